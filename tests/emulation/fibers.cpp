// The scheduler: a block's threads as fibers. Compiled without sanitizers; it tells AddressSanitizer
// of its stacks where that is loaded.
#include "fibers.hpp"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <numeric>
#include <string>
#include <utility>
#include <vector>

// Of AddressSanitizer, where it is loaded.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t size);

// Static shared memory: where shared.ld gathers it.
extern __attribute__((visibility("hidden"))) uint8_t kiln_shared_start[];
extern __attribute__((visibility("hidden"))) uint8_t kiln_shared_stop[];

// Saves the callee's registers and the stack pointer, and goes on where `to` was saved.
__attribute__((visibility("hidden"))) void kiln_switch(void** from, void* to);
}

#if defined(__x86_64__)
// Threads mostly wait where others do, so the processor's prediction of returns, which knows nothing
// of the switch, is right for the thread that goes on too.
asm(R"(
.text
.globl kiln_switch
.hidden kiln_switch
.type kiln_switch, @function
kiln_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kiln_switch, . - kiln_switch
)");
// Words that `kiln_switch` takes from a stack, where among them it goes on, and words above them:
// a function expects the stack to be 8 bytes off a multiple of 16.
constexpr size_t SAVED_WORDS = 7, ENTRY_WORD = 6, ABOVE_WORDS = 1;
#elif defined(__aarch64__)
asm(R"(
.text
.globl kiln_switch
.hidden kiln_switch
.type kiln_switch, %function
kiln_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    br x30
.size kiln_switch, . - kiln_switch
)");
constexpr size_t SAVED_WORDS = 20, ENTRY_WORD = 11, ABOVE_WORDS = 0;
#else
#error "the switch of fibers is written for x86-64 and aarch64"
#endif

namespace emulation {

Index thread_index, block_index, block_size, grid_size;
uint8_t* dynamic_shared_memory;

namespace {

constexpr uint32_t MAX_THREADS = 1024;
constexpr uint32_t WARP = 32;
constexpr uint32_t MAX_STATIC_SMEM_BYTES = 48 * 1024;
constexpr size_t STACK_BYTES = 256 * 1024;

// An odd number of pages: at a round distance, all stacks would share a few entries of the TLB.
const size_t GUARD_BYTES = static_cast<size_t>(sysconf(_SC_PAGESIZE));
const size_t STACK_STRIDE_BYTES = STACK_BYTES + GUARD_BYTES;

struct Copy {
    void* shared;
    const void* global;
    bool exists;
    uint32_t group;
};

// Where to go on, and what AddressSanitizer must know of its stack.
struct Context {
    void* stack_pointer;
    void* fake_stack;
    const void* stack;
    size_t stack_bytes;
};

// What a switch touches comes first, in one line of the cache.
struct alignas(64) Fiber : Context {
    uint32_t thread;
    int line;
    // What it waits in; null while it could run.
    const char* what;
    const char* file;
    bool ended;
    // Copies under way, oldest first from `first_copy`; `group` takes the next ones.
    uint32_t group;
    size_t first_copy;
    std::vector<Copy> copies;
};
static_assert(sizeof(Fiber) == 128);

// Lanes that wait for each other.
struct Group {
    Complete complete;
    uint32_t mask;
    uint32_t arrived;
};

struct Warp {
    uint32_t live;
    // Lanes that wait for the previous kernel.
    uint32_t waiting;
    uint32_t group_count;
    Group groups[WARP];
    void* operands[WARP];
};

struct Pool {
    uint8_t* stacks;
    uint32_t guarded;
    Fiber fibers[MAX_THREADS];
    Warp warps[MAX_THREADS / WARP];
    Fiber* ready[MAX_THREADS];
};

// Of the launch under way.
const Launch* launch;
Call call_kernel;
Pool* pool;
bool failed;
uint64_t random_state;
Context host;
// Of the block under way.
Fiber* current;
uint32_t ready_count;
uint32_t live_count;
uint32_t barrier_count;
const Fiber* barrier_first;
// Whether the previous kernel has ended, as far as the block is concerned, and whether a thread waited.
bool previous_ended;
bool waited_for_previous;

uint32_t random_below(uint32_t bound) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    uint64_t high = random_state * 0x2545f4914f6cdd1dull >> 32;
    return static_cast<uint32_t>(high * bound >> 32);
}

void switch_to(Context& from, Context& to, bool ends = false) {
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
    kiln_switch(&from.stack_pointer, to.stack_pointer);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void make_ready(Fiber& fiber) {
    fiber.what = nullptr;
    pool->ready[ready_count++] = &fiber;
}

// The last one made ready: a warp goes on until all of its lanes wait for others, while its stacks
// are in the cache. Odd seeds take any.
Fiber* take_ready() {
    Fiber*& last = pool->ready[ready_count - 1];
    if (launch->seed % 2 != 0) std::swap(last, pool->ready[random_below(ready_count)]);
    ready_count--;
    return last;
}

void wait_in(const char* what, const char* file, int line) {
    Fiber& fiber = *current;
    fiber.what = what;
    fiber.file = file;
    fiber.line = line;
}

// Backwards, so that the first is taken first.
void release_lanes(uint32_t warp, uint32_t lanes) {
    for (uint32_t lane = WARP; lane-- > 0;)
        if (lanes >> lane & 1) make_ready(pool->fibers[warp * WARP + lane]);
}

// Those lanes of every warp. Seeds permute warps.
void release_all(uint32_t Warp::*lanes) {
    uint8_t order[MAX_THREADS / WARP];
    uint32_t warps = (block_size.x + WARP - 1) / WARP;
    for (uint32_t i = 0; i < warps; i++) {
        uint32_t other = launch->seed == 0 ? i : random_below(i + 1);
        order[i] = order[other];
        order[other] = static_cast<uint8_t>(i);
    }
    while (warps-- > 0) release_lanes(order[warps], pool->warps[order[warps]].*lanes);
}

void hide() {
    if (!__asan_poison_memory_region) return;
    for (size_t i = 0; i < launch->hidden_count; i++)
        __asan_poison_memory_region(launch->hidden[i].start, launch->hidden[i].bytes);
}

void reveal() {
    if (!__asan_unpoison_memory_region) return;
    for (size_t i = 0; i < launch->hidden_count; i++)
        __asan_unpoison_memory_region(launch->hidden[i].start, launch->hidden[i].bytes);
}

void end_previous() {
    previous_ended = true;
    reveal();
    release_all(&Warp::waiting);
}

void release_barrier() {
    barrier_count = 0;
    release_all(&Warp::live);
}

// Runs others until the current thread is made ready and chosen. Where none can run, the host
// finds out why.
void yield(bool ends = false) {
    Fiber& from = *current;
    if (ready_count == 0 && waited_for_previous && !previous_ended && !failed) end_previous();
    if (ready_count == 0 || failed) {
        switch_to(from, host, ends);
        return;
    }
    Fiber& to = *take_ready();
    if (&to == &from) return;
    current = &to;
    thread_index.x = to.thread;
    switch_to(from, to, ends);
}

bool complete_group(uint32_t warp_index, Group& group) {
    Warp& warp = pool->warps[warp_index];
    if (group.arrived != (group.mask & warp.live)) return false;
    Group whole = group;
    group = warp.groups[--warp.group_count];
    whole.complete(warp.operands, whole.arrived);
    release_lanes(warp_index, whole.arrived);
    return true;
}

// "0-15", "0-3, 8, 9"
std::string list(const std::vector<uint32_t>& threads) {
    std::string text;
    for (size_t i = 0; i < threads.size();) {
        size_t end = i + 1;
        while (end < threads.size() && threads[end] == threads[end - 1] + 1) end++;
        if (!text.empty()) text += ", ";
        text += std::to_string(threads[i]);
        if (end - i > 1) text += (end - i > 2 ? "-" : ", ") + std::to_string(threads[end - 1]);
        i = end;
    }
    return text;
}

// Where each thread of the block is.
std::string whereabouts() {
    std::vector<std::pair<std::string, std::vector<uint32_t>>> places;
    for (uint32_t thread = 0; thread < block_size.x; thread++) {
        const Fiber& fiber = pool->fibers[thread];
        std::string place = "could go on";
        if (fiber.ended) place = "have ended";
        if (fiber.what) place = std::string("wait in ") + fiber.what + " (" + fiber.file + ":" + std::to_string(fiber.line) + ")";
        size_t found = 0;
        while (found < places.size() && places[found].first != place) found++;
        if (found == places.size()) places.push_back({place, {}});
        places[found].second.push_back(thread);
    }
    std::string text;
    for (const auto& [place, threads] : places)
        text += (text.empty() ? "threads " : "; threads ") + list(threads) + " " + place;
    return text;
}

void describe(const char* thread, const char* format, va_list arguments) {
    failed = true;
    int length = snprintf(launch->error, launch->error_bytes, "block (%u, %u, %u)%s: ", block_index.x, block_index.y,
                          block_index.z, thread);
    vsnprintf(launch->error + length, launch->error_bytes - length, format, arguments);
}

// An error of the block, not of one thread.
void fail_block(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    describe("", format, arguments);
    va_end(arguments);
}

void run_thread() {
    // The first thread of a launch comes from the host and learns of its stack.
    bool first = host.stack == nullptr;
    if (__sanitizer_finish_switch_fiber)
        __sanitizer_finish_switch_fiber(nullptr, first ? &host.stack : nullptr, first ? &host.stack_bytes : nullptr);
    call_kernel(launch->parameters);

    Fiber& fiber = *current;
    fiber.ended = true;
    live_count--;
    // Those who wait do not wait for a thread that has ended.
    uint32_t warp_index = fiber.thread / WARP;
    Warp& warp = pool->warps[warp_index];
    warp.live &= ~(1u << fiber.thread % WARP);
    for (uint32_t i = warp.group_count; i-- > 0;) complete_group(warp_index, warp.groups[i]);
    if (live_count > 0 && barrier_count == live_count) release_barrier();
    yield(true);
}

void prepare(Fiber& fiber, uint32_t thread) {
    uint8_t* stack = pool->stacks + thread * STACK_STRIDE_BYTES + GUARD_BYTES;
    fiber.stack = stack;
    fiber.stack_bytes = STACK_BYTES;
    fiber.fake_stack = nullptr;
    fiber.thread = thread;
    fiber.ended = false;
    fiber.copies.clear();
    fiber.first_copy = 0;
    fiber.group = 0;
    // Tops at different offsets in their pages: at the same one, all stacks would share a few
    // lines of the cache.
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES - thread % 64 * 64);
    top -= SAVED_WORDS + ABOVE_WORDS;
    memset(top, 0, (SAVED_WORDS + ABOVE_WORDS) * sizeof *top);
    top[ENTRY_WORD] = reinterpret_cast<void*>(run_thread);
    fiber.stack_pointer = top;
}

void run_block() {
    // As a number a NaN; but a flag that nobody wrote is to be false, too, under some seeds.
    uint8_t garbage = launch->seed & 2 ? 0 : 0xff;
    memset(dynamic_shared_memory, garbage, launch->dynamic_smem_bytes);
    if (__asan_unpoison_memory_region) {
        // Its memset would report the gaps between variables.
        for (volatile uint8_t* byte = kiln_shared_start; byte != kiln_shared_stop; byte++) *byte = garbage;
    } else {
        memset(kiln_shared_start, garbage, kiln_shared_stop - kiln_shared_start);
    }
    previous_ended = waited_for_previous = false;
    hide();
    ready_count = barrier_count = 0;
    live_count = block_size.x;
    for (uint32_t thread = 0; thread < block_size.x; thread++) prepare(pool->fibers[thread], thread);
    for (uint32_t first = 0; first < block_size.x; first += WARP) {
        Warp& warp = pool->warps[first / WARP];
        uint32_t lanes = block_size.x - first < WARP ? block_size.x - first : WARP;
        warp.live = lanes == WARP ? ~0u : (1u << lanes) - 1;
        warp.waiting = 0;
        warp.group_count = 0;
    }
    release_all(&Warp::live);

    current = take_ready();
    thread_index = {current->thread, 0, 0};
    switch_to(host, *current);
    current = nullptr;
    if (failed) return;
    if (live_count > 0) {
        fail_block("threads wait for others that do not come: %s", whereabouts().c_str());
    } else if (!waited_for_previous) {
        fail_block("no thread has called wait_for_previous()");
    }
}

// Stacks with a page before each that may not be touched.
bool make_pool() {
    pool = static_cast<Pool*>(*launch->pool);
    if (pool == nullptr) {
        void* stacks = mmap(nullptr, MAX_THREADS * STACK_STRIDE_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) return false;
        pool = new Pool{};
        pool->stacks = static_cast<uint8_t*>(stacks);
        *launch->pool = pool;
    }
    for (; pool->guarded < block_size.x; pool->guarded++) {
        uint8_t* guard = pool->stacks + pool->guarded * STACK_STRIDE_BYTES;
        if (mprotect(guard, GUARD_BYTES, PROT_NONE) != 0) return false;
    }
    return true;
}

// A sanitizer's report ends the process: say whose it is.
void name_thread() {
    if (launch == nullptr || current == nullptr) return;
    fprintf(stderr, "emulated: %s, block (%u, %u, %u), thread %u\n", launch->place, block_index.x, block_index.y,
            block_index.z, current->thread);
}

// Both sanitizers have a function of this name, and call what it was last given.
void set_death_callbacks() {
    using Hook = void (*)(void (*)());
    constexpr const char* NAME = "__sanitizer_set_death_callback";
    static const Hook of_addresses = reinterpret_cast<Hook>(dlsym(RTLD_DEFAULT, NAME));
    static void* const undefined_behaviour = dlopen("libubsan.so.1", RTLD_NOLOAD | RTLD_LAZY);
    static const Hook of_behaviour =
        undefined_behaviour ? reinterpret_cast<Hook>(dlsym(undefined_behaviour, NAME)) : nullptr;
    if (of_addresses) of_addresses(name_thread);
    if (of_behaviour) of_behaviour(name_thread);
}

}  // namespace

void fail(const char* format, ...) {
    char thread[24];
    snprintf(thread, sizeof thread, ", thread %u", current->thread);
    va_list arguments;
    va_start(arguments, format);
    describe(thread, format, arguments);
    va_end(arguments);
    yield();
    __builtin_unreachable();
}

bool refuse(const Launch& refused, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(refused.error, refused.error_bytes, format, arguments);
    va_end(arguments);
    return false;
}

void barrier(const char* file, int line) {
    wait_in("__syncthreads", file, line);
    if (barrier_count++ == 0) {
        barrier_first = current;
    } else if (barrier_first->line != line || (barrier_first->file != file && strcmp(barrier_first->file, file) != 0)) {
        fail("divergent __syncthreads: %s", whereabouts().c_str());
    }
    if (barrier_count == live_count) release_barrier();
    yield();
}

void collective(Complete complete, uint32_t mask, void* operand, const char* what, const char* file, int line) {
    uint32_t warp_index = current->thread / WARP;
    Warp& warp = pool->warps[warp_index];
    uint32_t bit = 1u << current->thread % WARP;
    wait_in(what, file, line);
    if (!(mask & bit)) fail("%s (%s:%d) is called by a lane that its mask 0x%08x leaves out", what, file, line, mask);

    Group* group = warp.groups;
    Group* end = warp.groups + warp.group_count;
    while (group != end && (group->complete != complete || group->mask != mask)) group++;
    if (group == end) {
        *group = {complete, mask, 0};
        warp.group_count++;
    }
    group->arrived |= bit;
    warp.operands[current->thread % WARP] = operand;
    complete_group(warp_index, *group);
    yield();
}

void wait_for_previous(const char* file, int line) {
    waited_for_previous = true;
    if (previous_ended) return;
    wait_in("wait_for_previous", file, line);
    pool->warps[current->thread / WARP].waiting |= 1u << current->thread % WARP;
    yield();
}

static void copy_now(const Copy& copy) {
    if (copy.exists) {
        memcpy(copy.shared, copy.global, 16);
    } else {
        memset(copy.shared, 0, 16);
    }
}

void start_copy(void* shared, const void* global, bool exists) {
    uint8_t* to = static_cast<uint8_t*>(shared);
    bool is_dynamic = to >= dynamic_shared_memory && to + 16 <= dynamic_shared_memory + launch->dynamic_smem_bytes;
    bool is_static = to >= kiln_shared_start && to + 16 <= kiln_shared_stop;
    if (!is_dynamic && !is_static) fail("copy_async to an address outside of shared memory");
    Fiber& fiber = *current;
    Copy copy = {shared, global, exists, fiber.group};
    if (launch->seed != 0 && random_below(2) == 0) {
        copy_now(copy);
    } else {
        fiber.copies.push_back(copy);
    }
}

void commit_copies() { current->group++; }

void wait_for_copies(int pending) {
    Fiber& fiber = *current;
    while (fiber.first_copy < fiber.copies.size() && fiber.copies[fiber.first_copy].group + pending < fiber.group)
        copy_now(fiber.copies[fiber.first_copy++]);
    if (fiber.first_copy == fiber.copies.size()) {
        fiber.copies.clear();
        fiber.first_copy = 0;
    }
}

bool run(const Launch& of, Call call) {
    launch = &of;
    call_kernel = call;
    failed = false;
    host = {};
    random_state = of.seed * 0x9e3779b97f4a7c15ull | 1;
    block_size = {of.block_threads, 1, 1};
    grid_size = {of.grid[0], of.grid[1], of.grid[2]};

    if (of.block_threads == 0 || of.block_threads > MAX_THREADS)
        return refuse(of, "a block of %u threads: it has 1 to %u", of.block_threads, MAX_THREADS);
    if (grid_size.x == 0 || grid_size.y == 0 || grid_size.z == 0 || grid_size.x > 0x7fffffff || grid_size.y > 65535 ||
        grid_size.z > 65535)
        return refuse(of, "no grid: (%u, %u, %u)", grid_size.x, grid_size.y, grid_size.z);
    // AddressSanitizer adds gaps to variables.
    size_t static_smem_bytes = __asan_unpoison_memory_region ? 0 : kiln_shared_stop - kiln_shared_start;
    if (static_smem_bytes > MAX_STATIC_SMEM_BYTES)
        return refuse(of, "%zu bytes of static shared memory: there are %u", static_smem_bytes, MAX_STATIC_SMEM_BYTES);
    if (of.dynamic_smem_bytes + static_smem_bytes > of.max_smem_bytes)
        return refuse(of, "%u dynamic and %zu static bytes of shared memory: there are %u", of.dynamic_smem_bytes,
                      static_smem_bytes, of.max_smem_bytes);
    if (!make_pool()) return refuse(of, "no memory for the stacks of %u threads", of.block_threads);
    // Of this size exactly, so that AddressSanitizer knows where it ends.
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, of.dynamic_smem_bytes) != 0) return refuse(of, "no memory to share");
    dynamic_shared_memory = static_cast<uint8_t*>(shared);
    if (__asan_unpoison_memory_region) set_death_callbacks();

    std::vector<uint64_t> order(uint64_t{grid_size.x} * grid_size.y * grid_size.z);
    std::iota(order.begin(), order.end(), uint64_t{0});
    if (of.seed != 0)
        for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(static_cast<uint32_t>(i))]);
    for (uint64_t block : order) {
        block_index.x = static_cast<uint32_t>(block % grid_size.x);
        block_index.y = static_cast<uint32_t>(block / grid_size.x % grid_size.y);
        block_index.z = static_cast<uint32_t>(block / grid_size.x / grid_size.y);
        run_block();
        if (failed) break;
    }
    free(shared);
    reveal();
    // Threads that were given up in the middle leave marks on their stacks.
    if (failed && __asan_unpoison_memory_region)
        for (uint32_t thread = 0; thread < block_size.x; thread++)
            __asan_unpoison_memory_region(pool->fibers[thread].stack, STACK_BYTES);
    launch = nullptr;
    return !failed;
}

void free_pool(void* freed) {
    Pool* old = static_cast<Pool*>(freed);
    if (old == nullptr) return;
    munmap(old->stacks, MAX_THREADS * STACK_STRIDE_BYTES);
    delete old;
}

}  // namespace emulation

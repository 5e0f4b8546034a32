// What emulated device code asks of the scheduler in fibers.cpp.
//
// A block's threads are fibers of one host thread, and blocks run one after another. A thread runs
// until it must wait for others, so between two synchronisation points it is alone: atomics are
// plain operations, and what a missing barrier breaks is broken in every run. The seed chooses the
// order of blocks and of the threads that could go on; seed 0 is the natural one. With odd seeds any
// thread may be next, with even ones any warp, which then goes as far as it can: the one shows what
// lanes of a warp do to each other, the other what a warp does that is far ahead.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulation {

struct Index {
    uint32_t x, y, z;
};

// Of the running thread.
extern Index thread_index, block_index, block_size, grid_size;
// Dynamic shared memory of the running block.
extern uint8_t* dynamic_shared_memory;

// Ends the launch with an error that names block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits for all threads of the block that have not ended.
void barrier(const char* file, int line);

// Waits for all lanes of `mask` that have not ended. The last to arrive runs `complete` for them:
// `operands` are by lane, and live until their lanes go on.
using Complete = void (*)(void* const* operands, uint32_t lanes);
void collective(Complete complete, uint32_t mask, void* operand, const char* what, const char* file, int line);

// Waits until the previous kernel has ended, which is as late as can be: when no thread of the block can
// go on without. Until then a launch's `hidden` memory may not be touched.
void wait_for_previous(const char* file, int line);

// Copies of 16 bytes to shared memory. With seed 0 they are as late as they may be: done by the wait
// for their group. With other seeds some are as early as they may be.
void start_copy(void* shared, const void* global, bool exists);
void commit_copies();
void wait_for_copies(int pending);

// The products of `mma.m16n8k16` for all lanes, whose operands are `Mma`s.
struct Mma {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
};
void complete_mma_f16(void* const* operands, uint32_t lanes);
void complete_mma_bf16(void* const* operands, uint32_t lanes);

struct Parameter {
    const void* bytes;
    size_t size;
};

struct Range {
    const void* start;
    size_t bytes;
};

// Mirrored in tests/src/emulation.rs.
struct Launch {
    const char* place;
    uint32_t grid[3];
    uint32_t block_threads;
    uint32_t dynamic_smem_bytes;
    uint32_t max_smem_bytes;
    uint64_t seed;
    const Parameter* parameters;
    size_t parameter_count;
    // What other kernels of the step write.
    const Range* hidden;
    size_t hidden_count;
    // Stacks and bookkeeping, made by the first launch and reused by the next.
    void** pool;
    char* error;
    size_t error_bytes;
};

// Calls the kernel as the running thread.
using Call = void (*)(const Parameter* parameters);

// Runs all blocks of a launch. Returns false, and fills `launch.error`, when something is wrong.
bool run(const Launch& launch, Call call);
// As `fail`, before the first block.
bool refuse(const Launch& launch, const char* format, ...) __attribute__((format(printf, 2, 3)));
void free_pool(void* pool);

}  // namespace emulation

// libcuda and libcublasLt for tests of what calls them, in one file that is loaded by both names. There is
// one GPU, an H200 by name. Its memory is the host's and kernels do nothing, but they take time on a clock
// of its own. Work waits in its stream until somebody waits for the stream, so that who reads too early
// finds what was there before. What a caller must not do fails; what was not given back is counted when the
// context is, as a line of the file MOCK_CUDA_LOG.
//
// A kernel's machine code is, behind an ELF header of 64 bytes, the number of its parameters and the bytes
// of each, as 32-bit words.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

// What kernels take, in microseconds. Those that may start before the one ahead has ended take less.
constexpr double KERNEL_US = 10000, OVERLAPPING_US = 4000, PRODUCT_US = 2500;
constexpr double COPY_BYTES_PER_US = 4.0e6;

enum Result { SUCCESS = 0, INVALID_VALUE = 1, INVALID_HANDLE = 400 };

namespace {

struct Event { bool timed; bool recorded = false; int waits = 0; double at_us = 0; };
// Of a graph: a kernel, or an event to be recorded.
struct Node { double us; Event* event; };
using Graph = std::vector<Node>;
struct Stream { bool capturing = false; Graph captured; std::deque<std::function<void()>> work; };
struct Module { std::vector<uint32_t> parameter_bytes; };

double now_us = 0;
std::map<std::string, int> live;
std::map<uint64_t, size_t> memory;
std::set<Stream*> streams;

template <class T, class... A> T* make(const char* kind, A... with) { ++live[kind]; return new T{with...}; }
template <class T> int unmake(const char* kind, T* made) { --live[kind]; delete made; return SUCCESS; }

void run(const Node& node) {
    if (!node.event) { now_us += node.us; return; }
    node.event->at_us = now_us;
    node.event->recorded = true;
}

void settle(Stream* stream) {
    for (; !stream->work.empty(); stream->work.pop_front()) stream->work.front()();
}

int kernel(Stream* stream, double us) {
    Node node{us, nullptr};
    if (stream->capturing) stream->captured.push_back(node);
    else stream->work.push_back([node] { run(node); });
    return SUCCESS;
}

bool is_memory(uint64_t start, size_t bytes) {
    auto after = memory.upper_bound(start);
    if (after == memory.begin()) return false;
    auto found = std::prev(after);
    return start + bytes <= found->first + found->second;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return SUCCESS; }
int cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
int cuDeviceGetCount(int* count) { *count = 1; return SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal == 0 ? SUCCESS : INVALID_VALUE; }
int cuDeviceGetName(char* name, int length, int) { std::snprintf(name, length, "NVIDIA H200"); return SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    const std::map<int, int> values{{16, 132}, {75, 9}, {76, 0}, {97, 232448}};
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return SUCCESS;
}
int cuGetErrorName(int, const char** text) { *text = "MOCK_ERROR"; return SUCCESS; }
int cuGetErrorString(int, const char** text) { *text = "what the mock does not allow"; return SUCCESS; }

int cuDevicePrimaryCtxRetain(void** context, int) { *context = &live; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) {
    const char* path = std::getenv("MOCK_CUDA_LOG");
    if (std::FILE* log = path ? std::fopen(path, "a") : nullptr) {
        for (auto& [kind, count] : live) std::fprintf(log, "%s %d ", kind.c_str(), count);
        std::fprintf(log, "\n");
        std::fclose(log);
    }
    return SUCCESS;
}
int cuCtxSetCurrent(void*) { return SUCCESS; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { *free = *total = size_t(4) << 30; return SUCCESS; }

int cuStreamCreate(Stream** stream, unsigned) { streams.insert(*stream = make<Stream>("streams")); return SUCCESS; }
int cuStreamSynchronize(Stream* stream) { settle(stream); return SUCCESS; }
int cuStreamDestroy_v2(Stream* stream) { streams.erase(stream); return unmake("streams", stream); }

int cuEventCreate(Event** event, unsigned flags) { *event = make<Event>("events", !(flags & 2)); return SUCCESS; }
// In a stream that is being captured it would mark a dependency, and no time.
int cuEventRecord(Event* event, Stream* stream) {
    if (stream->capturing) return INVALID_VALUE;
    ++event->waits;
    stream->work.push_back([event] { run({0, event}); --event->waits; });
    return SUCCESS;
}
int cuEventRecordWithFlags(Event* event, Stream* stream, unsigned flags) {
    if (flags != 1 || !stream->capturing) return INVALID_VALUE;
    stream->captured.push_back({0, event});
    return SUCCESS;
}
// The records of graphs are not waited for.
int cuEventSynchronize(Event* event) {
    if (event->waits) for (Stream* stream : streams) settle(stream);
    return SUCCESS;
}
int cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    for (Event* event : {start, end}) if (!event->timed || !event->recorded) return INVALID_HANDLE;
    *milliseconds = float((end->at_us - start->at_us) / 1e3);
    return SUCCESS;
}
int cuEventDestroy_v2(Event* event) { return unmake("events", event); }

int cuMemHostAlloc(void** start, size_t bytes, unsigned) { ++live["pinned"]; *start = std::malloc(bytes); return SUCCESS; }
int cuMemFreeHost(void* start) { --live["pinned"]; std::free(start); return SUCCESS; }
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    ++live["memory"];
    *address = uint64_t(std::calloc(bytes, 1));
    memory[*address] = bytes;
    return SUCCESS;
}
int cuMemFree_v2(uint64_t address) { --live["memory"]; memory.erase(address); std::free((void*)address); return SUCCESS; }
// Memory is of zeros, and nobody reads what else it is set to.
int cuMemsetD8Async(uint64_t to, unsigned char, size_t bytes, Stream*) { return is_memory(to, bytes) ? SUCCESS : INVALID_VALUE; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
    if (!is_memory(to, bytes)) return INVALID_VALUE;
    stream->work.push_back([=] { std::memcpy((void*)to, from, bytes); });
    return SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
    if (!is_memory(from, bytes)) return INVALID_VALUE;
    stream->work.push_back([=] { std::memcpy(to, (void*)from, bytes); });
    return SUCCESS;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
    if (!is_memory(to, bytes) || !is_memory(from, bytes)) return INVALID_VALUE;
    return kernel(stream, 2 * bytes / COPY_BYTES_PER_US);
}

int cuModuleLoadData(Module** module, const char* image) {
    uint32_t count;
    std::memcpy(&count, image + 64, 4);
    *module = make<Module>("modules");
    (*module)->parameter_bytes.resize(count);
    std::memcpy((*module)->parameter_bytes.data(), image + 68, 4 * count);
    return SUCCESS;
}
int cuModuleGetFunction(Module** function, Module* module, const char*) { *function = module; return SUCCESS; }
int cuModuleUnload(Module* module) { return unmake("modules", module); }
int cuFuncSetAttribute(Module*, int, int) { return SUCCESS; }
int cuFuncGetParamInfo(Module* function, size_t index, size_t* offset, size_t* bytes) {
    if (index >= function->parameter_bytes.size()) return INVALID_VALUE;
    *offset = 0;
    *bytes = function->parameter_bytes[index];
    return SUCCESS;
}

struct LaunchConfig { unsigned grid[3], block[3], smem_bytes; Stream* stream; void* attributes; unsigned attribute_count; };
// A launch may overlap with a kernel alone.
int cuLaunchKernelEx(const LaunchConfig* config, Module*, void**, void**) {
    bool overlaps = config->attribute_count > 0;
    const Graph& ahead = config->stream->captured;
    if (overlaps && (ahead.empty() || ahead.back().event)) return INVALID_VALUE;
    return kernel(config->stream, overlaps ? OVERLAPPING_US : KERNEL_US);
}

int cuStreamBeginCapture_v2(Stream* stream, int) {
    if (stream->capturing) return INVALID_VALUE;
    stream->capturing = true;
    return SUCCESS;
}
int cuStreamEndCapture(Stream* stream, Graph** graph) {
    if (!stream->capturing) return INVALID_VALUE;
    stream->capturing = false;
    *graph = make<Graph>("graphs");
    (*graph)->swap(stream->captured);
    return SUCCESS;
}
int cuGraphInstantiateWithFlags(Graph** instance, Graph* graph, unsigned long long) {
    *instance = make<Graph>("instances", *graph);
    return SUCCESS;
}
int cuGraphLaunch(Graph* graph, Stream* stream) {
    stream->work.push_back([graph] { for (const Node& node : *graph) run(node); });
    return SUCCESS;
}
int cuGraphDestroy(Graph* graph) { return unmake("graphs", graph); }
int cuGraphExecDestroy(Graph* graph) { return unmake("instances", graph); }

// ---- cuBLASLt: products in 16 bits of matrices whose columns lie one after another ----

struct Product { bool transposes_a = false; };
struct Layout { uint64_t rows, columns; };

int cublasLtCreate(int** library) { *library = make<int>("libraries"); return SUCCESS; }
int cublasLtDestroy(int* library) { return unmake("libraries", library); }
int cublasLtMatmulDescCreate(Product** product, int, int) { *product = make<Product>("products"); return SUCCESS; }
int cublasLtMatmulDescDestroy(Product* product) { return unmake("products", product); }
int cublasLtMatmulDescSetAttribute(Product* product, int attribute, const int* value, size_t bytes) {
    if (attribute != 3 || bytes != 4) return INVALID_VALUE;
    product->transposes_a = *value == 1;
    return SUCCESS;
}
int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    if (type != 2 || stride != int64_t(rows)) return INVALID_VALUE;
    *layout = make<Layout>("layouts", rows, columns);
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) { return unmake("layouts", layout); }
int cublasLtMatmulPreferenceCreate(int** preference) { *preference = make<int>("preferences"); return SUCCESS; }
int cublasLtMatmulPreferenceDestroy(int* preference) { return unmake("preferences", preference); }
int cublasLtMatmulPreferenceSetAttribute(int*, int attribute, const size_t*, size_t bytes) {
    return attribute == 1 && bytes == sizeof(size_t) ? SUCCESS : INVALID_VALUE;
}
int cublasLtMatmulAlgoGetHeuristic(int*, Product*, Layout*, Layout*, Layout*, Layout*, int*, int, void*, int* count) {
    *count = 1;
    return SUCCESS;
}
int cublasLtMatmul(int*, Product* product, const float* alpha, uint64_t a, Layout* a_is, uint64_t b, Layout* b_is, const float* beta,
                   uint64_t, Layout*, uint64_t d, Layout* d_is, const void*, uint64_t workspace, size_t workspace_bytes, Stream* stream) {
    auto holds = [](uint64_t start, const Layout* is) { return is_memory(start, 2 * is->rows * is->columns); };
    bool fits = product->transposes_a && a_is->rows == b_is->rows && d_is->rows == a_is->columns && d_is->columns == b_is->columns;
    bool sound = holds(a, a_is) && holds(b, b_is) && holds(d, d_is) && is_memory(workspace, workspace_bytes);
    if (!fits || !sound || *alpha != 1 || *beta != 0) return 7;
    return kernel(stream, PRODUCT_US);
}

}

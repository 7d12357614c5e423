// A GPU made of this machine's CPU: CUDA's driver, for the program's real CUDA build to run on where there is no GPU.
//
// Device memory is the process' own, a launch runs the kernel's PTX on the CPU (libkernels.so, made by ptx.py) before it
// returns, and what is captured into a graph runs when the graph is launched. What a program on one stream can tell from a
// GPU is kept: rules of capture, freed and fresh memory that holds NaN, kernels that are given memory which is not theirs.
// libraries.cpp has the parts of cuBLAS, cuBLASLt, cuDNN and cuRAND that are called.
//
//   STANDIN=run     everything is computed (default)
//   STANDIN=check   and every access of a kernel is checked against the memory that is allocated (slow)
//   STANDIN=count   nothing is computed, and memory is taken but not touched: for shapes that no CPU has time for
//   STANDIN_LOG=F   what was launched, allocated and waited for between one wait and the next, a line of JSON each, goes to F
//   STANDIN_MEMORY  GiB that the device claims to have (default 80)
#include "standin.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <memory>

namespace standin {
namespace {

Mode mode_from_environment() {
    const char* name = getenv("STANDIN");
    if (!name || !strcmp(name, "run")) return Mode::Run;
    if (!strcmp(name, "check")) return Mode::Check;
    if (!strcmp(name, "count")) return Mode::Count;
    fprintf(stderr, "stand-in: STANDIN is run, check or count, not %s\n", name);
    exit(1);
}

struct Block {
    size_t bytes, mapped;
    struct Graph* graph;  // whose launch it belongs to, if any
};

struct Graph {
    std::vector<Work> work;
    std::multimap<size_t, char*> freed;  // blocks that a later allocation of the capture takes again
    std::vector<char*> blocks;
    std::map<std::string, Tally> tally;
    size_t live = 0, peak = 0;
    ~Graph();
};

struct Function {
    std::string name;
    const KernelInfo* info;
    int shared = 48 << 10;  // bytes of dynamic shared memory that it may have
};

struct State {
    Mode mode = mode_from_environment();
    std::map<char*, Block> blocks;         // by address
    std::multimap<size_t, char*> kept;     // freed, by bytes
    size_t live = 0, peak = 0, total = (getenv("STANDIN_MEMORY") ? atoll(getenv("STANDIN_MEMORY")) : 80) << 30;
    std::list<Function> functions;
    std::unique_ptr<Graph> capture;
    bool broken_capture = false;
    FILE* log = nullptr;
    std::map<std::string, Tally> tally;
    size_t to_device = 0, from_device = 0, allocations = 0, graphs = 0, in_graphs = 0;
    const KernelInfo* (*find)(const char*) = nullptr;
    const char* (*run)(const KernelInfo*, void* const*, const unsigned*, const unsigned*, unsigned) = nullptr;
    CUresult error = CUDA_SUCCESS;  // of a kernel: it stays, as on a GPU

    State() {
        if (const char* path = getenv("STANDIN_LOG")) log = fopen(path, "w");
        Dl_info here;
        dladdr((void*)mode_from_environment, &here);
        const std::string folder = std::string(here.dli_fname).substr(0, std::string(here.dli_fname).rfind('/'));
        void* kernels = dlopen((folder + "/libkernels.so").c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!kernels) {
            fprintf(stderr, "stand-in: %s\n", dlerror());
            exit(1);
        }
        find = (decltype(find))dlsym(kernels, "kernel_find");
        run = (decltype(run))dlsym(kernels, "kernel_run");
        if (mode == Mode::Check) {
            auto check = (void (*)(bool (*)(const void*, size_t)))dlsym(kernels, "kernel_memory");
            check([](const void* address, size_t bytes) { return is_device(address, bytes); });
        }
    }
};

State& state() {
    static State* all = new State;  // never destroyed: the program's own threads may outlive static objects
    return *all;
}

// Memory as the device would give it: aligned, with a page behind it that nobody may touch. Where nothing is computed, blocks
// are kept and taken again, so that the host's time is the program's.
char* take(size_t bytes, Graph* graph) {
    State& s = state();
    const size_t size = bytes ? bytes : 1, mapped = ((size + 4095) & ~size_t(4095)) + 4096;
    const auto kept = s.kept.find(mapped);
    if (kept != s.kept.end()) {
        char* base = kept->second;
        s.kept.erase(kept);
        s.blocks[base] = {size, mapped, graph};
        return base;
    }
    char* base = (char*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    mprotect(base + mapped - 4096, 4096, PROT_NONE);
    if (s.mode != Mode::Count) memset(base, 0xff, size);
    s.blocks[base] = {size, mapped, graph};
    return base;
}
void give_back(char* base) {
    State& s = state();
    const auto found = s.blocks.find(base);
    if (s.mode == Mode::Count)
        s.kept.emplace(found->second.mapped, base);
    else
        munmap(base, found->second.mapped);
    s.blocks.erase(found);
}

Graph::~Graph() {
    for (char* block : blocks) give_back(block);
}

// What happened since the last wait, as a line of the log.
void segment(const char* why) {
    State& s = state();
    if (!s.log) return;
    fprintf(s.log, "{\"wait\": \"%s\", \"live\": %zu, \"peak\": %zu, \"allocations\": %zu, \"to_device\": %zu, \"from_device\": %zu, "
            "\"graphs\": %zu, \"in_graphs\": %zu, \"kernels\": {", why, s.live, s.peak, s.allocations, s.to_device, s.from_device, s.graphs,
            s.in_graphs);
    const char* comma = "";
    for (const auto& [name, t] : s.tally) {
        fprintf(s.log, "%s\"%s\": [%zu, %.0f, %.0f, %.9f]", comma, name.c_str(), t.launches, t.bytes, t.flops, t.seconds);
        comma = ", ";
    }
    fprintf(s.log, "}}\n");
    fflush(s.log);
    s.tally.clear();
    s.to_device = s.from_device = s.allocations = s.graphs = s.in_graphs = 0;
}

// A call that would wait or that a graph cannot hold: fine outside a capture, the end of one inside.
CUresult outside_capture(const char* what) {
    State& s = state();
    if (!s.capture) return s.error;
    fprintf(stderr, "stand-in: %s during a capture\n", what);
    s.broken_capture = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult wait(const char* why) {
    const CUresult found = outside_capture(why);
    if (found == CUDA_SUCCESS) segment(why);
    return found;
}

CUresult allocate(CUdeviceptr* address, size_t bytes) {
    State& s = state();
    s.allocations++;
    if (Graph* graph = s.capture.get()) {
        // a graph's own memory: freed blocks are taken again, as the driver does
        const auto free = graph->freed.lower_bound(bytes);
        char* block;
        if (free != graph->freed.end() && free->first < 2 * bytes + 4096) {
            block = free->second;
            graph->freed.erase(free);
        } else {
            block = take(bytes, graph);
            if (!block) return CUDA_ERROR_OUT_OF_MEMORY;
            graph->blocks.push_back(block);
        }
        graph->live += s.blocks[block].bytes;
        graph->peak = std::max(graph->peak, graph->live);
        if (s.mode != Mode::Count) graph->work.push_back([block, bytes] { memset(block, 0xff, bytes); });
        *address = (CUdeviceptr)block;
        return CUDA_SUCCESS;
    }
    if (s.live + bytes > s.total) return CUDA_ERROR_OUT_OF_MEMORY;
    char* block = take(bytes, nullptr);
    if (!block) return CUDA_ERROR_OUT_OF_MEMORY;
    s.live += bytes;
    s.peak = std::max(s.peak, s.live);
    *address = (CUdeviceptr)block;
    return CUDA_SUCCESS;
}

CUresult release(CUdeviceptr address) {
    State& s = state();
    if (!address) return CUDA_SUCCESS;
    const auto found = s.blocks.find((char*)address);
    if (found == s.blocks.end()) {
        fprintf(stderr, "stand-in: memory is freed that is not allocated\n");
        return CUDA_ERROR_INVALID_VALUE;
    }
    Block& block = found->second;
    if (s.capture) {
        if (block.graph != s.capture.get()) {
            fprintf(stderr, "stand-in: memory from outside is freed during a capture\n");
            s.broken_capture = true;
            return CUDA_ERROR_INVALID_VALUE;
        }
        s.capture->freed.emplace(block.bytes, (char*)address);
        s.capture->live -= block.bytes;
        return CUDA_SUCCESS;
    }
    if (block.graph) {
        fprintf(stderr, "stand-in: memory of a graph is freed outside of it\n");
        return CUDA_ERROR_INVALID_VALUE;
    }
    s.live -= block.bytes;
    give_back((char*)address);
    return CUDA_SUCCESS;
}

}  // namespace

Mode mode() { return state().mode; }

size_t bytes_from(const void* address) {
    State& s = state();
    auto found = s.blocks.upper_bound((char*)address);
    if (found == s.blocks.begin()) return 0;
    --found;
    const size_t offset = (const char*)address - found->first;
    return offset < found->second.bytes ? found->second.bytes - offset : 0;
}
bool is_device(const void* address, size_t bytes) { return bytes_from(address) >= bytes; }

void submit(const char* name, double bytes, double flops, double seconds, Work work) {
    State& s = state();
    Tally& t = (s.capture ? s.capture->tally : s.tally)[name];
    t.launches++;
    t.bytes += bytes;
    t.flops += flops;
    t.seconds += seconds;
    if (s.capture) {
        s.capture->work.push_back(std::move(work));
    } else if (s.mode != Mode::Count) {
        work();
    }
}

}  // namespace standin

using namespace standin;

#define API extern "C" __attribute__((visibility("default"))) CUresult

API cuInit(unsigned) { return CUDA_SUCCESS; }
API cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
API cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS; }
API cuDeviceGetName(char* name, int length, CUdevice) { return snprintf(name, length, "a CPU in a GPU's place"), CUDA_SUCCESS; }
API cuDeviceTotalMem_v2(size_t* bytes, CUdevice) { return *bytes = state().total, CUDA_SUCCESS; }
API cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MOST_SHARED; break;
        default: *value = 0; return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return *context = (CUcontext)0x10, CUDA_SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
API cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)0x10, CUDA_SUCCESS; }
API cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API cuCtxSynchronize() { return wait("cuCtxSynchronize"); }

API cuStreamCreate(CUstream* stream, unsigned) { return *stream = (CUstream)0x20, CUDA_SUCCESS; }
API cuStreamDestroy_v2(CUstream) { return CUDA_SUCCESS; }
API cuStreamSynchronize(CUstream) { return wait("cuStreamSynchronize"); }
API cuStreamWaitEvent(CUstream, CUevent, unsigned) { return CUDA_SUCCESS; }
API cuEventCreate(CUevent* event, unsigned) { return *event = (CUevent)0x30, CUDA_SUCCESS; }
API cuEventDestroy_v2(CUevent) { return CUDA_SUCCESS; }
API cuEventRecord(CUevent, CUstream) { return CUDA_SUCCESS; }
API cuEventSynchronize(CUevent) { return wait("cuEventSynchronize"); }

API cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice) { return *pool = (CUmemoryPool)0x40, CUDA_SUCCESS; }
API cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice) { return *pool = (CUmemoryPool)0x40, CUDA_SUCCESS; }
API cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute attribute, void*) {
    State& s = state();
    if (attribute == CU_MEMPOOL_ATTR_USED_MEM_HIGH || attribute == CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH) s.peak = s.live;
    return CUDA_SUCCESS;
}
// What the driver reserves beyond what is used is its own secret: here it is what was used at most.
API cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute attribute, void* value) {
    State& s = state();
    const bool high = attribute != CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
    *(cuuint64_t*)value = high ? s.peak : s.live;
    return CUDA_SUCCESS;
}
API cuMemGetInfo_v2(size_t* free, size_t* total) {
    State& s = state();
    return *total = s.total, *free = s.total - s.live, CUDA_SUCCESS;
}
API cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream) { return allocate(address, bytes); }
API cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    const CUresult found = wait("cuMemAlloc");
    return found ? found : allocate(address, bytes);
}
API cuMemFreeAsync(CUdeviceptr address, CUstream) { return release(address); }
API cuMemFree_v2(CUdeviceptr address) {
    const CUresult found = wait("cuMemFree");
    return found ? found : release(address);
}

static CUresult copy(const char* what, void* to, const void* from, size_t bytes, bool from_device, bool to_device) {
    State& s = state();
    if ((from_device && !is_device(from, bytes)) || (to_device && !is_device(to, bytes))) {
        fprintf(stderr, "stand-in: %s of %zu bytes is not within allocated memory\n", what, bytes);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (!(from_device && to_device)) {
        // the source of a captured copy would be read at each launch, when the host's memory may be something else
        const CUresult found = outside_capture(what);
        if (found) return found;
        (to_device ? s.to_device : s.from_device) += bytes;
        if (s.mode != Mode::Count)
            memcpy(to, from, bytes);
        else if (from_device)
            memset(to, 0, bytes);
        return CUDA_SUCCESS;
    }
    submit(what, 2.0 * bytes, 0, 0, [=] { memmove(to, from, bytes); });
    return s.error;
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
    // ordinary memory of more than 64 KiB is copied in two steps, and the call waits for the first
    if (bytes > (64 << 10)) {
        const CUresult found = wait("a large copy to the device");
        if (found) return found;
    }
    return copy("cuMemcpyHtoDAsync", (void*)to, from, bytes, false, true);
}
API cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) { return copy("cuMemcpyHtoD", (void*)to, from, bytes, false, true); }
API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream) {
    const CUresult found = wait("a copy from the device");
    return found ? found : copy("cuMemcpyDtoHAsync", to, (const void*)from, bytes, true, false);
}
API cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) { return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
    return copy("cuMemcpyDtoDAsync", (void*)to, (const void*)from, bytes, true, true);
}
API cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream) {
    if (!is_device((void*)to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    submit("cuMemsetD8Async", bytes, 0, 0, [=] { memset((void*)to, value, bytes); });
    return state().error;
}
API cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) { return cuMemsetD8Async(to, value, bytes, nullptr); }

// Kernels are found by their names, whatever module they are asked of.
API cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)image, outside_capture("loading a module"); }
API cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    State& s = state();
    const KernelInfo* info = s.find(name);
    if (!info) {
        fprintf(stderr, "stand-in: no kernel %s was translated\n", name);
        return CUDA_ERROR_NOT_FOUND;
    }
    s.functions.push_back({name, info});
    *function = (CUfunction)&s.functions.back();
    return CUDA_SUCCESS;
}
API cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    Function& f = *(Function*)function;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value + (int)f.info->static_shared > MOST_SHARED) return CUDA_ERROR_INVALID_VALUE;
    f.shared = value;
    return CUDA_SUCCESS;
}

API cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   CUstream, void** parameters, void**) {
    State& s = state();
    if (s.error) return s.error;
    const Function& f = *(Function*)function;
    const bool sizes = gx && gy && gz && bx && by && bz && bx * by * bz <= 1024 && gx <= 0x7fffffff && gy <= 65535 && gz <= 65535;
    if (!sizes || (int)(shared + f.info->static_shared) > std::max(f.shared, 48 << 10)) {
        fprintf(stderr, "stand-in: %s cannot be launched with a grid of %u %u %u, blocks of %u %u %u and %u bytes\n", f.name.c_str(), gx,
                gy, gz, bx, by, bz, shared);
        return CUDA_ERROR_INVALID_VALUE;
    }
    struct Launch {
        std::vector<unsigned long long> values;
        std::vector<void*> addresses;
    };
    auto launch = std::make_shared<Launch>();
    launch->values.resize(f.info->parameters);
    double bytes = 0;
    std::vector<const void*> seen;
    for (unsigned i = 0; i < f.info->parameters; i++) {
        if (f.info->sizes[i] > 8) {
            fprintf(stderr, "stand-in: parameter %u of %s has %u bytes\n", i, f.name.c_str(), f.info->sizes[i]);
            return CUDA_ERROR_INVALID_VALUE;
        }
        memcpy(&launch->values[i], parameters[i], f.info->sizes[i]);
        const void* address = (const void*)launch->values[i];
        if (f.info->sizes[i] == 8 && std::find(seen.begin(), seen.end(), address) == seen.end()) {
            bytes += bytes_from(address);  // the tensors that it was given, each once
            seen.push_back(address);
        }
    }
    for (auto& value : launch->values) launch->addresses.push_back(&value);
    const auto [flops, seconds] = floor_of(f.name, launch->values, gx, gy, gz, bytes);
    submit(f.name.c_str(), bytes, flops, seconds, [=] {
        const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
        State& s = state();
        if (s.error) return;
        if (const char* wrong = s.run(((Function*)function)->info, launch->addresses.data(), grid, block, shared)) {
            fprintf(stderr, "stand-in: %s: %s\n", ((Function*)function)->name.c_str(), wrong);
            s.error = CUDA_ERROR_ILLEGAL_ADDRESS;
        }
    });
    return s.error;
}

API cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode) {
    State& s = state();
    if (s.capture) return CUDA_ERROR_ILLEGAL_STATE;
    s.capture.reset(new Graph);
    s.broken_capture = false;
    return CUDA_SUCCESS;
}
API cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
    *status = state().capture ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}
API cuStreamEndCapture(CUstream, CUgraph* graph) {
    State& s = state();
    *graph = nullptr;
    if (!s.capture) return CUDA_ERROR_ILLEGAL_STATE;
    Graph* made = s.capture.release();
    if (s.broken_capture) return delete made, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (made->live) return fprintf(stderr, "stand-in: a graph ends with %zu bytes of its own memory in use\n", made->live), delete made, CUDA_ERROR_INVALID_VALUE;
    *graph = (CUgraph)made;
    return CUDA_SUCCESS;
}
API cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    return *executable = (CUgraphExec)graph, outside_capture("making a graph");
}
API cuGraphUpload(CUgraphExec, CUstream) { return CUDA_SUCCESS; }
API cuGraphExecDestroy(CUgraphExec) { return CUDA_SUCCESS; }
API cuGraphDestroy(CUgraph graph) { return delete (Graph*)graph, CUDA_SUCCESS; }
API cuGraphLaunch(CUgraphExec executable, CUstream) {
    State& s = state();
    const CUresult found = outside_capture("launching a graph");
    if (found) return found;
    Graph& graph = *(Graph*)executable;
    s.graphs++;
    for (const auto& [name, t] : graph.tally) {
        Tally& all = s.tally[name];
        all.launches += t.launches, all.bytes += t.bytes, all.flops += t.flops, all.seconds += t.seconds;
        s.in_graphs += t.launches;
    }
    s.peak = std::max(s.peak, s.live + graph.peak);
    if (s.mode != Mode::Count)
        for (const Work& work : graph.work) work();
    return s.error;
}

API cuGetErrorName(CUresult error, const char** name) {
    static std::map<CUresult, std::string> names;
    names[error] = "error " + std::to_string((int)error) + " of the stand-in for a GPU";
    return *name = names[error].c_str(), CUDA_SUCCESS;
}
API cuGetErrorString(CUresult error, const char** text) { return cuGetErrorName(error, text); }

// The rest of a run, when the program ends.
__attribute__((destructor)) static void finish() { segment("the end"); }

// A GPU for checks: the kernels' source compiled as C++, where the threads of a block are fibers.
//
// A fiber runs until it meets a barrier (of its block or of its warp: shuffles and matrix fragments are exchanges behind
// a barrier) and goes on when all have met it. Barriers that not all threads reach are an error here, as they would be
// on a GPU. Threads run in three orders: the first warp as far ahead of the others as barriers let it, the last one, and
// all side by side in random order; asynchronous copies arrive at once in the first order and when they are waited for in
// the others. Where a barrier or a wait is missing, the three give different numbers. Dynamic shared memory starts as NaN.
//
// Where STANDIN_KERNELS names a libkernels.so (tools/cuda/standin), launches go to its kernels instead, which come from the
// compiler's PTX: the same checks hold the compiled code.
#pragma once

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define KERNEL static void
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::shared_memory

struct bf16 {
    uint16_t bits;
};
struct f16 {
    _Float16 value;
};
static inline float __bfloat162float(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
// To nearest, ties to even.
static inline bf16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {(uint16_t)0x7fff};
    return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
static inline float __half2float(f16 x) { return (float)x.value; }
static inline f16 __float2half_rn(float x) { return {(_Float16)x}; }
using std::isfinite;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

enum State { READY, AT_BLOCK, AT_WARP, DONE };
struct Copy {
    void* to;
    unsigned char data[16];
};
struct Fiber {
    ucontext_t start;
    jmp_buf jump;
    std::vector<char> stack;
    State state;
    bool started;
    unsigned exchanges;
    std::vector<std::vector<Copy>> copies;  // groups, the last one open
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline unsigned current;
inline dim3 block_dim, grid_dim, block_idx;
inline std::function<void()> body;
alignas(64) inline unsigned char shared_memory[256 << 10];
// What a thread shows to its warp, for exchanges of even and odd number: those who are late still read the one before.
alignas(16) inline unsigned char slots[2][1024][64];
inline size_t shared_size;
inline int order = 0;
inline std::mt19937 shuffler(7);

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "emulator: %s (block %u %u %u, thread %u)\n", what, block_idx.x, block_idx.y, block_idx.z, current);
    exit(1);
}

inline void wait(State state) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    if (_setjmp(fiber.jump) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
    body();
    Fiber& fiber = fibers[current];
    if (!fiber.copies.back().empty() || fiber.copies.size() > 1) {
        for (const auto& group : fiber.copies)
            if (!group.empty()) fail("an asynchronous copy was never waited for");
    }
    fiber.state = DONE;
    _longjmp(scheduler, 1);
}

// Runs one fiber to its next barrier.
inline void resume(unsigned index) {
    current = index;
    if (_setjmp(scheduler) == 0) {
        Fiber& fiber = fibers[index];
        if (fiber.started) _longjmp(fiber.jump, 1);
        fiber.started = true;
        setcontext(&fiber.start);
    }
}

// Releases those who wait for each other and all have come; whether there were any.
inline bool release(unsigned from, unsigned to, State state) {
    unsigned waiting = 0, done = 0;
    for (unsigned i = from; i < to; i++) {
        waiting += fibers[i].state == state;
        done += fibers[i].state == DONE;
    }
    if (waiting == 0 || waiting + done < to - from) return false;
    current = from;
    if (done > 0) fail("some threads have ended before a barrier of the others");
    for (unsigned i = from; i < to; i++) fibers[i].state = READY;
    return true;
}

inline void run_block(unsigned threads) {
    while (fibers.size() < threads) {
        fibers.emplace_back();
        fibers.back().stack.resize(128 << 10);
    }
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
        fiber.state = READY;
        fiber.started = false;
        fiber.exchanges = 0;
        fiber.copies.assign(1, {});
    }
    std::vector<unsigned> turns(threads);
    for (unsigned i = 0; i < threads; i++) turns[i] = order == 1 ? threads - 1 - i : i;
    auto step = [&](unsigned from, unsigned to) {
        bool progress = false;
        for (unsigned i = from; i < to; i++)
            if (fibers[turns[i]].state == READY) {
                resume(turns[i]);
                progress = true;
            }
        return progress;
    };
    for (;;) {
        bool progress = false;
        if (order == 2) {
            // all warps side by side, in random order
            std::shuffle(turns.begin(), turns.end(), shuffler);
            progress = step(0, threads);
            for (unsigned warp = 0; warp < threads; warp += 32)
                progress |= release(warp, std::min(warp + 32, threads), AT_WARP);
        } else {
            // each warp as far ahead of the others as the block's barriers let it
            for (unsigned i = 0; i < threads; i += 32) {
                const unsigned warp = order == 1 ? (threads - 1 - i) / 32 * 32 : i;
                do {
                    progress |= step(i, std::min(i + 32, threads));
                } while (release(warp, std::min(warp + 32, threads), AT_WARP));
            }
        }
        bool alive = false;
        for (unsigned i = 0; i < threads; i++) alive |= fibers[i].state != DONE;
        if (!alive) return;
        progress |= release(0, threads, AT_BLOCK);
        if (!progress) fail("threads wait for each other at different barriers");
    }
}

// A kernel by its name and its source.
template <typename... P> struct Kernel {
    const char* name;
    void (*source)(P...);
};
template <typename... P> Kernel<P...> kernel(const char* name, void (*source)(P...)) { return {name, source}; }
template <typename T, typename F, typename B, typename H> auto by_type(F f32_kernel, B bf16_kernel, H f16_kernel) {
    if constexpr (std::is_same<T, float>::value) {
        return f32_kernel;
    } else if constexpr (std::is_same<T, bf16>::value) {
        return bf16_kernel;
    } else {
        return f16_kernel;
    }
}
#define KERNEL_NAMED(NAME) emulator::kernel(#NAME, NAME)
#define KERNEL_OF(NAME, T) \
    emulator::by_type<T>(KERNEL_NAMED(NAME##_f32), KERNEL_NAMED(NAME##_bf16), KERNEL_NAMED(NAME##_f16))

// A launch of the kernel in the library of STANDIN_KERNELS; false where there is none.
inline bool launch_compiled(const char* name, void* const* parameters, dim3 grid, unsigned threads, size_t shared) {
    static const char* path = getenv("STANDIN_KERNELS");
    if (!path) return false;
    static void* library = dlopen(path, RTLD_NOW);
    if (!library) fail(dlerror());
    static const auto find = (const void* (*)(const char*))dlsym(library, "kernel_find");
    static const auto run = (const char* (*)(const void*, void* const*, const unsigned*, const unsigned*, unsigned))dlsym(
        library, "kernel_run");
    static const auto set_order = (void (*)(int))dlsym(library, "kernel_order");
    const void* found = find(name);
    if (!found) fail((std::string("no kernel ") + name + " in " + path).c_str());
    set_order(order);
    const unsigned blocks[3] = {grid.x, grid.y, grid.z}, block[3] = {threads, 1, 1};
    if (const char* error = run(found, parameters, blocks, block, (unsigned)shared)) fail(error);
    return true;
}

// <<<grid, threads, shared>>>
template <typename... P, typename... A> void launch(dim3 grid, unsigned threads, size_t shared, Kernel<P...> kernel, A&&... arguments) {
    if (threads > 1024 || shared > (99 << 10) || grid.y > 65535 || grid.z > 65535) fail("such a launch is not possible");
    std::tuple<P...> parameters(static_cast<P>(arguments)...);
    void* addresses[sizeof...(P)];
    std::apply([&](auto&... parameter) { size_t i = 0; ((addresses[i++] = (void*)&parameter), ...); }, parameters);
    if (launch_compiled(kernel.name, addresses, grid, threads, shared)) return;
    grid_dim = grid;
    block_dim = {threads, 1, 1};
    body = [&] { std::apply(kernel.source, parameters); };
    shared_size = shared;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_idx = {x, y, z};
                memset(shared_memory, 0xff, sizeof shared_memory);
                run_block(threads);
                for (size_t i = shared; i < sizeof shared_memory; i++)
                    if (shared_memory[i] != 0xff) fail("a write beyond the dynamic shared memory");
            }
}

struct ThreadIndex {
    struct X {
        operator unsigned() const { return current; }
    } x;
};

// Shows `mine` to the warp; the result is what each lane showed.
template <typename V> const unsigned char (*exchange(const V& mine))[64] {
    static_assert(sizeof(V) <= 64);
    Fiber& fiber = fibers[current];
    auto* all = slots[fiber.exchanges++ % 2];
    memcpy(all[current], &mine, sizeof mine);
    wait(AT_WARP);
    return all + current / 32 * 32;
}
template <typename V> V shown(const unsigned char (*all)[64], unsigned lane) {
    V value;
    memcpy(&value, all[lane], sizeof value);
    return value;
}

}  // namespace emulator

inline emulator::ThreadIndex threadIdx;
#define blockIdx emulator::block_idx
#define blockDim emulator::block_dim
#define gridDim emulator::grid_dim

inline void __syncthreads() { emulator::wait(emulator::AT_BLOCK); }
inline void __syncwarp() { emulator::wait(emulator::AT_WARP); }
template <typename V> V __shfl_xor_sync(unsigned mask, V value, int lanes) {
    if (mask != 0xffffffffu) emulator::fail("a shuffle of part of a warp");
    return emulator::shown<V>(emulator::exchange(value), (emulator::current % 32) ^ lanes);
}
template <typename V> V __shfl_sync(unsigned mask, V value, int lane) {
    if (mask != 0xffffffffu) emulator::fail("a shuffle of part of a warp");
    return emulator::shown<V>(emulator::exchange(value), lane);
}

[[noreturn]] inline void __trap() { emulator::fail("the kernel stopped itself: it was launched with other sizes than its own"); }
inline unsigned dynamic_shared_size() { return (unsigned)emulator::shared_size; }
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float exp2_fast(float x) { return exp2f(x); }

// The matrix instructions, by the tables of the PTX ISA: "Matrix fragments for mma.m16n8k16 with floating point type" and
// "ldmatrix".
namespace emulator {
struct Fragments {
    uint32_t a[4], b[2];
};
template <typename T> float half_of(uint32_t pair, int which) {
    T value;
    memcpy(&value, (const char*)&pair + 2 * which, 2);
    if constexpr (std::is_same<T, bf16>::value) {
        return __bfloat162float(value);
    } else {
        return __half2float(value);
    }
}
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    if ((uintptr_t)row % 16) fail("ldmatrix from an address that is not at a multiple of 16");
    const auto* all = exchange(row);
    const unsigned lane = current % 32;
    for (unsigned matrix = 0; matrix < 4; matrix++)
        for (unsigned half = 0; half < 2; half++) {
            const unsigned i = transposed ? 2 * (lane % 4) + half : lane / 4, j = transposed ? lane / 4 : 2 * (lane % 4) + half;
            const char* address = (const char*)shown<const void*>(all, 8 * matrix + i) + 2 * j;
            memcpy((char*)&r[matrix] + 2 * half, address, 2);
        }
    // nobody may overwrite the rows before all have read them, as one instruction reads them
    exchange(0);
}
}  // namespace emulator
inline void ldmatrix(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, false); }
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, true); }

template <typename T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto* all = emulator::exchange(emulator::Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const unsigned lane = emulator::current % 32;
    for (unsigned e = 0; e < 4; e++) {
        const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        float sum = 0;
        for (unsigned k = 0; k < 16; k++) {
            const auto from_a = emulator::shown<emulator::Fragments>(all, row % 8 * 4 + k % 8 / 2);
            const auto from_b = emulator::shown<emulator::Fragments>(all, column * 4 + k % 8 / 2);
            sum += emulator::half_of<T>(from_a.a[row / 8 + k / 8 * 2], k % 2) * emulator::half_of<T>(from_b.b[k / 8], k % 2);
        }
        c[e] += sum;
    }
}

// An asynchronous copy reads its source at once.
inline void copy16(void* to, const void* from, bool valid) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) emulator::fail("cp.async between addresses that are not at multiples of 16");
    emulator::Copy copy = {to, {}};
    if (valid) memcpy(copy.data, from, 16);
    if (emulator::order == 0) memcpy(to, copy.data, 16);
    emulator::fibers[emulator::current].copies.back().push_back(copy);
}
inline void copy_commit() { emulator::fibers[emulator::current].copies.emplace_back(); }
template <int N> void copy_wait() {
    auto& groups = emulator::fibers[emulator::current].copies;
    while (groups.size() > N + 1) {
        if (emulator::order != 0)
            for (const auto& copy : groups.front()) memcpy(copy.to, copy.data, 16);
        groups.erase(groups.begin());
    }
}

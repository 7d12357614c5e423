// What every kernel uses: element types, vectors of 16 bytes, reductions, the functions of a number.
//
// A kernel is a template over its element type T (float, bf16 or f16) and an `extern "C"` name for each, made by
// EACH_TYPE. Parameters are pointers, `long long` and `float`: src/ops/cuda/mod.rs passes nothing else. Sums,
// exponentials and products are f32 whatever T is.
//
// The same text compiles for the host (tools/cuda/emulate.sh), where threads are fibers and the checks run.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef __nv_bfloat16 bf16;
typedef __half f16;
#define KERNEL extern "C" __global__ void
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "emulator.h"
#endif

#define EACH_TYPE(MACRO) \
    MACRO(float, f32)    \
    MACRO(bf16, bf16)    \
    MACRO(f16, f16)

typedef long long i64;
typedef unsigned int u32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// Eight elements: 16 bytes of bf16 and f16, 32 of f32. A warp reads whole lines with it.
constexpr int LANE = 8;
template <typename T> struct alignas(16) Eight {
    T at[LANE];
};

template <typename T> __device__ __forceinline__ void load8(float (&to)[LANE], const T* from) {
    const Eight<T> data = *reinterpret_cast<const Eight<T>*>(from);
#pragma unroll
    for (int k = 0; k < LANE; k++) to[k] = to_float(data.at[k]);
}
template <typename T> __device__ __forceinline__ void store8(T* to, const float (&from)[LANE]) {
    Eight<T> data;
#pragma unroll
    for (int k = 0; k < LANE; k++) data.at[k] = from_float<T>(from[k]);
    *reinterpret_cast<Eight<T>*>(to) = data;
}

// `count` elements (VEC of them where VEC is 8, then aligned; one where it is 1).
template <int VEC, typename T> __device__ __forceinline__ void load(float (&to)[VEC], const T* from) {
    if constexpr (VEC == LANE) {
        load8(to, from);
    } else {
        to[0] = to_float(from[0]);
    }
}
template <int VEC, typename T> __device__ __forceinline__ void store(T* to, const float (&from)[VEC]) {
    if constexpr (VEC == LANE) {
        store8(to, from);
    } else {
        to[0] = from_float<T>(from[0]);
    }
}

constexpr u32 ALL = 0xffffffffu;

// The sum over a warp, in every lane; the order does not depend on anything.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

// The sum over a block of whole warps, in every thread.
template <typename F> __device__ __forceinline__ F block_sum(F x) {
    __shared__ F sums[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();  // the sums of a call before this one have been read
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? sums[lane] : F(0));
}
template <typename F> __device__ __forceinline__ F block_max(F x) {
    __shared__ F values[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) values[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? values[lane] : -INFINITY);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
// The standard normal distribution: its integral up to x, and its density.
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * erfcf(-0.70710678118654752f * x); }
__device__ __forceinline__ float normal_density(float x) { return 0.39894228040143268f * expf(-0.5f * x * x); }

// The softmax of rows of scores in f32, and its backward: for attention with heads too large for tiles.
//
// A block has a row. Bytes of a forward: the scores in f32 are read once from memory and twice from the caches, P is
// written: 4096 rows of 4096 scores in bf16 move 100 MB, 34 us on an H100, and 235 MB, 78 us backward.
#include "common.cuh"

// exp(s - top) / sum over the keys that query `first` + row sees: (top, 1 / sum).
__device__ __forceinline__ float2 row_softmax(const float* s, i64 keys) {
    float top = -INFINITY;
    for (i64 i = threadIdx.x; i < keys; i += blockDim.x) top = fmaxf(top, s[i]);
    top = block_max(top);
    float sum = 0;
    for (i64 i = threadIdx.x; i < keys; i += blockDim.x) sum += expf(s[i] - top);
    return {top, 1.0f / block_sum(sum)};
}

__device__ __forceinline__ i64 seen(i64 m, i64 first, i64 causal) {
    const i64 keys = first + blockIdx.x + 1;
    return causal && keys < m ? keys : m;
}

// p = softmax(s) over m keys, 0 where a query does not look
template <typename T> __device__ void softmax_fwd(T* p, const float* s, i64 m, i64 first, i64 causal) {
    const i64 row = blockIdx.x * m, keys = seen(m, first, causal);
    const float2 r = row_softmax(s + row, keys);
    for (i64 i = threadIdx.x; i < m; i += blockDim.x)
        p[row + i] = from_float<T>(i < keys ? expf(s[row + i] - r.x) * r.y : 0.0f);
}

// p again, and d_s = p (d_p - sum(p d_p))
template <typename T>
__device__ void softmax_bwd(T* p, T* d_s, const float* s, const float* d_p, i64 m, i64 first, i64 causal) {
    const i64 row = blockIdx.x * m, keys = seen(m, first, causal);
    const float2 r = row_softmax(s + row, keys);
    float along = 0;
    for (i64 i = threadIdx.x; i < keys; i += blockDim.x) along += expf(s[row + i] - r.x) * r.y * d_p[row + i];
    along = block_sum(along);
    for (i64 i = threadIdx.x; i < m; i += blockDim.x) {
        const float x = i < keys ? expf(s[row + i] - r.x) * r.y : 0.0f;
        p[row + i] = from_float<T>(x);
        d_s[row + i] = from_float<T>(i < keys ? x * (d_p[row + i] - along) : 0.0f);
    }
}

#define INSTANCES(T, NAME)                                                                                             \
    KERNEL softmax_fwd_##NAME(T* p, const float* s, i64 m, i64 first, i64 causal) { softmax_fwd(p, s, m, first, causal); } \
    KERNEL softmax_bwd_##NAME(T* p, T* d_s, const float* s, const float* d_p, i64 m, i64 first, i64 causal) {          \
        softmax_bwd(p, d_s, s, d_p, m, first, causal);                                                                 \
    }

EACH_TYPE(INSTANCES)

// Attention of several heads without the score matrix, forward and backward (Dao et al. 2022; Dao 2023).
//
//   S = Q Kᵀ / sqrt(d),  P = softmax(S),  O = P V         per head: Q (N, d)  K, V (M, d), slices of rows of C channels
//   L = log2 of the sum of 2^(S log2 e) over a row        kept by the forward: P = 2^(S log2 e - L)
//   delta = rowsum(d_O O) = rowsum(P d_P)
//   d_V = Pᵀ d_O,  d_S = P (d_O Vᵀ - delta),  d_Q = d_S K / sqrt(d),  d_K = d_Sᵀ Q / sqrt(d)
//
// A block has a tile of queries (forward, d_Q) or of keys (d_K and d_V) and walks over tiles of the other, two of which
// are in shared memory: one being read, one on its way. No atomics: every sum has one order, so a run repeats to the bit.
// Where there are few keys (77 of a prompt) the queries are split among blocks, whose parts attention_sum adds up.
//
// FLOPs: 4 N M d per head forward; backward 14 N M d in two kernels of 6 and 8 (the scores are computed in each, which
// costs less than atomic sums of d_Q in f32 and their conversion). For N = M = 4096, 8 heads of 40 (48 with the zeros
// that fill k16): 25.8 and 90 GFLOP an image. mma.sync reaches about 0.6 of an H100's 790 TFLOP/s: 55 us and 190 us.
// Bytes: Q, K, V, O are 2.6 MB each, read from the L2 by 32 or 64 blocks a head; memory sees them about once.
#pragma once

#include "mma.cuh"

constexpr float LOG2E = 1.4426950408889634f;

// Sizes of the kernels for heads of up to D numbers. src/ops/attention/cuda.rs has the same.
template <typename T, int D> struct Sizes {
    static constexpr bool HALF = sizeof(T) == 2;
    static constexpr int WARPS = !HALF && D > 80 ? 2 : 4;
    static constexpr int THREADS = 32 * WARPS;
    // 16-row tiles of a warp: two reuse what a warp reads from shared memory, where the registers suffice
    static constexpr int FWD_MT = HALF && D <= 64 ? 2 : 1;
    static constexpr int BWD_MT = 1;
    // rows of the tiles that are walked over
    static constexpr int STEP = HALF ? (D <= 80 ? 64 : 32) : (D <= 80 ? 32 : 16);
    static constexpr int FWD_ROWS = 16 * FWD_MT * WARPS, BWD_ROWS = 16 * BWD_MT * WARPS;
    static constexpr int S = STRIDE<T, D>;
    static constexpr int FWD_BYTES = (FWD_ROWS + 4 * STEP) * S * (int)sizeof(T) + WARPS * SCRATCH<T, FWD_MT, STEP / 8> * 4;
    static constexpr int BWD_BYTES =
        (2 * BWD_ROWS + 4 * STEP) * S * (int)sizeof(T) + WARPS * SCRATCH<T, BWD_MT, STEP / 8> * 4 + 4 * STEP * 4;
};

struct AttentionShape {
    i64 n, m, channels;
    int d;
    bool causal, vector;
    float scale;

    __device__ i64 query(i64 row) const { return (blockIdx.z * n + row) * channels + (i64)blockIdx.y * d; }
    __device__ i64 key(i64 row) const { return (blockIdx.z * m + row) * channels + (i64)blockIdx.y * d; }
    // of this head's queries in (images, heads, queries)
    __device__ i64 statistics() const { return (blockIdx.z * (i64)gridDim.y + blockIdx.y) * n; }
};

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

// Writes a product's rows, times `factor` (two for each 16-row tile); `to` is row 0 of the head.
template <int D, int MT, typename T>
__device__ __forceinline__ void write_rows(T* to, const float (&c)[MT][D / 8][4], const float (&factor)[MT][2], i64 row0,
                                           i64 rows, i64 pitch, int columns) {
    const int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const i64 row = row0 + 16 * i + 8 * h + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                T* at = to + row * pitch + 8 * j + column;
                if (8 * j + column < columns) at[0] = from_float<T>(c[i][j][2 * h] * factor[i][h]);
                if (8 * j + column + 1 < columns) at[1] = from_float<T>(c[i][j][2 * h + 1] * factor[i][h]);
            }
        }
}

template <int D, typename T>
__device__ void attention_fwd(T* o, float* lse, const T* q, const T* k, const T* v, const AttentionShape& s) {
    typedef Sizes<T, D> Z;
    constexpr int MT = Z::FWD_MT, NT = Z::STEP / 8, TILE = Z::STEP * Z::S;
    DYNAMIC_SHARED(bytes);
    if (dynamic_shared_size() < Z::FWD_BYTES || blockDim.x != Z::THREADS) __trap();
    T* q_tile = reinterpret_cast<T*>(bytes);
    T* k_tiles = q_tile + Z::FWD_ROWS * Z::S;
    T* v_tiles = k_tiles + 2 * TILE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* scratch = reinterpret_cast<float*>(v_tiles + 2 * TILE) + warp * SCRATCH<T, MT, NT>;

    const i64 first = (i64)blockIdx.x * Z::FWD_ROWS, row0 = first + warp * 16 * MT;
    i64 keys = s.m;
    if (s.causal && first + Z::FWD_ROWS < keys) keys = first + Z::FWD_ROWS;
    const int tiles = (int)((keys + Z::STEP - 1) / Z::STEP);
    auto load_keys = [&](int tile) {
        const i64 row = (i64)tile * Z::STEP;
        load_tile<Z::STEP, D, Z::THREADS>(k_tiles + tile % 2 * TILE, k + s.key(row), s.channels, s.m - row, s.d, s.vector);
        load_tile<Z::STEP, D, Z::THREADS>(v_tiles + tile % 2 * TILE, v + s.key(row), s.channels, s.m - row, s.d, s.vector);
    };

    float out[MT][D / 8][4], largest[MT][2], total[MT][2];
    clear(out);
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) largest[i][h] = -INFINITY, total[i][h] = 0;
    const float scale = s.scale * LOG2E;

    load_tile<Z::FWD_ROWS, D, Z::THREADS>(q_tile, q + s.query(first), s.channels, s.n - first, s.d, s.vector);
    load_keys(0);
    copy_commit();
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) load_keys(tile + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        float p[MT][NT][4];
        clear(p);
        multiply_transposed<D>(p, q_tile + warp * 16 * MT * Z::S, k_tiles + tile % 2 * TILE);
        const i64 key0 = (i64)tile * Z::STEP + lane % 4 * 2;
        const bool edge = (i64)(tile + 1) * Z::STEP > s.m || (s.causal && (i64)(tile + 1) * Z::STEP > row0 + 1);
        if (edge) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const i64 key = key0 + 8 * j + e % 2, query = row0 + 16 * i + e / 2 * 8 + lane / 4;
                        if (key >= s.m || (s.causal && key > query)) p[i][j][e] = -INFINITY;
                    }
        }
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float top = largest[i][h];
#pragma unroll
                for (int j = 0; j < NT; j++) top = fmaxf(top, fmaxf(p[i][j][2 * h], p[i][j][2 * h + 1]));
                top = quad_max(top);
                // a row of which nothing is visible yet
                const float base = top == -INFINITY ? 0.0f : top * scale;
                const float shrink = power_of_two<T>(largest[i][h] * scale - base);
                largest[i][h] = top;
                float sum = 0;
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        p[i][j][e] = power_of_two<T>(p[i][j][e] * scale - base);
                        sum += p[i][j][e];
                    }
                total[i][h] = total[i][h] * shrink + sum;
#pragma unroll
                for (int j = 0; j < D / 8; j++) out[i][j][2 * h] *= shrink, out[i][j][2 * h + 1] *= shrink;
            }
        multiply_fragments<D>(out, p, v_tiles + tile % 2 * TILE, scratch);
        __syncthreads();
    }
    copy_wait<0>();
    float inverse[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float sum = quad_sum(total[i][h]);
            inverse[i][h] = 1.0f / sum;
            const i64 row = row0 + 16 * i + 8 * h + lane / 4;
            if (lane % 4 == 0 && row < s.n) lse[s.statistics() + row] = largest[i][h] * scale + log2f(sum);
        }
    write_rows<D>(o + s.query(0), out, inverse, row0, s.n, s.channels, s.d);
}

// delta (images, heads, queries): a warp has one of them.
template <typename T>
__device__ void attention_delta(float* delta, const T* d_o, const T* o, i64 batch, i64 n, i64 heads, i64 d) {
    const i64 index = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;  // of (images, queries, heads)
    if (index >= batch * n * heads) return;
    float sum = 0;
    for (i64 c = threadIdx.x % 32; c < d; c += 32) sum += to_float(d_o[index * d + c]) * to_float(o[index * d + c]);
    sum = warp_sum(sum);
    const i64 head = index % heads, row = index / heads % n, image = index / heads / n;
    if (threadIdx.x % 32 == 0) delta[(image * heads + head) * n + row] = sum;
}

template <int D, typename T>
__device__ void attention_bwd_q(T* d_q, const T* d_o, const float* lse, const float* delta, const T* q, const T* k,
                                const T* v, const AttentionShape& s) {
    typedef Sizes<T, D> Z;
    constexpr int MT = Z::BWD_MT, NT = Z::STEP / 8, TILE = Z::STEP * Z::S;
    DYNAMIC_SHARED(bytes);
    if (dynamic_shared_size() < Z::BWD_BYTES || blockDim.x != Z::THREADS) __trap();
    T* q_tile = reinterpret_cast<T*>(bytes);
    T* o_tile = q_tile + Z::BWD_ROWS * Z::S;
    T* k_tiles = o_tile + Z::BWD_ROWS * Z::S;
    T* v_tiles = k_tiles + 2 * TILE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* scratch = reinterpret_cast<float*>(v_tiles + 2 * TILE) + warp * SCRATCH<T, MT, NT>;

    const i64 first = (i64)blockIdx.x * Z::BWD_ROWS, row0 = first + warp * 16 * MT;
    i64 keys = s.m;
    if (s.causal && first + Z::BWD_ROWS < keys) keys = first + Z::BWD_ROWS;
    const int tiles = (int)((keys + Z::STEP - 1) / Z::STEP);
    auto load_keys = [&](int tile) {
        const i64 row = (i64)tile * Z::STEP;
        load_tile<Z::STEP, D, Z::THREADS>(k_tiles + tile % 2 * TILE, k + s.key(row), s.channels, s.m - row, s.d, s.vector);
        load_tile<Z::STEP, D, Z::THREADS>(v_tiles + tile % 2 * TILE, v + s.key(row), s.channels, s.m - row, s.d, s.vector);
    };
    float row_lse[MT][2], row_delta[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const i64 row = row0 + 16 * i + 8 * h + lane / 4;
            row_lse[i][h] = row < s.n ? lse[s.statistics() + row] : 0.0f;
            row_delta[i][h] = row < s.n ? delta[s.statistics() + row] : 0.0f;
        }
    const float scale = s.scale * LOG2E;
    float out[MT][D / 8][4];
    clear(out);

    load_tile<Z::BWD_ROWS, D, Z::THREADS>(q_tile, q + s.query(first), s.channels, s.n - first, s.d, s.vector);
    load_tile<Z::BWD_ROWS, D, Z::THREADS>(o_tile, d_o + s.query(first), s.channels, s.n - first, s.d, s.vector);
    load_keys(0);
    copy_commit();
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) load_keys(tile + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        float p[MT][NT][4], d_p[MT][NT][4];
        clear(p);
        clear(d_p);
        multiply_transposed<D>(p, q_tile + warp * 16 * MT * Z::S, k_tiles + tile % 2 * TILE);
        multiply_transposed<D>(d_p, o_tile + warp * 16 * MT * Z::S, v_tiles + tile % 2 * TILE);
        const i64 key0 = (i64)tile * Z::STEP + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const i64 key = key0 + 8 * j + e % 2, query = row0 + 16 * i + e / 2 * 8 + lane / 4;
                    const bool seen = key < s.m && !(s.causal && key > query);
                    const float x = seen ? power_of_two<T>(p[i][j][e] * scale - row_lse[i][e / 2]) : 0.0f;
                    p[i][j][e] = x * (d_p[i][j][e] - row_delta[i][e / 2]);
                }
        multiply_fragments<D>(out, p, k_tiles + tile % 2 * TILE, scratch);
        __syncthreads();
    }
    copy_wait<0>();
    float factor[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) factor[i][0] = factor[i][1] = s.scale;
    write_rows<D>(d_q + s.query(0), out, factor, row0, s.n, s.channels, s.d);
}

// With one split d_k and d_v are written; with more, part `split` of `parts` (splits, 2, images, keys, channels). The
// blocks of grid.x are (tiles of keys, splits).
template <int D, typename T>
__device__ void attention_bwd_kv(T* d_k, T* d_v, float* parts, i64 splits, const T* d_o, const float* lse,
                                 const float* delta, const T* q, const T* k, const T* v, const AttentionShape& s) {
    typedef Sizes<T, D> Z;
    constexpr int MT = Z::BWD_MT, NT = Z::STEP / 8, TILE = Z::STEP * Z::S;
    DYNAMIC_SHARED(bytes);
    if (dynamic_shared_size() < Z::BWD_BYTES || blockDim.x != Z::THREADS) __trap();
    T* k_tile = reinterpret_cast<T*>(bytes);
    T* v_tile = k_tile + Z::BWD_ROWS * Z::S;
    T* q_tiles = v_tile + Z::BWD_ROWS * Z::S;
    T* o_tiles = q_tiles + 2 * TILE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* statistics = reinterpret_cast<float*>(o_tiles + 2 * TILE);  // (2, lse and delta, STEP)
    float* scratch = statistics + 4 * Z::STEP + warp * SCRATCH<T, MT, NT>;

    const int split = (int)(blockIdx.x % splits);
    const i64 first = (i64)(blockIdx.x / splits) * Z::BWD_ROWS, row0 = first + warp * 16 * MT;
    // the tiles of queries of this split; those before the first key see none of these keys
    const int all = (int)((s.n + Z::STEP - 1) / Z::STEP), share = (int)((all + splits - 1) / splits);
    int begin = split * share, end = begin + share < all ? begin + share : all;
    if (s.causal && (int)(first / Z::STEP) > begin) begin = (int)(first / Z::STEP);
    auto load_queries = [&](int tile) {
        const i64 row = (i64)tile * Z::STEP;
        const int at = tile % 2;
        load_tile<Z::STEP, D, Z::THREADS>(q_tiles + at * TILE, q + s.query(row), s.channels, s.n - row, s.d, s.vector);
        load_tile<Z::STEP, D, Z::THREADS>(o_tiles + at * TILE, d_o + s.query(row), s.channels, s.n - row, s.d, s.vector);
        for (int i = threadIdx.x; i < Z::STEP; i += Z::THREADS) {
            const bool valid = row + i < s.n;
            statistics[(2 * at) * Z::STEP + i] = valid ? lse[s.statistics() + row + i] : 0.0f;
            statistics[(2 * at + 1) * Z::STEP + i] = valid ? delta[s.statistics() + row + i] : 0.0f;
        }
    };
    const float scale = s.scale * LOG2E;
    float out_k[MT][D / 8][4], out_v[MT][D / 8][4];
    clear(out_k);
    clear(out_v);

    load_tile<Z::BWD_ROWS, D, Z::THREADS>(k_tile, k + s.key(first), s.channels, s.m - first, s.d, s.vector);
    load_tile<Z::BWD_ROWS, D, Z::THREADS>(v_tile, v + s.key(first), s.channels, s.m - first, s.d, s.vector);
    if (begin < end) load_queries(begin);
    copy_commit();
    for (int tile = begin; tile < end; tile++) {
        if (tile + 1 < end) load_queries(tile + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const float* tile_lse = statistics + tile % 2 * 2 * Z::STEP;
        const float* tile_delta = tile_lse + Z::STEP;
        // transposed: rows are keys, columns are queries
        float p[MT][NT][4], d_p[MT][NT][4];
        clear(p);
        multiply_transposed<D>(p, k_tile + warp * 16 * MT * Z::S, q_tiles + tile % 2 * TILE);
        const int column = lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const i64 query = (i64)tile * Z::STEP + 8 * j + column + e % 2, key = row0 + 16 * i + e / 2 * 8 + lane / 4;
                    const bool seen = query < s.n && !(s.causal && key > query);
                    p[i][j][e] = seen ? power_of_two<T>(p[i][j][e] * scale - tile_lse[8 * j + column + e % 2]) : 0.0f;
                }
        multiply_fragments<D>(out_v, p, o_tiles + tile % 2 * TILE, scratch);
        clear(d_p);
        multiply_transposed<D>(d_p, v_tile + warp * 16 * MT * Z::S, o_tiles + tile % 2 * TILE);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) p[i][j][e] *= d_p[i][j][e] - tile_delta[8 * j + column + e % 2];
        multiply_fragments<D>(out_k, p, q_tiles + tile % 2 * TILE, scratch);
        __syncthreads();
    }
    copy_wait<0>();
    float factor[MT][2], one[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) factor[i][0] = factor[i][1] = s.scale, one[i][0] = one[i][1] = 1.0f;
    if (splits == 1) {
        write_rows<D>(d_k + s.key(0), out_k, factor, row0, s.m, s.channels, s.d);
        write_rows<D>(d_v + s.key(0), out_v, one, row0, s.m, s.channels, s.d);
    } else {
        const i64 size = gridDim.z * s.m * s.channels;
        write_rows<D>(parts + (2 * split) * size + s.key(0), out_k, factor, row0, s.m, s.channels, s.d);
        write_rows<D>(parts + (2 * split + 1) * size + s.key(0), out_v, one, row0, s.m, s.channels, s.d);
    }
}

// Adds the splits' parts up: n numbers of d_k and of d_v.
template <typename T> __device__ void attention_sum(T* d_k, T* d_v, const float* parts, i64 splits, i64 n) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= 2 * n) return;
    float sum = 0;
    for (i64 split = 0; split < splits; split++) sum += parts[split * 2 * n + i];
    (i < n ? d_k[i] : d_v[i - n]) = from_float<T>(sum);
}

#define ATTENTION_SHAPE i64 n, i64 m, i64 channels, i64 d, i64 causal, i64 vector, float scale
#define THE_ATTENTION_SHAPE \
    const AttentionShape s = {n, m, channels, (int)d, causal != 0, vector != 0, scale};
#define ATTENTION(T, NAME, D)                                                                                          \
    KERNEL __launch_bounds__(Sizes<T, D>::THREADS)                                                                     \
        attention_fwd_##D##_##NAME(T* o, float* lse, const T* q, const T* k, const T* v, ATTENTION_SHAPE) {            \
        THE_ATTENTION_SHAPE                                                                                            \
        attention_fwd<D>(o, lse, q, k, v, s);                                                                          \
    }                                                                                                                  \
    KERNEL __launch_bounds__(Sizes<T, D>::THREADS)                                                                     \
        attention_bwd_q_##D##_##NAME(T* d_q, const T* d_o, const float* lse, const float* delta, const T* q,           \
                                     const T* k, const T* v, ATTENTION_SHAPE) {                                        \
        THE_ATTENTION_SHAPE                                                                                            \
        attention_bwd_q<D>(d_q, d_o, lse, delta, q, k, v, s);                                                          \
    }                                                                                                                  \
    KERNEL __launch_bounds__(Sizes<T, D>::THREADS)                                                                     \
        attention_bwd_kv_##D##_##NAME(T* d_k, T* d_v, float* parts, i64 splits, const T* d_o, const float* lse,        \
                                      const float* delta, const T* q, const T* k, const T* v, ATTENTION_SHAPE) {       \
        THE_ATTENTION_SHAPE                                                                                            \
        attention_bwd_kv<D>(d_k, d_v, parts, splits, d_o, lse, delta, q, k, v, s);                                     \
    }

#define ATTENTION_INSTANCES(T, NAME)                                                                                   \
    KERNEL attention_delta_##NAME(float* delta, const T* d_o, const T* o, i64 batch, i64 n, i64 heads, i64 d) {        \
        attention_delta(delta, d_o, o, batch, n, heads, d);                                                            \
    }                                                                                                                  \
    KERNEL attention_sum_##NAME(T* d_k, T* d_v, const float* parts, i64 splits, i64 n) {                               \
        attention_sum(d_k, d_v, parts, splits, n);                                                                     \
    }                                                                                                                  \
    ATTENTION(T, NAME, 16)                                                                                             \
    ATTENTION(T, NAME, 32)                                                                                             \
    ATTENTION(T, NAME, 48)                                                                                             \
    ATTENTION(T, NAME, 64)                                                                                             \
    ATTENTION(T, NAME, 80)                                                                                             \
    ATTENTION(T, NAME, 128)                                                                                            \
    ATTENTION(T, NAME, 160)

// LoRA's thin products: y + s (x Aᵀ) Bᵀ and its gradients, in one pass over the activations each.
//
//   lora_fwd     out = y + s (x Aᵀ) Bᵀ                 x (rows, in)  A (rank, in)  B (out, rank)  y (rows, out)
//   lora_bwd     low = x Aᵀ, d_low = s d_y B, d_x = d_low A
//   lora_factors parts of d_A = d_lowᵀ x and d_Bᵀ = s lowᵀ d_y over a share of the rows
//   lora_sum     adds the parts up
//
// A and B are f32 and are read as such; x, y and d_y are the run's type; everything is multiplied and added in f32 on the
// ordinary cores: 4096 rows, 320 -> 320, rank 16 are 84 MFLOP, 2 us at half of an H100's 60 TFLOP/s, beside 7.9 MB in
// bf16, 2.6 us. Backward 7.9 MB and twice 5.2 MB again from the L2, 168 MFLOP and 84 MFLOP.
//
// A block has 8 warps with ROWS rows each; eight rows of a factor at a time are in shared memory, 512 numbers wide.
#include "common.cuh"

constexpr int RANKS = 8, WIDTH = 512, WARPS = 8, LORA_THREADS = 32 * WARPS;

// Four numbers from `from`, of which `count` exist (0 for the others).
template <typename T> __device__ __forceinline__ void load4(float (&to)[4], const T* from, i64 count, bool vector) {
    if (vector && count >= 4) {
        struct alignas(4 * sizeof(T)) Four {
            T at[4];
        } four = *reinterpret_cast<const Four*>(from);
#pragma unroll
        for (int k = 0; k < 4; k++) to[k] = to_float(four.at[k]);
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++) to[k] = k < count ? to_float(from[k]) : 0.0f;
    }
}
template <typename T> __device__ __forceinline__ void store4(T* to, const float (&from)[4], i64 count, bool vector) {
    if (vector && count >= 4) {
        struct alignas(4 * sizeof(T)) Four {
            T at[4];
        } four;
#pragma unroll
        for (int k = 0; k < 4; k++) four.at[k] = from_float<T>(from[k]);
        *reinterpret_cast<Four*>(to) = four;
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) to[k] = from_float<T>(from[k]);
    }
}

// A factor (rank, width), or with `columns` stored by columns, (width, rank).
struct Factor {
    const float* data;
    i64 width, rank;
    bool columns;

    // rows r0 .. r0 + RANKS, columns c0 .. c0 + WIDTH, zeros outside
    __device__ void stage(float* tile, i64 r0, i64 c0) const {
        __syncthreads();
        for (int i = threadIdx.x; i < RANKS * WIDTH; i += LORA_THREADS) {
            const int r = columns ? i % RANKS : i / WIDTH, c = columns ? i / RANKS : i % WIDTH;
            const bool valid = r0 + r < rank && c0 + c < width;
            tile[r * WIDTH + c] = !valid ? 0.0f : columns ? data[(c0 + c) * rank + r0 + r] : data[(r0 + r) * width + c0 + c];
        }
        __syncthreads();
    }
};

// low[row][r] = factor_scale · <x row, factor row r> for this warp's rows; `low` is the warp's part, (ROWS, rank).
template <int ROWS, typename T>
__device__ void into_rank(float* low, const T* x, i64 row0, i64 rows, const Factor& f, float scale, float* tile, bool vector) {
    const int lane = threadIdx.x % 32;
    for (i64 r0 = 0; r0 < f.rank; r0 += RANKS) {
        float sum[ROWS][RANKS] = {};
        for (i64 c0 = 0; c0 < f.width; c0 += WIDTH) {
            f.stage(tile, r0, c0);
            for (int c = 4 * lane; c < WIDTH && c0 + c < f.width; c += 128) {
                float v[ROWS][4];
#pragma unroll
                for (int i = 0; i < ROWS; i++)
                    load4(v[i], x + (row0 + i) * f.width + c0 + c, row0 + i < rows ? f.width - c0 - c : 0, vector);
#pragma unroll
                for (int r = 0; r < RANKS; r++) {
                    const float4 w = *reinterpret_cast<const float4*>(tile + r * WIDTH + c);
#pragma unroll
                    for (int i = 0; i < ROWS; i++) sum[i][r] += v[i][0] * w.x + v[i][1] * w.y + v[i][2] * w.z + v[i][3] * w.w;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int r = 0; r < RANKS; r++) {
                const float all = warp_sum(sum[i][r]);
                if (lane == 0 && r0 + r < f.rank) low[i * f.rank + r0 + r] = scale * all;
            }
    }
    __syncwarp();
}

// out[row] = y[row] + scale · low[row] factor for this warp's rows, without y where it is null.
template <int ROWS, typename T>
__device__ void out_of_rank(T* out, const T* y, const float* low, i64 row0, i64 rows, const Factor& f, float scale, float* tile,
                            bool vector) {
    const int lane = threadIdx.x % 32;
    for (i64 c0 = 0; c0 < f.width; c0 += WIDTH) {
        float sum[ROWS][WIDTH / 128][4] = {};
        for (i64 r0 = 0; r0 < f.rank; r0 += RANKS) {
            f.stage(tile, r0, c0);
            const int count = f.rank - r0 < RANKS ? (int)(f.rank - r0) : RANKS;
            for (int r = 0; r < count; r++) {
                float l[ROWS];
#pragma unroll
                for (int i = 0; i < ROWS; i++) l[i] = low[i * f.rank + r0 + r];
#pragma unroll
                for (int j = 0; j < WIDTH / 128; j++) {
                    const float4 w = *reinterpret_cast<const float4*>(tile + r * WIDTH + 128 * j + 4 * lane);
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        sum[i][j][0] += l[i] * w.x;
                        sum[i][j][1] += l[i] * w.y;
                        sum[i][j][2] += l[i] * w.z;
                        sum[i][j][3] += l[i] * w.w;
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < WIDTH / 128; j++) {
                const i64 c = c0 + 128 * j + 4 * lane;
                if (row0 + i >= rows || c >= f.width) continue;
                float v[4] = {};
                if (y) load4(v, y + (row0 + i) * f.width + c, f.width - c, vector);
#pragma unroll
                for (int k = 0; k < 4; k++) v[k] += scale * sum[i][j][k];
                store4(out + (row0 + i) * f.width + c, v, f.width - c, vector);
            }
    }
}

template <int ROWS, typename T>
__device__ void lora_fwd(T* out, const T* y, const T* x, const float* a, const float* b, i64 rows, i64 in, i64 width,
                         i64 rank, float scale, bool vector) {
    DYNAMIC_SHARED(bytes);  // a tile of a factor, (rows of the block, rank)
    const int warp = threadIdx.x / 32;
    float* tile = reinterpret_cast<float*>(bytes);
    float* low = tile + RANKS * WIDTH + warp * ROWS * rank;
    const i64 row0 = ((i64)blockIdx.x * WARPS + warp) * ROWS;
    into_rank<ROWS>(low, x, row0, rows, Factor{a, in, rank, false}, 1.0f, tile, vector);
    out_of_rank<ROWS>(out, y, low, row0, rows, Factor{b, width, rank, true}, scale, tile, vector);
}

template <int ROWS, typename T>
__device__ void lora_bwd(T* d_x, float* low_all, float* d_low_all, const T* d_y, const T* x, const float* a, const float* b,
                         i64 rows, i64 in, i64 width, i64 rank, float scale, bool vector) {
    DYNAMIC_SHARED(bytes);  // a tile of a factor, twice (rows of the block, rank)
    const int warp = threadIdx.x / 32;
    float* tile = reinterpret_cast<float*>(bytes);
    float* low = tile + RANKS * WIDTH + warp * ROWS * rank;
    float* d_low = low + WARPS * ROWS * rank;
    const i64 row0 = ((i64)blockIdx.x * WARPS + warp) * ROWS;
    into_rank<ROWS>(low, x, row0, rows, Factor{a, in, rank, false}, 1.0f, tile, vector);
    into_rank<ROWS>(d_low, d_y, row0, rows, Factor{b, width, rank, true}, scale, tile, vector);
    for (i64 i = threadIdx.x % 32; i < ROWS * rank && row0 * rank + i < rows * rank; i += 32) {
        low_all[row0 * rank + i] = low[i];
        d_low_all[row0 * rank + i] = d_low[i];
    }
    out_of_rank<ROWS>(d_x, (const T*)nullptr, d_low, row0, rows, Factor{a, in, rank, false}, 1.0f, tile, vector);
}

// part[r][c] = Σ low[row][r] z[row][c] over a share of the rows. Blocks: (tiles of 256 columns of x, then of d_y; eight
// ranks; shares). 64 threads have four columns each, four times over for every fourth row.
template <typename T>
__device__ void lora_factors(float* parts, const T* x, const T* d_y, const float* low, const float* d_low, i64 rows, i64 in,
                             i64 width, i64 rank, i64 share, bool vector) {
    constexpr int COLUMNS = 256, GROUPS = 4;
    __shared__ __align__(16) float sums[GROUPS - 1][RANKS][COLUMNS];
    const i64 tiles_in = (in + COLUMNS - 1) / COLUMNS;
    const bool of_b = blockIdx.x >= tiles_in;  // d_B, else d_A
    const T* z = of_b ? d_y : x;
    const float* l = of_b ? low : d_low;
    const i64 columns = of_b ? width : in;
    const int lane = threadIdx.x % 64 * 4, group = threadIdx.x / 64;
    const i64 c = (blockIdx.x - (of_b ? tiles_in : 0)) * COLUMNS + lane, r0 = (i64)blockIdx.y * RANKS;
    const i64 first = blockIdx.z * share, end = first + share < rows ? first + share : rows;
    float sum[RANKS][4] = {};
    for (i64 row = first + group; row < end; row += GROUPS) {
        float v[4];
        load4(v, z + row * columns + c, columns - c, vector);
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            const float lr = r0 + r < rank ? l[row * rank + r0 + r] : 0.0f;
#pragma unroll
            for (int k = 0; k < 4; k++) sum[r][k] += lr * v[k];
        }
    }
    if (group > 0)
#pragma unroll
        for (int r = 0; r < RANKS; r++)
#pragma unroll
            for (int k = 0; k < 4; k++) sums[group - 1][r][lane + k] = sum[r][k];
    __syncthreads();
    if (group > 0) return;
    float* part = parts + blockIdx.z * rank * (in + width) + (of_b ? rank * in : 0);
#pragma unroll
    for (int r = 0; r < RANKS; r++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            for (int g = 0; g < GROUPS - 1; g++) sum[r][k] += sums[g][r][lane + k];
            if (r0 + r < rank && c + k < columns) part[(r0 + r) * columns + c + k] = sum[r][k];
        }
}

// d_A (rank, in) and d_B (width, rank) from the parts of `shares` shares.
__device__ void lora_sum(float* d_a, float* d_b, const float* parts, i64 in, i64 width, i64 rank, i64 shares, float scale) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, all = rank * (in + width);
    if (i >= all) return;
    float sum = 0;
    for (i64 share = 0; share < shares; share++) sum += parts[share * all + i];
    if (i < rank * in) {
        d_a[i] = sum;
    } else {
        const i64 j = i - rank * in;
        d_b[j % width * rank + j / width] = scale * sum;
    }
}

// Four rows a warp, or one where the rank or few rows ask for it.
#define ROWS_OF_A_WARP(function, ...) \
    if (tall) {                       \
        function<4>(__VA_ARGS__);     \
    } else {                          \
        function<1>(__VA_ARGS__);     \
    }

#define INSTANCES(T, NAME)                                                                                             \
    KERNEL __launch_bounds__(LORA_THREADS)                                                                             \
        lora_fwd_##NAME(T* out, const T* y, const T* x, const float* a, const float* b, i64 rows, i64 in, i64 width,   \
                        i64 rank, float scale, i64 tall, i64 vector) {                                                 \
        ROWS_OF_A_WARP(lora_fwd, out, y, x, a, b, rows, in, width, rank, scale, vector != 0)                           \
    }                                                                                                                  \
    KERNEL __launch_bounds__(LORA_THREADS)                                                                             \
        lora_bwd_##NAME(T* d_x, float* low, float* d_low, const T* d_y, const T* x, const float* a, const float* b,    \
                        i64 rows, i64 in, i64 width, i64 rank, float scale, i64 tall, i64 vector) {                    \
        ROWS_OF_A_WARP(lora_bwd, d_x, low, d_low, d_y, x, a, b, rows, in, width, rank, scale, vector != 0)             \
    }                                                                                                                  \
    KERNEL __launch_bounds__(LORA_THREADS)                                                                             \
        lora_factors_##NAME(float* parts, const T* x, const T* d_y, const float* low, const float* d_low, i64 rows,    \
                            i64 in, i64 width, i64 rank, i64 share, i64 vector) {                                      \
        lora_factors(parts, x, d_y, low, d_low, rows, in, width, rank, share, vector != 0);                            \
    }

EACH_TYPE(INSTANCES)

KERNEL lora_sum_f32(float* d_a, float* d_b, const float* parts, i64 in, i64 width, i64 rank, i64 shares, float scale) {
    lora_sum(d_a, d_b, parts, in, width, rank, shares, scale);
}

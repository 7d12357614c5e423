// Products of tiles in shared memory by a warp.
//
// bf16 and f16 use the tensor cores: mma.sync.m16n8k16 with f32 sums, fragments by ldmatrix. f32 multiplies and adds in
// f32. Both keep a product's numbers in the same places, those of the instruction's C fragment (PTX ISA, "Matrix
// fragments for mma.m16n8k16"): lane l has c[0], c[1] in row l / 4, columns 2 (l % 4) and the next, and c[2], c[3] eight
// rows below. So the kernels above are written once.
#pragma once

#include "common.cuh"

#ifdef __CUDACC__

template <typename T> __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], const void* row) {
    const u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], const void* row) {
    const u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Copies 16 bytes to shared memory behind the thread's back, zeros where there is no source.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `N` of this thread's committed groups are under way.
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ u32 dynamic_shared_size() {
    u32 size;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(size));
    return size;
}

// 2^x to 2 units in the last place of f32; the result is rounded to 16 bits where this is used.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

template <typename T> __device__ __forceinline__ float power_of_two(float x) { return exp2_fast(x); }
template <> __device__ __forceinline__ float power_of_two<float>(float x) { return exp2f(x); }

// Two elements in the order in which fragments have them: the first in the low half.
template <typename T> __device__ __forceinline__ u32 pack(float low, float high) {
    union {
        T at[2];
        u32 both;
    } pair;
    pair.at[0] = from_float<T>(low);
    pair.at[1] = from_float<T>(high);
    return pair.both;
}

// Elements of a row of a tile of D columns: 16 bytes more than the columns, so that eight rows lie in different banks.
template <typename T, int D> constexpr int STRIDE = D + 16 / (int)sizeof(T);
// Floats of a warp's scratch memory, which f32 needs to hand fragments from lane to lane.
template <typename T, int MT, int NT> constexpr int SCRATCH = sizeof(T) == 4 ? 16 * MT * (8 * NT + 4) : 0;

template <int MT, int NT> __device__ __forceinline__ void clear(float (&c)[MT][NT][4]) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) c[i][j][k] = 0;
}

// c += a bᵀ: a has 16 MT rows, b has 8 NT rows, both D columns.
template <int D, int MT, int NT, typename T>
__device__ __forceinline__ void multiply_transposed(float (&c)[MT][NT][4], const T* a, const T* b) {
    constexpr int S = STRIDE<T, D>;
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
        const T* a_row = a + lane % 16 * S + lane / 16 * 8;
        const T* b_row = b + (lane / 16 * 8 + lane % 8) * S + lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            u32 fa[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) ldmatrix(fa[i], a_row + 16 * i * S + k);
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                u32 fb[4];
                ldmatrix(fb, b_row + 8 * j * S + k);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma<T>(c[i][j], fa[i], fb[0], fb[1]);
                    mma<T>(c[i][j + 1], fa[i], fb[2], fb[3]);
                }
            }
        }
    } else {
        const int row = lane / 4, column = lane % 4 * 2;
#pragma unroll 2
        for (int k = 0; k < D; k += 4) {
            float4 fa[MT][2];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                fa[i][0] = *reinterpret_cast<const float4*>(a + (16 * i + row) * S + k);
                fa[i][1] = *reinterpret_cast<const float4*>(a + (16 * i + row + 8) * S + k);
            }
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const float4 b0 = *reinterpret_cast<const float4*>(b + (8 * j + column) * S + k);
                const float4 b1 = *reinterpret_cast<const float4*>(b + (8 * j + column + 1) * S + k);
#pragma unroll
                for (int i = 0; i < MT; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const float4 x = fa[i][h];
                        float& low = c[i][j][2 * h];
                        float& high = c[i][j][2 * h + 1];
                        low += x.x * b0.x + x.y * b0.y + x.z * b0.z + x.w * b0.w;
                        high += x.x * b1.x + x.y * b1.y + x.z * b1.z + x.w * b1.w;
                    }
            }
        }
    }
}

// c += p b: p is a product of 16 MT rows and 8 NT columns in its fragments, b has 8 NT rows and D columns.
template <int D, int MT, int NT, typename T>
__device__ __forceinline__ void multiply_fragments(float (&c)[MT][D / 8][4], const float (&p)[MT][NT][4], const T* b,
                                                   float* scratch) {
    constexpr int S = STRIDE<T, D>;
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
        const T* b_row = b + lane % 16 * S + lane / 16 * 8;
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            u32 fa[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                fa[i][0] = pack<T>(p[i][j][0], p[i][j][1]);
                fa[i][1] = pack<T>(p[i][j][2], p[i][j][3]);
                fa[i][2] = pack<T>(p[i][j + 1][0], p[i][j + 1][1]);
                fa[i][3] = pack<T>(p[i][j + 1][2], p[i][j + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                u32 fb[4];
                ldmatrix_transposed(fb, b_row + 8 * j * S + 8 * n);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma<T>(c[i][n], fa[i], fb[0], fb[1]);
                    mma<T>(c[i][n + 1], fa[i], fb[2], fb[3]);
                }
            }
        }
    } else {
        constexpr int P = 8 * NT + 4;
        const int row = lane / 4, column = lane % 4 * 2;
        __syncwarp();  // the last product's rows have been read
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    scratch[(16 * i + row + e / 2 * 8) * P + 8 * j + column + e % 2] = p[i][j][e];
        __syncwarp();
#pragma unroll 1
        for (int k = 0; k < 8 * NT; k += 4) {
            float pk[MT][2][4];
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float4 x = *reinterpret_cast<const float4*>(scratch + (16 * i + row + 8 * h) * P + k);
                    pk[i][h][0] = x.x, pk[i][h][1] = x.y, pk[i][h][2] = x.z, pk[i][h][3] = x.w;
                }
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float2 y = *reinterpret_cast<const float2*>(b + (k + e) * S + 8 * n + column);
#pragma unroll
                    for (int i = 0; i < MT; i++)
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            c[i][n][2 * h] += pk[i][h][e] * y.x;
                            c[i][n][2 * h + 1] += pk[i][h][e] * y.y;
                        }
                }
        }
    }
}

// ROWS rows of D columns to shared memory: row r is from + r * pitch, those from `rows` on and columns from `columns` on
// are zeros. With `vector` (every row at a multiple of 16 bytes, whole vectors) the copies are asynchronous.
template <int ROWS, int D, int THREADS, typename T>
__device__ __forceinline__ void load_tile(T* to, const T* from, i64 pitch, i64 rows, int columns, bool vector) {
    constexpr int S = STRIDE<T, D>, V = 16 / (int)sizeof(T);
    if (vector) {
        for (int i = threadIdx.x; i < ROWS * (D / V); i += THREADS) {
            const int row = i / (D / V), column = i % (D / V) * V;
            const bool valid = row < rows && column < columns;
            copy16(to + row * S + column, valid ? from + row * pitch + column : from, valid);
        }
    } else {
        for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
            const int row = i / D, column = i % D;
            const bool valid = row < rows && column < columns;
            to[row * S + column] = valid ? from[row * pitch + column] : from_float<T>(0.0f);
        }
    }
}

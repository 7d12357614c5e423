// The smooth stand-in for a JPEG's size (ops/jpeg_size), in f64 inside as there: a sum over every coefficient.
//
// A block of 64 threads has an 8x8 block of one component; first the luma's blocks by rows, then cb's, then cr's.
//   jpeg_coefficients  pixels -> u, coefficients in quantisation steps       (images, blocks, 64)
//   jpeg_bytes         u -> parts of the sum over all of them, jpeg_total adds them up
//   jpeg_slopes        u -> d, the gradient of the planes' pixels            (images, blocks, 64)
//   jpeg_gather        d -> the gradient of the image's pixels
//
// A 512x512 image has 6144 blocks: 3 MB of f64 and 2·1024 multiplications a block each way, about 5 us of an H100's
// 30 TFLOP/s in f64 and 2 us of memory.
#include "common.cuh"

// ops/jpeg_size/cuda.rs fills it.
struct Jpeg {
    double basis[64];      // D[k][n] of the cosine transform
    double steps[2][64];   // luma, chroma
    double weights[3][3];  // of (r, g, b) in [0, 1], a mean over the averaged pixels
    double ac_bits[3], ac_nonzero[3];
    double bend, header, block, dc_bits;
};

struct Place {
    i64 component, stride, width, block, row, column;  // width: blocks in a row of the plane

    __device__ Place(i64 index, i64 h, i64 w) {
        const i64 blocks_w = (w + 15) / 16 * 2, blocks_h = (h + 15) / 16 * 2, luma = blocks_w * blocks_h, chroma = luma / 4;
        component = index < luma ? 0 : 1 + (index - luma) / chroma;
        stride = component == 0 ? 1 : 2;
        width = blocks_w / stride;
        block = component == 0 ? index : (index - luma) % chroma;
        row = block / width;
        column = block % width;
    }
};

__device__ __forceinline__ double jpeg_bits(double u, double bend) { return 0.5 * log2(1.0 + u * u / bend); }
__device__ __forceinline__ double jpeg_d_bits(double u, double bend) {
    return u / ((u * u + bend) * 0.69314718055994530942);
}
__device__ __forceinline__ double jpeg_nonzero(double u, double bend) { return u * u / (u * u + bend); }
__device__ __forceinline__ double jpeg_d_nonzero(double u, double bend) {
    return 2.0 * bend * u / ((u * u + bend) * (u * u + bend));
}

// A M Aᵀ for this thread's element (y, x): A is the basis, or its transpose.
__device__ __forceinline__ double sandwich(double element, const double* basis, bool transposed) {
    __shared__ double m[64], half[64];
    const int y = threadIdx.x / 8, x = threadIdx.x % 8;
    auto a = [&](int i, int j) { return transposed ? basis[8 * j + i] : basis[8 * i + j]; };
    m[threadIdx.x] = element;
    __syncthreads();
    double sum = 0;
    for (int k = 0; k < 8; k++) sum += a(y, k) * m[8 * k + x];
    half[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (int k = 0; k < 8; k++) sum += half[8 * y + k] * a(x, k);
    return sum;
}

__device__ __forceinline__ i64 at_most(i64 x, i64 most) { return x < most ? x : most; }

// Blocks: (blocks of the planes, images).
template <typename T> __device__ void jpeg_coefficients(double* u, const T* pixels, const Jpeg* j, i64 h, i64 w) {
    const Place p(blockIdx.x, h, w);
    const i64 top = (8 * p.row + threadIdx.x / 8) * p.stride, left = (8 * p.column + threadIdx.x % 8) * p.stride;
    const T* image = pixels + blockIdx.y * 3 * h * w;
    double value = p.component == 0 ? -128.0 : 0.0;
    for (i64 y = top; y < top + p.stride; y++)
        for (i64 x = left; x < left + p.stride; x++)
            for (int c = 0; c < 3; c++)
                value += j->weights[p.component][c] *
                         (double)to_float(image[c * h * w + at_most(y, h - 1) * w + at_most(x, w - 1)]);
    value = sandwich(value, j->basis, false) / j->steps[p.stride - 1][threadIdx.x];
    u[(blockIdx.y * (i64)gridDim.x + blockIdx.x) * 64 + threadIdx.x] = value;
}

// parts (images, gridDim.x). Blocks: (parts, images).
__device__ void jpeg_bytes(double* parts, const double* u, const Jpeg* j, i64 blocks, i64 h, i64 w) {
    u += blockIdx.y * blocks * 64;
    double sum = 0;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < blocks * 64; i += (i64)gridDim.x * blockDim.x) {
        const Place p(i / 64, h, w);
        if (i % 64 == 0) {
            const double before = p.column == 0 ? 0.0 : u[i - 64];
            sum += j->block + j->dc_bits * jpeg_bits(u[i] - before, j->bend);
        } else {
            sum += j->ac_bits[p.component] * jpeg_bits(u[i], j->bend) + j->ac_nonzero[p.component] * jpeg_nonzero(u[i], j->bend);
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.y * (i64)gridDim.x + blockIdx.x] = sum;
}

// A block has an image.
template <typename T> __device__ void jpeg_total(T* sizes, const double* parts, const Jpeg* j, i64 count) {
    double sum = 0;
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) sum += parts[blockIdx.x * count + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sizes[blockIdx.x] = from_float<T>((float)(j->header + sum));
}

// Blocks: (blocks of the planes, images).
template <typename T> __device__ void jpeg_slopes(double* d, const double* u, const T* cotangent, const Jpeg* j, i64 h, i64 w) {
    const Place p(blockIdx.x, h, w);
    const i64 at = (blockIdx.y * (i64)gridDim.x + blockIdx.x) * 64 + threadIdx.x;
    double slope;
    if (threadIdx.x == 0) {
        slope = j->dc_bits * jpeg_d_bits(u[at] - (p.column == 0 ? 0.0 : u[at - 64]), j->bend);
        if (p.column + 1 < p.width) slope -= j->dc_bits * jpeg_d_bits(u[at + 64] - u[at], j->bend);
    } else {
        slope = j->ac_bits[p.component] * jpeg_d_bits(u[at], j->bend) + j->ac_nonzero[p.component] * jpeg_d_nonzero(u[at], j->bend);
    }
    slope *= (double)to_float(cotangent[blockIdx.y]) / j->steps[p.stride - 1][threadIdx.x];
    d[at] = sandwich(slope, j->basis, true);
}

// A thread has a pixel, whose gradient is that of every place of the planes it was averaged into or repeated to.
template <typename T> __device__ void jpeg_gather(T* gradient, const double* d, const Jpeg* j, i64 batch, i64 h, i64 w) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= batch * h * w) return;
    const i64 x = i % w, y = i / w % h, image = i / w / h;
    const i64 padded_h = (h + 15) / 16 * 16, padded_w = (w + 15) / 16 * 16, luma = padded_h / 8 * (padded_w / 8);
    d += image * (luma + luma / 2) * 64;
    const i64 last_y = y == h - 1 ? padded_h : y + 1, last_x = x == w - 1 ? padded_w : x + 1;
    double sum[3] = {};
    for (int component = 0; component < 3; component++) {
        const i64 stride = component == 0 ? 1 : 2, width = padded_w / 8 / stride;
        const double* plane = d + (component == 0 ? 0 : luma + (component - 1) * (luma / 4)) * 64;
        double all = 0;
        for (i64 py = y; py < last_y; py++)
            for (i64 px = x; px < last_x; px++) {
                const i64 r = py / stride, c = px / stride;
                all += plane[(r / 8 * width + c / 8) * 64 + r % 8 * 8 + c % 8];
            }
        for (int c = 0; c < 3; c++) sum[c] += j->weights[component][c] * all;
    }
    for (int c = 0; c < 3; c++) gradient[(image * 3 + c) * h * w + y * w + x] = from_float<T>((float)sum[c]);
}

#define INSTANCES(T, NAME)                                                                                              \
    KERNEL jpeg_coefficients_##NAME(double* u, const T* pixels, const Jpeg* jpeg, i64 h, i64 w) {                       \
        jpeg_coefficients(u, pixels, jpeg, h, w);                                                                       \
    }                                                                                                                   \
    KERNEL jpeg_bytes_##NAME(double* parts, const double* u, const Jpeg* jpeg, i64 blocks, i64 h, i64 w) {              \
        jpeg_bytes(parts, u, jpeg, blocks, h, w);                                                                       \
    }                                                                                                                   \
    KERNEL jpeg_total_##NAME(T* sizes, const double* parts, const Jpeg* jpeg, i64 count) {                              \
        jpeg_total(sizes, parts, jpeg, count);                                                                          \
    }                                                                                                                   \
    KERNEL jpeg_slopes_##NAME(double* d, const double* u, const T* cotangent, const Jpeg* jpeg, i64 h, i64 w) {         \
        jpeg_slopes(d, u, cotangent, jpeg, h, w);                                                                       \
    }                                                                                                                   \
    KERNEL jpeg_gather_##NAME(T* gradient, const double* d, const Jpeg* jpeg, i64 batch, i64 h, i64 w) {                \
        jpeg_gather(gradient, d, jpeg, batch, h, w);                                                                    \
    }

EACH_TYPE(INSTANCES)

// Group normalisation with an optional SiLU, and layer normalisation, over frozen scale and shift.
//
// Group norm, channels-last: a block has a chunk of pixels of one image and all channels (or a tile of whole groups where
// they do not fit), so a warp reads whole lines and a thread keeps the parameters of its VEC channels in registers.
//
//   group_norm_sums      sums of x - shift and (x - shift)² for every (image, group, chunk); shift is the group's first
//                        number, so that a large mean cancels nothing and the sums of chunks simply add up
//   group_norm_apply     adds the chunks up, writes y
//   group_norm_bwd_sums  sums of g and g x̂
//   group_norm_bwd_apply writes d_x = rstd (g - mean(g) - x̂ mean(g x̂))
//
// Bytes: the forward reads x twice and writes y, the backward reads x three times and d_y twice and writes d_x. An image
// of 64·64·320 in bf16 is 2.6 MB, which the L2 of an H100 (50 MB) holds between the passes, so about 2 and 3 passes of
// memory: 1.7 us and 2.6 us at 3 TB/s beside 2 and 3 launches. 512·512·128 is 67 MB: 3 passes 67 us, 6 passes 134 us.
#include "common.cuh"

struct GroupShape {
    i64 pixels, channels, per_group, tile_groups, chunk_pixels;
};

// Where this thread works: VEC channels from `channel`, pixels from `first` in steps of `step` to `end`.
template <int VEC> struct GroupThread {
    i64 image, group0, groups, channel, first, step, end;
    int width, row, rows;
    bool active;

    __device__ explicit GroupThread(const GroupShape& s) {
        image = blockIdx.z;
        const i64 all = s.channels / s.per_group;
        group0 = blockIdx.y * s.tile_groups;
        groups = all - group0 < s.tile_groups ? all - group0 : s.tile_groups;
        width = (int)(groups * s.per_group);
        const int lanes = (int)(s.tile_groups * s.per_group) / VEC;
        rows = blockDim.x / lanes;
        row = threadIdx.x / lanes;
        const int column = threadIdx.x % lanes * VEC;
        channel = group0 * s.per_group + column;
        active = row < rows && column < width;
        first = blockIdx.x * s.chunk_pixels + row;
        step = rows;
        end = (blockIdx.x + 1) * s.chunk_pixels;
        if (end > s.pixels) end = s.pixels;
    }
    __device__ i64 offset(const GroupShape& s, i64 pixel) const { return (image * s.pixels + pixel) * s.channels + channel; }
    __device__ i64 group(const GroupShape& s, int k) const { return (channel + k) / s.per_group - group0; }
};

// Place of a chunk's sum in `partial`: (2, images, groups, chunks).
__device__ __forceinline__ i64 partial_at(const GroupShape& s, int quantity, i64 image, i64 group) {
    return ((quantity * (i64)gridDim.z + image) * (s.channels / s.per_group) + group) * gridDim.x;
}

// Adds the threads' sums of two quantities up by group and writes them to this chunk's place.
template <int VEC>
__device__ void write_partials(float* partial, const GroupShape& s, const GroupThread<VEC>& t, const float (&a)[VEC],
                               const float (&b)[VEC], float* shared) {
    float* shared_b = shared + t.rows * t.width;
    if (t.active) {
        const int at = t.row * t.width + (int)(t.channel - t.group0 * s.per_group);
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            shared[at + k] = a[k];
            shared_b[at + k] = b[k];
        }
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, per_group = (int)s.per_group;
    for (int group = threadIdx.x / 32; group < t.groups; group += blockDim.x / 32) {
        float sum_a = 0, sum_b = 0;
        for (int i = lane; i < t.rows * per_group; i += 32) {
            const int at = i / per_group * t.width + group * per_group + i % per_group;
            sum_a += shared[at];
            sum_b += shared_b[at];
        }
        sum_a = warp_sum(sum_a);
        sum_b = warp_sum(sum_b);
        if (lane == 0) {
            partial[partial_at(s, 0, t.image, t.group0 + group) + blockIdx.x] = sum_a;
            partial[partial_at(s, 1, t.image, t.group0 + group) + blockIdx.x] = sum_b;
        }
    }
    __syncthreads();
}

// The means of two quantities over every group of this block's tile, from the chunks' sums.
template <int VEC>
__device__ void read_means(float* mean_a, float* mean_b, const float* partial, const GroupShape& s,
                           const GroupThread<VEC>& t) {
    const int lane = threadIdx.x % 32;
    const double count = (double)s.pixels * s.per_group;
    for (int group = threadIdx.x / 32; group < t.groups; group += blockDim.x / 32) {
        const float* from_a = partial + partial_at(s, 0, t.image, t.group0 + group);
        const float* from_b = partial + partial_at(s, 1, t.image, t.group0 + group);
        double a = 0, b = 0;
        for (int chunk = lane; chunk < (int)gridDim.x; chunk += 32) {
            a += from_a[chunk];
            b += from_b[chunk];
        }
        a = warp_sum(a) / count;
        b = warp_sum(b) / count;
        if (lane == 0) {
            mean_a[group] = (float)a;
            mean_b[group] = (float)b;
        }
    }
    __syncthreads();
}

// The number that a group's sums are taken relative to.
template <typename T> __device__ __forceinline__ float group_shift(const T* x, const GroupShape& s, i64 image, i64 group) {
    return to_float(x[image * s.pixels * s.channels + group * s.per_group]);
}

// Mean and 1 / sqrt(var + eps) of every group of the tile.
template <int VEC, typename T>
__device__ void read_statistics(float* mean, float* rstd, const float* partial, const T* x, const GroupShape& s,
                                const GroupThread<VEC>& t, float eps) {
    read_means(mean, rstd, partial, s, t);
    for (int group = threadIdx.x; group < t.groups; group += blockDim.x) {
        const double shifted = mean[group], square = rstd[group];
        const double var = square - shifted * shifted;
        mean[group] = (float)(group_shift(x, s, t.image, t.group0 + group) + shifted);
        rstd[group] = (float)(1.0 / sqrt((var > 0 ? var : 0) + (double)eps));
    }
    __syncthreads();
}

template <int VEC, typename T> __device__ void group_norm_sums(float* partial, const T* x, const GroupShape& s, float* shared) {
    const GroupThread<VEC> t(s);
    float sum[VEC] = {}, square[VEC] = {};
    if (t.active) {
        float shift[VEC];
#pragma unroll
        for (int k = 0; k < VEC; k++) shift[k] = group_shift(x, s, t.image, t.group0 + t.group(s, k));
        for (i64 pixel = t.first; pixel < t.end; pixel += t.step) {
            float v[VEC];
            load<VEC>(v, x + t.offset(s, pixel));
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                v[k] -= shift[k];
                sum[k] += v[k];
                square[k] += v[k] * v[k];
            }
        }
    }
    write_partials(partial, s, t, sum, square, shared);
}

// What a thread keeps of its channels: x̂ = (x - mean) rstd, z = x̂ weight + bias.
template <int VEC> struct Channels {
    float mean[VEC], rstd[VEC], weight[VEC], bias[VEC];

    template <typename T>
    __device__ Channels(const GroupShape& s, const GroupThread<VEC>& t, const float* means, const float* rstds,
                        const T* weights, const T* biases) {
        load<VEC>(weight, weights + t.channel);
        load<VEC>(bias, biases + t.channel);
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            mean[k] = means[t.group(s, k)];
            rstd[k] = rstds[t.group(s, k)];
        }
    }
    __device__ float hat(float x, int k) const { return (x - mean[k]) * rstd[k]; }
    // d_z weight: through SiLU, if there is one
    __device__ float g(float dy, float x_hat, int k, bool silu) const {
        if (!silu) return dy * weight[k];
        const float z = x_hat * weight[k] + bias[k], sz = sigmoid(z);
        return dy * sz * (1.0f + z * (1.0f - sz)) * weight[k];
    }
};

template <int VEC, typename T>
__device__ void group_norm_apply(T* y, const T* x, const T* weight, const T* bias, const float* partial,
                                 const GroupShape& s, float eps, bool silu, float* shared) {
    const GroupThread<VEC> t(s);
    float *mean = shared, *rstd = mean + s.tile_groups;
    read_statistics(mean, rstd, partial, x, s, t, eps);
    if (!t.active) return;
    const Channels<VEC> c(s, t, mean, rstd, weight, bias);
    for (i64 pixel = t.first; pixel < t.end; pixel += t.step) {
        float v[VEC];
        load<VEC>(v, x + t.offset(s, pixel));
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            const float z = c.hat(v[k], k) * c.weight[k] + c.bias[k];
            v[k] = silu ? z * sigmoid(z) : z;
        }
        store<VEC>(y + t.offset(s, pixel), v);
    }
}

template <int VEC, typename T>
__device__ void group_norm_bwd_sums(float* d_partial, const T* dy, const T* x, const T* weight, const T* bias,
                                    const float* partial, const GroupShape& s, float eps, bool silu, float* shared) {
    const GroupThread<VEC> t(s);
    float *mean = shared, *rstd = mean + s.tile_groups;
    read_statistics(mean, rstd, partial, x, s, t, eps);
    float g_sum[VEC] = {}, gx_sum[VEC] = {};
    if (t.active) {
        const Channels<VEC> c(s, t, mean, rstd, weight, bias);
        for (i64 pixel = t.first; pixel < t.end; pixel += t.step) {
            float v[VEC], d[VEC];
            load<VEC>(v, x + t.offset(s, pixel));
            load<VEC>(d, dy + t.offset(s, pixel));
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                const float x_hat = c.hat(v[k], k), g = c.g(d[k], x_hat, k, silu);
                g_sum[k] += g;
                gx_sum[k] += g * x_hat;
            }
        }
    }
    write_partials(d_partial, s, t, g_sum, gx_sum, rstd + s.tile_groups);
}

template <int VEC, typename T>
__device__ void group_norm_bwd_apply(T* dx, const T* dy, const T* x, const T* weight, const T* bias, const float* partial,
                                     const float* d_partial, const GroupShape& s, float eps, bool silu, float* shared) {
    const GroupThread<VEC> t(s);
    float *mean = shared, *rstd = mean + s.tile_groups, *g_mean = rstd + s.tile_groups, *gx_mean = g_mean + s.tile_groups;
    read_statistics(mean, rstd, partial, x, s, t, eps);
    read_means(g_mean, gx_mean, d_partial, s, t);
    if (!t.active) return;
    const Channels<VEC> c(s, t, mean, rstd, weight, bias);
    float g0[VEC], gx0[VEC];
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        g0[k] = g_mean[t.group(s, k)];
        gx0[k] = gx_mean[t.group(s, k)];
    }
    for (i64 pixel = t.first; pixel < t.end; pixel += t.step) {
        float v[VEC], d[VEC];
        load<VEC>(v, x + t.offset(s, pixel));
        load<VEC>(d, dy + t.offset(s, pixel));
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            const float x_hat = c.hat(v[k], k);
            v[k] = c.rstd[k] * (c.g(d[k], x_hat, k, silu) - g0[k] - x_hat * gx0[k]);
        }
        store<VEC>(dx + t.offset(s, pixel), v);
    }
}

// Layer norm: a warp has one row; the passes after the first find it in the L1 cache (2.5 KB for 1280 channels).
// Bytes: x in, y out; backward x and d_y in, d_x out. 8192 rows of 320 in bf16: 10.5 MB, 3.5 us, and 15.7 MB, 5.2 us.

// f(c, VEC numbers) for every vector of the row that this lane has.
template <int VEC, typename T, typename F> __device__ __forceinline__ void over_row(const T* row, i64 channels, F f) {
    for (i64 c = threadIdx.x % 32 * VEC; c < channels; c += 32 * VEC) {
        float v[VEC];
        load<VEC>(v, row + c);
        f(c, v);
    }
}

template <int VEC, typename T>
__device__ __forceinline__ void row_statistics(const T* row, i64 channels, float eps, float& mean, float& rstd) {
    float sum = 0;
    over_row<VEC>(row, channels, [&](i64, float(&v)[VEC]) {
#pragma unroll
        for (int k = 0; k < VEC; k++) sum += v[k];
    });
    mean = warp_sum(sum) / channels;
    float square = 0;
    over_row<VEC>(row, channels, [&](i64, float(&v)[VEC]) {
#pragma unroll
        for (int k = 0; k < VEC; k++) square += (v[k] - mean) * (v[k] - mean);
    });
    rstd = 1.0f / sqrtf(warp_sum(square) / channels + eps);
}

__device__ __forceinline__ i64 warp_row() { return (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

template <int VEC, typename T>
__device__ void layer_norm_fwd(T* y, const T* x, const T* weight, const T* bias, i64 rows, i64 channels, float eps) {
    const i64 row = warp_row();
    if (row >= rows) return;
    x += row * channels;
    y += row * channels;
    float mean, rstd;
    row_statistics<VEC>(x, channels, eps, mean, rstd);
    over_row<VEC>(x, channels, [&](i64 c, float(&v)[VEC]) {
        float w[VEC], b[VEC];
        load<VEC>(w, weight + c);
        load<VEC>(b, bias + c);
#pragma unroll
        for (int k = 0; k < VEC; k++) v[k] = (v[k] - mean) * rstd * w[k] + b[k];
        store<VEC>(y + c, v);
    });
}

template <int VEC, typename T>
__device__ void layer_norm_bwd(T* dx, const T* dy, const T* x, const T* weight, i64 rows, i64 channels, float eps) {
    const i64 row = warp_row();
    if (row >= rows) return;
    x += row * channels;
    dy += row * channels;
    dx += row * channels;
    float mean, rstd;
    row_statistics<VEC>(x, channels, eps, mean, rstd);
    float g_sum = 0, gx_sum = 0;
    over_row<VEC>(x, channels, [&](i64 c, float(&v)[VEC]) {
        float d[VEC], w[VEC];
        load<VEC>(d, dy + c);
        load<VEC>(w, weight + c);
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            g_sum += d[k] * w[k];
            gx_sum += d[k] * w[k] * (v[k] - mean) * rstd;
        }
    });
    const float g_mean = warp_sum(g_sum) / channels, gx_mean = warp_sum(gx_sum) / channels;
    over_row<VEC>(x, channels, [&](i64 c, float(&v)[VEC]) {
        float d[VEC], w[VEC];
        load<VEC>(d, dy + c);
        load<VEC>(w, weight + c);
#pragma unroll
        for (int k = 0; k < VEC; k++) v[k] = rstd * (d[k] * w[k] - g_mean - (v[k] - mean) * rstd * gx_mean);
        store<VEC>(dx + c, v);
    });
}

#define DISPATCH(function, ...)      \
    if (vector) {                    \
        function<LANE>(__VA_ARGS__); \
    } else {                         \
        function<1>(__VA_ARGS__);    \
    }

#define GROUP_SHAPE i64 pixels, i64 channels, i64 per_group, i64 tile_groups, i64 chunk_pixels, i64 vector
#define THE_SHAPE                                                                   \
    const GroupShape s = {pixels, channels, per_group, tile_groups, chunk_pixels}; \
    DYNAMIC_SHARED(bytes);                                                          \
    float* shared = reinterpret_cast<float*>(bytes);

#define INSTANCES(T, NAME)                                                                                             \
    KERNEL __launch_bounds__(512) group_norm_sums_##NAME(float* partial, const T* x, GROUP_SHAPE) {                    \
        THE_SHAPE                                                                                                      \
        DISPATCH(group_norm_sums, partial, x, s, shared)                                                               \
    }                                                                                                                  \
    KERNEL __launch_bounds__(512)                                                                                      \
        group_norm_apply_##NAME(T* y, const T* x, const T* weight, const T* bias, const float* partial, float eps,     \
                                i64 silu, GROUP_SHAPE) {                                                               \
        THE_SHAPE                                                                                                      \
        DISPATCH(group_norm_apply, y, x, weight, bias, partial, s, eps, silu != 0, shared)                             \
    }                                                                                                                  \
    KERNEL __launch_bounds__(512)                                                                                      \
        group_norm_bwd_sums_##NAME(float* d_partial, const T* dy, const T* x, const T* weight, const T* bias,          \
                                   const float* partial, float eps, i64 silu, GROUP_SHAPE) {                           \
        THE_SHAPE                                                                                                      \
        DISPATCH(group_norm_bwd_sums, d_partial, dy, x, weight, bias, partial, s, eps, silu != 0, shared)              \
    }                                                                                                                  \
    KERNEL __launch_bounds__(512)                                                                                      \
        group_norm_bwd_apply_##NAME(T* dx, const T* dy, const T* x, const T* weight, const T* bias,                    \
                                    const float* partial, const float* d_partial, float eps, i64 silu, GROUP_SHAPE) {  \
        THE_SHAPE                                                                                                      \
        DISPATCH(group_norm_bwd_apply, dx, dy, x, weight, bias, partial, d_partial, s, eps, silu != 0, shared)         \
    }                                                                                                                  \
    KERNEL layer_norm_fwd_##NAME(T* y, const T* x, const T* weight, const T* bias, i64 rows, i64 channels, float eps,  \
                                 i64 vector) {                                                                         \
        DISPATCH(layer_norm_fwd, y, x, weight, bias, rows, channels, eps)                                              \
    }                                                                                                                  \
    KERNEL layer_norm_bwd_##NAME(T* dx, const T* dy, const T* x, const T* weight, i64 rows, i64 channels, float eps,   \
                                 i64 vector) {                                                                         \
        DISPATCH(layer_norm_bwd, dx, dy, x, weight, rows, channels, eps)                                               \
    }

EACH_TYPE(INSTANCES)

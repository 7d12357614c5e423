// Elementwise functions, gates, sums, upsampling, concatenation and the check for finite numbers.
//
// All are bound by memory: a number is read once and written once, 16 bytes a thread. On an H100 (3 TB/s) a sum of two
// bf16 tensors of 2·64·64·320 elements moves 15.7 MB, 5.2 us; a GEGLU of 2·4096·2560 moves 63 MB, 21 us.
#include "common.cuh"

// In the order of ops::activation::Activation.
enum Function { IDENTITY, RELU, SILU, GELU, QUICK_GELU, TANH, SIGMOID, GELU_TANH, UNIT_RANGE };

__device__ __forceinline__ float value(int function, float x) {
    switch (function) {
        case RELU: return x <= 0.0f ? 0.0f : x;  // NaN stays NaN
        case SILU: return x * sigmoid(x);
        case GELU: return x * normal_cdf(x);
        case QUICK_GELU: return x * sigmoid(1.702f * x);
        case TANH: return tanhf(x);
        case SIGMOID: return sigmoid(x);
        case GELU_TANH: return x * sigmoid(1.5957691216057308f * x * (1.0f + 0.044715f * x * x));
        case UNIT_RANGE: {
            const float y = x * 0.5f + 0.5f;
            return y < 0.0f ? 0.0f : (y > 1.0f ? 1.0f : y);
        }
        default: return x;
    }
}

__device__ __forceinline__ float derivative(int function, float x) {
    switch (function) {
        case RELU: return x > 0.0f ? 1.0f : 0.0f;
        case SILU: {
            const float s = sigmoid(x);
            return s * (1.0f + x * (1.0f - s));
        }
        case GELU: return normal_cdf(x) + x * normal_density(x);
        case QUICK_GELU: {
            const float s = sigmoid(1.702f * x);
            return s * (1.0f + 1.702f * x * (1.0f - s));
        }
        case TANH: {
            const float t = tanhf(x);
            return 1.0f - t * t;
        }
        case SIGMOID: {
            const float s = sigmoid(x);
            return s * (1.0f - s);
        }
        case GELU_TANH: {
            const float s = sigmoid(1.5957691216057308f * x * (1.0f + 0.044715f * x * x));
            return s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 3.0f * 0.044715f * x * x);
        }
        case UNIT_RANGE: return x < -1.0f || x > 1.0f ? 0.0f : 0.5f;
        default: return 1.0f;
    }
}

// The vector of this thread, of VEC elements; threads beyond the end have none.
__device__ __forceinline__ i64 thread_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

// y[i] = f(a[i], b[i]) for i < n; with `vector` every pointer is at a multiple of 16 bytes.
template <typename T, typename F>
__device__ __forceinline__ void map2(T* y, const T* a, const T* b, i64 n, bool vector, F f) {
    const i64 first = thread_index() * LANE;
    if (vector && first + LANE <= n) {
        float u[LANE], v[LANE];
        load8(u, a + first);
        load8(v, b + first);
#pragma unroll
        for (int k = 0; k < LANE; k++) u[k] = f(u[k], v[k]);
        store8(y + first, u);
    } else {
        for (i64 i = first; i < n && i < first + LANE; i++) y[i] = from_float<T>(f(to_float(a[i]), to_float(b[i])));
    }
}

// y = f(x)
template <typename T> __device__ void activation_fwd(T* y, const T* x, i64 n, i64 function, i64 vector) {
    map2(y, x, x, n, vector, [=](float x, float) { return value((int)function, x); });
}
// dx = dy f'(x)
template <typename T> __device__ void activation_bwd(T* dx, const T* dy, const T* x, i64 n, i64 function, i64 vector) {
    map2(dx, dy, x, n, vector, [=](float dy, float x) { return dy * derivative((int)function, x); });
}
// y = a + b
template <typename T> __device__ void add(T* y, const T* a, const T* b, i64 n, i64 vector) {
    map2(y, a, b, n, vector, [](float a, float b) { return a + b; });
}

// y[r, c] = x[r, c] + shift[c]
template <int VEC, typename T> __device__ void add_channels(T* y, const T* x, const T* shift, i64 rows, i64 channels) {
    const i64 i = thread_index() * VEC;
    if (i >= rows * channels) return;
    float a[VEC], s[VEC];
    load<VEC>(a, x + i);
    load<VEC>(s, shift + i % channels);
#pragma unroll
    for (int k = 0; k < VEC; k++) a[k] += s[k];
    store<VEC>(y + i, a);
}

// y[r, j] = u gelu(v), u = x[r, j], v = x[r, features + j]
template <int VEC, typename T> __device__ void geglu_fwd(T* y, const T* x, i64 rows, i64 features) {
    const i64 i = thread_index() * VEC;
    if (i >= rows * features) return;
    const T* from = x + i / features * 2 * features + i % features;
    float u[VEC], v[VEC];
    load<VEC>(u, from);
    load<VEC>(v, from + features);
#pragma unroll
    for (int k = 0; k < VEC; k++) u[k] *= v[k] * normal_cdf(v[k]);
    store<VEC>(y + i, u);
}
template <int VEC, typename T> __device__ void geglu_bwd(T* dx, const T* dy, const T* x, i64 rows, i64 features) {
    const i64 i = thread_index() * VEC;
    if (i >= rows * features) return;
    const i64 at = i / features * 2 * features + i % features;
    float d[VEC], u[VEC], v[VEC];
    load<VEC>(d, dy + i);
    load<VEC>(u, x + at);
    load<VEC>(v, x + at + features);
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        const float cdf = normal_cdf(v[k]);
        const float du = d[k] * v[k] * cdf;
        v[k] = d[k] * u[k] * (cdf + v[k] * normal_density(v[k]));
        u[k] = du;
    }
    store<VEC>(dx + at, u);
    store<VEC>(dx + at + features, v);
}

// y[b, i, j, c] = x[b, i h / H, j w / W, c]; a thread has VEC channels of one output pixel
template <int VEC, typename T>
__device__ void upsample_fwd(T* y, const T* x, i64 batch, i64 h, i64 w, i64 height, i64 width, i64 channels) {
    const i64 i = thread_index() * VEC;
    if (i >= batch * height * width * channels) return;
    const i64 c = i % channels, pixel = i / channels;
    const i64 col = pixel % width, row = pixel / width % height, b = pixel / width / height;
    const i64 source = (b * h + row * h / height) * w + col * w / width;
    float a[VEC];
    load<VEC>(a, x + source * channels + c);
    store<VEC>(y + i, a);
}
// dx: the sum of dy over the output pixels (i, j) with i h / H, j w / W = this pixel
template <int VEC, typename T>
__device__ void upsample_bwd(T* dx, const T* dy, i64 batch, i64 h, i64 w, i64 height, i64 width, i64 channels) {
    const i64 i = thread_index() * VEC;
    if (i >= batch * h * w * channels) return;
    const i64 c = i % channels, pixel = i / channels;
    const i64 col = pixel % w, row = pixel / w % h, b = pixel / w / h;
    float sum[VEC] = {};
    for (i64 y = (row * height + h - 1) / h; y < ((row + 1) * height + h - 1) / h; y++) {
        for (i64 x = (col * width + w - 1) / w; x < ((col + 1) * width + w - 1) / w; x++) {
            float d[VEC];
            load<VEC>(d, dy + ((b * height + y) * width + x) * channels + c);
#pragma unroll
            for (int k = 0; k < VEC; k++) sum[k] += d[k];
        }
    }
    store<VEC>(dx + i, sum);
}

// y[r] = [a[r], b[r]] with `left` and `right` columns; backwards (`split`) a and b are written from y
template <int VEC, typename T> __device__ void concat_fwd(T* y, const T* a, const T* b, i64 rows, i64 left, i64 right) {
    const i64 i = thread_index() * VEC, width = left + right;
    if (i >= rows * width) return;
    const i64 row = i / width, col = i % width;
    float v[VEC];
    load<VEC>(v, col < left ? a + row * left + col : b + row * right + (col - left));
    store<VEC>(y + i, v);
}
template <int VEC, typename T> __device__ void concat_bwd(T* a, T* b, const T* y, i64 rows, i64 left, i64 right) {
    const i64 i = thread_index() * VEC, width = left + right;
    if (i >= rows * width) return;
    const i64 row = i / width, col = i % width;
    float v[VEC];
    load<VEC>(v, y + i);
    store<VEC>(col < left ? a + row * left + col : b + row * right + (col - left), v);
}

// Makes *slot NaN if some x[i] is a NaN or an infinity, and leaves it otherwise.
template <typename T> __device__ void not_finite(double* slot, const T* x, i64 n) {
    bool bad = false;
    for (i64 i = thread_index(); i < n; i += (i64)gridDim.x * blockDim.x) bad |= !isfinite(to_float(x[i]));
    if (bad) *slot = nan("");  // every thread that writes writes the same
}

// A kernel for vectors of 8 and one for any size.
#define DISPATCH(function, ...)              \
    if (vector) {                            \
        function<LANE>(__VA_ARGS__);         \
    } else {                                 \
        function<1>(__VA_ARGS__);            \
    }

#define INSTANCES(T, NAME)                                                                                             \
    KERNEL activation_fwd_##NAME(T* y, const T* x, i64 n, i64 function, i64 vector) {                                  \
        activation_fwd(y, x, n, function, vector);                                                                     \
    }                                                                                                                  \
    KERNEL activation_bwd_##NAME(T* dx, const T* dy, const T* x, i64 n, i64 function, i64 vector) {                    \
        activation_bwd(dx, dy, x, n, function, vector);                                                                \
    }                                                                                                                  \
    KERNEL add_##NAME(T* y, const T* a, const T* b, i64 n, i64 vector) { add(y, a, b, n, vector); }                    \
    KERNEL add_channels_##NAME(T* y, const T* x, const T* shift, i64 rows, i64 channels, i64 vector) {                 \
        DISPATCH(add_channels, y, x, shift, rows, channels)                                                            \
    }                                                                                                                  \
    KERNEL geglu_fwd_##NAME(T* y, const T* x, i64 rows, i64 features, i64 vector) {                                    \
        DISPATCH(geglu_fwd, y, x, rows, features)                                                                      \
    }                                                                                                                  \
    KERNEL geglu_bwd_##NAME(T* dx, const T* dy, const T* x, i64 rows, i64 features, i64 vector) {                      \
        DISPATCH(geglu_bwd, dx, dy, x, rows, features)                                                                 \
    }                                                                                                                  \
    KERNEL upsample_fwd_##NAME(T* y, const T* x, i64 batch, i64 h, i64 w, i64 height, i64 width, i64 channels,         \
                               i64 vector) {                                                                           \
        DISPATCH(upsample_fwd, y, x, batch, h, w, height, width, channels)                                             \
    }                                                                                                                  \
    KERNEL upsample_bwd_##NAME(T* dx, const T* dy, i64 batch, i64 h, i64 w, i64 height, i64 width, i64 channels,       \
                               i64 vector) {                                                                           \
        DISPATCH(upsample_bwd, dx, dy, batch, h, w, height, width, channels)                                           \
    }                                                                                                                  \
    KERNEL concat_fwd_##NAME(T* y, const T* a, const T* b, i64 rows, i64 left, i64 right, i64 vector) {                \
        DISPATCH(concat_fwd, y, a, b, rows, left, right)                                                               \
    }                                                                                                                  \
    KERNEL concat_bwd_##NAME(T* a, T* b, const T* y, i64 rows, i64 left, i64 right, i64 vector) {                      \
        DISPATCH(concat_bwd, a, b, y, rows, left, right)                                                               \
    }                                                                                                                  \
    KERNEL not_finite_##NAME(double* slot, const T* x, i64 n) { not_finite(slot, x, n); }

EACH_TYPE(INSTANCES)

// The parts of cuBLAS, cuBLASLt, cuDNN and cuRAND that the program calls, for the stand-in: products and convolutions with
// sums in f32, rounded once to the result's format.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>

#include "standin.h"

using namespace standin;

namespace {

enum Type { F32, F16, BF16, F64 };
size_t size_of(Type type) { return type == F32 ? 4 : type == F64 ? 8 : 2; }

float read(Type type, const void* base, size_t i) {
    switch (type) {
        case F32: return ((const float*)base)[i];
        case F64: return (float)((const double*)base)[i];
        case F16: return (float)((const _Float16*)base)[i];
        default: {
            const uint32_t bits = (uint32_t)((const uint16_t*)base)[i] << 16;
            float x;
            memcpy(&x, &bits, 4);
            return x;
        }
    }
}
void write(Type type, void* base, size_t i, float x) {
    switch (type) {
        case F32: ((float*)base)[i] = x; break;
        case F64: ((double*)base)[i] = x; break;
        case F16: ((_Float16*)base)[i] = (_Float16)x; break;
        default: {
            uint32_t bits;
            memcpy(&bits, &x, 4);
            ((uint16_t*)base)[i] = x != x ? 0x7fff : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        }
    }
}

template <typename F> void parallel(size_t n, size_t work, const F& body) {
    const size_t threads = work < (1 << 18) ? 1 : std::min<size_t>(n, std::max(1u, std::thread::hardware_concurrency()));
    std::vector<std::thread> all;
    for (size_t t = 1; t < threads; t++) all.emplace_back([&, t] { body(t * n / threads, (t + 1) * n / threads); });
    body(0, n / std::max<size_t>(threads, 1));
    for (auto& thread : all) thread.join();
}

// Matrices by columns, as these libraries have them.
struct Matrix {
    Type type;
    const void* data;
    size_t ld;
    bool transposed;
    float at(size_t row, size_t column) const { return transposed ? read(type, data, row * ld + column) : read(type, data, column * ld + row); }
};

// y (m, n) = alpha a b + beta c + bias, by columns; c has the type and the pitch of y.
void product(size_t m, size_t n, size_t k, float alpha, const Matrix& a, const Matrix& b, float beta, const void* c, Type type, void* y,
             size_t ld, const void* bias) {
    std::vector<float> packed(m * k);  // a by its columns
    parallel(k, m * k, [&](size_t from, size_t to) {
        for (size_t p = from; p < to; p++)
            for (size_t i = 0; i < m; i++) packed[p * m + i] = a.at(i, p);
    });
    parallel(n, m * n * k, [&](size_t from, size_t to) {
        constexpr size_t COLUMNS = 4, ROWS = 256;
        std::vector<float> right(COLUMNS * k);
        for (size_t j = from; j < to; j += COLUMNS) {
            const size_t columns = std::min(COLUMNS, to - j);
            std::fill(right.begin(), right.end(), 0.0f);
            for (size_t q = 0; q < columns; q++)
                for (size_t p = 0; p < k; p++) right[p * COLUMNS + q] = b.at(p, j + q);
            for (size_t i = 0; i < m; i += ROWS) {
                const size_t rows = std::min(ROWS, m - i);
                float sums[COLUMNS][ROWS] = {};
                for (size_t p = 0; p < k; p++) {
                    const float* left = &packed[p * m + i];
                    const float r0 = right[p * COLUMNS], r1 = right[p * COLUMNS + 1], r2 = right[p * COLUMNS + 2], r3 = right[p * COLUMNS + 3];
                    for (size_t r = 0; r < rows; r++) {
                        sums[0][r] += left[r] * r0;
                        sums[1][r] += left[r] * r1;
                        sums[2][r] += left[r] * r2;
                        sums[3][r] += left[r] * r3;
                    }
                }
                for (size_t q = 0; q < columns; q++)
                    for (size_t r = 0; r < rows; r++) {
                        float x = alpha * sums[q][r];
                        if (beta != 0) x += beta * read(type, c, (j + q) * ld + i + r);
                        if (bias) x += read(type, bias, i + r);
                        write(type, y, (j + q) * ld + i + r, x);
                    }
            }
        }
    });
}

bool from_cuda(int type, Type& to) {
    switch (type) {
        case 0: to = F32; return true;
        case 2: to = F16; return true;
        case 14: to = BF16; return true;
        case 1: to = F64; return true;
        default: return false;
    }
}

void submit_product(const char* name, size_t m, size_t n, size_t k, double bytes, Type type, Work work) {
    const double flops = 2.0 * m * n * k;
    submit(name, bytes, flops, std::max(bytes / BYTES_A_SECOND, flops / (type == F32 ? F32_FLOPS : HALF_FLOPS)), std::move(work));
}

// Whether `columns` columns of `rows` numbers lie within allocated memory.
bool lies(const void* at, size_t rows, size_t columns, size_t ld, Type type) {
    return is_device(at, ((columns - 1) * ld + rows) * size_of(type));
}

constexpr int BAD = 7;  // CUBLAS_STATUS_INVALID_VALUE
int refuse(const char* what) {
    fprintf(stderr, "stand-in: %s\n", what);
    return BAD;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cublasCreate_v2(void** handle) { return *handle = (void*)0x50, 0; }
API cublasDestroy_v2(void*) { return 0; }
API cublasSetStream_v2(void*, void*) { return 0; }
API cublasSetMathMode(void*, int) { return 0; }

static int gemm(int transa, int transb, int m, int n, int k, float alpha, const void* a, Type a_type, int lda, const void* b, Type b_type,
                int ldb, float beta, void* c, Type c_type, int ldc) {
    if (lda < (transa ? k : m) || ldb < (transb ? n : k) || ldc < m) return refuse("a product's leading dimension is too small");
    if (!lies(a, transa ? k : m, transa ? m : k, lda, a_type) || !lies(b, transb ? n : k, transb ? k : n, ldb, b_type) ||
        !lies(c, m, n, ldc, c_type))
        return refuse("a product's matrix is not within allocated memory");
    const double bytes = (double)m * k * size_of(a_type) + (double)k * n * size_of(b_type) + (double)m * n * size_of(c_type);
    submit_product(a_type == F32 ? "cublasGemmEx f32" : "cublasGemmEx half", m, n, k, bytes, a_type, [=] {
        product(m, n, k, alpha, {a_type, a, (size_t)lda, transa != 0}, {b_type, b, (size_t)ldb, transb != 0}, beta, c, c_type, c, ldc, nullptr);
    });
    return 0;
}
API cublasGemmEx(void*, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda, const void* b,
                 int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int) {
    Type ta, tb, tc;
    if (!from_cuda(a_type, ta) || !from_cuda(b_type, tb) || !from_cuda(c_type, tc) || ta != tb) return refuse("a product of these types");
    if (compute != 68 && compute != 77) return refuse("a product that does not add in f32");
    return gemm(transa, transb, m, n, k, *(const float*)alpha, a, ta, lda, b, tb, ldb, *(const float*)beta, c, tc, ldc);
}
API cublasGemmStridedBatchedEx(void*, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
                               long long stride_a, const void* b, int b_type, int ldb, long long stride_b, const void* beta, void* c,
                               int c_type, int ldc, long long stride_c, int batch, int compute, int) {
    Type ta, tb, tc;
    if (!from_cuda(a_type, ta) || !from_cuda(b_type, tb) || !from_cuda(c_type, tc) || ta != tb) return refuse("a product of these types");
    if (compute != 68 && compute != 77) return refuse("a product that does not add in f32");
    int status = 0;
    for (int i = 0; i < batch && !status; i++)
        status = gemm(transa, transb, m, n, k, *(const float*)alpha, (const char*)a + i * stride_a * size_of(ta), ta, lda,
                      (const char*)b + i * stride_b * size_of(tb), tb, ldb, *(const float*)beta, (char*)c + i * stride_c * size_of(tc), tc, ldc);
    return status;
}

// cuBLASLt

struct Description {
    int compute, scale, transa = 0, transb = 0, epilogue = 1;
    const void* bias = nullptr;
};
struct Layout {
    Type type;
    size_t rows, columns;
    int64_t ld;
};

API cublasLtCreate(void** handle) { return *handle = (void*)0x60, 0; }
API cublasLtDestroy(void*) { return 0; }
API cublasLtMatmulDescCreate(Description** made, int compute, int scale) { return *made = new Description{compute, scale}, 0; }
API cublasLtMatmulDescDestroy(Description* description) { return delete description, 0; }
API cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* value, size_t bytes) {
    void* field;
    size_t size = 4;
    switch (attribute) {
        case 3: field = &description->transa; break;
        case 4: field = &description->transb; break;
        case 7: field = &description->epilogue; break;
        case 8: field = &description->bias, size = 8; break;
        default: return refuse("an unknown attribute of a product");
    }
    if (bytes != size) return refuse("an attribute of another size");
    memcpy(field, value, size);
    return 0;
}
API cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    Type found;
    if (!from_cuda(type, found) || ld < (int64_t)rows) return refuse("a matrix layout");
    return *made = new Layout{found, rows, columns, ld}, 0;
}
API cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, 0; }
API cublasLtMatmulPreferenceCreate(void** made) { return *made = (void*)0x70, 0; }
API cublasLtMatmulPreferenceDestroy(void*) { return 0; }
API cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return 0; }

struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
static const char* misfit(const Description* d, const Layout* a, const Layout* b, const Layout* c, const Layout* to) {
    const size_t m = d->transa ? a->columns : a->rows, k = d->transa ? a->rows : a->columns;
    const size_t k2 = d->transb ? b->columns : b->rows, n = d->transb ? b->rows : b->columns;
    if (k != k2 || to->rows != m || to->columns != n || c->rows != m || c->columns != n) return "a product's sizes do not fit";
    if (a->type != b->type || c->type != to->type || a->type != to->type) return "a product of different types";
    if (d->scale != 0 || (d->compute != 68 && d->compute != 77)) return "a product that does not add in f32";
    if (d->epilogue != 1 && d->epilogue != 4) return "an unknown epilogue";
    return nullptr;
}
API cublasLtMatmulAlgoGetHeuristic(void*, Description* d, Layout* a, Layout* b, Layout* c, Layout* to, void*, int wanted, Heuristic* found,
                                   int* count) {
    if (const char* wrong = misfit(d, a, b, c, to)) return refuse(wrong);
    if (wanted < 1) return refuse("no algorithm is wanted");
    memset(found, 0, sizeof *found);
    found->algorithm[0] = 1;
    return *count = 1, 0;
}
API cublasLtMatmul(void*, Description* d, const void* alpha, const void* a, Layout* a_layout, const void* b, Layout* b_layout, const void* beta,
                   const void* c, Layout* c_layout, void* to, Layout* to_layout, const uint64_t* algorithm, void* workspace, size_t bytes, void*) {
    if (const char* wrong = misfit(d, a_layout, b_layout, c_layout, to_layout)) return refuse(wrong);
    if (!algorithm || algorithm[0] != 1) return refuse("a product without an algorithm");
    if (!is_device(workspace, bytes)) return refuse("a workspace that is not allocated");
    const Type type = a_layout->type;
    for (const auto& [at, layout] : {std::pair<const void*, Layout*>{a, a_layout}, {b, b_layout}, {c, c_layout}, {to, to_layout}})
        if (!lies(at, layout->rows, layout->columns, layout->ld, type)) return refuse("a product's matrix is not within allocated memory");
    const size_t m = to_layout->rows, n = to_layout->columns, k = d->transa ? a_layout->rows : a_layout->columns;
    const void* bias = d->epilogue == 4 ? d->bias : nullptr;
    if (bias && !is_device(bias, m * size_of(type))) return refuse("a product's bias is not within allocated memory");
    const float factor = *(const float*)alpha, kept = *(const float*)beta;
    if (c_layout->ld != to_layout->ld) return refuse("a summand of another pitch");
    const Matrix left{type, a, (size_t)a_layout->ld, d->transa != 0}, right{type, b, (size_t)b_layout->ld, d->transb != 0};
    const size_t ld = to_layout->ld;
    submit_product(type == F32 ? "cublasLtMatmul f32" : "cublasLtMatmul half", m, n, k, (double)size_of(type) * (m * k + k * n + m * n * (kept != 0 ? 2 : 1)), type,
                   [=] { product(m, n, k, factor, left, right, kept, c, type, to, ld, bias); });
    return 0;
}

// cuDNN: convolutions, channels-last.

struct Tensor4 {
    Type type;
    int n, c, h, w;
};
struct Filter {
    Type type;
    int k, c, h, w;
};
struct Convolution {
    int pad[2], stride[2], math;
};

static bool from_cudnn(int type, Type& to) {
    switch (type) {
        case 0: to = F32; return true;
        case 2: to = F16; return true;
        case 9: to = BF16; return true;
        default: return false;
    }
}
constexpr int BAD_PARAM = 2000;

API cudnnCreate(void** handle) { return *handle = (void*)0x80, 0; }
API cudnnDestroy(void*) { return 0; }
API cudnnSetStream(void*, void*) { return 0; }
API cudnnCreateTensorDescriptor(Tensor4** made) { return *made = new Tensor4, 0; }
API cudnnDestroyTensorDescriptor(Tensor4* tensor) { return delete tensor, 0; }
API cudnnSetTensor4dDescriptor(Tensor4* tensor, int format, int type, int n, int c, int h, int w) {
    if (format != 1 || !from_cudnn(type, tensor->type)) return refuse("a tensor that is not channels-last"), BAD_PARAM;
    return tensor->n = n, tensor->c = c, tensor->h = h, tensor->w = w, 0;
}
API cudnnCreateFilterDescriptor(Filter** made) { return *made = new Filter, 0; }
API cudnnDestroyFilterDescriptor(Filter* filter) { return delete filter, 0; }
API cudnnSetFilter4dDescriptor(Filter* filter, int type, int format, int k, int c, int h, int w) {
    if (format != 1 || !from_cudnn(type, filter->type)) return refuse("a filter that is not channels-last"), BAD_PARAM;
    return filter->k = k, filter->c = c, filter->h = h, filter->w = w, 0;
}
API cudnnCreateConvolutionDescriptor(Convolution** made) { return *made = new Convolution, 0; }
API cudnnDestroyConvolutionDescriptor(Convolution* convolution) { return delete convolution, 0; }
API cudnnSetConvolution2dDescriptor(Convolution* c, int pad_h, int pad_w, int stride_h, int stride_w, int dilation_h, int dilation_w, int mode,
                                    int compute) {
    if (dilation_h != 1 || dilation_w != 1 || mode != 1 || compute != 0) return refuse("another kind of convolution"), BAD_PARAM;
    return *c = {{pad_h, pad_w}, {stride_h, stride_w}, 0}, 0;
}
API cudnnSetConvolutionMathType(Convolution* c, int math) { return c->math = math, 0; }
API cudnnCreateActivationDescriptor(void** made) { return *made = (void*)0x90, 0; }
API cudnnSetActivationDescriptor(void*, int mode, int, double) { return mode == 5 ? 0 : (refuse("an activation"), BAD_PARAM); }

struct Performance {
    int algorithm, status;
    float time;
    size_t memory;
    int deterministic, math, reserved[3];
};
constexpr size_t WORKSPACE = 1 << 20;  // what the convolutions here ask for, and do not need

static const char* misfit(const Tensor4* x, const Filter* w, const Convolution* c, const Tensor4* y) {
    if (x->type != w->type || x->type != y->type) return "a convolution of different types";
    if (x->c != w->c || y->c != w->k || x->n != y->n) return "a convolution's channels do not fit";
    if (y->h != (x->h + 2 * c->pad[0] - w->h) / c->stride[0] + 1 || y->w != (x->w + 2 * c->pad[1] - w->w) / c->stride[1] + 1)
        return "a convolution's sides do not fit";
    return nullptr;
}
static int advise(const Tensor4* x, const Filter* w, const Convolution* c, const Tensor4* y, int places, int* count, Performance* found) {
    if (const char* wrong = misfit(x, w, c, y)) return refuse(wrong), BAD_PARAM;
    if (places < 2) return *count = 0, 0;
    // the fastest may add in any order, and one may need more memory than there is
    found[0] = {0, 0, 1.0f, WORKSPACE, 0, c->math, {}};
    found[1] = {1, 0, 2.0f, WORKSPACE, 1, c->math, {}};
    return *count = 2, 0;
}
API cudnnGetConvolutionForwardAlgorithm_v7(void*, Tensor4* x, Filter* w, Convolution* c, Tensor4* y, int places, int* count, Performance* found) {
    return advise(x, w, c, y, places, count, found);
}
API cudnnGetConvolutionBackwardDataAlgorithm_v7(void*, Filter* w, Tensor4* y, Convolution* c, Tensor4* x, int places, int* count,
                                                Performance* found) {
    return advise(x, w, c, y, places, count, found);
}

// Patches of one image (rows y.h y.w, numbers w.h w.w x.c) from it, or added to it.
template <bool ADD> static void patches(const Tensor4& x, const Filter& w, const Convolution& c, const Tensor4& y, float* image, float* rows) {
    for (int oy = 0; oy < y.h; oy++)
        for (int ox = 0; ox < y.w; ox++)
            for (int ky = 0; ky < w.h; ky++)
                for (int kx = 0; kx < w.w; kx++) {
                    const int iy = oy * c.stride[0] + ky - c.pad[0], ix = ox * c.stride[1] + kx - c.pad[1];
                    float* row = rows + ((size_t)(oy * y.w + ox) * w.h * w.w + ky * w.w + kx) * x.c;
                    const bool inside = iy >= 0 && iy < x.h && ix >= 0 && ix < x.w;
                    float* pixel = image + ((size_t)iy * x.w + ix) * x.c;
                    for (int i = 0; i < x.c; i++) {
                        if (ADD && inside) pixel[i] += row[i];
                        if (!ADD) row[i] = inside ? pixel[i] : 0;
                    }
                }
}

static int convolve(const char* name, const Tensor4& x, const void* x_at, const Filter& w, const void* w_at, const Convolution& c, const Tensor4& y,
                    const void* y_at, bool backward, void* workspace, size_t bytes, const void* bias, const void* residual = nullptr) {
    if (const char* wrong = misfit(&x, &w, &c, &y)) return refuse(wrong), BAD_PARAM;
    const Type type = x.type;
    const size_t filter = (size_t)w.h * w.w * w.c, in = (size_t)x.h * x.w * x.c, pixels = (size_t)y.h * y.w;
    if (!is_device(x_at, x.n * in * size_of(type)) || !is_device(w_at, w.k * filter * size_of(type)) ||
        !is_device(y_at, y.n * pixels * w.k * size_of(type)) || !is_device(workspace, bytes) || bytes < WORKSPACE ||
        (bias && !is_device(bias, w.k * size_of(type))) || (residual && !is_device(residual, y.n * pixels * w.k * size_of(type))))
        return refuse("a convolution's memory is not allocated"), BAD_PARAM;
    const double moved = (double)size_of(type) * (x.n * in + w.k * filter + y.n * pixels * w.k * (residual ? 2 : 1));
    submit_product(name, y.n * pixels, w.k, filter, moved, type, [=] {
        std::vector<float> image(in), rows(pixels * filter);
        for (int n = 0; n < x.n; n++) {
            const char* from = (const char*)x_at + n * in * size_of(type);
            char* out = (char*)y_at + n * pixels * w.k * size_of(type);
            if (!backward) {
                for (size_t i = 0; i < in; i++) image[i] = read(type, from, i);
                patches<false>(x, w, c, y, image.data(), rows.data());
                const char* onto = (const char*)residual + n * pixels * w.k * size_of(type);
                product(w.k, pixels, filter, 1, {type, w_at, filter, true}, {F32, rows.data(), filter, false}, residual ? 1 : 0, onto, type,
                        out, w.k, bias);
            } else {
                product(filter, pixels, w.k, 1, {type, w_at, filter, false}, {type, out, (size_t)w.k, false}, 0, nullptr, F32,
                        rows.data(), filter, nullptr);
                std::fill(image.begin(), image.end(), 0.0f);
                patches<true>(x, w, c, y, image.data(), rows.data());
                for (size_t i = 0; i < in; i++) write(type, (void*)from, i, image[i]);
            }
        }
    });
    return 0;
}
API cudnnConvolutionForward(void*, const void* alpha, Tensor4* x, const void* x_at, Filter* w, const void* w_at, Convolution* c, int,
                            void* workspace, size_t bytes, const void* beta, Tensor4* y, void* y_at) {
    if (*(const float*)alpha != 1 || *(const float*)beta != 0) return refuse("factors of a convolution"), BAD_PARAM;
    return convolve(x->type == F32 ? "convolution f32" : "convolution half", *x, x_at, *w, w_at, *c, *y, y_at, false, workspace, bytes, nullptr);
}
API cudnnConvolutionBiasActivationForward(void*, const void* alpha1, Tensor4* x, const void* x_at, Filter* w, const void* w_at, Convolution* c,
                                          int algorithm, void* workspace, size_t bytes, const void* alpha2, Tensor4* z, const void* z_at,
                                          Tensor4* b, const void* bias, void*, Tensor4* y, void* y_at) {
    const float factor = *(const float*)alpha2;
    if (*(const float*)alpha1 != 1 || (factor != 0 && factor != 1)) return refuse("factors of a convolution"), BAD_PARAM;
    if (z->n != y->n || z->c != y->c || z->h != y->h || z->w != y->w || z->type != y->type) return refuse("a convolution's summand"), BAD_PARAM;
    if (algorithm != 1) return refuse("a bias with this algorithm"), 3000;  // CUDNN_STATUS_NOT_SUPPORTED
    if (b->c != w->k || b->n != 1 || b->h != 1 || b->w != 1 || b->type != x->type) return refuse("a convolution's bias"), BAD_PARAM;
    return convolve(x->type == F32 ? "convolution f32" : "convolution half", *x, x_at, *w, w_at, *c, *y, y_at, false, workspace, bytes, bias,
                    factor == 1 ? z_at : nullptr);
}
API cudnnConvolutionBackwardData(void*, const void* alpha, Filter* w, const void* w_at, Tensor4* y, const void* y_at, Convolution* c, int,
                                 void* workspace, size_t bytes, const void* beta, Tensor4* x, void* x_at) {
    if (*(const float*)alpha != 1 || *(const float*)beta != 0) return refuse("factors of a convolution"), BAD_PARAM;
    return convolve(x->type == F32 ? "convolution backward f32" : "convolution backward half", *x, x_at, *w, w_at, *c, *y, y_at, true, workspace,
                    bytes, nullptr);
}
extern "C" __attribute__((visibility("default"))) size_t cudnnGetVersion() { return 91900; }

// cuRAND is opened and never asked.
API curandCreateGenerator(void** made, int) { return *made = (void*)0xa0, 0; }
API curandDestroyGenerator(void*) { return 0; }
API curandSetStream(void*, void*) { return 0; }
API curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return 0; }

// The operations of our kernels whose arithmetic may count beside their bytes: attention on tensor cores (f16, bf16), LoRA
// in f32. The others move memory.
std::pair<double, double> standin::floor_of(const std::string& name, const std::vector<unsigned long long>& v, unsigned, unsigned gy,
                                            unsigned gz, double bytes) {
    const auto starts = [&](const char* prefix) { return name.rfind(prefix, 0) == 0; };
    double flops = 0, rate = F32_FLOPS;
    if (starts("attention_fwd") || starts("attention_bwd_q") || starts("attention_bwd_kv")) {
        const size_t at = starts("attention_fwd") ? 5 : starts("attention_bwd_q") ? 7 : 10;
        flops = (starts("attention_fwd") ? 4.0 : starts("attention_bwd_q") ? 6.0 : 8.0) * v[at] * v[at + 1] * v[at + 3] * gy * gz;
        if (name.size() > 3 && name.substr(name.size() - 3) != "f32") rate = HALF_FLOPS;
    } else if (starts("lora_fwd")) {
        flops = 2.0 * v[5] * v[8] * (v[6] + v[7]);
    } else if (starts("lora_bwd")) {
        flops = 2.0 * v[7] * v[10] * (2 * v[8] + v[9]);
    } else if (starts("lora_factors")) {
        flops = 2.0 * v[5] * v[8] * (v[6] + v[7]);
    }
    return {flops, std::max(bytes / BYTES_A_SECOND, flops / rate)};
}

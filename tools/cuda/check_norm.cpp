// Group and layer norm against f64.
#include "norm.cu"
#include "check.h"

using namespace check;

struct Norm {
    size_t batch, pixels, channels, groups;
};

static double silu_slope(double z) {
    const double s = 1 / (1 + std::exp(-z));
    return s * (1 + z * (1 - s));
}

// y and d_x in f64.
template <typename T>
static void reference(const Norm& n, Buffer<T>& x, Buffer<T>& dy, Buffer<T>& w, Buffer<T>& b, double eps, bool silu,
                      std::vector<double>& y, std::vector<double>& dx) {
    const size_t per_group = n.channels / n.groups, count = n.pixels * per_group;
    y.resize(n.batch * n.pixels * n.channels);
    dx.resize(y.size());
    for (size_t image = 0; image < n.batch; image++)
        for (size_t group = 0; group < n.groups; group++) {
            auto at = [&](size_t i) {
                return (image * n.pixels + i / per_group) * n.channels + group * per_group + i % per_group;
            };
            double mean = 0, var = 0, g_mean = 0, gx_mean = 0;
            for (size_t i = 0; i < count; i++) mean += x[at(i)] / count;
            for (size_t i = 0; i < count; i++) var += (x[at(i)] - mean) * (x[at(i)] - mean) / count;
            const double rstd = 1 / std::sqrt(var + eps);
            std::vector<double> g(count);
            for (size_t i = 0; i < count; i++) {
                const size_t c = at(i) % n.channels;
                const double hat = (x[at(i)] - mean) * rstd, z = hat * w[c] + b[c];
                y[at(i)] = silu ? z / (1 + std::exp(-z)) : z;
                g[i] = dy[at(i)] * (silu ? silu_slope(z) : 1) * w[c];
                g_mean += g[i] / count;
                gx_mean += g[i] * hat / count;
            }
            for (size_t i = 0; i < count; i++)
                dx[at(i)] = rstd * (g[i] - g_mean - (x[at(i)] - mean) * rstd * gx_mean);
        }
}

// As src/ops/group_norm/cuda.rs launches it.
template <typename T> static void group_norm(const Norm& n, bool silu, double mean, size_t want_chunks) {
    const std::string name = "group norm " + std::to_string(n.batch) + "x" + std::to_string(n.pixels) + "x" +
                             std::to_string(n.channels) + "/" + std::to_string(n.groups);
    const size_t per_group = n.channels / n.groups, size = n.batch * n.pixels * n.channels;
    const bool vector = n.channels % 8 == 0 && n.channels <= 4096;
    const size_t tile = vector ? n.groups : std::min(n.groups, std::max<size_t>(1, 512 / per_group));
    const size_t lanes = tile * per_group / (vector ? 8 : 1), threads = (std::max<size_t>(lanes, 512 / lanes * lanes) + 31) / 32 * 32;
    const size_t chunk = blocks(n.pixels, want_chunks), chunks = blocks(n.pixels, chunk);
    const size_t shared = (threads * (vector ? 8 : 1) * 2 + 4 * tile) * 4;
    auto x = normal<T>(size, 1, mean), dy = normal<T>(size), w = normal<T>(n.channels), b = normal<T>(n.channels);
    Buffer<T> y(size), dx(size);
    Buffer<float> partial(2 * n.batch * n.groups * chunks), d_partial(partial.size);
    const dim3 grid = {(unsigned)chunks, blocks(n.groups, tile), (unsigned)n.batch};
    const float eps = 1e-5f;
#define SHAPE n.pixels, n.channels, per_group, tile, chunk, vector
    in_any_order(
        name,
        [&] {
            emulator::launch(grid, threads, shared, KERNEL_OF(group_norm_sums, T), partial, x, SHAPE);
            emulator::launch(grid, threads, shared, KERNEL_OF(group_norm_apply, T), y, x, w, b, partial, eps, silu, SHAPE);
            emulator::launch(grid, threads, shared, KERNEL_OF(group_norm_bwd_sums, T), d_partial, dy, x, w, b, partial, eps, silu,
                             SHAPE);
            emulator::launch(grid, threads, shared, KERNEL_OF(group_norm_bwd_apply, T), dx, dy, x, w, b, partial, d_partial, eps,
                             silu, SHAPE);
        },
        {{y.at(), size * sizeof(T)}, {dx.at(), size * sizeof(T)}});
    std::vector<double> y_ref, dx_ref;
    reference(n, x, dy, w, b, eps, silu, y_ref, dx_ref);
    // 1000 carries 24 bits: 3e-5 of the unit variance is lost where the mean is rounded to f32
    const double bound = mean == 0 ? 0 : rounding<T>() + 1e-4;
    close(name + " fwd", y, y_ref, bound);
    // the gradient of one or two numbers is what cancellation leaves
    if (n.pixels * per_group > 2) close(name + " bwd", dx, dx_ref, n.pixels * per_group < 8 ? 4 * rounding<T>() + 1e-4 : bound);
    report(partial.guarded() && d_partial.guarded(), name + ": partial sums outside their memory", 0, 0);
}

template <typename T> static void layer_norm(size_t rows, size_t channels, size_t shift) {
    const std::string name = "layer norm " + std::to_string(rows) + "x" + std::to_string(channels);
    auto x = normal<T>(rows * channels, 2, 3, shift), dy = normal<T>(rows * channels, 1, 0, shift);
    auto w = normal<T>(channels, 1, 0, shift), b = normal<T>(channels, 1, 0, shift);
    Buffer<T> y(rows * channels, shift), dx(rows * channels, shift);
    const bool vector = channels % 8 == 0 && shift == 0;
    const dim3 grid = {blocks(rows, 8)};
    const float eps = 1e-5f;
    const std::vector<std::pair<void*, size_t>> outputs = {{y.at(), y.size * sizeof(T)}, {dx.at(), dx.size * sizeof(T)}};
    in_any_order(
        name,
        [&] {
            emulator::launch(grid, 256, 0, KERNEL_OF(layer_norm_fwd, T), y, x, w, b, rows, channels, eps, vector);
            emulator::launch(grid, 256, 0, KERNEL_OF(layer_norm_bwd, T), dx, dy, x, w, rows, channels, eps, vector);
        },
        outputs);
    // a layer norm is a group norm of one group over "images" of one pixel
    std::vector<double> y_ref, dx_ref;
    reference(Norm{rows, 1, channels, 1}, x, dy, w, b, eps, false, y_ref, dx_ref);
    close(name + " fwd", y, y_ref);
    if (channels > 2) close(name + " bwd", dx, dx_ref);
}

template <typename T> static void all() {
    for (const Norm& n : {Norm{1, 1, 10, 2}, Norm{2, 15, 6, 3}, Norm{2, 28, 8, 8}, Norm{1, 600, 6, 2}, Norm{2, 6, 5, 1},
                          Norm{2, 64, 64, 32}, Norm{1, 300, 320, 32}, Norm{1, 17, 1280, 32}, Norm{1, 9, 2560, 32},
                          Norm{1, 5, 1000, 8}, Norm{1, 7, 1022, 2}})
        for (bool silu : {false, true}) group_norm<T>(n, silu, 0, 5);
    group_norm<T>({2, 1000, 32, 4}, true, 0, 70);
    if (sizeof(T) == 4) group_norm<T>({1, 256, 4, 2}, false, 1000, 3);
    for (size_t channels : {1, 2, 7, 8, 64, 77, 320, 768, 1280, 1288})
        for (size_t rows : {1, 3, 20}) layer_norm<T>(rows, channels, 0);
    layer_norm<T>(5, 64, 1);
}

int main() {
    all<float>();
    all<bf16>();
    all<f16>();
    return finish("norm");
}

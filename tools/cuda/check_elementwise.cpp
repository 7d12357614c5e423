// Elementwise operations, upsampling, concatenation and the check for finite numbers, against f64.
#include "elementwise.cu"
#include "check.h"

using namespace check;

static double value64(int f, double x) {
    const double s = 1 / (1 + std::exp(-x)), q = 1 / (1 + std::exp(-1.702 * x)), cdf = 0.5 * std::erfc(-x / std::sqrt(2.0));
    const double u = x / 2 + 0.5;
    const double by_tanh = x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) / 2;
    const double values[] = {x, std::max(x, 0.0), x * s, x * cdf, x * q, std::tanh(x), s, by_tanh, std::min(std::max(u, 0.0), 1.0)};
    return values[f];
}
static double slope64(int f, double x) {
    const double s = 1 / (1 + std::exp(-x)), q = 1 / (1 + std::exp(-1.702 * x)), cdf = 0.5 * std::erfc(-x / std::sqrt(2.0));
    const double density = std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
    const double t = std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
    const double slopes[] = {1,
                             x > 0 ? 1.0 : 0.0,
                             s * (1 + x * (1 - s)),
                             cdf + x * density,
                             q * (1 + 1.702 * x * (1 - q)),
                             1 - std::tanh(x) * std::tanh(x),
                             s * (1 - s),
                             (1 + t) / 2 + x * (1 - t * t) / 2 * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x),
                             x < -1 || x > 1 ? 0.0 : 0.5};
    return slopes[f];
}

template <typename T, typename F> static std::vector<double> tabulate(size_t n, F f) {
    std::vector<double> all(n);
    for (size_t i = 0; i < n; i++) all[i] = f(i);
    return all;
}

template <typename T> static void maps() {
    for (size_t n : {1, 7, 8, 2048, 2055, 5000})
        for (size_t shift : {0, 1}) {
            const std::string name = " " + std::to_string(n) + "+" + std::to_string(shift);
            auto x = normal<T>(n, 2, 0, shift), d = normal<T>(n, 1, 0, shift);
            Buffer<T> y(n, shift);
            const dim3 grid = {blocks(n, 2048)};
            for (int f = 0; f < 9; f++) {
                emulator::launch(grid, 256, 0, KERNEL_OF(activation_fwd, T), y, x, n, f, shift == 0);
                close("activation fwd " + std::to_string(f) + name, y, tabulate<T>(n, [&](size_t i) { return value64(f, x[i]); }));
                emulator::launch(grid, 256, 0, KERNEL_OF(activation_bwd, T), y, d, x, n, f, shift == 0);
                close("activation bwd " + std::to_string(f) + name, y,
                      tabulate<T>(n, [&](size_t i) { return d[i] * slope64(f, x[i]); }));
            }
            emulator::launch(grid, 256, 0, KERNEL_OF(add, T), y, x, d, n, shift == 0);
            close("add" + name, y, tabulate<T>(n, [&](size_t i) { return x[i] + d[i]; }));
        }
    for (double bad : {0.0, (double)INFINITY, -(double)INFINITY, (double)NAN})
        for (size_t place : {0, 300, 1999}) {
            auto x = normal<T>(2000);
            if (bad != 0) x.set(place, bad);
            double slot = 7;
            emulator::launch({2}, 256, 0, KERNEL_OF(not_finite, T), &slot, x, 2000);
            report(bad != 0 ? std::isnan(slot) : slot == 7, std::string("finite ") + type_name<T>(), slot, bad);
        }
    // large arguments stay finite
    for (int f = 0; f < 9; f++) {
        Buffer<T> x(4), one(4), y(4), d(4);
        const double large[] = {-200, -90, 90, 200};
        for (int i = 0; i < 4; i++) x.set(i, large[i]), one.set(i, 1);
        emulator::launch({1}, 256, 0, KERNEL_OF(activation_fwd, T), y, x, 4, f, 1);
        emulator::launch({1}, 256, 0, KERNEL_OF(activation_bwd, T), d, one, x, 4, f, 1);
        for (int i = 0; i < 4; i++) report(std::isfinite(y[i]) && std::isfinite(d[i]), "large arguments", x[i], f);
    }
}

template <int VEC, typename T> static void rows_of(size_t rows, size_t width) {
    const std::string name = " " + std::to_string(rows) + "x" + std::to_string(width) + "/" + std::to_string(VEC);
    const size_t n = rows * width;
    const dim3 grid = {blocks(n, 256 * VEC)};
    {
        auto x = normal<T>(n), s = normal<T>(width);
        Buffer<T> y(n);
        emulator::launch(grid, 256, 0, KERNEL_OF(add_channels, T), y, x, s, rows, width, VEC == LANE);
        close("add_channels" + name, y, tabulate<T>(n, [&](size_t i) { return x[i] + s[i % width]; }));
    }
    {
        auto x = normal<T>(2 * n), d = normal<T>(n);
        Buffer<T> y(n), dx(2 * n);
        emulator::launch(grid, 256, 0, KERNEL_OF(geglu_fwd, T), y, x, rows, width, VEC == LANE);
        auto u = [&](size_t i) { return x[i / width * 2 * width + i % width]; };
        auto v = [&](size_t i) { return x[i / width * 2 * width + width + i % width]; };
        close("geglu fwd" + name, y, tabulate<T>(n, [&](size_t i) { return u(i) * value64(GELU, v(i)); }));
        emulator::launch(grid, 256, 0, KERNEL_OF(geglu_bwd, T), dx, d, x, rows, width, VEC == LANE);
        close("geglu bwd" + name, dx, tabulate<T>(2 * n, [&](size_t at) {
                  const size_t row = at / (2 * width), col = at % (2 * width), i = row * width + col % width;
                  return col < width ? d[i] * value64(GELU, v(i)) : d[i] * u(i) * slope64(GELU, v(i));
              }));
    }
    for (size_t right : {VEC * 1, VEC * 3}) {
        auto a = normal<T>(n), b = normal<T>(rows * right);
        const size_t all = rows * (width + right);
        Buffer<T> y(all), a2(n), b2(b.size);
        const dim3 grid = {blocks(all, 256 * VEC)};
        emulator::launch(grid, 256, 0, KERNEL_OF(concat_fwd, T), y, a, b, rows, width, right, VEC == LANE);
        close("concat fwd" + name, y, tabulate<T>(all, [&](size_t i) {
                  const size_t row = i / (width + right), col = i % (width + right);
                  return col < width ? a[row * width + col] : b[row * right + col - width];
              }), 1e-12);
        emulator::launch(grid, 256, 0, KERNEL_OF(concat_bwd, T), a2, b2, y, rows, width, right, VEC == LANE);
        close("concat bwd" + name, a2, a.numbers(), 1e-12);
        close("concat bwd" + name, b2, b.numbers(), 1e-12);
    }
}

template <int VEC, typename T> static void upsample(size_t h, size_t w, size_t height, size_t width, size_t channels) {
    const std::string name = " " + std::to_string(h) + "x" + std::to_string(w) + "->" + std::to_string(height) + "x" + std::to_string(width);
    const size_t batch = 2, in = batch * h * w * channels, out = batch * height * width * channels;
    auto x = normal<T>(in), d = normal<T>(out);
    Buffer<T> y(out), dx(in);
    std::vector<double> y_ref(out), dx_ref(in, 0.0);
    for (size_t i = 0; i < out; i++) {
        const size_t c = i % channels, col = i / channels % width, row = i / channels / width % height, b = i / channels / width / height;
        const size_t source = ((b * h + row * h / height) * w + col * w / width) * channels + c;
        y_ref[i] = x[source];
        dx_ref[source] += d[i];
    }
    const bool vector = VEC == LANE;
    emulator::launch({blocks(out, 256 * VEC)}, 256, 0, KERNEL_OF(upsample_fwd, T), y, x, batch, h, w, height, width, channels, vector);
    emulator::launch({blocks(in, 256 * VEC)}, 256, 0, KERNEL_OF(upsample_bwd, T), dx, d, batch, h, w, height, width, channels, vector);
    close("upsample fwd" + name, y, y_ref, 1e-12);
    close("upsample bwd" + name, dx, dx_ref);
}

template <typename T> static void all() {
    maps<T>();
    rows_of<1, T>(1, 1);
    rows_of<1, T>(5, 7);
    rows_of<1, T>(40, 16);
    rows_of<LANE, T>(3, 8);
    rows_of<LANE, T>(33, 40);
    upsample<1, T>(1, 1, 2, 2, 3);
    upsample<1, T>(3, 5, 5, 9, 3);
    upsample<1, T>(4, 2, 7, 3, 5);
    upsample<LANE, T>(3, 5, 6, 10, 16);
    upsample<LANE, T>(3, 3, 3, 3, 8);
}

int main() {
    all<float>();
    all<bf16>();
    all<f16>();
    return finish("elementwise");
}

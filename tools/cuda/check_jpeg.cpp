// The size of a JPEG and its gradient: the sum against f64 written without blocks, the gradient against differences of it.
#include "jpeg.cu"
#include "check.h"

using namespace check;

static Jpeg constants() {
    Jpeg j;
    for (int k = 0; k < 8; k++)
        for (int n = 0; n < 8; n++)
            j.basis[8 * k + n] = (k == 0 ? std::sqrt(0.125) : 0.5) * std::cos(M_PI * (2 * n + 1) * k / 16);
    std::uniform_real_distribution<double> numbers(0.5, 3);
    for (auto& table : j.steps)
        for (double& step : table) step = numbers(rng);
    for (auto& row : j.weights)
        for (double& weight : row) weight = 60 * (numbers(rng) - 1.7);
    for (int c = 0; c < 3; c++) j.ac_bits[c] = numbers(rng), j.ac_nonzero[c] = numbers(rng);
    j.bend = 0.25, j.header = 600, j.block = 0.6, j.dc_bits = 0.2;
    return j;
}

// Bytes of one image, plane by plane.
static double bytes(const Jpeg& j, const std::vector<double>& image, size_t h, size_t w) {
    double sum = j.header;
    for (int component = 0; component < 3; component++) {
        const size_t stride = component == 0 ? 1 : 2;
        const size_t height = (h + 15) / 16 * 16 / stride, width = (w + 15) / 16 * 16 / stride;
        std::vector<double> plane(height * width, component == 0 ? -128.0 : 0.0), u(height * width);
        for (size_t y = 0; y < height * stride; y++)
            for (size_t x = 0; x < width * stride; x++)
                for (int c = 0; c < 3; c++)
                    plane[y / stride * width + x / stride] +=
                        j.weights[component][c] * image[c * h * w + std::min(y, h - 1) * w + std::min(x, w - 1)];
        for (size_t y = 0; y < height; y++)
            for (size_t x = 0; x < width; x++) {
                double all = 0;
                for (size_t m = 0; m < 8; m++)
                    for (size_t n = 0; n < 8; n++)
                        all += j.basis[y % 8 * 8 + m] * j.basis[x % 8 * 8 + n] * plane[(y / 8 * 8 + m) * width + x / 8 * 8 + n];
                u[y * width + x] = all / j.steps[stride - 1][y % 8 * 8 + x % 8];
            }
        for (size_t y = 0; y < height; y++)
            for (size_t x = 0; x < width; x++) {
                const double v = u[y * width + x];
                if (y % 8 == 0 && x % 8 == 0) {
                    const double d = v - (x == 0 ? 0.0 : u[y * width + x - 8]);
                    sum += j.block + j.dc_bits * 0.5 * std::log2(1 + d * d / j.bend);
                } else {
                    sum += j.ac_bits[component] * 0.5 * std::log2(1 + v * v / j.bend) + j.ac_nonzero[component] * v * v / (v * v + j.bend);
                }
            }
    }
    return sum;
}

template <typename T> static void jpeg(size_t batch, size_t h, size_t w) {
    const std::string name = "jpeg " + std::to_string(h) + "x" + std::to_string(w);
    Jpeg j = constants();
    const size_t luma = (h + 15) / 16 * 2 * ((w + 15) / 16 * 2), all = luma + luma / 2, size = batch * 3 * h * w;
    Buffer<T> pixels(size), sizes(batch), gradient(size);
    std::uniform_real_distribution<double> uniform(0, 1);
    for (size_t i = 0; i < size; i++) pixels.set(i, uniform(rng));
    auto cotangent = normal<T>(batch);
    std::vector<double> u(batch * all * 64, NAN), d(u.size(), NAN), parts(batch * 3, NAN);
    const unsigned images = (unsigned)batch;
    in_any_order(
        name,
        [&] {
            emulator::launch({(unsigned)all, images}, 64, 0, KERNEL_OF(jpeg_coefficients, T), u.data(), pixels, &j, h, w);
            emulator::launch({3, images}, 256, 0, KERNEL_OF(jpeg_bytes, T), parts.data(), u.data(), &j, all, h, w);
            emulator::launch({images}, 64, 0, KERNEL_OF(jpeg_total, T), sizes, parts.data(), &j, 3);
            emulator::launch({(unsigned)all, images}, 64, 0, KERNEL_OF(jpeg_slopes, T), d.data(), u.data(), cotangent, &j, h, w);
            emulator::launch({blocks(batch * h * w, 256)}, 256, 0, KERNEL_OF(jpeg_gather, T), gradient, d.data(), &j, batch, h, w);
        },
        {{sizes.at(), batch * sizeof(T)}, {gradient.at(), size * sizeof(T)}});
    std::vector<double> sizes_ref(batch), gradient_ref(size);
    for (size_t b = 0; b < batch; b++) {
        std::vector<double> image(3 * h * w);
        for (size_t i = 0; i < image.size(); i++) image[i] = pixels[b * 3 * h * w + i];
        sizes_ref[b] = bytes(j, image, h, w);
        // central differences of some pixels, the last ones (which repeat) among them; the others are not looked at
        const auto found = gradient.numbers();
        for (size_t i = 0; i < image.size(); i++) gradient.set(b * image.size() + i, 0);
        for (size_t k = 0; k < 12; k++) {
            const size_t i = k < 3 ? (k + 1) * h * w - 1 : std::uniform_int_distribution<size_t>(0, image.size() - 1)(rng);
            const double x = image[i], step = 1e-6;
            image[i] = x + step;
            double difference = bytes(j, image, h, w);
            image[i] = x - step;
            difference -= bytes(j, image, h, w);
            image[i] = x;
            gradient.set(b * image.size() + i, found[b * image.size() + i]);
            gradient_ref[b * image.size() + i] = cotangent[b] * difference / (2 * step);
        }
    }
    close(name + " fwd", sizes, sizes_ref);
    close(name + " bwd", gradient, gradient_ref, rounding<T>() + 1e-5);
}

template <typename T> static void sizes() {
    jpeg<T>(1, 16, 16);
    jpeg<T>(2, 9, 21);
    jpeg<T>(1, 33, 5);
    jpeg<T>(1, 1, 1);
}

int main() {
    sizes<float>();
    sizes<bf16>();
    sizes<f16>();
    return finish("jpeg");
}

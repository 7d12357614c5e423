// LoRA's products and gradients against f64.
#include "lora.cu"
#include "check.h"

using namespace check;

template <typename T>
static void lora(size_t rows, size_t in, size_t width, size_t rank, bool tall, size_t want_shares, size_t shift = 0) {
    const std::string name = "lora " + std::to_string(rows) + ", " + std::to_string(in) + "->" + std::to_string(width) + ", rank " +
                             std::to_string(rank) + (tall ? " tall" : "");
    const float scale = 0.7f;
    auto x = normal<T>(rows * in, 1, 0, shift), y = normal<T>(rows * width, 1, 0, shift), d_y = normal<T>(rows * width, 1, 0, shift);
    auto a = normal<float>(rank * in), b = normal<float>(width * rank);
    Buffer<T> out(rows * width, shift), d_x(rows * in, shift);
    Buffer<float> low(rows * rank), d_low(rows * rank), d_a(rank * in), d_b(width * rank);
    const size_t share = blocks(rows, want_shares), shares = blocks(rows, share), per_block = 8 * (tall ? 4 : 1);
    Buffer<float> parts(shares * rank * (in + width));
    const bool vector = in % 4 == 0 && width % 4 == 0 && shift == 0;
    const size_t tile = RANKS * WIDTH * 4, shared = per_block * rank * 4;
    in_any_order(
        name,
        [&] {
            emulator::launch({blocks(rows, per_block)}, 256, tile + shared, KERNEL_OF(lora_fwd, T), out, y, x, a, b, rows, in, width,
                             rank, scale, tall, vector);
            emulator::launch({blocks(rows, per_block)}, 256, tile + 2 * shared, KERNEL_OF(lora_bwd, T), d_x, low, d_low, d_y, x, a,
                             b, rows, in, width, rank, scale, tall, vector);
            emulator::launch({blocks(in, 256) + blocks(width, 256), blocks(rank, 8), (unsigned)shares}, 256, 0,
                             KERNEL_OF(lora_factors, T), parts, x, d_y, low, d_low, rows, in, width, rank, share, vector);
            emulator::launch({blocks(rank * (in + width), 256)}, 256, 0, KERNEL_NAMED(lora_sum_f32), d_a, d_b, parts, in, width,
                             rank, shares, scale);
        },
        {{out.at(), out.size * sizeof(T)}, {d_x.at(), d_x.size * sizeof(T)}, {d_a.at(), d_a.size * 4}, {d_b.at(), d_b.size * 4}});

    const auto X = x.numbers(), Y = y.numbers(), D = d_y.numbers(), A = a.numbers(), B = b.numbers();
    const double s = scale;
    std::vector<double> out_ref = Y, dx_ref(rows * in), da_ref(rank * in), db_ref(width * rank);
    for (size_t i = 0; i < rows; i++)
        for (size_t r = 0; r < rank; r++) {
            double l = 0, d = 0;
            for (size_t c = 0; c < in; c++) l += X[i * in + c] * A[r * in + c];
            for (size_t c = 0; c < width; c++) d += s * D[i * width + c] * B[c * rank + r];
            for (size_t c = 0; c < width; c++) {
                out_ref[i * width + c] += s * l * B[c * rank + r];
                db_ref[c * rank + r] += s * l * D[i * width + c];
            }
            for (size_t c = 0; c < in; c++) {
                dx_ref[i * in + c] += d * A[r * in + c];
                da_ref[r * in + c] += d * X[i * in + c];
            }
        }
    close(name + " fwd", out, out_ref);
    close(name + " d_x", d_x, dx_ref);
    close(name + " d_A", d_a, da_ref, 3e-6);
    close(name + " d_B", d_b, db_ref, 3e-6);
    report(low.guarded() && d_low.guarded() && parts.guarded(), name + ": intermediate sums outside their memory", 0, 0);
}

template <typename T> static void all() {
    for (bool tall : {false, true}) {
        lora<T>(1, 1, 1, 1, tall, 1);
        lora<T>(5, 7, 3, 2, tall, 2);
        lora<T>(77, 64, 40, 4, tall, 3);
        lora<T>(70, 320, 320, 16, tall, 2);
        lora<T>(40, 768, 320, 11, tall, 4);
        lora<T>(33, 516, 1030, 9, tall, 1);
    }
    lora<T>(20, 64, 64, 130, false, 2);
    lora<T>(20, 40, 40, 4, true, 1, 1);
}

int main() {
    all<float>();
    all<bf16>();
    all<f16>();
    return finish("lora");
}

// The softmax of rows and its backward against f64.
#include "softmax.cu"
#include "check.h"

using namespace check;

template <typename T> static void softmax(size_t rows, size_t m, size_t first, bool causal, double scale) {
    const std::string name = "softmax " + std::to_string(rows) + "x" + std::to_string(m) + (causal ? " causal" : "");
    auto s = normal<float>(rows * m, scale), d_p = normal<float>(rows * m);
    Buffer<T> p(rows * m), p2(rows * m), d_s(rows * m);
    in_any_order(
        name,
        [&] {
            emulator::launch({(unsigned)rows}, 256, 0, KERNEL_OF(softmax_fwd, T), p, s, m, first, causal);
            emulator::launch({(unsigned)rows}, 256, 0, KERNEL_OF(softmax_bwd, T), p2, d_s, s, d_p, m, first, causal);
        },
        {{p.at(), p.size * sizeof(T)}, {d_s.at(), d_s.size * sizeof(T)}});
    std::vector<double> p_ref(rows * m), d_ref(rows * m);
    for (size_t r = 0; r < rows; r++) {
        const size_t keys = causal ? std::min(m, first + r + 1) : m;
        double top = -INFINITY, sum = 0, along = 0;
        for (size_t i = 0; i < keys; i++) top = std::max(top, s[r * m + i]);
        for (size_t i = 0; i < keys; i++) sum += p_ref[r * m + i] = std::exp(s[r * m + i] - top);
        for (size_t i = 0; i < keys; i++) along += (p_ref[r * m + i] /= sum) * d_p[r * m + i];
        for (size_t i = 0; i < keys; i++) d_ref[r * m + i] = p_ref[r * m + i] * (d_p[r * m + i] - along);
    }
    const double bound = rounding<T>() + 3e-6 * std::max(1.0, scale);
    close(name + " fwd", p, p_ref, bound);
    close(name + " fwd in bwd", p2, p_ref, bound);
    if (m > 1) close(name + " bwd", d_s, d_ref, 2 * bound);
}

template <typename T> static void all() {
    softmax<T>(3, 1, 0, false, 1);
    softmax<T>(2, 77, 0, false, 3);
    softmax<T>(5, 1000, 0, false, 30);
    softmax<T>(40, 300, 260, true, 3);
}

int main() {
    all<float>();
    all<bf16>();
    all<f16>();
    return finish("softmax");
}

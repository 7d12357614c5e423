// AdamW, weighted sums and the global norm over many tensors at once, against f64.
#include "optim.cu"
#include "check.h"

using namespace check;

int main() {
    const std::vector<size_t> sizes = {1, 7, 1024, 1025, 5120, 3};
    size_t total = 0, longest = 0;
    std::vector<Buffer<float>> p, g, m, v;
    for (size_t n : sizes) {
        p.push_back(normal<float>(n)), g.push_back(normal<float>(n)), m.push_back(normal<float>(n));
        v.push_back(normal<float>(n));
        for (size_t i = 0; i < n; i++) v.back().set(i, std::fabs(v.back()[i]));
    }
    std::vector<i64> table;
    for (size_t t = 0; t < sizes.size(); t++) {
        for (i64 x : {(i64)sizes[t], (i64)total, (i64)p[t].at(), (i64)g[t].at(), (i64)m[t].at(), (i64)v[t].at()}) table.push_back(x);
        total += sizes[t];
        longest = std::max(longest, sizes[t]);
    }
    const dim3 grid = {blocks(longest, 1024), (unsigned)sizes.size()};
    Buffer<float> p2(total), m2(total), v2(total), sum(total), scaled(total);
    const float decay = 0.99f, b1 = 0.9f, b2 = 0.999f, r1 = 0.1f, r2 = 0.001f, step = 0.01f, root = 0.5f, eps = 1e-8f;
    emulator::launch(grid, 256, 0, KERNEL_NAMED(adamw_f32), p2, m2, v2, table.data(), decay, b1, b2, r1, r2, step, root, eps);
    emulator::launch(grid, 256, 0, KERNEL_NAMED(weighted_sum_f32), sum, table.data(), 0.75f, 0.25f);
    std::vector<double> p_ref, m_ref, v_ref, sum_ref, scaled_ref;
    double squares = 0;
    for (size_t t = 0; t < sizes.size(); t++)
        for (size_t i = 0; i < sizes[t]; i++) {
            m_ref.push_back((double)b1 * m[t][i] + (double)r1 * g[t][i]);
            v_ref.push_back((double)b2 * v[t][i] + (double)r2 * g[t][i] * g[t][i]);
            p_ref.push_back(p[t][i] * (double)decay - (double)step * m_ref.back() / (std::sqrt(v_ref.back()) / root + eps));
            sum_ref.push_back(0.75 * p[t][i] + 0.25 * g[t][i]);
            scaled_ref.push_back(0.5 * p[t][i]);
            squares += p[t][i] * p[t][i];
        }
    close("adamw p", p2, p_ref);
    close("adamw m", m2, m_ref);
    close("adamw v", v2, v_ref);
    close("weighted sum", sum, sum_ref);

    std::vector<double> parts(grid.x * grid.y, NAN);
    double norm = NAN;
    in_any_order(
        "global norm",
        [&] {
            emulator::launch(grid, 256, 0, KERNEL_NAMED(square_sums_f32), parts.data(), table.data());
            emulator::launch({1}, 256, 0, KERNEL_NAMED(norm_f32), &norm, parts.data(), parts.size());
        },
        {{&norm, 8}});
    report(std::fabs(norm / std::sqrt(squares) - 1) < 1e-12, "global norm", norm, std::sqrt(squares));
    Buffer<float> clipped(total);
    for (double part : {0.25, 1.5, (double)INFINITY}) {  // of the norm: the first one clips
        const float max_norm = part * norm;
        emulator::launch(grid, 256, 0, KERNEL_NAMED(clip_f32), clipped, table.data(), &norm, max_norm);
        std::vector<double> clipped_ref;
        for (size_t t = 0; t < sizes.size(); t++)
            for (size_t i = 0; i < sizes[t]; i++) clipped_ref.push_back(std::min(part, 1.0) * p[t][i]);
        close("clip to " + std::to_string(part), clipped, clipped_ref);
    }
    p[4].set(5000, INFINITY);
    emulator::launch(grid, 256, 0, KERNEL_NAMED(square_sums_f32), parts.data(), table.data());
    emulator::launch({1}, 256, 0, KERNEL_NAMED(norm_f32), &norm, parts.data(), parts.size());
    report(!std::isfinite(norm), "the norm of an infinity", norm, 0);
    p[4].set(5000, 1);
    norm = NAN;
    emulator::launch(grid, 256, 0, KERNEL_NAMED(clip_f32), clipped, table.data(), &norm, 1.0f);
    report(clipped[1] == p[1][0], "a norm that is none clips nothing", clipped[1], p[1][0]);

    for (size_t t = 0; t < sizes.size(); t++) table[6 * t + 3] = 0;
    emulator::launch(grid, 256, 0, KERNEL_NAMED(weighted_sum_f32), scaled, table.data(), 0.5f, NAN);
    scaled_ref.clear();
    for (size_t t = 0; t < sizes.size(); t++)
        for (size_t i = 0; i < sizes[t]; i++) scaled_ref.push_back(0.5 * p[t][i]);
    close("scaled", scaled, scaled_ref);
    return finish("optim");
}

// Attention, forward and backward, against f64.
#include "attention_f32.cu"
#include "attention_bf16.cu"
#include "attention_f16.cu"
#include "check.h"

using namespace check;

struct Case {
    size_t batch, n, m, heads, d;
    bool causal;
    size_t splits = 1;
};

struct Gradients {
    std::vector<double> o, q, k, v;
};

// The formulas above attention.cuh, in f64 with the whole score matrix.
template <typename T>
static Gradients reference(const Case& c, Buffer<T>& q, Buffer<T>& k, Buffer<T>& v, Buffer<T>& d_o) {
    const size_t C = c.heads * c.d;
    Gradients r{std::vector<double>(q.size), std::vector<double>(q.size), std::vector<double>(k.size), std::vector<double>(k.size)};
    const double scale = 1 / std::sqrt((double)c.d);
    const std::vector<double> Q = q.numbers(), K = k.numbers(), V = v.numbers(), D = d_o.numbers();
    for (size_t b = 0; b < c.batch; b++)
        for (size_t h = 0; h < c.heads; h++)
            for (size_t i = 0; i < c.n; i++) {
                const size_t at = (b * c.n + i) * C + h * c.d, keys = c.causal ? i + 1 : c.m;
                auto key = [&](size_t j) { return (b * c.m + j) * C + h * c.d; };
                std::vector<double> p(keys), dp(keys, 0.0);
                double top = -INFINITY, sum = 0, delta = 0;
                for (size_t j = 0; j < keys; j++) {
                    for (size_t e = 0; e < c.d; e++) p[j] += Q[at + e] * K[key(j) + e] * scale;
                    top = std::max(top, p[j]);
                }
                for (double& x : p) sum += x = std::exp(x - top);
                for (size_t j = 0; j < keys; j++) {
                    p[j] /= sum;
                    for (size_t e = 0; e < c.d; e++) {
                        r.o[at + e] += p[j] * V[key(j) + e];
                        dp[j] += D[at + e] * V[key(j) + e];
                        r.v[key(j) + e] += p[j] * D[at + e];
                    }
                    delta += p[j] * dp[j];
                }
                for (size_t j = 0; j < keys; j++)
                    for (size_t e = 0; e < c.d; e++) {
                        r.q[at + e] += p[j] * (dp[j] - delta) * K[key(j) + e] * scale;
                        r.k[key(j) + e] += p[j] * (dp[j] - delta) * Q[at + e] * scale;
                    }
            }
    return r;
}

// The instance for heads of up to D.
#define FOR_HEAD(NAME)                                                       \
    [] {                                                                     \
        if constexpr (D == 16) return KERNEL_OF(NAME##_16, T);               \
        if constexpr (D == 32) return KERNEL_OF(NAME##_32, T);               \
        if constexpr (D == 48) return KERNEL_OF(NAME##_48, T);               \
        if constexpr (D == 64) return KERNEL_OF(NAME##_64, T);               \
        if constexpr (D == 80) return KERNEL_OF(NAME##_80, T);               \
        if constexpr (D == 128) return KERNEL_OF(NAME##_128, T);             \
        if constexpr (D == 160) return KERNEL_OF(NAME##_160, T);             \
    }()

template <int D, typename T> static void attention(const Case& c, double scale = 1, size_t shift = 0) {
    typedef Sizes<T, D> Z;
    const std::string name = "attention " + std::to_string(c.n) + "x" + std::to_string(c.m) + " " + std::to_string(c.heads) + "x" +
                             std::to_string(c.d) + (c.causal ? " causal" : "") + " splits " + std::to_string(c.splits);
    const size_t C = c.heads * c.d, size_q = c.batch * c.n * C, size_k = c.batch * c.m * C, rows = c.batch * c.heads * c.n;
    auto q = normal<T>(size_q, scale, 0, shift), k = normal<T>(size_k, scale, 0, shift), v = normal<T>(size_k, 1, 0, shift);
    auto d_o = normal<T>(size_q, 1, 0, shift);
    Buffer<T> o(size_q, shift), d_q(size_q, shift), d_k(size_k, shift), d_v(size_k, shift);
    Buffer<float> lse(rows), delta(rows), parts(2 * c.splits * size_k);
    const unsigned heads = (unsigned)c.heads, batch = (unsigned)c.batch;
    const bool vector = c.d % (16 / sizeof(T)) == 0 && shift == 0;
    const float factor = 1 / std::sqrt((float)c.d);
#define SHAPE c.n, c.m, C, c.d, c.causal, vector, factor
    in_any_order(
        name,
        [&] {
            emulator::launch({blocks(c.n, Z::FWD_ROWS), heads, batch}, Z::THREADS, Z::FWD_BYTES, FOR_HEAD(attention_fwd), o, lse,
                             q, k, v, SHAPE);
            emulator::launch({blocks(rows, 8)}, 256, 0, KERNEL_OF(attention_delta, T), delta, d_o, o, c.batch, c.n, c.heads, c.d);
            emulator::launch({blocks(c.n, Z::BWD_ROWS), heads, batch}, Z::THREADS, Z::BWD_BYTES, FOR_HEAD(attention_bwd_q), d_q,
                             d_o, lse, delta, q, k, v, SHAPE);
            emulator::launch({blocks(c.m, Z::BWD_ROWS) * (unsigned)c.splits, heads, batch}, Z::THREADS, Z::BWD_BYTES,
                             FOR_HEAD(attention_bwd_kv), d_k, d_v, parts, c.splits, d_o, lse, delta, q, k, v, SHAPE);
            if (c.splits > 1)
                emulator::launch({blocks(2 * size_k, 256)}, 256, 0, KERNEL_OF(attention_sum, T), d_k, d_v, parts, c.splits,
                                 size_k);
        },
        {{o.at(), size_q * sizeof(T)}, {d_q.at(), size_q * sizeof(T)}, {d_k.at(), size_k * sizeof(T)}, {d_v.at(), size_k * sizeof(T)}});
    const Gradients r = reference(c, q, k, v, d_o);
    // P, d_S and O are rounded to T on their way into a product: a few roundings in all. With large scores an error of a
    // score is one of its exponential: f32 sums of d products of about scale² numbers.
    const double bound = 2 * rounding<T>() + 3e-6 * std::max(1.0, scale * scale);
    close(name + " fwd", o, r.o, bound);
    if (c.m == 1 || scale > 10) return;  // one key: the softmax is 1 and its gradient what cancellation leaves
    close(name + " d_q", d_q, r.q, 2 * bound);
    close(name + " d_k", d_k, r.k, 2 * bound);
    close(name + " d_v", d_v, r.v, 2 * bound);
    report(lse.guarded() && delta.guarded() && parts.guarded(), name + ": statistics outside their memory", 0, 0);
}

template <typename T> static void all() {
    attention<16, T>({1, 1, 1, 1, 1, false});
    attention<16, T>({2, 5, 7, 2, 3, false});
    attention<16, T>({2, 8, 77, 3, 4, false});
    attention<16, T>({2, 9, 9, 2, 5, true});
    attention<16, T>({2, 150, 33, 2, 8, false});
    attention<16, T>({1, 150, 150, 1, 3, true});
    attention<16, T>({2, 150, 77, 2, 16, false, 3});
    attention<32, T>({1, 70, 70, 2, 32, true});
    attention<32, T>({1, 20, 130, 1, 24, false});
    attention<48, T>({2, 64, 64, 2, 40, false});
    attention<48, T>({1, 130, 77, 1, 40, false, 2});
    attention<48, T>({1, 200, 200, 1, 48, true, 2});
    attention<64, T>({1, 77, 77, 2, 64, true});
    attention<64, T>({1, 257, 257, 1, 64, false});
    attention<80, T>({1, 64, 77, 2, 80, false, 2});
    attention<80, T>({1, 90, 90, 1, 72, true});
    attention<128, T>({1, 64, 77, 1, 104, false});
    attention<160, T>({1, 64, 64, 2, 160, false});
    attention<160, T>({1, 65, 77, 1, 160, false, 3});
    attention<160, T>({1, 70, 70, 1, 136, true});
    // one split has nothing to do, one query block is a rest
    attention<16, T>({1, 65, 5, 1, 8, false, 4});
    // off the alignment of 16 bytes
    attention<48, T>({1, 70, 77, 1, 40, false}, 1, 1);
    // scores of about a thousand do not overflow
    attention<16, T>({1, 20, 20, 1, 8, false}, 20);
}

// Rust launches by a table of its own, which its tests hold against the same file.
template <typename T, int D> static void sizes(FILE* table) {
    typedef Sizes<T, D> Z;
    char name[8], line[200];
    do {
        report(fgets(line, sizeof line, table), "attention_sizes.txt ends early", 0, 0);
    } while (line[0] == '#');
    int d, threads, fwd_rows, bwd_rows, fwd_bytes, bwd_bytes;
    const int read = sscanf(line, "%7s %d %d %d %d %d %d", name, &d, &threads, &fwd_rows, &bwd_rows, &fwd_bytes, &bwd_bytes);
    const bool same = read == 7 && !strcmp(name, type_name<T>()) && d == D && threads == Z::THREADS && fwd_rows == Z::FWD_ROWS &&
                      bwd_rows == Z::BWD_ROWS && fwd_bytes == Z::FWD_BYTES && bwd_bytes == Z::BWD_BYTES;
    report(same, std::string("attention_sizes.txt: ") + line, D, Z::FWD_BYTES);
    if (!same)
        printf("%s %d %d %d %d %d %d\n", type_name<T>(), D, Z::THREADS, Z::FWD_ROWS, Z::BWD_ROWS, Z::FWD_BYTES, Z::BWD_BYTES);
}
template <typename T> static void all_sizes(FILE* table) {
    sizes<T, 16>(table), sizes<T, 32>(table), sizes<T, 48>(table), sizes<T, 64>(table);
    sizes<T, 80>(table), sizes<T, 128>(table), sizes<T, 160>(table);
}

int main() {
    FILE* table = fopen("src/ops/cuda/attention_sizes.txt", "r");
    if (!table) return perror("src/ops/cuda/attention_sizes.txt"), 1;
    all_sizes<float>(table);
    all_sizes<bf16>(table);
    fclose(table);
    all<float>();
    all<bf16>();
    all<f16>();
    return finish("attention");
}

// What the checks share: buffers with guards, random numbers, comparison with a reference in f64.
#pragma once

#include "common.cuh"

#include <string>

namespace check {

// Largest relative rounding error of a number stored as T.
template <typename T> double rounding();
template <> inline double rounding<float>() { return std::ldexp(1.0, -24); }
template <> inline double rounding<bf16>() { return std::ldexp(1.0, -8); }
template <> inline double rounding<f16>() { return std::ldexp(1.0, -11); }
template <typename T> const char* type_name();
template <> inline const char* type_name<float>() { return "f32"; }
template <> inline const char* type_name<bf16>() { return "bf16"; }
template <> inline const char* type_name<f16>() { return "f16"; }

inline std::mt19937 rng(1);
inline int checks = 0, failures = 0;

// Device memory of `size` elements between guards that no kernel may write and whose NaNs spoil what reads them.
template <typename T> struct Buffer {
    static constexpr size_t GUARD = 64;
    std::vector<T> data;
    size_t size, shift;

    // `shift` elements off the alignment of 16 bytes
    explicit Buffer(size_t size, size_t shift = 0) : size(size), shift(shift) {
        data.resize(size + 2 * GUARD + shift + 16);
        memset((void*)data.data(), 0xff, data.size() * sizeof(T));
    }
    T* at() {
        uintptr_t first = (uintptr_t)(data.data() + GUARD);
        first = (first + 15) / 16 * 16;
        return (T*)first + shift;
    }
    operator T*() { return at(); }
    double operator[](size_t i) { return (double)to_float(at()[i]); }
    std::vector<double> numbers() {
        std::vector<double> all(size);
        for (size_t i = 0; i < size; i++) all[i] = (*this)[i];
        return all;
    }
    void set(size_t i, double x) { at()[i] = from_float<T>((float)x); }
    bool guarded() {
        const unsigned char *first = (const unsigned char*)data.data(), *end = (const unsigned char*)(data.data() + data.size());
        for (const unsigned char* p = first; p < end; p++)
            if ((p < (unsigned char*)at() || p >= (unsigned char*)(at() + size)) && *p != 0xff) return false;
        return true;
    }
};

template <typename T> Buffer<T> normal(size_t size, double scale = 1, double mean = 0, size_t shift = 0) {
    std::normal_distribution<double> distribution;
    Buffer<T> buffer(size, shift);
    for (size_t i = 0; i < size; i++) buffer.set(i, mean + scale * distribution(rng));
    return buffer;
}

inline void report(bool good, const std::string& what, double error, double bound) {
    checks++;
    if (good) return;
    failures++;
    printf("FAILED %s: error %.3g, bound %.3g\n", what.c_str(), error, bound);
}

// ||y - expected|| / ||expected|| is at most `bound`, which is by default the rounding of the output and 3e-6 for that of f32
// arithmetic inside; and no number is further off than 16 bounds of the largest.
template <typename T>
void close(const std::string& what, Buffer<T>& y, const std::vector<double>& expected, double bound = 0) {
    const std::string name = what + " " + type_name<T>();
    if (bound == 0) bound = rounding<T>() + 3e-6;
    double difference = 0, norm = 0, worst = 0, largest = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        const double d = y[i] - expected[i];
        difference += d * d;
        norm += expected[i] * expected[i];
        worst = d == d ? std::max(worst, std::fabs(d)) : NAN;
        largest = std::max(largest, std::fabs(expected[i]));
        if (worst != worst) break;
    }
    const double error = std::sqrt(difference / std::max(norm, 1e-300));
    report(y.size == expected.size(), name + ": size", (double)y.size, (double)expected.size());
    report(error <= bound, name, error, bound);
    report(worst <= 16 * bound * largest, name + ": worst number", worst / std::max(largest, 1e-300), 16 * bound);
    report(y.guarded(), name + ": a write outside its memory", 0, 0);
}

// Runs `kernels` with the threads in three orders; `outputs` must come out the same to the last bit.
template <typename F> void in_any_order(const std::string& what, F kernels, std::vector<std::pair<void*, size_t>> outputs) {
    std::vector<std::vector<unsigned char>> first;
    for (int order : {1, 2, 0}) {
        emulator::order = order;
        kernels();
        for (size_t i = 0; i < outputs.size(); i++) {
            const unsigned char* bytes = (const unsigned char*)outputs[i].first;
            if (order == 1) {
                first.emplace_back(bytes, bytes + outputs[i].second);
            } else {
                report(!memcmp(first[i].data(), bytes, outputs[i].second), what + ": depends on the order of threads", 0, 0);
            }
        }
    }
}

inline int finish(const char* what) {
    printf("%s: %d checks, %d failed\n", what, checks, failures);
    return failures > 0 || checks == 0;
}

inline unsigned blocks(size_t n, size_t per_block) { return (unsigned)((n + per_block - 1) / per_block); }

}  // namespace check

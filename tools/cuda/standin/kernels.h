// What the C++ that ptx.py writes is made of, and the interface of libkernels.so.
//
// A register is a variable: .pred bool, .f32 float, .f64 double, all others unsigned integers of their width (f16 and bf16
// are held as bits). Global, local and generic addresses are the host's; shared addresses are offsets into the block's
// shared memory. Payloads of NaN are not modelled.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" {
typedef struct {
    const char* name;
    unsigned parameters;
    const unsigned* sizes;  // bytes of each parameter
    unsigned static_shared;
} KernelInfo;
// NULL where there is none of this name.
const KernelInfo* kernel_find(const char* name);
// Runs a launch to its end. `parameters` are the addresses of the values, as in cuLaunchKernel. NULL, or what went wrong.
const char* kernel_run(const KernelInfo*, void* const* parameters, const unsigned grid[3], const unsigned block[3],
                       unsigned dynamic_shared);
// When set, every access to global memory is looked at: an invalid one ends the launch with an error.
void kernel_memory(bool (*valid)(const void* address, size_t bytes));
// Threads of a block run with the first warp as far ahead as barriers let it (0), the last one (1), or all side by side in
// random order (2). Asynchronous copies arrive at once in order 0 and when they are waited for in the others. 1 unless set.
void kernel_order(int order);
}

namespace standin {

struct Warp;
struct Copies;

// One thread of a block. `tid` and `lane` are its own, the rest is the block's.
struct Thread {
    unsigned char* shared;
    uint32_t shared_size, dynamic_size;
    uint32_t checks;  // whether global accesses are looked at
    uint32_t lane, tid[3], ntid[3], ctaid[3], nctaid[3];
    uint32_t index;  // in the block
    int line;        // of the barrier that it waits at
    Warp* warp;
    Copies* copies;
    void* stack;  // its stack pointer while it waits
};

typedef void (*Body)(Thread&, void* const* parameters);
struct Kernel {
    KernelInfo info;
    Body body;
    bool exchanges;  // between threads: they need stacks of their own
    unsigned max_threads;
    const char* file;
};
// Makes kernels known while the library is loaded.
struct Table {
    Table(const Kernel* kernels, size_t count);
};

#define STANDIN_INLINE inline __attribute__((always_inline))

// Ends the launch.
[[noreturn]] void fail(Thread&, int line, const char* what);
[[noreturn]] void fail_assert(Thread&, int line, const char* what, const char* file, unsigned at);
void check_global(Thread&, uint64_t address, unsigned size, int line);
void check_generic(Thread&, uint64_t address, unsigned size, int line);
[[noreturn]] void bad_shared(Thread&, uint64_t address, unsigned size, int line);

template <typename T> STANDIN_INLINE T* global_at(Thread& t, uint64_t address, unsigned size, int line) {
    if (__builtin_expect((address & (size - 1)) | t.checks, 0)) check_global(t, address, size, line);
    return (T*)address;
}
template <typename T> STANDIN_INLINE T* generic_at(Thread& t, uint64_t address, unsigned size, int line) {
    if (__builtin_expect((address & (size - 1)) | t.checks, 0)) check_generic(t, address, size, line);
    return (T*)address;
}
template <typename T> STANDIN_INLINE T* local_at(Thread& t, uint64_t address, unsigned size, int line) {
    if (__builtin_expect(address & (size - 1), 0)) check_generic(t, address, size, line);
    return (T*)address;
}
template <typename T> STANDIN_INLINE T* shared_at(Thread& t, uint64_t address, unsigned size, int line) {
    if (__builtin_expect((address & (size - 1)) || address >= t.shared_size || address + size > t.shared_size, 0))
        bad_shared(t, address, size, line);
    return (T*)(t.shared + address);
}
template <typename T> STANDIN_INLINE T parameter(const void* at) {
    T value;
    memcpy(&value, at, sizeof value);
    return value;
}

// Exchanges between threads.
void barrier(Thread&, int line);
void warp_barrier(Thread&, uint32_t mask, int line);
enum Shuffle { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_BFLY, SHUFFLE_IDX };
struct Shuffled {
    uint32_t value;
    bool in_range;
};
Shuffled shuffle(Thread&, Shuffle, uint32_t a, uint32_t b, uint32_t c, uint32_t mask, int line);
enum Vote { VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT };
uint32_t vote(Thread&, Vote, bool a, uint32_t mask, int line);
// mma.m16n8k16: d = a b + c
void mma(Thread&, bool bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], int line);
void ldmatrix(Thread&, unsigned count, bool transposed, uint32_t* r, uint64_t address, int line);
void copy_async(Thread&, uint64_t to, uint64_t from, unsigned size, unsigned source_size, int line);
void copy_commit(Thread&);
void copy_wait(Thread&, unsigned groups);

template <typename T, typename F> STANDIN_INLINE T bits(F x) {
    static_assert(sizeof(T) == sizeof(F));
    return __builtin_bit_cast(T, x);
}

// f16 and bf16 as bits.
constexpr uint16_t NAN_16 = 0x7fff;
STANDIN_INLINE float h2f(uint16_t x) { return (float)bits<_Float16>(x); }
STANDIN_INLINE float b2f(uint16_t x) { return bits<float>((uint32_t)x << 16); }
STANDIN_INLINE uint16_t f2h(float x) { return x != x ? NAN_16 : bits<uint16_t>((_Float16)x); }
inline uint16_t d2h(double x) { return x != x ? NAN_16 : bits<uint16_t>((_Float16)x); }
STANDIN_INLINE uint16_t f2b(float x) {
    const uint32_t u = bits<uint32_t>(x);
    return x != x ? NAN_16 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
// Through f32 rounded to odd, which leaves the last rounding what it is.
inline uint16_t d2b(double x) {
    if (x != x) return NAN_16;
    const float f = (float)x;
    uint32_t u = bits<uint32_t>(f);
    if ((double)f != x && !(u & 1)) u += (std::fabs((double)f) < std::fabs(x)) ? 1 : -1;
    return f2b(bits<float>(u));
}
// a b + c rounded to odd in f64; a, b and c are f16 or bf16, so the product is exact.
inline double fma_odd(double a, double b, double c) {
    const double p = a * b, s = p + c;
    if (!std::isfinite(s)) return s;
    const double from_p = s - c, error = (p - from_p) + (c - (s - from_p));
    uint64_t u = bits<uint64_t>(s);
    if (error != 0 && !(u & 1)) u += (error > 0) == (s > 0) ? 1 : -1;
    return bits<double>(u);
}
inline uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c) { return d2h(fma_odd(h2f(a), h2f(b), h2f(c))); }
inline uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) { return d2b(fma_odd(b2f(a), b2f(b), b2f(c))); }
inline uint16_t add_f16(uint16_t a, uint16_t b) { return f2h(h2f(a) + h2f(b)); }
inline uint16_t sub_f16(uint16_t a, uint16_t b) { return f2h(h2f(a) - h2f(b)); }
inline uint16_t mul_f16(uint16_t a, uint16_t b) { return f2h(h2f(a) * h2f(b)); }
inline uint16_t add_bf16(uint16_t a, uint16_t b) { return fma_bf16(a, 0x3f80, b); }
inline uint16_t sub_bf16(uint16_t a, uint16_t b) { return fma_bf16(b, 0xbf80, a); }
inline uint16_t mul_bf16(uint16_t a, uint16_t b) { return d2b((double)b2f(a) * b2f(b)); }
STANDIN_INLINE uint16_t neg_f16(uint16_t a) { return a ^ 0x8000; }
STANDIN_INLINE uint16_t neg_bf16(uint16_t a) { return a ^ 0x8000; }
STANDIN_INLINE uint16_t abs_f16(uint16_t a) { return a & 0x7fff; }
STANDIN_INLINE uint16_t abs_bf16(uint16_t a) { return a & 0x7fff; }
// An operation on both halves.
template <typename F, typename... A> STANDIN_INLINE uint32_t both(F f, A... a) {
    return f((uint16_t)a...) | (uint32_t)f((uint16_t)(a >> 16)...) << 16;
}

// Subnormal numbers as zeros of their sign.
STANDIN_INLINE float ftz(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
STANDIN_INLINE double ftz(double x) { return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; }
// To [0, 1], NaN to 0.
template <typename F> STANDIN_INLINE F saturate(F x) { return x > 0 ? (x < 1 ? x : F(1)) : F(0); }

// The other number where one is a NaN; -0 is below +0. With `nan`, a NaN where one is.
template <typename F> inline F float_min(F a, F b) {
    if (a != a) return b != b ? F(NAN) : b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}
template <typename F> inline F float_max(F a, F b) {
    if (a != a) return b != b ? F(NAN) : b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
}
template <typename F> inline F float_min_nan(F a, F b) { return a != a || b != b ? F(NAN) : float_min(a, b); }
template <typename F> inline F float_max_nan(F a, F b) { return a != a || b != b ? F(NAN) : float_max(a, b); }
inline uint16_t min_f16(uint16_t a, uint16_t b) { return f2h(float_min(h2f(a), h2f(b))); }
inline uint16_t max_f16(uint16_t a, uint16_t b) { return f2h(float_max(h2f(a), h2f(b))); }
inline uint16_t min_nan_f16(uint16_t a, uint16_t b) { return f2h(float_min_nan(h2f(a), h2f(b))); }
inline uint16_t max_nan_f16(uint16_t a, uint16_t b) { return f2h(float_max_nan(h2f(a), h2f(b))); }
inline uint16_t min_bf16(uint16_t a, uint16_t b) { return f2b(float_min(b2f(a), b2f(b))); }
inline uint16_t max_bf16(uint16_t a, uint16_t b) { return f2b(float_max(b2f(a), b2f(b))); }
inline uint16_t min_nan_bf16(uint16_t a, uint16_t b) { return f2b(float_min_nan(b2f(a), b2f(b))); }
inline uint16_t max_nan_bf16(uint16_t a, uint16_t b) { return f2b(float_max_nan(b2f(a), b2f(b))); }

// Arithmetic in another rounding than to nearest: the processor's own, for the time of one operation. The bits are those
// of MXCSR.
enum Rounding { RM = 0x2000, RP = 0x4000, RZ = 0x6000 };
template <typename F, typename... A> __attribute__((noinline)) auto rounded(Rounding mode, F f, A... a) {
    const unsigned before = __builtin_ia32_stmxcsr();
    (([](auto& x) { asm volatile("" : "+m"(x)); })(a), ...);
    __builtin_ia32_ldmxcsr((before & ~0x6000u) | mode);
    (([](auto& x) { asm volatile("" : "+m"(x)::"memory"); })(a), ...);
    auto y = f(a...);
    asm volatile("" : "+m"(y)::"memory");
    __builtin_ia32_ldmxcsr(before);
    return y;
}
inline constexpr auto plus = [](auto a, auto b) { return a + b; };
inline constexpr auto minus = [](auto a, auto b) { return a - b; };
inline constexpr auto times = [](auto a, auto b) { return a * b; };
inline constexpr auto over = [](auto a, auto b) { return a / b; };
inline constexpr auto root = [](auto a) { return std::sqrt(a); };
inline constexpr auto multiply_add = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
inline constexpr auto to_f32 = [](auto a) { return (float)a; };
inline constexpr auto to_f64 = [](auto a) { return (double)a; };

// Floating point to integers: clamped to the range of the result; a NaN is 0, or the highest bit alone where one of the two is
// 64 bits wide.
template <typename I, typename F> inline I to_integer(F rounded) {
    const double x = rounded;
    constexpr unsigned width = 8 * sizeof(I);
    constexpr bool is_signed = I(-1) < I(0);
    if (x != x) return sizeof(F) == 8 || sizeof(I) == 8 ? (I)((uint64_t)1 << (width - 1)) : I(0);
    constexpr double end = is_signed ? 2.0 * ((uint64_t)1 << (width - 2)) : 4.0 * ((uint64_t)1 << (width - 2));
    if (x >= end) return is_signed ? (I)(((uint64_t)1 << (width - 1)) - 1) : (I)~(uint64_t)0;
    if (x < (is_signed ? -end : 0.0)) return is_signed ? (I)((uint64_t)1 << (width - 1)) : I(0);
    return (I)x;
}
// Integers to integers, clamped.
template <typename D, typename S> inline D clamp_integer(S x) {
    const __int128 low = D(-1) < D(0) ? -((__int128)1 << (8 * sizeof(D) - 1)) : (__int128)0;
    const __int128 high = low + ((__int128)1 << 8 * sizeof(D)) - 1, wide = x;
    return (D)(wide < low ? low : wide > high ? high : wide);
}

// Gross approximation: the upper 32 bits of the f64 alone.
inline double reciprocal_upper(double x) {
    const uint64_t upper = ~(uint64_t)0xffffffff;
    return bits<double>(bits<uint64_t>(ftz(1 / bits<double>(bits<uint64_t>(ftz(x)) & upper))) & upper);
}

// Integers. The result of a division by zero is not specified; it is all ones here.
template <typename T> inline T divide(T a, T b) {
    if (b == 0) return (T)~(T)0;
    if (T(-1) < T(0) && b == T(-1)) return (T)(0 - (uint64_t)a);
    return a / b;
}
template <typename T> inline T remainder(T a, T b) {
    if (b == 0) return a;
    if (T(-1) < T(0) && b == T(-1)) return 0;
    return a % b;
}
template <typename T> STANDIN_INLINE T shift_left(T a, uint32_t by) { return by >= 8 * sizeof(T) ? T(0) : (T)(a << by); }
template <typename T> STANDIN_INLINE T shift_right(T a, uint32_t by) {
    if (by >= 8 * sizeof(T)) return a < 0 ? T(-1) : T(0);
    return (T)(a >> by);
}
template <typename T> STANDIN_INLINE T high_product(T a, T b) { return (T)(((__int128)a * (__int128)b) >> 8 * sizeof(T)); }
template <> STANDIN_INLINE uint64_t high_product(uint64_t a, uint64_t b) {
    return (uint64_t)(((unsigned __int128)a * b) >> 64);
}
template <typename T> STANDIN_INLINE uint32_t leading_zeros(T x) {
    uint32_t n = 8 * sizeof(T);
    for (; x; x >>= 1) n--;
    return n;
}
template <> STANDIN_INLINE uint32_t leading_zeros(uint32_t x) { return x ? __builtin_clz(x) : 32; }
template <> STANDIN_INLINE uint32_t leading_zeros(uint64_t x) { return x ? __builtin_clzll(x) : 64; }
template <typename T> inline T reverse_bits(T x) {
    T y = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); i++) y |= ((x >> i) & 1) << (8 * sizeof(T) - 1 - i);
    return y;
}
// The highest bit that is not a sign, counted from the lowest or (`amount`) as a shift that brings it to the top.
template <typename T> inline uint32_t find_bit(T x, bool amount) {
    const uint64_t u = x < 0 ? ~(uint64_t)x : (uint64_t)x;
    if (u == 0) return ~0u;
    const uint32_t at = 63 - __builtin_clzll(u);
    return amount ? 8 * sizeof(T) - 1 - at : at;
}
// bfe
template <typename T> inline T extract(T a, uint32_t b, uint32_t c) {
    const unsigned top = 8 * sizeof(T) - 1, at = b & 0xff, length = c & 0xff;
    constexpr bool is_signed = T(-1) < T(0);
    const uint64_t u = (uint64_t)a;
    const unsigned sign_at = at + length - 1 < top ? at + length - 1 : top;
    const bool sign = is_signed && length && ((u >> sign_at) & 1);
    uint64_t y = 0;
    for (unsigned i = 0; i <= top; i++)
        y |= (uint64_t)(i < length && at + i <= top ? (u >> (at + i)) & 1 : sign) << i;
    return (T)y;
}
// bfi: the low bits of a into b
template <typename T> inline T insert(T a, T b, uint32_t c, uint32_t d) {
    const unsigned at = c & 0xff, length = d & 0xff, width = 8 * sizeof(T);
    if (at >= width || length == 0) return b;
    T mask = length >= width ? (T)~(T)0 : (T)(((T)1 << length) - 1);
    mask = (T)(mask << at);
    return (T)((b & ~mask) | ((T)(a << at) & mask));
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t all = (uint64_t)b << 32 | a;
    uint32_t y = 0;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned s = (selector >> 4 * i) & 0xf;
        const uint8_t byte = (uint8_t)(all >> 8 * (s & 7));
        y |= (uint32_t)(s & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
    }
    return y;
}
template <typename T> STANDIN_INLINE T logic3(T a, T b, T c, unsigned table) {
    T y = 0;
    if (table & 0x01) y |= ~a & ~b & ~c;
    if (table & 0x02) y |= ~a & ~b & c;
    if (table & 0x04) y |= ~a & b & ~c;
    if (table & 0x08) y |= ~a & b & c;
    if (table & 0x10) y |= a & ~b & ~c;
    if (table & 0x20) y |= a & ~b & c;
    if (table & 0x40) y |= a & b & ~c;
    if (table & 0x80) y |= a & b & c;
    return y;
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t by, bool wrap) {
    by = wrap ? by & 31 : by > 32 ? 32 : by;
    return (uint32_t)(((uint64_t)high << 32 | low) << by >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by, bool wrap) {
    by = wrap ? by & 31 : by > 32 ? 32 : by;
    return (uint32_t)(((uint64_t)high << 32 | low) >> by);
}

// Replaces *at by f(*at); the value before.
template <typename T, typename F> inline T atomic(T* at, F f) {
    T before = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(at, &before, f(before), false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
    }
    return before;
}

}  // namespace standin

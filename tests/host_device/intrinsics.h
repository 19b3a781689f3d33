/* What device code may call beside the C library: numbers in the rounding that the name says, bits, memory, and a warp's exchanges. Included by cuda_runtime.h alone. Compiled without
 * contraction, so that a multiplication and an addition stay two. */
#pragma once

/* ---- numbers ---- */

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline unsigned long long __float2ull_rn(float x) { return (unsigned long long)rint((double)x); }

#define HOST_MIN_MAX(T)                                                                                                                              \
    static inline T min(T a, T b) { return b < a ? b : a; }                                                                                          \
    static inline T max(T a, T b) { return a < b ? b : a; }
HOST_MIN_MAX(int)
HOST_MIN_MAX(unsigned)
HOST_MIN_MAX(unsigned long)
HOST_MIN_MAX(unsigned long long)
#undef HOST_MIN_MAX

/* ---- bits ---- */

template <class To, class From> static inline To host_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline float __uint_as_float(unsigned bits) { return host_bits<float>(bits); }
static inline unsigned __float_as_uint(float x) { return host_bits<unsigned>(x); }
static inline float __int_as_float(int bits) { return host_bits<float>(bits); }
static inline int __float_as_int(float x) { return host_bits<int>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
/* Nibble i of the selector names byte i of the result; its top bit: the sign of that byte, eight times. */
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned nibble = selector >> (4 * i) & 15, byte = (unsigned)(bytes >> (8 * (nibble & 7))) & 255;
        result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return result;
}

/* ---- memory ---- */

template <class T> static inline T __ldg(const T *at) { return *at; }
template <class T> static inline T __ldcg(const T *at) { return *at; }
template <class T> static inline void __stcg(T *at, T value) { *at = value; }
static inline void __threadfence(void) {}
static inline void __threadfence_block(void) {}

/* Out of line: atomics are no races. */
unsigned host_atomic(unsigned *at, unsigned value, int what);
unsigned long long host_atomic_add(unsigned long long *at, unsigned long long value);
enum { HOST_ATOMIC_ADD, HOST_ATOMIC_MIN, HOST_ATOMIC_MAX, HOST_ATOMIC_OR, HOST_ATOMIC_EXCHANGE };
static inline unsigned atomicAdd(unsigned *at, unsigned value) { return host_atomic(at, value, HOST_ATOMIC_ADD); }
static inline unsigned long long atomicAdd(unsigned long long *at, unsigned long long value) { return host_atomic_add(at, value); }
static inline unsigned atomicMin(unsigned *at, unsigned value) { return host_atomic(at, value, HOST_ATOMIC_MIN); }
static inline unsigned atomicMax(unsigned *at, unsigned value) { return host_atomic(at, value, HOST_ATOMIC_MAX); }
static inline unsigned atomicOr(unsigned *at, unsigned value) { return host_atomic(at, value, HOST_ATOMIC_OR); }
static inline unsigned atomicExch(unsigned *at, unsigned value) { return host_atomic(at, value, HOST_ATOMIC_EXCHANGE); }

/* ---- a warp's exchanges ---- */

/* `value` and `result` in the low bits; source: the lane whose value is wanted. */
struct host_exchange {
    uint64_t value, result;
    uint32_t source;
};
host_combine host_shuffle, host_ballot, host_match_any, host_reduce_max, host_reduce_add, host_no_exchange;

template <class T> static inline T host_shuffled(const char *what, unsigned mask, T value, uint32_t source, const char *file, int line) {
    static_assert(sizeof(T) <= 8, "32 or 64 bits");
    struct host_exchange exchange = {0, 0, source};
    memcpy(&exchange.value, &value, sizeof value);
    host_warp_meet({what, file, line}, mask, &exchange, host_shuffle);
    memcpy(&value, &exchange.result, sizeof value);
    return value;
}
/* Of parts of `width` lanes; beyond the part a lane keeps its own. */
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, HOST_SITE_PARAMETERS) {
    const uint32_t lane = host_lane(), source = lane ^ (uint32_t)bits, end = lane / (uint32_t)width * (uint32_t)width + (uint32_t)width;
    return host_shuffled("__shfl_xor_sync", mask, value, source < end ? source : lane, file, line);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, HOST_SITE_PARAMETERS) {
    const uint32_t lane = host_lane();
    return host_shuffled("__shfl_up_sync", mask, value, lane % (uint32_t)width >= distance ? lane - distance : lane, file, line);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, HOST_SITE_PARAMETERS) {
    const uint32_t lane = host_lane();
    return host_shuffled("__shfl_down_sync", mask, value, lane % (uint32_t)width + distance < (uint32_t)width ? lane + distance : lane, file, line);
}
template <class T> static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, HOST_SITE_PARAMETERS) {
    return host_shuffled("__shfl_sync", mask, value, host_lane() / (uint32_t)width * (uint32_t)width + (uint32_t)source % (uint32_t)width, file,
                         line);
}
static inline unsigned host_collected(const char *what, unsigned mask, unsigned value, host_combine *combine, const char *file, int line) {
    struct host_exchange exchange = {value, 0, 0};
    host_warp_meet({what, file, line}, mask, &exchange, combine);
    return (unsigned)exchange.result;
}
static inline unsigned __ballot_sync(unsigned mask, int vote, HOST_SITE_PARAMETERS) {
    return host_collected("__ballot_sync", mask, vote != 0, host_ballot, file, line);
}
static inline int __any_sync(unsigned mask, int vote, HOST_SITE_PARAMETERS) {
    return host_collected("__any_sync", mask, vote != 0, host_ballot, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int vote, HOST_SITE_PARAMETERS) {
    return host_collected("__all_sync", mask, vote != 0, host_ballot, file, line) == mask;
}
static inline unsigned __match_any_sync(unsigned mask, unsigned value, HOST_SITE_PARAMETERS) {
    return host_collected("__match_any_sync", mask, value, host_match_any, file, line);
}
static inline unsigned __reduce_max_sync(unsigned mask, unsigned value, HOST_SITE_PARAMETERS) {
    return host_collected("__reduce_max_sync", mask, value, host_reduce_max, file, line);
}
static inline unsigned __reduce_add_sync(unsigned mask, unsigned value, HOST_SITE_PARAMETERS) {
    return host_collected("__reduce_add_sync", mask, value, host_reduce_add, file, line);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, HOST_SITE_PARAMETERS) {
    struct host_exchange exchange = {};
    host_warp_meet({"__syncwarp", file, line}, mask, &exchange, host_no_exchange);
}

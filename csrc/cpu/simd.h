// 64 bytes of floats or doubles at a time, in the compiler's own vector types: one AVX-512 register, two of AVX, four
// of SSE or NEON. The number of values is the same on every machine, and with it the order of every sum.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace wa {
namespace {  // compiled once for each instruction set: nothing here may be shared between those objects

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class Acc>
struct Simd {
    static constexpr int kLanes = 64 / sizeof(Acc);
    typedef Acc Vector __attribute__((vector_size(64)));
};
template <class Acc>
using Vector = typename Simd<Acc>::Vector;

using Bits32 = uint32_t __attribute__((vector_size(64)));
using Bits16 = uint16_t __attribute__((vector_size(32)));

#define WA_INLINE static inline __attribute__((always_inline))
#define WA_LAMBDA __attribute__((always_inline))
#define WA_APART static __attribute__((noinline))  // one copy of long code

WA_INLINE float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
WA_INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof x);
    return bits;
}

// One value. Rounding is to nearest even; a NaN stays one.
template <class Acc>
WA_INLINE Acc load_one(const Acc* p) {
    return *p;
}
template <class Acc>
WA_INLINE Acc load_one(const BFloat16* p) {
    return bits_to_float(uint32_t(p->bits) << 16);
}
template <class Acc>
WA_INLINE Acc load_one(const Half* p) {
#ifdef __F16C__
    return _cvtsh_ss(p->bits);
#else
    uint32_t magnitude = p->bits & 0x7fffu, sign = uint32_t(p->bits & 0x8000u) << 16;
    // Half's exponent is 112 less than float's: a product with 2^112 rebases it, subnormals included.
    float x = bits_to_float(magnitude << 13) * bits_to_float((127u + 112u) << 23);
    if (magnitude >= 0x7c00u) x = bits_to_float(0x7f800000u | (magnitude & 0x3ffu) << 13);
    return bits_to_float(float_to_bits(x) | sign);
#endif
}
template <class Acc>
WA_INLINE void store_one(Acc* p, Acc x) {
    *p = x;
}
WA_INLINE void store_one(BFloat16* p, float x) {
    uint32_t bits = float_to_bits(x);
    p->bits = uint16_t(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
WA_INLINE void store_one(Half* p, float x) {
#ifdef __F16C__
    p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffffu, result;
    if (magnitude > 0x7f800000u) result = 0x7e00u;
    else if (magnitude >= 0x477ff000u) result = 0x7c00u;  // rounds to 65536 or more
    else if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        result = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    else result = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    p->bits = uint16_t(result | (bits >> 16 & 0x8000u));
#endif
}

// The width of an access: a formula written once over it serves the bulk of a row and its last few values.
struct OneValue {};
struct OneVector {};

template <class Acc, class T>
WA_INLINE Acc load(OneValue, const T* p) {
    return load_one<Acc>(p);
}
template <class Acc, class T>
WA_INLINE void store(OneValue, T* p, Acc x) {
    store_one(p, x);
}
template <class Acc>
WA_INLINE Vector<Acc> load(OneVector, const Acc* p) {  // of any alignment, as all of these
    Vector<Acc> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class Acc>
WA_INLINE Vector<Acc> load(OneVector, const BFloat16* p) {
    Bits16 bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vector<float>)(__builtin_convertvector(bits, Bits32) << 16);
}
template <class Acc>
WA_INLINE Vector<Acc> load(OneVector, const Half* p) {
    float x[16];
#ifdef __F16C__
    for (int i = 0; i < 16; i += 8) _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i))));
#else
    for (int i = 0; i < 16; ++i) x[i] = load_one<float>(p + i);
#endif
    return load<float>(OneVector{}, x);
}
template <class Acc>
WA_INLINE void store(OneVector, Acc* p, Vector<Acc> v) {
    std::memcpy(p, &v, sizeof v);
}
template <class Acc>
WA_INLINE void store(OneVector, BFloat16* p, Vector<float> v) {
    Bits32 bits = (Bits32)v;
    bits = v != v ? Bits32{} + 0x7fc00000u : bits + 0x7fffu + (bits >> 16 & 1);
    Bits16 out = __builtin_convertvector(bits >> 16, Bits16);
    std::memcpy(p, &out, sizeof out);
}
template <class Acc>
WA_INLINE void store(OneVector, Half* p, Vector<float> v) {
    float x[16];
    std::memcpy(x, &v, sizeof v);
#ifdef __F16C__
    for (int i = 0; i < 16; i += 8)
        _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 16; ++i) store_one(p + i, x[i]);
#endif
}

// each(width, at) for all of [0, n)
template <class Acc, class Each>
WA_INLINE void for_each(uint32_t n, const Each& each) {
    constexpr uint32_t kLanes = Simd<Acc>::kLanes;
    uint32_t at = 0;
    for (; at + kLanes <= n; at += kLanes) each(OneVector{}, at);
    for (; at < n; ++at) each(OneValue{}, at);
}

template <class Acc>
WA_INLINE Acc sum_of(Vector<Acc> v) {  // a tree, always the same: halves of 32 and 16 bytes, then one by one
    typedef Acc Lower __attribute__((vector_size(32)));
    typedef Acc Quarter __attribute__((vector_size(16)));
    Lower halves[2];
    std::memcpy(halves, &v, sizeof v);
    halves[0] += halves[1];
    Quarter quarters[2];
    std::memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    if constexpr (sizeof(Acc) == 8) return quarters[0][0] + quarters[0][1];
    else return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

}  // namespace
}  // namespace wa

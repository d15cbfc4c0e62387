// One register of floats or doubles at a time, in the compiler's vector types: 64 bytes with AVX-512, 32 with AVX, 16
// with SSE or NEON. Types wider than a register are legal too, but compilers split them through memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace wa {
namespace {  // compiled once per instruction set: the linker must not merge the copies

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__F16C__) || defined(__aarch64__)
constexpr bool kConvertsHalves = true;  // in hardware
#else
constexpr bool kConvertsHalves = false;
#endif

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class Acc, int kBytes = kVectorBytes>
struct Simd {
    static constexpr int kLanes = kBytes / sizeof(Acc);
    typedef Acc Vector __attribute__((vector_size(kBytes)));
};
template <class Acc>
using Vector = typename Simd<Acc>::Vector;

// The bits of a vector of floats, and those of as many halves.
using Bits32 = uint32_t __attribute__((vector_size(kVectorBytes)));
using Signed32 = int32_t __attribute__((vector_size(kVectorBytes)));
using Bits16 = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

#define WA_INLINE static inline __attribute__((always_inline))
#define WA_LAMBDA __attribute__((always_inline))
#define WA_APART static __attribute__((noinline))  // one copy of long code

WA_INLINE Bits32 widened(Bits16 bits) {  // else g++ 12 splits it into two halves
#if defined(__AVX512F__)
    return (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#elif defined(__AVX2__)
    return (Bits32)_mm256_cvtepu16_epi32((__m128i)bits);
#else
    return __builtin_convertvector(bits, Bits32);
#endif
}

template <class To, class From>
WA_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// For numbers below 2^31: signed, because SSE has no unsigned comparison.
WA_INLINE bool is_less(uint32_t a, int32_t b) { return int32_t(a) < b; }
WA_INLINE Signed32 is_less(Bits32 a, int32_t b) { return (Signed32)a < b; }

// Conversions of the 16-bit formats, for one value or a vector (F: float, Bits: its bits). They round to nearest even
// and keep NaN. Shifts instead of masks: each constant costs a register in the surrounding loops.
template <class F, class Bits>
WA_INLINE F from_bfloat16(Bits bits) {
    return bit_cast<F>(bits << 16);
}
template <class F, class Bits>
WA_INLINE Bits to_bfloat16(F x) {
    const Bits bits = bit_cast<Bits>(x);
    return x != x ? Bits{} + 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
template <class F, class Bits>
WA_INLINE F from_half(Bits bits) {
    const Bits magnitude = bits << 17 >> 4;  // exponent and fraction, moved to where a float has them
    // Half's exponent bias is 112 less than float's: multiplying by 2^112 rebases it, subnormals included.
    const Bits finite = bit_cast<Bits>(bit_cast<F>(magnitude) * 0x1p112f);
    const Bits infinite = is_less(magnitude, 0x0f800000) ? Bits{} : Bits{} + 0x7f800000u;
    return bit_cast<F>(finite | infinite | bits >> 15 << 31);
}
template <class F, class Bits>
WA_INLINE Bits to_half(F x) {
    const Bits bits = bit_cast<Bits>(x), magnitude = bits << 1 >> 1;
    const Bits normal = (magnitude - ((112u << 23) - 0xfffu) + (bits << 18 >> 31)) >> 13;
    // Adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    const Bits subnormal = bit_cast<Bits>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
    Bits result = is_less(magnitude, 0x38800000) ? subnormal : normal;
    result = is_less(magnitude, 0x477ff000) ? result : Bits{} + 0x7c00u;  // else it rounds to 65536 or more
    result = is_less(magnitude, 0x7f800001) ? result : Bits{} + 0x7e00u;
    return result | bits >> 31 << 15;
}

// Conversions between half and float, in hardware where possible.
#if defined(__F16C__)
WA_INLINE float widen(Half half) { return _cvtsh_ss(half.bits); }
WA_INLINE Half narrow(float x) { return {_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)}; }
#if defined(__AVX512F__)  // maskz with all lanes: plain ones make g++ 12 warn about its own header
WA_INLINE Vector<float> widen(Bits16 halves) { return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves); }
WA_INLINE Bits16 narrow(Vector<float> x) {
    return (Bits16)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#else
WA_INLINE Vector<float> widen(Bits16 halves) { return (Vector<float>)_mm256_cvtph_ps((__m128i)halves); }
WA_INLINE Bits16 narrow(Vector<float> x) { return (Bits16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#endif
#elif defined(__aarch64__)
WA_INLINE float widen(Half half) { return bit_cast<__fp16>(half); }
WA_INLINE Half narrow(float x) { return bit_cast<Half>(__fp16(x)); }
WA_INLINE Vector<float> widen(Bits16 halves) { return (Vector<float>)vcvt_f32_f16(bit_cast<float16x4_t>(halves)); }
WA_INLINE Bits16 narrow(Vector<float> x) { return bit_cast<Bits16>(vcvt_f16_f32((float32x4_t)x)); }
#else
WA_INLINE float widen(Half half) { return from_half<float, uint32_t>(half.bits); }
WA_INLINE Half narrow(float x) { return {uint16_t(to_half<float, uint32_t>(x))}; }
WA_INLINE Vector<float> widen(Bits16 halves) { return from_half<Vector<float>, Bits32>(widened(halves)); }
WA_INLINE Bits16 narrow(Vector<float> x) { return __builtin_convertvector(to_half<Vector<float>, Bits32>(x), Bits16); }
#endif

// The width of an access: one formula, generic in it, serves the bulk of a row and its last few values.
struct OneValue {};
struct OneVector {};
struct StreamedVector : OneVector {};  // stored past the caches, see `write`
struct PartOfVector {  // the lanes whose bits are set: all last values of a row at once, where accesses can be masked
    uint32_t mask;
};

template <class Acc>
WA_INLINE Acc load(OneValue, const Acc* p) {
    return *p;
}
template <class Acc>
WA_INLINE Acc load(OneValue, const BFloat16* p) {
    return from_bfloat16<float, uint32_t>(p->bits);
}
template <class Acc>
WA_INLINE Acc load(OneValue, const Half* p) {
    return widen(*p);
}
template <class Acc>
WA_INLINE void store(OneValue, Acc* p, Acc x) {
    *p = x;
}
template <class Acc>
WA_INLINE void store(OneValue, BFloat16* p, float x) {
    p->bits = uint16_t(to_bfloat16<float, uint32_t>(x));
}
template <class Acc>
WA_INLINE void store(OneValue, Half* p, float x) {
    *p = narrow(x);
}

template <class V, class T>
WA_INLINE V read(OneVector, const T* p) {  // unaligned, like all accesses here
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
WA_INLINE void write(OneVector, T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
// Past the caches: a line is not read only to be overwritten. Only for lines that are overwritten as a whole, all by
// such vectors, as mixing in other stores makes them 20 times slower. Other threads see the values after `end_streams`.
constexpr size_t kLineBytes = 64;
template <class V, class T>
WA_INLINE void write(StreamedVector, T* p, V v) {
#if defined(__AVX512F__)
    if constexpr (sizeof v == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX__)
    if constexpr (sizeof v == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__x86_64__)
    if constexpr (sizeof v == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
    if constexpr (sizeof v == 8) return _mm_stream_si64(reinterpret_cast<long long*>(p), bit_cast<long long>(v));
#endif
    write(OneVector{}, p, v);
}
WA_INLINE void end_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
#if defined(__AVX512F__)
template <class V, class T>
WA_INLINE V read(PartOfVector part, const T* p) {  // 0 in the other lanes
    if constexpr (sizeof(T) == 2) return (V)_mm256_maskz_loadu_epi16(part.mask, p);
    else if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_epi32(part.mask, p);
    else return (V)_mm512_maskz_loadu_epi64(part.mask, p);
}
template <class V, class T>
WA_INLINE void write(PartOfVector part, T* p, V v) {
    if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, part.mask, (__m256i)v);
    else if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, part.mask, (__m512i)v);
    else _mm512_mask_storeu_epi64(p, part.mask, (__m512i)v);
}
WA_INLINE Vector<float> with_others(PartOfVector part, Vector<float> v, float others) {
    return (Vector<float>)_mm512_mask_blend_ps(part.mask, (__m512)(Vector<float>{} + others), (__m512)v);
}
WA_INLINE Vector<double> with_others(PartOfVector part, Vector<double> v, double others) {
    return (Vector<double>)_mm512_mask_blend_pd(part.mask, (__m512d)(Vector<double>{} + others), (__m512d)v);
}
constexpr bool kMasksAccesses = true;
#else
constexpr bool kMasksAccesses = false;
#endif
template <class Width, class X, class Acc>
WA_INLINE X with_others(Width, X x, Acc) {
    return x;
}

template <class Acc, class Width>
WA_INLINE Vector<Acc> load(Width width, const Acc* p) {
    return read<Vector<Acc>>(width, p);
}
template <class Acc, class Width>
WA_INLINE Vector<Acc> load(Width width, const BFloat16* p) {
    return from_bfloat16<Vector<float>, Bits32>(widened(read<Bits16>(width, p)));
}
template <class Acc, class Width>
WA_INLINE Vector<Acc> load(Width width, const Half* p) {
    return widen(read<Bits16>(width, p));
}
// A part of a vector has the value `others` in its other lanes, so that sums can leave them out.
template <class Acc, class Width, class T>
WA_INLINE auto load(Width width, const T* p, Acc others) {
    return with_others(width, load<Acc>(width, p), others);
}
template <class Acc, class Width>
WA_INLINE void store(Width width, Acc* p, Vector<Acc> v) {
    write(width, p, v);
}
template <class Acc, class Width>
WA_INLINE void store(Width width, BFloat16* p, Vector<float> v) {
    write(width, p, __builtin_convertvector(to_bfloat16<Vector<float>, Bits32>(v), Bits16));
}
template <class Acc, class Width>
WA_INLINE void store(Width width, Half* p, Vector<float> v) {
    write(width, p, narrow(v));
}

// each(width, at) for the last values of a row, [at, n), fewer than a vector has.
template <class Each>
WA_INLINE void for_rest(size_t at, size_t n, const Each& each) {
    if constexpr (kMasksAccesses) {
        if (at < n) each(PartOfVector{(1u << (n - at)) - 1}, at);
    } else {
        for (; at < n; ++at) each(OneValue{}, at);
    }
}

// each(width, at) for all of [0, n); `bulk` is the width of all but the last values.
template <class Acc, class Each, class Bulk = OneVector>
WA_INLINE void for_each(size_t n, const Each& each, Bulk bulk = {}) {
    constexpr size_t kLanes = Simd<Acc>::kLanes;
    size_t at = 0;
    for (; at + kLanes <= n; at += kLanes) each(bulk, at);
    for_rest(at, n, each);
}

// A fixed reduction tree: halves are added until two values are left.
template <class Acc, int kBytes = kVectorBytes>
WA_INLINE Acc sum_of(typename Simd<Acc, kBytes>::Vector v) {
    if constexpr (kBytes == 2 * sizeof(Acc)) {
        return v[0] + v[1];
    } else {
        typename Simd<Acc, kBytes / 2>::Vector halves[2];
        std::memcpy(halves, &v, sizeof v);
        return sum_of<Acc, kBytes / 2>(halves[0] + halves[1]);
    }
}

}  // namespace
}  // namespace wa

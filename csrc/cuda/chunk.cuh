// Values as stored in memory, up to 16 bytes per access, and as the kernels compute with them.
#pragma once
#include "../common/align_task.h"
#include "portable.cuh"

#include <cstring>

namespace wa::cuda {

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
struct Pair;
template <>
struct Pair<__half> {
    using Type = __half2;
    static __device__ float high(uint32_t word) {
        uint16_t bits = uint16_t(word >> 16);
        return to_float(*reinterpret_cast<const __half*>(&bits));
    }
    static __device__ Type of(float low, float high) { return __floats2half2_rn(low, high); }
};
template <>
struct Pair<__nv_bfloat16> {
    using Type = __nv_bfloat162;
    static __device__ float high(uint32_t word) {  // in one instruction, where to_float would shift there and back
        uint32_t bits = word & 0xffff0000u;
        float x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
    static __device__ Type of(float low, float high) { return __floats2bfloat162_rn(low, high); }
};

// kCount adjacent values of a tensor, moved in accesses of 16 bytes, or in one if they are fewer. 16-bit values stay
// packed in 32-bit registers until unpacked.
template <class Stored, int kCount>
struct Chunk {
    static constexpr bool kPacked = sizeof(Stored) == 2 && kCount > 1;
    using Word = std::conditional_t<sizeof(Stored) != 2, Stored, std::conditional_t<kPacked, uint32_t, uint16_t>>;
    static constexpr int kBytes = int(sizeof(Stored)) * kCount, kAccess = kBytes < 16 ? kBytes : 16;
    static constexpr int kPart = kAccess / int(sizeof(Word));
    struct __align__(kAccess) Part {
        Word words[kPart];
    };
    Part parts[kBytes / kAccess];

    __device__ void load(const Stored* from) {
#pragma unroll
        for (int i = 0; i < kBytes / kAccess; ++i) parts[i] = reinterpret_cast<const Part*>(from)[i];
    }
    __device__ void store(Stored* to) const {
#pragma unroll
        for (int i = 0; i < kBytes / kAccess; ++i) reinterpret_cast<Part*>(to)[i] = parts[i];
    }

    // The packed values in the registers of x, until they are unpacked.
    template <class Acc>
    __device__ void put_into(Acc (&x)[kCount]) const {
        static_assert(sizeof *this <= sizeof x);
        memcpy(x, this, sizeof *this);
    }
    template <class Acc>
    __device__ void take_from(const Acc (&x)[kCount]) {
        memcpy(this, x, sizeof *this);
    }

    template <class Acc>
    __device__ void unpack(Acc (&x)[kCount]) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if constexpr (sizeof(Stored) != 2) {
                x[i] = parts[i / kPart].words[i % kPart];
            } else {
                Word word = parts[i / 2 / kPart].words[i / 2 % kPart];
                uint16_t low = uint16_t(word);
                x[i] = i % 2 ? Pair<Stored>::high(word) : to_float(*reinterpret_cast<const Stored*>(&low));
            }
        }
    }
    template <class Acc>
    __device__ void pack(const Acc (&x)[kCount]) {
        if constexpr (kPacked) {
#pragma unroll
            for (int i = 0; i < kCount; i += 2) {
                auto pair = Pair<Stored>::of(x[i], x[i + 1]);
                parts[i / 2 / kPart].words[i / 2 % kPart] = *reinterpret_cast<const Word*>(&pair);
            }
        } else if constexpr (sizeof(Stored) == 2) {
            auto pair = Pair<Stored>::of(x[0], x[0]);
            parts[0].words[0] = uint16_t(*reinterpret_cast<const uint32_t*>(&pair));
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) parts[i / kPart].words[i % kPart] = x[i];
        }
    }
};

// run(typed pointer)
template <class Acc, class Void, class Run>
__device__ void with_type(Void* tensor, DType dtype, const Run& run) {
    using std::conditional_t;
    constexpr bool kConst = std::is_const_v<Void>;
    if constexpr (sizeof(Acc) == 8) {
        run(static_cast<conditional_t<kConst, const double, double>*>(tensor));
    } else {
        if (dtype == DType::kFloat32) run(static_cast<conditional_t<kConst, const float, float>*>(tensor));
        else if (dtype == DType::kFloat16) run(static_cast<conditional_t<kConst, const __half, __half>*>(tensor));
        else run(static_cast<conditional_t<kConst, const __nv_bfloat16, __nv_bfloat16>*>(tensor));
    }
}

}  // namespace wa::cuda

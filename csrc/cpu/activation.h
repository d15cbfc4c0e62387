// Activations of contiguous values, a vector at a time. float has vectorised exp and erf of its own; float64 calls libm
// for each value.
#pragma once

#include <math.h>

#include <algorithm>

#include "../common/activations.h"
#include "simd.h"

namespace wa {
namespace {

template <class V>
using Mask = decltype(V{} < V{});

// e^x to about 1 unit in the last place: 2^k e^r with |r| <= ln 2 / 2, the Taylor series of e^r to r^7.
WA_INLINE Vector<float> exp_of(Vector<float> x) {
    using V = Vector<float>;
    constexpr float kLow = -87.3f, kHigh = 88.7f;
    V bounded = x < kLow ? V{} + kLow : x > kHigh ? V{} + kHigh : x;
    V shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest integer
    V whole = shifted - 12582912.0f;
    V r = bounded - whole * 0.693359375f - whole * -2.12194440e-4f;  // ln 2 in two parts, the first of few bits
    V e = V{} + 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    auto k = (Mask<V>)shifted - 0x4b400000;  // in two steps: 2^128 is not a float
    auto half = k >> 1;
    e = e * (V)((half + 127) << 23) * (V)((k - half + 127) << 23);
    return x > kHigh ? V{} + INFINITY : x < kLow ? V{} : e;
}

// erf(x): a rational function on [-4, 4], with a relative error of 7e-8; beyond, erf rounds to -1 or 1 in float.
WA_INLINE Vector<float> erf_of(Vector<float> x) {
    using V = Vector<float>;
    V z = x * x;
    V p = V{} + 1.9107904592e-8f;
    p = p * z - 1.9419144337e-6f;
    p = p * z + 1.4724016364e-4f;
    p = p * z + 3.9891088381e-3f;
    p = p * z + 5.1520626992e-2f;
    p = p * z + 2.0709462464e-1f;
    p = p * z + 1.1283791065f;
    V q = V{} + 1.0207196465e-3f;
    q = q * z + 1.4955267310e-2f;
    q = q * z + 1.1795789003e-1f;
    q = q * z + 5.1686406136e-1f;
    q = q * z + 1.0f;
    return x < -4.0f ? V{} - 1.0f : x > 4.0f ? V{} + 1.0f : x * p / q;
}

WA_INLINE double exp_of(double x) { return exp(x); }
WA_INLINE double erf_of(double x) { return erf(x); }
// A scalar is computed as a vector is: a value's result must not depend on its position in the row.
WA_INLINE float exp_of(float x) { return exp_of(Vector<float>{} + x)[0]; }
WA_INLINE float erf_of(float x) { return erf_of(Vector<float>{} + x)[0]; }
WA_INLINE Vector<double> exp_of(Vector<double> x) {
    for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = exp(x[i]);
    return x;
}
WA_INLINE Vector<double> erf_of(Vector<double> x) {
    for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = erf(x[i]);
    return x;
}

struct Math {
    template <class V>
    static constexpr WA_LAMBDA V exp(V x) {
        return exp_of(x);
    }
    template <class V>
    static constexpr WA_LAMBDA V erf(V x) {
        return erf_of(x);
    }
};

// y = activation(x); y may be x
template <class Acc>
WA_APART void activate(uint8_t activation, const Acc* x, Acc* y, uint32_t n) {
    if (activation == 0 && x != y) std::copy_n(x, n, y);
    Activations::with(activation, [=](auto formula) WA_LAMBDA {
        for_each<Acc>(n, [=](auto width, size_t at) WA_LAMBDA {
            store<Acc>(width, y + at, formula.template value<Math, Acc>(load<Acc>(width, x + at)));
        });
    });
}

// y = activation'(x) g; y may be g
template <class Acc>
WA_APART void differentiate(uint8_t activation, const Acc* x, const Acc* g, Acc* y, uint32_t n) {
    if (activation == 0) return activate(activation, g, y, n);
    Activations::with(activation, [=](auto formula) WA_LAMBDA {
        for_each<Acc>(n, [=](auto width, size_t at) WA_LAMBDA {
            auto grad = load<Acc>(width, g + at);
            store<Acc>(width, y + at, differentiated<decltype(formula), Math, Acc>(load<Acc>(width, x + at), grad));
        });
    });
}

}  // namespace
}  // namespace wa

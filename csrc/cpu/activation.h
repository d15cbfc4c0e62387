// Activations and their derivatives, a vector at a time for float; float64 takes libm's functions value by value.
#pragma once

#include <math.h>

#include "../common/prepare_task.h"
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
    V r = bounded - whole * 0.693359375f - whole * -2.12194440e-4f;  // ln 2 in two parts, the first one short
    V e = V{} + 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    auto k = (Mask<V>)shifted - 0x4b400000;  // in two steps, for 2^128 is no float
    auto half = k >> 1;
    e = e * (V)((half + 127) << 23) * (V)((k - half + 127) << 23);
    return x > kHigh ? V{} + INFINITY : x < kLow ? V{} : e;
}

// erf(x), a rational function of x on [-4, 4], beyond which it is -1 or 1 in float; fitted to 7e-8, relative.
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
// A float is computed as a vector is: where a value stands in its row must not change its bits.
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

// Of one value or a vector of them. relu keeps NaN.
template <Activation kActivation, class Acc, class V>
WA_INLINE V activated(V x) {
    if constexpr (kActivation == Activation::kRelu) return x < Acc(0) ? V{} : x;
    if constexpr (kActivation == Activation::kSilu) return x / (Acc(1) + exp_of(-x));
    if constexpr (kActivation == Activation::kGelu)
        return Acc(0.5) * x * (Acc(1) + erf_of(x * Acc(0.70710678118654752440)));
    return x;
}

// The activation's derivative at x; of relu, x may be its result.
template <Activation kActivation, class Acc, class V>
WA_INLINE V derivative(V x) {
    if constexpr (kActivation == Activation::kRelu) return x <= Acc(0) ? V{} : V{} + Acc(1);
    if constexpr (kActivation == Activation::kSilu) {
        V s = Acc(1) / (Acc(1) + exp_of(-x));
        return s * (Acc(1) + x * (Acc(1) - s));
    }
    if constexpr (kActivation == Activation::kGelu)
        return Acc(0.5) * (Acc(1) + erf_of(x * Acc(0.70710678118654752440))) +
               x * exp_of(x * x * Acc(-0.5)) * Acc(0.39894228040143267794);
    return V{} + Acc(1);
}

// run(constant) with the activation as a type.
template <class Run>
WA_INLINE void with_activation(Activation activation, const Run& run) {
    switch (activation) {
        case Activation::kNone: return run(std::integral_constant<Activation, Activation::kNone>());
        case Activation::kRelu: return run(std::integral_constant<Activation, Activation::kRelu>());
        case Activation::kSilu: return run(std::integral_constant<Activation, Activation::kSilu>());
        case Activation::kGelu: return run(std::integral_constant<Activation, Activation::kGelu>());
    }
}

// y = activation(x); y may be x
template <class Acc>
WA_APART void activate(Activation activation, const Acc* x, Acc* y, uint32_t n) {
    if (x == y && activation == Activation::kNone) return;
    with_activation(activation, [=](auto constant) WA_LAMBDA {
        for_each<Acc>(n, [=](auto width, size_t at) WA_LAMBDA {
            store<Acc>(width, y + at, activated<decltype(constant)::value, Acc>(load<Acc>(width, x + at)));
        });
    });
}

// y = activation'(x) g; y may be g. A gradient that meets a derivative of 0 becomes 0 whatever it is.
template <class Acc>
WA_APART void differentiate(Activation activation, const Acc* x, const Acc* g, Acc* y, uint32_t n) {
    if (activation == Activation::kNone) return activate(activation, g, y, n);
    with_activation(activation, [=](auto constant) WA_LAMBDA {
        for_each<Acc>(n, [=](auto width, size_t at) WA_LAMBDA {
            auto slope = derivative<decltype(constant)::value, Acc>(load<Acc>(width, x + at));
            auto product = load<Acc>(width, g + at) * slope;
            store<Acc>(width, y + at, slope == Acc(0) ? decltype(product){} : product);
        });
    });
}

}  // namespace
}  // namespace wa

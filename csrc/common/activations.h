// Activations of a convolution's input: a formula with its derivative each, and the list of them, for CPU and CUDA.
//
// To add one: a struct like these, and its name at the end of the list. Its value at 0 must be 0 (asserted below), for
// some kernels pad before they activate and some after. `derivative` is a function of the input; with kFromResult it
// has the same value at the result, which the convolution keeps alive anyway.
//
// V is a float, a double or a vector of them, Acc the type of one value; M has exp and erf of a V.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WA_FORMULA __host__ __device__ static constexpr inline
#else
#define WA_FORMULA __attribute__((always_inline)) static constexpr inline
#endif

namespace wa {
namespace {  // compiled for several instruction sets: nothing here may be shared between their objects

struct Relu {
    static constexpr bool kFromResult = true;
    template <class M, class Acc, class V>
    WA_FORMULA V value(V x) {
        return x < Acc(0) ? V{} : x;  // keeps NaN
    }
    template <class M, class Acc, class V>
    WA_FORMULA V derivative(V x) {
        return x <= Acc(0) ? V{} : V{} + Acc(1);
    }
};

struct Silu {
    static constexpr bool kFromResult = false;
    template <class M, class Acc, class V>
    WA_FORMULA V value(V x) {
        return x / (Acc(1) + M::exp(-x));
    }
    template <class M, class Acc, class V>
    WA_FORMULA V derivative(V x) {
        V s = Acc(1) / (Acc(1) + M::exp(-x));
        return s * (Acc(1) + x * (Acc(1) - s));
    }
};

// x * Phi(x), Phi the standard normal distribution: the exact one, not its approximation by tanh.
struct Gelu {
    static constexpr bool kFromResult = false;
    template <class M, class Acc, class V>
    WA_FORMULA V value(V x) {
        return Acc(0.5) * x * (Acc(1) + M::erf(x * Acc(0.70710678118654752440)));
    }
    template <class M, class Acc, class V>
    WA_FORMULA V derivative(V x) {
        return Acc(0.5) * (Acc(1) + M::erf(x * Acc(0.70710678118654752440))) +
               x * M::exp(x * x * Acc(-0.5)) * Acc(0.39894228040143267794);
    }
};

struct Hardswish {
    static constexpr bool kFromResult = false;
    template <class M, class Acc, class V>
    WA_FORMULA V value(V x) {
        V gate = x + Acc(3);
        gate = gate < Acc(0) ? V{} : gate > Acc(6) ? V{} + Acc(6) : gate;
        return x * gate * Acc(1.0 / 6);
    }
    template <class M, class Acc, class V>
    WA_FORMULA V derivative(V x) {
        return x <= Acc(-3) ? V{} : x >= Acc(3) ? V{} + Acc(1) : x * Acc(1.0 / 3) + Acc(0.5);
    }
};

// A gradient that meets a derivative of 0 becomes 0 whatever it is.
template <class A, class M, class Acc, class V>
WA_FORMULA V differentiated(V x, V grad) {
    V derivative = A::template derivative<M, Acc>(x), product = grad * derivative;
    return derivative == Acc(0) ? V{} : product;
}

template <class... A>
struct ActivationList {
    static constexpr int kCount = sizeof...(A);

    // run(A{}) for the activation of this number: its place in the list, from 1; 0 is none.
    template <class Run>
    WA_FORMULA void with(uint8_t number, const Run& run) {
        uint8_t i = 0;
        (void)((++i == number && (run(A{}), true)) || ...);
    }
    static constexpr bool is_from_result(int64_t number) {
        constexpr bool each[] = {false, A::kFromResult...};
        return each[number];
    }
};
using Activations = ActivationList<Relu, Silu, Gelu, Hardswish>;  // in the order of the ops' numbers

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)  // whose exp and erf are constant expressions
struct ConstantMath {
    static constexpr double exp(double x) { return __builtin_exp(x); }
    static constexpr double erf(double x) { return __builtin_erf(x); }
};
template <class... A>
constexpr bool keep_zero(ActivationList<A...>) {
    return ((A::template value<ConstantMath, double>(0.0) == 0) && ...);
}
static_assert(keep_zero(Activations{}), "an activation whose value at 0 is not 0");
#endif

}  // namespace
}  // namespace wa

// Activations of a convolution's input, each with its derivative, and the list of them; shared by CPU and CUDA.
//
// To add one, write a struct like these and append it to the list. Its value at 0 must be 0 (asserted below): some
// kernels pad before the activation, others after it. `derivative` takes the input; with kFromResult it gives the same
// value for the result, which the convolution keeps alive anyway.
//
// V is float, double or a vector of either, Acc its element type; M provides exp and erf for V.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WA_FORMULA __host__ __device__ static constexpr inline
#else
#define WA_FORMULA __attribute__((always_inline)) static constexpr inline
#endif

namespace wa {
namespace {  // compiled once per instruction set: the linker must not merge the copies

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

// x * Phi(x), Phi the standard normal CDF: exact, not the tanh approximation.
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

// grad * derivative, but 0 where the derivative is 0, even if grad is infinite or NaN.
template <class A, class M, class Acc, class V>
WA_FORMULA V differentiated(V x, V grad) {
    V derivative = A::template derivative<M, Acc>(x), product = grad * derivative;
    return derivative == Acc(0) ? V{} : product;
}

template <class... A>
struct ActivationList {
    static constexpr int kCount = sizeof...(A);

    // run(A{}) for activation `number`: its position in the list, counted from 1; 0 is none.
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
using Activations = ActivationList<Relu, Silu, Gelu, Hardswish>;  // numbered as in the ops

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)  // GCC's exp and erf are constexpr
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

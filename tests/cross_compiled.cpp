// The CPU kernels on a machine that cannot run the other tests, such as an emulated one: forward and backward of a
// weight against the formula in double, and float16. Compiled with csrc/cpu/align_kernels.cpp (WA_ISA=baseline); see
// .ci/run.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../csrc/common/align_task.h"
#include "../csrc/common/prepare_task.h"
#include "../csrc/cpu/kernels.h"

using namespace wa;

constexpr uint32_t kFilters = 3;
constexpr double kEps = 1e-5, kScale = 1.5;

// The largest error of the kernels for filters of n values, relative to the largest value.
double error(uint32_t n) {
    std::vector<float> weight(kFilters * n), grad(kFilters * n), out(kFilters * n), grad_weight(kFilters * n);
    std::vector<float> gain{0.5f, 1.0f, 2.0f}, statistics(2 * kFilters), grad_gain(kFilters);
    for (uint32_t i = 0; i < weight.size(); ++i) {
        weight[i] = 3.0f + float(std::sin(i * i + 1.0));
        grad[i] = float(std::cos(i * 0.7));
    }
    AlignTask task{weight.data(),   nullptr,         out.data(),     gain.data(), kEps, kScale, n, kFilters, 0, 0,
                   DType::kFloat32, DType::kFloat32, DType::kFloat32};
    AlignList list{&task, 1, nullptr, statistics.data(), grad_gain.data(), false};
    cpu::baseline::align_forward(list, task, 0, kFilters, nullptr, false);
    task.grad = grad.data();
    task.out = grad_weight.data();
    cpu::baseline::align_backward(list, task, 0, kFilters, nullptr, false);

    double worst = 0, largest = 0;
    auto compare = [&](double got, double want) {
        worst = std::max(worst, std::abs(got - want));
        largest = std::max(largest, std::abs(want));
    };
    for (uint32_t k = 0; k < kFilters; ++k) {
        const float *w = &weight[k * n], *g = &grad[k * n];
        double mean = 0, squares = 0, sum = 0, product = 0;
        for (uint32_t i = 0; i < n; ++i) mean += w[i] / double(n);
        for (uint32_t i = 0; i < n; ++i) squares += (w[i] - mean) * (w[i] - mean);
        const double rstd = 1 / std::sqrt(squares / 2 + kEps);
        for (uint32_t i = 0; i < n; ++i) {
            sum += g[i];
            product += g[i] * (w[i] - mean) * rstd;
        }
        for (uint32_t i = 0; i < n; ++i) {
            const double x = (w[i] - mean) * rstd;
            compare(out[k * n + i], kScale * gain[k] * x);
            compare(grad_weight[k * n + i], kScale * gain[k] * rstd * (g[i] - sum / n - x * product / 2));
        }
        compare(grad_gain[k], kScale * product);
    }
    return worst / largest;
}

// The value of a float16 (not infinite, no NaN), without the conversion under test.
double half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits >> 15 ? -size : size;
}

// Of n values from float16 to float16, against float32's: the roundings and the conversions.
double half_error(uint32_t n) {
    std::vector<uint16_t> weight(n), out(n);
    std::vector<float> same(n), aligned(n), statistics(2);
    for (uint32_t i = 0; i < n; ++i) {
        weight[i] = uint16_t(0x3800 + i * 37 % 2048) | uint16_t(i % 3 ? 0 : 0x8000);  // 0.5 to 2, some negative
        same[i] = float(half(weight[i]));
    }
    AlignTask halves{weight.data(),   nullptr,         out.data(),     nullptr, kEps, kScale, n, 1, 0, 0,
                     DType::kFloat16, DType::kFloat16, DType::kFloat32};
    AlignTask floats{same.data(), nullptr, aligned.data(),  nullptr,         kEps,           kScale, n, 1,
                     0,           0,       DType::kFloat32, DType::kFloat32, DType::kFloat32};
    for (const AlignTask* task : {&halves, &floats}) {
        cpu::baseline::align_forward({task, 1, nullptr, statistics.data(), nullptr, false}, *task, 0, 1, nullptr,
                                     false);
    }
    double worst = 0;
    for (uint32_t i = 0; i < n; ++i) worst = std::max(worst, std::abs(half(out[i]) - aligned[i]));
    return worst;
}

int main() {
    double worst = 0, worst_half = 0;
    for (uint32_t n : {9u, 64u, 147u, 576u}) worst_half = std::max(worst_half, half_error(n));
    for (uint32_t n : {1u, 3u, 9u, 64u, 147u, 576u, 4609u}) worst = std::max(worst, error(n));
    std::printf("largest relative error %.2g, of float16 %.2g\n", worst, worst_half);
    return worst < 1e-5 && worst_half < 1e-3 ? 0 : 1;
}

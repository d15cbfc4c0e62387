// What the host passes to every kernel: one plain struct per weight tensor. Kernels see no torch types.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WA_ANYWHERE __host__ __device__
#else
#define WA_ANYWHERE
#endif

namespace wa {

struct PrepareTask;

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// One weight: K = filters rows of n values, each row a filter, contiguous in memory.
//
//   forward:   aligned = scale * gain * (w - mean) / sqrt(n/2 * var + eps)
//   backward:  with x = (w - mean) * rstd and G the gradient of the aligned weight,
//              d gain = scale * sum(G x),  d w = scale * gain * rstd * (G - mean(G) - x * sum(G x) / 2)
//
// (Shi et al., arXiv 2010.07160, eq. 10; biased variance, eps inside the root.)
struct AlignTask {
    const void* weight;  // (filters, n), weight_dtype
    const void* grad;    // (filters, n), aligned_dtype; backward only
    void* out;           // forward: the aligned weight, aligned_dtype; backward: the weight's gradient, weight_dtype
    const void* gain;    // (filters,), gain_dtype; null: 1
    double eps;
    double scale;
    uint32_t n;
    uint32_t filters;
    uint32_t first_filter;  // this weight's first row in the list's statistics and gain gradients
    // If not 0, each filter of the aligned side is the transpose of the weight's, seen as a matrix (n /
    // transposed_columns, transposed_columns): as between contiguous and channels_last.
    uint32_t transposed_columns;
    DType weight_dtype;
    DType aligned_dtype;
    DType gain_dtype;
};

// The work of one call: weights, and one convolution's input. They share one accumulation type: double for float64,
// else float.
struct AlignList {
    const AlignTask* tasks;
    uint32_t count;
    const PrepareTask* input;  // null: none
    void* statistics;  // (filters of all tasks, 2): mean and rstd = 1 / sqrt(n/2 * var + eps); read by the backward
    void* grad_gain;   // (filters of all tasks,); backward only
    bool is_double;
};

}  // namespace wa

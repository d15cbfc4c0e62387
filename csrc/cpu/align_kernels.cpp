// Forward and backward, one filter after another on one core; compiled once per instruction set.
//
// A filter is read from memory once; up to some thousand values, the later passes find it in the L1 cache: forward sum
// - centred sums - write, backward sums - write. The last pass fetches the next filter, for whose values the first one
// would have to wait. Sums run over blocks of kBlock values and are then added in double, so that the error does not
// grow with n.
//
// The mean is subtracted twice. With the first value as pivot, the mean of a constant filter is exact and its residuals
// are exactly 0; subtracting their mean then corrects the first one's rounding (mean 1e4, deviation 1e-3).
#include <math.h>

#include <type_traits>

#include "dtype.h"
#include "kernels.h"

namespace wa {
namespace {

constexpr size_t kBlock = 4096;
// Accumulators per sum. 4 hide the latency of an addition, and three sums with their operands then fill AVX's 16
// registers; converting halves without an instruction for it takes more, which leaves room for 2.
constexpr size_t kUnroll = kConvertsHalves ? 4 : 2;

// total[s] = the sum over [0, n) of what term(width, at, sums) adds to sums[s] for the value or vector at `at`.
template <class Acc, int kSums, class Term>
WA_INLINE void sum(size_t n, double (&total)[kSums], const Term& term) {
    constexpr size_t kLanes = Simd<Acc>::kLanes;
    for (double& t : total) t = 0;
    for (size_t begin = 0, end; begin < n; begin = end) {
        end = n - begin < kBlock ? n : begin + kBlock;
        size_t at = begin;
        Vector<Acc> sums[kUnroll][kSums] = {};
        Acc rest[kSums] = {};
        for (; at + kUnroll * kLanes <= end; at += kUnroll * kLanes)
            for (size_t u = 0; u < kUnroll; ++u) term(OneVector{}, at + u * kLanes, sums[u]);
        for (; at + kLanes <= end; at += kLanes) term(OneVector{}, at, sums[0]);
        for_rest(at, end, [&](auto width, size_t last) WA_LAMBDA {
            if constexpr (std::is_same_v<decltype(width), OneValue>) term(width, last, rest);
            else term(width, last, sums[0]);
        });
        for (int s = 0; s < kSums; ++s) {
            for (size_t u = 1; u < kUnroll; ++u) sums[0][s] += sums[u][s];
            total[s] += sum_of<Acc>(sums[0][s]) + rest[s];
        }
    }
}

template <class T>
bool fills_lines(const T* filters, uint32_t n) {
    return (reinterpret_cast<uintptr_t>(filters) | n * sizeof(T)) % kLineBytes == 0;
}

double load_gain(const AlignTask& task, uint32_t filter) {
    switch (task.gain ? task.gain_dtype : DType::kFloat64) {
        case DType::kFloat32: return static_cast<const float*>(task.gain)[filter];
        case DType::kFloat16: return load<float>(OneValue{}, static_cast<const Half*>(task.gain) + filter);
        case DType::kBFloat16: return load<float>(OneValue{}, static_cast<const BFloat16*>(task.gain) + filter);
        case DType::kFloat64: return task.gain ? static_cast<const double*>(task.gain)[filter] : 1.0;
    }
    return 0;
}

// each(width, at) for all values of a filter, by StreamedVector or OneVector. Apart from the sums, as all loops in one
// function share its registers.
template <class Acc, class Each>
WA_APART void write_each(uint32_t n, bool is_streamed, Each each) {
    if (is_streamed) for_each<Acc>(n, each, StreamedVector{});
    else for_each<Acc>(n, each);
}

// w: (n,) -> y: (n,), statistics: mean, rstd.
template <class Acc, class W, class Y>
WA_APART void forward_filter(const AlignTask& task, uint32_t filter, const W* w, Y* y, Acc* statistics,
                             bool is_streamed) {
    uint32_t n = task.n;
    Acc pivot = load<Acc>(OneValue{}, w);
    double deviation[1], moments[2];
    sum<Acc>(n, deviation, [=](auto width, size_t at, auto* sums) WA_LAMBDA {  //
        sums[0] += load<Acc>(width, w + at, pivot) - pivot;
    });
    double per_value = 1.0 / n;
    Acc mean = Acc(pivot + deviation[0] * per_value);
    sum<Acc>(n, moments, [=](auto width, size_t at, auto* sums) WA_LAMBDA {
        auto r = load<Acc>(width, w + at, mean) - mean;
        sums[0] += r;
        sums[1] += r * r;
    });
    double rest = moments[0] * per_value, squares = moments[1] - moments[0] * rest;
    double rstd = 1 / sqrt(squares / 2 + task.eps);
    Acc correction = Acc(rest), factor = Acc(task.scale * load_gain(task, filter) * rstd);
    write_each<Acc>(n, is_streamed, [=](auto width, size_t at) WA_LAMBDA {
        __builtin_prefetch(w + n + at);
        store<Acc>(width, y + at, (load<Acc>(width, w + at) - mean - correction) * factor);
    });
    statistics[0] = Acc(mean + rest);
    statistics[1] = Acc(rstd);
}

// w, g: (n,) -> dw: (n,); returns sum(g x).
template <class Acc, class W, class G>
WA_APART double backward_filter(const AlignTask& task, uint32_t filter, const W* w, const G* g, W* dw,
                                const Acc* statistics, bool is_streamed) {
    uint32_t n = task.n;
    Acc mean = statistics[0];
    double rstd = statistics[1], per_value = 1.0 / n, sums_[3];
    sum<Acc>(n, sums_, [=](auto width, size_t at, auto* sums) WA_LAMBDA {
        auto r = load<Acc>(width, w + at, mean) - mean, gradient = load<Acc>(width, g + at);
        sums[0] += r;
        sums[1] += gradient;
        sums[2] += gradient * r;
    });
    double rest = sums_[0] * per_value, g_dot_x = (sums_[2] - rest * sums_[1]) * rstd;
    Acc correction = Acc(rest), g_mean = Acc(sums_[1] * per_value), along = Acc(g_dot_x * rstd / 2),
        factor = Acc(task.scale * load_gain(task, filter) * rstd);
    write_each<Acc>(n, is_streamed, [=](auto width, size_t at) WA_LAMBDA {
        __builtin_prefetch(w + n + at);
        __builtin_prefetch(g + n + at);
        auto d = load<Acc>(width, w + at) - mean - correction;
        store<Acc>(width, dw + at, (load<Acc>(width, g + at) - g_mean - d * along) * factor);
    });
    return g_dot_x;
}

// (rows, columns) -> (columns, rows)
template <class Acc, class From, class To>
WA_INLINE void transpose(const From* from, To* to, uint32_t rows, uint32_t columns) {
    for (uint32_t c = 0; c < columns; ++c)
        for (uint32_t r = 0; r < rows; ++r)
            store<Acc>(OneValue{}, to + size_t(c) * rows + r, load<Acc>(OneValue{}, from + size_t(r) * columns + c));
}

template <class Acc, class W, class Y>
void forward(const AlignList& list, const AlignTask& task, const W* weight, Y* out, uint32_t first, uint32_t last,
             void* scratch, bool is_streamed) {
    is_streamed = is_streamed && fills_lines(out, task.n);
    auto statistics = static_cast<Acc*>(list.statistics) + 2 * size_t(task.first_filter);
    for (uint32_t filter = first; filter < last; ++filter) {
        const W* w = weight + size_t(filter) * task.n;
        Y* y = out + size_t(filter) * task.n;
        Acc* row = statistics + 2 * size_t(filter);
        if (task.transposed_columns == 0) {
            forward_filter<Acc>(task, filter, w, y, row, is_streamed);
        } else {
            auto staged = static_cast<Acc*>(scratch);
            forward_filter<Acc>(task, filter, w, staged, row, false);
            transpose<Acc>(staged, y, task.n / task.transposed_columns, task.transposed_columns);
        }
    }
    if (is_streamed) end_streams();
}

template <class Acc, class W, class G>
void backward(const AlignList& list, const AlignTask& task, const W* weight, const G* grad, uint32_t first,
              uint32_t last, void* scratch, bool is_streamed) {
    const bool is_in_place = task.out == task.grad;  // in the cache already
    is_streamed = is_streamed && !is_in_place && fills_lines(static_cast<W*>(task.out), task.n);
    auto statistics = static_cast<const Acc*>(list.statistics) + 2 * size_t(task.first_filter);
    auto grad_gain = static_cast<Acc*>(list.grad_gain) + task.first_filter;
    for (uint32_t filter = first; filter < last; ++filter) {
        const W* w = weight + size_t(filter) * task.n;
        const G* g = grad + size_t(filter) * task.n;
        auto dw = static_cast<W*>(task.out) + size_t(filter) * task.n;
        double g_dot_x;
        const Acc* row = statistics + 2 * size_t(filter);
        if (task.transposed_columns == 0) {
            g_dot_x = backward_filter<Acc>(task, filter, w, g, dw, row, is_streamed);
        } else {
            auto staged = static_cast<Acc*>(scratch);
            transpose<Acc>(g, staged, task.transposed_columns, task.n / task.transposed_columns);
            g_dot_x = backward_filter<Acc>(task, filter, w, staged, dw, row, is_streamed);
        }
        grad_gain[filter] = Acc(task.scale * g_dot_x);
    }
    if (is_streamed) end_streams();
}

}  // namespace

namespace cpu::WA_ISA {

void align_forward(const AlignList& list, const AlignTask& task, uint32_t first, uint32_t last, void* scratch,
                   bool is_streamed) {
    auto run = [&](auto acc) {
        using Acc = decltype(acc);
        with_type<Acc>(task.weight, task.weight_dtype, [&](auto* weight) {
            with_type<Acc>(task.out, task.aligned_dtype, [&](auto* out) {
                forward<Acc>(list, task, weight, out, first, last, scratch, is_streamed);
            });
        });
    };
    if (list.is_double) run(double());
    else run(float());
}
void align_backward(const AlignList& list, const AlignTask& task, uint32_t first, uint32_t last, void* scratch,
                    bool is_streamed) {
    auto run = [&](auto acc) {
        using Acc = decltype(acc);
        with_type<Acc>(task.weight, task.weight_dtype, [&](auto* weight) {
            with_type<Acc>(task.grad, task.aligned_dtype, [&](auto* grad) {
                backward<Acc>(list, task, weight, grad, first, last, scratch, is_streamed);
            });
        });
    };
    if (list.is_double) run(double());
    else run(float());
}

}  // namespace cpu::WA_ISA
}  // namespace wa

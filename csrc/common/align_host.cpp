#include "align_host.h"

#include <algorithm>
#include <limits>

#include "layout.h"

namespace wa {
namespace {

// A weight with contiguous filters, as the kernels require: the tensor itself if it has them, else a contiguous copy.
struct Source {
    Tensor tensor;
    explicit Source(const Tensor& weight) : tensor(weight) {
        if (is_dense(weight) && has_contiguous_filters(weight)) return;
        tensor = in_order(weight, contiguous_strides(weight).data());
    }
};

// A result with the requested strides, and the tensor that the kernel writes: the result itself if its memory order is
// the source's or its transpose (`transposed_columns`), else a tensor in the source's order that is copied to it
// afterwards.
struct Target {
    Tensor result;
    std::optional<Tensor> staged;
    int64_t transposed_columns = 0;
    explicit Target(const Tensor& spent) : result(spent) {}
    Target(const Source& source, const int64_t* strides, ScalarType dtype, int64_t max_transposed,
           const std::optional<Tensor>& memory = {})
        : result(made(source.tensor, strides, dtype, memory)) {
        const int64_t* order = strides_of(source.tensor);
        if (same_order(result, order, strides)) return;
        if (result.numel() <= max_transposed * result.size(0))  // a limit per filter
            transposed_columns = wa::transposed_columns(result, order, strides);
        if (transposed_columns == 0) staged = empty_strided(result, result.dim(), result.sizes().data(), order, dtype);
    }
    static Tensor made(const Tensor& shape, const int64_t* strides, ScalarType dtype,
                       const std::optional<Tensor>& memory) {
        const int64_t rank = shape.dim(), *sizes = shape.sizes().data();
        if (memory && memory->scalar_type() == dtype && memory->numel() == shape.numel())
            return in_memory_of(*memory, rank, sizes, strides, 0);
        return empty_strided(shape, rank, sizes, strides, dtype);
    }
    void* written() const { return (staged ? *staged : result).data_ptr(); }
    void finish() {
        if (staged) torch::stable::copy_(result, *staged);
    }
};

class TaskList {
public:
    TaskList(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains,
             const InputWork* input)
        : first_(weights.empty() && input ? input->tensor : weights.at(0)),
          type_(!weights.empty()   ? first_.scalar_type()
                : input->is_double ? ScalarType::Double
                                   : ScalarType::Float),
          input_(input ? input->task : nullptr) {
        STD_TORCH_CHECK(
            !input || (input->is_double == (type_ == ScalarType::Double) && on_same_device(input->tensor, first_)),
            "input: want one device with the weights, and float64 exactly if they are");
        STD_TORCH_CHECK(gains.size() == weights.size(), "gains: want one gain or None for each weight");
        for (const Tensor& w : weights) {
            STD_TORCH_CHECK(w.dim() >= 2, "weights: want rank 2 or more, got rank ", w.dim());
            STD_TORCH_CHECK(w.scalar_type() == type_ && on_same_device(w, first_),
                            "weights: want one dtype and one device in a list");
            check_memory("weights", w);
            STD_TORCH_CHECK(w.size(0) < std::numeric_limits<uint32_t>::max() - filters_,
                            "weights: more than 2^32 filters in a list");
            filters_ += w.size(0);
        }
        for (const auto& gain : gains)
            if (gain) check_memory("gains", *gain);
        tasks_.reserve(weights.size());
    }

    ScalarType statistics_dtype() const { return type_ == ScalarType::Double ? type_ : ScalarType::Float; }
    ScalarType weight_dtype() const { return type_; }
    void check_statistics(const Tensor& t) const {
        STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == filters_ && t.size(1) == 2 &&
                            t.scalar_type() == statistics_dtype() && on_same_device(t, first_),
                        "statistics: want those of the forward, (", filters_, ", 2) on the weights' device");
        check_memory("statistics", t);
    }
    int64_t max_transposed(const AlignBackend& backend) const {
        return backend.max_transposed / (type_ == ScalarType::Double ? 8 : 4);
    }

    // (filters, width), or (filters,) for width 1. Zeroed if a weight is empty, since the kernels skip those.
    Tensor per_filter(int64_t width) const {
        const int64_t sizes[2] = {filters_, width}, strides[2] = {width, 1};
        Tensor t = empty_strided(first_, width == 1 ? 1 : 2, sizes, strides, statistics_dtype());
        if (has_empty_) torch::stable::zero_(t);
        return t;
    }

    // Adds the weight's task; the caller fills in the pointers to its gradient and its result.
    AlignTask& add(const Source& source, const std::optional<Tensor>& gain, double eps, double scale,
                   ScalarType aligned_dtype) {
        const Tensor& w = source.tensor;
        int64_t filters = w.size(0), n = filters == 0 ? 0 : w.numel() / filters;
        STD_TORCH_CHECK(n < std::numeric_limits<uint32_t>::max(), "weights: more than 2^32 values in a filter");
        AlignTask task{};
        task.weight = w.const_data_ptr();
        task.eps = eps;
        task.scale = scale;
        task.n = uint32_t(n);
        task.filters = uint32_t(filters);
        task.first_filter = next_filter_;
        task.weight_dtype = dtype_of(type_);
        task.aligned_dtype = dtype_of(aligned_dtype);
        if (gain) {
            gains_.push_back(gain->is_contiguous() ? *gain : torch::stable::contiguous(*gain));
            STD_TORCH_CHECK(gain->dim() >= 1 && gain->size(0) == filters && gain->numel() == filters &&
                                on_same_device(*gain, first_),
                            "gains: want shape (", filters, ",) or (", filters, ", 1, ...) on the weight's device");
            task.gain = gains_.back().const_data_ptr();
            task.gain_dtype = dtype_of(gain->scalar_type());
        }
        next_filter_ += task.filters;
        has_empty_ |= n == 0;
        tasks_.push_back(task);
        return tasks_.back();
    }

    void run(const AlignBackend& backend, const Tensor& statistics, const Tensor* grad_gain) {
        tasks_.erase(std::remove_if(tasks_.begin(), tasks_.end(), [](const AlignTask& t) { return t.n == 0; }),
                     tasks_.end());
        if (tasks_.empty() && !input_) return;
        AlignList list{};
        list.input = input_;
        list.tasks = tasks_.data();
        list.count = uint32_t(tasks_.size());
        list.statistics = statistics.data_ptr();
        list.grad_gain = grad_gain ? grad_gain->data_ptr() : nullptr;
        list.is_double = type_ == ScalarType::Double;
        try {
            backend.run(list, first_.get_device_index());
        } catch (const std::exception& error) {
            throw RunError(error.what());
        }
    }

private:
    Tensor first_;
    ScalarType type_;
    const PrepareTask* input_;
    int64_t filters_ = 0;
    uint32_t next_filter_ = 0;
    bool has_empty_ = false;
    std::vector<AlignTask> tasks_;
    std::vector<Tensor> gains_;  // keeps contiguous copies alive until the kernels are launched
};

std::vector<Tensor> finish(std::vector<Target>& targets) {
    std::vector<Tensor> results;
    results.reserve(targets.size());
    for (Target& target : targets) {
        target.finish();
        results.push_back(target.result);
    }
    return results;
}

}  // namespace

DType dtype_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float: return DType::kFloat32;
        case ScalarType::Half: return DType::kFloat16;
        case ScalarType::BFloat16: return DType::kBFloat16;
        case ScalarType::Double: return DType::kFloat64;
        default: STD_TORCH_CHECK(false, "dtype: want float32, float16, bfloat16 or float64");
    }
}

AlignForwardResult forward_beside(const InputWork* input, const AlignBackend& backend,
                                  const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains,
                                  const std::vector<double>& eps, const std::vector<double>& scales, ScalarType dtype,
                                  MemoryFormat memory_format, const std::vector<std::optional<Tensor>>& memory) {
    STD_TORCH_CHECK(eps.size() == weights.size() && scales.size() == weights.size(),
                    "eps, scales: want one for each weight");
    TaskList list(weights, gains, input);
    STD_TORCH_CHECK((dtype == ScalarType::Double) == (list.weight_dtype() == ScalarType::Double),
                    "dtype: float64 goes to float64 only, and nothing else does");
    std::vector<Source> sources;
    std::vector<Target> targets;
    Strides storage;
    sources.reserve(weights.size());
    targets.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
        sources.emplace_back(weights[i]);
        targets.emplace_back(sources[i], result_strides(weights[i], memory_format, storage), dtype,
                             list.max_transposed(backend), memory.empty() ? std::nullopt : memory[i]);
        AlignTask& task = list.add(sources[i], gains[i], eps[i], scales[i], dtype);
        task.out = targets[i].written();
        task.transposed_columns = uint32_t(targets[i].transposed_columns);
    }
    Tensor statistics = list.per_filter(2);
    list.run(backend, statistics, nullptr);
    return {finish(targets), statistics};
}

AlignBackwardResult backward_beside(const InputWork* input, const AlignBackend& backend,
                                    const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                    const std::vector<std::optional<Tensor>>& gains, const Tensor& statistics,
                                    const std::vector<double>& scales, const std::vector<bool>& spent) {
    STD_TORCH_CHECK(grads.size() == weights.size() && scales.size() == weights.size(),
                    "grads, scales: want one for each weight");
    TaskList list(weights, gains, input);
    list.check_statistics(statistics);
    std::vector<Source> sources;
    std::vector<Target> targets;
    Strides storage;
    std::vector<Tensor> used_grads;
    sources.reserve(weights.size());
    targets.reserve(weights.size());
    used_grads.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
        const Tensor& grad = grads[i];
        STD_TORCH_CHECK(grad.scalar_type() == grads[0].scalar_type() && grad.sizes().equals(weights[i].sizes()) &&
                            on_same_device(grad, weights[i]),
                        "grads: want the weight's shape and device, and one dtype in a list");
        STD_TORCH_CHECK((grad.scalar_type() == ScalarType::Double) == (list.weight_dtype() == ScalarType::Double),
                        "grads: want float64 exactly if the weights are");
        check_memory("grads", grad);
        sources.emplace_back(weights[i]);
        const int64_t *order = strides_of(sources[i].tensor), *grad_order = strides_of(grad),
                      *strides = result_strides(weights[i], MemoryFormat::Preserve, storage);
        if (backend.is_in_place && !spent.empty() && spent[i] && grad.scalar_type() == list.weight_dtype() &&
            same_order(grad, order, grad_order) && same_order(grad, order, strides))
            targets.emplace_back(grad);
        else targets.emplace_back(sources[i], strides, list.weight_dtype(), 0);
        AlignTask& task = list.add(sources[i], gains[i], 0.0, scales[i], grad.scalar_type());
        if (!same_order(grad, order, grad_order) && is_dense(grad) && task.n <= list.max_transposed(backend))
            task.transposed_columns = uint32_t(transposed_columns(grad, order, grad_order));
        used_grads.push_back(task.transposed_columns ? grad : in_order(grad, order));
        task.grad = used_grads[i].const_data_ptr();
        task.out = targets[i].written();
    }
    Tensor rows = statistics.is_contiguous() ? statistics : torch::stable::contiguous(statistics);
    Tensor grad_gain = list.per_filter(1);
    list.run(backend, rows, &grad_gain);
    return {finish(targets), grad_gain};
}

AlignForwardResult align_forward(const AlignBackend& backend, const std::vector<Tensor>& weights,
                                 const std::vector<std::optional<Tensor>>& gains, const std::vector<double>& eps,
                                 const std::vector<double>& scales, ScalarType dtype, MemoryFormat memory_format) {
    return forward_beside(nullptr, backend, weights, gains, eps, scales, dtype, memory_format);
}

AlignBackwardResult align_backward(const AlignBackend& backend, const std::vector<Tensor>& grads,
                                   const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains,
                                   const Tensor& statistics, const std::vector<double>& scales) {
    return backward_beside(nullptr, backend, grads, weights, gains, statistics, scales);
}

}  // namespace wa

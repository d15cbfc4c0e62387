#include "prepare_host.h"

#include <algorithm>
#include <limits>

#include "activations.h"
#include "layout.h"

namespace wa {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // of a dimension, its padding, an image's positions

ImageSide side_of(const Tensor& t) {
    ImageSide side{};
    side.batch = t.stride(0);
    side.channel = t.stride(1);
    int64_t absent = kSpatial + 2 - t.dim();
    for (int64_t d = absent; d < kSpatial; ++d) side.spatial[d] = t.stride(d - absent + 2);
    side.dtype = dtype_of(t.scalar_type());
    return side;
}

// Merges adjacent unpadded dimensions that both tensors can view as one, so that rows are as long as possible.
void merge_rows(PrepareTask& task) {
    auto is_free = [&](int d) { return task.before[d] == 0 && task.after[d] == 0; };
    auto lie_as_one = [&](const ImageSide& side) {
        return task.size[1] == 1 || side.spatial[1] == side.spatial[2] * task.size[2];
    };
    for (int merged = 0; merged < 2; ++merged) {
        if (!is_free(1) || !is_free(2) || !lie_as_one(task.from_side) || !lie_as_one(task.to_side)) return;
        task.size[2] = task.to_size[2] = task.size[1] * task.size[2];
        task.size[1] = task.to_size[1] = 1;
        // The outermost dimension moves inwards, next to the row.
        for (auto* numbers : {task.size, task.to_size, task.before, task.after}) std::swap(numbers[0], numbers[1]);
        for (ImageSide* side : {&task.from_side, &task.to_side}) std::swap(side->spatial[0], side->spatial[1]);
    }
}

void check_activation(int64_t activation) {
    STD_TORCH_CHECK(activation >= 0 && activation <= Activations::kCount, "activation: want 0 to ", Activations::kCount,
                    ", got ", activation);
}

// The fields that both directions share; `unpadded` has the input's shape.
PrepareTask task_of(const Tensor& from, const Tensor& to, const Tensor& unpadded, const std::vector<int64_t>& padding,
                    int64_t padding_mode, int64_t activation) {
    STD_TORCH_CHECK(padding_mode >= 0 && padding_mode <= 3, "padding_mode: want 0 to 3, got ", padding_mode);
    check_activation(activation);
    PrepareTask task{};
    task.from = from.const_data_ptr();
    task.to = to.data_ptr();
    task.from_side = side_of(from);
    task.to_side = side_of(to);
    task.batch = uint32_t(to.size(0));
    task.channels = uint32_t(to.size(1));
    task.mode = PaddingMode(padding_mode);
    task.activation = uint8_t(activation);
    task.saved_is_result = Activations::is_from_result(activation);
    int64_t absent = kSpatial + 2 - to.dim(), positions = 1;
    for (int64_t d = 0; d < kSpatial; ++d) {
        int64_t size = 1, to_size = 1, before = 0, after = 0;
        if (d >= absent) {
            size = unpadded.size(d - absent + 2), to_size = to.size(d - absent + 2);
            before = padding[2 * (d - absent)], after = padding[2 * (d - absent) + 1];
        }
        int64_t most = task.mode == PaddingMode::kReflect ? size - 1 : size;
        bool fits = task.mode == PaddingMode::kZeros || (before | after) == 0 ||
                    (task.mode == PaddingMode::kReplicate ? size > 0 : std::max(before, after) <= most);
        STD_TORCH_CHECK(fits, "padding: too much for a dimension of ", size, " in this mode: ", before, ", ", after);
        task.size[d] = uint32_t(size);
        task.to_size[d] = uint32_t(to_size);
        task.before[d] = uint32_t(before);
        task.after[d] = uint32_t(after);
        positions *= std::max<int64_t>(1, size + before + after);
        STD_TORCH_CHECK(positions <= kMost, "input: more than 2^31 positions");
    }
    STD_TORCH_CHECK(to.size(0) <= kMost && to.size(1) <= kMost, "input: more than 2^31 images or channels");
    merge_rows(task);
    return task;
}

// The shape with `sign` times the padding added to its spatial dimensions.
std::vector<int64_t> padded_sizes(const Tensor& t, const std::vector<int64_t>& padding, int sign) {
    STD_TORCH_CHECK(t.dim() >= 3 && t.dim() <= kSpatial + 2, "input: want rank 3 to 5, got rank ", t.dim());
    STD_TORCH_CHECK(int64_t(padding.size()) == 2 * (t.dim() - 2),
                    "padding: want two numbers for each spatial dimension");
    std::vector<int64_t> sizes = sizes_of(t);
    for (size_t i = 0; i < padding.size(); ++i) {
        STD_TORCH_CHECK(padding[i] >= 0 && padding[i] <= kMost, "padding: want numbers from 0 to 2^31 - 1, got ",
                        padding[i]);
        STD_TORCH_CHECK(t.size(i / 2 + 2) <= kMost, "input: more than 2^31 positions");
        sizes[i / 2 + 2] += sign * padding[i];
    }
    for (int64_t size : sizes) STD_TORCH_CHECK(size >= 0, "padding: more than the whole of a gradient");
    return sizes;
}

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int>& order,
                  ScalarType dtype) {
    return empty_strided(like, int64_t(sizes.size()), sizes.data(), strides_in(sizes, order).data(), dtype);
}

}  // namespace

PrepareForwardResult prepare_forward(const AlignBackend& backend, const Tensor& input,
                                     const std::vector<Tensor>& weights,
                                     const std::vector<std::optional<Tensor>>& gains, const std::vector<double>& eps,
                                     const std::vector<double>& scales, ScalarType dtype, MemoryFormat memory_format,
                                     const std::vector<int64_t>& padding, int64_t padding_mode, int64_t activation) {
    bool is_double = dtype == ScalarType::Double;
    STD_TORCH_CHECK(is_double == (input.scalar_type() == ScalarType::Double),
                    "dtype: float64 goes to float64 only, and nothing else does");
    check_memory("input", input);
    std::vector<int64_t> sizes = padded_sizes(input, padding, 1);
    bool is_empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    std::vector<int> order = order_of(is_empty ? MemoryFormat::Contiguous : memory_format, input.dim());
    Tensor prepared = new_tensor(input, sizes, order, dtype);
    PrepareTask task = task_of(input, prepared, input, padding, padding_mode, activation);
    InputWork work{prepared.numel() ? &task : nullptr, input, is_double};
    auto [aligned, statistics] = forward_beside(&work, backend, weights, gains, eps, scales, dtype, memory_format);
    return {prepared, aligned, statistics};
}

PrepareBackwardResult prepare_backward(const AlignBackend& backend, const Tensor& grad_prepared,
                                       const std::optional<Tensor>& saved, const std::vector<Tensor>& grads,
                                       const std::vector<Tensor>& weights,
                                       const std::vector<std::optional<Tensor>>& gains, const Tensor& statistics,
                                       const std::vector<double>& scales, ScalarType input_dtype,
                                       const std::vector<int64_t>& input_order, const std::vector<int64_t>& padding,
                                       int64_t padding_mode, int64_t activation) {
    bool is_double = input_dtype == ScalarType::Double;
    STD_TORCH_CHECK(is_double == (grad_prepared.scalar_type() == ScalarType::Double),
                    "input_dtype: float64 goes with a gradient of float64 only");
    check_memory("grad_prepared", grad_prepared);
    check_activation(activation);
    const bool is_from_result = Activations::is_from_result(activation);
    STD_TORCH_CHECK(saved.has_value() == (activation != 0), "saved: want a tensor exactly if there is an activation");
    std::vector<int64_t> sizes = padded_sizes(grad_prepared, padding, -1);
    std::vector<int> order(sizes.size(), -1);
    STD_TORCH_CHECK(input_order.size() == sizes.size(), "input_order: want each dimension once");
    std::vector<bool> named(sizes.size());
    for (size_t i = 0; i < order.size(); ++i) {
        int64_t d = input_order[i];
        STD_TORCH_CHECK(d >= 0 && d < int64_t(sizes.size()) && !named[d], "input_order: want each dimension once");
        named[d] = true;
        order[i] = int(d);
    }
    Tensor grad_input = new_tensor(grad_prepared, sizes, order, input_dtype);
    Tensor grad = grad_prepared, source = grad_input;  // source of the derivative, if there is an activation
    if (saved) {
        const Tensor& shape = is_from_result ? grad_prepared : grad_input;
        STD_TORCH_CHECK(sizes_of(*saved) == sizes_of(shape) && saved->scalar_type() == shape.scalar_type() &&
                            on_same_device(*saved, grad_prepared),
                        "saved: want ", is_from_result ? "the prepared input" : "the input", " for this activation");
        check_memory("saved", *saved);
        if (is_from_result) grad = in_order(grad, strides_of(source = *saved));
        else source = in_order(*saved, strides_of(grad_input));
    }
    PrepareTask task = task_of(grad, grad_input, grad_input, padding, padding_mode, activation);
    task.saved = saved ? source.const_data_ptr() : nullptr;
    InputWork work{grad_input.numel() ? &task : nullptr, grad_prepared, is_double};
    auto [grad_weights, grad_gains] = backward_beside(&work, backend, grads, weights, gains, statistics, scales);
    return {grad_input, grad_weights, grad_gains};
}

}  // namespace wa

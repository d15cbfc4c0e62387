// The host side of the ops, the same for every device: tensors in, plain structs to the backend's kernels, tensors out.
#pragma once

#include "abi.h"
#include "align_task.h"

namespace wa {

// A backend: runs the whole list (`device_index` is the weights' device); transposes filters of up to
// `max_transposed` bytes, in the accumulation type, on the way; longer ones are copied by the host.
struct AlignBackend {
    void (*run)(const AlignList& list, int32_t device_index);
    int64_t max_transposed;
};

using AlignForwardResult = std::tuple<std::vector<Tensor>, Tensor>;   // aligned weights, statistics (filters, 2)
using AlignBackwardResult = std::tuple<std::vector<Tensor>, Tensor>;  // weight gradients, gain gradients (filters,)

AlignForwardResult align_forward(const AlignBackend& backend, const std::vector<Tensor>& weights,
                                 const std::vector<std::optional<Tensor>>& gains, const std::vector<double>& eps,
                                 const std::vector<double>& scales, ScalarType dtype, MemoryFormat memory_format);

AlignBackwardResult align_backward(const AlignBackend& backend, const std::vector<Tensor>& grads,
                                   const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains,
                                   const Tensor& statistics, const std::vector<double>& scales);

}  // namespace wa

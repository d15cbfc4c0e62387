// The host side of the ops, the same for every device: tensors in, plain structs to the backend's kernels, tensors out.
#pragma once

#include <stdexcept>

#include "abi.h"
#include "prepare_task.h"

namespace wa {

// A convolution's input that is prepared in the same launch as a list of weights.
struct InputWork {
    const PrepareTask* task;  // null: nothing to compute
    Tensor tensor;            // on the input's device
    bool is_double;
};

// What goes wrong in a backend's work, rather than with its arguments: nobody may try again.
struct RunError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A backend: `run` computes a whole list on the weights' device. Kernels transpose filters of up to `max_transposed`
// bytes, in the accumulation type; larger ones are copied by the host.
struct AlignBackend {
    void (*run)(const AlignList& list, int32_t device_index);
    int64_t max_transposed;
    bool is_in_place = false;  // a weight's gradient may be written over the gradient that it is computed from
};

using AlignForwardResult = std::tuple<std::vector<Tensor>, Tensor>;   // aligned weights, statistics (filters, 2)
using AlignBackwardResult = std::tuple<std::vector<Tensor>, Tensor>;  // weight gradients, gain gradients (filters,)

AlignForwardResult align_forward(const AlignBackend& backend, const std::vector<Tensor>& weights,
                                 const std::vector<std::optional<Tensor>>& gains, const std::vector<double>& eps,
                                 const std::vector<double>& scales, ScalarType dtype, MemoryFormat memory_format);

AlignBackwardResult align_backward(const AlignBackend& backend, const std::vector<Tensor>& grads,
                                   const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains,
                                   const Tensor& statistics, const std::vector<double>& scales);

// The same, and a convolution's input prepared with them unless it is null; with one, the lists may be empty. Gradients
// that are `spent`, seen by nobody else, become those of the weights where the backend, dtype and strides allow it.
// Likewise an aligned weight has the `memory` of a former one, dense and seen by nobody any more, if that is as large.
AlignForwardResult forward_beside(const InputWork* input, const AlignBackend& backend,
                                  const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains,
                                  const std::vector<double>& eps, const std::vector<double>& scales, ScalarType dtype,
                                  MemoryFormat memory_format, const std::vector<std::optional<Tensor>>& memory = {});
AlignBackwardResult backward_beside(const InputWork* input, const AlignBackend& backend,
                                    const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                    const std::vector<std::optional<Tensor>>& gains, const Tensor& statistics,
                                    const std::vector<double>& scales, const std::vector<bool>& spent = {});

DType dtype_of(ScalarType type);

}  // namespace wa

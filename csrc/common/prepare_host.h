// The host side of the ops that prepare a convolution's input along with its weights, the same for every device.
#pragma once

#include "align_host.h"

namespace wa {

using PrepareForwardResult = std::tuple<Tensor, std::vector<Tensor>, Tensor>;   // prepared, aligned, statistics
using PrepareBackwardResult = std::tuple<Tensor, std::vector<Tensor>, Tensor>;  // gradients of input, weights, gains

PrepareForwardResult prepare_forward(const AlignBackend& backend, const Tensor& input,
                                     const std::vector<Tensor>& weights,
                                     const std::vector<std::optional<Tensor>>& gains, const std::vector<double>& eps,
                                     const std::vector<double>& scales, ScalarType dtype, MemoryFormat memory_format,
                                     const std::vector<int64_t>& padding, int64_t padding_mode, int64_t activation);

PrepareBackwardResult prepare_backward(const AlignBackend& backend, const Tensor& grad_prepared,
                                       const std::optional<Tensor>& saved, const std::vector<Tensor>& grads,
                                       const std::vector<Tensor>& weights,
                                       const std::vector<std::optional<Tensor>>& gains, const Tensor& statistics,
                                       const std::vector<double>& scales, ScalarType input_dtype,
                                       const std::vector<int64_t>& input_order, const std::vector<int64_t>& padding,
                                       int64_t padding_mode, int64_t activation);

}  // namespace wa

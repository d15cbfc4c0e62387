// Test-only. One of PyTorch's operations on CUDA tensors, by its CPU kernel.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

namespace simcuda {

// As a kernel of the CUDA dispatch key: adds the operation to the current stream.
void launch_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace simcuda

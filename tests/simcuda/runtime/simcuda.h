// Test-only. What the simulated CUDA runtime offers to those that bring kernels: the project's own
// (project_kernels.cpp) and PyTorch's (torch/).
#pragma once
#include <cuda_runtime_api.h>

#include <functional>

#pragma GCC visibility push(default)
namespace simcuda {

using Work = std::function<void()>;  // in a graph it runs once for each replay

// The work of a launch, with its arguments copied from `arguments`, which are those of cudaLaunchKernel.
using Bind = Work (*)(dim3 grid, dim3 block, size_t shared_bytes, void** arguments);

// A kernel for every registered one whose demangled name contains `name`.
void add_kernel(const char* name, Bind bind);

// Adds work to the end of the stream, or of the graph that it captures.
void enqueue(cudaStream_t stream, Work work);
bool is_capturing(cudaStream_t stream);
bool is_idle(cudaStream_t stream);
// Runs all that was enqueued, and what it waits for in other streams.
void drain(cudaStream_t stream);

// For work that fails: the next call that synchronises returns cudaErrorLaunchFailure.
void fail(const char* message);

// While one exists, the host may access the device's memory (-1: that of all devices). Only SIMCUDA_STRICT=1 needs it.
struct Access {
    explicit Access(int device);
    Access(const Access&) = delete;
    ~Access();
    const int device;
};

}  // namespace simcuda
#pragma GCC visibility pop

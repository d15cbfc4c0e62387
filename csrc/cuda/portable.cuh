// What nvcc and the tests' CPU emulation spell differently.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "simt.h"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace wa::cuda {

template <class T>
__device__ T* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(16) unsigned char wa_dynamic_shared[];
    return reinterpret_cast<T*>(wa_dynamic_shared);
#else
    return static_cast<T*>(simt::dynamic_shared());
#endif
}

// Returns the launch's own error: cudaGetLastError would also return what an earlier call has left there.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   [[maybe_unused]] cudaStream_t stream, const A&... arguments) {
#ifdef __CUDACC__
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
#else
    simt::launch(kernel, grid, block, shared_bytes, arguments...);
    return cudaSuccess;
#endif
}

// Whether the driver takes more than 4 KB of kernel parameters: from CUDA 12.1 (R530) on.
inline bool takes_large_parameters() {
#ifdef __CUDACC__
    static const bool takes = [] {
        int version = 0;
        return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
    }();
    return takes;
#else
    return true;
#endif
}

// The upper half of a product.
__device__ inline uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return __umulhi(a, b);
#else
    return uint32_t(uint64_t(a) * b >> 32);
#endif
}

// 1 / x to within 2 units in the last place, in a few instructions.
__device__ inline float approximate_reciprocal(float x) {
#ifdef __CUDA_ARCH__
    return __fdividef(1.0f, x);
#else
    return 1.0f / x;
#endif
}

// 1 / x for a count, and 1 / sqrt(x), to within 1 unit in the last place: the hardware's approximation and one step of
// Newton's. Correct rounding would take a slow path, with a call and its registers. At 0 and infinity there is no step.
__device__ inline float reciprocal(float count) {
    float y = approximate_reciprocal(count);
    return fmaf(y, fmaf(-count, y, 1.0f), y);
}
__device__ inline double reciprocal(double count) { return 1 / count; }
__device__ inline float reciprocal_root(float x) {
#ifdef __CUDA_ARCH__
    float y = rsqrtf(x), error = fmaf(-x * y, y, 1.0f);
    return fabsf(error) < 1.0f ? fmaf(y / 2, error, y) : y;
#else
    return 1.0f / sqrtf(x);
#endif
}
__device__ inline double reciprocal_root(double x) { return 1 / sqrt(x); }

// The same number, hidden from the optimiser: what is derived from it is recomputed where it is used, instead of held
// in registers from its first use to its last.
__device__ inline int computed_again(int x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

}  // namespace wa::cuda

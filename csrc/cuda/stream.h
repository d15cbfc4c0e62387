// torch's current stream, from a library that must load where libtorch_cuda does not exist.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include "../common/abi.h"

// Weak: null on CPU-only torch, and on some loaders until libtorch_cuda is looked up by name.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace wa::cuda {

inline cudaStream_t current_stream(int32_t device_index) {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = []() -> Get {
        if (aoti_torch_get_current_cuda_stream) return aoti_torch_get_current_cuda_stream;
        void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
        return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    // Never fall back to stream 0: it would race with torch's own work.
    STD_TORCH_CHECK(get, "weightalign_cuda: this torch has no CUDA stream (libtorch_cuda is not loaded)");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(get(device_index, &stream));
    return static_cast<cudaStream_t>(stream);
}

}  // namespace wa::cuda

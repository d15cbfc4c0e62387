// What this library was built with, for `backends()` and `python -m weightalign_cuda`; called through ctypes.
#ifdef CUDA_KERNEL  // by Hugging Face's kernel-builder, which writes the architectures into a file (csrc/hub)
#define WA_CUDA_ARCHITECTURES ""
#endif
#ifdef WA_CUDA_ARCHITECTURES
#include <cuda_runtime.h>
#endif

#pragma GCC visibility push(default)
extern "C" {

// The architectures of the kernels, "75,80,90+PTX", or "" without CUDA.
const char* wa_cuda_architectures() {
#ifdef WA_CUDA_ARCHITECTURES
    return WA_CUDA_ARCHITECTURES;
#else
    return "";
#endif
}

// The CUDA runtime linked in: 13000 is 13.0, 0 is none.
int wa_cuda_runtime_version() {
#ifdef WA_CUDA_ARCHITECTURES
    return CUDART_VERSION;
#else
    return 0;
#endif
}

// The newest runtime that the installed driver supports, 0 without a driver. Initialises CUDA.
int wa_cuda_driver_version() {
    int version = 0;
#ifdef WA_CUDA_ARCHITECTURES
    cudaDriverGetVersion(&version);
#endif
    return version;
}
}
#pragma GCC visibility pop

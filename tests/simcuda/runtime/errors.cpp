// Errors of the runtime.
#include <array>

#include "machine.h"

namespace {

enum Part { kName, kText };

const char* describe(cudaError_t error, Part part) {
    static const std::map<int, std::array<const char*, 2>> kDescriptions = {
        {0, {"cudaSuccess", "no error"}},
        {1, {"cudaErrorInvalidValue", "invalid argument"}},
        {2, {"cudaErrorMemoryAllocation", "out of memory"}},
        {3, {"cudaErrorInitializationError", "initialization error"}},
        {9, {"cudaErrorInvalidConfiguration", "invalid configuration argument"}},
        {35, {"cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"}},
        {100, {"cudaErrorNoDevice", "no CUDA-capable device is detected"}},
        {101, {"cudaErrorInvalidDevice", "invalid device ordinal"}},
        {209, {"cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"}},
        {400, {"cudaErrorInvalidResourceHandle", "invalid resource handle"}},
        {600, {"cudaErrorNotReady", "device not ready"}},
        {700, {"cudaErrorIllegalAddress", "an illegal memory access was encountered"}},
        {701, {"cudaErrorLaunchOutOfResources", "too many resources requested for launch"}},
        {719, {"cudaErrorLaunchFailure", "unspecified launch failure"}},
        {801, {"cudaErrorNotSupported", "operation not supported"}},
        {900, {"cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"}},
        {901, {"cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"}},
        {905, {"cudaErrorStreamCaptureIsolation", "dependency created on uncaptured work in another stream"}},
        {907, {"cudaErrorCapturedEvent", "operation not permitted on an event last recorded in a capturing stream"}},
    };
    auto found = kDescriptions.find(error);
    return found == kDescriptions.end() ? "an error that the simulation has no name for" : found->second[part];
}

}  // namespace

extern "C" {
cudaError_t cudaGetLastError() { return std::exchange(simcuda::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return simcuda::last_error; }
const char* cudaGetErrorName(cudaError_t error) { return describe(error, kName); }
const char* cudaGetErrorString(cudaError_t error) { return describe(error, kText); }
}

// The ops on CUDA devices: device, stream and launch errors around align_launch.cuh.
#include "align_launch.cuh"

#include "../common/abi.h"
#include "../common/register_ops.h"
#include "stream.h"

namespace wa::cuda {
namespace {

// Of errors that a launch itself can have. Others are of work that was launched before, by whomever.
bool is_of_launch(cudaError_t error) {
    switch (error) {
        case cudaErrorInvalidValue:
        case cudaErrorInvalidConfiguration:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorInvalidResourceHandle:
        case cudaErrorLaunchOutOfResources:
        case cudaErrorMemoryAllocation:
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorStreamCaptureUnsupported: return true;
        default: return false;
    }
}

template <Direction kDirection>
void run(const AlignList& list, int32_t device_index) {
    torch::stable::accelerator::DeviceGuard guard(device_index);
    cudaError_t error = align<kDirection>(list, current_stream(device_index));
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else the next check of anybody's would report it once more
    STD_TORCH_CHECK(false, "weightalign_cuda::", list.input ? "prepare" : "align",
                    kDirection == Direction::kForward ? "_forward" : "_backward", " on cuda:", device_index,
                    ": the kernel launch failed: ", cudaGetErrorString(error),
                    is_of_launch(error) ? ""
                                        : ". The cause may be an earlier kernel, of any library: "
                                          "CUDA_LAUNCH_BLOCKING=1 reports it where it is launched");
}

constexpr int64_t kMaxTransposed =
    std::min(AlignShape<float>::kOnChip * sizeof(float), AlignShape<double>::kOnChip * sizeof(double));
constexpr AlignBackend kForward{run<Direction::kForward>, kMaxTransposed};
constexpr AlignBackend kBackward{run<Direction::kBackward>, kMaxTransposed};

}  // namespace
}  // namespace wa::cuda

WA_IMPLEMENT(CUDA, library) {
    wa::implement_ops<wa::cuda::kForward, wa::cuda::kBackward>(library, aoti_torch_device_type_cuda());
}

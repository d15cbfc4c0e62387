// The ops on CUDA devices: device, stream and launch errors around align_launch.cuh.
#include "align_launch.cuh"

#include "../common/abi.h"
#include "../common/register_ops.h"
#include "stream.h"

namespace wa::cuda {
namespace {

template <Direction kDirection>
void run(const AlignList& list, int32_t device_index) {
    torch::stable::accelerator::DeviceGuard guard(device_index);
    align<kDirection>(list, current_stream(device_index));
    cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "weightalign_cuda: kernel launch on cuda:", device_index,
                    " failed: ", cudaGetErrorString(error));
}

static_assert(AlignShape<float>::kOnChip * sizeof(float) == AlignShape<double>::kOnChip * sizeof(double));
constexpr AlignBackend kForward{run<Direction::kForward>, AlignShape<float>::kOnChip * sizeof(float)};
constexpr AlignBackend kBackward{run<Direction::kBackward>, AlignShape<float>::kOnChip * sizeof(float)};

}  // namespace
}  // namespace wa::cuda

STABLE_TORCH_LIBRARY_IMPL(weightalign_cuda, CUDA, library) {
    wa::implement_ops<wa::cuda::kForward, wa::cuda::kBackward>(library);
}

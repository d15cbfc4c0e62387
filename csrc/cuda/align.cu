// The ops on CUDA devices: device, stream and launch errors around align_launch.cuh.
#include "align_launch.cuh"

#include "../common/abi.h"
#include "../common/align_host.h"
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

template <Direction kDirection>
constexpr AlignBackend kBackend{run<kDirection>, AlignShape<float>::kOnChip * sizeof(float)};
static_assert(AlignShape<float>::kOnChip * sizeof(float) == AlignShape<double>::kOnChip * sizeof(double));

AlignForwardResult forward(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains,
                           const std::vector<double>& eps, const std::vector<double>& scales, ScalarType dtype,
                           MemoryFormat memory_format) {
    return align_forward(kBackend<Direction::kForward>, weights, gains, eps, scales, dtype, memory_format);
}

AlignBackwardResult backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                             const std::vector<std::optional<Tensor>>& gains, const Tensor& statistics,
                             const std::vector<double>& scales) {
    return align_backward(kBackend<Direction::kBackward>, grads, weights, gains, statistics, scales);
}

}  // namespace
}  // namespace wa::cuda

STABLE_TORCH_LIBRARY_IMPL(weightalign_cuda, CUDA, library) {
    library.impl("align_forward", WA_BOX(wa::cuda::forward));
    library.impl("align_backward", WA_BOX(wa::cuda::backward));
}

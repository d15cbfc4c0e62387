// Test-only. The kernels under test, compiled by the host compiler with the emulator's instrumentation.
#include "kernels.h"

#include "../../csrc/cuda/align_launch.cuh"

namespace wa {

void align_forward(const AlignList& list) { cuda::align<cuda::Direction::kForward>(list, nullptr); }
void align_backward(const AlignList& list) { cuda::align<cuda::Direction::kBackward>(list, nullptr); }

}  // namespace wa

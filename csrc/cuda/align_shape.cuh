// How much of a filter a thread and a block hold, and how wide their accesses are: what was tuned.
#pragma once
#include <cstdint>

namespace wa::cuda {

// What one block holds in registers: one filter of up to kOnChip values, or as many shorter ones. 16 floats a thread,
// of the weight and of the gradient, keep every way through the kernels under 64 registers without a spill, on every
// architecture; 32 did not.
template <class Acc>
struct AlignShape {
    static constexpr int kValues = sizeof(Acc) == 4 ? 16 : 4;
    static constexpr int kThreads = sizeof(Acc) == 4 ? 512 : 1024;
    static constexpr int kBlocksPerSm = 1024 / kThreads;  // at 64 registers a thread
    static constexpr uint32_t kOnChip = kValues * kThreads;
};

// Values that a thread moves together: what fills 16 bytes of the accumulation type; of 16-bit values, if the weight or
// the aligned side has them and the filter is on chip; or 1, where rows are not aligned.
template <class Acc>
constexpr int kVectorChunk = 16 / sizeof(Acc);
constexpr int kPackedChunk = 8;

}  // namespace wa::cuda

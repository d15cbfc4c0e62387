// The tuned constants: how much of a filter a thread and a block hold, and how wide their accesses are.
#pragma once
#include <cstdint>

namespace wa::cuda {

// What one block holds in registers: one filter of up to kOnChip values, or as many shorter ones. 16 floats per thread,
// of the weight and of the gradient, keep every path through the kernels within 64 registers and without spills on
// every architecture; 32 did not.
template <class Acc>
struct AlignShape {
    static constexpr int kValues = sizeof(Acc) == 4 ? 16 : 4;
    static constexpr int kThreads = sizeof(Acc) == 4 ? 512 : 1024;
    static constexpr int kBlocksPerSm = 1024 / kThreads;  // at 64 registers a thread
    static constexpr uint32_t kOnChip = kValues * kThreads;
};

// Values per access: kVectorChunk, 16 bytes of the accumulation type; kPackedChunk, 16 bytes of 16-bit values, if the
// weight or the aligned side has them and the filter is on chip; or 1 if rows are not aligned.
template <class Acc>
constexpr int kVectorChunk = 16 / sizeof(Acc);
constexpr int kPackedChunk = 8;

}  // namespace wa::cuda

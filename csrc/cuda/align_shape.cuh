// The tuned constants: how much of a filter a thread and a block hold, and how wide their accesses are.
#pragma once
#include "../common/align_task.h"

namespace wa::cuda {

// Values per access: kVectorChunk, 16 bytes of the accumulation type; kPackedChunk, 16 bytes of 16-bit values, if both
// sides have them and the filter is on chip; or 1 if rows are not aligned.
template <class Acc>
constexpr int kVectorChunk = 16 / sizeof(Acc);
constexpr int kPackedChunk = 8;

// What one block holds in registers: one filter, or as many shorter ones. 12 to 20 floats per thread, of the weight and
// of the gradient, keep every path through the kernels within 64 registers and without spills on every architecture; 32
// did not. 20, because teams are powers of two and 3x3 filters of 64, 128, 256 or 512 channels then fill 18 of them;
// with 16 they would fill 9. 12 scalars, for each needs an address and a predicate of its own besides.
template <class Acc>
struct AlignShape {
    static constexpr int kThreads = sizeof(Acc) == 4 ? 512 : 1024;  // of a block, or half as many
    static constexpr int kBlocksPerSm = 1024 / kThreads;            // at 64 registers a thread
    static WA_ANYWHERE constexpr int values(int chunk) {            // of a thread
        return sizeof(Acc) == 8 ? 4 : chunk == 1 ? 12 : chunk == kPackedChunk ? 16 : 20;
    }
    static constexpr uint32_t kOnChip = values(1) * kThreads;  // a filter that fits however it is accessed
};

}  // namespace wa::cuda

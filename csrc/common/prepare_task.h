// What the host passes to the kernels for a convolution's input: one plain struct.
#pragma once

#include "align_task.h"

namespace wa {

enum class PaddingMode : uint8_t { kZeros, kReflect, kReplicate, kCircular };  // numbered as in the ops

constexpr int kSpatial = 3;  // spatial dimensions; absent ones come first and have size 1

// A tensor (batch, channels, spatial...), in any memory order: the strides define it.
struct ImageSide {
    int64_t batch, channel, spatial[kSpatial];  // strides, in values
    DType dtype;
};

// One pass over a convolution's input, from `from` to `to`, both (batch, channels, ...):
//
//   forward:   prepared = pad(cast(activation(input)))       from: input, to: prepared
//   backward:  d input = activation'(input) * sum of d prepared over the positions that show the value
//                                                            from: d prepared, to: d input
struct PrepareTask {
    const void* from;
    void* to;
    const void* saved;  // backward: what the activation's derivative is computed from. The prepared input, with
                        // layout and dtype of `from` (saved_is_result), or the input, with those of `to`
    ImageSide from_side, to_side;
    uint32_t batch, channels;
    uint32_t size[kSpatial];                     // of the input
    uint32_t before[kSpatial], after[kSpatial];  // its padding
    uint32_t to_size[kSpatial];                  // of `to`: forward padded, backward not
    PaddingMode mode;
    uint8_t activation;  // position in `Activations`, from 1; 0: none
    bool saved_is_result;
};

}  // namespace wa

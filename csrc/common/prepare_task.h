// What the host functions hand to the kernels for a convolution's input: one plain struct.
#pragma once

#include "align_task.h"

namespace wa {

enum class PaddingMode : uint8_t { kZeros, kReflect, kReplicate, kCircular };  // in the order of the ops' numbers

constexpr int kSpatial = 3;  // spatial dimensions; absent ones come first and have size 1

// A tensor (batch, channels, spatial...): memory order is all in the strides.
struct ImageSide {
    int64_t batch, channel, spatial[kSpatial];  // strides, in values
    DType dtype;
};

// One input of a convolution on its way from `from` to `to`, both (batch, channels, ...):
//
//   forward:   prepared = pad(cast(activation(input)))       from: input, to: prepared
//   backward:  d input = activation'(input) * sum of d prepared over the places that show the value
//                                                            from: d prepared, to: d input
struct PrepareTask {
    const void* from;
    void* to;
    const void* saved;  // backward, what the activation's derivative comes from: the prepared input, which lies as
                        // `from` (saved_is_result), or the input, which lies as `to`, in to's dtype
    ImageSide from_side, to_side;
    uint32_t batch, channels;
    uint32_t size[kSpatial];                     // of the input
    uint32_t before[kSpatial], after[kSpatial];  // what pads it
    uint32_t to_size[kSpatial];                  // of `to`: forward padded, backward not
    PaddingMode mode;
    uint8_t activation;  // a number of `Activations`; 0: none
    bool saved_is_result;
};

}  // namespace wa

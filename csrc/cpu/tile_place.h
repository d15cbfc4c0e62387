// The position of a tile in a convolution's input, and copies of its values.
#pragma once

#include "activation.h"
#include "dtype.h"
#include "kernels.h"

namespace wa::cpu {
namespace {

template <class Acc, class From, class To>
WA_APART void convert(const From* from, To* to, uint32_t n) {
    for_each<Acc>(n, [=](auto width, size_t i) WA_LAMBDA { store<Acc>(width, to + i, load<Acc>(width, from + i)); });
}

// Copies n values, `from_stride` apart, to places `to_stride` apart; converts the dtype.
template <class Acc, class From, class To>
WA_INLINE void copy_run(const From* from, int64_t from_stride, To* to, int64_t to_stride, uint32_t n) {
    if (from_stride == 1 && to_stride == 1) convert<Acc>(from, to, n);
    else
        for (uint32_t i = 0; i < n; ++i)
            store<Acc>(OneValue{}, to + i * to_stride, load<Acc>(OneValue{}, from + i * from_stride));
}

template <class Acc>
WA_APART void add(const Acc* term, Acc* sum, uint32_t n) {
    for_each<Acc>(n, [=](auto width, size_t i) WA_LAMBDA {
        store<Acc>(width, sum + i, load<Acc>(width, sum + i) + load<Acc>(width, term + i));
    });
}

// Visits the tiles in the memory order of rows.
struct TilePlace {
    const PrepareTask& task;
    const Tiling& tiling;
    bool by_channels;  // whether channels are the innermost dimension of `from`, else positions
    uint32_t image, first_channel, channels, width;
    Coordinates first;
    int64_t from;  // offset of the image, at the tile's first channel
    int64_t to;    // offset of the tile

    TilePlace(const PrepareTask& task, const Tiling& tiling, int64_t index)
        : task(task), tiling(tiling), by_channels(is_by_channels(task.from_side, task)) {
        auto next_digit = [&](int64_t base) {
            int64_t digit = index % base;
            index /= base;
            return int(digit);
        };
        first.at[2] = next_digit(tiling.width_tiles) * int(tiling.width);
        first.at[1] = next_digit(task.to_size[1]);
        first.at[0] = next_digit(task.to_size[0]);
        first_channel = uint32_t(next_digit(tiling.channel_tiles)) * tiling.channels;
        image = uint32_t(index);
        locate();
    }

    void advance() {
        auto wraps = [](auto& at, uint32_t step, uint32_t size) {
            at += step;
            if (uint32_t(at) < size) return false;
            at = 0;
            return true;
        };
        if (wraps(first.at[2], tiling.width, task.to_size[2]) && wraps(first.at[1], 1, task.to_size[1]) &&
            wraps(first.at[0], 1, task.to_size[0]) && wraps(first_channel, tiling.channels, task.channels))
            ++image;
        locate();
    }

private:
    void locate() {
        width = std::min(tiling.width, task.to_size[2] - first.at[2]);
        channels = std::min(tiling.channels, task.channels - first_channel);
        auto begin = [&](const ImageSide& side) { return image * side.batch + first_channel * side.channel; };
        from = begin(task.from_side);
        to = begin(task.to_side);
        for (int d = 0; d < kSpatial; ++d) to += first.at[d] * task.to_side.spatial[d];
    }
};

}  // namespace
}  // namespace wa::cpu

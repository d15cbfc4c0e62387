// Tiles that are transposed or strided: read into the L1 cache in the source's memory order, transformed there, and
// written in the result's, in runs along its innermost dimension. The backward of a value that padding repeats gathers
// from each position that shows it.
#pragma once

#include "tile_place.h"

namespace wa::cpu {
namespace {

template <class Acc>
struct Tile : TilePlace {
    alignas(64) Acc values[kTileValues];  // in the order of `from`
    alignas(64) Acc other[kTileValues];

    using TilePlace::TilePlace;

    void forward() {
        load_padded();
        activate(task.activation, values, values, size());
        with_type<Acc>(task.to, task.to_side.dtype, [&](auto* typed) WA_LAMBDA {
            for_each_run([&](Acc* run, int64_t at, int64_t stride, uint32_t n)
                             WA_LAMBDA { copy_run<Acc>(run, 1, typed + at, stride, n); });
        });
    }

    void backward() {
        load_places();
        if (task.saved && task.saved_is_result) {
            load_columns(task.saved, own_source(task, first), 0, width, other);
            differentiate(task.activation, other, values, values, size());
        }
        alignas(64) Acc input[kTileValues];
        with_type<Acc>(task.to, task.to_side.dtype, [&](auto* typed) WA_LAMBDA {
            auto saved = static_cast<decltype(typed)>(const_cast<void*>(task.saved));
            for_each_run([&](Acc* run, int64_t at, int64_t stride, uint32_t n) WA_LAMBDA {
                if (saved && !task.saved_is_result) {
                    copy_run<Acc>(saved + at, stride, input, 1, n);
                    differentiate(task.activation, input, run, run, n);
                }
                copy_run<Acc>(run, 1, typed + at, stride, n);
            });
        });
    }

private:
    Coordinates at(uint32_t w) const { return {{first.at[0], first.at[1], first.at[2] + int(w)}}; }
    uint32_t size() const { return channels * width; }

    // Columns [begin, end) of all rows of the tile, starting at `offset` in the image.
    void load_columns(const void* tensor, int64_t offset, uint32_t begin, uint32_t end, Acc* out) const {
        const ImageSide& side = task.from_side;
        with_type<Acc>(tensor, side.dtype, [&](auto* typed) WA_LAMBDA {
            typed += from + offset;
            if (by_channels)
                for (uint32_t w = begin; w < end; ++w, typed += side.spatial[2])
                    copy_run<Acc>(typed, side.channel, out + w * channels, 1, channels);
            else if (end - begin == 1)
                for (uint32_t c = 0; c < channels; ++c)
                    out[c * width + begin] = load<Acc>(OneValue{}, typed + c * side.channel);
            else
                for (uint32_t c = 0; c < channels; ++c, typed += side.channel)
                    copy_run<Acc>(typed, side.spatial[2], out + c * width + begin, 1, end - begin);
        });
    }

    void load_padded() {
        for (uint32_t begin = 0, end; begin < width; begin = end) {
            int64_t source = source_of(task, at(begin)), beyond = int64_t(at(begin).at[2]) - task.before[2];
            bool inside = beyond >= 0 && beyond < task.size[2];  // then sources advance with the columns
            end = inside ? uint32_t(std::min<int64_t>(width, begin + task.size[2] - beyond)) : begin + 1;
            if (source >= 0) load_columns(task.from, source, begin, end, values);
            else clear_columns(begin, end);
        }
    }
    void clear_columns(uint32_t begin, uint32_t end) {
        if (by_channels) std::memset(values + begin * channels, 0, (end - begin) * channels * sizeof(Acc));
        else
            for (uint32_t c = 0; c < channels; ++c)
                std::memset(values + c * width + begin, 0, (end - begin) * sizeof(Acc));
    }

    // The sum over all positions that show a value.
    void load_places() {
        load_columns(task.from, own_source(task, first), 0, width, values);
        if (task.mode == PaddingMode::kZeros) return;
        for (uint32_t w = 0; w < width; ++w) {
            if (!is_shown_twice(task, at(w))) continue;
            bool own = true;
            for_each_source(task, at(w), [&](int64_t offset) {
                if (!own) add_column(offset, w);
                own = false;
            });
        }
    }
    void add_column(int64_t offset, uint32_t w) {
        const ImageSide& side = task.from_side;
        with_type<Acc>(task.from, side.dtype, [&](auto* typed) WA_LAMBDA {
            copy_run<Acc>(typed + from + offset, side.channel, other, 1, channels);
        });
        if (by_channels) return add(other, values + w * channels, channels);
        for (uint32_t c = 0; c < channels; ++c) values[c * width + w] += other[c];
    }

    // each(run of the result in `values` or `other`, its offset, stride and length) for all runs.
    template <class Each>
    void for_each_run(const Each& each) {
        const ImageSide& side = task.to_side;
        const bool to_channels = is_by_channels(side, task);
        const uint32_t runs = to_channels ? width : channels, length = to_channels ? channels : width;
        const int64_t step = to_channels ? side.spatial[2] : side.channel;
        const int64_t stride = to_channels ? side.channel : side.spatial[2];
        for (uint32_t r = 0; r < runs; ++r) {
            Acc* run = values + r * length;
            if (to_channels != by_channels) {
                run = other;
                for (uint32_t i = 0; i < length; ++i) run[i] = values[i * runs + r];
            }
            each(run, to + r * step, stride, length);
        }
    }
};

}  // namespace
}  // namespace wa::cpu

// A convolution's input, tile by tile: activation, cast, layout, padding, and back. Compiled once for each instruction
// set.
//
// A tile is read into the L1 cache, in the order in which it lies in memory, changed there, and written in the order of
// the result: each value is read from memory once and written once, in runs along what lies side by side. Backward, a
// value shown in the padding as well is read for each place that shows it.
#include <algorithm>

#include "../common/padding.h"
#include "activation.h"
#include "kernels.h"
#include "simd.h"

namespace wa::cpu {
namespace {

// run(typed pointer)
template <class Acc, class Void, class Run>
WA_INLINE void with_type(Void* tensor, DType dtype, const Run& run) {
    auto as = [&](auto* type) WA_LAMBDA {
        using T = std::remove_pointer_t<decltype(type)>;
        run(static_cast<std::conditional_t<std::is_const_v<Void>, const T, T>*>(tensor));
    };
    if constexpr (sizeof(Acc) == 8) {
        as(static_cast<double*>(nullptr));
    } else {
        switch (dtype) {
            case DType::kFloat16: return as(static_cast<Half*>(nullptr));
            case DType::kBFloat16: return as(static_cast<BFloat16*>(nullptr));
            default: return as(static_cast<float*>(nullptr));
        }
    }
}

// A run of n values of a tensor, from value `at` on, `stride` apart.
template <class Acc>
void load_run(const void* tensor, DType dtype, int64_t at, int64_t stride, Acc* to, uint32_t n) {
    with_type<Acc>(tensor, dtype, [&](auto* from) WA_LAMBDA {
        from += at;
        if (stride == 1)
            for_each<Acc>(
                n, [=](auto width, uint32_t i) WA_LAMBDA { store<Acc>(width, to + i, load<Acc>(width, from + i)); });
        else
            for (uint32_t i = 0; i < n; ++i) to[i] = load_one<Acc>(from + i * stride);
    });
}
template <class Acc>
void store_run(void* tensor, DType dtype, int64_t at, int64_t stride, const Acc* from, uint32_t n) {
    with_type<Acc>(tensor, dtype, [&](auto* to) WA_LAMBDA {
        to += at;
        if (stride == 1)
            for_each<Acc>(
                n, [=](auto width, uint32_t i) WA_LAMBDA { store<Acc>(width, to + i, load<Acc>(width, from + i)); });
        else
            for (uint32_t i = 0; i < n; ++i) store_one(to + i * stride, from[i]);
    });
}
template <class Acc>
void add(const Acc* term, Acc* sum, uint32_t n) {
    for_each<Acc>(n, [=](auto width, uint32_t i) WA_LAMBDA {
        store<Acc>(width, sum + i, load<Acc>(width, sum + i) + load<Acc>(width, term + i));
    });
}

template <class Acc>
struct Tile {
    const PrepareTask& task;
    bool by_channels;  // order of `values`: all channels of a position, or all positions of a channel
    uint32_t channels, width;
    int64_t from, to;  // where the image's first channel of the tile begins
    Coordinates first;
    alignas(64) Acc values[kTileValues];
    alignas(64) Acc other[kTileValues];

    Tile(const PrepareTask& task, const Tiling& tiling, int64_t index)
        : task(task), by_channels(is_by_channels(task.from_side, task)) {
        uint32_t w = uint32_t(index % tiling.width_tiles) * tiling.width;
        index /= tiling.width_tiles;
        int row = int(index % task.to_size[1]), depth = int(index / task.to_size[1] % task.to_size[0]);
        index /= int64_t(task.to_size[0]) * task.to_size[1];
        int64_t channel = index % tiling.channel_tiles * tiling.channels, image = index / tiling.channel_tiles;
        first = {{depth, row, int(w)}};
        width = std::min(tiling.width, task.to_size[2] - w);
        channels = uint32_t(std::min<int64_t>(tiling.channels, task.channels - channel));
        from = image * task.from_side.batch + channel * task.from_side.channel;
        to = image * task.to_side.batch + channel * task.to_side.channel;
    }

    Coordinates at(uint32_t w) const { return {{first.at[0], first.at[1], first.at[2] + int(w)}}; }
    uint32_t size() const { return channels * width; }

    // Columns [begin, end) of all rows of the tile, from `offset` of the image on.
    void load_columns(const void* tensor, int64_t offset, uint32_t begin, uint32_t end, Acc* out) const {
        const ImageSide& side = task.from_side;
        int64_t origin = from + offset;
        if (by_channels)
            for (uint32_t w = begin; w < end; ++w)
                load_run(tensor, side.dtype, origin + (w - begin) * side.spatial[2], side.channel, out + w * channels,
                         channels);
        else
            for (uint32_t c = 0; c < channels; ++c)
                load_run(tensor, side.dtype, origin + c * side.channel, side.spatial[2], out + c * width + begin,
                         end - begin);
    }

    void load_padded() {
        for (uint32_t begin = 0, end; begin < width; begin = end) {
            int64_t source = source_of(task, at(begin)), beyond = int64_t(at(begin).at[2]) - task.before[2];
            bool inside = beyond >= 0 && beyond < task.size[2];  // then the sources go on in step to the row's end
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

    // The sum over all places that show a value.
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
        load_run(task.from, task.from_side.dtype, from + offset, task.from_side.channel, other, channels);
        if (by_channels) return add(other, values + w * channels, channels);
        for (uint32_t c = 0; c < channels; ++c) values[c * width + w] += other[c];
    }

    // each(run of the result in `values` or `other`, where it goes, its length), all runs.
    template <class Each>
    void for_each_run(const Each& each) {
        const ImageSide& side = task.to_side;
        const bool to_channels = is_by_channels(side, task);
        int64_t origin = to;
        for (int d = 0; d < kSpatial; ++d) origin += first.at[d] * side.spatial[d];
        const uint32_t runs = to_channels ? width : channels, length = to_channels ? channels : width;
        const int64_t step = to_channels ? side.spatial[2] : side.channel;
        const int64_t stride = to_channels ? side.channel : side.spatial[2];
        for (uint32_t r = 0; r < runs; ++r) {
            Acc* run = values + r * length;
            if (to_channels != by_channels) {
                run = other;
                for (uint32_t i = 0; i < length; ++i) run[i] = values[i * runs + r];
            }
            each(run, origin + r * step, stride, length);
        }
    }
};

}  // namespace

namespace WA_ISA {

template <class Acc>
void prepare_forward(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
        Tile<Acc> tile(task, tiling, index);
        tile.load_padded();
        activate(task.activation, tile.values, tile.size());
        tile.for_each_run([&](Acc* run, int64_t at, int64_t stride, uint32_t n) {
            store_run(task.to, task.to_side.dtype, at, stride, run, n);
        });
    }
}

template <class Acc>
void prepare_backward(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last) {
    const bool is_relu = task.activation == Activation::kRelu;
    for (int64_t index = first; index < last; ++index) {
        Tile<Acc> tile(task, tiling, index);
        tile.load_places();
        if (is_relu) {
            tile.load_columns(task.saved, own_source(task, tile.first), 0, tile.width, tile.other);
            differentiate(task.activation, tile.other, tile.values, tile.size());
        }
        alignas(64) Acc input[kTileValues];
        tile.for_each_run([&](Acc* run, int64_t at, int64_t stride, uint32_t n) {
            if (task.saved && !is_relu) {
                load_run(task.saved, task.to_side.dtype, at, stride, input, n);
                differentiate(task.activation, input, run, n);
            }
            store_run(task.to, task.to_side.dtype, at, stride, run, n);
        });
    }
}

template void prepare_forward<float>(const PrepareTask&, const Tiling&, int64_t, int64_t);
template void prepare_forward<double>(const PrepareTask&, const Tiling&, int64_t, int64_t);
template void prepare_backward<float>(const PrepareTask&, const Tiling&, int64_t, int64_t);
template void prepare_backward<double>(const PrepareTask&, const Tiling&, int64_t, int64_t);

}  // namespace WA_ISA
}  // namespace wa::cpu

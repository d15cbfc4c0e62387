// A convolution's input, tile by tile: activation, cast, layout, padding, and back. Compiled once for each instruction
// set.
//
// Where nothing is padded, transposed or cast, values go from memory to memory in one loop, which keeps it busy all the
// time. Otherwise a tile is read into the L1 cache, in the order in which it lies in memory, changed there, and written
// in the order of the result: each value is read from memory once and written once, in runs along what lies side by
// side. Backward, a value shown in the padding as well is read for each place that shows it.
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

// n values from one place, each `from_stride` after the last, to another, each `to_stride` after the last.
template <class Acc, class From, class To>
WA_INLINE void copy_run(const From* from, int64_t from_stride, To* to, int64_t to_stride, uint32_t n) {
    if (from_stride == 1 && to_stride == 1)
        for_each<Acc>(n,
                      [=](auto width, uint32_t i) WA_LAMBDA { store<Acc>(width, to + i, load<Acc>(width, from + i)); });
    else
        for (uint32_t i = 0; i < n; ++i) store_one(to + i * to_stride, load_one<Acc>(from + i * from_stride));
}
template <class Acc>
void add(const Acc* term, Acc* sum, uint32_t n) {
    for_each<Acc>(n, [=](auto width, uint32_t i) WA_LAMBDA {
        store<Acc>(width, sum + i, load<Acc>(width, sum + i) + load<Acc>(width, term + i));
    });
}

struct TilePlace {
    const PrepareTask& task;
    bool by_channels;  // what lies side by side in `from`: all channels of a position, or all positions of a channel
    uint32_t channels, width;
    int64_t from;  // where the image's first channel of the tile begins
    int64_t to;    // where the tile begins
    Coordinates first;

    TilePlace(const PrepareTask& task, const Tiling& tiling, int64_t index)
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
        for (int d = 0; d < kSpatial; ++d) to += first.at[d] * task.to_side.spatial[d];
    }
};

template <class Acc>
struct Tile : TilePlace {
    alignas(64) Acc values[kTileValues];  // in the order of `from`
    alignas(64) Acc other[kTileValues];

    using TilePlace::TilePlace;

    Coordinates at(uint32_t w) const { return {{first.at[0], first.at[1], first.at[2] + int(w)}}; }
    uint32_t size() const { return channels * width; }

    // Columns [begin, end) of all rows of the tile, from `offset` of the image on.
    void load_columns(const void* tensor, int64_t offset, uint32_t begin, uint32_t end, Acc* out) const {
        const ImageSide& side = task.from_side;
        with_type<Acc>(tensor, side.dtype, [&](auto* typed) WA_LAMBDA {
            typed += from + offset;
            if (by_channels)
                for (uint32_t w = begin; w < end; ++w, typed += side.spatial[2])
                    copy_run<Acc>(typed, side.channel, out + w * channels, 1, channels);
            else if (end - begin == 1)
                for (uint32_t c = 0; c < channels; ++c)
                    out[c * width + begin] = load_one<Acc>(typed + c * side.channel);
            else
                for (uint32_t c = 0; c < channels; ++c, typed += side.channel)
                    copy_run<Acc>(typed, side.spatial[2], out + c * width + begin, 1, end - begin);
        });
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
        const ImageSide& side = task.from_side;
        with_type<Acc>(task.from, side.dtype, [&](auto* typed) WA_LAMBDA {
            copy_run<Acc>(typed + from + offset, side.channel, other, 1, channels);
        });
        if (by_channels) return add(other, values + w * channels, channels);
        for (uint32_t c = 0; c < channels; ++c) values[c * width + w] += other[c];
    }

    // each(run of the result in `values` or `other`, where it goes, its length), all runs.
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

// Whether the two sides differ in nothing but where their runs begin.
template <class Acc>
bool is_straight(const PrepareTask& task) {
    constexpr DType kOwn = sizeof(Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
    uint32_t padded = 0;
    for (int d = 0; d < kSpatial; ++d) padded |= task.before[d] | task.after[d];
    bool by_channels = is_by_channels(task.from_side, task);
    auto has_runs = [&](const ImageSide& side) { return by_channels || side.spatial[2] == 1 || task.to_size[2] == 1; };
    return padded == 0 && task.from_side.dtype == kOwn && task.to_side.dtype == kOwn &&
           by_channels == is_by_channels(task.to_side, task) && has_runs(task.from_side) && has_runs(task.to_side);
}

// each(offset in `from`, offset in `to`, length) for the runs of straight tiles
template <class Acc, class Each>
WA_INLINE void for_each_straight_run(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last,
                                     const Each& each) {
    for (int64_t index = first; index < last; ++index) {
        const TilePlace tile(task, tiling, index);
        const int64_t from = tile.from + own_source(task, tile.first);
        const uint32_t runs = tile.by_channels ? tile.width : tile.channels;
        auto step = [&](const ImageSide& side) { return tile.by_channels ? side.spatial[2] : side.channel; };
        for (uint32_t r = 0; r < runs; ++r)
            each(from + r * step(task.from_side), tile.to + r * step(task.to_side),
                 tile.by_channels ? tile.channels : tile.width);
    }
}

template <class Acc>
void forward(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last) {
    if (is_straight<Acc>(task)) {
        auto from = static_cast<const Acc*>(task.from);
        auto to = static_cast<Acc*>(task.to);
        return for_each_straight_run<Acc>(task, tiling, first, last, [&](int64_t at, int64_t out, uint32_t n) {
            activate(task.activation, from + at, to + out, n);
        });
    }
    for (int64_t index = first; index < last; ++index) {
        Tile<Acc> tile(task, tiling, index);
        tile.load_padded();
        activate(task.activation, tile.values, tile.values, tile.size());
        with_type<Acc>(task.to, task.to_side.dtype, [&](auto* to) WA_LAMBDA {
            tile.for_each_run([&](Acc* run, int64_t at, int64_t stride, uint32_t n)
                                  WA_LAMBDA { copy_run<Acc>(run, 1, to + at, stride, n); });
        });
    }
}

template <class Acc>
void backward(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last) {
    const bool is_relu = task.activation == Activation::kRelu;
    if (is_straight<Acc>(task)) {
        auto grad = static_cast<const Acc*>(task.from), saved = static_cast<const Acc*>(task.saved);
        auto to = static_cast<Acc*>(task.to);
        return for_each_straight_run<Acc>(task, tiling, first, last, [&](int64_t at, int64_t out, uint32_t n) {
            differentiate(task.activation, saved + (is_relu ? at : out), grad + at, to + out, n);
        });
    }
    for (int64_t index = first; index < last; ++index) {
        Tile<Acc> tile(task, tiling, index);
        tile.load_places();
        if (is_relu) {
            tile.load_columns(task.saved, own_source(task, tile.first), 0, tile.width, tile.other);
            differentiate(task.activation, tile.other, tile.values, tile.values, tile.size());
        }
        alignas(64) Acc input[kTileValues];
        with_type<Acc>(task.to, task.to_side.dtype, [&](auto* to) WA_LAMBDA {
            auto saved = static_cast<decltype(to)>(const_cast<void*>(task.saved));
            tile.for_each_run([&](Acc* run, int64_t at, int64_t stride, uint32_t n) WA_LAMBDA {
                if (saved && !is_relu) {
                    copy_run<Acc>(saved + at, stride, input, 1, n);
                    differentiate(task.activation, input, run, run, n);
                }
                copy_run<Acc>(run, 1, to + at, stride, n);
            });
        });
    }
}

}  // namespace

namespace WA_ISA {

template <class Acc>
void prepare_forward(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last) {
    forward<Acc>(task, tiling, first, last);
}
template <class Acc>
void prepare_backward(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last) {
    backward<Acc>(task, tiling, first, last);
}

template void prepare_forward<float>(const PrepareTask&, const Tiling&, int64_t, int64_t);
template void prepare_forward<double>(const PrepareTask&, const Tiling&, int64_t, int64_t);
template void prepare_backward<float>(const PrepareTask&, const Tiling&, int64_t, int64_t);
template void prepare_backward<double>(const PrepareTask&, const Tiling&, int64_t, int64_t);

}  // namespace WA_ISA
}  // namespace wa::cpu

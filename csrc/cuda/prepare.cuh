// A convolution's input, tile by tile, in the grid that aligns its weights: activation, cast, layout, padding, and back.
//
// One block takes one tile of an image, kTileBytes of channels x positions in shared memory: it reads the tile along what
// lies side by side in `from` and writes it along what lies side by side in `to`, both in 16-byte accesses where sizes and
// addresses allow. Each value is read from memory once and written once; backward, a value that is shown in the padding
// too is read for each place that shows it (a gather: no atomics). Why that shape: a transposition needs both sides wide,
// 64 x 64 floats are 16 of a block's 512 threads' 8 values; tiles of few channels are longer instead.
#pragma once
#include "../common/padding.h"
#include "align_table.cuh"
#include "chunk.cuh"

namespace wa::cuda {
namespace {

constexpr int kTileBytes = 16384;
template <class Acc>
constexpr int kTileValues = kTileBytes / int(sizeof(Acc));
constexpr int kMaxTileChannels = 64, kMinTileChannels = 4;

// Shared memory of one block: the tile, a row of positions for each channel, each of odd length against bank conflicts;
// and where each position lies in the images of `from` and `to`.
template <class Acc>
constexpr size_t prepare_shared_bytes(int channels_log2) {
    size_t channels = size_t(1) << channels_log2, positions = kTileValues<Acc> / channels;
    return (channels * (positions + 1) * sizeof(Acc) + 15) / 16 * 16 + 2 * positions * sizeof(int64_t);
}

template <class Acc>
__device__ Acc activated(Activation activation, Acc x) {
    switch (activation) {
        case Activation::kRelu: return x < 0 ? Acc(0) : x;
        case Activation::kSilu: return x / (1 + exp(-x));
        case Activation::kGelu: return Acc(0.5) * x * (1 + erf(x * Acc(0.70710678118654752440)));
        default: return x;
    }
}

// activation'(x) g; of relu, x may be the result. A gradient that meets a derivative of 0 becomes 0 whatever it is.
template <class Acc>
__device__ Acc differentiated(Activation activation, Acc x, Acc g) {
    Acc slope = 1;
    switch (activation) {
        case Activation::kRelu: slope = x <= 0 ? Acc(0) : Acc(1); break;
        case Activation::kSilu: {
            Acc s = 1 / (1 + exp(-x));
            slope = s * (1 + x * (1 - s));
            break;
        }
        case Activation::kGelu:
            slope = Acc(0.5) * (1 + erf(x * Acc(0.70710678118654752440))) +
                    x * exp(x * x * Acc(-0.5)) * Acc(0.39894228040143267794);
            break;
        default: break;
    }
    return slope == 0 ? Acc(0) : g * slope;
}

template <class Acc, bool kBackward>
struct InputTile {
    const PrepareEntry& entry;
    const PrepareTask& task;
    int channels_log2, positions_log2;
    int64_t image;        // of the batch
    int channel, position;  // the tile's first ones
    Acc* values;
    int64_t *from_at, *to_at;  // of each position. from_at negative: forward a zero; backward ~ the own place of a value
                               // that is shown in the padding too

    __device__ InputTile(const PrepareEntry& entry, uint32_t block)
        : entry(entry), task(entry.task), channels_log2(entry.channels_log2) {
        constexpr int kLog2 = sizeof(Acc) == 4 ? 12 : 11;
        static_assert(1 << kLog2 == kTileValues<Acc>);
        positions_log2 = kLog2 - channels_log2;
        uint32_t tile = block / entry.position_tiles;
        position = int(block % entry.position_tiles) << positions_log2;
        channel = int(tile % entry.channel_tiles) << channels_log2;
        image = tile / entry.channel_tiles;
        values = dynamic_shared<Acc>();
        size_t bytes = (size_t(pitch() << channels_log2) * sizeof(Acc) + 15) / 16 * 16;
        from_at = reinterpret_cast<int64_t*>(dynamic_shared<char>() + bytes);
        to_at = from_at + positions();
    }

    __device__ int positions() const { return 1 << positions_log2; }
    __device__ int pitch() const { return positions() + 1; }
    __device__ Acc& value(int c, int p) const { return values[c * pitch() + p]; }
    __device__ bool has(int c, int p) const {
        return channel + c < int(task.channels) && position + p < int(entry.positions);
    }
    __device__ int64_t origin(const ImageSide& side) const {
        return image * side.batch + int64_t(channel) * side.channel;
    }
    __device__ Coordinates coordinates(int p) const {
        return coordinates_of(uint32_t(position + p), task.to_size[1], task.to_size[2]);
    }

    __device__ void locate() const {
        for (int p = int(threadIdx.x); p < positions() && position + p < int(entry.positions); p += int(blockDim.x)) {
            Coordinates at = coordinates(p);
            int64_t offset = 0;
            for (int d = 0; d < kSpatial; ++d) offset += at.at[d] * task.to_side.spatial[d];
            to_at[p] = offset;
            if constexpr (kBackward) {
                int64_t own = own_source(task, at);
                from_at[p] = is_shown_twice(task, at) ? ~own : own;
            } else {
                from_at[p] = source_of(task, at);
            }
        }
    }

    // each(c, p) for this thread's chunks of kChunk values along channels or positions; all loads of a thread before
    // their first use is what the fixed number of steps is for.
    template <int kChunk>
    struct Walk {
        static constexpr int kSteps = (kTileValues<Acc> / kChunk + AlignShape<Acc>::kThreads - 1) /
                                      AlignShape<Acc>::kThreads;
        int rank, row_log2;
        bool by_channels;
        __device__ Walk(const InputTile& tile, bool by_channels)
            : rank(int(threadIdx.x)),
              row_log2((by_channels ? tile.channels_log2 : tile.positions_log2) - (kChunk == 8   ? 3
                                                                                   : kChunk == 4 ? 2
                                                                                   : kChunk == 2 ? 1
                                                                                                 : 0)),
              by_channels(by_channels) {}
        __device__ bool holds(int step) const {
            return (step * AlignShape<Acc>::kThreads + rank) * kChunk < kTileValues<Acc>;
        }
        __device__ int along(int step) const {
            return ((step * AlignShape<Acc>::kThreads + rank) & ((1 << row_log2) - 1)) * kChunk;
        }
        __device__ int across(int step) const { return (step * AlignShape<Acc>::kThreads + rank) >> row_log2; }
        __device__ int c(int step) const { return by_channels ? along(step) : across(step); }
        __device__ int p(int step) const { return by_channels ? across(step) : along(step); }
    };

    template <class Stored, int kChunk>
    __device__ void read_as(const Stored* from, const Stored* saved) const {
        const Walk<kChunk> walk(*this, entry.from_by_channels);
        const int64_t base = origin(task.from_side);
        Chunk<Stored, kChunk> chunks[Walk<kChunk>::kSteps] = {};
        const bool masks = kBackward && task.activation == Activation::kRelu;
#pragma unroll
        for (int step = 0; step < Walk<kChunk>::kSteps; ++step) {
            int c = walk.c(step), p = walk.p(step);
            if (!walk.holds(step) || !has(c, p)) continue;
            int64_t at = from_at[p];
            if (kBackward && at < 0) at = ~at;
            if (at >= 0) chunks[step].load(from + base + at + int64_t(c) * task.from_side.channel);
        }
#pragma unroll
        for (int step = 0; step < Walk<kChunk>::kSteps; ++step) {
            int c = walk.c(step), p = walk.p(step);
            if (!walk.holds(step) || !has(c, p)) continue;
            Acc x[kChunk];
            chunks[step].unpack(x);
            if (masks) {
                int64_t at = from_at[p] < 0 ? ~from_at[p] : from_at[p];
                Chunk<Stored, kChunk> kept;
                Acc y[kChunk];
                kept.load(saved + base + at + int64_t(c) * task.from_side.channel);
                kept.unpack(y);
                for (int i = 0; i < kChunk; ++i) {
                    int pi = entry.from_by_channels ? p : p + i, ci = entry.from_by_channels ? c + i : c;
                    if (from_at[pi] < 0) x[i] = sum_of_places(from, ci, pi);
                    x[i] = differentiated(task.activation, y[i], x[i]);
                }
            } else {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) {
                    int pi = entry.from_by_channels ? p : p + i, ci = entry.from_by_channels ? c + i : c;
                    if constexpr (kBackward) {
                        if (from_at[pi] < 0) x[i] = sum_of_places(from, ci, pi);
                    } else {
                        x[i] = activated(task.activation, x[i]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kChunk; ++i)
                (entry.from_by_channels ? value(c + i, p) : value(c, p + i)) = x[i];
        }
    }
    template <class Stored>
    __device__ Acc sum_of_places(const Stored* from, int c, int p) const {
        Acc sum = 0;
        int64_t base = origin(task.from_side) + int64_t(c) * task.from_side.channel;
        for_each_source(task, coordinates(p), [&](int64_t offset) {
            Chunk<Stored, 1> one;
            Acc x[1];
            one.load(from + base + offset);
            one.unpack(x);
            sum += x[0];
        });
        return sum;
    }

    template <class Stored, int kChunk>
    __device__ void write_as(Stored* to, const Stored* saved) const {
        const Walk<kChunk> walk(*this, entry.to_by_channels);
        const int64_t base = origin(task.to_side);
        const bool differentiates = kBackward && task.saved && task.activation != Activation::kRelu;
#pragma unroll
        for (int step = 0; step < Walk<kChunk>::kSteps; ++step) {
            int c = walk.c(step), p = walk.p(step);
            if (!walk.holds(step) || !has(c, p)) continue;
            int64_t at = base + to_at[p] + int64_t(c) * task.to_side.channel;
            Acc x[kChunk];
#pragma unroll
            for (int i = 0; i < kChunk; ++i) x[i] = entry.to_by_channels ? value(c + i, p) : value(c, p + i);
            Chunk<Stored, kChunk> chunk;
            if (differentiates) {
                Acc input[kChunk];
                chunk.load(saved + at);
                chunk.unpack(input);
                for (int i = 0; i < kChunk; ++i) x[i] = differentiated(task.activation, input[i], x[i]);
            }
            chunk.pack(x);
            chunk.store(to + at);
        }
    }

    // Run with the pointer typed, and 16 bytes' worth of values or 1.
    template <class Run>
    static __device__ void with_type(DType dtype, bool is_wide, const Run& run) {
        auto as = [&](auto* type) {
            using Stored = std::remove_pointer_t<decltype(type)>;
            if (is_wide) run(type, std::integral_constant<int, 16 / int(sizeof(Stored))>());
            else run(type, std::integral_constant<int, 1>());
        };
        if constexpr (sizeof(Acc) == 8) {
            as(static_cast<double*>(nullptr));
        } else {
            if (dtype == DType::kFloat32) as(static_cast<float*>(nullptr));
            else if (dtype == DType::kFloat16) as(static_cast<__half*>(nullptr));
            else as(static_cast<__nv_bfloat16*>(nullptr));
        }
    }

    __device__ void prepare() const {
        locate();
        __syncthreads();
        with_type(task.from_side.dtype, entry.from_is_wide, [&](auto* type, auto chunk) {
            using Stored = std::remove_pointer_t<decltype(type)>;
            read_as<Stored, decltype(chunk)::value>(static_cast<const Stored*>(task.from),
                                                    static_cast<const Stored*>(task.saved));
        });
        __syncthreads();
        with_type(task.to_side.dtype, entry.to_is_wide, [&](auto* type, auto chunk) {
            using Stored = std::remove_pointer_t<decltype(type)>;
            write_as<Stored, decltype(chunk)::value>(static_cast<Stored*>(task.to),
                                                     static_cast<const Stored*>(task.saved));
        });
    }
};

}  // namespace
}  // namespace wa::cuda

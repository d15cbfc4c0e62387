// Prepares a convolution's input tile by tile, in the grid that aligns its weights: activation, cast, layout, padding;
// and the backward.
//
// One block takes one tile of an image, kTileBytes of channels x positions in shared memory: it reads the tile along
// the innermost dimension of `from` and writes it along that of `to`, both in 16-byte accesses where sizes and
// addresses allow. Each value is read from memory once and written once; the backward of a value that padding repeats
// gathers from each position that shows it, without atomics. Why this shape: a transposition needs both sides wide, and
// 64 x 64 floats are 16 for each of a block's 256 threads, all on their way at once; tiles of fewer channels are longer
// instead. Where nothing is padded, threads step through both sides; else a table says where each position lies.
#pragma once
#include "../common/activations.h"
#include "../common/padding.h"
#include "align_shape.cuh"
#include "align_table.cuh"
#include "chunk.cuh"

namespace wa::cuda {
namespace {

constexpr int kTileBytes = 16384;
template <class Acc>
constexpr int kTileValues = kTileBytes / int(sizeof(Acc));
constexpr int kMinChannelsLog2 = 2, kMaxChannelsLog2 = 6;  // of a tile

// Shared memory of one block: the tile, with a row of positions per channel, padded to an odd length against bank
// conflicts; the offset of each position in images of `from` and `to`; and, if is_saved, a tile of what the
// activation's derivative is computed from.
template <class Acc>
WA_ANYWHERE constexpr size_t tile_bytes(int channels_log2) {
    size_t channels = size_t(1) << channels_log2, positions = kTileValues<Acc> / channels;
    return (channels * (positions + 1) * sizeof(Acc) + 15) / 16 * 16;
}
template <class Acc>
constexpr size_t prepare_shared_bytes(int channels_log2, bool is_saved) {
    return tile_bytes<Acc>(channels_log2) * (is_saved ? 2 : 1) +
           2 * (kTileValues<Acc> >> channels_log2) * sizeof(int64_t);
}

struct Math {
    template <class Acc>
    static __device__ constexpr Acc exp(Acc x) {
        return ::exp(x);
    }
    template <class Acc>
    static __device__ constexpr Acc erf(Acc x) {
        return ::erf(x);
    }
};

// The sum over all positions that show the value at `position`; its image and channel begin at `origin`.
template <class Acc>
__device__ Acc sum_of_places(const PrepareTask& task, int64_t origin, uint32_t position) {
    Acc sum = 0;
    const Coordinates at = coordinates_of(position, task.to_size[1], task.to_size[2]);
    for_each_source(task, at, [&](int64_t offset) {
        with_type<Acc>(task.from, task.from_side.dtype, [&](auto* from) {
            Chunk<std::remove_const_t<std::remove_pointer_t<decltype(from)>>, 1> one;
            Acc x[1];
            one.load(from + origin + offset);
            one.unpack(x);
            sum += x[0];
        });
    });
    return sum;
}

template <class Acc, bool kBackward>
struct InputTile {
    const PrepareEntry& entry;
    const PrepareTask& task;
    int channels_log2, positions_log2;
    int64_t image;          // of the batch
    int channel, position;  // the tile's first
    Acc *values, *saved;
    int64_t *from_at, *to_at;  // offset of each position. from_at negative: forward, a zero; backward, ~ the own
                               // position of a value that padding repeats

    __device__ InputTile(const PrepareEntry& entry, uint32_t block)
        : entry(entry), task(entry.task), channels_log2(entry.channels_log2) {
        constexpr int kLog2 = sizeof(Acc) == 4 ? 12 : 11;
        static_assert(1 << kLog2 == kTileValues<Acc>);
        positions_log2 = kLog2 - channels_log2;
        const uint32_t tile = entry.position_tiles.quotient(block), whole = entry.channel_tiles.quotient(tile);
        position = int(block - tile * entry.position_tiles.divisor) << positions_log2;
        channel = int(tile - whole * entry.channel_tiles.divisor) << channels_log2;
        image = whole;
        values = dynamic_shared<Acc>();
        from_at = reinterpret_cast<int64_t*>(dynamic_shared<char>() + tile_bytes<Acc>(channels_log2));
        to_at = from_at + positions();
        saved = reinterpret_cast<Acc*>(to_at + positions());
    }

    __device__ int positions() const { return 1 << positions_log2; }
    __device__ int pitch() const { return positions() + 1; }
    __device__ bool has(int c, int p) const {
        return channel + c < int(task.channels) && position + p < int(entry.positions);
    }
    __device__ int64_t origin(const ImageSide& side) const {
        return image * side.batch + int64_t(channel) * side.channel;
    }
    __device__ Coordinates coordinates(int p) const {
        return coordinates_of(uint32_t(position + p), task.to_size[1], task.to_size[2]);
    }

    // Whether each thread steps through both sides, and asks no table where a position lies.
    __device__ bool is_stepwise() const {
        return entry.from_access == Access::kStepwise && entry.to_access == Access::kStepwise;
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

    // A thread's chunks of kChunk values, along channels or positions. Parallel ones are loaded before the first is
    // used.
    template <int kChunk>
    struct Walk {
        static constexpr int kChunks = kTileValues<Acc> / kChunk, kMostThreads = AlignShape<Acc>::kThreads;
        static constexpr int kSteps = 2 * kChunks / kMostThreads, kParallel = kSteps < 8 ? kSteps : 8;
        static constexpr int kChunkLog2 = kChunk == 8 ? 3 : kChunk == 4 ? 2 : kChunk == 2 ? 1 : 0;
        int row_log2;  // chunks per row
        bool by_channels;
        __device__ Walk(const InputTile& tile, bool by_channels)
            : row_log2((by_channels ? tile.channels_log2 : tile.positions_log2) - kChunkLog2),
              by_channels(by_channels) {}
        __device__ int chunk(int step) const { return step * int(blockDim.x) + int(threadIdx.x); }
        __device__ bool holds(int step) const { return chunk(step) < kChunks; }
        __device__ int along(int step) const { return (chunk(step) & ((1 << row_log2) - 1)) * kChunk; }
        __device__ int across(int step) const { return chunk(step) >> row_log2; }
        __device__ int c(int step) const { return by_channels ? along(step) : across(step); }
        __device__ int p(int step) const { return by_channels ? across(step) : along(step); }
    };

    // The same where positions have one distance and no row has more chunks than the block has threads: then a thread
    // stays at one place along its rows, and its steps across them are alike.
    template <class Stored, int kChunk>
    struct Steps {
        static constexpr int kSteps = Walk<kChunk>::kSteps;
        Stored* memory;               // of the thread's first chunk
        int64_t distance;             // from chunk to chunk
        int step, rows;               // from chunk to chunk, and from the first one to the end of the image or the tile
        int place, place_step, next;  // in the tile: of the first value, from chunk to chunk, from value to value

        __device__ Steps(const InputTile& tile, Stored* image, const ImageSide& side, bool by_channels) {
            const Walk<kChunk> walk(tile, by_channels);
            const int along = walk.along(0), across = walk.across(0);
            step = int(blockDim.x) >> walk.row_log2;
            const int64_t stride = by_channels ? side.spatial[kSpatial - 1] : side.channel;
            memory = image + tile.origin(side) + tile.position * side.spatial[kSpatial - 1] + along + across * stride;
            distance = step * stride;
            const int channels = min(1 << tile.channels_log2, int(tile.task.channels) - tile.channel);
            const int positions = min(tile.positions(), int(tile.entry.positions) - tile.position);
            rows = along < (by_channels ? channels : positions) ? (by_channels ? positions : channels) - across : 0;
            const int pitch = tile.pitch();
            next = by_channels ? pitch : 1;
            place = along * next + across * (by_channels ? 1 : pitch);
            place_step = step * (by_channels ? 1 : pitch);
        }
        __device__ bool holds(int i) const { return i * step < rows; }
        __device__ Stored* at(int i) const { return memory + i * distance; }
        __device__ int value(int i, int j) const { return place + i * place_step + j * next; }
    };

    // The index in the tile of value i of a chunk that begins at (c, p).
    __device__ int place(bool by_channels, int c, int p, int i) const {
        return by_channels ? (c + i) * pitch() + p : c * pitch() + p + i;
    }

    // Reads the tile's part of `image`, which has the layout of `side`, into shared memory.
    template <class Stored, int kChunk>
    __device__ void read_stepwise(const Stored* image, const ImageSide& side, bool by_channels, Acc* out) const {
        using S = Steps<const Stored, kChunk>;
        const S steps(*this, image, side, by_channels);
        Chunk<Stored, kChunk> chunks[S::kSteps] = {};
#pragma unroll
        for (int i = 0; i < S::kSteps; ++i)
            if (steps.holds(i)) chunks[i].load(steps.at(i));
#pragma unroll
        for (int i = 0; i < S::kSteps; ++i) {
            if (!steps.holds(i)) continue;
            Acc x[kChunk];
            chunks[i].unpack(x);
#pragma unroll
            for (int j = 0; j < kChunk; ++j) out[steps.value(i, j)] = x[j];
        }
    }
    template <class Stored, int kChunk>
    __device__ void read_as(const Stored* image, const ImageSide& side, const int64_t* at, bool by_channels,
                            Acc* out) const {
        using W = Walk<kChunk>;
        const W walk(*this, by_channels);
        image += origin(side);
#pragma unroll 1
        for (int first = 0; first < W::kSteps; first += W::kParallel) {
            Chunk<Stored, kChunk> chunks[W::kParallel] = {};
#pragma unroll
            for (int i = 0; i < W::kParallel; ++i) {
                int c = walk.c(first + i), p = walk.p(first + i);
                if (!walk.holds(first + i) || !has(c, p)) continue;
                int64_t offset = at[p];
                if (kBackward && offset < 0) offset = ~offset;
                if (offset >= 0) chunks[i].load(image + offset + c * side.channel);
            }
#pragma unroll
            for (int i = 0; i < W::kParallel; ++i) {
                if (!walk.holds(first + i)) continue;
                Acc x[kChunk];
                chunks[i].unpack(x);
#pragma unroll
                for (int j = 0; j < kChunk; ++j)
                    out[place(by_channels, walk.c(first + i), walk.p(first + i), j)] = x[j];
            }
        }
    }
    __device__ void read(const void* image, bool as_from, Acc* out) const {
        const ImageSide& side = as_from ? task.from_side : task.to_side;
        const int64_t* at = as_from ? from_at : to_at;
        const bool by_channels = as_from ? entry.from_by_channels : entry.to_by_channels;
        const Access access = as_from ? entry.from_access : entry.to_access;
        with_type<Acc>(image, side.dtype, [&](auto* typed) {
            using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
            constexpr int kWide = 16 / int(sizeof(Stored));
            if (access == Access::kStepwise) read_stepwise<Stored, kWide>(typed, side, by_channels, out);
            else if (access == Access::kWide) read_as<Stored, kWide>(typed, side, at, by_channels, out);
            else read_as<Stored, 1>(typed, side, at, by_channels, out);
        });
    }

    template <class Stored, int kChunk>
    __device__ void write_stepwise(Stored* to) const {
        using S = Steps<Stored, kChunk>;
        const S steps(*this, to, task.to_side, entry.to_by_channels);
#pragma unroll
        for (int i = 0; i < S::kSteps; ++i) {
            if (!steps.holds(i)) continue;
            Chunk<Stored, kChunk> chunk;
            Acc x[kChunk];
#pragma unroll
            for (int j = 0; j < kChunk; ++j) x[j] = values[steps.value(i, j)];
            chunk.pack(x);
            chunk.store(steps.at(i));
        }
    }
    template <class Stored, int kChunk>
    __device__ void write_as(Stored* to) const {
        const Walk<kChunk> walk(*this, entry.to_by_channels);
        to += origin(task.to_side);
#pragma unroll 1
        for (int step = 0; step < Walk<kChunk>::kSteps; ++step) {
            int c = walk.c(step), p = walk.p(step);
            if (!walk.holds(step) || !has(c, p)) continue;
            Chunk<Stored, kChunk> chunk;
            Acc x[kChunk];
#pragma unroll
            for (int i = 0; i < kChunk; ++i) x[i] = values[place(entry.to_by_channels, c, p, i)];
            chunk.pack(x);
            chunk.store(to + to_at[p] + c * task.to_side.channel);
        }
    }
    __device__ void write() const {
        with_type<Acc>(task.to, task.to_side.dtype, [&](auto* typed) {
            using Stored = std::remove_pointer_t<decltype(typed)>;
            constexpr int kWide = 16 / int(sizeof(Stored));
            if (entry.to_access == Access::kStepwise) write_stepwise<Stored, kWide>(typed);
            else if (entry.to_access == Access::kWide) write_as<Stored, kWide>(typed);
            else write_as<Stored, 1>(typed);
        });
    }

    // each(c, p, index in the tile) for this thread's values, along the positions.
    template <class Each>
    __device__ void for_each_value(const Each& each) const {
#pragma unroll 1
        for (int i = int(threadIdx.x); i < kTileValues<Acc>; i += int(blockDim.x)) {
            int c = i >> positions_log2, p = i & (positions() - 1);
            if (has(c, p)) each(c, p, c * pitch() + p);
        }
    }

    // Transforms the values between reading and writing them.
    __device__ void change() const {
        const bool gathers = kBackward && task.mode != PaddingMode::kZeros && entry.from_access != Access::kStepwise;
        if (gathers)
            for_each_value([&](int c, int p, int at) {
                if (from_at[p] < 0)
                    values[at] = sum_of_places<Acc>(task, origin(task.from_side) + c * task.from_side.channel,
                                                    uint32_t(position + p));
            });
        Activations::with(task.activation, [&](auto formula) {  // each thread revisits its own values: no barrier
            for_each_value([&](int, int, int at) {
                if constexpr (kBackward)
                    values[at] = differentiated<decltype(formula), Math, Acc>(saved[at], values[at]);
                else values[at] = formula.template value<Math, Acc>(values[at]);
            });
        });
        if (gathers || task.activation != 0) __syncthreads();
    }

    // A loop around one call: reading is unrolled for every dtype and width, too long to inline twice.
    __device__ void read_all() const {
        const int images = kBackward && task.saved ? 2 : 1;
#pragma unroll 1
        for (int i = 0; i < images; ++i)
            read(i ? task.saved : task.from, i == 0 || task.saved_is_result, i ? saved : values);
    }
};

// The work of one block.
template <class Acc, bool kBackward>
__device__ void prepare_block(const PrepareEntry& entry, uint32_t block) {
    const InputTile<Acc, kBackward> tile(entry, block);
    if (!tile.is_stepwise()) {
        tile.locate();
        __syncthreads();
    }
    tile.read_all();
    __syncthreads();
    tile.change();
    tile.write();
}

}  // namespace
}  // namespace wa::cuda

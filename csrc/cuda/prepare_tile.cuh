// A tile of a convolution's input in shared memory: which part of the image it is, and where its values lie in memory.
#pragma once
#include "../common/activations.h"
#include "../common/padding.h"
#include "align_shape.cuh"
#include "align_table.cuh"

namespace wa::cuda {
namespace {

constexpr int kTileBytes = 16384;
template <class Acc>
constexpr int kTileValues = kTileBytes / int(sizeof(Acc));
constexpr int kMinChannelsLog2 = 2, kMaxChannelsLog2 = 6;  // of a tile

// Shared memory of one block: the tile, with a row of `pitch` values per channel; if is_saved, a tile of what the
// activation's derivative is computed from; and, if places are not computed directly, the offset of each position in
// images of `from` and `to`.
template <class Acc>
WA_ANYWHERE constexpr size_t tile_bytes(int channels_log2, int pitch) {
    return ((size_t(pitch) << channels_log2) * sizeof(Acc) + 15) / 16 * 16;
}
template <class Acc>
constexpr size_t table_bytes(int channels_log2) {
    return 2 * (kTileValues<Acc> >> channels_log2) * sizeof(int64_t);
}
template <class Acc>
constexpr int odd_pitch(int channels_log2) {  // against bank conflicts
    return (kTileValues<Acc> >> channels_log2) + 1;
}

// One tile of kTileValues at most: the positions and channels of an image that a block prepares.
//
// Directly, a tile consists of positions of the input, in both directions. In the forward the block writes those of the
// padded image from the tile's first to the next tile's first, which are the tile's and zeros. Otherwise it consists of
// positions of `to`, and a table says where each lies.
template <class Acc, bool kBackward>
struct TilePlace {
    const PrepareEntry& entry;
    const PrepareTask& task;
    int channels_log2, positions_log2;
    int64_t image;          // of the batch
    int channel, position;  // the tile's first
    Acc *values, *saved;
    int64_t *from_at, *to_at;  // offset of each position. from_at negative: forward, a zero; backward, ~ the own
                               // position of a value that padding repeats

    __device__ TilePlace(const PrepareEntry& entry, uint32_t block)
        : entry(entry), task(entry.task), channels_log2(entry.channels_log2) {
        constexpr int kLog2 = sizeof(Acc) == 4 ? 12 : 11;
        static_assert(1 << kLog2 == kTileValues<Acc>);
        positions_log2 = kLog2 - channels_log2;
        const uint32_t tile = entry.position_tiles.quotient(block), whole = entry.channel_tiles.quotient(tile);
        position = int(block - tile * entry.position_tiles.divisor) << positions_log2;
        channel = int(tile - whole * entry.channel_tiles.divisor) << channels_log2;
        image = whole;
        const size_t bytes = tile_bytes<Acc>(channels_log2, entry.pitch);
        values = dynamic_shared<Acc>();
        saved = reinterpret_cast<Acc*>(dynamic_shared<char>() + bytes);
        from_at = reinterpret_cast<int64_t*>(dynamic_shared<char>() + bytes * (kBackward && task.saved ? 2 : 1));
        to_at = from_at + (1 << positions_log2);
    }

    __device__ int channels() const { return min(1 << channels_log2, int(task.channels) - channel); }
    __device__ int positions() const { return min(1 << positions_log2, int(entry.positions) - position); }
    __device__ bool has(int c, int p) const { return c < channels() && p < positions(); }
    __device__ int64_t origin(const ImageSide& side) const {
        return image * side.batch + int64_t(channel) * side.channel;
    }
    __device__ Coordinates coordinates(int p) const {
        return coordinates_of(uint32_t(position + p), task.to_size[1], task.to_size[2]);
    }

    __device__ void make_table() const {
        for (int p = int(threadIdx.x); p < positions(); p += int(blockDim.x)) {
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

    // The offset of position p in an image of `side`, which is read; negative where nothing is.
    __device__ int64_t offset_of(int p, const ImageSide& side, bool as_from) const {
        if (!entry.is_direct) {
            const int64_t at = (as_from ? from_at : to_at)[p];
            return kBackward && at < 0 ? ~at : at;
        }
        uint32_t at = uint32_t(position + p), row = entry.width.quotient(at), column = at - row * entry.width.divisor;
        if (kBackward && as_from) row += task.before[1], column += task.before[2];
        return row * side.spatial[1] + column * side.spatial[2];
    }

    // The positions of `to` that the block writes, from the first to before the last.
    __device__ uint32_t shown_from(int p) const {  // the first of them, of a tile that begins at p
        const bool shows_padding = !kBackward && entry.is_padded && entry.is_direct;
        if (!shows_padding || p == 0) return uint32_t(p);
        if (uint32_t(p) >= entry.positions) return task.to_size[1] * task.to_size[2];
        const uint32_t row = entry.width.quotient(uint32_t(p)), column = uint32_t(p) - row * entry.width.divisor;
        return (row + task.before[1]) * entry.to_width.divisor + column + task.before[2];
    }
    struct Shown {
        int64_t offset;  // in an image of `to`
        int p;           // of the tile; negative for a zero
    };
    __device__ Shown shown_at(uint32_t at) const {
        const int p = int(at) - position;
        if (!entry.is_direct) return {to_at[p], p};
        const uint32_t row = entry.to_width.quotient(at), column = at - row * entry.to_width.divisor;
        const int64_t offset = row * task.to_side.spatial[1] + column * task.to_side.spatial[2];
        if (kBackward || !entry.is_padded) return {offset, p};
        const uint32_t y = row - task.before[1], x = column - task.before[2];
        return {offset, y < task.size[1] && x < task.size[2] ? int(y * task.size[2] + x) - position : -1};
    }

    // What follows is how threads walk through a tile, in chunks of kChunk values along channels or positions.

    template <int kChunk>
    static constexpr int kChunkLog2 = kChunk == 8 ? 3 : kChunk / 2;
    template <int kChunk>  // chunks of a thread, in blocks of half the most threads
    static constexpr int kSteps = 2 * kTileValues<Acc> / kChunk / AlignShape<Acc>::kThreads;

    // Along channels: a thread stays at some channels and steps from position to position.
    template <int kChunk>
    struct AlongChannels {
        int c, p, step;
        __device__ explicit AlongChannels(const TilePlace& tile) {
            const int log2 = tile.channels_log2 - kChunkLog2<kChunk>;
            const int thread = computed_again(int(threadIdx.x));
            c = (thread & ((1 << log2) - 1)) * kChunk, p = thread >> log2;
            step = computed_again(int(blockDim.x)) >> log2;
        }
    };

    // Along positions: a thread stays at some positions and steps from channel to channel; or steps through the tile's
    // run of memory, with the place in the tile.
    template <class Stored, int kChunk>
    struct AlongPositions {
        Stored* memory;          // of the first chunk
        int64_t distance;        // from chunk to chunk
        int place, place_step;   // in the tile
        int steps_left, stride;  // chunk i is there if i * stride < steps_left

        __device__ AlongPositions(const TilePlace& tile, Stored* image, const ImageSide& side) {
            const int thread = computed_again(int(threadIdx.x)), threads = computed_again(int(blockDim.x));
            memory = image + tile.origin(side);
            if (tile.entry.is_run) {
                place = thread * kChunk, place_step = threads * kChunk;
                memory += place, distance = place_step;
                stride = place_step, steps_left = tile.channels() * tile.entry.pitch - place;
                return;
            }
            const int log2 = tile.positions_log2 - kChunkLog2<kChunk>;
            const int p = (thread & ((1 << log2) - 1)) * kChunk, c = thread >> log2;
            stride = threads >> log2, steps_left = p < tile.positions() ? tile.channels() - c : 0;
            place = c * tile.entry.pitch + p, place_step = stride * tile.entry.pitch;
            memory += tile.position + p + c * side.channel, distance = stride * side.channel;
        }
        __device__ bool holds(int i) const { return i * stride < steps_left; }
    };
};

}  // namespace
}  // namespace wa::cuda

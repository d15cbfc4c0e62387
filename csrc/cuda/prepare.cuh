// Prepares a convolution's input tile by tile, in the grid that aligns its weights: activation, cast, layout, padding;
// and the backward.
//
// One block takes one tile of an image, kTileBytes of channels x positions in shared memory: it reads the tile along
// the innermost dimension of `from` and writes it along that of `to`, both in 16-byte accesses where sizes and
// addresses allow. Each value is read from memory once and written once; the backward of a value that padding repeats
// gathers from each position that shows it, without atomics. Why this shape: a transposition needs both sides wide, and
// 64 x 64 floats are 16 for each of a block's 256 threads, all on their way at once; tiles of fewer channels are longer
// instead. Padding with zeros is no part of a tile: the zeros are written beside it.
#pragma once
#include "chunk.cuh"
#include "prepare_tile.cuh"

namespace wa::cuda {
namespace {

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
struct InputTile : TilePlace<Acc, kBackward> {
    using Place = TilePlace<Acc, kBackward>;
    using Place::Place, Place::entry, Place::task, Place::values, Place::saved, Place::from_at, Place::to_at;

    // Reads the tile's part of `image`, which has the layout of `side`, into shared memory. All of a thread's chunks
    // are on their way before the first is used.
    template <class Stored, int kChunk>
    __device__ void read_along_positions(const Stored* image, const ImageSide& side, Acc* out) const {
        const typename Place::template AlongPositions<const Stored, kChunk> along(*this, image, side);
        constexpr int kSteps = Place::template kSteps<kChunk>;
        Chunk<Stored, kChunk> chunks[kSteps] = {};
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
            if (along.holds(i)) chunks[i].load(along.memory + i * along.distance);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            if (!along.holds(i)) continue;
            Acc x[kChunk];
            chunks[i].unpack(x);
#pragma unroll
            for (int j = 0; j < kChunk; ++j) out[along.place + i * along.place_step + j] = x[j];
        }
    }
    template <class Stored, int kChunk>
    __device__ void read_along_channels(const Stored* image, const ImageSide& side, bool as_from, Acc* out) const {
        const typename Place::template AlongChannels<kChunk> along(*this);
        constexpr int kSteps = Place::template kSteps<kChunk>;
        const int positions = along.c < this->channels() ? this->positions() : 0;
        image += this->origin(side) + along.c;
        const Stored* at[kSteps];  // computed before the first load: what they wait for, loads might be waited for with
        Chunk<Stored, kChunk> chunks[kSteps] = {};
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const int p = along.p + i * along.step;
            const int64_t offset = p < positions ? this->offset_of(p, side, as_from) : -1;
            at[i] = offset >= 0 ? image + offset : nullptr;
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
            if (at[i]) chunks[i].load(at[i]);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const int p = along.p + i * along.step;
            if (p >= positions) continue;
            Acc x[kChunk];
            chunks[i].unpack(x);
#pragma unroll
            for (int j = 0; j < kChunk; ++j) out[(along.c + j) * entry.pitch + p] = x[j];
        }
    }
    // Value by value: a thread's neighbours have the neighbours of its values.
    struct One {
        int c, p;
        bool is_there;
    };
    __device__ One one_at(int i, bool by_channels) const {
        const int log2 = by_channels ? this->channels_log2 : this->positions_log2;
        const int along = i & ((1 << log2) - 1), across = i >> log2;
        const int c = by_channels ? along : across, p = by_channels ? across : along;
        return {c, p, i < kTileValues<Acc> && this->has(c, p)};
    }
    template <class Each>  // each(c, p, index in the tile)
    __device__ void for_each_value(bool by_channels, const Each& each) const {
#pragma unroll 1
        for (int i = int(threadIdx.x); i < kTileValues<Acc>; i += int(blockDim.x)) {
            const One one = one_at(i, by_channels);
            if (one.is_there) each(one.c, one.p, one.c * entry.pitch + one.p);
        }
    }
    template <class Stored>
    __device__ void read_one_by_one(const Stored* image, const ImageSide& side, bool by_channels, bool as_from,
                                    Acc* out) const {
        constexpr int kParallel = sizeof(Acc) == 4 ? 8 : 4;  // on their way before the first is used
        image += this->origin(side);
#pragma unroll 1
        for (int first = computed_again(int(threadIdx.x)); first < kTileValues<Acc>;
             first += kParallel * int(blockDim.x)) {
            Chunk<Stored, 1> chunks[kParallel] = {};
#pragma unroll
            for (int i = 0; i < kParallel; ++i) {
                const One one = one_at(first + i * int(blockDim.x), by_channels);
                if (!one.is_there) continue;
                const int64_t offset = this->offset_of(one.p, side, as_from);
                if (offset >= 0) chunks[i].load(image + offset + one.c * side.channel);
            }
            const int again = computed_again(first);
#pragma unroll
            for (int i = 0; i < kParallel; ++i) {
                const One one = one_at(again + i * int(blockDim.x), by_channels);
                if (!one.is_there) continue;
                Acc x[1];
                chunks[i].unpack(x);
                out[one.c * entry.pitch + one.p] = x[0];
            }
        }
    }
    __device__ void read(const void* image, bool as_from, Acc* out) const {
        const ImageSide& side = as_from ? task.from_side : task.to_side;
        const bool by_channels = as_from ? entry.from_by_channels : entry.to_by_channels;
        const bool is_wide = as_from ? entry.from_is_wide : entry.to_is_wide;
        with_type<Acc>(image, side.dtype, [&](auto* typed) {
            using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
            constexpr int kWide = 16 / int(sizeof(Stored));
            if (!is_wide) read_one_by_one<Stored>(typed, side, by_channels, as_from, out);
            else if (by_channels) read_along_channels<Stored, kWide>(typed, side, as_from, out);
            else read_along_positions<Stored, kWide>(typed, side, out);
        });
    }

    template <class Stored, int kChunk>
    __device__ void write_along_positions(Stored* to) const {
        const typename Place::template AlongPositions<Stored, kChunk> along(*this, to, task.to_side);
        to = along.memory;
#pragma unroll 2
        for (int i = 0; along.holds(i); ++i, to += along.distance) {
            Chunk<Stored, kChunk> chunk;
            Acc x[kChunk];
#pragma unroll
            for (int j = 0; j < kChunk; ++j) x[j] = values[along.place + i * along.place_step + j];
            chunk.pack(x);
            chunk.store(to);
        }
    }
    template <class Stored, int kChunk>
    __device__ void write_along_channels(Stored* to) const {
        const typename Place::template AlongChannels<kChunk> along(*this);
        if (along.c >= this->channels()) return;
        const uint32_t end = this->shown_from(this->position + this->positions());
        to += this->origin(task.to_side) + along.c;
#pragma unroll 2
        for (uint32_t at = this->shown_from(this->position) + along.p; at < end; at += along.step) {
            const typename Place::Shown shown = this->shown_at(at);
            Chunk<Stored, kChunk> chunk{};
            if (shown.p >= 0) {
                Acc x[kChunk];
#pragma unroll
                for (int j = 0; j < kChunk; ++j) x[j] = values[(along.c + j) * entry.pitch + shown.p];
                chunk.pack(x);
            }
            chunk.store(to + shown.offset);
        }
    }
    template <class Stored>
    __device__ void write_one_by_one(Stored* to) const {
        to += this->origin(task.to_side);
        for_each_value(entry.to_by_channels, [&](int c, int p, int at) {
            Chunk<Stored, 1> one;
            const Acc x[1] = {values[at]};
            one.pack(x);
            one.store(to + to_at[p] + c * task.to_side.channel);
        });
    }
    __device__ void write() const {
        with_type<Acc>(task.to, task.to_side.dtype, [&](auto* typed) {
            using Stored = std::remove_pointer_t<decltype(typed)>;
            constexpr int kWide = 16 / int(sizeof(Stored));
            if (!entry.to_is_wide) write_one_by_one<Stored>(typed);
            else if (entry.to_by_channels) write_along_channels<Stored, kWide>(typed);
            else write_along_positions<Stored, kWide>(typed);
        });
    }

    // Transforms the values between reading and writing them.
    __device__ void change() const {
        const bool gathers = kBackward && task.mode != PaddingMode::kZeros && !entry.is_direct;
        if (gathers)
            for_each_value(false, [&](int c, int p, int at) {
                if (from_at[p] < 0)
                    values[at] = sum_of_places<Acc>(task, this->origin(task.from_side) + c * task.from_side.channel,
                                                    uint32_t(this->position + p));
            });
        Activations::with(task.activation, [&](auto formula) {  // each thread revisits its own values: no barrier
            for_each_value(false, [&](int, int, int at) {
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
    if (!entry.is_direct) {
        tile.make_table();
        __syncthreads();
    }
    tile.read_all();
    __syncthreads();
    tile.change();
    tile.write();
}

}  // namespace
}  // namespace wa::cuda

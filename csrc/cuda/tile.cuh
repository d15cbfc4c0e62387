// A tile: up to kValues values of a filter in the registers of each of its team's threads.
//
// Lane `lane` holds the chunks lane, lane + lanes, lane + 2 lanes, ... of kChunk values each, so that accesses
// coalesce. All loads are issued before the first value is used.
#pragma once
#include "../common/align_task.h"
#include "chunk.cuh"
#include "team.cuh"

namespace wa::cuda {
namespace {

template <class Acc, int kValues, int kChunk>
struct Tile {
    static constexpr int kSteps = kValues / kChunk;
    Team team;
    int size;   // values in the tile, over the whole team; a multiple of kChunk
    int steps;  // chunks of it that this thread holds
    Acc x[kSteps][kChunk];

    static __device__ int capacity(Team team) { return kValues << team.lanes_log2; }

    __device__ Tile(Team team, int size)
        : team(team), size(size), steps((size / kChunk - team.lane() + team.lanes() - 1) >> team.lanes_log2) {}

    __device__ int first() const { return team.lane() * kChunk; }

    // Which chunks this thread holds, and their offsets from its first. Cheap to compute but expensive to keep: up to
    // 16 comparisons and offsets, which would occupy registers from the load to the store.
    struct Reach {
        int steps, lanes_log2;
        __device__ Reach(const Tile& tile)
            : steps(computed_again(tile.steps)), lanes_log2(computed_again(tile.team.lanes_log2)) {}
        __device__ bool holds(int step) const { return step < steps; }
        __device__ unsigned beyond_first(int step) const { return unsigned(step * kChunk) << lanes_log2; }
    };

    // each(position in the tile, value) for the values this thread holds
    template <class Each>
    __device__ void for_each(const Each& each) {
        const Reach reach(*this);
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
            if (reach.holds(step))
#pragma unroll
                for (int i = 0; i < kChunk; ++i) each(first() + int(reach.beyond_first(step)) + i, x[step][i]);
    }

    template <class Stored>
    __device__ void load_as(const Stored* from) {
        const Reach reach(*this);
        from += first();
        Chunk<Stored, kChunk> chunks[kSteps] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
            if (reach.holds(step)) chunks[step].load(from + reach.beyond_first(step));
#pragma unroll
        for (int step = 0; step < kSteps; ++step) chunks[step].unpack(x[step]);
    }

    template <class Stored>
    __device__ void store_as(Stored* to) const {
        const Reach reach(*this);
        to += first();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            Chunk<Stored, kChunk> chunk;
            chunk.pack(x[step]);
            if (reach.holds(step)) chunk.store(to + reach.beyond_first(step));
        }
    }

    // `at`: the offset of the tile's first value in the tensor. Loads set values that this thread does not hold to 0.
    __device__ void load(const void* tensor, DType dtype, int64_t at) {
        with_type<Acc>(tensor, dtype, [&](auto* typed) { load_as(typed + at); });
    }
    __device__ void store(void* tensor, DType dtype, int64_t at) const {
        with_type<Acc>(tensor, dtype, [&](auto* typed) { store_as(typed + at); });
    }

    // The same for a tile that is a whole filter, and a tensor with the transpose of each filter. It passes through the
    // team's part of shared memory, so that both sides are read and written in order.
    __device__ void load_transposed(const void* tensor, DType dtype, int64_t at, int columns) {
        const Staged staged(*this, columns);
        with_type<Acc>(tensor, dtype, [&](auto* typed) {
            for_each_chunk(typed + at, [&](int position, auto& chunk, auto* memory) {
                Acc values[kChunk];
                chunk.load(memory);
                chunk.unpack(values);
                for (int i = 0; i < kChunk; ++i) staged.transposed(position + i) = values[i];
            });
        });
        team.sync();
        const Reach reach(*this);
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int i = 0; i < kChunk; ++i)
                x[step][i] = reach.holds(step) ? staged.original(first() + int(reach.beyond_first(step)) + i) : Acc(0);
    }
    __device__ void store_transposed(void* tensor, DType dtype, int64_t at, int columns) {
        const Staged staged(*this, columns);
        for_each([&](int position, Acc value) { staged.original(position) = value; });
        team.sync();
        with_type<Acc>(tensor, dtype, [&](auto* typed) {
            for_each_chunk(typed + at, [&](int position, auto& chunk, auto* memory) {
                Acc values[kChunk];
                for (int i = 0; i < kChunk; ++i) values[i] = staged.transposed(position + i);
                chunk.pack(values);
                chunk.store(memory);
            });
        });
    }

private:
    // A filter in shared memory: a matrix stored by columns, padded to an odd length against bank conflicts.
    struct Staged {
        Acc* values;
        int rows, columns, pitch;
        float per_row, per_column;

        __device__ Staged(const Tile& tile, int columns)
            : columns(columns), per_column(approximate_reciprocal(float(columns))) {
            rows = quotient(tile.size, per_column);
            per_row = approximate_reciprocal(float(rows));
            pitch = rows | 1;
            values = dynamic_shared<Acc>() + int64_t(tile.team.index()) * columns * pitch;
        }
        // Exact for positions up to 2^13: with + 0.5 the quotient is farther from an integer than the approximate
        // reciprocal errs.
        static __device__ int quotient(int position, float reciprocal) {
            return int((float(position) + 0.5f) * reciprocal);
        }
        __device__ Acc& original(int position) const {
            int row = quotient(position, per_column);
            return values[(position - row * columns) * pitch + row];
        }
        __device__ Acc& transposed(int position) const {
            int column = quotient(position, per_row);
            return values[column * pitch + position - column * rows];
        }
    };

    // each(position, empty chunk, its memory) for this thread's chunks, in a loop: no register array to index.
    template <class Stored, class Each>
    __device__ void for_each_chunk(Stored* memory, const Each& each) const {
#pragma unroll 1
        for (int position = first(); position < size; position += kChunk << team.lanes_log2) {
            Chunk<std::remove_const_t<Stored>, kChunk> chunk;
            each(position, chunk, memory + position);
        }
    }
};

}  // namespace
}  // namespace wa::cuda

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
        : team(team),
          size(size),
          steps((int(unsigned(size) / kChunk) - team.lane() + team.lanes() - 1) >> team.lanes_log2) {}

    __device__ unsigned first() const { return unsigned(team.lane()) * kChunk; }

    // Which chunks this thread holds, and their distances. Cheap to compute but expensive to keep: up to 16 comparisons
    // and offsets, which would occupy registers from the load to the store. ptxas, which sees through computed_again,
    // still recognises a comparison that it has made before, and packs results into bits to keep them; so each pass
    // over the tile compares other numbers.
    enum Pass { kLoad, kFirstDifferences, kSecondDifferences, kReorder, kStore };
    struct Reach {
        int steps, lanes_log2, pass;
        __device__ Reach(const Tile& tile, Pass pass)
            : steps(computed_again(tile.steps + pass)), lanes_log2(computed_again(tile.team.lanes_log2)), pass(pass) {}
        __device__ bool holds(int step) const { return step + pass < steps; }
        // From the memory of chunk `step` to that of the next one: one addition of bytes, where an index would first
        // have to be scaled. But of scalars ptxas would then compute all addresses at once, and spill.
        template <class Stored>
        __device__ Stored* next(Stored* first, Stored* chunk, int step) const {
            if constexpr (kChunk == 1) return first + (unsigned(step + 1) << lanes_log2);
            using Byte = std::conditional_t<std::is_const_v<Stored>, const char, char>;
            const unsigned bytes = unsigned(kChunk * sizeof(Stored)) << lanes_log2;
            return reinterpret_cast<Stored*>(reinterpret_cast<Byte*>(chunk) + unsigned(computed_again(int(bytes))));
        }
    };

    // each(value of the tile, value - subtrahend) for the values this thread holds, and each(0, 0) for the others
    template <Pass kPass = kFirstDifferences, class Each>
    __device__ void for_differences(Acc subtrahend, const Each& each) {
        const Reach reach(*this, kPass);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const Acc here = reach.holds(step) ? subtrahend : Acc(0);
#pragma unroll
            for (int i = 0; i < kChunk; ++i) each(x[step][i], x[step][i] - here);
        }
    }

    // each(value) for the values this thread holds and for others, which no store writes
    template <class Each>
    __device__ void for_each(const Each& each) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int i = 0; i < kChunk; ++i) each(x[step][i]);
    }

    template <class Stored>
    __device__ void request_as(const Stored* from) {
        const Reach reach(*this, kLoad);
        from += first();
        const Stored* at = from;
#pragma unroll
        for (int step = 0; step < kSteps; at = reach.next(from, at, step++)) {
            Chunk<Stored, kChunk> chunk = {};
            if (reach.holds(step)) chunk.load(at);
            chunk.put_into(x[step]);
        }
    }
    template <class Stored>
    __device__ void unpack_as() {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            Chunk<Stored, kChunk> chunk;
            chunk.take_from(x[step]);
            chunk.unpack(x[step]);
        }
    }

    template <class Stored>
    __device__ void store_as(Stored* to) const {
        const Reach reach(*this, kStore);
        to += first();
        Stored* at = to;
#pragma unroll
        for (int step = 0; step < kSteps; at = reach.next(to, at, step++)) {
            Chunk<Stored, kChunk> chunk;
            chunk.pack(x[step]);
            if (reach.holds(step)) chunk.store(at);
        }
    }

    // `at`: the offset of the tile's first value in the tensor. A load is a request, which leaves the values packed,
    // and their unpacking, which waits for them: between the two, other tiles make requests of their own. Values that
    // this thread does not hold become 0.
    __device__ void request(const void* tensor, DType dtype, uint64_t at) {
        with_type<Acc>(tensor, dtype, [&](auto* typed) { request_as(typed + at); });
    }
    __device__ void unpack(DType dtype) {
        with_type<Acc>(static_cast<const void*>(nullptr), dtype,
                       [&](auto* typed) { unpack_as<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>>(); });
    }
    // meanwhile() runs between the two.
    template <class Meanwhile>
    __device__ void load(const void* tensor, DType dtype, uint64_t at, const Meanwhile& meanwhile) {
        with_type<Acc>(tensor, dtype, [&](auto* typed) {
            request_as(typed + at);
            meanwhile();
            unpack_as<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>>();
        });
    }
    __device__ void load(const void* tensor, DType dtype, uint64_t at) {
        load(tensor, dtype, at, [] {});
    }
    __device__ void store(void* tensor, DType dtype, uint64_t at) const {
        with_type<Acc>(tensor, dtype, [&](auto* typed) { store_as(typed + at); });
    }

    // Reorder a tile that is a whole filter, seen as a matrix with so many columns: from the order of its rows, the
    // weight's, to that of its columns, and back. The values pass through the team's part of shared memory, where they
    // lie by rows: that side moves whole chunks, the other single values, of kChunk neighbouring rows. Where the number
    // of columns is odd, as in most convolutions, a warp's values then lie in kChunk different places of each bank at
    // most.
    __device__ void order_by_columns(int columns) {
        Acc* const by_rows = exchange();
        store_as(by_rows);
        team.sync();
        for_each_in_column(by_rows, columns, [](Acc& x, Acc& in_matrix) { x = in_matrix; });
    }
    __device__ void order_by_rows(int columns) {
        Acc* const by_rows = exchange();
        for_each_in_column(by_rows, columns, [](Acc& x, Acc& in_matrix) { in_matrix = x; });
        team.sync();
        request_as(static_cast<const Acc*>(by_rows));
    }

private:
    __device__ Acc* exchange() const { return dynamic_shared<Acc>() + team.index() * size; }

    // each(value of the tile in the order of columns, its place in a matrix in the order of rows)
    template <class Each>
    __device__ void for_each_in_column(Acc* by_rows, int columns, const Each& each) {
        const Reach reach(*this, kReorder);
        const int rows = max(quotient(size, approximate_reciprocal(float(columns))), 1);  // none, if there is no filter
        const float per_row = approximate_reciprocal(float(rows));
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
            if (reach.holds(step)) {
                const int position = computed_again(int(first())) + (step * kChunk << reach.lanes_log2);
                const int column = quotient(position, per_row), row = position - column * rows;
                Acc* in_matrix = by_rows + row * columns + column;
#pragma unroll
                for (int i = 0; i < kChunk; ++i, in_matrix += columns) each(x[step][i], *in_matrix);
            }
    }

    // Exact for positions up to 2^20: with + 0.5 the quotient is farther from an integer than the approximate
    // reciprocal errs.
    static __device__ int quotient(int position, float reciprocal) {
        return int((float(position) + 0.5f) * reciprocal);
    }
};

}  // namespace
}  // namespace wa::cuda

// Aligned weights and their statistics, for all filters of a table of tensors.
//
// One block takes as many filters of one tensor as fit in its registers (AlignShape), each with a team of 8 threads up
// to the whole block, about 16 values per thread. A filter is read once, in 16-byte accesses where its rows are
// aligned, kept in registers for the mean and the centred squares, and written once, through shared memory only if
// transposed; its statistics are one store. Only a filter longer than AlignShape::kOnChip is read a second time. Why
// this shape: 16 floats per thread at 1024 threads per SM keep up to 64 KB in flight, twice what an H200 needs, and let
// every path through the kernel fit in 64 registers; blocks of 32 KB keep the tail of the launch short.
#pragma once
#include "align_work.cuh"
#include "prepare.cuh"
#include "tile.cuh"

namespace wa::cuda {
namespace {

// Mean and sum of squared deviations of some values. The mean is kept in two parts, `rest` being its rounding error:
// the deviations of a filter of mean 1e4 and deviation 1e-3 are right only after both are subtracted.
template <class Acc>
struct Moments {
    Acc mean, rest, squares;
};

// per_value is 1 / count, computed before the tile is loaded because a division takes many registers. The pivot, one of
// the values, makes the mean of a constant filter exact, and so its deviations exactly 0.
template <class Acc, int kValues, int kChunk>
__device__ Moments<Acc> moments_of(Tile<Acc, kValues, kChunk>& tile, Acc per_value) {
    __shared__ Acc first_slots[kMaxWarps], sum_slots[kMaxWarps], moment_slots[2 * kMaxWarps];
    Acc pivot = team_first(tile.team, tile.x[0][0], first_slots);
    Acc sum[1] = {0}, residual[2] = {0, 0};
    tile.for_each([&](int, Acc x) { sum[0] += x - pivot; });
    team_sum(tile.team, sum, sum_slots);
    Moments<Acc> m;
    m.mean = pivot + sum[0] * per_value;
    tile.for_each([&](int, Acc x) {
        Acc r = x - m.mean;
        residual[0] += r;
        residual[1] += r * r;
    });
    team_sum(tile.team, residual, moment_slots);
    m.rest = residual[0] * per_value;
    m.squares = residual[1] - residual[0] * m.rest;
    return m;
}

// Moments of the union of `count_a` and `count_b` values (Chan et al.), in double: a few operations per 8192 values.
template <class Acc>
__device__ Moments<Acc> merged(Moments<Acc> a, double count_a, Moments<Acc> b, double count_b) {
    double delta = (double(b.mean) - double(a.mean)) + (double(b.rest) - double(a.rest));
    double mean = double(a.mean) + (double(a.rest) + delta * count_b / (count_a + count_b));
    double squares = double(a.squares) + double(b.squares) + delta * delta * count_a * count_b / (count_a + count_b);
    Acc high = Acc(mean);
    return {high, Acc(mean - double(high)), Acc(squares)};
}

template <class Acc>
struct Forward {
    Acc* statistics;

    // A filter that fits in its team's registers.
    template <int kChunk>
    __device__ void on_chip(AlignWork work) const {
        const AlignTask& task = work.task();
        Tile<Acc, AlignShape<Acc>::kValues, kChunk> tile(work.team, work.active() ? task.n : 0);
        const Acc per_value = Acc(1) / Acc(task.n);
        tile.load(task.weight, task.weight_dtype, work.row());
        Moments<Acc> m = moments_of(tile, per_value);
        Acc factor = finish(work, m);
        tile.for_each([&](int, Acc& x) { x = (x - m.mean - m.rest) * factor; });
        int64_t row = work.afresh().row();
        if (task.transposed_columns)
            tile.store_transposed(task.out, task.aligned_dtype, row, int(task.transposed_columns));
        else tile.store(task.out, task.aligned_dtype, row);
    }

    // A longer filter, by the whole block: read in parts for the moments, merged in order, and once more to write.
    template <int kChunk>
    __device__ void in_parts(AlignWork work) const {
        using Part = Tile<Acc, 2 * kChunk, kChunk>;
        const AlignTask& task = work.task();
        const uint32_t capacity = Part::capacity(work.team);
        __shared__ Moments<Acc> all;
        for (uint32_t begin = 0; begin < task.n; begin += capacity) {
            Part part(work.team, min(task.n - begin, capacity));
            const Acc per_value = Acc(1) / Acc(part.size);
            part.load(task.weight, task.weight_dtype, work.row() + begin);
            Moments<Acc> of_part = moments_of(part, per_value);
            if (work.team.lane() == 0) all = begin == 0 ? of_part : merged(all, begin, of_part, part.size);
            __syncthreads();  // moments_of reuses its shared memory
        }
        const Moments<Acc> m = all;
        Acc factor = finish(work, m);
        for (uint32_t begin = 0; begin < task.n; begin += capacity) {
            Part part(work.team, min(task.n - begin, capacity));
            part.load(task.weight, task.weight_dtype, work.row() + begin);
            part.for_each([&](int, Acc& x) { x = (x - m.mean - m.rest) * factor; });
            part.store(task.out, task.aligned_dtype, work.row() + begin);
        }
    }

    // Stores the statistics and returns the factor to scale the deviations by.
    __device__ Acc finish(const AlignWork& work, Moments<Acc> m) const {
        if (!work.active()) return 0;
        Acc rstd = Acc(1) / sqrt(m.squares / 2 + Acc(work.task().eps));
        if (work.team.lane() == 0) {
            const Acc mean_and_rstd[2] = {m.mean + m.rest, rstd};
            Chunk<Acc, 2> both;
            both.pack(mean_and_rstd);
            both.store(statistics + 2 * work.index());
        }
        return Acc(work.task().scale) * work.template load_gain<Acc>() * rstd;
    }
};

template <class Acc, class Table>
__global__ __launch_bounds__(AlignShape<Acc>::kThreads, AlignShape<Acc>::kBlocksPerSm) void align_forward_kernel(
    const __grid_constant__ Table table) {
    if constexpr (Table::kTakesInput)
        if (blockIdx.x >= table.blocks) return prepare_block<Acc, false>(table.input, blockIdx.x - table.blocks);
    align_block<Acc>(table, Forward<Acc>{static_cast<Acc*>(table.statistics)});
}

}  // namespace
}  // namespace wa::cuda

// Aligned weights and their statistics, for all filters of a table of tensors.
//
// One block takes as many filters of one tensor as fit in its registers (AlignShape), each with a team of 8 threads up
// to the whole block, up to 20 values per thread. A filter is read once, in 16-byte accesses where its rows are
// aligned, kept in registers for the mean and the centred squares, and written once, through shared memory only if
// transposed; its statistics are one store. Only a filter longer than a block holds is read a second time. Why this
// shape: 12 to 20 floats per thread at 1024 threads per SM keep up to 80 KB in flight, more than twice what an H200
// needs, and let every path through the kernel fit in 64 registers; blocks of 20 to 40 KB keep the tail of the launch
// short. What is not a load, a sum or a store is as little as can be, for it is the issue of instructions that would
// hold an H200's memory back: 26 a value, as the machine code shows (NOTES.md).
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

// Leaves x - mean in the tile. The pivot, one of the values, makes the mean of a constant filter exact, and so its
// deviations exactly 0.
template <class Acc, int kValues, int kChunk>
__device__ Moments<Acc> take_mean(Tile<Acc, kValues, kChunk>& tile, Acc per_value) {
    __shared__ Acc first_slots[kMaxWarps], sum_slots[kMaxWarps], moment_slots[2 * kMaxWarps];
    Acc pivot = team_first(tile.team, tile.x[0][0], first_slots);
    Acc sum[1] = {0}, residual[2] = {0, 0};
    tile.for_differences(pivot, [&](Acc, Acc difference) { sum[0] += difference; });
    team_sum(tile.team, sum, sum_slots);
    Moments<Acc> m;
    m.mean = pivot + sum[0] * per_value;
    tile.template for_differences<Tile<Acc, kValues, kChunk>::kSecondDifferences>(m.mean, [&](Acc& x, Acc difference) {
        x = difference;
        residual[0] += x;
        residual[1] += x * x;
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
    template <int kChunk, bool kTransposed>
    __device__ void on_chip(AlignWork work) const {
        const AlignTask& task = work.task();
        Tile<Acc, AlignShape<Acc>::values(kChunk), kChunk> tile(work.team, work.active() ? task.n : 0);
        const Acc per_value = reciprocal(Acc(task.n)), gain = work.template load_gain<Acc>();
        tile.load(task.weight, task.weight_dtype, work.row());
        const Moments<Acc> m = take_mean(tile, per_value);
        const Acc factor = finish(work, m, gain), shift = -m.rest * factor;
        tile.for_each([&](Acc& x) { x = x * factor + shift; });
        if (kTransposed) tile.order_by_columns(int(task.transposed_columns));
        tile.store(task.out, task.aligned_dtype, work.afresh().row());
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
            const Acc per_value = reciprocal(Acc(part.size));
            part.load(task.weight, task.weight_dtype, work.row() + begin);
            Moments<Acc> of_part = take_mean(part, per_value);
            if (work.team.lane() == 0) all = begin == 0 ? of_part : merged(all, begin, of_part, part.size);
            __syncthreads();  // take_mean reuses its shared memory
        }
        const Moments<Acc> m = all;
        const Acc factor = finish(work, m, work.template load_gain<Acc>()), shift = -m.rest * factor;
        for (uint32_t begin = 0; begin < task.n; begin += capacity) {
            Part part(work.team, min(task.n - begin, capacity));
            part.load(task.weight, task.weight_dtype, work.row() + begin);
            part.for_each([&](Acc& x) { x = (x - m.mean) * factor + shift; });
            part.store(task.out, task.aligned_dtype, work.row() + begin);
        }
    }

    // Stores the statistics and returns the factor to scale the deviations by.
    __device__ Acc finish(const AlignWork& work, Moments<Acc> m, Acc gain) const {
        if (!work.active()) return 0;
        const Acc rstd = reciprocal_root(m.squares / 2 + Acc(work.task().eps));
        if (work.team.lane() == 0) {
            const Acc mean_and_rstd[2] = {m.mean + m.rest, rstd};
            Chunk<Acc, 2> both;
            both.pack(mean_and_rstd);
            both.store(statistics + 2 * work.index());
        }
        return Acc(work.task().scale) * gain * rstd;
    }
};

template <class Acc, class Table>
__global__ __launch_bounds__(AlignShape<Acc>::kThreads, AlignShape<Acc>::kBlocksPerSm) void align_forward_kernel(
    const Table __grid_constant__ table) {
    if constexpr (Table::kTakesInput)
        if (blockIdx.x >= table.blocks) return prepare_block<Acc, false>(table.input, blockIdx.x - table.blocks);
    align_block<Acc>(table, Forward<Acc>{static_cast<Acc*>(table.statistics)});
}

}  // namespace
}  // namespace wa::cuda

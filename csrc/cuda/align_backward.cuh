// Gradients of weights and gains, for all filters of a table of tensors.
//
// One block takes as many filters of one tensor as fit in its registers (AlignShape), each with a team of 8 threads up
// to the whole block, up to 20 values per thread of the weight and of the gradient. Both are read once, in 16-byte
// accesses where rows are aligned (a transposed gradient through shared memory), kept in registers for three sums that
// are formed together, and the weight's gradient is written once; the gain's is one store, without atomics. Only a
// filter longer than a block holds is read a second time. For the reasons behind this shape see the forward, whose
// blocks are the same.
#pragma once
#include "align_work.cuh"
#include "prepare.cuh"
#include "tile.cuh"

namespace wa::cuda {
namespace {

// The coefficients of a filter's gradients, from three sums over it: of w - mean, G and G (w - mean). The rounding
// error of the stored mean is subtracted as in the forward, but from the mean of G, as it would be from each w.
template <class Acc>
struct Coefficients {
    Acc g_mean, g_dot_x, along;

    template <class Sum>
    __device__ Coefficients(const Sum (&sums)[3], Sum per_value, Acc rstd) {
        const Sum rest = sums[0] * per_value;
        g_dot_x = Acc(sums[2] - rest * sums[1]) * rstd;
        along = g_dot_x * rstd / 2;
        g_mean = Acc(sums[1] * per_value - rest * Sum(along));
    }
    __device__ Acc gradient(Acc w, Acc g, Acc factor) const { return ((g - g_mean) - w * along) * factor; }
};

// A part of a filter: w - mean and G; values beyond the filter's end are 0 in both. Both are requested before either is
// unpacked, which waits for it.
template <class Acc, int kValues, int kChunk, bool kTransposed>
struct GradientTiles {
    using RowTile = Tile<Acc, kValues, kChunk>;
    RowTile w, g;

    __device__ GradientTiles(const AlignTask& task, Team team, int size, uint64_t at, Acc mean)
        : w(team, size), g(team, size) {
        g.request(task.grad, task.aligned_dtype, at);
        w.load(task.weight, task.weight_dtype, at, [&] { g.unpack(task.aligned_dtype); });
        if (kTransposed) g.order_by_rows(int(task.transposed_columns));
        w.template for_differences<RowTile::kLoad>(mean, [](Acc& x, Acc difference) { x = difference; });
    }

    __device__ void sum(Acc (&sums)[3]) const {
        sums[0] = sums[1] = sums[2] = 0;
#pragma unroll
        for (int step = 0; step < RowTile::kSteps; ++step)
#pragma unroll
            for (int i = 0; i < kChunk; ++i) {
                sums[0] += w.x[step][i];
                sums[1] += g.x[step][i];
                sums[2] += w.x[step][i] * g.x[step][i];
            }
    }

    __device__ void store_gradient(const AlignTask& task, uint64_t at, const Coefficients<Acc>& coefficients,
                                   Acc factor) {
#pragma unroll
        for (int step = 0; step < RowTile::kSteps; ++step)
#pragma unroll
            for (int i = 0; i < kChunk; ++i) w.x[step][i] = coefficients.gradient(w.x[step][i], g.x[step][i], factor);
        w.store(task.out, task.weight_dtype, at);
    }
};

template <class Acc>
struct Backward {
    const Acc* statistics;
    Acc* grad_gain;

    // A filter that fits in its team's registers.
    template <int kChunk, bool kTransposed>
    __device__ void on_chip(AlignWork work) const {
        __shared__ Acc slots[3 * kMaxWarps];
        const AlignTask& task = work.task();
        constexpr bool kEarlyGain = kChunk > 1;  // with the tiles, if their addresses leave it a register
        Acc gain = kEarlyGain ? work.template load_gain<Acc>() : Acc(0);
        const auto [mean, rstd] = load_statistics(work);
        GradientTiles<Acc, AlignShape<Acc>::values(kChunk), kChunk, kTransposed> tiles(
            task, work.team, work.active() ? task.n : 0, work.row(), mean);
        Acc sums[3];
        tiles.sum(sums);
        team_sum(work.team, sums, slots);
        work = work.afresh();  // not held across the barrier
        if (!kEarlyGain) gain = work.template load_gain<Acc>();
        Coefficients<Acc> coefficients(sums, reciprocal(Acc(work.task().n)), rstd);
        tiles.store_gradient(work.task(), work.row(), coefficients, finish(work, coefficients, rstd, gain));
    }

    // A longer filter, by the whole block: read in parts for the sums, added in order, and once more to write.
    template <int kChunk>
    __device__ void in_parts(AlignWork work) const {
        __shared__ Acc slots[3 * kMaxWarps];
        using Part = GradientTiles<Acc, 2 * kChunk, kChunk, false>;
        const AlignTask& task = work.task();
        const uint32_t capacity = Part::RowTile::capacity(work.team);
        const auto [mean, rstd] = load_statistics(work);
        double total[3] = {0, 0, 0};
        for (uint32_t begin = 0; begin < task.n; begin += capacity) {
            Acc sums[3];
            Part(task, work.team, min(task.n - begin, capacity), work.row() + begin, mean).sum(sums);
            team_sum(work.team, sums, slots);
            for (int s = 0; s < 3; ++s) total[s] += sums[s];
            __syncthreads();  // team_sum reuses its shared memory
        }
        Coefficients<Acc> coefficients(total, 1.0 / task.n, rstd);
        Acc factor = finish(work, coefficients, rstd, work.template load_gain<Acc>());
        for (uint32_t begin = 0; begin < task.n; begin += capacity)
            Part(task, work.team, min(task.n - begin, capacity), work.row() + begin, mean)
                .store_gradient(task, work.row() + begin, coefficients, factor);
    }

    struct Statistics {
        Acc mean, rstd;
    };
    __device__ Statistics load_statistics(const AlignWork& work) const {
        Acc mean_and_rstd[2] = {0, 0};
        if (work.active()) {
            Chunk<Acc, 2> both;
            both.load(statistics + 2 * work.index());
            both.unpack(mean_and_rstd);
        }
        return {mean_and_rstd[0], mean_and_rstd[1]};
    }

    // Stores the gain's gradient and returns the factor of the weight's.
    __device__ Acc finish(const AlignWork& work, const Coefficients<Acc>& coefficients, Acc rstd, Acc gain) const {
        if (!work.active()) return 0;
        Acc scale = Acc(work.task().scale);
        if (work.team.lane() == 0) grad_gain[work.index()] = scale * coefficients.g_dot_x;
        return scale * gain * rstd;
    }
};

template <class Acc, class Table>
__global__ __launch_bounds__(AlignShape<Acc>::kThreads, AlignShape<Acc>::kBlocksPerSm) void align_backward_kernel(
    const Table __grid_constant__ table) {
    if constexpr (Table::kTakesInput)
        if (blockIdx.x >= table.blocks) return prepare_block<Acc, true>(table.input, blockIdx.x - table.blocks);
    align_block<Acc>(table,
                     Backward<Acc>{static_cast<const Acc*>(table.statistics), static_cast<Acc*>(table.grad_gain)});
}

}  // namespace
}  // namespace wa::cuda

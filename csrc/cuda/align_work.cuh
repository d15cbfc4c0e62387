// Which filter a team takes, and on which path through the kernel.
#pragma once
#include "align_shape.cuh"
#include "align_table.cuh"
#include "chunk.cuh"
#include "team.cuh"

namespace wa::cuda {
namespace {

// The work of one team: a filter of a task. In a task's last block some teams have none, but still take part in
// barriers.
struct AlignWork {
    const AlignEntry* entries;
    int entry;
    Team team;
    uint32_t filter;

    __device__ const AlignTask& task() const { return entries[entry].task; }
    __device__ bool active() const { return filter < task().filters; }
    __device__ uint64_t row() const { return uint64_t(filter) * task().n; }  // where the filter begins in its tensors
    __device__ int64_t index() const { return int64_t(task().first_filter) + filter; }  // among the list's filters

    template <class Acc>
    __device__ Acc load_gain() const {
        const AlignTask& task = this->task();
        if (!active()) return 0;
        if (!task.gain) return 1;
        switch (task.gain_dtype) {
            case DType::kFloat32: return static_cast<const float*>(task.gain)[filter];
            case DType::kFloat16: return to_float(static_cast<const __half*>(task.gain)[filter]);
            case DType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(task.gain)[filter]);
            default: return Acc(static_cast<const double*>(task.gain)[filter]);
        }
    }

    // The same work, hidden from the optimiser. Each path through a kernel starts with this: otherwise the compiler
    // hoists what several paths compute above them all, and holding it in registers makes the longest path spill.
    __device__ AlignWork afresh() const {
        return {entries, computed_again(entry), Team{computed_again(team.lanes_log2)},
                uint32_t(computed_again(int(filter)))};
    }
};

// Finds the block's work and runs ways.on_chip<chunk>(work) or, for longer filters, ways.in_parts<chunk>(work).
template <class Acc, class Table, class Ways>
__device__ void align_block(const Table& table, const Ways& ways) {
    const int index = table.find(blockIdx.x);
    const AlignEntry& entry = table.entries[index];
    Team team{entry.lanes_log2};
    uint32_t filter = (blockIdx.x - entry.first_block) * (blockDim.x >> team.lanes_log2) + team.index();
    const AlignWork work{table.entries, index, team, filter};
    constexpr int kVector = kVectorChunk<Acc>;
    if (!entry.is_on_chip) {
        if (entry.chunk == 1) ways.template in_parts<1>(work.afresh());
        else ways.template in_parts<kVector>(work.afresh());
        return;
    }
    auto on_chip = [&](auto is_transposed) {
        constexpr bool kTransposed = decltype(is_transposed)::value;
        if (entry.chunk == 1) ways.template on_chip<1, kTransposed>(work.afresh());
        else if (entry.chunk == kVector) ways.template on_chip<kVector, kTransposed>(work.afresh());
        else if constexpr (sizeof(Acc) == 4) ways.template on_chip<kPackedChunk, kTransposed>(work.afresh());
    };
    if (entry.task.transposed_columns) on_chip(std::true_type());
    else on_chip(std::false_type());
}

}  // namespace
}  // namespace wa::cuda

// The work of one launch: a table of tensors, by value in the kernel's parameters.
#pragma once
#include "../common/prepare_task.h"
#include "chunk.cuh"
#include "team.cuh"

namespace wa::cuda {

constexpr int kParameterBytes = 32764;  // what CUDA 12.1 and later allow a kernel
constexpr int kInputBytes = 512;        // kept free for the description of one prepared convolution input

// What one block holds in registers: one filter of up to kOnChip values, or as many shorter ones. 16 floats a thread,
// of the weight and of the gradient, keep every way through the kernels under 64 registers without a spill, on every
// architecture; 32 did not.
template <class Acc>
struct AlignShape {
    static constexpr int kValues = sizeof(Acc) == 4 ? 16 : 4;
    static constexpr int kThreads = sizeof(Acc) == 4 ? 512 : 1024;
    static constexpr int kBlocksPerSm = 1024 / kThreads;  // at 64 registers a thread
    static constexpr uint32_t kOnChip = kValues * kThreads;
};

// Values that a thread moves together: what fills 16 bytes of the accumulation type; of 16-bit values, if the weight or
// the aligned side has them and the filter is on chip; or 1, where rows are not aligned.
template <class Acc>
constexpr int kVectorChunk = 16 / sizeof(Acc);
constexpr int kPackedChunk = 8;

struct AlignEntry {
    AlignTask task;
    uint32_t first_block;
    uint8_t lanes_log2;  // threads per filter
    uint8_t chunk;
};

// A convolution's input, and how its tiles lie (prepare.cuh).
struct PrepareEntry {
    PrepareTask task;
    uint32_t positions;  // of an image of the result
    uint32_t position_tiles, channel_tiles;
    uint8_t channels_log2;                  // of a tile
    bool from_by_channels, to_by_channels;  // what lies side by side in memory: channels or positions
    bool from_is_wide, to_is_wide;          // accesses of 16 bytes
};

// Blocks first_block ... belong to the entry; each takes (threads in the block >> lanes_log2) of its filters.
template <int kEntries>
struct AlignTable {
    static constexpr int kCapacity = kEntries;
    void* statistics;
    void* grad_gain;
    uint32_t count;
    uint32_t blocks;  // of the entries; those after them prepare the input
    AlignEntry entries[kEntries];

    __device__ int find(uint32_t block) const {
        uint32_t low = 0, high = count;
        while (high - low > 1) {
            uint32_t middle = (low + high) / 2;
            if (entries[middle].first_block <= block) low = middle;
            else high = middle;
        }
        return int(low);
    }
};

// A launch copies its whole parameter block: a layer alone need not pay for the table of a model, which in turn needs
// no input.
struct SmallTable : AlignTable<16> {
    static constexpr bool kTakesInput = true;
    PrepareEntry input;
};
struct LargeTable : AlignTable<(kParameterBytes - kInputBytes - 24) / int(sizeof(AlignEntry))> {
    static constexpr bool kTakesInput = false;
};
static_assert(LargeTable::kCapacity >= 400 && sizeof(LargeTable) + kInputBytes <= kParameterBytes);
static_assert(sizeof(PrepareEntry) <= kInputBytes);

namespace {

// What one team does: a filter of a task. In a task's last block some teams have none, but still meet the others at
// barriers.
struct AlignWork {
    const AlignEntry* entries;
    int entry;
    Team team;
    uint32_t filter;

    __device__ const AlignTask& task() const { return entries[entry].task; }
    __device__ bool active() const { return filter < task().filters; }
    __device__ int64_t row() const { return int64_t(filter) * task().n; }  // where the filter begins in its tensors
    __device__ int64_t rank() const { return int64_t(task().first_filter) + filter; }  // among the list's filters

    template <class Acc>
    __device__ Acc gain() const {
        const AlignTask& task = this->task();
        if (!task.gain) return 1;
        switch (task.gain_dtype) {
            case DType::kFloat32: return static_cast<const float*>(task.gain)[filter];
            case DType::kFloat16: return to_float(static_cast<const __half*>(task.gain)[filter]);
            case DType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(task.gain)[filter]);
            default: return Acc(static_cast<const double*>(task.gain)[filter]);
        }
    }

    // The same work. Each way through a kernel begins with this: else the compiler computes what several ways need
    // ahead of them all, and holds it in registers that the longest one lacks.
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
    const bool on_chip = entry.task.n <= AlignShape<Acc>::kOnChip;
    constexpr int kVector = kVectorChunk<Acc>;
    if (!on_chip) {
        if (entry.chunk == 1) ways.template in_parts<1>(work.afresh());
        else ways.template in_parts<kVector>(work.afresh());
    } else {
        if (entry.chunk == 1) ways.template on_chip<1>(work.afresh());
        else if (entry.chunk == kVector) ways.template on_chip<kVector>(work.afresh());
        else if constexpr (sizeof(Acc) == 4) ways.template on_chip<kPackedChunk>(work.afresh());
    }
}

}  // namespace
}  // namespace wa::cuda

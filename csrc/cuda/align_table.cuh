// The work of one launch: a table of tensors, by value in the kernel's parameters.
#pragma once
#include "../common/prepare_task.h"
#include "portable.cuh"

namespace wa::cuda {

constexpr int kParameterBytes = 32764;  // the limit of CUDA 12.1 and later
constexpr int kInputBytes = 512;        // reserved for a PrepareEntry

struct AlignEntry {
    AlignTask task;
    uint32_t first_block;
    uint8_t lanes_log2;  // threads per filter
    uint8_t chunk;
};

// A convolution's input and its tiling (prepare.cuh).
struct PrepareEntry {
    PrepareTask task;
    uint32_t positions;  // of an image of the result
    uint32_t position_tiles, channel_tiles;
    uint8_t channels_log2;                  // of a tile
    bool from_by_channels, to_by_channels;  // whether channels are innermost in memory, else positions
    bool from_is_wide, to_is_wide;          // 16-byte accesses
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

// A launch copies its whole parameter block: a single layer need not pay for the table of a model, which in turn needs
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

}  // namespace wa::cuda

// The work of one launch: a table of tensors, by value in the kernel's parameters.
#pragma once
#include "../common/prepare_task.h"
#include "portable.cuh"

namespace wa::cuda {

constexpr int kParameterBytes = 32764;  // the limit of CUDA 12.1 and later

struct AlignEntry {
    AlignTask task;
    uint32_t first_block;
    uint8_t lanes_log2;  // threads per filter
    uint8_t chunk;
    bool is_on_chip;
};

// Quotients of numbers below 2^31 by a divisor from 1 on: two operations, where a division takes some twenty.
// (Granlund and Montgomery, 1994: exact, with multiplier = floor(2^32 (2^shift - divisor) / divisor) + 1.)
struct Divisor {
    uint32_t divisor, multiplier, shift;

    explicit Divisor(uint32_t divisor = 1) : divisor(divisor), shift(0) {
        while (uint64_t(1) << shift < divisor) ++shift;
        multiplier = uint32_t((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
    }
    __device__ uint32_t quotient(uint32_t n) const { return (high_product(n, multiplier) + n) >> shift; }
};

// A convolution's input and its tiling (prepare.cuh).
struct PrepareEntry {
    PrepareTask task;
    uint32_t positions;       // which tiles divide: those of the input if is_direct, else those of `to`
    Divisor width, to_width;  // rows of the input and of `to`
    Divisor position_tiles, channel_tiles;
    int pitch;  // of a tile's channels in shared memory, in values
    uint8_t channels_log2;
    bool from_by_channels, to_by_channels;  // whether channels are innermost in memory, else positions
    bool from_is_wide, to_is_wide;          // accessed in 16 aligned bytes, else value by value
    bool is_direct;                         // each position's place is computed where it is used, without a table
    bool is_padded;
    bool is_run;  // a tile's channels are whole images, one after another: one run of memory on sides by positions
};

// Blocks first_block ... belong to the entry; each takes (threads in the block >> lanes_log2) of its filters.
//
// A block finds its entry by a coarse map: all blocks are divided into up to kStretches stretches of equal length, and
// from the entry of a stretch's last block it is few steps back, mostly none. A search through the entries would be a
// chain of some nine dependent reads before a block's first load.
template <int kEntries, int kStretches>
struct AlignTable {
    static constexpr int kCapacity = kEntries;
    void* statistics;
    void* grad_gain;
    uint32_t count;
    uint32_t blocks;  // of the entries; those after them prepare the input
    uint32_t stretch_log2;
    uint16_t last_entries[kStretches];
    AlignEntry entries[kEntries];

    __device__ int find(uint32_t block) const {
        int entry = last_entries[block >> stretch_log2];
        while (entries[entry].first_block > block) --entry;
        return entry;
    }

    // When all entries are there.
    void make_map() {
        stretch_log2 = 0;
        while (blocks > uint64_t(kStretches) << stretch_log2) ++stretch_log2;
        for (uint32_t stretch = 0, entry = 0; uint64_t(stretch) << stretch_log2 < blocks; ++stretch) {
            uint64_t end = uint64_t(stretch + 1) << stretch_log2;
            while (entry + 1 < count && entries[entry + 1].first_block < end) ++entry;
            last_entries[stretch] = uint16_t(entry);
        }
    }
};

// A launch copies its whole parameter block: a single layer need not pay for the table of a model, which in turn needs
// no input.
struct SmallTable : AlignTable<16, 64> {
    static constexpr bool kTakesInput = true;
    PrepareEntry input;
};
struct LargeTable : AlignTable<400, 256> {
    static constexpr bool kTakesInput = false;
};
static_assert(sizeof(SmallTable) <= 4096 && sizeof(LargeTable) <= kParameterBytes);

}  // namespace wa::cuda

// Divides a convolution's input into tiles, one per block.
#pragma once
#include "prepare.cuh"

namespace wa::cuda {
namespace {

// How the kernel accesses one side, along channels or along positions.
template <class Acc>
Access access_of(const PrepareTask& task, const ImageSide& side, bool along_channels, bool is_from) {
    const int chunk = 16 / (side.dtype == DType::kFloat64 ? 8 : side.dtype == DType::kFloat32 ? 4 : 2);
    auto address = reinterpret_cast<uintptr_t>(is_from ? task.from : task.to);
    if (is_from == task.saved_is_result) address |= reinterpret_cast<uintptr_t>(task.saved);
    bool is_even = true;  // one distance between all neighbouring positions, and none of them padding
    int64_t next = side.spatial[kSpatial - 1], others = side.batch;  // all strides but the innermost, which is 1
    uint32_t positions = 1;
    for (int d = kSpatial - 1; d >= 0; --d) {
        is_even &= (task.to_size[d] == 1 || side.spatial[d] == next) && !(is_from && (task.before[d] | task.after[d]));
        next *= task.to_size[d];
        positions *= task.to_size[d];
        if (along_channels) others |= side.spatial[d];
    }
    if (!along_channels) others |= side.channel;
    const bool is_adjacent = along_channels || (is_even && side.spatial[kSpatial - 1] == 1);
    const uint32_t run = along_channels ? task.channels : positions;
    if (!is_adjacent || address % 16 != 0 || run % chunk != 0 || others % chunk != 0) return Access::kSingle;
    return is_even ? Access::kStepwise : Access::kWide;
}

// Fills in the tiling of an input and returns the number of tiles.
template <class Acc>
uint64_t tiles_of(const PrepareTask& task, PrepareEntry& entry) {
    entry.task = task;
    entry.positions = task.to_size[0] * task.to_size[1] * task.to_size[2];
    entry.from_by_channels = is_by_channels(task.from_side, task);
    entry.to_by_channels = is_by_channels(task.to_side, task);
    entry.from_access = access_of<Acc>(task, task.from_side, entry.from_by_channels, true);
    entry.to_access = access_of<Acc>(task, task.to_side, entry.to_by_channels, false);
    // A wide chunk must stay within a tile. And two tiles with the offsets of many positions are too much memory.
    const bool at_least_8 = task.saved || (entry.from_access != Access::kSingle && entry.from_by_channels) ||
                            (entry.to_access != Access::kSingle && entry.to_by_channels);
    entry.channels_log2 = at_least_8 ? kMinChannelsLog2 + 1 : kMinChannelsLog2;
    while (entry.channels_log2 < kMaxChannelsLog2 && (1u << entry.channels_log2) < task.channels) ++entry.channels_log2;
    const uint32_t positions = uint32_t(kTileValues<Acc>) >> entry.channels_log2;
    entry.position_tiles = Divisor((entry.positions + positions - 1) / positions);
    entry.channel_tiles = Divisor((task.channels + (1u << entry.channels_log2) - 1) >> entry.channels_log2);
    return uint64_t(task.batch) * entry.position_tiles.divisor * entry.channel_tiles.divisor;
}

}  // namespace
}  // namespace wa::cuda

// Divides a convolution's input into tiles, one per block.
#pragma once
#include "prepare.cuh"

namespace wa::cuda {
namespace {

// Fills in the tiling of an input and returns the number of tiles. Wide: accesses are 16 aligned bytes of adjacent
// values throughout.
template <class Acc>
uint64_t tiles_of(const PrepareTask& task, PrepareEntry& entry) {
    entry.task = task;
    entry.positions = task.to_size[0] * task.to_size[1] * task.to_size[2];
    auto is_wide = [&](const ImageSide& side, bool along_channels, bool is_from) {
        int chunk = 16 / (side.dtype == DType::kFloat64 ? 8 : side.dtype == DType::kFloat32 ? 4 : 2);
        auto address = reinterpret_cast<uintptr_t>(is_from ? task.from : task.to);
        if (is_from == task.saved_is_result) address |= reinterpret_cast<uintptr_t>(task.saved);
        int64_t others = side.batch;  // all strides but the innermost, which is 1
        if (along_channels) {
            for (int64_t stride : side.spatial) others |= stride;
            return address % 16 == 0 && task.channels % chunk == 0 && others % chunk == 0;
        }
        int64_t next = 1;  // positions must be contiguous, without padding between them
        for (int d = kSpatial - 1; d >= 0; --d) {
            if (task.to_size[d] != 1 && side.spatial[d] != next) return false;
            if (task.before[d] | task.after[d] && is_from) return false;
            next *= task.to_size[d];
        }
        return address % 16 == 0 && entry.positions % chunk == 0 && (others | side.channel) % chunk == 0;
    };
    entry.from_by_channels = is_by_channels(task.from_side, task);
    entry.to_by_channels = is_by_channels(task.to_side, task);
    entry.from_is_wide = is_wide(task.from_side, entry.from_by_channels, true);
    entry.to_is_wide = is_wide(task.to_side, entry.to_by_channels, false);
    entry.channels_log2 = kMinChannelsLog2;
    while (entry.channels_log2 < kMaxChannelsLog2 && (1u << entry.channels_log2) < task.channels) ++entry.channels_log2;
    // A wide chunk must stay within a tile.
    if (entry.channels_log2 < 3 &&
        ((entry.from_is_wide && entry.from_by_channels) || (entry.to_is_wide && entry.to_by_channels)))
        entry.channels_log2 = 3;
    uint32_t positions = uint32_t(kTileValues<Acc>) >> entry.channels_log2;
    entry.position_tiles = (entry.positions + positions - 1) / positions;
    entry.channel_tiles = (task.channels + (1u << entry.channels_log2) - 1) >> entry.channels_log2;
    return uint64_t(task.batch) * entry.position_tiles * entry.channel_tiles;
}

}  // namespace
}  // namespace wa::cuda

// Divides a convolution's input into tiles, one per block.
#pragma once
#include <algorithm>

#include "prepare.cuh"

namespace wa::cuda {
namespace {

// One side of an input, and how 16 aligned bytes of it can be accessed: along channels, along the positions of each
// channel, or along all positions of some channels, as one run.
struct WideAccess {
    bool by_channels, along_channels, along_positions, as_run;

    WideAccess(const PrepareTask& task, bool is_from, const uint32_t* size) {
        const ImageSide& side = is_from ? task.from_side : task.to_side;
        const int chunk = 16 / (side.dtype == DType::kFloat64 ? 8 : side.dtype == DType::kFloat32 ? 4 : 2);
        auto address = reinterpret_cast<uintptr_t>(is_from ? task.from : task.to);
        if (is_from == task.saved_is_result) address |= reinterpret_cast<uintptr_t>(task.saved);
        auto divides = [&](int64_t number) { return number % chunk == 0; };
        const bool is_aligned = address % 16 == 0 && divides(side.batch);
        bool is_adjacent = side.spatial[kSpatial - 1] == 1;
        int64_t positions = 1, strides = 0;
        for (int d = kSpatial - 1; d >= 0; --d) {
            is_adjacent &= size[d] == 1 || side.spatial[d] == positions;
            positions *= size[d];
            strides |= side.spatial[d];
        }
        by_channels = is_by_channels(side, task);
        along_channels = is_aligned && by_channels && divides(task.channels) && divides(strides);
        along_positions = is_aligned && is_adjacent && divides(positions) && divides(side.channel);
        as_run = is_aligned && is_adjacent && side.channel == positions && divides(positions * task.channels);
    }
};

constexpr int log2_from(uint32_t n) {  // rounded up
    int log2 = 0;
    while (uint64_t(1) << log2 < n) ++log2;
    return log2;
}

// Fills in the tiling of an input and returns the number of tiles.
template <class Acc>
uint64_t tiles_of(const PrepareTask& task, bool backward, PrepareEntry& entry) {
    entry.task = task;
    uint32_t padded[kSpatial], positions = 1, shown = 1;
    bool is_padded = false, is_flat = task.size[0] == 1 && !task.before[0] && !task.after[0];
    for (int d = 0; d < kSpatial; ++d) {
        padded[d] = task.size[d] + task.before[d] + task.after[d];
        is_padded |= padded[d] != task.size[d];
        positions *= task.size[d], shown *= task.to_size[d];
    }
    const WideAccess from(task, true, backward ? padded : task.size), to(task, false, task.to_size);
    const bool padded_by_channels = backward ? from.by_channels : to.by_channels;
    // A run is an image's channels in whole. It is taken where rows would leave much of a tile empty, or are unaligned.
    constexpr int kValuesLog2 = log2_from(kTileValues<Acc>);
    const int run_log2 = std::min(kMaxChannelsLog2, kValuesLog2 - log2_from(positions));
    auto runs = [](const WideAccess& side) { return side.by_channels ? side.along_channels : side.as_run; };
    auto is_wide = [](const WideAccess& side) { return side.by_channels ? side.along_channels : side.along_positions; };
    const bool is_cheap = !is_padded || (task.mode == PaddingMode::kZeros && padded_by_channels);
    const bool can_be_direct = is_flat && is_cheap && positions > 0;
    const bool can_run = can_be_direct && run_log2 > kMinChannelsLog2 && runs(from) && runs(to);
    const bool rows_fit = is_wide(from) && is_wide(to) && positions % (kTileValues<Acc> >> kMaxChannelsLog2) == 0;
    entry.is_padded = is_padded;
    entry.is_run = can_run && !rows_fit && !(from.by_channels && to.by_channels);
    entry.is_direct = entry.is_run || (can_be_direct && is_wide(from) && is_wide(to));
    entry.from_by_channels = from.by_channels, entry.to_by_channels = to.by_channels;
    entry.from_is_wide = entry.is_run || (is_wide(from) && (entry.is_direct || from.by_channels || !is_padded));
    entry.to_is_wide = entry.is_run || is_wide(to);
    entry.positions = entry.is_direct ? positions : shown;
    entry.width = Divisor(std::max(task.size[2], 1u)), entry.to_width = Divisor(task.to_size[2]);
    // A wide chunk must stay within a tile. And two tiles with the offsets of many positions are too much memory.
    const bool at_least_8 =
        task.saved || (entry.from_is_wide && from.by_channels) || (entry.to_is_wide && to.by_channels);
    int log2 = std::min(kMaxChannelsLog2, log2_from(task.channels));
    entry.channels_log2 = entry.is_run ? run_log2 : std::max(log2, kMinChannelsLog2 + at_least_8);
    entry.pitch = entry.is_run ? int(positions) : odd_pitch<Acc>(entry.channels_log2);
    const uint32_t of_tile = uint32_t(kTileValues<Acc>) >> entry.channels_log2;
    entry.position_tiles = Divisor((entry.positions + of_tile - 1) / of_tile);
    entry.channel_tiles = Divisor((task.channels + (1u << entry.channels_log2) - 1) >> entry.channels_log2);
    return uint64_t(task.batch) * entry.position_tiles.divisor * entry.channel_tiles.divisor;
}

template <class Acc>
size_t prepare_shared_bytes(const PrepareEntry& entry) {
    return tile_bytes<Acc>(entry.channels_log2, entry.pitch) * (entry.task.saved ? 2 : 1) +
           (entry.is_direct ? 0 : table_bytes<Acc>(entry.channels_log2));
}

}  // namespace
}  // namespace wa::cuda

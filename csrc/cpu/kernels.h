// The CPU kernels' interface. Each instruction set has its own copy, in a namespace named after it (WA_ISA).
#pragma once

#include <algorithm>
#include <cstddef>

#include "../common/padding.h"

namespace wa::cpu {

// Filters [first, last) of one task of the list. scratch: `scratch_bytes(task)`, for transposed filters. is_streamed:
// whether results are written past the caches, where they fill whole lines.
using AlignFilters = void (*)(const AlignList& list, const AlignTask& task, uint32_t first, uint32_t last,
                              void* scratch, bool is_streamed);
inline size_t scratch_bytes(const AlignTask& task) {
    return task.transposed_columns ? size_t(task.n) * sizeof(double) : 0;
}

// A tile is some channels of adjacent positions in one row of an image. If rows are contiguous on both sides it is a
// piece of a row, so that memory is walked in order; else it is long in the innermost dimension, and square if source
// and destination differ in that.
constexpr uint32_t kTileValues = 4096;
struct Tiling {
    bool by_rows;
    uint32_t channels, width;  // of a tile, at most
    uint32_t channel_tiles, width_tiles;

    explicit Tiling(const PrepareTask& task) {
        const bool from = is_by_channels(task.from_side, task), to = is_by_channels(task.to_side, task);
        const uint32_t w = task.to_size[2], unit = from ? task.channels : 1;
        auto has_rows = [&](const ImageSide& side) {
            return side.spatial[2] == unit || (w == 1 && task.before[2] + task.after[2] == 0);
        };
        by_rows = from == to && unit <= kTileValues && has_rows(task.from_side) && has_rows(task.to_side);
        if (by_rows) channels = unit;
        else if (!from && !to) channels = std::min(task.channels, kTileValues / std::min(w, kTileValues));
        else channels = std::min(task.channels, from && to ? kTileValues : 64);
        width = std::min(w, kTileValues / channels);
        channel_tiles = (task.channels + channels - 1) / channels;
        width_tiles = (w + width - 1) / width;
    }
    int64_t tiles(const PrepareTask& task) const {
        return int64_t(task.batch) * channel_tiles * task.to_size[0] * task.to_size[1] * width_tiles;
    }
};

// Tiles [first, last) of a convolution's input.
using PrepareTiles = void (*)(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last);

struct Kernels {
    AlignFilters align_forward, align_backward;
    PrepareTiles prepare_forward, prepare_backward;
    PrepareTiles prepare_forward_double, prepare_backward_double;
};

#define WA_DECLARE(isa)                                                                                     \
    namespace isa {                                                                                         \
    void align_forward(const AlignList&, const AlignTask&, uint32_t, uint32_t, void*, bool);                \
    void align_backward(const AlignList&, const AlignTask&, uint32_t, uint32_t, void*, bool);               \
    template <class Acc>                                                                                    \
    void prepare_forward(const PrepareTask&, const Tiling&, int64_t first, int64_t last);                   \
    template <class Acc>                                                                                    \
    void prepare_backward(const PrepareTask&, const Tiling&, int64_t first, int64_t last);                  \
    constexpr Kernels kKernels{align_forward,           align_backward,          prepare_forward<float>,    \
                               prepare_backward<float>, prepare_forward<double>, prepare_backward<double>}; \
    }
WA_DECLARE(baseline)
WA_DECLARE(avx2)    // x86-64-v3
WA_DECLARE(avx512)  // x86-64-v4
#undef WA_DECLARE

}  // namespace wa::cpu

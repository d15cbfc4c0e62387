// The index map of padding, shared by all kernels: which input value a padded position shows, and the inverse.
#pragma once

#include "prepare_task.h"

namespace wa {
namespace {  // compiled once per instruction set: the linker must not merge the copies

// The index of the value shown at `at`, in a dimension of `size` values, or -1 for zero. Positions below 0, or from
// `size` on, are padding.
WA_ANYWHERE inline int shown_value(PaddingMode mode, int at, int size) {
    if (at >= 0 && at < size) return at;
    switch (mode) {
        case PaddingMode::kReflect: return at < 0 ? -at : 2 * (size - 1) - at;
        case PaddingMode::kReplicate: return at < 0 ? 0 : size - 1;
        case PaddingMode::kCircular: return at < 0 ? at + size : at - size;
        default: return -1;
    }
}

// The positions of one dimension that show value `at`: its own, then those in the padding before, then those after,
// each a contiguous range. Numbered, so that a caller visits them in one loop, with one copy of its code.
struct Places {
    int at, before, first_before, after, first_after;

    WA_ANYWHERE Places(PaddingMode mode, int at, int size, int before, int after) : at(at), before(0), after(0) {
        first_before = first_after = 0;
        if (mode == PaddingMode::kReflect) {
            first_before = -at;
            this->before = at > 0 && at <= before;
            first_after = 2 * (size - 1) - at;
            this->after = at < size - 1 && first_after < size + after;
        } else if (mode == PaddingMode::kReplicate) {
            first_before = -before;
            this->before = at == 0 ? before : 0;
            first_after = size;
            this->after = at == size - 1 ? after : 0;
        } else if (mode == PaddingMode::kCircular) {
            first_before = at - size;
            this->before = first_before >= -before;
            first_after = at + size;
            this->after = at < after;
        }
    }
    WA_ANYWHERE int count() const { return 1 + before + after; }
    WA_ANYWHERE int operator[](int i) const {
        return i == 0 ? at : i <= before ? first_before + i - 1 : first_after + i - 1 - before;
    }
};

// Whether channels are the innermost dimension in memory, else positions.
WA_ANYWHERE inline bool is_by_channels(const ImageSide& side, const PrepareTask& task) {
    return side.channel == 1 && task.channels > 1;
}

struct Coordinates {
    int at[kSpatial];
};

WA_ANYWHERE inline Coordinates coordinates_of(uint32_t position, uint32_t height, uint32_t width) {
    uint32_t row = position / width;
    return {{int(row / height), int(row % height), int(position % width)}};
}

// Forward: the offset in an image of `from` of the value that this position of `to` shows, or -1 for zero.
WA_ANYWHERE inline int64_t source_of(const PrepareTask& task, const Coordinates& to) {
    int64_t offset = 0;
    for (int d = 0; d < kSpatial; ++d) {
        int value = shown_value(task.mode, to.at[d] - int(task.before[d]), int(task.size[d]));
        if (value < 0) return -1;
        offset += value * task.from_side.spatial[d];
    }
    return offset;
}

WA_ANYWHERE inline Places places_of(const PrepareTask& task, const Coordinates& to, int d) {
    return {task.mode, to.at[d], int(task.size[d]), int(task.before[d]), int(task.after[d])};
}

// Backward: each(offset in an image of `from`) for all positions that show this value, its own first.
template <class Each>
WA_ANYWHERE void for_each_source(const PrepareTask& task, const Coordinates& to, const Each& each) {
    const Places depths = places_of(task, to, 0), rows = places_of(task, to, 1), columns = places_of(task, to, 2);
    const int64_t* strides = task.from_side.spatial;
    for (int i = 0; i < depths.count(); ++i)
        for (int j = 0; j < rows.count(); ++j)
            for (int k = 0; k < columns.count(); ++k)
                each((depths[i] + int(task.before[0])) * strides[0] + (rows[j] + int(task.before[1])) * strides[1] +
                     (columns[k] + int(task.before[2])) * strides[2]);
}

// The first of them: the value's own position.
WA_ANYWHERE inline int64_t own_source(const PrepareTask& task, const Coordinates& to) {
    int64_t offset = 0;
    for (int d = 0; d < kSpatial; ++d) offset += int64_t(to.at[d] + task.before[d]) * task.from_side.spatial[d];
    return offset;
}

// Whether padding shows the value again.
WA_ANYWHERE inline bool is_shown_twice(const PrepareTask& task, const Coordinates& to) {
    return places_of(task, to, 0).count() * places_of(task, to, 1).count() * places_of(task, to, 2).count() > 1;
}

}  // namespace
}  // namespace wa

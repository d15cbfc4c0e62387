// Which value of a convolution's input a place of the padded one shows, and back: for all kernels.
#pragma once

#include "prepare_task.h"

namespace wa {
namespace {  // compiled for several instruction sets: nothing here may be shared between their objects

// Along one dimension of `size` values, place `at` (negative, or `size` and more, in the padding): the value it shows,
// or -1 for a zero.
WA_ANYWHERE inline int shown_value(PaddingMode mode, int at, int size) {
    if (at >= 0 && at < size) return at;
    switch (mode) {
        case PaddingMode::kReflect: return at < 0 ? -at : 2 * (size - 1) - at;
        case PaddingMode::kReplicate: return at < 0 ? 0 : size - 1;
        case PaddingMode::kCircular: return at < 0 ? at + size : at - size;
        default: return -1;
    }
}

// each(place) for the places of one dimension that show value `at`: its own first, then those in the padding.
template <class Each>
WA_ANYWHERE void for_each_place(PaddingMode mode, int at, int size, int before, int after, const Each& each) {
    each(at);
    switch (mode) {
        case PaddingMode::kReflect: {
            if (at > 0 && at <= before) each(-at);
            int mirrored = 2 * (size - 1) - at;
            if (at < size - 1 && mirrored < size + after) each(mirrored);
            break;
        }
        case PaddingMode::kReplicate:
            if (at == 0)
                for (int place = -before; place < 0; ++place) each(place);
            if (at == size - 1)
                for (int place = size; place < size + after; ++place) each(place);
            break;
        case PaddingMode::kCircular:
            if (at - size >= -before) each(at - size);
            if (at < after) each(at + size);
            break;
        default: break;
    }
}

struct Coordinates {
    int at[kSpatial];
};

WA_ANYWHERE inline Coordinates coordinates_of(uint32_t position, uint32_t height, uint32_t width) {
    uint32_t row = position / width;
    return {{int(row / height), int(row % height), int(position % width)}};
}

// Forward: where in an image of `from` the value of this place of `to` lies; -1: it is a zero.
WA_ANYWHERE inline int64_t source_of(const PrepareTask& task, const Coordinates& to) {
    int64_t offset = 0;
    for (int d = 0; d < kSpatial; ++d) {
        int value = shown_value(task.mode, to.at[d] - int(task.before[d]), int(task.size[d]));
        if (value < 0) return -1;
        offset += value * task.from_side.spatial[d];
    }
    return offset;
}

// Backward: each(offset in an image of `from`) for all places that show this value, its own first.
template <class Each>
WA_ANYWHERE void for_each_source(const PrepareTask& task, const Coordinates& to, const Each& each) {
    auto along = [&](int d, const auto& then) {
        for_each_place(task.mode, to.at[d], int(task.size[d]), int(task.before[d]), int(task.after[d]), [&](int place) {
            then((place + int(task.before[d])) * task.from_side.spatial[d]);
        });
    };
    along(0, [&](int64_t depth) {
        along(1, [&](int64_t row) { along(2, [&](int64_t column) { each(depth + row + column); }); });
    });
}

// The first of them: the value's own place.
WA_ANYWHERE inline int64_t own_source(const PrepareTask& task, const Coordinates& to) {
    int64_t offset = 0;
    for (int d = 0; d < kSpatial; ++d) offset += int64_t(to.at[d] + task.before[d]) * task.from_side.spatial[d];
    return offset;
}

// Whether the value is shown in the padding too.
WA_ANYWHERE inline bool is_shown_twice(const PrepareTask& task, const Coordinates& to) {
    if (task.mode == PaddingMode::kZeros) return false;
    int places = 0;
    for (int d = 0; d < kSpatial; ++d)
        for_each_place(task.mode, to.at[d], int(task.size[d]), int(task.before[d]), int(task.after[d]),
                       [&](int) { ++places; });
    return places > kSpatial;
}

}  // namespace
}  // namespace wa

// Tiles that are a piece of one row on both sides (`Tiling::by_rows`): neither transposed nor strided, perhaps cast and
// padded. float32 goes from memory to memory in one loop, other dtypes through the L1 cache. A column is one value, or
// all channels of a position.
#pragma once

#include <vector>

#include "tile_place.h"

namespace wa::cpu {
namespace {

// n values from `at` on: in place if they have the accumulation type, else converted into `buffer`.
template <class Acc>
const Acc* values_at(const void* tensor, DType dtype, int64_t at, uint32_t n, Acc* buffer) {
    const Acc* values = buffer;
    with_type<Acc>(tensor, dtype, [&](auto* typed) WA_LAMBDA {
        if constexpr (std::is_same_v<decltype(typed), const Acc*>) values = typed + at;
        else copy_run<Acc>(typed + at, 1, buffer, 1, n);
    });
    return values;
}

template <class Acc>
struct ForwardRow {
    const PrepareTask& task;
    const int64_t unit;  // values per column
    alignas(64) Acc buffer[kTileValues];

    ForwardRow(const PrepareTask& task, const Tiling& tiling) : task(task), unit(tiling.channels) {}

    void run(const TilePlace& tile) {
        with_type<Acc>(task.to, task.to_side.dtype, [&](auto* to) WA_LAMBDA { run(tile, to + tile.to); });
    }

private:
    template <class To>
    void run(const TilePlace& tile, To* to) {
        const int begin = tile.first.at[2], end = begin + int(tile.width);
        const int before = int(task.before[2]), size = int(task.size[2]);
        int64_t from = tile.from;
        for (int d = 0; d < 2; ++d) {
            int value = shown_value(task.mode, tile.first.at[d] - int(task.before[d]), int(task.size[d]));
            if (value < 0) return clear(to, tile.width);
            from += value * task.from_side.spatial[d];
        }
        // Columns [low, high) show the input's columns, the others are padding.
        const int low = std::clamp(before, begin, end), high = std::clamp(before + size, begin, end);
        auto at = [&](int column) { return to + (column - begin) * unit; };
        convert(from + (low - before) * unit, at(low), high - low);
        if (task.mode == PaddingMode::kZeros) {
            clear(at(begin), low - begin);
            return clear(at(high), end - high);
        }
        auto pad = [&](int column) {
            int shown = shown_value(task.mode, column - before, size);
            if (low <= shown + before && shown + before < high) std::copy_n(at(shown + before), unit, at(column));
            else convert(from + shown * unit, at(column), 1);
        };
        for (int column = begin; column < low; ++column) pad(column);
        for (int column = high; column < end; ++column) pad(column);
    }

    template <class To>
    void clear(To* to, int columns) const {
        std::memset(static_cast<void*>(to), 0, columns * unit * sizeof(To));
    }
    template <class To>
    void convert(int64_t from, To* to, int columns) {
        const auto n = uint32_t(columns * unit);
        const Acc* x = values_at(task.from, task.from_side.dtype, from, n, buffer);
        if constexpr (std::is_same_v<To, Acc>) {
            activate(task.activation, x, to, n);
        } else {
            if (task.activation != 0) {
                activate(task.activation, x, buffer, n);
                x = buffer;
            }
            copy_run<Acc>(x, 1, to, 1, n);
        }
    }
};

template <class Acc>
struct BackwardRow {
    const PrepareTask& task;
    const int64_t unit;
    struct Copy {
        int column, place;
    };
    std::vector<Copy> copies;  // columns that padding repeats, and where
    alignas(64) Acc sum[kTileValues];
    alignas(64) Acc other[kTileValues];

    BackwardRow(const PrepareTask& task, const Tiling& tiling) : task(task), unit(tiling.channels) {
        if (task.mode == PaddingMode::kZeros) return;
        for (int column = 0; column < int(task.to_size[2]); ++column) {
            const Places places = places_of(task, {{0, 0, column}}, 2);
            for (int i = 1; i < places.count(); ++i) copies.push_back({column, places[i]});
        }
    }

    void run(const TilePlace& tile) {
        const auto n = uint32_t(tile.width * unit);
        const Acc* grad = sum_of_places(tile, n);
        const Acc* x = nullptr;
        if (task.saved && task.saved_is_result)
            x = values_at(task.saved, task.from_side.dtype, tile.from + own_source(task, tile.first), n, other);
        else if (task.saved) x = values_at(task.saved, task.to_side.dtype, tile.to, n, other);
        with_type<Acc>(task.to, task.to_side.dtype, [&](auto* to) WA_LAMBDA {
            if constexpr (std::is_same_v<decltype(to), Acc*>) {
                differentiate(task.activation, x, grad, to + tile.to, n);
            } else {
                if (x) differentiate(task.activation, x, grad, sum, n);
                copy_run<Acc>(x ? sum : grad, 1, to + tile.to, 1, n);
            }
        });
    }

private:
    const Acc* sum_of_places(const TilePlace& tile, uint32_t n) {
        const Places depths = places_of(task, tile.first, 0), rows = places_of(task, tile.first, 1);
        const int64_t* strides = task.from_side.spatial;
        const int begin = tile.first.at[2], end = begin + int(tile.width);
        const bool is_alone = depths.count() * rows.count() == 1 && copies.empty();
        for (int i = 0; i < depths.count(); ++i)
            for (int j = 0; j < rows.count(); ++j) {
                const int64_t row = tile.from + (depths[i] + int(task.before[0])) * strides[0] +
                                    (rows[j] + int(task.before[1])) * strides[1];
                auto at = [&](int column) { return row + (column + int(task.before[2])) * unit; };
                const bool is_own = i + j == 0;
                const Acc* values = values_at(task.from, task.from_side.dtype, at(begin), n, is_own ? sum : other);
                if (is_alone) return values;
                if (!is_own) add(values, sum, n);
                else if (values != sum) std::copy_n(values, n, sum);
                for (const Copy& copy : copies)
                    if (begin <= copy.column && copy.column < end)
                        add(values_at(task.from, task.from_side.dtype, at(copy.place), uint32_t(unit), other),
                            sum + (copy.column - begin) * unit, uint32_t(unit));
            }
        return sum;
    }
};

}  // namespace
}  // namespace wa::cpu

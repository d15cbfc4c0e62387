// Prepares a convolution's input tile by tile: activation, cast, layout, padding; and the backward. Each value is read
// from memory once and written once; the backward of a value that padding repeats gathers from each position that shows
// it. Compiled once per instruction set.
#include "prepare_rows.h"
#include "prepare_tiles.h"

namespace wa::cpu {
namespace {

template <class Row>
void run_rows(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last) {
    Row row(task, tiling);
    TilePlace place(task, tiling, first);
    for (int64_t index = first; index < last; ++index, place.advance()) row.run(place);
}

}  // namespace

namespace WA_ISA {

template <class Acc>
void prepare_forward(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last) {
    if (tiling.by_rows) return run_rows<ForwardRow<Acc>>(task, tiling, first, last);
    Tile<Acc> tile(task, tiling, first);
    for (int64_t index = first; index < last; ++index, tile.advance()) tile.forward();
}
template <class Acc>
void prepare_backward(const PrepareTask& task, const Tiling& tiling, int64_t first, int64_t last) {
    if (tiling.by_rows) return run_rows<BackwardRow<Acc>>(task, tiling, first, last);
    Tile<Acc> tile(task, tiling, first);
    for (int64_t index = first; index < last; ++index, tile.advance()) tile.backward();
}

template void prepare_forward<float>(const PrepareTask&, const Tiling&, int64_t, int64_t);
template void prepare_forward<double>(const PrepareTask&, const Tiling&, int64_t, int64_t);
template void prepare_backward<float>(const PrepareTask&, const Tiling&, int64_t, int64_t);
template void prepare_backward<double>(const PrepareTask&, const Tiling&, int64_t, int64_t);

}  // namespace WA_ISA
}  // namespace wa::cpu

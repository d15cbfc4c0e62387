// The CPU kernels' interface: one table of functions for each instruction set that align_kernels.cpp is compiled for.
#pragma once

#include <cstddef>

#include "../common/align_task.h"

namespace wa::cpu {

// Filters [first, last) of one task of the list. scratch: `scratch_bytes(task)`, for transposed filters.
using AlignFilters = void (*)(const AlignList& list, const AlignTask& task, uint32_t first, uint32_t last,
                              void* scratch);
struct AlignKernels {
    AlignFilters forward, backward;
};

inline size_t scratch_bytes(const AlignTask& task) { return task.columns ? size_t(task.n) * sizeof(double) : 0; }

extern const AlignKernels kAlignBaseline;
extern const AlignKernels kAlignAvx2;    // x86-64-v3
extern const AlignKernels kAlignAvx512;  // x86-64-v4

}  // namespace wa::cpu

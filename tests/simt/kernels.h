// Test-only. What is emulated, as the bindings see it: neither CUDA headers nor torch.
#pragma once
#include "../../csrc/common/prepare_task.h"

#pragma GCC visibility push(default)

namespace wa {
void align_forward(const AlignList& list);
void align_backward(const AlignList& list);
}  // namespace wa

// The emulator's own kernels (selftest.cpp); false: no such name.
bool selftest(const char* name, const void* in, void* out);
void selftest_transpose(const void* in, void* out, int rows, int columns);

#pragma GCC visibility pop

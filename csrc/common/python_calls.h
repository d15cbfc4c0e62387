// The align ops as functions that Python calls without torch's dispatcher.
#pragma once

#include "align_host.h"

namespace wa {

// The backend of the functions for tensors of this device type.
void serve_python_calls(int32_t device_type, const AlignBackend& forward, const AlignBackend& backward);

}  // namespace wa

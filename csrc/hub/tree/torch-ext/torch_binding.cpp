// Makes the library a Python module, so that importing it registers the ops (csrc/common/register_ops.h).
#include "registration.h"  // kernel-builder's

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

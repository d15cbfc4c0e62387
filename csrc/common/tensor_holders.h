// Who else holds a tensor: whether anybody could see that its memory is written over.
#pragma once

#include "python_tensors.h"

namespace wa {

// How many references there are to a tensor, in Python and in torch; then `storage_state`.
Owned holders_of(PyObject* tensor);

// How many references there are to a tensor's storage, in Python and in torch; whether the memory is not torch's own,
// as NumPy's, whether other processes see it, and whether it is not the tensor's whole memory.
Owned storage_state(PyObject* tensor);

// Whether no number is higher than that of another tensor's `holders_of`.
bool has_no_more_holders(PyObject* tensor, PyObject* holders);

}  // namespace wa

// Sizes and strides: which memory order a tensor has, and new tensors of a given order.
//
// Strides are passed as pointers to as many numbers as the tensor has dimensions; a tensor's own live as long as it
// does.
#pragma once

#include "abi.h"

namespace wa {

using Strides = std::vector<int64_t>;

inline const int64_t* strides_of(const Tensor& t) { return t.strides().data(); }

// Row-major strides of a shape whose dimensions lie in memory in this order, outermost first.
Strides strides_in(const std::vector<int64_t>& sizes, const std::vector<int>& order);

// That order for channels_last and channels_last_3d, where the rank is theirs, else 0, 1, 2, ...
std::vector<int> order_of(MemoryFormat memory_format, int64_t rank);

std::vector<int64_t> sizes_of(const Tensor& t);
Strides contiguous_strides(const Tensor& t);

// Whether the elements fill one block of memory, each once, in any order of the dimensions.
bool is_dense(const Tensor& t);

// Whether dimension 0 is outermost in memory, so that each filter is one run of n values. Asks for a dense tensor.
bool has_contiguous_filters(const Tensor& t);

// The strides a result takes: those of `memory_format` (ranks it does not name keep theirs), else the tensor's own if
// it is dense, else contiguous ones, which a tensor without elements always takes. `storage` holds them if they are not
// the tensor's own.
const int64_t* result_strides(const Tensor& t, MemoryFormat memory_format, Strides& storage);

// Whether two strides put the elements of this shape in the same order (strides of dimensions of size 1 say nothing).
bool same_order(const Tensor& shape, const int64_t* a, const int64_t* b);

// If going from one order to the other transposes each filter as one matrix: the columns of that matrix in the order
// `from`. Else 0. (Contiguous to channels_last: the kernel size; back: the channels.)
int64_t transposed_columns(const Tensor& shape, const int64_t* from, const int64_t* to);

// The CPU has index -1, and a list of tensors comes to one backend's op: the index says all.
inline bool on_same_device(const Tensor& a, const Tensor& b) { return a.get_device_index() == b.get_device_index(); }

// An uninitialised tensor on the device of `like`.
Tensor empty_strided(const Tensor& like, int64_t rank, const int64_t* sizes, const int64_t* strides, ScalarType dtype);

// The tensor itself if its elements already lie in this order, else a copy that does.
Tensor in_order(const Tensor& t, const int64_t* strides);

}  // namespace wa

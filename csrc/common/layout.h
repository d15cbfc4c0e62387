// Sizes and strides: the memory order of a tensor, and new tensors in a given order.
//
// Strides are passed as pointers to one number per dimension; a tensor's own stay valid as long as it lives.
#pragma once

#include "abi.h"

namespace wa {

using Strides = std::vector<int64_t>;

inline const int64_t* strides_of(const Tensor& t) { return t.strides().data(); }

// Strides of a dense tensor whose dimensions have this order in memory, outermost first.
Strides strides_in(const std::vector<int64_t>& sizes, const std::vector<int>& order);

// The order of channels_last and channels_last_3d where they match the rank, else 0, 1, 2, ...
std::vector<int> order_of(MemoryFormat memory_format, int64_t rank);

std::vector<int64_t> sizes_of(const Tensor& t);
Strides contiguous_strides(const Tensor& t);

// Throws if a tensor's memory ends before its elements do: a storage can be resized, and FSDP's are freed that way.
void check_memory(const char* name, const Tensor& t);

// Whether the tensor is non-overlapping and dense, in any order of its dimensions.
bool is_dense(const Tensor& t);

// Whether dimension 0 is outermost in memory, so that each filter is one run of n values. Expects a dense tensor.
bool has_contiguous_filters(const Tensor& t);

// The strides of a result: those of `memory_format` if it defines them for this rank, else the tensor's own if it is
// dense, else contiguous ones; for an empty tensor always contiguous ones. `storage` holds them unless they are the
// tensor's own.
const int64_t* result_strides(const Tensor& t, MemoryFormat memory_format, Strides& storage);

// Whether two strides put the elements of this shape in the same order (strides of dimensions of size 1 do not matter).
bool same_order(const Tensor& shape, const int64_t* a, const int64_t* b);

// If going from one order to the other transposes each filter as a matrix: the number of its columns in the order
// `from`. Else 0. (Contiguous to channels_last: the kernel size; back: the channels.)
int64_t transposed_columns(const Tensor& shape, const int64_t* from, const int64_t* to);

// Comparing indices is enough: the CPU's is -1, and all tensors of a call go to one backend's op.
inline bool on_same_device(const Tensor& a, const Tensor& b) { return a.get_device_index() == b.get_device_index(); }

// An uninitialised tensor on the device of `like`.
Tensor empty_strided(const Tensor& like, int64_t rank, const int64_t* sizes, const int64_t* strides, ScalarType dtype);

// A new tensor in the memory of another, this many elements behind its first.
Tensor in_memory_of(const Tensor& t, int64_t rank, const int64_t* sizes, const int64_t* strides, int64_t offset);

// The tensor itself if its elements are already in this order, else a copy that is.
Tensor in_order(const Tensor& t, const int64_t* strides);

}  // namespace wa

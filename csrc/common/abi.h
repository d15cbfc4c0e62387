// All of libtorch that is used here: its stable C++ API, with a TORCH_BOX that checks argument types.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace wa {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace detail {

template <class T>
struct is_boxable : std::bool_constant<std::is_same_v<T, double> || std::is_same_v<T, int64_t> ||
                                       std::is_same_v<T, bool> || std::is_same_v<T, Tensor> ||
                                       std::is_same_v<T, ScalarType> || std::is_same_v<T, MemoryFormat>> {};
template <class T>
struct is_boxable<std::vector<T>> : is_boxable<T> {};
template <class T>
struct is_boxable<std::optional<T>> : is_boxable<T> {};

template <class F>
struct boxable;
template <class R, class... A>
struct boxable<R (*)(A...)> : std::conjunction<is_boxable<std::decay_t<A>>...> {};

}  // namespace detail
}  // namespace wa

// TORCH_BOX checks the number of arguments but not their types: a `float` parameter would receive the lower half of a
// double. WA_BOX accepts only types of the schema language.
#define WA_BOX(function)                                                                                          \
    []() {                                                                                                        \
        static_assert(wa::detail::boxable<decltype(&function)>::value, "not a schema type: use double, int64_t"); \
        return TORCH_BOX(&function);                                                                              \
    }()

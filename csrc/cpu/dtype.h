// Dispatch from a tensor's dtype to a C++ type.
#pragma once

#include <type_traits>

#include "../common/align_task.h"
#include "simd.h"

namespace wa::cpu {
namespace {

// run(typed pointer). The host ensures that float64 is not mixed with other dtypes.
template <class Acc, class Void, class Run>
WA_INLINE void with_type(Void* tensor, DType dtype, const Run& run) {
    auto as = [&](auto* type) WA_LAMBDA {
        using T = std::remove_pointer_t<decltype(type)>;
        run(static_cast<std::conditional_t<std::is_const_v<Void>, const T, T>*>(tensor));
    };
    if constexpr (sizeof(Acc) == 8) {
        as(static_cast<double*>(nullptr));
    } else {
        switch (dtype) {
            case DType::kFloat16: return as(static_cast<Half*>(nullptr));
            case DType::kBFloat16: return as(static_cast<BFloat16*>(nullptr));
            default: return as(static_cast<float*>(nullptr));
        }
    }
}

}  // namespace
}  // namespace wa::cpu

// Test-only. Other tensors for CUDA tensors: on the CPU, on the same memory; and meta ones, with shapes alone.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>

namespace simcuda {

// A CPU tensor on the whole of the CUDA tensor's storage, which it does not own: only the stream's order says that the
// memory is still there when work gets to it, as on a device.
at::Tensor on_cpu(const at::Tensor& t);

// A meta tensor of its sizes, strides and dtype.
at::Tensor on_meta(const at::Tensor& t);

// The value with every tensor in it replaced by change(tensor).
template <class Change>
c10::IValue with_tensors(const c10::IValue& value, const Change& change) {
    if (value.isTensor()) return change(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& t : value.toTensorVector()) list.push_back(change(t));
        return list;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> list;
        for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
            list.push_back(t ? std::optional<at::Tensor>(change(*t)) : t);
        return list;
    }
    return value;
}

}  // namespace simcuda

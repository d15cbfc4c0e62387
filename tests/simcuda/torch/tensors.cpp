#include "tensors.h"

namespace simcuda {

static at::Tensor alike(const at::Tensor& t, void* data, c10::DeviceType device, c10::DispatchKey key) {
    c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), at::DataPtr(data, device),
                         c10::GetAllocator(device), true);
    auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), t.dtype());
    c10::TensorImpl* impl = result.unsafeGetTensorImpl();
    impl->set_storage_offset(t.storage_offset());
    impl->set_sizes_and_strides(t.sizes(), t.strides());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    result._set_conj(t.is_conj());
    result._set_neg(t.is_neg());
    return result;
}

at::Tensor on_cpu(const at::Tensor& t) {
    return alike(t, t.storage().mutable_data(), c10::kCPU, c10::DispatchKey::CPU);
}

at::Tensor on_meta(const at::Tensor& t) { return alike(t, nullptr, c10::kMeta, c10::DispatchKey::Meta); }

}  // namespace simcuda

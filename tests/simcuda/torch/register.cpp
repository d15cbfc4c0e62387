// Loaded into a process, this takes the place of all aten kernels of the CUDA dispatch key that have a CPU counterpart,
// except those that launch nothing (allocation, views, item()). What autograd, autocast, the allocator, streams and
// graphs do is PyTorch's own.
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty_native.h>
#include <ATen/ops/empty_strided_native.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <memory>
#include <set>

#include "../runtime/simcuda.h"
#include "call.h"
#include "tensors.h"

namespace {

using at::Tensor;

// What launches nothing, or only copies.
const std::set<std::string> kKept = {"aten::empty",
                                     "aten::empty_strided",
                                     "aten::resize_",
                                     "aten::set_",
                                     "aten::copy_",
                                     "aten::_local_scalar_dense",
                                     "aten::record_stream",
                                     "aten::is_pinned",
                                     "aten::_pin_memory",
                                     "aten::_fused_sdp_choice",
                                     "aten::_efficientzerotensor"};

bool is_view(const c10::FunctionSchema& schema) {
    for (const auto& result : schema.returns())
        if (result.alias_info() && !result.alias_info()->isWrite()) return true;
    return false;
}

// PyTorch's own copies are memcpys, or come down to them, unless they change dtype or strides within a device.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
    bool lie_alike = self.sizes() == source.sizes() && self.strides() == source.strides();
    bool is_plain = lie_alike && self.dtype() == source.dtype() && self.is_non_overlapping_and_dense() &&
                    self.is_conj() == source.is_conj() && self.is_neg() == source.is_neg();
    if (self.device() != source.device() || is_plain) return at::native::copy_(self, source, non_blocking);
    static const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    torch::jit::Stack stack{self, source, non_blocking};
    simcuda::launch_on_cpu(op, &stack);
    return self;
}

// New memory is NaN, as soon as its stream gets there: it may hold old numbers, which may be the right ones.
Tensor poisoned(const Tensor& t) {
    if (t.numel() == 0) return t;
    c10::cuda::CUDAGuard guard(t.device());
    cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    if (simcuda::is_capturing(stream)) return t;
    cudaMemsetAsync(t.storage().mutable_data(), 0xff, t.storage().nbytes(), stream);
    return t;
}
Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<at::Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
    return poisoned(at::native::empty_cuda(size, dtype, layout, device, pin, format));
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout> layout, std::optional<at::Device> device, std::optional<bool> pin) {
    return poisoned(at::native::empty_strided_cuda(size, stride, dtype, layout, device, pin));
}

struct NoWarnings : c10::WarningHandler {  // PyTorch warns of each kernel that is replaced
    void process(const c10::Warning&) override {}
};

[[maybe_unused]] const bool registered = [] {
    NoWarnings handler;
    c10::WarningUtils::WarningHandlerGuard quiet(&handler);
    auto& dispatcher = c10::Dispatcher::singleton();
    static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    auto names = dispatcher.getRegistrationsForDispatchKey(c10::DispatchKey::CUDA);
    names.emplace_back("aten::convolution", "");  // has no kernel of its own at this key, but would come to cuDNN's
    for (const c10::OperatorName& name : names) {
        if (name.getNamespace() != "aten" || kKept.count(name.name)) continue;
        auto op = dispatcher.findSchema(name);
        if (!op || !op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU) || is_view(op->schema())) continue;
        library.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&simcuda::launch_on_cpu>());
    }
    library.impl("copy_", TORCH_FN(copy_));
    library.impl("empty.memory_format", TORCH_FN(empty));
    library.impl("empty_strided", TORCH_FN(empty_strided));
    return true;
}();

}  // namespace

// For kernels that run in Python (simtriton.py).
TORCH_LIBRARY(simcuda, library) {
    static thread_local std::vector<std::unique_ptr<simcuda::Access>> open;
    library.def("on_cpu(Tensor t) -> Tensor", [](const Tensor& t) { return t.is_cuda() ? simcuda::on_cpu(t) : t; });
    library.def("drain(int stream) -> ()",
                [](int64_t stream) { simcuda::drain(reinterpret_cast<cudaStream_t>(stream)); });
    library.def("open_memory() -> ()", [] { open.push_back(std::make_unique<simcuda::Access>(-1)); });
    library.def("close_memory() -> ()", [] { open.pop_back(); });
}

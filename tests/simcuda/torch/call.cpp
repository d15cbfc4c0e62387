// An operation's shapes come from its Meta kernel, at once, as a device's would from the host's code; its values come
// from its CPU kernel when the stream gets to it. What has no Meta kernel, or a result whose shape depends on values,
// waits for the stream and runs at once.
#include "call.h"

#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/native/cuda/Resize.h>
#include <ATen/ops/copy_native.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>
#include <set>

#include "../runtime/simcuda.h"
#include "tensors.h"

extern "C" void omp_set_num_threads(int);

namespace simcuda {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::IValue;
using torch::jit::Stack;
using Places = std::vector<std::vector<Tensor>>;  // of each result: where its tensors' values go

// Operations whose tensors may be on the CPU though others are not. (Those without dimensions always may.)
const std::set<std::string> kMixed = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_",       "aten::_index_put_impl_",
    "aten::copy_",        "aten::_foreach_copy_",   "aten::embedding_renorm_"};

// Without autograd, autocast, transforms and modes, whatever the thread is doing that runs the work.
struct KernelsOnly {
    c10::impl::ForceDispatchKeyGuard keys{
        c10::DispatchKeySet(DispatchKey::BackendSelect),
        c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
            c10::DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::PreDispatch,
                                 DispatchKey::FuncTorchDynamicLayerFrontMode,
                                 DispatchKey::FuncTorchDynamicLayerBackMode})};
    const at::impl::TorchFunctionDisabledState before = at::impl::PythonTorchFunctionTLS::get_disabled_state();
    KernelsOnly() {
        at::impl::PythonTorchFunctionTLS::set_disabled_state(at::impl::TorchFunctionDisabledState::ALL_DISABLED);
    }
    ~KernelsOnly() { at::impl::PythonTorchFunctionTLS::set_disabled_state(before); }
};

// The bits of a sum depend on the number of threads, which differs between the threads that run work.
struct OneThread {
    const int before = at::get_num_threads();
    OneThread() { omp_set_num_threads(1); }
    ~OneThread() { omp_set_num_threads(before); }
};

bool lie_alike(const Tensor& a, const Tensor& b) {
    return a.sizes() == b.sizes() && a.strides() == b.strides() && a.storage_offset() == b.storage_offset();
}

// The new tensors among result i, which are not arguments.
template <class Visit>
void each_new(const c10::FunctionSchema& schema, size_t i, const IValue& result, const Visit& visit) {
    if (schema.returns()[i].alias_info()) return;
    auto each = [&](const Tensor& t) {
        if (t.defined() && t.layout() == at::kStrided) visit(t);
    };
    if (result.isTensorList())
        for (const Tensor& t : result.toTensorVector()) each(t);
    else if (result.isTensor()) each(result.toTensor());
}

// Gives an operation without a generator argument random numbers of this seed.
struct DefaultGenerator {
    at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
    Tensor state = generator.get_state();
    explicit DefaultGenerator(uint64_t seed) { generator.set_current_seed(seed); }
    ~DefaultGenerator() { generator.set_state(state); }
};

class Call {
public:
    Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), stack_(stack), schema_(op.schema()) {
        const size_t count = schema_.arguments().size();
        arguments_ = torch::jit::last(*stack, count).vec();
        torch::jit::drop(*stack, count);
        for (const IValue& argument : arguments_) inspect(argument);
        TORCH_INTERNAL_ASSERT(device_, op.operator_name(), ": no CUDA tensor");
        const bool has_cpu = has_cpu_ && !kMixed.count(c10::toString(op.operator_name()));
        TORCH_CHECK(!has_cpu, "Expected all tensors to be on the same device, but found at least two devices, ",
                    *device_, " and cpu! (", op.operator_name(), ", simulated)");
    }

    void run() {
        c10::cuda::CUDAGuard guard(*device_);
        stream_ = c10::cuda::getCurrentCUDAStream(device_->index());
        if (op_.hasTag(at::Tag::nondeterministic_seeded)) take_seed();
        const bool has_results = !schema_.returns().empty() && !schema_.returns()[0].alias_info();
        if (waits_for_values()) {
            c10::cuda::warn_or_error_on_sync();
            run_at_once();
        } else if (!has_results && !has_out()) {
            push_arguments();
            enqueue_with({});
        } else if (!has_meta()) run_at_once();
        else run_with_shapes();
    }

private:
    void inspect(const IValue& value) {
        if (value.isDevice() && value.toDevice().is_cuda()) set_device(value.toDevice());
        if (value.isGenerator()) generator_ = value.toGenerator();
        with_tensors(value, [&](const Tensor& t) {
            if (!t.defined()) return t;
            if (t.is_cuda()) set_device(t.device());
            else has_cpu_ = has_cpu_ || (t.is_cpu() && t.dim() > 0);
            has_mask_ = has_mask_ || t.scalar_type() == at::kBool || t.scalar_type() == at::kByte;
            return t;
        });
    }
    void set_device(c10::Device device) {
        if (!device.has_index()) device = {at::kCUDA, c10::cuda::current_device()};
        TORCH_CHECK(!device_ || *device_ == device,
                    "Expected all tensors to be on the same device, but found at least two devices, ", *device_,
                    " and ", device, "! (", op_.operator_name(), ", simulated)");
        device_ = device;
    }

    // Whether the kernel on a device would ask it for a number, or how large its result is.
    bool waits_for_values() const {
        if (op_.hasTag(at::Tag::data_dependent_output)) return true;
        const std::string& name = schema_.name();
        bool only_for_masks = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
        return only_for_masks ? has_mask_ : op_.hasTag(at::Tag::dynamic_output_shape);
    }
    bool has_out() const {
        for (const c10::Argument& argument : schema_.arguments())
            if (argument.is_out()) return true;
        return false;
    }
    bool has_meta() const {
        for (DispatchKey key :
             {DispatchKey::Meta, DispatchKey::CompositeExplicitAutograd, DispatchKey::CompositeImplicitAutograd,
              DispatchKey::CompositeExplicitAutogradNonFunctional})
            if (op_.hasKernelForDispatchKey(key)) return true;
        return false;
    }

    // The place of a CUDA generator, from where a CPU one starts.
    void take_seed() {
        at::Generator cuda = generator_ ? *generator_ : at::globalContext().defaultGenerator(*device_);
        uint64_t offset = cuda.get_offset();
        cuda.set_offset(offset + 4);
        seed_ = cuda.current_seed() * 0x9e3779b97f4a7c15u + offset;
    }

    // The arguments for a kernel of another device.
    template <class Change>
    Stack arguments_for(c10::Device device, const Change& change) const {
        Stack result;
        for (const IValue& value : arguments_) {
            if (value.isDevice()) result.emplace_back(device);
            else if (value.isGenerator()) result.emplace_back();
            else result.push_back(with_tensors(value, [&](const Tensor& t) { return t.defined() ? change(t) : t; }));
        }
        return result;
    }
    Stack arguments_on_cpu() const {
        KernelsOnly only;  // what is on the CPU may change after the call
        return arguments_for(at::kCPU, [](const Tensor& t) { return t.is_cuda() ? on_cpu(t) : t.clone(); });
    }

    // Runs the CPU kernel. What it writes is on the device; its new results are left in `stack`.
    static void run_kernel(const c10::OperatorHandle& op, Stack& stack, std::optional<uint64_t> seed) {
        KernelsOnly only;
        OneThread alone;
        std::optional<DefaultGenerator> seeded;
        if (seed) seeded.emplace(*seed);
        op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), &stack);
    }

    void run_with_shapes() {
        // (A number in a tensor stays: some Meta kernels ask for its value.)
        auto shape = [](const Tensor& t) { return t.is_cpu() && t.dim() == 0 ? t : on_meta(t); };
        Stack shapes = arguments_for(at::kMeta, shape);
        const Stack given = shapes;
        {
            KernelsOnly only;
            op_.redispatchBoxed(c10::DispatchKeySet(DispatchKey::Meta), &shapes);
        }
        for (size_t i = 0; i < given.size(); ++i)
            if (schema_.arguments()[i].is_out()) resize(arguments_[i], given[i]);
        Places places;
        for (size_t i = 0; i < shapes.size(); ++i)
            places.push_back(push_result(i, with_tensors(shapes[i], [&](const Tensor& t) { return laid_out(t); })));
        enqueue_with(std::move(places));
    }

    // Makes an out= argument as its meta tensor has become.
    static void resize(const IValue& argument, const IValue& shape) {
        if (!argument.isTensor() || !argument.toTensor().defined()) return;
        Tensor out = argument.toTensor(), wanted = shape.toTensor();
        if (lie_alike(out, wanted)) return;
        at::AutoDispatchBelowADInplaceOrView below;
        out.resize_(wanted.sizes());
        out.unsafeGetTensorImpl()->set_sizes_and_strides(wanted.sizes(), wanted.strides());
    }

    // As cuDNN would lay out a convolution's result, of which Meta kernels know nothing.
    Tensor laid_out(const Tensor& t) const {
        const std::string& name = schema_.name();
        if (name != "aten::convolution" && name != "aten::convolution_backward") return t;
        for (const IValue& argument : arguments_) {
            if (!argument.isTensor() || !t.defined() || argument.toTensor().dim() != t.dim()) continue;
            at::MemoryFormat format = argument.toTensor().suggest_memory_format();
            KernelsOnly only;
            if (format != at::MemoryFormat::Contiguous) return t.contiguous(format);
        }
        return t;
    }

    // Pushes result i: an argument, or new tensors like `shape`, which are returned as CPU tensors on their memory.
    std::vector<Tensor> push_result(size_t i, const IValue& shape) {
        std::vector<Tensor> places;
        if (schema_.returns()[i].alias_info()) return stack_->push_back(aliased(i)), places;
        c10::List<Tensor> list;
        each_new(schema_, i, shape, [&](const Tensor& t) {
            Tensor result = at::empty_strided(t.sizes(), t.strides(), t.options().device(*device_));
            result._set_conj(t.is_conj());
            result._set_neg(t.is_neg());
            list.push_back(result);
            places.push_back(on_cpu(result));
        });
        if (shape.isTensorList()) stack_->push_back(list);
        else stack_->push_back(list.empty() ? shape : IValue(list.get(0)));
        return places;
    }
    void push_arguments() {
        for (size_t i = 0; i < schema_.returns().size(); ++i) stack_->push_back(aliased(i));
    }
    const IValue& aliased(size_t result) const {
        const auto* alias = schema_.returns()[result].alias_info();
        for (size_t a = 0; a < arguments_.size(); ++a)
            if (const auto* own = schema_.arguments()[a].alias_info(); own && *own == *alias) return arguments_[a];
        TORCH_INTERNAL_ASSERT(false, op_.operator_name(), ": a result is an alias of no argument");
    }

    // Copies new results to their places.
    static void deliver(const c10::FunctionSchema& schema, const Stack& results, const Places& places) {
        KernelsOnly only;
        for (size_t i = 0; i < places.size(); ++i) {
            auto place = places[i].begin();
            each_new(schema, i, results[i], [&](const Tensor& t) {
                // Some CPU kernels leave out what nobody reads, or return what nobody asked for.
                if (place == places[i].end() || t.numel() == 0) return;
                Tensor to = *place++;
                TORCH_CHECK(to.sizes() == t.sizes(), "its Meta kernel says ", to.sizes(), ", not ", t.sizes());
                at::native::copy_(to, t, false);
            });
        }
    }

    void enqueue_with(Places places) {
        auto work = [op = op_, arguments = arguments_on_cpu(), places = std::move(places), seed = seed_,
                     device = device_->index()] {
            Access access(device);
            Stack results = arguments;
            try {
                run_kernel(op, results, seed);
                deliver(op.schema(), results, places);
            } catch (const c10::Error& error) {
                fail((c10::toString(op.operator_name()) + ": " + error.what_without_backtrace()).c_str());
            } catch (const std::exception& error) {
                fail((c10::toString(op.operator_name()) + ": " + error.what()).c_str());
            }
        };
        enqueue(stream_, std::move(work));
    }

    void run_at_once() {
        C10_CUDA_CHECK(cudaStreamSynchronize(stream_));  // a capture does not allow it
        Access access(device_->index());
        Stack given = arguments_on_cpu(), results = given;
        run_kernel(op_, results, seed_);
        for (size_t i = 0; i < given.size(); ++i)
            if (schema_.arguments()[i].is_out()) follow(arguments_[i], given[i]);
        Places places;
        for (size_t i = 0; i < results.size(); ++i) places.push_back(push_result(i, results[i]));
        deliver(schema_, results, places);
    }

    // An out= argument that the CPU kernel resized.
    static void follow(const IValue& argument, const IValue& on_cpu) {
        Tensor cuda = argument.toTensor(), cpu = on_cpu.toTensor();
        if (cpu.storage().data() != cuda.storage().data()) {
            at::native::resize_bytes_cuda(cuda.storage().unsafeGetStorageImpl(), cpu.storage().nbytes());
            std::memcpy(cuda.storage().mutable_data(), cpu.storage().data(), cpu.storage().nbytes());
        }
        cuda.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }

    const c10::OperatorHandle& op_;
    Stack* stack_;
    const c10::FunctionSchema& schema_;
    std::vector<IValue> arguments_;
    std::optional<c10::Device> device_;
    std::optional<at::Generator> generator_;
    std::optional<uint64_t> seed_;
    cudaStream_t stream_ = nullptr;
    bool has_cpu_ = false, has_mask_ = false;
};

}  // namespace

void launch_on_cpu(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

}  // namespace simcuda

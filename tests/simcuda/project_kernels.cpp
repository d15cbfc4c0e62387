// The package's kernels as its emulator compiles them, each under the name that nvcc registers it by.
#include "align_launch.cuh"
#include "runtime/simcuda.h"
#include "simt_control.h"

#include <memory>
#include <tuple>
#include <utility>

namespace {

template <class... P, size_t... I>
simcuda::Work work_of(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void** arguments,
                      std::index_sequence<I...>) {
    using Copied = std::tuple<std::decay_t<P>...>;
    auto copied = std::make_shared<const Copied>(*static_cast<std::tuple_element_t<I, Copied>*>(arguments[I])...);
    return [=] {
        simt::reset(1, 0);
        simt::launch(kernel, grid, block, shared_bytes, std::get<I>(*copied)...);
        if (const char* error = simt::error()) simcuda::fail(error);
    };
}

template <auto kernel>
struct Emulated;
template <class... P, void (*kernel)(P...)>
struct Emulated<kernel> {
    static simcuda::Work bind(dim3 grid, dim3 block, size_t shared_bytes, void** arguments) {
        return work_of(kernel, grid, block, shared_bytes, arguments, std::index_sequence_for<P...>());
    }
};

using wa::cuda::LargeTable, wa::cuda::SmallTable;
#define ADD(kernel, Acc, Table) \
    simcuda::add_kernel("::" #kernel "<" #Acc ", wa::cuda::" #Table ">(", Emulated<wa::cuda::kernel<Acc, Table>>::bind)
#define ADD_ALL(kernel)                                                                              \
    ADD(kernel, float, SmallTable), ADD(kernel, float, LargeTable), ADD(kernel, double, SmallTable), \
        ADD(kernel, double, LargeTable)

[[maybe_unused]] const bool added = [] {
    ADD_ALL(align_forward_kernel), ADD_ALL(align_backward_kernel);
    // torch.cuda._sleep: the stream is late of itself.
    simcuda::add_kernel("::spin_kernel(", [](dim3, dim3, size_t, void**) -> simcuda::Work { return [] {}; });
    return true;
}();

}  // namespace

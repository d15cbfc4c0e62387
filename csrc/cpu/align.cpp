// The ops on the CPU: picks the instruction set once, deals the list's filters out to torch's threads.
#include <algorithm>
#include <memory>

#include "../common/abi.h"
#include "../common/align_host.h"
#include "align_kernels.h"

namespace wa::cpu {
namespace {

const AlignKernels& kernels() {
    static const AlignKernels& best = []() -> const AlignKernels& {
#ifdef WA_CPU_X86
        __builtin_cpu_init();
        bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                  __builtin_cpu_supports("bmi2");
        if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return kAlignAvx512;
        if (v3) return kAlignAvx2;
#endif
        return kAlignBaseline;
    }();
    return best;
}

// Work is dealt out in items of about kItem values, so that threads get equal shares whatever the list looks like; a
// thread is woken for no less than kThread values (some 10 us of work).
constexpr int64_t kItem = 8192, kThread = 32768;
constexpr int64_t kMaxTransposed = 4 << 20;  // bytes of a filter that a thread stages

int64_t filters_per_item(const AlignTask& task) { return std::max<int64_t>(1, kItem / task.n); }

void run(AlignFilters filters, const AlignList& list) {
    std::vector<int64_t> first_item(list.count + 1, 0);
    size_t scratch_size = 0;
    for (uint32_t i = 0; i < list.count; ++i) {
        int64_t per_item = filters_per_item(list.tasks[i]);
        first_item[i + 1] = first_item[i] + (list.tasks[i].filters + per_item - 1) / per_item;
        scratch_size = std::max(scratch_size, scratch_bytes(list.tasks[i]));
    }
    torch::stable::parallel_for(0, first_item.back(), kThread / kItem, [&](int64_t begin, int64_t end) {
        std::unique_ptr<char[]> scratch(scratch_size ? new char[scratch_size] : nullptr);
        auto i = std::upper_bound(first_item.begin(), first_item.end(), begin) - first_item.begin() - 1;
        for (; i < list.count && first_item[i] < end; ++i) {
            const AlignTask& task = list.tasks[i];
            int64_t per_item = filters_per_item(task);
            int64_t first = std::max<int64_t>(0, begin - first_item[i]) * per_item;
            int64_t last = std::min<int64_t>(task.filters, (end - first_item[i]) * per_item);
            filters(list, task, uint32_t(first), uint32_t(last), scratch.get());
        }
    });
}

AlignForwardResult forward(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains,
                           const std::vector<double>& eps, const std::vector<double>& scales, ScalarType dtype,
                           MemoryFormat memory_format) {
    AlignBackend backend{[](const AlignList& list, int32_t) { run(kernels().forward, list); }, kMaxTransposed};
    return align_forward(backend, weights, gains, eps, scales, dtype, memory_format);
}

AlignBackwardResult backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                             const std::vector<std::optional<Tensor>>& gains, const Tensor& statistics,
                             const std::vector<double>& scales) {
    AlignBackend backend{[](const AlignList& list, int32_t) { run(kernels().backward, list); }, kMaxTransposed};
    return align_backward(backend, grads, weights, gains, statistics, scales);
}

}  // namespace
}  // namespace wa::cpu

STABLE_TORCH_LIBRARY_IMPL(weightalign_cuda, CPU, library) {
    library.impl("align_forward", WA_BOX(wa::cpu::forward));
    library.impl("align_backward", WA_BOX(wa::cpu::backward));
}

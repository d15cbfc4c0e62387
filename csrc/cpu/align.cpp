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

// Work is dealt out in pieces of kPiece values, all tensors of the list laid end to end, so that threads get equal
// shares whatever the list looks like; a thread is woken for no less than kThread values (some 10 us of work). A filter
// belongs to the piece that its first value lies in.
constexpr int64_t kPiece = 4096, kThread = 32768;
constexpr int64_t kMaxTransposed = 4 << 20;  // bytes of a filter that a thread stages

void run(AlignFilters filters, const AlignList& list) {
    std::vector<int64_t> begins(list.count + 1, 0);  // where each tensor's values begin
    size_t scratch_size = 0;
    for (uint32_t i = 0; i < list.count; ++i) {
        begins[i + 1] = begins[i] + int64_t(list.tasks[i].filters) * list.tasks[i].n;
        scratch_size = std::max(scratch_size, scratch_bytes(list.tasks[i]));
    }
    int64_t pieces = (begins.back() + kPiece - 1) / kPiece;
    torch::stable::parallel_for(0, pieces, kThread / kPiece, [&](int64_t first_piece, int64_t last_piece) {
        std::unique_ptr<char[]> scratch(scratch_size ? new char[scratch_size] : nullptr);
        int64_t begin = first_piece * kPiece, end = last_piece * kPiece;
        auto i = std::upper_bound(begins.begin(), begins.end(), begin) - begins.begin() - 1;
        for (; i < list.count && begins[i] < end; ++i) {
            const AlignTask& task = list.tasks[i];
            auto first_from = [&](int64_t value) {  // the first filter that begins at this value or later
                int64_t filter = (std::max<int64_t>(0, value - begins[i]) + task.n - 1) / task.n;
                return uint32_t(std::min<int64_t>(filter, task.filters));
            };
            filters(list, task, first_from(begin), first_from(end), scratch.get());
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

// The ops on the CPU: picks the instruction set once, distributes the work of a call over torch's threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>

#include "../common/abi.h"
#include "../common/register_ops.h"
#include "kernels.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace wa::cpu {
namespace {

struct InstructionSet {
    const char* name;
    const Kernels* kernels;
    const Kernels* for_small = kernels;  // for weights of up to kSmall values
};

// What this machine supports, the preferred one last. AVX2 is 2.1x as fast as baseline on Zen 3. AVX-512 halves the
// instructions, but on Sapphire Rapids lowers the clock by 7 %, of whatever runs next, too: weights of up to 65,536
// values alone, with autograd, take 1.03 to 1.15 times as long as with AVX2, larger ones 0.86 to 1.04 times, all of
// ResNet-50's 0.9 times. So AVX2 aligns small weights. By the size of the weight, not of the list: in each list the
// same weight has the same result.
constexpr int64_t kSmall = 65536;
std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> sets{{"baseline", &baseline::kKernels}};
#ifdef __x86_64__
    __builtin_cpu_init();
    unsigned eax, ebx, ecx = 0, edx;
    __get_cpuid(1, &eax, &ebx, &ecx, &edx);  // f16c: no name that clang's builtin knows before version 17
    bool v3 = (ecx & bit_F16C) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (v3) sets.push_back({"avx2", &avx2::kKernels});
    if (v4) {
        sets.push_back({"avx512", &avx512::kKernels});
        sets.push_back({"avx512+avx2", &avx512::kKernels, &avx2::kKernels});
    }
#endif
    return sets;
}

// The preferred one, or the one that the environment names.
InstructionSet choose() {
    const std::vector<InstructionSet> sets = instruction_sets();
    const char* variable = std::getenv("WEIGHTALIGN_CPU");
    const std::string wanted = variable && *variable ? variable : sets.back().name;
    std::string names;
    for (const InstructionSet& set : sets) {
        if (wanted == set.name) return set;
        names.append(names.empty() ? "" : ", ").append(set.name);
    }
    STD_TORCH_CHECK(false, "WEIGHTALIGN_CPU: expected one of ", names, " (what this machine has), got '", wanted, "'");
}

const InstructionSet& chosen() {
    static const InstructionSet set = choose();  // after an exception the next call tries again
    return set;
}

// Work is split into pieces of kPiece values, all tensors of the list laid end to end, then the convolution's input, so
// that threads get equal shares of any list; a thread gets no less than kThread values (some 10 us of work). A filter
// belongs to the piece that contains its first value.
constexpr int64_t kPiece = 4096, kThread = 32768;
constexpr int64_t kMaxTransposed = 4 << 20;  // bytes of a filter that a thread stages
// Results of as many values (32 MiB of floats) are written past the caches, which could not keep them.
constexpr int64_t kStreamed = 8 << 20;

class Work {
public:
    Work(const AlignList& list, const InstructionSet& set, AlignFilters Kernels::* filters)
        : list_(list), set_(set), filters_(filters), begins_(list.count + 1, 0) {
        for (uint32_t i = 0; i < list.count; ++i) {
            begins_[i + 1] = begins_[i] + int64_t(list.tasks[i].filters) * list.tasks[i].n;
            scratch_bytes_ = std::max(scratch_bytes_, scratch_bytes(list.tasks[i]));
        }
    }
    int64_t pieces() const { return (begins_.back() + kPiece - 1) / kPiece; }

    void run(int64_t first_piece, int64_t last_piece) const {
        std::unique_ptr<char[]> scratch(scratch_bytes_ ? new char[scratch_bytes_] : nullptr);
        int64_t begin = first_piece * kPiece, end = last_piece * kPiece;
        auto i = std::upper_bound(begins_.begin(), begins_.end(), begin) - begins_.begin() - 1;
        for (; i < list_.count && begins_[i] < end; ++i) {
            const AlignTask& task = list_.tasks[i];
            auto first_from = [&](int64_t value) {  // the first filter that begins at this value or later
                int64_t filter = (std::max<int64_t>(0, value - begins_[i]) + task.n - 1) / task.n;
                return uint32_t(std::min<int64_t>(filter, task.filters));
            };
            const bool is_small = begins_[i + 1] - begins_[i] <= kSmall, is_streamed = begins_.back() >= kStreamed;
            const Kernels& kernels = is_small ? *set_.for_small : *set_.kernels;
            (kernels.*filters_)(list_, task, first_from(begin), first_from(end), scratch.get(), is_streamed);
        }
    }

private:
    const AlignList& list_;
    const InstructionSet& set_;
    AlignFilters Kernels::* filters_;
    std::vector<int64_t> begins_;  // where each tensor's values begin
    size_t scratch_bytes_ = 0;
};

void run(AlignFilters Kernels::* filters, PrepareTiles Kernels::* prepare, const AlignList& list) {
    const InstructionSet& set = chosen();
    const Work weights(list, set, filters);
    const PrepareTask* input = list.input;
    const int64_t weight_pieces = weights.pieces();
    int64_t tiles = 0, input_pieces = 0;
    std::optional<Tiling> tiling;
    if (input) {
        tiling.emplace(*input);
        tiles = tiling->tiles(*input);
        int64_t values = int64_t(input->batch) * input->channels;
        for (uint32_t size : input->to_size) values *= size;
        input_pieces = (values + kPiece - 1) / kPiece;
    }
    torch::stable::parallel_for(0, weight_pieces + input_pieces, kThread / kPiece, [&](int64_t first, int64_t last) {
        if (first < weight_pieces) weights.run(first, std::min(last, weight_pieces));
        if (last <= weight_pieces) return;
        auto tile = [&](int64_t piece) { return std::max<int64_t>(piece - weight_pieces, 0) * tiles / input_pieces; };
        (set.kernels->*prepare)(*input, *tiling, tile(first), tile(last));
    });
}

const AlignBackend kForward{[](const AlignList& list, int32_t) {
                                run(&Kernels::align_forward,
                                    list.is_double ? &Kernels::prepare_forward_double : &Kernels::prepare_forward,
                                    list);
                            },
                            kMaxTransposed};
const AlignBackend kBackward{[](const AlignList& list, int32_t) {
                                 run(&Kernels::align_backward,
                                     list.is_double ? &Kernels::prepare_backward_double : &Kernels::prepare_backward,
                                     list);
                             },
                             kMaxTransposed, true};

}  // namespace
}  // namespace wa::cpu

// The instruction set in use, or why there is none; called through ctypes.
extern "C" __attribute__((visibility("default"))) const char* wa_cpu_kernels() {
    try {
        return wa::cpu::chosen().name;
    } catch (const std::exception& error) {
        static thread_local std::string message;
        message = error.what();
        return message.c_str();
    }
}

WA_IMPLEMENT(CPU, library) {
    wa::implement_ops<wa::cpu::kForward, wa::cpu::kBackward>(library, aoti_torch_device_type_cpu());
}

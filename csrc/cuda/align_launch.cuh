// From the tasks of a call to launches: threads per filter, width of the accesses, and which block does what.
#pragma once
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "align_backward.cuh"
#include "align_forward.cuh"
#include "prepare_tiling.cuh"

namespace wa::cuda {
namespace {

enum class Direction { kForward, kBackward };

// Short filters get part of a warp, so that all its lanes work; longer ones as many lanes or warps as it takes to hold
// them in registers, up to the whole block.
template <class Acc>
int lanes_log2(uint32_t n, int chunk) {
    int log2 = Team::kFewestLog2;
    while (AlignShape<Acc>::values(chunk) << log2 < int64_t(n) && 1 << log2 < AlignShape<Acc>::kThreads) ++log2;
    return log2;
}

// The widest accesses for which every row of every tensor of the task is aligned. Where one side has 16 bits and the
// other 32, a packed chunk would be two accesses of the other, each to every other half of a sector; where it takes
// more lanes than a vector, they would be half empty. A chunk of a transposed filter lies within a column.
template <class Acc>
int chunk_of(const AlignTask& task) {
    auto is_16_bit = [](DType t) { return t == DType::kFloat16 || t == DType::kBFloat16; };
    auto address = reinterpret_cast<uintptr_t>(task.weight) | reinterpret_cast<uintptr_t>(task.out) |
                   reinterpret_cast<uintptr_t>(task.grad);
    const uint32_t run = task.transposed_columns ? task.n / task.transposed_columns : task.n;
    if (address % 16 != 0 || run % kVectorChunk<Acc> != 0) return 1;
    bool packs = is_16_bit(task.weight_dtype) && is_16_bit(task.aligned_dtype) && run % kPackedChunk == 0;
    bool fits = int64_t(task.n) <= AlignShape<Acc>::values(kPackedChunk) * AlignShape<Acc>::kThreads &&
                lanes_log2<Acc>(task.n, kPackedChunk) == lanes_log2<Acc>(task.n, kVectorChunk<Acc>);
    return packs && fits ? kPackedChunk : kVectorChunk<Acc>;
}

// Blocks of half the threads, twice as many on an SM, if no filter needs more: when one of them waits for memory or at
// a barrier, fewer threads wait.
template <class Acc>
int threads_of(const AlignList& list) {
    constexpr int kHalf = AlignShape<Acc>::kThreads / 2;
    bool suffices = std::all_of(list.tasks, list.tasks + list.count, [](const AlignTask& task) {
        return 1 << lanes_log2<Acc>(task.n, chunk_of<Acc>(task)) <= kHalf;
    });
    return suffices ? kHalf : AlignShape<Acc>::kThreads;
}

// Of every launch, beside up to 6 KB that kernels have of their own: beyond 48 KB they would have to opt in.
constexpr size_t kMostSharedBytes = 42 << 10;
template <class Acc>
constexpr bool kFitsWithoutOptIn =
    AlignShape<Acc>::values(kVectorChunk<Acc>) * AlignShape<Acc>::kThreads * sizeof(Acc) <= kMostSharedBytes &&
    tile_bytes<Acc>(kMinChannelsLog2, odd_pitch<Acc>(kMinChannelsLog2)) + table_bytes<Acc>(kMinChannelsLog2) <=
        kMostSharedBytes &&
    2 * tile_bytes<Acc>(kMinChannelsLog2 + 1, odd_pitch<Acc>(kMinChannelsLog2 + 1)) +
            table_bytes<Acc>(kMinChannelsLog2 + 1) <=
        kMostSharedBytes;
static_assert(kFitsWithoutOptIn<float> && kFitsWithoutOptIn<double>);

template <Direction kDirection, class Acc, class Table>
cudaError_t launch_table(const Table& table, uint32_t blocks, int threads, size_t shared_bytes, cudaStream_t stream) {
    auto kernel =
        kDirection == Direction::kForward ? align_forward_kernel<Acc, Table> : align_backward_kernel<Acc, Table>;
    return launch(kernel, dim3(blocks), dim3(threads), shared_bytes, stream, table);
}

template <Direction kDirection, class Acc, class Table>
cudaError_t launch_list(const AlignList& list, const std::vector<uint32_t>& order, cudaStream_t stream) {
    using Shape = AlignShape<Acc>;
    const int threads = threads_of<Acc>(list);
    auto table = std::make_unique<Table>();
    table->statistics = list.statistics;
    table->grad_gain = list.grad_gain;
    uint64_t blocks = 0, tiles = 0;
    size_t shared_bytes = 0;
    if constexpr (Table::kTakesInput)
        if (list.input) {
            tiles = tiles_of<Acc>(*list.input, kDirection == Direction::kBackward, table->input);
            shared_bytes = prepare_shared_bytes<Acc>(table->input);
        }
    cudaError_t error = cudaSuccess;  // the first one; what comes after it is not launched
    auto flush = [&] {
        table->blocks = uint32_t(blocks);
        table->make_map();
        if (blocks + tiles && error == cudaSuccess)
            error = launch_table<kDirection, Acc>(*table, uint32_t(blocks + tiles), threads, shared_bytes, stream);
        table->count = 0, blocks = 0, tiles = 0, shared_bytes = 0;  // the first launch takes the input
    };
    for (uint32_t i : order) {
        const AlignTask& task = list.tasks[i];
        int chunk = chunk_of<Acc>(task), log2 = lanes_log2<Acc>(task.n, chunk);
        uint32_t teams = threads >> log2, task_blocks = (task.filters + teams - 1) / teams;
        if (table->count == Table::kCapacity || blocks + tiles + task_blocks > 0x7fffffff) flush();
        bool is_on_chip = int64_t(task.n) <= Shape::values(chunk) << log2;
        table->entries[table->count++] = {task, uint32_t(blocks), uint8_t(log2), uint8_t(chunk), is_on_chip};
        blocks += task_blocks;
        if (task.transposed_columns) shared_bytes = std::max(shared_bytes, size_t(teams) * task.n * sizeof(Acc));
    }
    flush();
    return error;
}

// Largest filters first: their blocks take longest, and the launch ends with short ones.
template <Direction kDirection>
cudaError_t align(const AlignList& list, cudaStream_t stream) {
    std::vector<uint32_t> order(list.count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return list.tasks[a].n > list.tasks[b].n; });
    auto run = [&](auto acc) {
        using Acc = decltype(acc);
        if (list.input || list.count <= SmallTable::kCapacity || !takes_large_parameters())
            return launch_list<kDirection, Acc, SmallTable>(list, order, stream);
        return launch_list<kDirection, Acc, LargeTable>(list, order, stream);
    };
    return list.is_double ? run(double()) : run(float());
}

}  // namespace
}  // namespace wa::cuda

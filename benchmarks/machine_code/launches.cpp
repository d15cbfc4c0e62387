// The launches that the project's own host code makes for a list of layers, float32 to bfloat16: kernels, grids and
// the bytes of their parameters. Nothing is launched; kernels are compiled only to have addresses.
//
// In:  direction, addresses of statistics and gain gradients; for each layer the addresses of weight, gradient, result
//      and gain, the number of filters and of values in each, the columns if transposed (AlignTask), eps and scale.
// Out: for each launch the kernel's address, blocks, threads, dynamic shared memory, parameters in hexadecimal; then
// the
//      layer of each block, as `layer*blocks`.
#include "simt.h"  // stands in for nvcc

#include <iostream>
#include <string>
#include <vector>

#include "common/align_task.h"

static std::vector<wa::AlignTask> layers;

namespace simt {

// Chosen before simt.h's own, which is for any arguments.
template <class Table>
void launch(void (*kernel)(Table), dim3 grid, dim3 block, size_t shared_bytes, const Table& table) {
    std::cout << reinterpret_cast<uintptr_t>(kernel) << ' ' << grid.x << ' ' << block.x << ' ' << shared_bytes << ' ';
    auto bytes = reinterpret_cast<const unsigned char*>(&table);
    for (size_t i = 0; i < sizeof table; ++i)
        std::cout << "0123456789abcdef"[bytes[i] >> 4] << "0123456789abcdef"[bytes[i] & 15];
    for (uint32_t begin = 0, end; begin < grid.x; begin = end) {
        const void* weight = table.entries[table.find(begin)].task.weight;
        for (end = begin + 1; end < grid.x && table.entries[table.find(end)].task.weight == weight;) ++end;
        size_t layer = 0;
        while (layers[layer].weight != weight) ++layer;
        std::cout << ' ' << layer << '*' << end - begin;
    }
    std::cout << '\n';
}

}  // namespace simt

#include "cuda/align_launch.cuh"

template <class T>
T read() {
    T value;
    if (!(std::cin >> value)) exit(1);
    return value;
}

void* read_address() { return reinterpret_cast<void*>(read<uintptr_t>()); }

int main() {
    const std::string direction = read<std::string>();
    wa::AlignList list{};
    list.statistics = read_address();
    list.grad_gain = read_address();
    uint32_t filters = 0;
    for (uintptr_t weight; std::cin >> weight;) {
        wa::AlignTask task{};
        task.weight = reinterpret_cast<void*>(weight);
        task.grad = read_address();
        task.out = read_address();
        task.gain = read_address();
        task.filters = read<uint32_t>();
        task.n = read<uint32_t>();
        task.transposed_columns = read<uint32_t>();
        task.eps = read<double>();
        task.scale = read<double>();
        task.weight_dtype = task.gain_dtype = wa::DType::kFloat32;
        task.aligned_dtype = wa::DType::kBFloat16;
        task.first_filter = filters;
        filters += task.filters;
        layers.push_back(task);
    }
    list.tasks = layers.data();
    list.count = uint32_t(layers.size());
    if (direction == "forward") wa::cuda::align<wa::cuda::Direction::kForward>(list, nullptr);
    else wa::cuda::align<wa::cuda::Direction::kBackward>(list, nullptr);
}

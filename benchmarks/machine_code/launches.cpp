// The launches that the project's own host code makes for a list of layers, float32 to bfloat16, or for an input:
// kernels, grids and the bytes of their parameters. Nothing is launched; kernels are compiled only to have addresses.
//
// In:  direction, addresses of statistics and gain gradients, whether there is an input.
//      Of an input: addresses of both sides, images, channels, height, width, padding at each end of both, and whether
//      channels are innermost in the source and in the result.
//      For each layer: the addresses of weight, gradient, result and gain, the number of filters and of values in each,
//      the columns if transposed (AlignTask), eps and scale.
// Out: for each launch the kernel's address, blocks, threads, dynamic shared memory, parameters in hexadecimal; then
//      the layer of each block, as `layer*blocks`; -1 is the input.
#include "simt.h"  // stands in for nvcc

#include <iostream>
#include <string>
#include <vector>

#include "common/align_task.h"
#include "common/prepare_task.h"

static std::vector<wa::AlignTask> layers;

namespace simt {

// Chosen before simt.h's own, which is for any arguments.
template <class Parameter, class Table>
void launch(void (*kernel)(Parameter), dim3 grid, dim3 block, size_t shared_bytes, const Table& table) {
    std::cout << reinterpret_cast<uintptr_t>(kernel) << ' ' << grid.x << ' ' << block.x << ' ' << shared_bytes << ' ';
    auto bytes = reinterpret_cast<const unsigned char*>(&table);
    for (size_t i = 0; i < sizeof table; ++i)
        std::cout << "0123456789abcdef"[bytes[i] >> 4] << "0123456789abcdef"[bytes[i] & 15];
    for (uint32_t begin = 0, end; begin < table.blocks; begin = end) {
        const void* weight = table.entries[table.find(begin)].task.weight;
        for (end = begin + 1; end < table.blocks && table.entries[table.find(end)].task.weight == weight;) ++end;
        size_t layer = 0;
        while (layers[layer].weight != weight) ++layer;
        std::cout << ' ' << layer << '*' << end - begin;
    }
    if (grid.x > table.blocks) std::cout << " -1*" << grid.x - table.blocks;
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

wa::ImageSide side(uint32_t channels, const uint32_t (&size)[3], bool by_channels, wa::DType dtype) {
    const int64_t positions = int64_t(size[1]) * size[2], step = by_channels ? channels : 1;
    return {positions * channels, by_channels ? 1 : positions, {positions * step, size[2] * step, step}, dtype};
}

wa::PrepareTask read_input(bool backward) {
    wa::PrepareTask task{};
    task.from = read_address();
    task.to = read_address();
    task.batch = read<uint32_t>();
    task.channels = read<uint32_t>();
    uint32_t padded[3] = {1, read<uint32_t>(), read<uint32_t>()}, padding = read<uint32_t>();
    task.size[0] = 1;
    for (int d = 1; d < 3; ++d) {
        task.size[d] = padded[d], padded[d] += 2 * padding;
        task.before[d] = task.after[d] = padding;
    }
    for (int d = 0; d < 3; ++d) task.to_size[d] = backward ? task.size[d] : padded[d];
    const auto wide = wa::DType::kFloat32, half = wa::DType::kBFloat16;
    task.from_side = side(task.channels, backward ? padded : task.size, read<bool>(), backward ? half : wide);
    task.to_side = side(task.channels, task.to_size, read<bool>(), backward ? wide : half);
    return task;
}

int main() {
    const std::string direction = read<std::string>();
    wa::AlignList list{};
    list.statistics = read_address();
    list.grad_gain = read_address();
    wa::PrepareTask input;
    if (read<bool>()) input = read_input(direction == "backward"), list.input = &input;
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

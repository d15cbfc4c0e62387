// One small kernel per fault that the emulation must catch, and a few that must pass.
#include <cstring>

#include "../../csrc/cuda/chunk.cuh"
#include "kernels.h"

namespace {
using wa::cuda::launch;

__global__ void k_ok(const float* in, float* out) {  // reverses a block through shared memory
    __shared__ float tile[64];
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
}
__global__ void k_no_barrier(const float* in, float* out) {
    __shared__ float tile[64];
    tile[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = tile[63 - threadIdx.x];
}
template <bool kSync>
__global__ void k_warp_exchange(const float* in, float* out) {  // reverses each warp
    __shared__ float tile[64];
    float x = in[threadIdx.x];
    tile[threadIdx.x] = x;
    if (kSync) __syncwarp();
    else x = __shfl_xor_sync(~0u, x, 1);  // synchronises the lanes, but does not order memory
    out[threadIdx.x] = tile[threadIdx.x ^ 31];
}
__global__ void k_divergent_barrier(const float*, float* out) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
    out[threadIdx.x] = 0;
}
__global__ void k_skipped_barrier(const float*, float* out) {
    if (threadIdx.x < 32) __syncthreads();
    out[threadIdx.x] = 0;
}
__global__ void k_exited_lane(const float* in, float* out) {
    if (threadIdx.x >= 40) return;
    out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
}
__global__ void k_half_mask(const float* in, float* out) {  // the upper half of the warp takes no part
    out[threadIdx.x] = 0;
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, in[threadIdx.x], 1);
}
__global__ void k_outside_mask(const float* in, float* out) {
    out[threadIdx.x] = 0;
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, in[threadIdx.x], 16);
}
__global__ void k_misaligned(const float* in, float* out) {
    wa::cuda::Chunk<float, 4> chunk;
    chunk.load(in + 1);
    chunk.store(out);
}
__global__ void k_out_of_bounds(const float* in, float* out) { out[threadIdx.x + 1] = in[threadIdx.x]; }
__global__ void k_far_out(const float* in, float* out) { out[(threadIdx.x + 1ll) << 40] = in[threadIdx.x]; }
__global__ void k_shared_out_of_bounds(const float* in, float* out) {
    __shared__ float tile[64];
    float* volatile p = tile;
    p[threadIdx.x + 1] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = p[threadIdx.x + 1];
}
__global__ void k_shared_index(const float* in, float* out) {
    __shared__ float tile[64];
    tile[threadIdx.x + 1] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x + 1];
}
__global__ void k_store_to_input(const float* in, float*) { const_cast<float*>(in)[threadIdx.x] = 0; }
__global__ void k_read_before_write(const float*, float* out) { out[threadIdx.x] += 1; }
__global__ void k_blocks_collide(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void k_atomics(const float* in, float* out) {
    if (threadIdx.x == 0) out[0] = 0;
    __syncthreads();
    atomicAdd(out, in[threadIdx.x]);
    __syncthreads();
    if (threadIdx.x > 0) out[threadIdx.x] = out[0];
}
__global__ void k_atomics_unordered(const float* in, float* out) {
    if (threadIdx.x == 0) out[0] = 0;
    atomicAdd(out, in[threadIdx.x]);
}
__global__ void k_overflow(const float* in, float* out) {
    int row = threadIdx.x + 50000, at = row * 50000;
    out[threadIdx.x] = in[at];
}
__global__ void k_votes(const float*, float* out) {
    int i = threadIdx.x, lane = i % 32;
    bool ok = __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau && __any_sync(~0u, lane == 3) && !__all_sync(~0u, lane == 3);
    ok = ok && __syncthreads_count(i % 2) == 32 && __syncthreads_or(i == 5) && !__syncthreads_and(i == 5);
    ok =
        ok && __shfl_sync(~0u, i, 3, 8) == (i & ~7) + 3 && __shfl_up_sync(~0u, lane, 2) == (lane < 2 ? lane : lane - 2);
    ok = ok && __shfl_down_sync(~0u, lane, 3, 16) == (lane % 16 > 12 ? lane : lane + 3);
    ok = ok && __shfl_xor_sync(~0u, double(lane), 5) == (lane ^ 5);
    out[i] = ok;
}
// 32 x 32 tiles of fp16 through padded shared memory, (rows, columns) to (columns, rows)
__global__ void k_transpose(const __half* in, __half* out, int rows, int columns) {
    __half(*tile)[34] = reinterpret_cast<__half(*)[34]>(wa::cuda::dynamic_shared<__half>());
    int row = blockIdx.y * 32, column = blockIdx.x * 32;
    for (int y = threadIdx.y; y < 32; y += blockDim.y)
        if (row + y < rows && column + int(threadIdx.x) < columns)
            tile[y][threadIdx.x] = in[(long long)(row + y) * columns + column + threadIdx.x];
    __syncthreads();
    for (int y = threadIdx.y; y < 32; y += blockDim.y)
        if (column + y < columns && row + int(threadIdx.x) < rows)
            out[(long long)(column + y) * rows + row + threadIdx.x] = tile[threadIdx.x][y];
}

const struct {
    const char* name;
    void (*kernel)(const float*, float*);
    unsigned blocks = 1;
} kKernels[] = {
    {"ok", k_ok},
    {"no_barrier", k_no_barrier},
    {"warp_exchange", k_warp_exchange<true>},
    {"warp_no_sync", k_warp_exchange<false>},
    {"divergent_barrier", k_divergent_barrier},
    {"skipped_barrier", k_skipped_barrier},
    {"exited_lane", k_exited_lane},
    {"half_mask", k_half_mask},
    {"outside_mask", k_outside_mask},
    {"misaligned", k_misaligned},
    {"out_of_bounds", k_out_of_bounds},
    {"far_out", k_far_out},
    {"shared_out_of_bounds", k_shared_out_of_bounds},
    {"shared_index", k_shared_index},
    {"store_to_input", k_store_to_input},
    {"read_before_write", k_read_before_write},
    {"blocks_collide", k_blocks_collide, 2},
    {"atomics", k_atomics},
    {"atomics_unordered", k_atomics_unordered},
    {"overflow", k_overflow},
    {"votes", k_votes},
};

}  // namespace

bool selftest(const char* name, const void* in, void* out) {
    for (auto& k : kKernels) {
        if (std::strcmp(k.name, name)) continue;
        launch(k.kernel, dim3(k.blocks), dim3(64), 0, nullptr, static_cast<const float*>(in), static_cast<float*>(out));
        return true;
    }
    return false;
}

void selftest_transpose(const void* in, void* out, int rows, int columns) {
    launch(k_transpose, dim3((columns + 31) / 32, (rows + 31) / 32), dim3(32, 8), 32 * 34 * 2, nullptr,
           static_cast<const __half*>(in), static_cast<__half*>(out), rows, columns);
}

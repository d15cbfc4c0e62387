// The threads that share one filter: 8, 16 or 32 neighbouring lanes of a warp, or 2 to 32 whole warps of a block.
#pragma once
#include "portable.cuh"

namespace wa::cuda {
namespace {  // internal linkage lets AddressSanitizer put redzones around __shared__ variables

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = 32;

struct Team {
    int lanes_log2;

    __device__ int lanes() const { return 1 << lanes_log2; }
    __device__ int lane() const { return threadIdx.x & (lanes() - 1); }
    __device__ int index() const { return threadIdx.x >> lanes_log2; }
    __device__ bool in_one_warp() const { return lanes_log2 <= 5; }
    // Reached by all threads of the block together: its teams have the same size.
    __device__ void sync() const {
        if (in_one_warp()) __syncwarp();
        else __syncthreads();
    }
};

// Broadcasts the value of lane 0 to the team. `slots` are kMaxWarps values of shared memory that nothing else uses.
template <class Acc>
__device__ Acc team_first(Team team, Acc x, Acc* slots) {
    if (team.in_one_warp()) return __shfl_sync(kAllLanes, x, 0, team.lanes());
    if (team.lane() == 0) slots[team.index()] = x;
    __syncthreads();
    return slots[team.index()];
}

// Sums over the team, the same bits in every thread: a butterfly in each warp, then its warps in order. No atomics.
// `slots` are kMaxWarps * kSums values of shared memory that nothing else uses since the last barrier.
template <int kSums, class Acc>
__device__ void team_sum(Team team, Acc (&sums)[kSums], Acc* slots) {
    for (int flip = min(team.lanes(), 32) / 2; flip > 0; flip /= 2)
#pragma unroll
        for (int s = 0; s < kSums; ++s) sums[s] += __shfl_xor_sync(kAllLanes, sums[s], flip);
    if (team.in_one_warp()) return;
    int warp = threadIdx.x / 32, warps = team.lanes() / 32, first = warp & -warps;
    if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int s = 0; s < kSums; ++s) slots[warp * kSums + s] = sums[s];
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSums; ++s) sums[s] = 0;
    for (int w = first; w < first + warps; ++w)
#pragma unroll
        for (int s = 0; s < kSums; ++s) sums[s] += slots[w * kSums + s];
}

}  // namespace
}  // namespace wa::cuda

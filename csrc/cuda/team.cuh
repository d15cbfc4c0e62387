// The threads that share one filter: 8, 16 or 32 neighbouring lanes of a warp, or 2 to 32 whole warps of a block.
#pragma once
#include "portable.cuh"

namespace wa::cuda {
namespace {  // internal linkage lets AddressSanitizer put redzones around __shared__ variables

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = 32;

struct Team {
    static constexpr int kFewestLog2 = 3, kFewest = 1 << kFewestLog2;
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

// Adds the sums of lanes that differ in bits below `lanes`, a power of two of at least kLeast and at most kMost.
template <int kLeast, int kMost, int kSums, class Acc>
__device__ void butterfly(Acc (&sums)[kSums], int lanes) {
#pragma unroll
    for (int flip = kMost / 2; flip > 0; flip /= 2)
        if (flip < kLeast || flip < lanes)
#pragma unroll
            for (int s = 0; s < kSums; ++s) sums[s] += __shfl_xor_sync(kAllLanes, sums[s], flip);
}

// Sums over the team, the same bits in every thread: a butterfly in each warp; then, in each warp again, one of the
// sums that the team's warps left in shared memory. No atomics. `slots` are kMaxWarps * kSums values of shared memory
// that nothing else uses since the last barrier.
template <int kSums, class Acc>
__device__ void team_sum(Team team, Acc (&sums)[kSums], Acc* slots) {
    butterfly<Team::kFewest, 32>(sums, team.lanes());
    if (team.in_one_warp()) return;
    const int warp = threadIdx.x / 32, warps = team.lanes() / 32;
    if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int s = 0; s < kSums; ++s) slots[warp * kSums + s] = sums[s];
    __syncthreads();
    const int mine = (warp & -warps) + (threadIdx.x & (warps - 1));
#pragma unroll
    for (int s = 0; s < kSums; ++s) sums[s] = slots[mine * kSums + s];
    butterfly<2, kMaxWarps>(sums, warps);
}

}  // namespace
}  // namespace wa::cuda

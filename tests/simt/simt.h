// Test-only. Lets g++ compile CUDA device code and runs it on the CPU, one fiber per CUDA thread.
//
// Include before any CUDA header. The kernels' file is compiled as C++ against CUDA's own host headers (float4, dim3,
// cuda_fp16.h, cuda_bf16.h); what only nvcc provides is supplied here. simt.cpp is the runtime.
//
// Requirements on kernels: launches and dynamic shared memory through csrc/cuda/portable.cuh; no torch in their file;
// device code in an anonymous namespace (else AddressSanitizer cannot guard its __shared__ variables); no cooperative
// groups, inline PTX or clusters; blocks communicate by atomics only; no lane returns before a barrier or a full-mask
// warp operation. An intrinsic that is missing can be added below.
//
// What it cannot show: speed, bank conflicts, effects of the real memory model, how nvcc compiles the code (FMA
// contraction, approximate functions, registers), and code under __CUDA_ARCH__ or __CUDACC__.
#pragma once

#ifdef __CUDACC__
#error "simt.h is for the host compiler only"
#endif

#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // gets redzones (internal linkage only: GCC gives COMDAT variables none)
#else
#define __shared__ static thread_local  // all found in the module's TLS segment: poisoned and race-checked
#endif
#define __launch_bounds__(...)
#define __grid_constant__ &  // `const Table __grid_constant__ table`: not a copy of the table for each thread

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <math.h>   // unlike <cmath>, brings sqrt(float) and the like into the global namespace
#include <stdio.h>  // printf, which nvcc declares in device code

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

extern uint3 threadIdx, blockIdx;  // set by the scheduler before a fiber runs
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
using std::max;
using std::min;

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {

int block_sync(int predicate, const char* file, int line);  // returns how many predicates held
unsigned warp_ballot(unsigned mask, bool predicate, bool orders_memory, const char* file, int line);
uint64_t warp_read(unsigned mask, uint64_t value, int source_lane, const char* file, int line);
int lane();
void atomic_access(const void* address, size_t size);
void* dynamic_shared();
void run(dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*), void* call, size_t call_bytes);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, const A&... arguments) {
    struct Call {
        void (*kernel)(P...);
        std::tuple<std::decay_t<P>...> arguments;
    } call{kernel, {arguments...}};
    auto thread = [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->arguments); };
    run(grid, block, shared_bytes, thread, &call, sizeof call);
}

template <class T>
T shuffle(unsigned mask, T value, int source_lane, const char* file, int line) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = warp_read(mask, bits, source_lane, file, line);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace simt

inline void __syncthreads(SIMT_SITE) { simt::block_sync(0, file, line); }
inline int __syncthreads_count(int p, SIMT_SITE) { return simt::block_sync(p, file, line); }
inline int __syncthreads_or(int p, SIMT_SITE) { return simt::block_sync(p, file, line) > 0; }
inline int __syncthreads_and(int p, SIMT_SITE) { return simt::block_sync(!p, file, line) == 0; }
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) { simt::warp_ballot(mask, false, true, file, line); }
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) { return simt::warp_ballot(mask, p, false, file, line); }
inline int __any_sync(unsigned mask, int p, SIMT_SITE) { return simt::warp_ballot(mask, p, false, file, line) != 0; }
inline int __all_sync(unsigned mask, int p, SIMT_SITE) { return simt::warp_ballot(mask, !p, false, file, line) == 0; }

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_SITE) {
    return simt::shuffle(mask, v, (simt::lane() & -width) | (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int flip, int width = 32, SIMT_SITE) {
    int lane = simt::lane(), source = lane ^ flip;
    return simt::shuffle(mask, v, source <= (lane | (width - 1)) ? source : lane, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
    int lane = simt::lane(), source = lane + int(delta);
    return simt::shuffle(mask, v, source <= (lane | (width - 1)) ? source : lane, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
    int lane = simt::lane(), source = lane - int(delta);
    return simt::shuffle(mask, v, source >= (lane & -width) ? source : lane, file, line);
}

// clang-format off
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T> void __stcg(T* p, T v) { *p = v; }
// clang-format on

// no_sanitize_thread: the access is reported as atomic, not as a plain read and write
#define SIMT_ATOMIC(name, update)                                     \
    template <class T>                                                \
    __attribute__((noinline, no_sanitize_thread)) T name(T* p, T v) { \
        simt::atomic_access(p, sizeof(T));                            \
        T old = *p;                                                   \
        *p = update;                                                  \
        return old;                                                   \
    }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicExch, v)

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) {
    unsigned u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float __uint_as_float(unsigned u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

// The simplest kernels that move what ours move: a cast from float to bfloat16, and its gradient's sum with a weight.
#include <cuda_bf16.h>

__device__ unsigned packed(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
}
__device__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000); }

// Four values a thread.
__global__ void __launch_bounds__(256) flat_cast(const float4* from, uint2* to) {
    unsigned i = blockIdx.x * 256 + threadIdx.x;
    float4 x = from[i];
    to[i] = make_uint2(packed(x.x, x.y), packed(x.z, x.w));
}

__global__ void __launch_bounds__(256) flat_add(const float4* weight, const uint2* grad, float4* to) {
    unsigned i = blockIdx.x * 256 + threadIdx.x;
    float4 x = weight[i];
    uint2 g = grad[i];
    to[i] = make_float4(x.x + low(g.x), x.y + high(g.x), x.z + low(g.y), x.w + high(g.y));
}

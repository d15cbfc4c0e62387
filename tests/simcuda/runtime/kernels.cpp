// Kernels: registered by the code that nvcc adds to each library, launched by its host stubs.
#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "machine.h"

using namespace simcuda;

namespace simcuda {
void add_kernel(const char* name, Bind bind) { machine().added.emplace_back(name, bind); }
}  // namespace simcuda

namespace {

constexpr size_t kSharedOptIn = 227 << 10;
// Static shared memory counts too; how much of it a kernel has is not known here, but less than 1 KB.
constexpr size_t kShared = 47 << 10;

std::string demangled(const char* name) {
    int status = 0;
    std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status), std::free);
    return text ? text.get() : name;
}

CUkern_st* kernel_of(const void* function) {  // a host stub, or a cudaKernel_t already
    auto found = machine().kernels.find(function);
    return found == machine().kernels.end() ? static_cast<CUkern_st*>(const_cast<void*>(function)) : &found->second;
}

Bind bind_of(CUkern_st& kernel) {
    if (!std::exchange(kernel.is_sought, true)) {
        const std::string name = demangled(kernel.mangled);
        for (auto& [part, bind] : machine().added)
            if (name.find(part) != std::string::npos) kernel.bind = bind;
        if (!kernel.bind) std::fprintf(stderr, "simcuda: the kernel %s is not simulated\n", name.c_str());
    }
    return kernel.bind;
}

bool is_configuration(dim3 grid, dim3 block) {
    bool has_threads = grid.x && grid.y && grid.z && block.x && block.y && block.z;
    bool has_few = block.z <= 64 && size_t(block.x) * block.y * block.z <= 1024;
    return has_threads && has_few && grid.x <= 0x7fffffff && grid.y <= 0xffff && grid.z <= 0xffff;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
    return call([&] {
        CUkern_st& kernel = *kernel_of(function);
        if (stream_of(stream)->device != current_device) return cudaErrorInvalidResourceHandle;
        if (!is_configuration(grid, block)) return cudaErrorInvalidConfiguration;
        if (shared > std::max(kernel.shared[current_device], kShared)) return cudaErrorInvalidValue;
        Faults& faults = machine().faults;
        if (faults.launches_before >= 0 && faults.launches_before-- == 0) return faults.launch;
        Bind bind = bind_of(kernel);
        if (!bind) return cudaErrorNoKernelImageForDevice;
        ++machine().launches;
        if (machine().settings.trace)
            std::fprintf(stderr, "simcuda: cuda:%d, stream %p: %s <<<%u, %u, %zu>>>\n", current_device, (void*)stream,
                         demangled(kernel.mangled).c_str(), grid.x, block.x, shared);
        enqueue(stream, [work = bind(grid, block, shared, arguments), device = current_device] {
            Access access(device);
            work();
        });
        return cudaSuccess;
    });
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    void* stream;
};
thread_local Configuration configuration;  // between <<< >>> and the stub

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    std::lock_guard<std::recursive_mutex> lock(machine().mutex);
    machine().kernels[host].mangled = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    return configuration = {grid, block, shared, stream}, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    return *static_cast<void**>(stream) = configuration.stream, cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    return call([&] { return *kernel = kernel_of(function), cudaSuccess; });
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
    return launch(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
    return launch(function, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    return call([&] {
        if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
        if (value < 0 || size_t(value) > kSharedOptIn) return cudaErrorInvalidValue;
        return kernel_of(function)->shared[current_device] = size_t(value), cudaSuccess;
    });
}
}

// Devices and their properties: those of an H100, unless the environment says otherwise.
#include <cstdio>
#include <cstring>

#include "machine.h"

using namespace simcuda;

static bool exists(int device) { return device >= 0 && device < machine().settings.devices; }

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    return call([&] {
        const Settings& s = machine().settings;
        bool is_old = s.driver / 1000 < CUDART_VERSION / 1000;
        *count = is_old ? 0 : s.devices;
        return is_old ? cudaErrorInsufficientDriver : *count ? cudaSuccess : cudaErrorNoDevice;
    });
}
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    return call([&] {
        if (!exists(device)) return cudaErrorInvalidDevice;
        return current_device = device, cudaSuccess;
    });
}
cudaError_t cudaDeviceSynchronize() {
    return call_that_waits([] { return drain_all(current_device), take_failure(); });
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
    return call([&] { return *version = machine().settings.driver, cudaSuccess; });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    const Settings& s = machine().settings;
    if (!exists(device)) return last_error = cudaErrorInvalidDevice;
    *p = {};
    std::snprintf(p->name, sizeof p->name, "Simulated device %d", device);
    std::snprintf(p->uuid.bytes, sizeof p->uuid.bytes, "simulated %d", device % 100);
    p->major = s.capability / 10, p->minor = s.capability % 10;
    p->totalGlobalMem = s.memory;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 0xffff;
    p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10, p->sharedMemPerMultiprocessor = 228 << 10;
    p->reservedSharedMemPerBlock = 1 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->totalConstMem = 64 << 10;
    p->l2CacheSize = int(s.l2);
    p->memoryBusWidth = 5120, p->memPitch = 0x7fffffff, p->textureAlignment = p->surfaceAlignment = 512;
    p->pciBusID = device + 1;
    p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = p->streamPrioritiesSupported = 1;
    p->cooperativeLaunch = p->asyncEngineCount = p->hostRegisterSupported = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
    const std::map<int, size_t> values = {
        {cudaDevAttrMaxThreadsPerBlock, p.maxThreadsPerBlock},
        {cudaDevAttrMaxSharedMemoryPerBlock, p.sharedMemPerBlock},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, p.sharedMemPerBlockOptin},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, p.sharedMemPerMultiprocessor},
        {cudaDevAttrWarpSize, p.warpSize},
        {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
        {cudaDevAttrMaxThreadsPerMultiProcessor, p.maxThreadsPerMultiProcessor},
        {cudaDevAttrL2CacheSize, p.l2CacheSize},
        {cudaDevAttrComputeCapabilityMajor, p.major},
        {cudaDevAttrComputeCapabilityMinor, p.minor},
        {cudaDevAttrMaxRegistersPerBlock, p.regsPerBlock},
    };
    auto found = values.find(attribute);
    return *value = found == values.end() ? 0 : int(found->second), cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
    return std::snprintf(id, size_t(length), "0000:%02x:00.0", device + 1), cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}

// The driver's functions, of which driver.cpp has some: PyTorch looks all of them up and calls none.
extern int cuGetErrorString(int, const char**), cuCtxGetCurrent();
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    bool is_text = !std::strcmp(name, "cuGetErrorString");
    *function = is_text ? reinterpret_cast<void*>(cuGetErrorString) : reinterpret_cast<void*>(cuCtxGetCurrent);
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
}

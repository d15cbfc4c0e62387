// Memory and copies. New device memory is all NaN.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "machine.h"

using namespace simcuda;

static cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
    return call([=] {
        // What is not pinned could be changed by the host at once, so the runtime copies it at once.
        bool at_once = !stream_of(stream)->capture && (!block_of(to) || !block_of(from));
        enqueue(stream, [=] {
            Access access(-1);
            std::memmove(to, from, bytes);
        });
        if (at_once) drain(stream);
        return cudaSuccess;
    });
}

extern "C" {

cudaError_t cudaMalloc(void** address, size_t bytes) {
    return call_outside_of_capture([&] {
        const Settings& s = machine().settings;
        Device& device = machine().devices[current_device];
        bytes = (bytes + 4095) / 4096 * 4096;
        if (!bytes) return *address = nullptr, cudaSuccess;
        if (device.used + bytes > s.memory) return cudaErrorMemoryAllocation;
        void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pages == MAP_FAILED) return cudaErrorMemoryAllocation;
        if (s.strict) madvise(pages, bytes, MADV_HUGEPAGE);  // quicker to protect
        std::memset(pages, 0xff, bytes);
        if (s.strict && !device.accesses) mprotect(pages, bytes, PROT_NONE);
        device.used += bytes;
        machine().blocks[static_cast<char*>(pages)] = {bytes, cudaMemoryTypeDevice, current_device};
        return *address = pages, cudaSuccess;
    });
}
cudaError_t cudaFree(void* address) {
    return call_that_waits([&] {
        if (!address) return cudaSuccess;
        auto& blocks = machine().blocks;
        auto found = blocks.find(static_cast<char*>(address));
        if (found == blocks.end() || found->second.type != cudaMemoryTypeDevice) return cudaErrorInvalidValue;
        drain_all();
        machine().devices[found->second.device].used -= found->second.bytes;
        munmap(address, found->second.bytes);
        blocks.erase(found);
        return take_failure();
    });
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    return call([&] {
        *total = machine().settings.memory;
        return *free = *total - machine().devices[current_device].used, cudaSuccess;
    });
}
cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
    return call([&] {
        return machine().blocks[static_cast<char*>(address)] = {bytes, cudaMemoryTypeHost, current_device}, cudaSuccess;
    });
}
cudaError_t cudaHostUnregister(void* address) {
    return call(
        [&] { return machine().blocks.erase(static_cast<char*>(address)) ? cudaSuccess : cudaErrorInvalidValue; });
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned flags) {
    return call_outside_of_capture([&] {
        if (posix_memalign(address, 4096, bytes)) return cudaErrorMemoryAllocation;
        return cudaHostRegister(*address, bytes, flags);
    });
}
cudaError_t cudaMallocHost(void** address, size_t bytes) { return cudaHostAlloc(address, bytes, 0); }
cudaError_t cudaFreeHost(void* address) {
    return call([&] {
        drain_all();
        cudaError_t error = cudaHostUnregister(address);
        if (error == cudaSuccess) std::free(address);
        return error;
    });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    return call([&] {
        const Block* block = block_of(address);
        void* at = const_cast<void*>(address);
        *attributes = {};
        attributes->type = block ? block->type : cudaMemoryTypeUnregistered;
        attributes->device = block ? block->device : -2;
        attributes->devicePointer = block ? at : nullptr;
        attributes->hostPointer = block && block->type == cudaMemoryTypeDevice ? nullptr : at;
        return cudaSuccess;
    });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return copy(to, from, bytes, stream);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    return copy(to, from, bytes, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    return call_that_waits([&] {
        copy(to, from, bytes, nullptr);
        return cudaStreamSynchronize(nullptr);
    });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return call([&] {
        auto work = [=] {
            Access access(-1);
            std::memset(to, value, bytes);
        };
        // At once, where nothing comes before it.
        if (is_idle(stream)) work();
        else enqueue(stream, work);
        return cudaSuccess;
    });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    return call_outside_of_capture([&] { return cudaMemsetAsync(to, value, bytes, nullptr); });
}
}

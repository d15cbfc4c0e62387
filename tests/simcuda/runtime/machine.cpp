// The machine's queues, and the order in which work runs.
#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace simcuda {

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

static long long setting(const char* name, long long otherwise) {
    const char* value = std::getenv(name);
    return value && *value ? std::atoll(value) : otherwise;
}

Settings settings_of_environment() {
    return {int(setting("SIMCUDA_DEVICES", 1)),      int(setting("SIMCUDA_DRIVER", CUDART_VERSION)),
            int(setting("SIMCUDA_CAPABILITY", 90)),  size_t(setting("SIMCUDA_MEMORY", 16ll << 30)),
            size_t(setting("SIMCUDA_L2", 50 << 20)), setting("SIMCUDA_STRICT", 0) != 0,
            setting("SIMCUDA_TRACE", 0) != 0,        unsigned(setting("SIMCUDA_SEED", 0))};
}

Machine::Machine() : settings(settings_of_environment()) {
    random.seed(settings.seed);
    devices.resize(size_t(settings.devices));
    for (int d = 0; d < settings.devices; ++d) {
        devices[d].legacy = new CUstream_st{d, 0, &devices[d].queue};
        streams.push_back(devices[d].legacy);
    }
}

Machine& machine() {  // never destroyed: libraries register kernels before static objects live, and free memory after
    static Machine& the = *new Machine;
    return the;
}

bool is_forked() {
    int& owner = machine().initialised_by;
    if (!owner) owner = int(getpid());
    return owner != int(getpid());
}

CUstream_st* stream_of(cudaStream_t stream) {
    bool is_legacy = !stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
    return is_legacy ? machine().devices[current_device].legacy : stream;
}

static void run_first(Queue& queue) {
    if (!queue.front().can_run()) {  // it waits, and keeps its place meanwhile: nothing behind it may run
        auto awaited = queue.front().awaited;
        return reach(*awaited);
    }
    Item item = std::move(queue.front());
    queue.pop_front();
    if (!item.work) return;
    ++machine().running;
    item.work();
    --machine().running;
}

// With a seed: runs some work of the stream that is favoured now, if any is. That changes rarely, how rarely depends on
// the seed: most orders in which something goes wrong need one stream to get far ahead of another.
static void advance() {
    Machine& m = machine();
    if (!m.settings.seed || m.running) return;
    if (m.random() % (4 << m.settings.seed % 7) == 0) {
        std::vector<Queue*> choices{nullptr};
        for (CUstream_st* stream : m.streams)
            if (!stream->queue->empty()) choices.push_back(stream->queue);
        m.favourite = choices[m.random() % choices.size()];
    }
    Queue* queue = m.favourite;
    while (queue && !queue->empty() && queue->front().can_run() && m.random() % 2) run_first(*queue);
}

void run_until(Queue& queue, const std::function<bool()>& until) {
    while (!queue.empty() && !until()) {
        advance();
        if (!queue.empty() && !until()) run_first(queue);
    }
}
static void run_all(Queue& queue) {
    run_until(queue, [] { return false; });
}
void drain_all(int device) {
    for (CUstream_st* stream : std::vector<CUstream_st*>(machine().streams))
        if (device < 0 || stream->device == device) run_all(*stream->queue);
}
void reach(const Record& record) {
    if (!record.is_done) run_until(*record.queue, [&] { return record.is_done; });
}

cudaError_t take_failure() { return std::exchange(machine().failed, cudaSuccess); }

const Block* block_of(const void* address) {
    const auto& blocks = machine().blocks;
    auto above = blocks.upper_bound(static_cast<const char*>(address));
    if (above == blocks.begin()) return nullptr;
    --above;
    return static_cast<const char*>(address) < above->first + above->second.bytes ? &above->second : nullptr;
}

// simcuda.h

void enqueue(cudaStream_t handle, Work work) {
    std::lock_guard<std::recursive_mutex> lock(machine().mutex);
    CUstream_st* stream = stream_of(handle);
    if (stream->capture) stream->capture->works.push_back(std::move(work));
    else stream->queue->push_back({std::move(work), nullptr});
    advance();
}

bool is_capturing(cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> lock(machine().mutex);
    return stream_of(stream)->capture;
}

bool is_idle(cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> lock(machine().mutex);
    return !stream_of(stream)->capture && stream_of(stream)->queue->empty();
}

void drain(cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> lock(machine().mutex);
    run_all(*stream_of(stream)->queue);
}

void fail(const char* message) {
    std::fprintf(stderr, "simcuda: a kernel failed: %s\n", message);
    machine().failed = cudaErrorLaunchFailure;
}

static void protect(int device, int protection) {
    for (auto& [begin, block] : machine().blocks)
        if (block.type == cudaMemoryTypeDevice && block.device == device)
            mprotect(const_cast<char*>(begin), block.bytes, protection);
}

Access::Access(int device) : device(device) {
    if (!machine().settings.strict) return;
    std::lock_guard<std::recursive_mutex> lock(machine().mutex);
    for (int d = 0; d < machine().settings.devices; ++d)
        if ((device < 0 || d == device) && machine().devices[d].accesses++ == 0) protect(d, PROT_READ | PROT_WRITE);
}
Access::~Access() {
    if (!machine().settings.strict) return;
    std::lock_guard<std::recursive_mutex> lock(machine().mutex);
    for (int d = 0; d < machine().settings.devices; ++d)
        if ((device < 0 || d == device) && --machine().devices[d].accesses == 0) protect(d, PROT_NONE);
}

}  // namespace simcuda

// Test-only. The state of the simulated machine, and the two forms that every call of the runtime has.
//
// A CUDA runtime without a GPU: as much of libcudart.so.13 as PyTorch calls. Device memory is host memory; streams are
// queues of work on it. The hardware may run a stream's work at any time between its launch and the call that waits for
// it, so the order of work in different streams is open wherever no event orders it. By default everything runs as late
// as it may: when the host waits for its stream, or for another stream that waits for this one. With SIMCUDA_SEED,
// every call lets a random number of works of random streams run. Both orders are legal, so that only a program that
// forgets to wait, or gives memory away too early, sees a difference.
#pragma once
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "simcuda.h"

namespace simcuda {

struct Record {  // of an event, in a stream or a capture; an event is recorded many times
    struct Queue* queue = nullptr;
    unsigned long long capture = 0;  // the graph's id
    bool is_done = false;
    int asked = 0;  // how often whether it is done
    std::chrono::steady_clock::time_point when = {};
};

struct Item {
    Work work;                        // or, if empty:
    std::shared_ptr<Record> awaited;  // nothing behind it runs before this
    bool can_run() const { return work || awaited->is_done; }
};
struct Queue : std::deque<Item> {};

// From the environment, SIMCUDA_DEVICES and so on; tests change some of them while they run (control.cpp).
struct Settings {
    int devices, driver, capability;
    size_t memory, l2;  // of each device, bytes
    bool strict, trace;
    unsigned seed;  // 0: as late as it may
};

Settings settings_of_environment();

// Faults that a test plants, each for calls to come (control.cpp).
struct Faults {
    long long launches_before = -1;  // that many launches work, the next one fails; -1: none fails
    cudaError_t launch = cudaSuccess;
};

struct Block {
    size_t bytes;
    cudaMemoryType type;
    int device;
};
struct Device {
    Queue queue;  // of the legacy stream and those that synchronise with it
    CUstream_st* legacy;
    size_t used = 0;
    int accesses = 0;  // how many may access its memory now
};

struct Machine {
    Machine();
    Settings settings;
    Faults faults;
    std::recursive_mutex mutex;
    std::vector<Device> devices;
    std::vector<CUstream_st*> streams;
    std::vector<CUgraph_st*> captures;  // going on
    std::map<const char*, Block> blocks;
    std::unordered_map<const void*, CUkern_st> kernels;  // by their host stubs
    std::vector<std::pair<std::string, Bind>> added;     // what add_kernel was given
    cudaError_t failed = cudaSuccess;  // of some work. Reported once, where a real device would report it forever
    std::mt19937 random;
    Queue* favourite = nullptr;  // in a random order
    int running = 0;             // works that run now, one inside of another
    long long launches = 0, waits = 0;
    int initialised_by = 0;  // process
};
Machine& machine();

extern thread_local int current_device;
extern thread_local cudaError_t last_error;
extern thread_local cudaStreamCaptureMode capture_mode;

bool is_forked();             // a CUDA context does not survive fork
bool is_capture_forbidden();  // whether a capture forbids a call that waits or allocates; it then breaks

CUstream_st* stream_of(cudaStream_t stream);
void run_until(Queue& queue, const std::function<bool()>& until);
void drain_all(int device = -1);
void reach(const Record& record);
const Block* block_of(const void* address);
cudaError_t take_failure();  // of work that ran: for calls that synchronise

// A call of the runtime: body(), while no other runs.
template <class Body>
cudaError_t call(const Body& body) {
    cudaError_t error = cudaErrorInitializationError;
    if (!is_forked()) {
        std::lock_guard<std::recursive_mutex> lock(machine().mutex);
        error = body();
    }
    return error == cudaSuccess ? error : last_error = error;
}
// A call that waits for work, or that changes what memory there is: a capture that goes on may forbid it.
template <class Body>
cudaError_t call_outside_of_capture(const Body& body) {
    return call([&] { return is_capture_forbidden() ? cudaErrorStreamCaptureUnsupported : body(); });
}
template <class Body>
cudaError_t call_that_waits(const Body& body) {
    return call_outside_of_capture([&] { return ++machine().waits, body(); });
}

}  // namespace simcuda

struct CUstream_st {
    int device, priority;
    simcuda::Queue* queue;
    CUgraph_st* capture = nullptr;
};
struct CUevent_st {
    int device;
    unsigned flags;
    std::shared_ptr<simcuda::Record> record = {};
};
struct CUgraph_st {  // also what a capture writes to
    unsigned long long id;
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    bool is_broken = false;  // by a call that a capture forbids
    std::vector<simcuda::Work> works = {};
};
struct CUgraphExec_st {
    std::vector<simcuda::Work> works;
};
struct CUkern_st {
    const char* mangled;
    simcuda::Bind bind = nullptr;
    bool is_sought = false;
    std::map<int, size_t> shared = {};  // dynamic shared memory allowed on a device, where more than the 48 KB of all
};

// For tests, through ctypes (simcuda.py): faults to come, and what is in use.
#include <algorithm>

#include "machine.h"

using namespace simcuda;

#pragma GCC visibility push(default)
extern "C" {

// Memory of each device from now on: no more than what is in use and `bytes`. Negative: as at the start.
void simcuda_leave_memory(long long bytes) {
    Machine& m = machine();
    size_t used = 0;
    for (Device& device : m.devices) used = std::max(used, device.used);
    m.settings.memory = bytes < 0 ? settings_of_environment().memory : used + size_t(bytes);
}

// The launch after `launches_before` more returns this error, once.
void simcuda_fail_launch(long long launches_before, int error) {
    machine().faults = {launches_before, cudaError_t(error)};
}

// As if an earlier call of this thread had left it for cudaGetLastError.
void simcuda_leave_error(int error) { last_error = cudaError_t(error); }

// The order in which streams' work runs from now on; 0: as late as it may.
void simcuda_seed(unsigned seed) {
    machine().settings.seed = seed;
    machine().random.seed(seed);
    machine().favourite = nullptr;
}

void simcuda_set_driver(int version) { machine().settings.driver = version; }

long long simcuda_launches() { return machine().launches; }

// Calls that waited for a device.
long long simcuda_waits() { return machine().waits; }
}
#pragma GCC visibility pop

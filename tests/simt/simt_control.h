// Test-only. The emulator's interface to the bindings, for before and after they call a launcher.
#pragma once
#include <cstddef>
#include <vector>

namespace simt {

#pragma GCC visibility push(default)  // the bindings are another library, so that their thread_locals are not poisoned

// Clears the last run's buffers and error. preempt_every: also switch threads at one in so many memory accesses.
void reset(unsigned seed, unsigned preempt_every);

// Runs only these blocks of every launch until the next reset.
void only_blocks(long long first, long long end);

// The first fault since the reset; null: none.
const char* error();

// Whether the kernels' file was compiled with the checks: bounds, races, counts.
bool instrumented();

// Registers memory that the kernels may touch. granule: the element size. Returns the buffer's index.
int add_buffer(const char* name, void* begin, size_t size, size_t granule, bool initialised, bool writable);

struct Counts {
    size_t accesses[2][6];       // [is a write][log2 of the width; 5: a copy of any width]
    unsigned least[2], most[2];  // accesses of one granule, 255 meaning that or more
};
Counts counts(int buffer);

// Bytes that a block reads and writes in all buffers. Reads of a value by several threads between two barriers count
// once: a warp shares it, or it is in the cache.
struct Traffic {
    unsigned threads;
    size_t read, written;
    size_t shared;  // dynamic shared memory of its launch
};
const std::vector<Traffic>& traffic();  // of every block since the reset, in launch order

#pragma GCC visibility pop

}  // namespace simt

// Test-only. The interface between the scheduler (simt.cpp) and the memory checks (simt_check.cpp).
#pragma once
#include "simt.h"

#include <string>
#include <utility>

namespace simt {

using Range = std::pair<char*, size_t>;
inline bool inside(const void* at, Range range) {
    return size_t(static_cast<const char*>(at) - range.first) < range.second;
}

struct Now {                   // where the running thread is in the launch's order of events
    bool running = false;      // false: host code
    unsigned thread = 0;       // in the block
    uint32_t block = 0;        // counts all blocks ever run, from 1
    uint32_t launch = 0;       // the block before this launch's first
    uint32_t block_epoch = 0;  // barriers passed in this block
    uint32_t warp_epoch[32];   // full __syncwarps passed, per warp
};
extern Now now;

// Keeps the first error and ends the launch. Does not return to a running thread.
__attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
void yield();   // lets the scheduler choose again; the thread stays ready
Range stack();  // the running thread's
bool chance(unsigned one_in);
Range dynamic_range();  // this launch's dynamic shared memory

void check_launch(Range kernel_call);  // before the first block
void check_launched();                 // after the last
void check_block(unsigned threads);    // before each block
void check_reset(unsigned preempt_every);

}  // namespace simt

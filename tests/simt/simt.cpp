// Test-only. The runtime of simt.h: one fiber per CUDA thread, blocks one after another on one OS thread.
//
// A thread runs until it reaches a barrier or a warp operation; which ready thread runs next is drawn from the seed.
// The draw stays in one warp for a while, so that warps drift apart and a missing barrier shows.
#include "simt_control.h"
#include "simt_runtime.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <random>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
Now now;

namespace {

#ifdef __x86_64__
using Context = void*;  // a stack pointer; the callee-saved registers and the resume address are on that stack
extern "C" void simt_switch(Context* from, Context to);
asm(R"(.hidden simt_switch
simt_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    popq %rcx
    jmp *%rcx
)");
void make_context(Context& context, Range stack, void (*entry)()) {
    auto top = reinterpret_cast<void**>(stack.first + stack.second) - 2;
    *top = reinterpret_cast<void*>(entry);
    context = top - 6;
}
void switch_context(Context& from, Context& to) { simt_switch(&from, to); }
#else
using Context = ucontext_t;  // portable, some twenty times slower
void make_context(Context& context, Range stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.first;
    context.uc_stack.ss_size = stack.second;
    makecontext(&context, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

constexpr size_t kStack = 256 << 10, kGuard = 4096;
constexpr unsigned kMaxThreads = 1024;

enum State { kReady, kAtBarrier, kAtWarp, kExited };
struct Fiber {
    Context context;
    Range stack;
    uint3 index;
    State state;
    const char* file;  // where it waits
    int line;
    unsigned mask;  // of the warp operation it waits in
    int source;     // the lane it reads there, -1: the ballot
    uint64_t in, out;
};

Fiber fibers[kMaxThreads];
Fiber* self;
Context scheduler;
[[maybe_unused]] const void* host_stack;
[[maybe_unused]] size_t host_stack_size;
uint32_t ready_warps, ready_lanes[32];
uint32_t waiting_lanes[32], exited_lanes[32];  // at a warp operation; after exit
unsigned threads, arrived, exited;
int predicates, barrier_result;
const Fiber* first_arrived;
unsigned seed;
std::mt19937 random_engine;
long long first_block, last_block;
void (*thread_entry)(void*);
void* kernel_call;
std::vector<char> dynamic_memory;
std::string message;

void wake(unsigned thread) {
    fibers[thread].state = kReady;
    ready_lanes[thread / 32] |= 1u << thread % 32;
    ready_warps |= 1u << thread / 32;
}

void leave([[maybe_unused]] bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, host_stack, host_stack_size);
#endif
    switch_context(self->context, scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void resume(unsigned thread) {
    self = &fibers[thread];
    threadIdx = self->index;
    now.thread = thread;
    now.running = true;
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, self->stack.first, kStack);
#endif
    switch_context(scheduler, self->context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    now.running = false;
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
#endif
    thread_entry(kernel_call);
    self->state = kExited;
    exited_lanes[now.thread / 32] |= 1u << lane();
    ++exited;
    leave(true);
}

void start(unsigned thread) {
    Fiber& fiber = fibers[thread];
    if (!fiber.stack.first) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* pages = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
        mprotect(pages, kGuard, PROT_NONE);
        fiber.stack = {static_cast<char*>(pages) + kGuard, kStack};
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack.first, kStack);
#endif
    fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
    make_context(fiber.context, fiber.stack, fiber_main);
    wake(thread);
}

unsigned any_bit(uint32_t mask) {
    unsigned turn = random_engine() % 32;
    return (__builtin_ctz(mask >> turn | mask << (-turn & 31)) + turn) % 32;
}

void run_block() {
    ++now.block;
    now.block_epoch = arrived = exited = predicates = 0;
    std::fill_n(now.warp_epoch, 32, 0);
    check_block(threads);
    ready_warps = 0;
    for (auto* lanes : {ready_lanes, waiting_lanes, exited_lanes}) std::fill_n(lanes, 32, 0);
    for (unsigned i = 0; i < threads; ++i) start(i);
    for (unsigned warp = 0; ready_warps && message.empty();) {
        if (!ready_lanes[warp] || chance(64)) warp = any_bit(ready_warps);
        unsigned lane = any_bit(ready_lanes[warp]);
        ready_lanes[warp] &= ~(1u << lane);
        if (!ready_lanes[warp]) ready_warps &= ~(1u << warp);
        resume(warp * 32 + lane);
    }
    if (exited == threads || !message.empty()) return;
    unsigned at[4] = {}, example[4] = {};
    for (unsigned i = 0; i < threads; ++i) ++at[fibers[i].state], example[fibers[i].state] = i;
    const Fiber &barrier = fibers[example[kAtBarrier]], &warp = fibers[example[kAtWarp]];
    fail("stuck in block %u: %u threads wait at __syncthreads (%s:%d), %u at a warp operation (%s:%d), %u have exited",
         blockIdx.x, at[kAtBarrier], at[kAtBarrier] ? barrier.file : "", at[kAtBarrier] ? barrier.line : 0, at[kAtWarp],
         at[kAtWarp] ? warp.file : "", at[kAtWarp] ? warp.line : 0, exited);
}

bool same_place(const Fiber& a, const Fiber& b) {
    return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}

void wait(State state, const char* file, int line) {
    self->state = state;
    self->file = file;
    self->line = line;
}

void check_same_operation(const Fiber& a, const Fiber& b) {
    if (a.mask != b.mask || !same_place(a, b))
        fail("divergent warp operations: %s:%d, mask %#x, and %s:%d, mask %#x", a.file, a.line, a.mask, b.file, b.line,
             b.mask);
}

// All lanes of the mask have arrived: each gets its value. Arrivals must be cheap, since an operation has many, so
// lanes that wait with overlapping but different masks may be detected only here.
void complete_operation(const Fiber* warp, uint32_t mask, uint32_t whole, bool orders) {
    uint32_t ballot = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        unsigned lane = __builtin_ctz(rest);
        check_same_operation(*self, warp[lane]);
        ballot |= uint32_t(warp[lane].in & 1) << lane;
    }
    unsigned first = now.thread / 32 * 32;
    now.warp_epoch[first / 32] += orders && mask == whole;
    waiting_lanes[first / 32] &= ~mask;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        unsigned lane = __builtin_ctz(rest);
        Fiber& to = fibers[first + lane];
        if (to.source >= 0 && !(mask >> to.source & 1))
            fail("%s:%d: lane %u reads lane %d, which the mask %#x leaves out", to.file, to.line, lane, to.source,
                 mask);
        to.out = to.source < 0 ? ballot : warp[to.source].in;
        wake(first + lane);
    }
}

uint64_t warp_operation(uint32_t mask, uint64_t value, int source, bool orders, const char* file, int line) {
    unsigned warp = now.thread / 32, width = std::min(32u, threads - warp * 32);
    uint32_t whole = width == 32 ? ~0u : (1u << width) - 1;
    wait(kAtWarp, file, line);
    self->mask = mask, self->source = source, self->in = value;
    if (!(mask >> lane() & 1)) fail("%s:%d: the mask %#x leaves out the calling lane", file, line, mask);
    if (uint32_t missing = mask & (~whole | exited_lanes[warp]))
        fail("%s:%d: the mask %#x names lane %d, which has exited or never was", file, line, mask,
             __builtin_ctz(missing));
    if (uint32_t others = mask & waiting_lanes[warp])
        check_same_operation(*self, fibers[warp * 32 + __builtin_ctz(others)]);
    waiting_lanes[warp] |= 1u << lane();
    if ((waiting_lanes[warp] & mask) == mask) complete_operation(fibers + warp * 32, mask, whole, orders);
    leave();
    return self->out;
}

}  // namespace

int lane() { return now.thread % 32; }
void* dynamic_shared() { return dynamic_memory.data(); }
Range dynamic_range() { return {dynamic_memory.data(), dynamic_memory.size()}; }
Range stack() { return self->stack; }
bool chance(unsigned one_in) { return random_engine() % one_in == 0; }

void yield() {
    wake(now.thread);
    leave();
}

void fail(const char* format, ...) {
    char text[600], where[128] = "";
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (now.running)
        snprintf(where, sizeof where, " [block (%u,%u,%u), thread (%u,%u,%u)]", blockIdx.x, blockIdx.y, blockIdx.z,
                 threadIdx.x, threadIdx.y, threadIdx.z);
    if (message.empty()) message = std::string(text) + where;
    if (now.running) leave(true);  // never resumed: kernels own nothing that would need unwinding
}

int block_sync(int predicate, const char* file, int line) {
    wait(kAtBarrier, file, line);
    if (arrived == 0) first_arrived = self;
    if (!same_place(*self, *first_arrived))
        fail("divergent __syncthreads: %s:%d and %s:%d", file, line, first_arrived->file, first_arrived->line);
    predicates += predicate != 0;
    if (++arrived == threads) {
        barrier_result = predicates;
        arrived = predicates = 0;
        ++now.block_epoch;
        for (unsigned i = 0; i < threads; ++i) wake(i);
    }
    leave();
    return barrier_result;
}

unsigned warp_ballot(unsigned mask, bool predicate, bool orders_memory, const char* file, int line) {
    return unsigned(warp_operation(mask, predicate, -1, orders_memory, file, line));
}
uint64_t warp_read(unsigned mask, uint64_t value, int source_lane, const char* file, int line) {
    return warp_operation(mask, value, source_lane, false, file, line);
}

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*), void* call, size_t call_bytes) {
    if (!message.empty()) return;
    blockDim = block, gridDim = grid, thread_entry = thread, kernel_call = call;
    threads = block.x * block.y * block.z;
    if (!threads || threads > kMaxThreads || !grid.x || grid.x > 0x7fffffff || !grid.y || grid.y > 0xffff || !grid.z ||
        grid.z > 0xffff || shared_bytes > 227 << 10)
        return fail("invalid launch: grid (%u,%u,%u), %u threads, %zu bytes of shared memory", grid.x, grid.y, grid.z,
                    threads, shared_bytes);
    dynamic_memory = std::vector<char>(shared_bytes);
    random_engine.seed(seed);
    now.launch = now.block;
    check_launch({static_cast<char*>(call), call_bytes});
    long long blocks = 1ll * grid.x * grid.y * grid.z;
    for (long long b = first_block; b < std::min(blocks, last_block) && message.empty(); ++b) {
        blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
        run_block();
    }
    check_launched();
}

void reset(unsigned new_seed, unsigned preempt_every) {
    seed = new_seed;
    message.clear();
    first_block = 0, last_block = INT64_MAX;
    check_reset(preempt_every);
}
void only_blocks(long long first, long long end) { first_block = first, last_block = end; }
const char* error() { return message.empty() ? nullptr : message.c_str(); }

}  // namespace simt

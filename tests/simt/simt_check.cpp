// Test-only. Checks every memory access of a kernel: bounds, alignment, initialisation, data races; and counts them.
//
// The kernels' file is compiled with -fsanitize=thread -fno-tree-sra, which makes GCC call __tsan_read16(address) and
// the like for each access. Those functions are defined at the end of this file, as in the Linux kernel's KCSAN;
// libtsan is not linked. This file itself is compiled without sanitizers. If the kernels' file is compiled without that
// option, only the poisoning of shared memory remains.
#include "simt_control.h"
#include "simt_runtime.h"

#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <memory>
#include <new>
#include <vector>

namespace simt {
namespace {

constexpr uint16_t kSeveralWarps = 0xffff, kSeveralLanes = 0x8000;  // in Cell::reader; the second or-ed with the warp
// The last accesses of one granule; all zero: none.
struct Cell {
    uint32_t write_block, read_block, write_epoch, read_epoch;  // epoch: block << 16 | warp
    uint16_t writer, reader;
    uint8_t reads, writes, atomic, several_blocks;
};

struct Region {
    std::string name;
    Range range;
    size_t granule;
    bool initialised, writable, shared;
    Counts counts = {};
    std::shared_ptr<Cell> cells;
    Region(const char* name, Range range, size_t granule, bool initialised, bool writable, bool shared)
        : name(name), range(range), granule(granule), initialised(initialised), writable(writable), shared(shared) {
        size_t bytes = (range.second / granule + 1) * sizeof(Cell);  // mapped lazily: a buffer may be huge
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (map == MAP_FAILED) throw std::bad_alloc();
        cells.reset(static_cast<Cell*>(map), [bytes](Cell* c) { munmap(c, bytes); });
    }
};

std::vector<Region> regions;
std::vector<Region*> by_address;
std::vector<Traffic> moved;
size_t buffers;  // the regions that tests have registered; the rest are a launch's shared memory
Range parameters, module_image, tls_segment;
unsigned preempt;
bool has_checks;
thread_local volatile char tls_anchor;

void find_module() {  // its static data, and the TLS segment, which holds the __shared__ variables
    tls_anchor = 1;   // gives this thread its copy of the segment
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
            char *low = nullptr, *high = nullptr;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& header = info->dlpi_phdr[i];
                char* at = reinterpret_cast<char*>(info->dlpi_addr + header.p_vaddr);
                if (header.p_type == PT_LOAD) low = low ? low : at, high = at + header.p_memsz;
                if (header.p_type == PT_TLS) tls_segment = {static_cast<char*>(info->dlpi_tls_data), header.p_memsz};
            }
            module_image = {low, high - low};
            return int(inside(&preempt, module_image));
        },
        nullptr);
}

std::string source_line(void* pc) {
    Dl_info info;
    char command[600], text[256] = "?";
    if (!dladdr(pc, &info)) return text;
    snprintf(command, sizeof command, "addr2line -se '%s' %#tx", info.dli_fname,
             static_cast<char*>(pc) - 1 - static_cast<char*>(info.dli_fbase));
    if (FILE* pipe = popen(command, "r")) {
        if (fgets(text, sizeof text, pipe)) text[std::strcspn(text, " \n")] = 0;
        pclose(pipe);
    }
    return text;
}

// Whether what `thread` did at `epoch` of this block happens before what the running thread does now. Barriers and full
// __syncwarps order memory; shuffles and ballots do not, as CUDA documents.
bool ordered(uint16_t thread, uint32_t epoch) {
    if (thread == now.thread || epoch >> 16 != now.block_epoch) return true;
    if (thread == kSeveralWarps) return false;
    unsigned warp = thread & kSeveralLanes ? thread & ~kSeveralLanes : thread / 32;
    return warp == now.thread / 32 && (epoch & 0xffff) != now.warp_epoch[warp];
}

enum Kind { kRead, kWrite, kAtomic };
constexpr int kNear = 4096;  // an access this close to a buffer is reported as missing it

const char* conflict(Region& region, Cell& cell, Kind kind, uint32_t epoch) {
    auto recent = [&](uint32_t block) { return block > now.launch && (block == now.block || !region.shared); };
    bool written = recent(cell.write_block), was_read = recent(cell.read_block);
    bool read_elsewhere = was_read && (cell.several_blocks || cell.read_block != now.block);
    if (written && !(kind == kAtomic && cell.atomic)) {
        if (cell.write_block != now.block) return "race with another block's write";
        if (!ordered(cell.writer, cell.write_epoch)) return "race with another thread's write";
    }
    if (kind != kRead && read_elsewhere) return "race with another block's read";
    if (kind != kRead && was_read && !ordered(cell.reader, cell.read_epoch)) return "race with another thread's read";
    if (kind != kWrite && !region.initialised && !(region.shared ? written : cell.write_block)) return "uninitialised";
    if (kind == kRead) {
        bool again = was_read && cell.read_block == now.block && cell.read_epoch >> 16 == now.block_epoch;
        if (!region.shared && !again) moved.back().read += region.granule;
        uint16_t several = kSeveralLanes | now.thread / 32;
        cell.several_blocks = read_elsewhere;
        if (!was_read || read_elsewhere || cell.read_epoch >> 16 != now.block_epoch) cell.reader = now.thread;
        else if (cell.reader != now.thread)
            cell.reader = cell.reader == several || cell.reader / 32 == now.thread / 32 ? several : kSeveralWarps;
        cell.read_block = now.block, cell.read_epoch = epoch;
        cell.reads += cell.reads < 255;
    } else {
        cell.write_block = now.block, cell.write_epoch = epoch, cell.writer = now.thread;
        cell.atomic = kind == kAtomic;
        cell.writes += cell.writes < 255;
        if (!region.shared) moved.back().written += region.granule;
    }
    return nullptr;
}

// aligned: one access, of the type's own alignment; otherwise a copy that nvcc might split.
void touch(const void* address, size_t size, Kind kind, bool aligned, void* pc) {
    if (!now.running || !size) return;
    auto at = static_cast<const char*>(address);
    if (inside(at, stack()) || (kind == kRead && (inside(at, parameters) || inside(at, module_image)))) return;
    if (preempt && chance(preempt)) yield();
    static const char* const kNames[] = {"read", "write", "atomic"};
    Region *region = nullptr, *nearest = nullptr;
    auto above = std::upper_bound(by_address.begin(), by_address.end(), at,
                                  [](const char* p, const Region* r) { return p < r->range.first; });
    if (above != by_address.end() && at >= (*above)->range.first - kNear) nearest = *above;
    if (above != by_address.begin()) {
        Region& below = **--above;
        if (inside(at, below.range)) region = &below;
        if (inside(at, {below.range.first, below.range.second + kNear})) nearest = &below;
    }
    if (!region && !nearest)
        fail("out of bounds: %s of %zu bytes at %p, near no buffer, at %s", kNames[kind], size, address,
             source_line(pc).c_str());
    auto broken = [&](const char* what, const Region& r) {
        fail("%s: %s of %zu bytes at byte %td of %s (%zu bytes), at %s", what, kNames[kind], size, at - r.range.first,
             r.name.c_str(), r.range.second, source_line(pc).c_str());
    };
    if (!region || !inside(at + size - 1, region->range)) broken("out of bounds", region ? *region : *nearest);
    if (aligned && reinterpret_cast<uintptr_t>(at) % size) broken("misaligned", *region);
    if (kind != kRead && !region->writable) broken("store to an input", *region);
    ++region->counts.accesses[kind != kRead][aligned ? __builtin_ctzl(size) : 5];
    size_t offset = at - region->range.first, granule = region->granule;
    uint32_t epoch = now.block_epoch << 16 | now.warp_epoch[now.thread / 32];
    for (size_t i = offset / granule; i <= (offset + size - 1) / granule; ++i)
        if (auto what = conflict(*region, region->cells.get()[i], kind, epoch)) broken(what, *region);
}

}  // namespace

void atomic_access(const void* address, size_t size) {
    touch(address, size, kAtomic, true, __builtin_return_address(0));
}

void check_reset(unsigned preempt_every) {
    preempt = preempt_every;
    regions.clear();
    moved.clear();
    buffers = 0;
    find_module();
}
void check_launch(Range kernel_call) {
    parameters = kernel_call;
    if (!has_checks) return;
    regions.emplace_back("static shared memory", tls_segment, 1, false, true, true);
    regions.emplace_back("dynamic shared memory", dynamic_range(), 1, false, true, true);
    by_address.clear();
    for (Region& region : regions) by_address.push_back(&region);
    std::sort(by_address.begin(), by_address.end(),
              [](const Region* a, const Region* b) { return a->range.first < b->range.first; });
}
void check_launched() {
    while (regions.size() > buffers) regions.pop_back();
}
void check_block(unsigned threads) {
    moved.push_back({threads, 0, 0, dynamic_range().second});
    for (Range range : {tls_segment, dynamic_range()}) std::fill_n(range.first, range.second, '\xff');  // NaN
}

bool instrumented() { return has_checks; }
const std::vector<Traffic>& traffic() { return moved; }

int add_buffer(const char* name, void* begin, size_t size, size_t granule, bool initialised, bool writable) {
    regions.emplace_back(name, Range(static_cast<char*>(begin), size), granule, initialised, writable, false);
    return int(buffers++);
}

Counts counts(int buffer) {
    const Region& region = regions.at(buffer);
    Counts counts = region.counts;
    counts.least[0] = counts.least[1] = 255;
    for (size_t i = 0; i < region.range.second / region.granule; ++i) {
        const Cell& cell = region.cells.get()[i];
        const unsigned times[2] = {cell.reads, cell.writes};
        for (int is_write : {0, 1}) {
            counts.least[is_write] = std::min(counts.least[is_write], times[is_write]);
            counts.most[is_write] = std::max(counts.most[is_write], times[is_write]);
        }
    }
    return counts;
}

}  // namespace simt

#ifndef __SANITIZE_ADDRESS__  // the kernels of that build do not call these
#define SIMT_TOUCH(size, kind, aligned) simt::touch(p, size, simt::kind, aligned, __builtin_return_address(0))
#define SIMT_ACCESSES(size)                                                       \
    void __tsan_read##size(void* p) { SIMT_TOUCH(size, kRead, true); }            \
    void __tsan_write##size(void* p) { SIMT_TOUCH(size, kWrite, true); }          \
    void __tsan_unaligned_read##size(void* p) { SIMT_TOUCH(size, kRead, false); } \
    void __tsan_unaligned_write##size(void* p) { SIMT_TOUCH(size, kWrite, false); }
extern "C" {
void __tsan_read_range(void* p, size_t size) { SIMT_TOUCH(size, kRead, false); }
void __tsan_write_range(void* p, size_t size) { SIMT_TOUCH(size, kWrite, false); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() { simt::has_checks = true; }
// clang-format off
SIMT_ACCESSES(1) SIMT_ACCESSES(2) SIMT_ACCESSES(4) SIMT_ACCESSES(8) SIMT_ACCESSES(16)
// clang-format on
}
#endif

// The traces that drive the chip's model, as trace.py records them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

// The order is that of PIPES in trace.py.
// clang-format off
enum Pipe : uint8_t {
    kAlu, kFma, kSpecial, kConstantLoad, kUniformConstantLoad, kLoad, kStore, kCachedLoad, kCachedStore, kSharedAccess,
    kShuffleOp, kBarrierOp, kJumpOp, kSystemRegisterOp
};
// clang-format on

struct Record {
    Pipe pipe;
    uint8_t stall, sets_when_written, sets_when_read, waits_for, passes;
    uint16_t latency;
    uint32_t constant, first_segment, segments;
};
struct Segment {
    uint64_t address;
    uint32_t sectors, bytes;
};
struct Span {
    uint32_t begin, end;
};
static_assert(sizeof(Record) == 20 && sizeof(Segment) == 16);

struct Traces {
    std::vector<Record> records;
    std::vector<Segment> segments;
    std::vector<Span> warps;       // records of each
    std::vector<Span> kinds;       // of blocks: warps of each
    std::vector<uint32_t> launch;  // the kind of each block

    explicit Traces(const char* path) {
        std::ifstream file(path, std::ios::binary);
        read(file, records), read(file, segments), read(file, warps), read(file, kinds), read(file, launch);
        if (!file) std::cerr << path << ": cannot be read\n", exit(1);
    }

private:
    template <class T>
    static void read(std::ifstream& file, std::vector<T>& to) {
        uint64_t count = 0;
        file.read(reinterpret_cast<char*>(&count), sizeof count);
        if (file) to.resize(count);
        file.read(reinterpret_cast<char*>(to.data()), std::streamsize(count * sizeof(T)));
    }
};

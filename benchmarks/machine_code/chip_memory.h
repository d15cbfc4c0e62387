// L2 and DRAM in the chip's model. Times are cycles of the SMs' clock, unless they say otherwise.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

#include "chip_traces.h"

constexpr int kChannels = 96;
constexpr double kL2 = 150;
constexpr double kDramNanoseconds = 600;  // from L1 to DRAM and back, without queues
constexpr size_t kSharingBlocks = 16;     // neighbouring blocks that use the same sectors of gains and statistics
constexpr uint64_t kOddConstant = 0x9E3779B97F4A7C15ull, kMixer = 0xD6E8FEB86659FD93ull;

// A server that takes one request after another.
struct Server {
    double free = 0;
    // Occupies it for `cycles`, as soon as it is free; returns when that begins.
    double take(double now, double cycles) {
        double begin = std::max(now, free);
        free = begin + cycles;
        return begin;
    }
};

// L2 and DRAM.
class Memory {
public:
    Memory(double ghz, double gb_per_second, double l2_gb_per_second)
        : dram_latency_(kDramNanoseconds * ghz),
          per_byte_(kChannels * ghz / gb_per_second),
          per_l2_byte_(kChannels * ghz / l2_gb_per_second) {}

    // When a segment of a block has come from memory; `salt`: of the block, whose addresses its trace does not know.
    double load(const Segment& segment, uint64_t salt, double now) { return move(segment, salt, now) + dram_latency_; }
    void store(const Segment& segment, uint64_t salt, double now) { move(segment, salt, now); }

    // A sector of what neighbouring blocks share: DRAM gives 64 bytes once.
    double load_cached(uint64_t sector, size_t block, double now) {
        uint64_t key = (sector / 2) << 16 ^ (block / kSharingBlocks);
        if (auto found = cached_.find(key); found != cached_.end()) return std::max(now + kL2, found->second);
        Server& dram = dram_[(key * kOddConstant >> 40) % kChannels];
        dram.take(now, 64 * per_byte_);
        bytes_ += 64;
        return cached_[key] = dram.free + dram_latency_;
    }
    double bytes() const { return bytes_; }
    double idle_from() const {
        double last = 0;
        for (const Server& each : dram_) last = std::max(last, each.free);
        return last;
    }

private:
    double move(const Segment& segment, uint64_t salt, double now) {
        uint64_t hash = (segment.address ^ salt) * kMixer;
        hash = (hash ^ hash >> 32) * kMixer;
        size_t channel = (hash >> 33) % kChannels;
        l2_[channel].take(now, 32 * segment.sectors * per_l2_byte_);
        dram_[channel].take(l2_[channel].free, segment.bytes * per_byte_);
        bytes_ += segment.bytes;
        return dram_[channel].free;
    }
    double dram_latency_, per_byte_, per_l2_byte_, bytes_ = 0;
    Server l2_[kChannels], dram_[kChannels];
    std::unordered_map<uint64_t, double> cached_;
};

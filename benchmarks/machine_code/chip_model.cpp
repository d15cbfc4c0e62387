// A model in time of a GPU, driven by traces of a launch's blocks (trace.py).
//
// An SM has four schedulers that issue an instruction a cycle, of the warp that was last or else of the oldest that is
// ready: its stall counts, scoreboards and barriers decide, as they stand in the machine code. Pipes, the constant
// caches and the load/store unit are servers with a rate; L2 and DRAM are queues, one for each channel. Not modelled:
// the instruction cache, DRAM's turnaround between reads and writes, clocks that vary.
//
//     chip_model TRACES SMS GHZ GB_PER_SECOND L2_GB_PER_SECOND BLOCKS_PER_SM    prints a JSON object
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <iostream>
#include <queue>
#include <unordered_map>
#include <utility>
#include <vector>

#include "chip_memory.h"
#include "chip_traces.h"

namespace {

// Times are cycles of the SMs' clock, unless they say otherwise.
constexpr int kSchedulers = 4, kScoreboards = 6;
constexpr double kBeforeNanoseconds = 700;  // from the start of the launch to the first block
constexpr double kAfterNanoseconds = 400;   // from the last instruction to the end of the launch
constexpr double kBlockStart = 300;         // from the end of a block to the first instruction of the next one
constexpr double kWarpStart = 2, kBlocksPerCycle = 8;
constexpr double kL1 = 38, kOperandsRead = 10, kFmaLatency = 5;
constexpr double kShared = 28, kShuffle = 24, kSharedOperandsRead = 8, kBarrier = 22, kJump = 7, kSystemRegister = 25;
constexpr double kConstant = 38, kConstantMissesL1 = 75, kConstantMissesL15 = 260;
constexpr int kConstantL1 = 2048, kConstantL1Line = 64, kConstantL15 = 32768, kConstantL15Line = 256;  // bytes
constexpr double kAluPass = 2, kSpecialPass = 8;  // cycles that a warp occupies a pipe of 16 and of 4 lanes
constexpr double kNever = 1e300, kSame = 1e-9;

class Cache {  // fully associative, least recently used; says only what hits
public:
    Cache(int bytes, int line) : line_(line), capacity_(size_t(bytes / line)) {}
    bool hits(uint32_t address) {
        ++now_;
        for (Line& line : lines_)
            if (line.tag == address / line_) return line.used = now_, true;
        if (lines_.size() < capacity_) lines_.push_back({address / line_, now_});
        else
            *std::min_element(lines_.begin(), lines_.end(), [](auto& a, auto& b) { return a.used < b.used; }) = {
                address / line_, now_};
        return false;
    }

private:
    struct Line {
        uint32_t tag;
        uint64_t used;
    };
    uint32_t line_;
    size_t capacity_;
    std::vector<Line> lines_;
    uint64_t now_ = 0;
};

struct Warp;
struct Block {
    size_t index;
    int live;
    std::vector<Warp*> at_barrier = {};
    uint64_t salt() const { return (index + 1) * kOddConstant; }
};
struct Warp {
    Span records;
    Block& block;
    size_t scheduler;
    double scoreboards[kScoreboards] = {};
    double last_load = 0;  // when the last of its streamed data comes
};
struct Sm {
    Server load_store;
    Cache constants{kConstantL1, kConstantL1Line}, more_constants{kConstantL15, kConstantL15Line};
    std::unordered_map<uint64_t, double> cached;  // sectors by block, and when they come
};
struct Scheduler {
    std::vector<Warp*> warps;   // oldest first
    std::vector<double> ready;  // when each may issue, kNever at a barrier; apart, as each issue looks at all of them
    const Warp* last = nullptr;
    double free = 0, event = kNever;
    Server alu, fma, special;
};

class Chip {
public:
    Chip(const Traces& traces, int sms, double ghz, const Memory& memory, int blocks_per_sm)
        : traces_(traces), ghz_(ghz), memory_(memory), sms_(sms), schedulers_(sms * kSchedulers) {
        for (int i = 0; i < blocks_per_sm; ++i)
            for (int sm = 0; sm < sms; ++sm)
                start_block(sm, kBeforeNanoseconds * ghz + (double(i) * sms + sm) / kBlocksPerCycle);
    }

    void run() {
        while (!events_.empty()) {
            auto [now, scheduler] = events_.top();
            events_.pop();
            Scheduler& s = schedulers_[scheduler];
            if (now != s.event) continue;  // an earlier one has taken its place
            s.event = kNever;
            if (size_t place = chosen(s, now); place < s.warps.size()) issue(s, place, now);
            schedule(scheduler);
        }
        double end = std::max(last_issue_ + kAfterNanoseconds * ghz_, memory_.idle_from());
        std::printf("{\"microseconds\": %.4f, \"bytes\": %.0f, \"instructions\": %zu, \"issue_slots_used\": %.4f}\n",
                    end / ghz_ / 1e3, memory_.bytes(), instructions_,
                    double(instructions_) / double(schedulers_.size()) / end);
    }

private:
    using Event = std::pair<double, size_t>;

    void start_block(size_t sm, double now) {
        if (started_ == traces_.launch.size()) return;
        Span kind = traces_.kinds[traces_.launch[started_]];
        blocks_.push_back({started_++, int(kind.end - kind.begin)});
        for (uint32_t i = 0; i < kind.end - kind.begin; ++i) {
            size_t scheduler = sm * kSchedulers + i % kSchedulers;
            warps_.push_back({traces_.warps[kind.begin + i], blocks_.back(), scheduler});
            schedulers_[scheduler].warps.push_back(&warps_.back());
            schedulers_[scheduler].ready.push_back(now + i * kWarpStart);
        }
        for (size_t i = 0; i < kSchedulers; ++i) schedule(sm * kSchedulers + i);
    }

    // Puts the scheduler's next issue among the events.
    void schedule(size_t scheduler) {
        Scheduler& s = schedulers_[scheduler];
        double next = kNever;
        for (double ready : s.ready) next = std::min(next, ready);
        if (next == kNever) return;
        next = std::max(next, s.free);
        if (next < s.event - kSame) events_.push({s.event = next, scheduler});
    }

    // The place of the warp that issues; behind all of them if none can.
    static size_t chosen(const Scheduler& s, double now) {
        size_t oldest = s.warps.size();
        for (size_t i = s.warps.size(); i-- > 0;) {
            if (s.ready[i] > now + kSame) continue;
            if (s.warps[i] == s.last) return i;
            oldest = i;
        }
        return oldest;
    }

    // When an instruction's operands have been read, its result is written, and the warp may issue the next one.
    struct Outcome {
        double read, written, next;
    };

    void issue(Scheduler& s, size_t place, double now) {
        Warp& warp = *s.warps[place];
        const Record& record = traces_.records[warp.records.begin++];
        const bool ends = warp.records.begin == warp.records.end;
        Outcome outcome = execute(record, warp, now);
        if (record.sets_when_written < kScoreboards) raise(warp.scoreboards[record.sets_when_written], outcome.written);
        if (record.sets_when_read < kScoreboards) raise(warp.scoreboards[record.sets_when_read], outcome.read);
        s.free = now + 1;
        s.last = &warp;
        ++instructions_;
        last_issue_ = std::max(last_issue_, now);
        s.ready[place] = record.pipe == kBarrierOp ? kNever : ready_from(warp, outcome.next);
        if (record.pipe == kBarrierOp) arrive(warp, now);
        if (ends) finish(warp, now);
    }

    static void raise(double& value, double to) { value = std::max(value, to); }

    // From `time` on, or as soon as the scoreboards of the warp's next instruction allow.
    double ready_from(const Warp& warp, double time) const {
        if (warp.records.begin == warp.records.end) return time;
        for (int i = 0; i < kScoreboards; ++i)
            if (traces_.records[warp.records.begin].waits_for >> i & 1) raise(time, warp.scoreboards[i]);
        return time;
    }

    void arrive(Warp& warp, double now) {
        Block& block = warp.block;
        block.at_barrier.push_back(&warp);
        if (int(block.at_barrier.size()) < block.live) return;
        for (Warp* each : std::exchange(block.at_barrier, {})) {
            Scheduler& s = schedulers_[each->scheduler];
            s.ready[place_of(s, each)] = ready_from(*each, now + kBarrier);
            schedule(each->scheduler);
        }
    }

    void finish(const Warp& warp, double now) {
        Scheduler& s = schedulers_[warp.scheduler];
        const auto place = std::ptrdiff_t(place_of(s, &warp));
        s.warps.erase(s.warps.begin() + place);
        s.ready.erase(s.ready.begin() + place);
        if (--warp.block.live == 0) start_block(warp.scheduler / kSchedulers, now + kBlockStart);
    }

    static size_t place_of(const Scheduler& s, const Warp* warp) {
        return size_t(std::find(s.warps.begin(), s.warps.end(), warp) - s.warps.begin());
    }

    Outcome execute(const Record& r, Warp& warp, double now) {
        Scheduler& s = schedulers_[warp.scheduler];
        Sm& sm = sms_[warp.scheduler / kSchedulers];
        const double next = now + r.stall;
        switch (r.pipe) {
            case kAlu: return {now, now, std::max(next, s.alu.take(now, kAluPass) + 1)};
            case kFma: {
                double begin = s.fma.take(now, r.passes);
                return {now, begin + kFmaLatency, std::max(next, begin + 1)};
            }
            case kSpecial: {
                double begin = s.special.take(now, kSpecialPass);
                return {begin + kSpecialPass, begin + r.latency, next};
            }
            case kConstantLoad: return {now + kOperandsRead, now + kConstant + constant_miss(sm, r.constant), next};
            case kUniformConstantLoad: return {now, now, next + constant_miss(sm, r.constant)};
            case kSharedAccess: {
                double end = sm.load_store.take(now, r.passes) + r.passes;
                return {end + kSharedOperandsRead, end + kShared, next};
            }
            case kShuffleOp: {
                double begin = sm.load_store.take(now, 1);
                return {begin + kSharedOperandsRead, begin + kShuffle, next};
            }
            case kJumpOp: return {now, now, next + kJump};
            case kSystemRegisterOp: return {now, now + kSystemRegister, next};
            case kBarrierOp: return {now, now, next};
            default: return access(r, sm, warp, now);
        }
    }

    static double constant_miss(Sm& sm, uint32_t address) {
        if (sm.constants.hits(address)) return 0;
        return sm.more_constants.hits(address) ? kConstantMissesL1 : kConstantMissesL15;
    }

    // Global memory.
    Outcome access(const Record& r, Sm& sm, Warp& warp, double now) {
        const Block& block = warp.block;
        const double begin = sm.load_store.take(now, r.passes);
        double written = begin + kL1;
        for (uint32_t i = r.first_segment; i < r.first_segment + r.segments; ++i) {
            const Segment& segment = traces_.segments[i];
            if (r.pipe == kLoad) raise(written, memory_.load(segment, block.salt(), begin));
            else if (r.pipe == kStore) memory_.store(segment, block.salt(), begin);
            else if (r.pipe == kCachedLoad) {
                auto [found, is_new] = sm.cached.try_emplace(segment.address << 20 ^ block.index);
                if (is_new) found->second = memory_.load_cached(segment.address, block.index, begin);
                raise(written, found->second);
            }
        }
        if (r.pipe == kLoad) {
            if (r.segments == 0) raise(written, warp.last_load);  // the warp's sectors are on their way
            raise(warp.last_load, written);
        }
        return {begin + r.passes + kOperandsRead, written, now + r.stall};
    }

    const Traces& traces_;
    double ghz_;
    Memory memory_;
    std::vector<Sm> sms_;
    std::vector<Scheduler> schedulers_;
    std::deque<Warp> warps_;    // a deque: references stay valid
    std::deque<Block> blocks_;  // all that have been started
    std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
    size_t started_ = 0, instructions_ = 0;
    double last_issue_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 7) return std::cerr << "chip_model: want the arguments that its comment names\n", 2;
    const Traces traces(arguments[1]);
    const double ghz = atof(arguments[3]);
    const Memory memory(ghz, atof(arguments[4]), atof(arguments[5]));
    Chip(traces, atoi(arguments[2]), ghz, memory, atoi(arguments[6])).run();
}

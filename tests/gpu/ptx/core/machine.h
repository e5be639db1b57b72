// State of the emulated GPU: a decoded program, the warps of the resident CTAs, memory and its shadow.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int LANES = 32;
constexpr u64 SHARED_WINDOW = 0x0100'0000'0000'0000, LOCAL_WINDOW = 0x0200'0000'0000'0000;  // of generic addresses
constexpr u64 WINDOW_SIZE = 1ull << 32;
constexpr u32 SHARED_BASE = 1024;  // start of shared memory, as on sm_90

struct Warp;
struct Inst;
using Handler = void (*)(Warp&, const Inst&);

// A register (or a constant, which is a register that is never written): offset of its 32 lanes in the register file of
// the warp, and the number of its mask of defined lanes. A predicate is one u32, one bit per lane.
struct Operand {
    u32 off, id;
};

enum Flags : u32 {
    SINK = 1,        // an undefined source is an error; otherwise it makes the result undefined
    OWN_DEF = 2,     // the handler sets the mask of defined lanes of the results
    COLLECTIVE = 4,  // waits for the lanes named by its last operand (a member mask)
    ALIGNED = 8,     // all live lanes of the warp must execute it together
    BRANCH = 16,     // the handler sets the program counters
    MEMORY = 32,     // another warp may run after it
};

// Bits of imm[7] of floating-point instructions
enum Float : i64 { FTZ = 1, SAT = 2, ROUND_SHIFT = 2 };  // then 0 rn, 1 rz, 2 rm, 3 rp

struct Inst {
    Handler fn;
    const Operand* op;  // destinations first
    u32 destinations, operands, flags, line;
    i32 pred, pred_id;  // guard predicate: offset (-1: none) and number
    bool negated;
    i64 imm[8];
};

struct Special {
    u32 code, off;
};

struct Program {
    std::vector<Inst> code;
    std::vector<Operand> operands;
    std::vector<Special> specials;
    std::vector<u8> constants;  // start of every register file
    u32 file_size, registers, constant_registers;
    u32 static_shared, local_size;
    u32 granule_shared, granule_global;  // bytes that share a shadow cell: the narrowest access of the program
    std::vector<u64> executed, executed_lanes;
};

// Thread and time of an access: clock << 32 | CTA << 12 | warp << 6 | strong << 5 | lane. The clock of a warp is
// incremented at barriers and releases, where its accesses become visible to others; so a value of the clock is a point
// in its program order.
using Epoch = u64;
constexpr Epoch STRONG = 32;
inline u32 clock_of(Epoch e) { return e >> 32; }
inline u32 cta_of(Epoch e) { return e >> 12 & 0xfffff; }
inline u32 warp_of(Epoch e) { return e >> 6 & 63; }
inline u32 lane_of(Epoch e) { return e & 31; }

struct GlobalCell {
    Epoch write, read[2];
    u32 write_pc, read_pc[2];
};

struct SharedCell {
    Epoch write;
    u32 write_pc;
    u16 copying;   // cp.async in flight that write here
    u16 matrices;  // wgmma in flight that read here
};

struct Allocation {
    u64 lo, hi;
    std::string name;
    bool writable, poisoned;
    GlobalCell* cells = nullptr;
};

using Clocks = std::vector<u32>;
using Foreign = std::shared_ptr<const Clocks>;  // of all warps of the grid; null: no synchronization with other CTAs

struct Copy {  // a cp.async of one lane
    u64 from;
    u32 to, size, filled, pc;
    u8 lane;
};

struct Cta;
struct Launch;

struct Warp {
    Launch* launch;
    Cta* cta;
    u32 number;                 // within its CTA
    u8* file;                   // registers
    u32* defined;               // masks of defined lanes
    u32 pcs[LANES];             // of lanes that are not active
    u32 live, active, blocked;  // lanes: not exited; executing; waiting in a collective
    u32 exec;                   // lanes that the current instruction runs for: active and guarded true
    u32 pc;                     // of the active lanes
    u32 next_pc;                // lowest of the others
    bool jumped, waiting, done;
    u32 barrier;  // at which it waits
    u32 clock;
    Clocks seen;                         // clocks of the CTA's warps that happen before this point
    Clocks fenced;                       // what the last fence.proxy.async covers
    Foreign foreign, released, pending;  // of other CTAs: known; at the last fence; read but not yet fenced
    std::vector<Copy> open;              // cp.async since the last commit
    std::vector<std::vector<Copy>> groups;
    std::vector<std::vector<std::pair<u32, u32>>> matrix_groups;  // shared ranges that committed wgmma read
    std::vector<std::pair<u32, u32>> matrix_open;
    std::vector<u32> in_flight;  // numbers of the registers that wgmma are writing
    u8* local;
    u32 carry = 0;         // the condition code register, one bit per lane
    bool tainted = false;  // the last read raced with a write: its value counts as undefined
    std::unordered_map<u32, std::array<u32, 16>> parts;      // by register that was packed: defined lanes of each part
    std::unordered_map<u32, std::array<u64, LANES>> loaded;  // by load: its last addresses
};

struct Barrier {
    u32 expected = 0, arrived = 0;
    std::vector<u32> warps;     // waiting
    std::vector<u32> arrivals;  // arrived, waiting or not
    Clocks clocks;
    Foreign foreign;
    u32 pc = 0;
    u32 red_all = ~0u, red_any = 0, red_count = 0;
};

struct MBarrier {
    u32 count = 0, pending = 0, phase = 0;
    i64 tx = 0;
    Clocks clocks, done;  // of the arrived warps; at the end of the last phase
};

struct Bulk {  // a cp.async.bulk in flight
    u64 from;
    u32 to, size, barrier, warp, pc;
};

struct Cta {
    u32 x, y, z, number;
    std::vector<Warp> warps;
    std::vector<u8> files, shared, locals;
    std::vector<u32> masks;
    std::vector<u8> state;  // of bytes of shared memory: 0 never written, 1 written, 2 written with undefined
    std::vector<SharedCell> cells;
    std::vector<u64> reads;  // [cell][warp]: clock << 32 | lane << 24 | pc of its last read
    Barrier barriers[16];
    std::map<u32, MBarrier> mbarriers;
    std::vector<Bulk> bulk;
    u32 running;
};

struct Sync {  // the state released at an address with strong accesses
    Foreign clocks;
};

enum Kind { ERROR, WARNING, NOTE };

struct Launch {
    Program* program;
    u32 grid[3], block[3], warps_per_cta, threads;
    u32 shared_size;
    std::vector<u8> params;
    std::vector<Allocation> allocations;  // sorted by address
    std::unordered_map<u64, Sync> syncs;
    std::mt19937_64 random;
    u64 executed = 0, budget;
    bool races, noise, warp_races;
    std::vector<std::string> reports;
    std::map<std::string, u64> seen;
    bool failed = false;

    // Races that may be harmless: the value that was read is marked undefined. If it is used, they are reported as
    // errors, otherwise as notes.
    std::map<std::string, std::string> suspects;
    void suspect(const std::string& what, u32 line, const Warp& warp, u32 lane, const std::string& detail);
    void convict();

    void report(Kind kind, const std::string& what, u32 line, const Warp* warp, u32 lane, const std::string& detail);
};

struct Failure {};  // thrown if execution cannot continue; the report gives the reason

template <class T>
T* lanes(const Warp& w, const Operand& o) {
    return reinterpret_cast<T*>(w.file + o.off);
}
inline u32& mask(const Warp& w, const Operand& o) { return *reinterpret_cast<u32*>(w.file + o.off); }

std::unordered_map<std::string, u32>& handler_names();
std::vector<Handler>& handlers();

struct Register {
    Register(const std::string& name, Handler fn) {
        if (!handler_names().emplace(name, handlers().size()).second) throw std::runtime_error("twice: " + name);
        handlers().push_back(fn);
    }
};

template <class F>
inline void for_lanes(u32 mask, F f) {
    for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

// memory.cpp
enum Access { READ, WRITE, ATOMIC };
// Host address of a checked access; null if it is not allowed. `data`: the value that a write stores; threads that
// write equal values do not conflict.
u8* global_at(Warp& w, const Inst& I, u32 lane, u64 address, u32 size, Access access, bool strong,
              const u8* data = nullptr);
u8* shared_at(Warp& w, const Inst& I, u32 lane, u64 address, u32 size, Access access, u32* defined,
              const u8* data = nullptr);
void wait_copies(Warp& w, const Inst& I, u32 left);
void wait_matrices(Warp& w, u32 left);
void join(Clocks& a, const Clocks& b);
void join(Foreign& a, const Foreign& b);
std::string where(const Launch& l, Epoch e);

}  // namespace ptx

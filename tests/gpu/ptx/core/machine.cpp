// Control flow, warp collectives and barriers; the scheduler; the interface for Python.
#include "machine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace ptx {

std::unordered_map<std::string, u32>& handler_names() {
    static std::unordered_map<std::string, u32> names;
    return names;
}
std::vector<Handler>& handlers() {
    static std::vector<Handler> all;
    return all;
}

static std::string row(Kind kind, const std::string& what, u32 line, const Warp* warp, u32 lane,
                       const std::string& detail) {
    static const char* names[] = {"error", "warning", "note"};
    char place[96] = "";
    if (warp)
        snprintf(place, sizeof place, "CTA (%u,%u,%u) thread %u", warp->cta->x, warp->cta->y, warp->cta->z,
                 warp->number * 32 + lane);
    return std::string(names[kind]) + "\t" + what + "\t" + std::to_string(line) + "\t" + place + "\t" + detail;
}
void Launch::report(Kind kind, const std::string& what, u32 line, const Warp* warp, u32 lane,
                    const std::string& detail) {
    if (kind == ERROR) failed = true;
    if (seen[what + "\t" + std::to_string(line)]++) return;
    reports.push_back(row(kind, what, line, warp, lane, detail));
}
void Launch::suspect(const std::string& what, u32 line, const Warp& warp, u32 lane, const std::string& detail) {
    const std::string key = what + "\t" + std::to_string(line);
    if (seen[key]++) return;
    suspects[key] = row(NOTE, what, line, &warp, lane, detail);
}
void Launch::convict() {
    for (auto& [key, text] : suspects) reports.push_back("error" + text.substr(4)), failed = true;
    suspects.clear();
}

namespace {

// ---- lanes of a warp: the group with the lowest program counter runs, so that diverged lanes reconverge

void save(Warp& w) {
    for_lanes(w.active, [&](int i) { w.pcs[i] = w.pc; });
}
void choose(Warp& w) {  // selects the lanes that run next
    const u32 candidates = w.live & ~w.blocked;
    if (!w.live) {
        w.active = 0;
        return;
    }
    if (!candidates) {
        w.launch->report(ERROR, "deadlock: lanes wait in a warp-wide instruction for others that do not come",
                         w.launch->program->code[w.pcs[std::countr_zero(w.live)]].line, &w, std::countr_zero(w.live),
                         "");
        throw Failure();
    }
    u32 low = ~0u;
    for_lanes(candidates, [&](int i) { low = std::min(low, w.pcs[i]); });
    u32 active = 0, next = ~0u;
    for_lanes(w.live, [&](int i) {
        if (w.pcs[i] == low)
            active |= 1u << i;  // and lanes that wait at the same instruction
        else if (!(w.blocked >> i & 1))
            next = std::min(next, w.pcs[i]);
    });
    w.blocked &= ~active;
    w.active = active, w.pc = low, w.next_pc = next;
}

void branch(Warp& w, const Inst& I) {
    const u32 target = I.imm[0], taken = w.exec;
    w.jumped = true;
    if (taken == w.active && w.active == w.live) {
        w.pc = target;
        return;
    }
    if (!taken) {
        w.pc++;
        if (w.active != w.live) save(w), choose(w);
        return;
    }
    for_lanes(w.active, [&](int i) { w.pcs[i] = taken >> i & 1 ? target : w.pc + 1; });
    choose(w);
}
void exit_lanes(Warp& w, const Inst& I) {
    w.jumped = true;
    const u32 leaving = w.exec;
    w.pc++;
    save(w);
    w.live &= ~leaving;
    if (w.live) return choose(w);
    w.active = 0, w.done = true;
    if (w.open.size() || [&] {
            for (auto& g : w.groups)
                if (g.size()) return true;
            return false;
        }())
        w.launch->report(WARNING, "exits with cp.async in flight", I.line, &w, 0, "");
    w.groups.push_back(std::move(w.open));
    wait_copies(w, I, 0);
    wait_matrices(w, 0);
}
void branch_index(Warp& w, const Inst& I) {  // brx.idx: imm 0.. targets of a table held as constants
    const u32* index = lanes<u32>(w, I.op[0]);
    w.jumped = true;
    const u32 taken = w.exec;
    for_lanes(w.active, [&](int i) {
        if (!(taken >> i & 1)) {
            w.pcs[i] = w.pc + 1;
            return;
        }
        if (index[i] + 1 >= I.operands) throw std::runtime_error("brx.idx out of its table");
        w.pcs[i] = lanes<u32>(w, I.op[1 + index[i]])[0];
    });
    choose(w);
}

// ---- collectives

void define(Warp& w, const Operand& o, u32 ok) { w.defined[o.id] = (w.defined[o.id] & ~w.exec) | (ok & w.exec); }

// imm 0: idx up down bfly; imm 1: there is a predicate result. Operands: d [, p], a, b, c, members. ISA 9.7.9.6
void shuffle(Warp& w, const Inst& I) {
    const u32 at = I.destinations;
    const u32 *a = lanes<u32>(w, I.op[at]), *b = lanes<u32>(w, I.op[at + 1]), *c = lanes<u32>(w, I.op[at + 2]);
    u32 out[LANES], inside = 0, ok = 0;
    const u32 source_defined = w.defined[I.op[at].id];
    for (int lane = 0; lane < LANES; lane++) {
        const u32 bval = b[lane] & 31, cval = c[lane] & 31, segment = c[lane] >> 8 & 31;
        const int max_lane = (lane & segment) | (cval & ~segment), min_lane = lane & segment;
        int j;
        bool p;
        switch (I.imm[0]) {
            case 0:
                j = min_lane | (bval & ~segment), p = j <= max_lane;
                break;
            case 1:
                j = lane - int(bval), p = j >= max_lane;
                break;
            case 2:
                j = lane + int(bval), p = j <= max_lane;
                break;
            default:
                j = lane ^ int(bval), p = j <= max_lane;
                break;
        }
        if (!p) j = lane;
        inside |= u32(p) << lane;
        out[lane] = a[j];
        // ISA: a value from a lane that does not participate is undefined.
        if ((w.exec >> j & 1) && (source_defined >> j & 1)) ok |= 1u << lane;
    }
    u32* d = lanes<u32>(w, I.op[0]);
    for_lanes(w.exec, [&](int i) { d[i] = out[i]; });
    define(w, I.op[0], ok);
    if (I.imm[1]) {
        u32& p = mask(w, I.op[1]);
        p = (p & ~w.exec) | (inside & w.exec);
        define(w, I.op[1], ~0u);
    }
}
void vote(Warp& w, const Inst& I) {  // imm 0: all any uni ballot; imm 1: the source is negated
    const u32 p = (I.imm[1] ? ~mask(w, I.op[1]) : mask(w, I.op[1])) & w.exec;
    const bool all = p == w.exec, any = p != 0;
    if (I.imm[0] == 3) {
        u32* d = lanes<u32>(w, I.op[0]);
        for_lanes(w.exec, [&](int i) { d[i] = p; });
    } else {
        const bool r = I.imm[0] == 0 ? all : I.imm[0] == 1 ? any : all || !any;
        u32& d = mask(w, I.op[0]);
        d = (d & ~w.exec) | (r ? w.exec : 0);
    }
}
template <class T>
void match(Warp& w, const Inst& I) {  // imm 0: any, all; imm 1: there is a predicate result
    const T* a = lanes<T>(w, I.op[I.destinations]);
    u32* d = lanes<u32>(w, I.op[0]);
    const T first = a[std::countr_zero(w.exec)];
    bool same = true;
    u32 r[LANES];
    for_lanes(w.exec, [&](int i) {
        same &= a[i] == first;
        r[i] = 0;
        for_lanes(w.exec, [&](int j) { r[i] |= u32(a[i] == a[j]) << j; });
    });
    for_lanes(w.exec, [&](int i) { d[i] = I.imm[0] ? (same ? w.exec : 0) : r[i]; });
    if (I.imm[1]) {
        u32& p = mask(w, I.op[1]);
        p = (p & ~w.exec) | (same ? w.exec : 0);
    }
}
template <class T>
void reduce(Warp& w, const Inst& I) {  // imm 0: add min max and or xor
    const T* a = lanes<T>(w, I.op[1]);
    T r = a[std::countr_zero(w.exec)];
    for_lanes(w.exec & (w.exec - 1), [&](int i) {
        switch (I.imm[0]) {
            case 0:
                r += a[i];
                break;
            case 1:
                r = std::min(r, a[i]);
                break;
            case 2:
                r = std::max(r, a[i]);
                break;
            case 3:
                r &= a[i];
                break;
            case 4:
                r |= a[i];
                break;
            default:
                r ^= a[i];
        }
    });
    T* d = lanes<T>(w, I.op[0]);
    for_lanes(w.exec, [&](int i) { d[i] = r; });
}

// ---- barriers of a CTA: imm 0 number (-1: the first operand), 1 threads (0: all, -1: an operand), 2: 0 sync, 1
// arrive, 2 red; 3 reduction: 0 and, 1 or, 2 popc; 4 the predicate is negated
void tick(Warp& w) { w.seen[w.number] = ++w.clock; }

void barrier(Warp& w, const Inst& I) {
    Launch& l = *w.launch;
    Cta& cta = *w.cta;
    if (w.exec != w.live) {
        l.report(ERROR, "barrier executed by some lanes of a warp only", I.line, &w, std::countr_zero(w.exec), "");
        throw Failure();
    }
    u32 at = I.destinations + (I.imm[2] == 2 ? 1 : 0);
    const int lane = std::countr_zero(w.exec);
    const u32 number = I.imm[0] >= 0 ? I.imm[0] : lanes<u32>(w, I.op[at++])[lane];
    u32 threads = I.imm[1] >= 0 ? I.imm[1] : lanes<u32>(w, I.op[at])[lane];
    if (number > 15 || threads % LANES) throw std::runtime_error("barrier number or count");
    Barrier& b = cta.barriers[number];
    if (b.arrived == 0) b = Barrier(), b.clocks.assign(w.seen.size(), 0), b.pc = w.pc, b.expected = threads;
    if (b.expected != threads || (threads == 0 && b.pc != w.pc)) {
        // A barrier of all threads at different instructions: legal on hardware, but always a mistake.
        if (b.expected != threads)
            l.report(ERROR, "barrier: threads disagree on the count", I.line, &w, lane, "");
        else
            l.report(WARNING, "barrier: warps wait at different instructions", I.line, &w, lane,
                     "another at line " + std::to_string(l.program->code[b.pc].line));
    }
    join(b.clocks, w.seen);
    join(b.foreign, w.foreign);
    tick(w);
    b.arrived += LANES;
    b.arrivals.push_back(w.number);
    if (I.imm[2] == 2) {
        const u32 p = (I.imm[4] ? ~mask(w, I.op[I.destinations]) : mask(w, I.op[I.destinations])) & w.exec;
        b.red_all &= p == w.exec ? ~0u : 0, b.red_any |= p ? ~0u : 0, b.red_count += std::popcount(p);
    }
    if (I.imm[2] != 1) b.warps.push_back(w.number), w.waiting = true, w.barrier = number;
}
void release_barriers(Launch& l, Cta& cta) {
    for (auto& b : cta.barriers) {
        if (!b.arrived) continue;
        const u32 all = cta.running * LANES;
        const u32 expected = b.expected ? b.expected : all;
        if (b.arrived < expected) continue;
        if (!b.expected && cta.running < cta.warps.size() && !b.warps.empty())
            l.report(WARNING, "barrier passed with warps that have exited", l.program->code[b.pc].line,
                     &cta.warps[b.warps[0]], 0, "");
        for (u32 v : b.warps) {
            Warp& w = cta.warps[v];
            const Inst& I = l.program->code[w.pc - 1];
            join(w.seen, b.clocks);
            w.seen[w.number] = w.clock;
            join(w.foreign, b.foreign);
            w.waiting = false;
            if (I.imm[2] == 2) {
                if (I.imm[3] == 2)
                    for_lanes(w.live, [&](int i) { lanes<u32>(w, I.op[0])[i] = b.red_count; });
                else
                    mask(w, I.op[0]) = I.imm[3] == 0 ? b.red_all : b.red_any;
                w.defined[I.op[0].id] = ~0u;
            }
        }
        b = Barrier();
    }
}

// ---- one instruction of one warp

inline void step(Warp& w) {
    Program& p = *w.launch->program;
    const Inst& I = p.code[w.pc];
    u32 exec = w.active;
    if (I.pred >= 0) {
        if ((w.defined[I.pred_id] & exec) != exec)
            w.launch->convict(), w.launch->report(ERROR, "undefined guard predicate", I.line, &w,
                                                  std::countr_zero(exec & ~w.defined[I.pred_id]), "");
        const u32 value = *reinterpret_cast<const u32*>(w.file + I.pred);
        exec &= I.negated ? ~value : value;
    }
    w.exec = exec;
    p.executed[w.pc]++;
    p.executed_lanes[w.pc] += std::popcount(exec);
    if (I.flags & BRANCH) {
        I.fn(w, I);
        return;
    }
    if (!exec) {
        w.pc++;
    } else {
        if (I.flags & COLLECTIVE) {
            const u32 members = lanes<u32>(w, I.op[I.operands - 1])[std::countr_zero(exec)] & w.live;
            if (!(members >> std::countr_zero(exec) & 1))
                w.launch->report(ERROR, "a lane is not in its own member mask", I.line, &w, std::countr_zero(exec), "");
            if (members & ~w.active) {  // wait for the others
                save(w);
                w.blocked |= w.active;
                p.executed[w.pc]--;
                choose(w);
                return;
            }
        }
        if ((I.flags & ALIGNED) && exec != w.live) {
            w.launch->report(ERROR, "a warp-wide instruction executed by some lanes only", I.line, &w,
                             std::countr_zero(exec), "");
            throw Failure();
        }
        u32 ok = exec;
        for (u32 k = I.destinations; k < I.operands; k++) ok &= w.defined[I.op[k].id];
        if (ok != exec && (I.flags & SINK))
            w.launch->convict(),
                w.launch->report(ERROR, "uses an undefined register", I.line, &w, std::countr_zero(exec & ~ok), "");
        if (!w.in_flight.empty() && !(I.flags & ALIGNED))
            for (u32 k = 0; k < I.operands; k++)
                if (std::find(w.in_flight.begin(), w.in_flight.end(), I.op[k].id) != w.in_flight.end())
                    w.launch->report(ERROR, "touches an accumulator of a wgmma in flight", I.line, &w, 0, "");
        I.fn(w, I);
        if (!(I.flags & OWN_DEF))
            for (u32 k = 0; k < I.destinations; k++) {
                u32& d = w.defined[I.op[k].id];
                d = (d & ~exec) | ok;
            }
        w.pc++;
    }
    if (w.pc >= w.next_pc && w.active != w.live) save(w), choose(w);
}

// ---- CTAs

u32 special(const Launch& l, const Cta& c, u32 warp, u32 lane, u32 code) {
    const u32 t = warp * LANES + lane;
    switch (code) {
        case 0:
            return t % l.block[0];
        case 1:
            return t / l.block[0] % l.block[1];
        case 2:
            return t / l.block[0] / l.block[1];
        case 3:
        case 4:
        case 5:
            return l.block[code - 3];
        case 6:
            return c.x;
        case 7:
            return c.y;
        case 8:
            return c.z;
        case 9:
        case 10:
        case 11:
            return l.grid[code - 9];
        case 12:
            return lane;
        case 13:
            return warp;
        case 14:
            return l.warps_per_cta;
        case 15:
            return 0;  // smid
        case 16:
            return 1;  // nsmid
        case 17:
            return 1u << lane;  // lanemask_eq, lt, le, gt, ge
        case 18:
            return (1u << lane) - 1;
        case 19:
            return (2u << lane) - 1;
        case 20:
            return ~((2u << lane) - 1);
        case 21:
            return ~((1u << lane) - 1);
        case 22:
            return l.shared_size - l.program->static_shared;
        case 23:
            return l.shared_size;
        case 24:
            return 0;  // cluster_ctaid, cluster_ctarank: clusters of one
        case 25:
            return 1;  // cluster_nctaid, cluster_nctarank
    }
    throw std::runtime_error("special register");
}

void start(Launch& l, Cta& c, u32 number) {
    Program& p = *l.program;
    c.number = number;
    c.x = number % l.grid[0], c.y = number / l.grid[0] % l.grid[1], c.z = number / l.grid[0] / l.grid[1];
    const u32 n = l.warps_per_cta;
    c.files.assign(size_t(n) * p.file_size + 64, 0xcc);
    c.masks.assign(size_t(n) * p.registers, 0);
    c.shared.resize(l.shared_size);
    l.random.discard(1);
    memset(c.shared.data(), 0xa5, c.shared.size());
    c.state.assign(l.shared_size + 16, 0);
    const size_t cells = l.shared_size / p.granule_shared + 1;
    c.cells.assign(cells, SharedCell{});
    c.reads.assign(cells * n, 0);
    c.locals.assign(size_t(l.threads + LANES) * p.local_size, 0xcc);
    for (auto& b : c.barriers) b = Barrier();
    c.mbarriers.clear(), c.bulk.clear();
    c.warps.assign(n, Warp());
    c.running = n;
    u8* files = reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(c.files.data()) + 63) & ~uintptr_t(63));
    for (u32 v = 0; v < n; v++) {
        Warp& w = c.warps[v];
        w.launch = &l, w.cta = &c, w.number = v;
        w.file = files + size_t(v) * p.file_size;
        w.defined = &c.masks[size_t(v) * p.registers];
        w.local = c.locals.data() + size_t(v) * LANES * p.local_size;
        memcpy(w.file, p.constants.data(), p.constants.size());
        for (const Special& s : p.specials)
            for (u32 lane = 0; lane < LANES; lane++)
                reinterpret_cast<u32*>(w.file + s.off)[lane] = special(l, c, v, lane, s.code);
        for (u32 r = 0; r < p.constant_registers; r++) w.defined[r] = ~0u;
        const u32 left = l.threads - v * LANES;
        w.live = left >= LANES ? ~0u : (1u << left) - 1;
        w.active = w.live, w.blocked = 0, w.pc = 0, w.next_pc = ~0u;
        w.jumped = w.waiting = w.done = false;
        w.clock = 1;
        w.seen.assign(n, 0);
        w.seen[v] = 1;
    }
}

void run(Launch& l, u32 window) {
    const u32 total = l.grid[0] * l.grid[1] * l.grid[2];
    std::vector<u32> order(total);
    for (u32 i = 0; i < total; i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), l.random);
    std::vector<std::unique_ptr<Cta>> resident;
    u32 next = 0;
    std::vector<std::unique_ptr<Cta>> spare;
    while (next < total || !resident.empty()) {
        while (resident.size() < window && next < total) {
            if (spare.empty()) spare.push_back(std::make_unique<Cta>());
            resident.push_back(std::move(spare.back()));
            spare.pop_back();
            start(l, *resident.back(), order[next++]);
        }
        // The first warp that can run, from a random start
        const u32 n = l.warps_per_cta, count = resident.size() * n, from = l.random() % count;
        Warp* w = nullptr;
        for (u32 k = 0; k < count && !w; k++) {
            const u32 i = (from + k) % count;
            Warp& candidate = resident[i / n]->warps[i % n];
            if (!candidate.done && !candidate.waiting) w = &candidate;
        }
        if (!w) {
            for (auto& c : resident)
                for (auto& v : c->warps)
                    if (v.waiting)
                        l.report(ERROR, "deadlock: waits at a barrier that others never reach",
                                 l.program->code[v.pc - 1].line, &v, 0, "barrier " + std::to_string(v.barrier));
            throw Failure();
        }
        const u64 r = l.random();
        u32 quantum = r % 8 == 0 ? r >> 8 & 4095 : r % 2 ? r >> 8 & 255 : r >> 8 & 15;
        do {
            step(*w);
            l.executed++;
        } while (quantum-- && !w->waiting && !w->done);
        if (l.executed > l.budget) {
            l.report(ERROR, "still running after the budget of instructions: a livelock?",
                     l.program->code[w->done ? 0 : w->pc].line, w, 0, "");
            throw Failure();
        }
        Cta& cta = *w->cta;
        if (w->done) cta.running--;
        if (w->done || w->waiting) release_barriers(l, cta);
        if (cta.running == 0) {
            auto it = std::find_if(resident.begin(), resident.end(), [&](auto& c) { return c.get() == &cta; });
            spare.push_back(std::move(*it));
            resident.erase(it);
        }
    }
}

struct All {
    All() {
        Register("bra", branch);
        Register("brx.idx", branch_index);
        Register("exit", exit_lanes);
        Register("trap", [](Warp& w, const Inst& I) {
            w.launch->report(ERROR, "trap", I.line, &w, std::countr_zero(w.exec), "");
            throw Failure();
        });
        Register("shfl", shuffle);
        Register("vote", vote);
        Register("match.b32", match<u32>);
        Register("match.b64", match<u64>);
        Register("redux.u32", reduce<u32>);
        Register("redux.s32", reduce<i32>);
        Register("activemask", [](Warp& w, const Inst& I) {
            u32* d = lanes<u32>(w, I.op[0]);
            for_lanes(w.exec, [&](int i) { d[i] = w.exec; });
        });
        Register("elect", [](Warp& w, const Inst& I) {  // ISA 9.7.13.14: any lane may be the leader; here the lowest
            const u32 leader = std::countr_zero(w.exec);
            u32* d = lanes<u32>(w, I.op[0]);
            for_lanes(w.exec, [&](int i) { d[i] = leader; });
            u32& p = mask(w, I.op[1]);
            p = (p & ~w.exec) | 1u << leader;
        });
        Register("barrier", barrier);
    }
} all;

}  // namespace
}  // namespace ptx

// ---- interface for Python

using namespace ptx;

extern "C" {

int ptx_handler(const char* name) {
    auto at = handler_names().find(name);
    return at == handler_names().end() ? -1 : int(at->second);
}

// code: 17 numbers per instruction: handler, destinations, operands, first operand, flags, line, predicate offset (-1),
// its number, negated, imm[8]; operands: pairs; specials: pairs (code, offset).
Program* ptx_program(u64 n, const i64* code, u64 operands, const u32* operand, u64 specials, const u32* special,
                     u64 constants, const u8* constant, const u32* sizes) {
    auto* p = new Program;
    p->operands.resize(operands);
    for (u64 i = 0; i < operands; i++) p->operands[i] = {operand[2 * i], operand[2 * i + 1]};
    for (u64 i = 0; i < n; i++) {
        const i64* c = code + 17 * i;
        Inst I{};
        I.fn = handlers()[c[0]];
        I.destinations = c[1], I.operands = c[2], I.op = p->operands.data() + c[3], I.flags = c[4], I.line = c[5];
        I.pred = c[6], I.pred_id = c[7], I.negated = c[8];
        for (int k = 0; k < 8; k++) I.imm[k] = c[9 + k];
        p->code.push_back(I);
    }
    for (u64 i = 0; i < specials; i++) p->specials.push_back({special[2 * i], special[2 * i + 1]});
    p->constants.assign(constant, constant + constants);
    p->file_size = sizes[0], p->registers = sizes[1], p->constant_registers = sizes[2], p->static_shared = sizes[3];
    p->local_size = sizes[4], p->granule_shared = sizes[5], p->granule_global = sizes[6];
    p->executed.assign(n, 0), p->executed_lanes.assign(n, 0);
    return p;
}
void ptx_free(Program* p) { delete p; }
u64* ptx_executed(Program* p) { return p->executed.data(); }
u64* ptx_executed_lanes(Program* p) { return p->executed_lanes.data(); }

// options: seed, resident CTAs, budget of instructions, races, noise, races of lanes. Returns one report per line.
const char* ptx_launch(Program* p, const u32* grid, const u32* block, u32 dynamic_shared, u64 params, const u8* param,
                       u64 allocations, const u64* bounds, const char** names, const u8* kinds, const u64* options) {
    static std::string out;
    Launch l;
    l.program = p;
    for (int i = 0; i < 3; i++) l.grid[i] = grid[i], l.block[i] = block[i];
    l.threads = block[0] * block[1] * block[2];
    l.warps_per_cta = (l.threads + LANES - 1) / LANES;
    l.shared_size = p->static_shared + dynamic_shared;
    l.params.assign(param, param + params);
    l.random.seed(options[0]);
    l.budget = options[2], l.races = options[3], l.noise = options[4], l.warp_races = options[5];
    for (u64 i = 0; i < allocations; i++) {
        Allocation a;
        a.lo = bounds[2 * i], a.hi = bounds[2 * i + 1], a.name = names[i];
        a.writable = kinds[i] & 1, a.poisoned = kinds[i] & 2;
        if (l.races)
            a.cells = static_cast<GlobalCell*>(
                calloc(a.hi / p->granule_global - a.lo / p->granule_global + 2, sizeof(GlobalCell)));
        l.allocations.push_back(std::move(a));
    }
    if (l.grid[0] * u64(l.grid[1]) * l.grid[2] > 0xfffff)
        l.report(ERROR, "more CTAs than an epoch can name", 0, nullptr, 0, "");
    else
        try {
            run(l, options[1]);
        } catch (const Failure&) {
        } catch (const std::exception& e) {
            l.report(ERROR, std::string("emulator: ") + e.what(), 0, nullptr, 0, "");
        }
    for (auto& a : l.allocations) free(a.cells);
    for (auto& [key, text] : l.suspects) l.reports.push_back(text);
    out.clear();
    for (auto& r : l.reports) {
        const auto first = r.find('\t') + 1, second = r.find('\t', r.find('\t', first) + 1);
        out += r + "\t" + std::to_string(l.seen[r.substr(first, second - first)]) + "\n";
    }
    return out.c_str();
}
}

// Memory and its checks: bounds, alignment, initialisation, and a happens-before race detector.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "machine.h"

namespace ptx {

constexpr u32 POISON = 0xffa5ffa5;  // initial value of new tensors: a NaN that arithmetic does not produce

// ---- clocks

void join(Clocks& a, const Clocks& b) {
    for (size_t i = 0; i < a.size(); i++) a[i] = std::max(a[i], b[i]);
}
void join(Foreign& a, const Foreign& b) {
    if (!b || a == b) return;
    if (!a) {
        a = b;
        return;
    }
    auto sum = std::make_shared<Clocks>(*a);
    join(*sum, *b);
    a = sum;
}
static Foreign knowledge(const Warp& w) {  // a grid-wide vector clock of all that happens before
    const Launch& l = *w.launch;
    const size_t n = l.warps_per_cta, all = size_t(l.grid[0]) * l.grid[1] * l.grid[2] * n;
    auto k = w.foreign ? std::make_shared<Clocks>(*w.foreign) : std::make_shared<Clocks>(all);
    for (size_t i = 0; i < n; i++) (*k)[w.cta->number * n + i] = w.seen[i];
    return k;
}
static void learn(Warp& w, const Foreign& f) {
    if (!f) return;
    join(w.foreign, f);
    const size_t n = w.seen.size();
    for (size_t i = 0; i < n; i++)
        if (i != w.number) w.seen[i] = std::max(w.seen[i], (*f)[w.cta->number * n + i]);
}
static void tick(Warp& w) { w.seen[w.number] = ++w.clock; }

static void fence(Warp& w) {
    learn(w, w.pending);
    w.pending.reset();
    w.released = knowledge(w);
    tick(w);
}

enum Order { RELAXED, ACQUIRE, RELEASE, ACQ_REL };
static void synchronize(Warp& w, u64 key, Order order, bool reads, bool writes) {
    auto& syncs = w.launch->syncs;
    if (reads) {
        if (auto at = syncs.find(key); at != syncs.end()) {
            if (order & ACQUIRE)
                learn(w, at->second.clocks);
            else
                join(w.pending, at->second.clocks);
        }
    }
    if (writes) {
        const Foreign out = order & RELEASE ? knowledge(w) : w.released;
        if (out) {
            Sync& s = syncs[key];
            if (!reads) s.clocks.reset();  // a plain store ends the release sequence of others
            join(s.clocks, out);
            tick(w);
        }
    }
}

static bool ordered(const Warp& w, Epoch e) {
    const u32 c = cta_of(e), v = warp_of(e);
    if (c == w.cta->number) return v == w.number || w.seen[v] >= clock_of(e);
    return w.foreign && (*w.foreign)[c * w.seen.size() + v] >= clock_of(e);
}
static Epoch epoch(const Warp& w, u32 lane, bool strong) {
    return Epoch(w.clock) << 32 | Epoch(w.cta->number) << 12 | w.number << 6 | (strong ? STRONG : 0) | lane;
}
// Two lanes of a warp, without synchronization between them.
static bool between_lanes(const Warp& w, Epoch e, u32 lane) {
    return cta_of(e) == w.cta->number && warp_of(e) == w.number && clock_of(e) == w.clock && lane_of(e) != lane;
}
std::string where(const Launch& l, Epoch e) {
    const u32 n = cta_of(e);
    char text[96];
    snprintf(text, sizeof text, "CTA (%u,%u,%u) thread %u", n % l.grid[0], n / l.grid[0] % l.grid[1],
             n / l.grid[0] / l.grid[1], warp_of(e) * 32 + lane_of(e));
    return text;
}
static u32 pc_of(const Warp& w, const Inst& I) { return &I - w.launch->program->code.data(); }

// `harmless`: perhaps so; see Launch::suspect.
static void race(Warp& w, const Inst& I, u32 lane, const char* mine, const char* other, Epoch e, u32 other_pc,
                 const std::string& at, bool in_warp, bool harmless = false) {
    Launch& l = *w.launch;
    if (in_warp && !l.warp_races) return;
    const u32 line = l.program->code[other_pc].line;
    const bool same_cta = cta_of(e) == w.cta->number;
    const std::string what = std::string(in_warp    ? "race of lanes of a warp"
                                         : same_cta ? "race between threads of a CTA"
                                                    : "race between CTAs") +
                             ": " + mine + " after " + other + " of line " + std::to_string(line);
    const std::string detail = at + ", with " + where(l, e) + ", line " + std::to_string(line);
    if (harmless)
        l.suspect(what, I.line, w, lane, detail);
    else
        l.report(in_warp ? WARNING : ERROR, what, I.line, &w, lane, detail);
}

// ---- global memory

static Allocation* find(Launch& l, u64 address) {
    static thread_local size_t last = 0;
    auto& a = l.allocations;
    if (last < a.size() && a[last].lo <= address && address < a[last].hi) return &a[last];
    size_t lo = 0, hi = a.size();
    while (lo < hi) {
        const size_t m = (lo + hi) / 2;
        (a[m].hi <= address ? lo = m + 1 : hi = m);
    }
    if (lo < a.size() && a[lo].lo <= address) {
        last = lo;
        return &a[lo];
    }
    return nullptr;
}
static std::string describe(Launch& l, u64 address, u32 size) {
    char text[160];
    const Allocation* best = nullptr;
    i64 distance = 0;
    for (auto& a : l.allocations) {
        const i64 d = address < a.lo ? i64(address + size - a.lo) : address + size > a.hi ? i64(address - a.hi) : 0;
        if (!best || std::llabs(d) < std::llabs(distance)) best = &a, distance = d;
    }
    if (!best)
        snprintf(text, sizeof text, "%u bytes at 0x%llx, no memory is registered", size, (unsigned long long)address);
    else
        snprintf(text, sizeof text, "%u bytes at 0x%llx = %s%+lld (its %llu bytes)", size, (unsigned long long)address,
                 best->name.c_str(), (long long)(address - best->lo), (unsigned long long)(best->hi - best->lo));
    return text;
}

u8* global_at(Warp& w, const Inst& I, u32 lane, u64 address, u32 size, Access access, bool strong, const u8* data) {
    Launch& l = *w.launch;
    if (address & (size - 1)) {
        l.report(ERROR, "misaligned access to global memory", I.line, &w, lane, describe(l, address, size));
        return nullptr;
    }
    Allocation* a = find(l, address);
    if (!a || address + size > a->hi) {
        l.report(ERROR, std::string("out of bounds: ") + (access == READ ? "reads" : "writes") + " global memory",
                 I.line, &w, lane, describe(l, address, size));
        return nullptr;
    }
    if (access != READ && !a->writable) {
        l.report(ERROR, "writes memory that is only to be read", I.line, &w, lane, describe(l, address, size));
        return nullptr;
    }
    u8* p = reinterpret_cast<u8*>(address);
    if (l.races) {
        const u32 shift = std::countr_zero(l.program->granule_global);
        const Epoch now = epoch(w, lane, strong || access == ATOMIC);
        const u32 pc = pc_of(w, I);
        const bool same_value = data && !memcmp(p, data, size);
        GlobalCell* c = a->cells + ((address >> shift) - (a->lo >> shift));
        GlobalCell* end = a->cells + ((address + size - 1 >> shift) - (a->lo >> shift)) + 1;
        for (; c < end; c++) {
            if (c->write && !same_value) {
                const char* mine = access == READ ? "read" : "write";
                if (!ordered(w, c->write)) {
                    if (!(c->write & now & STRONG)) {
                        race(w, I, lane, mine, "write", c->write, c->write_pc, describe(l, address, size), false,
                             access == READ);
                        w.tainted = true;
                    }
                } else if (between_lanes(w, c->write, lane) && !(c->write & now & STRONG)) {
                    race(w, I, lane, mine, "write", c->write, c->write_pc, describe(l, address, size), true);
                }
            }
            if (access == READ) {
                // Two readers of different warps are kept: a writer differs from at least one of them.
                int k = c->read[0] >> 12 << 12 == 0 && !c->read[0] ? 0 : -1;
                auto same = [&](Epoch e) { return ((e ^ now) & 0xffffffc0) == 0; };
                if (c->read[0] && same(c->read[0]))
                    k = 0;
                else if (c->read[1] && same(c->read[1]))
                    k = 1;
                else if (!c->read[0])
                    k = 0;
                else if (!c->read[1])
                    k = 1;
                else if (ordered(w, c->read[0]))
                    k = 0;
                else if (ordered(w, c->read[1]))
                    k = 1;
                if (k >= 0) c->read[k] = now, c->read_pc[k] = pc;
            } else {
                for (int k = 0; k < 2; k++) {
                    if (!c->read[k]) continue;
                    if (!ordered(w, c->read[k])) {
                        // x += y where all threads read x and one writes it: the values of the others are not used, or
                        // are reported if they read after the write.
                        auto own = w.loaded.find(c->read_pc[k]);
                        const bool updates = cta_of(c->read[k]) == w.cta->number && own != w.loaded.end() &&
                                             own->second[lane] == address;
                        if (!(c->read[k] & now & STRONG))
                            race(w, I, lane, "write", "read", c->read[k], c->read_pc[k], describe(l, address, size),
                                 false, updates);
                    } else if (between_lanes(w, c->read[k], lane) && c->read_pc[k] != pc &&
                               !(c->read[k] & now & STRONG)) {
                        race(w, I, lane, "write", "read", c->read[k], c->read_pc[k], describe(l, address, size), true);
                    }
                    c->read[k] = 0;
                }
                c->write = now, c->write_pc = pc;
            }
        }
    }
    if (access != WRITE && a->poisoned && size >= 2) {
        bool poison = true;
        for (u32 i = 0; i + 2 <= size; i += 2) poison &= *reinterpret_cast<u16*>(p + i) == u16(POISON);
        if (poison)
            l.report(ERROR, "reads global memory that nobody wrote", I.line, &w, lane, describe(l, address, size));
    }
    return p;
}

// ---- shared memory

u8* shared_at(Warp& w, const Inst& I, u32 lane, u64 address, u32 size, Access access, u32* defined, const u8* data) {
    Launch& l = *w.launch;
    Cta& cta = *w.cta;
    auto text = [&] {
        char t[64];
        snprintf(t, sizeof t, "%u bytes at shared+%lld of %u", size, (long long)address - SHARED_BASE, l.shared_size);
        return std::string(t);
    };
    if (address & (size - 1)) {
        l.report(ERROR, "misaligned access to shared memory", I.line, &w, lane, text());
        return nullptr;
    }
    const u64 at = address - SHARED_BASE;
    if (address < SHARED_BASE || at + size > l.shared_size) {
        l.report(ERROR, "out of bounds in shared memory", I.line, &w, lane, text());
        return nullptr;
    }
    if (access != WRITE) {
        u8 worst = 1;
        u64 states[2];
        if (size == 16 &&
            (memcpy(states, &cta.state[at], 16), states[0] == 0x0101010101010101 && states[1] == states[0])) {
        } else {
            for (u32 i = 0; i < size; i++) {
                const u8 s = cta.state[at + i];
                if (s == 0)
                    worst = 0;
                else if (s == 2 && worst)
                    worst = 2;
            }
        }
        if (worst == 0 && cta.cells[at / l.program->granule_shared].copying == 0)
            l.report(ERROR, "reads shared memory that nobody wrote", I.line, &w, lane, text());
        if (access == READ && defined) *defined = worst == 1;
    }
    if (l.races) {
        const u32 g = l.program->granule_shared, n = l.warps_per_cta, pc = pc_of(w, I);
        const bool strong = access == ATOMIC;
        const Epoch now = epoch(w, lane, strong);
        const bool same_value = data && !memcmp(&cta.shared[at], data, size);
        for (u32 k = at / g; k <= (at + size - 1) / g; k++) {
            SharedCell& c = cta.cells[k];
            u64* reads = &cta.reads[size_t(k) * n];
            const char* mine = access == READ ? "read" : "write";
            if (c.copying)
                l.report(ERROR, std::string(mine) + " where a cp.async has not been waited for", I.line, &w, lane,
                         text());
            if (c.write && !same_value) {
                if (!ordered(w, c.write)) {
                    if (!(c.write & now & STRONG)) {
                        race(w, I, lane, mine, "write", c.write, c.write_pc, text(), false, access == READ);
                        w.tainted = true;
                    }
                } else if (between_lanes(w, c.write, lane) && !(c.write & now & STRONG)) {
                    race(w, I, lane, mine, "write", c.write, c.write_pc, text(), true);
                }
            }
            if (access == READ) {
                reads[w.number] = u64(w.clock) << 32 | u64(lane) << 24 | pc;
            } else {
                if (c.matrices) l.report(ERROR, "write where a wgmma in flight reads", I.line, &w, lane, text());
                for (u32 v = 0; v < n; v++) {
                    const u64 r = reads[v];
                    if (!r) continue;
                    const Epoch e = (r >> 32 << 32) | Epoch(cta.number) << 12 | v << 6 | (r >> 24 & 31);
                    if (v != w.number && w.seen[v] < (r >> 32))
                        race(w, I, lane, "write", "read", e, r & 0xffffff, text(), false);
                    else if (between_lanes(w, e, lane) && (r & 0xffffff) != pc)
                        race(w, I, lane, "write", "read", e, r & 0xffffff, text(), true);
                    reads[v] = 0;
                }
                c.write = now, c.write_pc = pc;
            }
        }
    }
    if (access != READ) memset(&cta.state[at], access == WRITE && defined && !*defined ? 2 : 1, size);
    return cta.shared.data() + at;
}

namespace {

enum Space { GENERIC, GLOBAL, SHARED, LOCAL, PARAM };

u64 address_of(const Warp& w, const Operand& o, int lane, i64 offset, int width) {
    const u64 base = width == 8 ? lanes<u64>(w, o)[lane] : lanes<u32>(w, o)[lane];
    return width == 8 ? base + offset : u32(base + offset);
}
int space_of(int space, u64& address) {
    if (space != GENERIC) return space;
    if (address >= SHARED_WINDOW && address < SHARED_WINDOW + WINDOW_SIZE) return address -= SHARED_WINDOW, SHARED;
    if (address >= LOCAL_WINDOW && address < LOCAL_WINDOW + WINDOW_SIZE) return address -= LOCAL_WINDOW, LOCAL;
    return GLOBAL;
}
u8* local_at(Warp& w, const Inst& I, u32 lane, u64 address, u32 size) {
    const u32 each = w.launch->program->local_size;
    if (address & (size - 1) || address + size > each) {
        w.launch->report(
            ERROR, address & (size - 1) ? "misaligned access to local memory" : "out of bounds in local memory", I.line,
            &w, lane,
            std::to_string(size) + " bytes at local+" + std::to_string(i64(address)) + " of " + std::to_string(each));
        return nullptr;
    }
    return w.local + size_t(lane) * each + address;
}
u64 sync_key(const Warp& w, int space, u64 address) {
    return space == SHARED ? SHARED_WINDOW + u64(w.cta->number) * (1 << 20) + address : address;
}

// ld: imm 0 space, 1 offset, 2 bytes of an element, 3 elements, 4 signed, 5 strong | order << 1, 6 bytes of a result's
// register, 7 bytes of the address register. Operands: results, address.
void load(Warp& w, const Inst& I) {
    const u32 each = I.imm[2], n = I.imm[3], wide = I.imm[6];
    const bool strong = I.imm[5] & 1;
    u32 ok = w.exec;
    struct Known {  // lanes often read the same address, so it is checked once
        u64 address = ~0ull;
        const u8* p;
        bool good;
    } known[8];
    std::array<u64, LANES>* loaded = I.imm[0] <= GLOBAL && w.launch->races ? &w.loaded[pc_of(w, I)] : nullptr;
    for_lanes(w.exec, [&](int lane) {
        u64 address = address_of(w, I.op[n], lane, I.imm[1], I.imm[7]);
        if (loaded) (*loaded)[lane] = address;
        w.tainted = false;
        const int space = space_of(I.imm[0], address);
        const u8* p = nullptr;
        u32 defined = 1;
        Known& memo = known[(address >> 2 ^ address >> 5) & 7];
        if (space <= SHARED && !strong && memo.address == address) {
            p = memo.p;
            if (!memo.good) w.tainted = true;
        } else if (space == GLOBAL || space == SHARED) {
            if (space == GLOBAL)
                p = global_at(w, I, lane, address, each * n, READ, strong);
            else
                p = shared_at(w, I, lane, address, each * n, READ, &defined);
            if (I.imm[0] != GENERIC) memo = {address, p, defined && !w.tainted};
        } else if (space == LOCAL)
            p = local_at(w, I, lane, address, each * n);
        else if (address + each * n <= w.launch->params.size())
            p = w.launch->params.data() + address;
        else
            throw std::runtime_error("parameter out of bounds");
        if (strong && p && space <= SHARED)
            synchronize(w, sync_key(w, space, address), Order(I.imm[5] >> 1), true, false);
        if (!p || !defined || w.tainted) ok &= ~(1u << lane);
        for (u32 k = 0; k < n; k++) {
            u8* d = lanes<u8>(w, I.op[k]) + lane * wide;
            if (each == wide) {
                if (p)
                    memcpy(d, p + k * each, each);
                else
                    memset(d, 0, each);
            } else {
                i64 v = 0;
                if (p) memcpy(&v, p + k * each, each);
                if (I.imm[4]) v = v << (64 - 8 * each) >> (64 - 8 * each);
                memcpy(d, &v, wide);
            }
        }
    });
    for (u32 k = 0; k < n; k++) {
        u32& d = w.defined[I.op[k].id];
        d = (d & ~w.exec) | ok;
    }
}

// st: as ld; operands: address, values; imm 6 bytes of a value's register.
void store(Warp& w, const Inst& I) {
    const u32 each = I.imm[2], n = I.imm[3], wide = I.imm[6];
    const bool strong = I.imm[5] & 1;
    u32 defined_lanes = ~0u;
    for (u32 k = 0; k < n; k++) defined_lanes &= w.defined[I.op[1 + k].id];
    // If lanes write to one address, here the highest lane wins. The ISA does not specify which one (9.7.9.12), so
    // different values are reported as a warning.
    struct Written {
        u64 address;
        u8 data[64];
    } written[LANES];
    int count = 0;
    for (int lane = LANES - 1; lane >= 0; lane--) {
        if (!(w.exec >> lane & 1)) continue;
        u64 address = address_of(w, I.op[0], lane, I.imm[1], I.imm[7]);
        const int space = space_of(I.imm[0], address);
        u32 defined = defined_lanes >> lane & 1;
        u8* p = nullptr;
        u8* data = written[count].data;
        for (u32 k = 0; k < n; k++) memcpy(data + k * each, lanes<u8>(w, I.op[1 + k]) + lane * wide, each);
        if (space <= SHARED) {
            int k = 0;
            while (k < count && written[k].address != address) k++;
            if (k < count) {
                if (w.launch->warp_races && memcmp(written[k].data, data, each * n))
                    w.launch->report(WARNING, "lanes of a warp write different values to one address", I.line, &w, lane,
                                     space == SHARED ? "shared+" + std::to_string(address - SHARED_BASE)
                                                     : describe(*w.launch, address, each * n));
                continue;
            }
            written[count++].address = address;
        }
        if (space == GLOBAL) {
            if (!defined)
                w.launch->convict(),
                    w.launch->report(ERROR, "stores an undefined value to global memory", I.line, &w, lane, "");
            p = global_at(w, I, lane, address, each * n, WRITE, strong, data);
        } else if (space == SHARED) {
            p = shared_at(w, I, lane, address, each * n, WRITE, &defined, data);
        } else if (space == LOCAL) {
            p = local_at(w, I, lane, address, each * n);
        } else {
            throw std::runtime_error("store to parameters");
        }
        if (strong && p && space <= SHARED)
            synchronize(w, sync_key(w, space, address), Order(I.imm[5] >> 1), false, true);
        if (p) memcpy(p, data, each * n);
    }
}

// ---- atomics: imm 0 space, 1 offset, 2 bytes, 3 elements, 4 operation, 5 1 | order << 1, 6 type, 7 bytes of the
// address
enum Operation { ADD, MIN, MAX, AND_, OR_, XOR_, EXCH, CAS, INC, DEC };
enum Type { UNSIGNED, SIGNED, FLOAT, HALF, BFLOAT, HALF2, BFLOAT2 };

template <class T>
T integer(int op, T old, T b, T c) {
    switch (op) {
        case ADD:
            return old + b;
        case MIN:
            return std::min(old, b);
        case MAX:
            return std::max(old, b);
        case AND_:
            return old & b;
        case OR_:
            return old | b;
        case XOR_:
            return old ^ b;
        case EXCH:
            return b;
        case CAS:
            return old == b ? c : old;
        case INC:
            return old >= b ? 0 : old + 1;
        case DEC:
            return old == 0 || old > b ? b : old - 1;
    }
    throw std::runtime_error("atomic operation");
}
template <class T>
T real(int op, T old, T b) {
    switch (op) {
        case ADD:
            return old + b;
        case MIN:
            return std::fmin(old, b);
        case MAX:
            return std::fmax(old, b);
        case EXCH:
            return b;
    }
    throw std::runtime_error("atomic operation");
}
float widen(u16 h, bool bf) {
    if (bf) return std::bit_cast<float>(u32(h) << 16);
    _Float16 x;
    memcpy(&x, &h, 2);
    return float(x);
}
u16 narrow(float x, bool bf) {
    if (bf) {
        const u32 b = std::bit_cast<u32>(x);
        return x != x ? 0x7fff : u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
    }
    const _Float16 y = _Float16(x);
    u16 h;
    memcpy(&h, &y, 2);
    return h;
}
void combine(u8* p, const u8* b, const u8* c, int op, int type, u32 bytes) {
    auto apply = [&](auto zero, auto f) {
        using T = decltype(zero);
        T old, x, y{};
        memcpy(&old, p, sizeof old), memcpy(&x, b, sizeof x);
        if (c) memcpy(&y, c, sizeof y);
        const T r = f(old, x, y);
        memcpy(p, &r, sizeof r);
    };
    auto ints = [&](auto zero) {
        apply(zero, [&](auto o, auto x, auto y) { return decltype(o)(integer<decltype(o)>(op, o, x, y)); });
    };
    if (type == UNSIGNED)
        bytes == 2 ? ints(u16{}) : bytes == 4 ? ints(u32{}) : ints(u64{});
    else if (type == SIGNED)
        bytes == 4 ? ints(i32{}) : ints(i64{});
    else if (type == FLOAT && bytes == 4)
        apply(0.0f, [&](float o, float x, float) { return real(op, o, x); });
    else if (type == FLOAT)
        apply(0.0, [&](double o, double x, double) { return real(op, o, x); });
    else
        for (u32 i = 0; i < bytes; i += 2) {
            u16 o, x;
            memcpy(&o, p + i, 2), memcpy(&x, b + i, 2);
            const bool bf = type == BFLOAT || type == BFLOAT2;
            o = narrow(real(op, widen(o, bf), widen(x, bf)), bf);
            memcpy(p + i, &o, 2);
        }
}
template <bool RETURNS>
void atomic(Warp& w, const Inst& I) {
    const u32 bytes = I.imm[2], n = I.imm[3], first = RETURNS ? n : 0;
    const bool cas = I.imm[4] == CAS;
    u32 order = w.launch->random() % LANES;  // lanes in random order
    for (u32 k = 0; k < LANES; k++) {
        const u32 lane = (k + order) % LANES;
        if (!(w.exec >> lane & 1)) continue;
        u64 address = address_of(w, I.op[first], lane, I.imm[1], I.imm[7]);
        const int space = space_of(I.imm[0], address);
        u8* p = space == SHARED ? shared_at(w, I, lane, address, bytes * n, ATOMIC, nullptr)
                                : global_at(w, I, lane, address, bytes * n, ATOMIC, true);
        if (!p) continue;
        synchronize(w, sync_key(w, space, address), Order(I.imm[5] >> 1), true, true);
        for (u32 e = 0; e < n; e++) {
            const u8* b = lanes<u8>(w, I.op[first + 1 + e]) + lane * bytes;
            const u8* c = cas ? lanes<u8>(w, I.op[first + 2]) + lane * bytes : nullptr;
            u8 value[8], third[8];
            memcpy(value, b, bytes);
            if (c) memcpy(third, c, bytes);
            u8 old[8];
            memcpy(old, p + e * bytes, bytes);
            combine(p + e * bytes, value, c ? third : nullptr, I.imm[4], I.imm[6], bytes);
            if constexpr (RETURNS) memcpy(lanes<u8>(w, I.op[e]) + lane * bytes, old, bytes);
        }
    }
}

// ---- cp.async: imm 0 offset of the destination, 1 of the source, 2 bytes, 3 there is a third operand (bytes to read,
// a u32 register), 7 bytes of the destination's address register
void copy_async(Warp& w, const Inst& I) {
    const u32 size = I.imm[2];
    Cta& cta = *w.cta;
    for_lanes(w.exec, [&](int lane) {
        u64 to = address_of(w, I.op[0], lane, I.imm[0], I.imm[7]);
        if (space_of(I.imm[7] == 8 ? GENERIC : SHARED, to) != SHARED && to >= WINDOW_SIZE)
            throw std::runtime_error("cp.async to global memory");
        const u64 from = address_of(w, I.op[1], lane, I.imm[1], 8);
        const u32 filled = I.imm[3] ? std::min(lanes<u32>(w, I.op[2])[lane], size) : size;
        if (from & (size - 1) && filled)
            w.launch->report(ERROR, "misaligned source of cp.async", I.line, &w, lane, describe(*w.launch, from, size));
        for (u32 i = 0; i < filled;) {  // naturally aligned parts
            u32 piece = size;
            while (piece > filled - i || (from + i) & (piece - 1)) piece /= 2;
            w.tainted = false;
            if (!global_at(w, I, lane, from + i, piece, READ, false)) return;
            if (w.tainted) w.launch->convict();
            i += piece;
        }
        u32 defined = 1;
        if (!shared_at(w, I, lane, to, size, WRITE, &defined)) return;
        const u32 g = w.launch->program->granule_shared;
        for (u32 k = (to - SHARED_BASE) / g; k <= (to - SHARED_BASE + size - 1) / g; k++) cta.cells[k].copying++;
        w.open.push_back({from, u32(to), size, filled, pc_of(w, I), u8(lane)});
    });
}
void all_lanes(Warp& w, const char* what) {
    if (w.exec != w.live) throw std::runtime_error(std::string(what) + " by some lanes of a warp only");
}

// ---- ldmatrix, stmatrix: imm 0 matrices, 1 transposed, 2 offset, 7 bytes of the address register (ISA 9.7.14.5.15)
void load_matrix(Warp& w, const Inst& I) {
    const u32 n = I.imm[0];
    u16 rows[4][8][8];
    u32 ok = ~0u;
    for (u32 k = 0; k < n * 8; k++) {
        u64 address = address_of(w, I.op[n], k, I.imm[2], I.imm[7]);
        space_of(GENERIC, address);
        u32 defined = 1;
        w.tainted = false;
        const u8* p = shared_at(w, I, k, address, 16, READ, &defined);
        if (p)
            memcpy(rows[k / 8][k % 8], p, 16);
        else
            memset(rows[k / 8][k % 8], 0, 16);
        if (!p || !defined || w.tainted) ok &= I.imm[1] ? 0 : ~(15u << 4 * (k % 8));
    }
    for (u32 m = 0; m < n; m++) {
        u32* d = lanes<u32>(w, I.op[m]);
        for (int lane = 0; lane < LANES; lane++) {
            const int r = lane / 4, c = lane % 4 * 2;
            d[lane] =
                I.imm[1] ? rows[m][c][r] | u32(rows[m][c + 1][r]) << 16 : rows[m][r][c] | u32(rows[m][r][c + 1]) << 16;
        }
        w.defined[I.op[m].id] = ok;
    }
}
void store_matrix(Warp& w, const Inst& I) {
    const u32 n = I.imm[0];
    for (u32 m = 0; m < n; m++) {
        const u32* s = lanes<u32>(w, I.op[1 + m]);
        u32 all = w.defined[I.op[1 + m].id];
        u16 rows[8][8];
        for (int lane = 0; lane < LANES; lane++)
            for (int h = 0; h < 2; h++) {
                const int r = lane / 4, c = lane % 4 * 2 + h;
                (I.imm[1] ? rows[c][r] : rows[r][c]) = s[lane] >> 16 * h;
            }
        for (u32 r = 0; r < 8; r++) {
            u64 address = address_of(w, I.op[0], m * 8 + r, I.imm[2], I.imm[7]);
            space_of(GENERIC, address);
            u32 defined = all == ~0u;
            if (u8* p = shared_at(w, I, m * 8 + r, address, 16, WRITE, &defined, reinterpret_cast<const u8*>(rows[r])))
                memcpy(p, rows[r], 16);
        }
    }
}

struct All {
    All() {
        Register("ld", load);
        Register("st", store);
        Register("atom", atomic<true>);
        Register("red", atomic<false>);
        Register("cp.async", copy_async);
        Register("cp.async.commit_group", [](Warp& w, const Inst&) {
            all_lanes(w, "cp.async.commit_group");
            w.groups.push_back(std::move(w.open));
            w.open.clear();
        });
        Register("cp.async.wait_group", [](Warp& w, const Inst& I) {
            all_lanes(w, "cp.async.wait_group");
            wait_copies(w, I, I.imm[0]);
        });
        Register("cp.async.wait_all", [](Warp& w, const Inst& I) {
            all_lanes(w, "cp.async.wait_all");
            w.groups.push_back(std::move(w.open));
            w.open.clear();
            wait_copies(w, I, 0);
        });
        Register("ldmatrix", load_matrix);
        Register("stmatrix", store_matrix);
        Register("fence", [](Warp& w, const Inst&) { fence(w); });
        Register("fence.proxy.async", [](Warp& w, const Inst&) { w.fenced = w.seen, tick(w); });
        Register("bar.warp.sync", [](Warp& w, const Inst&) { tick(w); });
        Register("prefetch", [](Warp&, const Inst&) {});
    }
} all;

}  // namespace

void wait_copies(Warp& w, const Inst&, u32 left) {
    Cta& cta = *w.cta;
    const u32 g = w.launch->program->granule_shared;
    while (w.groups.size() > left) {
        for (const Copy& c : w.groups.front()) {
            u8* to = cta.shared.data() + c.to - SHARED_BASE;
            memcpy(to, reinterpret_cast<const u8*>(c.from), c.filled);
            memset(to + c.filled, 0, c.size - c.filled);  // ISA 9.7.9.25.3.1: the rest is zero
            for (u32 k = (c.to - SHARED_BASE) / g; k <= (c.to - SHARED_BASE + c.size - 1) / g; k++) {
                cta.cells[k].copying--;
                cta.cells[k].write = epoch(w, c.lane, false), cta.cells[k].write_pc = c.pc;
            }
        }
        w.groups.erase(w.groups.begin());
    }
}

}  // namespace ptx

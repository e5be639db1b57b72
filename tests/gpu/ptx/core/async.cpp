// mbarrier objects and bulk copies of one dimension (ISA 9.7.13.15, 9.7.9.25.5). Clusters have one CTA.
#include <algorithm>
#include <stdexcept>

#include "machine.h"

namespace ptx {
namespace {

u64 address_of(const Warp& w, const Operand& o, int lane, i64 offset, int width) {
    u64 a = width == 8 ? lanes<u64>(w, o)[lane] + offset : u32(lanes<u32>(w, o)[lane] + offset);
    return a >= SHARED_WINDOW && a < SHARED_WINDOW + WINDOW_SIZE ? a - SHARED_WINDOW : a;
}

MBarrier& at(Warp& w, const Inst& I, u32 lane, u32 address) {
    auto& all = w.cta->mbarriers;
    auto found = all.find(address);
    if (found == all.end()) {
        w.launch->report(ERROR, "mbarrier that was not initialised", I.line, &w, lane,
                         "shared+" + std::to_string(address - SHARED_BASE));
        throw Failure();
    }
    shared_at(w, I, lane, address, 8, ATOMIC, nullptr);
    return found->second;
}

void complete(MBarrier& m) {  // a phase ends when no arrivals and no bytes are pending
    if (m.pending || m.tx) return;
    m.phase++, m.pending = m.count, m.done = m.clocks;
}

void arrive(Warp& w, const Inst& I, u32 lane, MBarrier& m, u32 count) {
    if (count > m.pending) {
        w.launch->report(ERROR, "more arrivals at an mbarrier than it expects", I.line, &w, lane, "");
        throw Failure();
    }
    join(m.clocks, w.seen);
    m.pending -= count;
    complete(m);
}

// Copies in flight are executed as late as possible: when a thread waits for the barrier that they complete.
void deliver(Warp& w, u32 barrier) {
    auto& bulk = w.cta->bulk;
    const u32 g = w.launch->program->granule_shared;
    for (size_t i = 0; i < bulk.size();) {
        if (bulk[i].barrier != barrier) {
            i++;
            continue;
        }
        const Bulk b = bulk[i];
        bulk.erase(bulk.begin() + i);
        memcpy(w.cta->shared.data() + b.to - SHARED_BASE, reinterpret_cast<const u8*>(b.from), b.size);
        Warp& issuer = w.cta->warps[b.warp];
        for (u32 k = (b.to - SHARED_BASE) / g; k <= (b.to - SHARED_BASE + b.size - 1) / g; k++) {
            SharedCell& c = w.cta->cells[k];
            c.copying--, c.write = Epoch(issuer.clock) << 32 | Epoch(w.cta->number) << 12 | b.warp << 6,
                         c.write_pc = b.pc;
        }
        MBarrier& m = w.cta->mbarriers[barrier];
        join(m.clocks, issuer.seen);
        issuer.seen[b.warp] = ++issuer.clock;
        // Written by the async proxy: wgmma may read them without a proxy fence.
        if (issuer.fenced.empty()) issuer.fenced.assign(issuer.seen.size(), 0);
        issuer.fenced[b.warp] = issuer.clock;
        m.tx -= b.size;
        complete(m);
    }
}

struct All {
    All() {
        // Operands: address [, count]; imm 0 offset, 7 bytes of the address register
        Register("mbarrier.init", [](Warp& w, const Inst& I) {
            for_lanes(w.exec, [&](int lane) {
                const u32 a = address_of(w, I.op[0], lane, I.imm[0], I.imm[7]);
                if (!shared_at(w, I, lane, a, 8, WRITE, nullptr)) return;
                MBarrier m;
                m.count = m.pending = lanes<u32>(w, I.op[1])[lane];
                m.clocks.assign(w.seen.size(), 0), m.done = m.clocks;
                w.cta->mbarriers[a] = m;
            });
        });
        Register("mbarrier.inval", [](Warp& w, const Inst& I) {
            for_lanes(w.exec,
                      [&](int lane) { w.cta->mbarriers.erase(u32(address_of(w, I.op[0], lane, I.imm[0], I.imm[7]))); });
        });
        // imm 1: there is a state result; 2: bytes are expected (their number is the last operand); 3: there is a
        // count; 4: no arrival
        Register("mbarrier.arrive", [](Warp& w, const Inst& I) {
            for_lanes(w.exec, [&](int lane) {
                const u32 d = I.destinations;
                MBarrier& m = at(w, I, lane, address_of(w, I.op[d], lane, I.imm[0], I.imm[7]));
                const u32 phase = m.phase;
                if (I.imm[2]) m.tx += lanes<u32>(w, I.op[d + 1])[lane];
                if (!I.imm[4]) arrive(w, I, lane, m, I.imm[3] ? lanes<u32>(w, I.op[d + 1])[lane] : 1);
                if (I.imm[1]) lanes<u64>(w, I.op[0])[lane] = phase;
            });
            w.seen[w.number] = ++w.clock;
        });
        // Operands: predicate, address, state or parity; imm 1: parity
        Register("mbarrier.wait", [](Warp& w, const Inst& I) {
            u32 ready = 0;
            for_lanes(w.exec, [&](int lane) {
                const u32 a = address_of(w, I.op[1], lane, I.imm[0], I.imm[7]);
                MBarrier& m = at(w, I, lane, a);
                if (w.launch->random() % 2) deliver(w, a);
                const bool done = I.imm[1] ? (m.phase & 1) != (lanes<u32>(w, I.op[2])[lane] & 1)
                                           : m.phase != u32(lanes<u64>(w, I.op[2])[lane]);
                if (!done) return;
                ready |= 1u << lane;
                const u32 own = w.clock;
                join(w.seen, m.done);
                w.seen[w.number] = own;
            });
            u32& p = mask(w, I.op[0]);
            p = (p & ~w.exec) | ready;
        });
        // Operands: destination, source, bytes, barrier; imm 0, 1, 2: offsets; 5, 6, 7: bytes of the address registers
        Register("cp.async.bulk", [](Warp& w, const Inst& I) {
            for_lanes(w.exec, [&](int lane) {
                const u32 to = address_of(w, I.op[0], lane, I.imm[0], I.imm[5]),
                          barrier = address_of(w, I.op[3], lane, I.imm[2], I.imm[7]);
                const u64 from = address_of(w, I.op[1], lane, I.imm[1], 8);
                const u32 size = lanes<u32>(w, I.op[2])[lane];
                at(w, I, lane, barrier);
                if (size % 16 || from % 16 || to % 16) {
                    w.launch->report(ERROR, "bulk copy that is not aligned to 16 bytes", I.line, &w, lane, "");
                    return;
                }
                const u32 g = w.launch->program->granule_shared;
                for (u32 i = 0; i < size; i += 16) {
                    u32 defined = 1;
                    if (!global_at(w, I, lane, from + i, 16, READ, false) ||
                        !shared_at(w, I, lane, to + i, 16, WRITE, &defined))
                        return;
                }
                for (u32 k = (to - SHARED_BASE) / g; k <= (to - SHARED_BASE + size - 1) / g; k++)
                    w.cta->cells[k].copying++;
                w.cta->bulk.push_back({from, to, size, barrier, w.number, u32(&I - w.launch->program->code.data())});
            });
        });
    }
} all;

}  // namespace
}  // namespace ptx

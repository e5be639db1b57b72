// Tensor core instructions: mma.sync and wgmma. Products are exact and summed in double, then rounded once. Hardware
// has another order of summation and truncates, so results agree only to a few ulp of float32.
#include <cmath>
#include <stdexcept>

#include "machine.h"

namespace ptx {
namespace {

enum Element { F16, BF16, TF32, F64, S8, U8 };

double element(const u8* p, int type) {
    switch (type) {
        case F16: {
            _Float16 h;
            memcpy(&h, p, 2);
            return double(h);
        }
        case BF16: {
            u16 h;
            memcpy(&h, p, 2);
            return std::bit_cast<float>(u32(h) << 16);
        }
        case TF32: {  // ISA 9.7.14: the lower 13 bits are ignored
            u32 b;
            memcpy(&b, p, 4);
            return std::bit_cast<float>(b & 0xffffe000u);
        }
        case F64: {
            double d;
            memcpy(&d, p, 8);
            return d;
        }
        case S8:
            return i8(*p);
        default:
            return *p;
    }
}
int bytes_of(int type) { return type == F64 ? 8 : type == TF32 ? 4 : type >= S8 ? 1 : 2; }

// Position of element (row, k) of A: for lane = 4 (row % 8) + group, a register holds 4 bytes (8 of f64).
// imm 0 type of A and B, 1 bytes of an accumulator (2 f16, 4, 8), 2 n (8), 3 k, 4 integers. Operands: D, A, B, C.
// ISA 9.7.14.5: fragments. Registers of A: (row < 8, low k), (row >= 8, low k), (row < 8, high k), (row >= 8, high k);
// registers of B: low k, high k; a register holds elements k = 4 / bytes * group + i.
template <int M = 16>
void multiply(Warp& w, const Inst& I) {
    const int type = I.imm[0], size = bytes_of(type), k_size = I.imm[3];
    const int registers_a = I.imm[4], registers_b = I.imm[5];
    const int per = type == F64 ? 1 : 4 / size;  // elements a register
    const int rows = I.imm[2];
    double a[16][32], b[32][8], c[16][8];
    const int d0 = 0, a0 = I.destinations, b0 = a0 + registers_a, c0 = b0 + registers_b;
    const int rows_in = rows / 8;
    for (int r = 0; r < registers_a; r++) {
        const u8* s = lanes<u8>(w, I.op[a0 + r]);
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < per; i++)
                a[lane / 4 + 8 * (r % rows_in)][(r / rows_in) * 4 * per + lane % 4 * per + i] =
                    element(s + lane * (type == F64 ? 8 : 4) + i * size, type);
    }
    for (int r = 0; r < registers_b; r++) {
        const u8* s = lanes<u8>(w, I.op[b0 + r]);
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < per; i++)
                b[r * 4 * per + lane % 4 * per + i][lane / 4] =
                    element(s + lane * (type == F64 ? 8 : 4) + i * size, type);
    }
    const int acc = I.imm[1];
    const bool integers = type >= S8;
    auto each = [&](auto f) {  // accumulators: (row, 2 group + i), then row + 8; two f16 per register
        for (int r = 0; r < rows / 8 * 2; r++)
            for (int lane = 0; lane < LANES; lane++) f(lane / 4 + 8 * (r / 2), lane % 4 * 2 + r % 2, r, lane);
    };
    each([&](int row, int column, int r, int lane) {
        if (acc == 2) {
            _Float16 h;
            memcpy(&h, lanes<u8>(w, I.op[c0 + r / 2]) + lane * 4 + r % 2 * 2, 2);
            c[row][column] = h;
        } else if (acc == 8) {
            c[row][column] = lanes<double>(w, I.op[c0 + r])[lane];
        } else {
            c[row][column] =
                integers ? double(lanes<i32>(w, I.op[c0 + r])[lane]) : double(lanes<float>(w, I.op[c0 + r])[lane]);
        }
    });
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < k_size; k++)
            for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    each([&](int row, int column, int r, int lane) {
        const double v = c[row][column];
        if (acc == 2) {
            const _Float16 h = _Float16(v);
            memcpy(lanes<u8>(w, I.op[d0 + r / 2]) + lane * 4 + r % 2 * 2, &h, 2);
        } else if (acc == 8) {
            lanes<double>(w, I.op[d0 + r])[lane] = v;
        } else if (integers) {
            lanes<i32>(w, I.op[d0 + r])[lane] = i32(i64(v));
        } else {
            lanes<float>(w, I.op[d0 + r])[lane] = float(v);
        }
    });
}

// ---- wgmma (ISA 9.7.15): a warp computes 16 of the 64 rows of its warpgroup's product.

struct Descriptor {  // ISA 9.7.15.5.1.2.2
    u32 start, leading, stride;
    int swizzle;  // bits of the address that are exchanged: 0 none, 1, 2, 3 for 32, 64, 128 bytes
    explicit Descriptor(u64 d)
        : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
        static const int bits[] = {0, 3, 2, 1};
        swizzle = bits[d >> 62];
        if (d >> 49 & 7) throw std::runtime_error("wgmma descriptor with a base offset");
    }
    // Address of 16 bytes: row `outer` of M or N and 16-byte column `k` for a K-major matrix; for an MN-major one
    // 16-byte column `outer` and row `k`. Canonical layouts in 16-byte units, with T elements each:
    u32 address(u32 outer, u32 k, bool mn_major) const {
        const u32 width = 1u << swizzle;  // 16-byte units of a swizzled row
        u32 at;
        if (!mn_major) {
            // none: ((8, m), 2) : ((1, SBO), LBO); swizzled: ((8, m), 2) : ((width, SBO), 1)
            at = swizzle ? outer % 8 * width * 16 + outer / 8 * stride + k * 16
                         : outer % 8 * 16 + outer / 8 * stride + k * leading;
        } else {
            // none: (m, (8, k)) : (SBO, (1, LBO)); swizzled: ((width, m), (8, k)) : ((1, LBO), (width, SBO))
            at = swizzle ? outer % width * 16 + outer / width * leading + k % 8 * width * 16 + k / 8 * stride
                         : outer * stride + k % 8 * 16 + k / 8 * leading;
        }
        u32 address = start + at;
        if (swizzle) address ^= (address >> 7 & (width - 1)) << 4;  // by the address, not by the offset
        return address;
    }
};

// One matrix in shared memory, [outer][k] as double; the ranges that are read are recorded.
void gather(Warp& w, const Inst& I, u64 descriptor, bool mn_major, int type, u32 first, u32 count, u32 k_size,
            double* out, u32 pitch_outer, u32 pitch_k) {
    const Descriptor d(descriptor);
    const u32 size = bytes_of(type), each = 16 / size;
    auto read = [&](u32 outer, u32 k) -> const u8* {
        const u32 at = d.address(outer, k, mn_major);
        u32 defined = 1;
        w.tainted = false;
        const u8* p = shared_at(w, I, (outer + k) % LANES, at, 16, READ, &defined);
        static const u8 zeros[16] = {};
        if (!p) return zeros;
        if (!defined || w.tainted)
            w.launch->convict(), w.launch->report(ERROR, "wgmma reads undefined shared memory", I.line, &w, 0, "");
        const u32 g = w.launch->program->granule_shared;
        for (u32 c = (at - SHARED_BASE) / g; c <= (at - SHARED_BASE + 15) / g; c++) {
            SharedCell& cell = w.cta->cells[c];
            cell.matrices++;
            if (cell.write && w.launch->races) {  // ISA 9.7.15.4: generic writes are visible only after a proxy fence
                const u32 v = warp_of(cell.write), when = clock_of(cell.write);
                const Clocks &mine = w.fenced, &his = w.cta->warps[v].fenced;
                if (!(mine.size() && mine[v] >= when) && !(his.size() && his[v] >= when)) {
                    const Inst& writer = w.launch->program->code[cell.write_pc];
                    const bool copy = writer.fn == handlers()[handler_names()["cp.async"]];
                    w.launch->report(ERROR,
                                     std::string("wgmma reads what ") + (copy ? "a cp.async" : "a store") +
                                         " wrote without a fence.proxy.async since",
                                     I.line, &w, 0, "written by line " + std::to_string(writer.line));
                }
            }
        }
        w.matrix_open.push_back({at, 16});
        return p;
    };
    if (!mn_major) {
        for (u32 o = 0; o < count; o++)
            for (u32 c = 0; c < k_size / each; c++) {
                const u8* p = read(first + o, c);
                for (u32 i = 0; i < each; i++)
                    out[o * pitch_outer + (c * each + i) * pitch_k] = element(p + i * size, type);
            }
    } else {
        for (u32 k = 0; k < k_size; k++)
            for (u32 c = first / each; c < (first + count) / each; c++) {
                const u8* p = read(c, k);
                for (u32 i = 0; i < each; i++)
                    out[(c * each + i - first) * pitch_outer + k * pitch_k] = element(p + i * size, type);
            }
    }
}

// imm 0 type of A and B, 1 bytes of an accumulator, 2 n, 3 k, 4 A is in registers, 5 signs (1: -A, 2: -B), 6 MN-major
// (1 A, 2 B). Operands: D; A's registers or descriptor; B's descriptor; predicate scale-d; D again, as sources.
void multiply_group(Warp& w, const Inst& I) {
    const int type = I.imm[0], n = I.imm[2], k_size = I.imm[3], acc = I.imm[1];
    const bool from_registers = I.imm[4];
    const int registers = I.destinations, a0 = registers, b0 = a0 + (from_registers ? 4 : 1);
    static thread_local double a[16 * 32], b[32 * 256], c[16 * 256];
    if (from_registers) {
        const int size = bytes_of(type), per = 4 / size;
        for (int r = 0; r < 4; r++) {
            const u8* s = lanes<u8>(w, I.op[a0 + r]);
            for (int lane = 0; lane < LANES; lane++)
                for (int i = 0; i < per; i++)
                    a[(lane / 4 + 8 * (r % 2)) * 32 + r / 2 * 4 * per + lane % 4 * per + i] =
                        element(s + lane * 4 + i * size, type);
        }
    } else {
        gather(w, I, lanes<u64>(w, I.op[a0])[0], I.imm[6] & 1, type, w.number % 4 * 16, 16, k_size, a, 32, 1);
    }
    gather(w, I, lanes<u64>(w, I.op[b0])[0], I.imm[6] & 2, type, 0, n, k_size, b, 1, 256);
    const u32 scale = mask(w, I.op[b0 + 1]);
    if (scale && scale != ~0u) throw std::runtime_error("wgmma: lanes disagree on scale-d");
    const double sign = (I.imm[5] == 1 || I.imm[5] == 2) ? -1 : 1;
    auto each = [&](auto f) {
        for (int j = 0; j < n / 8; j++)
            for (int r = 0; r < 4; r++)
                for (int lane = 0; lane < LANES; lane++)
                    f(lane / 4 + 8 * (r / 2), j * 8 + lane % 4 * 2 + r % 2, j * 4 + r, lane);
    };
    auto slot = [&](int r, int lane) -> u8* {
        return acc == 2 ? lanes<u8>(w, I.op[r / 2]) + lane * 4 + r % 2 * 2 : lanes<u8>(w, I.op[r]) + lane * 4;
    };
    each([&](int row, int column, int r, int lane) {
        double v = 0;
        if (scale) {
            if (acc == 2) {
                _Float16 h;
                memcpy(&h, slot(r, lane), 2);
                v = h;
            } else if (type >= S8) {
                v = *reinterpret_cast<i32*>(slot(r, lane));
            } else {
                v = *reinterpret_cast<float*>(slot(r, lane));
            }
        }
        c[row * 256 + column] = v;
    });
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < k_size; k++) {
            const double x = sign * a[row * 32 + k];
            for (int column = 0; column < n; column++) c[row * 256 + column] += x * b[k * 256 + column];
        }
    each([&](int row, int column, int r, int lane) {
        const double v = c[row * 256 + column];
        if (acc == 2) {
            const _Float16 h = _Float16(v);
            memcpy(slot(r, lane), &h, 2);
        } else if (type >= S8) {
            *reinterpret_cast<i32*>(slot(r, lane)) = i32(i64(v));
        } else {
            *reinterpret_cast<float*>(slot(r, lane)) = float(v);
        }
    });
    // Before the wait, only another wgmma of the same shape may access the accumulators.
    for (int r = 0; r < registers; r++) {
        w.in_flight.push_back(I.op[r].id);
        if (!scale) w.defined[I.op[r].id] = ~0u;
    }
}

struct All {
    All() {
        Register("mma", multiply<>);
        Register("wgmma", multiply_group);
        Register("wgmma.fence", [](Warp&, const Inst&) {});
        Register("wgmma.commit_group", [](Warp& w, const Inst&) {
            w.matrix_groups.push_back(std::move(w.matrix_open));
            w.matrix_open.clear();
        });
        Register("wgmma.wait_group", [](Warp& w, const Inst& I) { wait_matrices(w, I.imm[0]); });
    }
} all;

}  // namespace

void wait_matrices(Warp& w, u32 left) {
    const u32 g = w.launch->program->granule_shared, n = w.launch->warps_per_cta;
    while (w.matrix_groups.size() > left) {
        for (auto [at, size] : w.matrix_groups.front())
            for (u32 c = (at - SHARED_BASE) / g; c <= (at - SHARED_BASE + size - 1) / g; c++) {
                w.cta->cells[c].matrices--;
                if (u64& r = w.cta->reads[size_t(c) * n + w.number]; r)
                    r = u64(w.clock) << 32 | (r & 0xffffffff);  // it read until now
            }
        w.matrix_groups.erase(w.matrix_groups.begin());
    }
    if (left == 0) w.in_flight.clear();
}

}  // namespace ptx

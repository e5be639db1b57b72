// Arithmetic, comparison, conversion and data movement between registers. "ISA" is the PTX ISA 9.0 manual.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "machine.h"

namespace ptx {
namespace {

// ---- loops over the lanes; registers of inactive lanes do not change

template <class D, class F>
inline void store_lanes(Warp& w, const Operand& o, F value) {
    D* d = lanes<D>(w, o);
    if (w.exec == ~0u) {
        D r[LANES];
        for (int i = 0; i < LANES; i++) r[i] = value(i);
        memcpy(d, r, sizeof r);
    } else {
        D r[LANES];
        for (int i = 0; i < LANES; i++) r[i] = value(i);
        for (int i = 0; i < LANES; i++) d[i] = (w.exec >> i & 1) ? r[i] : d[i];
    }
}
template <class D, class A, class F>
inline void map1(Warp& w, const Inst& I, F f) {
    const A* a = lanes<A>(w, I.op[1]);
    store_lanes<D>(w, I.op[0], [&](int i) { return D(f(a[i])); });
}
template <class D, class A, class B, class F>
inline void map2(Warp& w, const Inst& I, F f) {
    const A* a = lanes<A>(w, I.op[1]);
    const B* b = lanes<B>(w, I.op[2]);
    store_lanes<D>(w, I.op[0], [&](int i) { return D(f(a[i], b[i])); });
}
template <class D, class A, class B, class C, class F>
inline void map3(Warp& w, const Inst& I, F f) {
    const A* a = lanes<A>(w, I.op[1]);
    const B* b = lanes<B>(w, I.op[2]);
    const C* c = lanes<C>(w, I.op[3]);
    store_lanes<D>(w, I.op[0], [&](int i) { return D(f(a[i], b[i], c[i])); });
}
inline void set_mask(Warp& w, const Operand& o, u32 value) {
    u32& d = mask(w, o);
    d = (d & ~w.exec) | (value & w.exec);
}

// ---- integers

template <class T>
struct Wide;
template <>
struct Wide<u16> {
    using type = u32;
};
template <>
struct Wide<i16> {
    using type = i32;
};
template <>
struct Wide<u32> {
    using type = u64;
};
template <>
struct Wide<i32> {
    using type = i64;
};
template <>
struct Wide<u64> {
    using type = unsigned __int128;
};
template <>
struct Wide<i64> {
    using type = __int128;
};

template <class T>
using U = std::make_unsigned_t<T>;

// ISA 9.7.1.12: shift amounts above the width are clamped to it.
template <class T>
T shl(T a, u32 n) {
    return n >= sizeof(T) * 8 ? 0 : T(U<T>(a) << n);
}
template <class T>
T shr(T a, u32 n) {
    const u32 bits = sizeof(T) * 8;
    if (n >= bits) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
    return a >> n;
}

template <class T>
T divide(T a, T b) {
    if (b == 0) return T(-1);  // unspecified in PTX; all ones on hardware
    if (std::is_signed_v<T> && b == T(-1)) return T(-U<T>(a));
    return a / b;
}
template <class T>
T remainder(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return a % b;
}

template <class T>
void integers(const std::string& t) {
    using W = typename Wide<T>::type;
    using V = U<T>;
    constexpr int bits = sizeof(T) * 8;
#define BIN(name, expr) \
    Register(name "." + t, [](Warp& w, const Inst& I) { map2<T, T, T>(w, I, [](T a, T b) -> T { return expr; }); })
    BIN("add", T(V(a) + V(b)));
    BIN("sub", T(V(a) - V(b)));
    BIN("mul.lo", T(W(a) * W(b)));
    BIN("mul.hi", T((W(a) * W(b)) >> bits));
    BIN("div", divide<T>(a, b));
    BIN("rem", remainder<T>(a, b));
    BIN("min", a < b ? a : b);
    BIN("max", a > b ? a : b);
    if constexpr (std::is_signed_v<T>) {
        BIN("min.relu", std::max<T>(a < b ? a : b, 0));
        BIN("max.relu", std::max<T>(a > b ? a : b, 0));
        BIN("add.sat", T(std::clamp<W>(W(a) + W(b), std::numeric_limits<T>::min(), std::numeric_limits<T>::max())));
        BIN("sub.sat", T(std::clamp<W>(W(a) - W(b), std::numeric_limits<T>::min(), std::numeric_limits<T>::max())));
    }
#undef BIN
    Register("mad.lo." + t, [](Warp& w, const Inst& I) {
        map3<T, T, T, T>(w, I, [](T a, T b, T c) { return T(V(T(W(a) * W(b))) + V(c)); });
    });
    Register("mad.hi." + t, [](Warp& w, const Inst& I) {
        map3<T, T, T, T>(w, I, [](T a, T b, T c) { return T(V(T((W(a) * W(b)) >> bits)) + V(c)); });
    });
    if constexpr (sizeof(T) < 8) {
        Register("mul.wide." + t,
                 [](Warp& w, const Inst& I) { map2<W, T, T>(w, I, [](T a, T b) { return W(a) * W(b); }); });
        Register("mad.wide." + t, [](Warp& w, const Inst& I) {
            map3<W, T, T, W>(w, I, [](T a, T b, W c) { return W(U<W>(W(a) * W(b)) + U<W>(c)); });
        });
    }
    Register("sad." + t, [](Warp& w, const Inst& I) {
        map3<T, T, T, T>(w, I, [](T a, T b, T c) { return T(V(c) + V(a < b ? V(b) - V(a) : V(a) - V(b))); });
    });
    Register("neg." + t, [](Warp& w, const Inst& I) { map1<T, T>(w, I, [](T a) { return T(-V(a)); }); });
    Register("abs." + t, [](Warp& w, const Inst& I) { map1<T, T>(w, I, [](T a) { return T(a < 0 ? -V(a) : V(a)); }); });
    Register("shr." + t,
             [](Warp& w, const Inst& I) { map2<T, T, u32>(w, I, [](T a, u32 n) { return shr<T>(a, n); }); });
    if constexpr (sizeof(T) >= 4) {
        Register("bfe." + t, [](Warp& w, const Inst& I) {  // ISA 9.7.1.19
            map3<T, T, u32, u32>(w, I, [](T a, u32 pos, u32 len) -> T {
                pos &= 255, len &= 255;
                if (len == 0) return 0;
                const u32 top = std::min<u32>(pos + len - 1, bits - 1);
                const bool sign = std::is_signed_v<T> && (V(a) >> top & 1);
                V r = pos >= bits ? V(0) : V(a) >> pos;
                if (len < bits) {
                    const V keep = (V(1) << len) - 1;
                    r = sign ? (r & keep) | ~keep : r & keep;
                }
                // Above the top bit of the register the field is filled with the sign.
                if (sign && pos + len > bits) r |= pos >= bits ? ~V(0) : ~V(0) << (bits - pos);
                return T(r);
            });
        });
        Register("bfind." + t, [](Warp& w, const Inst& I) {
            const bool shift = I.imm[0];
            map1<u32, T>(w, I, [=](T a) -> u32 {
                V v = std::is_signed_v<T> && a < 0 ? ~V(a) : V(a);
                if (!v) return ~0u;
                const u32 at = bits - 1 - std::countl_zero(v);
                return shift ? bits - 1 - at : at;
            });
        });
    }
}

// ISA 9.7.2: extended precision. imm 0: carry in; 1: carry out; 2: 0 add, 1 sub, 2 mad.lo, 3 mad.hi
template <class T>
void extended(const std::string& t) {
    Register("extended." + t, [](Warp& w, const Inst& I) {
        using W = typename Wide<T>::type;
        constexpr int bits = sizeof(T) * 8;
        const T *a = lanes<T>(w, I.op[1]), *b = lanes<T>(w, I.op[2]),
                *c = I.operands > 3 ? lanes<T>(w, I.op[3]) : nullptr;
        T* d = lanes<T>(w, I.op[0]);
        u32 out = 0;
        for_lanes(w.exec, [&](int i) {
            const W in = I.imm[0] ? w.carry >> i & 1 : 0;
            W r;
            if (I.imm[2] == 0)
                r = W(a[i]) + W(b[i]) + in;
            else if (I.imm[2] == 1)
                r = W(a[i]) - W(b[i]) - in;
            else
                r = W(T(I.imm[2] == 2 ? W(a[i]) * b[i] : W(a[i]) * b[i] >> bits)) + c[i] + in;
            d[i] = T(r);
            out |= u32(r >> bits & 1) << i;
        });
        if (I.imm[1]) w.carry = (w.carry & ~w.exec) | out;
    });
}

template <class T>
void bitwise(const std::string& t) {  // unsigned T
#define BIN(name, expr) \
    Register(name "." + t, [](Warp& w, const Inst& I) { map2<T, T, T>(w, I, [](T a, T b) -> T { return expr; }); })
    BIN("and", a & b);
    BIN("or", a | b);
    BIN("xor", a ^ b);
#undef BIN
    Register("not." + t, [](Warp& w, const Inst& I) { map1<T, T>(w, I, [](T a) { return T(~a); }); });
    Register("cnot." + t, [](Warp& w, const Inst& I) { map1<T, T>(w, I, [](T a) { return T(a == 0); }); });
    Register("mov." + t, [](Warp& w, const Inst& I) { map1<T, T>(w, I, [](T a) { return a; }); });
    Register("shl." + t,
             [](Warp& w, const Inst& I) { map2<T, T, u32>(w, I, [](T a, u32 n) { return shl<T>(a, n); }); });
    Register("selp." + t, [](Warp& w, const Inst& I) {
        const T *a = lanes<T>(w, I.op[1]), *b = lanes<T>(w, I.op[2]);
        const u32 p = mask(w, I.op[3]);
        store_lanes<T>(w, I.op[0], [&](int i) { return (p >> i & 1) ? a[i] : b[i]; });
        const u32 ok = w.defined[I.op[3].id] & ((p & w.defined[I.op[1].id]) | (~p & w.defined[I.op[2].id]));
        u32& d = w.defined[I.op[0].id];
        d = (d & ~w.exec) | (ok & w.exec);
    });
    if constexpr (sizeof(T) >= 4) {
        constexpr u32 bits = sizeof(T) * 8;
        Register("popc." + t, [](Warp& w, const Inst& I) { map1<u32, T>(w, I, [](T a) { return std::popcount(a); }); });
        Register("clz." + t,
                 [](Warp& w, const Inst& I) { map1<u32, T>(w, I, [](T a) { return std::countl_zero(a); }); });
        Register("brev." + t, [](Warp& w, const Inst& I) {
            map1<T, T>(w, I, [](T a) {
                T r = 0;
                for (u32 i = 0; i < bits; i++) r |= (a >> i & 1) << (bits - 1 - i);
                return r;
            });
        });
        Register("bfi." + t, [](Warp& w, const Inst& I) {  // ISA 9.7.1.20: d = b with the low bits of a at pos
            const T *a = lanes<T>(w, I.op[1]), *b = lanes<T>(w, I.op[2]);
            const u32 *pos = lanes<u32>(w, I.op[3]), *len = lanes<u32>(w, I.op[4]);
            store_lanes<T>(w, I.op[0], [&](int i) -> T {
                const u32 p = pos[i] & 255, n = len[i] & 255;
                if (n == 0 || p >= bits) return b[i];
                const T field = (n >= bits ? ~T(0) : (T(1) << n) - 1) << p;
                return (b[i] & ~field) | (a[i] << p & field);
            });
        });
        Register("lop3." + t, [](Warp& w, const Inst& I) {
            const u32 table = I.imm[0];
            map3<T, T, T, T>(w, I, [=](T a, T b, T c) {
                T r = 0;
                for (u32 k = 0; k < 8; k++)
                    if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
                return r;
            });
        });
    }
}

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline double flush(double x) { return x; }

// ---- predicates: comparisons; results of setp may be combined with a predicate

enum Combine { SET, AND, OR, XOR };
void set_predicates(Warp& w, const Inst& I, u32 r) {
    // imm[0]: how to combine with the last operand; imm[1]: that operand is negated; imm[2]: there is a second result
    const int next = I.destinations + 2;
    auto combined = [&](u32 r) {
        if (I.imm[0] == SET) return r;
        const u32 c = I.imm[1] ? ~mask(w, I.op[next]) : mask(w, I.op[next]);
        return I.imm[0] == AND ? r & c : I.imm[0] == OR ? r | c : r ^ c;
    };
    set_mask(w, I.op[0], combined(r));
    if (I.imm[2]) set_mask(w, I.op[1], combined(~r));
}
template <class T, class F>
inline u32 compare_lanes(Warp& w, const Inst& I, F f) {
    const T *a = lanes<T>(w, I.op[I.destinations]), *b = lanes<T>(w, I.op[I.destinations + 1]);
    u32 r = 0;
    if constexpr (std::is_same_v<T, float>)
        if (I.imm[7] & FTZ) {
            for (int i = 0; i < LANES; i++) r |= u32(f(flush(a[i]), flush(b[i]))) << i;
            return r;
        }
    for (int i = 0; i < LANES; i++) r |= u32(f(a[i], b[i])) << i;
    return r;
}
template <class T>
void compares(const std::string& t) {
#define CMP(name, expr)                                                                                              \
    Register("setp." name "." + t, [](Warp& w, const Inst& I) {                                                      \
        set_predicates(w, I, compare_lanes<T>(w, I, [](T a, T b) { return bool(expr); }));                           \
    });                                                                                                              \
    Register("set." name "." + t,                                                                                    \
             [](Warp& w, const Inst& I) { /* imm[3]: 1 gives 1.0f, 0 all ones */                                     \
                                          map2<u32, T, T>(w, I, [one = u32(I.imm[3] ? 0x3f800000 : ~0u)](T a, T b) { \
                                              return bool(expr) ? one : 0;                                           \
                                          });                                                                        \
             })
    CMP("eq", a == b);
    CMP("lt", a < b);
    CMP("le", a <= b);
    CMP("gt", a > b);
    CMP("ge", a >= b);
    if constexpr (std::is_floating_point_v<T>) {  // ISA 9.3.2: unordered comparisons are true with a NaN
        CMP("ne", a < b || a > b);
        CMP("equ", !(a < b || a > b));
        CMP("neu", !(a == b));
        CMP("ltu", !(a >= b));
        CMP("leu", !(a > b));
        CMP("gtu", !(a <= b));
        CMP("geu", !(a < b));
        CMP("num", a == a && b == b);
        CMP("nan", a != a || b != b);
    } else {
        CMP("ne", a != b);
    }
#undef CMP
}

// ---- floating point

// ISA 9.7.3: NaN results of float32 arithmetic are the canonical 0x7fffffff.
inline float canonical(float x) { return x != x ? std::bit_cast<float>(0x7fffffffu) : x; }
inline double canonical(double x) { return x != x ? std::bit_cast<double>(0x7fffffffffffffffull) : x; }
template <class T>
inline T saturate(T x) {
    return x > 0 ? std::min<T>(x, 1) : T(0);
}  // NaN gives 0

struct Rounding {
    bool changed;
    explicit Rounding(int mode) : changed(mode != 0) {
        static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
        if (changed) std::fesetround(modes[mode]);
    }
    ~Rounding() {
        if (changed) std::fesetround(FE_TONEAREST);
    }
};

// Fused operations are exact with any flags; x * y as fma(x, y, -0) would lose the rounding mode.
template <class T, int N, class F>
inline void floating(Warp& w, const Inst& I, F f) {
    auto run = [&](auto g) {
        if constexpr (N == 1) map1<T, T>(w, I, g);
        if constexpr (N == 2) map2<T, T, T>(w, I, g);
        if constexpr (N == 3) map3<T, T, T, T>(w, I, g);
    };
    const i64 flags = I.imm[7];
    if (flags == 0) return run([f](auto... x) { return canonical(f(x...)); });
    Rounding mode(flags >> ROUND_SHIFT);
    run([f, flags](auto... x) {
        T r = flags & FTZ ? f(flush(x)...) : f(x...);
        if (flags & FTZ) r = flush(r);
        if (flags & SAT) r = saturate(r);
        return canonical(r);
    });
}

template <class T>
inline T minimum(T a, T b) {  // ISA 9.7.3.11: the other operand if one is NaN; -0 < +0
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}
template <class T>
inline T maximum(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
}
template <class T>
inline T with_nan(T a, T b, T r) {
    return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : r;
}
template <class T>
inline T xor_sign(T a, T b, T r) {
    return std::copysign(std::fabs(r), std::signbit(a) != std::signbit(b) ? T(-1) : T(1));
}

// 16-bit formats: computed in double and rounded once. A double sum may be inexact: it is rounded to odd, so that the
// second rounding has the same result as a single rounding.
inline double odd_sum(double a, double b) {
    const double s = a + b, t = s - a, error = (a - (s - t)) + (b - t);
    if (error == 0 || !(std::fabs(s) <= std::numeric_limits<double>::max())) return s;
    u64 bits = std::bit_cast<u64>(s);
    if (bits & 1) return s;
    return std::bit_cast<double>((error > 0) == (s > 0) ? bits + 1 : bits - 1);
}

// x as an integer significand times 2^e is rounded to `digits` significant bits, exponents not below `lowest`.
template <int MODE_ANY>
inline double round_to(double x, int digits, int lowest, int mode) {
    if (x == 0 || !(std::fabs(x) <= std::numeric_limits<double>::max())) return x;
    int e;
    std::frexp(x, &e);
    const int unit = std::max(e - digits, lowest);
    const double scaled = std::ldexp(x, -unit);
    double r;
    switch (mode) {
        case 0:
            r = std::nearbyint(scaled);
            break;
        case 1:
            r = std::trunc(scaled);
            break;
        case 2:
            r = std::floor(scaled);
            break;
        case 3:
            r = std::ceil(scaled);
            break;
        default:
            r = std::copysign(std::floor(std::fabs(scaled) + 0.5), scaled);
            break;  // 4 rna: ties away from zero
    }
    return std::copysign(std::ldexp(r, unit), x);
}

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

inline double to_double(f16 h) {
    const int e = h.bits >> 10 & 31, m = h.bits & 1023;
    const double v = e == 31 ? (m ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity())
                     : e     ? std::ldexp(1024 + m, e - 25)
                             : std::ldexp(m, -24);
    return h.bits >> 15 ? -v : v;
}
inline float to_float(f16 h) {  // exact, and fast enough for matrices
    const u32 sign = u32(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
    float v = std::bit_cast<float>(rest << 13) * 0x1p112f;
    if (rest >= 0x7c00) v = std::bit_cast<float>(rest << 13 | 0x7f800000u);
    return std::bit_cast<float>(std::bit_cast<u32>(v) | sign);
}
inline float to_float(bf16 h) { return std::bit_cast<float>(u32(h.bits) << 16); }
inline double to_double(bf16 h) { return to_float(h); }
inline double to_double(float x) { return x; }
inline double to_double(double x) { return x; }

template <class T>
T from_double(double x, int mode);
template <>
inline f16 from_double<f16>(double x, int mode) {
    if (x != x) return {0x7fff};  // ISA 9.7.9.22: canonical NaN
    const u16 sign = std::signbit(x) ? 0x8000 : 0;
    const double r = std::fabs(round_to<0>(x, 11, -24, mode));
    if (r > 65504) {
        const bool finite = !std::isinf(x) && (mode == 1 || (mode == 2 && !sign) || (mode == 3 && sign));
        return {u16(sign | (finite ? 0x7bff : 0x7c00))};
    }
    if (r == 0) return {sign};
    int e;
    const double m = std::frexp(r, &e);  // in [0.5, 1)
    if (e < -13) return {u16(sign | u16(std::ldexp(r, 24)))};
    return {u16(sign | ((e + 14) << 10) | (u16(m * 2048) & 1023))};
}
template <>
inline bf16 from_double<bf16>(double x, int mode) {
    if (x != x) return {0x7fff};
    const double r = round_to<0>(x, 8, -133, mode);
    if (std::fabs(r) > 0x1.fep127) {
        const bool sign = std::signbit(x),
                   finite = !std::isinf(x) && (mode == 1 || (mode == 2 && !sign) || (mode == 3 && sign));
        return {u16((sign ? 0x8000 : 0) | (finite ? 0x7f7f : 0x7f80))};
    }
    return {u16(std::bit_cast<u32>(float(r)) >> 16)};
}
template <>
inline float from_double<float>(double x, int mode) {
    if (x != x) return std::bit_cast<float>(0x7fffffffu);
    Rounding r(mode);
    volatile double v = x;
    return float(v);
}
template <>
inline double from_double<double>(double x, int) {
    return canonical(x);
}

inline bf16 nearest_bf16(float x) {  // round to nearest even, without the generality of from_double
    const u32 b = std::bit_cast<u32>(x);
    if (x != x) return {0x7fff};
    return {u16((b + 0x7fff + (b >> 16 & 1)) >> 16)};
}

inline f16 nearest_f16(float x) {
    if (x != x) return {0x7fff};
    return {std::bit_cast<u16>(_Float16(x))};
}

template <class T>
void halves(const std::string& t, int count) {  // f16, bf16 and, with count 2, their packed forms
    static_assert(sizeof(T) == 2);
    const std::string name = "." + t;
    (void)count;
    auto each = [](Warp& w, const Inst& I, int arity, bool fused, auto f) {
        const int n = I.imm[6];  // elements a register
        T* d = lanes<T>(w, I.op[0]);
        const T* s[3] = {};
        for (int k = 0; k < arity; k++) s[k] = lanes<T>(w, I.op[1 + k]);
        (void)fused;
        for_lanes(w.exec, [&](int lane) {
            for (int j = 0; j < n; j++) {
                double x[3] = {};
                for (int k = 0; k < arity; k++) {
                    x[k] = to_double(s[k][lane * n + j]);
                    // Halves in ftz mode flush subnormal inputs and results.
                    if ((I.imm[7] & FTZ) && std::is_same_v<T, f16> && std::fabs(x[k]) < 0x1p-14)
                        x[k] = std::copysign(0.0, x[k]);
                }
                double r = f(x[0], x[1], x[2]);
                if (I.imm[7] & SAT) r = saturate(r);
                T v = from_double<T>(r, 0);
                if ((I.imm[7] & FTZ) && std::is_same_v<T, f16> && (v.bits & 0x7c00) == 0) v.bits &= 0x8000;
                d[lane * n + j] = v;
            }
        });
    };
    static auto loop = each;
#define HALF(op, arity, expr)                                                \
    Register(op + name, [](Warp& w, const Inst& I) {                         \
        loop(w, I, arity, true, [](double a, double b, double c) -> double { \
            (void)b;                                                         \
            (void)c;                                                         \
            return expr;                                                     \
        });                                                                  \
    })
    HALF("add", 2, odd_sum(a, b));
    HALF("sub", 2, odd_sum(a, -b));
    HALF("mul", 2, a * b);
    HALF("fma", 3, odd_sum(a * b, c));
    HALF("fma.relu", 3, std::max(odd_sum(a * b, c), 0.0));
    HALF("min", 2, minimum(a, b));
    HALF("max", 2, maximum(a, b));
    HALF("min.NaN", 2, with_nan(a, b, minimum(a, b)));
    HALF("max.NaN", 2, with_nan(a, b, maximum(a, b)));
    HALF("ex2.approx", 1, std::exp2(a));
    HALF("tanh.approx", 1, std::tanh(a));
#undef HALF
    Register("neg" + name, [](Warp& w, const Inst& I) {
        if (I.imm[6] == 2)
            map1<u32, u32>(w, I, [](u32 a) { return a ^ 0x80008000u; });
        else
            map1<u16, u16>(w, I, [](u16 a) { return u16(a ^ 0x8000u); });
    });
    Register("abs" + name, [](Warp& w, const Inst& I) {
        if (I.imm[6] == 2)
            map1<u32, u32>(w, I, [](u32 a) { return a & 0x7fff7fffu; });
        else
            map1<u16, u16>(w, I, [](u16 a) { return u16(a & 0x7fffu); });
    });
#define CMP(op, expr)                                                       \
    Register("setp." op + name, [](Warp& w, const Inst& I) {                \
        if (I.imm[6] != 1) throw std::runtime_error("packed setp");         \
        set_predicates(w, I, compare_lanes<T>(w, I, [](T x, T y) {          \
                           const double a = to_double(x), b = to_double(y); \
                           return bool(expr);                               \
                       }));                                                 \
    })
    CMP("eq", a == b);
    CMP("ne", a < b || a > b);
    CMP("lt", a < b);
    CMP("le", a <= b);
    CMP("gt", a > b);
    CMP("ge", a >= b);
    CMP("equ", !(a < b || a > b));
    CMP("neu", !(a == b));
    CMP("ltu", !(a >= b));
    CMP("leu", !(a > b));
    CMP("gtu", !(a <= b));
    CMP("geu", !(a < b));
    CMP("nan", a != a || b != b);
    CMP("num", a == a && b == b);
#undef CMP
}

// Functions that hardware approximates. With noise, a random error up to the maximum in the manual is added, to detect
// code that needs a higher accuracy than specified. The error is a function of the operands, as on hardware: threads
// with equal operands get equal results.
inline double noise(float a, float b = 0) {
    u64 h = (u64(std::bit_cast<u32>(a)) << 32 | std::bit_cast<u32>(b)) + 0x9e3779b97f4a7c15ull;
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9ull, h = (h ^ h >> 27) * 0x94d049bb133111ebull, h ^= h >> 31;
    return double(h >> 11) * 0x1p-52 - 1;
}
template <class F>
void approximate(Warp& w, const Inst& I, double relative, double absolute, F f) {
    if (!w.launch->noise) return floating<float, 1>(w, I, f);
    floating<float, 1>(w, I, [=](float x) {
        const float exact = f(x);
        if (exact == 0 || !(std::fabs(exact) <= std::numeric_limits<float>::max())) return exact;
        return float(exact * (1 + relative * noise(x)) + absolute * noise(x, 1));
    });
}

template <class T>
void floats(const std::string& t) {
#define OP1(name, expr) \
    Register(name "." + t, [](Warp& w, const Inst& I) { floating<T, 1>(w, I, [](T a) -> T { return expr; }); })
#define OP2(name, expr) \
    Register(name "." + t, [](Warp& w, const Inst& I) { floating<T, 2>(w, I, [](T a, T b) -> T { return expr; }); })
#define OP3(name, expr)    \
    Register(name "." + t, \
             [](Warp& w, const Inst& I) { floating<T, 3>(w, I, [](T a, T b, T c) -> T { return expr; }); })
    OP2("add", a + b);
    OP2("sub", a - b);
    OP2("mul", a * b);
    OP2("div", a / b);
    OP3("fma", std::fma(a, b, c));
    OP2("min", minimum(a, b));
    OP2("max", maximum(a, b));
    OP2("min.NaN", with_nan(a, b, minimum(a, b)));
    OP2("max.NaN", with_nan(a, b, maximum(a, b)));
    OP2("min.xorsign.abs", xor_sign(a, b, minimum(std::fabs(a), std::fabs(b))));
    OP2("max.xorsign.abs", xor_sign(a, b, maximum(std::fabs(a), std::fabs(b))));
    OP1("sqrt", std::sqrt(a));
    OP1("rcp", T(1) / a);
#undef OP1
#undef OP2
#undef OP3
    using B = std::conditional_t<sizeof(T) == 4, u32, u64>;
    constexpr B sign = B(1) << (sizeof(T) * 8 - 1);
    Register("neg." + t, [](Warp& w, const Inst& I) {
        if (I.imm[7] & FTZ)
            map1<T, T>(w, I, [](T a) { return flush(-a); });
        else
            map1<B, B>(w, I, [](B a) { return a ^ sign; });
    });
    Register("abs." + t, [](Warp& w, const Inst& I) {
        if (I.imm[7] & FTZ)
            map1<T, T>(w, I, [](T a) { return flush(std::fabs(a)); });
        else
            map1<B, B>(w, I, [](B a) { return a & ~sign; });
    });
    Register("copysign." + t, [](Warp& w, const Inst& I) {  // ISA 9.7.3.1: the sign of a on b
        map2<B, B, B>(w, I, [](B a, B b) { return (a & sign) | (b & ~sign); });
    });
    Register("testp.finite." + t, [](Warp& w, const Inst& I) {
        const T* a = lanes<T>(w, I.op[1]);
        u32 r = 0;
        for (int i = 0; i < LANES; i++) r |= u32(std::isfinite(a[i])) << i;
        set_mask(w, I.op[0], r);
    });
    Register("testp.infinite." + t, [](Warp& w, const Inst& I) {
        const T* a = lanes<T>(w, I.op[1]);
        u32 r = 0;
        for (int i = 0; i < LANES; i++) r |= u32(std::isinf(a[i])) << i;
        set_mask(w, I.op[0], r);
    });
}

void approximations() {
    // Errors: ISA 9.7.3.8 div, .13 rcp, .15 sqrt, .16 rsqrt, .18 sin, .19 cos, .20 lg2, .21 ex2, .22 tanh.
    Register("ex2.approx.f32",
             [](Warp& w, const Inst& I) { approximate(w, I, 0x1p-22, 0, [](float a) { return std::exp2(a); }); });
    Register("lg2.approx.f32",
             [](Warp& w, const Inst& I) { approximate(w, I, 0x1p-22, 0x1p-22, [](float a) { return std::log2(a); }); });
    Register("rcp.approx.f32",
             [](Warp& w, const Inst& I) { approximate(w, I, 0x1p-23, 0, [](float a) { return 1 / a; }); });
    Register("sqrt.approx.f32",
             [](Warp& w, const Inst& I) { approximate(w, I, 0x1p-23, 0, [](float a) { return std::sqrt(a); }); });
    Register("rsqrt.approx.f32", [](Warp& w, const Inst& I) {
        approximate(w, I, 0x1p-22, 0, [](float a) { return float(1 / std::sqrt(double(a))); });
    });
    Register("sin.approx.f32",
             [](Warp& w, const Inst& I) { approximate(w, I, 0, 0x1p-20, [](float a) { return std::sin(a); }); });
    Register("cos.approx.f32",
             [](Warp& w, const Inst& I) { approximate(w, I, 0, 0x1p-20, [](float a) { return std::cos(a); }); });
    Register("tanh.approx.f32",
             [](Warp& w, const Inst& I) { approximate(w, I, 0x1p-11, 0, [](float a) { return std::tanh(a); }); });
    auto quotient = [](Warp& w, const Inst& I, float limit) {
        const bool noisy = w.launch->noise;
        floating<float, 2>(w, I, [=](float a, float b) {
            // div.approx: |b| in (2^126, 2^128) gives 0 for finite a.
            if (std::fabs(b) > limit && std::isfinite(b) && std::isfinite(a)) return std::copysign(0.0f, a * b);
            const float q = a / b;
            return noisy && q != 0 && std::isfinite(q) ? float(q * (1 + 0x1p-22 * noise(a, b))) : q;  // 2 ulp
        });
    };
    static auto divide_approximately = quotient;
    Register("div.full.f32",
             [](Warp& w, const Inst& I) { divide_approximately(w, I, std::numeric_limits<float>::infinity()); });
    Register("div.approx.f32", [](Warp& w, const Inst& I) { divide_approximately(w, I, 0x1p126f); });
    // ISA 9.7.3.14, .17: coarse approximations from the upper 32 bits, 20 of them significant; low words of results are
    // 0.
    auto upper = [](double x) { return std::bit_cast<double>(std::bit_cast<u64>(x) & 0xffffffff00000000ull); };
    static auto high_word = upper;
    Register("rcp.approx.f64", [](Warp& w, const Inst& I) {
        floating<double, 1>(w, I, [](double a) { return high_word(1 / high_word(a)); });
    });
    Register("rsqrt.approx.f64", [](Warp& w, const Inst& I) {
        floating<double, 1>(w, I, [](double a) { return high_word(1 / std::sqrt(high_word(a))); });
    });
}

// ---- conversions; imm[0]: rounding of the result (0..4 as round_to; integers of floats too), imm[7]: FTZ, SAT,
// imm[5]: relu

template <class D, class S>
D convert(S s, const Inst& I) {
    const int mode = I.imm[0];
    if constexpr (std::is_integral_v<S> && std::is_integral_v<D>) {
        if (I.imm[7] & SAT) {
            const __int128 v = s;
            return D(std::clamp<__int128>(v, std::numeric_limits<D>::min(), std::numeric_limits<D>::max()));
        }
        return D(s);
    } else if constexpr (std::is_integral_v<S>) {
        if constexpr (std::is_same_v<D, float> || std::is_same_v<D, double>) {  // one rounding, in the given mode
            Rounding r(mode);
            volatile S v = s;
            return D(v);
        } else {
            return from_double<D>(double(s), mode);  // 64-bit sources above 2^53 do not fit 16-bit floats finely
        }
    } else {
        double x = to_double(s);
        if ((I.imm[7] & FTZ) && sizeof(S) == 4) x = flush(float(x));
        if constexpr (std::is_integral_v<D>) {  // ISA 9.7.9.22: clamps; NaN gives 0 (the top bit alone for 64-bit
                                                // results)
            if (x != x) return sizeof(D) == 8 ? D(u64(1) << 63) : D(0);
            const double r = mode == 0   ? std::nearbyint(x)
                             : mode == 1 ? std::trunc(x)
                             : mode == 2 ? std::floor(x)
                                         : std::ceil(x);
            const double low = double(std::numeric_limits<D>::min()),
                         high = std::ldexp(1.0, std::numeric_limits<D>::digits);
            if (r < low) return std::numeric_limits<D>::min();
            if (r >= high) return std::numeric_limits<D>::max();
            return D(r);
        } else {
            if (I.imm[1])
                x = mode == 0   ? std::nearbyint(x)
                    : mode == 1 ? std::trunc(x)
                    : mode == 2 ? std::floor(x)
                                : std::ceil(x);
            if (I.imm[7] & SAT) x = saturate(x);
            if (I.imm[5]) x = x > 0 || x != x ? x : 0.0;
            D r = from_double<D>(x, I.imm[1] ? 0 : mode);
            if constexpr (std::is_same_v<D, float>)
                if (I.imm[7] & FTZ) r = flush(r);
            return r;
        }
    }
}
// A destination may be wider than its type (ISA 9.4.1): the result is extended. imm[3]: bytes of the destination
// register; imm[4]: of the source register.
template <class D, class S>
void convert_lanes(Warp& w, const Inst& I) {
    const u8* s = lanes<u8>(w, I.op[1]);
    u8* d = lanes<u8>(w, I.op[0]);
    const u32 to = I.imm[3], from = I.imm[4];
    for_lanes(w.exec, [&](int i) {
        S x;
        memcpy(&x, s + i * from, sizeof x);
        const D r = convert<D, S>(x, I);
        if constexpr (std::is_integral_v<D>) {
            const i64 wide = i64(r);
            memcpy(d + i * to, &wide, to);
        } else {
            memcpy(d + i * to, &r, sizeof r);
        }
    });
}
template <class D, class S>
void conversion(const char* to, const char* from) {
    const std::string name = std::string("cvt.") + to + "." + from;
    Register(name, [](Warp& w, const Inst& I) { convert_lanes<D, S>(w, I); });
    Register(name + ".plain", [](Warp& w, const Inst& I) {  // registers as wide as their types, no flags, default mode
        map1<D, S>(w, I, [](S s) -> D {
            if constexpr (std::is_same_v<D, float> && (std::is_same_v<S, f16> || std::is_same_v<S, bf16>))
                return to_float(s);
            else if constexpr (std::is_same_v<D, bf16> && std::is_same_v<S, float>)
                return nearest_bf16(s);
            else if constexpr (std::is_same_v<D, f16> && std::is_same_v<S, float>)
                return nearest_f16(s);
            else if constexpr (std::is_arithmetic_v<D> && std::is_arithmetic_v<S> &&
                               !(std::is_integral_v<D> && !std::is_integral_v<S>))
                return D(s);
            else
                return D{};  // the decoder uses this form only for the types above
        });
    });
}
template <class D>
void conversions(const char* to) {
    conversion<D, u8>(to, "u8"), conversion<D, i8>(to, "s8"), conversion<D, u16>(to, "u16"),
        conversion<D, i16>(to, "s16");
    conversion<D, u32>(to, "u32"), conversion<D, i32>(to, "s32"), conversion<D, u64>(to, "u64"),
        conversion<D, i64>(to, "s64");
    conversion<D, f16>(to, "f16"), conversion<D, bf16>(to, "bf16"), conversion<D, float>(to, "f32"),
        conversion<D, double>(to, "f64");
}
template <class T>
void convert_pair(Warp& w, const Inst& I) {  // ISA 9.7.9.22: the first source goes to the upper half
    const float *a = lanes<float>(w, I.op[1]), *b = lanes<float>(w, I.op[2]);
    const bool plain = I.imm[0] == 0 && I.imm[5] == 0 && I.imm[7] == 0;
    if (std::is_same_v<T, bf16> && plain)
        return store_lanes<u32>(w, I.op[0],
                                [&](int i) { return u32(nearest_bf16(a[i]).bits) << 16 | nearest_bf16(b[i]).bits; });
    if (plain)
        return store_lanes<u32>(w, I.op[0],
                                [&](int i) { return u32(nearest_f16(a[i]).bits) << 16 | nearest_f16(b[i]).bits; });
    store_lanes<u32>(w, I.op[0], [&](int i) {
        return u32(convert<T, float>(a[i], I).bits) << 16 | convert<T, float>(b[i], I).bits;
    });
}

template <class T, class F>
void halves_of(Warp& w, const Inst& I, F f) {
    map2<u32, u32, u32>(w, I,
                        [&](u32 a, u32 b) { return u32(u16(f(T(a >> 16), T(b >> 16)))) << 16 | u16(f(T(a), T(b))); });
}

void others() {
    Register("cvt.bf16x2.f32", convert_pair<bf16>);
    Register("cvt.f16x2.f32", convert_pair<f16>);
    Register("cvt.tf32.f32", [](Warp& w, const Inst& I) {  // 10 bits of mantissa; rna or rn
        map1<float, float>(w, I, [&](float a) {
            if (!std::isfinite(a)) return a;
            return float(round_to<0>(a, 11, -136, I.imm[0]));
        });
    });
    Register("mov.pred", [](Warp& w, const Inst& I) { set_mask(w, I.op[0], mask(w, I.op[1])); });
    Register("not.pred", [](Warp& w, const Inst& I) { set_mask(w, I.op[0], ~mask(w, I.op[1])); });
    Register("and.pred", [](Warp& w, const Inst& I) { set_mask(w, I.op[0], mask(w, I.op[1]) & mask(w, I.op[2])); });
    Register("or.pred", [](Warp& w, const Inst& I) { set_mask(w, I.op[0], mask(w, I.op[1]) | mask(w, I.op[2])); });
    Register("xor.pred", [](Warp& w, const Inst& I) { set_mask(w, I.op[0], mask(w, I.op[1]) ^ mask(w, I.op[2])); });
    Register("selp.pred", [](Warp& w, const Inst& I) {
        const u32 p = mask(w, I.op[3]);
        set_mask(w, I.op[0], (p & mask(w, I.op[1])) | (~p & mask(w, I.op[2])));
        u32& d = w.defined[I.op[0].id];
        d = (d & ~w.exec) | (w.exec & w.defined[I.op[3].id]);
    });
    // A part may be undefined if it is not unpacked again: compilers pad in this way. imm[0]: bytes of a part
    Register("pack", [](Warp& w, const Inst& I) {
        const u32 part = I.imm[0], n = I.operands - 1;
        u8* d = lanes<u8>(w, I.op[0]);
        auto& parts = w.parts[I.op[0].id];
        u32 all = w.exec;
        for (u32 k = 0; k < n; k++) {
            const u8* s = lanes<u8>(w, I.op[1 + k]);
            for_lanes(w.exec, [&](int i) { memcpy(d + i * part * n + k * part, s + i * part, part); });
            const u32 defined = w.defined[I.op[1 + k].id];
            parts[k] = (parts[k] & ~w.exec) | (defined & w.exec), all &= defined;
        }
        u32& whole = w.defined[I.op[0].id];
        whole = (whole & ~w.exec) | all;
    });
    Register("unpack", [](Warp& w, const Inst& I) {
        const u32 part = I.imm[0], n = I.destinations;
        const Operand from = I.op[n];
        u8 copy[LANES * 16];
        memcpy(copy, lanes<u8>(w, from), LANES * part * n);  // the source may be among the results
        const u32 whole = w.defined[from.id];
        const auto packed = w.parts.find(from.id);
        for (u32 k = 0; k < n; k++) {
            u8* d = lanes<u8>(w, I.op[k]);
            for_lanes(w.exec, [&](int i) { memcpy(d + i * part, copy + (i * n + k) * part, part); });
            const u32 defined = whole | (packed == w.parts.end() ? 0 : packed->second[k]);
            u32& known = w.defined[I.op[k].id];
            known = (known & ~w.exec) | (defined & w.exec);
        }
    });
    Register("prmt.b32", [](Warp& w, const Inst& I) {  // ISA 9.7.8.7; imm[0]: mode, 0 the general one
        const int mode = I.imm[0];
        map3<u32, u32, u32, u32>(w, I, [=](u32 a, u32 b, u32 c) {
            const u64 bytes = u64(b) << 32 | a;
            u32 r = 0;
            for (int i = 0; i < 4; i++) {
                const u32 low = c & 3;
                u32 s = 0;
                switch (mode) {
                    case 0:
                        s = c >> 4 * i & 15;
                        break;
                    case 1:
                        s = low + i;
                        break;  // f4e
                    case 2:
                        s = (low - i) & 7;
                        break;  // b4e
                    case 3:
                        s = low;
                        break;  // rc8
                    case 4:
                        s = std::max<u32>(low, i);
                        break;  // ecl
                    case 5:
                        s = std::min<u32>(low, i);
                        break;  // ecr
                    case 6:
                        s = (low & 1) * 2 + (i & 1);
                        break;  // rc16
                }
                u32 byte = bytes >> 8 * (s & 7) & 255;
                if (mode == 0 && (s & 8)) byte = byte & 128 ? 255 : 0;
                r |= byte << 8 * i;
            }
            return r;
        });
    });
    // ISA 9.7.8.5: funnel shifts of (b, a); imm[0]: wrap
    Register("shf.l.b32", [](Warp& w, const Inst& I) {
        map3<u32, u32, u32, u32>(w, I, [wrap = I.imm[0]](u32 a, u32 b, u32 c) {
            const u32 n = wrap ? c & 31 : std::min(c, 32u);
            return u32((u64(b) << 32 | a) << n >> 32) | (n == 32 ? a : 0);
        });
    });
    Register("shf.r.b32", [](Warp& w, const Inst& I) {
        map3<u32, u32, u32, u32>(w, I, [wrap = I.imm[0]](u32 a, u32 b, u32 c) {
            const u32 n = wrap ? c & 31 : std::min(c, 32u);
            return u32((u64(b) << 32 | a) >> n);
        });
    });
    Register("slct.b32", [](Warp& w, const Inst& I) {
        map3<u32, u32, u32, i32>(w, I, [](u32 a, u32 b, i32 c) { return c >= 0 ? a : b; });
    });
    Register("dp4a.s32", [](Warp& w, const Inst& I) {
        map3<u32, u32, u32, u32>(w, I, [](u32 a, u32 b, u32 c) {
            for (int i = 0; i < 4; i++) c += i32(i8(a >> 8 * i)) * i32(i8(b >> 8 * i));
            return c;
        });
    });
    // Pairs of 16-bit integers (sm_90): each half separately
    Register("add.u16x2", [](Warp& w, const Inst& I) { halves_of<u16>(w, I, [](u16 a, u16 b) { return a + b; }); });
    Register("add.s16x2", [](Warp& w, const Inst& I) { halves_of<u16>(w, I, [](u16 a, u16 b) { return a + b; }); });
    Register("min.u16x2",
             [](Warp& w, const Inst& I) { halves_of<u16>(w, I, [](u16 a, u16 b) { return std::min(a, b); }); });
    Register("max.u16x2",
             [](Warp& w, const Inst& I) { halves_of<u16>(w, I, [](u16 a, u16 b) { return std::max(a, b); }); });
    Register("min.s16x2",
             [](Warp& w, const Inst& I) { halves_of<i16>(w, I, [](i16 a, i16 b) { return std::min(a, b); }); });
    Register("max.s16x2",
             [](Warp& w, const Inst& I) { halves_of<i16>(w, I, [](i16 a, i16 b) { return std::max(a, b); }); });
    Register("dp4a.u32", [](Warp& w, const Inst& I) {
        map3<u32, u32, u32, u32>(w, I, [](u32 a, u32 b, u32 c) {
            for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
            return c;
        });
    });
    Register("isspacep", [](Warp& w, const Inst& I) {  // imm[0]: 0 global, 1 shared, 2 local
        const u64* a = lanes<u64>(w, I.op[1]);
        u32 r = 0;
        for (int i = 0; i < LANES; i++) {
            const int space = a[i] >= LOCAL_WINDOW && a[i] < LOCAL_WINDOW + WINDOW_SIZE     ? 2
                              : a[i] >= SHARED_WINDOW && a[i] < SHARED_WINDOW + WINDOW_SIZE ? 1
                                                                                            : 0;
            r |= u32(space == I.imm[0]) << i;
        }
        set_mask(w, I.op[0], r);
    });
    Register("clock.b32",
             [](Warp& w, const Inst& I) { map1<u32, u32>(w, I, [&](u32) { return u32(w.launch->executed); }); });
    Register("clock.b64",
             [](Warp& w, const Inst& I) { map1<u64, u64>(w, I, [&](u64) { return w.launch->executed; }); });
    Register("nop", [](Warp&, const Inst&) {});
}

struct All {
    All() {
        integers<u16>("u16"), integers<i16>("s16"), integers<u32>("u32"), integers<i32>("s32"), integers<u64>("u64"),
            integers<i64>("s64");
        extended<u32>("u32"), extended<u64>("u64");
        bitwise<u16>("b16"), bitwise<u32>("b32"), bitwise<u64>("b64");
        compares<u16>("u16"), compares<i16>("s16"), compares<u32>("u32"), compares<i32>("s32"), compares<u64>("u64"),
            compares<i64>("s64");
        compares<float>("f32"), compares<double>("f64");
        floats<float>("f32"), floats<double>("f64");
        halves<f16>("f16", 1), halves<bf16>("bf16", 1);
        approximations();
        conversions<u8>("u8"), conversions<i8>("s8"), conversions<u16>("u16"), conversions<i16>("s16"),
            conversions<u32>("u32"), conversions<i32>("s32");
        conversions<u64>("u64"), conversions<i64>("s64"), conversions<f16>("f16"), conversions<bf16>("bf16"),
            conversions<float>("f32"), conversions<double>("f64");
        others();
    }
} all;

}  // namespace
}  // namespace ptx

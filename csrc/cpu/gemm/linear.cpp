// Linear layers of bfloat16 and float32, and the gradients of their weights. README.md explains how the operands are
// packed and multiplied.
#include "cpu/gemm/linear.h"

#include "common/nontemporal.h"
#include "cpu/gemm/operands.h"

namespace dino {

Products best_products(DType dtype) {
    if (microkernel_for(DType::bf16, Products::amx).amx) return Products::amx;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16")) return Products::library;
    if (__builtin_cpu_supports("avx512f")) return Products::f32;
    // The library's float32 products are a tenth faster on AVX2.
    if (dtype == DType::bf16 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Products::f32;
#endif
    return Products::library;
}

namespace {

template <class P>
void block(const LinearArgs& a, const float* packed, int64_t first, int64_t rows) {
    using Value = typename P::Value;
    static thread_local Sums sums;
    static thread_local Buffer copy;
    int64_t size = kPanel * P::floats(a.depth);
    const float* x = P::rows(static_cast<const Value*>(a.x) + first * a.depth, rows, a.depth, copy);
    for_each_panel(
        a.outputs / kPanel, rows, P::steps(P::whole(rows), a.depth),
        [&](int64_t j, auto& interleave) {
            bool prefetch_next = exceeds_half_l2(a.outputs * P::floats(a.depth));
            P::multiply(x, P::whole(rows), a.depth, packed + j * size, sums.of(j), false, prefetch_next, interleave);
        },
        [&](int64_t j, int64_t i) {
            Value* to = static_cast<Value*>(a.out) + (first + i) * a.outputs + j * kPanel;
            int64_t count = std::min(kPiece, rows - i);
            next_panel(to, count, a.outputs, true);
            P::finish(sums.of(j, i), count, a.bias ? a.bias + j * kPanel : nullptr, to, a.outputs);
        });
}

template <class P>
void linear_many_tokens(const LinearArgs& a) {
    static thread_local Buffer buffer;
    float* packed = buffer.fit(a.outputs * P::floats(a.depth));
    pack_weights<P>(a.weight, a.depth, a.outputs, a.transposed, a.threads, packed);
    int64_t tokens = P::block(a.outputs * P::floats(a.depth));
    parallel_for((a.tokens + tokens - 1) / tokens, a.threads, [&](int64_t i) {
        typename P::Scope scope;
        block<P>(a, packed, i * tokens, std::min(tokens, a.tokens - i * tokens));
    });
}

// to [rows, columns] += from
DINO_MULTIVERSION
void add_rows(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) to[i * to_row + j] += from[i * from_row + j];
}

// One block of tokens and weights [outputs, depth]: a task packs the panel that it takes.
template <class P>
void linear_one_block(const LinearArgs& a) {
    using Value = typename P::Value;
    static thread_local Buffer copy;
    const float* x = P::rows(static_cast<const Value*>(a.x), a.tokens, a.depth, copy);
    parallel_for(a.outputs / kPanel, a.threads, [&](int64_t i) {
        static thread_local Buffer sums, buffer;
        typename P::Scope scope;
        float *panel = buffer.fit(kPanel * P::floats(a.depth)), *c = sums.fit(kBlock * kPanel);
        P::pack(static_cast<const Value*>(a.weight), a.depth, a.outputs, false, i * kPanel, panel);
        P::multiply(x, P::whole(a.tokens), a.depth, panel, c, false, false, Nothing());
        P::finish(c, a.tokens, a.bias ? a.bias + i * kPanel : nullptr, static_cast<Value*>(a.out) + i * kPanel,
                  a.outputs);
    });
}

// One block of tokens and weights [depth, outputs]: split-K. A task takes a part of the depth, whose rows of the
// weights it reads in order, and some panels; the sums of the parts are added in a fixed order.
template <class P>
struct SplitKLinear {
    using Value = typename P::Value;
    static constexpr int64_t kParts = 16, kPart = 1024;  // at most; values of the depth, at least
    static constexpr int64_t kChunk = 128;               // of them at a time
    static constexpr int64_t kPanels = 8;

    const LinearArgs& a;
    int64_t chunks = (a.depth + kChunk - 1) / kChunk, rows = P::whole(a.tokens), panels = a.outputs / kPanel;
    int64_t parts = std::clamp<int64_t>(a.depth / kPart, 1, kParts), spans = (panels + kPanels - 1) / kPanels;
    float* sums;  // [parts, panels, rows, 32]

    float* of(int64_t part, int64_t panel) const { return sums + (part * panels + panel) * rows * kPanel; }
    void add(int64_t part, int64_t span) const;
    void finish(int64_t panel) const;
};

template <class P>
void SplitKLinear<P>::add(int64_t part, int64_t span) const {
    static thread_local BufferOf<Value> values;
    static thread_local Buffer copy, buffer;
    typename P::Scope scope;
    auto from = static_cast<const Value*>(a.x), weights = static_cast<const Value*>(a.weight);
    int64_t first = chunks * part / parts * kChunk, last = std::min(chunks * (part + 1) / parts * kChunk, a.depth);
    float* packed = buffer.fit(kPanel * P::floats(kChunk));
    int64_t begin = span * kPanels, end = std::min(panels, begin + kPanels);
    for (int64_t k = first; k < last; k += kChunk) {
        int64_t count = std::min(kChunk, last - k), next = std::min(kChunk, last - k - count);
        Value* chunk = values.fit(kBlock * kChunk);
        for (int64_t i = 0; i < a.tokens; ++i) std::copy_n(from + i * a.depth + k, count, chunk + i * count);
        const float* x = P::rows(chunk, a.tokens, count, copy);
        // Prefetches of the next chunk's weights are interleaved with the products of this one.
        const Value* row = weights + (k + count) * a.outputs + begin * kPanel;
        auto fetch = [&](int64_t) {
            for (int64_t j = 0; j < (end - begin) * kPanel; j += 64 / sizeof(Value)) __builtin_prefetch(row + j, 0, 2);
            row += a.outputs;
        };
        Interleave<decltype(fetch)> interleave{fetch, next, (end - begin) * P::steps(rows, count)};
        for (int64_t j = begin; j < end; ++j) {
            P::pack(weights + k * a.outputs, count, a.outputs, true, j * kPanel, packed);
            P::multiply(x, rows, count, packed, of(part, j), k > first, false, interleave);
        }
    }
}

template <class P>
void SplitKLinear<P>::finish(int64_t panel) const {
    float* c = of(0, panel);
    for (int64_t part = 1; part < parts; ++part) add_rows(of(part, panel), kPanel, a.tokens, kPanel, c, kPanel);
    P::finish(c, a.tokens, a.bias ? a.bias + panel * kPanel : nullptr, static_cast<Value*>(a.out) + panel * kPanel,
              a.outputs);
}

template <class P>
void linear_split_k(const LinearArgs& a) {
    static thread_local Buffer buffer;
    SplitKLinear<P> split{a};
    split.sums = buffer.fit(split.parts * split.panels * split.rows * kPanel);
    parallel_for(split.parts * split.spans, a.threads, [&](int64_t i) { split.add(i / split.spans, i % split.spans); });
    parallel_for(split.panels, a.threads, [&](int64_t i) { split.finish(i); });
}

template <class P>
void linear_with(const LinearArgs& a) {
    if (a.tokens > kBlock) return linear_many_tokens<P>(a);
    a.transposed ? linear_split_k<P>(a) : linear_one_block<P>(a);
}

#if defined(DINO_HAS_AMX)
constexpr int64_t kFew = 64;      // tokens up to which the weights are not packed
constexpr int64_t kWeights = 64;  // rows of the weights a task then
// Outputs from which they are written with streaming stores: rows a power of two apart compete for a few sets of the
// caches.
constexpr int64_t kApart = 1 << 14;

// Outputs [first, + 64) of all tokens, computed transposed: rows of the weights are read in place, and the next ones
// prefetched.
void few_tokens_rows(const LinearArgs& a, const float* x, int64_t first) {
    alignas(64) float c[2 * kTiles], pairs[kTiles], rounded[kTiles];
    int64_t rows = std::min(kWeights, a.outputs - first), width = a.depth / 2, tokens = whole(a.tokens);
    const float *weights = units(a.weight, first * a.depth), *next = weights + rows * width;
    bool nontemporal = a.outputs >= kApart;
    auto fetch = [&](int64_t line) { __builtin_prefetch(next + line * 16, 0, 2); };
    int64_t lines = std::min(rows, a.outputs - first - rows) * width / 16;
    Interleave<decltype(fetch)> interleave{fetch, lines, rows / 32 * tokens / 32 * width / kLanes};
    for (int64_t i = 0; i < rows; i += 32)
        for (int64_t j = 0; j < tokens; j += 32) {
            Product p{width, width, 1, tokens, kPanel, false};
            amx_tile<2, 2>(p, weights + i * width, x + j, c, interleave);
            for (int64_t k = 0; a.bias && k < 2 * kTiles; ++k) c[k] += a.bias[first + i + k / kPanel];
            finish_pairs(c, 32, pairs);
            transpose(pairs, 16, 32, rounded, 16);
            auto out = static_cast<uint16_t*>(a.out) + j * a.outputs + first + i;
            for (int64_t k = 0; k < std::min<int64_t>(32, a.tokens - j); ++k)
                stream_store(out + k * a.outputs, rounded + k * 16, 64, nontemporal);
        }
    finish_streaming();
}

void linear_few_tokens(const LinearArgs& a) {
    static thread_local Buffer copy, buffer;
    int64_t width = a.depth / 2, rows = whole(a.tokens);
    float* transposed = buffer.fit(rows * width);
    transpose(whole_tiles(a.x, 0, a.tokens, width, copy), rows, width, transposed, rows);
    parallel_for((a.outputs + kWeights - 1) / kWeights, a.threads, [&](int64_t i) {
        TileConfigScope scope;
        few_tokens_rows(a, transposed, i * kWeights);
    });
}
#endif

// --- gradients of weights ----------------------------------------------------------------------------

constexpr int64_t kGroups = 4;  // of tokens, at most, whatever the number of threads: each has sums of its own
constexpr int64_t kPack = 8;    // tokens packed at a time between steps of a product

// The gradient [outputs, inputs] is a product over tokens: of one operand transposed, the one with fewer columns if
// there is a choice, and of panels of the other. A task is a group of tokens and a share of the panels, and packs what
// it reads itself: cache lines that another core has just written are slow to load.
template <class P>
struct Gradient {
    using Value = typename P::Value;
    using Sum = SumOf<Value>;
    const AddLinearArgs& a;
    bool inputs_transposed = a.packed == Packed::neither ? a.inputs <= a.outputs : a.packed == Packed::grad;
    int64_t narrow = inputs_transposed ? a.inputs : a.outputs, wide = inputs_transposed ? a.outputs : a.inputs;
    int64_t panels = wide / kPanel;
    int64_t groups = std::clamp<int64_t>((a.tokens + P::kChunk - 1) / P::kChunk, 1, kGroups);
    int64_t shares = std::min(panels, (2 * a.threads + groups - 1) / groups);
    float* sums = nullptr;     // [groups, panels, narrow, 32], where they live longer than a chunk
    Sum* bias_sums = nullptr;  // [groups, outputs], or null

    int64_t bound(int64_t group) const { return std::min(a.tokens, group * whole(a.tokens) / groups / 32 * 32); }
    void run(int64_t group, int64_t share) const;
    void add_panel(int64_t panel, const float* c) const;
};

template <class P>
void Gradient<P>::run(int64_t group, int64_t share) const {
    static thread_local Buffer transposed_buffer, panel_buffer, sums_buffer;
    auto transposed_side = static_cast<const Value*>(inputs_transposed ? a.x : a.grad);
    const void* wide_side = inputs_transposed ? a.grad : a.x;
    bool ready = a.packed != Packed::neither;
    Sum* bias = bias_sums ? bias_sums + group * a.outputs : nullptr;
    int64_t first = share * panels / shares, last = (share + 1) * panels / shares, end = bound(group + 1);
    float* transposed = transposed_buffer.fit(narrow * P::floats(P::kChunk));
    float* packed = panel_buffer.fit(2 * kPanel * P::floats(P::kChunk));  // of two panels
    for (int64_t begin = bound(group), t = begin; t < end; t += P::kChunk) {
        int64_t count = std::min(P::kChunk, end - t);
        P::pack_transposed(transposed_side + t * narrow, count, narrow, transposed);
        if (bias && !inputs_transposed && share == 0)
            add_rows_to(bias, transposed_side + t * narrow, count, narrow, narrow);
        auto panel = [&](int64_t i) {
            return ready ? static_cast<const float*>(wide_side) + P::floats(i * whole(a.tokens) + t) * kPanel
                         : packed + i % 2 * kPanel * P::floats(P::kChunk);
        };
        // Packing or prefetching of the next panel is interleaved with the product of this one.
        auto prepare = [&](int64_t i, int64_t piece) {
            if (ready) return __builtin_prefetch(panel(i) + piece * 16);
            int64_t row = piece * kPack, rows = std::min(kPack, count - row);
            const Value* from = static_cast<const Value*>(wide_side) + (t + row) * wide + i * kPanel;
            P::pack_tokens(from, wide, rows, kPack,
                           packed + i % 2 * kPanel * P::floats(P::kChunk) + P::token_offset(row));
            if (bias && inputs_transposed) add_rows_to(bias + i * kPanel, from, rows, kPanel, wide);
        };
        int64_t lines = P::kPrefetch ? P::floats(whole(count)) * kPanel / 16 : 0;
        int64_t pieces = ready ? lines : whole(count) / kPack;
        for (int64_t i = first - 1; i < last; ++i) {
            auto piece = [&](int64_t j) { prepare(i + 1, j); };
            Interleave<decltype(piece)> interleave{piece, i + 1 < last ? pieces : 0, P::steps(narrow, whole(count))};
            if (i >= first) {
                float* c = sums ? sums + (group * panels + i) * narrow * kPanel : sums_buffer.fit(narrow * kPanel);
                P::multiply(transposed, narrow, whole(count), panel(i), c, t > begin, false, interleave);
                if (groups == 1 && t + count == end) add_panel(i, c);
            }
            interleave.rest();
        }
    }
}

template <class P>
void Gradient<P>::add_panel(int64_t panel, const float* c) const {
    static thread_local Buffer rows;
    if (!inputs_transposed) return add_rows(c, kPanel, a.outputs, kPanel, a.into + panel * kPanel, a.inputs);
    float* back = rows.fit(a.inputs * kPanel);
    transpose(c, a.inputs, kPanel, back, a.inputs);
    add_rows(back, a.inputs, kPanel, a.inputs, a.into + panel * kPanel * a.inputs, a.inputs);
}

template <class P>
void add_gradient(const AddLinearArgs& a) {
    static thread_local Buffer buffer;
    static thread_local BufferOf<typename Gradient<P>::Sum> biases;
    Gradient<P> gradient{a};
    int64_t size = gradient.narrow * gradient.wide, groups = gradient.groups;
    if (a.tokens > P::kChunk) gradient.sums = buffer.fit(groups * size);
    if (a.into_bias) {
        gradient.bias_sums = biases.fit(groups * a.outputs);
        std::fill_n(gradient.bias_sums, groups * a.outputs, 0);
    }
    parallel_for(groups * gradient.shares, a.threads, [&](int64_t i) {
        typename P::Scope scope;
        gradient.run(i / gradient.shares, i % gradient.shares);
    });
    if (groups > 1)
        parallel_for(gradient.panels, a.threads, [&](int64_t i) {
            for (int64_t group = 0; group < groups; ++group)
                gradient.add_panel(i, gradient.sums + (group * gradient.panels + i) * gradient.narrow * kPanel);
        });
    for (int64_t i = 0; a.into_bias && i < a.outputs; ++i) {
        typename Gradient<P>::Sum sum = 0;
        for (int64_t group = 0; group < groups; ++group) sum += gradient.bias_sums[group * a.outputs + i];
        a.into_bias[i] += float(sum);
    }
}

}  // namespace

void linear(const LinearArgs& a) {
#if defined(DINO_HAS_AMX)
    bool tiles = a.products == Products::amx;
    if (tiles && a.dtype == DType::bf16 && a.tokens <= kFew && !a.transposed) return linear_few_tokens(a);
#endif
    with_operands(a.products, a.dtype, [&](auto operands) { linear_with<decltype(operands)>(a); });
}

void add_linear(const AddLinearArgs& a) {
    with_operands(a.products, a.dtype, [&](auto operands) { add_gradient<decltype(operands)>(a); });
}

}  // namespace dino

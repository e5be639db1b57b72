// Products of linear layers in bfloat16 and float32 by the processor's matrix tiles (AMX). Rows of x are read where
// they are, the weights are packed once a call, and bias, rounding and the sum into a gradient are done while a block
// is in the first-level cache.
#include "tile_products.h"

namespace dino {

bool has_tiles() { return kind_of(DType::bf16, 2).amx; }

#if defined(DINO_HAS_AMX)
namespace {

constexpr int64_t kFew = 64;      // tokens up to which the weights are not packed
constexpr int64_t kWeights = 64;  // rows of the weights a task then

template <class Value>
void block(const LinearArgs& a, const float* packed, int64_t first) {
    static thread_local Sums sums;
    static thread_local Buffer copy;
    int64_t rows = std::min(kBlock, a.tokens - first), width = a.depth / 2, size = kParts<Value> * kPanel * width;
    const float* x = whole_tiles<Value>(a.x, first * a.depth, rows, width, copy);
    by_panels(
        a.outputs / kPanel, rows, steps_of(whole(rows), width),
        [&](int64_t j, auto& beside) {
            bool distant = far(kParts<Value> * a.outputs * width);
            multiply<Value>(x, whole(rows), width, packed + j * size, sums.of(j), false, distant, beside);
        },
        [&](int64_t j, int64_t i) {
            Value* to = static_cast<Value*>(a.out) + (first + i) * a.outputs + j * kPanel;
            int64_t count = std::min(kPiece, rows - i);
            next_panel(to, count, a.outputs, true);
            finish(sums.of(j, i), count, a.bias ? a.bias + j * kPanel : nullptr, to, a.outputs);
        });
}

template <class Value>
void linear_of_many(const LinearArgs& a) {
    static thread_local Buffer buffer;
    float* packed = buffer.fit(kParts<Value> * a.outputs * a.depth / 2);
    pack_weights<Value>(a.weight, a.depth, a.outputs, a.transposed, a.threads, packed);
    parallel_for((a.tokens + kBlock - 1) / kBlock, a.threads, [&](int64_t i) {
        TileUse tiles(kind_of(DType::bf16, 2));
        block<Value>(a, packed, i * kBlock);
    });
}

// One block of tokens: a task packs the panel that it takes.
template <class Value>
void linear_of_block(const LinearArgs& a) {
    static thread_local Buffer copy;
    int64_t width = a.depth / 2;
    const float* x = whole_tiles<Value>(a.x, 0, a.tokens, width, copy);
    parallel_for(a.outputs / kPanel, a.threads, [&](int64_t i) {
        static thread_local Buffer sums, buffer;
        TileUse tiles(kind_of(DType::bf16, 2));
        float *panel = buffer.fit(kParts<Value> * kPanel * width), *c = sums.fit(kBlock * kPanel);
        pack_panel(static_cast<const Value*>(a.weight), a.depth, a.outputs, a.transposed, i * kPanel, panel);
        multiply<Value>(x, whole(a.tokens), width, panel, c, false, false, Nothing());
        finish(c, a.tokens, a.bias ? a.bias + i * kPanel : nullptr, static_cast<Value*>(a.out) + i * kPanel, a.outputs);
    });
}

// Outputs [first, + 64) of all tokens, transposed: rows of the weights are read where they are.
void few(const LinearArgs& a, const Kind& kind, const float* x, int64_t first) {
    static thread_local Buffer sums, turned;
    int64_t rows = std::min(kWeights, a.outputs - first), width = a.depth / 2, tokens = whole(a.tokens);
    float *c = sums.fit(kWeights * tokens), *y = turned.fit(kPanel * tokens);
    product(kind, rows, tokens, {width, width, 1, tokens, tokens}, units(a.weight, first * a.depth), x, c);
    for (int64_t j = 0; j < rows; j += kPanel) {
        transpose(c + j * tokens, kPanel, tokens, y, kPanel);
        finish(y, a.tokens, a.bias ? a.bias + first + j : nullptr, static_cast<uint16_t*>(a.out) + first + j,
               a.outputs);
    }
}

void linear_of_few(const LinearArgs& a) {
    Kind kind = kind_of(DType::bf16, 2);
    static thread_local Buffer copy, buffer;
    int64_t width = a.depth / 2, rows = whole(a.tokens);
    float* turned = buffer.fit(rows * width);
    transpose(whole_tiles(a.x, 0, a.tokens, width, copy), rows, width, turned, rows);
    parallel_for((a.outputs + kWeights - 1) / kWeights, a.threads, [&](int64_t i) {
        TileUse tiles(kind);
        few(a, kind, turned, i * kWeights);
    });
}

// --- gradients of weights ----------------------------------------------------------------------------

constexpr int64_t kGroups = 4;  // of tokens, at most, whatever the number of threads: each has sums of its own
constexpr int64_t kPack = 8;    // tokens packed at a time beside a product

// The gradient [outputs, inputs] is a product over tokens: of one side transposed, that with fewer columns if there is
// a choice, and of the other one by panels of pairs of tokens [pairs, 32]. A task is a group of tokens and a share of
// the panels, and packs what it reads: lines that another core has just written are slow to come by.
template <class Value>
struct Gradient {
    using Sum = std::conditional_t<std::is_same_v<Value, float>, double, float>;
    static constexpr int64_t kChunk = kParts<Value> == 1 ? 512 : 256;  // tokens at a time: what is made of them stays
                                                                       // in the second-level cache
    const AddProductArgs& a;
    bool inputs_turned = a.paired == Paired::neither ? a.inputs <= a.outputs : a.paired == Paired::grad;
    int64_t narrow = inputs_turned ? a.inputs : a.outputs, wide = inputs_turned ? a.outputs : a.inputs;
    int64_t panels = wide / kPanel;
    int64_t groups = std::clamp<int64_t>((a.tokens + kChunk - 1) / kChunk, 1, kGroups);
    int64_t shares = std::min(panels, (2 * a.threads + groups - 1) / groups);
    float* sums = nullptr;     // [groups, panels, narrow, 32], where they live longer than a chunk
    Sum* bias_sums = nullptr;  // [groups, outputs], or null

    int64_t bound(int64_t group) const { return std::min(a.tokens, group * whole(a.tokens) / groups / 32 * 32); }
    void turn(const Value* x, int64_t count, float* to, int64_t width) const;
    void run(int64_t group, int64_t share) const;
    void add_panel(int64_t panel, const float* c) const;
};

// `count` rows of x transposed, as pairs of rows: [narrow, width]
template <class Value>
void Gradient<Value>::turn(const Value* x, int64_t count, float* to, int64_t width) const {
    constexpr int64_t parts = kParts<Value>;
    alignas(64) float block[parts * kTiles];
    for (int64_t i = 0; i < count; i += 32, x += 32 * narrow) {
        int64_t rows = std::min<int64_t>(32, count - i), next = std::min<int64_t>(32, count - i - 32);
        for (int64_t j = 0; j < next * narrow; j += 64 / sizeof(Value)) __builtin_prefetch(x + 32 * narrow + j);
        for (int64_t j = 0; j < narrow; j += kPanel) {
            pairs_of(x, narrow, rows, j, block, 16);
            if constexpr (parts == 1)
                transpose(block, 16, kPanel, to + j * width + i / 2, width);
            else
                for (int64_t k = 0; k < parts * kTiles; k += kTiles)
                    transpose(block + k, 16, kPanel, to + parts * (j * width + i / 2 * 32) + k, kLanes);
        }
    }
}

template <class Value>
void Gradient<Value>::run(int64_t group, int64_t share) const {
    static thread_local Buffer turned_buffer, panel_buffer, sums_buffer;
    constexpr int64_t parts = kParts<Value>;
    auto turned_side = static_cast<const Value*>(inputs_turned ? a.x : a.grad);
    const void* wide_side = inputs_turned ? a.grad : a.x;
    bool paired = a.paired != Paired::neither;
    Sum* bias = bias_sums ? bias_sums + group * a.outputs : nullptr;
    int64_t first = share * panels / shares, last = (share + 1) * panels / shares, end = bound(group + 1);
    float* turned = turned_buffer.fit(parts * narrow * kChunk / 2);
    float* packed = panel_buffer.fit(parts * kPanel * kChunk);
    for (int64_t begin = bound(group), t = begin; t < end; t += kChunk) {
        int64_t count = std::min(kChunk, end - t), width = whole(count) / 2;
        turn(turned_side + t * narrow, count, turned, width);
        if (bias && !inputs_turned && share == 0) add_rows_to(bias, turned_side + t * narrow, count, narrow, narrow);
        auto panel = [&](int64_t i) {
            return paired ? static_cast<const float*>(wide_side) + (i * whole(a.tokens) + t) / 2 * kPanel
                          : packed + i % 2 * parts * kPanel * kChunk / 2;
        };
        // The next panel is packed, or fetched, beside the product of this one.
        auto prepare = [&](int64_t i, int64_t piece) {
            if (paired) return __builtin_prefetch(panel(i) + piece * 16);
            int64_t row = piece * kPack, rows = std::min(kPack, count - row);
            const Value* from = static_cast<const Value*>(wide_side) + (t + row) * wide;
            float* to = packed + i % 2 * parts * kPanel * kChunk / 2 + (row / 32 * parts * 16 + row / 2 % 16) * kPanel;
            pairs_of(from, wide, rows, i * kPanel, to, kPack / 2);
            if (bias && inputs_turned) add_rows_to(bias + i * kPanel, from + i * kPanel, rows, kPanel, wide);
        };
        int64_t pieces = paired ? 2 * width : whole(count) / kPack;
        for (int64_t i = first - 1; i < last; ++i) {
            auto piece = [&](int64_t j) { prepare(i + 1, j); };
            Spread<decltype(piece)> beside{piece, i + 1 < last ? pieces : 0, steps_of(narrow, width)};
            if (i >= first) {
                float* c = sums ? sums + (group * panels + i) * narrow * kPanel : sums_buffer.fit(narrow * kPanel);
                multiply<Value>(turned, narrow, width, panel(i), c, t > begin, false, beside);
                if (groups == 1 && t + count == end) add_panel(i, c);
            }
            beside.rest();
        }
    }
}

DINO_MULTIVERSION
void add_rows(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) to[i * to_row + j] += from[i * from_row + j];
}

template <class Value>
void Gradient<Value>::add_panel(int64_t panel, const float* c) const {
    static thread_local Buffer rows;
    if (!inputs_turned) return add_rows(c, kPanel, a.outputs, kPanel, a.into + panel * kPanel, a.inputs);
    float* back = rows.fit(a.inputs * kPanel);
    transpose(c, a.inputs, kPanel, back, a.inputs);
    add_rows(back, a.inputs, kPanel, a.inputs, a.into + panel * kPanel * a.inputs, a.inputs);
}

template <class Value>
void add_gradient(const AddProductArgs& a) {
    static thread_local Buffer buffer;
    static thread_local BufferOf<typename Gradient<Value>::Sum> biases;
    Gradient<Value> gradient{a};
    int64_t size = gradient.narrow * gradient.wide, groups = gradient.groups;
    if (a.tokens > gradient.kChunk) gradient.sums = buffer.fit(groups * size);
    if (a.into_bias) {
        gradient.bias_sums = biases.fit(groups * a.outputs);
        std::fill_n(gradient.bias_sums, groups * a.outputs, 0);
    }
    parallel_for(groups * gradient.shares, a.threads, [&](int64_t i) {
        TileUse tiles(kind_of(DType::bf16, 2));
        gradient.run(i / gradient.shares, i % gradient.shares);
    });
    if (groups > 1)
        parallel_for(gradient.panels, a.threads, [&](int64_t i) {
            for (int64_t group = 0; group < groups; ++group)
                gradient.add_panel(i, gradient.sums + (group * gradient.panels + i) * gradient.narrow * kPanel);
        });
    for (int64_t i = 0; a.into_bias && i < a.outputs; ++i) {
        typename Gradient<Value>::Sum sum = 0;
        for (int64_t group = 0; group < groups; ++group) sum += gradient.bias_sums[group * a.outputs + i];
        a.into_bias[i] += float(sum);
    }
}

}  // namespace

void linear(const LinearArgs& a) {
    bool one = a.tokens <= kBlock;
    if (a.dtype == DType::f32) return one ? linear_of_block<float>(a) : linear_of_many<float>(a);
    if (a.tokens <= kFew && !a.transposed) return linear_of_few(a);
    one ? linear_of_block<uint16_t>(a) : linear_of_many<uint16_t>(a);
}

void add_linear(const AddProductArgs& a) { a.dtype == DType::f32 ? add_gradient<float>(a) : add_gradient<uint16_t>(a); }
#else
void linear(const LinearArgs&) {}
void add_linear(const AddProductArgs&) {}
#endif

}  // namespace dino

// Products of linear layers in bfloat16 by the processor's matrix tiles (AMX). Rows of x are read where they are, the
// weights are packed once a call, and bias, rounding and the sum into a gradient are done while a block is in the
// first-level cache.
#include "tile_products.h"

namespace dino {

bool has_tiles() { return kind_of(DType::bf16, 2).amx; }

#if defined(DINO_HAS_AMX)
namespace {

constexpr int64_t kFew = 64;      // tokens up to which the weights are not packed
constexpr int64_t kWeights = 64;  // rows of the weights a task then

void block(const LinearArgs& a, const Kind& kind, const float* packed, int64_t first) {
    static thread_local Buffer sums, copy;
    int64_t rows = std::min(kBlock, a.tokens - first), width = a.depth / 2;
    const float* x = whole_tiles(units(a.x, first * a.depth), rows, width, copy);
    for (int64_t j = 0; j < a.outputs; j += kPanel)
        by_tiles(kind, x, rows, width, packed + j * width, sums.fit(kBlock * kPanel),
                 [&](int64_t i, int64_t count, const float* c) {
                     uint16_t* to = static_cast<uint16_t*>(a.out) + (first + i) * a.outputs + j;
                     next_panel(to, count, a.outputs, true);
                     finish(c, count, a.bias ? a.bias + j : nullptr, to, a.outputs);
                 });
}

// Outputs [first, + 64) of all tokens, transposed: rows of the weights are read where they are.
void few(const LinearArgs& a, const Kind& kind, const float* x, int64_t first) {
    static thread_local Buffer sums, turned;
    int64_t rows = std::min(kWeights, a.outputs - first), width = a.depth / 2, tokens = (a.tokens + 31) / 32 * 32;
    float *c = sums.fit(kWeights * tokens), *y = turned.fit(kPanel * tokens);
    product(kind, rows, tokens, {width, width, 1, tokens, tokens}, units(a.weight, first * a.depth), x, c);
    for (int64_t j = 0; j < rows; j += kPanel) {
        transpose(c + j * tokens, kPanel, tokens, y, kPanel);
        finish(y, a.tokens, a.bias ? a.bias + first + j : nullptr, static_cast<uint16_t*>(a.out) + first + j,
               a.outputs);
    }
}

void linear_of_few(const LinearArgs& a, const Kind& kind) {
    static thread_local Buffer copy, buffer;
    int64_t width = a.depth / 2, rows = (a.tokens + 31) / 32 * 32;
    float *x = copy.fit(rows * width), *turned = buffer.fit(rows * width);
    std::copy_n(units(a.x, 0), a.tokens * width, x);
    std::fill(x + a.tokens * width, x + rows * width, 0.0f);
    transpose(x, rows, width, turned, rows);
    parallel_for((a.outputs + kWeights - 1) / kWeights, a.threads, [&](int64_t i) {
        TileUse tiles(kind);
        few(a, kind, turned, i * kWeights);
    });
}

// --- gradients of weights ----------------------------------------------------------------------------

constexpr int64_t kChunk = 512;  // tokens at a time: what is made of them stays in the second-level cache
constexpr int64_t kGroups = 4;   // of tokens, at most: each has sums of its own

// The gradient [outputs, inputs] is a product over tokens: of the side with fewer columns transposed, and of the other
// one by panels of pairs of tokens [pairs, 32]. A task is a group of tokens and a share of the panels, and makes all
// that it reads: lines that another core has just written are slow to come by.
struct Gradient {
    const AddProductArgs& a;
    Kind kind = kind_of(DType::bf16, 2);
    bool inputs_turned = a.inputs < a.outputs;
    int64_t narrow = std::min(a.inputs, a.outputs), wide = std::max(a.inputs, a.outputs), panels = wide / kPanel;
    int64_t groups = std::max<int64_t>(1, std::min<int64_t>({kGroups, a.threads, (a.tokens + kChunk - 1) / kChunk}));
    int64_t shares = std::min(panels, (2 * a.threads + groups - 1) / groups);
    float* sums = nullptr;  // [groups, panels, narrow, 32], where they live longer than a chunk

    void run(int64_t group, int64_t share) const;
    void add_panel(int64_t panel, const float* c) const;
};

void Gradient::run(int64_t group, int64_t share) const {
    static thread_local Buffer turned_buffer, panel_buffer, sums_buffer;
    auto turned_side = static_cast<const uint16_t*>(inputs_turned ? a.x : a.grad);
    auto wide_side = static_cast<const uint16_t*>(inputs_turned ? a.grad : a.x);
    float *turned = turned_buffer.fit(narrow * kChunk / 2), *pairs = panel_buffer.fit(kChunk / 2 * kPanel);
    int64_t begin = group * a.tokens / groups, end = (group + 1) * a.tokens / groups;
    for (int64_t t = begin; t < end; t += kChunk) {
        int64_t count = std::min(kChunk, end - t), width = padded((count + 1) / 2);
        for (int64_t j = 0; j < narrow; j += kPanel) {
            pair_rows_of(turned_side + t * narrow, narrow, count, j, pairs);
            transpose(pairs, width, kPanel, turned + j * width, width);
        }
        for (int64_t i = share * panels / shares; i < (share + 1) * panels / shares; ++i) {
            float* c = sums ? sums + (group * panels + i) * narrow * kPanel : sums_buffer.fit(narrow * kPanel);
            pair_rows_of(wide_side + t * wide, wide, count, i * kPanel, pairs);
            product(kind, narrow, kPanel, {width, width, 1, kPanel, kPanel, t > begin}, turned, pairs, c);
            if (groups == 1 && t + count == end) add_panel(i, c);
        }
    }
}

DINO_MULTIVERSION
void add_rows(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) to[i * to_row + j] += from[i * from_row + j];
}

void Gradient::add_panel(int64_t panel, const float* c) const {
    static thread_local Buffer rows;
    if (!inputs_turned) return add_rows(c, kPanel, a.outputs, kPanel, a.into + panel * kPanel, a.inputs);
    float* back = rows.fit(a.inputs * kPanel);
    transpose(c, a.inputs, kPanel, back, a.inputs);
    add_rows(back, a.inputs, kPanel, a.inputs, a.into + panel * kPanel * a.inputs, a.inputs);
}

}  // namespace

void linear(const LinearArgs& a) {
    static thread_local Buffer buffer;
    Kind kind = kind_of(DType::bf16, 2);
    if (a.tokens <= kFew && !a.transposed) return linear_of_few(a, kind);
    float* packed = buffer.fit(a.outputs * a.depth / 2);
    pack_weights(a.weight, a.depth, a.outputs, a.transposed, a.threads, packed);
    parallel_for((a.tokens + kBlock - 1) / kBlock, a.threads, [&](int64_t i) {
        TileUse tiles(kind);
        block(a, kind, packed, i * kBlock);
    });
}

void add_linear(const AddProductArgs& a) {
    static thread_local Buffer buffer;
    Gradient gradient{a};
    int64_t size = gradient.narrow * gradient.wide;
    if (a.tokens > kChunk) gradient.sums = buffer.fit(gradient.groups * size);
    parallel_for(gradient.groups * gradient.shares, a.threads, [&](int64_t i) {
        TileUse tiles(gradient.kind);
        gradient.run(i / gradient.shares, i % gradient.shares);
    });
    if (gradient.groups > 1)
        parallel_for(gradient.panels, a.threads, [&](int64_t i) {
            for (int64_t group = 0; group < gradient.groups; ++group)
                gradient.add_panel(i, gradient.sums + (group * gradient.panels + i) * gradient.narrow * kPanel);
        });
}
#else
void linear(const LinearArgs&) {}
void add_linear(const AddProductArgs&) {}
#endif

}  // namespace dino

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

void block(const LinearArgs& a, const float* packed, int64_t first) {
    static thread_local Sums sums;
    static thread_local Buffer copy;
    int64_t rows = std::min(kBlock, a.tokens - first), width = a.depth / 2;
    const float* x = whole_tiles(units(a.x, first * a.depth), rows, width, copy);
    by_panels(
        a.outputs / kPanel, rows, steps_of(whole(rows), width),
        [&](int64_t j, auto& beside) {
            multiply(x, whole(rows), width, packed + j * kPanel * width, sums.of(j), false, far(a.outputs * width),
                     beside);
        },
        [&](int64_t j, int64_t i) {
            uint16_t* to = static_cast<uint16_t*>(a.out) + (first + i) * a.outputs + j * kPanel;
            int64_t count = std::min(kPiece, rows - i);
            next_panel(to, count, a.outputs, true);
            finish(sums.of(j, i), count, a.bias ? a.bias + j * kPanel : nullptr, to, a.outputs);
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
constexpr int64_t kPack = 8;     // tokens packed at a time beside a product

// The gradient [outputs, inputs] is a product over tokens: of one side transposed, that with fewer columns if there is
// a choice, and of the other one by panels of pairs of tokens [pairs, 32]. A task is a group of tokens and a share of
// the panels, and packs what it reads: lines that another core has just written are slow to come by.
struct Gradient {
    const AddProductArgs& a;
    bool inputs_turned = a.paired == Paired::neither ? a.inputs <= a.outputs : a.paired == Paired::grad;
    int64_t narrow = inputs_turned ? a.inputs : a.outputs, wide = inputs_turned ? a.outputs : a.inputs;
    int64_t panels = wide / kPanel;
    int64_t groups = std::max<int64_t>(1, std::min<int64_t>({kGroups, a.threads, (a.tokens + kChunk - 1) / kChunk}));
    int64_t shares = std::min(panels, (2 * a.threads + groups - 1) / groups);
    float* sums = nullptr;       // [groups, panels, narrow, 32], where they live longer than a chunk
    float* bias_sums = nullptr;  // [groups, outputs], or null

    int64_t bound(int64_t group) const { return std::min(a.tokens, group * whole(a.tokens) / groups / 32 * 32); }
    void run(int64_t group, int64_t share) const;
    void add_panel(int64_t panel, const float* c) const;
};

// `count` rows of x transposed, as pairs of rows: [columns, width]
void turn(const uint16_t* x, int64_t count, int64_t columns, float* to, int64_t width) {
    alignas(64) float block[16 * kPanel];
    for (int64_t i = 0; i < count; i += 32, x += 32 * columns) {
        for (int64_t j = 0; j < std::min<int64_t>(32, count - i - 32) * columns; j += kPanel)
            __builtin_prefetch(x + 32 * columns + j);
        for (int64_t j = 0; j < columns; j += kPanel) {
            pairs_of(x, columns, std::min<int64_t>(32, count - i), j, block, 16);
            transpose(block, 16, kPanel, to + j * width + i / 2, width);
        }
    }
}

void Gradient::run(int64_t group, int64_t share) const {
    static thread_local Buffer turned_buffer, panel_buffer, sums_buffer;
    auto turned_side = static_cast<const uint16_t*>(inputs_turned ? a.x : a.grad);
    const void* wide_side = inputs_turned ? a.grad : a.x;
    bool paired = a.paired != Paired::neither;
    float* bias = bias_sums ? bias_sums + group * a.outputs : nullptr;
    int64_t first = share * panels / shares, last = (share + 1) * panels / shares, end = bound(group + 1);
    float *turned = turned_buffer.fit(narrow * kChunk / 2), *packed = panel_buffer.fit(kChunk * kPanel);
    for (int64_t begin = bound(group), t = begin; t < end; t += kChunk) {
        int64_t count = std::min(kChunk, end - t), width = whole(count) / 2;
        turn(turned_side + t * narrow, count, narrow, turned, width);
        if (bias && !inputs_turned && share == 0) add_rows_to(bias, turned_side + t * narrow, count, narrow, narrow);
        auto panel = [&](int64_t i) {
            return paired ? static_cast<const float*>(wide_side) + (i * whole(a.tokens) + t) / 2 * kPanel
                          : packed + i % 2 * kChunk / 2 * kPanel;
        };
        // The next panel is packed, or fetched, beside the product of this one.
        auto prepare = [&](int64_t i, int64_t piece) {
            if (paired) return __builtin_prefetch(panel(i) + piece * 16);
            int64_t row = piece * kPack, rows = std::min(kPack, count - row);
            const uint16_t* from = static_cast<const uint16_t*>(wide_side) + (t + row) * wide;
            pairs_of(from, wide, rows, i * kPanel, packed + (i % 2 * kChunk + row) / 2 * kPanel, kPack / 2);
            if (bias && inputs_turned) add_rows_to(bias + i * kPanel, from + i * kPanel, rows, kPanel, wide);
        };
        int64_t pieces = paired ? 2 * width : whole(count) / kPack;
        for (int64_t i = first - 1; i < last; ++i) {
            auto piece = [&](int64_t j) { prepare(i + 1, j); };
            Spread<decltype(piece)> beside{piece, i + 1 < last ? pieces : 0, steps_of(narrow, width)};
            if (i >= first) {
                float* c = sums ? sums + (group * panels + i) * narrow * kPanel : sums_buffer.fit(narrow * kPanel);
                multiply(turned, narrow, width, panel(i), c, t > begin, false, beside);
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
        block(a, packed, i * kBlock);
    });
}

void add_linear(const AddProductArgs& a) {
    static thread_local Buffer buffer, biases;
    Gradient gradient{a};
    int64_t size = gradient.narrow * gradient.wide;
    if (a.tokens > kChunk) gradient.sums = buffer.fit(gradient.groups * size);
    if (a.into_bias) {
        gradient.bias_sums = biases.fit(gradient.groups * a.outputs);
        std::fill_n(gradient.bias_sums, gradient.groups * a.outputs, 0.0f);
    }
    parallel_for(gradient.groups * gradient.shares, a.threads, [&](int64_t i) {
        TileUse tiles(kind_of(DType::bf16, 2));
        gradient.run(i / gradient.shares, i % gradient.shares);
    });
    if (gradient.groups > 1)
        parallel_for(gradient.panels, a.threads, [&](int64_t i) {
            for (int64_t group = 0; group < gradient.groups; ++group)
                gradient.add_panel(i, gradient.sums + (group * gradient.panels + i) * gradient.narrow * kPanel);
        });
    for (int64_t i = 0; a.into_bias && i < gradient.groups * a.outputs; ++i)
        a.into_bias[i % a.outputs] += gradient.bias_sums[i];
}
#else
void linear(const LinearArgs&) {}
void add_linear(const AddProductArgs&) {}
#endif

}  // namespace dino

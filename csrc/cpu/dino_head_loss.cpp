// Last layer and DINO loss together, blocked over the outputs: the logits of a block live in cache, all logits
// nowhere. Formula and notation in dino_kernels/ops/dino_head_loss.py.
//
// Two passes: statistics of all rows, then gradients, for which a block's logits are recomputed. Blocks are
// transposed, [outputs, rows], so that a vector holds one output of 16 rows and no sum runs across its lanes.
#include "cpu/dino_head_loss.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "cpu/block_softmax.h"
#include "cpu/gemm/microkernel.h"

namespace dino {
namespace {

constexpr int64_t kGroups = 32;  // tasks; fixed, so that sums over blocks do not depend on the threads

// logits = exponentials * weight[row] - scale * target; dot[row] += target * logits
DINO_MULTIVERSION
void gradient(float* logits, int64_t width, const float* max, float inv_temp, const float* weight, const float* target,
              float scale, float* dot) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        dot[i] += target[i] * logits[i];
        logits[i] = weight[i] * exp_negative((logits[i] - max[i]) * inv_temp) - scale * target[i];
    }
}

// --- one group of blocks -----------------------------------------------------------------------------

struct Net {
    const void* weights;
    Rows rows;
    const float* center;  // of the teacher; zeros for the student
    float inv_temp;
    Statistics stats;
};

struct Problem {
    const DinoHeadLossArgs& a;
    Net student, teacher;
    int64_t channels;  // padded
    double scale;      // of the gradient
    Microkernel kernel = microkernel_for(DType::f32, Products::f32);

    const float* weights(const Net& net, int64_t begin, int64_t count, float* scratch) const {
        return block_of(net.weights, a.dtype, begin, count, a.channels, scratch);
    }
    void logits(const Net& net, const float* weights, int64_t count, float* out) const {
        int64_t width = net.rows.width;
        product(kernel, count, width, {a.channels, channels, 1, width, width}, weights, net.rows.transposed, out);
    }
};

void group_statistics(const Problem& p, const Net& net, int64_t begin, int64_t end, Statistics& stats) {
    FlushDenormals flush;
    int64_t width = net.rows.width;
    static thread_local Buffer buffers[5];
    float *x = buffers[0].fit(kBlock * width), *scratch = buffers[1].fit(kBlock * p.channels);
    float *highest = buffers[2].fit(width), *sum = buffers[3].fit(width), *ones = buffers[4].fit(width);
    std::fill_n(ones, width, 1.0f);
    for (int64_t k = begin; k < end; k += kBlock) {
        int64_t count = std::min(kBlock, end - k);
        p.logits(net, p.weights(net, k, count, scratch), count, x);
        block_max(x, width, net.center + k, count, highest);
        for (int64_t i = 0; i < width; ++i) stats.raise(i, highest[i], net.inv_temp);
        std::fill_n(sum, width, 0.0f);
        exponentials(x, width, net.center + k, count, stats.max.data(), net.inv_temp, ones, sum);
        for (int64_t i = 0; i < width; ++i) stats.total[i] += sum[i];
    }
}

// Sum over u != v of q_u for every student row, from the teacher's q [2, B]
void targets(const float* q, int64_t batch, int64_t views, float* target) {
    for (int64_t b = 0; b < batch; ++b) {
        target[b] = q[batch + b];
        target[batch + b] = q[b];
    }
    for (int64_t v = 2; v < views; ++v)
        for (int64_t b = 0; b < batch; ++b) target[v * batch + b] = q[b] + q[batch + b];
}

// Gradients of blocks [begin, end): of the weights to their place, of the rows added to grad_z [padded V*B, padded D];
// returns the sum of targets times logits.
double group_gradient(const Problem& p, int64_t begin, int64_t end, float* grad_z) {
    FlushDenormals flush;
    const DinoHeadLossArgs& a = p.a;
    const Net &s = p.student, &t = p.teacher;
    int64_t rows = s.rows.count, width = s.rows.width;
    static thread_local Buffer buffers[9];
    float *x = buffers[0].fit(kBlock * width), *q = buffers[1].fit(kBlock * t.rows.width);
    float *scratch = buffers[2].fit(kBlock * p.channels), *grad_w = buffers[3].fit(kBlock * p.channels);
    float *student_weight = zeros(buffers[4], width), *teacher_weight = zeros(buffers[5], t.rows.width);
    float *target = zeros(buffers[6], width), *dot = buffers[7].fit(width), *unused = zeros(buffers[8], t.rows.width);
    for (int64_t i = 0; i < rows; ++i)
        student_weight[i] = float((i < 2 * a.batch ? 1 : 2) * p.scale / s.stats.total[i]);
    for (int64_t i = 0; i < 2 * a.batch; ++i) teacher_weight[i] = float(1 / t.stats.total[i]);
    double total_dot = 0;
    for (int64_t k = begin; k < end; k += kBlock) {
        int64_t count = std::min(kBlock, end - k);
        p.logits(t, p.weights(t, k, count, scratch), count, q);
        for (int64_t j = 0; j < count; ++j)  // the last teacher row is the mean of the others
            a.batch_center[k + j] = q[j * t.rows.width + 2 * a.batch];
        exponentials(q, t.rows.width, t.center + k, count, t.stats.max.data(), t.inv_temp, teacher_weight, unused);
        const float* weights = p.weights(s, k, count, scratch);
        p.logits(s, weights, count, x);
        std::fill_n(dot, width, 0.0f);
        for (int64_t j = 0; j < count; ++j) {
            targets(q + j * t.rows.width, a.batch, a.views, target);
            gradient(x + j * width, width, s.stats.max.data(), s.inv_temp, student_weight, target, float(p.scale), dot);
        }
        for (int64_t i = 0; i < rows; ++i) total_dot += dot[i];
        product(p.kernel, rows, p.channels, {count, 1, width, p.channels, p.channels, true}, x, weights, grad_z);
        if (!a.grad_w) continue;
        product(p.kernel, count, p.channels, {rows, width, 1, p.channels, p.channels}, x, s.rows.wide, grad_w);
        narrow(grad_w, p.channels, count, a.channels, a.grad_w, a.dtype, k * a.channels);
    }
    return total_dot;
}

DINO_MULTIVERSION
void add(float* to, const float* from, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

}  // namespace

double dino_head_loss(const DinoHeadLossArgs& a) {
    Buffer center_buffer, grad_buffer;
    const float* no_center = zeros(center_buffer, a.outputs);
    Rows student_rows(a.student_z, a.dtype, a.views * a.batch, 0, a.channels);
    Rows teacher_rows(a.teacher_z, a.dtype, 2 * a.batch, 1, a.channels);
    int64_t channels = padded(a.channels), rows = student_rows.count;
    float* mean = teacher_rows.wide + 2 * a.batch * channels;  // its logits are the batch center
    for (int64_t i = 0; i < 2 * a.batch; ++i) add(mean, teacher_rows.wide + i * channels, channels);
    for (int64_t d = 0; d < channels; ++d) mean[d] /= float(2 * a.batch);
    student_rows.transpose(a.channels);
    teacher_rows.transpose(a.channels);
    Statistics student_stats(student_rows.width), teacher_stats(teacher_rows.width);
    double scale = 1.0 / (double(a.student_temp) * double(2 * a.views - 2) * double(a.batch));
    Problem p{a,
              {a.student_w, std::move(student_rows), no_center, 1 / a.student_temp, student_stats},
              {a.teacher_w, std::move(teacher_rows), a.center, 1 / a.teacher_temp, teacher_stats},
              channels,
              scale};

    int64_t blocks = (a.outputs + kBlock - 1) / kBlock, groups = std::min(kGroups, blocks);
    auto begin = [&](int64_t group) { return std::min(group * blocks / groups * kBlock, a.outputs); };
    std::vector<Statistics> student_parts(groups, student_stats), teacher_parts(groups, teacher_stats);
    parallel_for(2 * groups, a.threads, [&](int64_t task) {
        int64_t group = task / 2;
        const Net& net = task % 2 ? p.teacher : p.student;
        group_statistics(p, net, begin(group), begin(group + 1), (task % 2 ? teacher_parts : student_parts)[group]);
    });
    for (int64_t group = 0; group < groups; ++group) {
        p.student.stats.merge(student_parts[group], p.student.inv_temp);
        p.teacher.stats.merge(teacher_parts[group], p.teacher.inv_temp);
    }

    int64_t size = padded(rows) * channels;
    float* grad_z = zeros(grad_buffer, groups * size);
    std::vector<double> dots(groups);
    parallel_for(groups, a.threads, [&](int64_t group) {
        dots[group] = group_gradient(p, begin(group), begin(group + 1), grad_z + group * size);
    });
    parallel_for(rows, a.threads, [&](int64_t row) {
        float* sum = grad_z + row * channels;
        for (int64_t group = 1; group < groups; ++group) add(sum, grad_z + group * size + row * channels, channels);
        narrow(sum, channels, 1, a.channels, a.grad_z, a.dtype, row * a.channels);
    });
    double loss = 0;
    const Statistics& stats = p.student.stats;
    for (int64_t i = 0; i < rows; ++i)
        loss += (i < 2 * a.batch ? 1 : 2) * (stats.max[i] / double(a.student_temp) + std::log(stats.total[i]));
    for (double dot : dots) loss -= dot / a.student_temp;
    return loss / double((2 * a.views - 2) * a.batch);
}

}  // namespace dino

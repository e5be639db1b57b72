// The DINO loss, its gradient and the batch center; formula and notation in dino_kernels/ops/dino_loss.py.
// An image's rows are one task: its two teacher rows become probabilities in a scratch that
// stays in cache while all views of the image are read once from memory and their gradients written once.
#include "cpu/dino_loss.h"

#include <algorithm>
#include <vector>

#include "common/memory.h"
#include "cpu/row_loss.h"

namespace dino {
namespace {

int64_t gradient_bytes(const DinoLossArgs& a) { return a.views * a.batch * a.outputs * width_of(a.student_dtype); }

// Loss and gradient of views [begin, end) of image b; returns the sum over its pairs.
double image_views(const DinoLossArgs& a, int64_t b, int64_t begin, int64_t end) {
    FlushDenormals flush;
    // Kept by the thread: new memory would cost page faults for every image.
    thread_local std::vector<float> scratch;
    scratch.resize(3 * a.outputs + (a.outputs + kBlock - 1) / kBlock);
    float *q[2] = {scratch.data(), scratch.data() + a.outputs}, *exps = scratch.data() + 2 * a.outputs;
    float* block_max = exps + a.outputs;
    for (int u = 0; u < 2; ++u) {
        int64_t offset = (u * a.batch + b) * a.teacher_stride;
        teacher_probabilities({a.teacher, a.teacher_dtype, offset, a.outputs, 1 / a.teacher_temp},
                              a.center + u * a.center_stride, q[u]);
    }
    double inv_temp = 1.0 / a.student_temp, loss = 0;
    double scale = inv_temp / double((2 * a.views - 2) * a.batch);
    bool summed = false, nontemporal = gradient_bytes(a) > kCached;
    for (int64_t v = begin; v < end; ++v) {
        if (v >= 2 && !summed) {  // from here on both teacher views are targets
            for (int64_t k = 0; k < a.outputs; ++k) q[0][k] += q[1][k];
            summed = true;
        }
        int64_t pairs = v < 2 ? 1 : 2;
        const float* target = v == 0 ? q[1] : q[0];
        Row row{a.student, a.student_dtype, (v * a.batch + b) * a.student_stride, a.outputs, float(inv_temp)};
        Stats stats = student_stats(row, target, exps, block_max);
        loss += double(pairs) * stats.lse - stats.dot * inv_temp;
        student_gradient(row, target, exps, block_max, stats.lse, double(pairs) * scale, scale, a.grad,
                         (v * a.batch + b) * a.grad_stride, nontemporal);
    }
    finish_streaming();
    return loss;
}

}  // namespace

double dino_loss(const DinoLossArgs& a) {
    if (a.grad != a.student) use_huge_pages(a.grad, size_t(gradient_bytes(a)));
    mean_row({a.teacher, a.teacher_dtype, a.teacher_stride, 2 * a.batch, a.outputs}, nullptr, a.batch_center,
             a.threads);
    // With fewer images than threads, tasks share an image's views and recompute its softmax.
    int64_t groups = std::min(a.views, (a.threads + a.batch - 1) / a.batch);
    std::vector<double> losses(a.batch * groups);
    parallel_for(a.batch * groups, a.threads, [&](int64_t task) {
        int64_t b = task / groups, group = task % groups;
        losses[task] = image_views(a, b, group * a.views / groups, (group + 1) * a.views / groups);
    });
    double total = 0;  // in order of tasks, whatever thread ran them
    for (double loss : losses) total += loss;
    return total / double((2 * a.views - 2) * a.batch);
}

}  // namespace dino

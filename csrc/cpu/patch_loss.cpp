// The loss of masked patch tokens, its gradient and the batch center; formula in dino_kernels/ops/patch_loss.py.
// A row is one task, whose target stays in cache until the gradient is written.
#include "cpu/patch_loss.h"

#include <cstring>
#include <vector>

#include "common/memory.h"
#include "cpu/row_loss.h"

namespace dino {
namespace {

int64_t gradient_bytes(const PatchLossArgs& a) { return a.rows * a.outputs * width_of(a.student_dtype); }

// Writes the gradient of a row and returns its loss.
double patch(const PatchLossArgs& a, int64_t i) {
    double weight = a.weights[i], inv_temp = 1.0 / a.student_temp;
    if (weight == 0) {
        int64_t width = width_of(a.student_dtype);
        std::memset(static_cast<char*>(a.grad) + i * a.grad_stride * width, 0, size_t(a.outputs * width));
        return 0;
    }
    FlushDenormals flush;
    static thread_local Buffer buffers[3];
    float *q = buffers[0].fit(a.outputs), *exps = buffers[1].fit(a.outputs);
    float* block_max = buffers[2].fit((a.outputs + kBlock - 1) / kBlock);
    teacher_probabilities({a.teacher, a.teacher_dtype, i * a.teacher_stride, a.outputs, 1 / a.teacher_temp}, a.center,
                          q);
    Row row{a.student, a.student_dtype, i * a.student_stride, a.outputs, float(inv_temp)};
    Stats stats = student_stats(row, q, exps, block_max);
    student_gradient(row, q, exps, block_max, stats.lse, weight * inv_temp, weight * inv_temp, a.grad,
                     i * a.grad_stride, gradient_bytes(a) > kCached);
    finish_streaming();
    return weight * (stats.lse - stats.dot * inv_temp);
}

}  // namespace

double patch_loss(const PatchLossArgs& a) {
    if (a.grad != a.student) use_huge_pages(a.grad, size_t(gradient_bytes(a)));
    mean_row({a.teacher, a.teacher_dtype, a.teacher_stride, a.rows, a.outputs}, a.weights, a.batch_center, a.threads);
    std::vector<double> losses(a.rows);
    parallel_for(a.rows, a.threads, [&](int64_t i) { losses[i] = patch(a, i); });
    double total = 0;  // in order of the rows, whatever thread ran them
    for (double loss : losses) total += loss;
    return total;
}

}  // namespace dino

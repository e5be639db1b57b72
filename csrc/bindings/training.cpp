// Losses, optimizer, moving averages and weight norm.
#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "cpu/adamw_ema.h"
#include "cpu/column_mass.h"
#include "cpu/dino_head_loss.h"
#include "cpu/dino_loss.h"
#include "cpu/ema_update.h"
#include "cpu/info_nce.h"
#include "cpu/patch_loss.h"
#include "cpu/sgd_ema.h"
#include "cpu/weight_norm.h"

namespace dino::bindings {
namespace {

void bind_column_mass(py::module_& m) {
    using Args = ColumnMassArgs;
    bind(m, "column_mass", column_mass, DINO_FIELD(logits), DINO_FIELD(center), DINO_FIELD(counted), DINO_FIELD(mass),
         DINO_FIELD(rows), DINO_FIELD(outputs), DINO_FIELD(stride), DINO_FIELD(dtype), DINO_FIELD(temp),
         DINO_FIELD(threads));
}

void bind_dino_loss(py::module_& m) {
    using Args = DinoLossArgs;
    bind(m, "dino_loss", dino_loss, DINO_FIELD(student), DINO_FIELD(teacher), DINO_FIELD(center), DINO_FIELD(grad),
         DINO_FIELD(batch_center), DINO_FIELD(views), DINO_FIELD(batch), DINO_FIELD(outputs),
         DINO_FIELD(student_stride), DINO_FIELD(teacher_stride), DINO_FIELD(center_stride), DINO_FIELD(grad_stride),
         DINO_FIELD(student_dtype), DINO_FIELD(teacher_dtype), DINO_FIELD(student_temp), DINO_FIELD(teacher_temp),
         DINO_FIELD(threads));
}

void bind_dino_head_loss(py::module_& m) {
    using Args = DinoHeadLossArgs;
    bind(m, "dino_head_loss", dino_head_loss, DINO_FIELD(student_z), DINO_FIELD(teacher_z), DINO_FIELD(student_w),
         DINO_FIELD(teacher_w), DINO_FIELD(center), DINO_FIELD(grad_z), DINO_FIELD(grad_w), DINO_FIELD(batch_center),
         DINO_FIELD(views), DINO_FIELD(batch), DINO_FIELD(outputs), DINO_FIELD(channels), DINO_FIELD(dtype),
         DINO_FIELD(student_temp), DINO_FIELD(teacher_temp), DINO_FIELD(threads));
}

void bind_info_nce(py::module_& m) {
    using Args = InfoNceArgs;
    bind(m, "info_nce", info_nce, DINO_FIELD(query), DINO_FIELD(positive), DINO_FIELD(labels), DINO_FIELD(keys),
         DINO_FIELD(grad), DINO_FIELD(rows), DINO_FIELD(outputs), DINO_FIELD(channels), DINO_FIELD(dtype),
         DINO_FIELD(temp), DINO_FIELD(scale), DINO_FIELD(threads));
}

void bind_patch_loss(py::module_& m) {
    using Args = PatchLossArgs;
    bind(m, "patch_loss", patch_loss, DINO_FIELD(student), DINO_FIELD(teacher), DINO_FIELD(center), DINO_FIELD(weights),
         DINO_FIELD(grad), DINO_FIELD(batch_center), DINO_FIELD(rows), DINO_FIELD(outputs), DINO_FIELD(student_stride),
         DINO_FIELD(teacher_stride), DINO_FIELD(grad_stride), DINO_FIELD(student_dtype), DINO_FIELD(teacher_dtype),
         DINO_FIELD(student_temp), DINO_FIELD(teacher_temp), DINO_FIELD(threads));
}

void update_ema(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& sources,
                const std::vector<int64_t>& sizes, const std::vector<int>& source_dtypes, double momentum,
                int threads) {
    py::gil_scoped_release unlocked;
    auto to = pointers<float>(targets);
    auto from = pointers<const void>(sources);
    auto types = dtypes(source_dtypes);
    ema_update({to.data(), from.data(), sizes.data(), types.data(), int64_t(sizes.size()), momentum, threads});
}

// The step of an optimizer with the fields of FlatStepArgs and its own.
template <class Args, bool (*Step)(const Args&), class... Fields>
void bind_flat_step(py::module_& m, const char* name, Fields... own) {
    auto step = [](const Args& given) {
        Args args = given;
        --args.segments;  // counted as offsets, of which there is one more
        return Step(args);
    };
    bind<Args, bool>(m, name, step, DINO_FIELD(student), DINO_FIELD(grad), DINO_FIELD(teacher), DINO_FIELD(student_16),
                     DINO_FIELD(teacher_16), DINO_FIELD(student_rows), DINO_FIELD(teacher_rows), DINO_FIELD(grad_dtype),
                     DINO_FIELD(student_16_dtype), DINO_FIELD(teacher_16_dtype), DINO_FIELD(rows_dtype),
                     ListField<Args>{"offsets", &Args::offsets, &Args::segments}, DINO_FIELD(decayed),
                     DINO_FIELD(frozen), DINO_FIELD(lr), DINO_FIELD(weight_decay), DINO_FIELD(momentum),
                     DINO_FIELD(clip_norm), DINO_FIELD(rows), DINO_FIELD(channels), DINO_FIELD(cleared),
                     DINO_FIELD(threads), own...);
}

void bind_adamw_ema_step(py::module_& m) {
    using Args = AdamwEmaArgs;
    bind_flat_step<Args, adamw_ema_step>(m, "adamw_ema_step", DINO_FIELD(exp_avg), DINO_FIELD(exp_avg_sq),
                                         DINO_FIELD(steps), DINO_FIELD(lr_scale), DINO_FIELD(clip_groups),
                                         DINO_FIELD(beta1), DINO_FIELD(beta2), DINO_FIELD(eps));
}

void bind_sgd_ema_step(py::module_& m) {
    using Args = SgdEmaArgs;
    bind_flat_step<Args, sgd_ema_step>(m, "sgd_ema_step", DINO_FIELD(momentum_buffer), DINO_FIELD(adapted),
                                       DINO_FIELD(momentum_sgd), DINO_FIELD(eta), DINO_FIELD(eps), DINO_FIELD(larc));
}

void bind_weight_norm(py::module_& m) {
    using Args = WeightNormArgs;
    bind(m, "weight_norm", weight_norm, DINO_FIELD(v), DINO_FIELD(g), DINO_FIELD(w), DINO_FIELD(rows),
         DINO_FIELD(channels), DINO_FIELD(dtype), DINO_FIELD(threads));
}

void bind_weight_norm_backward(py::module_& m) {
    using Args = WeightNormBackwardArgs;
    bind(m, "weight_norm_backward", weight_norm_backward, DINO_FIELD(grad_w), DINO_FIELD(v), DINO_FIELD(g),
         DINO_FIELD(grad_v), DINO_FIELD(grad_g), DINO_FIELD(rows), DINO_FIELD(channels), DINO_FIELD(dtype),
         DINO_FIELD(threads));
}

}  // namespace

void bind_training(py::module_& m) {
    bind_column_mass(m);
    bind_dino_loss(m);
    bind_dino_head_loss(m);
    bind_info_nce(m);
    bind_patch_loss(m);
    m.def("ema_update", &update_ema, py::kw_only(), py::arg("targets"), py::arg("sources"), py::arg("sizes"),
          py::arg("source_dtypes"), py::arg("momentum"), py::arg("threads"));
    bind_adamw_ema_step(m);
    bind_sgd_ema_step(m);
    bind_weight_norm(m);
    bind_weight_norm_backward(m);
}

}  // namespace dino::bindings

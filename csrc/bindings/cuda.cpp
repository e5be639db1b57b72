// The Python module dino_kernels._C.cuda: addresses, sizes and a stream in, by name. Callers check shapes and dtypes.
#include <tuple>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "cuda/launch.h"

namespace dino::bindings {

using cuda::Scalar;
using cuda::Stream;

// (address or 0, whether float64 lies there, value if there is no address)
template <>
struct Conversion<Scalar> {
    using Passed = std::tuple<uintptr_t, bool, double>;
    static Scalar from(const Passed& given) {
        auto [address, wide, value] = given;
        return {reinterpret_cast<const void*>(address), wide, value};
    }
};

namespace {

// m.name(*, fields, stream) calls launch(args, stream).
template <class Args, class... Fields>
void bind_launch(py::module_& m, const char* name, void (*launch)(const Args&, Stream), Fields... fields) {
    auto call = [=](typename Fields::Passed... values, uintptr_t stream) {
        Args args{};
        (fields.set(args, values), ...);
        launch(args, reinterpret_cast<Stream>(stream));
    };
    m.def(name, call, py::kw_only(), py::arg(fields.name)..., py::arg("stream"));
}

void update_ema(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& sources,
                const std::vector<int64_t>& sizes, const std::vector<int>& source_dtypes,
                const Conversion<Scalar>::Passed& momentum, uintptr_t stream) {
    auto to = pointers<float>(targets);
    auto from = pointers<const void>(sources);
    auto types = dtypes(source_dtypes);
    cuda::launch_ema_update(
        {to.data(), from.data(), sizes.data(), types.data(), int64_t(sizes.size()), Conversion<Scalar>::from(momentum)},
        reinterpret_cast<Stream>(stream));
}

void bind_dino_loss(py::module_& m) {
    using Args = cuda::DinoLossArgs;
    bind_launch(m, "dino_loss", cuda::launch_dino_loss, DINO_FIELD(student), DINO_FIELD(teacher), DINO_FIELD(center),
                DINO_FIELD(grad), DINO_FIELD(batch_center), DINO_FIELD(loss), DINO_FIELD(partials), DINO_FIELD(targets),
                DINO_FIELD(losses), DINO_FIELD(arrived), DINO_FIELD(views), DINO_FIELD(batch), DINO_FIELD(outputs),
                DINO_FIELD(student_stride), DINO_FIELD(teacher_stride), DINO_FIELD(center_stride),
                DINO_FIELD(grad_stride), DINO_FIELD(student_dtype), DINO_FIELD(teacher_dtype), DINO_FIELD(student_temp),
                DINO_FIELD(teacher_temp));
}

void bind_dino_loss_scale(py::module_& m) {
    using Args = cuda::DinoLossScaleArgs;
    bind_launch(m, "dino_loss_scale", cuda::launch_dino_loss_scale, DINO_FIELD(grad), DINO_FIELD(rows),
                DINO_FIELD(outputs), DINO_FIELD(stride), DINO_FIELD(dtype), DINO_FIELD(upstream));
}

void step(const cuda::AdamwEmaArgs& given, Stream stream) {
    cuda::AdamwEmaArgs args = given;
    --args.segments;  // counted as offsets, of which there is one more
    cuda::launch_adamw_ema_step(args, stream);
}

void bind_adamw_ema_step(py::module_& m) {
    using Args = cuda::AdamwEmaArgs;
    bind_launch(m, "adamw_ema_step", step, DINO_FIELD(student), DINO_FIELD(grad), DINO_FIELD(exp_avg),
                DINO_FIELD(exp_avg_sq), DINO_FIELD(teacher), DINO_FIELD(student_16), DINO_FIELD(teacher_16),
                DINO_FIELD(student_rows), DINO_FIELD(teacher_rows), DINO_FIELD(steps), DINO_FIELD(decayed),
                DINO_FIELD(frozen), DINO_FIELD(lr_scale), DINO_FIELD(clip_groups), DINO_FIELD(nonfinite),
                DINO_FIELD(partials), DINO_FIELD(factors), DINO_FIELD(squares), DINO_FIELD(grad_dtype),
                DINO_FIELD(student_16_dtype), DINO_FIELD(teacher_16_dtype), DINO_FIELD(rows_dtype),
                ListField<Args>{"offsets", &Args::offsets, &Args::segments}, DINO_FIELD(cleared), DINO_FIELD(rows),
                DINO_FIELD(channels), DINO_FIELD(lr), DINO_FIELD(weight_decay), DINO_FIELD(momentum),
                DINO_FIELD(clip_norm), DINO_FIELD(beta1), DINO_FIELD(beta2), DINO_FIELD(eps));
}

template <void (*Launch)(const cuda::AttentionArgs&, Stream)>
void attend(const cuda::AttentionArgs& given, Stream stream) {
    cuda::AttentionArgs args = given;
    args.group_count /= 2;  // counted as numbers, of which a group has two
    Launch(args, stream);
}

void bind_attention(py::module_& m) {
    using Args = cuda::AttentionArgs;
    auto bind_pass = [&](const char* name, void (*launch)(const Args&, Stream), auto... gradients) {
        bind_launch(m, name, launch, DINO_FIELD(qkv), DINO_FIELD(out), DINO_FIELD(lse), gradients...,
                    DINO_FIELD(tokens), DINO_FIELD(heads), DINO_FIELD(token_stride), DINO_FIELD(part_stride),
                    DINO_FIELD(head_stride), DINO_FIELD(dtype), DINO_FIELD(scale),
                    ListField<Args>{"groups", &Args::groups, &Args::group_count});
    };
    bind_pass("attention_short", attend<cuda::launch_attention_short>);
    bind_pass("attention_short_backward", attend<cuda::launch_attention_short_backward>, DINO_FIELD(grad_out),
              DINO_FIELD(grad));
}

}  // namespace

void bind_cuda(py::module_& m) {
    m.doc() = "Launchers of the CUDA C++ kernels of dino_kernels.";
    bind_adamw_ema_step(m);
    bind_attention(m);
    bind_dino_loss(m);
    bind_dino_loss_scale(m);
    m.def("ema_update", &update_ema, py::kw_only(), py::arg("targets"), py::arg("sources"), py::arg("sizes"),
          py::arg("source_dtypes"), py::arg("momentum"), py::arg("stream"));
}

}  // namespace dino::bindings

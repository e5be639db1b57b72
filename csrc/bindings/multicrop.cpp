// Crops of decoded images; crops: address of [images, views] structs Crop.
#include "cpu/multicrop/multicrop.h"

#include "bindings/bindings.h"
#include "bindings/fields.h"

namespace dino::bindings {
namespace {

void check(uintptr_t crops, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
           const std::vector<int64_t>& sizes) {
    check_crops(reinterpret_cast<const Crop*>(crops), int64_t(heights.size()), int64_t(sizes.size()), heights.data(),
                widths.data(), sizes.data());
}

void crop(const std::vector<uintptr_t>& pixels, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
          const std::vector<int64_t>& row_strides, uintptr_t crops, const std::vector<uintptr_t>& out,
          const std::vector<int64_t>& sizes, const std::vector<int64_t>& out_strides, bool levels,
          const std::vector<float>& mean, const std::vector<float>& std, int dtype, int threads) {
    py::gil_scoped_release unlocked;
    auto images = pointers<const uint8_t>(pixels);
    auto views = pointers<void>(out);
    multicrop({images.data(), heights.data(), widths.data(), row_strides.data(), reinterpret_cast<const Crop*>(crops),
               views.data(), sizes.data(), out_strides.data(), int64_t(images.size()), int64_t(views.size()), levels,
               mean.data(), std.data(), DType(dtype), threads});
}

void crop_deep(const std::vector<uintptr_t>& pixels, int depth, const std::vector<int64_t>& heights,
               const std::vector<int64_t>& widths, const std::vector<int64_t>& row_strides,
               const std::vector<float>& low, const std::vector<float>& high, const std::vector<float>& mean,
               const std::vector<float>& std, uintptr_t crops, const std::vector<uintptr_t>& out,
               const std::vector<int64_t>& sizes, const std::vector<int64_t>& out_strides, int dtype, int threads) {
    py::gil_scoped_release unlocked;
    auto images = pointers<const void>(pixels);
    auto views = pointers<void>(out);
    multicrop_deep({images.data(), Depth(depth), int64_t(mean.size()), heights.data(), widths.data(),
                    row_strides.data(), low.data(), high.data(), mean.data(), std.data(),
                    reinterpret_cast<const Crop*>(crops), views.data(), sizes.data(), out_strides.data(),
                    int64_t(images.size()), int64_t(views.size()), DType(dtype), threads});
}

}  // namespace

void bind_multicrop(py::module_& m) {
    m.def("check_crops", &check, py::kw_only(), py::arg("crops"), py::arg("heights"), py::arg("widths"),
          py::arg("sizes"));
    m.def("multicrop", &crop, py::kw_only(), py::arg("pixels"), py::arg("heights"), py::arg("widths"),
          py::arg("row_strides"), py::arg("crops"), py::arg("out"), py::arg("sizes"), py::arg("out_strides"),
          py::arg("levels"), py::arg("mean"), py::arg("std"), py::arg("dtype"), py::arg("threads"));
    m.def("multicrop_deep", &crop_deep, py::kw_only(), py::arg("pixels"), py::arg("depth"), py::arg("heights"),
          py::arg("widths"), py::arg("row_strides"), py::arg("low"), py::arg("high"), py::arg("mean"), py::arg("std"),
          py::arg("crops"), py::arg("out"), py::arg("sizes"), py::arg("out_strides"), py::arg("dtype"),
          py::arg("threads"));
}

}  // namespace dino::bindings

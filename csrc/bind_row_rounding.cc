// Python's way into row rounding: addresses of dense torch tensors, whose shapes the face checks; the GIL is released.
#include <cstdint>
#include <string>

#include "bind_addresses.h"
#include "bindings.h"
#include "row_rounding.h"

namespace shallowfusion {
namespace {

namespace py = pybind11;

void check_shape(int64_t rows, int64_t columns, int threads) {
  check(rows >= 1 && rows <= kMostOfASize && columns >= 1 && columns <= kMostOfASize,
        "rows and columns must be from 1 to 2^31, got " + std::to_string(rows) + " and " + std::to_string(columns) + ".");
  check_threads(threads);
}

void round_them(uint64_t values, int dtype, int64_t rows, int64_t columns, uint64_t whole, uint64_t scales,
                int threads) {
  check_shape(rows, columns, threads);
  const Dtype kind = row_dtype(dtype);
  const char* from = pointer<const char>(values, static_cast<uint64_t>(item_size(kind)), "values");
  auto* to = pointer<int8_t>(whole, 1, "whole");
  auto* own = pointer<float>(scales, 4, "scales");
  const py::gil_scoped_release unlocked;
  round_rows(from, kind, rows, columns, to, own, threads);
}

void scale_them(uint64_t product, uint64_t scales, uint64_t bias, int64_t rows, int64_t columns, uint64_t output,
                int dtype, int threads) {
  check_shape(rows, columns, threads);
  const Dtype kind = row_dtype(dtype);
  const auto* from = pointer<const float>(product, 4, "product");
  const auto* own = pointer<const float>(scales, 4, "scales");
  const float* shift = bias == 0 ? nullptr : pointer<const float>(bias, 4, "bias");
  char* to = pointer<char>(output, static_cast<uint64_t>(item_size(kind)), "output");
  const py::gil_scoped_release unlocked;
  scale_rows(from, own, shift, rows, columns, to, kind, threads);
}

}  // namespace

void bind_row_rounding(py::module_& module) {
  module.def("round_rows", &round_them, py::kw_only(), py::arg("values"), py::arg("dtype"), py::arg("rows"),
             py::arg("columns"), py::arg("whole"), py::arg("scales"), py::arg("threads"));
  module.def("scale_rows", &scale_them, py::kw_only(), py::arg("product"), py::arg("scales"), py::arg("bias"),
             py::arg("rows"), py::arg("columns"), py::arg("output"), py::arg("dtype"), py::arg("threads"));
}

}  // namespace shallowfusion

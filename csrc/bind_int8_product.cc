// Python's way into int8 products: addresses of dense torch tensors, whose shapes the face checks; the GIL is released.
#include <cstdint>
#include <string>

#include "bind_addresses.h"
#include "bindings.h"
#include "int8_product.h"
#include "tile_shapes.h"

namespace shallowfusion {
namespace {

namespace py = pybind11;

constexpr int64_t kMostInputs = 1 << 16;  // beyond, a sum of products might not fit 32 bits

void check_sizes(int64_t outputs, int64_t inputs) {
  check(outputs >= 1 && outputs <= kMostOfASize && inputs >= kInputsAtOnce && inputs <= kMostInputs &&
            inputs % kInputsAtOnce == 0,
        "outputs must be from 1 to 2^31 and inputs a multiple of 4 up to 65536, got " + std::to_string(outputs) +
            " and " + std::to_string(inputs) + ".");
}

void pack(uint64_t weights, int64_t outputs, int64_t inputs, uint64_t packed) {
  check_sizes(outputs, inputs);
  const auto* from = pointer<const int8_t>(weights, 1, "weights");
  auto* to = pointer<uint8_t>(packed, 1, "packed");
  const py::gil_scoped_release unlocked;
  pack_int8(from, outputs, inputs, to);
}

void product(uint64_t values, int dtype, uint64_t packed, uint64_t scales, uint64_t bias, uint64_t output,
             int output_dtype, int64_t rows, int64_t inputs, int64_t outputs, int threads) {
  check(has_int8_product(), "this machine has no AVX-512 VNNI.");
  check_sizes(outputs, inputs);
  check_rows(rows);
  check_threads(threads);
  const Dtype kind = row_dtype(dtype);
  const Dtype made = row_dtype(output_dtype);
  const Int8Product call{
      pointer<const char>(values, static_cast<uint64_t>(item_size(kind)), "values"),
      kind,
      pointer<const uint8_t>(packed, 1, "packed"),
      pointer<const float>(scales, 4, "scales"),
      bias == 0 ? nullptr : pointer<const float>(bias, 4, "bias"),
      pointer<char>(output, static_cast<uint64_t>(item_size(made)), "output"),
      made,
      rows,
      inputs,
      outputs};
  const py::gil_scoped_release unlocked;
  int8_product(call, threads);
}

}  // namespace

void bind_int8_product(py::module_& module) {
  module.def("has_int8_product", &has_int8_product);
  module.def("has_int8_tiles", &has_int8_tiles);
  module.def("packed_int8_size", &packed_int8_size, py::kw_only(), py::arg("outputs"), py::arg("inputs"));
  module.def("pack_int8", &pack, py::kw_only(), py::arg("weights"), py::arg("outputs"), py::arg("inputs"),
             py::arg("packed"));
  module.def("int8_product", &product, py::kw_only(), py::arg("values"), py::arg("dtype"), py::arg("packed"),
             py::arg("scales"), py::arg("bias"), py::arg("output"), py::arg("output_dtype"), py::arg("rows"),
             py::arg("inputs"), py::arg("outputs"), py::arg("threads"));
}

}  // namespace shallowfusion

// Python's way into tile products: addresses of dense torch tensors, whose shapes the face checks; the GIL is released.
#include <cstdint>
#include <string>

#include "bind_addresses.h"
#include "bindings.h"
#include "huge_pages.h"
#include "tile_product.h"

namespace shallowfusion {
namespace {

namespace py = pybind11;

void check_sizes(int64_t outputs, int64_t inputs) {
  check(outputs >= 1 && outputs <= kMostOfASize && inputs >= 1 && inputs <= kMostOfASize,
        "outputs and inputs must be from 1 to 2^31, got " + std::to_string(outputs) + " and " +
            std::to_string(inputs) + ".");
}

int64_t packed_size(int64_t outputs, int64_t inputs) {
  check_sizes(outputs, inputs);
  return packed_tiles_size(outputs, inputs);
}

void pack(uint64_t weights, int64_t outputs, int64_t inputs, uint64_t packed) {
  check_sizes(outputs, inputs);
  const auto* from = pointer<const float>(weights, 4, "weights");
  auto* to = pointer<float>(packed, 4, "packed");
  const py::gil_scoped_release unlocked;
  pack_tiles(from, outputs, inputs, to);
}

void product(uint64_t values, uint64_t packed, uint64_t bias, uint64_t output, int64_t rows, int64_t inputs,
             int64_t outputs, int threads) {
  check(has_tile_product(), "this machine has no matrix units for bfloat16 (AMX).");
  check_sizes(outputs, inputs);
  check_rows(rows);
  check_threads(threads);
  const TileProduct call{pointer<const float>(values, 4, "values"),
                         pointer<const float>(packed, 4, "packed"),
                         bias == 0 ? nullptr : pointer<const float>(bias, 4, "bias"),
                         pointer<float>(output, 4, "output"),
                         rows,
                         inputs,
                         outputs};
  const py::gil_scoped_release unlocked;
  tile_product(call, threads);
}

void huge_pages(uint64_t memory, int64_t bytes) {
  check(bytes >= 0, "bytes must not be negative, got " + std::to_string(bytes) + ".");
  prefer_huge_pages(pointer<char>(memory, 1, "memory"), bytes);
}

}  // namespace

void bind_tile_product(py::module_& module) {
  module.def("prefer_huge_pages", &huge_pages, py::kw_only(), py::arg("memory"), py::arg("bytes"));
  module.def("has_tile_product", &has_tile_product);
  module.def("packed_tiles_size", &packed_size, py::kw_only(), py::arg("outputs"), py::arg("inputs"));
  module.def("pack_tiles", &pack, py::kw_only(), py::arg("weights"), py::arg("outputs"), py::arg("inputs"),
             py::arg("packed"));
  module.def("tile_product", &product, py::kw_only(), py::arg("values"), py::arg("packed"), py::arg("bias"),
             py::arg("output"), py::arg("rows"), py::arg("inputs"), py::arg("outputs"), py::arg("threads"));
}

}  // namespace shallowfusion

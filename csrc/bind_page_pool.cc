#include <pybind11/numpy.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "page_pool.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// The GIL is held throughout: calls take microseconds, and it keeps threads out of each other's way.

py::array_t<int32_t> to_array(const std::vector<int32_t>& values) {
  return py::array_t<int32_t>({static_cast<py::ssize_t>(values.size())}, values.data());
}

int64_t check_vector(const char* name, const Int64Array& array) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one axis.");
  return array.shape(0);
}

py::tuple append(PagePool& pool, int64_t sequence, int64_t count) {
  const AppendResult result = pool.append(sequence, count);
  py::array_t<int32_t> copies({static_cast<py::ssize_t>(result.copies.size()), py::ssize_t{2}});
  for (size_t i = 0; i < result.copies.size(); ++i) {
    copies.mutable_at(i, 0) = result.copies[i].source;
    copies.mutable_at(i, 1) = result.copies[i].target;
  }
  return py::make_tuple(to_array(result.slots), copies);
}

py::array_t<int32_t> append_each(PagePool& pool, const Int64Array& sequences) {
  py::array_t<int32_t> slots({check_vector("sequences", sequences)});
  pool.append_each(sequences.data(), sequences.size(), slots.mutable_data());
  return slots;
}

py::array_t<int64_t> reorder(PagePool& pool, const Int64Array& sequences, const Int64Array& parents) {
  const int64_t count = check_vector("sequences", sequences);
  const int64_t new_count = check_vector("parents", parents);
  py::array_t<int64_t> new_sequences({new_count});
  pool.reorder(sequences.data(), count, parents.data(), new_count, new_sequences.mutable_data());
  return new_sequences;
}

py::array_t<bool> visibility(const PagePool& pool, const Int64Array& sequences) {
  py::array_t<bool> visible({check_vector("sequences", sequences), pool.high_water()});
  auto* bytes = reinterpret_cast<uint8_t*>(visible.mutable_data());
  std::fill_n(bytes, visible.size(), uint8_t{0});
  pool.visibility(sequences.data(), sequences.size(), bytes);
  return visible;
}

}  // namespace

void bind_page_pool(py::module_& module) {
  const auto sequence = py::arg("sequence");
  const auto sequences = py::arg("sequences");
  py::class_<PagePool>(module, "PagePool")
      .def(py::init<int64_t, int64_t>(), py::kw_only(), py::arg("num_pages"), py::arg("page_size"))
      .def("create", &PagePool::create)
      .def("fork", &PagePool::fork, py::kw_only(), sequence)
      .def("release", &PagePool::release, py::kw_only(), sequence)
      .def("append", &append, py::kw_only(), sequence, py::arg("count"))
      .def("append_each", &append_each, py::kw_only(), sequences)
      .def("reorder", &reorder, py::kw_only(), sequences, py::arg("parents"))
      .def("visibility", &visibility, py::kw_only(), sequences)
      .def("length", &PagePool::length, py::kw_only(), sequence)
      .def("slots", [](const PagePool& pool, int64_t id) { return to_array(pool.slots(id)); }, py::kw_only(), sequence)
      .def("pages", [](const PagePool& pool, int64_t id) { return to_array(pool.pages(id)); }, py::kw_only(), sequence)
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("page_size", &PagePool::page_size)
      .def_property_readonly("num_free", &PagePool::num_free)
      .def_property_readonly("num_used", &PagePool::num_used)
      .def_property_readonly("high_water", &PagePool::high_water)
      .def_property_readonly("num_sequences", &PagePool::num_sequences);
}

}  // namespace shallowfusion

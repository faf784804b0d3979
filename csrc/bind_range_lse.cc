// Python's way into the range log-sum-exp: every shape, dtype and range is checked here, then the GIL is released.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "bindings.h"
#include "range_lse.h"

namespace shallowfusion {
namespace {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr int64_t kMaxVocab = int64_t{1} << 30;
constexpr int64_t kMaxRows = int64_t{1} << 24;

void check(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

// (address, dtype code, rows, vocab, row stride), in this order: numpy knows no bfloat16.
using Logits = std::tuple<uint64_t, int, int64_t, int64_t, int64_t>;

RangeArguments checked_logits(const Logits& given, double temperature) {
  const auto& [address, dtype, rows, vocab, row_stride] = given;
  check(dtype >= 0 && dtype <= 2, "dtype code must be 0, 1 or 2, got " + std::to_string(dtype) + ".");
  check(rows >= 0 && rows <= kMaxRows, "rows must be from 0 to 2^24, got " + std::to_string(rows) + ".");
  check(vocab >= 1 && vocab <= kMaxVocab, "vocabulary must be from 1 to 2^30, got " + std::to_string(vocab) + ".");
  check(row_stride >= vocab && row_stride <= int64_t{1} << 40, "row stride must be at least the vocabulary.");
  const auto size = static_cast<uint64_t>(item_size(static_cast<Dtype>(dtype)));
  check(address != 0 && address % size == 0, "address must be aligned and not null.");
  check(std::isfinite(temperature) && temperature > 0.0, "temperature must be finite and above 0.");
  RangeArguments arguments;
  arguments.logits = reinterpret_cast<const char*>(address);
  arguments.dtype = static_cast<Dtype>(dtype);
  arguments.rows = rows;
  arguments.vocab = vocab;
  arguments.row_stride = row_stride;
  arguments.temperature = temperature;
  return arguments;
}

void add_ranges(RangeArguments& arguments, const Array<int32_t>& row_offsets, const Array<int32_t>& first,
                const Array<int32_t>& last) {
  check(row_offsets.ndim() == 1 && row_offsets.shape(0) == arguments.rows + 1, "row_offsets must be [rows + 1].");
  check(first.ndim() == 1 && last.ndim() == 1 && first.shape(0) == last.shape(0), "first and last must pair.");
  const int64_t count = first.shape(0);
  const int32_t* offsets = row_offsets.data();
  check(offsets[0] == 0 && offsets[arguments.rows] == count, "row_offsets must rise from 0 to the number of ranges.");
  for (int64_t row = 0; row < arguments.rows; ++row) {
    check(offsets[row] <= offsets[row + 1], "row_offsets must rise from 0 to the number of ranges.");
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = first.data()[i];
    const int64_t to = last.data()[i];
    check(from >= 0 && from <= arguments.vocab && to >= 0 && to <= arguments.vocab,
          "range " + std::to_string(i) + " is from " + std::to_string(from) + " to " + std::to_string(to) +
              ", outside the vocabulary of " + std::to_string(arguments.vocab) + ".");
  }
  arguments.row_offsets = offsets;
  arguments.first = first.data();
  arguments.last = last.data();
}

py::tuple run(const Logits& logits, double temperature, const std::optional<Array<int32_t>>& order,
              const Array<int32_t>& row_offsets, const Array<int32_t>& first, const Array<int32_t>& last,
              const std::optional<Array<float>>& log_sums, const std::optional<std::string>& level, int threads) {
  RangeArguments arguments = checked_logits(logits, temperature);
  const Kernels& kernels = kernels_named(level);
  add_ranges(arguments, row_offsets, first, last);
  if (order.has_value()) {
    check(order->ndim() == 1 && order->shape(0) == arguments.vocab, "order must be [vocab].");
    arguments.order = order->data();
  }
  if (log_sums.has_value()) {
    check(log_sums->ndim() == 1 && log_sums->shape(0) == arguments.rows, "log_sums must be [rows].");
    arguments.given_sums = log_sums->data();
  }
  check(threads >= 1 && threads <= 256, "threads must be from 1 to 256, got " + std::to_string(threads) + ".");
  py::array_t<float> found(first.shape(0));
  py::array_t<float> sums(arguments.rows);
  float* log_probs = found.mutable_data();
  float* row_sums = sums.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    const auto vocab = static_cast<uint32_t>(arguments.vocab);
    for (int64_t place = 0; arguments.order != nullptr && place < arguments.vocab; ++place) {
      check(static_cast<uint32_t>(arguments.order[place]) < vocab, "order must hold ids of the vocabulary.");
    }
    range_log_probs(arguments, log_probs, row_sums, kernels, threads);
  }
  return py::make_tuple(found, sums, kernels.name);
}

}  // namespace

void bind_range_lse(py::module_& module) {
  module.def("range_log_probs", &run, py::kw_only(), py::arg("logits"), py::arg("temperature"), py::arg("order"),
             py::arg("row_offsets"), py::arg("first"), py::arg("last"), py::arg("log_sums"), py::arg("level"),
             py::arg("threads"), "Log-probs of ranges; see shallowfusion.scorers.token_ranges, the only caller.");
}

}  // namespace shallowfusion

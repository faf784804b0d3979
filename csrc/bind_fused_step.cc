// Python's way into the fused step: every shape, dtype and range is checked here, then the GIL is released.
//
// Logits arrive as addresses, since numpy knows no bfloat16; everything else arrives as C-contiguous numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "fused_step.h"
#include "thread_pool.h"

namespace shallowfusion {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxTopK = int64_t{1} << 24;
constexpr int64_t kMaxVocab = int64_t{1} << 30;
constexpr int64_t kMaxRows = int64_t{1} << 24;
constexpr int kMaxThreads = 256;

// A macro, so that the message is put together only when it is needed: these checks run in every step.
#define REQUIRE(condition, message)                    \
  do {                                                 \
    if (!(condition)) throw py::value_error(message);  \
  } while (false)

template <class Value>
std::string text(const Value& value) {
  return std::to_string(value);
}

std::string joined(const std::vector<int64_t>& values) {
  std::string all;
  for (const int64_t value : values) all += (all.empty() ? "" : ", ") + text(value);
  return all;
}

// The data of an array with exactly this dtype and shape.
template <class T>
const T* data_of(const py::object& object, const char* array_name, const std::vector<int64_t>& shape) {
  const std::string name(array_name);
  REQUIRE((py::isinstance<py::array_t<T, py::array::c_style>>(object)),
          name + " must be a C-contiguous numpy array of " + std::string(py::str(py::dtype::of<T>())) + ".");
  const auto array = py::reinterpret_borrow<py::array>(object);
  const std::vector<int64_t> given(array.shape(), array.shape() + array.ndim());
  REQUIRE(given == shape, name + " must have shape [" + joined(shape) + "], got [" + joined(given) + "].");
  return static_cast<const T*>(array.data());
}

int threads_for(const std::optional<int>& threads, int64_t rows) {
  if (!threads.has_value()) return static_cast<int>(std::clamp<int64_t>(rows, 1, hardware_threads()));
  REQUIRE(*threads >= 1 && *threads <= kMaxThreads,
          "threads must be from 1 to " + text(kMaxThreads) + ", got " + text(*threads) + ".");
  return *threads;
}

// (address, dtype code, vocab, row stride, temperature, map or None, policy code, floor), in this order.
using SourceTuple = std::tuple<uint64_t, int, int64_t, int64_t, double, py::object, int, double>;

SourceView checked_view(const SourceTuple& given, int64_t rows, const std::string& name) {
  const auto& [address, dtype, vocab, row_stride, temperature, map, policy, floor] = given;
  (void)map;
  REQUIRE(dtype >= 0 && dtype <= 2, name + ": dtype code must be 0, 1 or 2, got " + text(dtype) + ".");
  REQUIRE(vocab >= 1 && vocab <= kMaxVocab, name + ": vocabulary must be from 1 to 2^30, got " + text(vocab) + ".");
  REQUIRE(row_stride <= int64_t{1} << 40 && (row_stride >= vocab || (rows <= 1 && row_stride >= 0)),
          name + ": row stride must be at least the vocabulary, got " + text(row_stride) + ".");
  const auto size = static_cast<uint64_t>(item_size(static_cast<Dtype>(dtype)));
  REQUIRE(address != 0 && address % size == 0, name + ": address must be aligned and not null.");
  REQUIRE(std::isfinite(temperature) && temperature > 0.0,
          name + ": temperature must be finite and > 0, got " + text(temperature) + ".");
  REQUIRE(policy >= 0 && policy <= 2, name + ": policy code must be 0, 1 or 2, got " + text(policy) + ".");
  REQUIRE(!std::isnan(floor) && floor < HUGE_VAL, name + ": floor must be a number below +inf.");
  SourceView view;
  view.logits = reinterpret_cast<const char*>(address);
  view.dtype = static_cast<Dtype>(dtype);
  view.vocab = vocab;
  view.row_stride = row_stride;
  view.temperature = temperature;
  view.policy = static_cast<Policy>(policy);
  view.floor = floor;
  return view;
}

void add_sources(StepArguments& arguments, const std::vector<SourceTuple>& sources) {
  REQUIRE(!sources.empty() && sources.size() <= kMaxSources,
          "sources must be 1 to " + text(kMaxSources) + ", got " + text(sources.size()) + ".");
  for (size_t index = 0; index < sources.size(); ++index) {
    const std::string name = "source " + text(index);
    SourceView view = checked_view(sources[index], arguments.rows, name);
    const py::object& map = std::get<5>(sources[index]);
    if (!map.is_none()) {
      const int64_t vocab = index == 0 ? view.vocab : arguments.vocab();
      view.map = data_of<int32_t>(map, (name + ": map").c_str(), {vocab});
      const auto [low, high] = std::minmax_element(view.map, view.map + vocab);
      REQUIRE(*low >= -1 && *high < view.vocab, name + ": map must hold -1 or ids below " + text(view.vocab) + ".");
    }
    arguments.sources.push_back(view);
  }
}

bool below_infinity(const float* values, int64_t count) {
  return std::all_of(values, values + count, [](float value) { return value < HUGE_VALF; });
}

void add_weights(StepArguments& arguments, const py::object& weights, const py::object& length_bonus) {
  const auto num_sources = static_cast<int64_t>(arguments.sources.size());
  arguments.weights = data_of<float>(weights, "weights", {arguments.rows, num_sources});
  arguments.length_bonus = data_of<float>(length_bonus, "length_bonus", {arguments.rows});
  const bool mixture = arguments.combine == Combine::mixture;
  for (int64_t at = 0; at < arguments.rows * num_sources; ++at) {
    const float weight = arguments.weights[at];
    REQUIRE(std::isfinite(weight) && (!mixture || weight >= 0.0f),
            std::string("weights must be finite") + (mixture ? " and >= 0 in a mixture" : "") + ", got " +
                text(weight) + ".");
  }
  REQUIRE(below_infinity(arguments.length_bonus, arguments.rows), "length_bonus must hold numbers below +inf.");
}

void add_biases(StepArguments& arguments, const Kernels& kernels, const py::object& token_bias,
                const py::object& allowed) {
  const int64_t vocab = arguments.vocab();
  if (!token_bias.is_none()) {
    arguments.token_bias = data_of<float>(token_bias, "token_bias", {vocab});
    REQUIRE(!kernels.any_broken[0](arguments.token_bias, vocab), "token_bias must hold numbers below +inf.");
  }
  if (!allowed.is_none()) {
    arguments.allowed_words = (vocab + 31) / 32;
    arguments.allowed = data_of<int32_t>(allowed, "allowed", {arguments.rows, arguments.allowed_words});
  }
}

using BonusTuple = std::tuple<py::object, py::object, py::object>;

void add_bonus(StepArguments& arguments, const BonusTuple& bonus) {
  const auto& [offsets, tokens, values] = bonus;
  REQUIRE(py::isinstance<py::array>(tokens), "bonus token_ids must be a numpy array.");
  const int64_t entries = py::reinterpret_borrow<py::array>(tokens).size();
  arguments.bonus_offsets = data_of<int32_t>(offsets, "bonus row_offsets", {arguments.rows + 1});
  arguments.bonus_tokens = data_of<int32_t>(tokens, "bonus token_ids", {entries});
  arguments.bonus_values = data_of<float>(values, "bonus values", {entries});
  const int32_t* from = arguments.bonus_offsets;
  REQUIRE(from[0] == 0 && from[arguments.rows] == entries && std::is_sorted(from, from + arguments.rows + 1),
          "bonus row_offsets must rise from 0 to the number of entries.");
  REQUIRE(below_infinity(arguments.bonus_values, entries), "bonus values must be numbers below +inf.");
  for (int64_t row = 0; row < arguments.rows; ++row) {
    std::vector<int32_t> row_tokens(arguments.bonus_tokens + from[row], arguments.bonus_tokens + from[row + 1]);
    if (row_tokens.empty()) continue;
    std::sort(row_tokens.begin(), row_tokens.end());
    REQUIRE(row_tokens.front() >= 0 && row_tokens.back() < arguments.vocab() &&
                std::adjacent_find(row_tokens.begin(), row_tokens.end()) == row_tokens.end(),
            "bonus token_ids must be acoustic ids, each at most once in a row.");
  }
}

int code_of(const std::string& value, const std::string& name, const std::vector<std::string>& codes) {
  const auto found = std::find(codes.begin(), codes.end(), value);
  std::string wanted;
  for (const std::string& code : codes) wanted += (wanted.empty() ? "'" : ", '") + code + "'";
  REQUIRE(found != codes.end(), name + " must be one of " + wanted + ", got '" + value + "'.");
  return static_cast<int>(found - codes.begin());
}

void add_sizes(StepArguments& arguments, const py::object& totals, int64_t beam_size, int64_t top_k, int64_t end_id) {
  const int64_t vocab = arguments.vocab();
  REQUIRE(beam_size >= 1 && arguments.rows % beam_size == 0,
          "beam_size must divide the number of rows, got " + text(beam_size) + " for " + text(arguments.rows) + ".");
  REQUIRE(top_k >= 1 && top_k <= kMaxTopK, "top_k must be from 1 to 2^24, got " + text(top_k) + ".");
  REQUIRE(end_id >= -1 && end_id < vocab, "end_id must be -1 or an acoustic id, got " + text(end_id) + ".");
  REQUIRE(end_id >= 0 || arguments.normalize != Normalize::end_factored, "end_factored needs an end_id.");
  arguments.totals = data_of<float>(totals, "totals", {arguments.rows});
  arguments.beam_size = beam_size;
  arguments.top_k = top_k;
  arguments.end_id = end_id;
}

int64_t rows_of(const py::object& totals) {
  REQUIRE(py::isinstance<py::array>(totals) && py::reinterpret_borrow<py::array>(totals).ndim() == 1,
          "totals must be a numpy array [rows].");
  const int64_t rows = py::reinterpret_borrow<py::array>(totals).shape(0);
  REQUIRE(rows <= kMaxRows, "rows must be at most 2^24.");
  return rows;
}

py::dict run(const StepArguments& arguments, const Kernels& kernels, int threads) {
  const int64_t utterances = arguments.rows / arguments.beam_size;
  const std::vector<int64_t> shape = {utterances, arguments.top_k};
  py::array_t<float> totals(shape);
  py::array_t<int64_t> parent_rows(shape);
  py::array_t<int64_t> token_ids(shape);
  py::array_t<float> parts({utterances, arguments.top_k, static_cast<int64_t>(arguments.sources.size())});
  py::array_t<bool> flags(arguments.rows);
  const StepOutput output{totals.mutable_data(), parent_rows.mutable_data(), token_ids.mutable_data(),
                          parts.mutable_data(), flags.mutable_data()};
  StepTrace trace;
  {
    const py::gil_scoped_release unlocked;
    trace = fused_step(arguments, output, kernels, threads);
  }
  py::dict found;
  found["totals"] = totals;
  found["parent_rows"] = parent_rows;
  found["token_ids"] = token_ids;
  found["parts"] = parts;
  found["flags"] = flags;
  found["level"] = kernels.name;
  found["one_pass_rows"] = trace.one_pass_rows;
  found["general_rows"] = trace.general_rows;
  found["split_rows"] = trace.split_rows;
  return found;
}

py::dict fused_step_bound(const std::vector<SourceTuple>& sources, const py::object& weights, const py::object& totals,
                          int64_t beam_size, int64_t top_k, int64_t end_id, const py::object& token_bias,
                          const py::object& allowed, const std::optional<BonusTuple>& bonus,
                          const py::object& length_bonus, const std::string& combine, const std::string& normalize,
                          const std::optional<std::string>& level, const std::optional<int>& threads) {
  StepArguments arguments;
  const Kernels& kernels = kernels_named(level);
  arguments.rows = rows_of(totals);
  arguments.combine = static_cast<Combine>(code_of(combine, "combine", {"log_linear", "mixture"}));
  arguments.normalize = static_cast<Normalize>(code_of(normalize, "normalize", {"none", "local", "end_factored"}));
  add_sources(arguments, sources);
  add_sizes(arguments, totals, beam_size, top_k, end_id);
  add_weights(arguments, weights, length_bonus);
  add_biases(arguments, kernels, token_bias, allowed);
  if (bonus.has_value()) add_bonus(arguments, *bonus);
  return run(arguments, kernels, threads_for(threads, arguments.rows));
}

py::dict row_statistics_bound(const SourceTuple& source, int64_t rows, const std::optional<std::string>& level,
                              const std::optional<int>& threads) {
  const Kernels& kernels = kernels_named(level);
  REQUIRE(rows >= 0 && rows <= kMaxRows, "rows must be from 0 to 2^24, got " + text(rows) + ".");
  const SourceView view = checked_view(source, rows, "source");
  const int num_threads = threads_for(threads, rows);
  py::array_t<float> log_sum_exp(rows);
  py::array_t<float> entropy(rows);
  py::array_t<float> max_log_prob(rows);
  py::array_t<float> margin(rows);
  const StatisticsOutput output{log_sum_exp.mutable_data(), entropy.mutable_data(), max_log_prob.mutable_data(),
                                margin.mutable_data()};
  {
    const py::gil_scoped_release unlocked;
    row_statistics(view, rows, output, kernels, num_threads);
  }
  py::dict found;
  found["log_sum_exp"] = log_sum_exp;
  found["entropy"] = entropy;
  found["max_log_prob"] = max_log_prob;
  found["margin"] = margin;
  found["level"] = kernels.name;
  return found;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace

void bind_fused_step(py::module_& module) {
  module.def("fused_step", &fused_step_bound, py::kw_only(), py::arg("sources"), py::arg("weights"),
             py::arg("totals"), py::arg("beam_size"), py::arg("top_k"), py::arg("end_id"), py::arg("token_bias"),
             py::arg("allowed"), py::arg("bonus"), py::arg("length_bonus"), py::arg("combine"), py::arg("normalize"),
             py::arg("level"), py::arg("threads"),
             "The fused step; see shallowfusion.fusion.native_step, the only caller.");
  module.def("row_statistics", &row_statistics_bound, py::kw_only(), py::arg("source"), py::arg("rows"),
             py::arg("level"), py::arg("threads"), "Statistics of each row of one source.");
  module.def("fused_step_levels", &levels, "SIMD levels this machine runs, slowest first.");
}

}  // namespace shallowfusion

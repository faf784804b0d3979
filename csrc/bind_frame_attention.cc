// Python's way into attention over frames: addresses and strides of torch tensors, which the face checks.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "bind_addresses.h"
#include "bindings.h"
#include "frame_attention.h"

namespace shallowfusion {
namespace {

namespace py = pybind11;

using Strides = std::array<int64_t, 3>;  // of utterances, positions and heads, in elements

void check_starts(const int64_t* starts, int64_t utterances, int64_t queries) {
  bool is_ascending = starts[0] == 0 && starts[utterances] == queries;
  for (int64_t u = 0; u < utterances; ++u) is_ascending = is_ascending && starts[u] <= starts[u + 1];
  check(is_ascending, "starts must ascend from 0 to the number of queries.");
}

void attend(uint64_t query, const Strides& query_strides, uint64_t keys, const Strides& key_strides, uint64_t values,
            const Strides& value_strides, int dtype, uint64_t output, uint64_t lengths,
            uint64_t starts, const std::array<int64_t, 6>& sizes, float scale, const std::optional<std::string>& level, int threads) {
  const auto [utterances, queries, heads, key_heads, frames, dim] = sizes;
  for (const int64_t size : sizes) check(size >= 1 && size <= kMostOfASize, "sizes must be from 1 to 2^31.");
  check(heads % key_heads == 0, "heads must be a multiple of key_heads.");
  check(dim % kMaxLanes == 0 && dim <= kMostDim, "dim must be a multiple of 16 up to 256.");
  check(dtype >= 0 && dtype <= 2, "dtype code must be 0, 1 or 2.");
  check_threads(threads);
  const auto kind = static_cast<Dtype>(dtype);
  const auto alignment = static_cast<uint64_t>(item_size(kind));
  FrameAttention call{};
  call.query = pointer<const float>(query, 4, "query");
  call.query_utterance_stride = query_strides[0];
  call.query_position_stride = query_strides[1];
  call.query_head_stride = query_strides[2];
  call.keys = {pointer<const char>(keys, alignment, "keys"), key_strides[0], key_strides[1], key_strides[2]};
  call.values = {pointer<const char>(values, alignment, "values"), value_strides[0], value_strides[1],
                 value_strides[2]};
  call.dtype = kind;
  call.output = pointer<float>(output, 4, "output");
  call.lengths = lengths == 0 ? nullptr : pointer<const int32_t>(lengths, 4, "lengths");
  call.starts = starts == 0 ? nullptr : pointer<const int64_t>(starts, 8, "starts");
  if (call.starts != nullptr) check_starts(call.starts, utterances, queries);
  call.utterances = utterances;
  call.queries = queries;
  call.heads = heads;
  call.key_heads = key_heads;
  call.frames = frames;
  call.dim = dim;
  call.scale = scale;
  const Kernels& kernels = kernels_named(level);
  const py::gil_scoped_release unlocked;
  frame_attention(call, kernels, threads);
}

}  // namespace

void bind_frame_attention(py::module_& module) {
  module.def("frame_attention", &attend, py::kw_only(), py::arg("query"), py::arg("query_strides"), py::arg("keys"),
             py::arg("key_strides"), py::arg("values"), py::arg("value_strides"), py::arg("dtype"), py::arg("output"),
             py::arg("lengths"), py::arg("starts"), py::arg("sizes"), py::arg("scale"), py::arg("level"),
             py::arg("threads"));
}

}  // namespace shallowfusion

// Random calls of attention over frames and of int8 and tile products: memory, threads and levels.
#include <algorithm>

#include "frame_attention.h"
#include "fuzz.h"
#include "int8_product.h"
#include "tile_product.h"

using namespace shallowfusion;

namespace fuzz {
namespace {

std::vector<float> random_floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  const bool is_wild = one_in(4);
  for (float& value : values) {
    value = static_cast<float>(is_wild && one_in(50) ? wild() : draw_between(-3.0, 3.0));
  }
  return values;
}

bool are_finite(const std::vector<float>& values) {
  for (const float value : values) {
    if (!std::isfinite(value) || std::abs(value) > 1e6F) return false;
  }
  return true;
}

bool are_near(const std::vector<float>& first, const std::vector<float>& second, float tolerance) {
  for (size_t at = 0; at < first.size(); ++at) {
    if (!(std::abs(first[at] - second[at]) <= tolerance * (1.0F + std::abs(first[at])))) return false;
  }
  return true;
}

}  // namespace

bool fuzz_attention() {
  const int64_t utterances = draw(1, 3), queries = draw(1, 7), key_heads = draw(1, 3), heads = key_heads * draw(1, 3);
  const int64_t frames = draw(1, 40), dim = kMaxLanes * draw(1, 5);
  const std::vector<float> query = random_floats(utterances * queries * heads * dim);
  const std::vector<float> keys = random_floats(utterances * frames * key_heads * dim);
  const std::vector<float> values = random_floats(utterances * frames * key_heads * dim);
  std::vector<int32_t> lengths(static_cast<size_t>(utterances));
  for (int32_t& length : lengths) length = draw(-1, static_cast<int>(frames) + 1);
  FrameAttention call{};
  call.query = query.data();
  call.query_utterance_stride = queries * heads * dim;
  call.query_position_stride = heads * dim;
  call.query_head_stride = dim;
  const bool by_head = one_in(2);
  const int64_t frame_stride = by_head ? dim : key_heads * dim, head_stride = by_head ? frames * dim : dim;
  call.keys = {reinterpret_cast<const char*>(keys.data()), frames * key_heads * dim, frame_stride, head_stride};
  call.values = {reinterpret_cast<const char*>(values.data()), frames * key_heads * dim, frame_stride, head_stride};
  call.dtype = Dtype::float32;
  call.lengths = one_in(2) ? lengths.data() : nullptr;
  std::vector<int64_t> starts(static_cast<size_t>(utterances) + 1);  // of as many queries as one utterance has else
  for (int64_t& start : starts) start = draw(0, static_cast<int>(queries));
  std::sort(starts.begin(), starts.end());
  starts.front() = 0;
  starts.back() = queries;
  if (one_in(2)) call.starts = starts.data();
  call.utterances = utterances;
  call.queries = queries;
  call.heads = heads;
  call.key_heads = key_heads;
  call.frames = frames;
  call.dim = dim;
  call.scale = 0.2F;
  std::vector<float> wanted(query.size());
  call.output = wanted.data();
  frame_attention(call, *available_kernels().front(), 1);
  const bool is_sane = are_finite(query) && are_finite(keys) && are_finite(values);
  for (const Kernels* kernels : available_kernels()) {
    std::vector<float> alone(query.size()), shared(query.size());
    call.output = alone.data();
    frame_attention(call, *kernels, 1);
    call.output = shared.data();
    frame_attention(call, *kernels, draw(2, 4));
    if (is_sane && alone != shared) return wrong("threads change the result of attention");
    if (is_sane && !are_near(alone, wanted, 1e-3F)) return wrong("levels of attention differ");
  }
  return true;
}

bool fuzz_int8() {
  const int64_t rows = one_in(4) ? draw(15, 120) : draw(1, 14), outputs = draw(1, 90);
  const int64_t inputs = one_in(2) ? 64 * draw(1, 3) : kInputsAtOnce * draw(1, 20);  // matrix units take the former
  std::vector<int8_t> weights(static_cast<size_t>(outputs * inputs));
  for (int8_t& weight : weights) weight = static_cast<int8_t>(draw(-128, 127));
  std::vector<uint8_t> packed(static_cast<size_t>(packed_int8_size(outputs, inputs)));
  pack_int8(weights.data(), outputs, inputs, packed.data());
  if (!has_int8_product()) return true;
  const std::vector<float> values = random_floats(rows * inputs), scales = random_floats(outputs);
  const std::vector<float> bias = random_floats(outputs);
  std::vector<float> alone(static_cast<size_t>(rows * outputs)), shared(alone.size());
  std::vector<uint16_t> half(alone.size());
  Int8Product call{reinterpret_cast<const char*>(values.data()), Dtype::float32, packed.data(), scales.data(),
                   one_in(2) ? bias.data() : nullptr, reinterpret_cast<char*>(alone.data()), Dtype::float32, rows,
                   inputs, outputs};
  int8_product(call, 1);
  call.output = reinterpret_cast<char*>(shared.data());
  int8_product(call, draw(2, 4));
  if (are_finite(values) && are_finite(scales) && are_finite(bias) && alone != shared) {
    return wrong("threads change an int8 product");
  }
  call.output = reinterpret_cast<char*>(half.data());
  call.output_dtype = Dtype::bfloat16;
  int8_product(call, 1);
  return true;
}

bool fuzz_tiles() {
  const int64_t rows = one_in(8) ? draw(190, 260) : draw(1, 60), inputs = draw(1, 100), outputs = draw(1, 90);
  const std::vector<float> weights = random_floats(outputs * inputs);
  std::vector<float> packed(static_cast<size_t>(packed_tiles_size(outputs, inputs)));
  pack_tiles(weights.data(), outputs, inputs, packed.data());
  if (!has_tile_product()) return true;
  const std::vector<float> values = random_floats(rows * inputs), bias = random_floats(outputs);
  std::vector<float> alone(static_cast<size_t>(rows * outputs)), shared(alone.size());
  TileProduct call{values.data(), packed.data(), one_in(2) ? bias.data() : nullptr, alone.data(), rows, inputs, outputs};
  tile_product(call, 1);
  call.output = shared.data();
  tile_product(call, draw(2, 4));
  if (!are_finite(values) || !are_finite(weights) || !are_finite(bias)) return true;
  if (alone != shared) return wrong("threads change a tile product");
  const int64_t row = draw(0, static_cast<int>(rows) - 1), output = draw(0, static_cast<int>(outputs) - 1);
  double sum = call.bias == nullptr ? 0.0 : bias[static_cast<size_t>(output)], size = std::abs(sum);
  for (int64_t input = 0; input < inputs; ++input) {
    const double term = static_cast<double>(values[static_cast<size_t>(row * inputs + input)]) *
                        weights[static_cast<size_t>(output * inputs + input)];
    sum += term;
    size += std::abs(term);
  }
  const double found = alone[static_cast<size_t>(row * outputs + output)];
  return std::abs(found - sum) <= 1e-6 * size + 1e-30 || wrong("a tile product is not the product");
}

}  // namespace fuzz

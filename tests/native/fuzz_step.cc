// The fused step and its neighbours on arrays without room to spare: every level, odd shapes, numbers no model should say.
#include <algorithm>
#include <cstring>

#include "fused_step.h"
#include "fuzz.h"
#include "range_lse.h"
#include "row_rounding.h"

namespace fuzz {
namespace {

using namespace shallowfusion;

// Logits of one source with some stride; nothing lies behind the last row.
struct Logits {
  std::vector<uint16_t> halves;
  std::vector<float> floats;
  Dtype dtype;
  int64_t stride;

  Logits(int64_t rows, int64_t vocab, bool spoil) : dtype(static_cast<Dtype>(draw(0, 2))), stride(vocab + draw(0, 3)) {
    const auto size = static_cast<size_t>(rows == 0 ? 0 : (rows - 1) * stride + vocab);
    std::vector<float> values(size);
    const double spread = pick(std::vector<double>{0.0, 1.0, 10.0, 300.0});
    const double middle = one_in(6) ? draw_between(-30000.0, 30000.0) : 0.0;
    const bool coarse = one_in(3);  // ties
    for (float& value : values) {
      const double drawn = middle + draw_between(-spread, spread);
      value = static_cast<float>(coarse ? std::floor(drawn) : drawn);
      if (one_in(50)) value = -kInfinity;
      if (spoil && one_in(200)) value = static_cast<float>(wild());
    }
    if (one_in(6)) std::fill_n(values.begin(), std::min<size_t>(size, static_cast<size_t>(vocab)), -kInfinity);
    if (dtype == Dtype::float32) {
      floats = values;
    } else {
      halves.resize(size);
      for (size_t i = 0; i < size; ++i) halves[i] = rounded(values[i]);
    }
  }

  const char* data() const {
    return floats.empty() ? reinterpret_cast<const char*>(halves.data()) : reinterpret_cast<const char*>(floats.data());
  }

 private:
  // Near enough: any bits will do.
  uint16_t rounded(float value) const {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (dtype == Dtype::bfloat16) return static_cast<uint16_t>(bits >> 16);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 65504.0F) return static_cast<uint16_t>(sign | (std::isinf(value) ? 0x7c00u : 0x7bffu));
    if (magnitude < 0x1p-14F) return static_cast<uint16_t>(sign);
    return static_cast<uint16_t>(sign | (((bits & 0x7fffffffu) - 0x38000000u) >> 13));
  }
};

int random_vocab() {
  static const std::vector<int> sizes{1, 2, 7, 15, 16, 17, 31, 33, 255, 256, 257, 1023, 1024, 1025, 2049, 4099};
  return one_in(2) ? pick(sizes) : draw(1, 600);
}

struct Request {
  std::vector<Logits> logits;
  std::vector<std::vector<int32_t>> maps;
  std::vector<float> weights, totals, length_bonus, token_bias, bonus_values;
  std::vector<int32_t> allowed, bonus_offsets, bonus_tokens;
  StepArguments arguments;

  explicit Request(bool spoil) {
    const int64_t vocab = random_vocab();
    arguments.beam_size = draw(1, 4);
    arguments.rows = arguments.beam_size * draw(0, 3);
    arguments.top_k = one_in(5) ? draw(1, 3000) : draw(1, 9);
    arguments.end_id = draw(-1, static_cast<int>(vocab) - 1);
    arguments.combine = static_cast<Combine>(draw(0, 1));
    arguments.normalize = static_cast<Normalize>(draw(0, arguments.end_id >= 0 ? 2 : 1));
    const int num_sources = one_in(5) ? draw(1, kMaxSources) : draw(1, 3);
    maps.resize(static_cast<size_t>(num_sources));
    for (int source = 0; source < num_sources; ++source) add_source(source, vocab, spoil);
    const auto number = [&](double low, double high) { return static_cast<float>(draw_between(low, high)); };
    for (int64_t i = 0; i < arguments.rows * num_sources; ++i) {
      const double lowest = arguments.combine == Combine::mixture ? 0.0 : -1.0;
      weights.push_back(one_in(5) ? 0.0F : one_in(4) ? 1.0F : number(lowest, 2.0));
    }
    for (int64_t row = 0; row < arguments.rows; ++row) {
      totals.push_back(one_in(9) ? -kInfinity : spoil && one_in(20) ? NAN : number(-50.0, 0.0));
      length_bonus.push_back(one_in(9) ? -kInfinity : number(-1.0, 1.0));
    }
    arguments.weights = weights.data();
    arguments.totals = totals.data();
    arguments.length_bonus = length_bonus.data();
    add_biases(vocab);
  }

  void add_source(int source, int64_t vocab, bool spoil) {
    SourceView view;
    view.vocab = source == 0 ? vocab : one_in(2) ? vocab : random_vocab();
    logits.emplace_back(arguments.rows, view.vocab, spoil);
    view.logits = logits.back().data();
    view.dtype = logits.back().dtype;
    view.row_stride = logits.back().stride;
    view.temperature = one_in(3) ? draw_between(0.05, 5.0) : 1.0;
    view.policy = static_cast<Policy>(draw(0, 2));
    view.floor = one_in(5) ? -kInfinity : draw_between(-30.0, 0.0);
    if (one_in(4)) {
      std::vector<int32_t>& map = maps[static_cast<size_t>(source)];
      for (int64_t token = 0; token < vocab; ++token) map.push_back(draw(-1, static_cast<int>(view.vocab) - 1));
      view.map = map.data();
    }
    arguments.sources.push_back(view);
  }

  void add_biases(int64_t vocab) {
    if (one_in(3)) {
      token_bias.resize(static_cast<size_t>(vocab));
      for (float& bias : token_bias) bias = one_in(4) ? static_cast<float>(draw_between(-9.0, 9.0)) : one_in(9) ? -kInfinity : 0.0F;
      arguments.token_bias = token_bias.data();
    }
    if (one_in(3)) {
      arguments.allowed_words = (vocab + 31) / 32;
      allowed.resize(static_cast<size_t>(arguments.rows * arguments.allowed_words));
      for (int32_t& word : allowed) word = one_in(3) ? -1 : one_in(2) ? 0 : draw(INT32_MIN, INT32_MAX);
      arguments.allowed = allowed.data();
    }
    if (one_in(3)) {
      bonus_offsets.push_back(0);
      for (int64_t row = 0; row < arguments.rows; ++row) {
        for (int token = draw(0, 9); token < vocab; token += draw(1, 60)) {
          bonus_tokens.push_back(token);
          bonus_values.push_back(one_in(9) ? -kInfinity : static_cast<float>(draw_between(-5.0, 5.0)));
        }
        bonus_offsets.push_back(static_cast<int32_t>(bonus_tokens.size()));
      }
      arguments.bonus_offsets = bonus_offsets.data();
      arguments.bonus_tokens = bonus_tokens.data();
      arguments.bonus_values = bonus_values.data();
    }
  }
};

struct Answer {
  std::vector<float> totals, parts;
  std::vector<int64_t> parent_rows, token_ids;
  std::unique_ptr<bool[]> flags;
  int64_t rows;

  Answer(const StepArguments& arguments, const Kernels& kernels, int threads) : rows(arguments.rows) {
    const auto size = static_cast<size_t>(arguments.rows / arguments.beam_size * arguments.top_k);
    totals.resize(size);
    parent_rows.resize(size);
    token_ids.resize(size);
    parts.resize(size * arguments.sources.size());
    flags = std::make_unique<bool[]>(static_cast<size_t>(rows));
    fused_step(arguments, {totals.data(), parent_rows.data(), token_ids.data(), parts.data(), flags.get()}, kernels, threads);
  }

  bool is_same(const Answer& other) const {
    return totals == other.totals && parent_rows == other.parent_rows && token_ids == other.token_ids &&
           (parts.empty() || std::memcmp(parts.data(), other.parts.data(), parts.size() * sizeof(float)) == 0) &&
           std::equal(flags.get(), flags.get() + rows, other.flags.get());
  }
};

bool is_sound(const StepArguments& arguments, const Answer& answer) {
  for (size_t at = 0; at < answer.totals.size(); ++at) {
    const auto utterance = static_cast<int64_t>(at) / arguments.top_k;
    const int64_t row = answer.parent_rows[at], token = answer.token_ids[at];
    if (!(answer.totals[at] > -kInfinity)) {
      if (answer.totals[at] != -kInfinity || row != -1 || token != -1) return wrong("an empty place is not empty");
      continue;
    }
    if (row / arguments.beam_size != utterance || token < 0 || token >= arguments.vocab()) return wrong("out of range");
    if (answer.flags[row] || !arguments.allows(row, token)) return wrong("a token that may not be was chosen");
    const bool is_first = static_cast<int64_t>(at) % arguments.top_k == 0;
    if (!is_first && answer.totals[at] > answer.totals[at - 1]) return wrong("candidates are not in order");
  }
  return true;
}

}  // namespace

bool fuzz_step() {
  const Request request(one_in(3));
  std::vector<std::vector<float>> best;
  for (const Kernels* kernels : available_kernels()) {
    const Answer alone(request.arguments, *kernels, 1);
    const Answer shared(request.arguments, *kernels, draw(2, 6));
    if (!alone.is_same(shared)) return wrong("threads change the result");
    if (!is_sound(request.arguments, alone)) return false;
    best.push_back(alone.totals);
  }
  for (const auto& totals : best) {
    for (size_t at = 0; at < totals.size(); ++at) {
      const float one = totals[at], other = best[0][at];
      const float apart = one == other ? 0.0F : std::fabs(one - other);
      if (!(apart <= 1e-3F + 1e-4F * std::fabs(other))) return wrong("levels differ");
    }
  }
  return true;
}

bool fuzz_statistics() {
  const int64_t rows = draw(0, 5), vocab = random_vocab();
  const Logits logits(rows, vocab, one_in(2));
  SourceView view;
  view.logits = logits.data();
  view.dtype = logits.dtype;
  view.vocab = vocab;
  view.row_stride = logits.stride;
  view.temperature = one_in(2) ? draw_between(0.05, 5.0) : 1.0;
  for (const Kernels* kernels : available_kernels()) {
    const auto size = static_cast<size_t>(rows);
    std::vector<float> sums(size), entropies(size), best(size), margins(size);
    row_statistics(view, rows, {sums.data(), entropies.data(), best.data(), margins.data()}, *kernels, draw(1, 4));
    for (size_t row = 0; row < size; ++row) {
      if (std::isnan(sums[row])) continue;
      if (!(entropies[row] >= 0.0F) || best[row] > 1e-3F || margins[row] < 0.0F) return wrong("no statistics of a softmax");
    }
  }
  return true;
}

bool fuzz_ranges() {
  const int64_t rows = draw(0, 4), vocab = random_vocab();
  const Logits logits(rows, vocab, one_in(3));
  std::vector<int32_t> offsets{0}, first, last, order(static_cast<size_t>(vocab));
  for (int64_t row = 0; row < rows; ++row) {
    for (int count = draw(0, one_in(4) ? 200 : 4); count > 0; --count) {
      first.push_back(draw(0, static_cast<int>(vocab)));
      last.push_back(draw(0, static_cast<int>(vocab)));  // may lie before the first
    }
    offsets.push_back(static_cast<int32_t>(first.size()));
  }
  for (int32_t& id : order) id = draw(0, static_cast<int>(vocab) - 1);
  std::vector<float> given(static_cast<size_t>(rows));
  for (float& sum : given) sum = static_cast<float>(draw_between(0.0, 9.0));
  RangeArguments arguments;
  arguments.logits = logits.data();
  arguments.dtype = logits.dtype;
  arguments.rows = rows;
  arguments.vocab = vocab;
  arguments.row_stride = logits.stride;
  arguments.temperature = one_in(2) ? draw_between(0.05, 5.0) : 1.0;
  arguments.order = one_in(2) ? order.data() : nullptr;
  arguments.row_offsets = offsets.data();
  arguments.first = first.data();
  arguments.last = last.data();
  arguments.given_sums = one_in(3) ? given.data() : nullptr;
  for (const Kernels* kernels : available_kernels()) {
    std::vector<float> log_probs(first.size()), log_sums(static_cast<size_t>(rows));
    range_log_probs(arguments, log_probs.data(), log_sums.data(), *kernels, draw(1, 4));
    for (size_t i = 0; i < first.size(); ++i) {
      // An empty range is impossible; a row that holds NaN tells nothing of anything.
      if (first[i] >= last[i] && log_probs[i] != -kInfinity && !std::isnan(log_probs[i])) return wrong("nothing is likely");
    }
  }
  return true;
}

bool fuzz_rounding() {
  const int64_t rows = draw(0, 5), columns = draw(0, 70);
  Logits values(rows, std::max<int64_t>(columns, 1), one_in(2));
  const Dtype dtype = values.dtype == Dtype::float32 ? Dtype::float32 : Dtype::bfloat16;
  const auto size = static_cast<size_t>(rows * columns);
  std::vector<int8_t> whole(size);
  std::vector<float> scales(static_cast<size_t>(rows)), bias(static_cast<size_t>(columns), 0.5F), product(size, 3.0F);
  round_rows(values.data(), dtype, rows, columns, whole.data(), scales.data(), draw(1, 4));
  for (int64_t at = 0; at < rows * columns; ++at) {
    if (std::isfinite(scales[at / columns]) && whole[at] == -128) return wrong("a number is past -127");
  }
  std::vector<char> output(size * static_cast<size_t>(item_size(dtype)));
  scale_rows(product.data(), scales.data(), one_in(2) ? bias.data() : nullptr, rows, columns, output.data(), dtype, draw(1, 4));
  return true;
}

}  // namespace fuzz

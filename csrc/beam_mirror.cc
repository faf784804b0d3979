#include "beam_mirror.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "divergence_error.h"

namespace shallowfusion {
namespace {

constexpr int64_t kHeaderWords = 8;  // clock, status, hash low and high, length, and three spare
constexpr int32_t kActive = 1;
constexpr int32_t kDone = 2;
constexpr int32_t kFlagged = 4;

constexpr uint64_t kStride = 0x1E3779B97F4A7C15;
constexpr uint64_t kChain = 0x5851F42D4C957F2D;
constexpr uint64_t kFirstFactor = 0x3F58476D1CE4E5B9;
constexpr uint64_t kSecondFactor = 0x14D049BB133111EB;

// A word of which every bit depends on every bit of `word`.
uint64_t mixed(uint64_t word) {
  word ^= word >> 33;
  word *= kFirstFactor;
  word ^= word >> 29;
  word *= kSecondFactor;
  return word ^ (word >> 32);
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[noreturn]] void diverge(int64_t utterance, int64_t step, const std::string& how) {
  throw DivergenceError("utterance " + std::to_string(utterance) + ", step " + std::to_string(step) + ": " + how +
                        "; decode with driver='host' and report this.");
}

}  // namespace

BeamMirror::BeamMirror(BeamRules rules, int64_t num_utterances, int64_t num_candidates, int64_t num_parts)
    : beams_(std::move(rules), num_utterances, num_parts), num_candidates_(num_candidates), num_parts_(num_parts) {
  if (num_candidates < 1) throw std::invalid_argument("num_candidates must be at least 1.");
  hashes_.assign(num_utterances, 0);
  saw_nan_.assign(num_utterances, 0);
  cut_short_.assign(num_utterances, 0);
}

int64_t BeamMirror::record_words() const { return kHeaderWords + num_candidates_ * (3 + num_parts_); }

void BeamMirror::replay(const int32_t* entry, int64_t num_records, int64_t num_words) {
  if (num_words != record_words() || num_records < num_utterances()) {
    throw std::invalid_argument("a ring entry must hold at least " + std::to_string(num_utterances()) + " records of " +
                                std::to_string(record_words()) + " words, got " + std::to_string(num_records) +
                                " of " + std::to_string(num_words) + ".");
  }
  active_.clear();
  totals_.clear();
  parents_.clear();
  tokens_.clear();
  parts_.clear();
  for (int64_t utterance = 0; utterance < num_records; ++utterance) {  // everything is checked before anything changes
    const int32_t* record = entry + utterance * num_words;
    if (record[0] != num_steps_) {
      diverge(utterance, num_steps_, "the ring holds step " + std::to_string(record[0]) + " in its place");
    }
    const bool is_active = (record[1] & kActive) != 0;
    if (utterance >= num_utterances()) {
      if (is_active) diverge(utterance, num_steps_, "an utterance that is none was searched");
      continue;
    }
    if (cut_short_[utterance]) continue;
    if (is_active == beams_.is_done(utterance)) {
      diverge(utterance, num_steps_, is_active ? "the device goes on with a search that is done"
                                               : "the device stopped a search that is not done");
    }
    if (is_active) gather(record, utterance);
  }
  const auto lanes = static_cast<int64_t>(active_.size()) * beams_.beam_size();
  new_tokens_.resize(lanes);
  new_parents_.resize(lanes);
  new_totals_.resize(lanes);
  done_.resize(active_.size());
  const BeamInput input{static_cast<int64_t>(active_.size()), num_candidates_, active_.data(), totals_.data(),
                        parents_.data(), tokens_.data(), parts_.data()};
  static_assert(sizeof(bool) == sizeof(uint8_t));
  beams_.advance(input, {new_tokens_.data(), new_parents_.data(), new_totals_.data(),
                         reinterpret_cast<bool*>(done_.data())});
  const int64_t step = num_steps_++;
  for (size_t row = 0; row < active_.size(); ++row) {
    const int64_t utterance = active_[row];
    const int32_t* record = entry + utterance * num_words;
    if ((record[1] & kFlagged) != 0) saw_nan_[utterance] = 1;
    if (((record[1] & kDone) != 0) != (done_[row] != 0)) {
      diverge(utterance, step, done_[row] ? "the device goes on where its stop rule ends" : "the device stopped early");
    }
    verify(record, utterance, static_cast<int64_t>(row));
  }
}

// Appends the candidates of one record.
void BeamMirror::gather(const int32_t* record, int64_t utterance) {
  active_.push_back(utterance);
  const int32_t* body = record + kHeaderWords;
  const auto first = totals_.size();
  totals_.resize(first + num_candidates_);
  std::memcpy(totals_.data() + first, body, num_candidates_ * sizeof(float));
  parents_.insert(parents_.end(), body + num_candidates_, body + 2 * num_candidates_);
  tokens_.insert(tokens_.end(), body + 2 * num_candidates_, body + 3 * num_candidates_);
  if (num_parts_ == 0) return;
  const auto first_part = parts_.size();
  parts_.resize(first_part + num_candidates_ * num_parts_);
  std::memcpy(parts_.data() + first_part, body + 3 * num_candidates_, num_candidates_ * num_parts_ * sizeof(float));
}

// Compares the hash of what the host decided with the device's.
void BeamMirror::verify(const int32_t* record, int64_t utterance, int64_t row) {
  uint64_t words = 0;
  for (int64_t lane = 0; lane < beams_.beam_size(); ++lane) {
    const int64_t at = row * beams_.beam_size() + lane;
    const uint64_t word = (static_cast<uint64_t>(new_tokens_[at]) << 32) | bits_of(new_totals_[at]);
    words += mixed(word + static_cast<uint64_t>(lane * 1024 + new_parents_[at] + 1) * kStride);
  }
  const int64_t length = record[4];
  const auto state = static_cast<uint64_t>(length * 8 + record[1]);
  hashes_[utterance] = mixed(hashes_[utterance] * kChain + words + state);
  const uint64_t theirs = static_cast<uint32_t>(record[2]) | (static_cast<uint64_t>(static_cast<uint32_t>(record[3])) << 32);
  if (hashes_[utterance] != theirs) diverge(utterance, num_steps_ - 1, "the device chose other lanes");
}

void BeamMirror::force_finish(int64_t utterance) {
  check_utterance(utterance);
  if (!beams_.is_done(utterance)) cut_short_[utterance] = 1;
  beams_.force_finish(utterance);
}

bool BeamMirror::saw_nan(int64_t utterance) const {
  check_utterance(utterance);
  return saw_nan_[utterance] != 0;
}

uint64_t BeamMirror::hash(int64_t utterance) const {
  check_utterance(utterance);
  return hashes_[utterance];
}

void BeamMirror::check_utterance(int64_t utterance) const {
  if (utterance < 0 || utterance >= num_utterances()) {
    throw std::invalid_argument("utterance must be from 0 to " + std::to_string(num_utterances() - 1) + ", got " +
                                std::to_string(utterance) + ".");
  }
}

}  // namespace shallowfusion

// Replays on the host what a device-driven beam search decided, from the records it left in its ring. The records are
// described in kernels/beam_advance_arrays.py; the Python twin is shallowfusion/search/beam_mirror_reference.py.
#pragma once

#include <cstdint>
#include <vector>

#include "beam_state.h"

namespace shallowfusion {

// Not thread-safe: one call at a time.
class BeamMirror {
 public:
  BeamMirror(BeamRules rules, int64_t num_utterances, int64_t num_candidates, int64_t num_parts);

  // One ring entry [utterances, record words]; those beyond num_utterances must be idle.
  void replay(const int32_t* entry, int64_t num_records, int64_t num_words);
  void force_finish(int64_t utterance);

  BeamState& beams() { return beams_; }
  const BeamState& beams() const { return beams_; }
  bool saw_nan(int64_t utterance) const;
  uint64_t hash(int64_t utterance) const;
  int64_t num_steps() const { return num_steps_; }
  int64_t record_words() const;
  int64_t num_utterances() const { return static_cast<int64_t>(hashes_.size()); }

 private:
  void gather(const int32_t* record, int64_t utterance);
  void verify(const int32_t* record, int64_t utterance, int64_t row);
  void check_utterance(int64_t utterance) const;

  BeamState beams_;
  int64_t num_candidates_;
  int64_t num_parts_;
  std::vector<uint64_t> hashes_;
  std::vector<uint8_t> saw_nan_;
  std::vector<uint8_t> cut_short_;  // by force_finish: what the device says from then on does not count
  int64_t num_steps_ = 0;

  // Scratch of one `replay`, kept to save allocations.
  std::vector<int64_t> active_;
  std::vector<float> totals_;
  std::vector<int64_t> parents_;
  std::vector<int64_t> tokens_;
  std::vector<float> parts_;
  std::vector<int64_t> new_tokens_;
  std::vector<int64_t> new_parents_;
  std::vector<float> new_totals_;
  std::vector<uint8_t> done_;
};

}  // namespace shallowfusion

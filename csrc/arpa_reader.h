// Fast reading of ARPA files that are as they should be; described in shallowfusion/ngrams/arpa.py.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace shallowfusion {

struct ArpaOrder {
  std::vector<int32_t> words;    // [ngrams, order]
  std::vector<float> log_probs;  // nats
  std::vector<float> back_offs;
};

struct ArpaContent {
  std::vector<std::string_view> words;  // into the text
  std::vector<ArpaOrder> orders;
};

// Reads a whole file. Returns false at anything unusual, right or wrong: the reader in Python, which knows every right
// form and words every error, then has to look at the file.
bool read_arpa(std::string_view text, ArpaContent* content);

}  // namespace shallowfusion

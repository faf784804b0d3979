// What a search of words asks of a language model. Price of a look-up: see what implements it.
#pragma once

#include <cstdint>

namespace shallowfusion {

class WordTable {
 public:
  virtual ~WordTable() = default;

  // Log-prob of `word` after `state`, nats; writes the state after it.
  virtual float score(uint32_t state, uint32_t word, uint32_t* next_state) const = 0;
  virtual float end(uint32_t state) const = 0;  // of the end of the sentence
  virtual uint32_t unknown_word() const = 0;
  virtual uint32_t num_words() const = 0;
  virtual uint32_t num_states() const = 0;  // states are below this
};

}  // namespace shallowfusion

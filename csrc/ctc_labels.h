// The labels of a CTC alphabet as the search in C++ knows them.
#pragma once

#include <cstdint>
#include <string>

namespace shallowfusion {

struct CtcLabel {
  std::string text;
  bool begins_word;  // closes the word before it
  bool ends_word;    // the next label begins a word whatever it is
  uint32_t language_word;
};

}  // namespace shallowfusion

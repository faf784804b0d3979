// Thrown when the device decided otherwise than the host's replay of the same candidates.
#pragma once

#include <stdexcept>
#include <string>

namespace shallowfusion {

class DivergenceError : public std::runtime_error {
 public:
  explicit DivergenceError(const std::string& message) : std::runtime_error(message) {}
};

}  // namespace shallowfusion

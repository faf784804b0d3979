// Thrown when a fixed-size resource is exhausted; Python sees shallowfusion.errors.CapacityError.
#pragma once

#include <stdexcept>

namespace shallowfusion {

class CapacityError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace shallowfusion

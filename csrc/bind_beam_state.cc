#include "bindings.h"

namespace shallowfusion {

void bind_beam_state(pybind11::module_& module) { (void)module; }

}  // namespace shallowfusion

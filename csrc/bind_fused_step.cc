#include "bindings.h"

namespace shallowfusion {

void bind_fused_step(pybind11::module_& module) { (void)module; }

}  // namespace shallowfusion

#include "bindings.h"

namespace shallowfusion {

void bind_page_pool(pybind11::module_& module) { (void)module; }

}  // namespace shallowfusion

#include "bindings.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ core of shallowfusion: CPU fused step, beam state, page pool.";
  shallowfusion::bind_errors(module);
  shallowfusion::bind_fused_step(module);
  shallowfusion::bind_beam_state(module);
  shallowfusion::bind_page_pool(module);
}

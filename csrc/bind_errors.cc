#include <exception>
#include <stdexcept>

#include "bindings.h"
#include "capacity_error.h"
#include "divergence_error.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

void raise_ours(const char* name, const std::exception& error) {
  // Looked up when raised: errors are rare, and a stored Python object would outlive the interpreter.
  PyErr_SetString(py::module_::import("shallowfusion.errors").attr(name).ptr(), error.what());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const std::invalid_argument& error) {
    raise_ours("InvalidArgumentError", error);
  } catch (const CapacityError& error) {
    raise_ours("CapacityError", error);
  } catch (const DivergenceError& error) {
    raise_ours("DivergenceError", error);
  }
}

}  // namespace

// Every std::invalid_argument, CapacityError and DivergenceError that leaves this module becomes one of our own errors.
void bind_errors(py::module_&) { py::register_local_exception_translator(&translate); }

}  // namespace shallowfusion

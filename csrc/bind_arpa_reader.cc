#include <pybind11/numpy.h>

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "arpa_reader.h"
#include "bindings.h"

namespace py = pybind11;

namespace shallowfusion {
namespace {

template <typename T>
py::array_t<T> owned(std::vector<T>&& values) {
  auto* kept = new std::vector<T>(std::move(values));
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>({static_cast<py::ssize_t>(kept->size())}, kept->data(), owner);
}

// (spellings, per order (words [ngrams * order], log-probs, back-offs)), or None for the reader in Python.
py::object read(const py::bytes& text) {
  const std::string_view view = text;
  ArpaContent content;
  bool is_read;
  {
    const py::gil_scoped_release released;
    is_read = read_arpa(view, &content);
  }
  if (!is_read) return py::none();
  py::list words;
  for (const std::string_view word : content.words) words.append(py::bytes(word.data(), word.size()));
  py::list orders;
  for (ArpaOrder& order : content.orders) {
    orders.append(py::make_tuple(owned(std::move(order.words)), owned(std::move(order.log_probs)),
                                 owned(std::move(order.back_offs))));
  }
  return py::make_tuple(words, orders);
}

}  // namespace

void bind_arpa_reader(py::module_& module) { module.def("read_arpa", &read, py::kw_only(), py::arg("text")); }

}  // namespace shallowfusion

// What each bind_<class>.cc adds to the module; only these files see pybind11.
#pragma once

#include <pybind11/pybind11.h>

namespace shallowfusion {

void bind_errors(pybind11::module_& module);
void bind_fused_step(pybind11::module_& module);
void bind_beam_state(pybind11::module_& module);
void bind_beam_mirror(pybind11::module_& module);
void bind_page_pool(pybind11::module_& module);
void bind_arpa_reader(pybind11::module_& module);
void bind_word_table(pybind11::module_& module);  // before the tables
void bind_ngram_table(pybind11::module_& module);
void bind_ctc_search(pybind11::module_& module);
void bind_ctc_prefix_scores(pybind11::module_& module);
void bind_phrase_automaton(pybind11::module_& module);
void bind_range_lse(pybind11::module_& module);
void bind_row_rounding(pybind11::module_& module);
void bind_frame_attention(pybind11::module_& module);
void bind_int8_product(pybind11::module_& module);
void bind_tile_product(pybind11::module_& module);
void bind_lexicon_search(pybind11::module_& module);

}  // namespace shallowfusion

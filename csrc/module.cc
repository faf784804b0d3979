#include "bindings.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ core of shallowfusion: CPU fused step, beam state, page pool, n-grams, phrases, CTC search.";
  shallowfusion::bind_errors(module);
  shallowfusion::bind_fused_step(module);
  shallowfusion::bind_beam_state(module);
  shallowfusion::bind_beam_mirror(module);
  shallowfusion::bind_page_pool(module);
  shallowfusion::bind_arpa_reader(module);
  shallowfusion::bind_word_table(module);
  shallowfusion::bind_ngram_table(module);
  shallowfusion::bind_ctc_search(module);
  shallowfusion::bind_ctc_prefix_scores(module);
  shallowfusion::bind_phrase_automaton(module);
  shallowfusion::bind_range_lse(module);
  shallowfusion::bind_row_rounding(module);
  shallowfusion::bind_frame_attention(module);
  shallowfusion::bind_int8_product(module);
  shallowfusion::bind_tile_product(module);
  shallowfusion::bind_lexicon_search(module);
}

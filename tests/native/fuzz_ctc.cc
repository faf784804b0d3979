// CTC searches of random shapes, labels, rules and scores; prefix scores; and the search with a lexicon of spellings.
#include <algorithm>
#include <string>

#include "ctc_prefix_scores.h"
#include "ctc_search.h"
#include "fuzz.h"
#include "lexicon_search.h"

namespace fuzz {
namespace {

using namespace shallowfusion;

// Log-softmaxes of random numbers; `spoil` puts what no model should say among them.
std::vector<float> random_log_probs(int64_t frames, int64_t labels, bool spoil) {
  std::vector<float> values(static_cast<size_t>(frames * labels));
  const double sharpness = draw_between(0.0, 12.0);
  for (int64_t frame = 0; frame < frames; ++frame) {
    float* row = values.data() + frame * labels;
    double sum = 0.0;
    for (int64_t label = 0; label < labels; ++label) {
      row[label] = static_cast<float>(draw_between(-sharpness, sharpness));
      if (label > 0 && one_in(8)) row[label] = one_in(2) ? -kInfinity : -5000.0F;
      sum += std::exp(static_cast<double>(row[label]));
    }
    for (int64_t label = 0; label < labels; ++label) row[label] -= static_cast<float>(std::log(sum));
    if (spoil && one_in(5)) row[draw(0, static_cast<int>(labels) - 1)] = static_cast<float>(wild());
    if (spoil && one_in(20)) std::fill_n(row, labels, -kInfinity);
  }
  return values;
}

std::string random_text() {
  static const std::vector<std::string> texts{"", "a", "b", "ab", "abc", "'", " ", "\xc3\xa4", "\xc3", "\xff", std::string(1, '\0')};
  return pick(texts);
}

std::shared_ptr<CtcLexicon> random_lexicon(int num_words) {
  std::vector<std::string> spellings;
  for (int count = draw(0, 12); count > 0; --count) {
    std::string spelling;
    while (spelling.empty() || one_in(2)) spelling += random_text();
    spellings.push_back(spelling);
  }
  std::sort(spellings.begin(), spellings.end());
  spellings.erase(std::unique(spellings.begin(), spellings.end()), spellings.end());
  std::vector<LexiconWord> words;
  for (const std::string& spelling : spellings) {
    words.push_back({spelling, static_cast<uint32_t>(draw(0, num_words - 1)),
                     static_cast<uint32_t>(draw(0, 7))});
  }
  return std::make_shared<CtcLexicon>(std::move(words));
}

CtcLanguage random_language(int num_words, bool is_wild) {
  const auto number = [&](double scale) { return is_wild && one_in(4) ? wild() : draw_between(-0.2, 1.0) * scale; };
  CtcLanguage language;
  if (one_in(2)) {
    language.table = random_table(num_words);
    language.label_level = one_in(2);
    if (!language.label_level) language.lexicon = random_lexicon(num_words);
    language.weight = number(1.0);
    language.unknown_word = number(-5.0);
    language.unknown_prefixes.assign(static_cast<size_t>(draw(1, 3)), number(-5.0));
  }
  language.word_bonus = number(2.0);
  language.label_bonus = number(1.0);
  language.score_end = one_in(2);
  language.score_empty_word = one_in(3);
  if (one_in(4)) {
    language.hotwords = random_lexicon(1);
    language.hotword_weight = number(4.0);
  }
  if (one_in(4)) language.phrases = random_phrases({'a', 'b', 'c', '\'', ' ', 0xc3, 0xa4, 0xff, 0}, false);
  return language;
}

CtcRules random_rules(int num_labels, bool is_wild) {
  const double infinity = std::numeric_limits<double>::infinity();
  const auto number = [&](double sane) { return is_wild && one_in(4) ? wild() : sane; };
  CtcRules rules{};
  rules.blank = draw(0, num_labels - 1);
  rules.delimiter = num_labels > 1 && one_in(2) ? (rules.blank + draw(1, num_labels - 1)) % num_labels : -1;
  rules.beam_size = one_in(10) ? draw(1, 1000) : draw(1, 20);
  rules.use_max = one_in(2);
  rules.token_min_log_prob = number(one_in(2) ? -infinity : draw_between(-9.0, 0.0));
  rules.top_labels = one_in(2) ? 0 : draw(is_wild ? -2 : 0, num_labels + 2);
  rules.beam_margin = number(one_in(2) ? infinity : draw_between(0.0, 20.0));
  rules.blank_skip_log_prob = number(one_in(2) ? 1.0 : draw_between(-1.0, 0.0));
  rules.rank_paths = one_in(3);
  rules.history_words = one_in(3) ? draw(1, 4) : 0;
  rules.merge_texts = one_in(3);
  rules.last_times = one_in(3);
  return rules;
}

std::shared_ptr<const CtcModel> random_model(int num_labels, bool is_wild) {
  const int num_words = draw(1, 12);
  const CtcRules rules = random_rules(num_labels, is_wild);
  std::vector<CtcLabel> labels;
  for (int label = 0; label < num_labels; ++label) {
    const bool is_special = label == rules.blank || label == rules.delimiter;
    labels.push_back({is_special ? "" : random_text(), label == rules.delimiter || one_in(3), one_in(6),
                      static_cast<uint32_t>(draw(0, num_words - 1))});
  }
  return std::make_shared<CtcModel>(rules, labels, random_language(num_words, is_wild));
}

// What was worked out for a site against saying the bytes of each label there.
bool steps_hold(const CtcPhraseSteps& steps, const PhraseAutomaton& phrases, const std::vector<CtcLabel>& labels,
                int32_t blank, const PhraseSite& site) {
  const CtcPhraseSteps::Usual usual = steps.usual(site);
  const CtcPhraseSteps::Own others = steps.own(site);
  for (int32_t label = 0; label < static_cast<int32_t>(labels.size()); ++label) {
    if (label == blank) continue;
    const CtcLabel& own = labels[static_cast<size_t>(label)];
    uint32_t state = site.state;
    double gain = 0.0;
    const bool spaced = site.is_begun && (site.begins || own.begins_word) && !own.text.empty();
    for (const char byte : (spaced ? " " : "") + own.text) gain += phrases.say(&state, static_cast<uint8_t>(byte));
    const CtcPhraseSteps::Step step = steps.step(site, label);
    const bool is_known = !std::isnan(step.gain);
    if (is_known && (step.state != state || step.gain != gain)) return wrong("a label leads elsewhere");
    const double least = std::exp(gain + phrases.held(state));
    if (!(step.factor >= least)) return wrong("a label is worth more than its bound");
    if (!(steps.most(site) * (1.0 + 1e-5) >= step.factor)) return wrong("a label is worth more than any");
    const bool is_other = own.text.empty() || std::any_of(others.first, others.last, [&](const auto& other) {
      return other.label == label;
    });
    if (!is_other && !(usual.factor(label) >= least && usual.most >= least)) return wrong("a label is not as usual");
    if (own.text.empty() && !(steps.silent_factor(site) >= least)) return wrong("a silent label leads elsewhere");
  }
  return steps.loan(site.state) == std::exp(static_cast<double>(phrases.held(site.state))) || wrong("a loan is another");
}

bool same(const std::vector<CtcHypothesis>& one, const std::vector<CtcHypothesis>& other) {
  const auto equal = [](double left, double right) { return left == right || (std::isnan(left) && std::isnan(right)); };
  return std::equal(one.begin(), one.end(), other.begin(), other.end(), [&](const auto& left, const auto& right) {
    return left.text == right.text && left.labels == right.labels && left.label_frames == right.label_frames &&
           left.word_frames == right.word_frames && equal(left.total, right.total) && equal(left.asr, right.asr) &&
           left.lm_state == right.lm_state;
  });
}

bool is_sound(const std::vector<CtcHypothesis>& hypotheses, int64_t frames, int32_t blank, bool is_wild,
              double most) {
  for (size_t i = 0; i < hypotheses.size(); ++i) {
    const CtcHypothesis& own = hypotheses[i];
    if (own.label_frames.size() != 2 * own.labels.size()) return wrong("labels and their frames differ in number");
    for (const int32_t label : own.labels) {
      if (label == blank) return wrong("a text holds a blank");
    }
    if (is_wild) continue;
    int32_t last = 0;
    for (size_t place = 0; place < own.label_frames.size(); place += 2) {
      const int32_t start = own.label_frames[place], end = own.label_frames[place + 1];
      if (start < last || end <= start || end > frames) return wrong("frames of labels do not follow each other");
      last = end;
    }
    if (std::isnan(own.total) || own.asr > most * static_cast<double>(frames + 1)) return wrong("no log-probability");
    if (i > 0 && own.total > hypotheses[i - 1].total) return wrong("hypotheses are not in order");
  }
  return true;
}

struct Batch {
  int64_t utterances, frames, labels;
  std::vector<float> values;
  std::vector<int64_t> counts;

  CtcFrames from(int64_t utterance, int64_t number, const int64_t* used) const {
    const int64_t item = sizeof(float);
    return {reinterpret_cast<const char*>(values.data() + utterance * frames * labels), false,
            {frames * labels * item, labels * item, item}, number, used};
  }
};

// The last utterance alone must give what it gave in the batch, to the bit.
bool is_alone_the_same(const std::shared_ptr<const CtcModel>& model, const Batch& batch, uint32_t start,
                       const std::vector<CtcHypothesis>& wanted) {
  CtcState alone(model, {start});
  alone.step(batch.from(batch.utterances - 1, 1, &batch.counts.back()), 1);
  return same(alone.results(5, true, 1).front(), wanted) || wrong("neighbours change a result");
}

}  // namespace

bool fuzz_phrase_steps() {
  const std::shared_ptr<const PhraseAutomaton> phrases =
      random_phrases({'a', 'b', 'c', '\'', ' ', 0xc3, 0xa4, 0xff, 0}, false);
  std::vector<CtcLabel> labels;
  for (int count = draw(1, 20); count > 0; --count) labels.push_back({random_text() + random_text(), one_in(3), false, 0});
  const int32_t blank = draw(0, static_cast<int>(labels.size()) - 1);
  const CtcPhraseSteps steps(labels, blank, phrases);
  const auto num_states = static_cast<uint32_t>(phrases->num_states());
  for (uint32_t state = 0; state < num_states; ++state) {
    for (const bool begins : {false, true}) {
      const PhraseSite site{state, true, begins};
      if (!steps_hold(steps, *phrases, labels, blank, site)) return false;
    }
  }
  const PhraseSite unbegun{phrases->start_state(), false, false};
  return steps_hold(steps, *phrases, labels, blank, unbegun);
}

bool fuzz_ctc() {
  const bool is_wild = one_in(3);
  Batch batch{draw(0, 4), one_in(20) ? draw(0, 300) : draw(0, 12), draw(1, one_in(10) ? 200 : 12), {}, {}};
  const auto model = random_model(static_cast<int>(batch.labels), is_wild);
  const bool spoil = one_in(3);
  // Nats of a frame: a spoiled one may sum to 2, and labels of one text may differ in what else they are worth.
  const double most = model->rules.merge_texts ? HUGE_VAL : spoil ? 0.7 : 1e-2;
  batch.values = random_log_probs(batch.utterances * batch.frames, batch.labels, spoil);
  std::vector<uint32_t> starts;
  for (int64_t utterance = 0; utterance < batch.utterances; ++utterance) {
    batch.counts.push_back(one_in(2) ? batch.frames : draw(0, static_cast<int>(batch.frames)));
    const auto* table = model->language.table.get();
    starts.push_back(table == nullptr ? 0 : static_cast<uint32_t>(draw(0, static_cast<int>(table->num_states()) - 1)));
  }
  CtcState state(model, starts);
  state.step(batch.from(0, batch.utterances, batch.counts.data()), draw(1, 4));
  const auto found = state.results(5, true, draw(1, 4));
  for (int64_t utterance = 0; utterance < batch.utterances; ++utterance) {
    if (!state.utterance(utterance).error().empty()) ++refusals;
    if (!is_sound(found[utterance], batch.counts[utterance], model->rules.blank, is_wild, most)) return false;
  }
  if (batch.utterances > 0 && !is_alone_the_same(model, batch, starts.back(), found.back())) return false;
  // Streamed on, with what a delayed language model says in between.
  for (int more = draw(0, 3); more > 0; --more) {
    std::vector<std::vector<double>> extras;
    for (int64_t utterance = 0; utterance < batch.utterances; ++utterance) {
      extras.emplace_back(state.utterance(utterance).live().size() + (one_in(30) ? 1 : 0));
      for (double& extra : extras.back()) extra = is_wild ? wild() : draw_between(-20.0, 0.0);
    }
    try {
      state.set_extras(extras);
    } catch (const std::invalid_argument&) {
      ++refusals;
    }
    state.step(batch.from(0, batch.utterances, batch.counts.data()), draw(1, 4));
    for (const auto& hypotheses : state.results(draw(-1, 3), one_in(2), 1)) {
      if (!is_sound(hypotheses, INT32_MAX, model->rules.blank, true, most)) return false;
    }
  }
  return true;
}

bool fuzz_prefix_scores() {
  const int64_t frames = draw(0, 20), labels = draw(1, 8);
  const int64_t blank = draw(0, static_cast<int>(labels) - 1);
  std::vector<float> by_label = random_log_probs(labels, std::max<int64_t>(frames, 1), false);
  by_label.resize(static_cast<size_t>(frames * labels));  // not normalised over labels, which the scores do not ask
  for (float& value : by_label) value = std::min(value, 0.0F);
  const int64_t delimiter = labels == 1 || one_in(2) ? -1 : (blank + draw(1, static_cast<int>(labels) - 1)) % labels;
  CtcPrefixUtterance utterance(by_label, labels, blank, delimiter, one_in(2) ? 0.0 : draw_between(0.0, 0.5));
  for (int step = 0; step < 8; ++step) {
    std::vector<int64_t> rows, tokens;
    for (int count = draw(0, 6); count > 0; --count) {
      rows.push_back(draw(0, static_cast<int>(utterance.num_rows()) - 1));
      tokens.push_back(draw(-2, static_cast<int>(labels) - 1));
      if (tokens.back() == blank) tokens.back() = kCtcEnd;
    }
    if (utterance.num_rows() == 0 || rows.empty()) break;
    std::vector<double> scores(rows.size());
    utterance.scores(rows.data(), tokens.data(), static_cast<int64_t>(rows.size()), scores.data());
    for (const double score : scores) {
      if (std::isnan(score)) return wrong("a prefix score is NaN");
    }
    utterance.follow(rows.data(), tokens.data(), static_cast<int64_t>(rows.size()));
  }
  return true;
}

bool fuzz_lexicon_search() {
  const int num_labels = draw(1, 8), num_words = draw(num_labels, 12);
  LexiconRules rules;
  rules.num_labels = num_labels;
  rules.blank = draw(0, num_labels - 1);
  rules.silence = draw(0, num_labels - 1);
  rules.beam_size = draw(1, 30);
  rules.top_labels = draw(1, num_labels + 2);
  rules.beam_margin = one_in(3) ? wild() : draw_between(0.0, 50.0);
  rules.lm_weight = one_in(5) ? wild() : draw_between(0.0, 2.0);
  rules.word_score = one_in(5) ? wild() : draw_between(-1.0, 1.0);
  if (one_in(2)) rules.unknown_score = one_in(5) ? wild() : draw_between(-9.0, 0.0);
  rules.log_add = one_in(2);
  if (one_in(2)) {
    rules.blank = -1;
    const bool is_wild = one_in(3);
    for (int64_t i = 0; i < rules.num_labels * rules.num_labels; ++i) {
      rules.transitions.push_back(static_cast<float>(is_wild && one_in(4) ? wild() : draw_between(-3.0, 1.0)));
    }
  }
  std::shared_ptr<SpellingTrie> trie;
  if (!one_in(3)) {
    trie = std::make_shared<SpellingTrie>();
    for (int count = draw(0, 10); count > 0; --count) {
      std::vector<int32_t> labels(static_cast<size_t>(draw(1, 4)));
      for (int32_t& label : labels) label = draw(0, num_labels - 1);
      trie->insert(labels.data(), static_cast<int64_t>(labels.size()), draw(0, num_words - 1), one_in(9) ? wild() : 0.0);
    }
    trie->smear();
  }
  std::shared_ptr<const NgramTable> table;
  if (one_in(2)) table = random_table(num_words);
  std::vector<uint32_t> ids(static_cast<size_t>(num_words));
  for (uint32_t& id : ids) id = static_cast<uint32_t>(draw(0, num_words - 1));
  LexiconSearch search(rules, trie, draw(0, num_words - 1), table, ids);
  for (int step = draw(0, 3); step > 0; --step) {
    const int64_t frames = draw(0, 10);
    search.step(random_log_probs(frames, num_labels, one_in(3)).data(), frames);
  }
  if (one_in(2)) search.end();
  for (const LexiconResult& result : search.results()) {
    const auto places = static_cast<int64_t>(result.labels.size());
    if (places < search.num_frames() + 1 || places > search.num_frames() + 2) return wrong("a path has lost its frames");
  }
  return true;
}

}  // namespace fuzz

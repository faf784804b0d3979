#include "ctc_phrase_steps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

namespace shallowfusion {
namespace {

constexpr double kHair = 1.0 + 1e-6;  // bounds must hold for products of rounded numbers
constexpr size_t kMany = 3;  // own labels, where one in so many is
constexpr ptrdiff_t kFew = 32;       // labels that are faster looked through than searched
constexpr double kSmallest = std::numeric_limits<float>::min();

// No less than exp(nats), and 1 where nothing is worth anything.
float bound(double nats) {
  if (nats == 0.0) return 1.0F;
  if (std::isnan(nats)) return std::numeric_limits<float>::infinity();
  return static_cast<float>(std::max(kSmallest, std::exp(nats) * kHair));
}

}  // namespace

CtcPhraseSteps::CtcPhraseSteps(const std::vector<CtcLabel>& labels, int32_t blank,
                               std::shared_ptr<const PhraseAutomaton> phrases)
    : labels_(labels), phrases_(std::move(phrases)), by_byte_(256) {
  const auto num_states = static_cast<uint32_t>(phrases_->num_states());
  for (int32_t label = 0; label < static_cast<int32_t>(labels_.size()); ++label) {
    if (label == blank) continue;
    const std::string& text = labels_[label].text;
    (text.empty() ? silent_ : by_byte_[static_cast<uint8_t>(text[0])]).push_back(label);
  }
  fill_usual();
  places_.resize(num_states + 1);
  for (uint32_t state = 0; state < num_states; ++state) {
    const float held = phrases_->held(state);
    Place& place = places_[state];
    place.is_bounded = phrases_->bounded(state) == state;
    place.held = held;
    place.closing = phrases_->closing(state);
    place.loan = held == 0.0F ? 1.0 : std::exp(static_cast<double>(held));
    place.first = static_cast<uint32_t>(own_.size());
    for (const bool after_word : {false, true}) fill_own(state, after_word);
  }
  places_[num_states].first = static_cast<uint32_t>(own_.size());
  own_.shrink_to_fit();
}

bool CtcPhraseSteps::says_space(Table table, int32_t label) const {
  return table == kAfterWord || (table != kUnbegun && labels_[label].begins_word);
}

// Says the bytes of a label one by one, the space before them first.
CtcPhraseSteps::Step CtcPhraseSteps::walk(uint32_t state, Table table, int32_t label) const {
  double sum = 0.0;
  int gains = 0;
  const auto say = [&](uint8_t byte) {
    const double gain = phrases_->say(&state, byte);
    gains += gain != 0.0;
    sum += gain;
  };
  const std::string& text = labels_[label].text;
  if (!text.empty() && says_space(table, label)) say(' ');
  for (const char byte : text) say(static_cast<uint8_t>(byte));
  const auto rounded = static_cast<float>(sum);
  const bool is_exact = gains <= 1 && static_cast<double>(rounded) == sum;
  return {label, state, is_exact ? rounded : std::numeric_limits<float>::quiet_NaN(),
          bound(sum + phrases_->held(state))};
}

// From the shortest states that texts can end in. What ends a word counts from after it.
void CtcPhraseSteps::fill_usual() {
  constexpr uint32_t kNoPhrase = 0;
  const uint32_t start = phrases_->start_state();
  const auto size = static_cast<int32_t>(labels_.size());
  for (const Table table : {kInWord, kBounded, kAfterWord, kUnbegun}) {
    most_usual_[table] = 0.0F;
    for (int32_t label = 0; label < size; ++label) {
      const std::string& text = labels_[label].text;
      const uint8_t first = says_space(table, label) || text.empty() ? ' ' : static_cast<uint8_t>(text[0]);
      const bool closes = !text.empty() && !phrases_->begins_inside(first);
      kinds_.push_back(text.empty() ? kSilent : closes ? kCloses : kStays);
      usual_.push_back(walk(closes || table == kBounded || table == kUnbegun ? start : kNoPhrase, table, label));
      usual_factors_.push_back(text.empty() ? static_cast<float>(kSmallest) : usual_.back().factor);
      if (!text.empty()) most_usual_[table] = std::max(most_usual_[table], usual_.back().factor);
    }
  }
}

// Labels of one kind whose first byte, that after a space if they say one, goes on from the state or a suffix of it
// longer than `end`.
void CtcPhraseSteps::collect(uint32_t state, uint32_t end, Table table, bool closing, bool spaced) {
  const Kind* kinds = kinds_.data() + table * labels_.size();
  for (; state != end; state = phrases_->suffix(state)) {
    phrases_->each_child(state, [&](int32_t byte) {
      if (byte >= 256) return;
      for (const int32_t label : by_byte_[byte]) {
        if (says_space(table, label) == spaced && (spaced || (kinds[label] == kCloses) == closing)) found_.push_back(label);
      }
    });
    if (state == 0) break;
  }
}

// Labels that may not be as usual, found by their first bytes: any other byte meets the phrases that it usually does.
void CtcPhraseSteps::find_own(uint32_t state, Table table) {
  constexpr uint32_t kNoPhrase = 0;
  const uint32_t start = phrases_->start_state();
  found_.clear();
  if (table != kAfterWord) {
    collect(state, table == kBounded ? start : kNoPhrase, table, false, false);
    collect(phrases_->bounded(state), start, table, true, false);
  }
  const bool space_closes = !phrases_->begins_inside(' ');
  uint32_t spaced = state, usually = space_closes || table == kBounded ? start : kNoPhrase;
  const double gain = phrases_->say(&spaced, ' ') - (space_closes ? phrases_->closing(state) : 0.0F);
  if (gain == phrases_->say(&usually, ' ') && phrases_->bounded(spaced) == spaced) {
    collect(spaced, usually, table, false, true);
  } else {
    for (const std::vector<int32_t>& labels : by_byte_) {
      for (const int32_t label : labels) {
        if (says_space(table, label)) found_.push_back(label);
      }
    }
  }
  std::sort(found_.begin(), found_.end());
  found_.erase(std::unique(found_.begin(), found_.end()), found_.end());
}

// Puts the usual labels between a site's own, which begin at `first`.
void CtcPhraseSteps::fill_up(const PhraseSite& site, size_t first) {
  const std::vector<Step> own(own_.begin() + static_cast<ptrdiff_t>(first), own_.end());
  own_.resize(first);
  auto next = own.begin();
  for (int32_t label = 0; label < static_cast<int32_t>(labels_.size()); ++label) {
    const bool is_own = next != own.end() && next->label == label;
    own_.push_back(is_own ? *next++ : usual_step(site, label));
  }
}

void CtcPhraseSteps::fill_own(uint32_t state, bool after_word) {
  const PhraseSite site{state, true, after_word};
  find_own(state, table(site));
  float most = usual(site).most;
  if (!silent_.empty()) most = std::max(most, silent_factor(site));
  const size_t first = own_.size();
  for (const int32_t label : found_) {
    const Step as_usual = usual_step(site, label), own = walk(state, table(site), label);
    const bool is_known = own.gain == as_usual.gain || std::isnan(as_usual.gain);
    if (is_known && own.state == as_usual.state && own.factor <= as_usual.factor) continue;
    own_.push_back(own);
    most = std::max(most, own.factor);
  }
  if (kMany * (own_.size() - first) >= labels_.size()) fill_up(site, first);
  if (own_.size() >= std::numeric_limits<int32_t>::max()) throw std::invalid_argument("too many phrases.");
  if (!after_word) places_[state].num_in_word = static_cast<uint32_t>(own_.size()) - places_[state].first;
  places_[state].most[after_word] = most;
}

float CtcPhraseSteps::silent_factor(const PhraseSite& site) const {
  const Place& place = places_[site.state];
  return place.held == 0.0F ? 1.0F : static_cast<float>(place.loan * kHair);
}

float CtcPhraseSteps::most(const PhraseSite& site) const {
  if (site.is_begun) return places_[site.state].most[site.begins];
  const float usually = usual(site).most;
  return silent_.empty() ? usually : std::max(usually, silent_factor(site));
}

CtcPhraseSteps::Usual CtcPhraseSteps::usual(const PhraseSite& site) const {
  const Table table = this->table(site);
  const size_t first = table * labels_.size();
  const float closing_factor = bound(closing(site));
  return {usual_factors_.data() + first, kinds_.data() + first, closing_factor,
          most_usual_[table] * std::max(1.0F, closing_factor)};
}

CtcPhraseSteps::Own CtcPhraseSteps::own(const PhraseSite& site) const {
  if (!site.is_begun) return {nullptr, nullptr};
  const Place& place = places_[site.state];
  const Step* middle = own_.data() + place.first + place.num_in_word;
  return site.begins ? Own{middle, own_.data() + (&place + 1)->first} : Own{own_.data() + place.first, middle};
}

CtcPhraseSteps::Step CtcPhraseSteps::usual_step(const PhraseSite& site, int32_t label) const {
  const size_t at = table(site) * labels_.size() + static_cast<size_t>(label);
  if (kinds_[at] == kSilent) return {label, site.state, 0.0F, silent_factor(site)};
  Step step = usual_[at];
  const float gain = kinds_[at] == kCloses ? closing(site) : 0.0F;
  if (gain == 0.0F) return step;
  step.gain = step.gain == 0.0F ? gain : std::numeric_limits<float>::quiet_NaN();
  step.factor *= bound(gain);
  return step;
}

CtcPhraseSteps::Step CtcPhraseSteps::step(const PhraseSite& site, int32_t label) const {
  Own own = this->own(site);
  if (is_full(own)) return own.first[label];
  if (own.last - own.first > kFew) {
    own.first = std::lower_bound(own.first, own.last, label,
                                 [](const Step& step, int32_t wanted) { return step.label < wanted; });
  }
  while (own.first != own.last && own.first->label < label) ++own.first;
  return own.first != own.last && own.first->label == label ? *own.first : usual_step(site, label);
}

}  // namespace shallowfusion

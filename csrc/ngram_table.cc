#include "ngram_table.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace shallowfusion {

// The n-grams of one order, sorted by their words.
struct NgramTable::Level {
  int64_t order;
  std::vector<uint32_t> words;   // [count, order]
  std::vector<float> log_probs;  // NaN: only a context of longer n-grams
  std::vector<float> back_offs;

  int64_t count() const { return static_cast<int64_t>(log_probs.size()); }
  const uint32_t* at(int64_t i) const { return words.data() + i * order; }
  void reserve(int64_t count) {
    words.reserve(count * order);
    log_probs.reserve(count);
    back_offs.reserve(count);
  }
  void append(const uint32_t* ngram, float log_prob, float back_off) {
    words.insert(words.end(), ngram, ngram + order);
    log_probs.push_back(log_prob);
    back_offs.push_back(back_off);
  }
};

namespace {

constexpr float kUnset = std::numeric_limits<float>::quiet_NaN();

int compare(const uint32_t* left, const uint32_t* right, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (left[i] != right[i]) return left[i] < right[i] ? -1 : 1;
  }
  return 0;
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string name_of(const int32_t* words, int64_t order) {
  std::string text = "[";
  for (int64_t i = 0; i < order; ++i) text += (i > 0 ? ", " : "") + std::to_string(words[i]);
  return text + "]";
}

void check(const NgramArrays& ngrams, int64_t order, int64_t num_words) {
  for (int64_t i = 0; i < ngrams.count; ++i) {
    const int32_t* words = ngrams.words + i * order;
    for (int64_t k = 0; k < order; ++k) {
      if (words[k] < 0 || words[k] >= num_words) {
        refuse("words of n-grams must be from 0 to " + std::to_string(num_words - 1) + ", got " +
               name_of(words, order) + ".");
      }
    }
    const float log_prob = ngrams.log_probs[i];
    const float back_off = ngrams.back_offs[i];
    const float infinity = std::numeric_limits<float>::infinity();
    if (std::isnan(log_prob) || std::isnan(back_off) || log_prob == infinity || back_off == infinity) {
      refuse("n-gram " + name_of(words, order) + " has a log-prob or back-off that is NaN or +inf.");
    }
  }
}

}  // namespace

NgramTable::NgramTable(int64_t num_words, const std::vector<NgramArrays>& orders, int64_t begin_word, int64_t end_word,
                       int64_t unknown_word)
    : order_(static_cast<int64_t>(orders.size())) {
  if (orders.empty()) refuse("a table needs at least the unigrams, got no order.");
  if (num_words < 1 || num_words >= std::numeric_limits<int32_t>::max()) refuse("num_words is out of range.");
  for (const int64_t special : {begin_word, end_word, unknown_word}) {
    if (special < 0 || special >= num_words) {
      refuse("begin, end and unknown word must be from 0 to " + std::to_string(num_words - 1) + ", got " +
             std::to_string(special) + ".");
    }
  }
  if (orders[0].count != num_words) {
    refuse("every word needs one unigram: got " + std::to_string(orders[0].count) + " unigrams for " +
           std::to_string(num_words) + " words.");
  }
  num_words_ = static_cast<uint32_t>(num_words);
  begin_word_ = static_cast<uint32_t>(begin_word);
  end_word_ = static_cast<uint32_t>(end_word);
  unknown_word_ = static_cast<uint32_t>(unknown_word);

  std::vector<Level> levels(orders.size());
  for (int64_t order = order_; order >= 1; --order) {
    check(orders[order - 1], order, num_words);
    levels[order - 1] = sorted_level(orders[order - 1], order, order < order_ ? &levels[order] : nullptr);
  }
  lay_out(levels);
  link_suffixes();
  choose_states();
  start_state_ = state_of_[1 + begin_word_];
  std::vector<uint32_t>().swap(parent_);
}

NgramTable::Level NgramTable::sorted_level(const NgramArrays& given, int64_t order, const Level* longer) {
  const auto* words = reinterpret_cast<const uint32_t*>(given.words);
  std::vector<int64_t> places(given.count);
  std::iota(places.begin(), places.end(), int64_t{0});
  const auto before = [&](int64_t left, int64_t right) {
    return compare(words + left * order, words + right * order, order) < 0;
  };
  if (!std::is_sorted(places.begin(), places.end(), before)) std::sort(places.begin(), places.end(), before);
  Level level;
  level.order = order;
  level.reserve(given.count);
  int64_t next = 0;  // of `longer`, whose contexts are merged in where they are no n-grams themselves
  const auto add_contexts = [&](const uint32_t* limit) {
    for (; longer != nullptr && next < longer->count(); ++next) {
      const uint32_t* context = longer->at(next);
      if (limit != nullptr && compare(context, limit, order) >= 0) return;
      const bool is_new = level.count() == 0 || compare(level.at(level.count() - 1), context, order) != 0;
      if (is_new) level.append(context, kUnset, 0.0F);
    }
  };
  for (const int64_t i : places) {
    const uint32_t* ngram = words + i * order;
    add_contexts(ngram);
    if (level.count() > 0 && compare(level.at(level.count() - 1), ngram, order) == 0) {
      refuse("n-gram " + name_of(given.words + i * order, order) + " is given twice.");
    }
    level.append(ngram, given.log_probs[i], longer == nullptr ? 0.0F : given.back_offs[i]);
  }
  add_contexts(nullptr);
  return level;
}

void NgramTable::lay_out(const std::vector<Level>& levels) {
  int64_t total = 1;
  for (const Level& level : levels) total += level.count();
  if (total >= std::numeric_limits<uint32_t>::max()) refuse("a table holds fewer than 2^32 - 1 n-grams.");
  for (auto* values : {&word_, &parent_, &suffix_, &state_of_}) values->assign(total, kRoot);
  first_child_.assign(total + 1, 0);
  log_prob_.assign(total, 0.0F);
  back_off_.assign(total, 0.0F);
  uint32_t node = 1;
  uint32_t parent = kRoot;
  for (const Level& level : levels) {
    const Level* shorter = level.order > 1 ? &levels[level.order - 2] : nullptr;
    const uint32_t first_parent = parent;  // the first node of the order before
    const uint32_t first_node = node;
    for (int64_t i = 0; i < level.count(); ++i, ++node) {
      // Parents and children are sorted alike, so the parent of a child is never before that of the child before.
      while (shorter != nullptr && compare(shorter->at(parent - first_parent), level.at(i), level.order - 1) != 0) {
        ++parent;
      }
      word_[node] = level.at(i)[level.order - 1];
      parent_[node] = parent;
      log_prob_[node] = level.log_probs[i];
      back_off_[node] = level.back_offs[i];
      ++first_child_[parent + 1];
    }
    parent = first_node;
  }
  first_child_[0] = 1;
  for (int64_t i = 0; i < total; ++i) first_child_[i + 1] += first_child_[i];
}

void NgramTable::link_suffixes() {
  // Shorter n-grams come first, so suffixes and log-probs of shorter nodes are final when they are needed.
  for (uint32_t node = 1 + num_words_; node < num_states(); ++node) {
    const uint32_t word = word_[node];
    float back_off = back_off_[parent_[node]];
    uint32_t context = suffix_[parent_[node]];
    uint32_t shorter = context == kRoot ? 1 + word : find_child(context, word);
    while (shorter == kRoot) {
      back_off += back_off_[context];
      context = suffix_[context];
      shorter = context == kRoot ? 1 + word : find_child(context, word);
    }
    suffix_[node] = shorter;
    if (std::isnan(log_prob_[node])) log_prob_[node] = back_off + log_prob_[shorter];
  }
}

void NgramTable::choose_states() {
  for (uint32_t node = 1; node < num_states(); ++node) {
    const bool matters = first_child_[node] < first_child_[node + 1] || back_off_[node] != 0.0F;
    state_of_[node] = matters ? node : state_of_[suffix_[node]];
  }
}

uint32_t NgramTable::find_child(uint32_t node, uint32_t word) const {
  const uint32_t* first = word_.data() + first_child_[node];
  const uint32_t* last = word_.data() + first_child_[node + 1];
  const uint32_t* found = std::lower_bound(first, last, word);
  return found != last && *found == word ? static_cast<uint32_t>(found - word_.data()) : kRoot;
}

void NgramTable::dense(uint32_t state, float* log_probs) const {
  std::vector<uint32_t> chain;  // from the state down to contexts of one word
  for (uint32_t node = state; node != kRoot; node = suffix_[node]) chain.push_back(node);
  std::vector<float> back_offs(chain.size() + 1, 0.0F);  // before each context of the chain, then before the root
  for (size_t i = 0; i < chain.size(); ++i) back_offs[i + 1] = back_offs[i] + back_off_[chain[i]];
  for (uint32_t word = 0; word < num_words_; ++word) log_probs[word] = back_offs.back() + log_prob_[1 + word];
  for (size_t i = chain.size(); i-- > 0;) {
    for (uint32_t child = first_child_[chain[i]]; child < first_child_[chain[i] + 1]; ++child) {
      log_probs[word_[child]] = back_offs[i] + log_prob_[child];
    }
  }
}

int64_t NgramTable::num_bytes() const {
  int64_t bytes = 0;
  for (const auto* values : {&word_, &first_child_, &suffix_, &state_of_}) bytes += 4 * values->capacity();
  for (const auto* values : {&log_prob_, &back_off_}) bytes += 4 * values->capacity();
  return bytes;
}

}  // namespace shallowfusion

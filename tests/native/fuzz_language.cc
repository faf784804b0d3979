// Mutated ARPA files, n-gram tables and phrase automata.
#include <algorithm>
#include <string>

#include "arpa_reader.h"
#include "fuzz.h"

namespace fuzz {
namespace {

using namespace shallowfusion;

struct Order {
  std::vector<int32_t> words;
  std::vector<float> log_probs, back_offs;
};

void append(Order& order, const std::vector<int32_t>& words) {
  order.words.insert(order.words.end(), words.begin(), words.end());
  order.log_probs.push_back(static_cast<float>(draw_between(-9.0, 0.0)));
  order.back_offs.push_back(one_in(3) ? 0.0F : static_cast<float>(draw_between(-3.0, 0.5)));
}

// Unigrams of every word, then distinct longer n-grams, contexts missing or not.
std::vector<Order> random_orders(int num_words, int most_order) {
  std::vector<Order> orders(static_cast<size_t>(draw(1, most_order)));
  for (int word = 0; word < num_words; ++word) append(orders[0], {word});
  for (size_t order = 2; order <= orders.size(); ++order) {
    std::vector<std::vector<int32_t>> ngrams(static_cast<size_t>(draw(0, 20)), std::vector<int32_t>(order));
    for (auto& ngram : ngrams) {
      for (int32_t& word : ngram) word = draw(0, std::min(num_words, 6) - 1);
    }
    std::sort(ngrams.begin(), ngrams.end());
    ngrams.erase(std::unique(ngrams.begin(), ngrams.end()), ngrams.end());
    std::shuffle(ngrams.begin(), ngrams.end(), generator);
    for (const auto& ngram : ngrams) append(orders[order - 1], ngram);
  }
  return orders;
}

std::vector<NgramArrays> views(const std::vector<Order>& orders) {
  std::vector<NgramArrays> found;
  for (const Order& order : orders) {
    found.push_back({order.words.data(), order.log_probs.data(), order.back_offs.data(),
                     static_cast<int64_t>(order.log_probs.size())});
  }
  return found;
}

std::string arpa_of(const std::vector<Order>& orders) {
  std::string text = "\\data\\\n";
  for (size_t n = 1; n <= orders.size(); ++n) {
    text += "ngram " + std::to_string(n) + "=" + std::to_string(orders[n - 1].log_probs.size()) + "\n";
  }
  for (size_t n = 1; n <= orders.size(); ++n) {
    const Order& order = orders[n - 1];
    text += "\n\\" + std::to_string(n) + "-grams:\n";
    for (size_t i = 0; i < order.log_probs.size(); ++i) {
      text += std::to_string(order.log_probs[i]) + "\t";
      for (size_t k = 0; k < n; ++k) text += (k > 0 ? " w" : "w") + std::to_string(order.words[i * n + k]);
      if (n < orders.size()) text += "\t" + std::to_string(order.back_offs[i]);
      text += '\n';
    }
  }
  return text + "\n\\end\\\n";
}

// Bytes lost, doubled, overwritten by others or by what a reader of numbers and sections may trip over.
void mutate(std::string& text) {
  static const std::vector<std::string> pieces{
      "", "\n", "\t", " ", "-", "e", "nan", "inf", "-inf", "1e999", "1e-999", "99999999999999999999", "-1",
      "9223372036854775807", "4611686018427387904", "2147483648", "0x1p3", ".", "=", "\\", "\\data\\", "\\end\\", "\\1-grams:",
      "\\2-grams:", "ngram 1=", "ngram 3=1", "w0", "\r\n", "\x0b", std::string(1, '\0'), "\xff\xfe", std::string(300, '9')};
  const auto size = static_cast<int>(text.size());
  const size_t at = static_cast<size_t>(draw(0, size));
  const size_t length = std::min(text.size() - at, static_cast<size_t>(one_in(5) ? draw(0, size) : draw(0, 5)));
  const int how = draw(0, 4);
  if (how == 0) text.resize(at);
  else if (how == 1) text.erase(at, length);
  else if (how == 2) text.insert(at, text.substr(static_cast<size_t>(draw(0, size)), length));
  else if (how == 3) text.replace(at, length, pick(pieces));
  else if (at < text.size()) text[at] = static_cast<char>(draw(0, 255));
}

bool is_sound(const NgramTable& table) {
  std::vector<float> dense(table.num_words());
  for (uint32_t state = 0; state < table.num_states(); ++state) {
    table.dense(state, dense.data());
    for (uint32_t word = 0; word < table.num_words(); ++word) {
      uint32_t next;
      const float score = table.score(state, word, &next);
      const bool same = score == dense[word] || (std::isnan(score) && std::isnan(dense[word]));
      if (!same || next >= table.num_states()) return wrong("dense and single look-ups differ");
    }
  }
  return true;
}

}  // namespace

std::unique_ptr<NgramTable> random_table(int num_words) {
  const std::vector<Order> orders = random_orders(num_words, 4);
  const auto word = [&] { return draw(0, num_words - 1); };
  return std::make_unique<NgramTable>(num_words, views(orders), word(), word(), word());
}

std::unique_ptr<PhraseAutomaton> random_phrases(const std::vector<int32_t>& tokens, bool is_wild) {
  std::vector<int32_t> all;
  std::vector<double> credits;
  std::vector<int64_t> offsets{0}, phrases;
  std::vector<uint8_t> classes(static_cast<size_t>(one_in(3) ? 0 : draw(1, 130)));
  for (uint8_t& value : classes) value = static_cast<uint8_t>(draw(0, is_wild ? 255 : 3));
  const int count = draw(0, 8);
  for (int i = 0; i < count; ++i) {
    for (int length = draw(is_wild ? 0 : 1, 5); length > 0; --length) {
      const bool is_boundary = !classes.empty() && one_in(4);
      all.push_back(is_boundary ? kWordBoundary : is_wild && one_in(20) ? -1 : pick(tokens));
      credits.push_back(is_wild ? wild() : draw_between(-0.5, 2.0));
    }
    offsets.push_back(static_cast<int64_t>(all.size()));
    phrases.push_back(draw(0, 3));
  }
  return std::make_unique<PhraseAutomaton>(PhrasePatterns{all.data(), credits.data(), offsets.data(), phrases.data(),
                                                          count, classes.data(), static_cast<int64_t>(classes.size())});
}

bool fuzz_arpa() {
  const std::vector<Order> orders = random_orders(draw(1, 12), 3);
  std::string text = arpa_of(orders);
  const int mutations = draw(0, 4);
  for (int i = 0; i < mutations; ++i) mutate(text);
  // On the heap to the byte, so that reading past the end is seen.
  const std::vector<char> exact(text.begin(), text.end());
  ArpaContent content;
  if (!read_arpa({exact.data(), exact.size()}, &content)) {
    ++refusals;
    return mutations > 0 || wrong("a right ARPA file was refused");
  }
  if (mutations == 0) {
    for (size_t n = 0; n < orders.size(); ++n) {
      if (content.orders.at(n).words != orders[n].words) return wrong("words were read wrongly");
    }
  }
  std::vector<NgramArrays> arrays;
  for (size_t n = 0; n < content.orders.size(); ++n) {
    const ArpaOrder& order = content.orders[n];
    const size_t ngrams = order.log_probs.size();
    if (order.back_offs.size() != ngrams || order.words.size() != ngrams * (n + 1)) return wrong("lengths differ");
    arrays.push_back({order.words.data(), order.log_probs.data(), order.back_offs.data(), static_cast<int64_t>(ngrams)});
  }
  try {
    return is_sound(NgramTable(static_cast<int64_t>(content.words.size()), arrays, 0, 0, 0));
  } catch (const std::invalid_argument&) {
    ++refusals;  // an n-gram twice, or a back-off past float32
    return true;
  }
}

bool fuzz_table() {
  const int num_words = draw(1, 30);
  std::vector<Order> orders = random_orders(num_words, 4);
  if (one_in(2)) return is_sound(NgramTable(num_words, views(orders), 0, num_words - 1, num_words / 2));
  for (int changes = draw(1, 3); changes > 0; --changes) {
    Order& order = orders[static_cast<size_t>(draw(0, static_cast<int>(orders.size()) - 1))];
    if (order.words.empty()) continue;
    order.words[static_cast<size_t>(draw(0, static_cast<int>(order.words.size()) - 1))] =
        pick(std::vector<int32_t>{-1, 0, num_words, INT32_MAX, INT32_MIN});
    order.back_offs.back() = static_cast<float>(pick(std::vector<double>{kInfinity, -kInfinity, NAN, 3e38, -3e38}));
    order.log_probs.front() = static_cast<float>(pick(std::vector<double>{kInfinity, -kInfinity, NAN, 3e38, -3e38}));
  }
  try {
    const int64_t given = one_in(5) ? pick(std::vector<int64_t>{-1, 0, INT64_MAX, INT64_MIN}) : num_words;
    return is_sound(NgramTable(given, views(orders), draw(-1, num_words), draw(-1, num_words), draw(-1, num_words)));
  } catch (const std::invalid_argument&) {
    ++refusals;
    return true;
  }
}

// Two ways along random tokens meet in the same states.
bool fuzz_phrases() {
  const std::vector<int32_t> tokens{0, 1, 2, 31, 32, 64, 97, 127, 128, 129, INT32_MAX - 1};
  const bool is_wild = one_in(3);
  try {
    const auto automaton = random_phrases(tokens, is_wild);
    uint32_t arrived = automaton->start_state(), said = arrived;
    std::vector<PhraseAutomaton::Arc> arcs;
    std::vector<int32_t> turns;
    for (int step = 0; step < 20; ++step) {
      const int32_t token = pick(tokens);
      for (const bool with_first : {false, true}) {
        automaton->arcs(arrived, with_first, &arcs);
        for (size_t i = 1; i < arcs.size(); ++i) {
          if (arcs[i - 1].token >= arcs[i].token) return wrong("arcs are not sorted");
        }
      }
      automaton->closing(arrived);
      automaton->turns(arrived, &turns);
      const uint32_t fallback = automaton->fallback(arrived);
      for (size_t i = 1; i < turns.size(); ++i) {
        if (turns[i - 1] >= turns[i]) return wrong("turns are not sorted");
      }
      for (const int32_t other : tokens) {
        const bool is_same = automaton->arrive(arrived, other).state == automaton->arrive(fallback, other).state;
        const bool is_listed = std::binary_search(turns.begin(), turns.end(), other);
        if (!is_same && !is_listed) return wrong("a turn is not listed");
      }
      arrived = automaton->arrive(arrived, token).state;
      automaton->say(&said, token);
      if (arrived >= automaton->num_states() || said != arrived) return wrong("two ways along a text part");
    }
    return true;
  } catch (const std::invalid_argument&) {
    ++refusals;
    return is_wild || wrong("good patterns were refused");
  }
}

}  // namespace fuzz

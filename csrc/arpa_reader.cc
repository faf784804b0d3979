#include "arpa_reader.h"

#include <charconv>
#include <cmath>
#include <string>
#include <system_error>
#include <unordered_map>

namespace shallowfusion {
namespace {

constexpr double kLog10 = 2.302585092994046;
constexpr double kRounding = 1e-6;  // by which a log10 probability may exceed 0
constexpr size_t kMostOrders = 64;

bool is_space(char letter) { return letter == ' ' || (letter >= '\t' && letter <= '\r'); }

// Fields of one line, parted by white space.
class Fields {
 public:
  explicit Fields(std::string_view line) : rest_(line) {}

  // The next field, empty at the end of the line.
  std::string_view next() {
    size_t start = 0;
    while (start < rest_.size() && is_space(rest_[start])) ++start;
    size_t stop = start;
    while (stop < rest_.size() && !is_space(rest_[stop])) ++stop;
    const std::string_view field = rest_.substr(start, stop - start);
    rest_.remove_prefix(stop);
    return field;
  }

 private:
  std::string_view rest_;
};

class Lines {
 public:
  explicit Lines(std::string_view text) : rest_(text) {}

  bool next(std::string_view* line) {
    if (is_done_) return false;
    const size_t stop = rest_.find('\n');
    is_done_ = stop == std::string_view::npos;
    *line = rest_.substr(0, stop);
    if (!is_done_) rest_.remove_prefix(stop + 1);
    return true;
  }

  // The next line that is not blank, without the white space around it.
  bool next_told(std::string_view* line) {
    while (next(line)) {
      while (!line->empty() && is_space(line->front())) line->remove_prefix(1);
      while (!line->empty() && is_space(line->back())) line->remove_suffix(1);
      if (!line->empty()) return true;
    }
    return false;
  }

 private:
  std::string_view rest_;
  bool is_done_ = false;
};

template <typename Number>
bool parse(std::string_view field, Number* number) {
  const char* last = field.data() + field.size();
  const auto [stop, error] = std::from_chars(field.data(), last, *number);
  return error == std::errc() && stop == last && !field.empty();
}

bool parse_log10(std::string_view field, double most, float* nats) {
  double value;
  if (!parse(field, &value) || !std::isfinite(value) || value > most) return false;
  *nats = static_cast<float>(value * kLog10);
  return true;
}

class Reader {
 public:
  Reader(std::string_view text, ArpaContent* content) : text_(text), lines_(text), content_(content) {}

  bool read() {
    std::vector<int64_t> counts;
    std::string_view line;
    if (!read_header(&counts, &line)) return false;
    for (size_t order = 1; order <= counts.size(); ++order) {
      if (order > 1 && !lines_.next_told(&line)) return false;
      if (line != "\\" + std::to_string(order) + "-grams:") return false;
      // An n-gram takes two letters a word at least: no memory is taken for counts no file of this size can hold.
      if (counts[order - 1] > static_cast<int64_t>(text_.size() / (2 * order))) return false;
      content_->orders.emplace_back();
      if (!read_section(order, counts[order - 1], order == counts.size())) return false;
    }
    return lines_.next_told(&line) && line == "\\end\\";
  }

 private:
  // Reads up to the line after the counts, which it writes.
  bool read_header(std::vector<int64_t>* counts, std::string_view* line) {
    do {
      if (!lines_.next_told(line)) return false;
    } while (*line != "\\data\\");
    while (lines_.next_told(line) && line->front() != '\\') {
      Fields fields(*line);
      if (fields.next() != "ngram") return false;
      const std::string_view field = fields.next();
      const size_t sign = field.find('=');
      size_t order = 0;
      int64_t count = 0;
      const bool is_good = sign != std::string_view::npos && parse(field.substr(0, sign), &order) &&
                           parse(field.substr(sign + 1), &count) && fields.next().empty();
      if (!is_good || order != counts->size() + 1 || order > kMostOrders || count < 0) return false;
      counts->push_back(count);
    }
    return !counts->empty();
  }

  bool read_section(size_t order, int64_t count, bool is_highest) {
    ArpaOrder& ngrams = content_->orders.back();
    ngrams.words.reserve(count * order);
    ngrams.log_probs.reserve(count);
    ngrams.back_offs.reserve(count);
    std::string_view line;
    for (int64_t i = 0; i < count; ++i) {
      if (!lines_.next(&line)) return false;
      Fields fields(line);
      float log_prob;
      float back_off = 0.0F;
      if (!parse_log10(fields.next(), kRounding, &log_prob)) return false;
      for (size_t k = 0; k < order; ++k) {
        const std::string_view word = fields.next();
        if (word.empty()) return false;
        int32_t id;
        if (order == 1 ? !add_word(word, &id) : !find_word(word, &id)) return false;
        ngrams.words.push_back(id);
      }
      const std::string_view last = fields.next();
      if (!last.empty() && (is_highest || !parse_log10(last, HUGE_VAL, &back_off))) return false;
      if (!last.empty() && !fields.next().empty()) return false;
      ngrams.log_probs.push_back(log_prob);
      ngrams.back_offs.push_back(back_off);
    }
    return true;
  }

  bool add_word(std::string_view word, int32_t* id) {
    *id = static_cast<int32_t>(content_->words.size());
    content_->words.push_back(word);
    return ids_.emplace(word, *id).second;
  }

  bool find_word(std::string_view word, int32_t* id) const {
    const auto found = ids_.find(word);
    if (found == ids_.end()) return false;
    *id = found->second;
    return true;
  }

  std::string_view text_;
  Lines lines_;
  ArpaContent* content_;
  std::unordered_map<std::string_view, int32_t> ids_;
};

}  // namespace

bool read_arpa(std::string_view text, ArpaContent* content) { return Reader(text, content).read(); }

}  // namespace shallowfusion

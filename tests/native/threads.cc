// The C++ core from several threads at once under the thread sanitizer: `build/threaded/threads [SECONDS]`; see `make fuzz`.
//
// As the bindings do: what is immutable is shared by all, what has a state has one user at a time. Every answer must be
// that of one thread alone.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "arpa_reader.h"
#include "beam_state.h"
#include "ctc_prefix_scores.h"
#include "ctc_search.h"
#include "fused_step.h"
#include "ngram_table.h"
#include "page_pool.h"
#include "range_lse.h"
#include "row_rounding.h"
#include "thread_pool.h"

namespace {

using namespace shallowfusion;

constexpr int kCallers = 4;
constexpr int64_t kRows = 6, kVocab = 700, kLabels = 9, kFrames = 14, kWords = 8;

struct Shared {
  std::vector<float> logits, weights, zeros, log_probs;
  std::vector<int64_t> counts{kFrames, 3, 0, kFrames};
  std::vector<uint32_t> starts{0, 0, 0, 0};
  StepArguments step;
  std::shared_ptr<NgramTable> table;
  std::shared_ptr<PhraseAutomaton> phrases;
  std::shared_ptr<const CtcModel> model;
  std::string arpa{"\\data\\\nngram 1=3\n\n\\1-grams:\n-1 <s>\n-1 </s>\n-1 <unk>\n\n\\end\\\n"};
  // One at a time: these have a state, as Python's threads share them behind a lock.
  std::mutex turn;
  PagePool pool{64, 2};
  std::unique_ptr<CtcState> stream;

  Shared() {
    std::mt19937 generator(7);
    std::uniform_real_distribution<float> drawn(-6.0F, 6.0F);
    logits.resize(2 * kRows * kVocab);
    for (float& value : logits) value = drawn(generator);
    weights.assign(2 * kRows, 0.5F);
    zeros.assign(kRows, 0.0F);
    for (int source = 0; source < 2; ++source) {
      SourceView view;
      view.logits = reinterpret_cast<const char*>(logits.data() + source * kRows * kVocab);
      view.vocab = view.row_stride = kVocab;
      step.sources.push_back(view);
    }
    step.weights = weights.data();
    step.totals = step.length_bonus = zeros.data();
    step.rows = kRows;
    step.beam_size = 2;
    step.top_k = 5;
    build_language();
    log_probs.assign(counts.size() * kFrames * kLabels, -std::log(static_cast<float>(kLabels)));
    for (size_t i = 0; i < log_probs.size(); i += 2) log_probs[i] -= 1.0F + 0.1F * static_cast<float>(i % 7);
    CtcLanguage language;
    language.table = table;
    language.phrases = phrases;
    language.label_level = true;
    language.weight = 0.4;
    std::vector<CtcLabel> labels;
    for (int label = 0; label < kLabels; ++label) {
      labels.push_back({label == 0 ? "" : std::string(1, static_cast<char>('a' + label)), label == 3, false,
                        static_cast<uint32_t>(label % kWords)});
    }
    const double infinity = std::numeric_limits<double>::infinity();
    const CtcRules rules{0, -1, 12, false, -infinity, 0, infinity, 1.0, false, 0, false, false};
    model = std::make_shared<CtcModel>(rules, labels, language);
    stream = std::make_unique<CtcState>(model, starts);
  }

  void build_language() {
    std::vector<int32_t> unigrams, bigrams;
    for (int32_t word = 0; word < kWords; ++word) unigrams.push_back(word);
    for (int32_t word = 0; word + 1 < kWords; ++word) bigrams.insert(bigrams.end(), {word, word + 1});
    const std::vector<float> values(kWords, -1.5F);
    table = std::make_shared<NgramTable>(
        kWords, std::vector<NgramArrays>{{unigrams.data(), values.data(), values.data(), kWords},
                                         {bigrams.data(), values.data(), values.data(), kWords - 1}}, 0, 1, 2);
    const std::vector<int32_t> tokens{'b', 'c', 'c', 'd', 'e'};
    const std::vector<double> credits{0.5, 1.0, 0.2, 0.4, 0.9};
    const std::vector<int64_t> offsets{0, 2, 5}, numbers{0, 1};
    phrases = std::make_shared<PhraseAutomaton>(
        PhrasePatterns{tokens.data(), credits.data(), offsets.data(), numbers.data(), 2});
  }

  CtcFrames frames() const {
    const int64_t item = sizeof(float);
    return {reinterpret_cast<const char*>(log_probs.data()), false, {kFrames * kLabels * item, kLabels * item, item},
            static_cast<int64_t>(counts.size()), counts.data()};
  }
};

// What the calls return, as numbers to be compared.
using Answer = std::vector<double>;

Answer call_step(Shared& shared, int threads) {
  const size_t size = 3 * 5;
  std::vector<float> totals(size), parts(2 * size);
  std::vector<int64_t> rows(size), tokens(size);
  bool flags[kRows];
  fused_step(shared.step, {totals.data(), rows.data(), tokens.data(), parts.data(), flags}, *available_kernels().back(), threads);
  Answer answer(totals.begin(), totals.end());
  answer.insert(answer.end(), tokens.begin(), tokens.end());
  return answer;
}

Answer call_rows(Shared& shared, int threads) {
  std::vector<float> sums(kRows), entropies(kRows), best(kRows), margins(kRows), log_probs(kRows);
  row_statistics(shared.step.sources[0], kRows, {sums.data(), entropies.data(), best.data(), margins.data()},
                 *available_kernels().back(), threads);
  const std::vector<int32_t> offsets{0, 1, 2, 3, 4, 5, 6}, first(kRows, 3), last(kRows, 300);
  RangeArguments ranges;
  ranges.logits = shared.step.sources[0].logits;
  ranges.rows = kRows;
  ranges.vocab = ranges.row_stride = kVocab;
  ranges.row_offsets = offsets.data();
  ranges.first = first.data();
  ranges.last = last.data();
  range_log_probs(ranges, log_probs.data(), sums.data(), *available_kernels().back(), threads);
  std::vector<int8_t> whole(kRows * kVocab);
  round_rows(ranges.logits, Dtype::float32, kRows, kVocab, whole.data(), best.data(), threads);
  Answer answer(log_probs.begin(), log_probs.end());
  answer.insert(answer.end(), best.begin(), best.end());
  return answer;
}

Answer totals_of(const std::vector<std::vector<CtcHypothesis>>& found) {
  Answer answer;
  for (const auto& hypotheses : found) {
    for (const CtcHypothesis& hypothesis : hypotheses) answer.push_back(hypothesis.total);
  }
  return answer;
}

Answer call_search(Shared& shared, int threads) {
  CtcState state(shared.model, shared.starts);
  state.step(shared.frames(), threads);
  return totals_of(state.results(4, true, threads));
}

Answer call_prefix_scores(Shared& shared, int threads) {
  Answer answer(4);
  parallel_for(4, threads, [&](int64_t number) {
    CtcPrefixUtterance utterance(std::vector<float>(shared.log_probs.begin(), shared.log_probs.begin() + kLabels * 5),
                                 kLabels, 0, -1, 0.0);
    const std::vector<int64_t> rows{0, 0}, labels{number + 1, number + 2};
    std::vector<double> scores(2);
    utterance.follow(rows.data(), labels.data(), 2);
    utterance.scores(rows.data(), labels.data(), 2, scores.data());
    answer[static_cast<size_t>(number)] = scores[0];
  });
  return answer;
}

Answer call_language(Shared& shared, int) {
  ArpaContent content;
  Answer answer{read_arpa(shared.arpa, &content) ? 1.0 : 0.0};
  std::vector<float> dense(kWords);
  uint32_t state = shared.table->start_state(), next;
  uint32_t place = shared.phrases->start_state();
  std::vector<PhraseAutomaton::Arc> arcs;
  for (uint32_t word = 0; word < kWords; ++word, state = next) {
    answer.push_back(shared.table->score(state, word, &next));
    shared.table->dense(state, dense.data());
    answer.push_back(dense[0] + shared.phrases->say(&place, static_cast<int32_t>('a' + word)));
    shared.phrases->arcs(place, true, &arcs);
    answer.push_back(static_cast<double>(arcs.size()));
  }
  return answer;
}

Answer call_beams(Shared&, int) {
  BeamRules rules{};
  rules.beam_size = 3;
  rules.end_ids = {1};
  rules.max_new_tokens = 5;
  rules.length_penalty = 1.0;
  rules.patience = 1.0;
  BeamState state(rules, 1, 0);
  Answer answer;
  while (!state.is_done(0)) {
    const std::vector<int64_t> running{0}, parents(6, 0), tokens{1, 2, 3, 4, 5, 6};
    const std::vector<float> totals{-1.0F, -1.5F, -2.0F, -2.5F, -3.0F, -3.5F};
    std::vector<int64_t> new_tokens(3), new_parents(3);
    std::vector<float> new_totals(3);
    bool done = false;
    state.advance({1, 6, running.data(), totals.data(), parents.data(), tokens.data(), nullptr},
                  {new_tokens.data(), new_parents.data(), new_totals.data(), &done});
    answer.insert(answer.end(), new_totals.begin(), new_totals.end());
  }
  return answer;
}

// Objects with a state, one caller at a time; inside, a step may share its work out.
Answer call_in_turn(Shared& shared, int threads) {
  const std::lock_guard<std::mutex> lock(shared.turn);
  const int64_t sequence = shared.pool.create();
  shared.pool.append(sequence, 5);
  const int64_t fork = shared.pool.fork(sequence);
  shared.pool.append(fork, 1);
  shared.pool.release(sequence);
  shared.pool.release(fork);
  shared.stream->step(shared.frames(), threads);
  shared.stream->results(1, false, threads);
  return {static_cast<double>(shared.pool.num_used())};
}

// Every task once, and the first exception comes out.
Answer call_tasks(Shared&, int threads) {
  std::vector<std::atomic<int>> seen(37);
  parallel_for(37, threads, [&](int64_t task) { ++seen[static_cast<size_t>(task)]; });
  double once = 0;
  for (const auto& count : seen) once += count == 1;
  try {
    parallel_for(37, threads, [](int64_t task) {
      if (task % 5 == 3) throw std::runtime_error("task");
    });
  } catch (const std::runtime_error&) {
    return {once, 1.0};
  }
  return {once, 0.0};
}

using Call = Answer (*)(Shared&, int);
constexpr Call kCalls[] = {call_step,     call_rows,  call_search,  call_prefix_scores,
                           call_language, call_beams, call_in_turn, call_tasks};

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 10.0;
  Shared shared;
  std::vector<Answer> wanted;
  std::atomic<int> waiting{kCallers};
  std::atomic<long> calls{0};
  std::atomic<bool> is_wrong{false};
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  // One thread alone never starts a helper, so that the callers race for the first start of the pool.
  for (const Call call : kCalls) wanted.push_back(call(shared, 1));
  const auto work = [&](unsigned seed) {
    std::mt19937 generator(seed);
    --waiting;
    while (waiting > 0) std::this_thread::yield();
    while (std::chrono::steady_clock::now() < end && !is_wrong) {
      const size_t which = generator() % std::size(kCalls);
      if (kCalls[which](shared, 1 + static_cast<int>(generator() % 5)) != wanted[which]) {
        std::printf("call %zu gave another answer among threads\n", which);
        is_wrong = true;
      }
      ++calls;
    }
  };
  std::vector<std::thread> callers;
  for (unsigned caller = 0; caller < kCallers; ++caller) callers.emplace_back(work, caller + 1);
  for (std::thread& caller : callers) caller.join();
  if (is_wrong) return 1;
  std::printf("%ld calls by %d threads at once\n", calls.load(), kCallers);
  return 0;
}

// Attention over frames: tasks are groups of key heads of an utterance, walked in the order in which memory holds them.
#include "frame_attention.h"

#include <algorithm>
#include <vector>

#include "thread_pool.h"

namespace shallowfusion {
namespace {

constexpr int64_t kBlockFrames = kMaxLanes;  // of all heads of a task, before the next ones: pages are walked once
constexpr int64_t kAhead = 4;

// The key heads [first, last) of one utterance.
class Task {
 public:
  Task(const FrameAttention& arguments, const Kernels& kernels, int64_t utterance, int64_t first, int64_t last)
      : call_(arguments),
        kernels_(kernels),
        utterance_(utterance),
        first_(first),
        last_(last),
        group_(arguments.heads / arguments.key_heads),
        start_(arguments.starts == nullptr ? utterance * arguments.queries : arguments.starts[utterance]),
        queries_(arguments.starts == nullptr ? arguments.queries : arguments.starts[utterance + 1] - start_),
        rows_(group_ * queries_),
        count_(arguments.lengths == nullptr ? arguments.frames
                                            : std::clamp<int64_t>(arguments.lengths[utterance], 0, arguments.frames)),
        stride_(round_up(count_, kMaxLanes)) {}

  void run() {
    if (queries_ == 0) return;
    const int64_t rows = (last_ - first_) * rows_;
    query_.resize(static_cast<size_t>(rows * call_.dim));
    mixed_.assign(static_cast<size_t>(rows * call_.dim), 0.0f);
    sums_.assign(static_cast<size_t>(rows), 1.0f);
    if (count_ > 0) {
      scores_.resize(static_cast<size_t>(rows * stride_));
      read_query();
      over_frames(call_.keys, [&](int64_t head, const char* keys, const char* ahead, int64_t start, int64_t frames) {
        kernels_.frame_scores[code()](query_.data() + head * rows_ * call_.dim, rows_, call_.dim, keys,
                                      call_.keys.frame_stride, frames, ahead, scores_.data() + head * rows_ * stride_ + start,
                                      stride_);
      });
      for (int64_t row = 0; row < rows; ++row) {
        sums_[static_cast<size_t>(row)] = kernels_.frame_shares(scores_.data() + row * stride_, count_);
      }
      over_frames(call_.values, [&](int64_t head, const char* values, const char* ahead, int64_t start, int64_t frames) {
        kernels_.frame_mix[code()](scores_.data() + head * rows_ * stride_ + start, stride_, rows_, call_.dim, values,
                                   call_.values.frame_stride, frames, ahead, mixed_.data() + head * rows_ * call_.dim);
      });
    }
    write_output();
  }

 private:
  int code() const { return static_cast<int>(call_.dtype); }

  // Calls work(head of the task, its block, the block after, first frame, frames), block by block and head by head.
  template <typename Work>
  void over_frames(const FrameTensor& tensor, const Work& work) const {
    const int64_t heads = last_ - first_;
    const auto block_of = [&](int64_t number) {
      const int64_t at = utterance_ * tensor.utterance_stride + number / heads * kBlockFrames * tensor.frame_stride +
                         (first_ + number % heads) * tensor.head_stride;
      return tensor.data + item_size(call_.dtype) * at;
    };
    const int64_t whole = count_ / kBlockFrames * heads;  // the last block may be short, and is not asked for
    for (int64_t number = 0; number < (count_ + kBlockFrames - 1) / kBlockFrames * heads; ++number) {
      const int64_t start = number / heads * kBlockFrames;
      work(number % heads, block_of(number), number + kAhead < whole ? block_of(number + kAhead) : nullptr, start,
           std::min(kBlockFrames, count_ - start));
    }
  }

  int64_t query_head(int64_t head, int64_t row) const { return (first_ + head) * group_ + row / queries_; }

  void read_query() {
    const float factor = call_.scale * static_cast<float>(kLog2E);
    float* to = query_.data();
    const float* own = call_.query + (call_.starts == nullptr ? utterance_ * call_.query_utterance_stride
                                                              : start_ * call_.query_position_stride);
    for (int64_t head = 0; head < last_ - first_; ++head) {
      for (int64_t row = 0; row < rows_; ++row, to += call_.dim) {
        const float* from =
            own + row % queries_ * call_.query_position_stride + query_head(head, row) * call_.query_head_stride;
        for (int64_t at = 0; at < call_.dim; ++at) to[at] = factor * from[at];
      }
    }
  }

  void write_output() const {
    const float* from = mixed_.data();
    for (int64_t head = 0; head < last_ - first_; ++head) {
      for (int64_t row = 0; row < rows_; ++row, from += call_.dim) {
        const float unit = 1.0f / sums_[static_cast<size_t>(head * rows_ + row)];
        const int64_t place = (start_ + row % queries_) * call_.heads + query_head(head, row);
        float* to = call_.output + place * call_.dim;
        for (int64_t at = 0; at < call_.dim; ++at) to[at] = unit * from[at];
      }
    }
  }

  const FrameAttention& call_;
  const Kernels& kernels_;
  const int64_t utterance_;
  const int64_t first_;
  const int64_t last_;
  const int64_t group_;   // query heads per key head
  const int64_t start_;   // of the queries of this utterance in the output
  const int64_t queries_;
  const int64_t rows_;    // of one key head
  const int64_t count_;   // frames that are seen
  const int64_t stride_;  // of scores
  std::vector<float> query_;
  std::vector<float> scores_;
  std::vector<float> mixed_;
  std::vector<float> sums_;
};

}  // namespace

void frame_attention(const FrameAttention& arguments, const Kernels& kernels, int threads) {
  // One utterance is shared among the threads by heads; several are not, since together they are enough tasks.
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + arguments.utterances - 1) / arguments.utterances;
  const int64_t parts = std::clamp<int64_t>(wanted, 1, arguments.key_heads);
  parallel_for(arguments.utterances * parts, threads, [&](int64_t number) {
    const int64_t part = number % parts;
    const int64_t first = part * arguments.key_heads / parts;
    const int64_t last = (part + 1) * arguments.key_heads / parts;
    Task(arguments, kernels, number / parts, first, last).run();
  });
}

}  // namespace shallowfusion

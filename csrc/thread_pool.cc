#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace shallowfusion {
namespace {

constexpr int kMaxHelpers = 255;

class ThreadPool {
 public:
  void run(int64_t count, int helpers, const std::function<void(int64_t)>& task) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < helpers) {
        const int number = static_cast<int>(threads_.size());
        threads_.emplace_back([this, number] { serve(number); });
      }
      task_ = &task;
      count_ = count;
      next_.store(0);
      failure_ = nullptr;
      invited_ = helpers;
      working_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return working_ == 0; });
    task_ = nullptr;
    if (failure_) std::rethrow_exception(failure_);
  }

  std::mutex& turn() { return turn_; }

 private:
  void work() {
    for (int64_t index = next_.fetch_add(1); index < count_; index = next_.fetch_add(1)) {
      try {
        (*task_)(index);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        next_.store(count_);
      }
    }
  }

  void serve(int number) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (number >= invited_) continue;
      lock.unlock();
      work();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;  // held by the one caller whose tasks run
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> threads_;
  const std::function<void(int64_t)>* task_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  int invited_ = 0;
  int working_ = 0;
  uint64_t round_ = 0;
  std::exception_ptr failure_;
};

std::atomic<ThreadPool*> current_pool{nullptr};

// Never destroyed: helpers may still sleep in it at exit, and after a fork its threads exist in the parent only.
ThreadPool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    current_pool.store(new ThreadPool);
    pthread_atfork(nullptr, nullptr, [] { current_pool.store(new ThreadPool); });
  });
  return *current_pool.load();
}

}  // namespace

int hardware_threads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  const int helpers = static_cast<int>(std::min<int64_t>({count, threads, kMaxHelpers + 1}) - 1);
  if (helpers >= 1) {
    ThreadPool& shared = pool();
    const std::unique_lock<std::mutex> turn(shared.turn(), std::try_to_lock);
    if (turn.owns_lock()) {
      shared.run(count, helpers, task);
      return;
    }
  }
  for (int64_t index = 0; index < count; ++index) task(index);
}

}  // namespace shallowfusion

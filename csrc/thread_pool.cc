#include "thread_pool.h"

#include <dlfcn.h>
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

// What callers and helpers share: the next task, and the first failure.
class Work {
 public:
  Work(int64_t count, const std::function<void(int64_t)>& task) : count_(count), task_(task) {}

  void take_part() {
    for (int64_t index = next_.fetch_add(1); index < count_; index = next_.fetch_add(1)) {
      try {
        task_(index);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        next_.store(count_);
      }
    }
  }

  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)>& task_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr failure_;
};

class ThreadPool {
 public:
  void run(Work& work, int helpers) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < helpers) {
        const int number = static_cast<int>(threads_.size());
        threads_.emplace_back([this, number] { serve(number); });
      }
      work_ = &work;
      invited_ = helpers;
      working_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    work.take_part();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return working_ == 0; });
    work_ = nullptr;
  }

  std::mutex& turn() { return turn_; }

 private:
  void serve(int number) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (number >= invited_) continue;
      Work* const work = work_;
      lock.unlock();
      work->take_part();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;  // held by the one caller whose tasks run
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> threads_;
  Work* work_ = nullptr;
  int invited_ = 0;
  int working_ = 0;
  uint64_t round_ = 0;
};

// The OpenMP threads of whoever loaded that runtime, torch as a rule. They wait for work by spinning, so beside them
// threads of ours would get half a core each; and they are not there in a forked child.
class OpenMp {
 public:
  bool has(int threads) {
    if (is_child().load()) return false;
    if (parallel_.load() == nullptr) {
      most_.store(reinterpret_cast<Most>(dlsym(RTLD_DEFAULT, "omp_get_max_threads")));
      parallel_.store(reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")));
    }
    return parallel_.load() != nullptr && most_.load() != nullptr && threads <= most_.load()();
  }

  void run(Work& work, int threads) {
    parallel_.load()([](void* data) { static_cast<Work*>(data)->take_part(); }, &work, static_cast<unsigned>(threads), 0);
  }

  static std::atomic<bool>& is_child() {
    static std::atomic<bool> flag{false};
    return flag;
  }

 private:
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Most = int (*)();
  std::atomic<Parallel> parallel_{nullptr};
  std::atomic<Most> most_{nullptr};
};

std::atomic<ThreadPool*> current_pool{nullptr};

// Never destroyed: helpers may still sleep in it at exit, and after a fork its threads exist in the parent only.
ThreadPool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    current_pool.store(new ThreadPool);
    pthread_atfork(nullptr, nullptr, [] {
      current_pool.store(new ThreadPool);
      OpenMp::is_child().store(true);
    });
  });
  return *current_pool.load();
}

}  // namespace

int64_t fair_share(int64_t count, int64_t most, int threads) {
  const int64_t rounds = std::max<int64_t>(1, (count + most * threads - 1) / (most * threads));
  return std::max<int64_t>(1, (count + rounds * threads - 1) / (rounds * threads));
}

int hardware_threads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  static OpenMp open_mp;
  Work work(count, task);
  const int helpers = static_cast<int>(std::min<int64_t>({count, threads, kMaxHelpers + 1}) - 1);
  if (helpers < 1) {
    work.take_part();
  } else {
    ThreadPool& shared = pool();
    const std::unique_lock<std::mutex> turn(shared.turn(), std::try_to_lock);
    if (!turn.owns_lock()) {
      work.take_part();
    } else if (open_mp.has(helpers + 1)) {
      open_mp.run(work, helpers + 1);
    } else {
      shared.run(work, helpers);
    }
  }
  work.rethrow();
}

}  // namespace shallowfusion

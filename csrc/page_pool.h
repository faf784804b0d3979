// Ref-counted pages of key/value slots; ids only. Described in shallowfusion/search/page_pool.py.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <vector>

namespace shallowfusion {

struct SlotCopy {
  int32_t source;
  int32_t target;
};

struct AppendResult {
  std::vector<int32_t> slots;
  std::vector<SlotCopy> copies;
};

// Pages form a tree: a page knows the page before it, a sequence knows its last page. So a fork costs O(1), and a
// page lives while a sequence ends in it or another page follows it.
// Not thread-safe. Bad arguments throw std::invalid_argument, exhaustion CapacityError; nothing is changed then.
class PagePool {
 public:
  PagePool(int64_t num_pages, int64_t page_size);

  int64_t create();
  int64_t fork(int64_t sequence);
  void release(int64_t sequence);
  AppendResult append(int64_t sequence, int64_t count);

  // One token for each of `count` distinct sequences; writes their slots.
  void append_each(const int64_t* sequences, int64_t count, int32_t* slots);

  // Forks sequences[parents[i]] for each i, then releases all of `sequences`; writes the new ids.
  void reorder(const int64_t* sequences, int64_t count, const int64_t* parents, int64_t new_count,
               int64_t* new_sequences);

  // Writes 1 for each slot a sequence sees; `visible` holds [count, high_water] zeros.
  void visibility(const int64_t* sequences, int64_t count, uint8_t* visible) const;

  int64_t length(int64_t sequence) const { return at(sequence).length; }
  std::vector<int32_t> slots(int64_t sequence) const;
  std::vector<int32_t> pages(int64_t sequence) const;

  int64_t num_pages() const { return num_pages_; }
  int64_t page_size() const { return page_size_; }
  int64_t num_used() const { return static_cast<int64_t>(pages_.size() - freed_.size()); }
  int64_t num_free() const { return num_pages_ - num_used(); }
  int64_t high_water() const { return high_water_; }
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size() - free_places_.size()); }

 private:
  static constexpr int32_t kNone = -1;

  struct Page {
    int32_t before;  // the page before it in every sequence that holds it
    int32_t num_references;
  };

  // One place of the table of sequences. An id is place + generation * 2^32, so that an old id is never taken for a
  // newer sequence in the same place.
  struct Sequence {
    int64_t id;
    int64_t length;
    int64_t last_call;  // finds a sequence that is named twice in one call
    int32_t last_page;
    bool live;
  };

  const Sequence& at(int64_t sequence) const;
  Sequence& at(int64_t sequence);
  void check_distinct(const int64_t* sequences, int64_t count);
  int64_t num_filled(const Sequence& sequence) const;  // tokens in a partly filled last page, else 0
  bool must_copy(const Sequence& sequence) const;
  void check_capacity(int64_t wanted) const;

  int64_t add(int32_t last_page, int64_t length);
  int32_t take_page(int32_t before);
  void retain(int32_t page);
  void release_page(int32_t page);
  int32_t push_token(Sequence& sequence);

  int64_t num_pages_;
  int64_t page_size_;
  int64_t high_water_ = 0;
  int64_t num_calls_ = 0;
  std::vector<Page> pages_;  // grows to the most pages ever in use
  std::priority_queue<int32_t, std::vector<int32_t>, std::greater<int32_t>> freed_;  // the free ones among `pages_`
  std::vector<Sequence> sequences_;  // grows to the most sequences ever alive
  std::vector<int64_t> free_places_;
};

}  // namespace shallowfusion

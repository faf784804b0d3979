#include "page_pool.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "capacity_error.h"

namespace shallowfusion {
namespace {

constexpr int64_t kGeneration = int64_t{1} << 32;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

PagePool::PagePool(int64_t num_pages, int64_t page_size) : num_pages_(num_pages), page_size_(page_size) {
  constexpr int64_t most_slots = std::numeric_limits<int32_t>::max();
  if (num_pages < 1 || page_size < 1 || num_pages > most_slots / page_size) {
    refuse("num_pages * page_size must be from 1 to 2^31 - 1, got " + std::to_string(num_pages) + " * " +
           std::to_string(page_size) + ".");
  }
}

const PagePool::Sequence& PagePool::at(int64_t sequence) const {
  const auto place = static_cast<size_t>(sequence % kGeneration);
  if (sequence < 0 || place >= sequences_.size() || sequences_[place].id != sequence || !sequences_[place].live) {
    refuse("sequence " + std::to_string(sequence) + " is unknown; it was released or never created.");
  }
  return sequences_[place];
}

PagePool::Sequence& PagePool::at(int64_t sequence) {
  return const_cast<Sequence&>(std::as_const(*this).at(sequence));
}

void PagePool::check_distinct(const int64_t* sequences, int64_t count) {
  ++num_calls_;
  for (int64_t i = 0; i < count; ++i) {
    Sequence& sequence = at(sequences[i]);
    if (sequence.last_call == num_calls_) {
      refuse("sequences must be distinct, got " + std::to_string(sequences[i]) + " twice.");
    }
    sequence.last_call = num_calls_;
  }
}

int64_t PagePool::num_filled(const Sequence& sequence) const { return sequence.length % page_size_; }

// A partly filled page that somebody else also ends in may not be written to.
bool PagePool::must_copy(const Sequence& sequence) const {
  return num_filled(sequence) != 0 && pages_[sequence.last_page].num_references > 1;
}

void PagePool::check_capacity(int64_t wanted) const {
  if (wanted > num_free()) {
    throw CapacityError("the pool needs " + std::to_string(wanted) + " more pages and has " +
                        std::to_string(num_free()) + " of " + std::to_string(num_pages_) +
                        " free; release sequences or make a larger pool.");
  }
}

int64_t PagePool::add(int32_t last_page, int64_t length) {
  auto place = static_cast<int64_t>(sequences_.size());
  if (free_places_.empty()) {
    if (place == kGeneration) throw CapacityError("the pool holds 2^32 sequences; release some.");
    sequences_.push_back({place, length, 0, last_page, true});
  } else {
    place = free_places_.back();
    free_places_.pop_back();
    sequences_[place] = {sequences_[place].id + kGeneration, length, 0, last_page, true};
  }
  retain(last_page);
  return sequences_[place].id;
}

int64_t PagePool::create() { return add(kNone, 0); }

int64_t PagePool::fork(int64_t sequence) { return add(at(sequence).last_page, at(sequence).length); }

void PagePool::release(int64_t sequence) {
  Sequence& old = at(sequence);
  release_page(old.last_page);
  old.live = false;
  free_places_.push_back(sequence % kGeneration);
  if (num_used() == 0) high_water_ = 0;
}

// The lowest free page, with one reference for the caller; takes over the caller's reference to `before`.
int32_t PagePool::take_page(int32_t before) {
  int32_t page = static_cast<int32_t>(pages_.size());
  if (freed_.empty()) {
    pages_.push_back({before, 1});
  } else {
    page = freed_.top();
    freed_.pop();
    pages_[page] = {before, 1};
  }
  return page;
}

void PagePool::retain(int32_t page) {
  if (page != kNone) ++pages_[page].num_references;
}

void PagePool::release_page(int32_t page) {
  while (page != kNone && --pages_[page].num_references == 0) {
    freed_.push(page);
    page = pages_[page].before;
  }
}

// Appends one token whose page is free to write to, or starts a new page; returns the slot.
int32_t PagePool::push_token(Sequence& sequence) {
  const int64_t filled = num_filled(sequence);
  if (filled == 0) sequence.last_page = take_page(sequence.last_page);
  ++sequence.length;
  const int64_t slot = sequence.last_page * page_size_ + filled;
  high_water_ = std::max(high_water_, slot + 1);
  return static_cast<int32_t>(slot);
}

AppendResult PagePool::append(int64_t sequence, int64_t count) {
  Sequence& target = at(sequence);
  if (count < 0) refuse("count must be at least 0, got " + std::to_string(count) + ".");
  AppendResult result;
  if (count == 0) return result;
  const int64_t filled = num_filled(target);
  const bool copies = must_copy(target);
  const int64_t room = filled == 0 ? 0 : page_size_ - filled;  // in the last page
  const int64_t missing = count > room ? count - room : 0;
  check_capacity(missing / page_size_ + (missing % page_size_ != 0) + copies);
  if (copies) {
    const int32_t shared = target.last_page;
    const int32_t before = pages_[shared].before;
    retain(before);
    target.last_page = take_page(before);
    release_page(shared);
    for (int64_t offset = 0; offset < filled; ++offset) {
      result.copies.push_back({static_cast<int32_t>(shared * page_size_ + offset),
                               static_cast<int32_t>(target.last_page * page_size_ + offset)});
    }
  }
  result.slots.reserve(count);
  for (int64_t i = 0; i < count; ++i) result.slots.push_back(push_token(target));
  return result;
}

void PagePool::append_each(const int64_t* sequences, int64_t count, int32_t* slots) {
  check_distinct(sequences, count);
  int64_t wanted = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Sequence& sequence = at(sequences[i]);
    if (must_copy(sequence)) {
      refuse("sequence " + std::to_string(sequences[i]) +
             " shares its partly filled last page; use append, which tells what to copy, or page_size 1.");
    }
    wanted += num_filled(sequence) == 0;
  }
  check_capacity(wanted);
  for (int64_t i = 0; i < count; ++i) slots[i] = push_token(at(sequences[i]));
}

void PagePool::reorder(const int64_t* sequences, int64_t count, const int64_t* parents, int64_t new_count,
                       int64_t* new_sequences) {
  check_distinct(sequences, count);
  for (int64_t i = 0; i < new_count; ++i) {
    if (parents[i] < 0 || parents[i] >= count) {
      refuse("parents must be from 0 to " + std::to_string(count - 1) + ", got " + std::to_string(parents[i]) + ".");
    }
  }
  for (int64_t i = 0; i < new_count; ++i) new_sequences[i] = fork(sequences[parents[i]]);
  for (int64_t i = 0; i < count; ++i) release(sequences[i]);
}

void PagePool::visibility(const int64_t* sequences, int64_t count, uint8_t* visible) const {
  for (int64_t i = 0; i < count; ++i) {
    const Sequence& sequence = at(sequences[i]);
    uint8_t* row = visible + i * high_water_;
    int64_t tokens = num_filled(sequence) == 0 ? page_size_ : num_filled(sequence);
    for (int32_t page = sequence.last_page; page != kNone; page = pages_[page].before, tokens = page_size_) {
      for (int64_t offset = 0; offset < tokens; ++offset) row[page * page_size_ + offset] = 1;
    }
  }
}

std::vector<int32_t> PagePool::pages(int64_t sequence) const {
  std::vector<int32_t> pages((at(sequence).length + page_size_ - 1) / page_size_);
  int32_t page = at(sequence).last_page;
  for (auto place = pages.rbegin(); place != pages.rend(); ++place, page = pages_[page].before) *place = page;
  return pages;
}

std::vector<int32_t> PagePool::slots(int64_t sequence) const {
  const std::vector<int32_t> pages = this->pages(sequence);
  std::vector<int32_t> slots(at(sequence).length);
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i] = static_cast<int32_t>(pages[i / page_size_] * page_size_ + i % page_size_);
  }
  return slots;
}

}  // namespace shallowfusion

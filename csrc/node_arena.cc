#include "node_arena.h"

#include <algorithm>
#include <limits>

#include "capacity_error.h"

namespace shallowfusion {

int32_t NodeArena::take() {
  if (first_free_ != kRoot) {
    const int32_t node = first_free_;
    first_free_ = nodes_[node].parent;
    --num_free_;
    return node;
  }
  if (nodes_.size() >= static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw CapacityError("the beam state holds 2^31 - 1 tokens; release finished utterances.");
  }
  parts_.resize(parts_.size() + num_parts_);
  nodes_.emplace_back();
  return static_cast<int32_t>(nodes_.size() - 1);
}

int32_t NodeArena::add(int32_t parent, int64_t token, float total, const float* parts) {
  const int32_t node = take();
  nodes_[node] = Node{token, total, parent, 1};
  std::copy_n(parts, num_parts_, parts_.data() + static_cast<int64_t>(node) * num_parts_);
  retain(parent);
  return node;
}

void NodeArena::release(int32_t node) {
  while (node != kRoot && --nodes_[node].num_references == 0) {
    const int32_t parent = nodes_[node].parent;
    nodes_[node].parent = first_free_;
    first_free_ = node;
    ++num_free_;
    node = parent;
  }
}

}  // namespace shallowfusion

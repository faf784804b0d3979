// The tree of tokens that live and finished hypotheses share: a ref-counted arena with a free list.
#pragma once

#include <cstdint>
#include <vector>

namespace shallowfusion {

class NodeArena {
 public:
  static constexpr int32_t kRoot = -1;  // the empty prefix: no node, total 0, never counted

  explicit NodeArena(int64_t num_parts) : num_parts_(num_parts) {}

  // A new child of `parent`; the caller owns one reference. `parts` holds num_parts values, copied.
  int32_t add(int32_t parent, int64_t token, float total, const float* parts);

  void retain(int32_t node) {
    if (node != kRoot) ++nodes_[node].num_references;
  }

  // Gives one reference back; a node nobody refers to is freed and gives back its parent.
  void release(int32_t node);

  float total(int32_t node) const { return node == kRoot ? 0.0f : nodes_[node].total; }
  int64_t token(int32_t node) const { return nodes_[node].token; }
  int32_t parent(int32_t node) const { return nodes_[node].parent; }
  const float* parts(int32_t node) const { return parts_.data() + static_cast<int64_t>(node) * num_parts_; }

  int64_t num_parts() const { return num_parts_; }
  int64_t num_nodes() const { return static_cast<int64_t>(nodes_.size()) - num_free_; }

 private:
  struct Node {
    int64_t token;
    float total;
    int32_t parent;  // the next free node when this one is free
    int32_t num_references;
  };

  int32_t take();

  int64_t num_parts_;
  std::vector<Node> nodes_;
  std::vector<float> parts_;  // [nodes, num_parts]
  int32_t first_free_ = kRoot;
  int64_t num_free_ = 0;
};

}  // namespace shallowfusion

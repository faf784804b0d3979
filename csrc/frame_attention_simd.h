// Loop bodies of attention over frames, shared by the SIMD levels; included by fused_step_simd.h behind its loaders.
#pragma once

#include "frame_attention.h"

namespace shallowfusion {

constexpr int64_t kTileFrames = kMaxLanes;  // frames whose keys are float32 at a time

// The dot products of one row with the frames of a tile, [kTileFrames, dim] float32.
template <class Simd>
void score_tile(const float* query, const float* tile, int64_t tile_stride, int64_t dim, float* scores) {
  for (int64_t first = 0; first < kTileFrames; first += Simd::lanes) {
    typename Simd::Vector sums[Simd::lanes];
    for (auto& sum : sums) sum = Simd::broadcast(0.0f);
    const float* own = tile + first * tile_stride;
    for (int64_t at = 0; at < dim; at += Simd::lanes) {
      const typename Simd::Vector part = Simd::load(query + at);
      for (int64_t frame = 0; frame < Simd::lanes; ++frame) {
        sums[frame] = Simd::multiply_add(part, Simd::load(own + frame * tile_stride + at), sums[frame]);
      }
    }
    Simd::store(scores + first, Simd::sum_each(sums));
  }
}

// Asks for the memory of a block that is read soon: what computes meanwhile hides the wait.
template <class Element>
void ask_for(const void* ahead, int64_t dim, int64_t frame_stride, int64_t frames) {
  const auto* from = static_cast<const Element*>(ahead);
  constexpr auto line = static_cast<int64_t>(64 / sizeof(Element));
  for (int64_t frame = 0; frame < frames; ++frame) {
    for (int64_t at = 0; at < dim; at += line) __builtin_prefetch(from + frame * frame_stride + at);
  }
}

template <class Simd, Dtype dtype>
void frame_scores(const float* query, int64_t rows, int64_t dim, const void* keys, int64_t frame_stride, int64_t frames,
                  const void* ahead, float* scores, int64_t score_stride) {
  using Load = Loader<Simd, dtype>;
  const auto* from = static_cast<const typename Load::Element*>(keys);
  if (ahead != nullptr) ask_for<typename Load::Element>(ahead, dim, frame_stride, frames);
  alignas(64) float tile[kTileFrames * kMostDim];
  for (int64_t start = 0; start < frames; start += kTileFrames) {
    const int64_t count = frames - start < kTileFrames ? frames - start : kTileFrames;
    const auto* own = from + start * frame_stride;
    const float* read = tile;
    int64_t stride = dim;
    if constexpr (dtype == Dtype::float32) {
      if (count == kTileFrames) {
        read = own;
        stride = frame_stride;
      }
    }
    if (read == tile) {
      for (int64_t frame = 0; frame < kTileFrames; ++frame) {
        for (int64_t at = 0; at < dim; at += Simd::lanes) {
          const auto part = frame < count ? Load::load(own + frame * frame_stride + at) : Simd::broadcast(0.0f);
          Simd::store(tile + frame * dim + at, part);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      score_tile<Simd>(query + row * dim, read, stride, dim, scores + row * score_stride + start);
    }
  }
}

template <class Simd>
float frame_shares(float* scores, int64_t count) {
  using Vector = typename Simd::Vector;
  const int64_t whole = round_up(count, kMaxLanes);
  for (int64_t at = count; at < whole; ++at) scores[at] = kImpossible;
  Vector most = Simd::broadcast(kImpossible);
  for (int64_t at = 0; at < whole; at += Simd::lanes) most = Simd::larger(Simd::load(scores + at), most);
  const Vector shift = Simd::broadcast(-Simd::largest(most));
  const Vector zero = Simd::broadcast(0.0f);
  Vector sum = zero;
  for (int64_t at = 0; at < whole; at += Simd::lanes) {
    const Vector share = Simd::add_exp2(Simd::add(Simd::load(scores + at), shift), zero);
    Simd::store(scores + at, share);
    sum = Simd::add(sum, share);
  }
  float total = Simd::sum(sum);
  for (int64_t at = count; at < whole; ++at) {
    total -= scores[at];
    scores[at] = 0.0f;
  }
  return total;
}

// `rows` rows and `parts` vectors of each, all in registers over the frames of the block.
template <class Simd, Dtype dtype, int rows, int parts>
void mix_part(const float* shares, int64_t share_stride, const typename Loader<Simd, dtype>::Element* values,
              int64_t frame_stride, int64_t frames, float* output, int64_t dim) {
  using Vector = typename Simd::Vector;
  Vector sums[rows][parts];
  for (int row = 0; row < rows; ++row) {
    for (int part = 0; part < parts; ++part) sums[row][part] = Simd::load(output + row * dim + part * Simd::lanes);
  }
  for (int64_t frame = 0; frame < frames; ++frame) {
    Vector value[parts];
    for (int part = 0; part < parts; ++part) {
      value[part] = Loader<Simd, dtype>::load(values + frame * frame_stride + part * Simd::lanes);
    }
    for (int row = 0; row < rows; ++row) {
      const Vector share = Simd::broadcast(shares[row * share_stride + frame]);
      for (int part = 0; part < parts; ++part) sums[row][part] = Simd::multiply_add(share, value[part], sums[row][part]);
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int part = 0; part < parts; ++part) Simd::store(output + row * dim + part * Simd::lanes, sums[row][part]);
  }
}

template <class Simd, Dtype dtype, int rows>
void mix_rows(const float* shares, int64_t share_stride, int64_t dim,
              const typename Loader<Simd, dtype>::Element* values, int64_t frame_stride, int64_t frames,
              float* output) {
  constexpr int64_t most = 4 * Simd::lanes;
  int64_t at = 0;
  for (; at + most <= dim; at += most) {
    mix_part<Simd, dtype, rows, 4>(shares, share_stride, values + at, frame_stride, frames, output + at, dim);
  }
  for (; at < dim; at += Simd::lanes) {
    mix_part<Simd, dtype, rows, 1>(shares, share_stride, values + at, frame_stride, frames, output + at, dim);
  }
}

template <class Simd, Dtype dtype>
void frame_mix(const float* shares, int64_t share_stride, int64_t rows, int64_t dim, const void* values,
               int64_t frame_stride, int64_t frames, const void* ahead, float* output) {
  using Element = typename Loader<Simd, dtype>::Element;
  if (ahead != nullptr) ask_for<Element>(ahead, dim, frame_stride, frames);
  const auto* from = static_cast<const Element*>(values);
  constexpr int most = Simd::lanes == kMaxLanes ? 5 : 2;  // rows whose sums fit the registers
  int64_t row = 0;
  for (; row + most <= rows; row += most) {
    mix_rows<Simd, dtype, most>(shares + row * share_stride, share_stride, dim, from, frame_stride, frames,
                                output + row * dim);
  }
  for (; row + 2 <= rows; row += 2) {
    mix_rows<Simd, dtype, 2>(shares + row * share_stride, share_stride, dim, from, frame_stride, frames,
                             output + row * dim);
  }
  if (row < rows) {
    mix_rows<Simd, dtype, 1>(shares + row * share_stride, share_stride, dim, from, frame_stride, frames,
                             output + row * dim);
  }
}

template <class Simd, Dtype dtype>
void fill_frame_dtype(Kernels& kernels) {
  kernels.frame_scores[static_cast<int>(dtype)] = &frame_scores<Simd, dtype>;
  kernels.frame_mix[static_cast<int>(dtype)] = &frame_mix<Simd, dtype>;
}

}  // namespace shallowfusion

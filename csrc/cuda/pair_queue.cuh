// The queue of tile_queue.cuh where a slot has room for a whole block: then one of K and one of V take turns, and what to ask for is
// known where it is asked.
#pragma once

#include "cuda/tile_stream.cuh"

namespace foldkv::cuda {

template <class S, class K, class V>
class PairQueue : TileStream<S, K, V> {
  using Base = TileStream<S, K, V>;
  using typename Base::Span;
  static constexpr int kPairs = S::kStages / 2;
  static_assert(S::kStageTokens == kNarrowBlock && S::kStages % 2 == 0 && (kPairs & (kPairs - 1)) == 0,
                "pairs of slots");
  // In place of a row: tokens that are not wanted, and the end of the stream.
  static constexpr int kNothing = S::kStageTokens, kEnd = -1;

 public:
  using Base::clear_unseen, Base::drain, Base::kAsked, Base::open, Base::set_up;

  __device__ PairQueue(const AttendParams& p, const TileMaps& maps) : Base(p, maps), block_(0) {}

  __device__ __forceinline__ void start(const WorkItem*, int) {
    token_ = row_ = 0;
    ask_keys(0);
#pragma unroll
    for (int i = 1; i < kPairs; ++i) {
      ask_values(i - 1);
      ask_keys(i);
    }
  }

  // The next slot of K, then that of V, filled. Also a barrier for the block; the slot handed out before is free again.
  __device__ __forceinline__ uint32_t next_keys() {
    __syncthreads();
    ask_values(kPairs - 1);
    return take(0);
  }
  __device__ __forceinline__ uint32_t next_values() {
    __syncthreads();
    ask_keys(kPairs);
    const uint32_t values = take(1);
    ++block_;
    return values;
  }

 private:
  __device__ __forceinline__ int index(int ahead) const { return (block_ + ahead) % kPairs * 2; }

  __device__ __forceinline__ uint32_t take(int which) const {
    const int now = index(0) + which;
    barrier_wait(Base::barrier(now), block_ / kPairs & 1);
    return Base::slot(now);
  }

  // Of the block after the last one asked for.
  __device__ __forceinline__ void ask_keys(int ahead) {
    if (row_ == kEnd) return;
    Span span = Base::cursor().span;
    const int before = token_;
    token_ += span.size;
    if (token_ >= span.end) {
      span = Base::next_pass();
      if (span.end == 0) {
        row_ = kEnd;
        return;
      }
      token_ = span.block;
    } else {
      Base::next_block(before, token_, span);
    }
    const int first = Base::own(token_);
    const bool wanted = Base::wanted(first, token_, span);
    row_ = wanted ? first - token_ : kNothing;
    Base::copy(index(ahead), false, first, first - token_, wanted);
  }
  // Of the last block that keys were asked for of.
  __device__ __forceinline__ void ask_values(int ahead) {
    if (row_ == kEnd) return;
    Base::copy(index(ahead) + 1, true, token_ + row_, row_, row_ != kNothing);
  }

  unsigned block_;  // handed out so far
  int token_;  // the first of the last block asked for
  int row_;  // that this warp's part of it has in a slot
};

}  // namespace foldkv::cuda

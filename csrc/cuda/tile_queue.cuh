// The queue through which keys and values come in: slots in shared memory, filled by the copy engine ahead of what is computed.
#pragma once

#include "cuda/tile_stream.cuh"

namespace foldkv::cuda {

template <class S, class K, class V>
class TileQueue : TileStream<S, K, V> {
  using Base = TileStream<S, K, V>;
  using typename Base::Span;

 public:
  using Base::clear_unseen, Base::drain, Base::kAsked, Base::open, Base::set_up;

  __device__ TileQueue(const AttendParams& p, const TileMaps& maps) : Base(p, maps), turn_(0) {}

  // Begin the items; all threads have left the slots.
  __device__ __forceinline__ void start(const WorkItem*, int) {
    begin_pass();
    int write = index();
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) {
      ask(write);
      write = write + 1 == S::kStages ? 0 : write + 1;
    }
  }

  // The next slot, filled, of K or V, whichever it is. Also a barrier for the block; the slot handed out before is free again.
  __device__ __forceinline__ uint32_t next_keys() { return next(); }
  __device__ __forceinline__ uint32_t next_values() { return next(); }

 private:
  __device__ __forceinline__ uint32_t next() {
    __syncthreads();
    const int now = index();
    ask(now == 0 ? S::kStages - 1 : now - 1);
    if constexpr (S::kStages == 2) {
      barrier_wait(Base::barrier(now), turn_ / 2 & 1);
      ++turn_;
    } else {
      barrier_wait(Base::barrier(now), turn_ >= S::kStages);
      turn_ = turn_ + 1 == 2 * S::kStages ? 0 : turn_ + 1;
    }
    return Base::slot(now);
  }

  // Of the slot that is handed out next. Turns are counted so that they tell phases of the slots' barriers, too.
  __device__ __forceinline__ int index() const {
    return S::kStages == 2 ? turn_ & 1 : turn_ < S::kStages ? turn_ : turn_ - S::kStages;
  }
  __device__ __forceinline__ static int slots(const Span& span, int token) {
    return static_cast<unsigned>(min(span.end - token, span.size) + S::kStageTokens - 1) / S::kStageTokens;
  }

  __device__ __forceinline__ void begin_pass() {
    const Span span = Base::next_pass();
    token_ = span.block;
    left_ = slots(span, token_);
  }

  // Asks for the stream's next tokens, to be put into a free slot.
  __device__ __forceinline__ void ask(int write) {
    if (left_ == 0) return;
    const bool values = left_ < 0;
    const Span span = Base::cursor().span;
    const int first = Base::own(token_), row = first - token_;
    if (row < S::kStageTokens) Base::copy(write, values, first, row, Base::wanted(first, span.block, span));
    token_ += S::kStageTokens;
    left_ += values ? 1 : -1;
    if (left_ == 0) next_run(values, span);
  }

  // After K the values of the same block, after those the next block.
  __device__ __forceinline__ void next_run(bool values, const Span& span) {
    if (!values) {
      token_ = span.block;
      left_ = -slots(span, token_);
      return;
    }
    token_ = span.block + span.size;
    if (token_ >= span.end) {
      begin_pass();
      return;
    }
    left_ = slots(span, token_);
    __syncwarp();
    if (threadIdx.x % 32 == 0) Base::cursor().span.block = token_;
    __syncwarp();
    Base::next_block(span.block, token_, span);
  }

  int turn_;  // slots handed out: modulo 2 kStages, but for kStages of 2
  int token_,
      left_;  // the first token asked for next; slots left in this block, negative where they are of V; 0 at the end
};

}  // namespace foldkv::cuda

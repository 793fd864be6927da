// The queue through which keys and values come in: slots in shared memory, filled by cp.async several slots ahead.
//
// A worker's items are one stream: for each pass and block of tokens first its slots of K, then those of V. The stream
// runs ahead over block and item borders, so memory stays busy while a block computes.
#pragma once

#include "core/params.h"
#include "cuda/attend_shape.cuh"

namespace foldkv::cuda {

// log2 of 16, 32, 64 or 128.
__device__ __forceinline__ int page_shift(int page_size) {
  return page_size == 16 ? 4 : page_size == 32 ? 5 : page_size == 64 ? 6 : 7;
}

// Where the stream stands. Each warp keeps its own in shared memory: registers are scarce, and it is needed once a slot.
struct alignas(16) Cursor {
  int low, high;              // keys that the pass sees
  int token, end;             // of the block, of the item
  int stage, num_stages;      // slots of the block: num_stages of K, then as many of V
  int size, first_row;        // tokens of a block; first query row of the pass
  const WorkItem* item;
  const WorkItem* item_end;
  const int32_t* table;       // page ids of the sequence
};

template <class S, class K, class V, int D>
class Queue {
 public:
  __device__ Queue(const AttendParams& p, uint32_t shared, int kv_head)
      : p_(p), shared_(shared), kv_head_(kv_head), page_shift_(page_shift(p.page_size)) {}

  // Begin a worker's items; all threads have left the slots.
  __device__ void start(const WorkItem* item, const WorkItem* end) {
    Cursor c;
    c.item = item;
    c.item_end = end;
    c.first_row = -S::kMaxRows;
    next_pass(c);
    if (threadIdx.x % 32 == 0) cursor() = c;
    __syncwarp();
    read_ = 0;
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) issue(i);
  }

  // The next slot, filled; also a barrier for the block. The slot handed out before is free again.
  __device__ uint32_t next() {
    copy_wait<S::kStages - 2>();
    __syncthreads();
    issue(read_ == 0 ? S::kStages - 1 : read_ - 1);
    const uint32_t slot = shared_ + read_ * S::kSlotBytes;
    read_ = read_ + 1 == S::kStages ? 0 : read_ + 1;
    return slot;
  }

 private:
  __device__ static Cursor& cursor() {
    return reinterpret_cast<Cursor*>(shared_memory + S::kCursorAt)[threadIdx.x / 32];
  }

  __device__ void issue(int write) {
    Cursor c = cursor();
    if (c.item < c.item_end) {
      const bool values = c.stage >= c.num_stages;
      const int token = c.token + (values ? c.stage - c.num_stages : c.stage) * S::kStageTokens;
      const uint32_t slot = shared_ + write * S::kSlotBytes;
      if constexpr (S::kKRow == S::kVRow) {
        copy_codes<S::kKRow / 16>(c, values ? p_.v_cache.codes : p_.k_cache.codes, slot, token);
      } else if (values) {
        copy_codes<S::kVRow / 16>(c, p_.v_cache.codes, slot, token);
      } else {
        copy_codes<S::kKRow / 16>(c, p_.k_cache.codes, slot, token);
      }
      if (!values) {
        if constexpr (K::kInteger) {
          if (p_.k_cache.format.dynamic) copy_meta(c, p_.k_cache, slot + S::kKMeta, token, threadIdx.x);
        }
        if constexpr (V::kInteger) {
          if (p_.v_cache.format.dynamic) copy_meta(c, p_.v_cache, slot + S::kVMeta, token, threadIdx.x - 32);
        }
      }
      if (++c.stage < 2 * c.num_stages) {
        if (threadIdx.x % 32 == 0) cursor().stage = c.stage;
      } else {
        next_block(c);
        if (threadIdx.x % 32 == 0) cursor() = c;
      }
      __syncwarp();
    }
    copy_commit();
  }

  __device__ void next_block(Cursor& c) const {
    c.stage = 0;
    c.token += c.size;
    if (c.token >= c.end) {
      next_pass(c);
    } else {
      c.num_stages = ceil_div(min(c.end - c.token, c.size), S::kStageTokens);
    }
  }

  __device__ void next_pass(Cursor& c) const {
    const int group = p_.h_q / opaque(p_.h_kv);
    for (; c.item < c.item_end; ++c.item, c.first_row = -S::kMaxRows) {
      const WorkItem item = *c.item;
      c.first_row += S::kMaxRows;
      if (c.first_row >= item.q_count * group) continue;
      const Pass pass(item, group, c.first_row, S::kMaxTiles, p_.window_left);
      if (pass.begin >= pass.end) continue;
      c.low = pass.low;
      c.high = pass.high;
      c.end = pass.end;
      c.token = pass.begin;
      c.size = pass.block;
      c.table = p_.block_table + item.seq * p_.table_stride;
      c.stage = 0;
      c.num_stages = ceil_div(min(c.end - c.token, c.size), S::kStageTokens);
      return;
    }
  }

  // kStageTokens rows of kUnits * 16 bytes, from token `first` on. Rows that no query sees are zero and are not fetched,
  // nor are their page ids read.
  template <int kUnits>
  __device__ __forceinline__ void copy_codes(const Cursor& c, const uint8_t* pool, uint32_t slot, int first) {
    constexpr int kRow = 16 * kUnits, kPieces = S::kStageTokens * kUnits, kEach = (kPieces + kThreads - 1) / kThreads;
    constexpr int kTogether = kEach < 4 ? kEach : 4;  // page ids on their way at a time
    // A thread's pieces lie at one unit, kThreads / kUnits rows apart, and are swizzled alike.
    constexpr bool kEven = kThreads % kUnits == 0 && kThreads / kUnits % 8 == 0;
    const int thread = opaque(threadIdx.x);
    const uint32_t page_bytes = static_cast<uint32_t>(p_.h_kv << page_shift_) * kRow;
    pool += (static_cast<int64_t>(kv_head_) << page_shift_) * kRow;
    const int row0 = thread / kUnits, unit0 = thread % kUnits;
    const uint32_t to0 = slot + row0 * kRow + ((unit0 ^ Swizzle<kUnits>::of(row0)) << 4);
    const bool whole = first >= c.low && first + S::kStageTokens <= c.high;
#pragma unroll
    for (int begin = 0; begin < kEach; begin += kTogether) {
      uint32_t page[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        int token = first + (kEven ? row0 + (begin + i) * (kThreads / kUnits) : (thread + (begin + i) * kThreads) / kUnits);
        if (!whole) token = min(max(token, c.low), c.high - 1);
        page[i] = page_id(c.table + (token >> page_shift_));
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int piece = thread + (begin + i) * kThreads;
        const int row = kEven ? row0 + (begin + i) * (kThreads / kUnits) : piece / kUnits;
        const int unit = kEven ? unit0 : piece % kUnits;
        const uint32_t to = kEven ? to0 + (begin + i) * (kThreads * 16)
                                  : slot + row * kRow + ((unit ^ Swizzle<kUnits>::of(row)) << 4);
        const int token = first + row, offset = (token & ((1 << page_shift_) - 1)) * kRow + unit * 16;
        const uint8_t* from = pool + (static_cast<uint64_t>(page[i]) * page_bytes + offset);
        if (begin + i >= kEach || (kPieces % kThreads != 0 && piece >= kPieces)) break;
        if (whole) {
          copy_async(to, from);
        } else {
          copy_async(to, from, token >= c.low && token < c.high ? 16 : 0);
        }
      }
    }
  }

  // A table that names no page of the pool gives wrong numbers, not a fault.
  __device__ uint32_t page_id(const int32_t* at) const { return min(static_cast<uint32_t>(__ldg(at)), p_.max_page); }

  // Scales of the same tokens, 16 bytes a thread.
  __device__ void copy_meta(const Cursor& c, const Cache& cache, uint32_t to, int first, int thread) {
    const int bytes = cache.format.meta_bytes(), tokens = bytes == 4 ? 4 : 8;
    if (thread < 0 || thread * 16 >= S::kStageTokens * bytes) return;
    const int token = first + thread * tokens;
    int valid = c.high - token < tokens ? c.high - token : tokens;
    if (token + tokens <= c.low || valid < 0) valid = 0;
    const int known = valid > 0 ? max(token, c.low) : c.low;
    const uint32_t page = page_id(c.table + (known >> page_shift_));
    const int64_t tile = static_cast<int64_t>(page) * p_.h_kv + kv_head_;
    const int offset = valid > 0 ? token & ((1 << page_shift_) - 1) : 0;
    copy_async(to + thread * 16, cache.meta + ((tile << page_shift_) + offset) * bytes, valid * bytes);
  }

  const AttendParams& p_;
  const uint32_t shared_;
  const int kv_head_, page_shift_;
  int read_;
};

}  // namespace foldkv::cuda

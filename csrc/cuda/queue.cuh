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
    fetch_pages(c);
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
      const int token = slot_token(c);
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
          if (p_.k_cache.format.dynamic) copy_meta(c, p_.k_cache, slot + S::kKMeta, token, 0);
        }
        if constexpr (V::kInteger) {
          if (p_.v_cache.format.dynamic) copy_meta(c, p_.v_cache, slot + S::kVMeta, token, 1);
        }
      }
      if (++c.stage < 2 * c.num_stages) {
        if (threadIdx.x % 32 == 0) cursor().stage = c.stage;
      } else {
        next_block(c);
        if (threadIdx.x % 32 == 0) cursor() = c;
      }
      __syncwarp();
      fetch_pages(c);
    }
    copy_commit();
  }

  // First token of the cursor's slot.
  __device__ static int slot_token(const Cursor& c) {
    return c.token + (c.stage >= c.num_stages ? c.stage - c.num_stages : c.stage) * S::kStageTokens;
  }

  // Page ids of the next slot: lane l has that of the 16 tokens from 16 l on. They come a slot ahead of their use. A table
  // that names no page of the pool gives wrong numbers, not a fault.
  static constexpr int kGroups = S::kStageTokens / 16;
  __device__ void fetch_pages(const Cursor& c) {
    if (c.item >= c.item_end) return;
    const int group = opaque(threadIdx.x) % kGroups;
    const int token = min(max(slot_token(c) + 16 * group, c.low), c.high - 1);
    pages_ = min(static_cast<uint32_t>(__ldg(c.table + (token >> page_shift_))), p_.max_page);
  }
  __device__ uint32_t page_of(int row) const { return __shfl_sync(0xffffffffu, pages_, row / 16); }

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
    // A thread's pieces lie at one unit, kThreads / kUnits rows apart, and are swizzled alike.
    constexpr bool kEven = kThreads % kUnits == 0 && kThreads / kUnits % 8 == 0;
    const int thread = opaque(threadIdx.x);
    const uint32_t page_bytes = static_cast<uint32_t>(p_.h_kv << page_shift_) * kRow;
    pool += (static_cast<int64_t>(kv_head_) << page_shift_) * kRow;
    const int row0 = thread / kUnits, unit0 = thread % kUnits;
    const uint32_t to0 = slot + row0 * kRow + ((unit0 ^ Swizzle<kUnits>::of(row0)) << 4);
    const int stop = min(c.high, c.token + c.size);  // a block may be smaller than a slot
    const bool whole = first >= c.low && first + S::kStageTokens <= stop;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int piece = thread + i * kThreads;
      const int row = kEven ? row0 + i * (kThreads / kUnits) : piece / kUnits, unit = kEven ? unit0 : piece % kUnits;
      const uint32_t to = kEven ? to0 + i * (kThreads * 16)
                                : slot + row * kRow + ((unit ^ Swizzle<kUnits>::of(row)) << 4);
      const uint32_t page = page_of(row);
      const int token = first + row, offset = (token & ((1 << page_shift_) - 1)) * kRow + unit * 16;
      const uint8_t* from = pool + (static_cast<uint64_t>(page) * page_bytes + offset);
      if (kPieces % kThreads == 0 || piece < kPieces) {
        if (whole) {
          copy_async(to, from);
        } else {
          copy_async(to, from, token >= c.low && token < stop ? 16 : 0);
        }
      }
    }
  }

  // Scales of the same tokens, 16 bytes a lane of `warp`.
  __device__ void copy_meta(const Cursor& c, const Cache& cache, uint32_t to, int first, int warp) {
    if (threadIdx.x / 32 != warp) return;
    const int lane = opaque(threadIdx.x) % 32, bytes = cache.format.meta_bytes(), tokens = bytes == 4 ? 4 : 8;
    const uint32_t page = page_of(min(lane * tokens, S::kStageTokens - 1));
    if (lane * tokens >= S::kStageTokens) return;
    const int token = first + lane * tokens;
    int valid = min(c.high - token, tokens);
    if (token + tokens <= c.low || valid < 0) valid = 0;
    const int64_t tile = static_cast<int64_t>(page) * p_.h_kv + kv_head_;
    const int offset = token & ((1 << page_shift_) - 1);
    copy_async(to + lane * 16, cache.meta + ((tile << page_shift_) + offset) * bytes, valid * bytes);
  }

  const AttendParams& p_;
  const uint32_t shared_;
  const int kv_head_, page_shift_;
  int read_;
  uint32_t pages_;
};

}  // namespace foldkv::cuda

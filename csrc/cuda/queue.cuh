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

// Where the stream stands: a run of slots of K, or of V, and the block, pass and item it belongs to. Each warp keeps its own
// in shared memory: registers are scarce, and it is needed once a slot.
struct alignas(16) Cursor {
  int token;                  // first of the next slot
  int left;                   // slots left of the run; kValues more where they are of V; 0 at the end
  int low, stop;              // keys that the pass sees, clipped to the block
  const int32_t* table;       // page ids of the sequence
  int high, block;            // end of the keys that the pass sees; first token of the block
  int end, size;              // end of the item's tokens; tokens of a block
  int first_row;              // first query row of the pass
  int freed;                  // slots that the last call of next() handed out
  const WorkItem* item;
  const WorkItem* item_end;
};

template <class S, class K, class V, int D>
class Queue {
  static constexpr int kValues = 1 << 16;

 public:
  __device__ Queue(const AttendParams& p, uint32_t shared, int kv_head)
      : p_(p), shared_(shared), kv_head_(kv_head), page_shift_(page_shift(p.page_size)) {}

  // Begin a worker's items; all threads have left the slots.
  __device__ __forceinline__ void start(const WorkItem* item, const WorkItem* end) {
    if (threadIdx.x % 32 == 0) {
      Cursor& c = cursor();
      c.item = item;
      c.item_end = end;
      c.first_row = -S::kMaxRows;
      c.freed = 1;
      next_pass(c);
    }
    __syncwarp();
    if (cursor().left != 0) fetch_pages(cursor().table, cursor().token, cursor().low, cursor().stop);
    read_ = 0;
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) issue(i);
  }

  // The next `count` slots, 1 .. kTogether, filled: the first one's index. Also a barrier for the block. The slots handed out
  // before are free again.
  __device__ __forceinline__ int next(int count) {
    int freed = 1;
    if constexpr (S::kTogether == 1) {
      copy_wait<S::kStages - 2>();
    } else {
      freed = cursor().freed;
      // On their way or here: all slots but the freed ones; the oldest `count` must be here.
      const int others = freed + count;
      if (others == 4) {
        copy_wait<S::kStages - 4>();
      } else if (others == 3) {
        copy_wait<S::kStages - 3>();
      } else {
        copy_wait<S::kStages - 2>();
      }
    }
    __syncthreads();
    int write = read_ - freed < 0 ? read_ - freed + S::kStages : read_ - freed;
#pragma unroll 1
    for (int i = 0; i < freed; ++i) {
      issue(write);
      write = write + 1 == S::kStages ? 0 : write + 1;
    }
    const int first = read_;
    read_ = read_ + count < S::kStages ? read_ + count : read_ + count - S::kStages;
    if constexpr (S::kTogether > 1) {
      if (threadIdx.x % 32 == 0) cursor().freed = count;
      __syncwarp();
    }
    return first;
  }

  // Where the slot `i` after `first` is.
  __device__ __forceinline__ uint32_t slot(int first, int i) const {
    const int index = first + i < S::kStages ? first + i : first + i - S::kStages;
    return shared_ + index * S::kSlotBytes;
  }

 private:
  __device__ static Cursor& cursor() {
    return reinterpret_cast<Cursor*>(shared_memory + S::kCursorAt)[threadIdx.x / 32];
  }

  __device__ __forceinline__ void issue(int write) {
    const int4 now = *reinterpret_cast<const int4*>(&cursor().token);
    int token = now.x, left = now.y, low = now.z, stop = now.w;
    if (left != 0) {
      const uint32_t slot = shared_ + write * S::kSlotBytes;
      const bool values = left > kValues;
      if constexpr (S::kKRow == S::kVRow) {
        copy_codes<S::kKRow / 16>(values ? p_.v_cache.codes : p_.k_cache.codes, slot, token, low, stop);
      } else if (values) {
        copy_codes<S::kVRow / 16>(p_.v_cache.codes, slot, token, low, stop);
      } else {
        copy_codes<S::kKRow / 16>(p_.k_cache.codes, slot, token, low, stop);
      }
      if (!values) {
        if constexpr (K::kInteger) {
          if (p_.k_cache.format.dynamic) copy_meta(p_.k_cache, slot + S::kKMeta, token, low, stop, 0);
        }
        if constexpr (V::kInteger) {
          if (p_.v_cache.format.dynamic) copy_meta(p_.v_cache, slot + S::kVMeta, token, low, stop, 1);
        }
      }
      token += S::kStageTokens;
      --left;
      const int32_t* table = cursor().table;
      if (left % kValues != 0) {
        if (threadIdx.x % 32 == 0) *reinterpret_cast<int2*>(&cursor().token) = make_int2(token, left);
      } else {
        if (threadIdx.x % 32 == 0) next_run(cursor(), values);
        __syncwarp();
        const int4 then = *reinterpret_cast<const int4*>(&cursor().token);
        token = then.x, left = then.y, low = then.z, stop = then.w, table = cursor().table;
      }
      __syncwarp();
      if (left != 0) fetch_pages(table, token, low, stop);
    }
    copy_commit();
  }

  // Page ids of the next slot: lane l has that of the 16 tokens from 16 l on. They come a slot ahead of their use. A table
  // that names no page of the pool gives wrong numbers, not a fault.
  static constexpr int kGroups = S::kStageTokens / 16;
  __device__ __forceinline__ void fetch_pages(const int32_t* table, int token, int low, int stop) {
    const int at = min(max(token + 16 * (opaque(threadIdx.x) % kGroups), low), stop - 1);
    pages_ = min(static_cast<uint32_t>(__ldg(table + (at >> page_shift_))), p_.max_page);
  }
  __device__ uint32_t page_of(int row) const { return __shfl_sync(0xffffffffu, pages_, row / 16); }

  // After K the values of the same block; after those the next block, pass or item.
  __device__ __forceinline__ void next_run(Cursor& c, bool values) const {
    if (!values) {
      c.token = c.block;
      c.left = kValues + ceil_div(c.stop - c.block, S::kStageTokens);
      return;
    }
    c.block += c.size;
    if (c.block >= c.end) {
      next_pass(c);
    } else {
      begin_block(c);
    }
  }

  __device__ __forceinline__ static void begin_block(Cursor& c) {
    c.token = c.block;
    c.stop = min(c.high, c.block + c.size);
    c.left = ceil_div(c.stop - c.block, S::kStageTokens);
  }

  __device__ __forceinline__ void next_pass(Cursor& c) const {
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
      c.size = pass.block;
      c.block = pass.begin;
      c.table = p_.block_table + item.seq * p_.table_stride;
      begin_block(c);
      return;
    }
    c.left = 0;
  }

  // kStageTokens rows of kUnits * 16 bytes, from token `first` on. Rows outside low .. stop - 1 are zero and are not fetched,
  // nor are their page ids read.
  template <int kUnits>
  __device__ __forceinline__ void copy_codes(const uint8_t* pool, uint32_t slot, int first, int low, int stop) {
    constexpr int kRow = 16 * kUnits, kPieces = S::kStageTokens * kUnits, kEach = (kPieces + kThreads - 1) / kThreads;
    // A thread's pieces lie at one unit, kThreads / kUnits rows apart, and are swizzled alike.
    constexpr bool kEven = kThreads % kUnits == 0 && kThreads / kUnits % 8 == 0;
    const int thread = opaque(threadIdx.x), row0 = thread / kUnits, unit0 = thread % kUnits;
    const uint32_t page_bytes = static_cast<uint32_t>(p_.h_kv << page_shift_) * kRow;
    const uint32_t to0 = slot + row0 * kRow + ((unit0 ^ Swizzle<kUnits>::of(row0)) << 4);
    pool += (static_cast<int64_t>(kv_head_) << page_shift_) * kRow;
    const auto place = [&](int i) {
      const int piece = thread + i * kThreads, row = piece / kUnits, unit = piece % kUnits;
      return kEven ? to0 + i * (kThreads * 16) : slot + row * kRow + ((unit ^ Swizzle<kUnits>::of(row)) << 4);
    };
    if (page_shift_ >= 6 && first >= low && first + S::kStageTokens <= stop) {
      // 64 tokens are one run of bytes.
      constexpr int kRuns = S::kStageTokens / 64, kRunPieces = 64 * kUnits;
      const uint8_t* from = nullptr;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (i * kThreads % kRunPieces == 0) {
          const int token = first + i * kThreads / kUnits;
          const int offset = (token & ((1 << page_shift_) - 1)) * kRow + thread * 16;
          from = pool + (static_cast<uint64_t>(page_of(i * kThreads / kUnits)) * page_bytes + offset);
        }
        static_assert(kRuns == 1 || kRunPieces % kThreads == 0, "a thread's pieces begin a run together");
        if (kPieces % kThreads == 0 || thread + i * kThreads < kPieces) {
          copy_async(place(i), from + i * kThreads % kRunPieces * 16);
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int piece = thread + i * kThreads, row = piece / kUnits, unit = piece % kUnits, token = first + row;
      const uint32_t page = page_of(row);
      const int offset = (token & ((1 << page_shift_) - 1)) * kRow + unit * 16;
      const uint8_t* from = pool + (static_cast<uint64_t>(page) * page_bytes + offset);
      if (kPieces % kThreads == 0 || piece < kPieces) copy_async(place(i), from, token >= low && token < stop ? 16 : 0);
    }
  }

  // Scales of the same tokens, 16 bytes a lane of `warp`.
  __device__ __forceinline__ void copy_meta(const Cache& cache, uint32_t to, int first, int low, int stop, int warp) {
    if (threadIdx.x / 32 != warp) return;
    const int lane = opaque(threadIdx.x) % 32, bytes = cache.format.meta_bytes(), tokens = bytes == 4 ? 4 : 8;
    const uint32_t page = page_of(min(lane * tokens, S::kStageTokens - 1));
    if (lane * tokens >= S::kStageTokens) return;
    const int token = first + lane * tokens;
    int valid = min(stop - token, tokens);
    if (token + tokens <= low || valid < 0) valid = 0;
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

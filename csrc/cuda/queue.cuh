// The queue through which keys and values come in: slots in shared memory, filled by cp.async several slots ahead.
//
// A worker's items are one stream: for each pass and block of tokens first its slots of K, then those of V. The stream
// runs ahead over block and item borders, so memory stays busy while a block computes.
#pragma once

#include "core/params.h"
#include "cuda/attend_shape.cuh"

namespace foldkv::cuda {

// Where the stream stands: a run of slots of K, or of V, and the block, pass and item it belongs to. Each warp keeps its own
// in shared memory, as registers are scarce; what is needed once a slot is in registers where there are some.
struct alignas(16) Cursor {
  int token;                  // first of the next slot
  int left;                   // slots left of the run; kValues more where they are of V; 0 at the end
  int low, stop;              // keys that the pass sees, clipped to the block
  const int32_t* table;       // page ids of the sequence
  int high, block;            // end of the keys that the pass sees; first token of the block
  int end, size;              // end of the item's tokens; tokens of a block
  int freed, read;            // slots that the last call of next() handed out; index of the next one
  const uint8_t* codes[2];    // of K and V: the kv head's in page 0
  const WorkItem* item;
  int items;                  // that are left, this one included
  int first_row;              // first query row of the pass
};

template <class S, class K, class V, int D>
class Queue {
  static constexpr int kValues = 1 << 16;
  static_assert(sizeof(Cursor) <= S::kCursorBytes, "room for it");

 public:
  __device__ explicit Queue(const AttendParams& p) : p_(p) {}

  // Begin a worker's items; all threads have left the slots.
  __device__ __forceinline__ void start(const WorkItem* item, int items) {
    if (threadIdx.x % 32 == 0) {
      Cursor& c = cursor();
      const int64_t before = static_cast<int64_t>(S::kv_head()) << page_shift();
      c.codes[0] = p_.k_cache.codes + before * S::kKRow;
      c.codes[1] = p_.v_cache.codes + before * S::kVRow;
      c.item = item;
      c.items = items;
      c.first_row = -S::kMaxRows;
      next_pass(c);
    }
    set_turn(1, 0);
    recall();
    if (run().y != 0) fetch_pages(run());
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) issue(i);
  }

  // The next `count` slots, 1 .. kTogether, filled: the first one's index. Also a barrier for the block. The slots handed out
  // before are free again.
  __device__ __forceinline__ int next(int count) {
    const int2 now = turn();
    const int freed = S::kTogether == 1 ? 1 : now.x, first = now.y;
    // On their way or here: all slots but the freed ones; the oldest `count` must be here.
    const int others = freed + count;
    if (S::kTogether == 1 || others == 2) {
      copy_wait<S::kStages - 2>();
    } else if (others == 3) {
      copy_wait<S::kStages - 3>();
    } else {
      copy_wait<S::kTogether == 1 ? 0 : S::kStages - 4>();
    }
    __syncthreads();
    int write = first - freed < 0 ? first - freed + S::kStages : first - freed;
#pragma unroll 1
    for (int i = 0; i < freed; ++i) {
      issue(write);
      write = write + 1 == S::kStages ? 0 : write + 1;
    }
    const int read = first + count < S::kStages ? first + count : first + count - S::kStages;
    set_turn(count, read);
    return first;
  }

  // Where the slot `i` after `first` is.
  __device__ __forceinline__ uint32_t slot(int first, int i) const {
    const int index = first + i < S::kStages ? first + i : first + i - S::kStages;
    return shared_base() + index * S::kSlotBytes;
  }

 private:
  __device__ static Cursor& cursor() {
    return reinterpret_cast<Cursor*>(shared_memory + S::kCursorAt)[threadIdx.x / 32];
  }

  // The run: token, left, low, stop of the cursor. The turn: freed and read.
  static constexpr bool kSpare = !S::kDecode;
  __device__ __forceinline__ int4 run() const {
    return kSpare ? *reinterpret_cast<const int4*>(&cursor().token) : run_;
  }
  __device__ __forceinline__ int2 turn() const {
    return kSpare ? *reinterpret_cast<const int2*>(&cursor().freed) : turn_;
  }
  __device__ __forceinline__ void set_turn(int freed, int read) {
    if constexpr (kSpare) {
      if (threadIdx.x % 32 == 0) *reinterpret_cast<int2*>(&cursor().freed) = make_int2(freed, read);
      __syncwarp();
    } else {
      turn_ = make_int2(freed, read);
    }
  }
  __device__ __forceinline__ void set_token(int token, int left) {
    if constexpr (kSpare) {
      __syncwarp();  // all have read what is now written anew
      if (threadIdx.x % 32 == 0) *reinterpret_cast<int2*>(&cursor().token) = make_int2(token, left);
      __syncwarp();
    } else {
      run_.x = token, run_.y = left;
    }
  }
  // The cursor has moved to another run.
  __device__ __forceinline__ void recall() {
    __syncwarp();
    if constexpr (!kSpare) run_ = *reinterpret_cast<const int4*>(&cursor().token);
  }

  __device__ __forceinline__ void issue(int write) {
    const int4 now = run();
    const int token = now.x, low = now.z, stop = now.w;
    int left = now.y;
    if (left != 0) {
      const uint32_t slot = shared_base() + write * S::kSlotBytes;
      const bool values = left > kValues;
      const uint8_t* codes = cursor().codes[values];
      if (S::kKRow == S::kVRow || !values) {
        copy_codes<S::kKRow / 16>(codes, slot, token, low, stop);
      } else {
        copy_codes<S::kVRow / 16>(codes, slot, token, low, stop);
      }
      if constexpr (K::kInteger || V::kInteger) {
        if (!values && (p_.k_cache.format.dynamic || p_.v_cache.format.dynamic)) copy_scales(slot, token, low, stop);
      }
      --left;
      if (left % kValues != 0) {
        set_token(token + S::kStageTokens, left);
      } else {
        __syncwarp();  // all have read what is now written anew
        if (threadIdx.x % 32 == 0) next_run(cursor(), values);
        recall();
      }
      if (run().y != 0) fetch_pages(run());
    }
    copy_commit();
  }

  // log2 of the page size.
  __device__ __forceinline__ int page_shift() const { return 31 - __clz(opaque(p_.page_size)); }

  // Page ids of the next slot: lane l has that of the 16 tokens from 16 l on. They come a slot ahead of their use. A table
  // that names no page of the pool gives wrong numbers, not a fault.
  static constexpr int kGroups = S::kStageTokens / 16;
  __device__ __forceinline__ void fetch_pages(const int4& run) {
    const int at = min(max(run.x + static_cast<int>(16 * (opaque(threadIdx.x) % kGroups)), run.z), run.w - 1);
    pages_ = min(static_cast<uint32_t>(__ldg(cursor().table + (at >> page_shift()))), p_.max_page);
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
    for (; c.items > 0; ++c.item, --c.items, c.first_row = -S::kMaxRows) {
      const WorkItem item = *c.item;
      c.first_row += S::kMaxRows;
      if (c.first_row >= item.q_count * group) continue;
      const Pass pass(item, group, c.first_row, S::kMaxRows, p_.window_left);
      if (pass.begin >= pass.end) continue;
      c.low = pass.low;
      c.high = pass.high;
      c.end = pass.end;
      c.size = pass.block();
      c.block = pass.begin;
      c.table = p_.block_table + item.seq * p_.table_stride;
      begin_block(c);
      return;
    }
    c.left = 0;
  }

  // kStageTokens rows of kUnits * 16 bytes, from token `first` on. Rows outside low .. stop - 1 are zero and are not fetched,
  // nor are their page ids read. `codes`: the kv head's in page 0.
  template <int kUnits>
  __device__ __forceinline__ void copy_codes(const uint8_t* codes, uint32_t slot, int first, int low, int stop) {
    constexpr int kRow = 16 * kUnits, kPieces = S::kStageTokens * kUnits, kEach = (kPieces + kThreads - 1) / kThreads;
    const int shift = page_shift();
    const unsigned thread = opaque(threadIdx.x), mask = (1u << shift) - 1;
    const uint32_t page_bytes = static_cast<uint32_t>(p_.h_kv << shift) * kRow;
    const auto place = [&](unsigned piece) {
      const unsigned row = piece / kUnits, unit = piece % kUnits;
      return slot + row * kRow + ((unit ^ Swizzle<kUnits>::of(row)) << 4);
    };
    if (shift >= 6 && first >= low && first + S::kStageTokens <= stop) {
      // 64 tokens are one run of bytes. A thread's pieces lie at one unit, rows apart, and may be swizzled alike.
      constexpr bool kEven = kThreads % kUnits == 0 && kThreads / kUnits % 8 == 0;
      constexpr int kRuns = S::kStageTokens / 64, kRunPieces = 64 * kUnits;
      static_assert(kRuns == 1 || kRunPieces % kThreads == 0, "a thread's pieces begin a run together");
      const uint32_t to0 = place(thread);
      const uint8_t* from = nullptr;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (i * kThreads % kRunPieces == 0) {
          const unsigned token = first + i * kThreads / kUnits;
          from = codes + (static_cast<uint64_t>(page_of(i * kThreads / kUnits)) * page_bytes +
                          ((token & mask) * kRow + thread * 16));
        }
        if (kPieces % kThreads == 0 || thread + i * kThreads < kPieces) {
          copy_async(kEven ? to0 + i * (kThreads * 16) : place(thread + i * kThreads),
                     from + i * kThreads % kRunPieces * 16);
        }
      }
      return;
    }
#pragma unroll 1
    for (unsigned piece = thread; piece < ceil_div(kPieces, kThreads) * kThreads; piece += kThreads) {
      const unsigned row = piece / kUnits, unit = piece % kUnits;
      const int token = first + static_cast<int>(row);
      const uint32_t page = page_of(row), offset = (token & mask) * kRow + unit * 16;
      const bool seen = token >= low && token < stop;
      if (kPieces % kThreads == 0 || piece < kPieces) {
        copy_async(place(piece), codes + (static_cast<uint64_t>(page) * page_bytes + offset), seen ? 16 : 0);
      }
    }
  }

  // Scales of the same tokens, 16 bytes a lane: of K by the first warp, of V by the second.
  __device__ __forceinline__ void copy_scales(uint32_t slot, int first, int low, int stop) {
    const unsigned thread = opaque(threadIdx.x), warp = thread / 32, lane = thread % 32;
    if (warp > 1) return;
    const Format format = warp == 0 ? p_.k_cache.format : p_.v_cache.format;
    if (!format.dynamic) return;
    const uint8_t* meta = warp == 0 ? p_.k_cache.meta : p_.v_cache.meta;
    const uint32_t to = slot + (warp == 0 ? S::kKMeta : S::kVMeta) + lane * 16;
    const int bytes = format.meta_bytes(), tokens = 16 / bytes, shift = page_shift();
    const uint32_t page = page_of(min(static_cast<int>(lane) * tokens, S::kStageTokens - 1));
    if (lane * tokens >= S::kStageTokens) return;
    const int token = first + static_cast<int>(lane) * tokens;
    int valid = min(stop - token, tokens);
    if (token + tokens <= low || valid < 0) valid = 0;
    const int64_t tile = static_cast<int64_t>(page) * p_.h_kv + S::kv_head();
    const int offset = token & ((1 << shift) - 1);
    copy_async(to, meta + ((tile << shift) + offset) * bytes, valid * bytes);
  }

  const AttendParams& p_;
  uint32_t pages_;
  int4 run_;
  int2 turn_;
};

}  // namespace foldkv::cuda

// The queue where there is no copy engine (tile_queue.cuh): slots filled by cp.async, 16 bytes a lane.
#pragma once

#include "cuda/stream.cuh"

namespace foldkv::cuda {

// The slots that come next: of K, or of V, of one block of tokens.
struct alignas(16) Run {
  int token;      // first of the next slot
  int left;       // slots left, negative where they are of V; 0 at the end of all
  int low, stop;  // keys that the pass sees, clipped to the block
};
struct alignas(16) Block {
  int token, size;  // the first, and how many
  int end;          // of the item's tokens that the pass sees
};

// Where the stream stands. Each warp keeps its own in shared memory, as registers are scarce; the decode kernel has some for
// what is needed once a slot.
struct Cursor {
  Run run;
  Block block;
  Stream stream;
  int first;                // index of the slot that is handed out next
  const uint8_t* codes[2];  // of K and V: the kv head's in page 0
};

template <class S, class K, class V>
class CopyQueue {
  static_assert(sizeof(Cursor) <= S::kCursorBytes && alignof(Cursor) == 16, "room for it");
  static constexpr bool kHolds = S::kDecode;  // in registers

 public:
  __device__ CopyQueue(const AttendParams& p, const TileMaps&) : p_(p) {
    const unsigned warp = threadIdx.x / 32;
    shift_ = 31 - __clz(p.page_size);
    copies_scales_ = (warp == 0 && p.k_cache.format.dynamic) || (warp == 1 && p.v_cache.format.dynamic);
  }

  __device__ __forceinline__ static void set_up(const TileMaps&) {}
  __device__ __forceinline__ void open(const WorkItem&, const WorkItem*, int) const {}
  static constexpr int kAsked = S::kStages - 1;  // groups of cp.async that a start leaves on their way
  // Begin a worker's items; all threads have left the slots.
  __device__ __forceinline__ void start(const WorkItem* item, int items) {
    if (threadIdx.x % 32 == 0) {
      const int64_t before = static_cast<int64_t>(S::kv_head()) << page_shift();
      Cursor& c = cursor();
      c.codes[0] = p_.k_cache.codes + before * S::kKRow;
      c.codes[1] = p_.v_cache.codes + before * S::kVRow;
      c.stream.template begin<S>(item, items);
    }
    set_first(0);
    begin_pass();
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) issue(i);
  }

  // The next slot, filled. Also a barrier for the block; the slot handed out before is free again.
  __device__ __forceinline__ uint32_t next_keys() { return next(); }
  __device__ __forceinline__ uint32_t next_values() { return next(); }
  __device__ __forceinline__ uint32_t next() {
    const int first = this->first();
    copy_wait<S::kStages - 2>();
    __syncthreads();
    issue(first == 0 ? S::kStages - 1 : first - 1);
    set_first(first + 1 == S::kStages ? 0 : first + 1);
    return shared_base() + first * S::kSlotBytes;
  }

  // Rows that no query sees are zero.
  __device__ __forceinline__ void clear_unseen(uint32_t, int, int, int) const {}
  // All copies have come.
  __device__ __forceinline__ static void drain() { copy_wait<0>(); }

 private:
  __device__ static Cursor& cursor() {
    return reinterpret_cast<Cursor*>(shared_memory + S::kCursorAt)[threadIdx.x / 32];
  }

  __device__ __forceinline__ Run run() const { return kHolds ? run_ : cursor().run; }
  __device__ __forceinline__ int first() const { return kHolds ? first_ : cursor().first; }
  __device__ __forceinline__ void set_first(int first) {
    if constexpr (kHolds) {
      first_ = first;
    } else {
      if (threadIdx.x % 32 == 0) cursor().first = first;
      __syncwarp();
    }
  }
  __device__ __forceinline__ Block block() const { return kHolds ? block_ : cursor().block; }
  __device__ __forceinline__ void hold(const Run& run, const Block& block) {
    if constexpr (kHolds) {
      run_ = run, block_ = block;
    } else {
      __syncwarp();  // all have read what is now written anew
      if (threadIdx.x % 32 == 0) cursor().run = run, cursor().block = block;
      __syncwarp();
    }
  }

  __device__ __forceinline__ void issue(int write) {
    Run now = run();
    Block in = block();
    const bool going = now.left != 0, values = now.left < 0;
    const uint32_t slot = shared_base() + write * S::kSlotBytes;
    const uint8_t* codes = cursor().codes[values];
    const int row = now.token - in.token;
    if (going) {
      if (S::kKRow == S::kVRow || !values) {
        copy_codes<S::kKRow / 16>(codes, slot, now, row);
      } else {
        copy_codes<S::kVRow / 16>(codes, slot, now, row);
      }
    }
    if constexpr (K::kInteger || V::kInteger) {
      if (copies_scales_ && now.left > 0) copy_scales(slot, now, row);
    }
    copy_commit();
    if (!going) return;
    now.token += S::kStageTokens;
    now.left += values ? 1 : -1;
    if (now.left == 0) {
      if (!next_run(now, in, values)) {
        begin_pass();
        return;
      }
      if (values) turn_pages(now, in);
    }
    hold(now, in);
  }

  // The stream goes on with the next pass, if there is one.
  __device__ __forceinline__ void begin_pass() {
    __syncwarp();  // all have read what is now written anew
    if (threadIdx.x % 32 == 0) next_pass(cursor());
    __syncwarp();
    const Run now = cursor().run;
    const Block in = cursor().block;
    if constexpr (kHolds) run_ = now, block_ = in;
    if (now.left == 0) return;
    pages_ = fetch_pages(in.token, now, in);
    next_pages_ = fetch_pages(in.token + in.size, now, in);
  }

  // log2 of the page size.
  __device__ __forceinline__ int page_shift() const { return kHolds ? shift_ : 31 - __clz(opaque(p_.page_size)); }

  // Page ids of the block: lane l has that of the 16 tokens from 16 l on; and those of the next one, on their way. A table that
  // names no page of the pool gives wrong numbers, not a fault.
  static_assert(kNarrowBlock <= 32 * 16 && S::kWideStep <= 32 * 16, "a lane for each page");
  __device__ __forceinline__ int32_t fetch_pages(int first, const Run& run, const Block& block) const {
    const int at = min(max(first + static_cast<int>(16 * (opaque(threadIdx.x) % 32)), run.low), block.end - 1);
    return __ldg(cursor().stream.table + (at >> page_shift()));
  }
  // A block begins.
  __device__ __forceinline__ void turn_pages(const Run& run, const Block& block) {
    asm volatile("mov.b32 %0, %1;" : "=r"(pages_) : "r"(next_pages_));  // here and no sooner: it waits for the load
    next_pages_ = fetch_pages(block.token + block.size, run, block);
  }
  // That of a row of the block.
  __device__ uint32_t page_of(int row) const {
    return min(static_cast<uint32_t>(__shfl_sync(0xffffffffu, pages_, static_cast<unsigned>(row) / 16)), p_.max_page);
  }

  // Slots of `tokens` tokens.
  __device__ __forceinline__ static int slots(int tokens) {
    return static_cast<unsigned>(tokens + S::kStageTokens - 1) / S::kStageTokens;
  }
  __device__ __forceinline__ static void begin_block(Run& run, const Block& block) {
    run.token = block.token;
    run.stop = min(block.end, block.token + block.size);
    run.left = slots(run.stop - run.token);
  }
  // After K the values of the same block, after those the next block; false at the end of the pass.
  __device__ __forceinline__ static bool next_run(Run& run, Block& block, bool values) {
    if (!values) {
      run.token = block.token;
      run.left = -slots(run.stop - run.token);
      return true;
    }
    block.token += block.size;
    if (block.token >= block.end) return false;
    begin_block(run, block);
    return true;
  }

  __device__ __forceinline__ void next_pass(Cursor& c) const {
    Pass pass;
    if (!c.stream.template next<S>(p_, pass)) {
      c.run.left = 0;
      return;
    }
    c.run.low = pass.low;
    c.block = {pass.begin, pass.block, pass.end};
    begin_block(c.run, c.block);
  }

  // kStageTokens rows of kUnits * 16 bytes, from the run's token on. Rows outside low .. stop - 1 are not fetched, nor are their
  // page ids read; they are zero, or, where codes are integers, anything. `codes`: the kv head's in page 0.
  template <int kUnits>
  __device__ __forceinline__ void copy_codes(const uint8_t* codes, uint32_t slot, const Run& run, int row0) {
#pragma unroll
    for (int at = 0; at < S::kStageTokens; at += 64) {
      if (at > 0 && run.token + at >= run.stop) break;
      copy_64<kUnits>(codes, slot + at * Swizzle<kUnits>::kPitch, run, at, row0 + at);
    }
  }
  template <int kUnits>
  __device__ __forceinline__ void copy_64(const uint8_t* codes, uint32_t slot, const Run& run, int at, int row0) {
    using Layout = Swizzle<kUnits>;
    constexpr int kRow = 16 * kUnits, kPieces = 64 * kUnits, kEach = (kPieces + kThreads - 1) / kThreads;
    const int first = run.token + at, low = run.low, stop = run.stop, shift = page_shift();
    const unsigned thread = opaque(threadIdx.x), mask = (1u << shift) - 1;
    const uint32_t page_bytes = static_cast<uint32_t>(p_.h_kv << shift) * kRow;
    const auto place = [&](unsigned piece) {
      const unsigned row = piece / kUnits, unit = piece % kUnits;
      return slot + (unit / Layout::kPartUnits * S::kStageTokens + row) * Layout::kPitch +
             ((unit % Layout::kPartUnits ^ Layout::of(row)) << 4);
    };
    if (shift >= 6 && first >= low && first + 64 <= stop) {
      // 64 tokens are one run of bytes. A thread's pieces lie at one unit, rows apart, and may be swizzled alike.
      constexpr bool kEven = kThreads % kUnits == 0 && kThreads / kUnits % 8 == 0;
      const uint32_t to0 = place(thread);
      const uint8_t* from =
          codes + (static_cast<uint64_t>(page_of(row0)) * page_bytes + ((first & mask) * kRow + thread * 16));
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (kPieces % kThreads == 0 || thread + i * kThreads < kPieces) {
          copy_async(kEven ? to0 + i * (kThreads / kUnits * Layout::kPitch) : place(thread + i * kThreads),
                     from + i * kThreads * 16);
        }
      }
      return;
    }
#pragma unroll 1
    for (unsigned piece = thread; piece < ceil_div(kPieces, kThreads) * kThreads; piece += kThreads) {
      const unsigned row = piece / kUnits, unit = piece % kUnits;
      const int token = first + static_cast<int>(row);
      const uint32_t page = page_of(row0 + row), offset = (token & mask) * kRow + unit * 16;
      const bool seen = token >= low && token < stop;
      if (kPieces % kThreads == 0 || piece < kPieces) {
        copy_async(place(piece), codes + (static_cast<uint64_t>(page) * page_bytes + offset), seen ? 16 : 0);
      }
    }
  }

  // Scales of the same tokens, 16 bytes a lane: of K by the first warp, of V by the second.
  __device__ __forceinline__ void copy_scales(uint32_t slot, const Run& run, int row0) {
    const int low = run.low, stop = run.stop;
    const unsigned thread = opaque(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const Format format = warp == 0 ? p_.k_cache.format : p_.v_cache.format;
    const uint8_t* meta = warp == 0 ? p_.k_cache.meta : p_.v_cache.meta;
    const uint32_t to = slot + (warp == 0 ? S::kKMeta : S::kVMeta);
    const int bytes = format.meta_bytes(), tokens = 16 / bytes, shift = page_shift();
#pragma unroll 1
    for (int at = 0; at < S::kStageTokens; at += 32 * tokens) {
      const int row = at + static_cast<int>(lane) * tokens, token = run.token + row;
      const uint32_t page = page_of(row0 + min(row, S::kStageTokens - 1));
      if (row >= S::kStageTokens) continue;
      int valid = min(stop - token, tokens);
      if (token + tokens <= low || valid < 0) valid = 0;
      const int64_t tile = static_cast<int64_t>(page) * p_.h_kv + S::kv_head();
      const int offset = token & ((1 << shift) - 1);
      copy_async(to + row * bytes, meta + ((tile << shift) + offset) * bytes, valid * bytes);
    }
  }

  const AttendParams& p_;
  int32_t pages_, next_pages_;
  bool copies_scales_;
  // Of the cursor, where they are held; see there.
  Run run_;
  Block block_;
  int first_;
  int shift_;
};

}  // namespace foldkv::cuda

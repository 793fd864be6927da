// What the queues that the copy engine fills have in common: where the stream of tokens is, and how a warp asks for its part.
//
// Of any 256 tokens warp w asks for 64 w .. 64 w + 63, so that the work is even, and knows page ids of no others. A slot's
// barrier has an arrival for each 64 tokens.
#pragma once

#include "cuda/stream.cuh"

namespace foldkv::cuda {

template <class S, class K, class V>
class TileStream {
 public:
  // 16-bit values of a slot from `token` on that no query sees are anybody's, and a weight of 0 might make NaN of them: they
  // become zero. A barrier for the block, where there are any.
  __device__ __forceinline__ static void clear_unseen(uint32_t slot, int token, int low, int end) {
    if constexpr (!V::kInteger) {
      if (token >= low && token + S::kStageTokens <= end) return;
      constexpr int kUnits = S::kVRow / 16, kPartUnits = S::VSwizzle::kPartUnits;
#pragma unroll 1
      for (int piece = threadIdx.x; piece < kUnits * S::kStageTokens; piece += kThreads) {
        const int key = token + piece / kPartUnits % S::kStageTokens;
        if (key < low || key >= end) store_shared(slot + piece * 16, 0, 0, 0, 0);
      }
      before_copies();
      __syncthreads();
    }
  }
  // Once, before anything else; a barrier must follow.
  __device__ __forceinline__ static void set_up(const TileMaps& maps) {
    if (threadIdx.x != 0) return;
    prefetch_map(maps.k), prefetch_map(maps.v);
    for (int i = 0; i < S::kStages; ++i) barrier_init(barrier(i), S::kStageTokens / kTileTokens);
    barrier_init_fence();
  }
  // Get ready for a worker's items, of which this is the first: its page ids come.
  __device__ __forceinline__ void open(const WorkItem& first, const WorkItem* item, int items) {
    if (thread() % 32 == 0) {
      cursor().span = {0, 0, 0, 0};
      cursor().stream.template begin<S>(item, items);
    }
    look_ahead(first);
  }
  static constexpr int kAsked = 0;  // groups of cp.async that a start leaves on their way
  // All copies have come: whatever was asked for was handed out.
  __device__ __forceinline__ static void drain() {}

 protected:
  // The pass that the stream is at; each warp keeps its own.
  struct alignas(16) Span {
    int low, end;  // keys that it sees
    int size, block;  // tokens of K before those of V: how many, and the first one
  };
  struct Cursor {
    Span span, ahead;  // ahead: the pass after it, from when the last page id of this one has been asked for
    Stream stream;
  };
  static_assert(sizeof(Cursor) <= S::kTileCursorBytes, "room for it");

  __device__ TileStream(const AttendParams& p, const TileMaps& maps) : p_(p), maps_(maps) {
    shift_ = 31 - __clz(p.page_size);
  }

  // In the kernel for many rows registers are too scarce to keep what follows from it.
  __device__ __forceinline__ static unsigned thread() { return S::kDecode ? threadIdx.x : opaque(threadIdx.x); }
  __device__ __forceinline__ static Cursor& cursor() {
    return *reinterpret_cast<Cursor*>(shared_memory + S::kCursorAt + thread() / 32 * S::kTileCursorBytes);
  }
  __device__ __forceinline__ static uint32_t barrier(int index) { return shared_base() + S::kBarrierAt + 8 * index; }
  __device__ __forceinline__ static uint32_t slot(int index) { return shared_base() + index * S::kSlotBytes; }

  // The next pass, from its first block on, with the pages of that; an empty one where there is none.
  __device__ __forceinline__ Span next_pass() {
    Cursor& c = cursor();
    const Span span = c.ahead;
    __syncwarp();  // all have read what is now written anew
    if (thread() % 32 == 0) c.span = span;
    __syncwarp();
    if (span.end > 0) next_page(span.block, span);
    return span;
  }
  // Pages of the block at `token`, which is behind the one at `before`.
  __device__ __forceinline__ void next_block(int before, int token, const Span& span) {
    if (own(before) < token && own(token) < span.end) next_page(token, span);
  }

  // The first of this warp's 64 tokens among 256 from `token` on, a multiple of 64.
  __device__ __forceinline__ static int own(int token) {
    return token + ((static_cast<int>(opaque(threadIdx.x) / 32 * kTileTokens) - token) & (3 * kTileTokens));
  }
  // Whether queries see any of 64 tokens of a block.
  __device__ __forceinline__ static bool wanted(int first, int block, const Span& span) {
    return first < min(span.end, block + span.size) && first + kTileTokens > span.low;
  }

  // This warp's 64 tokens from `first` on, rows `row` on of a slot, in tiles, a lane each, and with K the scales of both. Where they
  // are not wanted, the arrival alone.
  __device__ __forceinline__ void copy(int index, bool values, int first, int row, bool wanted) const {
    const uint32_t full = barrier(index);
    const int row_bytes = values ? S::kVRow : S::kKRow, lane = lane_token();
    const Format &k = p_.k_cache.format, &v = p_.v_cache.format;
    int bytes = row_bytes;
    if constexpr (K::kInteger || V::kInteger) {
      if (!values) bytes += k.meta_bytes() + v.meta_bytes();
    }
    if (lane == 0) barrier_expect(full, wanted ? kTileTokens * bytes : 0);
    const int pitch = values ? S::VSwizzle::kPitch : S::KSwizzle::kPitch,
              part = static_cast<unsigned>(lane) / kTileTokens;
    if (!wanted || part >= (values ? S::VSwizzle::kParts : S::KSwizzle::kParts)) return;
    const int tile = lane % kTileTokens, in_page = (first + tile) & ((1 << shift_) - 1);
    const uint32_t to = slot(index);
    copy_tile(to + (part * S::kStageTokens + row + tile) * pitch, values ? maps_.v : maps_.k, full, part * pitch,
              in_page, page_);
    if constexpr (K::kInteger || V::kInteger) {
      if (values || !(k.dynamic || v.dynamic) || part > 0) return;
      const int64_t from = (static_cast<int64_t>(page_) << shift_) + in_page;
      const int tokens = min(1 << shift_, kTileTokens);
      if (const int size = k.meta_bytes(); size > 0) {
        copy_run(to + S::kKMeta + (row + tile) * size, p_.k_cache.meta + from * size, full, size * tokens);
      }
      if (const int size = v.meta_bytes(); size > 0) {
        copy_run(to + S::kVMeta + (row + tile) * size, p_.v_cache.meta + from * size, full, size * tokens);
      }
    }
  }

 private:
  // The id asked for is that of the tokens among 256 from `token` on; the next one is asked for, which may be of the next pass.
  __device__ __forceinline__ void next_page(int token, const Span& span) {
    turn_page();
    if (own(token) + 4 * kTileTokens < span.end) {
      fetch_page(token + 4 * kTileTokens, span);
    } else {
      look_ahead();
    }
  }
  template <class... First>
  __device__ __forceinline__ void look_ahead(const First&... first) {
    Cursor& c = cursor();
    __syncwarp();  // all have read what is now written anew
    if (thread() % 32 == 0) {
      Pass pass;
      c.ahead = {0, 0, 0, 0};
      if (c.stream.template next<S>(p_, pass, first...)) {
        c.ahead = {pass.low, pass.end, pass.block, pass.begin};
        const auto* next = reinterpret_cast<const uint8_t*>(c.stream.item + 1);
        prefetch(next), prefetch(next + 32);  // for next time
      }
    }
    __syncwarp();
    const Span span = c.ahead;
    if (span.end > 0) fetch_page(span.block, span);
  }

  // A lane's tile: the first of its tokens in the 64, and 64 for each part of a row before its own.
  __device__ __forceinline__ int lane_token() const { return opaque(threadIdx.x) % 32 << min(shift_, 6); }
  // The id of the page of this lane's tile among 256 tokens from `token` on comes; a table that names no page of the pool gives
  // wrong numbers, not a fault.
  __device__ __forceinline__ void fetch_page(int token, const Span& span) {
    const int at = min(max(own(token) + lane_token() % kTileTokens, span.low), span.end - 1);
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(next_page_) : "l"(cursor().stream.table + (at >> shift_)));
  }
  __device__ __forceinline__ void turn_page() {
    asm volatile("min.u32 %0, %1, %2;"
                 : "=r"(page_)
                 : "r"(next_page_), "r"(p_.max_page));  // here and no sooner: it waits
    page_ = page_ * p_.h_kv + S::kv_head();
  }

  const AttendParams& p_;
  const TileMaps& maps_;
  int shift_;  // log2 of the page size
  int page_, next_page_;  // of this lane's tile: kv heads before it, and the id for the 256 tokens after these
};

}  // namespace foldkv::cuda

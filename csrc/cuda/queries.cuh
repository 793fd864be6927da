// Query rows on their way to fragments: read, transformed as K is, scaled, rounded to 16 bits, laid into shared memory.
#pragma once

#include "cuda/finish.cuh"

namespace foldkv::cuda {

// What a block and its pass are about, in shared memory, to spare registers: the item, and
struct Current : WorkItem {
  WorkItem next[2];  // the items that come next: the first is `turn`
  Pass pass;
  int rows;  // query rows of the pass
  int first_row;  // of the pass in its item
  int group_shift;  // log2 of a group's chunks, 30 where all chunks are one
  int left, turn;  // items after this one
  int joined;  // see join.cuh
  int worker, num_workers, items_at, merges_at, tail;  // see attend_kernel
  const WorkItem* after_next;

  // Whether a run of chunks that ends with this one begins with its group's first, or the item's that is folded.
  __device__ __forceinline__ bool is_folded(int chunk) const {
    return folds != 0 || chunk >> group_shift != chunk_begin >> group_shift;
  }
  // Where the partial of a chunk goes, or of the group's chunks up to it: see quant/plan.py.
  __device__ __forceinline__ int partial_of(int chunk, bool folded) const {
    const int first = chunk_begin >> group_shift, group = (chunk >> group_shift) - first;
    int index = folded ? 0 : chunk - chunk_begin;
    if (group > 0) {  // behind those of the item's first group
      const int end = (first + 1) << group_shift;
      index = (folds ? 1 : end - chunk_begin) + group - 1;
    }
    return first_partial + index * q_count;
  }
};

template <class S, class K, int D>
class Queries {
  using Rows = typename S::Rows;
  static constexpr int kSlices = S::kSlices;

 public:
  __device__ static Current& mutable_current() { return *reinterpret_cast<Current*>(shared_memory + S::kPassAt); }
  __device__ static const Current& current() { return mutable_current(); }

  // An item is asked for.
  __device__ __forceinline__ static void fetch_item(const WorkItem* item, int turn) {
    constexpr int kPieces = sizeof(WorkItem) / 16;
    WorkItem& to = mutable_current().next[turn];
    const unsigned thread = opaque(threadIdx.x);
    if (thread >= kPieces) return;
    const int4* from = reinterpret_cast<const int4*>(item) + thread;
    if constexpr (S::kTiles) {
      copy_async(shared_address(&to) + 16 * thread, from);
      copy_commit();
    } else {
      reinterpret_cast<int4*>(&to)[thread] = *from;
    }
  }

  // The parameters of the block's kv head are asked for.
  __device__ __forceinline__ static void fetch_params(const AttendParams& p, int kv_head) {
    const unsigned thread = opaque(threadIdx.x);
    if constexpr (!S::kKeepsParams) {
      if constexpr (K::kInteger) prefetch_params(p, p.k_cache.params, D, kv_head, thread);
      if constexpr (S::kVInteger) prefetch_params(p, p.v_cache.params, D, kv_head, thread ^ 64);
      return;
    }
    const int kind = thread / 32, lane = thread % 32;  // a warp for each kind
    const auto fetch = [&](int at, const float* params) {
#pragma unroll
      for (int channel = 4 * lane; channel < D; channel += 128) {
        copy_async(shared_base() + at + (kind * D + channel) * 4, params + (kind * p.h_kv + kv_head) * D + channel);
      }
    };
    if constexpr (K::kInteger) fetch(S::kKParamsAt, p.k_cache.params);
    if constexpr (S::kVInteger) fetch(S::kVParamsAt, p.v_cache.params);
    copy_commit();
  }

  // The query rows of an item are asked for, so that they come while the queue starts, or the item before is attended to.
  __device__ __forceinline__ static void fetch_rows(const AttendParams& p, const WorkItem& item, int kv_head) {
    const unsigned thread = opaque(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int group = p.group.n, rows = item.q_count * group;
    const auto place = [&](int row, int channel) {
      const int token = p.group.divide(row);
      return static_cast<int64_t>(item.q_row + token) * p.q.token_stride +
             (kv_head * group + row - token * group) * p.q.head_stride + channel;
    };
    if (is_copied(p, item, rows)) {
      constexpr int kPieces = D / 8;  // of 16 bytes
#pragma unroll
      for (int at = 0; at < kNarrowRows / kWarps * kPieces; at += 32) {  // each warp the rows that it loads
        const int piece = (at + lane) % kPieces, row = warp + (at + lane) / kPieces * kWarps;
        if (row >= min(rows, kNarrowRows)) continue;
        copy_async(shared_base() + S::kNextAt + row * S::kQueryRow + 16 * piece,
                   static_cast<const uint16_t*>(p.q.data) + place(row, 8 * piece));
      }
      copy_commit();
      return;
    }
    const int element = p.q.dtype == DType::Float32 ? 4 : 2, row = thread / 8, at = thread % 8 * 64 / element;
    if (row < min(rows, S::kMaxRows) && at < D) {
      prefetch(static_cast<const uint8_t*>(p.q.data) + place(row, at) * element);
    }
  }

  // A worker's items, if any, are the next ones; a barrier must follow. The first one's queries are asked for.
  __device__ __forceinline__ static void begin_items(const AttendParams& p, int worker, const WorkItem& first,
                                                     const WorkItem* items, int count, int kv_head) {
    if (count > 0) fetch_rows(p, first, kv_head);
    if (count > 1) fetch_item(items + 1, 1);
    if (threadIdx.x != 0) return;
    Current& now = mutable_current();
    now.next[0] = first;
    now.worker = worker;
    now.left = count, now.turn = 0;
    now.after_next = items + 2;
    now.q_count = now.first_row = 0;
  }

  // Makes the next pass the current one, with its queries; all threads may use both. False where there is none.
  __device__ __forceinline__ static bool next_pass(const AttendParams& p) {
    const int group = p.group.n;
    if constexpr (S::kTiles) copy_wait<0>();
    __syncthreads();  // items are there, and all have left the rows, queries and outputs of the pass before
    Current& now = mutable_current();
    int first_row = now.first_row + S::kMaxRows;
    const int turn = now.turn, left = now.left;
    const bool begins = first_row >= now.q_count * group;
    const WorkItem* item = &now;
    if (begins) {
      if (left == 0) return false;
      item = now.next + turn;
      first_row = 0;
    }
    const int rows = min(item->q_count * group - first_row, S::kMaxRows);
    __syncthreads();
    if (threadIdx.x == kThreads - 1) {  // the last warp has the fewest rows
      now.pass = Pass(*item, group, first_row, S::kMaxRows, S::kWideStep, p.window_left);
      now.rows = rows;
      now.first_row = first_row;
      now.group_shift = item->group > 0 ? 31 - __clz(item->group) : 30;
      if (begins) now.left = left - 1, now.turn = turn ^ 1;
    }
    if (begins && threadIdx.x < sizeof(WorkItem) / 4) {
      reinterpret_cast<int32_t*>(&now)[threadIdx.x] = reinterpret_cast<const int32_t*>(item)[threadIdx.x];
    }
    load(p, *item, first_row, rows);
    __syncthreads();
    // What comes next comes while this item's keys are attended to.
    if (begins && left > 1) {
      fetch_rows(p, now.next[turn ^ 1], S::kv_head());
      if (left > 2) {
        fetch_item(now.after_next, turn);
        if (threadIdx.x == 0) ++now.after_next;
      }
    }
    return true;
  }

 private:
  // Whether an item's query rows come by fetch_rows.
  __device__ __forceinline__ static bool is_copied(const AttendParams& p, const WorkItem& item, int rows) {
    return S::kCopiesRows && p.copies_queries && Pass::tiles_of(item, p.group.n, rows) == 0;
  }

  // Queries become 16-bit fragments: balanced, rotated, static scale folded in, scaled by a power of 2 a row; with
  //   logit * log2(e) = dot * factor + base, dot = sum over channels of query * code, in the fragments' units.
  // A query's rounding error is to meet numbers about zero. Zeros that come with the tokens are multiplied by `sum`, that of the
  // query as it is rounded. With static ones, which only the exact query knows, `base` has what rounding took off times the
  // middle code. Rows past the last have anybody's queries; nobody reads what comes of them.
  __device__ __forceinline__ static void load(const AttendParams& p, const WorkItem& item, int first_row, int rows) {
    static_assert(sizeof(Current) <= S::kPassBytes, "room for it");
    const unsigned thread = opaque(threadIdx.x);
    const int warp = thread / 32, lane = thread % 32, place = place_of(lane);
    const int kv_head = S::kv_head(), group = p.group.n;
    const bool wide = Pass::tiles_of(item, group, rows) != 0, dynamic = K::kInteger && p.k_cache.format.dynamic;
    // What a lane's numbers are multiplied by, a power of 2, and its inverse.
    const float factor = K::k_factor(place % 8), inverse = __int_as_float((254 << 23) - __float_as_int(factor));
    float ahead[kSlices] = {};  // the row after the one that is being worked on
    const bool copied = is_copied(p, item, rows);
    const auto fetch = [&](int r) {
      if (r >= rows) return;
      const void* from = p.q.data;
      const int token = p.group.divide(first_row + r), head = kv_head * group + first_row + r - token * group;
      int64_t at = static_cast<int64_t>(item.q_row + token) * p.q.token_stride + head * p.q.head_stride;
      if (copied) from = shared_memory + S::kNextAt, at = r * D;
      load_lane(ahead, from, p.q.dtype, at + lane);
    };
    if (copied) {
      copy_wait<0>();
      __syncwarp();
    }
    fetch(warp);
#pragma unroll 1
    for (int r = warp; r < rows; r += kWarps) {
      float x[kSlices];
      bool bad = false;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        x[i] = ahead[i];
        bad = bad || !isfinite(x[i]);
      }
      fetch(r + kWarps);
      bad = __any_sync(kFullWarp, bad);
      float base = 0.0f, sum = 0.0f, largest = 0.0f;
      if (bad) {
#pragma unroll
        for (int i = 0; i < kSlices; ++i) x[i] = 0.0f;
      }
      if constexpr (K::kInteger) base = transform(p, lane, x);
#pragma unroll
      for (int i = 0; i < kSlices; ++i) largest = fmaxf(largest, fabsf(x[i]));
      int shift = 0;  // queries are multiplied by 2^shift
      if constexpr (K::Math::kMaxQuery > 0.0f) {
        largest = warp_max(largest);
        if (largest > 0.0f) shift = min(max(14 + 127 - (__float_as_int(largest) >> 23), -126), 126);
      }
      const float scale = __int_as_float((127 + shift) << 23), unscale = __int_as_float((127 - shift) << 23);
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        const float scaled = x[i] * scale;
        const uint32_t value = K::Math::pack(scaled * factor, 0.0f);
        *reinterpret_cast<uint16_t*>(shared_memory + S::query_number(wide, r, i, place)) = static_cast<uint16_t>(value);
        const float rounded = K::Math::unpack(value).x * inverse;
        sum += dynamic ? rounded : scaled - rounded;
      }
      if constexpr (K::kInteger) sum = warp_sum(sum);
      if (lane == 0) {
        const int token = p.group.divide(first_row + r);
        const KeyRange keys = visible_keys(item.position + token, item.start, p.window_left);
        const float to_logits = p.softmax_scale * kLog2E;
        if (K::kInteger && !dynamic) base = fmaf(sum * unscale, K::kMid, base);
        Rows::base()[r] = base * to_logits;
        Rows::factor()[r] = to_logits * K::kUnit * unscale;
        Rows::sum()[r] = sum / K::kUnit;
        Rows::key_begin()[r] = keys.begin;
        Rows::key_end()[r] = keys.end < item.seq_len ? keys.end : item.seq_len;
        Rows::token()[r] = token;
        Rows::head()[r] = kv_head * group + first_row + r - token * group;
        Rows::bad()[r] = bad ? NAN : 0.0f;
      }
    }
  }

  // Where in its 32 channels' 32 places a lane's channel goes. Eight lanes' places make a word.
  __device__ __forceinline__ static int place_of(int lane) {
    constexpr uint64_t kPlaces[4] = {places(0), places(1), places(2), places(3)};
    const uint64_t low = lane < 8 ? kPlaces[0] : kPlaces[1], high = lane < 24 ? kPlaces[2] : kPlaces[3];
    return static_cast<int>((lane < 16 ? low : high) >> lane % 8 * 8) & 31;
  }
  static constexpr uint64_t places(int octet) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) {
      for (int t = 0; t < 4; ++t) {
        const int lane = K::k_channel(t, i);
        if (lane / 8 == octet) word |= static_cast<uint64_t>(8 * t + i) << lane % 8 * 8;
      }
    }
    return word;
  }

  // Returns what the mean, and static zeros, add to every dot.
  __device__ __forceinline__ static float transform(const AttendParams& p, int lane, float (&x)[kSlices]) {
    const Format& format = p.k_cache.format;
    const HeadParams params = block_params<S, D>(p, p.k_cache, S::kKParamsAt, lane);
    float base = 0.0f;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      base += x[i] * params.at(kMean, i);
      x[i] *= params.at(kBalance, i);
    }
    if (format.rotate) hadamard_row<D>(x, lane);
    if (!format.dynamic) {
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        x[i] *= params.at(kScale, i);
        base -= x[i] * params.at(kZero, i);
      }
    }
    return warp_sum(base);
  }
};

}  // namespace foldkv::cuda

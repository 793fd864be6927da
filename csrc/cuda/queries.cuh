// Query rows on their way to fragments: read, transformed as K is, scaled, rounded to 16 bits, laid into shared memory.
#pragma once

#include "cuda/finish.cuh"

namespace foldkv::cuda {

// What a block and its pass are about, in shared memory, to spare registers.
struct Current {
  Pass pass;
  int rows;  // query rows of the pass
  int seq, q_row, q_count;  // as in WorkItem
  int chunk_begin, first_partial, folds;
  int group_shift;  // log2 of a group's chunks, 30 where all chunks are one
  int first_row;  // of the pass in its item
  const WorkItem *item, *item_end;
  int merge;  // as in WorkItem
  int joined;  // see join.cuh
  int worker, num_workers, items_at, merges_at, tail;  // see attend_kernel
};

template <class S, class K, int D>
class Queries {
  using Rows = typename S::Rows;
  static constexpr int kSlices = S::kSlices;

 public:
  __device__ static Current& mutable_current() { return *reinterpret_cast<Current*>(shared_memory + S::kPassAt); }
  __device__ static const Current& current() { return mutable_current(); }

  // Ask for the query rows of an item and the parameters, so that they come while the queue starts, and those of V before they
  // are wanted at the item's end.
  __device__ __forceinline__ static void prefetch_rows(const AttendParams& p, const WorkItem& item, int kv_head,
                                                       unsigned thread) {
    const int element = p.q.dtype == DType::Float32 ? 4 : 2, group = p.group.n;
    const int row = thread / 8, at = thread % 8 * 64 / element, token = p.group.divide(row);
    if (row < min(item.q_count * group, S::kMaxRows) && at < D) {
      const int64_t from = static_cast<int64_t>(item.q_row + token) * p.q.token_stride +
                           (kv_head * group + row - token * group) * p.q.head_stride + at;
      prefetch(static_cast<const uint8_t*>(p.q.data) + from * element);
    }
    if constexpr (K::kInteger) prefetch_params(p, p.k_cache.params, D, kv_head, thread);
    if constexpr (S::kVInteger) prefetch_params(p, p.v_cache.params, D, kv_head, thread ^ 64);
  }

  // Makes a worker's items the current ones; a barrier must follow.
  __device__ __forceinline__ static void begin_items(int worker, const WorkItem* item, const WorkItem* end) {
    if (threadIdx.x != 0) return;
    Current& now = mutable_current();
    now.worker = worker;
    now.item = item;
    now.item_end = end;
    now.first_row = -S::kMaxRows;
  }

  // Makes the next pass the current one, with its queries; all threads may use both. False where there is none.
  __device__ __forceinline__ static bool next_pass(const AttendParams& p) {
    const int group = p.group.n;
    __syncthreads();  // all have left the rows, queries and outputs of the pass before
    const WorkItem* item = current().item;
    int first_row = current().first_row + S::kMaxRows;
    if (first_row >= item->q_count * group) {
      ++item;
      first_row = 0;
    }
    if (item == current().item_end) return false;
    const int rows = min(item->q_count * group - first_row, S::kMaxRows);
    __syncthreads();
    if (threadIdx.x == 0) {
      Current& now = mutable_current();
      now.pass = Pass(*item, group, first_row, S::kMaxRows, S::kWideStep, p.window_left);
      now.rows = rows;
      now.seq = item->seq, now.q_row = item->q_row, now.q_count = item->q_count;
      now.chunk_begin = item->chunk_begin, now.first_partial = item->first_partial, now.folds = item->folds;
      now.merge = item->merge;
      now.group_shift = item->group > 0 ? 31 - __clz(item->group) : 30;
      now.item = item;
      now.first_row = first_row;
    }
    load(p, *item, first_row, rows);
    __syncthreads();
    // The next item's queries come while this one's keys are attended to.
    if (item + 1 != current().item_end) prefetch_rows(p, item[1], S::kv_head(), opaque(threadIdx.x));
    return true;
  }

 private:
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
    const auto fetch = [&](int r) {
      if (r >= rows) return;
      const int token = p.group.divide(first_row + r), head = kv_head * group + first_row + r - token * group;
      const int64_t at = static_cast<int64_t>(item.q_row + token) * p.q.token_stride + head * p.q.head_stride;
      load_lane(ahead, p.q.data, p.q.dtype, at + lane);
    };
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
      if constexpr (K::kInteger) base = transform(p, kv_head, lane, x);
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
  __device__ __forceinline__ static float transform(const AttendParams& p, int kv_head, int lane, float (&x)[kSlices]) {
    const Format& format = p.k_cache.format;
    const float* params = p.k_cache.params + static_cast<int64_t>(kv_head) * D + lane;
    const int64_t stride = static_cast<int64_t>(p.h_kv) * D;
    float base = 0.0f;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      base += x[i] * params[kMean * stride + 32 * i];
      x[i] *= params[kBalance * stride + 32 * i];
    }
    if (format.rotate) hadamard_row<D>(x, lane);
    if (!format.dynamic) {
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        x[i] *= params[kScale * stride + 32 * i];
        base -= x[i] * params[kZero * stride + 32 * i];
      }
    }
    return warp_sum(base);
  }
};

}  // namespace foldkv::cuda

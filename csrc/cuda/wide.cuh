// Tiles of 16 query rows: drafts, large groups, prefill. By 64 tokens: S = Q K^T, query rows in rows, in registers from the
// scores to the weights; then O = P V. A warp has 16 rows, and where a pass has fewer than 64, warps share rows: each scores
// its own tokens, hands their weights to the others through shared memory, and sums its own channels. Every number is computed
// alike however many warps share its row.
#pragma once

#include "cuda/fragments.cuh"
#include "cuda/queue.cuh"
#include "cuda/wide_rows.cuh"

namespace foldkv::cuda {

template <class S, class K, class V, int D, int kRowTiles>
class Wide : WideRows<S, K, V, D, kRowTiles> {
  using Base = WideRows<S, K, V, D, kRowTiles>;
  using Rows = typename Base::Rows;
  using State = typename Base::State;
  using Base::clear, Base::column, Base::current, Base::fold_chunk, Base::for_fragments, Base::has_slice, Base::keep;
  using Base::kOwn, Base::kSlices, Base::kSplit, Base::part, Base::raise, Base::recall, Base::row, Base::thread;
  static constexpr int kTiles = kWideBlock / 8;  // of 8 tokens
  static constexpr int kMine = kTiles / kSplit;  // that a warp scores
  static constexpr int kBlocks = S::kWideBlocks;
  static_assert(kBlocks == 1 || kSplit == 4, "one row tile");
  static constexpr int kKWords = K::kBits / 4, kVWords = V::kBits / 4;

 public:
  __device__ __forceinline__ Wide(const AttendParams& p, Queue<S, K, V>& queue) : p_(p), queue_(queue) {}

  __device__ __forceinline__ void run() {
    const Current& now = current();
    State run, chunk;
    clear(run);
    keep(run);
    int last = now.chunk_begin;  // of the chunks up to now
#pragma unroll 1
    for (int token = now.pass.begin; token < now.pass.end;) {
      clear(chunk);
#pragma unroll 1
      do {
        attend_blocks(token, chunk);
        token += kBlocks * kWideBlock;
      } while (token % kChunkSize != 0 && token < now.pass.end);
      Base::finish_chunk(chunk);
      last = (token - 1) / kChunkSize;
      if (!now.is_folded(last)) {
        Base::save(p_, now.partial_of(last, false), chunk, false);
        continue;
      }
      fold_chunk(run, chunk);
      if (token < now.pass.end && (last + 1) >> now.group_shift != last >> now.group_shift) {
        close_group(last, run);
        clear(run);
        keep(run);
      }
    }
    if (!now.is_folded(last)) return;
    recall(run);
    close_group(last, run);
    if (now.first_partial < 0) Base::write_rows(p_, run);
  }

 private:
  // A group's chunks up to `chunk` are done: they become a partial, or the fold of all groups so far.
  __device__ __forceinline__ void close_group(int chunk, State& run) const {
    const Current& now = current();
    if (now.first_partial >= 0) {
      Base::save(p_, now.partial_of(chunk, true), run, now.group > 0);
    } else if (now.group > 0) {
      Base::fold_groups(p_, chunk >> now.group_shift != now.chunk_begin >> now.group_shift, run);
    }
  }

  // --- blocks of 64 tokens ---------------------------------------------------------------------------------------------

  // What V's scales and zeros make of the weights of this thread's two rows: sums of weight / scale, and of weight * zero.
  struct Sums {
    float total[2], zeros[2];
  };

  // Adds the blocks from `token` on, up to the pass' end, to a chunk's state: one after another, but scored together.
  __device__ __forceinline__ void attend_blocks(int token, State& s) {
    const int blocks = kBlocks == 1 ? 1 : min(kBlocks, ceil_div(current().pass.end - token, kWideBlock));
    uint32_t weight[kBlocks][kMine][2];  // two tokens each, of the two rows: A fragments
    Sums sums[kBlocks] = {};
    int max[kBlocks][2];
    {
      const Pass& pass = current().pass;
      const uint32_t keys = queue_.next_keys();
      float x[kBlocks][kMine][4], highest[kBlocks][2];
      bool whole[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        highest[b][0] = highest[b][1] = -INFINITY;
        if (b >= blocks) continue;
        const int at = token + b * kWideBlock;
        whole[b] = at >= pass.whole_begin && at + kWideBlock <= pass.whole_end;
        score(keys, row_of(b), x[b]);
        if (!whole[b]) mask(x[b], at);
        find_highest(keys, row_of(b), at, whole[b], x[b], highest[b]);
      }
      if constexpr (kSplit > 1) share_highest(highest);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) max[b][h] = round_max(highest[b][h], b == 0 ? s.max[h] : max[b - 1][h]);
        if (b >= blocks) continue;
        weigh_tokens(keys, row_of(b), token + b * kWideBlock, whole[b], x[b], max[b], weight[b], sums[b]);
        if constexpr (kSplit > 1) hand_out(b, weight[b], sums[b]);
      }
    }
    if constexpr (kSplit == 1) {
      const auto fragment = [&](int n, uint32_t (&a)[4]) {
        a[0] = weight[0][n][0], a[1] = weight[0][n][1], a[2] = weight[0][n + 1][0], a[3] = weight[0][n + 1][1];
      };
      raise(max[0], s);
      if (v_dynamic()) {
        add_sums(sums[0], s);
      } else {
        add_weights(s, fragment);
      }
      const uint32_t values = queue_.next_values();
      queue_.clear_unseen(values, token, current().pass.low, current().pass.end);
      add_values(values, 0, s, fragment);
    } else {
      const uint32_t values = queue_.next_values();  // a barrier, too
      queue_.clear_unseen(values, token, current().pass.low, current().pass.end);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (b >= blocks) continue;
        raise(max[b], s);
        const auto fragment = [&](int n, uint32_t (&a)[4]) {
          const uint4 held = load_shared(weights_at(b) + n * 256);
          a[0] = held.x, a[1] = held.y, a[2] = held.z, a[3] = held.w;
        };
        if (v_dynamic()) {
          add_sums(collect_sums(b), s);
        } else {
          add_weights(s, fragment);
        }
        add_values(values, row_of(b), s, fragment);
      }
    }
  }

  // A block's first row in its slot.
  __device__ __forceinline__ static constexpr int row_of(int block) { return block * kWideBlock; }

  // The first of the tiles that this warp scores.
  __device__ __forceinline__ static int first_tile() { return kSplit == 1 ? 0 : part() * kMine; }

  // Weights of the warps that share rows, [k-step of 16 tokens][lane] of 16 bytes; their sums, [warp][16 rows].
  __device__ __forceinline__ static uint32_t weights_at(int block) {
    return shared_base() + S::template wide_weights<kRowTiles>() +
           (block * kRowTiles + row() / 16) * S::kWideWeightBytes + thread() % 32 * 16;
  }
  __device__ __forceinline__ static float2* sums_of(int block, int warp) {
    return reinterpret_cast<float2*>(shared_memory + S::template wide_sums<kRowTiles>()) +
           (block * kWarps + warp) * kWideRows + thread() % 32 / 4;
  }
  __device__ __forceinline__ bool v_dynamic() const { return V::kInteger && p_.v_cache.format.dynamic; }

  __device__ __forceinline__ void hand_out(int block, const uint32_t (&weight)[kMine][2], const Sums& sums) const {
#pragma unroll
    for (int n = 0; n < kMine; n += 2) {
      const uint32_t (&a)[4] = a_fragment(weight, n);
      store_shared(weights_at(block) + (first_tile() + n) * 256, a[0], a[1], a[2], a[3]);
    }
    if (v_dynamic() && column() == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums_of(block, thread() / 32)[8 * h] = make_float2(sums.total[h], sums.zeros[h]);
      }
    }
  }

  __device__ __forceinline__ Sums collect_sums(int block) const {
    const float2* from = sums_of(block, thread() / 32 / kSplit * kSplit);
    Sums sums;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float2 pair[kSplit / 2];
#pragma unroll
      for (int i = 0; i < kSplit / 2; ++i) {
        const float2 a = from[2 * i * kWideRows + 8 * h], b = from[(2 * i + 1) * kWideRows + 8 * h];
        pair[i] = make_float2(a.x + b.x, a.y + b.y);
      }
      sums.total[h] = kSplit == 4 ? pair[0].x + pair[kSplit / 2 - 1].x : pair[0].x;
      sums.zeros[h] = kSplit == 4 ? pair[0].y + pair[kSplit / 2 - 1].y : pair[0].y;
    }
    return sums;
  }

  // Logits times log2(e) of this warp's tokens: x[8 tokens] as C fragments.
  __device__ __forceinline__ void score(uint32_t slot, int row0, float (&x)[kMine][4]) const {
    constexpr int kSpan = kSplit == 4 ? 1 : kKeySpan<K>;
    constexpr bool kByTokens = kSpan * kKWords > 1;
#pragma unroll
    for (int n = 0; n < kMine; ++n) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.0f;
#pragma unroll
    for (int slice = 0; slice < kSlices; slice += kSpan) {
      const unsigned lane = thread() % 32, key_row = KeyLane<kByTokens>::row(lane),
                     high = KeyLane<kByTokens>::high(lane);
      const uint32_t keys = slot + (row0 + 8 * first_tile() + key_row) * S::KSwizzle::kPitch;
      const uint32_t first = (high ^ S::KSwizzle::of(key_row)) << 4;
      uint32_t q[kSpan][2][4];
#pragma unroll
      for (int i = 0; i < kSpan && slice + i < kSlices; ++i) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint4 a = load_shared(shared_base() + S::wide_query(row() / 16, slice + i, step) + lane * 16);
          q[i][step][0] = a.x, q[i][step][1] = a.y, q[i][step][2] = a.z, q[i][step][3] = a.w;
        }
      }
#pragma unroll
      for (int n = 0; n < kMine; n += 2) {
        uint32_t word[kSpan][kKWords][2];
        load_keys<S, K, kByTokens, kSpan>(word, slice, keys + 8 * n * S::KSwizzle::kPitch, first, high);
#pragma unroll
        for (int i = 0; i < kSpan && slice + i < kSlices; ++i) {
          uint32_t k[2][4];
          K::k_fragments(word[i], k);
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            K::Math::mma(x[n], q[i][step], k[step][0], k[step][2]);
            K::Math::mma(x[n + 1], q[i][step], k[step][1], k[step][3]);
          }
        }
      }
    }
    if constexpr (K::kInteger) {
      const Format& format = p_.k_cache.format;
      if (format.dynamic) {
        const int r = row();
        const float sum[2] = {Rows::sum()[r], Rows::sum()[r + 8]};
#pragma unroll
        for (int n = 0; n < kMine; ++n) {
          const uint2 raw = load_scales(format, slot + S::kKMeta, row0 + 8 * (first_tile() + n) + column());
          const Scale k[2] = {unpack_scale<K>(raw.x, format.stored_zero), unpack_scale<K>(raw.y, format.stored_zero)};
#pragma unroll
          for (int c = 0; c < 4; ++c) x[n][c] = fmaf(-k[c % 2].zero, sum[c / 2], x[n][c]) * k[c % 2].scale;
        }
      }
    }
    const int r = row();
    const float factor[2] = {Rows::factor()[r], Rows::factor()[r + 8]},
                base[2] = {Rows::base()[r], Rows::base()[r + 8]};
#pragma unroll
    for (int n = 0; n < kMine; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) x[n][c] = fmaf(x[n][c], factor[c / 2], base[c / 2]);
    }
    if (p_.softcap > 0.0f) {
#pragma unroll
      for (int n = 0; n < kMine; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) x[n][c] = soft_cap(x[n][c], p_.softcap);
      }
    }
  }

  __device__ __forceinline__ void mask(float (&x)[kMine][4], int token) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row() + 8 * h, first = token + 8 * first_tile() + column();
      const int begin = Rows::key_begin()[r] - first, end = Rows::key_end()[r] - first;
#pragma unroll
      for (int n = 0; n < kMine; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = 8 * n + j;
          if (key < begin || key >= end) x[n][2 * h + j] = -INFINITY;
        }
      }
    }
  }

  // Raw scales of V of two tokens from 8 n + 2 t on, n counted from this warp's first tile; 0 for tokens that no query sees, whose bytes are anybody's.
  __device__ __forceinline__ uint2 v_scales(uint32_t slot, int row0, int token, bool whole, int n) const {
    const int at = 8 * (first_tile() + n) + column();
    uint2 raw = load_scales(p_.v_cache.format, slot + S::kVMeta, row0 + at);
    if (!whole) {
      const Pass& pass = current().pass;
      const int key = token + at;
      if (key < pass.low || key >= pass.high) raw.x = 0;
      if (key + 1 < pass.low || key + 1 >= pass.high) raw.y = 0;
    }
    return raw;
  }

  // The largest of log2(weight * scale of V), up to a constant, of this warp's tokens.
  __device__ __forceinline__ void find_highest(uint32_t slot, int row0, int token, bool whole,
                                               const float (&x)[kMine][4], float (&highest)[2]) const {
    if (!v_dynamic()) {
#pragma unroll
      for (int n = 0; n < kMine; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) highest[c / 2] = fmaxf(highest[c / 2], x[n][c]);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kMine; ++n) {
        const uint2 raw = v_scales(slot, row0, token, whole, n);
        const float lift[2] = {scale_exponent(raw.x), scale_exponent(raw.y)};
#pragma unroll
        for (int c = 0; c < 4; ++c) highest[c / 2] = fmaxf(highest[c / 2], x[n][c] + lift[c % 2]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      highest[h] = fmaxf(highest[h], __shfl_xor_sync(kFullWarp, highest[h], 1));
      highest[h] = fmaxf(highest[h], __shfl_xor_sync(kFullWarp, highest[h], 2));
    }
  }

  // That of all warps that share rows.
  __device__ __forceinline__ void share_highest(float (&highest)[kBlocks][2]) const {
    float* const all = Rows::warp_max();  // [block][kWarps][16 rows]
    const int warp = thread() / 32, at = thread() % 32 / 4;
    if (column() == 0) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        float* const to = all + (b * kWarps + warp) * kWideRows + at;
        to[0] = highest[b][0], to[8] = highest[b][1];
      }
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kSplit; ++i) {
        const float* const of = all + (b * kWarps + warp / kSplit * kSplit + i) * kWideRows + at;
        highest[b][0] = fmaxf(highest[b][0], of[0]), highest[b][1] = fmaxf(highest[b][1], of[8]);
      }
    }
  }

  // Logits become weights that stand on the maxima.
  __device__ __forceinline__ void weigh_tokens(uint32_t slot, int row0, int token, bool whole,
                                               const float (&x)[kMine][4], const int (&max)[2],
                                               uint32_t (&weight)[kMine][2], Sums& sums) const {
    const float offset[2] = {max[0] == kEmpty ? 0.0f : static_cast<float>(max[0]) - V::Math::kBoost,
                             max[1] == kEmpty ? 0.0f : static_cast<float>(max[1]) - V::Math::kBoost};
    if (!v_dynamic()) {
#pragma unroll
      for (int n = 0; n < kMine; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          weight[n][h] = V::Math::pack(exp2_fast(x[n][2 * h] - offset[h]), exp2_fast(x[n][2 * h + 1] - offset[h]));
        }
      }
      return;
    }
    if constexpr (V::kInteger) {
      const bool stored_zero = p_.v_cache.format.stored_zero;
      Sums of[kMine / 2] = {};  // of 16 tokens each, added in pairs, so that it is all one how many a warp has
#pragma unroll
      for (int n = 0; n < kMine; n += 2) {
        float (&totals)[2] = of[n / 2].total;
        uint32_t zeros[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint2 raw = v_scales(slot, row0, token, whole, n + i);
          zeros[i] = stored_zero ? __byte_perm(raw.x, raw.y, 0x7632) : V::Math::pack(V::kMid, V::kMid);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float (&logit)[4] = x[n + i];
            // Tokens that no query sees have scale 0 here, and weight 0.
            const float a = __uint_as_float(raw.x << 16), b = __uint_as_float(raw.y << 16);
            weight[n + i][h] =
                V::Math::pack(exp2_fast(logit[2 * h] - offset[h]) * a, exp2_fast(logit[2 * h + 1] - offset[h]) * b);
            const float2 rounded = V::Math::unpack(weight[n + i][h]);
            totals[h] = fmaf(rounded.x, reciprocal_fast(fmaxf(a, 0x1p-126f)), totals[h]);
            totals[h] = fmaf(rounded.y, reciprocal_fast(fmaxf(b, 0x1p-126f)), totals[h]);
          }
        }
        float product[4] = {};
        V::Math::mma(product, a_fragment(weight, n), zeros[0], zeros[1]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          totals[h] += __shfl_xor_sync(kFullWarp, totals[h], 1);
          totals[h] += __shfl_xor_sync(kFullWarp, totals[h], 2);
          of[n / 2].zeros[h] = product[2 * h];
        }
      }
#pragma unroll
      for (int step = 1; step < kMine / 2; step *= 2) {
#pragma unroll
        for (int i = 0; i < kMine / 2; i += 2 * step) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            of[i].total[h] += of[i + step].total[h];
            of[i].zeros[h] += of[i + step].zeros[h];
          }
        }
      }
      sums = of[0];
    }
  }

  // Adds the weights' sum to the state's total: as they are rounded, so that they remain weights of a mean. `fragment(n, a)`
  // gives the A fragment of 16 tokens from tile n on.
  template <class Fragment>
  __device__ __forceinline__ static void add_weights(State& s, Fragment fragment) {
    float product[4] = {};
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t a[4];
      fragment(n, a);
      V::Math::mma(product, a, V::Math::kOnes, V::Math::kOnes);
    }
    s.total[0] += product[0], s.total[1] += product[2];
  }
  __device__ __forceinline__ static void add_sums(const Sums& sums, State& s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      s.total[h] += sums.total[h];
      s.zeros[h] += sums.zeros[h];
    }
  }

  // Weights of 16 tokens from tile n on.
  template <int kCount>
  __device__ __forceinline__ static const uint32_t (&a_fragment(const uint32_t (&weight)[kCount][2], int n))[4] {
    return reinterpret_cast<const uint32_t (&)[4]>(weight[n]);
  }

  // out += P V for this warp's channels.
  template <class Fragment>
  __device__ __forceinline__ void add_values(uint32_t slot, int row0, State& s, Fragment fragment) const {
    const int lane = thread() % 32;
#pragma unroll
    for (int at = 0; at < kWideBlock; at += 32) {
      uint32_t word[kOwn][2][kVWords][2];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t a[4];
        fragment(at / 8 + 2 * step, a);
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
          if (!has_slice(own)) continue;
          load_values<S, V, false>(word[own], step, slot + (row0 + at) * S::VSwizzle::kPitch, part() + own * kSplit,
                                   lane);
          uint32_t v[2][4];
          V::v_fragments(word[own][step], v);
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            V::Math::mma(s.out[own][2 * tile], a, v[tile][0], v[tile][2]);
            V::Math::mma(s.out[own][2 * tile + 1], a, v[tile][1], v[tile][3]);
          }
        }
      }
    }
  }

  const AttendParams& p_;
  Queue<S, K, V>& queue_;
};

}  // namespace foldkv::cuda

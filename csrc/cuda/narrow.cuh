// Tiles of at most 8 query rows: decode. A chunk at once: scores as S^T = K Q^T, tokens in rows, each warp 16 tokens of every
// 64; the maximum over the chunk; weights into shared memory; then O^T = V^T P^T, each warp its own channels.
#pragma once

#include "cuda/fragments.cuh"
#include "cuda/queries.cuh"
#include "cuda/queue.cuh"

namespace foldkv::cuda {

template <class S, class K, class V, int D>
class Narrow {
  using Rows = typename S::Rows;
  static constexpr int kSlices = S::kSlices;
  static constexpr int kOwn = (kSlices + kWarps - 1) / kWarps;  // slices of a warp: warp, warp + 4
  static constexpr int kKWords = K::kBits / 4, kVWords = V::kBits / 4;
  static constexpr int kTiles = kNarrowBlock / 64, kStageTiles = S::kStageTokens / 64;
  static constexpr int kRound = kStageTiles > 1 ? 2 : 1;  // tiles that are scored in a row
  static_assert(kNarrowBlock == kChunkSize, "a block is a chunk");

 public:
  __device__ __forceinline__ Narrow(const AttendParams& p, Queue<S, K, V>& queue)
      : p_(p),
        queue_(queue),
        warp_(opaque(threadIdx.x) / 32),
        lane_(opaque(threadIdx.x) % 32),
        g_(lane_ / 4),
        t_(lane_ % 4) {
    const unsigned lane = opaque(threadIdx.x) % 32, row = warp_ * 16 + KeyLane<false>::row(lane);
    key_row_ = row * S::KSwizzle::kPitch;
    key_unit_ = (KeyLane<false>::high(lane) ^ S::KSwizzle::of(row)) << 4;
  }

  __device__ __forceinline__ void run() {
    const Current& now = current();
    State chunk, run;
    int token = now.pass.begin;
    bool last = token >= now.pass.end;
    begin_run(run);
#pragma unroll 1
    while (!last) {
      // A run goes on to its group's last chunk, but where the item begins inside a group: there each chunk is alone. The
      // inner loop has nothing in it that is seldom done: it is to fit the instruction cache.
      bool goes_on;
#pragma unroll 1
      do {
        attend_chunk(token, chunk);
        fold_chunk(run, chunk);
        token += kNarrowBlock;
        const int next = token / kChunkSize, shift = now.group_shift, group = (next - 1) >> shift;
        goes_on = token < now.pass.end && next >> shift == group && (now.folds || group != now.chunk_begin >> shift);
      } while (goes_on);
      last = token >= now.pass.end;
      close_run(token / kChunkSize - 1, last, run);
    }
    if (now.first_partial < 0) stage_rows(run);
  }

 private:
  // The softmax state of this thread's two columns, alike in all warps, and its outputs: [slice][tile of 16 channels][fragment].
  using Outputs = float[kOwn][2][4];
  struct State {
    int2 max;
    float2 total;
    Outputs out;
  };

  __device__ __forceinline__ static const Current& current() { return Queries<S, K, D>::current(); }

  // A group's chunks up to `chunk`, or one chunk of it, are done.
  __device__ __forceinline__ void close_run(int chunk, bool last, State& run) const {
    const Current& now = current();
    const bool first_group = chunk >> now.group_shift == now.chunk_begin >> now.group_shift;
    if (now.first_partial >= 0) {
      const bool folds = now.folds || !first_group;
      save(now.partial_of(chunk, folds), run, folds);
    } else {
      if (!first_group) recall(run);
      if (last) return;
      keep(run);
    }
    begin_run(run);
  }

  __device__ __forceinline__ static void begin_run(State& run) {
    run.max = make_int2(kEmpty, kEmpty);
    run.total = make_float2(0.0f, 0.0f);
    for_fragments([&](int own, int tile, int c) { run.out[own][tile][c] = 0.0f; });
  }

  // --- scores --------------------------------------------------------------------------------------------------------

  // Dot products of this warp's 16 of 64 tokens and 8 query rows, as a C fragment; in two chains of sums.
  __device__ __forceinline__ void score(uint32_t slot, int row0, float (&x)[4]) const {
    const uint32_t keys = slot + row0 * S::KSwizzle::kPitch + key_row_;
    float odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    x[0] = x[1] = x[2] = x[3] = 0.0f;
    uint32_t word[kKeySpan<K>][kKWords][2];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      uint32_t a[2][4];
      if (slice % kKeySpan<K> == 0) {
        load_keys<S, K, false, kKeySpan<K>>(word, slice, keys, key_unit_, static_cast<unsigned>(lane_) / 16);
      }
      K::k_fragments(word[slice % kKeySpan<K>], a);
      const uint4 q = load_shared(shared_base() + S::narrow_query(g_, slice) + t_ * 16);  // of two k-steps
      K::Math::mma(x, a[0], q.x, q.y);
      K::Math::mma(odd, a[1], q.z, q.w);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] += odd[c];
    if constexpr (K::kInteger) {
      const Format& format = p_.k_cache.format;
      if (format.dynamic) {
        const float2 sum = pair(Rows::sum());
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t raw = load_scale(format, slot + S::kKMeta, row0 + 16 * warp_ + g_ + 8 * h);
          const Scale k = unpack_scale<K>(raw, format.stored_zero);
          x[2 * h] = fmaf(-k.zero, sum.x, x[2 * h]) * k.scale;
          x[2 * h + 1] = fmaf(-k.zero, sum.y, x[2 * h + 1]) * k.scale;
        }
      }
    }
  }

  // Logits times log2(e), of all tiles; nothing where no query sees a key.
  __device__ __forceinline__ void finish_scores(float (&x)[kTiles][4], int token, bool whole) const {
    const float2 factor = pair(Rows::factor()), base = pair(Rows::base());
#pragma unroll
    for (int at = 0; at < kTiles; ++at) {
#pragma unroll
      for (int c = 0; c < 4; ++c) x[at][c] = fmaf(x[at][c], c % 2 ? factor.y : factor.x, c % 2 ? base.y : base.x);
    }
    if (p_.softcap > 0.0f) {
#pragma unroll
      for (int at = 0; at < kTiles; ++at) {
#pragma unroll
        for (int c = 0; c < 4; ++c) x[at][c] = soft_cap(x[at][c], p_.softcap);
      }
    }
    if (whole) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = 2 * t_ + j, first = token + 16 * warp_ + g_;
      const int begin = Rows::key_begin()[r] - first, end = Rows::key_end()[r] - first;
#pragma unroll
      for (int at = 0; at < kTiles; ++at) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int key = 64 * at + 8 * h;
          if (key < begin || key >= end) x[at][2 * h + j] = -INFINITY;
        }
      }
    }
  }

  // --- one chunk -------------------------------------------------------------------------------------------------------

  // The state of the tokens from `token` on, up to the pass' end.
  __device__ __forceinline__ void attend_chunk(int token, State& chunk) {
    const bool v_dynamic = V::kInteger && p_.v_cache.format.dynamic;
    float x[kTiles][4];
    uint32_t v_raw[kTiles][2];  // scale and zero of V, of this thread's tokens
    const Pass& pass = current().pass;
    // In rounds, and they are rolled, so that there is little code: a short batch spends its time fetching it. Tiles move up to
    // make room. Where a slot has all tiles there is little code anyway.
    const int num_tiles = ceil_div(min(kNarrowBlock, pass.end - token), 64 * kRound) * kRound;
    const bool whole = token >= pass.whole_begin && token + kNarrowBlock <= pass.whole_end;
    uint32_t slot = 0;
#pragma unroll(kStageTiles == kTiles ? kTiles : 1)
    for (int tile = 0; tile < kTiles; tile += kRound) {
#pragma unroll
      for (int at = 0; at + kRound < kTiles; ++at) {
#pragma unroll
        for (int c = 0; c < 4; ++c) x[at][c] = x[at + kRound][c];
        v_raw[at][0] = v_raw[at + kRound][0], v_raw[at][1] = v_raw[at + kRound][1];
      }
      if (tile < num_tiles) {
        if (tile % kStageTiles == 0) slot = queue_.next_keys();
#pragma unroll
        for (int i = 0; i < kRound; ++i) {
          const int at = kTiles - kRound + i, row0 = (tile % kStageTiles + i) * 64 + 16 * warp_;
          score(slot, row0 - 16 * warp_, x[at]);
          load_v_scales(slot, row0, token + tile * 64 + i * 64 + 16 * warp_, whole, v_raw[at]);
        }
      } else {
#pragma unroll
        for (int i = kTiles - kRound; i < kTiles; ++i) {
          x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0.0f;
          v_raw[i][0] = v_raw[i][1] = 0;
        }
      }
    }
    finish_scores(x, token, whole);
    share_max(x, v_raw, v_dynamic);
    __syncthreads();
    begin_run(chunk);
    chunk.max = weights(x, v_raw, v_dynamic, num_tiles);
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of the weights: a C fragment, all rows alike
    weigh(token, num_tiles, chunk.out, sums);
    chunk.total = make_float2(sums[0], sums[1]);
    float2 zeros = make_float2(0.0f, 0.0f);
    if (v_dynamic) gather_sums(chunk.total, zeros);
    to_units(chunk.out, zeros);
  }

  // Raw scales of V of tokens key + g and key + g + 8; 0 for tokens that no query sees, whose bytes are anybody's.
  __device__ __forceinline__ void load_v_scales(uint32_t slot, int row0, int key, bool whole,
                                                uint32_t (&v_raw)[2]) const {
    v_raw[0] = v_raw[1] = 0;
    if constexpr (V::kInteger) {
      if (!p_.v_cache.format.dynamic) return;
      const Pass& pass = current().pass;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = key + g_ + 8 * h;
        if (whole || (k >= pass.low && k < pass.high)) {
          v_raw[h] = load_scale(p_.v_cache.format, slot + S::kVMeta, row0 + g_ + 8 * h);
        }
      }
    }
  }

  // The warp's maxima, for all warps: of log2(weight * scale of V), up to a constant.
  __device__ __forceinline__ void share_max(const float (&x)[kTiles][4], const uint32_t (&v_raw)[kTiles][2],
                                            bool v_dynamic) const {
    float highest[2] = {-INFINITY, -INFINITY};
    if (!v_dynamic) {
#pragma unroll
      for (int at = 0; at < kTiles; ++at) {
#pragma unroll
        for (int c = 0; c < 4; ++c) highest[c % 2] = fmaxf(highest[c % 2], x[at][c]);
      }
    } else {
#pragma unroll
      for (int at = 0; at < kTiles; ++at) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float lift = scale_exponent(v_raw[at][h]);
#pragma unroll
          for (int j = 0; j < 2; ++j) highest[j] = fmaxf(highest[j], x[at][2 * h + j] + lift);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        highest[j] = fmaxf(highest[j], __shfl_xor_sync(kFullWarp, highest[j], step));
      }
    }
    if (g_ == 0) set_pair(Rows::warp_max() + warp_ * kNarrowRows, make_float2(highest[0], highest[1]));
  }

  // The weights go to shared memory. Returns the maxima that they stand on.
  __device__ __forceinline__ int2 weights(const float (&x)[kTiles][4], const uint32_t (&v_raw)[kTiles][2],
                                          bool v_dynamic, int num_tiles) const {
    float2 highest = pair(Rows::warp_max());
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const float2 other = pair(Rows::warp_max() + w * kNarrowRows);
      highest.x = fmaxf(highest.x, other.x);
      highest.y = fmaxf(highest.y, other.y);
    }
    const int2 max = make_int2(round_max(highest.x, kEmpty), round_max(highest.y, kEmpty));
    const float offset[2] = {max.x == kEmpty ? 0.0f : static_cast<float>(max.x) - V::Math::kBoost,
                             max.y == kEmpty ? 0.0f : static_cast<float>(max.y) - V::Math::kBoost};
    const unsigned thread = opaque(threadIdx.x);
    const int row0 = thread / 32 * 16 + thread % 32 / 4;
    const auto store = [&](int at, int h, uint32_t packed) {
      const uint32_t to = shared_base() + S::kWeightAt + (64 * at + row0 + 8 * h) * 16 + 4 * t_;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(packed) : "memory");
    };
    if (!v_dynamic) {  // their sum comes with the values'
#pragma unroll
      for (int at = 0; at < kTiles; ++at) {
        if (at >= num_tiles) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          store(at, h, V::Math::pack(exp2_fast(x[at][2 * h] - offset[0]), exp2_fast(x[at][2 * h + 1] - offset[1])));
        }
      }
      return max;
    }
    if constexpr (V::kInteger) {
      float total[2] = {0.0f, 0.0f}, taken[2] = {0.0f, 0.0f};
#pragma unroll
      for (int at = 0; at < kTiles; ++at) {
        if (at >= num_tiles) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Scale v = unpack_scale<V>(v_raw[at][h], p_.v_cache.format.stored_zero);
          // Tokens that no query sees have scale 0 here, and weight 0.
          const float inverse = reciprocal_fast(fmaxf(v.scale, 0x1p-126f));
          const uint32_t packed = V::Math::pack(exp2_fast(x[at][2 * h] - offset[0]) * v.scale,
                                                exp2_fast(x[at][2 * h + 1] - offset[1]) * v.scale);
          // All sums take the weights as they are rounded, so that they remain weights of a mean.
          const float2 rounded = V::Math::unpack(packed);
          total[0] = fmaf(rounded.x, inverse, total[0]);
          total[1] = fmaf(rounded.y, inverse, total[1]);
          taken[0] = fmaf(rounded.x, v.zero, taken[0]);
          taken[1] = fmaf(rounded.y, v.zero, taken[1]);
          store(at, h, packed);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          total[j] += __shfl_xor_sync(kFullWarp, total[j], step);
          taken[j] += __shfl_xor_sync(kFullWarp, taken[j], step);
        }
        if (g_ == 0) Rows::warp_sum()[warp_ * kNarrowRows + 2 * t_ + j] = make_float2(total[j], taken[j]);
      }
    }
    return max;
  }

  // Sums of weights, and of weights times zeros, over the warps.
  __device__ __forceinline__ void gather_sums(float2& total, float2& zeros) const {
    total = zeros = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 sums = *reinterpret_cast<const float4*>(Rows::warp_sum() + w * kNarrowRows + 2 * t_);
      total.x += sums.x;
      zeros.x += sums.y;
      total.y += sums.z;
      zeros.y += sums.w;
    }
  }

  // Numbers of this thread's two columns.
  __device__ __forceinline__ float2 pair(const float* numbers) const {
    return *reinterpret_cast<const float2*>(numbers + 2 * t_);
  }
  __device__ __forceinline__ void set_pair(float* numbers, float2 x) const {
    *reinterpret_cast<float2*>(numbers + 2 * t_) = x;
  }

  // --- values ----------------------------------------------------------------------------------------------------------

  // out += V^T P^T over a chunk's tokens, for this warp's channels.
  __device__ __forceinline__ void weigh(int token, int num_tiles, Outputs& out, float (&sums)[4]) {
    constexpr uint32_t kOnes[4] = {V::Math::kOnes, V::Math::kOnes, V::Math::kOnes, V::Math::kOnes};
    uint32_t values = 0;
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile += kRound) {
      // The first one is also the barrier behind the weights.
      if (tile % kStageTiles == 0) {
        values = queue_.next_values();
        queue_.clear_unseen(values, token + tile * 64, current().pass.low, current().pass.end);
      }
      if (warp_ >= kSlices) continue;
      const int lane = opaque(lane_);
      const uint32_t weights = shared_base() + S::kWeightAt + tile * 64 * 16;
      const uint32_t rows = values + tile % kStageTiles * (64 * S::VSwizzle::kPitch);
#pragma unroll
      for (int at = 0; at < 64 * kRound; at += 32) {
        uint32_t p[4];  // B fragments of two k-steps of 16 tokens
        load_tiles_transposed(p, weights + at * 16 + lane * 16);
        uint32_t word[kOwn][2][kVWords][2];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          V::Math::mma(sums, kOnes, p[2 * step], p[2 * step + 1]);
#pragma unroll
          for (int own = 0; own < kOwn; ++own) {
            load_values<S, V, true>(word[own], step, rows + at * S::VSwizzle::kPitch, warp_ + own * kWarps, lane);
            uint32_t a[2][4];
            V::v_fragments(word[own][step], a);
#pragma unroll
            for (int tile16 = 0; tile16 < 2; ++tile16) {
              V::Math::mma(out[own][tile16], a[tile16], p[2 * step], p[2 * step + 1]);
            }
          }
        }
      }
    }
  }

  // --- results ---------------------------------------------------------------------------------------------------------

  // Calls fn(own, tile, c) for each number of the outputs that a thread has.
  template <class Fn>
  __device__ __forceinline__ static void for_fragments(Fn fn) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int c = 0; c < 4; ++c) fn(own, tile, c);
      }
    }
  }

  // Sums in the fragments' units become sums of weight * (code - zero), static zeros excepted.
  __device__ __forceinline__ static void to_units(Outputs& out, float2 zeros) {
    if constexpr (V::kInteger) {
      for_fragments([&](int own, int tile, int c) {
        out[own][tile][c] = fmaf(out[own][tile][c], V::v_factor(c / 2), c % 2 ? -zeros.y : -zeros.x);
      });
    }
  }

  __device__ __forceinline__ static void fold_chunk(State& run, const State& chunk) {
    const Rescale r[2] = {rescale(run.max.x, chunk.max.x), rescale(run.max.y, chunk.max.y)};
    run.max = make_int2(r[0].max, r[1].max);
    run.total = make_float2(fold(run.total.x, chunk.total.x, r[0]), fold(run.total.y, chunk.total.y, r[1]));
    for_fragments([&](int own, int tile, int c) {
      run.out[own][tile][c] = fold(run.out[own][tile][c], chunk.out[own][tile][c], r[c % 2]);
    });
  }

  __device__ __forceinline__ float* kept() const { return groups_at<D>(p_, current().seq, S::kv_head()); }

  // run becomes the fold of the groups before, and it.
  __device__ __forceinline__ void recall(State& run) const {
    const float* from = kept();
    State before;
    before.max = make_int2(__float_as_int(from[0]), __float_as_int(from[kThreads]));
    before.total = make_float2(from[2 * kThreads], from[3 * kThreads]);
    from += 4 * kThreads;
    for_fragments(
        [&](int own, int tile, int c) { before.out[own][tile][c] = from[((own * 2 + tile) * 4 + c) * kThreads]; });
    fold_chunk(before, run);
    run = before;
  }

  __device__ __forceinline__ void keep(const State& run) const {
    float* to = kept();
    to[0] = __int_as_float(run.max.x), to[kThreads] = __int_as_float(run.max.y);
    to[2 * kThreads] = run.total.x, to[3 * kThreads] = run.total.y;
    to += 4 * kThreads;
    for_fragments([&](int own, int tile, int c) { to[((own * 2 + tile) * 4 + c) * kThreads] = run.out[own][tile][c]; });
  }

  // Calls fn(channel, number) for the numbers of this thread's column j.
  template <class Fn>
  __device__ __forceinline__ void for_channels(const Outputs& out, int j, Fn fn) const {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int slice = warp_ + own * kWarps;
      if (slice < kSlices) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int high = 0; high < 2; ++high) {
            fn(32 * slice + V::v_channel(tile, high, g_), out[own][tile][2 * high + j]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void save(int64_t partial, const State& run, bool starts_group) const {
    const int rows = current().rows;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = 2 * t_ + j;
      if (r >= rows) continue;
      const PartialAt to = partial_at(p_, partial + Rows::token()[r], Rows::head()[r], D);
      if (warp_ == 0 && g_ == 0) {
        *to.state = pack_state(j == 0 ? run.max.x : run.max.y, (j == 0 ? run.total.x : run.total.y) + Rows::bad()[r],
                               starts_group);
      }
      for_channels(run.out, j, [&](int channel, float x) { to.out[channel] = x; });
    }
  }

  // For finish_rows.
  __device__ __forceinline__ void stage_rows(const State& run) const {
    __syncthreads();  // queries and weights make room
    float* sums = reinterpret_cast<float*>(shared_memory + S::kOutAt);
    float2* states = Rows::warp_sum();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      for_channels(run.out, j, [&](int channel, float x) { sums[(2 * t_ + j) * D + channel] = x; });
    }
    if (warp_ == 0 && g_ == 0) {
      states[2 * t_] = make_float2(__int_as_float(run.max.x), run.total.x);
      states[2 * t_ + 1] = make_float2(__int_as_float(run.max.y), run.total.y);
    }
    __syncthreads();
  }

  const AttendParams& p_;
  Queue<S, K, V>& queue_;
  const int warp_, lane_, g_, t_;
  uint32_t key_row_, key_unit_;  // of the row that this lane names in score()
};

}  // namespace foldkv::cuda

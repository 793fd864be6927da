// Attention of a work list over the paged cache: one templated kernel for all formats (docs/kernel.md).
//
// A block of 4 warps goes through its worker's items for one kv head. For a block of tokens (256 in decode): scores as
// S^T = K Q^T, tokens in rows, each warp 16 tokens of every 64; the maximum over the block; weights into shared memory;
// then O^T = V^T P^T, each warp its own channels. Each chunk starts from a fresh state and is folded or written out.
#pragma once

#include "cuda/finish.cuh"
#include "cuda/queue.cuh"

namespace foldkv::cuda {

template <class K, class V, int D, int kMaxTiles>
class Attention {
  using S = Shape<K, V, D, kMaxTiles>;
  using Rows = RowInfo<S::kRowsAt, S::kMaxRows>;
  static constexpr int kSlices = D / 32;  // of 32 channels
  static constexpr int kOwn = (kSlices + kWarps - 1) / kWarps;  // slices of a warp: warp, warp + 4
  static constexpr int kKWords = K::kBits / 4, kVWords = V::kBits / 4;

 public:
  __device__ Attention(const AttendParams& p, int kv_head)
      : p_(p),
        address_(shared_address(shared_memory)),
        queue_(p, address_, kv_head),
        kv_head_(kv_head),
        group_(p.h_q / p.h_kv) {
    locate(threadIdx.x);
  }

  __device__ __forceinline__ void run(const WorkItem* item, const WorkItem* end) {
    prefetch_queries(*item);
    queue_.start(item, end);
    for (; item < end; ++item) {
      const int rows = item->q_count * group_;
      for (int first_row = 0; first_row < rows; first_row += S::kMaxRows) {
        begin_pass(*item, first_row, min(rows - first_row, S::kMaxRows));
        const int tiles = current().pass.tiles;
        if (current().pass.block == kNarrowBlock) {
          run_pass<1, kNarrowBlock>();
        } else if (tiles == 1) {
          run_pass<1, kWideBlock>();
        } else {
          if constexpr (kMaxTiles >= 2) {
            if (tiles == 2) run_pass<2, kWideBlock>();
          }
          if constexpr (kMaxTiles >= 4) {
            if (tiles == 4) run_pass<4, kWideBlock>();
          }
          if constexpr (kMaxTiles >= 8) {
            if (tiles == 8) run_pass<8, kWideBlock>();
          }
        }
      }
    }
    copy_wait<0>();
    __syncthreads();
  }

 private:
  // Outputs: [slice][tile of 16 channels][query tile][fragment].
  template <int N>
  using Outputs = float[kOwn][2][N][4];

  // Which thread this is; said anew for each pass, so that addresses are not kept from one to the next in registers.
  __device__ __forceinline__ void locate(int thread) {
    warp_ = thread / 32;
    lane_ = thread % 32;
    g_ = lane_ / 4;
    t_ = lane_ % 4;
  }

  // What a pass is about, in shared memory, to spare registers.
  struct Current {
    Pass pass;
    int rows;  // query rows of the pass
    int q_row, q_count;  // as in WorkItem
    int chunk_begin, first_partial, folds;
  };
  static_assert(sizeof(Current) <= 64, "room for it");
  __device__ static const Current& current() { return *reinterpret_cast<Current*>(shared_memory + S::kPassAt); }

  __device__ __forceinline__ void begin_pass(const WorkItem& item, int first_row, int rows) {
    const Pass pass(item, group_, first_row, kMaxTiles, p_.window_left);
    __syncthreads();  // all have left the rows, queries and outputs of the pass before
    if (threadIdx.x == 0) {
      *reinterpret_cast<Current*>(shared_memory + S::kPassAt) = {
          pass, rows, item.q_row, item.q_count, item.chunk_begin, item.first_partial, item.folds};
    }
    load_queries(item, first_row, rows, 8 * pass.tiles);
    __syncthreads();
  }

  // --- queries -------------------------------------------------------------------------------------------------------

  // Ask for the query rows of an item and the parameters of K, so that they come while the queue starts.
  __device__ __forceinline__ void prefetch_queries(const WorkItem& item) const {
    const int element = p_.q.dtype == DType::Float32 ? 4 : 2, group = p_.h_q / p_.h_kv;
    const int row = threadIdx.x / 8, at = threadIdx.x % 8 * 64 / element;
    if (row < min(item.q_count * group, S::kMaxRows) && at < D) {
      const int64_t from = static_cast<int64_t>(item.q_row + row / group) * p_.q.token_stride +
                           (kv_head_ * group + row % group) * p_.q.head_stride + at;
      prefetch(static_cast<const uint8_t*>(p_.q.data) + from * element);
    }
    if constexpr (K::kInteger) {
      const int line = threadIdx.x * 16;  // 64 bytes
      if (line < kNumParamRows * D) {
        prefetch(p_.k_cache.params + (static_cast<int64_t>(line / D) * p_.h_kv + kv_head_) * D + line % D);
      }
    }
  }

  // Queries become 16-bit fragments: balanced, rotated, static scale folded in, scaled by a power of 2 a row; with
  //   logit * log2(e) = dot * factor + base, dot = sum over channels of query * code, in the fragments' units.
  // Codes are taken about the middle code, so that a query's rounding error meets small numbers: `correction` starts the
  // sums. `sum` is the exact sum of the query, for zeros that come with the tokens.
  __device__ __forceinline__ void load_queries(const WorkItem& item, int first_row, int rows, int padded) {
    const int group = opaque(group_);
#pragma unroll 1
    for (int r = warp_; r < padded; r += kWarps) {
      float x[kSlices] = {};
      bool bad = false;
      const int token = (first_row + r) / group, head = kv_head_ * group + (first_row + r) % group;
      if (r >= rows) {  // padding: zeros
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
          *reinterpret_cast<uint16_t*>(shared_memory + S::query_at(r, i) + 2 * lane_) = 0;
        }
        if (lane_ == 0) {
          Rows::base()[r] = Rows::factor()[r] = Rows::sum()[r] = Rows::correction()[r] = Rows::bad()[r] = 0.0f;
          Rows::key_begin()[r] = Rows::key_end()[r] = 0;
        }
        continue;
      }
      const int64_t at = static_cast<int64_t>(item.q_row + token) * p_.q.token_stride + head * p_.q.head_stride;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        x[i] = load_element(p_.q.data, p_.q.dtype, at + 32 * i + lane_);
        bad = bad || !isfinite(x[i]);
      }
      bad = __any_sync(kFullWarp, bad);
      float base = 0.0f, sum = 0.0f, largest = 0.0f;
      if (bad) {
#pragma unroll
        for (int i = 0; i < kSlices; ++i) x[i] = 0.0f;
      }
      if constexpr (K::kInteger) base = transform_query(x);
#pragma unroll
      for (int i = 0; i < kSlices; ++i) largest = fmaxf(largest, fabsf(x[i]));
      int shift = 0;  // queries are multiplied by 2^shift
      if constexpr (K::Math::kMaxQuery > 0.0f) {
        largest = warp_max(largest);
        if (largest > 0.0f) shift = min(max(14 + 127 - (__float_as_int(largest) >> 23), -126), 126);
      }
      const float scale = __int_as_float((shift + 127) << 23);
      float rounded = 0.0f;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        const float scaled = x[i] * scale;
        const uint32_t value = K::Math::pack(scaled * query_factor(), 0.0f);
        *reinterpret_cast<uint16_t*>(shared_memory + S::query_at(r, i) + query_place() * 2) =
            static_cast<uint16_t>(value);
        rounded += K::Math::unpack(value).x / query_factor();
        sum += scaled;
      }
      if constexpr (K::kInteger) {
        sum = warp_sum(sum);
        rounded = warp_sum(rounded);
      }
      if (lane_ == 0) {
        const KeyRange keys = visible_keys(item.position + token, item.start, p_.window_left);
        Rows::base()[r] = base * p_.softmax_scale * kLog2E;
        Rows::factor()[r] = p_.softmax_scale * kLog2E * K::kUnit / scale;
        Rows::sum()[r] = sum / K::kUnit;
        Rows::correction()[r] = K::kMid * (sum - rounded) / K::kUnit;
        Rows::key_begin()[r] = keys.begin;
        Rows::key_end()[r] = keys.end < item.seq_len ? keys.end : item.seq_len;
        Rows::token()[r] = token;
        Rows::head()[r] = head;
        Rows::bad()[r] = bad ? NAN : 0.0f;
      }
    }
  }

  // Where in its 32 channels' 32 places a lane's channel goes, and what it is multiplied by.
  __device__ __forceinline__ int query_place() const {
    int place = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        if (K::k_channel(t, i) == lane_) place = 8 * t + i;
      }
    }
    return place;
  }
  __device__ __forceinline__ float query_factor() const { return K::k_factor(query_place() % 8); }

  // Returns what the mean, and static zeros, add to every dot.
  __device__ __forceinline__ float transform_query(float (&x)[kSlices]) const {
    const Format& format = p_.k_cache.format;
    const float* params = p_.k_cache.params + static_cast<int64_t>(kv_head_) * D + lane_;
    const int64_t stride = static_cast<int64_t>(p_.h_kv) * D;
    float base = 0.0f;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      base += x[i] * params[kMean * stride + 32 * i];
      x[i] *= params[kBalance * stride + 32 * i];
    }
    if (format.rotate) hadamard_row<D>(x, lane_);
    if (!format.dynamic) {
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        x[i] *= params[kScale * stride + 32 * i];
        base -= x[i] * params[kZero * stride + 32 * i];
      }
    }
    return warp_sum(base);
  }

  // B fragments of two k-steps.
  __device__ __forceinline__ uint4 query_fragment(int row_tile, int slice) const {
    return load_shared(address_ + S::query_at(8 * row_tile + g_, slice) + t_ * 16);
  }

  // --- scores --------------------------------------------------------------------------------------------------------

  // Words of kSpan slices, from `slice` on, of a warp's 16 tokens; `row`: this lane's row, unit 0.
  static constexpr int kSpan = K::kBits == 4 ? 2 : 1;
  __device__ __forceinline__ static void load_keys(uint32_t (&word)[kSpan][kKWords][2], int slice, uint32_t row,
                                                   int swizzle, int high) {
    constexpr int kUnits = S::kKRow / 16;
#pragma unroll
    for (int i = 0; i < kSpan * kKWords; i += 2) {
      const int unit = slice * kKWords + i;
      if (unit + 1 < kUnits) {
        uint32_t r[4];
        load_tiles(r, row + (((unit + high) ^ swizzle) << 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) word[(i + j / 2) / kKWords][(i + j / 2) % kKWords][j % 2] = r[j];
      } else {
        uint32_t r[2];
        load_tiles(r, row + ((unit ^ swizzle) << 4));
        word[i / kKWords][i % kKWords][0] = r[0];
        word[i / kKWords][i % kKWords][1] = r[1];
      }
    }
  }

  struct Scale {
    float scale, zero;
  };
  // Bf16 scale and fp16 zero, or the middle code, of one token.
  template <class C>
  __device__ __forceinline__ static Scale unpack_scale(uint32_t raw, bool stored_zero) {
    const float zero = stored_zero ? __half2float(__ushort_as_half(static_cast<uint16_t>(raw >> 16))) : C::kMid;
    return {__uint_as_float(raw << 16), zero};
  }
  __device__ __forceinline__ uint32_t load_scale(const Format& format, uint32_t meta, int row) const {
    const uint8_t* at = shared_memory + (meta - address_);
    return format.stored_zero ? *reinterpret_cast<const uint32_t*>(at + 4 * row)
                              : *reinterpret_cast<const uint16_t*>(at + 2 * row);
  }

  // Logits times log2(e) of 16 tokens and N * 8 query rows: x[n] as a C fragment. kSplit: in two chains of sums.
  template <int N, bool kSplit>
  __device__ __forceinline__ void score(uint32_t slot, int row0, float (&x)[N][4]) const {
    constexpr int kUnits = S::kKRow / 16;
    const int lane = opaque(lane_), row = row0 + lane % 16;
    float odd[N][4];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float2 start = pair(Rows::correction(), n);
      x[n][0] = x[n][2] = start.x;
      x[n][1] = x[n][3] = start.y;
      if constexpr (!K::kInteger) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.0f;
      odd[n][0] = odd[n][1] = odd[n][2] = odd[n][3] = 0.0f;
    }
    uint32_t word[kSpan][kKWords][2];
    uint4 next = {};  // with one row tile, registers matter more than the wait
    if constexpr (N > 1) next = query_fragment(0, 0);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      uint32_t a[2][4];
      if (slice % kSpan == 0) load_keys(word, slice, slot + row * S::kKRow, Swizzle<kUnits>::of(row), lane / 16);
      K::k_fragments(word[slice % kSpan], a);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint4 q = N > 1 ? next : query_fragment(0, slice);
        if constexpr (N == 1) {
        } else if (n + 1 < N) {
          next = query_fragment(n + 1, slice);
        } else if (slice + 1 < kSlices) {
          next = query_fragment(0, slice + 1);
        }
        K::Math::mma(x[n], a[0], q.x, q.y);
        K::Math::mma(kSplit ? odd[n] : x[n], a[1], q.z, q.w);
      }
    }
    if constexpr (kSplit) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) x[n][c] += odd[n][c];
      }
    }
    Scale k[2] = {};
    if constexpr (K::kInteger) {
      if (p_.k_cache.format.dynamic) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          k[h] = unpack_scale<K>(load_scale(p_.k_cache.format, slot + S::kKMeta, row0 + g_ + 8 * h),
                                 p_.k_cache.format.stored_zero);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float2 factor = pair(Rows::factor(), n), base = pair(Rows::base(), n);
      if (K::kInteger && p_.k_cache.format.dynamic) {
        const float2 sum = pair(Rows::sum(), n);
#pragma unroll
        for (int c = 0; c < 4; ++c) x[n][c] = fmaf(-k[c / 2].zero, c % 2 ? sum.y : sum.x, x[n][c]) * k[c / 2].scale;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) x[n][c] = fmaf(x[n][c], c % 2 ? factor.y : factor.x, c % 2 ? base.y : base.x);
      if (p_.softcap > 0.0f) {
#pragma unroll
        for (int c = 0; c < 4; ++c) x[n][c] = soft_cap(x[n][c]);
      }
    }
  }

  // cap * tanh(logit / cap), in units of log2(e).
  __device__ __forceinline__ float soft_cap(float x) const {
    const float cap = p_.softcap * kLog2E;
    const float e = exp2_fast(fabsf(x) * __fdividef(-2.0f, p_.softcap));
    return copysignf(cap * __fdividef(1.0f - e, 1.0f + e), x);
  }

  template <int N>
  __device__ __forceinline__ void mask(float (&x)[N][4], int token) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int r = 8 * n + 2 * t_ + c % 2, key = token + g_ + 8 * (c / 2);
        if (key < Rows::key_begin()[r] || key >= Rows::key_end()[r]) x[n][c] = -INFINITY;
      }
    }
  }

  // --- one block of tokens ---------------------------------------------------------------------------------------------

  // Adds kTokens tokens from `token` on, up to the pass' end, to a chunk's state.
  template <int N, int kTokens>
  __device__ __forceinline__ void attend_block(int token, Outputs<N>& out) {
    constexpr int kStage = kTokens < S::kStageTokens ? kTokens : S::kStageTokens;  // tokens of a slot that are used
    constexpr int kTiles = kTokens / 64, kStageTiles = kStage / 64, kMaxStages = kTokens / kStage;
    const bool v_dynamic = V::kInteger && p_.v_cache.format.dynamic;
    int num_stages;
    float x[kTiles][N][4];
    uint32_t v_raw[kTiles][2];  // scale and zero of V, of this thread's tokens
    {
      const Pass& pass = current().pass;
      num_stages = ceil_div(min(kTokens, pass.end - token), kStage);
      const bool whole = token >= pass.whole_begin && token + kTokens <= pass.whole_end;
      int first = 0;
#pragma unroll
      for (int stage = 0; stage < kMaxStages; ++stage) {
        if (stage < num_stages) {
          if (stage % S::kTogether == 0) first = queue_.next(min(num_stages - stage, S::kTogether));
          const uint32_t slot = queue_.slot(first, stage % S::kTogether);
#pragma unroll
          for (int tile = 0; tile < kStageTiles; ++tile) {
            const int at = stage * kStageTiles + tile, row0 = 64 * tile + 16 * warp_;
            score<N, kTokens == kNarrowBlock>(slot, row0, x[at]);
            load_v_scales(slot, row0, token + 64 * at + 16 * warp_, whole, v_raw[at]);
            if (!whole) mask<N>(x[at], token + 64 * at + 16 * warp_);
          }
        } else {
#pragma unroll
          for (int tile = 0; tile < kStageTiles; ++tile) {
            clear_scores<N>(x[stage * kStageTiles + tile], v_raw[stage * kStageTiles + tile]);
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) share_max<N>(x, v_raw, v_dynamic, n);
    const int first = queue_.next(min(num_stages, S::kTogether));  // also the barrier behind the maxima
#pragma unroll
    for (int n = 0; n < N; ++n) weights<N>(x, v_raw, v_dynamic, num_stages * kStageTiles, n, out);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) gather_sums(n);
    weigh<N, kStage>(first, num_stages, out);
  }

  template <int N>
  __device__ __forceinline__ static void clear_scores(float (&x)[N][4], uint32_t (&v_raw)[2]) {
    v_raw[0] = v_raw[1] = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) x[n][0] = x[n][1] = x[n][2] = x[n][3] = -INFINITY;
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

  // The warp's maxima of query tile n, for all warps: of log2(weight * scale of V), up to a constant.
  template <int N, int kTiles>
  __device__ __forceinline__ void share_max(const float (&x)[kTiles][N][4], const uint32_t (&v_raw)[kTiles][2],
                                            bool v_dynamic, int n) const {
    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int at = 0; at < kTiles; ++at) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float lift = v_dynamic ? log2_fast(__uint_as_float(v_raw[at][h] << 16)) : 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) highest[j] = fmaxf(highest[j], x[at][n][2 * h + j] + lift);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        highest[j] = fmaxf(highest[j], __shfl_xor_sync(kFullWarp, highest[j], step));
      }
    }
    if (g_ == 0) set_pair(Rows::warp_max() + warp_ * S::kMaxRows, n, make_float2(highest[0], highest[1]));
  }

  // The least whole power of 2 that bounds a block's weights, or what it was before.
  __device__ __forceinline__ static int round_max(float highest, int before) {
    if (highest == -INFINITY) return before;
    const int max = static_cast<int>(fminf(fmaxf(ceilf(highest), -0x1p28f), 0x1p28f));
    return max > before ? max : before;
  }

  // The weights of query tile n go to shared memory; what is there of the chunk is scaled to the new maximum.
  template <int N, int kTiles>
  __device__ __forceinline__ void weights(const float (&x)[kTiles][N][4], const uint32_t (&v_raw)[kTiles][2],
                                          bool v_dynamic, int num_tiles, int n, Outputs<N>& out) const {
    float2 highest = pair(Rows::warp_max(), n);
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const float2 other = pair(Rows::warp_max() + w * S::kMaxRows, n);
      highest.x = fmaxf(highest.x, other.x);
      highest.y = fmaxf(highest.y, other.y);
    }
    const int2 before = mine(Rows::chunk_max(), n);
    const int2 max = make_int2(round_max(highest.x, before.x), round_max(highest.y, before.y));
    // Where a chunk has several blocks, what there is of it; once the maximum has settled there is nothing to do.
    const bool grown = before.x != max.x || before.y != max.y;
    if (kTiles * 64 < kChunkSize && __any_sync(kFullWarp, grown)) {
      const float scale[2] = {exp2_integer(before.x - max.x), exp2_integer(before.y - max.y)};
      const float2 total = mine(Rows::chunk_total(), n);
      set_mine(Rows::chunk_total(), n, make_float2(total.x * scale[0], total.y * scale[1]));
      if constexpr (V::kInteger) {
        const float2 zeros = mine(Rows::chunk_zeros(), n);
        set_mine(Rows::chunk_zeros(), n, make_float2(zeros.x * scale[0], zeros.y * scale[1]));
      }
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int c = 0; c < 4; ++c) out[own][tile][n][c] *= scale[c % 2];
        }
      }
    }
    if (kTiles * 64 == kChunkSize || __any_sync(kFullWarp, grown)) set_mine(Rows::chunk_max(), n, max);
    const float offset[2] = {max.x == kEmpty ? 0.0f : static_cast<float>(max.x) - V::Math::kBoost,
                             max.y == kEmpty ? 0.0f : static_cast<float>(max.y) - V::Math::kBoost};
    float total[2] = {0.0f, 0.0f}, taken[2] = {0.0f, 0.0f};
    const int row0 = opaque(16 * warp_ + g_);
#pragma unroll
    for (int at = 0; at < kTiles; ++at) {
      if (at < num_tiles) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Scale v = v_dynamic ? unpack_scale<V>(v_raw[at][h], p_.v_cache.format.stored_zero) : Scale{1.0f, 0.0f};
          // Tokens that no query sees have scale 0 here, and weight 0.
          const float inverse = v_dynamic ? reciprocal_fast(fmaxf(v.scale, 0x1p-126f)) : 1.0f;
          const int row = 64 * at + row0 + 8 * h;
          float w[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float probability = exp2_fast(x[at][n][2 * h + j] - offset[j]);
            w[j] = v_dynamic ? probability * v.scale : probability;
          }
          // All sums take the weights as they are rounded, so that they remain weights of a mean.
          const uint32_t packed = V::Math::pack(w[0], w[1]);
          const float2 rounded = V::Math::unpack(packed);
          total[0] = fmaf(rounded.x, inverse, total[0]);
          total[1] = fmaf(rounded.y, inverse, total[1]);
          if (v_dynamic) {
            taken[0] = fmaf(rounded.x, v.zero, taken[0]);
            taken[1] = fmaf(rounded.y, v.zero, taken[1]);
          }
          const uint32_t to = address_ + S::kWeightAt + row * (16 * N) + ((n ^ Swizzle<N>::of(row)) << 4) + 4 * t_;
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(packed) : "memory");
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        total[j] += __shfl_xor_sync(kFullWarp, total[j], step);
        if constexpr (V::kInteger) taken[j] += __shfl_xor_sync(kFullWarp, taken[j], step);
      }
      if (g_ == 0) Rows::warp_sum()[warp_ * S::kMaxRows + 8 * n + 2 * t_ + j] = make_float2(total[j], taken[j]);
    }
  }

  __device__ __forceinline__ void gather_sums(int n) const {
    float2 total = mine(Rows::chunk_total(), n), zeros = make_float2(0.0f, 0.0f);
    if constexpr (V::kInteger) zeros = mine(Rows::chunk_zeros(), n);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 sums = *reinterpret_cast<const float4*>(Rows::warp_sum() + w * S::kMaxRows + 8 * n + 2 * t_);
      total.x += sums.x;
      zeros.x += sums.y;
      total.y += sums.z;
      zeros.y += sums.w;
    }
    set_mine(Rows::chunk_total(), n, total);
    if constexpr (V::kInteger) set_mine(Rows::chunk_zeros(), n, zeros);
  }

  // Numbers of this thread's two columns; in arrays of all warps, and in this warp's part of [kWarps][S::kMaxRows].
  __device__ __forceinline__ float2 pair(const float* numbers, int n) const {
    return *reinterpret_cast<const float2*>(numbers + 8 * n + 2 * t_);
  }
  __device__ __forceinline__ void set_pair(float* numbers, int n, float2 x) const {
    *reinterpret_cast<float2*>(numbers + 8 * n + 2 * t_) = x;
  }
  __device__ __forceinline__ float2 mine(const float* numbers, int n) const {
    return pair(numbers + warp_ * S::kMaxRows, n);
  }
  __device__ __forceinline__ int2 mine(const int* numbers, int n) const {
    return *reinterpret_cast<const int2*>(numbers + warp_ * S::kMaxRows + 8 * n + 2 * t_);
  }
  template <class T, class T2>
  __device__ __forceinline__ void set_mine(T* numbers, int n, T2 x) const {
    __syncwarp();
    if (g_ == 0) *reinterpret_cast<T2*>(numbers + warp_ * S::kMaxRows + 8 * n + 2 * t_) = x;
    __syncwarp();
  }

  // --- values ----------------------------------------------------------------------------------------------------------

  // out += V^T P^T over a block's tokens, for this warp's channels.
  template <int N, int kStage>
  __device__ __forceinline__ void weigh(int first, int num_stages, Outputs<N>& out) {
#pragma unroll 1
    for (int stage = 0; stage < num_stages; ++stage) {
      if (stage > 0 && stage % S::kTogether == 0) first = queue_.next(min(num_stages - stage, S::kTogether));
      if (warp_ >= kSlices) continue;
      const uint32_t slot = queue_.slot(first, stage % S::kTogether);
      const int lane = opaque(lane_);
      const uint32_t weights = address_ + S::kWeightAt + stage * kStage * (16 * N);
#pragma unroll
      for (int at = 0; at < kStage; at += 32) {
        uint32_t p[2][N][2];  // [k-step of 16 tokens][query tile]
        uint32_t word[kOwn][2][kVWords][2];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          load_weights<N>(p, step, weights + at * (16 * N), lane);
#pragma unroll
          for (int own = 0; own < kOwn; ++own) {
            load_values(word[own], step, slot + at * S::kVRow, warp_ + own * kWarps, lane);
            uint32_t a[2][4];
            V::v_fragments(word[own][step], a);
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
              for (int n = 0; n < N; ++n) V::Math::mma(out[own][tile][n], a[tile], p[step][n][0], p[step][n][1]);
            }
          }
        }
      }
    }
  }

  // B fragments of the weights of a k-step of 32 tokens, or of both at once.
  template <int N>
  __device__ __forceinline__ static void load_weights(uint32_t (&p)[2][N][2], int step, uint32_t at, int lane) {
    if constexpr (N == 1) {
      if (step == 0) {
        uint32_t r[4];
        load_tiles_transposed(r, at + lane * 16);
        p[0][0][0] = r[0], p[0][0][1] = r[1], p[1][0][0] = r[2], p[1][0][1] = r[3];
      }
    } else {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        const int row = 16 * step + lane % 16;
        uint32_t r[4];
        load_tiles_transposed(r, at + row * (16 * N) + (((n + lane / 16) ^ Swizzle<N>::of(row)) << 4));
        p[step][n][0] = r[0], p[step][n][1] = r[1], p[step][n + 1][0] = r[2], p[step][n + 1][1] = r[3];
      }
    }
  }

  // Words of a slice of 32 channels of a k-step, or of both at once: [k-step][unit][tokens 0..7, 8..15].
  __device__ __forceinline__ static void load_values(uint32_t (&word)[2][kVWords][2], int step, uint32_t at, int slice,
                                                     int lane) {
    constexpr int kUnits = S::kVRow / 16;
    if constexpr (kVWords == 1) {
      if (step == 0) {
        uint32_t r[4];
        load_tiles_transposed(r, at + lane * S::kVRow + ((slice ^ Swizzle<kUnits>::of(lane)) << 4));
        word[0][0][0] = r[0], word[0][0][1] = r[1], word[1][0][0] = r[2], word[1][0][1] = r[3];
      }
    } else {
#pragma unroll
      for (int unit = 0; unit < kVWords; unit += 2) {
        const int row = 16 * step + lane % 16;
        const int from = (slice * kVWords + unit + lane / 16) ^ Swizzle<kUnits>::of(row);
        uint32_t r[4];
        load_tiles_transposed(r, at + row * S::kVRow + (from << 4));
        word[step][unit][0] = r[0], word[step][unit][1] = r[1];
        word[step][unit + 1][0] = r[2], word[step][unit + 1][1] = r[3];
      }
    }
  }

  // --- a pass ----------------------------------------------------------------------------------------------------------

  template <int N, int kTokens>
  __device__ __forceinline__ void run_pass() {
    if constexpr (S::kWide) locate(opaque(threadIdx.x));
    const Current& now = current();
    Outputs<N> out, run;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      set_mine(Rows::run_max(), n, make_int2(kEmpty, kEmpty));
      set_mine(Rows::run_total(), n, make_float2(0.0f, 0.0f));
    }
    clear_outputs<N>(run);
    if constexpr (S::kWide) for_running<N>(run, [](float4& kept, float (&mine)[4]) { kept = to_float4(mine); });
#pragma unroll 1
    for (int token = now.pass.begin; token < now.pass.end;) {
      const int chunk = token / kChunkSize, end = min(now.pass.end, (chunk + 1) * kChunkSize);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        set_mine(Rows::chunk_max(), n, make_int2(kEmpty, kEmpty));
        set_mine(Rows::chunk_total(), n, make_float2(0.0f, 0.0f));
        set_mine(Rows::chunk_zeros(), n, make_float2(0.0f, 0.0f));
      }
      clear_outputs<N>(out);
#pragma unroll 1
      for (; token < end; token += kTokens) attend_block<N, kTokens>(token, out);
      to_units<N>(out);
      if (now.folds) {
        fold_chunk<N>(run, out);
      } else {
        save<N>(now.first_partial + (chunk - now.chunk_begin) * now.q_count, Rows::chunk_max(), Rows::chunk_total(),
                out);
      }
    }
    if (!now.folds) return;
    if constexpr (S::kWide) {
      for_running<N>(out, [](float4& kept, float (&mine)[4]) {
        mine[0] = kept.x, mine[1] = kept.y, mine[2] = kept.z, mine[3] = kept.w;
      });
    } else {
      copy_outputs<N>(run, out);
    }
    if (now.first_partial >= 0) {
      save<N>(now.first_partial, Rows::run_max(), Rows::run_total(), out);
    } else {
      write_rows<N>(out);
    }
  }

  __device__ static float4 to_float4(const float (&x)[4]) { return make_float4(x[0], x[1], x[2], x[3]); }

  // Calls fn(own, tile, n) for each fragment of the outputs that this warp has.
  template <int N, class Fn>
  __device__ __forceinline__ static void for_fragments(Fn fn) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int n = 0; n < N; ++n) fn(own, tile, n);
      }
    }
  }

  template <int N>
  __device__ __forceinline__ static void clear_outputs(Outputs<N>& out) {
    for_fragments<N>([&](int own, int tile, int n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out[own][tile][n][c] = 0.0f;
    });
  }

  template <int N>
  __device__ __forceinline__ static void copy_outputs(const Outputs<N>& from, Outputs<N>& to) {
    for_fragments<N>([&](int own, int tile, int n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) to[own][tile][n][c] = from[own][tile][n][c];
    });
  }

  // Sums in the fragments' units become sums of weight * (code - zero), static zeros excepted.
  template <int N>
  __device__ __forceinline__ void to_units(Outputs<N>& out) const {
    if constexpr (V::kInteger) {
      for_fragments<N>([&](int own, int tile, int n) {
        const float2 zeros = mine(Rows::chunk_zeros(), n);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          out[own][tile][n][c] = fmaf(out[own][tile][n][c], V::v_factor(c / 2), c % 2 ? -zeros.y : -zeros.x);
        }
      });
    }
  }

  __device__ __forceinline__ static bool has_slice(int own) {
    return static_cast<int>(threadIdx.x / 32) + own * kWarps < kSlices;
  }

  // Where a thread of a wide tile keeps a fragment of its running sums.
  template <int N>
  __device__ __forceinline__ static float4& kept_sums(int own, int tile, int n) {
    constexpr int kStride = 32 * (kSlices < kWarps ? kSlices : kWarps);  // threads that have any
    static_assert(kOwn * 2 * kMaxTiles * kStride * 16 <= S::kRunBytes || !S::kWide, "room for running sums");
    return reinterpret_cast<float4*>(shared_memory + S::kOutAt)[((own * 2 + tile) * N + n) * kStride + threadIdx.x];
  }

  // Wide tiles keep running sums in shared memory, each thread its own: fn(kept, a fragment of `out`).
  template <int N, class Fn>
  __device__ __forceinline__ static void for_running(Outputs<N>& out, Fn fn) {
    for_fragments<N>([&](int own, int tile, int n) {
      if (has_slice(own)) fn(kept_sums<N>(own, tile, n), out[own][tile][n]);
    });
  }

  template <int N>
  __device__ __forceinline__ void fold_chunk(Outputs<N>& run, Outputs<N>& out) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int2 run_max = mine(Rows::run_max(), n), chunk_max = mine(Rows::chunk_max(), n);
      const float2 total = mine(Rows::run_total(), n), more = mine(Rows::chunk_total(), n);
      const Rescale r[2] = {rescale(run_max.x, chunk_max.x), rescale(run_max.y, chunk_max.y)};
      set_mine(Rows::run_max(), n, make_int2(r[0].max, r[1].max));
      set_mine(Rows::run_total(), n, make_float2(fold(total.x, more.x, r[0]), fold(total.y, more.y, r[1])));
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          float (&mine)[4] = out[own][tile][n];
          if constexpr (S::kWide) {
            if (has_slice(own)) {
              float4& kept = kept_sums<N>(own, tile, n);
              kept = make_float4(fold(kept.x, mine[0], r[0]), fold(kept.y, mine[1], r[1]), fold(kept.z, mine[2], r[0]),
                                 fold(kept.w, mine[3], r[1]));
            }
          } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) run[own][tile][n][c] = fold(run[own][tile][n][c], mine[c], r[c % 2]);
          }
        }
      }
    }
  }

  // Calls fn(channel, number) for the numbers of column j of query tile n.
  template <int N, class Fn>
  __device__ __forceinline__ void for_channels(const Outputs<N>& out, int n, int j, Fn fn) const {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int slice = warp_ + own * kWarps;
      if (slice < kSlices) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int high = 0; high < 2; ++high) {
            fn(32 * slice + V::v_channel(tile, high, g_), out[own][tile][n][2 * high + j]);
          }
        }
      }
    }
  }

  template <int N>
  __device__ __forceinline__ void save(int64_t partial, const int* maxima, const float* totals,
                                       const Outputs<N>& out) const {
    const int rows = current().rows;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int r = 8 * n + 2 * t_ + j;
        if (r >= rows) continue;
        const PartialAt to = partial_at(p_, partial + Rows::token()[r], Rows::head()[r], D);
        if (warp_ == 0 && g_ == 0) *to.state = make_float2(__int_as_float(maxima[r]), totals[r] + Rows::bad()[r]);
        for_channels<N>(out, n, j, [&](int channel, float x) { to.out[channel] = x; });
      }
    }
  }

  template <int N>
  __device__ __forceinline__ void write_rows(const Outputs<N>& out) const {
    const int rows = current().rows, q_row = current().q_row;
    __syncthreads();  // queries, weights or running sums make room
    float* sums = reinterpret_cast<float*>(shared_memory + S::kOutAt);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int r = 8 * n + 2 * t_ + j;
        for_channels<N>(out, n, j, [&](int channel, float x) { sums[r * D + channel] = x; });
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int r = warp_; r < rows; r += kWarps) {
      float x[kSlices];
#pragma unroll
      for (int i = 0; i < kSlices; ++i) x[i] = sums[r * D + 32 * i + lane_];
      // A query that is not finite gives NaN even where it sees nothing.
      const float bad = Rows::bad()[r];
      const int max = Rows::run_max()[r] == kEmpty && isnan(bad) ? 0 : Rows::run_max()[r];
      finish_row<D>(p_, V::kInteger, q_row + Rows::token()[r], Rows::head()[r], max, Rows::run_total()[r] + bad,
                    V::Math::kBoost, x, lane_);
    }
  }

  const AttendParams& p_;
  const uint32_t address_;
  Queue<S, K, V, D> queue_;
  const int kv_head_, group_;
  int warp_, lane_, g_, t_;
};

// Rows of no sequence are 0 with a log-sum-exp of nothing; all rows are NaN where the plan could not be made.
template <int D>
__device__ __forceinline__ void fill_rows(const AttendParams& p, int begin, float value, float lse) {
  const int64_t stop = static_cast<int64_t>(p.num_rows) * p.h_q;
  for (int64_t at = static_cast<int64_t>(begin) * p.h_q + blockIdx.x; at < stop; at += gridDim.x) {
    for (int c = threadIdx.x; c < D; c += kThreads) store_element(p.out, p.q.dtype, at * D + c, value);
    if (p.lse != nullptr && threadIdx.x == 0) p.lse[at] = lse;
  }
}

// Grid: any multiple of h_kv. Block b serves kv head b % h_kv and every (gridDim / h_kv)-th worker.
template <class K, class V, int D, int kMaxTiles>
__global__ void __launch_bounds__(kThreads, Shape<K, V, D, kMaxTiles>::kBlocksPerSm)
    attend_kernel(const __grid_constant__ AttendParams p) {
  const int32_t* plan = p.plan;
  const int kv_head = blockIdx.x % p.h_kv, lanes = gridDim.x / p.h_kv;
  int worker = blockIdx.x / p.h_kv;
  // All that can be known at once is asked for at once: each wait for memory delays a short batch as a whole. The worker's
  // entry may lie past the table, but not past the plan, which has more entries than workers.
  const int4 head = *reinterpret_cast<const int4*>(plan + kStatus),
             more = *reinterpret_cast<const int4*>(plan + kItemAt);
  const int last_entry = plan_item_at(kMaxWorkers) - kPlanHeader - 2;
  const int32_t* first = plan + kPlanHeader;
  const int known = min(min(worker, last_entry), static_cast<int>(p.plan_ints) - kPlanHeader - 2);
  int begin = first[known], end = first[known + 1];
  const int tail = p.cu_seqlens_q[p.batch];
  const int num_workers = more.y;
  const WorkItem* items = reinterpret_cast<const WorkItem*>(plan + more.x);
  if (head.x != kPlanOk) {
    fill_rows<D>(p, 0, NAN, NAN);
    return;
  }
  Attention<K, V, D, kMaxTiles> attention(p, kv_head);
  while (worker < num_workers) {
    if (begin < end) attention.run(items + begin, items + end);
    worker += lanes;
    if (worker < num_workers) begin = first[worker], end = first[worker + 1];
  }
  fill_rows<D>(p, tail, 0.0f, -INFINITY);
}

}  // namespace foldkv::cuda

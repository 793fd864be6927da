// What a thread of a wide tile (wide.cuh) has of its query rows: their softmax state, how states fold, and their way out.
#pragma once

#include "cuda/queries.cuh"

namespace foldkv::cuda {

template <class S, class K, class V, int D, int kRowTiles>
struct WideRows {
  using Rows = typename S::Rows;
  static constexpr int kSlices = S::kSlices;
  static constexpr int kSplit = kWarps / kRowTiles;  // warps that share 16 rows
  static constexpr int kOwn = (kSlices + kSplit - 1) / kSplit;  // slices of a warp: its part, part + kSplit, ...

  // The softmax state of this thread's rows, row() and row() + 8. Outputs: [slice][tile of 8 channels][C fragment].
  struct State {
    int max[2];
    float total[2], zeros[2];
    float out[kOwn][4][4];
  };

  __device__ __forceinline__ static const Current& current() { return Queries<S, K, D>::current(); }

  // Which thread this is, computed where it is needed: registers are scarce.
  __device__ __forceinline__ static unsigned thread() { return opaque(threadIdx.x); }
  __device__ __forceinline__ static int row() { return thread() / 32 / kSplit * 16 + thread() % 32 / 4; }
  __device__ __forceinline__ static int part() { return thread() / 32 % kSplit; }
  __device__ __forceinline__ static int column() { return thread() % 4 * 2; }  // the first of two

  __device__ __forceinline__ static bool has_slice(int own) {
    return kSlices % kSplit == 0 || part() + own * kSplit < kSlices;
  }

  // Calls fn(own, tile, c) for each number of the outputs.
  template <class Fn>
  __device__ __forceinline__ static void for_fragments(Fn fn) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
        for (int c = 0; c < 4; ++c) fn(own, tile, c);
      }
    }
  }

  __device__ __forceinline__ static void clear(State& s) {
    s.max[0] = s.max[1] = kEmpty;
#pragma unroll
    for (int h = 0; h < 2; ++h) s.total[h] = s.zeros[h] = 0.0f;
    for_fragments([&](int own, int tile, int c) { s.out[own][tile][c] = 0.0f; });
  }

  // What is there of the chunk is scaled to a new maximum.
  __device__ __forceinline__ static void raise(const int (&max)[2], State& s) {
    if (!__any_sync(kFullWarp, max[0] != s.max[0] || max[1] != s.max[1])) return;
    const float scale[2] = {exp2_integer(s.max[0] - max[0]), exp2_integer(s.max[1] - max[1])};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      s.total[h] *= scale[h];
      s.zeros[h] *= scale[h];
    }
    for_fragments([&](int own, int tile, int c) { s.out[own][tile][c] *= scale[c / 2]; });
    s.max[0] = max[0], s.max[1] = max[1];
  }

  // Sums in the fragments' units become sums of weight * (code - zero), static zeros excepted.
  __device__ __forceinline__ static void finish_chunk(State& s) {
    if constexpr (V::kInteger) {
      for_fragments([&](int own, int tile, int c) {
        s.out[own][tile][c] = fmaf(s.out[own][tile][c], V::v_factor(tile % 2), -s.zeros[c / 2]);
      });
    }
  }

  // Maxima and totals of a run of chunks wait in shared memory for the next chunk, each warp's its own, [kWarps][16 rows].
  __device__ __forceinline__ static float2* kept() {
    return Rows::run_state() + thread() / 32 * kWideRows + thread() % 32 / 4;
  }
  __device__ __forceinline__ static void keep(const State& s) {
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (column() == 0) kept()[8 * h] = make_float2(__int_as_float(s.max[h]), s.total[h]);
    }
    __syncwarp();
  }
  __device__ __forceinline__ static void recall(State& s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 state = kept()[8 * h];
      s.max[h] = __float_as_int(state.x);
      s.total[h] = state.y;
    }
  }

  __device__ __forceinline__ static void fold_chunk(State& run, const State& chunk) {
    recall(run);
    const Rescale r[2] = {rescale(run.max[0], chunk.max[0]), rescale(run.max[1], chunk.max[1])};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      run.max[h] = r[h].max;
      run.total[h] = fold(run.total[h], chunk.total[h], r[h]);
    }
    for_fragments([&](int own, int tile, int c) {
      run.out[own][tile][c] = fold(run.out[own][tile][c], chunk.out[own][tile][c], r[c / 2]);
    });
    keep(run);
  }

  // Calls fn(channel, number) for the numbers of row row() + 8 h.
  template <class Fn>
  __device__ __forceinline__ static void for_channels(const State& s, int h, Fn fn) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      if (!has_slice(own)) continue;
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          fn(32 * (part() + own * kSplit) + V::v_channel(tile / 2, tile % 2, column() + j),
             s.out[own][tile][2 * h + j]);
        }
      }
    }
  }

  // run becomes the fold of the groups before it, if any, and it; in the workspace, too.
  __device__ __forceinline__ static void fold_groups(const AttendParams& p, bool any, State& run) {
    float* at = groups_at<D>(p, current().seq, S::kv_head());
    static_assert(16 * kOwn + 4 <= kGroupFloats / kThreads, "room for it");
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* state = at + h * kThreads;
      const int max = any ? __float_as_int(state[0]) : kEmpty;
      const Rescale r = rescale(max, run.max[h]);
      run.max[h] = r.max;
      run.total[h] = fold(any ? state[2 * kThreads] : 0.0f, run.total[h], r);
      state[0] = __int_as_float(run.max[h]), state[2 * kThreads] = run.total[h];
      at += 4 * kThreads;
      for_fragments([&](int own, int tile, int c) {
        if (c / 2 != h) return;
        float& x = at[((own * 4 + tile) * 4 + c) * kThreads];
        x = run.out[own][tile][c] = fold(any ? x : 0.0f, run.out[own][tile][c], r);
      });
      at -= 4 * kThreads;
    }
  }

  __device__ __forceinline__ static void save(const AttendParams& p, int64_t partial, const State& s,
                                              bool starts_group) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row() + 8 * h;
      if (r >= current().rows) continue;
      const PartialAt to = partial_at(p, partial + Rows::token()[r], Rows::head()[r], D);
      if (part() == 0 && column() == 0) {
        *to.state = pack_state(s.max[h], s.total[h] + Rows::bad()[r], starts_group);
      }
      for_channels(s, h, [&](int channel, float x) { to.out[channel] = x; });
    }
  }

  // Eight rows of each tile at a time: there is no room for more.
  __device__ __forceinline__ static void write_rows(const AttendParams& p, const State& s) {
    const int rows = current().rows, q_row = current().q_row;
    float* sums = reinterpret_cast<float*>(shared_memory + S::kOutAt);
    float2* states = Rows::warp_sum();  // which wide tiles have no other use for
    static_assert(kRowTiles <= 4, "room for the states");
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      __syncthreads();  // queries, or the rows before, make room
      const int slot = row() / 16 * 8 + row() % 8;
      for_channels(s, h, [&](int channel, float x) { sums[slot * D + channel] = x; });
      if (part() == 0 && column() == 0) states[slot] = make_float2(__int_as_float(s.max[h]), s.total[h]);
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x / 32; i < 8 * kRowTiles; i += kWarps) {
        const int r = i / 8 * 16 + i % 8 + 8 * h;
        if (r >= rows) continue;
        finish_staged<S, V, D>(p, q_row, sums + i * D, r, __float_as_int(states[i].x), states[i].y, thread() % 32);
      }
    }
  }
};

}  // namespace foldkv::cuda

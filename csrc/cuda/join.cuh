// What becomes of the partials of a tile that is cut: the last of its blocks folds them, in chunk order, so the bits are those of
// a worker that saw all chunks. Which one that is nobody waits for: each adds itself to the tile's arrivals, and the one that
// finds all others there goes on. It leaves the count 0, as the planner made it.
//
// Code is kept short, and in loops: it is fetched anew by every launch.
#pragma once

#include "cuda/fold_parts.cuh"
#include "cuda/queries.cuh"
#include "cuda/tiles.cuh"

namespace foldkv::cuda {

// Adds 1. What those that added before, and the threads that met them at a barrier, wrote is there for this thread and those that
// meet it at one.
__device__ __forceinline__ int arrive(int32_t* count) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before;
}

// Where partials lie while a warp folds them, by turns of kTurn: one turn in room of the join's own, several where the worker
// has nothing more to attend to and the queue's slots are free. Each lane reads what it has copied itself. The row that comes of
// them takes the first one's place.
template <class S, int D>
struct JoinRoom {
  static constexpr int kTurn = S::kJoinTurn, kTurns = D > 128 ? 2 : 4, kPart = D * 4;  // bytes of a partial
  Factor factors[kFactors];
  float parts[kTurn][D];
  static_assert(kWarps * kTurns * kTurn * kPart <= S::kStages * S::kSlotBytes, "slots have room for them");

  __device__ __forceinline__ static JoinRoom& of(unsigned warp) {
    return reinterpret_cast<JoinRoom*>(shared_memory + S::kOutAt)[warp];
  }
};

// One query row and head by a warp; a lane has 4 channels of each 128. They end in room.parts[0], the state is returned. `free`: the
// slots are.
template <class S, int D>
__device__ __forceinline__ float2 fold_parts(const AttendParams& p, const MergeItem& tile, int token, int head,
                                             JoinRoom<S, D>& room, bool free, unsigned warp, int lane) {
  using Room = JoinRoom<S, D>;
  constexpr int kEach = (D + 127) / 128, kTurn = Room::kTurn, kTurnBytes = kTurn * Room::kPart;
  const int parts = tile.parts;
  const int64_t stride = static_cast<int64_t>(tile.q_count) * p.h_q;  // of partials, in rows
  const PartialAt first = partial_at(p, tile.first_partial + token, head, D);
  // From the L2: what the L1 has of the workspace may be of another launch.
  const auto state_of = [&](int part) { return part < parts ? __ldcg(first.state + part * stride) : empty_state(); };
  const uint32_t begin =
      (free ? shared_base() + warp * (Room::kTurns * kTurnBytes) : shared_address(room.parts)) + 16 * lane;
  const uint32_t end = begin + (free ? Room::kTurns : 1) * kTurnBytes;
  const float* from = first.out + 4 * lane;
  int asked = 0;
  uint32_t to = begin;
  // Past the last partial there are zeros, to the end of its turn.
  const auto ask = [&] {
    if (asked < parts) {
#pragma unroll
      for (int i = 0; i < kTurn; ++i, from += stride * D) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          if (D % 128 == 0 || 128 * e + 4 * lane < D) {
            copy_async(to + i * Room::kPart + 512 * e, from + 128 * e, asked + i < parts ? 16 : 0);
          }
        }
      }
    }
    copy_commit();
    asked += kTurn;
    to = to + kTurnBytes == end ? begin : to + kTurnBytes;
  };
  float2 state = state_of(lane);
#pragma unroll 1
  do {
    ask();
  } while (to != begin);
  RowFold<4 * kEach> row;
  int open = kEmpty;
#pragma unroll 1
  for (int done = 0; done < parts; done += kFactors) {
    // Past the last partial factors are such that nothing changes.
    unsigned starts = set_factors(state, open, room.factors, lane);
    state = state_of(done + kFactors + lane);
    const int stop = min(parts - done, kFactors);
#pragma unroll 1
    for (int turn = 0; turn < stop; turn += kTurn, starts >>= kTurn) {
      if (free) {
        copy_wait<Room::kTurns - 1>();
      } else {
        copy_wait<0>();
      }
      uint4 part[kTurn][kEach] = {};
      Factor factors[kTurn];
#pragma unroll
      for (int i = 0; i < kTurn; ++i) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          if (D % 128 == 0 || 128 * e + 4 * lane < D) part[i][e] = load_shared(to + i * Room::kPart + 512 * e);
        }
        factors[i] = room.factors[turn + i];
      }
      ask();
      const auto close = [&](int i) {
        if ((starts >> i & 1) == 0) return;
        __syncwarp();  // a branch, and not both sides
        row.close(factors[i].before);
      };
      const auto add = [&](int i) {
        float channels[4 * kEach];
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          channels[4 * e] = __uint_as_float(part[i][e].x), channels[4 * e + 1] = __uint_as_float(part[i][e].y);
          channels[4 * e + 2] = __uint_as_float(part[i][e].z), channels[4 * e + 3] = __uint_as_float(part[i][e].w);
        }
        row.add(factors[i], channels);
      };
      close(0);
      if ((starts & ((1 << kTurn) - 2)) == 0) {  // no branches inside, for which a warp alone waits
#pragma unroll
        for (int i = 0; i < kTurn; ++i) add(i);
      } else {
        add(0);
#pragma unroll
        for (int i = 1; i < kTurn; ++i) close(i), add(i);
      }
    }
  }
  row.close(open);
  copy_wait<0>();
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int channel = 128 * e + 4 * lane;
    if (channel < D) {
      *reinterpret_cast<float4*>(room.parts[0] + channel) =
          make_float4(row.x[4 * e], row.x[4 * e + 1], row.x[4 * e + 2], row.x[4 * e + 3]);
    }
  }
  return make_float2(__int_as_float(row.max), row.total);
}

// After each pass of a block: whether it is the last one of its tile, which was cut. `tile` is set where it was.
template <class S>
__device__ __forceinline__ bool is_last(const AttendParams& p, Current& now, MergeItem& tile) {
  if (now.merge < 0 || now.first_row + S::kMaxRows < now.q_count * p.group.n) return false;
  tile = reinterpret_cast<const MergeItem*>(p.plan + now.merges_at)[now.merge];
  __syncthreads();  // all partials are written
  if (threadIdx.x == 0) {
    // The plan's one part that is not constant; see quant/plan.py.
    int32_t* count =
        const_cast<int32_t*>(p.plan) + plan_arrivals_at(now.num_workers) + now.merge * p.h_kv + S::kv_head();
    now.joined = arrive(count) + 1 == tile.items;
    if (now.joined) *count = 0;
  }
  __syncthreads();
  return now.joined;
}

// Rows become outputs, a warp each: those of a narrow pass that saw all chunks, which lie in shared memory, or of a tile whose
// last block this is.
template <class S, class K, class V, int D>
__device__ __forceinline__ void finish_rows(const AttendParams& p) {
  using Rows = typename S::Rows;
  Current& now = Queries<S, K, D>::mutable_current();
  const bool whole = now.first_partial < 0;
  MergeItem tile{};
  if (whole) {
    if (now.pass.tiles != 0) return;  // wide.cuh has seen to it
  } else if (!S::kDecode || !p.joins || !is_last<S>(p, now, tile)) {
    return;
  }
  const unsigned thread = opaque(threadIdx.x), warp = thread / 32;
  const int lane = thread % 32, rows = now.q_count * p.group.n;
  const bool free = now.left == 0;
  static_assert(S::kKParamsAt - S::kOutAt >= (S::kDecode ? kWarps * sizeof(JoinRoom<S, D>) : 0), "room for it");
#pragma unroll 1
  for (int r = warp; r < rows; r += kWarps) {
    const int token = p.group.divide(r), head = S::kv_head() * p.group.n + r - token * p.group.n;
    const float* row = reinterpret_cast<const float*>(shared_memory + S::kOutAt) + r * D;
    float2 state = Rows::warp_sum()[whole ? r : 0];
    if (whole) {
      // A query that is not finite gives NaN even where it sees nothing.
      const float bad = Rows::bad()[r];
      state.y += bad;
      if (isnan(bad) && __float_as_int(state.x) == kEmpty) state.x = __int_as_float(0);
    } else if constexpr (S::kDecode) {
      JoinRoom<S, D>& room = JoinRoom<S, D>::of(warp);
      __syncwarp();
      state = fold_parts<S, D>(p, tile, token, head, room, free, warp, lane);
      __syncwarp();
      row = room.parts[0];
    }
    float x[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) x[i] = row[32 * i + lane];
    finish_row<D>(p, V::kInteger, now.q_row + token, head, block_params<S, D>(p, p.v_cache, S::kVParamsAt, lane),
                  __float_as_int(state.x), state.y, V::Math::kBoost, x, lane);
  }
  if constexpr (S::kTiles) before_copies();
}

}  // namespace foldkv::cuda

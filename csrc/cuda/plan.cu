// The planner on a GPU: lengths -> work list, the same numbers as csrc/cpu/plan.cpp. Definition: quant/plan.py.
//
// One block works through the sequences, and through their tiles, kThreads at a time; scans place what each thread writes.
// All tiles lie in a row of cost, so where a tile is cut follows from its place alone (TileCuts); which tiles get partials
// follows from a second scan, and where items lie from a third.
#include <climits>
#include <cstdint>

#include "core/params.h"
#include "core/schedule.h"
#include "cuda/launch.h"
#include "cuda/overlap.cuh"

namespace foldkv::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kNumWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

struct Tile {
  int seq, q_begin, q_count, group;
  KeyRange keys;
  __device__ int cost() const { return tile_cost(keys); }
};

// What the items of a tile have in common, for the threads that write them.
struct CutTile {
  int seq, q_begin, q_count, group;
  int at;  // see TileCuts; all cost fits an int, the header has it
  KeyRange keys;
  int partial, merge;  // -1: the tile is whole
};

struct Shared {
  int64_t scan[2][kNumWarps];  // two, so that one barrier a scan is enough
  int smallest[kNumWarps];
  int64_t alone[kNumWarps];
  int tile_at[kThreads + 1];  // first tile of each sequence, within this round of sequences
  int item_at[kThreads + 1];  // first item of each tile, within this round of tiles
  CutTile tiles[kThreads];
  int used;  // partials
  int merge_queries;  // the most queries of a tile that is cut
};

// The same number; before sm_90, where ptxas is a register short, what follows from it is computed again where it is needed.
__device__ __forceinline__ int anew(int x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Sums over the threads before this one; `total` over all. Rounds take turns with the two buffers.
struct Scan {
  Shared& s;
  int turn = 0;

  __device__ int64_t exclusive(int64_t x, int64_t& total) {
    int64_t* sums = s.scan[turn];
    turn ^= 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t upto = inclusive(x, lane);
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    const int64_t warps = inclusive(sums[lane], lane);
    total = __shfl_sync(kFullWarp, warps, 31);
    const int64_t before = __shfl_sync(kFullWarp, warps, warp > 0 ? warp - 1 : 0);
    return upto - x + (warp > 0 ? before : 0);
  }

  __device__ static int64_t inclusive(int64_t x, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, x, step);
      if (lane >= step) x += other;
    }
    return x;
  }
};

// Of numbers from 0 to 2^47.
__device__ __forceinline__ int64_t warp_sum(int64_t x) {
  const unsigned low = __reduce_add_sync(kFullWarp, static_cast<unsigned>(x) & 0xfffff),
                 high = __reduce_add_sync(kFullWarp, static_cast<unsigned>(x >> 20));
  return (int64_t{high} << 20) + low;
}

// Index of the last of the n rising numbers at[0 .. n - 1] that is <= x; at[0] <= x.
__device__ __forceinline__ int owner(const int* at, int n, int x) {
  int low = 0, high = n;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (at[middle] <= x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ int start_of(const PlanParams& p, int seq) {
  const int start = p.seq_starts != nullptr ? p.seq_starts[seq] : 0;
  return start > 0 ? start : 0;
}

// Tiles of a sequence; bad where its lengths cannot be planned.
__device__ __forceinline__ int count_tiles(const PlanParams& p, int seq, bool& bad) {
  const int begin = p.cu_seqlens_q[seq], end = p.cu_seqlens_q[seq + 1];
  bad = bad || end < begin || p.seq_lens[seq] < 0 || (seq == 0 && begin != 0);
  return end > begin && begin >= 0 ? (end - begin - 1) / p.tile_q + 1 : 0;
}

__device__ __forceinline__ Tile make_tile(const PlanParams& p, int seq, int tile) {
  const int q_len = p.cu_seqlens_q[seq + 1] - p.cu_seqlens_q[seq], q_begin = tile * p.tile_q;
  const int q_count = min(q_len - q_begin, p.tile_q);
  return {seq, q_begin, q_count, q_len <= p.grouped_q ? kGroupChunks : 0,
          tile_keys(p.seq_lens[seq], q_len, q_begin, q_count, start_of(p, seq), p.window_left)};
}

// Calls fn(whether the thread has a tile, tiles of this round) in every thread, for kThreads tiles at a time, in order; the
// tile is `held`. Where one round holds the whole batch, the second pass has it still: held_tiles says how many.
template <class Fn>
__device__ __forceinline__ void for_tiles(const PlanParams& p, Scan& scan, Tile& held, int held_tiles, Fn fn) {
  if (held_tiles > 0) {
    fn(threadIdx.x < held_tiles, held_tiles);
    return;
  }
  Shared& s = scan.s;
  const int thread = threadIdx.x;
  for (int seq0 = 0; seq0 < p.batch; seq0 += kThreads) {
    const int seqs = min(p.batch - seq0, kThreads);
    bool bad = false;
    int64_t tiles;
    const int64_t before = scan.exclusive(thread < seqs ? count_tiles(p, seq0 + thread, bad) : 0, tiles);
    s.tile_at[anew(thread)] = static_cast<int>(before);  // at most max_tiles, or nobody comes here
    __syncthreads();
    for (int64_t tile0 = 0; tile0 < tiles; tile0 += kThreads) {
      const int here = static_cast<int>(min(tiles - tile0, int64_t{kThreads})), tile = static_cast<int>(tile0) + thread;
      if (thread < here) {
        const int seq = owner(s.tile_at, seqs, anew(tile));
        held = make_tile(p, seq0 + seq, tile - s.tile_at[seq]);
      }
      fn(thread < here, here);
    }
    __syncthreads();  // tile_at is written anew
  }
}

__device__ __forceinline__ void write_entry(int32_t* to, int4 a, int4 b, int4 c, int4 d) {
  auto* vectors = reinterpret_cast<int4*>(to);
  vectors[0] = a, vectors[1] = b, vectors[2] = c, vectors[3] = d;
}

__global__ void __launch_bounds__(kThreads) plan_kernel(const PlanParams p) {
  __shared__ Shared s;
  Scan scan{s};
  const int thread = threadIdx.x;
  wait_for_previous();
  let_next_begin();
  if (thread == 0) s.used = s.merge_queries = 0;
  int32_t* workers = p.plan + kPlanHeader;
  const int item_at = static_cast<int>(plan_item_at(p.num_workers, p.max_tiles, p.kv_heads)),
            merge_at = item_at + kPlanEntry * p.max_items;
  const auto finish = [&](int items, int merges, int partials, int status, int64_t cost, const Share& share) {
    // Workers whose share begins behind the last tile.
    for (int w = cost > 0 ? share.worker_of(static_cast<int>(cost) - 1) + 1 + thread : thread; w <= p.num_workers;
         w += kThreads) {
      workers[w] = items;
    }
    for (int i = thread; i < merges * p.kv_heads; i += kThreads) p.plan[plan_arrivals_at(p.num_workers) + i] = 0;
    if (thread != 0) return;
    write_entry(
        p.plan, make_int4(items, merges, partials, merge_at),
        make_int4(status, static_cast<int>(cost), kChunkSize, p.tile_q),
        make_int4(item_at, p.num_workers, static_cast<int>(share.begin_of(1)), merges > 0 ? s.merge_queries : 0),
        make_int4(p.kv_heads, 0, 0, 0));
  };

  // How many tiles, and whether the lengths make sense.
  bool bad = false;
  int64_t tiles = 0;
  bool others = false;  // sequences whose chunks do not come in groups, where some do
  for (int seq = thread; seq < p.batch; seq += kThreads) {
    tiles += count_tiles(p, seq, bad);
    others = others || p.cu_seqlens_q[seq + 1] - p.cu_seqlens_q[seq] > p.grouped_q;
  }
  others = __syncthreads_or(others && p.grouped_q > 0);
  if (p.batch == 0 && thread == 0) bad = p.cu_seqlens_q[0] != 0;
  int64_t num_tiles;
  scan.exclusive(tiles, num_tiles);
  if (__syncthreads_or(bad)) return finish(0, 0, 0, kBadLengths, 0, {1, 1});
  if (num_tiles > p.max_tiles) return finish(0, 0, 0, kTooManyTiles, 0, {1, 1});

  // A worker's share of all cost.
  Tile held{};
  int64_t mine = 0, cost, alone = 0;
  int smallest = INT_MAX;
  for_tiles(p, scan, held, 0, [&](bool valid, int) {
    mine += valid ? held.cost() : 0;
    alone += valid ? chunk_partials(held.keys, held.q_count, held.group) : 0;
    smallest = min(smallest, valid ? held.cost() : INT_MAX);
  });
  smallest = __reduce_min_sync(kFullWarp, smallest);
  if (thread % 32 == 0) s.smallest[thread / 32] = smallest;
  if (others) {
    alone = warp_sum(alone);
    if (thread % 32 == 0) s.alone[thread / 32] = alone;
  }
  scan.exclusive(mine, cost);  // a barrier, too
  smallest = __reduce_min_sync(kFullWarp, s.smallest[thread % 32]);
  const Share share = make_share(static_cast<int>(cost), cost > 0 ? smallest : 0, p.num_workers);

  const int whole = others ? whole_cost(share, warp_sum(s.alone[thread % 32]), p.max_partials) : 0;
  int64_t begun = 0, wanted = 0;  // cost, and partials asked for, of the rounds before
  int num_items = 0, num_merges = 0;
  const bool one_round = p.batch <= kThreads && num_tiles <= kThreads;
  for_tiles(p, scan, held, one_round ? static_cast<int>(num_tiles) : 0, [&](bool valid, int here) {
    int64_t round_cost;
    const int64_t at = begun + scan.exclusive(valid ? held.cost() : 0, round_cost);
    begun += round_cost;
    TileCuts t{};
    if (valid) t = cut_tile(share, static_cast<int>(at), held.keys, held.group == 0 ? whole : 0);
    const int cuts = t.cuts;

    // Items before this thread's, and the partials of a tile that is cut, as long as the workspace lasts.
    int items_before = thread, items_here = here;
    int64_t partial = -1;
    int merge = -1;
    if (__syncthreads_or(cuts > 0)) {
      const int64_t parts = cuts > 0 ? t.parts_before(share, held.group, cuts, t.last) : 0;
      int64_t round_wanted, totals;
      const int64_t slot = wanted + scan.exclusive(parts * held.q_count, round_wanted);
      wanted += round_wanted;
      const bool fits = cuts > 0 && slot + parts * held.q_count <= p.max_partials;
      if (fits) partial = slot;
      const int items = !valid ? 0 : fits ? 1 + cuts : 1;
      const int64_t before = scan.exclusive(static_cast<int64_t>(items) << 32 | (fits ? 1 : 0), totals);
      items_before = static_cast<int>(before >> 32), items_here = static_cast<int>(totals >> 32);
      if (fits) {
        merge = num_merges + static_cast<int>(before & 0xffffffff);
        write_entry(p.plan + merge_at + kPlanEntry * merge,
                    make_int4(held.seq, held.q_begin, held.q_count, static_cast<int>(slot)),
                    make_int4(static_cast<int>(parts), p.cu_seqlens_q[held.seq] + held.q_begin, 1 + cuts, 0),
                    make_int4(0, 0, 0, 0), make_int4(0, 0, 0, 0));
        atomicMax(&s.merge_queries, held.q_count);
        // Accepted tiles come before refused ones, so the last merge has the greatest end.
        if (merge + 1 == num_merges + static_cast<int>(totals & 0xffffffff)) {
          s.used = static_cast<int>(slot + parts * held.q_count);
        }
      }
      num_merges += static_cast<int>(totals & 0xffffffff);
    }
    if (valid) {
      s.tiles[anew(thread)] = {
          held.seq, held.q_begin, held.q_count, held.group, static_cast<int>(at), held.keys, static_cast<int>(partial),
          merge};
      // Workers whose share begins in this tile: with its first item, with a cut, or with what comes after the tile.
      int worker = t.worker;
      const int first = num_items + items_before, next = first + (partial < 0 ? 1 : 1 + cuts);
      if (share.begin_of(worker) == t.at) workers[worker] = first;
      if (partial >= 0) {
        while (++worker <= t.cut_worker) workers[worker] = first + 1;
        for (int i = 1; i < cuts; ++i, ++worker) workers[worker] = first + 1 + i;
        --worker;
      }
      for (const int last = share.worker_of(t.at + t.cost - 1); worker < last;) workers[++worker] = next;
    }
    s.item_at[anew(thread)] = items_before;
    __syncthreads();

    // Items, each written by a thread of its own, whoever has the tile.
    for (int i = thread; i < items_here; i += kThreads) {
      const int index = items_here == here ? i : owner(s.item_at, here, i);
      const CutTile& tile = s.tiles[index];
      const int part = i - s.item_at[index];
      int begin = chunks_of(tile.keys).begin, end = chunks_of(tile.keys).end, slot = -1;
      if (tile.partial >= 0) {
        const TileCuts c = cut_tile(share, tile.at, tile.keys, tile.group == 0 ? whole : 0);
        if (part > 0) begin = c.cut_chunk(share, part - 1);
        end = c.cut_chunk(share, part);
        slot = tile.partial + c.parts_before(share, tile.group, part - 1, begin) * tile.q_count;
      }
      const bool folds = part == 0 || (tile.group > 0 && begin % tile.group == 0);
      const int q_row = p.cu_seqlens_q[tile.seq], q_len = p.cu_seqlens_q[tile.seq + 1] - q_row;
      const int seq_len = p.seq_lens[tile.seq];
      write_entry(p.plan + item_at + kPlanEntry * (num_items + i),
                  make_int4(tile.seq, tile.q_begin, tile.q_count, begin),
                  make_int4(end, slot, folds ? 1 : 0, q_row + tile.q_begin),
                  make_int4(seq_len - q_len + tile.q_begin, start_of(p, tile.seq), seq_len, tile.group),
                  make_int4(tile.merge, 0, 0, 0));
    }
    num_items += items_here;
    __syncthreads();  // tiles and item_at are written anew
  });
  finish(num_items, num_merges, s.used, kPlanOk, cost, share);
}

}  // namespace
}  // namespace foldkv::cuda

extern "C" int foldkv_cuda_plan(const foldkv::PlanParams* params, void* stream) {
  using namespace foldkv::cuda;
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  return launch_overlapping<plan_kernel>(device, 1, kThreads, 0, static_cast<cudaStream_t>(stream), *params);
}

// Which queries and keys a work item covers, and where its partials lie; for host and device.
// Definition in words: quant/plan.py. Chunk borders are a function of a sequence's own length and nothing else.
#pragma once

#include "core/layout.h"

namespace foldkv {

constexpr int kChunkSize = 256;  // tokens; 255 * 32767 * 256 < 2^31 keeps a chunk's integer sums exact
// On a GPU the chunks of a sequence with few new tokens come in groups; quant/plan.py says what for.
constexpr int kGroupChunks = 8;
// What a planner counts: tokens in units of kCostTokens, and kItemCost for what a tile costs beside them.
constexpr int kCostTokens = 64, kItemCost = 4, kChunkCost = kChunkSize / kCostTokens;

// The plan buffer, int32: header; first item of each worker [num_workers + 1]; arrivals; items; merges. Parts start at
// multiples of 4 numbers, so that the device reads entries 16 bytes at a time.
constexpr int kPlanHeader = 16;
constexpr int kPlanEntry = 16;
constexpr int kMaxWorkers = 1 << 20;
enum PlanHeaderField {
  kNumItems,
  kNumMerges,
  kNumPartials,
  kMergeAt,
  kStatus,
  kTotalCost,
  kPlanChunk,
  kPlanTile,
  kItemAt,
  kNumWorkers,
  kShare,
  kMergeQueries,  // the most queries of a tile among the merges
  kPlanHeads  // kv heads, each of which counts its arrivals
};

// kStatus of a plan that could not be made, where the planner cannot throw: no items, and outputs are NaN.
enum PlanStatus { kPlanOk = 0, kTooManyTiles = 1, kBadLengths = 2 };

// Queries of a tile, and the run of chunks that one worker attends to.
struct alignas(16) WorkItem {
  int32_t seq, q_begin, q_count, chunk_begin, chunk_end;
  int32_t first_partial;  // -1: the item sees all its tile's chunks and writes the output itself
  int32_t folds;  // starts at a first chunk, of the tile or of a group: folded; otherwise a partial for each chunk
  int32_t q_row;  // row of q that holds the tile's first query
  int32_t position;  // of the tile's first query in its sequence
  int32_t start;  // keys before it are padding; >= 0
  int32_t seq_len;
  int32_t group;  // chunks of a group, a power of 2; 0: all are one
  int32_t merge;  // of its tile; -1 where it sees all chunks
  int32_t unused[3];
};

struct alignas(16) MergeItem {
  int32_t seq, q_begin, q_count, first_partial, parts, q_row;
  int32_t items;  // of the tile
  int32_t unused[9];
};

static_assert(sizeof(WorkItem) == kPlanEntry * 4 && sizeof(MergeItem) == kPlanEntry * 4, "plan entries");

struct ChunkSpan {
  int begin, end;
};

FOLDKV_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Where the arrivals start: for each merge and kv head how many of the tile's items are done, on a GPU; 0 between launches.
FOLDKV_HD constexpr int plan_arrivals_at(int num_workers) { return kPlanHeader + ceil_div(num_workers + 1, 4) * 4; }
// Where the items start. Every tile that is cut has a worker's border inside.
FOLDKV_HD constexpr int64_t plan_item_at(int num_workers, int max_tiles, int kv_heads) {
  const int64_t merges = max_tiles < num_workers ? max_tiles : num_workers;
  return plan_arrivals_at(num_workers) + (merges * kv_heads + 3) / 4 * 4;
}

struct KeyRange {
  int begin, end;
};

// Keys that the queries q_begin .. q_begin + q_count - 1 can see, {0, 0} where there are none; keys before `start` are padding.
FOLDKV_HD constexpr KeyRange tile_keys(int seq_len, int q_len, int q_begin, int q_count, int start, int window_left) {
  const int first_query = seq_len - q_len + q_begin;
  const int end = first_query + q_count < seq_len ? first_query + q_count : seq_len;
  int begin = start;
  if (window_left >= 0 && first_query - window_left > begin) begin = first_query - window_left;
  if (begin < 0) begin = 0;
  return begin < end ? KeyRange{begin, end} : KeyRange{0, 0};
}

FOLDKV_HD constexpr ChunkSpan chunks_of(KeyRange keys) {
  return {keys.begin / kChunkSize, ceil_div(keys.end, kChunkSize)};
}

// Keys that the query at `position` sees.
FOLDKV_HD constexpr KeyRange visible_keys(int position, int start, int window_left) {
  int begin = start > 0 ? start : 0;
  if (window_left >= 0 && position - window_left > begin) begin = position - window_left;
  return {begin, position + 1};
}

// What a worker gets: num / den units of cost, at least kChunkCost. All cost fits an int.
struct Share {
  int num, den;
  FOLDKV_HD int worker_of(int at) const { return divide(int64_t{at} * den, num); }
  FOLDKV_HD int begin_of(int worker) const {
    return den == 1 ? worker * num : divide(int64_t{worker} * num + den - 1, den);
  }
  // begin_of one worker after another, without a division for each.
  struct Begin {
    int at, rest, step, step_rest, den;
    FOLDKV_HD Begin(const Share& share, int worker)
        : at(share.begin_of(worker)),
          rest(static_cast<int>(int64_t{worker} * share.num + share.den - 1 - int64_t{at} * share.den)),
          step(share.num / share.den),
          step_rest(share.num - step * share.den),
          den(share.den) {}
    FOLDKV_HD void advance() {
      at += step, rest += step_rest;
      if (rest >= den) ++at, rest -= den;
    }
  };

 private:
  // Fast on a GPU where the first number is short.
  FOLDKV_HD static int divide(int64_t a, int b) {
    if (a >> 32 == 0) return static_cast<int>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
    return static_cast<int>(a / b);
  }
};

// Equal shares of `total` for the workers; a little more, by at most a 24th and what an item costs, where cuts then fall on
// borders of tiles of the smallest cost, or divide them evenly; or, of a tile that is alone, all at multiples of the same
// number of chunks.
FOLDKV_HD constexpr Share make_share(int total, int smallest, int num_workers) {
  int least = ceil_div(total, num_workers);
  if (least < kChunkCost) least = kChunkCost;
  if (smallest <= 0) return {least, 1};
  int64_t pieces = int64_t{smallest} * num_workers / total;  // workers for each of the smallest tiles
  if (pieces > smallest / kChunkCost) pieces = smallest / kChunkCost;
  int64_t num = pieces > 0 ? smallest : int64_t{ceil_div(least, smallest)} * smallest;
  if (pieces > 1) {  // as many as there are with the most chunks that one of them has
    const int64_t chunks = ceil_div(smallest - kItemCost, kChunkCost), most = (chunks + pieces - 1) / pieces;
    pieces = most > 0 ? (chunks + most - 1) / most : 1;
    if (total == smallest && pieces > 1) num = kItemCost + pieces * most * kChunkCost;
  }
  const int den = pieces > 0 ? static_cast<int>(pieces) : 1;
  const int64_t equal = int64_t{least} * den, more = num - equal;
  return more * 24 <= equal && more <= kItemCost * den ? Share{static_cast<int>(num), den} : Share{least, 1};
}

// A tile's place in the row of all work, and where the workers' shares cut it.
struct TileCuts {
  int at;  // cost before it
  int cost, base;  // chunk c but the first lies at at + base + c * kChunkCost
  int first, last;  // chunks
  int worker;  // that the tile's first chunk falls to
  int cut;  // the first chunk that falls to another, or last
  int cut_worker;  // that one
  int cuts;

  FOLDKV_HD int place(int chunk) const { return chunk == first ? at : at + base + chunk * kChunkCost; }
  // The first chunk, after `chunk`, that lies at `place` or behind it.
  FOLDKV_HD int chunk_at(int wanted, int chunk) const {
    const int c = (wanted - at - base + kChunkCost - 1) / kChunkCost;
    return c > chunk ? (c < last ? c : last) : chunk + 1;
  }
  // Chunk of cut i, last where there is none.
  FOLDKV_HD int cut_chunk(const Share& share, int i) const {
    return i == 0 ? cut : i < cuts ? chunk_at(share.begin_of(cut_worker + i), cut) : last;
  }
  // Partials, of each query, that the chunks before `end`, which is cut i or last, ask for: one for the chunks of a group
  // before the first cut inside it, and one for each chunk behind that.
  FOLDKV_HD int parts_before(const Share& share, int group, int i, int end) const {
    if (end <= first) return 0;
    if (group == 0) return end <= cut ? 1 : 1 + end - cut;
    int parts = ceil_div(end, kGroupChunks) - first / kGroupChunks, before = -1, chunk = cut;
    Share::Begin next(share, cut_worker + 1);
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (int at = 0; at < i; ++at) {
      const int begin = chunk & -kGroupChunks, stop = begin + kGroupChunks;
      if (chunk > begin && before <= begin) parts += (stop < end ? stop : end) - chunk;
      before = chunk;
      chunk = chunk_at(next.at, cut);  // of the next cut
      next.advance();
    }
    return parts;
  }
};

FOLDKV_HD constexpr int tile_cost(KeyRange keys) {
  return kItemCost + ceil_div(keys.end, kCostTokens) - keys.begin / kCostTokens;
}

// The cost up to which tiles whose chunks do not come in groups stay whole, where others' do: they would have a partial for each
// chunk, `wanted` all together, so they are cut only where they are more than a worker's share, and all of them find room.
FOLDKV_HD constexpr int whole_cost(const Share& share, int64_t wanted, int64_t max_partials) {
  return wanted <= max_partials ? share.num / share.den : 0x7fffffff;
}
// What a tile adds to that.
FOLDKV_HD constexpr int64_t chunk_partials(KeyRange keys, int q_count, int group) {
  const ChunkSpan chunks = chunks_of(keys);
  return group > 0 ? 0 : int64_t{chunks.end - chunks.begin} * q_count;
}

// whole: the cost up to which the tile is not cut.
FOLDKV_HD inline TileCuts cut_tile(const Share& share, int at, KeyRange keys, int whole) {
  const ChunkSpan chunks = chunks_of(keys);
  TileCuts t{
      at, tile_cost(keys), kItemCost - keys.begin / kCostTokens, chunks.begin, chunks.end, share.worker_of(at), 0, 0,
      0};
  t.cut = t.last - t.first > 1 && t.cost > whole ? t.chunk_at(share.begin_of(t.worker + 1), t.first) : t.last;
  t.cut_worker = t.cut < t.last ? share.worker_of(t.place(t.cut)) : t.worker;
  t.cuts = t.cut < t.last ? 1 + share.worker_of(t.place(t.last - 1)) - t.cut_worker : 0;
  return t;
}

// Partials live in the workspace as (m, l) pairs [max_partials, h_q, 2], then outputs [max_partials, h_q, d].
FOLDKV_HD constexpr int64_t partial_floats(int h_q, int d) { return static_cast<int64_t>(h_q) * (d + 2); }

// Behind them, for each sequence and kv head: what 128 threads have of a fold over groups.
constexpr int kGroupFloats = 128 * (64 + 4);

}  // namespace foldkv

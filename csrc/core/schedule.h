// Which queries and keys a work item covers, and where its partials lie; for host and device.
// Definition in words: quant/plan.py. Chunk borders are a function of a sequence's own length and nothing else.
#pragma once

#include "core/layout.h"

namespace foldkv {

constexpr int kChunkSize = 256;  // tokens; 255 * 32767 * 256 < 2^31 keeps a chunk's integer sums exact

// The plan buffer, int32: header; first item of each worker [num_workers + 1]; items; merges. Parts start at multiples
// of 4 numbers, so that the device reads entries 16 bytes at a time.
constexpr int kPlanHeader = 12;
constexpr int kPlanEntry = 12;
constexpr int kMaxWorkers = 1 << 20;
enum PlanHeaderField {
  kNumItems,
  kNumMerges,
  kNumPartials,
  kMergeAt,
  kStatus,
  kUnits,
  kPlanChunk,
  kPlanTile,
  kItemAt,
  kNumWorkers,
  kShare,
  kMergeQueries  // the most queries of a tile among the merges
};

// kStatus of a plan that could not be made, where the planner cannot throw: no items, and outputs are NaN.
enum PlanStatus { kPlanOk = 0, kTooManyTiles = 1, kBadLengths = 2 };

// Queries of a tile, and the run of chunks that one worker attends to.
struct alignas(16) WorkItem {
  int32_t seq, q_begin, q_count, chunk_begin, chunk_end;
  int32_t first_partial;  // -1: the item sees all its tile's chunks and writes the output itself
  int32_t folds;          // starts at the tile's first chunk: one folded partial; otherwise one for each chunk
  int32_t q_row;          // row of q that holds the tile's first query
  int32_t position;       // of the tile's first query in its sequence
  int32_t start;          // keys before it are padding; >= 0
  int32_t seq_len;
  int32_t unused;
};

struct alignas(16) MergeItem {
  int32_t seq, q_begin, q_count, first_partial, parts, q_row, unused[6];
};

static_assert(sizeof(WorkItem) == kPlanEntry * 4 && sizeof(MergeItem) == kPlanEntry * 4, "plan entries");

struct ChunkSpan {
  int begin, end;
};

FOLDKV_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Where the items start.
FOLDKV_HD constexpr int plan_item_at(int num_workers) { return kPlanHeader + ceil_div(num_workers + 1, 4) * 4; }

// Chunks that the queries q_begin .. q_begin + q_count - 1 can see; keys before `start` are padding.
FOLDKV_HD constexpr ChunkSpan tile_chunks(int seq_len, int q_len, int q_begin, int q_count, int start, int window_left,
                                          int chunk_size) {
  const int first_query = seq_len - q_len + q_begin;
  const int end = first_query + q_count < seq_len ? first_query + q_count : seq_len;
  int begin = start;
  if (window_left >= 0 && first_query - window_left > begin) begin = first_query - window_left;
  if (begin < 0) begin = 0;
  if (begin >= end) return {0, 0};
  return {begin / chunk_size, ceil_div(end, chunk_size)};
}

// Keys that the query at `position` sees.
struct KeyRange {
  int begin, end;
};

FOLDKV_HD constexpr KeyRange visible_keys(int position, int start, int window_left) {
  int begin = start > 0 ? start : 0;
  if (window_left >= 0 && position - window_left > begin) begin = position - window_left;
  return {begin, position + 1};
}

// Partials live in the workspace as (m, l) pairs [max_partials, h_q, 2], then outputs [max_partials, h_q, d].
FOLDKV_HD constexpr int64_t partial_floats(int h_q, int d) { return static_cast<int64_t>(h_q) * (d + 2); }

}  // namespace foldkv

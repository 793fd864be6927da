// The planner on the CPU: lengths -> work list. Definition: quant/plan.py.
#include "core/schedule.h"
#include "cpu/kernels.h"

namespace foldkv::cpu {
namespace {

struct Tile {
  int seq, q_begin, q_count;
  ChunkSpan chunks;
  int q_row, position, start, seq_len;
  int units() const { return chunks.end > chunks.begin ? chunks.end - chunks.begin : 1; }
};

template <class Fn>
void for_tiles(const PlanParams& p, Fn fn) {
  for (int b = 0; b < p.batch; ++b) {
    const int q_row = p.cu_seqlens_q[b], q_len = p.cu_seqlens_q[b + 1] - q_row, seq_len = p.seq_lens[b];
    const int start = p.seq_starts != nullptr && p.seq_starts[b] > 0 ? p.seq_starts[b] : 0;
    for (int q_begin = 0; q_begin < q_len; q_begin += p.tile_q) {
      const int q_count = q_len - q_begin < p.tile_q ? q_len - q_begin : p.tile_q;
      fn(Tile{b, q_begin, q_count, tile_chunks(seq_len, q_len, q_begin, q_count, start, p.window_left, p.chunk_size),
              q_row + q_begin, seq_len - q_len + q_begin, start, seq_len});
    }
  }
}

}  // namespace

bool plan(const PlanParams& p) {
  int64_t units = 0, tiles = 0;
  for_tiles(p, [&](const Tile& tile) {
    units += tile.units();
    ++tiles;
  });
  if (tiles > p.max_tiles) return false;

  const int64_t share = units > p.num_workers ? (units + p.num_workers - 1) / p.num_workers : 1;
  const int item_at = plan_item_at(p.num_workers), merge_at = item_at + kPlanEntry * p.max_items;
  int32_t* workers = p.plan + kPlanHeader;
  auto* items = reinterpret_cast<WorkItem*>(p.plan + item_at);
  auto* merges = reinterpret_cast<MergeItem*>(p.plan + merge_at);
  int num_items = 0, num_merges = 0, worker = 0, merge_queries = 0;
  int64_t begun = 0, wanted = 0, used = 0;
  for_tiles(p, [&](const Tile& tile) {
    const auto [first, last] = tile.chunks;
    // Cut where a worker's share of all units ends; the first cut lies at chunk `cut`, more follow at distance `share`.
    int64_t cut = first + (begun / share + 1) * share - begun;
    const bool wants_cut = cut < first + tile.units();
    const int64_t offset = begun - first;  // from a chunk of this tile to its place among all units
    begun += tile.units();
    int64_t partial = -1;
    if (wants_cut) {
      const int64_t parts = 1 + last - cut;
      partial = wanted;
      wanted += parts * tile.q_count;
      if (wanted > p.max_partials) partial = -1;
      if (partial >= 0) {
        used = wanted;
        merge_queries = tile.q_count > merge_queries ? tile.q_count : merge_queries;
        merges[num_merges++] = {tile.seq,
                                tile.q_begin,
                                tile.q_count,
                                static_cast<int32_t>(partial),
                                static_cast<int32_t>(parts),
                                tile.q_row,
                                {}};
      }
    }
    const int64_t first_cut = cut;
    for (int64_t begin = first; begin == first || begin < last;) {
      const int64_t end = partial < 0 || cut > last ? last : cut;
      const int64_t slot = partial < 0 || begin == first ? partial : partial + (1 + begin - first_cut) * tile.q_count;
      while (worker * share <= begin + offset) workers[worker++] = num_items;
      items[num_items++] = {tile.seq,
                            tile.q_begin,
                            tile.q_count,
                            static_cast<int32_t>(begin),
                            static_cast<int32_t>(end),
                            static_cast<int32_t>(slot),
                            begin == first ? 1 : 0,
                            tile.q_row,
                            tile.position,
                            tile.start,
                            tile.seq_len,
                            0};
      if (end == begin) break;  // a tile that sees nothing: its rows are written as zeros
      begin = end;
      cut += share;
    }
  });
  while (worker <= p.num_workers) workers[worker++] = num_items;
  const int32_t header[kPlanHeader] = {num_items,
                                       num_merges,
                                       static_cast<int32_t>(used),
                                       merge_at,
                                       kPlanOk,
                                       static_cast<int32_t>(units),
                                       p.chunk_size,
                                       p.tile_q,
                                       item_at,
                                       p.num_workers,
                                       static_cast<int32_t>(share),
                                       merge_queries};
  for (int i = 0; i < kPlanHeader; ++i) p.plan[i] = header[i];
  return true;
}

}  // namespace foldkv::cpu

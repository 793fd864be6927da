// The planner on the CPU: lengths -> work list. Definition: quant/plan.py.
#include <algorithm>

#include "core/schedule.h"
#include "cpu/kernels.h"

namespace foldkv::cpu {
namespace {

struct Tile {
  int seq, q_begin, q_count, group;
  KeyRange keys;
  int q_row, position, start, seq_len;
};

template <class Fn>
void for_tiles(const PlanParams& p, Fn fn) {
  for (int b = 0; b < p.batch; ++b) {
    const int q_row = p.cu_seqlens_q[b], q_len = p.cu_seqlens_q[b + 1] - q_row, seq_len = p.seq_lens[b];
    const int start = p.seq_starts != nullptr && p.seq_starts[b] > 0 ? p.seq_starts[b] : 0;
    for (int q_begin = 0; q_begin < q_len; q_begin += p.tile_q) {
      const int q_count = q_len - q_begin < p.tile_q ? q_len - q_begin : p.tile_q;
      fn(Tile{b, q_begin, q_count, q_len <= p.grouped_q ? kGroupChunks : 0,
              tile_keys(seq_len, q_len, q_begin, q_count, start, p.window_left), q_row + q_begin,
              seq_len - q_len + q_begin, start, seq_len});
    }
  }
}

}  // namespace

bool plan(const PlanParams& p) {
  int64_t cost = 0, tiles = 0, alone = 0;
  int smallest = 0;
  for_tiles(p, [&](const Tile& tile) {
    const int here = tile_cost(tile.keys);
    smallest = tiles == 0 || here < smallest ? here : smallest;
    cost += here;
    alone += chunk_partials(tile.keys, tile.q_count, tile.group);
    ++tiles;
  });
  if (tiles > p.max_tiles) return false;

  const Share share = make_share(static_cast<int>(cost), smallest, p.num_workers);
  const int item_at = static_cast<int>(plan_item_at(p.num_workers, p.max_tiles, p.kv_heads)),
            merge_at = item_at + kPlanEntry * p.max_items;
  const int whole = whole_cost(share, alone, p.max_partials);
  int32_t* workers = p.plan + kPlanHeader;
  auto* items = reinterpret_cast<WorkItem*>(p.plan + item_at);
  auto* merges = reinterpret_cast<MergeItem*>(p.plan + merge_at);
  int num_items = 0, num_merges = 0, worker = 0, merge_queries = 0;
  int64_t wanted = 0, used = 0;
  int begun = 0;
  for_tiles(p, [&](const Tile& tile) {
    const TileCuts t = cut_tile(share, begun, tile.keys, p.grouped_q > 0 && tile.group == 0 ? whole : 0);
    begun += t.cost;
    int64_t partial = -1;
    if (t.cuts > 0) {
      const int parts = t.parts_before(share, tile.group, t.cuts, t.last);
      partial = wanted;
      wanted += int64_t{parts} * tile.q_count;
      if (wanted > p.max_partials) partial = -1;
      if (partial >= 0) {
        used = wanted;
        merge_queries = tile.q_count > merge_queries ? tile.q_count : merge_queries;
        merges[num_merges++] = {tile.seq, tile.q_begin, tile.q_count, static_cast<int32_t>(partial),
                                parts,    tile.q_row,   t.cuts + 1,   {}};
      }
    }
    for (int i = -1; i < (partial < 0 ? 0 : t.cuts); ++i) {
      const int begin = i < 0 ? t.first : t.cut_chunk(share, i);
      const int end = partial < 0 ? t.last : t.cut_chunk(share, i + 1);
      const int64_t slot =
          partial < 0 ? -1 : partial + int64_t{t.parts_before(share, tile.group, i, begin)} * tile.q_count;
      while (worker <= p.num_workers && share.begin_of(worker) <= t.place(begin)) workers[worker++] = num_items;
      items[num_items++] = {tile.seq,
                            tile.q_begin,
                            tile.q_count,
                            begin,
                            end,
                            static_cast<int32_t>(slot),
                            i < 0 || (tile.group > 0 && begin % tile.group == 0) ? 1 : 0,
                            tile.q_row,
                            tile.position,
                            tile.start,
                            tile.seq_len,
                            tile.group,
                            partial < 0 ? -1 : num_merges - 1,
                            {}};
    }
  });
  while (worker <= p.num_workers) workers[worker++] = num_items;
  std::fill_n(p.plan + plan_arrivals_at(p.num_workers), num_merges * p.kv_heads, 0);
  const int32_t header[kPlanHeader] = {num_items,
                                       num_merges,
                                       static_cast<int32_t>(used),
                                       merge_at,
                                       kPlanOk,
                                       static_cast<int32_t>(cost),
                                       kChunkSize,
                                       p.tile_q,
                                       item_at,
                                       p.num_workers,
                                       static_cast<int32_t>(share.begin_of(1)),
                                       merge_queries,
                                       p.kv_heads};
  for (int i = 0; i < kPlanHeader; ++i) p.plan[i] = header[i];
  return true;
}

}  // namespace foldkv::cpu

// A worker's items as one stream of tokens: for each pass and block of tokens first slots of K, then of V. Queues run ahead of
// what is computed, over block and item borders, so that memory stays busy.
#pragma once

#include "core/params.h"
#include "cuda/attend_shape.cuh"
#include "cuda/tiles.cuh"

namespace foldkv::cuda {

// The pass that a queue is at.
struct Stream {
  const int32_t* table;  // page ids of the sequence
  const WorkItem* item;
  int items;  // that are left, this one included
  int first_row;  // first query row of the pass

  template <class S>
  __device__ __forceinline__ void begin(const WorkItem* first, int count) {
    item = first;
    items = count;
    first_row = -S::kMaxRows;
  }

  // Goes on to the next pass that has tokens; false where there is none. `now`: the item that the stream is at.
  template <class S>
  __device__ __forceinline__ bool next(const AttendParams& p, Pass& pass, WorkItem now) {
    const int group = p.group.n;
    while (true) {
      first_row += S::kMaxRows;
      if (first_row < now.q_count * group) {
        pass = Pass(now, group, first_row, S::kMaxRows, S::kWideStep, p.window_left);
        if (pass.begin < pass.end) break;
      }
      if (--items <= 0) return false;
      first_row = -S::kMaxRows;
      now = load_item(++item);
    }
    table = p.block_table + now.seq * p.table_stride;
    return true;
  }
  template <class S>
  __device__ __forceinline__ bool next(const AttendParams& p, Pass& pass) {
    return items > 0 && next<S>(p, pass, load_item(item));
  }
};

}  // namespace foldkv::cuda

// Attention of a work list over the paged cache: one templated kernel for all formats (docs/kernel.md).
//
// A block of 4 warps goes through its worker's items for one kv head, tile by tile of query rows: tiles of at most 8 rows in
// narrow.cuh, others in wide.cuh. Each chunk starts from a fresh state and is folded or written out.
#pragma once

#include "cuda/join.cuh"
#include "cuda/narrow.cuh"
#include "cuda/overlap.cuh"
#include "cuda/wide.cuh"

namespace foldkv::cuda {

template <class S, class K, class V, int D>
__device__ __forceinline__ void run_items(const AttendParams& p, Queue<S, K, V>& queue, const WorkItem* items) {
  using Q = Queries<S, K, D>;
  queue.start(items, Q::current().left);
  copy_wait<Queue<S, K, V>::kAsked>();  // for parameters
#pragma unroll 1
  while (Q::next_pass(p)) {
    // Blocks without work have left, so those of the next kernel spread evenly: with the signal at the start 1 x 4096 had all its
    // blocks on half the multiprocessors.
    let_next_begin();
    const int tiles = Q::current().pass.tiles;
    if (tiles == 0) {
      Narrow<S, K, V, D>(p, queue).run();
    } else if (tiles == 1) {
      Wide<S, K, V, D, 1>(p, queue).run();
    } else {
      if constexpr (S::kMaxRows >= 32) {
        if (tiles == 2) Wide<S, K, V, D, 2>(p, queue).run();
      }
      if constexpr (S::kMaxRows >= 64) {
        if (tiles == 4) Wide<S, K, V, D, 4>(p, queue).run();
      }
    }
    finish_rows<S, K, V, D>(p);
  }
  Queue<S, K, V>::drain();
  __syncthreads();
}

// Rows of no sequence are 0 with a log-sum-exp of nothing; all rows are NaN where the plan could not be made.
template <int D>
__device__ __forceinline__ void fill_rows(const AttendParams& p, int begin, float value, float lse) {
  const int64_t stop = static_cast<int64_t>(p.num_rows) * p.h_q;
  for (int64_t at = static_cast<int64_t>(begin) * p.h_q + block_index(); at < stop; at += gridDim.x) {
    for (int c = threadIdx.x; c < D; c += kThreads) store_element(p.out, p.q.dtype, at * D + c, value);
    if (p.lse != nullptr && threadIdx.x == 0) p.lse[at] = lse;
  }
}

// Blocks of a launch that overlaps the one before come first to multiprocessors where that has none with work, and only then to all
// in turn. So where workers are few they are not those of the first blocks: each is to have a multiprocessor of its own.
__device__ __forceinline__ int first_worker(const AttendParams& p) {
  const int at = p.kv_heads.divide(block_index()), all = p.kv_heads.divide(gridDim.x), skipped = all / 4 + 2;
  return skipped >= all ? at : at >= skipped ? at - skipped : at - skipped + all;
}

// Grid: any multiple of h_kv. Block b serves kv head b % h_kv and every (gridDim / h_kv)-th worker.
template <class K, class V, int D, int kMaxRows>
__global__ void __launch_bounds__(kThreads, Shape<K, V, D, kMaxRows>::kBlocksPerSm)
    attend_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ TileMaps maps) {
  using S = Shape<K, V, D, kMaxRows>;
  const int32_t* plan = p.plan;
  int worker = first_worker(p);
  int kv_head = block_index() - p.kv_heads.divide(block_index()) * p.h_kv;
  Queue<S, K, V>::set_up(maps);
  wait_for_previous();
  // All that can be known at once is asked for at once: each wait for memory delays a short batch as a whole. The worker's
  // entry may lie past the table, but not past the plan, which has more entries than workers.
  const int4 head = *reinterpret_cast<const int4*>(plan + kStatus),
             more = *reinterpret_cast<const int4*>(plan + kItemAt);
  const int heads = plan[kPlanHeads], merges_at = plan[kMergeAt];
  const int last_entry = plan_arrivals_at(kMaxWorkers) - kPlanHeader - 2;
  const int32_t* first = plan + kPlanHeader;
  const int known = min(min(worker, last_entry), static_cast<int>(p.plan_ints) - kPlanHeader - 2);
  int begin = first[known], end = first[known + 1];
  const int tail = p.cu_seqlens_q[p.batch];
  if (head.x != kPlanOk || heads != p.h_kv) {
    fill_rows<D>(p, 0, NAN, NAN);
    return;
  }
  using Q = Queries<S, K, D>;
  Queue<S, K, V> queue(p, maps);
  if (worker >= more.y) end = begin;
  const auto* items = reinterpret_cast<const WorkItem*>(plan + more.x);
  if (threadIdx.x == 0) {
    Current& now = Q::mutable_current();
    now.num_workers = more.y, now.items_at = more.x, now.merges_at = merges_at, now.tail = tail;
    S::kv_head() = kv_head;
  }
#pragma unroll 1
  while (true) {
    WorkItem item{};
    if (begin < end) {
      item = load_item(items + begin);
      Q::fetch_params(p, kv_head);
      queue.open(item, items + begin, end - begin);
    }
    Q::begin_items(p, worker, item, items + begin, end - begin, kv_head);
    __syncthreads();
    const Current& now = Q::current();
    if (now.left > 0) run_items<S, K, V, D>(p, queue, items + begin);
    worker = now.worker + p.kv_heads.divide(gridDim.x);
    if (worker >= now.num_workers) break;
    items = reinterpret_cast<const WorkItem*>(p.plan + now.items_at), kv_head = S::kv_head();
    const int32_t* next = p.plan + kPlanHeader + worker;
    begin = next[0], end = next[1];
    __syncthreads();  // all have read what is now written anew
  }
  fill_rows<D>(p, Q::current().tail, 0.0f, -INFINITY);
}

}  // namespace foldkv::cuda

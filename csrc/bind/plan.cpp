// foldkv::plan: see quant/plan.py for the work list.
#include "bind/cache_args.h"
#include "bind/cpu_threads.h"
#include "core/schedule.h"

#ifdef FOLDKV_HAS_CUDA
#include "bind/stream.h"
#include "cuda/launch.h"
#endif

namespace foldkv::bind {
namespace {

// What only a device whose lengths the host can read is able to check.
void check_lengths(const PlanParams& p) {
  if (p.cu_seqlens_q[0] != 0) fail("cu_seqlens_q: expected 0 first, got ", p.cu_seqlens_q[0]);
  for (int b = 0; b < p.batch; ++b) {
    if (p.cu_seqlens_q[b + 1] < p.cu_seqlens_q[b]) {
      fail("cu_seqlens_q: expected numbers that do not fall, got ", p.cu_seqlens_q[b + 1], " after ",
           p.cu_seqlens_q[b]);
    }
    if (p.seq_lens[b] < 0) fail("seq_lens: expected lengths >= 0, got ", p.seq_lens[b], " at index ", b);
  }
}

PlanParams plan_params(const Tensor& seq_lens, const Tensor& cu_seqlens_q, const OptionalTensor& seq_starts,
                       const Tensor& plan, int64_t window_left, int64_t chunk_size, int64_t tile_q, int64_t num_workers,
                       int64_t max_items, int64_t max_tiles, int64_t max_partials, int64_t max_batch, int64_t grouped_q,
                       int64_t kv_heads) {
  check_tensor(seq_lens, "seq_lens", ScalarType::Int, {kAny}, "batch");
  check_tensor(cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, {seq_lens.size(0) + 1}, "batch + 1");
  if (seq_starts.has_value()) check_tensor(*seq_starts, "seq_starts", ScalarType::Int, {seq_lens.size(0)}, "batch");
  check(chunk_size == kChunkSize, "chunk_size: expected ", kChunkSize, ", got ", chunk_size);
  check(tile_q >= 1 && num_workers >= 1 && num_workers <= kMaxWorkers && max_tiles >= 0 &&
            max_items >= max_tiles + num_workers && max_partials >= 0 && grouped_q >= 0 && grouped_q <= tile_q &&
            kv_heads >= 1,
        "plan limits: expected those of a quant.plan.Capacity, got tile_q ", tile_q, ", num_workers ", num_workers,
        ", max_items ", max_items, ", max_tiles ", max_tiles, ", max_partials ", max_partials, ", grouped_q ",
        grouped_q, ", kv_heads ", kv_heads);
  check(seq_lens.size(0) <= max_batch, "seq_lens: expected at most ", max_batch,
        " sequences (Capacity.max_batch), got ", seq_lens.size(0), "; plan with a larger Capacity");
  check_tensor(
      plan, "plan", ScalarType::Int,
      {plan_item_at(static_cast<int>(num_workers), to_int("max_tiles", max_tiles), to_int("kv_heads", kv_heads)) +
       kPlanEntry * (max_items + max_tiles)},
      "Capacity.plan_ints");
  PlanParams p{};
  p.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr());
  p.seq_starts = data_or_null<int32_t>(seq_starts);
  p.plan = static_cast<int32_t*>(plan.mutable_data_ptr());
  p.batch = to_int("batch", seq_lens.size(0));
  p.window_left = window_left < 0 ? -1 : to_int("window_left", window_left);
  p.tile_q = to_int("tile_q", tile_q);
  p.num_workers = to_int("num_workers", num_workers);
  p.max_items = to_int("max_items", max_items);
  p.max_tiles = to_int("max_tiles", max_tiles);
  p.max_partials = max_partials;
  p.grouped_q = to_int("grouped_q", grouped_q);
  p.kv_heads = static_cast<int>(kv_heads);
  return p;
}

void plan_cpu(const Tensor& seq_lens, const Tensor& cu_seqlens_q, const OptionalTensor& seq_starts, const Tensor& plan,
              int64_t window_left, int64_t chunk_size, int64_t tile_q, int64_t num_workers, int64_t max_items,
              int64_t max_tiles, int64_t max_partials, int64_t max_batch, int64_t grouped_q, int64_t kv_heads) {
  const PlanParams p = plan_params(seq_lens, cu_seqlens_q, seq_starts, plan, window_left, chunk_size, tile_q,
                                   num_workers, max_items, max_tiles, max_partials, max_batch, grouped_q, kv_heads);
  check_lengths(p);
  if (!cpu::plan(p)) {
    fail("plan: expected at most ", max_tiles, " query tiles of ", tile_q,
         " tokens (Capacity.max_batch and max_q_tokens)", ", got ", p.cu_seqlens_q[p.batch], " query tokens in ",
         p.batch, " sequences; plan with a larger Capacity");
  }
}

#ifdef FOLDKV_HAS_CUDA
void plan_cuda(const Tensor& seq_lens, const Tensor& cu_seqlens_q, const OptionalTensor& seq_starts, const Tensor& plan,
               int64_t window_left, int64_t chunk_size, int64_t tile_q, int64_t num_workers, int64_t max_items,
               int64_t max_tiles, int64_t max_partials, int64_t max_batch, int64_t grouped_q, int64_t kv_heads) {
  const PlanParams p = plan_params(seq_lens, cu_seqlens_q, seq_starts, plan, window_left, chunk_size, tile_q,
                                   num_workers, max_items, max_tiles, max_partials, max_batch, grouped_q, kv_heads);
  check_same_device(seq_lens, "seq_lens", plan, "plan");
  check_same_device(cu_seqlens_q, "cu_seqlens_q", plan, "plan");
  if (seq_starts.has_value()) check_same_device(*seq_starts, "seq_starts", plan, "plan");
  check_aligned(plan, "plan");
  const torch::stable::accelerator::DeviceGuard guard(plan.get_device_index());
  check_cuda("plan", foldkv_cuda_plan(&p, current_cuda_stream(plan.get_device_index())));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(foldkv, CPU, m) { m.impl("plan", TORCH_BOX(&plan_cpu)); }

#ifdef FOLDKV_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(foldkv, CUDA, m) { m.impl("plan", TORCH_BOX(&plan_cuda)); }
#endif

}  // namespace foldkv::bind

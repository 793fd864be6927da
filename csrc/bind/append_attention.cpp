// foldkv::append_attention: see quant/ops.py for the meaning of the arguments.
#include <utility>

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
void check_batch(const AttendParams& p, int64_t num_pages, int64_t max_pages) {
  if (p.cu_seqlens_q[0] != 0 || p.cu_seqlens_q[p.batch] > p.num_rows) {
    fail("cu_seqlens_q: expected 0 first and at most ", p.num_rows, " (rows of q) last, got ", p.cu_seqlens_q[0],
         " and ", p.cu_seqlens_q[p.batch]);
  }
  for (int b = 0; b < p.batch; ++b) {
    const int64_t seq_len = p.seq_lens[b];
    if (p.cu_seqlens_q[b + 1] < p.cu_seqlens_q[b]) {
      fail("cu_seqlens_q: expected numbers that do not fall, got ", p.cu_seqlens_q[b + 1], " after ",
           p.cu_seqlens_q[b]);
    }
    if (seq_len < 0 || seq_len > max_pages * p.page_size) {
      fail("seq_lens: expected 0 .. ", max_pages * p.page_size, " (table width * page_size), got ", seq_len,
           " at index ", b);
    }
    const int q_len = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    if (q_len == 0 || seq_len == 0) continue;
    const int start = p.seq_starts != nullptr ? p.seq_starts[b] : 0;
    const int64_t first_query = seq_len > q_len ? seq_len - q_len : 0;
    int64_t first = visible_keys(static_cast<int>(first_query), start, p.window_left).begin;
    for (int64_t page = first / p.page_size; page * p.page_size < seq_len; ++page) {
      const int32_t id = p.block_table[b * p.table_stride + page];
      if (id < 0 || id >= num_pages) {
        fail("block_table: expected page ids in 0 .. ", num_pages - 1, ", got ", id, " for sequence ", b, ", page ",
             page);
      }
    }
  }
}

[[noreturn]] void fail_stale() {
  fail(
      "plan: expected a work list for these lengths and this window, got one for others; call Plan.update once a "
      "step, ",
      "with the same seq_lens, cu_seqlens_q, seq_starts and window");
}

// The work list must be one that was made for this batch: every tile, and every chunk that it sees, once and in order.
void check_plan(const AttendParams& p, int64_t plan_ints) {
  const int64_t items = p.plan[kNumItems], merges = p.plan[kNumMerges], merge_at = p.plan[kMergeAt];
  const int64_t item_at = p.plan[kItemAt];
  const int tile_q = p.plan[kPlanTile];
  const bool fits = p.plan[kPlanChunk] == kChunkSize && tile_q >= 1 && items >= 0 && merges >= 0 &&
                    item_at >= kPlanHeader && item_at + items * kPlanEntry <= merge_at &&
                    merge_at + merges * kPlanEntry <= plan_ints;
  if (!fits) fail("plan: expected a work list, got a buffer that holds none; call Plan.update first");
  if (p.plan[kPlanHeads] != p.h_kv) {
    fail("plan: expected one for ", p.h_kv, " kv heads (Capacity.h_kv), got one for ", p.plan[kPlanHeads]);
  }
  if (p.plan[kNumPartials] > p.max_partials) {
    fail("workspace: expected room for ", p.plan[kNumPartials], " partials, got ", p.max_partials,
         "; use the workspace of the Plan that was updated");
  }
  const auto* item = reinterpret_cast<const WorkItem*>(p.plan + item_at);
  const auto* last = item + items;
  for (int b = 0; b < p.batch; ++b) {
    const int q_len = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    const int start = p.seq_starts != nullptr ? p.seq_starts[b] : 0;
    for (int q_begin = 0; q_begin < q_len; q_begin += tile_q) {
      const int q_count = q_len - q_begin < tile_q ? q_len - q_begin : tile_q;
      const ChunkSpan span = chunks_of(tile_keys(p.seq_lens[b], q_len, q_begin, q_count, start, p.window_left));
      int chunk = span.begin;
      do {
        if (item == last || item->seq != b || item->q_begin != q_begin || item->q_count != q_count ||
            item->chunk_begin != chunk || item->chunk_end > span.end || item->chunk_end < chunk) {
          fail_stale();
        }
        if (item->group != 0) fail("plan: expected one without chunk groups on a CPU; use Capacity.for_device");
        chunk = item->chunk_end;
      } while (item++->chunk_begin < chunk && chunk < span.end);
      if (chunk != span.end) fail_stale();
    }
  }
  if (item != last) fail_stale();
}

struct AttendTensors {
  const Tensor &q, &k_cache, &v_cache, &k_meta, &v_meta, &k_params, &v_params, &block_table, &seq_lens, &cu_seqlens_q;
  const OptionalTensor& seq_starts;
  const Tensor &plan, &workspace, &out;
  const OptionalTensor &lse, &sinks;
};

AttendParams attend_params(const AttendTensors& t, double softmax_scale, int64_t window_left, double softcap,
                           int64_t k_format, int64_t v_format, int64_t page_size) {
  const CacheShape shape = cache_shape(t.k_cache, t.k_params, page_size);
  AttendParams p{};
  p.h_kv = shape.h_kv, p.d = shape.d, p.page_size = shape.page_size;
  p.k_cache = as_cache(t.k_cache, t.k_meta, t.k_params, k_format, shape, true);
  p.v_cache = as_cache(t.v_cache, t.v_meta, t.v_params, v_format, shape, false);
  p.max_page = static_cast<uint32_t>(to_int("num_pages", shape.num_pages > 0 ? shape.num_pages - 1 : 0));
  check_shape(t.q, "q", {kAny, kAny, shape.d}, "tokens, h_q, d");
  p.num_rows = to_int("tokens", t.q.size(0));
  p.h_q = to_int("h_q", t.q.size(1));
  if (p.h_q == 0 || p.h_q % p.h_kv != 0) {
    fail("q: expected a number of heads that the ", p.h_kv, " kv heads divide, got ", p.h_q);
  }
  p.kv_heads = Divisor(p.h_kv), p.group = Divisor(p.h_q / p.h_kv);
  p.q = as_rows(t.q, "q");
  check_tensor(t.out, "out", t.q.scalar_type(), {p.num_rows, p.h_q, p.d}, "as q");
  p.out = t.out.mutable_data_ptr();
  if (t.lse.has_value()) {
    check_tensor(*t.lse, "lse", ScalarType::Float, {p.num_rows, p.h_q}, "tokens, h_q");
    p.lse = static_cast<float*>(t.lse->mutable_data_ptr());
  }
  if (t.sinks.has_value()) check_tensor(*t.sinks, "sinks", ScalarType::Float, {p.h_q}, "h_q");
  p.sinks = data_or_null<float>(t.sinks);
  check_dtype(t.block_table, "block_table", ScalarType::Int);
  check_shape(t.block_table, "block_table", {kAny, kAny}, "batch, max_pages");
  check_rows(t.block_table, "block_table");
  p.batch = to_int("batch", t.block_table.size(0));
  check_tensor(t.seq_lens, "seq_lens", ScalarType::Int, {p.batch}, "batch");
  check_tensor(t.cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, {int64_t{p.batch} + 1}, "batch + 1");
  if (t.seq_starts.has_value()) check_tensor(*t.seq_starts, "seq_starts", ScalarType::Int, {p.batch}, "batch");
  p.block_table = static_cast<const int32_t*>(t.block_table.const_data_ptr());
  p.table_stride = t.block_table.stride(0);
  p.seq_lens = static_cast<const int32_t*>(t.seq_lens.const_data_ptr());
  p.cu_seqlens_q = static_cast<const int32_t*>(t.cu_seqlens_q.const_data_ptr());
  p.seq_starts = data_or_null<int32_t>(t.seq_starts);
  check_tensor(t.plan, "plan", ScalarType::Int, {kAny}, "Capacity.plan_ints");
  check(t.plan.size(0) >= kPlanHeader, "plan: expected at least ", kPlanHeader, " numbers, got ", t.plan.size(0));
  check_tensor(t.workspace, "workspace", ScalarType::Float, {kAny}, "Capacity.workspace_floats");
  p.plan = static_cast<const int32_t*>(t.plan.const_data_ptr());
  p.plan_ints = t.plan.size(0);
  p.workspace = static_cast<float*>(t.workspace.mutable_data_ptr());
  const int64_t groups = int64_t{p.batch} * p.h_kv * kGroupFloats, floats = t.workspace.size(0) - groups;
  p.max_partials = floats > 0 ? floats / partial_floats(p.h_q, p.d) / 2 * 2 : 0;  // outputs are 16-byte aligned
  check(softcap >= 0.0, "softcap: expected a number >= 0, got ", softcap);
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.softcap = static_cast<float>(softcap);
  p.window_left = window_left < 0 ? -1 : to_int("window_left", window_left);
  return p;
}

#define FOLDKV_ATTENTION_ARGUMENTS                                                                               \
  const Tensor &q, const Tensor &k_cache, const Tensor &v_cache, const Tensor &k_meta, const Tensor &v_meta,     \
      const Tensor &k_params, const Tensor &v_params, const Tensor &block_table, const Tensor &seq_lens,         \
      const Tensor &cu_seqlens_q, const OptionalTensor &seq_starts, const Tensor &plan, const Tensor &workspace, \
      const Tensor &out, const OptionalTensor &lse, const OptionalTensor &sinks, double softmax_scale,           \
      int64_t window_left, double softcap, int64_t k_format, int64_t v_format, int64_t page_size
#define FOLDKV_ATTENTION_NAMES                                                                                    \
  q, k_cache, v_cache, k_meta, v_meta, k_params, v_params, block_table, seq_lens, cu_seqlens_q, seq_starts, plan, \
      workspace, out, lse, sinks, softmax_scale, window_left, softcap, k_format, v_format, page_size
#define FOLDKV_ATTENTION_TENSORS                                                           \
  {q,        k_cache,      v_cache,    k_meta, v_meta,    k_params, v_params, block_table, \
   seq_lens, cu_seqlens_q, seq_starts, plan,   workspace, out,      lse,      sinks}

void append_attention_cpu(FOLDKV_ATTENTION_ARGUMENTS) {
  check_cpu();
  const AttendParams p =
      attend_params(FOLDKV_ATTENTION_TENSORS, softmax_scale, window_left, softcap, k_format, v_format, page_size);
  check_batch(p, k_cache.size(0), block_table.size(1));
  check_plan(p, plan.size(0));
  cpu::append_attention(p, cpu_parallel);
}

void append_attention_static_grid_cpu(FOLDKV_ATTENTION_ARGUMENTS, int64_t) {
  append_attention_cpu(FOLDKV_ATTENTION_NAMES);
}

#ifdef FOLDKV_HAS_CUDA
void append_attention_static_grid_cuda(FOLDKV_ATTENTION_ARGUMENTS, int64_t grid_workers) {
  AttendParams p =
      attend_params(FOLDKV_ATTENTION_TENSORS, softmax_scale, window_left, softcap, k_format, v_format, page_size);
  check(grid_workers >= 0 && grid_workers <= kMaxWorkers, "grid_workers: expected 0 .. ", kMaxWorkers, ", got ",
        grid_workers);
  p.grid_workers = static_cast<int>(grid_workers);
  const std::pair<const Tensor&, const char*> tensors[] = {
      {k_cache, "k_cache"},   {v_cache, "v_cache"},         {k_meta, "k_meta"},     {v_meta, "v_meta"},
      {k_params, "k_params"}, {v_params, "v_params"},       {plan, "plan"},         {workspace, "workspace"},
      {out, "out"},           {block_table, "block_table"}, {seq_lens, "seq_lens"}, {cu_seqlens_q, "cu_seqlens_q"}};
  for (const auto& [tensor, name] : tensors) check_same_device(tensor, name, q, "q");
  const std::pair<const OptionalTensor&, const char*> optional[] = {
      {seq_starts, "seq_starts"}, {lse, "lse"}, {sinks, "sinks"}};
  for (const auto& [tensor, name] : optional) {
    if (tensor.has_value()) check_same_device(*tensor, name, q, "q");
  }
  for (int i = 0; i < 8; ++i) check_aligned(tensors[i].first, tensors[i].second);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  check_cuda("append_attention", foldkv_cuda_append_attention(&p, current_cuda_stream(q.get_device_index())));
}

void append_attention_cuda(FOLDKV_ATTENTION_ARGUMENTS) { append_attention_static_grid_cuda(FOLDKV_ATTENTION_NAMES, 0); }
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(foldkv, CPU, m) {
  m.impl("append_attention", TORCH_BOX(&append_attention_cpu));
  m.impl("append_attention_static_grid", TORCH_BOX(&append_attention_static_grid_cpu));
}

#ifdef FOLDKV_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(foldkv, CUDA, m) {
  m.impl("append_attention", TORCH_BOX(&append_attention_cuda));
  m.impl("append_attention_static_grid", TORCH_BOX(&append_attention_static_grid_cuda));
}
#endif

}  // namespace foldkv::bind

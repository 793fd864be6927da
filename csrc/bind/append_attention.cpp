// foldkv::append_attention and foldkv::merge: see quant/ops.py for the meaning of the arguments.
#include "bind/cache_args.h"
#include "bind/cpu_threads.h"
#include "core/schedule.h"

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
  const int tile_q = p.plan[kPlanTile];
  const bool fits = p.plan[kPlanChunk] == kChunkSize && tile_q >= 1 && items >= 0 && merges >= 0 &&
                    kPlanHeader + items * kPlanEntry <= merge_at && merge_at + merges * kPlanEntry <= plan_ints;
  if (!fits) fail("plan: expected a work list, got a buffer that holds none; call Plan.update first");
  if (p.plan[kNumPartials] > p.max_partials) {
    fail("workspace: expected room for ", p.plan[kNumPartials], " partials, got ", p.max_partials,
         "; use the workspace of the Plan that was updated");
  }
  const auto* item = reinterpret_cast<const WorkItem*>(p.plan + kPlanHeader);
  const auto* last = item + items;
  for (int b = 0; b < p.batch; ++b) {
    const int q_len = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    const int start = p.seq_starts != nullptr ? p.seq_starts[b] : 0;
    for (int q_begin = 0; q_begin < q_len; q_begin += tile_q) {
      const int q_count = q_len - q_begin < tile_q ? q_len - q_begin : tile_q;
      const ChunkSpan span = tile_chunks(p.seq_lens[b], q_len, q_begin, q_count, start, p.window_left, kChunkSize);
      int chunk = span.begin;
      do {
        if (item == last || item->seq != b || item->q_begin != q_begin || item->q_count != q_count ||
            item->chunk_begin != chunk || item->chunk_end > span.end || item->chunk_end < chunk) {
          fail_stale();
        }
        chunk = item->chunk_end;
      } while (item++->chunk_begin < chunk && chunk < span.end);
      if (chunk != span.end) fail_stale();
    }
  }
  if (item != last) fail_stale();
}

void append_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_meta,
                          const Tensor& v_meta, const Tensor& k_params, const Tensor& v_params,
                          const Tensor& block_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
                          const OptionalTensor& seq_starts, const Tensor& plan, const Tensor& workspace,
                          const Tensor& out, const OptionalTensor& lse, const OptionalTensor& sinks,
                          double softmax_scale, int64_t window_left, double softcap, int64_t k_format, int64_t v_format,
                          int64_t page_size) {
  check_cpu();
  const CacheShape shape = cache_shape(k_cache, k_params, page_size);
  AttendParams p{};
  p.h_kv = shape.h_kv, p.d = shape.d, p.page_size = shape.page_size;
  p.k_cache = as_cache(k_cache, k_meta, k_params, k_format, shape, true);
  p.v_cache = as_cache(v_cache, v_meta, v_params, v_format, shape, false);
  check_shape(q, "q", {kAny, kAny, shape.d}, "tokens, h_q, d");
  p.num_rows = to_int("tokens", q.size(0));
  p.h_q = to_int("h_q", q.size(1));
  if (p.h_q == 0 || p.h_q % p.h_kv != 0) {
    fail("q: expected a number of heads that the ", p.h_kv, " kv heads divide, got ", p.h_q);
  }
  p.q = as_rows(q, "q");
  check_tensor(out, "out", q.scalar_type(), {p.num_rows, p.h_q, p.d}, "as q");
  p.out = out.mutable_data_ptr();
  if (lse.has_value()) {
    check_tensor(*lse, "lse", ScalarType::Float, {p.num_rows, p.h_q}, "tokens, h_q");
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  if (sinks.has_value()) check_tensor(*sinks, "sinks", ScalarType::Float, {p.h_q}, "h_q");
  p.sinks = data_or_null<float>(sinks);
  check_dtype(block_table, "block_table", ScalarType::Int);
  check_shape(block_table, "block_table", {kAny, kAny}, "batch, max_pages");
  check_rows(block_table, "block_table");
  p.batch = to_int("batch", block_table.size(0));
  check_tensor(seq_lens, "seq_lens", ScalarType::Int, {p.batch}, "batch");
  check_tensor(cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, {int64_t{p.batch} + 1}, "batch + 1");
  if (seq_starts.has_value()) check_tensor(*seq_starts, "seq_starts", ScalarType::Int, {p.batch}, "batch");
  p.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  p.table_stride = block_table.stride(0);
  p.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr());
  p.seq_starts = data_or_null<int32_t>(seq_starts);
  check_tensor(plan, "plan", ScalarType::Int, {kAny}, "Capacity.plan_ints");
  check(plan.size(0) >= kPlanHeader, "plan: expected at least ", kPlanHeader, " numbers, got ", plan.size(0));
  check_tensor(workspace, "workspace", ScalarType::Float, {kAny}, "Capacity.workspace_floats");
  p.plan = static_cast<const int32_t*>(plan.const_data_ptr());
  p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  p.max_partials = workspace.size(0) / partial_floats(p.h_q, p.d);
  check(softcap >= 0.0, "softcap: expected a number >= 0, got ", softcap);
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.softcap = static_cast<float>(softcap);
  p.window_left = window_left < 0 ? -1 : to_int("window_left", window_left);
  check_batch(p, shape.num_pages, block_table.size(1));
  check_plan(p, plan.size(0));
  cpu::append_attention(p, cpu_parallel);
}

void merge_cpu(const Tensor& o, const Tensor& lse, const Tensor& out, const Tensor& out_lse) {
  check_cpu();
  check_shape(o, "o", {kAny, kAny, kAny, kAny}, "parts, tokens, h, d");
  check_contiguous(o, "o");
  const int64_t d = o.size(3);
  check(d % 16 == 0 && d >= 16 && d <= kMaxHeadDim, "o: expected a head_dim that is a multiple of 16 up to ",
        kMaxHeadDim, ", got ", d);
  check_tensor(lse, "lse", ScalarType::Float, {o.size(0), o.size(1), o.size(2)}, "parts, tokens, h");
  check_tensor(out, "out", o.scalar_type(), {o.size(1), o.size(2), d}, "tokens, h, d");
  check_tensor(out_lse, "out_lse", ScalarType::Float, {o.size(1), o.size(2)}, "tokens, h");
  MergeParams p{};
  p.o = o.const_data_ptr();
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.out_lse = static_cast<float*>(out_lse.mutable_data_ptr());
  p.dtype = row_dtype(o, "o");
  p.parts = o.size(0);
  p.rows = o.size(1) * o.size(2);
  p.d = d;
  cpu::merge(p, cpu_parallel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(foldkv, CPU, m) {
  m.impl("append_attention", TORCH_BOX(&append_attention_cpu));
  m.impl("merge", TORCH_BOX(&merge_cpu));
}

}  // namespace foldkv::bind

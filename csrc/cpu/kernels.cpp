// The CPU kernels: jobs handed to threads. What a job computes does not depend on who computes it.
#include "cpu/kernels.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/tables.h"

namespace foldkv::cpu {
namespace {

template <class Fn>
void run(Parallel parallel, int64_t jobs, Fn fn) {
  if (jobs <= 0) return;
  parallel(jobs, [](int64_t job, void* context) { (*static_cast<Fn*>(context))(job); }, &fn);
}

// Rows that no sequence owns: 0, and a log-sum-exp of nothing.
void clear_tail(const AttendParams& p) {
  const int64_t begin = p.cu_seqlens_q[p.batch], heads = p.h_q;
  const int64_t element = p.q.dtype == DType::Float32 ? 4 : 2;
  if (begin >= p.num_rows) return;
  char* out = static_cast<char*>(p.out) + begin * heads * p.d * element;
  std::memset(out, 0, static_cast<size_t>((p.num_rows - begin) * heads * p.d * element));
  if (p.lse == nullptr) return;
  for (int64_t i = begin * heads; i < p.num_rows * heads; ++i) p.lse[i] = -INFINITY;
}

}  // namespace

void append_kv(const AppendParams& p, Parallel parallel) {
  const IsaOps& ops = *isa();
  std::atomic<int64_t> nonfinite{0};
  run(parallel, p.num_tokens, [&](int64_t token) {
    int count = 0;
    for (int head = 0; head < p.h_kv; ++head) count += ops.append_row(p, ops, static_cast<int>(token), head);
    if (count > 0) nonfinite += count;
  });
  if (p.nonfinite != nullptr) *p.nonfinite += nonfinite;
}

void append_attention(const AttendParams& p, Parallel parallel) {
  const IsaOps& ops = *isa();
  const auto* items = reinterpret_cast<const WorkItem*>(p.plan + p.plan[kItemAt]);
  const auto* merges = reinterpret_cast<const MergeItem*>(p.plan + p.plan[kMergeAt]);
  run(parallel, int64_t{p.plan[kNumItems]} * p.h_kv,
      [&](int64_t job) { ops.attend_item(p, ops, items[job / p.h_kv], static_cast<int>(job % p.h_kv)); });
  run(parallel, int64_t{p.plan[kNumMerges]} * p.h_kv,
      [&](int64_t job) { ops.merge_item(p, ops, merges[job / p.h_kv], static_cast<int>(job % p.h_kv)); });
  clear_tail(p);
}

void merge(const MergeParams& p, Parallel parallel) {
  const IsaOps& ops = *isa();
  run(parallel, p.rows, [&](int64_t row) { ops.merge_row(p, row); });
}

const char* isa_name() { return isa() != nullptr ? isa()->name : nullptr; }

}  // namespace foldkv::cpu

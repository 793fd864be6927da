// foldkv::merge: see quant/ops.py for the meaning of the arguments.
#include "bind/cache_args.h"
#include "bind/cpu_threads.h"

#ifdef FOLDKV_HAS_CUDA
#include "bind/stream.h"
#include "cuda/launch.h"
#endif

namespace foldkv::bind {
namespace {

MergeParams merge_params(const Tensor& o, const Tensor& lse, const Tensor& out, const Tensor& out_lse) {
  check_shape(o, "o", {kAny, kAny, kAny, kAny}, "parts, tokens, h, d");
  check_contiguous(o, "o");
  const int64_t d = o.size(3);
  check(d % 16 == 0 && d >= 16 && d <= kMaxHeadDim, "o: expected a head_dim that is a multiple of 16 up to ",
        kMaxHeadDim, ", got ", d);
  check_tensor(lse, "lse", ScalarType::Float, {o.size(0), o.size(1), o.size(2)}, "parts, tokens, h");
  check_tensor(out, "out", o.scalar_type(), {o.size(1), o.size(2), d}, "tokens, h, d");
  check_tensor(out_lse, "out_lse", ScalarType::Float, {o.size(1), o.size(2)}, "tokens, h");
  check_same_device(lse, "lse", o, "o");
  check_same_device(out, "out", o, "o");
  check_same_device(out_lse, "out_lse", o, "o");
  MergeParams p{};
  p.o = o.const_data_ptr();
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.out_lse = static_cast<float*>(out_lse.mutable_data_ptr());
  p.dtype = row_dtype(o, "o");
  p.parts = o.size(0);
  p.rows = o.size(1) * o.size(2);
  p.d = d;
  return p;
}

void merge_cpu(const Tensor& o, const Tensor& lse, const Tensor& out, const Tensor& out_lse) {
  check_cpu();
  cpu::merge(merge_params(o, lse, out, out_lse), cpu_parallel);
}

#ifdef FOLDKV_HAS_CUDA
void merge_cuda(const Tensor& o, const Tensor& lse, const Tensor& out, const Tensor& out_lse) {
  const MergeParams p = merge_params(o, lse, out, out_lse);
  const torch::stable::accelerator::DeviceGuard guard(o.get_device_index());
  check_cuda("merge", foldkv_cuda_merge(&p, current_cuda_stream(o.get_device_index())));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(foldkv, CPU, m) { m.impl("merge", TORCH_BOX(&merge_cpu)); }

#ifdef FOLDKV_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(foldkv, CUDA, m) { m.impl("merge", TORCH_BOX(&merge_cuda)); }
#endif

}  // namespace foldkv::bind

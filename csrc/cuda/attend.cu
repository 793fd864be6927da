// foldkv::append_attention on CUDA: which kernel, how many blocks. All of it is a function of tensor shapes, formats and
// the device; what the sequences are like is in the plan, on the device.
#include "cuda/attend_shape.cuh"
#include "cuda/combine.h"
#include "cuda/device.h"
#include "cuda/generic.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/variant.h"
#include "fp16/codec.cuh"
#include "int4/codec.cuh"
#include "int8/codec.cuh"

namespace foldkv::cuda {
namespace {

struct Variant {
  int k, v, d;
  bool v_integer;
  float boost;
  AttendLauncher launch;
};

constexpr Variant kVariants[] = {
#define FOLDKV_VARIANT(K, V, D) {K::kId, V::kId, D, V::kInteger, V::Math::kBoost, attend_##K##_##V##_##D},
#include "cuda/variants.def"
#undef FOLDKV_VARIANT
};

const Variant* find(const AttendParams& p) {
  for (const Variant& variant : kVariants) {
    if (variant.k == p.k_cache.format.codec && variant.v == p.v_cache.format.codec && variant.d == p.d) return &variant;
  }
  return nullptr;
}

}  // namespace
}  // namespace foldkv::cuda

extern "C" int foldkv_cuda_append_attention(const foldkv::AttendParams* params, void* stream_handle) {
  using namespace foldkv::cuda;
  foldkv::AttendParams p = *params;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  const Variant* variant = find(p);
  if (variant == nullptr) return generic_attention(p, device.num_sms, stream);
  // Rows of a sequence, if all had the same: what a shape can tell.
  const int64_t all = static_cast<int64_t>(p.num_rows) * (p.h_q / p.h_kv), batch = p.batch > 0 ? p.batch : 1;
  const int rows = static_cast<int>((all + batch - 1) / batch);
  p.joins = rows <= kNarrowRows;
  p.copies_queries = p.q.dtype != foldkv::DType::Float32 && reinterpret_cast<uintptr_t>(p.q.data) % 16 == 0 &&
                     p.q.token_stride % 8 == 0 && p.q.head_stride % 8 == 0;
  const int lanes = p.grid_workers > 0 ? p.grid_workers : kBlocksPerSm * device.num_sms / p.h_kv;
  const int num_blocks = (lanes > 0 ? lanes : 1) * p.h_kv;
  const cudaError_t error = variant->launch(device, p, rows, num_blocks, stream);
  if (error == cudaErrorNotSupported) return generic_attention(p, device.num_sms, stream);
  if (error != cudaSuccess || p.joins) return error;
  return combine(device, p, variant->v_integer, variant->boost, stream);
}

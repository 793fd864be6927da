// foldkv::append_kv: see quant/ops.py for the meaning of the arguments.
#include "bind/cache_args.h"
#include "bind/cpu_threads.h"

#ifdef FOLDKV_HAS_CUDA
#include "bind/stream.h"
#include "cuda/launch.h"
#endif

namespace foldkv::bind {
namespace {

// What only a device whose slots and positions the host can read is able to check.
void check_contents(const AppendParams& p) {
  const int64_t num_slots = p.num_pages * p.page_size;
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    if (p.slots[i] >= num_slots) {
      fail("slot_mapping: expected slots below ", num_slots, " (num_pages * page_size) or negative ones, got ",
           p.slots[i], " at index ", i, "; nothing was written");
    }
    if (p.cos != nullptr && p.slots[i] >= 0 && (p.positions[i] < 0 || p.positions[i] >= p.max_pos)) {
      fail("positions: expected 0 .. ", p.max_pos - 1, " (rows of cos and sin), got ", p.positions[i], " at index ", i,
           "; nothing was written");
    }
  }
}

struct AppendTensors {
  const Tensor &k, &v, &k_cache, &v_cache, &k_meta, &v_meta, &k_params, &v_params, &slot_mapping;
  const OptionalTensor &k_shaping, &v_shaping, &cos, &sin, &positions, &nonfinite;
};

AppendParams append_params(const AppendTensors& t, bool interleaved, int64_t k_format, int64_t v_format,
                           int64_t page_size) {
  const CacheShape shape = cache_shape(t.k_cache, t.k_params, page_size);
  AppendParams p{};
  p.h_kv = shape.h_kv, p.d = shape.d, p.page_size = shape.page_size;
  p.num_pages = shape.num_pages;
  p.k_cache = as_cache(t.k_cache, t.k_meta, t.k_params, k_format, shape, true);
  p.v_cache = as_cache(t.v_cache, t.v_meta, t.v_params, v_format, shape, false);
  p.k_cache.shaping = as_shaping(t.k_shaping, "k_shaping", p.k_cache.format, shape);
  p.v_cache.shaping = as_shaping(t.v_shaping, "v_shaping", p.v_cache.format, shape);
  check_shape(t.k, "k", {kAny, shape.h_kv, shape.d}, "tokens, h_kv, d");
  check_shape(t.v, "v", {t.k.size(0), shape.h_kv, shape.d}, "tokens, h_kv, d");
  p.num_tokens = to_int("tokens", t.k.size(0));
  p.k = as_rows(t.k, "k");
  p.v = as_rows(t.v, "v");
  check_tensor(t.slot_mapping, "slot_mapping", ScalarType::Long, {t.k.size(0)}, "tokens");
  p.slots = static_cast<const int64_t*>(t.slot_mapping.const_data_ptr());
  if (t.cos.has_value() != t.sin.has_value() || t.cos.has_value() != t.positions.has_value()) {
    fail("cos, sin, positions: expected all three or none, got some of them");
  }
  if (t.cos.has_value()) {
    check_tensor(*t.cos, "cos", ScalarType::Float, {kAny, kAny}, "max_pos, rot / 2");
    check_tensor(*t.sin, "sin", ScalarType::Float, {t.cos->size(0), t.cos->size(1)}, "as cos");
    check_tensor(*t.positions, "positions", ScalarType::Long, {t.k.size(0)}, "tokens");
    check(2 * t.cos->size(1) <= shape.d, "cos: expected at most d / 2 = ", shape.d / 2, " columns, got ",
          t.cos->size(1));
    p.max_pos = t.cos->size(0);
    p.rot_half = static_cast<int>(t.cos->size(1));
  }
  p.cos = data_or_null<float>(t.cos);
  p.sin = data_or_null<float>(t.sin);
  p.positions = data_or_null<int64_t>(t.positions);
  p.interleaved = interleaved;
  if (t.nonfinite.has_value()) {
    check_tensor(*t.nonfinite, "nonfinite", ScalarType::Long, {1});
    p.nonfinite = static_cast<int64_t*>(t.nonfinite->mutable_data_ptr());
  }
  return p;
}

void append_kv_cpu(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_meta,
                   const Tensor& v_meta, const Tensor& k_params, const Tensor& v_params,
                   const OptionalTensor& k_shaping, const OptionalTensor& v_shaping, const Tensor& slot_mapping,
                   const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& positions,
                   bool interleaved, const OptionalTensor& nonfinite, int64_t k_format, int64_t v_format,
                   int64_t page_size) {
  check_cpu();
  const AppendParams p = append_params({k, v, k_cache, v_cache, k_meta, v_meta, k_params, v_params, slot_mapping,
                                        k_shaping, v_shaping, cos, sin, positions, nonfinite},
                                       interleaved, k_format, v_format, page_size);
  check_contents(p);
  cpu::append_kv(p, cpu_parallel);
}

#ifdef FOLDKV_HAS_CUDA
void append_kv_cuda(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& k_meta, const Tensor& v_meta, const Tensor& k_params, const Tensor& v_params,
                    const OptionalTensor& k_shaping, const OptionalTensor& v_shaping, const Tensor& slot_mapping,
                    const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& positions,
                    bool interleaved, const OptionalTensor& nonfinite, int64_t k_format, int64_t v_format,
                    int64_t page_size) {
  const AppendParams p = append_params({k, v, k_cache, v_cache, k_meta, v_meta, k_params, v_params, slot_mapping,
                                        k_shaping, v_shaping, cos, sin, positions, nonfinite},
                                       interleaved, k_format, v_format, page_size);
  const auto on_device = [&](const Tensor& tensor, const char* name) {
    check_same_device(tensor, name, k_cache, "k_cache");
  };
  on_device(k, "k"), on_device(v, "v"), on_device(v_cache, "v_cache");
  on_device(k_meta, "k_meta"), on_device(v_meta, "v_meta");
  on_device(k_params, "k_params"), on_device(v_params, "v_params"), on_device(slot_mapping, "slot_mapping");
  if (k_shaping.has_value()) on_device(*k_shaping, "k_shaping"), check_aligned(*k_shaping, "k_shaping");
  if (v_shaping.has_value()) on_device(*v_shaping, "v_shaping"), check_aligned(*v_shaping, "v_shaping");
  if (cos.has_value()) on_device(*cos, "cos"), on_device(*sin, "sin"), on_device(*positions, "positions");
  if (nonfinite.has_value()) on_device(*nonfinite, "nonfinite");
  check_aligned(k_cache, "k_cache"), check_aligned(v_cache, "v_cache");
  check_aligned(k_meta, "k_meta"), check_aligned(v_meta, "v_meta");
  check_aligned(k_params, "k_params"), check_aligned(v_params, "v_params");
  const torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  check_cuda("append_kv", foldkv_cuda_append_kv(&p, current_cuda_stream(k_cache.get_device_index())));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(foldkv, CPU, m) { m.impl("append_kv", TORCH_BOX(&append_kv_cpu)); }

#ifdef FOLDKV_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(foldkv, CUDA, m) { m.impl("append_kv", TORCH_BOX(&append_kv_cuda)); }
#endif

}  // namespace foldkv::bind

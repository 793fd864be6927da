// foldkv::append_kv: see quant/ops.py for the meaning of the arguments.
#include "bind/cache_args.h"
#include "bind/cpu_threads.h"

namespace foldkv::bind {
namespace {

void check_slots(const Tensor& slots, int64_t num_slots) {
  const auto* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t i = 0; i < slots.size(0); ++i) {
    if (slot[i] >= num_slots) {
      fail("slot_mapping: expected slots below ", num_slots, " (num_pages * page_size) or negative ones, got ", slot[i],
           " at index ", i, "; nothing was written");
    }
  }
}

void check_positions(const Tensor& positions, const Tensor& slots, int64_t max_pos) {
  const auto* position = static_cast<const int64_t*>(positions.const_data_ptr());
  const auto* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t i = 0; i < positions.size(0); ++i) {
    if (slot[i] >= 0 && (position[i] < 0 || position[i] >= max_pos)) {
      fail("positions: expected 0 .. ", max_pos - 1, " (rows of cos and sin), got ", position[i], " at index ", i,
           "; nothing was written");
    }
  }
}

void append_kv_cpu(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_meta,
                   const Tensor& v_meta, const Tensor& k_params, const Tensor& v_params, const Tensor& slot_mapping,
                   const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& positions,
                   bool interleaved, const OptionalTensor& nonfinite, int64_t k_format, int64_t v_format,
                   int64_t page_size) {
  check_cpu();
  const CacheShape shape = cache_shape(k_cache, k_params, page_size);
  AppendParams p{};
  p.h_kv = shape.h_kv, p.d = shape.d, p.page_size = shape.page_size;
  p.k_cache = as_cache(k_cache, k_meta, k_params, k_format, shape, true);
  p.v_cache = as_cache(v_cache, v_meta, v_params, v_format, shape, false);
  check_shape(k, "k", {kAny, shape.h_kv, shape.d}, "tokens, h_kv, d");
  check_shape(v, "v", {k.size(0), shape.h_kv, shape.d}, "tokens, h_kv, d");
  p.num_tokens = to_int("tokens", k.size(0));
  p.k = as_rows(k, "k");
  p.v = as_rows(v, "v");
  check_tensor(slot_mapping, "slot_mapping", ScalarType::Long, {k.size(0)}, "tokens");
  check_slots(slot_mapping, shape.num_pages * page_size);
  p.slots = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  if (cos.has_value() != sin.has_value() || cos.has_value() != positions.has_value()) {
    fail("cos, sin, positions: expected all three or none, got some of them");
  }
  if (cos.has_value()) {
    check_tensor(*cos, "cos", ScalarType::Float, {kAny, kAny}, "max_pos, rot / 2");
    check_tensor(*sin, "sin", ScalarType::Float, {cos->size(0), cos->size(1)}, "as cos");
    check_tensor(*positions, "positions", ScalarType::Long, {k.size(0)}, "tokens");
    check(2 * cos->size(1) <= shape.d, "cos: expected at most d / 2 = ", shape.d / 2, " columns, got ", cos->size(1));
    check_positions(*positions, slot_mapping, cos->size(0));
    p.rot_half = static_cast<int>(cos->size(1));
  }
  p.cos = data_or_null<float>(cos);
  p.sin = data_or_null<float>(sin);
  p.positions = data_or_null<int64_t>(positions);
  p.interleaved = interleaved;
  if (nonfinite.has_value()) {
    check_tensor(*nonfinite, "nonfinite", ScalarType::Long, {1});
    p.nonfinite = static_cast<int64_t*>(nonfinite->mutable_data_ptr());
  }
  cpu::append_kv(p, cpu_parallel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(foldkv, CPU, m) { m.impl("append_kv", TORCH_BOX(&append_kv_cpu)); }

}  // namespace foldkv::bind

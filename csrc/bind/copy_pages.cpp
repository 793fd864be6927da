// foldkv::copy_pages(Tensor(a!) pool, Tensor src, Tensor dst) -> (): pool[dst[i]] = pool[src[i]].
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bind/check.h"

#ifdef FOLDKV_HAS_CUDA
#include "bind/stream.h"
#include "cuda/launch.h"
#endif

namespace foldkv::bind {
namespace {

void check_arguments(const Tensor& pool, const Tensor& src, const Tensor& dst) {
  check_tensor(pool, "copy_pages pool", ScalarType::Byte, {kAny, kAny, kAny}, "num_pages, h_kv, page_bytes");
  check_tensor(src, "copy_pages src", ScalarType::Long, {kAny}, "n");
  check_tensor(dst, "copy_pages dst", ScalarType::Long, {src.size(0)}, "as src");
  check_same_device(src, "copy_pages src", pool, "pool");
  check_same_device(dst, "copy_pages dst", pool, "pool");
}

void check_ids(const char* name, const int64_t* ids, int64_t n, int64_t num_pages) {
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= num_pages) {
      fail(name, ": expected page ids in 0 .. ", num_pages - 1, ", got ", ids[i], " at index ", i);
    }
  }
}

void copy_pages_cpu(const Tensor& pool, const Tensor& src, const Tensor& dst) {
  check_arguments(pool, src, dst);
  const int64_t n = src.size(0);
  const int64_t num_pages = pool.size(0);
  const int64_t page_bytes = pool.size(1) * pool.size(2);
  const auto* from = static_cast<const int64_t*>(src.const_data_ptr());
  const auto* to = static_cast<const int64_t*>(dst.const_data_ptr());
  check_ids("copy_pages src", from, n, num_pages);
  check_ids("copy_pages dst", to, n, num_pages);
  std::vector<int64_t> written(to, to + n);
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  if (twice != written.end()) fail("copy_pages dst: expected each page once, got page ", *twice, " twice");
  for (int64_t i = 0; i < n; ++i) {
    if (std::binary_search(written.begin(), written.end(), from[i])) {
      fail("copy_pages src: expected pages that dst does not name, got page ", from[i], " in both");
    }
  }
  auto* bytes = static_cast<uint8_t*>(pool.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) std::memcpy(bytes + to[i] * page_bytes, bytes + from[i] * page_bytes, page_bytes);
}

#ifdef FOLDKV_HAS_CUDA
void copy_pages_cuda(const Tensor& pool, const Tensor& src, const Tensor& dst) {
  check_arguments(pool, src, dst);
  const int64_t page_bytes = pool.size(1) * pool.size(2);
  void* data = pool.mutable_data_ptr();
  check(page_bytes % 16 == 0, "copy_pages pool: expected pages of a multiple of 16 bytes, got ", page_bytes);
  check(reinterpret_cast<uintptr_t>(data) % 16 == 0, "copy_pages pool: expected 16-byte aligned data, got a view that ",
        "starts between; allocate the pool on its own");
  check(src.size(0) <= INT32_MAX, "copy_pages src: expected at most ", INT32_MAX, " page ids, got ", src.size(0));
  const torch::stable::accelerator::DeviceGuard guard(pool.get_device_index());
  check_cuda("copy_pages",
             foldkv_cuda_copy_pages(data, pool.size(0), page_bytes, static_cast<const int64_t*>(src.const_data_ptr()),
                                    static_cast<const int64_t*>(dst.const_data_ptr()), src.size(0),
                                    current_cuda_stream(pool.get_device_index())));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(foldkv, CPU, m) { m.impl("copy_pages", TORCH_BOX(&copy_pages_cpu)); }

#ifdef FOLDKV_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(foldkv, CUDA, m) { m.impl("copy_pages", TORCH_BOX(&copy_pages_cuda)); }
#endif

}  // namespace foldkv::bind

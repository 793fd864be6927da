// Jobs on PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>

#include "bind/check.h"
#include "cpu/kernels.h"

namespace foldkv::bind {

inline void cpu_parallel(int64_t jobs, cpu::Job fn, void* context) {
  torch::stable::parallel_for(0, jobs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) fn(job, context);
  });
}

// Every CPU op asks first: FOLDKV_ISA may name an instruction set that this machine lacks.
inline void check_cpu() {
  if (cpu::isa_name() != nullptr) return;
  const char* wanted = std::getenv("FOLDKV_ISA");
  fail("FOLDKV_ISA: expected an instruction set that is built in and runs here (`foldkv doctor` lists them), got '",
       wanted != nullptr ? wanted : "", "'; unset it");
}

}  // namespace foldkv::bind

// The CPU kernels, as the bindings call them. Arguments are checked there.
#pragma once

#include "core/params.h"

namespace foldkv::cpu {

// Runs fn(job, context) for job 0 .. jobs - 1 on some threads; the caller brings the threads.
using Job = void (*)(int64_t job, void* context);
using Parallel = void (*)(int64_t jobs, Job fn, void* context);

void append_kv(const AppendParams& p, Parallel parallel);
// False where the plan buffer is too small for these lengths; nothing past it is written.
bool plan(const PlanParams& p);
void append_attention(const AttendParams& p, Parallel parallel);
void merge(const MergeParams& p, Parallel parallel);
// Name of the instruction set in use; null where FOLDKV_ISA names one that cannot run here.
const char* isa_name();

}  // namespace foldkv::cpu

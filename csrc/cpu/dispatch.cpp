// Chooses the instruction set once, at first use.
#include <cstdlib>
#include <cstring>

#include "cpu/tables.h"

namespace foldkv {
namespace plain {
const cpu::IsaOps& isa_ops();
}
#ifdef FOLDKV_HAS_X86
namespace avx2 {
const cpu::IsaOps& isa_ops();
}
namespace avx512 {
const cpu::IsaOps& isa_ops();
}
#endif
}  // namespace foldkv

namespace foldkv::cpu {
namespace {

struct Choice {
  const IsaOps* able[4] = {};
  const char* names[4] = {};
  const IsaOps* used = nullptr;

  Choice() {
    int n = 0;
#ifdef FOLDKV_HAS_X86
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vnni");
    if (has_avx512) able[n++] = &avx512::isa_ops();
    if (has_avx2) able[n++] = &avx2::isa_ops();
#endif
    able[n++] = &plain::isa_ops();
    for (int i = 0; i < n; ++i) names[i] = able[i]->name;
    const char* wanted = std::getenv("FOLDKV_ISA");
    if (wanted == nullptr || *wanted == '\0') used = able[0];
    for (int i = 0; used == nullptr && i < n; ++i) {
      if (std::strcmp(wanted, names[i]) == 0) used = able[i];
    }
  }
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

}  // namespace

const IsaOps* isa() { return choice().used; }
const char* const* isa_names() { return choice().names; }

}  // namespace foldkv::cpu

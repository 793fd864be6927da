// C4 on the CPU: two unsigned codes a byte, the even channel in the low nibble.
#include "cpu/integer_codec.h"

namespace foldkv::FOLDKV_ISA {

struct Int4 {
  static constexpr int kBits = 4;
  static W widen(const uint8_t* p) { return widen_u4(p); }  // low nibbles first
  static constexpr int channel(int lane) { return lane < 16 ? 2 * lane : 2 * (lane - 16) + 1; }
};

const cpu::CodecOps& int4_codec(int id) { return integer_codec<Int4>(id); }

}  // namespace foldkv::FOLDKV_ISA

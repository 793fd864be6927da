// Numbers of steered rounding, which quant/steering.py defines.
#pragma once

#include "core/layout.h"

namespace foldkv {

constexpr int kSteerBits = 4;
constexpr float kSteerUnits = 64.0f;  // of a code
constexpr float kSteerMiddle = 7.5f;
constexpr float kSteerLeast = -8.0f, kSteerMost = 23.0f;  // positions are cut to these, in codes
constexpr float kSteerWeight = 8.0f;
constexpr int kSteerFlips = 4;
constexpr float kMaxDirection = 511.0f;
constexpr float kSteerRanks = 8.0f;  // of a unit: changes are compared in whole ones

}  // namespace foldkv

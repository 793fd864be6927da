// Numbers of shaped rounding, which quant/shaping.py defines.
#pragma once

#include "core/layout.h"

namespace foldkv {

constexpr int kShapeFlips = 8;
constexpr int kShapeMost = 23;   // units of a code's step that an error is cut to
constexpr int kShapeUnits = 32;  // that a step has where a row's range is not searched

}  // namespace foldkv

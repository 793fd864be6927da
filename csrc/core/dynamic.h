// Numbers of the dynamic formats, which quant/dynamic.py and quant/reference.py define.
#pragma once

#include "core/layout.h"

namespace foldkv {

constexpr float kMaxZero = 1024.0f;  // a step is at least absmax / 1024: the fp16 zero stays exact to half a step
constexpr float kMaxDynamic = 0x1p100f;  // rows are cut to this magnitude, so that no sum of a rotation overflows
constexpr float kMinScale = 0x1p-126f;
constexpr float kMaxScale = 0x1.fep127f;  // largest bf16

// The search of 4-bit formats with a zero: a row lies on whole units from its least to its greatest element, a grid has
// its 16 points at start + step * code.
constexpr int kSearchBits = 4;
constexpr float kLeastSearched = 0x1p-50f;  // magnitude of a row
constexpr float kSearchUnits = 480.0f;
constexpr float kMinGain = 0.875f, kMaxGain = 1.125f;

struct SearchGrid {
  float step, start;
};

constexpr int kSearchGrids = 4;
FOLDKV_HD constexpr SearchGrid search_grid(int i) {
  return i == 0 ? SearchGrid{32.0f, 0.0f} : SearchGrid{30.0f, 8.0f * static_cast<float>(i) - 1.0f};
}

}  // namespace foldkv

#include "cuda/variant.cuh"
#include "int8/codec.cuh"

FOLDKV_INSTANTIATE(Int8, Int8, 96)

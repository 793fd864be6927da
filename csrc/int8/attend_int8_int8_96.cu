#include "int8/codec.cuh"
#include "cuda/variant.cuh"

FOLDKV_INSTANTIATE(Int8, Int8, 96)

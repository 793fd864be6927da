#include "cuda/variant.cuh"
#include "int4/codec.cuh"
#include "int8/codec.cuh"

FOLDKV_INSTANTIATE(Int8, Int4, 96)

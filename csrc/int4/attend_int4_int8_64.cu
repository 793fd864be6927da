#include "cuda/variant.cuh"
#include "int4/codec.cuh"
#include "int8/codec.cuh"

FOLDKV_INSTANTIATE(Int4, Int8, 64)

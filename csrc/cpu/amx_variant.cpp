// Products with a 4-bit weight compiled for AMX (see variant.cpp for the other kernels). int8_variant.cpp is, too.

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "simd/vector.h"

#include "fourbit.inl"
#include "gemm_4bit.inl"

BNB_NAMESPACE_BEGIN

extern const TiledProducts tiled_products;
constexpr TiledProducts kTiledProducts = {
    {gemm_4bit<float>, gemm_4bit_transposed<float>},
    {gemm_4bit<Half>, gemm_4bit_transposed<Half>},
    {gemm_4bit<BFloat16>, gemm_4bit_transposed<BFloat16>},
};
const TiledProducts tiled_products = kTiledProducts;

BNB_NAMESPACE_END

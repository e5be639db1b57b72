// The classes of operands that products of linear layers are written for.
#pragma once

#include "cpu/gemm/amx_operands.h"
#include "cpu/gemm/f32_operands.h"
#include "cpu/gemm/products.h"

namespace dino {
namespace {

// body(class) for what multiplies which values; of f32 and bf16
template <class Body>
void with_operands(Products products, DType dtype, const Body& body) {
#if defined(DINO_HAS_AMX)
    if (products == Products::amx) return dtype == DType::f32 ? body(Tiles<float>()) : body(Tiles<uint16_t>());
#endif
    dtype == DType::f32 ? body(Floats<float>()) : body(Floats<uint16_t>());
}

}  // namespace
}  // namespace dino

// The policies of linear layers' products; README.md says what each member must do.
#pragma once

#include "cpu/gemm/amx_operands.h"
#include "cpu/gemm/f32_operands.h"
#include "cpu/gemm/products.h"

namespace dino {
namespace {

// body(policy) for values of f32 or bf16
template <class Body>
void with_operands(Products products, DType dtype, const Body& body) {
#if defined(DINO_HAS_AMX)
    if (products == Products::amx)
        return dtype == DType::f32 ? body(AmxOperands<float>()) : body(AmxOperands<uint16_t>());
#endif
    dtype == DType::f32 ? body(F32Operands<float>()) : body(F32Operands<uint16_t>());
}

}  // namespace
}  // namespace dino

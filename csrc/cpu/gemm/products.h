// Which instructions multiply matrices on the CPU.
#pragma once

namespace dino {

enum class Products : int {
    library,     // none of ours: Python calls the GEMM of oneDNN or MKL
    f32,         // fused multiply-adds of float32; bfloat16 is widened as it is packed
    bf16_pairs,  // dot products of two bfloat16 values (AVX512-BF16), in attention only
    amx,         // AMX tiles of bfloat16; a float32 operand is the sum of three such
};

}  // namespace dino

// What multiplies matrices on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

// What multiplies in the kernels of linear layers, where all channels are multiples of 32 and everything is contiguous:
// fused multiply-adds of floats, or matrix tiles (AMX), for processors that have them.
enum class Products : int { library, floats, tiles };

}  // namespace dino

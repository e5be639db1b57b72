// Cross-entropy of each row's positive key against many keys, logits never stored, on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct InfoNceArgs {
    const void *query, *positive;  // [R, D], contiguous as all of these; or null: positives are among the keys,
    const int64_t* labels;         // [R], of these numbers
    const void* keys;              // [K, D]
    void* grad;                    // [R, D]
    int64_t rows, outputs, channels;
    DType dtype;
    float temp;
    double scale;
    int threads;
};
double info_nce(const InfoNceArgs& args);

}  // namespace dino

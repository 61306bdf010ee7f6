// The caller's batch, checked; the same for every kind of device.
#pragma once

#include "common/tensor.h"
#include "common/weights.h"

namespace kvspn {

struct BatchSizes {
    int64_t rows, capacity, cross_capacity, token_capacity;
};

// Throws InvalidArgument unless dtypes, shapes and strides are those that kvspn.h asks for.
BatchSizes check_batch(const kvspn_batch& batch, const Weights& weights);

}  // namespace kvspn

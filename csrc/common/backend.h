// The kinds of devices: how each runs engines and single ops.
#pragma once

#include <memory>

#include "common/encoder.h"
#include "common/ops.h"
#include "common/runner.h"

namespace kvspn {

struct Backend {
    Layout layout;  // of the matrices that its runners read
    // The runner may replace what the weights point to by copies of its own; they and the plan outlive it.
    std::unique_ptr<Runner> (*make_runner)(const kvspn_engine_params& params, Weights& weights,
                                           const Plan& plan);
    // Null where the device has none.
    std::unique_ptr<Encoder> (*make_encoder)(const kvspn_encoder_params& params, const kvspn_tensor* weights,
                                             int count);
    const char* (*instruction_set)();
#define KVSPN_POINTER(name, Params) void (*name)(const Params& params);
    KVSPN_EACH_OP(KVSPN_POINTER)
#undef KVSPN_POINTER
};

extern const Backend cpu_backend, cuda_backend;

// Of a kvspn_device; null where the library is built without it.
const Backend* find_backend(int32_t device);
// The same; throws InvalidArgument where there is none.
const Backend& get_backend(int32_t device);

}  // namespace kvspn

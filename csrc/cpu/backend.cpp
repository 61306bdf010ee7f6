#include "common/backend.h"

#include "cpu/encoder.h"
#include "cpu/runner.h"

namespace kvspn {
namespace {

std::unique_ptr<Runner> make_runner(const kvspn_engine_params& params, Weights& weights, const Plan& plan) {
    return std::make_unique<cpu::CpuRunner>(params, weights, plan);
}

std::unique_ptr<Encoder> make_encoder(const kvspn_encoder_params& params, const kvspn_tensor* weights,
                                      int count) {
    return std::make_unique<cpu::CpuEncoder>(params, weights, count);
}

const char* instruction_set() { return select_kernels(nullptr).name; }

}  // namespace

#define KVSPN_ADDRESS(name, Params) &cpu::name,
const Backend cpu_backend = {Layout::packed, &make_runner, &make_encoder, &instruction_set,
                             KVSPN_EACH_OP(KVSPN_ADDRESS)};

}  // namespace kvspn

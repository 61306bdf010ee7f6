#include "common/backend.h"

#include "cuda/runner.h"

namespace kvspn {
namespace {

std::unique_ptr<Runner> make_runner(const kvspn_engine_params& params, Weights& weights, const Plan& plan) {
    return std::make_unique<cuda::CudaRunner>(params, weights, plan);
}

const char* instruction_set() {
#if defined(KVSPN_EMULATE)
    return "cuda, emulated";
#else
    return "cuda";
#endif
}

}  // namespace

#define KVSPN_ADDRESS(name, Params) &cuda::name,
const Backend cuda_backend = {Layout::rows, &make_runner, nullptr, &instruction_set,
                              KVSPN_EACH_OP(KVSPN_ADDRESS)};

}  // namespace kvspn

#include "common/backend.h"

#include "cuda/ops.h"
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

const Backend cuda_backend = {
    Layout::rows,        &make_runner,          &instruction_set, &cuda::flat_kv_attention,
    &cuda::fused_linear, &cuda::lm_head_verify, &cuda::append_kv, &cuda::accept_and_rollback,
    &cuda::compact_kv};

}  // namespace kvspn

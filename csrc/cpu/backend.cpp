#include "common/backend.h"

#include "cpu/ops.h"
#include "cpu/runner.h"

namespace kvspn {
namespace {

std::unique_ptr<Runner> make_runner(const kvspn_engine_params& params, Weights& weights, const Plan& plan) {
    return std::make_unique<cpu::CpuRunner>(params, weights, plan);
}

const char* instruction_set() { return select_kernels(nullptr).name; }

}  // namespace

const Backend cpu_backend = {
    Layout::packed,     &make_runner,         &instruction_set, &cpu::flat_kv_attention,
    &cpu::fused_linear, &cpu::lm_head_verify, &cpu::append_kv,  &cpu::accept_and_rollback,
    &cpu::compact_kv};

}  // namespace kvspn

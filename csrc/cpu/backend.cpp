#include "common/backend.h"

#include "cpu/runner.h"

namespace kvspn {
namespace {

std::unique_ptr<Runner> make_runner(const kvspn_engine_params& params, Weights& weights, const Plan& plan) {
    return std::make_unique<cpu::CpuRunner>(params, weights, plan);
}

const char* instruction_set() { return select_kernels(nullptr).name; }

}  // namespace

#define KVSPN_ADDRESS(name, Params) &cpu::name,
const Backend cpu_backend = {Layout::packed, &make_runner, &instruction_set, KVSPN_EACH_OP(KVSPN_ADDRESS)};

}  // namespace kvspn

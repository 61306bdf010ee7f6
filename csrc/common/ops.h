// Single ops on the caller's tensors.
#pragma once

#include "kvspn.h"

// Each op by its name, with its parameters. Every device defines all of them in its own namespace.
#define KVSPN_EACH_OP(X)                         \
    X(flat_kv_attention, kvspn_attention_params) \
    X(fused_linear, kvspn_linear_params)         \
    X(lm_head_verify, kvspn_verify_params)       \
    X(append_kv, kvspn_append_params)            \
    X(accept_and_rollback, kvspn_accept_params)  \
    X(compact_kv, kvspn_compact_params)

#define KVSPN_DECLARE(name, Params) void name(const Params& params);
namespace kvspn::cpu {
KVSPN_EACH_OP(KVSPN_DECLARE)
}
namespace kvspn::cuda {
KVSPN_EACH_OP(KVSPN_DECLARE)
}
#undef KVSPN_DECLARE

// What each op must be given: throws InvalidArgument that names the tensor.
#define KVSPN_DECLARE(name, Params) void check(const Params& params);
namespace kvspn {
KVSPN_EACH_OP(KVSPN_DECLARE)
}
#undef KVSPN_DECLARE

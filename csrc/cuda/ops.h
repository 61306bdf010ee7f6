// Single ops on the caller's tensors.
#pragma once

#include "kvspn.h"

namespace kvspn::cuda {

void flat_kv_attention(const kvspn_attention_params& params);
void fused_linear(const kvspn_linear_params& params);
void lm_head_verify(const kvspn_verify_params& params);
void append_kv(const kvspn_append_params& params);
void accept_and_rollback(const kvspn_accept_params& params);
void compact_kv(const kvspn_compact_params& params);

}  // namespace kvspn::cuda

// Single ops on the caller's tensors.
#pragma once

#include "kvspn.h"

namespace kvspn {

void flat_kv_attention(const kvspn_attention_params& params);

}  // namespace kvspn

// What each op must be given: throws InvalidArgument that names the tensor.
#pragma once

#include "kvspn.h"

namespace kvspn {

void check(const kvspn_attention_params& p);
void check(const kvspn_linear_params& p);
void check(const kvspn_verify_params& p);
void check(const kvspn_append_params& p);
void check(const kvspn_accept_params& p);
void check(const kvspn_compact_params& p);

}  // namespace kvspn

/* The policies by name, for table.c. Inside policies/ only. */
#pragma once

#include "policies/policy.h"

extern const struct policy policy_none, policy_random, policy_streaming_llm, policy_h2o, policy_scissorhands, policy_fastgen, policy_snapkv,
    policy_pyramidkv, policy_ada_snapkv, policy_ada_pyramidkv, policy_kv_compress, policy_expected_attention, policy_keydiff, policy_tova;

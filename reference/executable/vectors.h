// The stored vectors of `moe-audit selftest`: what they are made of, and the file that holds them.
#pragma once

#include "reference/executable/compute.h"

namespace moeaudit::reference {

/// All vectors with inputs, options and published values, without outputs.
Json make_vectors();

at::Tensor tensor_of(const Json& tensor);
Json json_of(const at::Tensor& tensor);

}  // namespace moeaudit::reference

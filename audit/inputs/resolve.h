// From what files say to what the trainer would do. The order of authority is in resolve.cc and docs/architecture.md:
// command line > training_args.bin > training config > adapter_config > config.json the run wrote > base model's
// config.json > framework default (behaviours) > family. The loser is kept as shadowed.
#pragma once

#include "audit/inputs/inputs.h"
#include "audit/inputs/material.h"

namespace moeaudit {

/// Fills the fact sheet from the material: static facts only; what needs tensors is a measure's.
void resolve(const Material& material, const RunOptions& options, FactSheet* facts);

}  // namespace moeaudit

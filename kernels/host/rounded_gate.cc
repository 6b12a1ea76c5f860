#include "kernels/host/rounded_gate.h"

namespace moeaudit::kernels {

Status rounded_gate_logits(const RoundedGateArgs& a, float* logits) {
  const Status status = check_rounded_gate(a, logits);
  for (std::int64_t t = 0; status == Status::kOk && t < a.tokens; ++t) {
    for (std::int64_t e = 0; e < a.experts; ++e) logits[t * a.experts + e] = rounded_gate_logit(a, t, e);
  }
  return status;
}

}  // namespace moeaudit::kernels

#include "kernels/host/bias_update.h"

namespace moeaudit::kernels {

Status check_bias_update(const BiasUpdateArgs& a, const double* bias) {
  if (a.layers < 0 || a.experts < 1 || a.ranks < 1 || a.micro_batches < 1) return Status::kBadShape;
  if (a.layers > 0 && (a.bias == nullptr || a.counts == nullptr || bias == nullptr)) return Status::kNullPointer;
  return a.rate - a.rate == 0.0 ? Status::kOk : Status::kBadOption;
}

Status bias_update(const BiasUpdateArgs& a, double* bias) {
  const Status status = check_bias_update(a, bias);
  for (std::int64_t l = 0; status == Status::kOk && l < a.layers; ++l) update_layer(a, l, bias + l * a.experts);
  return status;
}

}  // namespace moeaudit::kernels

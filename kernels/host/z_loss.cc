#include "kernels/host/z_loss.h"

#include <algorithm>

namespace moeaudit::kernels {
namespace {

template <class T>
Status run(const ZLossArgs<T>& a, const ZLossResult<T>& r) {
  if (const Status status = check_z_loss(a, r); status != Status::kOk) return status;
  const auto is_valid = [&](std::int64_t t) { return a.valid == nullptr || a.valid[t] != 0; };
  std::int64_t valid = 0;
  for (std::int64_t t = 0; t < a.tokens; ++t) valid += is_valid(t);
  const double divisor = static_cast<double>(a.divisor == Divisor::kAllTokens ? a.tokens : valid);
  double total = 0;
  for (std::int64_t t = 0; t < a.tokens;) {
    double stretch = 0;
    for (const std::int64_t end = std::min(a.tokens, t + kZLossRun); t < end; ++t) {
      const T* row = a.logits + t * a.experts;
      double largest = 0, sum = 0;
      const double lse = log_sum_exp(row, a.experts, &largest, &sum);
      if (r.log_sum_exp != nullptr) r.log_sum_exp[t] = lse;
      if (is_valid(t)) stretch += lse * lse;
      if (r.gradient == nullptr) continue;
      for (std::int64_t e = 0; e < a.experts; ++e) {
        r.gradient[t * a.experts + e] =
            is_valid(t)
                ? static_cast<T>(2.0 * lse / divisor * (exp_exact_order(static_cast<double>(row[e]) - largest) / sum))
                : T(0);
      }
    }
    total += stretch;
  }
  *r.loss = valid == 0 ? 0.0 : total / divisor;
  return Status::kOk;
}

}  // namespace

Status z_loss(const ZLossArgs<float>& args, const ZLossResult<float>& result) { return run(args, result); }
Status z_loss(const ZLossArgs<double>& args, const ZLossResult<double>& result) { return run(args, result); }

}  // namespace moeaudit::kernels

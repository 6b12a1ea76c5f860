// The router z-loss of ST-MoE: the mean over tokens of (log sum_e exp(logit_e))^2. Host kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/host/balance_loss.h"
#include "kernels/host/elementary.h"

namespace moeaudit::kernels {

template <class T>
struct ZLossArgs {
  const T* logits = nullptr;            // [tokens, experts]
  const std::uint8_t* valid = nullptr;  // [tokens], 0 for padding; null: all are valid
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  Divisor divisor = Divisor::kValidTokens;
};

template <class T>
struct ZLossResult {
  double* loss = nullptr;         // [1]
  double* log_sum_exp = nullptr;  // [tokens], or null; of padding, too
  T* gradient = nullptr;          // [tokens, experts], or null: d loss / d logits = 2 lse softmax(logits) / divisor
};

/// Stretch of tokens whose squares are added up from 0 in their order; the stretch sums are added up in theirs.
inline constexpr std::int64_t kZLossRun = 256;

/// log sum_e exp(l_e) = m + log(sum_e exp(l_e - m)), m the largest: no overflow at any magnitude. All -inf: -inf. Any
/// +inf: +inf. Any NaN: NaN.
MOE_AUDIT_HOST_DEVICE inline double finish_log_sum_exp(bool nan, double largest, double sum) {
  if (nan) return std::bit_cast<double>(std::uint64_t{0x7ff8} << 48);
  return largest - largest == 0.0 ? largest + log_exact_order(sum) : largest;
}

/// Of one row, count >= 1; also m and the sum of the exponentials, in kLanes lanes (elementary.h).
double log_sum_exp(const float* logits, std::int64_t count, double* largest, double* sum);
double log_sum_exp(const double* logits, std::int64_t count, double* largest, double* sum);

/// ST-MoE (arXiv 2202.08906 eq. 5), averaged over the valid tokens (Megatron-LM z_loss_func, transformers' switch and
/// nllb routers); all of them padding: 0. Sums are float64, whatever T. kBadShape, kNullPointer as balance_loss().
Status z_loss(const ZLossArgs<float>& args, const ZLossResult<float>& result);
Status z_loss(const ZLossArgs<double>& args, const ZLossResult<double>& result);

template <class T>
Status check_z_loss(const ZLossArgs<T>& a, const ZLossResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1) return Status::kBadShape;
  return r.loss == nullptr || (a.tokens > 0 && a.logits == nullptr) ? Status::kNullPointer : Status::kOk;
}

}  // namespace moeaudit::kernels

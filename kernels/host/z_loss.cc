// The sum of exponentials in vectors, compiled once per instruction set; lanes never meet but in the written order, so
// the width does not show.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/host/z_loss.cc"
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#include "kernels/host/z_loss.h"

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/host/elementary-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moeaudit::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Adds exp(logits[i] - largest) to lane i mod kLanes.
template <class T>
void add_exponentials(const T* logits, std::int64_t count, double largest, double* lane) {
  const hn::CappedTag<double, 8> d;
  const hn::Rebind<T, decltype(d)> from;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  const auto shift = hn::Set(d, largest);
  std::int64_t i = 0;
  for (; i + width <= count; i += width) {
    hn::Vec<decltype(d)> v;
    if constexpr (sizeof(T) == sizeof(double))
      v = hn::LoadU(d, logits + i);
    else
      v = hn::PromoteTo(d, hn::LoadU(from, logits + i));
    double* to = lane + i % kLanes;
    hn::StoreU(hn::Add(hn::LoadU(d, to), exp_lanes(d, hn::Sub(v, shift))), d, to);
  }
  for (; i < count; ++i) lane[i % kLanes] += exp_exact_order(static_cast<double>(logits[i]) - largest);
}
/// lse[i] = largest[i] + log sum[i], as finish_log_sum_exp() has it, for sums of at least 1.
void add_logarithms(const double* largest, const double* sum, std::int64_t count, double* lse) {
  const hn::CappedTag<double, 8> d;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + width <= count; i += width)
    hn::StoreU(hn::Add(hn::LoadU(d, largest + i), log_lanes(d, hn::LoadU(d, sum + i))), d, lse + i);
  for (; i < count; ++i) lse[i] = largest[i] + log_exact_order(sum[i]);
}
void add_exponentials_f32(const float* logits, std::int64_t count, double largest, double* lane) {
  add_exponentials(logits, count, largest, lane);
}
void add_exponentials_f64(const double* logits, std::int64_t count, double largest, double* lane) {
  add_exponentials(logits, count, largest, lane);
}

}  // namespace moeaudit::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>
#include <vector>

namespace moeaudit::kernels {

HWY_EXPORT(add_exponentials_f32);
HWY_EXPORT(add_exponentials_f64);
HWY_EXPORT(add_logarithms);

namespace {

/// The largest and the sum of a row; whether its result is largest + log sum: else it is finish_log_sum_exp()'s.
template <class T, class Add>
bool sum_of_row(const T* logits, std::int64_t count, double* largest, double* sum, bool* nan, Add add) {
  T m = logits[0];
  *nan = false;
  for (std::int64_t e = 0; e < count; ++e) {
    m = logits[e] > m ? logits[e] : m;
    *nan |= logits[e] != logits[e];
  }
  if (m != m) {  // the first is no number: the largest of the others
    for (std::int64_t e = 0; e < count; ++e) m = logits[e] > m || m != m ? logits[e] : m;
  }
  alignas(64) double lane[kLanes] = {};
  *largest = static_cast<double>(m);
  *sum = 0;
  if (m - m != T(0)) return false;
  add(logits, count, *largest, lane);
  *sum = add_lanes(lane, static_cast<int>(std::min<std::int64_t>(count, kLanes)));
  return !*nan;
}

template <class T, class Add>
double of_row(const T* logits, std::int64_t count, double* largest, double* sum, Add add) {
  bool nan = false;
  sum_of_row(logits, count, largest, sum, &nan, add);
  return finish_log_sum_exp(nan, *largest, *sum);
}

}  // namespace

double log_sum_exp(const float* logits, std::int64_t count, double* largest, double* sum) {
  return of_row(logits, count, largest, sum, HWY_DYNAMIC_DISPATCH(add_exponentials_f32));
}
double log_sum_exp(const double* logits, std::int64_t count, double* largest, double* sum) {
  return of_row(logits, count, largest, sum, HWY_DYNAMIC_DISPATCH(add_exponentials_f64));
}

namespace {

template <class T, class Add>
Status run(const ZLossArgs<T>& a, const ZLossResult<T>& r, Add add) {
  if (const Status status = check_z_loss(a, r); status != Status::kOk) return status;
  const auto is_valid = [&](std::int64_t t) { return a.valid == nullptr || a.valid[t] != 0; };
  std::int64_t valid = 0;
  for (std::int64_t t = 0; t < a.tokens; ++t) valid += is_valid(t);
  const double divisor = static_cast<double>(a.divisor == Divisor::kAllTokens ? a.tokens : valid);
  double total = 0;
  const auto logarithms = HWY_DYNAMIC_DISPATCH(add_logarithms);
  for (std::int64_t first = 0; first < a.tokens; first += kZLossRun) {
    const std::int64_t end = std::min(a.tokens, first + kZLossRun);
    double largests[kZLossRun], sums[kZLossRun], lses[kZLossRun];  // of tokens
    struct Special {
      std::int64_t at;
      double sum, lse;
    };
    std::vector<Special> special;  // not largest + log sum
    for (std::int64_t t = first; t < end; ++t) {
      double &largest = largests[t - first], &sum = sums[t - first];
      bool nan = false;
      if (sum_of_row(a.logits + t * a.experts, a.experts, &largest, &sum, &nan, add)) continue;
      special.push_back({t - first, sum, finish_log_sum_exp(nan, largest, sum)});
      sum = 1;
    }
    logarithms(largests, sums, end - first, lses);
    for (const Special& s : special) sums[s.at] = s.sum, lses[s.at] = s.lse;
    double stretch = 0;
    for (std::int64_t t = first; t < end; ++t) {
      const T* row = a.logits + t * a.experts;
      const double largest = largests[t - first], sum = sums[t - first], lse = lses[t - first];
      if (r.log_sum_exp != nullptr) r.log_sum_exp[t] = lse;
      if (is_valid(t)) stretch += lse * lse;
      if (r.gradient == nullptr) continue;
      for (std::int64_t e = 0; e < a.experts; ++e) {
        r.gradient[t * a.experts + e] =
            is_valid(t)
                ? static_cast<T>(lse / divisor * (2.0 * (exp_exact_order(static_cast<double>(row[e]) - largest) / sum)))
                : T(0);
      }
    }
    total += stretch;
  }
  *r.loss = valid == 0 ? 0.0 : total / divisor;
  return Status::kOk;
}

}  // namespace

Status z_loss(const ZLossArgs<float>& args, const ZLossResult<float>& result) {
  return run(args, result, HWY_DYNAMIC_DISPATCH(add_exponentials_f32));
}
Status z_loss(const ZLossArgs<double>& args, const ZLossResult<double>& result) {
  return run(args, result, HWY_DYNAMIC_DISPATCH(add_exponentials_f64));
}

}  // namespace moeaudit::kernels
#endif  // HWY_ONCE

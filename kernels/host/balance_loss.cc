#include "kernels/host/balance_loss.h"

#include <algorithm>
#include <vector>

namespace moeaudit::kernels {
namespace {

/// Tokens [first, last) of one set.
template <class T>
class Set {
 public:
  Set(const BalanceLossArgs<T>& a, std::int64_t first, std::int64_t last)
      : a_(a),
        first_(first),
        last_(last),
        counts_(static_cast<std::size_t>(a.experts)),
        device_tokens_(static_cast<std::size_t>(a.convention.devices)),
        mean_(static_cast<std::size_t>(a.experts)),
        weight_(static_cast<std::size_t>(a.experts)) {}

  bool count() {
    const std::int64_t on_device = a_.experts / a_.convention.devices;
    const std::int64_t slots = a_.convention.counted == Counted::kFirstChoice ? 1 : a_.top_k;
    std::vector<std::int64_t> seen(device_tokens_.size(), -1);
    for (std::int64_t t = first_; t < last_; ++t) {
      if (a_.valid != nullptr && a_.valid[t] == 0) continue;
      ++valid_;
      if (a_.chosen == nullptr) continue;
      for (std::int64_t j = 0; j < a_.top_k; ++j) {
        const std::int32_t e = a_.chosen[t * a_.top_k + j];
        if (e >= a_.experts) return false;
        if (e < 0) continue;
        if (j < slots) ++counts_[static_cast<std::size_t>(e)];
        const auto d = static_cast<std::size_t>(e / on_device);
        device_tokens_[d] += seen[d] != t;
        seen[d] = t;
      }
    }
    return true;
  }

  void average() {
    std::vector<double> stretch(mean_.size());
    for (std::int64_t t = first_; t < last_;) {
      std::fill(stretch.begin(), stretch.end(), 0.0);
      for (const std::int64_t end = std::min(last_, t + kBalanceRun); t < end; ++t) {
        if (a_.valid != nullptr && a_.valid[t] == 0) continue;
        const T* row = a_.probabilities + t * a_.experts;
        const double sum = balance_token(a_, t, nullptr).sum;
        for (std::int64_t e = 0; e < a_.experts; ++e) stretch[static_cast<std::size_t>(e)] += share_of(row[e], sum);
      }
      for (std::size_t e = 0; e < mean_.size(); ++e) mean_[e] += stretch[e];
    }
    for (double& v : mean_) v = divisor() == 0.0 ? 0.0 : v / divisor();
  }

  double loss(const std::int64_t* counts, std::int64_t counted) {
    const double tokens = counts != nullptr ? static_cast<double>(counted) : divisor();
    balance_weights(a_.convention, a_.experts, a_.top_k, counts != nullptr ? counts : counts_.data(),
                    device_tokens_.data(), tokens, 0, 1, weight_.data());
    double sum = 0;
    for (std::size_t e = 0; e < mean_.size(); ++e) sum += weight_[e] * mean_[e];
    return sum;
  }

  void write_gradient(double share, T* gradient) const {
    for (std::int64_t t = first_; t < last_; ++t) {
      const bool out = (a_.valid != nullptr && a_.valid[t] == 0) || divisor() == 0.0;
      T* row = gradient + t * a_.experts;
      if (out) {
        std::fill_n(row, a_.experts, T(0));
        continue;
      }
      const BalanceToken token = balance_token(a_, t, weight_.data());
      for (std::int64_t e = 0; e < a_.experts; ++e)
        row[e] = static_cast<T>(balance_gradient(token, share, weight_[static_cast<std::size_t>(e)], divisor()));
    }
  }

  const std::vector<std::int64_t>& counts() const { return counts_; }
  const std::vector<double>& mean() const { return mean_; }

 private:
  /// Tokens that the means divide by; 0 for a set without valid tokens.
  double divisor() const {
    if (valid_ == 0) return 0.0;
    return static_cast<double>(a_.convention.divisor == Divisor::kAllTokens ? last_ - first_ : valid_);
  }

  const BalanceLossArgs<T>& a_;
  std::int64_t first_, last_, valid_ = 0;
  std::vector<std::int64_t> counts_, device_tokens_;
  std::vector<double> mean_, weight_;
};

template <class T>
Status run(const BalanceLossArgs<T>& a, const BalanceLossResult<T>& r) {
  if (const Status status = check_balance_loss(a, r); status != Status::kOk) return status;
  for (std::int64_t s = 0; a.sets != nullptr && s <= a.num_sets; ++s) {
    const bool ends = (s > 0 || a.sets[0] == 0) && (s < a.num_sets || a.sets[s] == a.tokens);
    if (!ends || (s > 0 && a.sets[s] < a.sets[s - 1])) return Status::kBadShape;
  }
  const double share = a.convention.over_sets == OverSets::kMean ? 1.0 / static_cast<double>(a.num_sets) : 1.0;
  double sum = 0;
  for (std::int64_t s = 0; s < a.num_sets; ++s) {
    Set<T> set(a, a.sets != nullptr ? a.sets[s] : 0, a.sets != nullptr ? a.sets[s + 1] : a.tokens);
    if (!set.count()) return Status::kBadShape;
    set.average();
    const double loss = set.loss(a.counts != nullptr ? a.counts + s * a.experts : nullptr,
                                 a.counts != nullptr ? a.counted_tokens[s] : 0);
    sum += loss;
    if (r.set_loss != nullptr) r.set_loss[s] = loss;
    if (r.counts != nullptr) std::copy(set.counts().begin(), set.counts().end(), r.counts + s * a.experts);
    if (r.mean_probability != nullptr)
      std::copy(set.mean().begin(), set.mean().end(), r.mean_probability + s * a.experts);
    if (r.gradient != nullptr) set.write_gradient(share, r.gradient);
  }
  *r.loss = share * sum;
  return Status::kOk;
}

}  // namespace

Status balance_loss(const BalanceLossArgs<float>& args, const BalanceLossResult<float>& result) {
  return run(args, result);
}
Status balance_loss(const BalanceLossArgs<double>& args, const BalanceLossResult<double>& result) {
  return run(args, result);
}

}  // namespace moeaudit::kernels

// The terms of an entropy in vectors, compiled once per instruction set; the sum over them is in the written order.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/host/expert_load.cc"
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#include "kernels/host/expert_load.h"

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/host/elementary-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moeaudit::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// terms[i] = entropy_term(p[i])
template <class T>
void entropy_terms(const T* p, std::int64_t count, double* terms) {
  const hn::CappedTag<double, 8> d;
  const hn::Rebind<T, decltype(d)> from;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  const auto smallest = hn::Set(d, 0x1p-1022), largest = hn::Set(d, 0x1.fffffffffffffp1023);
  std::int64_t i = 0;
  for (; i + width <= count; i += width) {
    hn::Vec<decltype(d)> v;
    if constexpr (sizeof(T) == sizeof(double))
      v = hn::LoadU(d, p + i);
    else
      v = hn::PromoteTo(d, hn::LoadU(from, p + i));
    if (hn::AllTrue(d, hn::And(hn::Ge(v, smallest), hn::Le(v, largest)))) {
      hn::StoreU(hn::Mul(hn::Neg(v), log_lanes(d, v)), d, terms + i);
    } else {
      for (std::int64_t j = i; j < i + width; ++j) terms[j] = entropy_term(static_cast<double>(p[j]));
    }
  }
  for (; i < count; ++i) terms[i] = entropy_term(static_cast<double>(p[i]));
}
void entropy_terms_f32(const float* p, std::int64_t count, double* terms) { entropy_terms(p, count, terms); }
void entropy_terms_f64(const double* p, std::int64_t count, double* terms) { entropy_terms(p, count, terms); }

}  // namespace moeaudit::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/host/elementary.h"
#include "kernels/host/gaussian.h"

namespace moeaudit::kernels {

HWY_EXPORT(entropy_terms_f32);
HWY_EXPORT(entropy_terms_f64);

namespace {

void entropy_terms(const float* p, std::int64_t n, double* to) { HWY_DYNAMIC_DISPATCH(entropy_terms_f32)(p, n, to); }
void entropy_terms(const double* p, std::int64_t n, double* to) { HWY_DYNAMIC_DISPATCH(entropy_terms_f64)(p, n, to); }

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- counts

/// Four tables by position, so that equal ids in a row do not wait for one another; the last place takes what is no
/// expert.
template <class Id>
class Histogram {
 public:
  explicit Histogram(std::int64_t experts)
      : experts_(static_cast<std::uint32_t>(experts)), tables_(4 * static_cast<std::size_t>(experts + 1)) {}

  void add(const Id* ids, std::int64_t n) {
    std::uint32_t* const t = tables_.data();
    const std::uint32_t stride = experts_ + 1;
    std::int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      ++t[place(ids[i])];
      ++t[stride + place(ids[i + 1])];
      ++t[2 * stride + place(ids[i + 2])];
      ++t[3 * stride + place(ids[i + 3])];
    }
    for (; i < n; ++i) ++t[place(ids[i])];
  }

  void move_to(std::int64_t* counts, std::int64_t* outside) {
    for (std::uint32_t e = 0; e <= experts_; ++e) {
      std::int64_t sum = 0;
      for (std::uint32_t table = 0; table < 4; ++table) {
        std::uint32_t& c = tables_[table * (experts_ + 1) + e];
        sum += c;
        c = 0;
      }
      if (e < experts_)
        counts[e] += sum;
      else
        *outside += sum;
    }
  }

 private:
  std::uint32_t place(Id id) const {
    return std::min(static_cast<std::uint32_t>(static_cast<std::int32_t>(id)), experts_);
  }

  std::uint32_t experts_;
  std::vector<std::uint32_t> tables_;
};

template <class Id>
Status count(const CountArgs<Id>& a, std::int64_t* counts, std::int64_t* outside) {
  if (const Status status = check_count(a, counts, outside); status != Status::kOk) return status;
  if (a.experts > std::numeric_limits<std::int32_t>::max() / 8) return Status::kBadShape;
  std::fill(counts, counts + a.experts, 0);
  *outside = 0;
  Histogram<Id> histogram(a.experts);
  constexpr std::int64_t kMost = std::int64_t{1} << 31;  // before a 32-bit count could overflow
  std::int64_t since = 0;
  for (std::int64_t t = 0; t < a.tokens;) {
    std::int64_t end = a.tokens;
    if (a.valid != nullptr) {
      while (t < end && a.valid[t] == 0) ++t;
      std::int64_t run = t;
      while (run < a.tokens && a.valid[run] != 0) ++run;
      end = run;
    }
    end = std::min(end, t + std::max<std::int64_t>(1, kMost / a.top_k));
    histogram.add(a.chosen + t * a.top_k, (end - t) * a.top_k);
    since += (end - t) * a.top_k;
    t = end;
    if (since >= kMost) histogram.move_to(counts, outside), since = 0;
  }
  histogram.move_to(counts, outside);
  return Status::kOk;
}

// ---- statistics

struct Spread {
  double max_violation = kNan, cv = kNan;
};
/// Of counts of which none is negative; nullopt: more than an int64 holds.
std::optional<std::int64_t> sum_of(const std::int64_t* counts, std::int64_t n) {
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    if (__builtin_add_overflow(sum, counts[i], &sum)) return std::nullopt;
  }
  return sum;
}

Spread spread_of(const std::vector<std::int64_t>& counts) {
  std::int64_t sum = 0, largest = 0;
  for (const std::int64_t n : counts) sum += n, largest = std::max(largest, n);
  if (sum == 0) return {};
  const double experts = static_cast<double>(counts.size()), fair = static_cast<double>(sum) / experts;
  double squares = 0;
  for (const std::int64_t n : counts) squares += (static_cast<double>(n) - fair) * (static_cast<double>(n) - fair);
  return {(static_cast<double>(largest) - fair) / fair, std::sqrt(squares / experts) / fair};
}

Interval middle_95(std::vector<double> v) {
  if (v.empty()) return {kNan, kNan};
  std::sort(v.begin(), v.end());
  const auto at = [&](double share) { return v[static_cast<std::size_t>(share * static_cast<double>(v.size() - 1))]; };
  return {at(0.025), at(0.975)};
}

template <class T>
Status route_statistics(const RoutingStatisticsArgs<T>& a, RoutingStatistics* out) {
  if (const Status status = check_routing_statistics(a, out); status != Status::kOk) return status;
  for (std::int64_t i = 0; i < a.tokens * a.top_k; ++i) {
    const bool counts = a.valid == nullptr || a.valid[i / a.top_k] != 0;
    if (counts && (a.chosen[i] < 0 || a.chosen[i] >= a.experts)) return Status::kBadShape;
  }
  const auto experts = static_cast<std::size_t>(a.experts);
  std::vector<double> sums(experts + 2), stretch(experts + 2);  // and those of entropy and mass
  std::vector<double> terms(experts);
  std::int64_t tokens = 0;
  for (std::int64_t t = 0; t < a.tokens;) {
    std::fill(stretch.begin(), stretch.end(), 0.0);
    for (const std::int64_t end = std::min(a.tokens, t + kBalanceRun); t < end; ++t) {
      if (a.valid != nullptr && a.valid[t] == 0) continue;
      ++tokens;
      const T* p = a.probabilities + t * a.experts;
      for (std::size_t e = 0; e < experts; ++e) stretch[e] += static_cast<double>(p[e]);
      entropy_terms(p, a.experts, terms.data());
      double entropy = 0;
      for (const double term : terms) entropy += term;
      stretch[experts] += entropy;
      stretch[experts + 1] += chosen_mass(a, t);
    }
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += stretch[i];
  }
  *out = finish_routing_statistics(sums.data(), a.experts, sums[experts], sums[experts + 1], tokens);
  return Status::kOk;
}

}  // namespace

Status count_choices(const CountArgs<std::int16_t>& a, std::int64_t* counts, std::int64_t* outside) {
  return count(a, counts, outside);
}
Status count_choices(const CountArgs<std::int32_t>& a, std::int64_t* counts, std::int64_t* outside) {
  return count(a, counts, outside);
}

Status load_statistics(const std::int64_t* counts, std::int64_t experts, std::int64_t top_k, std::int64_t tokens,
                       LoadStatistics* out) {
  if (experts < 1 || tokens < 0) return Status::kBadShape;
  if (top_k < 1 || top_k > experts) return Status::kBadTopK;
  if (counts == nullptr || out == nullptr) return Status::kNullPointer;
  std::vector<std::int64_t> sorted(counts, counts + experts);
  std::sort(sorted.begin(), sorted.end());
  if (sorted.front() < 0) return Status::kBadShape;
  const std::optional<std::int64_t> choices = sum_of(counts, experts);
  if (!choices) return Status::kBadShape;
  *out = {};
  out->choices = *choices;
  const double e = static_cast<double>(experts), sum = static_cast<double>(out->choices), fair = sum / e;
  const Spread spread = spread_of({counts, counts + experts});
  out->fair_share = fair;
  out->max_violation = spread.max_violation;
  out->cv_population = spread.cv;
  out->cv_sample = experts > 1 ? spread.cv * std::sqrt(e / (e - 1)) : kNan;
  out->min_violation = out->choices == 0 ? kNan : (fair - static_cast<double>(sorted.front())) / fair;
  double entropy = 0, gini = 0;
  for (std::int64_t i = 0; i < experts; ++i) {
    const double q = static_cast<double>(counts[i]) / sum;
    entropy += counts[i] == 0 ? 0.0 : -q * log_exact_order(q);
    gini +=
        (2.0 * static_cast<double>(i + 1) - e - 1) * (static_cast<double>(sorted[static_cast<std::size_t>(i)]) / sum);
    out->idle += counts[i] == 0;
    out->below_tenth += static_cast<double>(counts[i]) < 0.1 * fair;
    out->below_permille += q < 0.001;
    out->below_half_percent += q < 0.005;
  }
  const double most = log_exact_order(e);
  out->entropy = out->choices == 0 ? kNan : entropy;
  out->normalised_entropy = experts == 1 && out->choices > 0 ? 1.0 : out->entropy / most;
  out->effective_experts = exp_exact_order(out->entropy);
  out->kl_to_uniform = most - out->entropy;
  out->gini = gini / e;
  const double k = static_cast<double>(top_k), variance = e / k * (1 - k / e) / static_cast<double>(tokens);
  out->cv_floor = std::sqrt(variance);
  out->max_violation_floor = std::sqrt(2 * most * variance);
  out->can_judge = fair >= 100;
  out->idle_is_dead = 0.1 * fair > 6.9;
  return Status::kOk;
}

std::int64_t drawn_block(std::uint64_t seed, std::int64_t i, std::int64_t blocks) {
  const auto n = static_cast<std::uint64_t>(i);
  const std::uint32_t r = philox4x32({static_cast<std::uint32_t>(n), static_cast<std::uint32_t>(n >> 32), 0, 0},
                                     {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)})[0];
  return static_cast<std::int64_t>(static_cast<double>(r) * 0x1p-32 * static_cast<double>(blocks));
}

Status load_intervals(const std::int64_t* counts, std::int64_t blocks, std::int64_t experts, std::int64_t draws,
                      std::uint64_t seed, LoadIntervals* out) {
  if (blocks < 2 || blocks >= (std::int64_t{1} << 31) || experts < 1 || draws < 40) return Status::kBadShape;
  if (counts == nullptr || out == nullptr) return Status::kNullPointer;
  if (std::any_of(counts, counts + blocks * experts, [](std::int64_t n) { return n < 0; })) return Status::kBadShape;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::optional<std::int64_t> of_block = sum_of(counts + b * experts, experts);
    if (!of_block || *of_block > std::numeric_limits<std::int64_t>::max() / blocks) return Status::kBadShape;
  }
  std::vector<double> most, least, cvs, entropies, ginis;
  std::vector<std::int64_t> sum(static_cast<std::size_t>(experts));
  for (std::int64_t d = 0; d < draws; ++d) {
    std::fill(sum.begin(), sum.end(), 0);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t drawn = drawn_block(seed, d * blocks + b, blocks);
      for (std::int64_t e = 0; e < experts; ++e) sum[static_cast<std::size_t>(e)] += counts[drawn * experts + e];
    }
    LoadStatistics s;
    if (const Status status = load_statistics(sum.data(), experts, 1, 1, &s); status != Status::kOk) return status;
    if (s.choices == 0) continue;
    most.push_back(s.max_violation);
    least.push_back(s.min_violation);
    cvs.push_back(s.cv_population);
    entropies.push_back(s.normalised_entropy);
    ginis.push_back(s.gini);
  }
  *out = {middle_95(std::move(most)), middle_95(std::move(least)), middle_95(std::move(cvs)),
          middle_95(std::move(entropies)), middle_95(std::move(ginis))};
  return Status::kOk;
}

Status routing_statistics(const RoutingStatisticsArgs<float>& a, RoutingStatistics* out) {
  return route_statistics(a, out);
}
Status routing_statistics(const RoutingStatisticsArgs<double>& a, RoutingStatistics* out) {
  return route_statistics(a, out);
}

Status co_activation(const CountArgs<std::int32_t>& a, std::int64_t* together) {
  std::int64_t outside = 0;
  if (const Status status = check_count(a, together, &outside); status != Status::kOk) return status;
  std::fill(together, together + a.experts * a.experts, 0);
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    if (a.valid != nullptr && a.valid[t] == 0) continue;
    const std::int32_t* chosen = a.chosen + t * a.top_k;
    for (std::int64_t i = 0; i < a.top_k; ++i) {
      for (std::int64_t j = 0; j < a.top_k; ++j) {
        if (is_pair(chosen, i, j, a.experts)) ++together[chosen[i] * a.experts + chosen[j]];
      }
    }
  }
  return Status::kOk;
}

}  // namespace moeaudit::kernels
#endif  // HWY_ONCE

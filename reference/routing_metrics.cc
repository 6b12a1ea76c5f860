// Metrics of routing in float64 on LibTorch.
#include "reference/routing_metrics.h"

#include <ATen/ATen.h>

#include <bitset>
#include <cmath>
#include <limits>

#include "reference/expert_load.h"

namespace moeaudit::reference {
namespace {

/// 1 where an expert is in a token's set: [T, E].
at::Tensor members(const at::Tensor& chosen, std::int64_t experts) {
  return (at::one_hot(chosen.clamp_min(0), experts) * chosen.ge(0).unsqueeze(-1)).sum(1).to(at::kDouble);
}

double entropy(const at::Tensor& counts) {
  const at::Tensor q = counts.to(at::kDouble) / counts.sum();
  return -(q * at::log(at::where(q.gt(0), q, at::ones_like(q)))).sum().item<double>();
}

}  // namespace

at::Tensor routing_margins(const at::Tensor& choice, const at::Tensor& chosen) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const at::Tensor v = choice.to(at::kDouble), in = members(chosen, v.size(1)).gt(0);
  const at::Tensor least = v.masked_fill(in.logical_not(), kInf).amin(1), most = v.masked_fill(in, -kInf).amax(1);
  return least - most;
}

std::map<std::string, double> agreement(const at::Tensor& now, const at::Tensor& then, std::int64_t experts,
                                        bool with_chance) {
  const at::Tensor a = members(now, experts), b = members(then, experts);
  const at::Tensor both = (a * b).sum(1), either = at::maximum(a, b).sum(1), some = either.gt(0);
  std::map<std::string, double> s;
  s["saturation"] = both.sum().item<double>() / b.sum().item<double>();
  s["changed"] = 1 - s["saturation"];
  s["jaccard"] = (both.index({some}) / either.index({some})).mean().item<double>();
  s["identical"] = a.eq(b).all(1).to(at::kDouble).mean().item<double>();
  const at::Tensor first = now.select(1, 0), other = then.select(1, 0);
  s["same_first"] = first.eq(other).logical_and(first.ge(0)).to(at::kDouble).mean().item<double>();
  if (!with_chance) return s;
  double pairs = 0, jaccard = 0, retained = 0;
  for (std::uint64_t x = 0; x < std::uint64_t{1} << experts; ++x) {
    for (std::uint64_t y = 0; y < std::uint64_t{1} << experts; ++y) {
      const auto size = [](std::uint64_t v) { return static_cast<std::int64_t>(std::bitset<64>(v).count()); };
      if (size(x) != now.size(1) || size(y) != then.size(1)) continue;
      pairs += 1;
      jaccard += static_cast<double>(size(x & y)) / static_cast<double>(size(x | y));
      retained += static_cast<double>(size(x & y)) / static_cast<double>(size(y));
    }
  }
  s["jaccard_chance"] = jaccard / pairs;
  s["saturation_chance"] = retained / pairs;
  return s;
}

at::Tensor count_by_label(const at::Tensor& chosen, const at::Tensor& labels, std::int64_t num_labels,
                          std::int64_t experts) {
  const at::Tensor known = labels.ge(0).logical_and(labels.lt(num_labels));
  const at::Tensor by = at::one_hot(labels.clamp(0, num_labels - 1), num_labels) * known.unsqueeze(-1);  // [T, L]
  const at::Tensor in = chosen.ge(0).logical_and(chosen.lt(experts));
  const at::Tensor of = (at::one_hot(chosen.clamp(0, experts - 1), experts) * in.unsqueeze(-1)).sum(1);  // [T, E]
  return at::mm(by.t().to(at::kDouble), of.to(at::kDouble)).to(at::kLong);
}

at::Tensor count_settled(const at::Tensor& first) {
  const std::int64_t checkpoints = first.size(0);
  // From below: as long as the product of equalities is 1, the choice is the last one's.
  const at::Tensor same = first.eq(first[checkpoints - 1]).to(at::kLong).flip(0).cumprod(0).sum(0);
  return at::bincount(checkpoints - same, {}, checkpoints);
}

at::Tensor order_statistics(const at::Tensor& values, const at::Tensor& shares) {
  const at::Tensor rank = at::floor(shares * static_cast<double>(values.numel() - 1)).to(at::kLong);
  return std::get<0>(values.sort()).index_select(0, rank);
}

std::map<std::string, double> load_scopes(const at::Tensor& counts) {
  std::map<std::string, double> s;
  const auto mean = [&](const std::string& scope, const at::Tensor& windows) {
    for (std::int64_t i = 0; i < windows.size(0); ++i) {
      const auto one = load_statistics(windows[i]);
      s[scope + "_max_violation"] += one.at("max_violation") / static_cast<double>(windows.size(0));
      s[scope + "_cv"] += one.at("cv_population") / static_cast<double>(windows.size(0));
    }
  };
  mean("micro", counts.flatten(0, 1));
  mean("step", counts.sum(1));
  mean("pooled", counts.sum(1).sum(0, true));
  return s;
}

double coverage(const at::Tensor& counts, std::int64_t busiest) {
  const at::Tensor sorted = std::get<0>(counts.to(at::kDouble).sort(0, true));
  return (sorted.narrow(0, 0, busiest).sum() / sorted.sum()).item<double>();
}

std::map<std::string, double> placement_load(const at::Tensor& counts, const at::Tensor& slot_expert,
                                             const at::Tensor& slot_rank, const at::Tensor& speed, std::int64_t top_k,
                                             std::int64_t tokens, at::Tensor* loads) {
  const std::int64_t experts = counts.size(0), ranks = speed.size(0);
  // Part of an expert that lies on a rank, [R, E].
  const at::Tensor copies =
      at::mm(at::one_hot(slot_rank, ranks).t().to(at::kDouble), at::one_hot(slot_expert, experts).to(at::kDouble));
  const at::Tensor part = copies / copies.sum(0, true), load = at::mv(part, counts.to(at::kDouble));
  const at::Tensor time = load / speed;
  if (loads != nullptr) *loads = load;
  std::map<std::string, double> s;
  s["ideal"] = counts.sum().item<double>() / speed.sum().item<double>();
  s["slowest"] = time.max().item<double>();
  s["slowest_rank"] = static_cast<double>(time.argmax().item<std::int64_t>());
  s["max_over_mean"] = s["slowest"] / s["ideal"];
  s["idle_ranks"] = load.eq(0).sum().item<double>();
  // An even router: a token sends a rank the sum of the parts of k experts, drawn without replacement. Its variance is k
  // times that of one, times (E - k) / (E - 1) (Cochran, Sampling Techniques, section 2.5).
  const double n = static_cast<double>(experts), k = static_cast<double>(top_k), r = static_cast<double>(ranks);
  const at::Tensor mean = k * part.mean(1), variance = k * part.var(1, /*unbiased=*/false) * (experts > 1 ? (n - k) / (n - 1) : 0.0);
  // The mean of T tokens lies sqrt(2 ln R / T) standard deviations above its own, at the worst of R ranks.
  const at::Tensor worst = tokens > 0 ? mean + at::sqrt(variance * (2 * std::log(r) / static_cast<double>(tokens))) : mean;
  s["even_router"] = (worst / k / (speed / speed.sum())).max().item<double>();
  return s;
}

double mutual_information(const at::Tensor& table) {
  return entropy(table.sum(1)) + entropy(table.sum(0)) - entropy(table.reshape({-1}));
}

at::Tensor lift(const at::Tensor& table) {
  const at::Tensor n = table.to(at::kDouble);
  return n * n.sum() / (n.sum(1, true) * n.sum(0, true));
}

}  // namespace moeaudit::reference

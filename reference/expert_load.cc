// Statistics of expert load in float64 on LibTorch.
#include "reference/expert_load.h"

#include <ATen/ATen.h>

#include <cmath>
#include <vector>

namespace moeaudit::reference {
namespace {

/// -sum p ln p over the last dimension, 0 ln 0 = 0.
at::Tensor entropy(const at::Tensor& p) { return at::where(p.eq(0), at::zeros_like(p), -p * at::log(p)).sum(-1); }

}  // namespace

at::Tensor count_choices(const at::Tensor& chosen, std::int64_t experts) {
  const at::Tensor flat = chosen.reshape({-1});
  return at::bincount(flat.masked_select(flat.ge(0).logical_and(flat.lt(experts))), {}, experts);
}

std::map<std::string, double> load_statistics(const at::Tensor& counts) {
  const at::Tensor n = counts.to(at::kDouble), q = n / n.sum();
  const double experts = static_cast<double>(n.numel()), fair = n.mean().item<double>();
  std::map<std::string, double> s;
  s["max_violation"] = (n.max().item<double>() - fair) / fair;
  s["min_violation"] = (fair - n.min().item<double>()) / fair;
  s["cv_population"] = n.std(/*unbiased=*/false).item<double>() / fair;
  s["cv_sample"] = n.std(/*unbiased=*/true).item<double>() / fair;
  s["entropy"] = entropy(q).item<double>();
  s["normalised_entropy"] = s["entropy"] / std::log(experts);
  s["effective_experts"] = std::exp(s["entropy"]);
  s["kl_to_uniform"] = at::where(q.gt(0), q * at::log(q * experts), at::zeros_like(q)).sum().item<double>();
  s["gini"] = (n.unsqueeze(0) - n.unsqueeze(1)).abs().sum().item<double>() /
              (2 * experts * experts * fair);  // mean absolute difference
  s["idle"] = n.eq(0).sum().item<double>();
  s["below_tenth"] = n.lt(0.1 * fair).sum().item<double>();
  s["below_permille"] = q.lt(0.001).sum().item<double>();
  s["below_half_percent"] = q.lt(0.005).sum().item<double>();
  return s;
}

std::map<std::string, std::pair<double, double>> load_intervals(const at::Tensor& counts, const at::Tensor& drawn) {
  std::map<std::string, std::vector<double>> seen;
  for (std::int64_t d = 0; d < drawn.size(0); ++d) {
    for (const auto& [name, value] : load_statistics(counts.index_select(0, drawn[d]).sum(0))) seen[name].push_back(value);
  }
  std::map<std::string, std::pair<double, double>> intervals;
  for (auto& [name, values] : seen) {
    const at::Tensor sorted = std::get<0>(at::tensor(values, at::kDouble).sort());
    const auto at_share = [&](double share) {
      return sorted[static_cast<std::int64_t>(std::floor(share * static_cast<double>(values.size() - 1)))].item<double>();
    };
    intervals[name] = {at_share(0.025), at_share(0.975)};
  }
  return intervals;
}

std::map<std::string, double> routing_statistics(const at::Tensor& probabilities, const at::Tensor& chosen) {
  const at::Tensor p = probabilities.to(at::kDouble);
  const double most = std::log(static_cast<double>(p.size(1)));
  const double of_tokens = entropy(p).mean().item<double>(), of_mean = entropy(p.mean(0)).item<double>();
  return {{"token_entropy", of_tokens / most},
          {"mean_entropy", of_mean / most},
          {"mutual_information", of_mean - of_tokens},
          {"confidence", p.gather(1, chosen).sum(1).mean().item<double>()}};
}

at::Tensor co_activation(const at::Tensor& chosen, std::int64_t experts) {
  const at::Tensor in = chosen.ge(0).logical_and(chosen.lt(experts));
  const at::Tensor member =
      (at::one_hot(chosen.clamp(0, experts - 1), experts) * in.unsqueeze(-1)).sum(1).to(at::kDouble);  // [T, E]
  return member.t().matmul(member).to(at::kLong);
}

}  // namespace moeaudit::reference

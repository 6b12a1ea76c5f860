// Statistics of expert load in float64 on LibTorch: the truth that kernels/host/expert_load.h answers to, by the
// definitions.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace moeaudit::reference {

/// counts int64 [E] of the choices int64 [...] in 0..E-1; others are left out.
at::Tensor count_choices(const at::Tensor& chosen, std::int64_t experts);

/// max_violation, min_violation, cv_population, cv_sample, entropy, normalised_entropy, effective_experts,
/// kl_to_uniform, gini, idle, below_tenth, below_permille, below_half_percent of counts [E], as the header of the kernel
/// defines them.
std::map<std::string, double> load_statistics(const at::Tensor& counts);

/// The 2.5 and 97.5 % order statistics of each of them over the draws: counts [B, E], drawn int64 [D, B] of blocks.
std::map<std::string, std::pair<double, double>> load_intervals(const at::Tensor& counts, const at::Tensor& drawn);

/// token_entropy, mean_entropy, mutual_information, confidence of probabilities [T, E] and chosen int64 [T, k].
std::map<std::string, double> routing_statistics(const at::Tensor& probabilities, const at::Tensor& chosen);

/// together int64 [E, E] of chosen [T, k], ids that are no expert left out.
at::Tensor co_activation(const at::Tensor& chosen, std::int64_t experts);

}  // namespace moeaudit::reference

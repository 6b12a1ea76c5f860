// Regularisers of the router in float64 on LibTorch: the truth that kernels/host/router_regularisers.h answers to, by
// the formulas of the papers; masks and sorts, no loops over tokens. Every function returns a differentiable scalar.
//
// Symbols: T tokens, E experts, k choices, d hidden. `valid` [T] or undefined: padding is 0.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moeaudit::reference {

struct CvOptions {
  bool sample = false;  // over E - 1
  double eps = 0;       // added to the squared mean
};
/// variance / (mean^2 + eps) of values [E]; one value with `sample`: 0.
at::Tensor cv_squared(const at::Tensor& values, const CvOptions& options);

/// CV^2 of sum_t gates: arXiv 1701.06538 equations 6 and 7. gates [T, k] of the experts chosen int64 [T, k] (negative:
/// dropped), or [T, E] where chosen is undefined.
at::Tensor importance_loss(const at::Tensor& gates, const at::Tensor& chosen, std::int64_t experts,
                           const CvOptions& options, const at::Tensor& valid = {});

/// P [T, E] = Phi((clean - threshold) / stddev), stddev = softplus(raw) + added (raw undefined: added), the threshold
/// the k-th largest of clean + noise stddev without the expert itself, or of all of them: arXiv 1701.06538 equations 8
/// and 9. k = E without the expert itself: ones.
at::Tensor load_probabilities(const at::Tensor& clean, const at::Tensor& noise, const at::Tensor& raw, double added,
                              std::int64_t top_k, bool last_chosen = false);
/// CV^2 of sum_t P: equations 10 and 11.
at::Tensor load_loss(const at::Tensor& probabilities, const CvOptions& options, const at::Tensor& valid = {});

/// Mean over tokens of H(softmax(logits)), or H of the mean; nats.
at::Tensor routing_entropy(const at::Tensor& logits, bool of_mean, const at::Tensor& valid = {});

/// Entry-wise |W W^T - I|_1, W [E, d]: arXiv 2506.14038; or the sum of squares.
at::Tensor gate_orthogonality(const at::Tensor& w, bool squared = false);

enum class Overlap { kProjection, kSquaredProjection, kCosine };
/// outputs [T, k, d], present bool [T, k] or undefined. Sum over tokens and ordered pairs j != k of the length of the
/// projection of x_j on x_k, <x_j, x_k> / (<x_k, x_k> + eps) x_k (arXiv 2505.22323), of its square, or of the cosine;
/// `mean`: over the pairs of a token, then over the tokens that have one.
at::Tensor expert_overlap(const at::Tensor& outputs, const at::Tensor& present, Overlap overlap, double eps, bool mean,
                          const at::Tensor& valid = {});

/// -(1 / E) sum (scores - their mean over tokens)^2: arXiv 2505.22323; `mean`: divided by the valid tokens.
at::Tensor score_variance(const at::Tensor& scores, bool mean, const at::Tensor& valid = {});

}  // namespace moeaudit::reference

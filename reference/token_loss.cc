// Cross-entropy in float64 on LibTorch.
#include "reference/token_loss.h"

#include <ATen/ATen.h>

namespace moeaudit::reference {
namespace {

at::Tensor quotient(const at::Tensor& s, const at::Tensor& n) {
  return at::where(n.gt(0), s / n.clamp_min(1), at::zeros_like(s));
}

}  // namespace

at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels) {
  const at::Tensor counts = labels.ne(-100);
  const at::Tensor picked = at::log_softmax(logits.to(at::kDouble), -1)
                                .gather(1, at::where(counts, labels, at::zeros_like(labels)).unsqueeze(1))
                                .squeeze(1);
  return -at::where(counts, picked, at::zeros_like(picked)).sum();
}

at::Tensor normalised(Normalisation how, const at::Tensor& sums, const at::Tensor& labels) {
  const at::Tensor n = labels.to(at::kDouble);
  const auto ranks = static_cast<double>(n.size(0)), steps = static_cast<double>(n.size(1));
  const at::Tensor right = sums.sum() / n.sum();
  switch (how) {
    case Normalisation::kTokens: return right;
    case Normalisation::kMeanOfMeans: return quotient(sums, n).mean();
    case Normalisation::kMeansSummed: return quotient(sums, n).sum(1).mean();
    case Normalisation::kMeansDividedTwice: return quotient(sums, n).mean() / steps;
    case Normalisation::kTokensTimesSteps: return right * steps;
    case Normalisation::kTokensDividedTwice: return right / steps;
    case Normalisation::kTokensOfRank: return quotient(sums.sum(1), n.sum(1)).mean();
    case Normalisation::kTokensTimesRanks: return right * ranks;
    case Normalisation::kTokensOverRanks: return right / ranks;
    case Normalisation::kSum: return sums.sum();
  }
  return right;
}

at::Tensor joined_terms(TermWeight how, const StepShape& s, const at::Tensor& terms, const at::Tensor& tokens,
                        const at::Tensor& labels) {
  const at::Tensor t = tokens.to(at::kDouble), n = labels.to(at::kDouble);
  const auto steps = static_cast<double>(t.size(1));
  const auto tp = static_cast<double>(s.tensor_parallel), cp = static_cast<double>(s.context_parallel);
  const auto by_tokens = [&](const at::Tensor& counted) { return (terms * counted).sum() / n.sum(); };
  switch (how) {
    case TermWeight::kMean: return terms.mean();
    case TermWeight::kSummed: return terms.sum(1).mean();
    case TermWeight::kOverTokens: return (terms / steps).sum() / n.sum();
    case TermWeight::kTokensOfShard: return by_tokens(t / (tp * cp));
    case TermWeight::kTokensOfSequence: return by_tokens(t / static_cast<double>(s.sequences));
    case TermWeight::kTokensReducedTwice: return by_tokens(t * tp * cp);
    case TermWeight::kWithoutContext: return (terms / steps).sum(1).mean() / cp;
    case TermWeight::kAllTokens: return by_tokens(t);
    case TermWeight::kDividedTwice: return (terms / steps).sum(1).mean() / steps;
    case TermWeight::kScaleOfLast: return by_tokens(n.narrow(1, n.size(1) - 1, 1));
    case TermWeight::kOverExpertRanks: return terms.mean(1).sum() / (static_cast<double>(t.size(0)) / static_cast<double>(s.expert_parallel));
  }
  return terms.mean();
}

}  // namespace moeaudit::reference

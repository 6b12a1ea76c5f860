#include "kernels/host/token_loss.h"

#include <algorithm>

namespace moeaudit::kernels {
namespace {

template <class T>
Status run(const CrossEntropyArgs<T>& a, const CrossEntropyResult<T>& r) {
  if (const Status status = check_cross_entropy(a, r); status != Status::kOk) return status;
  double total = 0;
  std::int64_t labels = 0;
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    if (a.labels[t] != kIgnored && (a.labels[t] < 0 || a.labels[t] >= a.vocabulary)) return Status::kBadShape;
  }
  for (std::int64_t t = 0; t < a.tokens;) {
    double stretch = 0;
    for (const std::int64_t end = std::min(a.tokens, t + kZLossRun); t < end; ++t) {
      const T* row = a.logits + t * a.vocabulary;
      const bool counts = a.labels[t] != kIgnored;
      double largest = 0, sum = 0;
      const double lse = log_sum_exp(row, a.vocabulary, &largest, &sum);
      const double loss = counts ? lse - static_cast<double>(row[a.labels[t]]) : 0.0;
      labels += counts;
      stretch += loss;
      if (r.token_loss != nullptr) r.token_loss[t] = loss;
      if (r.gradient == nullptr) continue;
      for (std::int64_t v = 0; v < a.vocabulary; ++v) {
        const double p = exp_exact_order(static_cast<double>(row[v]) - largest) / sum;
        r.gradient[t * a.vocabulary + v] =
            counts ? static_cast<T>(a.weight * (p - (v == a.labels[t] ? 1.0 : 0.0))) : T(0);
      }
    }
    total += stretch;
  }
  *r.sum = total;
  *r.labels = labels;
  return Status::kOk;
}

}  // namespace

Status cross_entropy(const CrossEntropyArgs<float>& args, const CrossEntropyResult<float>& result) {
  return run(args, result);
}
Status cross_entropy(const CrossEntropyArgs<double>& args, const CrossEntropyResult<double>& result) {
  return run(args, result);
}

Status normalise(Normalisation how, const double* sums, const std::int64_t* labels, std::int64_t ranks,
                 std::int64_t micro_batches, double* loss, double* weight) {
  if (ranks < 1 || micro_batches < 1) return Status::kBadShape;
  if (sums == nullptr || labels == nullptr || loss == nullptr) return Status::kNullPointer;
  const double m = static_cast<double>(micro_batches), w = static_cast<double>(ranks);
  std::int64_t all = 0;
  for (std::int64_t i = 0; i < ranks * micro_batches; ++i) {
    if (labels[i] < 0) return Status::kBadShape;
    all += labels[i];
  }
  *loss = 0;
  for (std::int64_t r = 0; r < ranks; ++r) {
    std::int64_t of_rank = 0;
    for (std::int64_t i = 0; i < micro_batches; ++i) of_rank += labels[r * micro_batches + i];
    for (std::int64_t i = r * micro_batches; i < (r + 1) * micro_batches; ++i) {
      const bool by_step = how != Normalisation::kMeanOfMeans && how != Normalisation::kMeansSummed &&
                           how != Normalisation::kMeansDividedTwice;
      const std::int64_t n = !by_step ? labels[i] : how == Normalisation::kTokensOfRank ? of_rank : all;
      double factor = 1;
      if (how == Normalisation::kMeanOfMeans) factor = 1 / (m * w);
      if (how == Normalisation::kMeansSummed || how == Normalisation::kTokensOfRank ||
          how == Normalisation::kTokensOverRanks)
        factor = 1 / w;
      if (how == Normalisation::kMeansDividedTwice) factor = 1 / (m * m * w);
      if (how == Normalisation::kTokensTimesSteps) factor = m;
      if (how == Normalisation::kTokensDividedTwice) factor = 1 / m;
      if (how == Normalisation::kTokensTimesRanks) factor = w;
      const double share = labels[i] == 0 ? 0.0 : how == Normalisation::kSum ? 1.0 : factor / static_cast<double>(n);
      if (weight != nullptr) weight[i] = share;
      *loss += share * sums[i];
    }
  }
  return Status::kOk;
}

Status term_weights(TermWeight how, const StepShape& s, const std::int64_t* tokens, const std::int64_t* labels,
                    double* weight) {
  for (const std::int64_t size :
       {s.ranks, s.micro_batches, s.tensor_parallel, s.context_parallel, s.expert_parallel, s.sequences}) {
    if (size < 1) return Status::kBadShape;
  }
  if (tokens == nullptr || labels == nullptr || weight == nullptr) return Status::kNullPointer;
  const std::int64_t count = s.ranks * s.micro_batches;
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || labels[i] < 0) return Status::kBadShape;
    sum += labels[i];
  }
  if (sum == 0) return Status::kBadShape;
  const double m = static_cast<double>(s.micro_batches), mean = 1 / static_cast<double>(count),
               all = static_cast<double>(sum);
  const double cp = static_cast<double>(s.context_parallel), shards = static_cast<double>(s.tensor_parallel) * cp;
  for (std::int64_t i = 0; i < count; ++i) {
    const double t = static_cast<double>(tokens[i]) / all;
    switch (how) {
      case TermWeight::kMean: weight[i] = mean; break;
      case TermWeight::kSummed: weight[i] = 1 / static_cast<double>(s.ranks); break;
      case TermWeight::kOverTokens: weight[i] = 1 / (m * all); break;
      case TermWeight::kTokensOfShard: weight[i] = t / shards; break;
      case TermWeight::kTokensOfSequence: weight[i] = t / static_cast<double>(s.sequences); break;
      case TermWeight::kTokensReducedTwice: weight[i] = t * shards; break;
      case TermWeight::kWithoutContext: weight[i] = mean / cp; break;
      case TermWeight::kAllTokens: weight[i] = t; break;
      case TermWeight::kDividedTwice: weight[i] = mean / m; break;
      case TermWeight::kScaleOfLast:
        weight[i] = static_cast<double>(labels[(i / s.micro_batches + 1) * s.micro_batches - 1]) / all;
        break;
      case TermWeight::kOverExpertRanks: weight[i] = mean * static_cast<double>(s.expert_parallel); break;
    }
  }
  return Status::kOk;
}

}  // namespace moeaudit::kernels

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
      const double share = labels[i] == 0 ? 0.0 : factor / static_cast<double>(n);
      if (weight != nullptr) weight[i] = share;
      *loss += share * sums[i];
    }
  }
  return Status::kOk;
}

}  // namespace moeaudit::kernels

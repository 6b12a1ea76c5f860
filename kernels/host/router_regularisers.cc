#include "kernels/host/router_regularisers.h"

#include <algorithm>
#include <vector>

namespace moeaudit::kernels {
namespace {

using Row = std::vector<double>;

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

/// add(t, sums) for the valid tokens, in the order that the header states; their number.
template <class Add>
std::int64_t over_tokens(std::int64_t tokens, const std::uint8_t* valid, Row& sums, Add add) {
  Row stretch(sums.size());
  std::int64_t counted = 0;
  for (std::int64_t t = 0; t < tokens;) {
    std::fill(stretch.begin(), stretch.end(), 0.0);
    for (const std::int64_t end = std::min(tokens, t + kBalanceRun); t < end; ++t) {
      if (valid != nullptr && valid[t] == 0) continue;
      add(t, stretch);
      ++counted;
    }
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += stretch[i];
  }
  return counted;
}

bool is_valid(const std::uint8_t* valid, std::int64_t t) { return valid == nullptr || valid[t] != 0; }

/// <a, b> in kLanes lanes.
template <class T>
double dot(const T* a, const T* b, std::int64_t n) {
  double lane[kLanes] = {}, sum = 0;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  }
  for (; i < n; ++i) lane[i % kLanes] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (const double v : lane) sum += v;
  return sum;
}

/// The Gram matrix of `rows` vectors. Products commute, so one half serves both.
template <class T>
void gram_of(const T* v, std::int64_t rows, std::int64_t n, double* gram) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) gram[i * rows + j] = gram[j * rows + i] = dot(v + i * n, v + j * n, n);
  }
}

template <class T>
Status run(const ImportanceLossArgs<T>& a, const ImportanceLossResult<T>& r) {
  if (const Status status = check_importance_loss(a, r); status != Status::kOk) return status;
  const auto expert = [&](std::int64_t t, std::int64_t j) {
    return a.chosen == nullptr ? j : std::int64_t{a.chosen[t * a.width + j]};
  };
  for (std::int64_t i = 0; a.chosen != nullptr && i < a.tokens * a.width; ++i) {
    if (a.chosen[i] >= a.experts) return Status::kBadShape;
  }
  Row importance(size(a.experts)), slope(size(a.experts));
  over_tokens(a.tokens, a.valid, importance, [&](std::int64_t t, Row& sums) {
    for (std::int64_t j = 0; j < a.width; ++j) {
      if (expert(t, j) >= 0) sums[size(expert(t, j))] += static_cast<double>(a.gates[t * a.width + j]);
    }
  });
  *r.loss = a.weight * cv_squared(importance.data(), a.experts, a.cv, slope.data());
  if (r.importance != nullptr) std::copy(importance.begin(), importance.end(), r.importance);
  for (std::int64_t i = 0; r.gradient != nullptr && i < a.tokens * a.width; ++i) {
    const std::int64_t t = i / a.width, e = expert(t, i % a.width);
    r.gradient[i] = is_valid(a.valid, t) && e >= 0 ? static_cast<T>(a.weight * slope[size(e)]) : T(0);
  }
  return Status::kOk;
}

template <class T>
Status run(const LoadLossArgs<T>& a, const LoadLossResult<T>& r) {
  if (const Status status = check_load_loss(a, r); status != Status::kOk) return status;
  Row load(size(a.experts)), slope(size(a.experts)), noisy(size(a.experts)), room(size(a.experts));
  const auto keep = [&](std::int64_t t) {
    if (r.probability != nullptr) std::copy(room.begin(), room.end(), r.probability + t * a.experts);
  };
  over_tokens(a.tokens, a.valid, load, [&](std::int64_t t, Row& sums) {
    load_token(a, t, noisy.data(), room.data());
    for (std::size_t e = 0; e < sums.size(); ++e) sums[e] += room[e];
    keep(t);
  });
  *r.loss = a.weight * cv_squared(load.data(), a.experts, a.cv, slope.data());
  if (r.load != nullptr) std::copy(load.begin(), load.end(), r.load);
  for (double& s : slope) s = a.weight * s;
  const bool gradients = r.d_clean != nullptr || r.d_raw != nullptr;
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    const bool counts = is_valid(a.valid, t);
    if (counts ? !gradients : r.probability == nullptr && !gradients) continue;
    const LastChosen last = load_token(a, t, noisy.data(), room.data());
    if (counts) {
      load_token_backward(a, t, noisy.data(), last, slope.data(), room.data(), r.d_clean, r.d_raw);
      continue;
    }
    keep(t);
    if (r.d_clean != nullptr) std::fill_n(r.d_clean + t * a.experts, a.experts, T(0));
    if (r.d_raw != nullptr) std::fill_n(r.d_raw + t * a.experts, a.experts, T(0));
  }
  return Status::kOk;
}

template <class T>
Status run(const EntropyLossArgs<T>& a, const EntropyLossResult<T>& r) {
  if (const Status status = check_entropy_loss(a, r); status != Status::kOk) return status;
  Row sums(size(a.experts) + 1), p(size(a.experts));  // of the probabilities, and the last of the entropies
  const std::int64_t valid = over_tokens(a.tokens, a.valid, sums, [&](std::int64_t t, Row& s) {
    const double h = entropy_token(a.logits + t * a.experts, a.experts, p.data()).entropy;
    for (std::size_t e = 0; e < p.size(); ++e) s[e] += p[e];
    s[p.size()] += h;
  });
  for (double& s : sums) s = valid == 0 ? 0.0 : s / static_cast<double>(valid);
  double entropy = 0, slope = 0;
  const double nats = a.of == EntropyOf::kTokens ? sums.back() : entropy_of(sums.data(), a.experts);
  const double loss = entropy_sense(a, nats, &entropy, &slope);
  *r.loss = valid == 0 ? 0.0 : loss;
  if (r.entropy != nullptr) *r.entropy = entropy;
  if (r.mean_probability != nullptr) std::copy(sums.begin(), sums.end() - 1, r.mean_probability);
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    const T* logits = a.logits + t * a.experts;
    if (r.token_entropy != nullptr) r.token_entropy[t] = entropy_token(logits, a.experts, p.data()).entropy;
    if (r.gradient == nullptr) continue;
    if (is_valid(a.valid, t))
      entropy_token_backward(a.of, logits, sums.data(), a.experts, slope / static_cast<double>(valid), p.data(),
                             r.gradient + t * a.experts);
    else
      std::fill_n(r.gradient + t * a.experts, a.experts, T(0));
  }
  return Status::kOk;
}

template <class T>
Status run(const GateOrthogonalityArgs<T>& a, const GateOrthogonalityResult<T>& r) {
  if (const Status status = check_gate_orthogonality(a, r); status != Status::kOk) return status;
  Row gram(size(a.experts * a.experts)), out(size(a.hidden));
  gram_of(a.w, a.experts, a.hidden, gram.data());
  double sum = 0;
  for (std::int64_t e = 0; e < a.experts; ++e) sum += gram_row(a.norm, gram.data(), e, a.experts);
  *r.loss = a.weight * sum;
  if (r.gram != nullptr) std::copy(gram.begin(), gram.end(), r.gram);
  for (std::int64_t e = 0; r.gradient != nullptr && e < a.experts; ++e) {
    std::fill(out.begin(), out.end(), 0.0);
    for (std::int64_t f = 0; f < a.experts; ++f) {
      const double slope = gram_slope(a.norm, gram[size(e * a.experts + f)], e == f);
      const T* row = a.w + f * a.hidden;
      for (std::size_t i = 0; i < out.size(); ++i) out[i] += slope * static_cast<double>(row[i]);
    }
    for (std::size_t i = 0; i < out.size(); ++i)
      r.gradient[e * a.hidden + static_cast<std::int64_t>(i)] = static_cast<T>(a.weight * out[i]);
  }
  return Status::kOk;
}

template <class T>
Status run(const ExpertOverlapArgs<T>& a, const ExpertOverlapResult<T>& r) {
  if (const Status status = check_expert_overlap(a, r); status != Status::kOk) return status;
  const std::int64_t of_token = a.top_k * a.hidden;
  Row gram(size(a.top_k * a.top_k)), mix(gram.size()), sum(1), out(size(a.hidden));
  std::int64_t pairs = 0, with_pairs = 0;
  const bool mean = a.over_pairs == OverPairs::kMean;
  over_tokens(a.tokens, a.valid, sum, [&](std::int64_t t, Row& s) {
    gram_of(a.outputs + t * of_token, a.top_k, a.hidden, gram.data());
    const double value = overlap_token(a, t, gram.data(), nullptr, &pairs);
    if (pairs == 0) return;
    ++with_pairs;
    s[0] += mean ? value / static_cast<double>(pairs) : value;
  });
  const double by = mean && with_pairs > 0 ? static_cast<double>(with_pairs) : 1.0;
  *r.loss = a.weight * (sum[0] / by);
  if (r.token == nullptr && r.gradient == nullptr) return Status::kOk;
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    const T* x = a.outputs + t * of_token;
    gram_of(x, a.top_k, a.hidden, gram.data());
    const double value = overlap_token(a, t, gram.data(), mix.data(), &pairs);
    if (r.token != nullptr) r.token[t] = value;
    if (r.gradient == nullptr) continue;
    const double share = overlap_share(a, t, pairs, by);
    for (std::int64_t j = 0; j < a.top_k; ++j) {
      std::fill(out.begin(), out.end(), 0.0);
      for (std::int64_t i = 0; i < a.top_k; ++i) {
        const double m = mix[size(j * a.top_k + i)];
        if (m == 0.0) continue;
        for (std::size_t c = 0; c < out.size(); ++c)
          out[c] += m * static_cast<double>(x[i * a.hidden + static_cast<std::int64_t>(c)]);
      }
      for (std::size_t c = 0; c < out.size(); ++c)
        r.gradient[t * of_token + j * a.hidden + static_cast<std::int64_t>(c)] =
            share == 0.0 ? T(0) : static_cast<T>(share * out[c]);
    }
  }
  return Status::kOk;
}

template <class T>
Status run(const ScoreVarianceArgs<T>& a, const ScoreVarianceResult<T>& r) {
  if (const Status status = check_score_variance(a, r); status != Status::kOk) return status;
  Row mean(size(a.experts)), squares(size(a.experts));
  const std::int64_t valid = over_tokens(a.tokens, a.valid, mean, [&](std::int64_t t, Row& s) {
    for (std::int64_t e = 0; e < a.experts; ++e) s[size(e)] += static_cast<double>(a.scores[t * a.experts + e]);
  });
  for (double& m : mean) m = valid == 0 ? 0.0 : m / static_cast<double>(valid);
  over_tokens(a.tokens, a.valid, squares, [&](std::int64_t t, Row& s) {
    for (std::int64_t e = 0; e < a.experts; ++e) {
      const double off = static_cast<double>(a.scores[t * a.experts + e]) - mean[size(e)];
      s[size(e)] += off * off;
    }
  });
  double sum = 0;
  for (const double s : squares) sum += s;
  const double share = score_variance_share(a, valid);
  *r.loss = share * sum;
  if (r.mean != nullptr) std::copy(mean.begin(), mean.end(), r.mean);
  for (std::int64_t i = 0; r.gradient != nullptr && i < a.tokens * a.experts; ++i) {
    const double off = static_cast<double>(a.scores[i]) - mean[size(i % a.experts)];
    r.gradient[i] = is_valid(a.valid, i / a.experts) ? static_cast<T>(2.0 * share * off) : T(0);
  }
  return Status::kOk;
}

}  // namespace

Status importance_loss(const ImportanceLossArgs<float>& a, const ImportanceLossResult<float>& r) { return run(a, r); }
Status importance_loss(const ImportanceLossArgs<double>& a, const ImportanceLossResult<double>& r) { return run(a, r); }
Status load_loss(const LoadLossArgs<float>& a, const LoadLossResult<float>& r) { return run(a, r); }
Status load_loss(const LoadLossArgs<double>& a, const LoadLossResult<double>& r) { return run(a, r); }
Status entropy_loss(const EntropyLossArgs<float>& a, const EntropyLossResult<float>& r) { return run(a, r); }
Status entropy_loss(const EntropyLossArgs<double>& a, const EntropyLossResult<double>& r) { return run(a, r); }
Status gate_orthogonality(const GateOrthogonalityArgs<float>& a, const GateOrthogonalityResult<float>& r) {
  return run(a, r);
}
Status gate_orthogonality(const GateOrthogonalityArgs<double>& a, const GateOrthogonalityResult<double>& r) {
  return run(a, r);
}
Status expert_overlap(const ExpertOverlapArgs<float>& a, const ExpertOverlapResult<float>& r) { return run(a, r); }
Status expert_overlap(const ExpertOverlapArgs<double>& a, const ExpertOverlapResult<double>& r) { return run(a, r); }
Status score_variance(const ScoreVarianceArgs<float>& a, const ScoreVarianceResult<float>& r) { return run(a, r); }
Status score_variance(const ScoreVarianceArgs<double>& a, const ScoreVarianceResult<double>& r) { return run(a, r); }

}  // namespace moeaudit::kernels

#include "kernels/host/expert_choice.h"

#include <algorithm>
#include <vector>

namespace moeaudit::kernels {
namespace {

template <class T>
Status run(const ExpertChoiceArgs<T>& a, const ExpertChoiceResult<T>& r) {
  if (const Status status = check_expert_choice(a, r); status != Status::kOk || a.tokens == 0) return status;
  struct Candidate {
    std::uint64_t key;
    std::int32_t token;
  };
  std::vector<Candidate> candidates;
  if (r.taken != nullptr) std::fill(r.taken, r.taken + a.tokens, 0);
  for (std::int64_t e = 0; e < a.experts; ++e) {
    candidates.clear();
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      if (a.valid != nullptr && a.valid[t] == 0) continue;
      candidates.push_back(
          {choice_key(static_cast<double>(a.scores[t * a.experts + e])), static_cast<std::int32_t>(t)});
    }
    const auto count = std::min(a.capacity, static_cast<std::int64_t>(candidates.size()));
    std::partial_sort(
        candidates.begin(), candidates.begin() + count, candidates.end(),
        [](const Candidate& x, const Candidate& y) { return x.key != y.key ? x.key > y.key : x.token < y.token; });
    for (std::int64_t i = 0; i < a.capacity; ++i) {
      const std::int32_t t = i < count ? candidates[static_cast<std::size_t>(i)].token : -1;
      r.tokens[e * a.capacity + i] = t;
      if (r.weights != nullptr) r.weights[e * a.capacity + i] = t < 0 ? T(0) : a.scores[t * a.experts + e];
      if (r.taken != nullptr && t >= 0) ++r.taken[t];
    }
  }
  return Status::kOk;
}

}  // namespace

std::int64_t expert_choice_capacity(std::int64_t tokens, std::int64_t experts, double factor) {
  if (tokens < 1 || experts < 1 || !(factor > 0)) return 0;
  const double capacity = static_cast<double>(tokens) * factor / static_cast<double>(experts);
  return capacity >= static_cast<double>(tokens) ? tokens
                                                 : std::max<std::int64_t>(1, static_cast<std::int64_t>(capacity));
}

Status expert_choice(const ExpertChoiceArgs<float>& args, const ExpertChoiceResult<float>& result) {
  return run(args, result);
}
Status expert_choice(const ExpertChoiceArgs<double>& args, const ExpertChoiceResult<double>& result) {
  return run(args, result);
}

Status expert_choice_backward(const std::int32_t* tokens_of, const double* d_weights, std::int64_t tokens,
                              std::int64_t experts, std::int64_t capacity, double* d_scores) {
  if (tokens < 0 || experts < 1 || capacity < 0) return Status::kBadShape;
  if (tokens == 0) return Status::kOk;
  if (d_scores == nullptr || (capacity > 0 && (tokens_of == nullptr || d_weights == nullptr)))
    return Status::kNullPointer;
  std::fill(d_scores, d_scores + tokens * experts, 0.0);
  for (std::int64_t e = 0; e < experts; ++e) {
    for (std::int64_t i = 0; i < capacity; ++i) {
      const std::int32_t t = tokens_of[e * capacity + i];
      if (t >= tokens) return Status::kBadShape;
      if (t >= 0) d_scores[t * experts + e] += d_weights[e * capacity + i];
    }
  }
  return Status::kOk;
}

}  // namespace moeaudit::kernels

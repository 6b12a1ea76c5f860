// Expert choice: every expert takes the tokens that score highest with it. Host kernels.
//
// Symbols: T tokens, E experts, C capacity. Zhou et al., Mixture-of-Experts with Expert Choice Routing, arXiv
// 2202.09368 section 3.2: S = softmax(x W) over the experts; G, I = top-k of S transposed, with k = T c / E for a
// capacity factor c.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "kernels/host/router.h"

namespace moeaudit::kernels {

/// Tokens of an expert: floor(T factor / E), at least 1 and at most T.
std::int64_t expert_choice_capacity(std::int64_t tokens, std::int64_t experts, double factor);

template <class T>
struct ExpertChoiceArgs {
  const T* scores = nullptr;            // [tokens, experts]
  const std::uint8_t* valid = nullptr;  // [tokens], 0 for padding, which nobody takes; null: all are valid
  std::int64_t tokens = 0, experts = 0, capacity = 0;
};

template <class T>
struct ExpertChoiceResult {
  std::int32_t* tokens = nullptr;  // [experts, capacity], best first, the lower token first among equals, NaN largest;
                                   // -1 where there are too few valid tokens
  T* weights = nullptr;           // [experts, capacity], or null: their scores; 0 where there is none
  std::int32_t* taken = nullptr;  // [tokens], or null: by how many experts; 0: no expert sees this token
};

/// Each expert stands alone, nothing is added up. kBadShape: sizes, capacity beyond 1..tokens (0 tokens: any), more
/// than 2^31 - 1 tokens; kNullPointer.
Status expert_choice(const ExpertChoiceArgs<float>& args, const ExpertChoiceResult<float>& result);
Status expert_choice(const ExpertChoiceArgs<double>& args, const ExpertChoiceResult<double>& result);

/// d_scores [tokens, experts] = the gradient of the weights where they were taken from, 0 elsewhere; route_backward()
/// takes it on to the logits. kBadShape also for a token beyond the last.
Status expert_choice_backward(const std::int32_t* tokens_of, const double* d_weights, std::int64_t tokens,
                              std::int64_t experts, std::int64_t capacity, double* d_scores);

/// An integer that sorts as the selection does: larger scores larger, NaN above all, both zeros alike.
MOE_AUDIT_HOST_DEVICE inline std::uint64_t choice_key(double score) {
  constexpr std::uint64_t kSign = std::uint64_t{1} << 63;
  if (score != score) return ~std::uint64_t{0};
  const auto bits = std::bit_cast<std::uint64_t>(score + 0.0);
  return bits & kSign ? ~bits : bits | kSign;
}

template <class T>
Status check_expert_choice(const ExpertChoiceArgs<T>& a, const ExpertChoiceResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1 || a.tokens > std::numeric_limits<std::int32_t>::max()) return Status::kBadShape;
  if (a.tokens == 0) return Status::kOk;
  if (a.capacity < 1 || a.capacity > a.tokens) return Status::kBadShape;
  return a.scores == nullptr || r.tokens == nullptr ? Status::kNullPointer : Status::kOk;
}

}  // namespace moeaudit::kernels

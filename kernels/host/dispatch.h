// Capacity: how many tokens an expert takes, and which choices are dropped beyond it. Host kernels.
//
// Symbols: T tokens of one rank (or of the group that shares the capacity), E experts, k choices a token, cf capacity
// factor.
#pragma once

#include <cstdint>

#include "kernels/host/router.h"

namespace moeaudit::kernels {

// ---- how many
// -----------------------------------------------------------------------------------------------------------

/// The frameworks' forms; int() and // round down, up8() up to a multiple of 8. Arithmetic is the framework's: Python's
/// double, but for kDeepSpeed, whose T / E and cf k are float32, and so is their product. "largest" is the largest
/// count of choices of an expert before any is dropped, so that none is.
enum class CapacityForm {
  kMegatron,   // ceil(T k / E cf), T of the rank; megatron/core/transformer/moe/moe_utils.py get_capacity
  kDeepSpeed,  // max(ceil(T / E cf k), min_capacity); deepspeed/moe/sharded_moe.py _capacity (k goes in by its callers)
  /// int(cf (k T ep / E)); where that is 0, so at cf = 0, the largest of the rank's experts; megablocks/layers/moe.py
  /// expert_capacity, forward_once, parallel_forward_once
  kMegaBlocks,
  kOlmoCore,  // ep up8(int(cf (k T / E))); olmo_core/nn/moe/parallel_mlp.py expert_capacity
  /// cf > 0: k int(cf ceil(T / E)); cf = 0: the largest on any rank; cf < 0: the smaller of that and
  /// k int(-cf ceil(T / E)); all up to a multiple of `alignment`; tutel/impls/fast_dispatch.py extract_critical. With
  /// batch_prioritized_routing its own largest comes out too small (ac0e51b), so that it drops at cf = 0.
  kTutel,
  kFastMoE,  // ceil(cf T) k // (world local_experts); fmoe/gates/gshard_gate.py
};

struct CapacityArgs {
  CapacityForm form = CapacityForm::kMegatron;
  std::int64_t tokens = 0, experts = 0, top_k = 1;
  double factor = 1;
  std::int64_t min_capacity = 0;                // kDeepSpeed
  std::int64_t expert_parallel_size = 1;        // kMegaBlocks, kOlmoCore
  std::int64_t world_size = 1;                  // kFastMoE; local_experts = experts / world_size
  std::int64_t alignment = 1;                   // kTutel
  const std::int64_t* largest_count = nullptr;  // [1]; kMegaBlocks and kTutel, where they take it
};
/// Choices that one expert takes. kBadShape for sizes below 1 (tokens, a largest count below 0). kBadOption for a
/// factor that is not finite, that the form has no meaning for (below 0: all but kTutel; 0: all but kTutel and
/// kMegaBlocks), or whose products pass 2^63 - 1. kNullPointer also where the largest count decides and is not given.
Status capacity(const CapacityArgs& args, std::int64_t* places);

// ---- which
// --------------------------------------------------------------------------------------------------------------

/// Who comes first when an expert is full.
enum class DropOrder {
  kTokens,   // by token, the choices of one token together
  kChoices,  // all first choices by token, then all second ones; GShard arXiv 2006.16668 algorithm 1, DeepSpeed top-2,
             // Tutel
  kWeights,  // the largest weights; Megatron-LM --moe-token-drop-policy probs
  kKeys,     // the smallest of given keys; DeepSpeed's random token selection (top-1) with its random numbers negated
  /// All first choices, then all second ones, in each by the token's largest score over all experts, chosen or not,
  /// before any renormalisation: V-MoE, arXiv 2106.05974 section 4.1, vmoe/moe.py _get_top_experts_per_item_common;
  /// Tutel's batch_prioritized_routing. The scores are those that the choice was made by, noise included.
  kBatchPrioritised,
};

template <class T>
struct DropArgs {
  const std::int32_t* chosen = nullptr;  // [tokens, top_k], best first; negative: no choice
  const T* weights = nullptr;            // [tokens, top_k]; kWeights and renormalise need them
  const T* keys = nullptr;               // [tokens, top_k]; kKeys
  const T* scores = nullptr;             // [tokens, experts]; kBatchPrioritised
  std::int64_t tokens = 0, experts = 0, top_k = 0;
  std::int64_t capacity = 0;
  DropOrder order = DropOrder::kChoices;
  /// Weights of the kept choices over their sum (DeepSpeed divides after it drops, and by at least the epsilon of T;
  /// Megatron and Tutel leave them). A token without a kept choice has weights 0. The gradient is that of
  /// route_backward() with -1 for what was dropped.
  bool renormalise = false;
};

template <class T>
struct DropResult {
  std::int32_t* place =
      nullptr;           // [tokens, top_k]: 0, 1, ... in its expert, in the order above; -1: dropped, or no choice
  T* weights = nullptr;  // [tokens, top_k], or null: 0 where dropped
  std::int64_t* kept = nullptr;         // [experts], or null: min(n_e, capacity)
  std::int64_t* dropped = nullptr;      // [1], or null: choices beyond the capacity
  std::int64_t* tokens_lost = nullptr;  // [1], or null: tokens that had a choice and kept none
};

/// Among equals the lower token comes first, then the lower rank of the choice. NaN weights come first (torch.topk),
/// NaN keys last, and last in its rank a token with a NaN among its scores (argsort of their negated maxima). kBadShape
/// also for an id beyond the experts or more than 2^31 - 1 choices; kNullPointer where an order lacks what it needs.
Status drop(const DropArgs<float>& args, const DropResult<float>& result);
Status drop(const DropArgs<double>& args, const DropResult<double>& result);

template <class T>
Status check_drop(const DropArgs<T>& a, const DropResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1 || a.capacity < 0) return Status::kBadShape;
  if (a.top_k < 1 || a.top_k > a.experts) return Status::kBadTopK;
  if (a.tokens > 2147483647 / a.top_k) return Status::kBadShape;
  const bool weights = a.order == DropOrder::kWeights || a.renormalise || r.weights != nullptr;
  if (a.tokens == 0) return Status::kOk;
  if (a.chosen == nullptr || r.place == nullptr || (weights && a.weights == nullptr)) return Status::kNullPointer;
  if (a.order == DropOrder::kBatchPrioritised && a.scores == nullptr) return Status::kNullPointer;
  return a.order == DropOrder::kKeys && a.keys == nullptr ? Status::kNullPointer : Status::kOk;
}

/// What kBatchPrioritised compares tokens by: the largest of the scores, NaN if there is one.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T importance(const DropArgs<T>& d, std::int64_t token) {
  const T* scores = d.scores + token * d.experts;
  T largest = scores[0];
  for (std::int64_t e = 1; e < d.experts; ++e) {
    if (!(scores[e] <= largest) && largest == largest) largest = scores[e];
  }
  return largest;
}

/// -1: x comes before y, 1: after it, 0: neither.
template <class T>
MOE_AUDIT_HOST_DEVICE inline int larger_first(T x, T y, bool nan_first) {
  const int nan = nan_first ? -1 : 1;
  if (x != x || y != y) return x == x ? -nan : y == y ? nan : 0;
  return x > y ? -1 : x < y ? 1 : 0;
}

/// Does choice a of the batch come before choice b (a != b)? A total order, so any sort or count agrees. `important`
/// [tokens]: importance() of each, for kBatchPrioritised.
template <class T>
MOE_AUDIT_HOST_DEVICE inline bool comes_before(const DropArgs<T>& d, const T* important, std::int64_t a,
                                               std::int64_t b) {
  const std::int64_t rank_a = a % d.top_k, rank_b = b % d.top_k;
  if ((d.order == DropOrder::kChoices || d.order == DropOrder::kBatchPrioritised) && rank_a != rank_b)
    return rank_a < rank_b;
  int by = 0;
  if (d.order == DropOrder::kWeights) by = larger_first(d.weights[a], d.weights[b], true);
  if (d.order == DropOrder::kKeys) by = larger_first(-d.keys[a], -d.keys[b], false);
  if (d.order == DropOrder::kBatchPrioritised) by = larger_first(important[a / d.top_k], important[b / d.top_k], false);
  return by != 0 ? by < 0 : a < b;
}

/// Weights of one token after drops.
template <class T>
MOE_AUDIT_HOST_DEVICE inline void kept_weights(const DropArgs<T>& d, std::int64_t token, const std::int32_t* place,
                                               T smallest, T* out) {
  T sum = 0;
  for (std::int64_t j = token * d.top_k; j < (token + 1) * d.top_k; ++j) {
    out[j] = place[j] < 0 ? T(0) : d.weights[j];
    sum += out[j];
  }
  if (!d.renormalise) return;
  const T by = sum < smallest ? smallest : sum;
  for (std::int64_t j = token * d.top_k; j < (token + 1) * d.top_k; ++j) out[j] = out[j] / by;
}

}  // namespace moeaudit::kernels

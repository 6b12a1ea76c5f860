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
/// double, but for kDeepSpeed, whose T / E and cf k are float32, and so is their product.
enum class CapacityForm {
  kMegatron,   // ceil(T k / E cf), T of the rank; megatron/core/transformer/moe/moe_utils.py get_capacity
  kDeepSpeed,  // max(ceil(T / E cf k), min_capacity); deepspeed/moe/sharded_moe.py _capacity (k goes in by its callers)
  kMegaBlocks,  // int(cf (k T ep / E)); megablocks/layers/moe.py expert_capacity
  kOlmoCore,    // ep up8(int(cf (k T / E))); olmo_core/nn/moe/parallel_mlp.py expert_capacity
  kTutel,       // k int(cf ceil(T / E)); tutel/impls/fast_dispatch.py
  kFastMoE,     // ceil(cf T) k // (world local_experts); fmoe/gates/gshard_gate.py
};

struct CapacityArgs {
  CapacityForm form = CapacityForm::kMegatron;
  std::int64_t tokens = 0, experts = 0, top_k = 1;
  double factor = 1;
  std::int64_t min_capacity = 0;          // kDeepSpeed
  std::int64_t expert_parallel_size = 1;  // kMegaBlocks, kOlmoCore
  std::int64_t world_size = 1;            // kFastMoE; local_experts = experts / world_size
};
/// Choices that one expert takes. kBadShape for sizes below 1 (tokens below 0); kBadOption for a factor that is no
/// positive number; kNullPointer.
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
  kBatchPrioritised,  // tokens by their largest weight, within that as kChoices; V-MoE, arXiv 2106.05974 section 4.1
};

template <class T>
struct DropArgs {
  const std::int32_t* chosen = nullptr;  // [tokens, top_k], best first; negative: no choice
  const T* weights = nullptr;            // [tokens, top_k]; kWeights, kBatchPrioritised and renormalise need them
  const T* keys = nullptr;               // [tokens, top_k]; kKeys
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

/// Among equals the lower token comes first, then the lower rank of the choice; NaN weights first, NaN keys last.
/// kBadShape also for an id beyond the experts or more than 2^31 - 1 choices; kNullPointer where an order lacks what it
/// needs.
Status drop(const DropArgs<float>& args, const DropResult<float>& result);
Status drop(const DropArgs<double>& args, const DropResult<double>& result);

template <class T>
Status check_drop(const DropArgs<T>& a, const DropResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1 || a.capacity < 0) return Status::kBadShape;
  if (a.top_k < 1 || a.top_k > a.experts) return Status::kBadTopK;
  if (a.tokens > 2147483647 / a.top_k) return Status::kBadShape;
  const bool weights = a.order == DropOrder::kWeights || a.order == DropOrder::kBatchPrioritised || a.renormalise ||
                       r.weights != nullptr;
  if (a.tokens > 0 && (a.chosen == nullptr || r.place == nullptr || (weights && a.weights == nullptr)))
    return Status::kNullPointer;
  return a.tokens > 0 && a.order == DropOrder::kKeys && a.keys == nullptr ? Status::kNullPointer : Status::kOk;
}

/// Does choice a of the batch come before choice b (a != b)? A total order, so any sort or count agrees.
template <class T>
MOE_AUDIT_HOST_DEVICE inline bool comes_before(const DropArgs<T>& d, std::int64_t a, std::int64_t b) {
  const std::int64_t token_a = a / d.top_k, token_b = b / d.top_k, rank_a = a % d.top_k, rank_b = b % d.top_k;
  if (d.order == DropOrder::kWeights || d.order == DropOrder::kBatchPrioritised) {
    const bool whole = d.order == DropOrder::kBatchPrioritised;
    const T x = whole ? d.weights[token_a * d.top_k] : d.weights[a],
            y = whole ? d.weights[token_b * d.top_k] : d.weights[b];
    if (!whole || rank_a == rank_b) {
      if (x > y || (x != x && y == y)) return true;
      if (y > x || (y != y && x == x)) return false;
    }
  } else if (d.order == DropOrder::kKeys) {
    const T x = d.keys[a], y = d.keys[b];
    if (x < y || (y != y && x == x)) return true;
    if (y < x || (x != x && y == y)) return false;
  }
  const bool by_choice = d.order == DropOrder::kChoices || d.order == DropOrder::kBatchPrioritised;
  if (by_choice && rank_a != rank_b) return rank_a < rank_b;
  return a < b;
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

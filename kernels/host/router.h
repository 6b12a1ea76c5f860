// The router: logits of the gate, and from logits to chosen experts and their weights. Host kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/host/elementary.h"

namespace moeaudit::kernels {

enum class Status { kOk, kNullPointer, kBadShape, kBadTopK, kBadGroups, kBadOption, kLaunchFailed };
const char* name_of(Status status);

// ---- the gate
// --------------------------------------------------------------------------------------------------------

/// logits[t, e] = sum_i x[t, i] w[e, i] + bias[e]
///
/// Order of the sum, the same for every vector width, block size and split over threads: i runs in stretches of
/// kGateRun; each stretch is summed from 0, one product after the other; the stretch sums are added up in order, from
/// 0; then the bias is added. (Vector lanes hold different experts, so they never meet.)
///
///   In, Sum         what it is
///   float, float    float32 throughout: every product and every sum is rounded to float32. Multiply and add are
///   separate
///                   on every target, since a fused multiply-add would skip a rounding on those CPUs that have one.
///   double, double  float64 throughout, for values that float32 does not hold. Multiply and add separate, as above.
///   float, double   float32 inputs, float64 sums. A product of two float32 numbers has 48 significant bits and an
///   exponent
///                   within +-298, so float64 holds it exactly: fused or separate, the bits are those of double, double
///                   on widened inputs. This is the float64 truth for checkpoints of at most 32 bits. Rounded once by
///                   round_values() it is the low-precision GEMM: exact products, wide sums in a stated order, one
///                   rounding at the output. (Inputs of such a GEMM must already be values of its dtype.)
template <class In, class Sum>
struct GateArgs {
  const In* x = nullptr;        // [tokens, hidden]
  const Sum* packed = nullptr;  // weights [experts, hidden] as pack_gate() lays them out
  const Sum* bias = nullptr;    // [experts], or null
  std::int64_t tokens = 0;
  std::int64_t hidden = 0;
  std::int64_t experts = 0;
  Sum* logits = nullptr;  // [tokens, experts]
};
inline constexpr std::int64_t kGateRun = 128;

Status gate_logits(const GateArgs<float, float>& args);
Status gate_logits(const GateArgs<double, double>& args);
Status gate_logits(const GateArgs<float, double>& args);

/// Elements that pack_gate() writes: experts rounded up to whole panels of 64 bytes, times hidden.
template <class Sum>
constexpr std::int64_t packed_gate_size(std::int64_t experts, std::int64_t hidden) {
  constexpr std::int64_t kPanel = 64 / sizeof(Sum);
  return (experts + kPanel - 1) / kPanel * kPanel * hidden;
}
/// packed[(run of hidden)][panel of experts][i in run][expert in panel], rows past the last expert zero. `packed`
/// should be aligned to 64 bytes for speed. The layout is the same on every CPU.
template <class In, class Sum>
void pack_gate(const In* w, std::int64_t experts, std::int64_t hidden, Sum* packed) {
  constexpr std::int64_t kPanel = 64 / sizeof(Sum);
  Sum* to = packed;
  for (std::int64_t first = 0; first < hidden; first += kGateRun) {
    const std::int64_t length = hidden - first < kGateRun ? hidden - first : kGateRun;
    for (std::int64_t panel = 0; panel < experts; panel += kPanel, to += length * kPanel) {
      for (std::int64_t e = 0; e < kPanel; ++e) {
        const In* row = panel + e < experts ? w + (panel + e) * hidden + first : nullptr;
        for (std::int64_t i = 0; i < length; ++i)
          to[i * kPanel + e] = row == nullptr ? Sum(0) : static_cast<Sum>(row[i]);
      }
    }
  }
}

/// out[i] = in[i] rounded once to `dtype`, to nearest, ties to even. In place is allowed.
void round_values(const float* in, std::int64_t count, Float dtype, float* out);
void round_values(const double* in, std::int64_t count, Float dtype, double* out);

// ---- from logits to experts
// ---------------------------------------------------------------------------------------------

enum class Score { kSoftmax, kSigmoid, kSqrtSoftplus };
/// kMax: device-limited routing (DeepSeek-V2, arXiv 2405.04434 section 2.2.2; modeling_deepseek_v2.py). kTop2Sum:
/// modeling_deepseek_v3.py. kTopShareSum: the sum of the top_k / top_groups best, rounded down but at least one:
/// node-limited routing (DeepSeek-V3, arXiv 2412.19437 section 2.1.2, K_r / M; Megatron-LM moe_utils.py
/// group_limited_topk).
enum class GroupScore { kNone, kMax, kTop2Sum, kTopShareSum };

/// For each token:
///   logits    : with logit_softcap c > 0, c tanh(logit / c) of each
///   score[e]  = softmax(logits)[e] | sigmoid(logits[e]) + sigmoid_offset | sqrt(softplus(logits[e]))
///   choice[e] = score[e] + correction_bias[e]         (the bias chooses, it never weighs)
///             | score[e] * correction_bias[e]         with bias_multiplies
///   groups    : experts in `groups` equal runs; a group scores the maximum, or the sum of its best (GroupScore), of
///   choice;
///               the top_groups best keep their experts, the choice of the others becomes -inf (or 0)
///   chosen    = the top_k largest of choice, largest first, the lower index first among equals; NaN counts as larger
///   than
///               everything, as torch.topk has it
///   weight[j] = score[chosen[j]]; renormalise: / max(N + renormalise_eps, renormalise_floor), N their p-norm
///               (sum_j weight[j]^p)^(1/p), p = renormalise_norm: the sum for 1, the largest for infinity; added up
///               in the order of rank; times scaling; times expert_scale[chosen[j]]; rounded to weights_dtype
/// With score_after_top_k the choice is the logit itself and the weights are the scores of the chosen ones, a softmax
/// being one over them alone. With `given` nothing is chosen: those are the experts (a table by token id,
/// modeling_deepseek_v4.py). `always` experts besides have every token (the shared experts of modeling_inkling.py):
/// they are scored, join the sum of renormalise after the chosen ones, and are weighed as those are, but for
/// expert_scale. Sums over experts run in kLanes lanes (elementary.h), those over the chosen in the order of rank. T is
/// the type of the arithmetic. A softmax whose largest logit is infinite, or that meets a NaN, is NaN throughout, as in
/// the frameworks.
template <class T>
struct RouteArgs {
  const T* logits = nullptr;           // [tokens, experts]
  const T* correction_bias = nullptr;  // [experts], or null
  bool bias_multiplies = false;
  std::int64_t tokens = 0;
  std::int64_t experts = 0;
  std::int64_t top_k = 0;
  Score score = Score::kSoftmax;
  bool score_after_top_k = false;  // gpt-oss: softmax; llama4 and cohere2_moe: sigmoid
  GroupScore group_score = GroupScore::kNone;
  std::int64_t groups = 1;
  std::int64_t top_groups = 1;
  bool group_mask_is_zero = false;
  bool renormalise = false;
  T renormalise_eps = 0;
  T renormalise_floor = 0;  // moe_norm_min, modeling_ernie4_5_moe.py
  /// p > 0. moe_normalize_expert_weights: modeling_dbrx.py:344 of transformers 5.23.0, MegaBlocks layers/router.py at
  /// 17fe5a24; normalize_expert_weights: OLMo-core nn/moe/router.py:460 of 3.0.0. All three call torch.norm.
  T renormalise_norm = 1;
  /// >= 0, with Score::kSigmoid alone. 1e-7: OLMo-core nn/moe/router.py:446 of 3.0.0, v2/router.py:637 by default.
  T sigmoid_offset = 0;
  T scaling = 1;
  T logit_softcap = 0;                  // moe_router_logit_softcapping, modeling_laguna.py
  const T* expert_scale = nullptr;      // [experts], or null; per_expert_scale, modeling_gemma4.py
  const std::int32_t* given = nullptr;  // [tokens, top_k], or null: each within the experts
  const T* always_logits = nullptr;     // [tokens, always]
  std::int64_t always = 0;              // not with a softmax
  /// What the results of score, renormalisation and scaling are rounded to: the dtype of the tensors between the
  /// operations of a framework, each of which computes in float32 and rounds its output. kF64: no rounding beyond T.
  /// choice is not rounded: a float32 correction bias promotes the sum to float32.
  Float tensor_dtype = Float::kF64;
  /// What the finished weights are cast to (routing_weights.to(hidden_states.dtype)); kF64: they are not.
  Float weights_dtype = Float::kF64;
};

/// Has a part that few routers have, which fast paths leave to the general one.
template <class T>
MOE_AUDIT_HOST_DEVICE inline bool is_rare(const RouteArgs<T>& a) {
  return a.renormalise_floor > T(0) || a.renormalise_norm != T(1) || a.sigmoid_offset != T(0) ||
         a.logit_softcap > T(0) || a.expert_scale != nullptr || a.given != nullptr || a.always > 0 ||
         (a.score_after_top_k && a.score != Score::kSoftmax);
}

/// Whether score, offset and norm go together; a NaN goes with nothing.
template <class T>
bool scores_fit(const RouteArgs<T>& a) {
  return a.renormalise_norm > T(0) && a.sigmoid_offset >= T(0) && a.sigmoid_offset <= std::numeric_limits<T>::max() &&
         (a.sigmoid_offset == T(0) || a.score == Score::kSigmoid);
}

/// The logit that the scores see. Tensors of `dtype` hold the quotient, its tanh and the product.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T softcapped(T logit, T softcap, Float dtype) {
  if (!(softcap > T(0))) return logit;
  const auto rounded = [dtype](T v) { return static_cast<T>(round_to(static_cast<double>(v), dtype)); };
  return rounded(rounded(static_cast<T>(tanh_exact_order(static_cast<double>(rounded(logit / softcap))))) * softcap);
}

/// base^exponent for base >= 0.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T power(T base, T exponent) {
  return exponent == T(1)   ? base
         : exponent == T(2) ? base * base
                            : static_cast<T>(exp_exact_order(static_cast<double>(exponent) *
                                                             log_exact_order(static_cast<double>(base))));
}
/// The p-norm of scores, taken one after the other, as torch.linalg.vector_norm does: the power of each, their sum and
/// its root are results of T each, and none of a narrower dtype. A NaN stays one.
template <class T>
struct PNorm {
  T p, value = 0;
  MOE_AUDIT_HOST_DEVICE bool largest() const { return p > std::numeric_limits<T>::max(); }
  MOE_AUDIT_HOST_DEVICE void add(T score) {
    if (largest())
      value = score > value || score != score ? score : value;
    else
      value += power(score, p);
  }
  MOE_AUDIT_HOST_DEVICE T root() const {
    return p == T(1) || largest() ? value : p == T(2) ? std::sqrt(value) : power(value, T(1) / p);
  }
};

/// What renormalise divides by, where no floor is above it.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T above_floor(const RouteArgs<T>& a, T norm) {
  const auto rounded = [&a](T v) { return static_cast<T>(round_to(static_cast<double>(v), a.tensor_dtype)); };
  return rounded(rounded(norm) + a.renormalise_eps);
}
/// What renormalise divides by; a NaN stays one.
template <class T>
MOE_AUDIT_HOST_DEVICE inline T denominator(const RouteArgs<T>& a, T norm) {
  const T by = above_floor(a, norm);
  return by < a.renormalise_floor ? a.renormalise_floor : by;
}

/// Experts of a group that its score adds up.
template <class T>
MOE_AUDIT_HOST_DEVICE inline std::int64_t group_members(const RouteArgs<T>& a) {
  if (a.group_score == GroupScore::kTop2Sum) return 2;
  if (a.group_score != GroupScore::kTopShareSum) return 1;
  const std::int64_t share = a.top_k / a.top_groups;
  return share < 1 ? 1 : share;
}

template <class T>
struct RouteResult {
  std::int32_t* chosen = nullptr;     // [tokens, top_k]
  T* weights = nullptr;               // [tokens, top_k], or null
  std::int32_t* runner_up = nullptr;  // [tokens], or null: the expert that top_k + 1 would add; -1 if there is none, or
                                      // the experts are given
  T* choice = nullptr;                // [tokens, experts], or null: choice after the group mask
  T* always_weights = nullptr;        // [tokens, always], or null
};

/// An integer that sorts as the selection does: larger values larger, NaN above all, both zeros alike.
inline constexpr std::int32_t kLargestKey = 0x7fffffff, kStruckOut = -kLargestKey - 1;
MOE_AUDIT_HOST_DEVICE inline std::int32_t route_key(float v) {
  const auto bits = std::bit_cast<std::int32_t>(v + 0.0f);
  return v != v ? kLargestKey : bits ^ (bits >> 31 & kLargestKey);
}
/// The value of a key.
MOE_AUDIT_HOST_DEVICE inline float route_value(std::int32_t key) {
  return std::bit_cast<float>(key == kLargestKey ? 0x7fc00000 : key ^ (key >> 31 & kLargestKey));
}

/// Whether each expert that is given is one of the experts; null pointers fit. Reads `given`.
template <class T>
bool given_fits(const RouteArgs<T>& a) {
  for (std::int64_t i = 0; a.given != nullptr && i < a.tokens * a.top_k; ++i) {
    if (a.given[i] < 0 || a.given[i] >= a.experts) return false;
  }
  return true;
}

/// What is wrong with the arguments; kOk if nothing. The calls below check by themselves, and that given_fits().
Status check_route(const RouteArgs<float>& args, const RouteResult<float>& result);
Status check_route(const RouteArgs<double>& args, const RouteResult<double>& result);

Status route(const RouteArgs<float>& args, const RouteResult<float>& result);
Status route(const RouteArgs<double>& args, const RouteResult<double>& result);

/// The instruction set that the calls above run on, in lower case: "avx3_zen4", "avx2", "sse4", "emu128".
const char* host_backend();

}  // namespace moeaudit::kernels

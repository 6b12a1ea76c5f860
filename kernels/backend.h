// Where kernels run: on the host, or on a CUDA device that has the host's bits. Chosen at run time.
//
// All pointers of arguments and results are host memory whatever the backend; a device copies what it needs there and
// back. So a caller is written once, and who works on many tokens at a time pays for the copies once.
#pragma once

#include <memory>
#include <string>

#include "kernels/host/balance_loss.h"
#include "kernels/host/bias_update.h"
#include "kernels/host/dispatch.h"
#include "kernels/host/expert_choice.h"
#include "kernels/host/expert_load.h"
#include "kernels/host/lora.h"
#include "kernels/host/moe_layer.h"
#include "kernels/host/permute.h"
#include "kernels/host/quantised_weights.h"
#include "kernels/host/rounded_gate.h"
#include "kernels/host/router.h"
#include "kernels/host/router_backward.h"
#include "kernels/host/router_noise.h"
#include "kernels/host/router_regularisers.h"
#include "kernels/host/routing_metrics.h"
#include "kernels/host/sparse_mixer.h"
#include "kernels/host/token_loss.h"
#include "kernels/host/z_loss.h"

namespace moeaudit::kernels {

/// The host. Calls may come from several threads at a time. kLaunchFailed comes from devices alone: nothing of the
/// result is to be relied on then, and last_error() says why.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const { return std::string("host ") + host_backend(); }
  virtual std::string last_error() const { return {}; }
  virtual bool on_device() const { return false; }

  virtual Status gate_logits(const GateArgs<float, float>& a) { return kernels::gate_logits(a); }
  virtual Status gate_logits(const GateArgs<float, double>& a) { return kernels::gate_logits(a); }
  virtual Status gate_logits(const GateArgs<double, double>& a) { return kernels::gate_logits(a); }
  virtual Status rounded_gate_logits(const RoundedGateArgs& a, float* logits) {
    return kernels::rounded_gate_logits(a, logits);
  }
  virtual Status route(const RouteArgs<float>& a, const RouteResult<float>& r) { return kernels::route(a, r); }
  virtual Status route(const RouteArgs<double>& a, const RouteResult<double>& r) { return kernels::route(a, r); }
  virtual Status route_backward(const RouteBackwardArgs<double>& a, double* d_logits) {
    return kernels::route_backward(a, d_logits);
  }
  virtual Status expert_scale_backward(const ExpertScaleBackwardArgs<double>& a, double* d_scale) {
    return kernels::expert_scale_backward(a, d_scale);
  }
  virtual Status gate_backward(const GateBackwardArgs<double>& a, double* d_w, double* d_x) {
    return kernels::gate_backward(a, d_w, d_x);
  }
  virtual Status expert_choice(const ExpertChoiceArgs<double>& a, const ExpertChoiceResult<double>& r) {
    return kernels::expert_choice(a, r);
  }
  virtual Status expert_choice_backward(const std::int32_t* tokens_of, const double* d_weights, std::int64_t tokens,
                                        std::int64_t experts, std::int64_t capacity, double* d_scores) {
    return kernels::expert_choice_backward(tokens_of, d_weights, tokens, experts, capacity, d_scores);
  }
  virtual Status noisy_logits(const NoisyLogitsArgs<double>& a, double* out) { return kernels::noisy_logits(a, out); }
  virtual Status noisy_logits_backward(const NoisyLogitsArgs<double>& a, const double* upstream,
                                       double* d_noise_logits) {
    return kernels::noisy_logits_backward(a, upstream, d_noise_logits);
  }
  virtual Status jitter(const double* x, const double* factor, std::int64_t count, Float dtype, double* out) {
    return kernels::jitter(x, factor, count, dtype, out);
  }
  virtual Status sparse_mixer(const SparseMixerArgs<float>& a, const SparseMixerResult<float>& r) {
    return kernels::sparse_mixer(a, r);
  }
  virtual Status sparse_mixer(const SparseMixerArgs<double>& a, const SparseMixerResult<double>& r) {
    return kernels::sparse_mixer(a, r);
  }
  virtual Status sparse_mixer_backward(const SparseMixerBackwardArgs<double>& a, double* d_logits) {
    return kernels::sparse_mixer_backward(a, d_logits);
  }
  virtual Status balance_loss(const BalanceLossArgs<double>& a, const BalanceLossResult<double>& r) {
    return kernels::balance_loss(a, r);
  }
  virtual Status z_loss(const ZLossArgs<double>& a, const ZLossResult<double>& r) { return kernels::z_loss(a, r); }
  virtual Status bias_update(const BiasUpdateArgs& a, double* bias) { return kernels::bias_update(a, bias); }
  virtual Status cross_entropy(const CrossEntropyArgs<double>& a, const CrossEntropyResult<double>& r) {
    return kernels::cross_entropy(a, r);
  }
  virtual Status drop(const DropArgs<double>& a, const DropResult<double>& r) { return kernels::drop(a, r); }
  virtual Status count_choices(const CountArgs<std::int32_t>& a, std::int64_t* counts, std::int64_t* outside) {
    return kernels::count_choices(a, counts, outside);
  }
  virtual Status routing_statistics(const RoutingStatisticsArgs<double>& a, RoutingStatistics* out) {
    return kernels::routing_statistics(a, out);
  }
  virtual Status dequantise(const QuantisedWeights& w, double* out) {  // all of it
    return kernels::dequantise(w, 0, w.matrices * w.rows * w.columns, out);
  }
  virtual Status lora_merge(const LoraMergeArgs& a, bool unmerge, double* out) {
    return kernels::lora_merge(a, unmerge, out);
  }
  virtual Status lora_gradient(const LoraGradientArgs& a, const LoraGradient& r) {
    return kernels::lora_gradient(a, r);
  }
  virtual Status permute(const PermuteArgs& a, const Permutation& r) { return kernels::permute(a, r); }
  virtual Status combine(const Permutation& p, const RowShape& s, const double* rows, const double* weights,
                         double* y) {
    return kernels::combine(p, s, rows, weights, y);
  }
  virtual Status combine_backward(const Permutation& p, const RowShape& s, const double* rows, const double* weights,
                                  const double* d_y, double* d_rows, double* d_weights) {
    return kernels::combine_backward(p, s, rows, weights, d_y, d_rows, d_weights);
  }
  virtual Status moe_layer(const MoeLayerArgs<double>& a, const MoeLayerState<double>& s, double* y) {
    return kernels::moe_layer(a, s, y);
  }
  virtual Status moe_layer_backward(const MoeLayerArgs<double>& a, const MoeLayerState<double>& s, const double* d_y,
                                    const MoeLayerGradients<double>& g) {
    return kernels::moe_layer_backward(a, s, d_y, g);
  }
  virtual Status importance_loss(const ImportanceLossArgs<double>& a, const ImportanceLossResult<double>& r) {
    return kernels::importance_loss(a, r);
  }
  virtual Status load_loss(const LoadLossArgs<double>& a, const LoadLossResult<double>& r) {
    return kernels::load_loss(a, r);
  }
  virtual Status entropy_loss(const EntropyLossArgs<double>& a, const EntropyLossResult<double>& r) {
    return kernels::entropy_loss(a, r);
  }
  virtual Status gate_orthogonality(const GateOrthogonalityArgs<double>& a, const GateOrthogonalityResult<double>& r) {
    return kernels::gate_orthogonality(a, r);
  }
  virtual Status expert_overlap(const ExpertOverlapArgs<double>& a, const ExpertOverlapResult<double>& r) {
    return kernels::expert_overlap(a, r);
  }
  virtual Status score_variance(const ScoreVarianceArgs<double>& a, const ScoreVarianceResult<double>& r) {
    return kernels::score_variance(a, r);
  }
  virtual Status routing_margins(const MarginArgs<double>& a, const MarginResult& r) {
    return kernels::routing_margins(a, r);
  }
  virtual Status count_agreement(const AgreementArgs& a, std::int64_t* table, AgreementCounts* counts) {
    return kernels::count_agreement(a, table, counts);
  }
  virtual Status count_settled(const SettlingArgs& a, std::int64_t* tokens_settled) {
    return kernels::count_settled(a, tokens_settled);
  }
  virtual Status count_by_label(const CountArgs<std::int32_t>& a, const std::int32_t* labels, std::int64_t num_labels,
                                std::int64_t* table, std::int64_t* outside) {
    return kernels::count_by_label(a, labels, num_labels, table, outside);
  }
};

/// The one host of those who have no other backend.
inline Backend& on_host() {
  static Backend host;
  return host;
}

/// The first CUDA device; null, and why, where there is none or this binary was built without CUDA. The first call of
/// the CUDA runtime: a few tenths of a second.
std::unique_ptr<Backend> open_cuda(std::string* why_not);

}  // namespace moeaudit::kernels

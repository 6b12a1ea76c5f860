// Replays one router in several precisions.
#include "audit/measures/router_replay.h"

#include <cmath>
#include <cstring>

#include "audit/measures/router_inputs.h"
#include "kernels/host/elementary.h"
#include "kernels/host/quantised_weights.h"

namespace moeaudit {

namespace k = kernels;
using k::Float;

namespace {

ReadyMode make_ready(const Mode& mode, const Router& r) {
  ReadyMode ready;
  ready.mode = mode;
  if (!mode.correction.empty()) return ready;
  std::vector<float> w = r.w, bias = r.linear_bias;
  const auto round_both = [&](Float dtype) {
    k::round_values(w.data(), static_cast<std::int64_t>(w.size()), dtype, w.data());
    k::round_values(bias.data(), static_cast<std::int64_t>(bias.size()), dtype, bias.data());
  };
  if (mode.loaded != Float::kF64) round_both(mode.loaded);
  if (mode.trip == Trip::kNf4) k::nf4_round_trip(w.data(), static_cast<std::int64_t>(w.size()), w.data());
  if (mode.trip == Trip::kInt8) k::int8_row_round_trip(w.data(), r.rows(), r.hidden, w.data());
  round_both(mode.dtype);
  ready.same_weights = w == r.w && bias == r.linear_bias;
  if (mode.dtype == Float::kF32) {
    ready.packed_float = Aligned<float>(k::packed_gate_size<float>(r.rows(), r.hidden));
    k::pack_gate(w.data(), r.rows(), r.hidden, ready.packed_float.data());
    ready.bias_float = bias;
  } else {
    ready.packed_wide = Aligned<double>(k::packed_gate_size<double>(r.rows(), r.hidden));
    k::pack_gate(w.data(), r.rows(), r.hidden, ready.packed_wide.data());
    ready.bias_wide.assign(bias.begin(), bias.end());
  }
  return ready;
}

/// Slope of the score at a logit: how far a small change of the logit moves it.
double slope(const Routing& routing, double logit) {
  const double cap = routing.logit_softcap, l = k::softcapped(logit, cap, Float::kF64);
  const double of_cap = cap > 0 ? 1 - l / cap * (l / cap) : 1, s = k::sigmoid_exact_order(l);
  if (routing.scoring == Scoring::kSqrtSoftplus) {
    const double score = k::sqrt_softplus_exact_order(l);
    return score > 0 ? of_cap * s / (2 * score) : 0;
  }
  return of_cap * s * (1 - s);  // sigmoid; for a softmax with a correction bias this is the largest it can be
}

}  // namespace

std::string with_layer(std::string pattern, int layer) {
  const std::size_t at = pattern.find("{L}");
  if (at != std::string::npos) pattern.replace(at, 3, std::to_string(layer));
  return pattern;
}

std::string beside(const std::string& router, std::string_view weight, std::string_view pattern) {
  std::size_t same = 0;
  while (same < weight.size() && same < pattern.size() && weight[same] == pattern[same]) ++same;
  const std::string_view tail = weight.substr(same);
  if (same == 0 || !std::string_view(router).ends_with(tail)) return {};
  return router.substr(0, router.size() - tail.size()) + std::string(pattern.substr(same));
}

std::string read_router(const TensorStore& model, const RouterTable& table, const Routing& routing, std::size_t row,
                        Router* out) {
  out->layer = table.layer[row];
  out->tensor = table.tensor[row];
  out->experts = table.experts[row];
  out->hidden = table.hidden[row];
  if (out->experts < 1 || out->hidden < 1) return out->tensor + " is empty";
  if (routing.always_rows) {
    out->always = out->experts - table.expert_count[row];
    if (out->always < 1 || table.expert_count[row] < out->always)
      return out->tensor + " has " + std::to_string(out->experts) + " rows for " + std::to_string(table.expert_count[row]) +
             " experts, and for those that every token has besides";
    out->experts = table.expert_count[row];
  }
  std::string fault = read_gate(model, table, row, out->tensor, &out->w);
  const auto companion = [&](const std::string& pattern) {
    std::string name = beside(out->tensor, routing.weight_tensor, pattern);
    return model.find(name) == nullptr ? with_layer(pattern, out->layer) : name;
  };
  if (fault.empty() && routing.linear_bias) {
    fault = read_floats(model, companion(routing.linear_bias_tensor), out->rows(), &out->linear_bias);
  }
  if (fault.empty() && routing.correction_bias) {
    const std::string name =
        table.bias[row].empty() ? with_layer(routing.correction_bias_tensor, out->layer) : table.bias[row];
    fault = read_correction_bias(model, name, out->experts, &out->correction_bias);
  }
  if (fault.empty() && !routing.expert_scale_tensor.empty()) {
    fault = read_floats(model, companion(routing.expert_scale_tensor), out->experts, &out->expert_scale);
  }
  if (fault.empty() && !routing.global_scale_tensor.empty()) {
    std::vector<float> scale;
    fault = read_floats(model, companion(routing.global_scale_tensor), 1, &scale);
    if (fault.empty()) out->global_scale = scale[0];
  }
  return fault;
}

bool survives(const Router& r, Float dtype) {
  const auto same = [dtype](const std::vector<float>& v) {
    std::vector<float> rounded(v.size());
    k::round_values(v.data(), static_cast<std::int64_t>(v.size()), dtype, rounded.data());
    return rounded == v;
  };
  return same(r.w) && same(r.linear_bias);
}

template <class T>
k::RouteArgs<T> route_args(const Routing& routing, std::int64_t experts, std::int64_t top_k) {
  k::RouteArgs<T> a;
  a.experts = experts;
  a.top_k = top_k;
  a.score = routing.scoring == Scoring::kSoftmax   ? k::Score::kSoftmax
            : routing.scoring == Scoring::kSigmoid ? k::Score::kSigmoid
                                                   : k::Score::kSqrtSoftplus;
  a.score_after_top_k = routing.score_after_top_k;
  a.group_score = routing.group_score == GroupScore::kMax       ? k::GroupScore::kMax
                  : routing.group_score == GroupScore::kTop2Sum ? k::GroupScore::kTop2Sum
                                                                : k::GroupScore::kNone;
  a.groups = routing.groups;
  a.top_groups = routing.top_groups;
  a.group_mask_is_zero = routing.group_mask_is_zero;
  a.renormalise_norm = static_cast<T>(routing.renormalise_norm);
  // A softmax over the chosen sums to one already.
  a.renormalise = routing.renormalise && (routing.renormalise_norm != 1 || !routing.softmax_over_chosen());
  a.renormalise_eps = static_cast<T>(routing.renormalise_eps);
  a.renormalise_floor = static_cast<T>(routing.renormalise_floor);
  a.scaling = static_cast<T>(routing.scaling);
  a.logit_softcap = static_cast<T>(routing.logit_softcap);
  return a;
}

template <class T>
k::RouteArgs<T> route_args(const Routing& routing, const Router& router, std::int64_t top_k) {
  k::RouteArgs<T> a = route_args<T>(routing, router.experts, top_k);
  a.scaling *= static_cast<T>(router.global_scale);
  a.always = router.always;
  return a;
}

template k::RouteArgs<float> route_args<float>(const Routing&, std::int64_t, std::int64_t);
template k::RouteArgs<double> route_args<double>(const Routing&, std::int64_t, std::int64_t);
template k::RouteArgs<float> route_args<float>(const Routing&, const Router&, std::int64_t);
template k::RouteArgs<double> route_args<double>(const Routing&, const Router&, std::int64_t);

template <class T>
k::Status route_by(k::Backend& backend, const Routing& routing, const k::RouteArgs<T>& a, const k::RouteResult<T>& r, Float logits) {
  // The two best logits are the picks; a weight is not of those two alone.
  const k::Status status = backend.route(a, r);
  if (!routing.sparse_mixer || status != k::Status::kOk || r.weights == nullptr) return status;
  k::SparseMixerArgs<T> mixer;
  mixer.logits = a.logits, mixer.tokens = a.tokens, mixer.experts = a.experts, mixer.jitter = routing.mixer_jitter;
  mixer.logits_dtype = logits, mixer.tensor_dtype = a.tensor_dtype;
  return backend.sparse_mixer(mixer, {r.chosen, r.weights, nullptr, nullptr});
}
template k::Status route_by<float>(k::Backend&, const Routing&, const k::RouteArgs<float>&, const k::RouteResult<float>&, Float);
template k::Status route_by<double>(k::Backend&, const Routing&, const k::RouteArgs<double>&, const k::RouteResult<double>&, Float);

RouterReplay::RouterReplay(const Router& router, const Routing& routing, std::int64_t top_k, Float activations,
                           const std::vector<Mode>& modes, k::Backend& backend)
    : router_(router),
      backend_(backend),
      routing_(routing),
      top_k_(top_k),
      activations_(activations),
      truth_w_(k::packed_gate_size<double>(router.rows(), router.hidden)),
      truth_bias_(router.linear_bias.begin(), router.linear_bias.end()),
      correction_wide_(router.correction_bias.begin(), router.correction_bias.end()),
      scale_wide_(router.expert_scale.begin(), router.expert_scale.end()) {
  k::pack_gate(router.w.data(), router.rows(), router.hidden, truth_w_.data());
  for (const Mode& mode : modes) modes_.push_back(make_ready(mode, router));
}

/// The last chosen and the first not chosen expert are closer than half a unit of the logits' dtype at each of them, so
/// that rounding alone can bring them level.
bool RouterReplay::near_tie(Float dtype, const double* logits, const double* choice, std::int32_t last,
                            std::int32_t next) const {
  if (next < 0) return false;
  double reach_last = 0.5 * k::spacing(logits[last], dtype), reach_next = 0.5 * k::spacing(logits[next], dtype);
  if (correction_wide_.empty()) {  // the score grows with the logit: compare logits (a masked expert is not in reach)
    return choice[next] > -INFINITY && logits[last] - logits[next] <= reach_last + reach_next;
  }
  reach_last *= slope(routing_, logits[last]);
  reach_next *= slope(routing_, logits[next]);
  return choice[last] - choice[next] <= reach_last + reach_next;
}

/// Logits of one mode into s.narrow and s.narrow_always (every value of a mode's dtype is a float32).
void RouterReplay::mode_logits(const ReadyMode& ready, std::int64_t n, Scratch& s) const {
  const Router& r = router_;
  const std::int64_t count = n * r.experts;
  const Float dtype = ready.mode.dtype;
  if (dtype == Float::kF32) {
    const float* bias = ready.bias_float.empty() ? nullptr : ready.bias_float.data();
    backend_.gate_logits(k::GateArgs<float, float>{s.x.data(), ready.packed_float.data(), bias, n, r.hidden, r.rows(),
                                             s.narrow.data()});
    split_rows(r, n, s.narrow.data(), s.narrow_always.data());
    return;
  }
  const float* x = s.x.data();
  bool same_x = true;
  if (dtype != activations_) {
    k::round_values(x, n * r.hidden, dtype, s.rounded_x.data());
    same_x = std::memcmp(x, s.rounded_x.data(), sizeof(float) * static_cast<std::size_t>(n * r.hidden)) == 0;
    x = s.rounded_x.data();
  }
  double* wide = s.truth.data();
  std::vector<double>* always = &s.truth_always;
  if (!same_x || !ready.same_weights) {
    wide = s.wide.data();
    const double* bias = ready.bias_wide.empty() ? nullptr : ready.bias_wide.data();
    backend_.gate_logits(k::GateArgs<float, double>{x, ready.packed_wide.data(), bias, n, r.hidden, r.rows(), wide});
    split_rows(r, n, wide, s.wide_always.data());
    always = &s.wide_always;
  }
  k::round_values(wide, count, dtype, s.wide.data());
  std::copy(s.wide.data(), s.wide.data() + count, s.narrow.data());
  k::round_values(always->data(), n * r.always, dtype, s.wide_always.data());
  std::copy(s.wide_always.begin(), s.wide_always.begin() + n * r.always, s.narrow_always.begin());
}

void RouterReplay::compare_token(std::int64_t t, Scratch& s, Tally* tally) const {
  const std::int64_t n = top_k_;
  const std::int32_t* truth = s.chosen.data() + t * n;
  const std::int32_t* chosen = s.mode_chosen.data() + t * n;
  double worst = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    const std::int32_t* at = std::find(truth, truth + n, chosen[j]);
    if (at == truth + n) {
      ++tally->flipped;
      return;
    }
    worst =
        std::max(worst, std::fabs(static_cast<double>(s.narrow_weights[t * n + j]) - s.weights[t * n + (at - truth)]));
  }
  tally->weight_error = std::max(tally->weight_error, worst);
}

void RouterReplay::run_mode(const ReadyMode& ready, std::int64_t n, Scratch& s, Tally* tally) const {
  const Router& r = router_;
  mode_logits(ready, n, s);
  k::RouteArgs<float> args = route_args<float>(routing_, r, top_k_);
  args.logits = s.narrow.data(), args.always_logits = s.narrow_always.data();
  args.tokens = n;
  args.correction_bias = r.correction_bias.empty() ? nullptr : r.correction_bias.data();
  args.expert_scale = r.expert_scale.empty() ? nullptr : r.expert_scale.data();
  if (routing_.scores_dtype == DType::kUnknown && ready.mode.dtype != Float::kF32) args.tensor_dtype = ready.mode.dtype;
  if (routing_.scores_cast_back && activations_ != Float::kF32) args.tensor_dtype = activations_;
  route_by(backend_, routing_, args, k::RouteResult<float>{s.mode_chosen.data(), s.narrow_weights.data(), nullptr, nullptr},
           ready.mode.dtype);
  for (std::int64_t t = 0; t < n; ++t) {
    const double* truth = s.truth.data() + t * r.experts;
    for (std::int64_t e = 0; e < r.experts; ++e) {
      tally->overflowed += !std::isfinite(s.narrow.data()[t * r.experts + e]) && std::isfinite(truth[e]) ? 1 : 0;
    }
    const std::int32_t last = s.chosen[static_cast<std::size_t>((t + 1) * top_k_ - 1)];
    tally->near_ties +=
        near_tie(ready.mode.dtype, truth, s.choice.data() + t * r.experts, last, s.runner_up[t]) ? 1 : 0;
    compare_token(t, s, tally);
  }
}

/// The truth's logits and another correction bias, in float64.
void RouterReplay::run_correction(const ReadyMode& ready, std::int64_t n, Scratch& s, Tally* tally) const {
  k::RouteArgs<double> args = route_args<double>(routing_, router_, top_k_);
  args.logits = s.truth.data(), args.always_logits = s.truth_always.data();
  args.tokens = n;
  args.correction_bias = ready.mode.correction.data();
  args.expert_scale = scale_wide_.empty() ? nullptr : scale_wide_.data();
  backend_.route(args, k::RouteResult<double>{s.mode_chosen.data(), s.mode_weights.data(), nullptr, nullptr});
  std::copy(s.mode_weights.begin(), s.mode_weights.begin() + n * top_k_, s.narrow_weights.begin());
  for (std::int64_t t = 0; t < n; ++t) compare_token(t, s, tally);
}

/// All modes on the n tokens of s.x.
void RouterReplay::run(std::int64_t n, Scratch& s, TileTally* out) const {
  const Router& r = router_;
  const double* bias = truth_bias_.empty() ? nullptr : truth_bias_.data();
  backend_.gate_logits(k::GateArgs<float, double>{s.x.data(), truth_w_.data(), bias, n, r.hidden, r.rows(), s.truth.data()});
  split_rows(r, n, s.truth.data(), s.truth_always.data());
  k::RouteArgs<double> args = route_args<double>(routing_, r, top_k_);
  args.logits = s.truth.data(), args.always_logits = s.truth_always.data();
  args.tokens = n;
  args.correction_bias = correction_wide_.empty() ? nullptr : correction_wide_.data();
  args.expert_scale = scale_wide_.empty() ? nullptr : scale_wide_.data();
  route_by(backend_, routing_, args,
           k::RouteResult<double>{s.chosen.data(), s.weights.data(), s.runner_up.data(), s.choice.data()}, Float::kF64);
  out->tokens = n;
  for (std::int64_t i = 0; i < n * r.experts; ++i)
    out->max_abs_logit = std::max(out->max_abs_logit, std::fabs(s.truth.data()[i]));
  out->modes.resize(modes_.size());
  for (std::size_t m = 0; m < modes_.size(); ++m) {
    if (modes_[m].mode.correction.empty()) run_mode(modes_[m], n, s, &out->modes[m]);
    else run_correction(modes_[m], n, s, &out->modes[m]);
  }
}

}  // namespace moeaudit

#include "reference/executable/compute.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <vector>

#include "reference/balance_loss.h"
#include "reference/dispatch.h"
#include "reference/expert_choice.h"
#include "reference/expert_load.h"
#include "reference/lora.h"
#include "reference/moe_layer.h"
#include "reference/permute.h"
#include "reference/quantised_weights.h"
#include "reference/router.h"
#include "reference/router_noise.h"
#include "reference/router_regularisers.h"
#include "reference/routing_metrics.h"
#include "reference/sparse_mixer.h"
#include "reference/token_loss.h"

namespace moeaudit::reference {
namespace {

at::Tensor get(const Inputs& in, const char* name) {
  const auto at = in.find(name);
  return at == in.end() ? at::Tensor() : at->second;
}
double largest(const at::Tensor& t) { return t.numel() == 0 ? 0.0 : t.abs().max().item<double>(); }
double range_of(const at::Tensor& logits) { return (logits.amax(-1) - logits.amin(-1)).max().item<double>(); }
std::int64_t last(const at::Tensor& t) { return t.size(-1); }
double twice(double roundings) { return 2 * std::ceil(roundings); }
/// Of a softmax: l - max l counts 2 |range| of them (numerator and sum), exponentials 2 and 2, E additions, a division.
double softmax_roundings(const at::Tensor& logits) {
  return 2 * range_of(logits) + static_cast<double>(last(logits)) + 5;
}
/// Of the logarithm of a sum of exponentials, of the larger of 1 and itself (kernels/host/bounds.h, log_sum_exp()).
double log_sum_exp_roundings(const at::Tensor& logits) {
  const double e = static_cast<double>(last(logits));
  return e + 4 + 2 * range_of(logits) + 4 * std::log(e + 1);
}
/// What the gradient of `value` by `t` is; t must require one.
at::Tensor gradient(const at::Tensor& value, const at::Tensor& t, const at::Tensor& upstream = {}) {
  t.mutable_grad() = at::Tensor();
  value.backward(upstream, /*retain_graph=*/true);
  return t.grad().clone();
}
at::Tensor leaf(const at::Tensor& t) { return t.detach().clone().set_requires_grad(true); }

template <class E>
E one_of(const Json& options, const char* key, const std::vector<std::pair<const char*, E>>& names) {
  const std::string name = options.value(key, std::string(names.front().first));
  for (const auto& [known, value] : names) {
    if (name == known) return value;
  }
  throw std::runtime_error("option " + std::string(key) + " has no value " + name);
}

Outputs gate(const Json&, const Inputs& in) {
  const at::Tensor x = get(in, "x"), w = get(in, "w"), bias = get(in, "bias");
  const double scale = largest(gate_logits(x.abs(), w.abs(), bias.defined() ? bias.abs() : bias));
  return {{"logits", {gate_logits(x, w, bias), twice(static_cast<double>(last(x)) + 1), scale}}};
}

/// p of the norm: a number, or "inf", which JSON has no number for.
double norm_of(const Json& j) {
  const auto p = j.find("renormalise_norm");
  if (p == j.end()) return 1.0;
  return p->is_number() ? p->get<double>() : std::numeric_limits<double>::infinity();
}

RouteOptions route_options(const Json& j) {
  RouteOptions o;
  o.top_k = j.value("top_k", 2);
  o.score = one_of<Score>(
      j, "score", {{"softmax", Score::kSoftmax}, {"sigmoid", Score::kSigmoid}, {"sqrtsoftplus", Score::kSqrtSoftplus}});
  o.score_after_top_k = j.value("score_after_top_k", false);
  o.group_score = one_of<GroupScore>(
      j, "group_score",
      {{"none", GroupScore::kNone}, {"max", GroupScore::kMax}, {"top2_sum", GroupScore::kTop2Sum}});
  o.groups = j.value("groups", 1);
  o.top_groups = j.value("top_groups", 1);
  o.renormalise = j.value("renormalise", false);
  o.renormalise_eps = j.value("renormalise_eps", 0.0);
  o.renormalise_floor = j.value("renormalise_floor", 0.0);
  o.renormalise_norm = norm_of(j);
  o.sigmoid_offset = j.value("sigmoid_offset", 0.0);
  o.scaling = j.value("scaling", 1.0);
  o.logit_softcap = j.value("logit_softcap", 0.0);
  return o;
}
RouteInputs route_inputs(const Inputs& in) {
  const at::Tensor given = get(in, "given");
  return {get(in, "correction_bias"), get(in, "expert_scale"), given.defined() ? given.to(at::kLong) : given, get(in, "always_logits")};
}
/// The largest |ln score|: of a softmax what its logits span and the logarithm of a sum of at most E, of a sigmoid or the
/// root of a softplus the largest logit and 1.
double logarithm(const RouteOptions& o, const at::Tensor& logits) {
  return o.score == Score::kSoftmax ? range_of(logits) + std::log(static_cast<double>(last(logits))) : largest(logits) + 1;
}
/// Of the norm of `terms` scores (kernels/host/bounds.h, norm_relative()): additions, or also powers, of which the root leaves a
/// p-th, and the root itself.
double norm_roundings(const RouteOptions& o, double terms, double range) {
  const double p = o.renormalise_norm;
  if (p == 1) return terms;
  if (std::isinf(p)) return 0;
  if (p == 2) return (terms + 1) / 2 + 1;
  return 5 * range + (3 + terms) / p + 6 * (range + std::log(terms) / p) + 3;
}
double route_roundings(const RouteOptions& o, const Inputs& in) {
  const at::Tensor logits = get(in, "logits"), always = get(in, "always_logits");
  double score = o.score == Score::kSoftmax ? softmax_roundings(logits) : 10;
  // A capped logit has 11 roundings of its size (kernels/host/bounds.h, softcapped()), which a score feels as often as it is large.
  if (o.logit_softcap > 0) score += 2 * 11 * o.logit_softcap;
  const double terms = static_cast<double>(o.top_k + (always.defined() ? last(always) : 0));
  if (o.sigmoid_offset > 0) score += 2;
  // Of the weight and of their norm; division, scaling, the expert's scale.
  return 2 * score + norm_roundings(o, terms, logarithm(o, logits)) + 7;
}

Outputs route_of(const Json& j, const Inputs& in) {
  const at::Tensor logits = get(in, "logits");
  const RouteOptions o = route_options(j);
  Routed r = route(logits, o, route_inputs(in));
  if (j.value("weighs", std::string("scores")) == "choice") {  // W1: what chose is what weighs
    r.weights = r.choice.gather(-1, r.chosen);
    r.weights = r.weights / r.weights.sum(-1, true);
  }
  const double n = twice(route_roundings(o, in));
  Outputs out = {{"chosen", {r.chosen, 0, 0}}, {"weights", {r.weights, n, largest(r.weights)}}};
  if (r.always_weights.defined()) out["always_weights"] = {r.always_weights, n, largest(r.always_weights)};
  return out;
}

Outputs route_backward(const Json& j, const Inputs& in) {
  const at::Tensor logits = leaf(get(in, "logits")), upstream = get(in, "d_weights"), of_always = get(in, "d_always_weights");
  const RouteOptions o = route_options(j);
  RouteInputs inputs = route_inputs(in), unscaled = inputs;
  if (inputs.always_logits.defined()) inputs.always_logits = leaf(inputs.always_logits);
  if (inputs.expert_scale.defined()) inputs.expert_scale = leaf(inputs.expert_scale);
  const Routed r = route(logits, o, inputs);
  RouteOptions raw = o;
  raw.renormalise = false, raw.scaling = 1;
  unscaled.expert_scale = at::Tensor();
  const at::Tensor scores = route(logits.detach(), raw, unscaled).weights;
  const double p = o.renormalise_norm, least = at::norm(scores, p, at::IntArrayRef{-1}).min().item<double>();
  // Terms of one logit: scaling u_j / sum, and scaling sum_j u_j s_j / sum^2, both times a slope of at most 1.
  const double by_expert = inputs.expert_scale.defined() ? largest(inputs.expert_scale) : 1;
  const double largest_upstream = std::max(by_expert * largest(upstream), of_always.defined() ? largest(of_always) : 0);
  const double terms = static_cast<double>(o.top_k + (of_always.defined() ? last(of_always) : 0));
  const double scale = 2 * o.scaling * terms * largest_upstream / (o.renormalise ? least : 1);
  double roundings = 2 * route_roundings(o, in) + static_cast<double>(last(logits)) + 8;
  // The second term times (s / norm)^(p - 1), at most 1 for p >= 1 (bounds.h, route_backward_normed_relative()).
  if (p != 1 && !std::isinf(p))
    roundings += std::fabs(p - 1) * route_roundings(o, in) + 10 * (p + 1) * (logarithm(o, logits) + std::log(terms) / p) + terms + 9;
  const double n = twice(roundings);
  at::Tensor loss = (r.weights * upstream).sum();
  if (of_always.defined()) loss = loss + (r.always_weights * of_always).sum();
  Outputs out = {{"chosen", {r.chosen, 0, 0}}, {"d_logits", {gradient(loss, logits), n, scale}}};
  if (of_always.defined()) out["d_always_logits"] = {gradient(loss, inputs.always_logits), n, scale};
  if (inputs.expert_scale.defined()) {
    // A term is d loss / d weight times the weight without its scale; their sum is over all choices.
    const at::Tensor sizes = (route(logits.detach(), o, unscaled).weights * upstream).abs();
    const double of_sum = twice(route_roundings(o, in) + 1 + static_cast<double>(sizes.numel()));
    out["d_expert_scale"] = {gradient(loss, inputs.expert_scale), of_sum, sizes.sum().item<double>()};
  }
  return out;
}

Outputs gate_backward(const Json&, const Inputs& in) {
  const at::Tensor d = get(in, "d_logits"), x = get(in, "x"), w = get(in, "w");
  return {{"d_w", {at::mm(d.t(), x), twice(static_cast<double>(d.size(0))), largest(at::mm(d.abs().t(), x.abs()))}},
          {"d_x", {at::mm(d, w), twice(static_cast<double>(d.size(1))), largest(at::mm(d.abs(), w.abs()))}}};
}

Outputs rounded_gate(const Json& j, const Inputs& in) {
  const at::Tensor logits = rounded_gate_logits(get(in, "x"), get(in, "w"), get(in, "bias"), at::kBFloat16, j.value("stretch", 1));
  return {{"logits", {logits.to(at::kDouble), 0, 0}}};
}

Outputs balance(const Json& j, const Inputs& in) {
  BalanceLossOptions o;
  o.first_choice_only = j.value("first_choice", false);
  o.over_k = j.value("over_k", true);
  o.balanced = one_of<Balanced>(j, "balanced",
                                {{"experts", Balanced::kExperts},
                                 {"devices", Balanced::kDevices},
                                 {"communication", Balanced::kCommunication}});
  o.devices = j.value("devices", 1);
  o.most_devices = j.value("most_devices", 1);
  o.divide_by_all_tokens = j.value("all_tokens", false);
  o.sum_over_sets = j.value("sum", false);
  o.over_sum = j.value("over_sum", false);
  o.sum_eps = j.value("sum_eps", 0.0);
  o.top_k = j.value("top_k", 2);
  std::vector<std::int64_t> sets;
  if (const at::Tensor s = get(in, "sets"); s.defined()) sets.assign(s.data_ptr<std::int64_t>(), s.data_ptr<std::int64_t>() + s.numel());
  const auto loss_of = [&](const at::Tensor& p) {
    return balance_loss(p, get(in, "chosen"), o, get(in, "valid"), sets, get(in, "counts"), get(in, "counted")) *
           j.value("factor", 1.0);
  };
  const at::Tensor p = leaf(get(in, "probabilities")), loss = loss_of(p);
  const double over_sum = o.over_sum ? static_cast<double>(p.size(1)) + 2 : 0;
  const double sizes = static_cast<double>(p.size(0) + p.size(1)) + static_cast<double>(sets.size()) + over_sum;
  Outputs out = {{"loss", {loss.detach(), twice(sizes + 9), largest(loss_of(p.detach().abs()))}}};
  if (!j.value("gradient", false)) return out;
  const at::Tensor slope = gradient(loss, p);
  // Over the sum: a difference of weights, and E of them times probabilities.
  out["gradient"] = {slope, twice(o.over_sum ? 2 * over_sum + 12 : 9),
                     o.over_sum ? static_cast<double>(2 * p.size(1)) / p.detach().sum(-1).min().item<double>() : largest(slope)};
  return out;
}

Outputs z(const Json& j, const Inputs& in) {
  const at::Tensor logits = leaf(get(in, "logits")), valid = get(in, "valid");
  const at::Tensor lse = at::logsumexp(logits.detach(), -1);
  const double size = std::max(largest(lse), 1.0), tokens = static_cast<double>(logits.size(0)), factor = j.value("factor", 1.0);
  const double n = twice(2 * log_sum_exp_roundings(logits.detach()) + tokens + 4);
  const std::string what = j.value("value", std::string("loss"));
  if (what == "mean") return {{"loss", {lse.mean(), n, size}}};
  if (what == "squared_mean") return {{"loss", {lse.mean() * lse.mean(), n, size * size}}};
  const at::Tensor loss = z_loss(logits, valid, j.value("all_tokens", false)) * factor;
  Outputs out = {{"loss", {loss.detach(), n, size * size * factor}}};
  if (!j.value("gradient", false)) return out;
  const double slope_scale = 2 * size * factor / (valid.defined() ? valid.sum().item<double>() : tokens);
  out["gradient"] = {gradient(loss, logits),
                     twice(softmax_roundings(logits.detach()) + log_sum_exp_roundings(logits.detach()) + 4), slope_scale};
  return out;
}

/// Variants Z4 and Z5: no log-sum-exp at all.
Outputs squares(const Json& j, const Inputs& in) {
  const at::Tensor v = get(in, "logits"), sum = (v * v).sum() * j.value("factor", 1.0);
  return {{"loss", {sum, twice(static_cast<double>(v.numel()) + 2), largest(sum)}}};
}

Outputs bias(const Json& j, const Inputs& in) {
  const at::Tensor before = get(in, "bias"), given = get(in, "counts");
  const at::Tensor counts = given.dim() == 4 ? counted(given, j.value("counts_bf16", false) ? at::kBFloat16 : at::kDouble) : given;
  const double rate = j.value("rate", 0.001);
  const std::string centre = j.value("centre", std::string("nothing"));
  const bool proportional = j.value("proportional", false);
  const at::Tensor after = bias_update(before, counts, rate, proportional, centre == "step", centre == "bias");
  const double step = std::fabs(rate) * (proportional ? 2 * largest(counts.to(at::kDouble)) : 1);
  return {{"bias", {after, twice(2 * static_cast<double>(last(counts)) + 6), 2 * (largest(before) + step)}}};
}

Outputs cross_entropy(const Json& j, const Inputs& in) {
  const at::Tensor logits = leaf(get(in, "logits")), labels = get(in, "labels");
  const at::Tensor sum = cross_entropy_sum(logits, labels);
  const double weight = j.value("weight", 1.0), tokens = static_cast<double>(logits.size(0));
  const double scale = tokens * std::max(1.0, largest(at::logsumexp(logits.detach(), -1)) + largest(logits.detach()));
  return {{"sum", {sum.detach(), twice(log_sum_exp_roundings(logits.detach()) + tokens + 3), scale}},
          {"labels", {labels.ne(-100).sum(), 0, 0}},
          {"gradient", {gradient(sum, logits) * weight, twice(softmax_roundings(logits.detach()) + 3), weight}}};
}

Outputs normalise(const Json& j, const Inputs& in) {
  using N = Normalisation;
  const auto how = one_of<N>(j, "how",
                             {{"tokens", N::kTokens},
                              {"mean_of_means", N::kMeanOfMeans},
                              {"means_summed", N::kMeansSummed},
                              {"means_divided_twice", N::kMeansDividedTwice},
                              {"tokens_times_steps", N::kTokensTimesSteps},
                              {"tokens_divided_twice", N::kTokensDividedTwice},
                              {"tokens_of_rank", N::kTokensOfRank},
                              {"tokens_times_ranks", N::kTokensTimesRanks},
                              {"tokens_over_ranks", N::kTokensOverRanks},
                              {"sum", N::kSum}});
  const at::Tensor loss = normalised(how, get(in, "sums"), get(in, "labels"));
  return {{"loss", {loss, twice(static_cast<double>(get(in, "sums").numel()) + 4), largest(loss)}}};
}

/// Options: tp, cp, ep, sequences.
Outputs weights_of_terms(const Json& j, const Inputs& in) {
  using W = TermWeight;
  const auto how = one_of<W>(j, "how",
                             {{"mean", W::kMean},
                              {"summed", W::kSummed},
                              {"over_tokens", W::kOverTokens},
                              {"tokens_of_shard", W::kTokensOfShard},
                              {"tokens_of_sequence", W::kTokensOfSequence},
                              {"tokens_reduced_twice", W::kTokensReducedTwice},
                              {"without_context", W::kWithoutContext},
                              {"all_tokens", W::kAllTokens},
                              {"divided_twice", W::kDividedTwice},
                              {"scale_of_last", W::kScaleOfLast},
                              {"over_expert_ranks", W::kOverExpertRanks}});
  const StepShape step{j.value("tp", 1), j.value("cp", 1), j.value("ep", 1), j.value("sequences", 1)};
  const at::Tensor terms = leaf(at::ones(get(in, "labels").sizes(), at::kDouble));
  const at::Tensor weight = gradient(joined_terms(how, step, terms, get(in, "tokens"), get(in, "labels")), terms);
  return {{"weight", {weight, twice(6), largest(weight)}}};
}

Outputs dispatch(const Json& j, const Inputs& in) {
  const auto order = one_of<DropOrder>(j, "order",
                                       {{"tokens", DropOrder::kTokens},
                                        {"choices", DropOrder::kChoices},
                                        {"weights", DropOrder::kWeights},
                                        {"keys", DropOrder::kKeys},
                                        {"batch_prioritised", DropOrder::kBatchPrioritised}});
  const at::Tensor weights = get(in, "weights");
  const at::Tensor place = drop(get(in, "chosen"), weights, get(in, "keys"), get(in, "scores"), order, j.value("capacity", 4));
  Outputs out = {{"place", {place, 0, 0}}};
  if (weights.defined())
    out["weights"] = {kept_weights(weights, place, true, std::numeric_limits<double>::epsilon()), twice(static_cast<double>(weights.size(1))), 1};
  return out;
}

Outputs capacities(const Json& j, const Inputs& in) {
  const auto form = one_of<CapacityForm>(j, "form",
                                         {{"megatron", CapacityForm::kMegatron},
                                          {"deepspeed", CapacityForm::kDeepSpeed},
                                          {"megablocks", CapacityForm::kMegaBlocks},
                                          {"olmo_core", CapacityForm::kOlmoCore},
                                          {"tutel", CapacityForm::kTutel},
                                          {"fastmoe", CapacityForm::kFastMoE}});
  return {{"places", {capacity(form, get(in, "cases"), get(in, "factors")), 0, 0}}};
}

Outputs choice_of_experts(const Json& j, const Inputs& in) {
  const at::Tensor scores = leaf(get(in, "scores")), valid = get(in, "valid");
  const ExpertChosen c = expert_choice(scores, j.at("capacity"), valid.defined() ? valid.to(at::kBool) : valid);
  const at::Tensor d = gradient(c.weights, scores, get(in, "d_weights"));
  return {{"tokens", {c.tokens.contiguous(), 0, 0}},
          {"weights", {c.weights.detach(), 0, 0}},
          {"taken", {at::bincount(c.tokens.reshape({-1}), {}, scores.size(0)), 0, 0}},
          {"d_scores", {d, 0, 0}}};
}

Outputs noise(const Json& j, const Inputs& in) {
  const at::Tensor logits = get(in, "logits"), drawn = get(in, "noise"), given = get(in, "raw");
  const double eps = j.value("eps", 0.0), scale = j.value("scale", 0.0);
  if (!given.defined())
    return {{"noisy", {noisy_logits(logits, drawn, given, eps, scale), twice(2), largest(logits.abs() + drawn.abs() * scale)}}};
  const at::Tensor raw = leaf(given), noisy = noisy_logits(logits, drawn, raw, eps);
  const at::Tensor slope = gradient(noisy, raw, get(in, "d_noisy"));
  // A softplus takes 8 roundings, eps, the product and the sum one each; a sigmoid 4, its argument none, two products.
  return {{"noisy", {noisy.detach(), twice(11), largest(logits.abs() + drawn.abs() * (at::softplus(given) + eps))}},
          {"d_raw", {slope, twice(7), largest(slope)}}};
}

/// The product of two bfloat16 or of values as short is exact in float32, so the one rounding is that to bfloat16.
Outputs jittered(const Json&, const Inputs& in) {
  return {{"x", {jitter(get(in, "x"), get(in, "factor")).to(at::kBFloat16).to(at::kDouble), 0, 0}}};
}

Outputs mixer(const Json& j, const Inputs& in) {
  const at::Tensor logits = leaf(get(in, "logits")), given = get(in, "given"), upstream = get(in, "d_weights");
  const Mixed m = sparse_mixer(logits, j.value("jitter", 0.01), given.defined() ? given.to(at::kLong) : given, get(in, "draws"));
  const at::Tensor d = given.defined() ? sparse_mixer_gradient(m, upstream) : gradient(m.weights, logits, upstream);
  const double score = softmax_roundings(get(in, "logits"));
  return {{"chosen", {m.chosen, 0, 0}},
          {"weights", {m.weights.detach(), twice(score + 1), 1}},
          {"kept", {m.kept.to(at::kLong), 0, 0}},
          {"probabilities", {m.probabilities.detach(), twice(score), 1}},
          {"d_logits", {d, twice(2 * score + 4), 4 * largest(upstream)}}};
}

at::Tensor numbers(const std::map<std::string, double>& m, const std::vector<const char*>& names) {
  std::vector<double> v;
  for (const char* name : names) v.push_back(m.at(name));
  return at::tensor(v, at::kDouble);
}

Outputs load_of_choices(const Json& j, const Inputs& in) {
  const std::int64_t experts = j.value("experts", 8);
  const at::Tensor counts = count_choices(get(in, "chosen"), experts);
  const at::Tensor s = numbers(load_statistics(counts), {"max_violation", "min_violation", "cv_population", "cv_sample",
                                                         "entropy", "normalised_entropy", "effective_experts",
                                                         "kl_to_uniform", "gini"});
  return {{"counts", {counts, 0, 0}},
          {"statistics", {s, twice(4 * static_cast<double>(experts) + 16), std::max(largest(s), static_cast<double>(experts))}}};
}
Outputs routing_load(const Json&, const Inputs& in) {
  const at::Tensor p = get(in, "probabilities");
  const at::Tensor s = numbers(routing_statistics(p, get(in, "chosen")),
                               {"token_entropy", "mean_entropy", "mutual_information", "confidence"});
  return {{"statistics", {s, twice(static_cast<double>(p.size(0) + 2 * p.size(1)) + 16), 2 * std::log(static_cast<double>(p.size(1))) + 1}}};
}

Outputs dequantise(const Json& j, const Inputs& in) {
  const std::int64_t rows = j.at("rows"), columns = j.at("columns");
  const at::Tensor codes = get(in, "codes").to(at::kByte);
  const std::string code = j.at("code"), scale = j.value("scale", std::string("f32"));
  const bool high = j.value("high_half_first", false);
  at::Tensor v = code == "e4m3"   ? small_float_values(codes, 4, 3, Specials::kAllOnes)
                 : code == "e5m2" ? small_float_values(codes, 5, 2, Specials::kIeee)
                 : code == "e2m1" ? small_float_values(halves(codes, high), 2, 1, Specials::kNone)
                 : code == "int8" ? codes.to(at::kChar).to(at::kDouble)
                                  : get(in, "table").index_select(0, halves(codes, high).to(at::kLong));
  at::Tensor s = get(in, "scales");
  if (scale == "e8m0") s = exponent_values(s.to(at::kByte));
  if (scale == "e4m3") s = small_float_values(s.to(at::kByte), 4, 3, Specials::kAllOnes);
  if (scale == "nested")
    s = nested_scales(s.to(at::kByte), get(in, "nested_map").to(at::kFloat), get(in, "nested_absmax").to(at::kFloat),
                      j.at("nested_block"), j.at("nested_offset").get<float>())
            .to(at::kDouble);
  s = s * j.value("factor", 1.0) / j.value("divisor", 1.0);
  const std::int64_t rb = j.at("row_block"), cb = j.at("column_block");
  s = s.to(at::kDouble).reshape({1, (rows + rb - 1) / rb, (columns + cb - 1) / cb});
  v = block_scaled(v.narrow(0, 0, rows * columns).reshape({1, rows, columns}), s, rb, cb);
  return {{"values", {v.reshape({rows, columns}), twice(3), largest(v)}}};
}

Outputs lora_merging(const Json& j, const Inputs& in) {
  const at::Tensor w = get(in, "w"), a = get(in, "a"), b = get(in, "b");
  const double s = j.value("scale", 1.0);
  const at::ScalarType stored = j.value("stored", std::string("f64")) == "bf16" ? at::kBFloat16 : at::kDouble;
  const at::Tensor m =
      lora_merge(w, a, b, s, at::kDouble, at::kDouble, at::kDouble, at::kDouble, stored, j.value("unmerge", false));
  // Rounded to bfloat16: the inputs are such that no sum comes near the middle of two of its values, so equal.
  if (stored != at::kDouble) return {{"merged", {m, 0, 0}}};
  return {{"merged", {m, twice(static_cast<double>(a.size(0)) + 4), largest(w.abs() + s * at::mm(b.abs(), a.abs()))}}};
}
Outputs lora_gradients(const Json& j, const Inputs& in) {
  const double s = j.value("scale", 1.0);
  const at::Tensor d = get(in, "d_y"), w = get(in, "w"), zero = at::zeros_like(w);
  const auto all = [&](const std::function<at::Tensor(const at::Tensor&)>& of) {
    const at::Tensor x = leaf(of(get(in, "x"))), a = leaf(of(get(in, "a"))), b = leaf(of(get(in, "b")));
    lora_forward(x, zero, a, b, s).backward(of(d));
    return std::vector<at::Tensor>{a.grad(), b.grad(), x.grad()};
  };
  const auto g = all([](const at::Tensor& t) { return t; }), size = all([](const at::Tensor& t) { return t.abs(); });
  const double n = twice(static_cast<double>(w.size(0) + w.size(1) + d.size(0) + get(in, "a").size(0)) + 4);
  return {{"d_a", {g[0], n, largest(size[0])}}, {"d_b", {g[1], n, largest(size[1])}}, {"d_x", {g[2], n, largest(size[2])}}};
}

Outputs permutation(const Json&, const Inputs& in) {
  const at::Tensor chosen = get(in, "chosen"), row = permute(chosen);
  const at::Tensor rows = leaf(get(in, "rows")), weights = leaf(get(in, "weights")), d_y = get(in, "d_y");
  const at::Tensor y = combine(rows, row, weights);
  const double k = static_cast<double>(chosen.size(1)), hidden = static_cast<double>(rows.size(1));
  const double r = largest(rows.detach()), w = largest(weights.detach()), d = largest(d_y);
  return {{"row_of_slot", {row, 0, 0}},
          {"y", {y.detach(), twice(k + 1), k * r * w}},
          {"d_rows", {gradient(y, rows, d_y), twice(2), d * w}},
          {"d_weights", {gradient(y, weights, d_y), twice(hidden + 8), hidden * d * r}}};
}

Outputs layer(const Json& j, const Inputs& in) {
  ExpertForm form;
  form.alpha = j.value("alpha", 1.0);
  form.up_offset = j.value("up_offset", 0.0);
  const at::Tensor chosen = get(in, "chosen");
  const auto run = [&](const ExpertForm& f, const std::function<at::Tensor(const at::Tensor&)>& of) {
    Inputs t;
    for (const auto& [name, v] : in) t[name] = name == "chosen" || name == "d_y" ? v : leaf(of(v));
    const auto linear = [&](const std::string& name) {
      return ExpertLinear{get(t, name.c_str()), {}, get(t, (name + "_lora_a").c_str()), get(t, (name + "_lora_b").c_str()),
                          j.value("lora_scaling", 1.0)};
    };
    const at::Tensor y = moe_layer(t["x"], chosen, t["weights"], f, {linear("gate_up"), linear("down")},
                                   {linear("shared_gate_up"), linear("shared_down")}, get(t, "shared_gate"));
    y.backward(of(get(in, "d_y")));
    std::map<std::string, at::Tensor> out = {{"y", y.detach()}};
    for (const auto& [name, v] : t) {
      if (name != "chosen" && name != "d_y") out["d_" + name] = v.grad();
    }
    return out;
  };
  // With magnitudes for values and max(z, 0) for the activation every term is added with one sign: the sums of magnitudes,
  // which bound the terms, since |SiLU(z)| <= |z| and both sigmoids grow. What they miss (kernels/host/bounds.h, activation()):
  // SiLU's slope is within 1.13, and an error of its argument, relative to the largest sum of magnitudes z, moves it by 1.13
  // max(1, |alpha|) z; the slope of the sigmoid in front of a shared expert is at most 1/4, at magnitudes less.
  ExpertForm plain = form;
  plain.activation = Activation::kRelu;
  const auto values = run(form, [](const at::Tensor& t) { return t; });
  const auto sizes = run(plain, [](const at::Tensor& t) { return t.abs(); });
  const at::Tensor x = get(in, "x");
  double z = 0;
  for (const std::string name : {"gate_up", "shared_gate_up"}) {
    at::Tensor w = get(in, name.c_str());
    if (!w.defined()) continue;
    w = w.abs();
    const at::Tensor a = get(in, (name + "_lora_a").c_str()), b = get(in, (name + "_lora_b").c_str());
    if (a.defined()) w = w + std::fabs(j.value("lora_scaling", 1.0)) * at::matmul(b.abs(), a.abs());
    z = std::max(z, largest(at::matmul(w, x.abs().t())));
  }
  const double alpha = std::fabs(form.alpha), slopes = 1.13 * (1 + std::max(1.0, alpha) * z);
  const at::Tensor gate = get(in, "shared_gate");
  const double s = gate.defined() ? at::sigmoid(at::mv(x.abs(), gate.abs())).max().item<double>() : 0.5;
  // The longest path: both linears there and back with their adapters (rank 2), tokens or choices; the activation or its
  // slope; sigmoid, offset, products and scalings.
  const double sums = static_cast<double>(3 * x.size(1) + 3 * last(get(in, "down")) + x.size(0) + chosen.size(1)) + 4 * 2;
  const double roundings = sums + 18 + 7 * alpha * z + 16;
  Outputs out;
  for (const auto& [name, v] : values) {
    const double steep = name == "d_x" || name == "d_shared_gate" ? 0.25 / (s * (1 - s)) : 1;
    out[name] = {v, twice(roundings), slopes * steep * largest(sizes.at(name))};
  }
  return out;
}

CvOptions cv(const Json& j) { return {j.value("sample", false), j.value("eps", 0.0)}; }
/// Of sum (v - mean)^2 / mean^2 / E: no term exceeds (2 largest / mean)^2.
double cv_scale(const at::Tensor& v) { return 4 * std::pow(largest(v) / v.mean().item<double>(), 2) * static_cast<double>(v.numel()); }

Outputs importance(const Json& j, const Inputs& in) {
  const at::Tensor gates = get(in, "gates"), chosen = get(in, "chosen");
  const std::int64_t experts = j.value("experts", 8);
  const at::Tensor sums = at::zeros({experts}, at::kDouble).scatter_add(0, chosen.reshape({-1}), gates.reshape({-1}));
  const double n = 2 * static_cast<double>(gates.size(0) * gates.size(1) + experts) + 12;
  return {{"loss", {importance_loss(gates, chosen, experts, cv(j)), twice(n), cv_scale(sums)}}};
}
Outputs smooth_load(const Json& j, const Inputs& in) {
  const at::Tensor clean = get(in, "clean"), noise = get(in, "noise"), raw = get(in, "raw");
  const double added = j.value("added", 0.01);
  const at::Tensor p = load_probabilities(clean, noise, raw, added, j.value("top_k", 2), j.value("last_chosen", false));
  const at::Tensor deviation = at::softplus(raw) + added;
  const double size = largest(clean) + largest(noise * deviation), least = deviation.min().item<double>();
  const double one = 47 + 14 * size / least + 22 * size / least;  // normal_cdf() and load_margin() of bounds.h
  return {{"probability", {p, twice(one), 1}},
          {"loss", {load_loss(p, cv(j)), twice(2 * one + static_cast<double>(p.size(0) + 2 * p.size(1)) + 12),
                    cv_scale(p.sum(0)) * std::max(1.0, static_cast<double>(p.size(0)) / largest(p.sum(0)))}}};
}
Outputs entropy(const Json& j, const Inputs& in) {
  const at::Tensor logits = leaf(get(in, "logits"));
  const at::Tensor h = routing_entropy(logits, j.value("of_mean", false));
  const double n = 2 * softmax_roundings(logits.detach()) + static_cast<double>(logits.size(0) + 2 * logits.size(1)) + 12;
  return {{"loss", {h.detach(), twice(n), std::log(static_cast<double>(last(logits))) + 1}},
          {"gradient", {gradient(h, logits), twice(2 * n), (2 * range_of(logits.detach()) + 4) / static_cast<double>(logits.size(0))}}};
}
Outputs orthogonality(const Json& j, const Inputs& in) {
  const at::Tensor w = get(in, "w");
  const bool squared = j.value("squared", false);
  const at::Tensor gram = at::mm(w.abs(), w.abs().t()) + 1;
  const double n = static_cast<double>(w.size(1) + 2 * w.size(0)) + 4;
  return {{"loss", {gate_orthogonality(w, squared), twice(squared ? 2 * n : n), (squared ? gram * gram : gram).sum().item<double>()}}};
}
Outputs overlap(const Json& j, const Inputs& in) {
  const at::Tensor x = get(in, "outputs");
  const auto which = one_of<Overlap>(
      j, "overlap", {{"projection", Overlap::kProjection}, {"squared", Overlap::kSquaredProjection}, {"cosine", Overlap::kCosine}});
  const double terms = static_cast<double>(x.size(0) * x.size(1) * x.size(1)), size = largest(x) * std::sqrt(static_cast<double>(last(x)));
  const double each = which == Overlap::kCosine ? 1 : which == Overlap::kProjection ? size : size * size;
  const double least = x.norm(2, -1).min().item<double>();
  const double n = 3 * static_cast<double>(last(x)) + terms + 12;
  return {{"loss", {expert_overlap(x, {}, which, 1e-8, j.value("mean", false)), twice(n), terms * each * std::pow(size / least, 2)}}};
}
Outputs variance(const Json& j, const Inputs& in) {
  const at::Tensor s = get(in, "scores");
  const double n = 2 * static_cast<double>(s.size(0)) + static_cast<double>(s.size(1)) + 6;
  return {{"loss", {score_variance(s, j.value("mean", false)), twice(n), 4 * static_cast<double>(s.size(0)) * largest(s) * largest(s)}}};
}

Outputs margins(const Json&, const Inputs& in) {
  const at::Tensor choice = get(in, "choice");
  return {{"margin", {routing_margins(choice, get(in, "chosen")), twice(1), 2 * largest(choice)}}};
}
Outputs agree(const Json& j, const Inputs& in) {
  const auto s = agreement(get(in, "now"), get(in, "then"), j.value("experts", 8), true);
  return {{"agreement", {numbers(s, {"saturation", "changed", "jaccard", "identical", "same_first"}),
                         twice(static_cast<double>(get(in, "now").size(0)) + 4), 1}}};
}
Outputs settled(const Json&, const Inputs& in) { return {{"settled", {count_settled(get(in, "first")), 0, 0}}}; }

Outputs by_label(const Json& j, const Inputs& in) {
  return {{"table", {count_by_label(get(in, "chosen"), get(in, "labels"), j.value("num_labels", 4), j.value("experts", 8)), 0, 0}}};
}

const std::map<std::string, Outputs (*)(const Json&, const Inputs&)>& operations() {
  static const std::map<std::string, Outputs (*)(const Json&, const Inputs&)> kOperations = {
      {"gate_logits", gate}, {"rounded_gate_logits", rounded_gate}, {"route", route_of}, {"route_backward", route_backward}, {"gate_backward", gate_backward},
      {"balance_loss", balance}, {"z_loss", z}, {"squares", squares}, {"bias_update", bias},
      {"cross_entropy", cross_entropy}, {"normalise", normalise}, {"term_weights", weights_of_terms}, {"drop", dispatch}, {"capacity", capacities},
      {"expert_choice", choice_of_experts}, {"noisy_logits", noise}, {"jitter", jittered}, {"sparse_mixer", mixer},
      {"expert_load", load_of_choices},
      {"routing_statistics", routing_load}, {"dequantise", dequantise}, {"lora_merge", lora_merging},
      {"lora_gradient", lora_gradients}, {"permute", permutation}, {"moe_layer", layer},
      {"importance_loss", importance}, {"load_loss", smooth_load}, {"entropy_loss", entropy},
      {"gate_orthogonality", orthogonality}, {"expert_overlap", overlap}, {"score_variance", variance},
      {"routing_margins", margins}, {"agreement", agree}, {"count_settled", settled}, {"count_by_label", by_label}};
  return kOperations;
}

}  // namespace

Outputs compute(const std::string& operation, const Json& options, const Inputs& inputs) {
  const auto at = operations().find(operation);
  if (at == operations().end()) throw std::runtime_error("there is no operation '" + operation + "'");
  return at->second(options, inputs);
}

}  // namespace moeaudit::reference

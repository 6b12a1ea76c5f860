#include "cli/stored_vectors.h"

#include <cmath>
#include <stdexcept>
#include <utility>

#include "kernels/host/bounds.h"
#include "kernels/host/moe_layer_steps.h"

namespace moeaudit {
namespace {

namespace k = kernels;
using Outputs = std::map<std::string, Values>;
using Ids = std::vector<std::int32_t>;

void check(k::Status status, const k::Backend& backend) {
  if (status == k::Status::kOk) return;
  const std::string error = backend.last_error();
  throw std::runtime_error(k::name_of(status) + (error.empty() ? std::string() : ": " + error));
}

/// The inputs of a vector in the types that kernels take; an input that is not there has no pointer.
class Inputs {
 public:
  explicit Inputs(const StoredVector& v) : v_(v) {}
  template <class T = double>
  std::vector<T> get(const char* role) const {
    const auto at = v_.inputs.find(role);
    if (at == v_.inputs.end()) return {};
    return std::vector<T>(at->second.begin(), at->second.end());
  }
  bool has(const std::string& role) const { return v_.inputs.count(role) > 0; }
  std::int64_t size(const char* role, std::size_t dimension) const { return v_.shapes.at(role).at(dimension); }

 private:
  const StoredVector& v_;
};
template <class T>
const T* pointer(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}
template <class T>
Values doubles(const std::vector<T>& v) {
  return {v.begin(), v.end()};
}
Values room(std::int64_t n) { return Values(static_cast<std::size_t>(n)); }

template <class E>
E one_of(const Json& options, const char* key, const std::vector<std::pair<const char*, E>>& names) {
  const std::string name = options.value(key, std::string(names.front().first));
  for (const auto& [known, value] : names) {
    if (name == known) return value;
  }
  throw std::runtime_error("option " + std::string(key) + " has no value " + name);
}

Outputs gate_logits(const Json&, const Inputs& in, k::Backend& backend) {
  const Values x = in.get("x"), w = in.get("w"), bias = in.get("bias");
  k::GateArgs<double, double> a;
  a.tokens = in.size("x", 0), a.hidden = in.size("x", 1), a.experts = in.size("w", 0);
  Values packed = room(k::packed_gate_size<double>(a.experts, a.hidden)), logits = room(a.tokens * a.experts);
  k::pack_gate(w.data(), a.experts, a.hidden, packed.data());
  a.x = x.data(), a.packed = packed.data(), a.bias = pointer(bias), a.logits = logits.data();
  check(backend.gate_logits(a), backend);
  return {{"logits", logits}};
}

Outputs rounded_gate_logits(const Json& j, const Inputs& in, k::Backend& backend) {
  const auto x = in.get<float>("x"), w = in.get<float>("w"), bias = in.get<float>("bias");
  const k::RoundedGateArgs a{x.data(), w.data(), pointer(bias), in.size("x", 0), in.size("x", 1), in.size("w", 0),
                             k::Float::kBF16, j.value("stretch", 1)};
  std::vector<float> logits(static_cast<std::size_t>(a.tokens * a.experts));
  check(backend.rounded_gate_logits(a, logits.data()), backend);
  return {{"logits", doubles(logits)}};
}

k::RouteArgs<double> route_args(const Json& j, const Inputs& in) {
  k::RouteArgs<double> a;
  a.tokens = in.size("logits", 0), a.experts = in.size("logits", 1);
  a.top_k = j.value("top_k", 2);
  a.score = one_of<k::Score>(
      j, "score",
      {{"softmax", k::Score::kSoftmax}, {"sigmoid", k::Score::kSigmoid}, {"sqrtsoftplus", k::Score::kSqrtSoftplus}});
  a.score_after_top_k = j.value("score_after_top_k", false);
  a.group_score = one_of<k::GroupScore>(
      j, "group_score",
      {{"none", k::GroupScore::kNone}, {"max", k::GroupScore::kMax}, {"top2_sum", k::GroupScore::kTop2Sum}});
  a.groups = j.value("groups", 1);
  a.top_groups = j.value("top_groups", 1);
  a.renormalise = j.value("renormalise", false);
  a.renormalise_eps = j.value("renormalise_eps", 0.0);
  a.renormalise_floor = j.value("renormalise_floor", 0.0);
  const auto norm = j.find("renormalise_norm");  // a number, or "inf", which JSON has no number for
  if (norm != j.end()) a.renormalise_norm = norm->is_number() ? norm->get<double>() : HUGE_VAL;
  a.sigmoid_offset = j.value("sigmoid_offset", 0.0);
  a.scaling = j.value("scaling", 1.0);
  a.logit_softcap = j.value("logit_softcap", 0.0);
  a.always = in.has("always_logits") ? in.size("always_logits", 1) : 0;
  return a;
}

/// A vector's routing, with what its arguments point to.
struct Routing {
  Routing(const Json& j, const Inputs& in, k::Backend& backend)
      : logits(in.get("logits")), bias(in.get("correction_bias")), scale(in.get("expert_scale")),
        always_logits(in.get("always_logits")), given(in.get<std::int32_t>("given")), args(route_args(j, in)),
        chosen(static_cast<std::size_t>(args.tokens * args.top_k)), weights(room(args.tokens * args.top_k)),
        choice(room(args.tokens * args.experts)), always(always_logits.size()) {
    args.logits = logits.data(), args.correction_bias = pointer(bias), args.expert_scale = pointer(scale);
    args.given = pointer(given), args.always_logits = pointer(always_logits);
    check(backend.route(args, {chosen.data(), weights.data(), nullptr, choice.data(), always.empty() ? nullptr : always.data()}),
          backend);
  }
  Routing(const Routing&) = delete;
  Values logits, bias, scale, always_logits;
  Ids given;
  k::RouteArgs<double> args;
  Ids chosen;
  Values weights, choice, always;
};

Outputs route(const Json& j, const Inputs& in, k::Backend& backend) {
  Routing r(j, in, backend);
  const k::RouteArgs<double>& a = r.args;
  if (j.value("weighs", std::string("scores")) == "choice") {  // W1: what chose is what weighs
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      double sum = 0;
      for (std::int64_t i = t * a.top_k; i < (t + 1) * a.top_k; ++i) {
        const auto at = static_cast<std::size_t>(i);
        r.weights[at] = r.choice[static_cast<std::size_t>(t * a.experts + r.chosen[at])];
        sum += r.weights[at];
      }
      for (std::int64_t i = t * a.top_k; i < (t + 1) * a.top_k; ++i) r.weights[static_cast<std::size_t>(i)] /= sum;
    }
  }
  Outputs out = {{"chosen", doubles(r.chosen)}, {"weights", r.weights}};
  if (a.always > 0) out["always_weights"] = r.always;
  return out;
}

Outputs route_backward(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values upstream = in.get("d_weights"), of_always = in.get("d_always_weights");
  const Routing r(j, in, backend);
  k::RouteBackwardArgs<double> a;
  a.forward = r.args;
  a.chosen = r.chosen.data(), a.weights = upstream.data(), a.always_weights = pointer(of_always);
  Values d = room(a.forward.tokens * a.forward.experts), d_always(r.always.size());
  a.d_always_logits = d_always.empty() ? nullptr : d_always.data();
  check(backend.route_backward(a, d.data()), backend);
  Outputs out = {{"chosen", doubles(r.chosen)}, {"d_logits", d}};
  if (!d_always.empty()) out["d_always_logits"] = d_always;
  if (a.forward.expert_scale != nullptr) {
    k::RouteArgs<double> plain = a.forward;
    plain.expert_scale = nullptr;
    Ids chosen = r.chosen;
    Values unscaled = r.weights, d_scale = room(plain.experts);
    check(backend.route(plain, {chosen.data(), unscaled.data(), nullptr, nullptr, nullptr}), backend);
    check(backend.expert_scale_backward({unscaled.data(), chosen.data(), upstream.data(), plain.tokens, plain.top_k, plain.experts},
                                        d_scale.data()),
          backend);
    out["d_expert_scale"] = d_scale;
  }
  return out;
}

Outputs gate_backward(const Json&, const Inputs& in, k::Backend& backend) {
  const Values d = in.get("d_logits"), x = in.get("x"), w = in.get("w");
  k::GateBackwardArgs<double> a{d.data(), x.data(), w.data(), in.size("x", 0), in.size("x", 1), in.size("w", 0)};
  Values d_w(w.size()), d_x(x.size());
  check(backend.gate_backward(a, d_w.data(), d_x.data()), backend);
  return {{"d_w", d_w}, {"d_x", d_x}};
}

Outputs balance_loss(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values p = in.get("probabilities");
  const Ids chosen = in.get<std::int32_t>("chosen");
  const auto valid = in.get<std::uint8_t>("valid");
  const auto sets = in.get<std::int64_t>("sets"), counts = in.get<std::int64_t>("counts"), counted = in.get<std::int64_t>("counted");
  k::BalanceLossArgs<double> a;
  a.tokens = in.size("probabilities", 0), a.experts = in.size("probabilities", 1);
  a.top_k = j.value("top_k", 2);
  a.probabilities = p.data(), a.chosen = pointer(chosen), a.valid = pointer(valid);
  a.sets = pointer(sets), a.num_sets = sets.empty() ? 1 : static_cast<std::int64_t>(sets.size()) - 1;
  a.counts = pointer(counts), a.counted_tokens = pointer(counted);
  a.convention.counted = j.value("first_choice", false) ? k::Counted::kFirstChoice : k::Counted::kAllChoices;
  a.convention.over_k = j.value("over_k", true);
  a.convention.balanced = one_of<k::Balanced>(j, "balanced",
                                              {{"experts", k::Balanced::kExperts},
                                               {"devices", k::Balanced::kDevices},
                                               {"communication", k::Balanced::kCommunication}});
  a.convention.devices = j.value("devices", 1);
  a.convention.most_devices = j.value("most_devices", 1);
  a.convention.divisor = j.value("all_tokens", false) ? k::Divisor::kAllTokens : k::Divisor::kValidTokens;
  a.convention.over_sets = j.value("sum", false) ? k::OverSets::kSum : k::OverSets::kMean;
  a.convention.averaged = j.value("over_sum", false) ? k::Averaged::kOverSum : k::Averaged::kAsGiven;
  a.convention.sum_eps = j.value("sum_eps", 0.0);
  Values loss(1), gradient(j.value("gradient", false) ? p.size() : 0);
  k::BalanceLossResult<double> r;
  r.loss = loss.data();
  if (!gradient.empty()) r.gradient = gradient.data();
  check(backend.balance_loss(a, r), backend);
  loss[0] *= j.value("factor", 1.0);
  Outputs out = {{"loss", loss}};
  if (!gradient.empty()) out["gradient"] = gradient;
  return out;
}

Outputs z_loss(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values logits = in.get("logits");
  const auto valid = in.get<std::uint8_t>("valid");
  k::ZLossArgs<double> a;
  a.logits = logits.data(), a.valid = pointer(valid);
  a.tokens = in.size("logits", 0), a.experts = in.size("logits", 1);
  a.divisor = j.value("all_tokens", false) ? k::Divisor::kAllTokens : k::Divisor::kValidTokens;
  Values loss(1), lse = room(a.tokens), gradient(j.value("gradient", false) ? logits.size() : 0);
  check(backend.z_loss(a, {loss.data(), lse.data(), gradient.empty() ? nullptr : gradient.data()}), backend);
  const std::string value = j.value("value", std::string("loss"));
  if (value != "loss") {
    double mean = 0;
    for (const double v : lse) mean += v / static_cast<double>(a.tokens);
    loss[0] = value == "mean" ? mean : mean * mean;
  }
  loss[0] *= j.value("factor", 1.0);
  Outputs out = {{"loss", loss}};
  if (!gradient.empty()) out["gradient"] = gradient;
  return out;
}

/// Variants Z4 and Z5 need no kernel.
Outputs squares(const Json& j, const Inputs& in, k::Backend&) {
  double sum = 0;
  for (const double v : in.get("logits")) sum += v * v;
  return {{"loss", {sum * j.value("factor", 1.0)}}};
}

Outputs bias_update(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values bias = in.get("bias"), counts = in.get("counts");
  k::BiasUpdateArgs a;
  a.bias = bias.data(), a.counts = counts.data(), a.layers = in.size("bias", 0), a.experts = in.size("bias", 1);
  if (counts.size() > bias.size()) a.ranks = in.size("counts", 0), a.micro_batches = in.size("counts", 1);
  if (j.value("counts_bf16", false)) a.counts_dtype = k::Float::kBF16;
  a.rate = j.value("rate", 0.001);
  a.step = j.value("proportional", false) ? k::BiasStep::kProportional : k::BiasStep::kSign;
  a.centre = one_of<k::Centre>(
      j, "centre", {{"nothing", k::Centre::kNothing}, {"step", k::Centre::kStep}, {"bias", k::Centre::kBias}});
  Values out(bias.size());
  check(backend.bias_update(a, out.data()), backend);
  return {{"bias", out}};
}

Outputs cross_entropy(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values logits = in.get("logits");
  const auto labels = in.get<std::int64_t>("labels");
  k::CrossEntropyArgs<double> a{logits.data(), labels.data(), in.size("logits", 0), in.size("logits", 1),
                                j.value("weight", 1.0)};
  Values sum(1), gradient(logits.size());
  std::int64_t count = 0;
  check(backend.cross_entropy(a, {sum.data(), &count, nullptr, gradient.data()}), backend);
  return {{"sum", sum}, {"labels", {static_cast<double>(count)}}, {"gradient", gradient}};
}

Outputs normalise(const Json& j, const Inputs& in, k::Backend& backend) {
  using N = k::Normalisation;
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
  Values loss(1);
  check(k::normalise(how, in.get("sums").data(), in.get<std::int64_t>("labels").data(), in.size("sums", 0),
                     in.size("sums", 1), loss.data(), nullptr),
        backend);
  return {{"loss", loss}};
}

Outputs term_weights(const Json& j, const Inputs& in, k::Backend& backend) {
  using W = k::TermWeight;
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
  const k::StepShape step{in.size("labels", 0), in.size("labels", 1), j.value("tp", 1), j.value("cp", 1), j.value("ep", 1), j.value("sequences", 1)};
  const auto labels = in.get<std::int64_t>("labels");
  Values weight(labels.size());
  check(k::term_weights(how, step, in.get<std::int64_t>("tokens").data(), labels.data(), weight.data()), backend);
  return {{"weight", weight}};
}

Outputs drop(const Json& j, const Inputs& in, k::Backend& backend) {
  const Ids chosen = in.get<std::int32_t>("chosen");
  const Values weights = in.get("weights"), keys = in.get("keys"), scores = in.get("scores");
  k::DropArgs<double> a;
  a.chosen = chosen.data(), a.weights = pointer(weights), a.keys = pointer(keys), a.scores = pointer(scores);
  a.tokens = in.size("chosen", 0), a.top_k = in.size("chosen", 1), a.experts = j.value("experts", 8);
  a.capacity = j.value("capacity", 4);
  a.order = one_of<k::DropOrder>(j, "order",
                                 {{"tokens", k::DropOrder::kTokens},
                                  {"choices", k::DropOrder::kChoices},
                                  {"weights", k::DropOrder::kWeights},
                                  {"keys", k::DropOrder::kKeys},
                                  {"batch_prioritised", k::DropOrder::kBatchPrioritised}});
  Ids place(chosen.size());
  Values after(weights.size());
  k::DropResult<double> r;
  r.place = place.data();
  if (!weights.empty()) a.renormalise = true, r.weights = after.data();
  check(backend.drop(a, r), backend);
  Outputs out = {{"place", doubles(place)}};
  if (!weights.empty()) out["weights"] = after;
  return out;
}

/// cases: tokens, experts, top_k, min_capacity, expert_parallel_size, world_size, alignment, largest count.
Outputs capacity(const Json& j, const Inputs& in, k::Backend& backend) {
  using F = k::CapacityForm;
  const auto cases = in.get<std::int64_t>("cases");
  const Values factors = in.get("factors");
  std::vector<std::int64_t> places(factors.size());
  for (std::size_t i = 0; i < places.size(); ++i) {
    const std::int64_t* c = cases.data() + 8 * i;
    k::CapacityArgs a{F::kMegatron, c[0], c[1], c[2], factors[i], c[3], c[4], c[5], c[6], c + 7};
    a.form = one_of<F>(j, "form",
                       {{"megatron", F::kMegatron},
                        {"deepspeed", F::kDeepSpeed},
                        {"megablocks", F::kMegaBlocks},
                        {"olmo_core", F::kOlmoCore},
                        {"tutel", F::kTutel},
                        {"fastmoe", F::kFastMoE}});
    check(k::capacity(a, &places[i]), backend);
  }
  return {{"places", doubles(places)}};
}

Outputs expert_choice(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values scores = in.get("scores"), upstream = in.get("d_weights");
  const auto valid = in.get<std::uint8_t>("valid");
  k::ExpertChoiceArgs<double> a{scores.data(), pointer(valid), in.size("scores", 0), in.size("scores", 1), j.at("capacity")};
  Ids tokens(upstream.size()), taken(static_cast<std::size_t>(a.tokens));
  Values weights(upstream.size()), d_scores(scores.size());
  check(backend.expert_choice(a, {tokens.data(), weights.data(), taken.data()}), backend);
  check(backend.expert_choice_backward(tokens.data(), upstream.data(), a.tokens, a.experts, a.capacity, d_scores.data()), backend);
  return {{"tokens", doubles(tokens)}, {"weights", weights}, {"taken", doubles(taken)}, {"d_scores", d_scores}};
}

Outputs noisy_logits(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values logits = in.get("logits"), noise = in.get("noise"), raw = in.get("raw"), upstream = in.get("d_noisy");
  k::NoisyLogitsArgs<double> a{logits.data(), noise.data(), pointer(raw), in.size("logits", 0), in.size("logits", 1),
                               j.value("eps", 0.0), j.value("scale", 0.0)};
  Values noisy(logits.size()), d_raw(raw.size());
  check(backend.noisy_logits(a, noisy.data()), backend);
  Outputs out = {{"noisy", noisy}};
  if (raw.empty()) return out;
  check(backend.noisy_logits_backward(a, upstream.data(), d_raw.data()), backend);
  out["d_raw"] = d_raw;
  return out;
}

Outputs jitter(const Json&, const Inputs& in, k::Backend& backend) {
  const Values x = in.get("x"), factor = in.get("factor");
  Values out(x.size());
  check(backend.jitter(x.data(), factor.data(), static_cast<std::int64_t>(x.size()), k::Float::kBF16, out.data()), backend);
  return {{"x", out}};
}

Outputs sparse_mixer(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values logits = in.get("logits"), draws = in.get("draws"), upstream = in.get("d_weights");
  const Ids given = in.get<std::int32_t>("given");
  k::SparseMixerBackwardArgs<double> b;
  k::SparseMixerArgs<double>& a = b.forward;
  a.logits = logits.data(), a.tokens = in.size("logits", 0), a.experts = in.size("logits", 1), a.jitter = j.value("jitter", 0.01);
  a.given = pointer(given), a.draws = pointer(draws);
  Ids chosen(upstream.size());
  std::vector<std::uint8_t> kept(2 * logits.size());
  Values weights(upstream.size()), p(2 * logits.size()), d(logits.size());
  check(backend.sparse_mixer(a, {chosen.data(), weights.data(), kept.data(), p.data()}), backend);
  b.chosen = chosen.data(), b.weights = upstream.data();
  check(backend.sparse_mixer_backward(b, d.data()), backend);
  return {{"chosen", doubles(chosen)}, {"weights", weights}, {"kept", doubles(kept)}, {"probabilities", p}, {"d_logits", d}};
}

k::CountArgs<std::int32_t> count_args(const Json& j, const Inputs& in, const Ids& chosen) {
  k::CountArgs<std::int32_t> a;
  a.chosen = chosen.data();
  a.tokens = in.size("chosen", 0), a.top_k = in.size("chosen", 1), a.experts = j.value("experts", 8);
  return a;
}

Outputs expert_load(const Json& j, const Inputs& in, k::Backend& backend) {
  const Ids chosen = in.get<std::int32_t>("chosen");
  const auto a = count_args(j, in, chosen);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(a.experts));
  std::int64_t outside = 0;
  check(backend.count_choices(a, counts.data(), &outside), backend);
  k::LoadStatistics s;
  check(k::load_statistics(counts.data(), a.experts, a.top_k, a.tokens, &s), backend);
  return {{"counts", doubles(counts)},
          {"statistics",
           {s.max_violation, s.min_violation, s.cv_population, s.cv_sample, s.entropy, s.normalised_entropy,
            s.effective_experts, s.kl_to_uniform, s.gini}}};
}

Outputs routing_statistics(const Json&, const Inputs& in, k::Backend& backend) {
  const Values p = in.get("probabilities");
  const Ids chosen = in.get<std::int32_t>("chosen");
  k::RoutingStatisticsArgs<double> a{p.data(), chosen.data(), nullptr, in.size("probabilities", 0),
                                     in.size("probabilities", 1), in.size("chosen", 1)};
  k::RoutingStatistics s;
  check(backend.routing_statistics(a, &s), backend);
  return {{"statistics", {s.token_entropy, s.mean_entropy, s.mutual_information, s.confidence}}};
}

Outputs dequantise(const Json& j, const Inputs& in, k::Backend& backend) {
  const auto codes = in.get<std::uint8_t>("codes");
  const auto scale_bytes = in.get<std::uint8_t>("scales");
  const auto scale_floats = in.get<float>("scales"), table = in.get<float>("table"), map = in.get<float>("nested_map"),
             absmax = in.get<float>("nested_absmax");
  const Values scale_doubles = in.get("scales");
  k::QuantisedWeights w;
  w.codes = codes.data();
  w.code = one_of<k::WeightCode>(j, "code",
                                 {{"e4m3", k::WeightCode::kE4M3},
                                  {"e5m2", k::WeightCode::kE5M2},
                                  {"e2m1", k::WeightCode::kE2M1},
                                  {"int8", k::WeightCode::kInt8},
                                  {"table", k::WeightCode::kTable}});
  w.high_half_first = j.value("high_half_first", false);
  w.table = pointer(table);
  w.rows = j.at("rows"), w.columns = j.at("columns"), w.row_block = j.at("row_block"), w.column_block = j.at("column_block");
  w.scale_type = one_of<k::ScaleType>(j, "scale",
                                      {{"f32", k::ScaleType::kF32},
                                       {"f64", k::ScaleType::kF64},
                                       {"e4m3", k::ScaleType::kE4M3},
                                       {"e8m0", k::ScaleType::kE8M0},
                                       {"nested", k::ScaleType::kNested}});
  w.scales = w.scale_type == k::ScaleType::kF64   ? static_cast<const void*>(scale_doubles.data())
             : w.scale_type == k::ScaleType::kF32 ? static_cast<const void*>(scale_floats.data())
                                                  : static_cast<const void*>(scale_bytes.data());
  w.factor = j.value("factor", 1.0), w.divisor = j.value("divisor", 1.0);
  w.nested_map = pointer(map), w.nested_absmax = pointer(absmax);
  w.nested_block = j.value("nested_block", 1), w.nested_offset = j.value("nested_offset", 0.0f);
  Values out = room(w.rows * w.columns);
  check(backend.dequantise(w, out.data()), backend);
  return {{"values", out}};
}

Outputs lora_merge(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values w = in.get("w");
  const auto a = in.get<float>("a"), b = in.get<float>("b");
  k::LoraMergeArgs args;
  args.update = {b.data(), a.data(), in.size("w", 0), in.size("w", 1), in.size("a", 0)};
  args.w = w.data(), args.scale = j.value("scale", 1.0);
  if (j.value("stored", std::string("f64")) == "bf16") args.dtypes.stored = k::Float::kBF16;
  Values merged(w.size());
  check(backend.lora_merge(args, j.value("unmerge", false), merged.data()), backend);
  return {{"merged", merged}};
}

Outputs lora_gradient(const Json& j, const Inputs& in, k::Backend& backend) {
  const auto x = in.get<float>("x"), d_y = in.get<float>("d_y"), a = in.get<float>("a"), b = in.get<float>("b");
  k::LoraGradientArgs args{x.data(), d_y.data(), a.data(), b.data(), in.size("x", 0), in.size("x", 1),
                           in.size("d_y", 1), in.size("a", 0), j.value("scale", 1.0)};
  Values d_a(a.size()), d_b(b.size()), d_x(x.size());
  check(backend.lora_gradient(args, {d_a.data(), d_b.data(), d_x.data()}), backend);
  return {{"d_a", d_a}, {"d_b", d_b}, {"d_x", d_x}};
}

Outputs permute(const Json& j, const Inputs& in, k::Backend& backend) {
  const Ids chosen = in.get<std::int32_t>("chosen");
  const Values rows = in.get("rows"), weights = in.get("weights"), d_y = in.get("d_y");
  k::PermuteArgs a;
  a.chosen = chosen.data(), a.tokens = in.size("chosen", 0), a.top_k = in.size("chosen", 1), a.experts = j.value("experts", 8);
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(a.experts) + 1);
  Ids slot_of_row(chosen.size()), row_of_slot(chosen.size());
  const k::Permutation p{offsets.data(), slot_of_row.data(), row_of_slot.data()};
  check(backend.permute(a, p), backend);
  const k::RowShape shape{a.tokens, a.top_k, in.size("rows", 0), in.size("rows", 1)};
  Values y(d_y.size()), d_rows(rows.size()), d_weights(weights.size());
  check(backend.combine(p, shape, rows.data(), weights.data(), y.data()), backend);
  check(backend.combine_backward(p, shape, rows.data(), weights.data(), d_y.data(), d_rows.data(), d_weights.data()), backend);
  return {{"row_of_slot", doubles(row_of_slot)}, {"y", y}, {"d_rows", d_rows}, {"d_weights", d_weights}};
}

/// Arguments, state and gradients of a layer, and the memory behind them.
class Layer {
 public:
  Layer(const Json& j, const Inputs& in) : in_(in), scaling_(j.value("lora_scaling", 1.0)) {
    a.tokens = in.size("x", 0), a.hidden = in.size("x", 1), a.experts = in.size("gate_up", 0), a.top_k = in.size("chosen", 1);
    a.form.alpha = j.value("alpha", 1.0), a.form.up_offset = j.value("up_offset", 0.0);
    chosen_ = in.get<std::int32_t>("chosen");
    a.x = keep(in.get("x")), a.chosen = chosen_.data(), a.weights = keep(in.get("weights"));
    const std::int64_t rows = a.tokens * a.top_k;
    offsets_.resize(static_cast<std::size_t>(a.experts) + 1), shared_offsets_.resize(2);
    slot_of_row_.resize(static_cast<std::size_t>(rows)), row_of_slot_.resize(static_cast<std::size_t>(rows));
    s.permutation = {offsets_.data(), slot_of_row_.data(), row_of_slot_.data()};
    s.rows = keep(room(rows * a.hidden)), s.shared_offsets = shared_offsets_.data();
    experts("", rows, &a.routed, &s.routed, &g.gate_up, &g.down);
    if (in.has("shared_gate_up")) experts("shared_", a.tokens, &a.shared, &s.shared, &g.shared_gate_up, &g.shared_down);
    if (in.has("shared_gate")) {
      a.shared_gate = keep(in.get("shared_gate")), s.shared_weight = keep(room(a.tokens));
      g.shared_gate = out("d_shared_gate", a.hidden);
    }
    y = out("y", a.tokens * a.hidden);
    g.x = out("d_x", a.tokens * a.hidden), g.weights = out("d_weights", rows);
    d_y = keep(in.get("d_y"));
  }
  Outputs results() const {
    Outputs all;
    for (const auto& [name, at] : named_) all[name] = kept_[at];
    return all;
  }

  k::MoeLayerArgs<double> a;
  k::MoeLayerState<double> s;
  k::MoeLayerGradients<double> g;
  double *y = nullptr, *d_y = nullptr;

 private:
  double* keep(Values v) {
    kept_.push_back(std::move(v));
    return kept_.back().data();  // the memory of a vector stays where it is when kept_ grows: vectors are moved
  }
  double* out(const std::string& name, std::int64_t n) {
    named_[name] = kept_.size();
    return keep(room(n));
  }
  void linear(const std::string& name, k::ExpertLinear<double>* l, k::ExpertLinearGradients<double>* d) {
    l->weight = keep(in_.get(name.c_str()));
    d->weight = out("d_" + name, static_cast<std::int64_t>(kept_.back().size()));
    const std::string first = name + "_lora_a", second = name + "_lora_b";
    if (!in_.has(first)) return;
    l->rank = in_.size(first.c_str(), 1), l->scaling = scaling_;
    const Values lora_a = in_.get(first.c_str()), lora_b = in_.get(second.c_str());
    d->lora_a = out("d_" + first, static_cast<std::int64_t>(lora_a.size()));
    d->lora_b = out("d_" + second, static_cast<std::int64_t>(lora_b.size()));
    l->lora_a = keep(lora_a), l->lora_b = keep(lora_b);
  }
  void experts(const std::string& name, std::int64_t rows, k::ExpertWeights<double>* w, k::ExpertState<double>* state,
               k::ExpertLinearGradients<double>* d_gate_up, k::ExpertLinearGradients<double>* d_down) {
    w->width = in_.size((name + "down").c_str(), 2);
    linear(name + "gate_up", &w->gate_up, d_gate_up);
    linear(name + "down", &w->down, d_down);
    state->before = keep(room(rows * k::first_outputs(a.form, w->width)));
    state->activated = keep(room(rows * w->width)), state->out = keep(room(rows * a.hidden));
    if (w->gate_up.rank > 0) state->gate_up_low = keep(room(rows * w->gate_up.rank));
    if (w->down.rank > 0) state->down_low = keep(room(rows * w->down.rank));
  }

  const Inputs& in_;
  double scaling_;
  Ids chosen_, slot_of_row_, row_of_slot_;
  std::vector<std::int64_t> offsets_, shared_offsets_;
  std::vector<Values> kept_;
  std::map<std::string, std::size_t> named_;
};

Outputs moe_layer(const Json& j, const Inputs& in, k::Backend& backend) {
  Layer layer(j, in);
  check(backend.moe_layer(layer.a, layer.s, layer.y), backend);
  check(backend.moe_layer_backward(layer.a, layer.s, layer.d_y, layer.g), backend);
  return layer.results();
}

k::CvConvention cv(const Json& j) {
  return {j.value("sample", false) ? k::Variance::kSample : k::Variance::kPopulation, j.value("eps", 0.0)};
}

Outputs importance_loss(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values gates = in.get("gates");
  const Ids chosen = in.get<std::int32_t>("chosen");
  k::ImportanceLossArgs<double> a;
  a.gates = gates.data(), a.chosen = chosen.data(), a.cv = cv(j);
  a.tokens = in.size("gates", 0), a.width = in.size("gates", 1), a.experts = j.value("experts", 8);
  Values loss(1);
  check(backend.importance_loss(a, {loss.data(), nullptr, nullptr}), backend);
  return {{"loss", loss}};
}

Outputs load_loss(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values clean = in.get("clean"), noise = in.get("noise"), raw = in.get("raw");
  k::LoadLossArgs<double> a;
  a.clean = clean.data(), a.noise = noise.data(), a.raw = pointer(raw), a.cv = cv(j);
  a.tokens = in.size("clean", 0), a.experts = in.size("clean", 1), a.top_k = j.value("top_k", 2), a.added = j.value("added", 0.01);
  a.threshold = j.value("last_chosen", false) ? k::LoadThreshold::kLastChosen : k::LoadThreshold::kWithoutSelf;
  Values loss(1), probability(clean.size());
  check(backend.load_loss(a, {loss.data(), nullptr, probability.data(), nullptr, nullptr}), backend);
  return {{"loss", loss}, {"probability", probability}};
}

Outputs entropy_loss(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values logits = in.get("logits");
  k::EntropyLossArgs<double> a;
  a.logits = logits.data(), a.tokens = in.size("logits", 0), a.experts = in.size("logits", 1);
  a.of = j.value("of_mean", false) ? k::EntropyOf::kMean : k::EntropyOf::kTokens;
  Values loss(1), gradient(logits.size());
  check(backend.entropy_loss(a, {loss.data(), nullptr, nullptr, nullptr, gradient.data()}), backend);
  return {{"loss", loss}, {"gradient", gradient}};
}

Outputs gate_orthogonality(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values w = in.get("w");
  k::GateOrthogonalityArgs<double> a;
  a.w = w.data(), a.experts = in.size("w", 0), a.hidden = in.size("w", 1);
  a.norm = j.value("squared", false) ? k::GramNorm::kSquaredFrobenius : k::GramNorm::kEntrywiseL1;
  Values loss(1);
  check(backend.gate_orthogonality(a, {loss.data(), nullptr, nullptr}), backend);
  return {{"loss", loss}};
}

Outputs expert_overlap(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values outputs = in.get("outputs");
  k::ExpertOverlapArgs<double> a;
  a.outputs = outputs.data();
  a.tokens = in.size("outputs", 0), a.top_k = in.size("outputs", 1), a.hidden = in.size("outputs", 2);
  a.overlap = one_of<k::Overlap>(j, "overlap",
                                 {{"projection", k::Overlap::kProjection},
                                  {"squared", k::Overlap::kSquaredProjection},
                                  {"cosine", k::Overlap::kCosine}});
  a.over_pairs = j.value("mean", false) ? k::OverPairs::kMean : k::OverPairs::kSum;
  Values loss(1);
  check(backend.expert_overlap(a, {loss.data(), nullptr, nullptr}), backend);
  return {{"loss", loss}};
}

Outputs score_variance(const Json& j, const Inputs& in, k::Backend& backend) {
  const Values scores = in.get("scores");
  k::ScoreVarianceArgs<double> a;
  a.scores = scores.data(), a.tokens = in.size("scores", 0), a.experts = in.size("scores", 1);
  a.mean_over_tokens = j.value("mean", false);
  Values loss(1);
  check(backend.score_variance(a, {loss.data(), nullptr, nullptr}), backend);
  return {{"loss", loss}};
}

Outputs routing_margins(const Json&, const Inputs& in, k::Backend& backend) {
  const Values choice = in.get("choice");
  const Ids chosen = in.get<std::int32_t>("chosen");
  k::MarginArgs<double> a;
  a.choice = choice.data(), a.chosen = chosen.data();
  a.tokens = in.size("choice", 0), a.experts = in.size("choice", 1), a.top_k = in.size("chosen", 1);
  Values margin = room(a.tokens);
  k::MarginCounts counts;
  check(backend.routing_margins(a, {margin.data(), &counts}), backend);
  return {{"margin", margin}};
}

Outputs agreement(const Json& j, const Inputs& in, k::Backend& backend) {
  const Ids now = in.get<std::int32_t>("now"), then = in.get<std::int32_t>("then");
  k::AgreementArgs a{now.data(), then.data(), nullptr, in.size("now", 0), in.size("now", 1), in.size("then", 1)};
  std::vector<std::int64_t> table(static_cast<std::size_t>(k::agreement_rows(a) * k::agreement_columns(a)));
  k::AgreementCounts counts;
  check(backend.count_agreement(a, table.data(), &counts), backend);
  k::Agreement s;
  check(k::agreement(a, table.data(), counts, j.value("experts", 8), &s), backend);
  return {{"agreement", {s.saturation, s.changed, s.jaccard, s.identical, s.same_first}}};
}

Outputs count_settled(const Json&, const Inputs& in, k::Backend& backend) {
  const Ids first = in.get<std::int32_t>("first");
  std::vector<std::int64_t> settled(static_cast<std::size_t>(in.size("first", 0)));
  check(backend.count_settled({first.data(), nullptr, in.size("first", 0), in.size("first", 1)}, settled.data()), backend);
  return {{"settled", doubles(settled)}};
}

Outputs count_by_label(const Json& j, const Inputs& in, k::Backend& backend) {
  const Ids chosen = in.get<std::int32_t>("chosen"), labels = in.get<std::int32_t>("labels");
  const auto a = count_args(j, in, chosen);
  const std::int64_t num_labels = j.value("num_labels", 4);
  std::vector<std::int64_t> table(static_cast<std::size_t>(num_labels * a.experts));
  std::int64_t outside = 0;
  check(backend.count_by_label(a, labels.data(), num_labels, table.data(), &outside), backend);
  return {{"table", doubles(table)}};
}

using Operation = Outputs (*)(const Json&, const Inputs&, k::Backend&);
constexpr std::pair<std::string_view, Operation> kOperations[] = {
    {"gate_logits", gate_logits}, {"rounded_gate_logits", rounded_gate_logits}, {"route", route}, {"route_backward", route_backward}, {"gate_backward", gate_backward},
    {"balance_loss", balance_loss}, {"z_loss", z_loss}, {"squares", squares}, {"bias_update", bias_update},
    {"cross_entropy", cross_entropy}, {"normalise", normalise}, {"term_weights", term_weights}, {"drop", drop}, {"capacity", capacity},
    {"expert_choice", expert_choice}, {"noisy_logits", noisy_logits}, {"jitter", jitter}, {"sparse_mixer", sparse_mixer},
    {"expert_load", expert_load},
    {"routing_statistics", routing_statistics}, {"dequantise", dequantise}, {"lora_merge", lora_merge},
    {"lora_gradient", lora_gradient}, {"permute", permute}, {"moe_layer", moe_layer},
    {"importance_loss", importance_loss}, {"load_loss", load_loss}, {"entropy_loss", entropy_loss},
    {"gate_orthogonality", gate_orthogonality}, {"expert_overlap", expert_overlap}, {"score_variance", score_variance},
    {"routing_margins", routing_margins}, {"agreement", agreement}, {"count_settled", count_settled}, {"count_by_label", count_by_label}};

}  // namespace

StoredVectors parse_vectors(std::string_view text) {
  const Json file = Json::parse(text);
  StoredVectors all;
  all.written_by = file.at("written_by");
  all.not_reached = file.at("not_reached");
  for (const Json& n : all.not_reached) (void)n.at("rows").get<std::vector<std::string>>(), (void)n.at("why").get<std::string>();
  for (const Json& j : file.at("vectors")) {
    StoredVector v{j.at("id"), j.at("stem"), j.at("operation"), j.at("source"), j.at("options"), {}, {}, {}, {}};
    for (const auto& [role, name] : j.at("inputs").items()) {
      const Json& tensor = file.at("tensors").at(name.get<std::string>());
      v.inputs[role] = tensor.at("values").get<Values>();
      v.shapes[role] = tensor.at("shape").get<std::vector<std::int64_t>>();
    }
    if (!j.at("outputs").is_object() || j.at("outputs").empty()) throw std::runtime_error("vector " + v.id + " has no outputs");
    for (const auto& [name, output] : j.at("outputs").items()) {
      const double bound = k::bounds::gamma(output.at("roundings").get<double>(), k::unit_roundoff(k::Float::kF64));
      v.outputs[name] = {output.at("values").get<Values>(), bound * output.at("scale").get<double>()};
    }
    if (const auto row = j.find("row"); row != j.end()) {
      v.row = CatalogueRow{row->at("id"), row->at("formula"), row->at("output"), row->at("first"), row->at("count"),
                           row->value("published", std::vector<std::string>())};
    }
    all.vectors.push_back(std::move(v));
  }
  return all;
}

bool host_only(const StoredVector& v) { return v.operation == "normalise" || v.operation == "term_weights" || v.operation == "squares" || v.operation == "capacity"; }

std::map<std::string, Values> run_vector(const StoredVector& vector, k::Backend& backend) {
  for (const auto& [name, operation] : kOperations) {
    if (vector.operation == name) return operation(vector.options, Inputs(vector), backend);
  }
  throw std::runtime_error("no operation is called " + vector.operation);
}

}  // namespace moeaudit

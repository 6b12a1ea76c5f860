#include "audit/measures/replay/routing.h"

#include <algorithm>
#include <cmath>

#include "audit/behaviours/behaviour.h"
#include "audit/measures/replay/sparse_mixer.h"
#include "audit/measures/router_replay.h"
#include "kernels/host/bounds.h"

namespace moeaudit::replay {
namespace {

constexpr std::size_t kNamedWeights = 4096;  // routing weights of a layer that a name must fit

}  // namespace

const Node* config_value(const TraceFacts& f, std::string_view key) {
  const std::size_t dot = key.find('.');
  const auto in = [&](const Node& map) {
    const Node* found = map.find(key.substr(0, dot));
    return dot == std::string_view::npos ? found : found && found->is_map() ? found->find(key.substr(dot + 1)) : nullptr;
  };
  const Node* found = f.config.is_map() ? in(f.config) : nullptr;
  if (!found && f.config.is_map()) {
    const Node* text = f.config.find("text_config");
    if (text && text->is_map()) found = in(*text);
  }
  return found;
}

std::optional<DType> dtype_of_release(const TraceFacts& f, const Family& family, std::string_view topic) {
  for (const auto& [package, version] : f.packages) {
    const auto exact = Version::parse(version);
    if (package != "transformers" || !exact) continue;
    const VersionSet release{.exact = exact, .window = {}, .text = package + "==" + version};
    const BehaviourAnswer answer =
        ask({package, topic, {{"family", std::string(family.name)}, {"model_type", f.model_type}, {"class", f.model_class}}}, &release);
    if (answer.value) return *answer.value == "float32" ? DType::kF32 : DType::kUnknown;  // else "activations" or "logits"
  }
  return std::nullopt;
}

bool chosen_by_table(const TraceFacts& facts, int layer) {
  const Family* family = facts.model_type.empty() ? nullptr : find_family_by_model_type(facts.model_type);
  if (!family || family->table_layers.key.empty()) return false;
  const Node* words = config_value(facts, family->table_layers.key);
  const auto at = static_cast<std::size_t>(layer);
  return words && words->is_list() && at < words->items.size() && words->items[at].text == family->table_layers.value;
}

std::optional<Routing> routing_of(const Trace& trace, std::string* why) {
  const TraceFacts& f = trace.facts();
  const Family* family = f.model_type.empty() ? nullptr : find_family_by_model_type(f.model_type);
  if (!family) {
    *why = f.model_type.empty() ? "the trace does not say model_type (trace.json, key model)" : "no family for model_type " + f.model_type;
    return std::nullopt;
  }
  if (!family->not_replayed.empty()) {
    *why = std::string(family->not_replayed);
    return std::nullopt;
  }
  const auto config = [&](std::string_view key) { return config_value(f, key); };
  for (const FamilyCondition& c : family->routing_if) {
    const Node* node = config(c.key);
    const std::string has = !node ? "" : node->as_bool() ? (*node->as_bool() ? "true" : "false") : node->text;
    if (node && has != c.value) {
      *why = "the order is known for " + std::string(c.key) + " " + std::string(c.value) + " only";
      return std::nullopt;
    }
  }
  Routing r = family->routing;
  const auto fact = [&](std::string_view name, auto&& set) {
    for (const FamilyKey& key : family->keys) {
      if (key.fact != name) continue;
      for (const std::string_view spelt : key.keys) {
        if (const Node* node = config(spelt)) return set(*node);
      }
    }
  };
  const auto number = [&](const ConfigNumber& n) {
    const Node* says = n.key.empty() ? nullptr : config(n.key);
    return (says ? says->as_double() : std::nullopt).value_or(n.fallback);
  };
  r.logit_softcap = number(family->logit_softcap);
  r.renormalise_floor = number(family->renormalise_floor);
  r.mixer_jitter = number(family->mixer_jitter);
  if (const Node* p = family->renormalise_norm.key.empty() ? nullptr : config(family->renormalise_norm.key)) {
    r.renormalise = r.renormalise && !p->is_null();
    r.renormalise_norm = p->is_null() ? 1.0 : p->as_double().value_or(0.0);
    if (!(r.renormalise_norm > 0)) {
      *why = std::string(family->renormalise_norm.key) + " is no p of a norm";
      return std::nullopt;
    }
  }
  fact("router.num_groups",
       [&](const Node& n) { r.groups = std::max<std::int64_t>(1, n.as_int().value_or(r.groups)); });
  fact("router.top_groups",
       [&](const Node& n) { r.top_groups = std::max<std::int64_t>(1, n.as_int().value_or(r.top_groups)); });
  fact("router.renormalised", [&](const Node& n) { r.renormalise = n.as_bool().value_or(r.renormalise); });
  fact("router.routed_scaling", [&](const Node& n) { r.scaling = n.as_double().value_or(r.scaling); });
  r.scaling = weight_scaling(*family, r.scaling, f.top_k.value_or(0));
  if (!family->groups_if.key.empty()) {
    const Node* node = config(family->groups_if.key);
    if (!node || node->text != family->groups_if.value) r.groups = r.top_groups = 1;
  }
  if (r.groups <= 1) r.group_score = GroupScore::kNone;
  if (family->scores_dtype_by_version) r.scores_dtype = dtype_of_release(f, *family, "router_scores_dtype").value_or(DType::kUnknown);
  for (const auto& [package, version] : f.packages) {
    // Masked groups got 0.0 before transformers 5.6 (pull request 45441), -inf since.
    const auto at = Version::parse(version), since = Version::parse("5.6.0");
    if (package == "transformers" && at && since && r.groups > 1) r.group_mask_is_zero |= compare(*at, *since) < 0;
  }
  return r;
}

namespace {

/// Whether a set of experts, with `others` that were dropped and are not told, is one that the choice values allow, each
/// value moved by no more than its band.
bool allowed(const k::RouteArgs<double>& a, const double* choice, const double* band, const std::vector<char>& in,
             std::int64_t others) {
  const std::int64_t size = a.experts / a.groups;
  const auto group_score = [&](std::int64_t g, double sign) {
    double best = -kInf, second = -kInf;
    for (std::int64_t e = g * size; e < (g + 1) * size; ++e) {
      const double value = choice[e] + sign * band[e];
      if (value > best)
        second = best, best = value;
      else
        second = std::max(second, value);
    }
    return a.group_score == k::GroupScore::kTop2Sum && size > 1 ? best + second : best;
  };
  std::vector<char> certain(static_cast<std::size_t>(a.groups), 1), possible(static_cast<std::size_t>(a.groups), 1);
  if (a.groups > 1) {
    for (std::int64_t g = 0; g < a.groups; ++g) {
      std::int64_t surely_better = 0, maybe_better = 0;
      for (std::int64_t h = 0; h < a.groups; ++h) {
        if (h == g) continue;
        surely_better += group_score(h, -1) > group_score(g, 1);
        maybe_better += group_score(h, 1) >= group_score(g, -1);
      }
      possible[static_cast<std::size_t>(g)] = surely_better < a.top_groups;
      certain[static_cast<std::size_t>(g)] = maybe_better < a.top_groups;
    }
  }
  double lowest = kInf;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    if (!in[static_cast<std::size_t>(e)]) continue;
    if (!possible[static_cast<std::size_t>(e / size)]) {
      // A mask of 0 leaves the others in the race, with choice 0.
      if (!a.group_mask_is_zero) return false;
      lowest = std::min(lowest, 0.0);
      continue;
    }
    lowest = std::min(lowest, choice[e] + band[e]);
  }
  for (std::int64_t e = 0; e < a.experts; ++e) {
    if (!in[static_cast<std::size_t>(e)] && certain[static_cast<std::size_t>(e / size)] && choice[e] - band[e] > lowest &&
        --others < 0)
      return false;
  }
  return true;
}

Float score_dtype(const Routing& routing, Float logits) {
  // A softmax is asked for in float32; the other scores come in the dtype of the logits, which autocast may have narrowed.
  const bool narrow = (logits == Float::kBF16 || logits == Float::kF16) && routing.scoring != Scoring::kSoftmax;
  if (narrow || routing.scores_cast_back || routing.scores_dtype == DType::kUnknown) return logits;
  const Float f = float_of(routing.scores_dtype);
  return f == Float::kF64 ? Float::kF32 : f;
}

double score_error(const v::RoutedLayer& l, double range, Float f) {
  const double off = l.logit_error;
  if (l.score == k::Score::kSoftmax) return k::bounds::softmax_relative(l.experts, off, range, f);
  return l.score == k::Score::kSigmoid ? k::bounds::sigmoid_relative(off, f) : k::bounds::sqrt_softplus_relative(off, f);
}

/// Relative error of the weights of one token, whose scores have the error `score`, logits `range` apart.
double weight_error(const k::RouteArgs<double>& args, const v::RoutedLayer& l, double score, double range, Float scores) {
  const auto top_k = static_cast<double>(l.top_k);
  if (!args.renormalise || args.renormalise_norm == 1)
    return std::expm1(2 * std::log1p(score) + k::bounds::gamma(top_k + 5, unit(scores)));
  // The norm is computed in float32 and rounded once.
  const double norm = k::bounds::norm_relative(score, l.top_k, args.renormalise_norm,
                                               range + std::log(static_cast<double>(l.experts)), Float::kF32);
  return std::expm1(std::log1p(score) + std::log1p(norm) + k::bounds::gamma(6, unit(scores)));
}

/// Choice values without the groups, and how far each may be off: what allowed() looks at, of one token.
struct OneToken {
  OneToken(const k::RouteArgs<double>& args, const v::RoutedLayer& l, Float scores)
      : plain(args), l(l), scores(scores), choice(static_cast<std::size_t>(l.experts)), band(choice.size()),
        chosen(static_cast<std::size_t>(l.top_k)), in(choice.size()) {
    plain.correction_bias = l.bias.empty() ? nullptr : l.bias.data();
    plain.tokens = 1;
    plain.groups = plain.top_groups = 1;
    plain.group_score = k::GroupScore::kNone;
  }
  const double* logits(std::int64_t token) const { return l.logits.data() + token * l.experts; }
  double range(std::int64_t token) const {
    const auto [low, high] = std::minmax_element(logits(token), logits(token) + l.experts);
    return *high - *low;
  }
  double error(std::int64_t token) const { return score_error(l, range(token), scores); }  // relative, of its scores
  bool allows(const k::RouteArgs<double>& args, std::int64_t token) {
    plain.logits = logits(token);
    k::route(plain, k::RouteResult<double>{chosen.data(), nullptr, nullptr, choice.data()});
    const double relative = error(token);
    for (std::size_t e = 0; e < choice.size(); ++e) {
      const double value = choice[e];
      const double score = args.score_after_top_k ? 0.0 : std::fabs(value - (l.bias.empty() ? 0.0 : l.bias[e]));
      band[e] = relative * score + 2 * unit(Float::kF32) * std::fabs(value) +
                (args.score_after_top_k ? l.logit_error : 0.0);
    }
    std::fill(in.begin(), in.end(), 0);
    std::int64_t others = 0;
    for (std::int64_t j = 0; j < l.top_k; ++j) {
      const std::int32_t e = l.chosen[static_cast<std::size_t>(token * l.top_k + j)];
      if (e < 0) {
        ++others;
      } else if (in[static_cast<std::size_t>(e)]++ != 0) {
        return false;  // twice the same
      }
    }
    return allowed(args, choice.data(), band.data(), in, others);
  }

  k::RouteArgs<double> plain;
  const v::RoutedLayer& l;
  Float scores;
  std::vector<double> choice, band;
  std::vector<std::int32_t> chosen;
  std::vector<char> in;
};

std::string family_words(const Context& ctx) { return ctx.facts.model_type + "'s order"; }

void name_selection(const k::RouteArgs<double>& args, const v::RoutedLayer& l, Row* r) {
  double nearest = kInf;
  for (const v::RouteForm& form : v::route_forms(args, !l.bias.empty())) {
    if (form.id.empty()) continue;
    std::vector<std::int32_t> chosen;
    std::vector<double> weights;
    if (!v::route_with(form, l, &chosen, &weights)) continue;
    std::int64_t off = 0;
    for (std::int64_t token = 0; token < l.tokens; ++token) {
      std::vector<std::int32_t> a(chosen.begin() + token * l.top_k, chosen.begin() + (token + 1) * l.top_k);
      std::vector<std::int32_t> b(l.chosen.begin() + token * l.top_k, l.chosen.begin() + (token + 1) * l.top_k);
      std::sort(a.begin(), a.end());
      std::sort(b.begin(), b.end());
      off += a != b;
    }
    const std::string text = std::string(form.id) + " " + std::string(form.name);
    if (off == 0 && r->name.found) {
      r->name.also += (r->name.also.empty() ? "" : "; ") + text;
    } else if (off == 0) {
      r->name.found = true;
      r->name.id = form.id;
      r->name.name = form.name;
    } else if (static_cast<double>(off) < nearest) {
      nearest = static_cast<double>(off);
      r->name.runner_up = text;
      r->name.runner_up_fit = nearest;
    }
  }
}

/// W6: weights that are the family's but for a number added to the sum that they are divided by.
void name_epsilon(const k::RouteArgs<double>& args, const v::RoutedLayer& l, const std::vector<double>& recorded,
                  std::size_t n, double relative, v::Name* name) {
  v::RouteForm plain;
  plain.args = args;
  plain.args.renormalise = false;
  plain.args.scaling = 1;
  std::vector<std::int32_t> chosen;
  std::vector<double> scores;
  if (!v::route_with(plain, l, &chosen, &scores)) return;
  const auto top_k = static_cast<std::size_t>(l.top_k);
  double low = -kInf, high = kInf;  // of the number, by every token
  for (std::size_t first = 0; first + top_k <= n; first += top_k) {
    double sum = 0, weights = 0;
    bool same = true;
    for (std::size_t j = first; j < first + top_k; ++j) {
      const auto* at = std::find(chosen.data() + first, chosen.data() + first + top_k, l.chosen[j]);
      same = same && at != chosen.data() + first + top_k && (l.dropped.empty() || !l.dropped[j]);
      sum += scores[j], weights += recorded[j];
    }
    if (!same || !(weights > 0)) continue;
    const double total = sum * args.scaling / weights, off = 2 * relative * total;
    low = std::max(low, total - off - sum);
    high = std::min(high, total + off - sum);
  }
  if (!(low > 0) || !(high >= low) || !std::isfinite(high)) return;
  char text[96];
  std::snprintf(text, sizeof text, "divided by the sum of the chosen plus %.3g", (low + high) / 2);
  name->found = true;
  name->id = "W6";
  name->name = text;
}

void name_weights(const Routing& routing, const k::RouteArgs<double>& args, const LayerTensors& t,
                  const v::RoutedLayer& l, const std::vector<double>& recorded, Row* w) {
  const std::size_t top_k = static_cast<std::size_t>(l.top_k);
  const std::size_t n = std::min(recorded.size(), kNamedWeights) / top_k * top_k;
  const Float stored = float_of(t.routing_weights->dtype), scores = score_dtype(routing, l.dtype);
  const auto [low, high] = std::minmax_element(l.logits.begin(), l.logits.end());
  const double score = score_error(l, *high - *low, scores);
  const double relative =
      (args.renormalise_norm == 1 ? 2 * score + k::bounds::gamma(static_cast<double>(l.top_k) + 5, unit(scores))
                                  : weight_error(args, l, score, *high - *low, scores)) +
      2 * unit(stored);
  std::vector<std::size_t> used;  // weights of choices that were not dropped
  for (std::size_t i = 0; i < n; ++i) {
    if (l.dropped.empty() || !l.dropped[i]) used.push_back(i);
  }
  std::vector<v::Formula> formulas;
  std::vector<double> got, sums;  // sums: of the chosen scores of each token, before they are renormalised
  for (const std::size_t i : used) got.push_back(recorded[i]);
  for (const v::RouteForm& form : v::route_forms(args, !l.bias.empty())) {
    std::vector<std::int32_t> chosen;
    std::vector<double> weights;
    if (!v::route_with(form, l, &chosen, &weights)) continue;
    v::Formula f{std::string(form.id), std::string(form.name), std::vector<double>(used.size(), kNan)};
    for (std::size_t u = 0; u < used.size(); ++u) {
      const std::size_t i = used[u], first = i / top_k * top_k;
      for (std::size_t j = first; j < first + top_k; ++j) {
        if (chosen[j] == l.chosen[i]) f.values[u] = weights[j];
      }
    }
    formulas.push_back(std::move(f));
  }
  const std::vector<v::Symbol> symbols = {{"k", static_cast<double>(l.top_k)}, {"2", 2}, {"scaling", args.scaling}};
  const std::vector<double> band(got.size(), relative);
  w->name = v::name_formula("weights", {got, band}, formulas, v::factors_of(symbols));
  if (!w->name.found && args.renormalise && args.renormalise_norm == 1) name_epsilon(args, l, recorded, n, relative, &w->name);
}

/// Tokens that went outside their groups, where the masked ones got 0.0 instead of -inf.
void replay_groups(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, v::RouteForm limited,
                   const v::RoutedLayer& l, OneToken* one) {
  limited.args.group_mask_is_zero = false;
  std::vector<std::int32_t> chosen;
  std::vector<double> weights;
  k::RouteArgs<double> a = limited.args;
  a.logits = l.logits.data();
  a.correction_bias = l.bias.empty() ? nullptr : l.bias.data();
  a.tokens = l.tokens;
  chosen.resize(l.chosen.size());
  std::vector<double> choice(l.logits.size());
  if (k::route(a, k::RouteResult<double>{chosen.data(), nullptr, nullptr, choice.data()}) != k::Status::kOk) return;
  Row& r = ctx->row("group_limit", t.layer);
  r.held_to = "experts of the chosen groups only";
  for (std::int64_t token = 0; token < l.tokens; ++token) {
    bool outside = false;
    for (std::int64_t j = 0; j < l.top_k; ++j) {
      const std::int32_t e = l.chosen[static_cast<std::size_t>(token * l.top_k + j)];
      outside = outside || (e >= 0 && std::isinf(choice[static_cast<std::size_t>(token * l.experts + e)]));
    }
    outside = outside && !one->allows(limited.args, token);  // groups may tie
    ++r.compared;
    if (outside && ++r.differing == 1) r.place = ctx->place_of(m);
  }
  r.recorded = r.distance = static_cast<double>(r.differing);
  r.expected = r.band = 0;
  if (r.differing == 0) return;
  r.name.found = true;
  r.name.id = "W10";
  r.name.name = "other groups masked by 0, above every negative score";
}

void replay_recomputation(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l) {
  std::vector<std::int32_t> again(l.chosen.size());
  if (!read_ids(*t.recomputed_selected_experts, 0, static_cast<std::int64_t>(again.size()), again.data())) return;
  Row& r = ctx->row("recomputed_selection", t.layer);
  r.held_to = "the choice of the first forward";
  for (std::int64_t token = 0; token < l.tokens; ++token) {
    std::vector<std::int32_t> a(again.begin() + token * l.top_k, again.begin() + (token + 1) * l.top_k);
    std::vector<std::int32_t> b(l.chosen.begin() + token * l.top_k, l.chosen.begin() + (token + 1) * l.top_k);
    std::sort(a.begin(), a.end());
    std::sort(b.begin(), b.end());
    ++r.compared;
    if (a != b && ++r.differing == 1) r.place = ctx->place_of(m);
  }
  r.recorded = r.distance = static_cast<double>(r.differing);
  r.expected = r.band = 0;
}

}  // namespace

void replay_selection(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l) {
  if (t.recomputed_selected_experts && !l.chosen.empty()) replay_recomputation(ctx, m, t, l);
  if (l.chosen.empty()) return;
  // A table of token ids chose: of that nothing is recorded, but the weights of its choices are those of the logits.
  const bool by_table = chosen_by_table(ctx->facts, t.layer);
  Row none, of_table;
  Row& choice = ctx->row("selection", t.layer);
  if (by_table && choice.missing.empty()) choice.missing = "a table of token ids gives the experts of this layer";
  Row& r = by_table ? of_table : choice;
  Row& w = t.routing_weights ? ctx->row("weights", t.layer) : none;
  const auto unknown = [&](const std::string& why) {
    if (r.missing.empty()) r.missing = why;
    if (w.missing.empty()) w.missing = why;
  };
  if (ctx->facts.routing_replayed.value_or(false)) return unknown("the experts are a rollout's (training.routing_replayed)");
  if (!ctx->routing) return unknown(ctx->why_not_routed);
  if (ctx->routing->sparse_mixer) return replay_sparse_mixer(ctx, m, t, l, &r, &w);
  if (by_table && *std::min_element(l.chosen.begin(), l.chosen.end()) < 0) return unknown("a choice is no expert");
  if (!by_table && ctx->routing->correction_bias && l.bias.empty())
    return unknown("needs correction_bias_before of the step");
  std::string unweighed;
  if (!ctx->routing->expert_scale_tensor.empty()) {
    unweighed = "the weights are multiplied by a scale of their expert, which a trace does not hold";
  } else if (ctx->routing->always_rows) {
    unweighed = "the weights share their sum with experts that every token has, whose logits a trace does not hold";
  }
  k::RouteArgs<double> args = route_args<double>(*ctx->routing, l.experts, l.top_k);
  args.logit_softcap = 0;  // Context::read_layer() capped them
  args.given = by_table ? l.chosen.data() : nullptr;
  if (args.groups < 1 || args.groups > 1024 || l.experts % args.groups != 0)
    return unknown("the groups do not divide the experts");
  const v::RouteForm right = v::route_forms(args, !l.bias.empty())[0];
  std::vector<std::int32_t> chosen(l.chosen.size());
  std::vector<double> weights;
  if (!v::route_with(right, l, &chosen, &weights)) return unknown("this order of routing is not replayed");
  const Place place = ctx->place_of(m);
  const Float scores = score_dtype(*ctx->routing, l.dtype);
  OneToken one(args, l, scores);
  r.held_to = std::string("the k largest of the ") + (t.router_logits ? "recorded" : "recomputed") + " logits, by " + family_words(*ctx);
  std::vector<double> recorded_weights;
  if (t.routing_weights && unweighed.empty()) {
    recorded_weights.resize(l.chosen.size());
    if (!read_values(*t.routing_weights, 0, l.tokens * l.top_k, recorded_weights.data())) recorded_weights.clear();
    w.held_to = "weights of the chosen, by " + family_words(*ctx);
  }
  std::int64_t differing = 0;
  bool of_others = false, hidden = false;
  for (std::int64_t token = 0; token < l.tokens; ++token) {
    const std::int32_t* got = l.chosen.data() + token * l.top_k;
    if (std::all_of(got, got + l.top_k, [](std::int32_t e) { return e == -1; })) continue;  // all dropped: which, is not told
    const std::int32_t* want = chosen.data() + token * l.top_k;
    bool same = true;
    for (std::int64_t j = 0; j < l.top_k; ++j) same = same && std::find(got, got + l.top_k, want[j]) != got + l.top_k;
    ++r.compared;
    if (same && recorded_weights.empty()) continue;
    if (!same) {
      const bool no_such = std::find(got, got + l.top_k, kNoSuchExpert) != got + l.top_k;
      if (no_such || !one.allows(args, token)) {
        ++differing;
        if (r.differing + differing == 1) r.place = place;
      }
      of_others = true;
      continue;  // weights of another set say nothing
    }
    const double by_weight = weight_error(args, l, one.error(token), one.range(token), scores);
    if (!(by_weight < kTellsNothing)) {
      hidden = true;
      continue;
    }
    for (std::int64_t j = 0; j < l.top_k; ++j) {
      const auto at = static_cast<std::size_t>(token * l.top_k + j);
      if (!l.dropped.empty() && l.dropped[at]) continue;  // its weight is used by nothing
      const auto* rank = std::find(want, want + l.top_k, got[j]);
      const double expected =
          weights[static_cast<std::size_t>(token * l.top_k) + static_cast<std::size_t>(rank - want)];
      const double by =
          by_weight * std::fabs(expected) + 0.5 * k::spacing(expected, float_of(t.routing_weights->dtype));
      w.add(recorded_weights[at], expected, by, place);
    }
  }
  if (r.missing.empty()) r.missing = "every choice is -1, one that was dropped";
  if (w.missing.empty()) {
    w.missing = !unweighed.empty()         ? unweighed
                : recorded_weights.empty() ? "the weights could not be read"
                : hidden                   ? "the logits are so large that rounding them can change a weight by half"
                : of_others                ? "no token has just the experts that the logits give, so no weight has its counterpart"
                                           : "every choice was dropped";
  }
  r.differing += differing;
  r.recorded = static_cast<double>(r.differing);
  r.expected = 0;
  r.band = 0;
  r.distance = static_cast<double>(r.differing);
  if (args.groups > 1 && args.group_mask_is_zero && !ctx->masks_with_zero) replay_groups(ctx, m, t, right, l, &one);
  if (differing > 0 && !r.name.found) name_selection(args, l, &r);
  if (w.differing > 0 && !recorded_weights.empty() && !w.name.found && w.name.runner_up.empty())
    name_weights(*ctx->routing, args, t, l, recorded_weights, &w);
}

}  // namespace moeaudit::replay

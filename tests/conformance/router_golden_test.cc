// reference/ and the host kernels against what the real routers of transformers answered (fixtures/golden/router, made
// by fixtures/make/router_golden.py), and the weight round trips against bitsandbytes.
#define BOOST_TEST_MODULE router_golden
#include <ATen/ATen.h>
#include <unistd.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "audit/inputs/inputs.h"
#include "audit/measures/router_replay.h"
#include "audit/text/text.h"
#include "kernels/host/bounds.h"
#include "kernels/host/quantised_weights.h"
#include "kernels/host/router.h"
#include "reference/router.h"
#include "tests/support/compare.h"
#include "tests/support/tensors.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using k::Float;
using moeaudit::Node;
using moeaudit::test::compare;
using moeaudit::test::CompareOptions;
using moeaudit::test::Comparison;
using moeaudit::test::values;
using moeaudit::test::Values;

Node load(const std::string& file) {
  std::string text, error;
  BOOST_REQUIRE_MESSAGE(moeaudit::read_file(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/router/" + file, &text, &error),
                        error);
  Node root;
  moeaudit::TextError where;
  BOOST_REQUIRE_MESSAGE(moeaudit::parse_json(text, &root, nullptr, &where), where.what);
  return root;
}
const Node& at(const Node& node, const std::string& key) {
  const Node* found = node.find(key);
  BOOST_REQUIRE_MESSAGE(found != nullptr, "no " << key);
  return *found;
}
std::int64_t integer(const Node& node, const std::string& key) { return at(node, key).as_int().value(); }
std::vector<double> list(const Node* node) {
  std::vector<double> out;
  if (node != nullptr && node->is_list()) {
    for (const Node& item : node->items) out.push_back(item.as_double().value());
  }
  return out;
}
Float float_of(const Node& name) {
  if (name.text == "float32") return Float::kF32;
  BOOST_REQUIRE_EQUAL(name.text, "bfloat16");
  return Float::kBF16;
}
std::vector<float> narrowed(const std::vector<double>& v) { return {v.begin(), v.end()}; }
at::Tensor tensor(const std::vector<double>& v, std::vector<std::int64_t> shape) {
  return v.empty() ? at::Tensor() : at::from_blob(const_cast<double*>(v.data()), shape, at::kDouble).clone();
}

/// The order that moe-audit replays for a model with this config.json under this release: the family's YAML, resolved.
moeaudit::Routing resolved_routing(nlohmann::json config, const std::string& family, const std::string& version) {
  namespace fs = std::filesystem;
  const fs::path dir = fs::temp_directory_path() / ("moe-audit-golden-" + std::to_string(::getpid()));
  fs::create_directories(dir);
  config["model_type"] = family;
  std::ofstream(dir / "config.json") << config;
  moeaudit::RunOptions options;
  options.models = {dir.string()};
  options.assume = {{"transformers", version}};
  const auto runs = moeaudit::load_runs(options);
  fs::remove_all(dir);
  BOOST_REQUIRE_EQUAL(runs.size(), 1u);
  const auto& routing = runs[0].facts.routing;
  BOOST_REQUIRE_MESSAGE(routing.known(), family << ": " << routing.why_unknown());
  return routing.value();
}

/// One family as one version of transformers has it.
struct Golden {
  std::string name;
  std::int64_t tokens, hidden, experts, top_k;
  std::vector<double> x, w, bias, correction;
  k::RouteArgs<float> args;
  ref::RouteOptions options;
  bool fp32_gate = false;  // x.float() @ W.float()
  bool scores_in_logits_dtype = false;
};

Golden golden_of(const Node& c, const moeaudit::Routing& routing) {
  Golden g;
  g.name = at(c, "family").text;
  g.tokens = integer(c, "tokens"), g.hidden = integer(c, "hidden"), g.experts = integer(c, "experts"),
  g.top_k = integer(c, "top_k");
  g.x = list(c.find("x")), g.w = list(c.find("w")), g.bias = list(c.find("bias")),
  g.correction = list(c.find("correction_bias"));
  BOOST_CHECK_EQUAL(routing.linear_bias, !g.bias.empty());
  BOOST_CHECK_EQUAL(routing.correction_bias, !g.correction.empty());
  g.args = moeaudit::route_args<float>(routing, g.experts, g.top_k);
  g.options.top_k = g.top_k;
  g.options.score = static_cast<ref::Score>(g.args.score);
  g.options.score_after_top_k = g.args.score_after_top_k;
  g.options.group_score = static_cast<ref::GroupScore>(g.args.group_score);
  g.options.groups = g.args.groups;
  g.options.top_groups = g.args.top_groups;
  g.options.group_mask_is_zero = g.args.group_mask_is_zero;
  g.options.renormalise = g.args.renormalise;
  g.options.renormalise_eps = routing.renormalise_eps;
  g.options.scaling = routing.scaling;
  g.fp32_gate = routing.logits_dtype == moeaudit::DType::kF32;
  g.scores_in_logits_dtype = routing.scores_dtype == moeaudit::DType::kUnknown;
  return g;
}

/// Logits as the executed dtype order gives them, float64 holding values of that dtype. F32 sums for a float32 gate.
std::vector<double> executed_logits(const Golden& g, Float gate) {
  std::vector<double> logits(static_cast<std::size_t>(g.tokens * g.experts));
  const std::vector<float> x = narrowed(g.x), w = narrowed(g.w);
  if (gate == Float::kF32) {
    std::vector<float> packed(static_cast<std::size_t>(k::packed_gate_size<float>(g.experts, g.hidden))),
        out(logits.size());
    const std::vector<float> bias = narrowed(g.bias);
    k::pack_gate(w.data(), g.experts, g.hidden, packed.data());
    BOOST_REQUIRE(
        k::gate_logits(k::GateArgs<float, float>{x.data(), packed.data(), bias.empty() ? nullptr : bias.data(),
                                                 g.tokens, g.hidden, g.experts, out.data()}) == k::Status::kOk);
    std::copy(out.begin(), out.end(), logits.begin());
    return logits;
  }
  std::vector<double> packed(static_cast<std::size_t>(k::packed_gate_size<double>(g.experts, g.hidden)));
  k::pack_gate(w.data(), g.experts, g.hidden, packed.data());
  BOOST_REQUIRE(
      k::gate_logits(k::GateArgs<float, double>{x.data(), packed.data(), g.bias.empty() ? nullptr : g.bias.data(),
                                                g.tokens, g.hidden, g.experts, logits.data()}) == k::Status::kOk);
  k::round_values(logits.data(), static_cast<std::int64_t>(logits.size()), gate, logits.data());
  return logits;
}

double absolute_sum(const Golden& g, std::size_t i) {
  const std::size_t t = i / g.experts, e = i % g.experts;
  double sum = g.bias.empty() ? 0.0 : std::fabs(g.bias[e]);
  for (std::int64_t j = 0; j < g.hidden; ++j) sum += std::fabs(g.x[t * g.hidden + j] * g.w[e * g.hidden + j]);
  return sum;
}
/// Error of a library's logit whose sum runs in float32 in an order we do not know (at most hidden + 1 roundings on any
/// path, products included) and is then rounded to `gate`. A bias may be added after that rounding, and rounded again.
double library_logit_error(const Golden& g, std::size_t i, double logit, Float gate) {
  const double before =
      bounds::gamma(static_cast<double>(g.hidden) + 2, k::unit_roundoff(Float::kF32)) * absolute_sum(g, i);
  if (gate == Float::kF32) return before;
  const double once = bounds::rounded(logit, before, gate);
  if (g.bias.empty()) return once;
  const double bias = std::fabs(g.bias[i % g.experts]);
  return bounds::rounded(std::fabs(logit) + bias, before, gate) + bounds::rounded(logit, before, gate);
}

/// The experts differ only where their choice values are within `reach` of each other.
bool same_choice(const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b, const double* choice,
                 double reach) {
  std::vector<double> left, right;
  for (const std::int64_t e : a) left.push_back(choice[e]);
  for (const std::int64_t e : b) right.push_back(choice[e]);
  std::sort(left.begin(), left.end());
  std::sort(right.begin(), right.end());
  for (std::size_t i = 0; i < left.size(); ++i) {
    if (!(left[i] == right[i] || std::fabs(left[i] - right[i]) <= reach)) return false;
  }
  return true;
}

struct Tallies {
  int same_sets = 0, tokens = 0;
};

/// The library's weights of one token by expert.
std::map<std::int64_t, double> by_expert(const std::vector<std::int64_t>& experts, const std::vector<double>& weights,
                                         std::size_t from) {
  std::map<std::int64_t, double> m;
  for (std::size_t j = 0; j < experts.size(); ++j) m[experts[j]] = weights[from + j];
  return m;
}

/// One dtype of one family: logits, sets, weights.
void check_run(const Golden& g, const Node& run, const std::string& what, Tallies* tallies) {
  const Float run_dtype = float_of(at(run, "dtype"));
  const Float gate = g.fp32_gate ? Float::kF32 : run_dtype;
  const std::vector<double> got_weights = list(run.find("weights")), indices = list(run.find("indices"));
  const std::vector<std::int64_t> shape = {g.tokens, g.experts};
  const at::Tensor exact = ref::gate_logits(tensor(g.x, {g.tokens, g.hidden}), tensor(g.w, {g.experts, g.hidden}),
                                            tensor(g.bias, {g.experts}));
  const std::vector<double> ours = executed_logits(g, gate);

  const std::vector<double> theirs = list(run.find("logits"));
  std::vector<double> exact_values = values(exact);
  if (!theirs.empty()) {
    CompareOptions o;
    o.format = gate;
    o.bound = [&](std::size_t i, double e) { return library_logit_error(g, i, e, gate); };
    const Comparison c = compare(Values<double>{shape, exact_values}, Values<double>{shape, theirs}, o);
    BOOST_CHECK_MESSAGE(c.ok(), what << " logits: " << c.report());
    // "Executed" must be what they computed: the same bfloat16 number for nearly all (the float32 sum in between can
    // fall on the other side of halfway), in float32 within both bounds.
    std::size_t equal = 0;
    for (std::size_t i = 0; i < ours.size(); ++i) equal += ours[i] == theirs[i] ? 1 : 0;
    if (gate == Float::kBF16) BOOST_CHECK_GE(static_cast<double>(equal), 0.98 * static_cast<double>(ours.size()));
  }

  // Route from their own logits where they are given: then only the route stage is compared. Else from ours.
  const std::vector<double>& from = theirs.empty() ? ours : theirs;
  const std::vector<float> logits = narrowed(from), correction = narrowed(g.correction);
  k::RouteArgs<float> a = g.args;
  a.logits = logits.data();
  a.correction_bias = correction.empty() ? nullptr : correction.data();
  a.tokens = g.tokens;
  if (g.scores_in_logits_dtype && gate == Float::kBF16) a.tensor_dtype = Float::kBF16;
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(g.tokens * g.top_k));
  std::vector<float> weights(chosen.size());
  BOOST_REQUIRE(k::route(a, {chosen.data(), weights.data(), nullptr, nullptr}) == k::Status::kOk);
  const ref::Routed truth = ref::route(tensor(from, shape), g.options, tensor(g.correction, {g.experts}));
  const std::vector<double> choice = values(truth.choice), true_weights = values(truth.weights),
                            true_chosen = values(truth.chosen);

  // What two evaluations of a float32 logit may differ by; the same bfloat16 number nearly always, else one place.
  double logit_error = 0;
  for (std::size_t i = 0; theirs.empty() && i < ours.size(); ++i) {
    logit_error =
        std::max(logit_error, gate == Float::kBF16 ? k::spacing(exact_values[i], gate)
                                                   : library_logit_error(g, i, exact_values[i], gate) +
                                                         bounds::gate(g.hidden, absolute_sum(g, i), gate, false));
  }
  double range = 0;
  for (std::size_t t = 0; t < from.size(); t += static_cast<std::size_t>(g.experts)) {
    const auto [low, high] = std::minmax_element(from.begin() + static_cast<std::ptrdiff_t>(t),
                                                 from.begin() + static_cast<std::ptrdiff_t>(t) + g.experts);
    range = std::max(range, *high - *low);
  }
  const Float stored = float_of(at(run, "weights_dtype"));
  for (std::int64_t t = 0; t < g.tokens; ++t) {
    std::vector<std::int64_t> lib, kernel, reference;
    for (std::int64_t j = 0; j < g.top_k; ++j) {
      lib.push_back(static_cast<std::int64_t>(indices[t * g.top_k + j]));
      kernel.push_back(chosen[t * g.top_k + j]);
      reference.push_back(static_cast<std::int64_t>(true_chosen[t * g.top_k + j]));
    }
    // Ties of bfloat16 logits go to the lowest index here, to any index in torch.topk. Otherwise float32 scores of
    // equal logits are good to a few roundings.
    double reach = bounds::softmax_relative(g.experts, gate == Float::kF32 ? logit_error : 0, range, Float::kF32);
    // Scores that live in bfloat16 tie where the exact ones are within one rounding of each other.
    const auto scores = choice.begin() + t * g.experts;
    if (a.tensor_dtype == Float::kBF16 && !a.score_after_top_k)
      reach += k::spacing(*std::max_element(scores, scores + g.experts), Float::kBF16);
    const std::string token = what + " token " + std::to_string(t);
    BOOST_CHECK_MESSAGE(same_choice(lib, kernel, choice.data() + t * g.experts, reach), token << ": kernel");
    BOOST_CHECK_MESSAGE(same_choice(lib, reference, choice.data() + t * g.experts, reach), token << ": reference");
    ++tallies->tokens;
    std::vector<std::int64_t> a_sorted = lib, b_sorted = kernel;
    std::sort(a_sorted.begin(), a_sorted.end());
    std::sort(b_sorted.begin(), b_sorted.end());
    if (a_sorted != b_sorted) continue;
    ++tallies->same_sets;
    const auto want = by_expert(lib, got_weights, static_cast<std::size_t>(t * g.top_k));
    for (std::int64_t j = 0; j < g.top_k; ++j) {
      const double theirs_w = want.at(kernel[j]), w = weights[t * g.top_k + j];
      // Two float32 evaluations in different orders, each within the bound; then theirs is stored in `stored`. Where
      // the scores live in bfloat16, one more rounding of the softmax there. Without their logits, a float32 gate
      // apart.
      double relative = bounds::softmax_relative(g.experts, 0, range, Float::kF32);
      relative = bounds::scaled_relative(bounds::renormalised_relative(relative, g.top_k, Float::kF32), Float::kF32);
      double bound = 2 * relative * w + (stored == Float::kBF16 ? 0.5 * k::spacing(w * (1 + relative), stored) : 0.0);
      if (a.tensor_dtype == Float::kBF16) bound += k::spacing(w, Float::kBF16);
      bound += std::expm1(2 * logit_error) * w;
      BOOST_CHECK_MESSAGE(std::fabs(w - theirs_w) <= bound,
                          token << " expert " << kernel[j] << ": " << w << " against " << theirs_w);
    }
  }
}

void check_version(const std::string& version) {
  const std::string file = "transformers-" + version + ".json";
  const Node root = load(file);
  std::ifstream raw(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/router/" + file);
  const nlohmann::json cases = nlohmann::json::parse(raw)["cases"];
  std::size_t families = 0;
  for (const Node& c : at(root, "cases").items) {
    const nlohmann::json& config = cases[families]["config"];
    const Golden g = golden_of(c, resolved_routing(config, at(c, "family").text, version));
    for (const Node& run : at(c, "runs").items) {
      Tallies tallies;
      check_run(g, run, file + " " + g.name + " " + at(run, "dtype").text, &tallies);
      // Sets differ on ties only: of bfloat16 logits at the edge, a few per cent of the tokens; and of masked experts,
      // whose choice is 0, all of them equal, where a mask of 0 lets them win.
      BOOST_CHECK_GE(tallies.same_sets, g.options.group_mask_is_zero ? 4 : tallies.tokens - 2);
      BOOST_CHECK_EQUAL(tallies.tokens, 16);
    }
    ++families;
  }
  BOOST_CHECK_EQUAL(families, 13u);
}

BOOST_AUTO_TEST_CASE(transformers_4_57_6) { check_version("4.57.6"); }
BOOST_AUTO_TEST_CASE(transformers_5_23_0) { check_version("5.23.0"); }

/// Routers with what few have (is_rare()), from their own logits: the classes of a library against kernel and reference.
/// Returns the weights compared.
std::size_t check_rare(const std::string& file) {
  std::ifstream raw(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/router/" + file);
  const nlohmann::json root = nlohmann::json::parse(raw);
  std::size_t compared = 0;
  for (const nlohmann::json& c : root["cases"]) {
    const auto doubles = [](const nlohmann::json& j) { return j.get<std::vector<double>>(); };
    const nlohmann::json& order = c["order"];
    const auto tokens = c["tokens"].get<std::int64_t>(), experts = c["experts"].get<std::int64_t>(),
               top_k = c["top_k"].get<std::int64_t>(), always = c["always"].get<std::int64_t>();
    ref::RouteOptions o;
    o.top_k = top_k;
    const std::string score = order["score"];
    o.score = score == "softmax"   ? ref::Score::kSoftmax
              : score == "sigmoid" ? ref::Score::kSigmoid
                                   : ref::Score::kSqrtSoftplus;
    o.score_after_top_k = order.value("score_after_top_k", false);
    o.renormalise = order.value("renormalise", false);
    o.renormalise_eps = order.value("renormalise_eps", 0.0);
    o.renormalise_floor = order.value("renormalise_floor", 0.0);
    const nlohmann::json norm = order.value("renormalise_norm", nlohmann::json(1.0));
    o.renormalise_norm = norm.is_string() ? HUGE_VAL : norm.get<double>();
    o.sigmoid_offset = order.value("sigmoid_offset", 0.0);
    o.scaling = order.value("scaling", 1.0);
    o.logit_softcap = order.value("logit_softcap", 0.0);
    const std::vector<double> bias = doubles(c["correction_bias"]), scale = doubles(c["expert_scale"]);
    const auto given = c["given"].get<std::vector<std::int32_t>>();
    const std::vector<float> bias32 = narrowed(bias), scale32 = narrowed(scale);
    for (const nlohmann::json& run : c["runs"]) {
      const std::string what = c["family"].get<std::string>() + " " + run["dtype"].get<std::string>();
      const bool bf16 = run["dtype"] == "bfloat16", narrow = bf16 && order.value("tensors", "") == "logits";
      // The gate's rows: the experts, then those that every token has.
      std::vector<double> logits, always_logits;
      const std::vector<double> all = doubles(run["logits"]);
      for (std::size_t i = 0; i < all.size(); ++i) {
        const auto row = static_cast<std::int64_t>(i) % (experts + always);
        (row < experts ? logits : always_logits).push_back(all[i]);
      }
      ref::RouteInputs in;
      in.correction_bias = tensor(bias, {experts}), in.expert_scale = tensor(scale, {experts});
      if (!given.empty()) in.given = at::tensor(given, at::kInt).to(at::kLong).reshape({tokens, top_k});
      in.always_logits = tensor(always_logits, {tokens, always});
      const ref::Routed truth = ref::route(tensor(logits, {tokens, experts}), o, in);
      const std::vector<double> choice = values(truth.choice), true_weights = values(truth.weights),
                                true_chosen = values(truth.chosen),
                                true_always = always > 0 ? values(truth.always_weights) : std::vector<double>();
      const std::vector<float> logits32 = narrowed(logits), always32 = narrowed(always_logits);
      k::RouteArgs<float> a;
      a.logits = logits32.data(), a.tokens = tokens, a.experts = experts, a.top_k = top_k;
      a.correction_bias = bias.empty() ? nullptr : bias32.data(),
      a.expert_scale = scale.empty() ? nullptr : scale32.data();
      a.given = given.empty() ? nullptr : given.data(), a.always_logits = always32.data(), a.always = always;
      a.score = static_cast<k::Score>(o.score), a.score_after_top_k = o.score_after_top_k,
      a.renormalise = o.renormalise;
      a.renormalise_eps = static_cast<float>(o.renormalise_eps),
      a.renormalise_floor = static_cast<float>(o.renormalise_floor);
      a.renormalise_norm = static_cast<float>(o.renormalise_norm);
      a.sigmoid_offset = static_cast<float>(o.sigmoid_offset);
      a.scaling = static_cast<float>(o.scaling), a.logit_softcap = static_cast<float>(o.logit_softcap);
      if (narrow) a.tensor_dtype = Float::kBF16;
      if (run["weights_dtype"] == "bfloat16") a.weights_dtype = Float::kBF16;
      std::vector<std::int32_t> chosen(static_cast<std::size_t>(tokens * top_k));
      std::vector<float> weights(chosen.size()), got_always(always_logits.size());
      BOOST_REQUIRE(k::route(a, {chosen.data(), weights.data(), nullptr, nullptr, got_always.data()}) ==
                    k::Status::kOk);
      const std::vector<double> lib_weights = doubles(run["weights"]), lib_always = doubles(run["always_weights"]);
      const auto lib = run["indices"].get<std::vector<std::int64_t>>();
      // Two float32 evaluations of the scores, of the capped logits, of the sum and of the products.
      const double logit = bounds::softcapped(o.logit_softcap, Float::kF32);
      const auto [low, high] = std::minmax_element(logits.begin(), logits.end());
      double relative = score == "softmax"   ? bounds::softmax_relative(experts, logit, *high - *low, Float::kF32)
                        : score == "sigmoid" ? bounds::sigmoid_relative(logit, Float::kF32)
                                             : bounds::sqrt_softplus_relative(logit, Float::kF32);
      if (o.sigmoid_offset > 0) relative = bounds::offset_relative(relative, Float::kF32);
      const double of_score = relative;
      // |ln| of a score: within the span of the logits and ln E for a softmax, within that of the logits from 0 for a sigmoid.
      const double logarithm = *high - *low + std::fabs(*low) + std::fabs(*high) + std::log(experts);
      relative = o.renormalise_norm == 1
                     ? bounds::renormalised_relative(relative, top_k + always, Float::kF32)
                     : bounds::normed_relative(relative, top_k + always, o.renormalise_norm, logarithm, Float::kF32);
      relative = bounds::scaled_relative(relative, Float::kF32);
      const auto bound = [&](double w) {
        // Stored in bfloat16 once at the end; or each tensor in between, where a float32 on the other side of halfway
        // moves the score, the sum, the quotient and the product by a place each.
        const double place = k::spacing(w, Float::kBF16);
        return 2 * relative * std::fabs(w) + (narrow ? 4 * place : run["weights_dtype"] == "bfloat16" ? place : 0.0);
      };
      int same = 0;
      for (std::int64_t t = 0; t < tokens; ++t) {
        const auto at = [&](std::int64_t j) { return static_cast<std::size_t>(t * top_k + j); };
        std::vector<std::int64_t> theirs, ours, exact;
        for (std::int64_t j = 0; j < top_k; ++j) {
          theirs.push_back(lib[at(j)]), ours.push_back(chosen[at(j)]);
          exact.push_back(static_cast<std::int64_t>(true_chosen[at(j)]));
        }
        const auto values_of = choice.begin() + t * experts;
        const double largest = *std::max_element(values_of, values_of + experts);
        const double reach =
            2 * of_score * (std::fabs(largest) + 1) + (narrow ? k::spacing(largest, Float::kBF16) : 0.0);
        BOOST_CHECK_MESSAGE(same_choice(theirs, ours, choice.data() + t * experts, reach), what << " token " << t);
        BOOST_CHECK_MESSAGE(same_choice(theirs, exact, choice.data() + t * experts, reach), what << " token " << t);
        if (std::set<std::int64_t>(theirs.begin(), theirs.end()) != std::set<std::int64_t>(ours.begin(), ours.end()))
          continue;
        ++same;
        const auto want = by_expert(theirs, lib_weights, at(0));
        for (std::int64_t j = 0; j < top_k; ++j, ++compared) {
          const double w = weights[at(j)], theirs_w = want.at(ours[static_cast<std::size_t>(j)]);
          BOOST_CHECK_MESSAGE(std::fabs(w - theirs_w) <= bound(theirs_w), what << " token " << t << " expert "
                                                                               << chosen[at(j)] << ": " << w
                                                                               << " against " << theirs_w);
        }
        for (std::int64_t s = 0; s < always; ++s) {
          const auto i = static_cast<std::size_t>(t * always + s);
          BOOST_CHECK_MESSAGE(std::fabs(got_always[i] - lib_always[i]) <= bound(lib_always[i]),
                              what << " token " << t << " always");
          if (!bf16) BOOST_CHECK_LE(std::fabs(true_always[i] - lib_always[i]), bound(lib_always[i]));
        }
      }
      BOOST_CHECK_GE(same, tokens - 2);
    }
  }
  return compared;
}
BOOST_AUTO_TEST_CASE(rare_routers_5_23_0) { BOOST_CHECK_GE(check_rare("rare-5.23.0.json"), 1500u); }
BOOST_AUTO_TEST_CASE(olmo_core_3_0_0) { BOOST_CHECK_GE(check_rare("olmo-core-3.0.0.json"), 480u); }

BOOST_AUTO_TEST_CASE(bitsandbytes_0_50_2) {
  const Node root = load("bitsandbytes-0.50.2.json");
  const std::int64_t rows = integer(root, "rows"), columns = integer(root, "columns");
  const std::vector<float> w = narrowed(list(root.find("w")));
  std::vector<float> nf4(w.size()), int8(w.size());
  k::nf4_round_trip(w.data(), rows * columns, nf4.data());
  k::int8_row_round_trip(w.data(), rows, columns, int8.data());
  const std::vector<float> want_nf4 = narrowed(list(root.find("nf4"))), want_int8 = narrowed(list(root.find("int8")));
  const Comparison a = compare(Values<float>{{rows, columns}, want_nf4}, Values<float>{{rows, columns}, nf4});
  BOOST_CHECK_MESSAGE(a.ok(), a.report());
  // bitsandbytes quantises float16 inputs: the scale is that of the rounded row, and a value within 2^-11 of halfway
  // between two steps may fall the other way.
  CompareOptions o;
  o.bound = [&](std::size_t i, double e) {
    float largest = 0;
    for (std::int64_t j = 0; j < columns; ++j) largest = std::max(largest, std::fabs(w[i / columns * columns + j]));
    const double step = largest / 127.0, u = k::unit_roundoff(Float::kF16);
    const double place = std::fabs(w[i]) / step, beside = std::fabs(place - std::floor(place) - 0.5);
    return 2 * u * std::fabs(e) + (beside <= 2 * u * place + 1e-6 ? step * (1 + u) : 0.0);
  };
  const Comparison b = compare(Values<float>{{rows, columns}, want_int8}, Values<float>{{rows, columns}, int8}, o);
  BOOST_CHECK_MESSAGE(b.ok(), b.report());
}

}  // namespace

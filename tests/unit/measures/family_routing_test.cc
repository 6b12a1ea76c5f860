// The routing that audit/families describes, replayed with the host kernels on what the real MoE blocks of every tiny
// model chose (fixtures/make/family_routing.py).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "audit/inputs/inputs.h"
#include "audit/measures/router_inputs.h"
#include "audit/measures/router_replay.h"
#include "kernels/host/bounds.h"
#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
extern const Measure measure_header_scan;
namespace {

namespace k = kernels;
using namespace test;
using k::Float;
using Json = nlohmann::json;
using Doubles = std::vector<double>;

Float float_of(const std::string& name) { return name == "bfloat16" ? Float::kBF16 : Float::kF32; }

/// x W^T + b in float64.
Doubles exact_logits(const Doubles& x, const std::vector<float>& w, const std::vector<float>& bias, std::size_t hidden) {
  const std::size_t tokens = x.size() / hidden, experts = w.size() / hidden;
  Doubles out;
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t e = 0; e < experts; ++e) {
      double sum = bias.empty() ? 0.0 : static_cast<double>(bias[e]);
      for (std::size_t i = 0; i < hidden; ++i) sum += x[t * hidden + i] * static_cast<double>(w[e * hidden + i]);
      out.push_back(sum);
    }
  }
  return out;
}

/// Largest sum of |x w| over a logit: what bounds the rounding of a float32 sum.
double largest_absolute_sum(const Doubles& x, const std::vector<float>& w, std::size_t hidden) {
  Doubles ax(x);
  std::vector<float> aw(w);
  for (double& v : ax) v = std::fabs(v);
  for (float& v : aw) v = std::fabs(v);
  const Doubles sums = exact_logits(ax, aw, {}, hidden);
  return *std::max_element(sums.begin(), sums.end());
}

struct Subject {
  LoadedRun run;
  Routing routing;
  Router router;
  std::int64_t top_k = 0;
};

/// The model as an audit would have it, and the router of its last MoE layer.
void load(const std::string& name, const std::string& version, std::size_t hidden, Subject* s) {
  RunOptions options;
  options.paths = {fixture("models/" + name)};
  options.assume = {{"transformers", version}};
  s->run = std::move(load_runs(options).at(0));
  std::vector<MeasureRecord> records;
  MeasureContext context{s->run.facts, s->run.model, s->run.base, s->run.adapter, s->run.hidden_states, 1, true, {}, records};
  measure_header_scan.run(context);
  const FactSheet& f = s->run.facts;
  ASSERT_TRUE(f.routing.known() && f.routers.known() && f.top_k.known()) << f.routing.why_unknown();
  s->routing = f.routing.value();
  s->top_k = f.top_k.value();
  const RouterTable& t = f.routers.value();
  ASSERT_EQ(read_router(s->run.model, t, s->routing, t.layer.size() - 1, &s->router), "");
  ASSERT_EQ(s->router.hidden, static_cast<std::int64_t>(hidden));
}

/// One dtype. The library's sets may differ from ours only where choices are level: bfloat16 logits tie.
void replay(const Subject& s, const Json& run, const Doubles& x, std::size_t hidden) {
  const Float loaded = float_of(run["dtype"]);
  const Float gate = s.routing.logits_dtype == DType::kF32 ? Float::kF32 : loaded;
  const Router& r = s.router;
  Doubles logits = exact_logits(x, r.w, r.linear_bias, hidden);
  const auto tokens = static_cast<std::int64_t>(x.size() / hidden);
  Doubles always(static_cast<std::size_t>(tokens * r.always));
  split_rows(r, tokens, logits.data(), always.data());
  logits.resize(static_cast<std::size_t>(tokens * r.experts));
  k::round_values(always.data(), static_cast<std::int64_t>(always.size()), gate, always.data());
  k::round_values(logits.data(), static_cast<std::int64_t>(logits.size()), gate, logits.data());
  // A router that caps its logits gives them out capped, in float32.
  const double cap = s.routing.logit_softcap;
  const Doubles product = logits;
  for (double& l : logits) l = k::softcapped(l, cap, Float::kF64);
  const double float_error = k::bounds::softcapped(cap, Float::kF32) + 2.0 * static_cast<double>(hidden + 2) * std::ldexp(1.0, -24) * largest_absolute_sum(x, r.w, hidden);
  if (!run["logits"].is_null()) {
    const Doubles theirs = run["logits"];
    Doubles stored(theirs.size());
    k::round_values(theirs.data(), static_cast<std::int64_t>(theirs.size()), gate, stored.data());
    const bool on_grid = std::equal(theirs.begin(), theirs.end(), stored.begin(),
                                    [](double a, double b) { return static_cast<float>(a) == static_cast<float>(b); });
    // granitemoe returns float32 after a product in the dtype of the activations.
    EXPECT_TRUE(float_of(run["logits_dtype"]) == gate || (float_of(run["logits_dtype"]) == Float::kF32 && (on_grid || cap > 0))) << "logits_dtype of the family";
    ASSERT_EQ(theirs.size(), logits.size());
    for (std::size_t i = 0; i < logits.size(); ++i) {
      // A sum in bfloat16 is rounded once, with a bias twice.
      const double place = k::spacing(std::max(std::fabs(theirs[i]), std::fabs(product[i])), gate);
      const double reach = gate == Float::kBF16 ? (r.linear_bias.empty() ? 1 : 2) * place : 0.0;
      ASSERT_NEAR(logits[i], theirs[i], reach + float_error) << i;
    }
    logits = theirs;
  }

  const std::vector<float> narrow(logits.begin(), logits.end()), narrow_always(always.begin(), always.end());
  k::RouteArgs<float> a = route_args<float>(s.routing, r, s.top_k);
  a.logits = narrow.data(), a.always_logits = narrow_always.data();
  a.logit_softcap = 0;  // done
  a.expert_scale = r.expert_scale.empty() ? nullptr : r.expert_scale.data();
  a.tokens = tokens;
  a.correction_bias = r.correction_bias.empty() ? nullptr : r.correction_bias.data();
  if (s.routing.scores_dtype == DType::kUnknown && gate != Float::kF32) a.tensor_dtype = gate;
  if (s.routing.scores_cast_back && loaded != Float::kF32) a.tensor_dtype = loaded;
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(a.tokens * s.top_k));
  std::vector<float> weights(chosen.size()), choice(logits.size());
  ASSERT_EQ(route_by(k::on_host(), s.routing, a, k::RouteResult<float>{chosen.data(), weights.data(), nullptr, choice.data()}, gate),
            k::Status::kOk);

  // Two float32 evaluations, of logits that may each be off by float_error, and where they are stored in bfloat16 one rounding.
  const double relative = std::expm1(2 * float_error) + 1e-5 +
                          (float_of(run["weights_dtype"]) == Float::kBF16 || gate == Float::kBF16 ? std::ldexp(1.0, -7) : 0.0);
  std::int64_t same = 0;
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    std::map<std::int64_t, double> ours;
    for (std::int64_t j = 0; j < s.top_k; ++j) ours[chosen[t * s.top_k + j]] = weights[t * s.top_k + j];
    const std::vector<std::int64_t> experts = run["experts"][t];
    const Doubles values = run["weights"][t];
    ASSERT_EQ(experts.size(), static_cast<std::size_t>(s.top_k)) << t;
    Doubles mine, theirs;
    bool equal = true;
    for (const auto& [e, w] : ours) mine.push_back(choice[t * r.experts + e]);
    for (std::size_t j = 0; j < experts.size(); ++j) {
      theirs.push_back(choice[t * r.experts + experts[j]]);
      if (const auto found = ours.find(experts[j]); found != ours.end()) EXPECT_NEAR(found->second, values[j], relative * std::fabs(values[j])) << t;
      else equal = false;
    }
    same += equal;
    std::sort(mine.begin(), mine.end());
    std::sort(theirs.begin(), theirs.end());
    for (std::size_t j = 0; j < mine.size(); ++j) EXPECT_NEAR(mine[j], theirs[j], 1e-5) << t;
  }
  EXPECT_GE(same, a.tokens - 1);
}

TEST(FamilyRouting, IsThatOfTheRealBlocks) {
  const Json golden = read_json(fixture("golden/family_routing.json"));
  const Doubles x = golden["x"];
  const std::size_t hidden = golden["hidden"];
  std::set<std::string> families;
  for (const auto& [name, model] : golden["models"].items()) {
    SCOPED_TRACE(name);
    Subject s;
    load(name, model["transformers"], hidden, &s);
    if (HasFatalFailure()) continue;
    families.insert(s.run.facts.family.value());
    for (const Json& run : model["runs"]) {
      SCOPED_TRACE(run["dtype"]);
      replay(s, run, run.value("x", x), hidden);  // its own where the router norms what it gets
    }
  }
  EXPECT_GE(families.size(), 11u);
}

}  // namespace
}  // namespace moeaudit

// Capacity and drops: kernels/host against reference/; the frameworks' forms by hand; DeepSpeed's gates
// (fixtures/golden/dispatch.json) and Tutel's (tutel.json); the laws of dropping.
#define BOOST_TEST_MODULE dispatch
#include "kernels/host/dispatch.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "kernels/host/router_backward.h"
#include "reference/dispatch.h"
#include "reference/router.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using Ids = std::vector<std::int32_t>;
using k::CapacityForm;
using k::DropOrder;

std::int64_t capacity(CapacityForm form, std::int64_t tokens, std::int64_t experts, std::int64_t top_k, double factor,
                      std::int64_t other = 1) {
  k::CapacityArgs a;
  a.form = form, a.tokens = tokens, a.experts = experts, a.top_k = top_k, a.factor = factor;
  if (form == CapacityForm::kDeepSpeed) a.min_capacity = other;
  if (form == CapacityForm::kMegaBlocks || form == CapacityForm::kOlmoCore) a.expert_parallel_size = other;
  if (form == CapacityForm::kFastMoE) a.world_size = other;
  std::int64_t places = -1;
  BOOST_REQUIRE(k::capacity(a, &places) == k::Status::kOk);
  return places;
}

BOOST_AUTO_TEST_CASE(forms_of_the_frameworks) {
  // 100 tokens, 8 experts, k = 2, factor 1.25: 31.25 choices an expert.
  BOOST_TEST(capacity(CapacityForm::kMegatron, 100, 8, 2, 1.25) == 32);
  BOOST_TEST(capacity(CapacityForm::kDeepSpeed, 100, 8, 2, 1.25) == 32);
  BOOST_TEST(capacity(CapacityForm::kDeepSpeed, 4, 8, 1, 1.0, 4) == 4);        // at least min_capacity
  BOOST_TEST(capacity(CapacityForm::kMegaBlocks, 100, 8, 2, 1.25) == 31);      // rounds down
  BOOST_TEST(capacity(CapacityForm::kMegaBlocks, 100, 8, 2, 1.25, 4) == 125);  // for 4 ranks at once
  BOOST_TEST(capacity(CapacityForm::kOlmoCore, 100, 8, 2, 1.25, 4) == 128);    // up8(31) for each of 4
  BOOST_TEST(capacity(CapacityForm::kTutel, 100, 8, 2, 1.25) == 32);           // 2 int(1.25 * 13)
  BOOST_TEST(capacity(CapacityForm::kTutel, 100, 8, 2, 1.0) == 26);
  BOOST_TEST(capacity(CapacityForm::kFastMoE, 100, 8, 2, 1.25, 4) == 31);  // 125 * 2 // 8
  BOOST_TEST(capacity(CapacityForm::kMegatron, 16, 8, 2, 1.0) == 4);
  // 15 choices an expert: float32 has 6.25 x 2.4 above it. 9: 1.2 x 7.5 = 9, and 1.2 x 3 x 50 / 20 is just below.
  BOOST_TEST(capacity(CapacityForm::kMegatron, 50, 8, 2, 1.2) == 15);
  BOOST_TEST(capacity(CapacityForm::kDeepSpeed, 50, 8, 2, 1.2) == 16);
  BOOST_TEST(capacity(CapacityForm::kOlmoCore, 50, 20, 3, 1.2) == 16);
}

/// Tutel's factors up to 0 and its alignment, MegaBlocks' 0: the largest count of an expert decides.
BOOST_AUTO_TEST_CASE(forms_that_take_the_largest_count) {
  const auto at_count = [](CapacityForm form, double factor, std::int64_t largest, std::int64_t alignment = 1,
                           std::int64_t tokens = 100) {
    k::CapacityArgs a;
    a.form = form, a.tokens = tokens, a.experts = 8, a.top_k = 2, a.factor = factor;
    a.alignment = alignment, a.largest_count = &largest;
    std::int64_t places = -1;
    BOOST_REQUIRE(k::capacity(a, &places) == k::Status::kOk);
    return places;
  };
  constexpr CapacityForm kTutel = CapacityForm::kTutel, kMegaBlocks = CapacityForm::kMegaBlocks;
  BOOST_TEST(at_count(kTutel, 0, 41) == 41);
  BOOST_TEST(at_count(kTutel, -1.25, 41) == 32);  // 2 int(1.25 * 13)
  BOOST_TEST(at_count(kTutel, -1.25, 29) == 29);
  BOOST_TEST(at_count(kTutel, 1.25, 29) == 32);  // above 0 the counts decide nothing
  BOOST_TEST(at_count(kTutel, 0, 41, 8) == 48);
  BOOST_TEST(at_count(kTutel, -1.25, 29, 8) == 32);
  BOOST_TEST(at_count(kTutel, 1.25, 29, 12) == 36);
  BOOST_TEST(at_count(kTutel, -0.01, 29) == 0);    // 2 int(0.13)
  BOOST_TEST(at_count(kTutel, -1e17, 29) == 29);   // 2.6e18 places are more
  BOOST_TEST(at_count(kTutel, -1e300, 29) == 29);  // beyond 2^63 as well
  BOOST_TEST(at_count(kMegaBlocks, 0, 41) == 41);
  BOOST_TEST(at_count(kMegaBlocks, 1, 41) == 25);
  BOOST_TEST(at_count(kMegaBlocks, 0.01, 41) == 41);   // int(0.25)
  BOOST_TEST(at_count(kMegaBlocks, 1, 2, 1, 3) == 2);  // int(0.75): 3 tokens drop none of theirs
  BOOST_TEST(at_count(kMegaBlocks, 1, 0, 1, 0) == 0);
  BOOST_TEST(at_count(CapacityForm::kMegatron, 1.25, 41, 8) == 32);  // Tutel's alone
}

constexpr CapacityForm kForms[] = {CapacityForm::kMegatron, CapacityForm::kDeepSpeed, CapacityForm::kMegaBlocks,
                                   CapacityForm::kOlmoCore, CapacityForm::kTutel,     CapacityForm::kFastMoE};

BOOST_AUTO_TEST_CASE(capacity_refuses) {
  const std::int64_t largest = 5, most = std::numeric_limits<std::int64_t>::max(), none = -1;
  const double inf = std::numeric_limits<double>::infinity();
  for (const CapacityForm form : kForms) {
    const bool tutel = form == CapacityForm::kTutel, megablocks = form == CapacityForm::kMegaBlocks;
    k::CapacityArgs a;
    a.form = form, a.tokens = 1000, a.experts = 8, a.top_k = 2, a.largest_count = &largest;
    std::int64_t places = -7;
    const auto status = [&](double factor) { return a.factor = factor, k::capacity(a, &places); };
    for (const double factor : {inf, -inf, std::nan("")}) BOOST_CHECK(status(factor) == k::Status::kBadOption);
    // 2^63 is 9.2e18. T k / E = 250; Tutel's 125 x 5e16 fits, twice that does not.
    for (const double factor : {5e16, 1e17, 1e38, 1e300}) BOOST_CHECK(status(factor) == k::Status::kBadOption);
    BOOST_CHECK(places == -7);
    const bool fastmoe = form == CapacityForm::kFastMoE;  // k T factor, before it divides
    BOOST_CHECK(status(3e16) == (fastmoe ? k::Status::kBadOption : k::Status::kOk));
    BOOST_CHECK(fastmoe || std::fabs(static_cast<double>(places) - 7.5e18) < 1e12);
    a.expert_parallel_size = 4;
    const bool of_ranks = megablocks || form == CapacityForm::kOlmoCore;
    BOOST_CHECK(status(3e16) == (fastmoe || of_ranks ? k::Status::kBadOption : k::Status::kOk));
    a.expert_parallel_size = 1, a.tokens = most, a.top_k = 1;
    BOOST_CHECK(status(1) == (fastmoe ? k::Status::kBadOption : k::Status::kOk));
    BOOST_CHECK(fastmoe || places == std::int64_t{1} << 60);
    a.tokens = 1000, a.top_k = 2;
    BOOST_CHECK(status(-1) == (tutel ? k::Status::kOk : k::Status::kBadOption));
    BOOST_CHECK(status(0) == (tutel || megablocks ? k::Status::kOk : k::Status::kBadOption));
    a.largest_count = nullptr;
    BOOST_CHECK(status(0) == (tutel || megablocks ? k::Status::kNullPointer : k::Status::kBadOption));
    BOOST_CHECK(status(-1) == (tutel ? k::Status::kNullPointer : k::Status::kBadOption));
    BOOST_CHECK(status(1) == k::Status::kOk);
    a.largest_count = &none;
    BOOST_CHECK(status(1) == k::Status::kBadShape);
    a.largest_count = &largest, a.alignment = 0;
    BOOST_CHECK(status(1) == k::Status::kBadShape);
    a.alignment = most;
    BOOST_CHECK(status(1) == k::Status::kOk);
    BOOST_CHECK(!tutel || places == most);
    a.alignment = 2, a.largest_count = &most;  // odd
    BOOST_CHECK(!tutel || status(0) == k::Status::kBadOption);
    a.alignment = 1, a.experts = 0;
    BOOST_CHECK(status(1) == k::Status::kBadShape);
    a.experts = 8;
    BOOST_CHECK(k::capacity(a, nullptr) == k::Status::kNullPointer);
  }
}

// Sizes and factors whose quotients and products round both ways.
BOOST_AUTO_TEST_CASE(forms_agree_with_the_reference) {
  std::vector<std::int64_t> cases;
  std::vector<double> factors;
  for (std::int64_t i = 0; i < 600; ++i) {
    const std::int64_t world = 1 + i % 4;
    cases.insert(cases.end(),
                 {i * i % 4099, world * (1 + i % 37), 1 + i % 8, i % 5, 1 + i % 3, world, 1 + i % 7, 1 + 5 * i % 97});
    factors.push_back(1 + 0.1 * static_cast<double>(i % 17));
  }
  const auto n = static_cast<std::int64_t>(factors.size());
  const at::Tensor sizes = at::tensor(cases, at::kLong).reshape({n, 8});
  for (const double sign : {1.0, 0.0, -1.0}) {
    const at::Tensor by = sign * at::tensor(factors, at::kDouble);
    for (int form = 0; form < 6; ++form) {
      if (sign < 0 && kForms[form] != CapacityForm::kTutel) continue;
      if (sign == 0 && kForms[form] != CapacityForm::kTutel && kForms[form] != CapacityForm::kMegaBlocks) continue;
      const at::Tensor want = ref::capacity(static_cast<ref::CapacityForm>(form), sizes, by).contiguous();
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t* c = cases.data() + 8 * i;
        std::int64_t places = -1;
        const double factor = sign * factors[static_cast<std::size_t>(i)];
        BOOST_REQUIRE(k::capacity({kForms[form], c[0], c[1], c[2], factor, c[3], c[4], c[5], c[6], c + 7}, &places) ==
                      k::Status::kOk);
        BOOST_CHECK_MESSAGE(places == want.data_ptr<std::int64_t>()[i],
                            "form " << form << ", factor " << factor << ", case " << i << ": " << places);
      }
    }
  }
}

struct Choices {
  std::int64_t tokens, experts, top_k;
  Ids chosen;
  std::vector<double> weights, keys, scores = {}, logits = {};  // the last two [tokens, experts]
};

/// Routing by Gaussian logits on a grid, so that weights tie; every 9th choice is none. Biased: by sigmoids and a bias
/// on top, so that the largest score is often not the first choice, or none.
Choices choices(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, bool collapsed, bool biased = false) {
  std::vector<float> g(static_cast<std::size_t>(tokens * experts)), h(static_cast<std::size_t>(tokens * top_k));
  k::unit_gaussians(3, 1, 0, tokens * experts, g.data());
  k::unit_gaussians(3, 2, 0, tokens * top_k, h.data());
  Choices c{tokens, experts, top_k, {}, {}, {}, {}, {}};
  for (std::size_t i = 0; i < g.size(); ++i) {
    c.logits.push_back(std::nearbyint(4 * static_cast<double>(g[i])) / 4 +
                       (collapsed && static_cast<std::int64_t>(i) % experts < top_k ? 50 : 0));
  }
  ref::RouteOptions o;
  o.top_k = top_k;
  at::Tensor bias;
  if (biased) o.score = ref::Score::kSigmoid, bias = 2 * at::cos(3 * at::arange(experts, at::kDouble));
  const at::Tensor logits = at::from_blob(c.logits.data(), {tokens, experts}, at::kDouble);
  const ref::Routed r = ref::route(logits, o, bias);
  const at::Tensor scores = ref::scores(logits, o.score).contiguous();
  c.scores.assign(scores.data_ptr<double>(), scores.data_ptr<double>() + scores.numel());
  const at::Tensor ids = r.chosen.contiguous(), weights = r.weights.contiguous();
  for (std::int64_t i = 0; i < tokens * top_k; ++i) {
    c.chosen.push_back(i % 9 == 4 ? -1 : static_cast<std::int32_t>(ids.data_ptr<std::int64_t>()[i]));
    c.weights.push_back(weights.data_ptr<double>()[i]);
    c.keys.push_back(std::nearbyint(2 * static_cast<double>(h[static_cast<std::size_t>(i)])));
  }
  return c;
}

struct Dropped {
  Ids place;
  std::vector<double> weights;
  std::vector<std::int64_t> kept;
  std::int64_t dropped = -1, lost = -1;
};
template <class T = double>
Dropped drop(const Choices& c, DropOrder order, std::int64_t places, bool renormalise = false) {
  Dropped d;
  d.place.resize(c.chosen.size());
  d.kept.resize(static_cast<std::size_t>(c.experts));
  const std::vector<T> before(c.weights.begin(), c.weights.end()), keys(c.keys.begin(), c.keys.end()),
      scores(c.scores.begin(), c.scores.end());
  std::vector<T> after(before.size());
  k::DropArgs<T> a;
  a.chosen = c.chosen.data(), a.weights = before.data(), a.keys = keys.data();
  a.scores = scores.data();
  a.tokens = c.tokens, a.experts = c.experts, a.top_k = c.top_k, a.capacity = places, a.order = order,
  a.renormalise = renormalise;
  BOOST_REQUIRE(k::drop(a, {d.place.data(), after.data(), d.kept.data(), &d.dropped, &d.lost}) == k::Status::kOk);
  d.weights.assign(after.begin(), after.end());
  return d;
}

constexpr DropOrder kOrders[] = {DropOrder::kTokens, DropOrder::kChoices, DropOrder::kWeights, DropOrder::kKeys,
                                 DropOrder::kBatchPrioritised};
constexpr ref::DropOrder kReferences[] = {ref::DropOrder::kTokens, ref::DropOrder::kChoices, ref::DropOrder::kWeights,
                                          ref::DropOrder::kKeys, ref::DropOrder::kBatchPrioritised};

BOOST_AUTO_TEST_CASE(drops_agree_with_the_reference) {
  struct Shape {
    std::int64_t tokens, experts, k, capacity;
  };
  for (const Shape s : {Shape{1, 1, 1, 1},
                        {1, 1, 1, 0},
                        {16, 8, 2, 4},
                        {100, 8, 8, 30},
                        {90, 60, 4, 3},
                        {40, 144, 6, 1},
                        {30, 160, 32, 5},
                        {50, 384, 1, 1000}}) {
    for (const auto& [collapsed, biased] : {std::pair{false, false}, {true, false}, {false, true}}) {
      const Choices c = choices(s.tokens, s.experts, s.k, collapsed, biased);
      const std::vector<std::int64_t> ids(c.chosen.begin(), c.chosen.end());
      const auto as = [&](const std::vector<double>& v) {
        return at::from_blob(const_cast<double*>(v.data()), {s.tokens, s.k}, at::kDouble);
      };
      for (std::size_t i = 0; i < 5; ++i) {
        const at::Tensor want =
            ref::drop(at::from_blob(const_cast<std::int64_t*>(ids.data()), {s.tokens, s.k}, at::kLong), as(c.weights),
                      as(c.keys),
                      at::from_blob(const_cast<double*>(c.scores.data()), {s.tokens, s.experts}, at::kDouble),
                      kReferences[i], s.capacity)
                .contiguous();
        const Dropped got = drop(c, kOrders[i], s.capacity);
        const Ids expected(want.data_ptr<std::int64_t>(), want.data_ptr<std::int64_t>() + want.numel());
        BOOST_CHECK_MESSAGE(got.place == expected, s.tokens << "x" << s.experts << "/" << s.k << " order " << i);
        // What every order keeps.
        std::int64_t kept = 0, had = 0;
        for (std::int64_t n : got.kept) {
          kept += n;
          BOOST_CHECK(n <= s.capacity);
        }
        for (std::int32_t e : c.chosen) had += e >= 0;
        BOOST_CHECK(kept + got.dropped == had);
        const at::Tensor some = at::tensor(c.chosen, at::kInt).reshape({s.tokens, s.k}).ge(0).any(1),
                         none = want.lt(0).all(1);
        BOOST_CHECK(got.lost == some.logical_and(none).sum().item<std::int64_t>());
        for (std::size_t j = 0; j < got.place.size(); ++j)
          BOOST_CHECK(got.weights[j] == (got.place[j] < 0 ? 0.0 : c.weights[j]));
        // Over the sum of the kept: k - 1 additions and a quotient on either side.
        const Dropped over = drop(c, kOrders[i], s.capacity, true);
        const at::Tensor kept_weights = ref::kept_weights(as(c.weights), want, true, 0x1p-52).contiguous();
        for (std::size_t j = 0; j < over.weights.size(); ++j) {
          const double w = kept_weights.data_ptr<double>()[j];
          BOOST_CHECK_SMALL(over.weights[j] - w, 2 * bounds::gamma(static_cast<double>(s.k), 0x1p-53) * w);
        }
        // float32 keeps what float64 keeps of the same numbers.
        Choices narrow = c;
        for (std::vector<double>* v : {&narrow.weights, &narrow.scores})
          for (double& w : *v) w = static_cast<double>(static_cast<float>(w));
        BOOST_CHECK(drop<float>(narrow, kOrders[i], s.capacity).place == drop(narrow, kOrders[i], s.capacity).place);
      }
    }
  }
}

/// The gradient through softmax, drops and renormalisation after them is route_backward()'s without the dropped
/// choices.
BOOST_AUTO_TEST_CASE(gradients_after_drops_are_those_of_autograd) {
  const Choices c = choices(60, 16, 4, false);
  const std::int64_t tokens = c.tokens, top_k = c.top_k;
  std::vector<float> g(static_cast<std::size_t>(tokens * top_k));
  k::unit_gaussians(3, 3, 0, tokens * top_k, g.data());
  const std::vector<double> upstream(g.begin(), g.end());
  const Dropped dropped = drop(c, DropOrder::kChoices, 4);
  BOOST_REQUIRE(dropped.dropped > 20 && dropped.lost > 0);
  Ids left = c.chosen;
  for (std::size_t i = 0; i < left.size(); ++i) left[i] = dropped.place[i] < 0 ? -1 : left[i];
  k::RouteBackwardArgs<double> a;
  a.forward.logits = c.logits.data(), a.forward.tokens = tokens, a.forward.experts = 16, a.forward.top_k = top_k;
  a.forward.renormalise = true;
  a.chosen = left.data(), a.weights = upstream.data();
  std::vector<double> got(c.logits.size());
  BOOST_REQUIRE(k::route_backward(a, got.data()) == k::Status::kOk);

  at::Tensor z =
      at::from_blob(const_cast<double*>(c.logits.data()), {tokens, 16}, at::kDouble).clone().set_requires_grad(true);
  const at::Tensor u = at::from_blob(const_cast<double*>(upstream.data()), {tokens, top_k}, at::kDouble),
                   chosen = at::tensor(c.chosen, at::kInt).to(at::kLong).reshape({tokens, top_k}).clamp_min(0),
                   place = at::tensor(dropped.place, at::kInt).to(at::kLong).reshape({tokens, top_k});
  const at::Tensor p = at::softmax(z, 1), w = p.gather(1, chosen);
  (ref::kept_weights(w, place, true, 0x1p-52) * u).sum().backward();
  // What bounds::route_backward_relative() is relative to.
  const at::Tensor kept = (w * place.ge(0).to(at::kDouble)).detach(), by = kept.sum(1, true).clamp_min(0x1p-52);
  const at::Tensor each = (u.abs() / by + (u.abs() * kept).sum(1, true) / by / by) * place.ge(0).to(at::kDouble);
  const at::Tensor of_scores = at::zeros({tokens, 16}, at::kDouble).scatter_add(1, chosen, each), s = p.detach();
  const at::Tensor size = (s * (of_scores + (of_scores * s).sum(1, true))).contiguous(), want = z.grad().contiguous();
  const double range = (z.detach().amax(1) - z.detach().amin(1)).max().item<double>();
  const double relative =
      2 * bounds::route_backward_relative(bounds::softmax_relative(16, 0, range, k::Float::kF64), 16, top_k);
  for (std::size_t i = 0; i < got.size(); ++i)
    BOOST_CHECK_SMALL(got[i] - want.data_ptr<double>()[i], relative * size.data_ptr<double>()[i] + 1e-300);
}

BOOST_AUTO_TEST_CASE(what_is_not_finite) {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
  const Choices c{
      4, 2, 1, {0, 0, 0, 0}, {0.5, nan, inf, 0.5}, {nan, -inf, 1, nan}, {0.5, 0, 1, nan, -inf, inf, nan, 0.7}};
  BOOST_TEST(drop(c, DropOrder::kWeights, 3).place == (Ids{2, 0, 1, -1}), boost::test_tools::per_element());
  // torch 2.13: [0.5, nan, inf, nan].neg().argsort() is 2, 0, 1, 3.
  BOOST_TEST(drop(c, DropOrder::kBatchPrioritised, 3).place == (Ids{1, 2, 0, -1}), boost::test_tools::per_element());
  BOOST_TEST(drop<float>(c, DropOrder::kKeys, 3).place == (Ids{2, 0, 1, -1}), boost::test_tools::per_element());
  const Choices negative{3, 2, 1, {1, 1, 1}, {-inf, 0.0, -0.0}, {-0.0, 0.0, -inf}};
  BOOST_TEST(drop(negative, DropOrder::kWeights, 2).place == (Ids{-1, 0, 1}), boost::test_tools::per_element());
  BOOST_TEST(drop(negative, DropOrder::kKeys, 2).place == (Ids{1, -1, 0}), boost::test_tools::per_element());
}

/// DeepSpeed 0.18.9: capacities in its float32, and what its gates keep, where, with which weights.
BOOST_AUTO_TEST_CASE(gates_of_deepspeed) {
  const auto golden = nlohmann::json::parse(std::ifstream(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/dispatch.json"));
  std::size_t apart = 0;
  for (const auto& c : golden.at("capacities")) {
    BOOST_TEST(capacity(CapacityForm::kDeepSpeed, c[0], c[1], c[2], c[3], c[4]) == c[5].get<std::int64_t>());
    apart += capacity(CapacityForm::kMegatron, c[0], c[1], c[2], c[3]) < c[5].get<std::int64_t>() && c[4] == 0;
  }
  BOOST_TEST(apart >= 4u);  // more than float64 gives
  std::size_t seen = 0;
  for (const auto& g : golden.at("drops")) {
    const std::string gate = g.at("gate");
    const auto flat = [&](const char* name) {
      std::vector<double> v;
      for (const auto& row : g.at(name)) v.insert(v.end(), row.begin(), row.end());
      return v;
    };
    const std::vector<double> chosen = flat("chosen"), after = flat("after"), places = flat("place");
    const auto tokens = static_cast<std::int64_t>(g.at("chosen").size());
    Choices c{tokens,
              g.at("experts"),
              static_cast<std::int64_t>(chosen.size()) / tokens,
              {chosen.begin(), chosen.end()},
              flat("before"),
              {}};
    DropOrder order = DropOrder::kTokens;
    bool by_place =
        true;  // top1gating and "probs" give the places in the order of tokens to those whom something else chose
    if (gate == "top1gating") {
      order = DropOrder::kKeys, c.keys = flat("random"), by_place = false;
      for (double& v : c.keys) v = -v;
    } else if (gate == "top2gating") {
      order = DropOrder::kChoices;
    } else if (gate == "topkgating probs") {  // by the logits, here above the 0 of what is not chosen
      order = DropOrder::kKeys, c.keys = flat("logits"), by_place = false;
      for (double& v : c.keys) v = -v;
    }
    const Dropped d = drop<float>(c, order, g.at("capacity"), gate != "top1gating");
    for (std::size_t i = 0; i < places.size(); ++i) {
      BOOST_CHECK_MESSAGE(by_place ? d.place[i] == places[i] : (d.place[i] < 0) == (places[i] < 0),
                          gate << " at " << i);
      BOOST_CHECK_SMALL(d.weights[i] - after[i], 2 * bounds::gamma(static_cast<double>(c.top_k), 0x1p-24) * after[i]);
    }
    BOOST_CHECK(d.dropped > 0 || gate == "top2gating");
    ++seen;
  }
  BOOST_TEST(seen == 5u);
}

/// V-MoE's own test of batch prioritised routing, vmoe/moe_test.py at 942a78b: the places of (item, choice).
BOOST_AUTO_TEST_CASE(batch_prioritised_as_in_vmoe) {
  const Choices c{3, 3, 2, {0, 2, 0, 2, 2, 0}, {.4, .2, .5, .4, .6, .3}, {}, {.4, .0, .2, .5, .1, .4, .3, .2, .6}};
  BOOST_TEST(drop(c, DropOrder::kChoices, 3).place == (Ids{0, 1, 1, 2, 0, 2}), boost::test_tools::per_element());
  BOOST_TEST(drop(c, DropOrder::kBatchPrioritised, 3).place == (Ids{1, 2, 0, 1, 0, 2}),
             boost::test_tools::per_element());
  BOOST_TEST(drop(c, DropOrder::kBatchPrioritised, 2).place == (Ids{1, -1, 0, 1, 0, -1}),
             boost::test_tools::per_element());
}

/// Neither the weight of the first choice nor the largest weight of the chosen: the largest score, whoever was chosen.
BOOST_AUTO_TEST_CASE(batch_prioritised_goes_by_all_scores) {
  // A bias chose: the first token's best expert, 2, is not among its choices. All first choices are expert 0.
  const Choices biased{
      3, 4, 2, {0, 1, 0, 1, 0, 3}, {.3, .2, .4, .5, .6, .1}, {}, {.3, .2, .9, .1, .4, .5, .1, .1, .6, .1, .2, .1}};
  BOOST_TEST(drop(biased, DropOrder::kBatchPrioritised, 3).place == (Ids{0, 0, 2, 1, 1, 0}),
             boost::test_tools::per_element());
  // Renormalised weights, .57 and .53, say the reverse of the scores that were chosen by, .4 and .5.
  const Choices renormalised{
      2, 3, 2, {0, 1, 0, 1}, {.4 / .7, .3 / .7, .5 / .95, .45 / .95}, {}, {.4, .3, .3, .5, .45, .05}};
  BOOST_TEST(drop(renormalised, DropOrder::kBatchPrioritised, 1).place == (Ids{-1, -1, 0, 0}),
             boost::test_tools::per_element());
}

/// Tutel at ac0e51b: its capacity, and where it puts each choice.
BOOST_AUTO_TEST_CASE(routing_of_tutel) {
  const auto golden = nlohmann::json::parse(std::ifstream(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/tutel.json"));
  std::size_t seen = 0, by_rank = 0;
  for (const auto& g : golden.at("cases")) {
    Choices c{0, 8, g.at("top_k"), {}, {}, {}, {}};
    Ids places;
    std::vector<std::int64_t> counts(8);
    for (const auto& row : g.at("chosen"))
      for (const std::int32_t e : row) c.chosen.push_back(e), ++counts[static_cast<std::size_t>(e)];
    for (const auto& row : g.at("place")) places.insert(places.end(), row.begin(), row.end());
    for (const auto& row : g.at("scores"))
      for (const double score : row) c.scores.push_back(score * 0x1p-20);
    c.tokens = static_cast<std::int64_t>(c.chosen.size()) / c.top_k;
    c.weights.resize(c.chosen.size());
    const bool prioritised = g.at("prioritised");
    const DropOrder order = prioritised ? DropOrder::kBatchPrioritised : DropOrder::kChoices;
    BOOST_TEST(drop(c, order, c.tokens).place == places, boost::test_tools::per_element());
    by_rank += drop(c, DropOrder::kChoices, c.tokens).place != places;
    const std::int64_t largest = *std::max_element(counts.begin(), counts.end());
    k::CapacityArgs a{CapacityForm::kTutel, c.tokens, 8, c.top_k, g.at("factor")};
    a.alignment = g.at("alignment"), a.largest_count = &largest;
    std::int64_t capacity = -1;
    BOOST_REQUIRE(k::capacity(a, &capacity) == k::Status::kOk);
    const auto theirs = g.at("capacity").get<std::int64_t>();
    if (prioritised && a.factor == 0)
      BOOST_TEST(theirs < capacity);  // meant to drop nothing, and does
    else
      BOOST_TEST(theirs == capacity);
    ++seen;
  }
  BOOST_TEST(seen == 11u);
  BOOST_TEST(by_rank == 4u);  // it matters in every case that is prioritised
}

BOOST_AUTO_TEST_CASE(who_is_dropped) {
  // Three tokens on experts 0 and 1, capacity 2 for each.
  const Choices c{3, 2, 2, {0, 1, 1, 0, 0, 1}, {0.6, 0.4, 0.7, 0.3, 0.9, 0.1}, {3, 1, 2, 2, 1, 3}};
  BOOST_TEST(drop(c, DropOrder::kTokens, 2).place == (Ids{0, 0, 1, 1, -1, -1}), boost::test_tools::per_element());
  BOOST_TEST(drop(c, DropOrder::kChoices, 2).place == (Ids{0, 1, 0, -1, 1, -1}), boost::test_tools::per_element());
  BOOST_TEST(drop(c, DropOrder::kWeights, 2).place == (Ids{1, 1, 0, -1, 0, -1}), boost::test_tools::per_element());
  BOOST_TEST(drop(c, DropOrder::kKeys, 2).place == (Ids{-1, 0, 1, 1, 0, -1}), boost::test_tools::per_element());
  const Dropped d = drop(c, DropOrder::kTokens, 2, true);
  BOOST_TEST(d.dropped == 2);
  BOOST_TEST(d.lost == 1);
  BOOST_CHECK_CLOSE(d.weights[2], 0.7, 1e-12);
  BOOST_CHECK(d.weights[4] == 0.0 && d.weights[5] == 0.0);
  const Dropped w = drop(c, DropOrder::kChoices, 2, true);
  BOOST_CHECK_CLOSE(w.weights[2], 1.0, 1e-12);  // its second choice is gone: W7
}

BOOST_AUTO_TEST_CASE(drop_refuses) {
  Choices c = choices(4, 8, 2, false);
  Ids place(8);
  k::DropArgs<double> a;
  a.chosen = c.chosen.data(), a.tokens = 4, a.experts = 8, a.top_k = 2, a.capacity = 1;
  const auto status = [&] { return k::drop(a, {place.data(), nullptr, nullptr, nullptr, nullptr}); };
  BOOST_CHECK(status() == k::Status::kOk);
  a.order = DropOrder::kWeights;
  BOOST_CHECK(status() == k::Status::kNullPointer);
  a.order = DropOrder::kKeys;
  BOOST_CHECK(status() == k::Status::kNullPointer);
  a.order = DropOrder::kBatchPrioritised, a.weights = c.weights.data();
  BOOST_CHECK(status() == k::Status::kNullPointer);
  a.order = DropOrder::kTokens;
  c.chosen[3] = 8;
  BOOST_CHECK(status() == k::Status::kBadShape);
  a.capacity = -1;
  BOOST_CHECK(status() == k::Status::kBadShape);
  a.capacity = 1, a.top_k = 9;
  BOOST_CHECK(status() == k::Status::kBadTopK);
}

}  // namespace

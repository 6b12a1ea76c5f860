// Capacity and drops: kernels/host against reference/; the frameworks' forms by hand; the laws of dropping.
#define BOOST_TEST_MODULE dispatch
#include "kernels/host/dispatch.h"

#include <ATen/ATen.h>

#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/host/gaussian.h"
#include "reference/dispatch.h"
#include "reference/router.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
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
  k::CapacityArgs a;
  std::int64_t places = 0;
  a.tokens = 8, a.experts = 8, a.factor = 0;
  BOOST_CHECK(k::capacity(a, &places) == k::Status::kBadOption);
  a.factor = std::numeric_limits<double>::infinity();
  BOOST_CHECK(k::capacity(a, &places) == k::Status::kBadOption);
  a.factor = 1, a.experts = 0;
  BOOST_CHECK(k::capacity(a, &places) == k::Status::kBadShape);
}

// Sizes and factors whose quotients and products round both ways.
BOOST_AUTO_TEST_CASE(forms_agree_with_the_reference) {
  std::vector<std::int64_t> cases;
  std::vector<double> factors;
  for (std::int64_t i = 0; i < 600; ++i) {
    const std::int64_t world = 1 + i % 4;
    cases.insert(cases.end(), {i * i % 4099, world * (1 + i % 37), 1 + i % 8, i % 5, 1 + i % 3, world});
    factors.push_back(1 + 0.1 * static_cast<double>(i % 17));
  }
  const auto n = static_cast<std::int64_t>(factors.size());
  const at::Tensor sizes = at::tensor(cases, at::kLong).reshape({n, 6}), by = at::tensor(factors, at::kDouble);
  for (int form = 0; form < 6; ++form) {
    const at::Tensor want = ref::capacity(static_cast<ref::CapacityForm>(form), sizes, by).contiguous();
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t* c = cases.data() + 6 * i;
      std::int64_t places = -1;
      BOOST_REQUIRE(k::capacity({static_cast<CapacityForm>(form), c[0], c[1], c[2], factors[i], c[3], c[4], c[5]}, &places) == k::Status::kOk);
      BOOST_CHECK_MESSAGE(places == want.data_ptr<std::int64_t>()[i], "form " << form << ", case " << i << ": " << places);
    }
  }
}

struct Choices {
  std::int64_t tokens, experts, top_k;
  Ids chosen;
  std::vector<double> weights, keys;
};

/// Routing by Gaussian logits on a grid, so that weights tie; every 9th choice is none.
Choices choices(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, bool collapsed) {
  std::vector<float> g(static_cast<std::size_t>(tokens * experts)), h(static_cast<std::size_t>(tokens * top_k));
  k::unit_gaussians(3, 1, 0, tokens * experts, g.data());
  k::unit_gaussians(3, 2, 0, tokens * top_k, h.data());
  std::vector<double> z;
  for (std::size_t i = 0; i < g.size(); ++i) {
    z.push_back(std::nearbyint(4 * static_cast<double>(g[i])) / 4 +
                (collapsed && static_cast<std::int64_t>(i) % experts < top_k ? 50 : 0));
  }
  ref::RouteOptions o;
  o.top_k = top_k;
  const ref::Routed r = ref::route(at::from_blob(z.data(), {tokens, experts}, at::kDouble), o);
  Choices c{tokens, experts, top_k, {}, {}, {}};
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
Dropped drop(const Choices& c, DropOrder order, std::int64_t places, bool renormalise = false) {
  Dropped d;
  d.place.resize(c.chosen.size());
  d.weights.resize(c.chosen.size());
  d.kept.resize(static_cast<std::size_t>(c.experts));
  k::DropArgs<double> a;
  a.chosen = c.chosen.data(), a.weights = c.weights.data(), a.keys = c.keys.data();
  a.tokens = c.tokens, a.experts = c.experts, a.top_k = c.top_k, a.capacity = places, a.order = order,
  a.renormalise = renormalise;
  BOOST_REQUIRE(k::drop(a, {d.place.data(), d.weights.data(), d.kept.data(), &d.dropped, &d.lost}) == k::Status::kOk);
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
    for (const bool collapsed : {false, true}) {
      const Choices c = choices(s.tokens, s.experts, s.k, collapsed);
      const std::vector<std::int64_t> ids(c.chosen.begin(), c.chosen.end());
      const auto as = [&](const std::vector<double>& v) {
        return at::from_blob(const_cast<double*>(v.data()), {s.tokens, s.k}, at::kDouble);
      };
      for (std::size_t i = 0; i < 5; ++i) {
        const at::Tensor want =
            ref::drop(at::from_blob(const_cast<std::int64_t*>(ids.data()), {s.tokens, s.k}, at::kLong), as(c.weights),
                      as(c.keys), kReferences[i], s.capacity)
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
        for (std::size_t j = 0; j < got.place.size(); ++j)
          BOOST_CHECK(got.weights[j] == (got.place[j] < 0 ? 0.0 : c.weights[j]));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(who_is_dropped) {
  // Three tokens on experts 0 and 1, capacity 2 for each.
  const Choices c{3, 2, 2, {0, 1, 1, 0, 0, 1}, {0.6, 0.4, 0.7, 0.3, 0.9, 0.1}, {3, 1, 2, 2, 1, 3}};
  BOOST_TEST(drop(c, DropOrder::kTokens, 2).place == (Ids{0, 0, 1, 1, -1, -1}), boost::test_tools::per_element());
  BOOST_TEST(drop(c, DropOrder::kChoices, 2).place == (Ids{0, 1, 0, -1, 1, -1}), boost::test_tools::per_element());
  BOOST_TEST(drop(c, DropOrder::kWeights, 2).place == (Ids{1, 1, 0, -1, 0, -1}), boost::test_tools::per_element());
  BOOST_TEST(drop(c, DropOrder::kKeys, 2).place == (Ids{-1, 0, 1, 1, 0, -1}), boost::test_tools::per_element());
  BOOST_TEST(drop(c, DropOrder::kBatchPrioritised, 2).place == (Ids{1, -1, 0, -1, 0, 1}),
             boost::test_tools::per_element());
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
  a.order = DropOrder::kTokens;
  c.chosen[3] = 8;
  BOOST_CHECK(status() == k::Status::kBadShape);
  a.capacity = -1;
  BOOST_CHECK(status() == k::Status::kBadShape);
  a.capacity = 1, a.top_k = 9;
  BOOST_CHECK(status() == k::Status::kBadTopK);
}

}  // namespace

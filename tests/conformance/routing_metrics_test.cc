// Metrics of routing: kernels/host against reference/; closed forms, the laws they obey, and chance levels against
// choices drawn at random.
#define BOOST_TEST_MODULE routing_metrics
#include "kernels/host/routing_metrics.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "kernels/host/router.h"
#include "kernels/host/router_regularisers.h"
#include "reference/router.h"
#include "reference/routing_metrics.h"
#include "tests/support/tensors.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using moeaudit::test::tensor;
using Doubles = std::vector<double>;
using Ids = std::vector<std::int32_t>;
using Longs = std::vector<std::int64_t>;
using Mask = std::vector<std::uint8_t>;
using K = k::Status;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kU = 1.1102230246251565e-16;

template <class T>
at::Tensor longs(const std::vector<T>& v, std::vector<std::int64_t> shape) {
  const Longs wide(v.begin(), v.end());
  return at::from_blob(const_cast<std::int64_t*>(wide.data()), shape, at::kLong).clone();
}
Doubles gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  k::unit_gaussians(16, stream, 0, n, g.data());
  return {g.begin(), g.end()};
}
/// The k largest of each row, best first.
Ids top(const Doubles& v, std::int64_t experts, std::int64_t top_k) {
  ref::RouteOptions o;
  o.top_k = top_k, o.score_after_top_k = true;
  const at::Tensor chosen =
      ref::route(tensor(v, {static_cast<std::int64_t>(v.size()) / experts, experts}), o).chosen.contiguous();
  return {chosen.data_ptr<std::int64_t>(), chosen.data_ptr<std::int64_t>() + chosen.numel()};
}
void near(const std::string& what, double got, double want, double bound) {
  BOOST_CHECK_MESSAGE(std::fabs(got - want) <= bound, what << ": " << got << ", not " << want);
}

struct Shape {
  std::int64_t tokens, experts, top_k;
};
const std::vector<Shape> kShapes = {{1, 1, 1},     {1, 8, 8},     {9, 8, 2},    {300, 60, 4},
                                    {200, 144, 6}, {100, 160, 6}, {50, 384, 32}};

// ---- margins

k::MarginArgs<double> args_of(const Doubles& choice, const Ids& chosen, const Mask& valid, const Shape& s) {
  k::MarginArgs<double> a;
  a.choice = choice.data(), a.chosen = chosen.data(), a.valid = valid.empty() ? nullptr : valid.data();
  a.tokens = s.tokens, a.experts = s.experts, a.top_k = s.top_k;
  return a;
}

BOOST_AUTO_TEST_CASE(margins_agree_with_the_reference) {
  for (const Shape& s : kShapes) {
    const Doubles v = gaussians(s.tokens * s.experts, 1);
    Ids chosen = top(v, s.experts, s.top_k);
    for (std::size_t i = 3; i < chosen.size(); i += 11) chosen[i] = s.top_k > 1 ? -1 : chosen[i];
    Doubles margin(static_cast<std::size_t>(s.tokens));
    k::MarginCounts c;
    BOOST_REQUIRE(k::routing_margins(args_of(v, chosen, {}, s), {margin.data(), &c}) == K::kOk);
    const at::Tensor want = ref::routing_margins(tensor(v, {s.tokens, s.experts}), longs(chosen, {s.tokens, s.top_k}));
    std::int64_t inverted = 0;
    for (std::int64_t t = 0; t < s.tokens; ++t) {
      BOOST_REQUIRE(margin[static_cast<std::size_t>(t)] == want[t].item<double>());  // one subtraction
      inverted += want[t].item<double>() < 0;
    }
    BOOST_CHECK(c.tokens == s.tokens && c.inverted == inverted && c.ties == 0 && c.nan == 0);
  }
}

BOOST_AUTO_TEST_CASE(near_ties_are_those_that_a_dtype_may_swap) {
  // A place at the larger value 1: bfloat16 2^-7, float16 2^-10, float32 2^-23. A margin of one place counts: 1 + 3 / 2
  // and 1 + 1 / 2 places both round to the even 1 + 2 / 2.
  const double gaps[] = {0.0, 0x1p-25, 0x1p-12, 0x1p-9, 0x1p-7, 0x1p-6};
  const Shape s{6, 2, 1};
  Doubles v;
  for (double g : gaps) v.push_back(1.0), v.push_back(1.0 - g);
  const Ids chosen(6, 0);
  k::MarginArgs<double> a = args_of(v, chosen, {}, s);
  const std::pair<k::Float, std::int64_t> expected[] = {
      {k::Float::kF64, 1}, {k::Float::kF32, 2}, {k::Float::kF16, 3}, {k::Float::kBF16, 5}};
  for (const auto& [dtype, ties] : expected) {
    a.dtype = dtype;
    k::MarginCounts c;
    BOOST_REQUIRE(k::routing_margins(a, {nullptr, &c}) == K::kOk);
    BOOST_CHECK_MESSAGE(c.near_ties == ties, k::name_of(dtype) << ": " << c.near_ties);
    BOOST_CHECK(c.ties == 1 && c.tokens == 6);
  }
  // Law: rounding to the dtype changes the chosen set of no token that is not a near tie.
  for (const k::Float dtype : {k::Float::kBF16, k::Float::kF16}) {
    const Shape big{2000, 64, 8};
    Doubles scores = gaussians(big.tokens * big.experts, 2), rounded(scores.size());
    for (double& x : scores) x = 1 / (1 + std::exp(-x));
    k::round_values(scores.data(), static_cast<std::int64_t>(scores.size()), dtype, rounded.data());
    const Ids exact = top(scores, 64, 8), after = top(rounded, 64, 8);
    k::MarginArgs<double> b = args_of(scores, exact, {}, big);
    b.dtype = dtype;
    std::int64_t swapped = 0, near_ties = 0;
    for (std::int64_t t = 0; t < big.tokens; ++t) {
      Ids x(exact.begin() + 8 * t, exact.begin() + 8 * t + 8), y(after.begin() + 8 * t, after.begin() + 8 * t + 8);
      std::sort(x.begin(), x.end()), std::sort(y.begin(), y.end());
      const bool near_tie = k::token_margin(b, t).near;
      near_ties += near_tie;
      swapped += x != y;
      BOOST_REQUIRE(x == y || near_tie);
    }
    BOOST_CHECK(swapped > 0 && near_ties < big.tokens / 2);
  }
}

BOOST_AUTO_TEST_CASE(margins_at_the_edges) {
  const auto one = [](const Doubles& v, const Ids& chosen, std::int64_t top_k) {
    k::MarginCounts c;
    double margin = -7;
    BOOST_REQUIRE(k::routing_margins(args_of(v, chosen, {}, {1, static_cast<std::int64_t>(v.size()), top_k}),
                                     {&margin, &c}) == K::kOk);
    return std::pair(margin, c);
  };
  BOOST_CHECK(one({1, 2}, {0, 1}, 2).first == kInf);  // all are chosen
  BOOST_CHECK(one({1, -kInf, -kInf}, {0}, 1).first == kInf);
  BOOST_CHECK(one({1, -kInf, -kInf}, {0, 1}, 2).second.near_ties == 1);  // a masked expert against a masked one
  BOOST_CHECK(one({kInf, kInf}, {0}, 1).second.ties == 1);
  BOOST_CHECK(one({1, 2}, {0}, 1).second.inverted == 1);
  BOOST_CHECK(one({1, std::nan("")}, {0}, 1).second.nan == 1);
  BOOST_CHECK(one({1, 2}, {-1}, 1).second.nan == 1);
  BOOST_CHECK(one({5e-324, 0}, {0}, 1).second.near_ties == 1);
  k::MarginCounts c;
  const Doubles v = {1, 2};
  const Ids beyond = {2};
  BOOST_CHECK(k::routing_margins(args_of(v, beyond, {}, {1, 2, 1}), {nullptr, &c}) == K::kBadShape);
  BOOST_CHECK(k::routing_margins(args_of(v, beyond, Mask{0}, {1, 2, 3}), {nullptr, &c}) == K::kBadTopK);
  const Ids fine = {0};
  const Mask none = {0};
  BOOST_CHECK(k::routing_margins(args_of(v, fine, none, {1, 2, 1}), {nullptr, &c}) == K::kOk && c.tokens == 0);
  // Order statistics by rank floor(share (n - 1)), NaN and padding left out.
  const Doubles values = {5, std::nan(""), 1, 4, 2, 99, 3}, shares = {0, 0.45, 0.5, 1};
  const Mask valid = {1, 1, 1, 1, 1, 0, 1};
  Doubles out(4);
  BOOST_REQUIRE(k::order_statistics(values.data(), valid.data(), 7, shares.data(), 4, out.data()) == K::kOk);
  BOOST_CHECK(out == (Doubles{1, 2, 3, 5}));
  const Doubles many = gaussians(1000, 21), each = {0, 0.01, 0.1, 0.3, 0.5, 0.999, 1};
  out.resize(7);
  BOOST_REQUIRE(k::order_statistics(many.data(), nullptr, 1000, each.data(), 7, out.data()) == K::kOk);
  BOOST_CHECK(at::equal(tensor(out, {7}), ref::order_statistics(tensor(many, {1000}), tensor(each, {7}))));
  const double half = 0.5, beyond_one = 1.5;
  BOOST_REQUIRE(k::order_statistics(nullptr, nullptr, 0, &half, 1, out.data()) == K::kOk && std::isnan(out[0]));
  BOOST_CHECK(k::order_statistics(values.data(), nullptr, 7, &beyond_one, 1, out.data()) == K::kBadOption);
}

BOOST_AUTO_TEST_CASE(intervals_of_ratios) {
  // Blocks that are alike leave nothing to be uncertain of, whatever their size.
  Doubles above, below;
  for (int b = 0; b < 30; ++b) below.push_back(10 + b), above.push_back(0.25 * below.back());
  k::Interval i, again;
  BOOST_REQUIRE(k::ratio_interval(above.data(), below.data(), 30, 200, 1, &i) == K::kOk);
  BOOST_CHECK_CLOSE(i.low, 0.25, 1e-10);
  BOOST_CHECK_CLOSE(i.high, 0.25, 1e-10);
  // Shares that a coin decides: the interval has 3.92 deviations, here of a mean of 400 blocks of 0 or 1, 3.92 / 40.
  const Doubles coin = gaussians(400, 77);
  Doubles heads;
  for (double v : coin) heads.push_back(v > 0 ? 1 : 0);
  const Doubles ones(400, 1);
  BOOST_REQUIRE(k::ratio_interval(heads.data(), ones.data(), 400, 4000, 2, &i) == K::kOk);
  const double p = std::accumulate(heads.begin(), heads.end(), 0.0) / 400;
  BOOST_CHECK(i.low < p && p < i.high);
  near("width", i.high - i.low, 3.92 * std::sqrt(p * (1 - p) / 400), 0.01);
  BOOST_REQUIRE(k::ratio_interval(heads.data(), ones.data(), 400, 4000, 2, &again) == K::kOk);
  BOOST_CHECK(again.low == i.low && again.high == i.high);
  BOOST_CHECK(k::ratio_interval(heads.data(), ones.data(), 1, 4000, 2, &i) == K::kBadShape);
}

// ---- agreement

struct Agreed {
  k::Agreement a;
  k::AgreementCounts counts;
  Longs table;
};
Agreed agreement_of(const Ids& now, const Ids& then, std::int64_t now_k, std::int64_t then_k, std::int64_t experts,
                    const Mask& valid = {}) {
  k::AgreementArgs a;
  a.now = now.data(), a.reference = then.data(), a.valid = valid.empty() ? nullptr : valid.data();
  a.tokens = static_cast<std::int64_t>(now.size()) / now_k, a.now_k = now_k, a.reference_k = then_k;
  Agreed r;
  r.table.resize(static_cast<std::size_t>(k::agreement_rows(a) * k::agreement_columns(a)));
  BOOST_REQUIRE(k::count_agreement(a, r.table.data(), &r.counts) == K::kOk);
  BOOST_REQUIRE(k::agreement(a, r.table.data(), r.counts, experts, &r.a) == K::kOk);
  return r;
}

BOOST_AUTO_TEST_CASE(agreement_agrees_with_the_reference) {
  for (const Shape& s : kShapes) {
    const std::int64_t then_k = std::max<std::int64_t>(1, s.top_k / 2);
    const Doubles v = gaussians(s.tokens * s.experts, 3);
    Doubles w = gaussians(s.tokens * s.experts, 4);
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = v[i] + 0.3 * w[i];
    Ids now = top(v, s.experts, s.top_k);
    const Ids then = top(w, s.experts, then_k);
    for (std::size_t i = 1; i < now.size(); i += 5) now[i] = -1;
    const k::Agreement got = agreement_of(now, then, s.top_k, then_k, s.experts).a;
    const auto want =
        ref::agreement(longs(now, {s.tokens, s.top_k}), longs(then, {s.tokens, then_k}), s.experts, s.experts <= 8);
    // Integers, one quotient; the mean of T quotients of at most 1.
    const double bound = bounds::gamma(2 * static_cast<double>(s.tokens) + 4, kU);
    near("saturation", got.saturation, want.at("saturation"), 2 * kU);
    near("changed", got.changed, want.at("changed"), 4 * kU);
    near("jaccard", got.jaccard, want.at("jaccard"), bound);
    near("identical", got.identical, want.at("identical"), bound);
    near("same first", got.same_first, want.at("same_first"), bound);
    if (s.experts > 8) continue;
    near("jaccard by chance", got.jaccard_chance, want.at("jaccard_chance"), 1e-13);  // 65536 pairs added up there
    near("saturation by chance", got.saturation_chance, want.at("saturation_chance"), 1e-12);
  }
}

BOOST_AUTO_TEST_CASE(agreement_closed_forms) {
  const Ids a = {0, 1, 2, 3}, b = {1, 0, 2, 4};
  const k::Agreement same = agreement_of(a, a, 2, 2, 8).a;
  BOOST_CHECK(same.saturation == 1 && same.changed == 0 && same.jaccard == 1 && same.identical == 1 &&
              same.same_first == 1);
  const k::Agreement some = agreement_of(a, b, 2, 2, 8).a;  // the first token in another order, the second in part
  BOOST_CHECK(some.saturation == 0.75 && some.identical == 0.5 && some.same_first == 0.5);
  BOOST_CHECK_CLOSE(some.jaccard, (1 + 1.0 / 3) / 2, 1e-12);
  const k::Agreement apart = agreement_of({0, 1}, {2, 3}, 2, 2, 8).a;
  BOOST_CHECK(apart.saturation == 0 && apart.jaccard == 0 && apart.changed == 1);
  const Agreed masked = agreement_of(a, b, 2, 2, 8, Mask{0, 1});
  BOOST_CHECK(masked.a.saturation == 0.5 && masked.counts.tokens == 1);
  BOOST_CHECK(std::isnan(agreement_of(a, b, 2, 2, 8, Mask{0, 0}).a.jaccard));
  // A token that lost every choice on both sides has no union, and is in no mean of Jaccard's; its sets are equal.
  const k::Agreement lost = agreement_of({-1, -1, 0, 1}, {-1, -1, 0, 2}, 2, 2, 8).a;
  BOOST_CHECK_CLOSE(lost.jaccard, 1.0 / 3, 1e-12);
  BOOST_CHECK(lost.identical == 0.5 && lost.same_first == 0.5 && lost.saturation == 0.5);
  // k = E: every set is the whole, by chance, too.
  BOOST_CHECK(agreement_of(a, b, 4, 4, 4).a.jaccard_chance == 1.0);
  // Two routers that know nothing of each other agree as chance says.
  const Shape s{4000, 24, 6};
  const k::Agreement random = agreement_of(top(gaussians(s.tokens * s.experts, 5), 24, 6),
                                           top(gaussians(s.tokens * s.experts, 6), 24, 6), 6, 6, 24)
                                  .a;
  // The deviation of |A and B| / k is 0.15 (hypergeometric), of a mean over 4000 tokens 0.0024; five of them.
  near("saturation", random.saturation, random.saturation_chance, 0.012);
  near("jaccard", random.jaccard, random.jaccard_chance, 0.012);
  near("same first", random.same_first, random.same_first_chance, 5 * std::sqrt(1.0 / 24 / 4000));
  k::AgreementArgs bad;
  const Ids twice = {3, 3};
  bad.now = bad.reference = twice.data(), bad.tokens = 1, bad.now_k = bad.reference_k = 2;
  Longs table(15);
  k::AgreementCounts c;
  BOOST_CHECK(k::count_agreement(bad, table.data(), &c) == K::kBadShape);
}

BOOST_AUTO_TEST_CASE(bias_affinity) {
  // The correction bias as route() has it: with none, the sets are equal; a bias that outweighs every score decides
  // alone.
  const Shape s{200, 16, 4};
  const Doubles z = gaussians(s.tokens * s.experts, 7);
  const auto choose = [&](const Doubles& bias) {
    k::RouteArgs<double> a;
    a.logits = z.data(), a.correction_bias = bias.data(), a.tokens = s.tokens, a.experts = s.experts, a.top_k = s.top_k;
    a.score = k::Score::kSigmoid;
    Ids chosen(static_cast<std::size_t>(s.tokens * s.top_k));
    k::RouteResult<double> r;
    r.chosen = chosen.data();
    BOOST_REQUIRE(k::route(a, r) == K::kOk);
    return chosen;
  };
  Doubles bias(16, 0.0);
  const Ids without = choose(bias);
  BOOST_CHECK(agreement_of(choose(bias), without, 4, 4, 16).a.jaccard == 1.0);
  double last = 1;
  for (const double size : {0.05, 0.3, 2.0}) {
    for (std::size_t e = 0; e < 16; ++e) bias[e] = e % 4 == 0 ? size : 0;
    const k::Agreement a = agreement_of(choose(bias), without, 4, 4, 16).a;
    BOOST_CHECK(a.jaccard < last);
    last = a.jaccard;
    if (size > 1) near("as good as chance", a.saturation, a.saturation_chance, 0.06);
  }
}

BOOST_AUTO_TEST_CASE(settled_choices) {
  // Never another; back and forth until the end; another at the start alone; padding.
  const Ids first = {3, 1, 0, 7,  //
                     3, 2, 5, 8,  //
                     3, 1, 5, 7,  //
                     3, 2, 5, 8};
  const Mask valid = {1, 1, 1, 0};
  Longs settled(4, -1);
  BOOST_REQUIRE(k::count_settled({first.data(), valid.data(), 4, 4}, settled.data()) == K::kOk);
  BOOST_CHECK(settled == (Longs{1, 1, 0, 1}));
  for (const std::int64_t checkpoints : {1, 2, 9}) {
    const std::int64_t tokens = 400;
    Ids ids;  // choices that get steadier: one of 1 + checkpoints - s experts
    const Doubles g = gaussians(checkpoints * tokens, 30);
    for (std::int64_t i = 0; i < checkpoints * tokens; ++i) {
      const double v = std::fabs(g[static_cast<std::size_t>(i)]) * 100;
      ids.push_back(static_cast<std::int32_t>(v) % static_cast<std::int32_t>(1 + checkpoints - i / tokens) - 1);
    }
    Longs got(static_cast<std::size_t>(checkpoints), -1);
    BOOST_REQUIRE(k::count_settled({ids.data(), nullptr, checkpoints, tokens}, got.data()) == K::kOk);
    BOOST_CHECK(at::equal(longs(got, {checkpoints}), ref::count_settled(longs(ids, {checkpoints, tokens}))));
    BOOST_CHECK(std::accumulate(got.begin(), got.end(), std::int64_t{0}) == tokens);
  }
  BOOST_CHECK(k::count_settled({first.data(), nullptr, 0, 4}, settled.data()) == K::kBadShape);
  BOOST_CHECK(k::count_settled({nullptr, nullptr, 4, 4}, settled.data()) == K::kNullPointer);
}

// ---- dependence

BOOST_AUTO_TEST_CASE(counts_and_information_agree_with_the_reference) {
  for (const Shape& s : kShapes) {
    const std::int64_t labels = 7;
    Ids chosen = top(gaussians(s.tokens * s.experts, 8), s.experts, s.top_k), label;
    for (std::int64_t t = 0; t < s.tokens; ++t) label.push_back(static_cast<std::int32_t>(t * t % 9 - 1));
    for (std::size_t i = 0; i < chosen.size(); i += 13) chosen[i] = -1;
    Longs table(static_cast<std::size_t>(labels * s.experts), -1);
    std::int64_t outside = -1;
    Mask valid;
    for (std::int64_t t = 0; t < s.tokens; ++t) valid.push_back(t % 6 != 3);
    const k::CountArgs<std::int32_t> a{chosen.data(), valid.data(), s.tokens, s.top_k, s.experts};
    BOOST_REQUIRE(k::count_by_label(a, label.data(), labels, table.data(), &outside) == K::kOk);
    const at::Tensor in = at::tensor(valid, at::kByte).nonzero().squeeze(1);
    const at::Tensor want = ref::count_by_label(longs(chosen, {s.tokens, s.top_k}).index_select(0, in),
                                                longs(label, {s.tokens}).index_select(0, in), labels, s.experts);
    BOOST_CHECK(at::equal(longs(table, {labels, s.experts}), want));
    const std::int64_t all = std::accumulate(table.begin(), table.end(), std::int64_t{0});
    BOOST_CHECK(outside == in.numel() * s.top_k - all);
    k::Dependence d;
    BOOST_REQUIRE(k::dependence(table.data(), labels, s.experts, s.top_k, &d) == K::kOk);
    BOOST_CHECK(d.choices == all);
    Doubles lift(table.size());
    BOOST_REQUIRE(k::lift(table.data(), labels, s.experts, k::LiftOver::kOverall, lift.data()) == K::kOk);
    if (all == 0) {
      BOOST_CHECK(std::isnan(d.mutual_information) && std::isnan(d.chance) && std::isnan(lift[0]));
      continue;
    }
    // Terms n / N ln(...), of at most ln(L E) + ln N each, weights that add up to 1; there, entropies of as much.
    const double terms = static_cast<double>(labels * s.experts);
    near("information", d.mutual_information, ref::mutual_information(want),
         3 * bounds::gamma(terms + 12, kU) * (std::log(terms) + std::log(static_cast<double>(all)) + 1));
    const at::Tensor want_lift = ref::lift(want).contiguous();
    for (std::size_t i = 0; i < lift.size(); ++i) {
      const double w = want_lift.data_ptr<double>()[i];
      BOOST_REQUIRE(std::isnan(w) ? std::isnan(lift[i]) : std::fabs(lift[i] - w) <= 8 * kU * w);
    }
  }
}

BOOST_AUTO_TEST_CASE(information_closed_forms_and_chance) {
  k::Dependence d;
  const Longs decides = {5, 0, 0, 0, 5, 0, 0, 0, 5};  // the label is the expert
  BOOST_REQUIRE(k::dependence(decides.data(), 3, 3, 1, &d) == K::kOk);
  BOOST_CHECK_CLOSE(d.mutual_information, std::log(3.0), 1e-12);
  BOOST_CHECK_CLOSE(d.explained, 1.0, 1e-12);
  const Longs independent = {2, 4, 6, 1, 2, 3};  // rows in proportion
  BOOST_REQUIRE(k::dependence(independent.data(), 2, 3, 1, &d) == K::kOk);
  BOOST_CHECK_SMALL(d.mutual_information, 1e-15);
  Doubles lift(6);
  BOOST_REQUIRE(k::lift(independent.data(), 2, 3, k::LiftOver::kOverall, lift.data()) == K::kOk);
  for (double v : lift) BOOST_CHECK_CLOSE(v, 1.0, 1e-12);
  BOOST_REQUIRE(k::lift(independent.data(), 2, 3, k::LiftOver::kEven, lift.data()) == K::kOk);
  for (std::size_t i = 0; i < 6; ++i)
    BOOST_CHECK_CLOSE(lift[i], (i % 3 + 1) / 2.0, 1e-12);  // shares of 1, 2, 3 of 6, times 3
  const Longs negative = {1, -1};
  BOOST_CHECK(k::dependence(negative.data(), 1, 2, 1, &d) == K::kBadShape);
  // A table and its transpose; labels under other numbers: the same information.
  const Longs table = {9, 1, 4, 2, 7, 3}, turned = {9, 2, 1, 7, 4, 3}, moved = {2, 7, 3, 9, 1, 4};
  k::Dependence a, b, c;
  k::dependence(table.data(), 2, 3, 1, &a), k::dependence(turned.data(), 3, 2, 1, &b),
      k::dependence(moved.data(), 2, 3, 1, &c);
  BOOST_CHECK_CLOSE(a.mutual_information, b.mutual_information, 1e-10);
  BOOST_CHECK_CLOSE(a.mutual_information, c.mutual_information, 1e-10);
  // Labels that say nothing: what is left is the chance level. For k = 1, 2 N I is chi-squared with 19 * 15 = 285
  // degrees of freedom, its deviation sqrt(2 / 285) = 8.4 % of it; the mean of 16 windows is within 3 of a quarter of
  // that, and the next term of the bias, of the order 1 / N. Larger k is steadier.
  Ids label;
  for (std::int64_t t = 0; t < 4000; ++t) label.push_back(static_cast<std::int32_t>(t % 20));
  for (const std::int64_t top_k : {1, 4, 12, 16}) {
    double seen = 0;
    for (std::uint64_t w = 0; w < 16; ++w) {
      const Ids chosen = top(gaussians(4000 * 16, 100 + w), 16, top_k);
      Longs counts(20 * 16);
      std::int64_t outside = 0;
      BOOST_REQUIRE(k::count_by_label({chosen.data(), nullptr, 4000, top_k, 16}, label.data(), 20, counts.data(),
                                      &outside) == K::kOk);
      BOOST_REQUIRE(k::dependence(counts.data(), 20, 16, top_k, &d) == K::kOk);
      seen += d.mutual_information / 16;
    }
    BOOST_CHECK_CLOSE(d.chance + 1,
                      19.0 * static_cast<double>(16 - top_k) / (2 * 4000.0 * static_cast<double>(top_k)) + 1, 1e-10);
    if (top_k < 16)
      near("information by chance, k " + std::to_string(top_k), seen / d.chance, 1, 3 * 0.084 / 4 + 0.02);
    else
      BOOST_CHECK_SMALL(seen, 1e-12);  // all experts, always
  }
}

BOOST_AUTO_TEST_CASE(co_activation_rates_and_chance) {
  // Four tokens, experts 0 and 1 always together, 2 with 3 once.
  const Ids chosen = {0, 1, 1, 0, 2, 3, 0, 1};
  Longs together(16);
  BOOST_REQUIRE(k::co_activation({chosen.data(), nullptr, 4, 2, 4}, together.data()) == K::kOk);
  Doubles rate(16), lift(16);
  k::CoActivation chance;
  BOOST_REQUIRE(k::co_activation_rates(together.data(), 4, 2, 4, rate.data(), lift.data(), &chance) == K::kOk);
  BOOST_CHECK(rate[1] == 1 && rate[4] == 1 && rate[2] == 0 && rate[11] == 1 && std::isnan(rate[0]));
  BOOST_CHECK_CLOSE(lift[1], 4.0 / 3, 1e-12);  // 3 * 4 / (3 * 3)
  BOOST_CHECK_CLOSE(lift[11], 4.0, 1e-12);
  BOOST_CHECK_CLOSE(chance.rate_chance, 1.0 / 3, 1e-12);
  BOOST_CHECK_CLOSE(chance.lift_chance, 2.0 / 3, 1e-12);
  // An even router without memory of pairs: the mean over pairs is the chance.
  const Shape s{3000, 16, 4};
  const Ids random = top(gaussians(s.tokens * s.experts, 9), 16, 4);
  Longs pairs(256);
  BOOST_REQUIRE(k::co_activation({random.data(), nullptr, s.tokens, 4, 16}, pairs.data()) == K::kOk);
  Doubles r(256), l(256);
  BOOST_REQUIRE(k::co_activation_rates(pairs.data(), 16, 4, s.tokens, r.data(), l.data(), &chance) == K::kOk);
  double mean_lift = 0;
  for (std::size_t i = 0; i < 16; ++i) {
    double row = 0;
    for (std::size_t j = 0; j < 16; ++j) {
      if (i != j) row += r[i * 16 + j], mean_lift += l[i * 16 + j] / 240;
    }
    BOOST_CHECK_CLOSE(row, 3.0, 1e-10);  // k - 1 others, always
  }
  // N_ij / N_i, and over N_j / T.
  const at::Tensor n = longs(pairs, {16, 16}).to(at::kDouble), own = n.diagonal();
  const at::Tensor want_rate = (n / own.unsqueeze(1)).contiguous(),
                   want_lift = (n * 3000 / (own.unsqueeze(1) * own)).contiguous();
  for (std::size_t i = 0; i < 256; ++i) {
    if (i % 17 == 0) continue;
    BOOST_CHECK_SMALL(r[i] - want_rate.data_ptr<double>()[i], 2 * kU * r[i]);
    BOOST_CHECK_SMALL(l[i] - want_lift.data_ptr<double>()[i], 8 * kU * l[i]);
  }
  near("lift", mean_lift, chance.lift_chance, 0.01);
  BOOST_CHECK_CLOSE(15 * chance.rate_chance, 3.0, 1e-12);
}

// ---- scopes, coverage, ranks

BOOST_AUTO_TEST_CASE(scopes_of_load) {
  // Two micro-batches that lean opposite ways even out in the step; two steps that do, in the pool.
  const Longs counts = {30, 10, 10, 30, 30, 10, 30, 10};  // [2, 2, 2]
  k::LoadScopes s;
  BOOST_REQUIRE(k::load_scopes(counts.data(), 2, 2, 2, &s) == K::kOk);
  BOOST_CHECK_CLOSE(s.micro_max_violation, 0.5, 1e-12);
  BOOST_CHECK_CLOSE(s.step_max_violation, 0.25, 1e-12);
  BOOST_CHECK_CLOSE(s.pooled_max_violation, 0.25, 1e-12);
  BOOST_CHECK_CLOSE(s.micro_cv, 0.5, 1e-12);
  // Windows of equal size: micro >= step >= pooled.
  const std::int64_t steps = 6, micro = 4, experts = 12, tokens = 50;
  Longs many;
  for (std::uint64_t w = 0; w < 24; ++w) {
    const Ids chosen = top(gaussians(tokens * experts, 200 + w), experts, 2);
    Longs c(static_cast<std::size_t>(experts));
    std::int64_t outside = 0;
    BOOST_REQUIRE(k::count_choices(k::CountArgs<std::int32_t>{chosen.data(), nullptr, tokens, 2, experts}, c.data(),
                                   &outside) == K::kOk);
    many.insert(many.end(), c.begin(), c.end());
  }
  BOOST_REQUIRE(k::load_scopes(many.data(), steps, micro, experts, &s) == K::kOk);
  BOOST_CHECK(s.micro_max_violation > s.step_max_violation && s.step_max_violation > s.pooled_max_violation);
  BOOST_CHECK(s.micro_cv > s.step_cv && s.step_cv > s.pooled_cv);
  const auto want = ref::load_scopes(longs(many, {steps, micro, experts}));
  for (const auto& [name, got] : {std::pair<const char*, double>{"micro_max_violation", s.micro_max_violation},
                                  {"step_max_violation", s.step_max_violation},
                                  {"pooled_max_violation", s.pooled_max_violation},
                                  {"micro_cv", s.micro_cv},
                                  {"step_cv", s.step_cv},
                                  {"pooled_cv", s.pooled_cv}})
    near(name, got, want.at(name), bounds::gamma(64, kU));
  // One micro-batch a step, one step: all the same number; it is load_statistics()'s.
  k::LoadStatistics one;
  BOOST_REQUIRE(k::load_statistics(many.data(), experts, 2, tokens, &one) == K::kOk);
  BOOST_REQUIRE(k::load_scopes(many.data(), 1, 1, experts, &s) == K::kOk);
  BOOST_CHECK(s.micro_max_violation == one.max_violation && s.step_max_violation == one.max_violation &&
              s.pooled_max_violation == one.max_violation && s.pooled_cv == one.cv_population);
  const Longs empty(4);
  BOOST_REQUIRE(k::load_scopes(empty.data(), 1, 2, 2, &s) == K::kOk);
  BOOST_CHECK(s.empty == 2 && std::isnan(s.micro_max_violation) && std::isnan(s.pooled_cv));
  double share = 0;
  for (const std::int64_t busiest : {1, 5, 64}) {
    const Longs of_64 = [] {
      Longs c;
      for (double v : gaussians(64, 31)) c.push_back(static_cast<std::int64_t>(std::exp(5 + v)));
      return c;
    }();
    BOOST_REQUIRE(k::coverage(of_64.data(), 64, busiest, &share) == K::kOk);
    near("coverage", share, ref::coverage(longs(of_64, {64}), busiest), 4 * kU);
  }
  const Longs n = {1, 5, 2, 2};
  BOOST_REQUIRE(k::coverage(n.data(), 4, 1, &share) == K::kOk && share == 0.5);
  BOOST_REQUIRE(k::coverage(n.data(), 4, 4, &share) == K::kOk && share == 1.0);
  BOOST_CHECK(k::coverage(n.data(), 4, 5, &share) == K::kBadTopK);
}

/// A slot for each expert.
k::PlacementArgs placed(const Longs& counts, const Ids& experts, const Ids& ranks, std::int64_t num_ranks) {
  k::PlacementArgs a;
  a.counts = counts.data(), a.experts = static_cast<std::int64_t>(counts.size());
  a.slot_expert = experts.data(), a.slot_rank = ranks.data(), a.slots = static_cast<std::int64_t>(experts.size());
  a.ranks = num_ranks, a.top_k = 1;
  return a;
}

BOOST_AUTO_TEST_CASE(load_of_ranks) {
  const Longs counts = {40, 10, 10, 20};
  const Ids each = {0, 1, 2, 3}, in_order = {0, 0, 1, 1}, spread = {0, 1, 1, 0};
  k::Placement p;
  Doubles loads(2);
  BOOST_REQUIRE(k::placement_load(placed(counts, each, in_order, 2), loads.data(), &p) == K::kOk);
  BOOST_CHECK(loads == (Doubles{50, 30}));
  BOOST_CHECK(p.ideal == 40 && p.slowest == 50 && p.max_over_mean == 1.25 && p.slowest_rank == 0 && p.idle_ranks == 0);
  BOOST_CHECK(p.even_router == 1.0);  // tokens without end
  BOOST_REQUIRE(k::placement_load(placed(counts, each, spread, 2), nullptr, &p) == K::kOk);
  BOOST_CHECK(p.max_over_mean == 1.5);
  const Ids one_rank(4, 1), outside(4, 2);
  BOOST_REQUIRE(k::placement_load(placed(counts, each, one_rank, 2), nullptr, &p) == K::kOk);
  BOOST_CHECK(p.max_over_mean == 2.0 && p.idle_ranks == 1 && p.even_router == 2.0);
  // Expert 0 twice, on both ranks: 20 of its 40 choices on each.
  const Ids copied = {0, 1, 0, 2, 3}, copied_rank = {0, 0, 1, 1, 1};
  BOOST_REQUIRE(k::placement_load(placed(counts, copied, copied_rank, 2), loads.data(), &p) == K::kOk);
  BOOST_CHECK(loads == (Doubles{30, 50}) && p.slowest_rank == 1);
  // Rank 0 at half the speed: 50 choices take it 100, and 80 / 1.5 would do.
  const Doubles speeds = {0.5, 1};
  k::PlacementArgs a = placed(counts, each, in_order, 2);
  a.speed = speeds.data();
  BOOST_REQUIRE(k::placement_load(a, nullptr, &p) == K::kOk);
  BOOST_CHECK(p.slowest == 100 && p.slowest_rank == 0);
  BOOST_CHECK_CLOSE(p.max_over_mean, 100 / (80 / 1.5), 1e-12);
  BOOST_CHECK_CLOSE(p.even_router, 1.5, 1e-12);  // half of the work, a third of the speed
  // Refused.
  const Doubles no_speed = {0, 1};
  a.speed = no_speed.data();
  BOOST_CHECK(k::placement_load(a, nullptr, &p) == K::kBadShape);
  const Ids missing = {0, 1, 2, 2};
  BOOST_CHECK(k::placement_load(placed(counts, each, outside, 2), nullptr, &p) == K::kBadShape);
  BOOST_CHECK(k::placement_load(placed(counts, missing, in_order, 2), nullptr, &p) == K::kBadShape);
  BOOST_CHECK(k::placement_load(placed(counts, each, in_order, 2), nullptr, nullptr) == K::kNullPointer);
  // A rank for each expert: max / mean is 1 + MaxVio, and an even router's that of its floor. All on one rank: 1.
  for (const char* file : {"olmoe-1b-7b_c4", "olmoe-1b-7b_github"}) {
    const auto json = nlohmann::json::parse(
        std::ifstream(std::string(MOE_AUDIT_SOURCE_DIR "/fixtures/expert_counts/") + file + ".json"));
    const Longs layer = json["layers"]["7"].get<Longs>();
    Ids own(64), all(64, 0), run(64);
    std::iota(own.begin(), own.end(), 0);
    for (std::size_t e = 0; e < 64; ++e) run[e] = static_cast<std::int32_t>(e / 8);
    k::LoadStatistics s;
    BOOST_REQUIRE(k::load_statistics(layer.data(), 64, 8, 200'000, &s) == K::kOk);
    const auto place = [&](const Ids& rank, std::int64_t ranks) {
      k::PlacementArgs b = placed(layer, own, rank, ranks);
      b.top_k = 8, b.tokens = 200'000;
      BOOST_REQUIRE(k::placement_load(b, nullptr, &p) == K::kOk);
    };
    place(own, 64);
    BOOST_CHECK_CLOSE(p.max_over_mean, 1 + s.max_violation, 1e-10);
    BOOST_CHECK_CLOSE(p.even_router, 1 + s.max_violation_floor, 1e-10);
    place(all, 1);
    BOOST_CHECK(p.max_over_mean == 1.0 && p.even_router == 1.0);
    place(run, 8);  // eight ranks of eight: between the two
    BOOST_CHECK(p.max_over_mean > 1 && p.max_over_mean < 1 + s.max_violation);
  }
  // What is said of an even router, against one: below, and in that region. Experts one by one, then with 0 to 15
  // twice.
  const Shape s{4096, 64, 8};
  for (const std::int64_t copies : {0, 16}) {
    Ids slot, rank;
    for (std::int64_t i = 0; i < 64 + copies; ++i) {
      slot.push_back(static_cast<std::int32_t>(i % 64));
      rank.push_back(static_cast<std::int32_t>(i / ((64 + copies) / 16)));
    }
    double seen = 0;
    for (std::uint64_t w = 0; w < 8; ++w) {
      const Ids chosen = top(gaussians(s.tokens * s.experts, 300 + w), 64, 8);
      Longs c(64);
      std::int64_t none = 0;
      BOOST_REQUIRE(k::count_choices(k::CountArgs<std::int32_t>{chosen.data(), nullptr, s.tokens, 8, 64}, c.data(),
                                     &none) == K::kOk);
      k::PlacementArgs b = placed(c, slot, rank, 16);
      b.top_k = 8, b.tokens = s.tokens;
      BOOST_REQUIRE(k::placement_load(b, nullptr, &p) == K::kOk);
      seen += p.max_over_mean / 8;
    }
    BOOST_CHECK_MESSAGE(seen < p.even_router * 1.005 && seen > 1 + 0.5 * (p.even_router - 1),
                        seen << " " << p.even_router);
  }
}

/// Against the reference: one-hot matrices and the variance of a draw without replacement.
BOOST_AUTO_TEST_CASE(load_of_ranks_by_matrices) {
  struct Shape {
    std::int64_t experts, copies, ranks, top_k, tokens;
  };
  for (const Shape s : {Shape{1, 0, 1, 1, 0}, {1, 2, 3, 1, 50}, {8, 0, 4, 2, 100}, {60, 4, 8, 4, 1000}, {144, 16, 10, 6, 0},
                        {160, 32, 16, 6, 12}, {384, 128, 64, 8, 4096}, {64, 0, 96, 8, 7}, {32, 0, 4, 32, 9}}) {
    const Doubles g = gaussians(s.experts, 41), h = gaussians(s.ranks, 42);
    Longs counts;
    for (const double v : g) counts.push_back(v < -1 ? 0 : static_cast<std::int64_t>(std::exp(6 + v)));
    counts[0] = 5;
    Doubles speed;
    for (const double v : h) speed.push_back(std::exp(0.2 * v));
    Ids expert, rank;
    for (std::int64_t i = 0; i < s.experts + s.copies; ++i) {
      expert.push_back(static_cast<std::int32_t>(i < s.experts ? i : i * 7 % s.experts));
      rank.push_back(static_cast<std::int32_t>(i * 5 % s.ranks));  // some experts twice on a rank
    }
    k::PlacementArgs a = placed(counts, expert, rank, s.ranks);
    a.top_k = s.top_k, a.tokens = s.tokens, a.speed = speed.data();
    k::Placement p;
    Doubles loads(static_cast<std::size_t>(s.ranks));
    BOOST_REQUIRE(k::placement_load(a, loads.data(), &p) == K::kOk);
    at::Tensor want_loads;
    const auto slots = static_cast<std::int64_t>(expert.size());
    auto want = ref::placement_load(longs(counts, {s.experts}), at::tensor(expert, at::kInt).to(at::kLong).reshape({slots}),
                                    at::tensor(rank, at::kInt).to(at::kLong).reshape({slots}), tensor(speed, {s.ranks}), s.top_k,
                                    s.tokens, &want_loads);
    // Both sides: two roundings a part, at most one addition an expert; a quotient of sums over ranks; a root.
    const double terms = static_cast<double>(s.experts + s.ranks + 8);
    const auto close = [&](const std::string& name, double got, double exact, double size) {
      const double bound = 2 * bounds::gamma(terms, kU) * size;
      BOOST_CHECK_MESSAGE(std::fabs(got - exact) <= bound, name << " of " << s.experts << " on " << s.ranks << ": " << got
                                                                << ", not " << exact);
    };
    for (const auto& [name, got] : std::map<std::string, double>{{"ideal", p.ideal}, {"slowest", p.slowest},
                                                                 {"max_over_mean", p.max_over_mean}})
      close(name, got, want.at(name), want.at(name));
    BOOST_CHECK(static_cast<double>(p.slowest_rank) == want.at("slowest_rank"));
    BOOST_CHECK(static_cast<double>(p.idle_ranks) == want.at("idle_ranks"));
    const double* each = want_loads.contiguous().data_ptr<double>();
    for (std::size_t r = 0; r < loads.size(); ++r) close("load", loads[r], each[r], each[r]);
    // A variance is the difference of two squares of at most 1, which a root brings out: sqrt(v + d) - sqrt(v) <= sqrt(d).
    const double parts = *std::max_element(speed.begin(), speed.end()) / *std::min_element(speed.begin(), speed.end());
    const double rooted = s.tokens == 0 ? 0.0 : std::sqrt(bounds::gamma(terms, kU) * 2 * std::log(static_cast<double>(s.ranks)) /
                                                          static_cast<double>(s.tokens));
    BOOST_CHECK_MESSAGE(std::fabs(p.even_router - want.at("even_router")) <=
                            2 * bounds::gamma(terms, kU) * want.at("even_router") + parts * static_cast<double>(s.ranks) * rooted,
                        "even_router of " << s.experts << " on " << s.ranks << ": " << p.even_router << ", not "
                                          << want.at("even_router"));
  }
}

/// Gate mass of the chosen and of all is the importance of router_regularisers.h; the confidence is its sum over
/// tokens.
BOOST_AUTO_TEST_CASE(gate_mass) {
  const Shape s{500, 16, 4};
  const at::Tensor p =
      ref::scores(tensor(gaussians(s.tokens * s.experts, 11), {s.tokens, s.experts}), ref::Score::kSoftmax)
          .contiguous();
  const Doubles all(p.data_ptr<double>(), p.data_ptr<double>() + p.numel());
  const Ids chosen = top(all, 16, 4);
  Doubles mass;
  for (std::size_t i = 0; i < chosen.size(); ++i) mass.push_back(all[i / 4 * 16 + static_cast<std::size_t>(chosen[i])]);
  k::ImportanceLossArgs<double> a;
  a.gates = mass.data(), a.chosen = chosen.data(), a.tokens = s.tokens, a.experts = 16, a.width = 4;
  double loss = 0;
  Doubles of_chosen(16), of_all(16);
  BOOST_REQUIRE(k::importance_loss(a, {&loss, of_chosen.data(), nullptr}) == K::kOk);
  a.gates = all.data(), a.chosen = nullptr, a.width = 16;
  BOOST_REQUIRE(k::importance_loss(a, {&loss, of_all.data(), nullptr}) == K::kOk);
  k::RoutingStatistics r;
  BOOST_REQUIRE(k::routing_statistics(
                    k::RoutingStatisticsArgs<double>{all.data(), chosen.data(), nullptr, s.tokens, 16, 4}, &r) ==
                K::kOk);
  const double error = bounds::gamma(600, kU);
  near("confidence", std::accumulate(of_chosen.begin(), of_chosen.end(), 0.0) / 500, r.confidence, error);
  near("all of it", std::accumulate(of_all.begin(), of_all.end(), 0.0) / 500, 1, error);
  for (std::size_t e = 0; e < 16; ++e) BOOST_CHECK(of_chosen[e] <= of_all[e]);
}

}  // namespace

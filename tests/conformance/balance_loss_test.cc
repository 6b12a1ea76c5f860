// Balance losses: kernels/host against reference/ within bounds.h; both against the closed-form
// test vector, of which the values of right and wrong formulas are known; the laws that the losses obey.
#define BOOST_TEST_MODULE balance_loss
#include "kernels/host/balance_loss.h"

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
#include "kernels/host/dispatch.h"
#include "kernels/host/gaussian.h"
#include "kernels/host/router_backward.h"
#include "reference/balance_loss.h"
#include "reference/router.h"
#include "tests/support/compare.h"
#include "tests/support/tensors.h"
#include "tests/support/test_vector.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using moeaudit::test::compare;
using moeaudit::test::CompareOptions;
using moeaudit::test::kE;
using moeaudit::test::kK;
using moeaudit::test::kT;
using moeaudit::test::padded_logits;
using moeaudit::test::padding;
using moeaudit::test::tensor;
using moeaudit::test::top2;
using moeaudit::test::values;
using moeaudit::test::Values;
using moeaudit::test::vector_logits;
using Doubles = std::vector<double>;
using Ids = std::vector<std::int32_t>;
using Longs = std::vector<std::int64_t>;
using Mask = std::vector<std::uint8_t>;

constexpr double kInf = std::numeric_limits<double>::infinity();

/// Probabilities and choices of some tokens, as one backend after the other takes them.
struct Routed {
  std::int64_t tokens = 0, experts = 0, top_k = 0;
  Doubles p;   // [tokens, experts]
  Ids chosen;  // [tokens, top_k]
  Mask valid;  // empty: all
  Longs sets;  // empty: one
  Longs counts, counted;
};

k::BalanceLossArgs<double> args_of(const Routed& r, const k::BalanceConvention& c) {
  k::BalanceLossArgs<double> a;
  a.probabilities = r.p.data();
  a.chosen = r.chosen.empty() ? nullptr : r.chosen.data();
  a.valid = r.valid.empty() ? nullptr : r.valid.data();
  a.tokens = r.tokens;
  a.experts = r.experts;
  a.top_k = r.top_k;
  a.sets = r.sets.empty() ? nullptr : r.sets.data();
  a.num_sets = r.sets.empty() ? 1 : static_cast<std::int64_t>(r.sets.size()) - 1;
  a.counts = r.counts.empty() ? nullptr : r.counts.data();
  a.counted_tokens = r.counted.empty() ? nullptr : r.counted.data();
  a.convention = c;
  return a;
}

double loss_of(const Routed& r, const k::BalanceConvention& c = {}) {
  double loss = 0;
  k::BalanceLossResult<double> result;
  result.loss = &loss;
  BOOST_REQUIRE(k::balance_loss(args_of(r, c), result) == k::Status::kOk);
  return loss;
}

at::Tensor reference_of(const Routed& r, const k::BalanceConvention& c, const at::Tensor& p) {
  ref::BalanceLossOptions o;
  o.first_choice_only = c.counted == k::Counted::kFirstChoice;
  o.over_k = c.over_k;
  o.balanced = c.balanced == k::Balanced::kExperts   ? ref::Balanced::kExperts
               : c.balanced == k::Balanced::kDevices ? ref::Balanced::kDevices
                                                     : ref::Balanced::kCommunication;
  o.devices = c.devices;
  o.most_devices = c.most_devices;
  o.divide_by_all_tokens = c.divisor == k::Divisor::kAllTokens;
  o.sum_over_sets = c.over_sets == k::OverSets::kSum;
  o.over_sum = c.averaged == k::Averaged::kOverSum;
  o.sum_eps = c.sum_eps;
  o.top_k = r.top_k;
  const Longs chosen(r.chosen.begin(), r.chosen.end()), valid(r.valid.begin(), r.valid.end());
  const std::int64_t sets = r.sets.empty() ? 1 : static_cast<std::int64_t>(r.sets.size()) - 1;
  return ref::balance_loss(p, chosen.empty() ? at::Tensor() : tensor(chosen, {r.tokens, r.top_k}), o,
                           valid.empty() ? at::Tensor() : tensor(valid, {r.tokens}), r.sets,
                           r.counts.empty() ? at::Tensor() : tensor(r.counts, {sets, r.experts}),
                           r.counted.empty() ? at::Tensor() : tensor(r.counted, {sets}));
}

at::Tensor gradient_of(const at::Tensor& loss, const at::Tensor& z) {
  z.mutable_grad() = at::Tensor();
  loss.backward({}, /*retain_graph=*/true);
  return z.grad().clone();
}

// ---- the test vector

Doubles score(const Doubles& z, ref::Score s) {
  return values(ref::scores(tensor(z, {static_cast<std::int64_t>(z.size()) / kE, kE}), s));
}
Doubles row_normalised(Doubles p) {
  for (std::size_t t = 0; t < p.size(); t += kE) {
    const double sum = std::accumulate(p.begin() + static_cast<std::ptrdiff_t>(t),
                                       p.begin() + static_cast<std::ptrdiff_t>(t) + kE, 0.0);
    for (std::size_t e = 0; e < kE; ++e) p[t + e] /= sum;
  }
  return p;
}
Routed vector_layer(int layer) {
  const Doubles z = vector_logits(layer);
  return {kT, kE, kK, score(z, ref::Score::kSoftmax), top2(z), {}, {}, {}, {}};
}
Routed both_layers(bool one_set) {
  Routed r = vector_layer(0);
  const Routed s = vector_layer(1);
  r.p.insert(r.p.end(), s.p.begin(), s.p.end());
  r.chosen.insert(r.chosen.end(), s.chosen.begin(), s.chosen.end());
  r.tokens = 2 * kT;
  if (!one_set) r.sets = {0, kT, 2 * kT};
  return r;
}
Doubles biased(Doubles p) {
  for (std::size_t i = 0; i < p.size(); ++i) p[i] += 0.05 * (static_cast<double>(i % kE) - 3.5);
  return p;
}

/// A number with nine or more digits written down.
void says(const char* what, double got, double want) {
  BOOST_CHECK_MESSAGE(moeaudit::test::nine_digits(got, want), what << ": " << got << ", not " << want);
}

BOOST_AUTO_TEST_CASE(test_vector) {
  const Routed layer = vector_layer(0);
  says("layer 0", loss_of(layer), 1.086730629);
  says("layer 1", loss_of(vector_layer(1)), 1.050889132);
  says("mean of layers", loss_of(both_layers(false)), 1.068809881);
  Longs counts(kE);
  double loss = 0;
  k::BalanceLossResult<double> result;
  result.loss = &loss;
  result.counts = counts.data();
  BOOST_REQUIRE(k::balance_loss(args_of(layer, {}), result) == k::Status::kOk);
  BOOST_TEST(counts == (Longs{7, 5, 5, 3, 2, 4, 3, 3}), boost::test_tools::per_element());
  Routed halves = layer;
  halves.sets = {0, 8, 16};
  Doubles each(2);
  result.set_loss = each.data();
  result.counts = nullptr;
  BOOST_REQUIRE(k::balance_loss(args_of(halves, {}), result) == k::Status::kOk);
  says("sequence 0", each[0], 1.0763675663);
  says("sequence 1", each[1], 1.2315227757);
  says("sequence level", loss, 1.153945171);
  says("reference", reference_of(layer, {}, tensor(layer.p, {kT, kE})).item<double>(), 1.086730629);
}

BOOST_AUTO_TEST_CASE(values_of_wrong_variants) {
  const Routed right = vector_layer(0);
  k::BalanceConvention c;
  c.over_sets = k::OverSets::kSum;
  says("A1: layers summed", loss_of(both_layers(false), c), 2.137619761);
  says("A2: layers in one set", loss_of(both_layers(true)), 1.064989317);
  c = {};
  c.over_k = false;
  says("A3: A2 without k", loss_of(both_layers(true), c), 2.129978635);
  says("A4: without k", loss_of(right, c), 2.173461259);
  says("A5: k twice", loss_of(right) / kK, 0.5433653147);
  says("A6: without E", loss_of(right) / kE, 0.1358413287);
  c = {};
  c.counted = k::Counted::kFirstChoice;
  says("A7: first choice", loss_of(right, c), 1.241710524);
  Routed r = right;
  r.p = score(right.p, ref::Score::kSoftmax);
  says("A8: softmax of the softmax", loss_of(r), 1.012495077);
  r = right;
  std::fill(r.p.begin(), r.p.end(), 0.0);
  for (std::size_t t = 0; t < kT; ++t) {
    const auto a = t * kE + static_cast<std::size_t>(r.chosen[2 * t]),
               b = t * kE + static_cast<std::size_t>(r.chosen[2 * t + 1]);
    r.p[a] = right.p[a] / (right.p[a] + right.p[b]);
    r.p[b] = right.p[b] / (right.p[a] + right.p[b]);
  }
  says("A9: renormalised weights of the chosen", loss_of(r), 1.166564029);
  r = right;
  const Doubles sigmoid = score(vector_logits(0), ref::Score::kSigmoid);
  r.p = sigmoid;
  says("A11: sigmoid without its sum", loss_of(r), 4.259023519);
  r.p = row_normalised(sigmoid);
  says("sigmoid over its sum", loss_of(r), 1.031707853);
  r.p = sigmoid;
  c = {};
  c.averaged = k::Averaged::kOverSum;
  says("sigmoid, averaged over its sum", loss_of(r, c), 1.031707853);
  r = right;
  r.sets = {0, 8, 16};
  c = {};
  c.over_sets = k::OverSets::kSum;
  says("A14, A22: sequences or micro-batches summed", loss_of(r, c), 2.307890342);
  says("A23: a micro-batch at a time", loss_of(r), 1.153945171);
  const Doubles padded = padded_logits();
  r = {kT, kE, kK, score(padded, ref::Score::kSoftmax), top2(padded), {}, {}, {}, {}};
  says("A16: padding counted", loss_of(r), 1.11109582);
  r.valid = padding();
  says("padding left out", loss_of(r), 1.180170249);
  c = {};
  c.divisor = k::Divisor::kAllTokens;
  says("A17: padding out of the sums alone", loss_of(r, c), 0.663845765);
  r = right;
  r.p = row_normalised(sigmoid);
  r.chosen = top2(biased(sigmoid));
  says("A18: choices with the bias", loss_of(r), 0.964183591);
  r = right;  // capacity 4, in the order of the tokens, first choices before second ones or not: the counts are the
              // same
  Longs taken(kE);
  for (auto& e : r.chosen) {
    if (++taken[static_cast<std::size_t>(e)] > 4) e = -1;
  }
  says("A19: choices after drops", loss_of(r), 0.8589304497);
  r = right;
  r.counts = Longs(kE, 4);
  r.counted = {kT};
  says("A20: counts padded to the capacity", loss_of(r), 1.0);
  // A24: a running mean of counts over the micro-batches seen so far.
  Routed first = right, second = right;
  first.tokens = second.tokens = 8;
  second.p.erase(second.p.begin(), second.p.begin() + 8 * kE);
  second.chosen.erase(second.chosen.begin(), second.chosen.begin() + 8 * kK);
  second.counts = {7, 5, 5, 3, 2, 4, 3, 3};
  second.counted = {16};
  says("A24: running mean", (loss_of(first) + loss_of(second)) / 2, 1.112273445);
}

/// What transformers computes, per release: its own form, layers one after the other and no k; from 5.0 to 5.5 on
/// probabilities that its gate hands over in place of logits, of which the loss takes the softmax again (variant A8).
BOOST_AUTO_TEST_CASE(golden_values_of_transformers) {
  const auto golden = nlohmann::json::parse(std::ifstream(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/balance_loss.json"));
  BOOST_REQUIRE(golden["releases"].size() >= 3);
  const std::int64_t tokens = 2 * kT;
  Doubles both = vector_logits(0);
  const Doubles second = vector_logits(1);
  both.insert(both.end(), second.begin(), second.end());
  for (const auto& [version, release] : golden["releases"].items()) {
    const bool twice = version.rfind("5.5.", 0) == 0;
    const at::Tensor z = tensor(both, {tokens, kE}).set_requires_grad(true);
    at::Tensor p = ref::scores(z, ref::Score::kSoftmax);
    if (twice) p = ref::scores(p, ref::Score::kSoftmax);
    for (const char* which : {"plain", "masked"}) {
      Routed r{tokens, kE, kK, values(p), top2(values(p)), {}, {}, {}, {}};
      if (which == std::string("masked")) {
        for (std::int64_t t = 0; t < tokens; ++t) r.valid.push_back(t % kT < 12);
      }
      k::BalanceConvention c;
      c.over_k = false;
      const double want = release[which]["loss"];
      // Some releases pass through float32 on the way: its unit roundoff, over the sum of 8 terms of one sign.
      const double close = 8 * k::unit_roundoff(k::Float::kF32) * want;
      BOOST_CHECK_MESSAGE(std::fabs(loss_of(r, c) - want) <= close,
                          version << " " << which << ": " << loss_of(r, c) << ", not " << want);
      const at::Tensor gradient = gradient_of(reference_of(r, c, p), z);
      Doubles theirs = release[which]["gradient"][0];
      const Doubles rest = release[which]["gradient"][1];
      theirs.insert(theirs.end(), rest.begin(), rest.end());
      double largest = 0;
      for (double v : theirs) largest = std::max(largest, std::fabs(v));
      CompareOptions o;
      o.bound = [largest](std::size_t, double) { return 32 * k::unit_roundoff(k::Float::kF32) * largest; };
      const auto compared =
          compare(Values<double>{{tokens, kE}, theirs}, Values<double>{{tokens, kE}, values(gradient)}, o);
      BOOST_CHECK_MESSAGE(compared.ok(), version << " " << which << ": " << compared.report());
    }
  }
}

/// transformers' Switch in 4.x: a token beyond the capacity counts as one of expert 0, because argmax of a mask of
/// zeros is 0 (variant switch-dropped-as-expert-0; advisory AV016). The right loss counts the choice, dropped or not
/// (arXiv 2101.03961 equation 5).
BOOST_AUTO_TEST_CASE(switch_counts_dropped_tokens_as_expert_0) {
  const auto golden = nlohmann::json::parse(std::ifstream(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/balance_loss.json"));
  const auto& cases = golden["releases"]["4.57.6"]["switch_dropped"];
  BOOST_REQUIRE(cases.size() == 3);
  ref::RouteOptions o;
  o.top_k = 1;
  const at::Tensor z = tensor(vector_logits(0), {kT, kE});
  const ref::Routed routed = ref::route(z, o);
  Routed right{kT, kE, 1, values(ref::scores(z, ref::Score::kSoftmax)), {}, {}, {}, {}, {}};
  for (const double e : values(routed.chosen)) right.chosen.push_back(static_cast<std::int32_t>(e));
  int differ = 0;
  for (const auto& c : cases) {
    std::vector<std::int32_t> place(right.chosen.size());
    k::DropArgs<double> a;
    a.chosen = right.chosen.data(), a.tokens = kT, a.experts = kE, a.top_k = 1, a.capacity = c["capacity"];
    k::DropResult<double> dropped;
    dropped.place = place.data();
    BOOST_REQUIRE(k::drop(a, dropped) == k::Status::kOk);
    Routed wrong = right;
    std::int64_t kept = 0;
    for (std::size_t t = 0; t < place.size(); ++t) {
      if (place[t] < 0) wrong.chosen[t] = 0;
      kept += place[t] >= 0;
    }
    BOOST_CHECK_EQUAL(kept, c["kept"].get<std::int64_t>());
    const double want = c["loss"], close = 8 * k::unit_roundoff(k::Float::kF32) * want;  // computed in float32
    BOOST_CHECK_SMALL(loss_of(wrong, {}) - want, close);
    differ += std::fabs(loss_of(right, {}) - want) > close;
  }
  BOOST_CHECK_EQUAL(differ, 1);  // at capacity 2; at 4 expert 0 is the only one overfull, and nothing shows
}

// ---- kernels against the reference
// ---------------------------------------------------------------------------------------

Routed random_routed(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, std::uint64_t seed) {
  std::vector<float> g(static_cast<std::size_t>(tokens * experts));
  k::unit_gaussians(seed, 1, 0, tokens * experts, g.data());
  const Doubles z(g.begin(), g.end());
  Routed r{tokens, experts, top_k, {}, {}, {}, {}, {}, {}};
  if (tokens == 0) return r;
  ref::RouteOptions o;
  o.top_k = top_k;
  const ref::Routed routed = ref::route(tensor(z, {tokens, experts}), o);
  r.p = values(ref::scores(tensor(z, {tokens, experts}), ref::Score::kSoftmax));
  for (double e : values(routed.chosen)) r.chosen.push_back(static_cast<std::int32_t>(e));
  return r;
}

void check(const Routed& r, const k::BalanceConvention& c, const std::string& what) {
  at::Tensor p = tensor(r.p, {r.tokens, r.experts}).set_requires_grad(true);
  const at::Tensor want = reference_of(r, c, p);
  want.backward();
  const at::Tensor want_gradient = p.grad().defined() ? p.grad() : at::zeros_like(p);
  double loss = 0;
  Doubles gradient(r.p.size());
  k::BalanceLossResult<double> result;
  result.loss = &loss;
  result.gradient = gradient.data();
  BOOST_REQUIRE(k::balance_loss(args_of(r, c), result) == k::Status::kOk);
  const std::int64_t sets = r.sets.empty() ? 1 : static_cast<std::int64_t>(r.sets.size()) - 1;
  const double relative = bounds::balance_loss_relative(r.tokens, r.experts, sets) +
                          bounds::balance_loss_in_any_order(r.tokens, r.experts, sets);
  const double truth = want.item<double>();
  const double more = c.averaged == k::Averaged::kAsGiven
                          ? 0.0
                          : 2 * bounds::gamma(static_cast<double>(r.experts) + 2, k::unit_roundoff(k::Float::kF64));
  BOOST_CHECK_MESSAGE(
      std::fabs(loss - truth) <= (relative + more) * truth + 2 * bounds::balance_loss_underflow(r.experts, sets),
      what << ": " << loss << ", not " << truth);
  // Over the sum of a token, at most E of them and its eps, a gradient is a difference of two numbers of at most the
  // largest weight, E k, and a probability counts a sum and a quotient more.
  double least = 1;
  for (std::int64_t t = 0; c.averaged == k::Averaged::kOverSum && t < r.tokens; ++t)
    least = std::min(least,
                     c.sum_eps + std::accumulate(r.p.begin() + t * r.experts, r.p.begin() + (t + 1) * r.experts, 0.0));
  const double over_sum =
      c.averaged == k::Averaged::kAsGiven
          ? 0.0
          : bounds::gamma(2.0 * static_cast<double>(r.experts) + 12, k::unit_roundoff(k::Float::kF64)) * 2 *
                static_cast<double>(r.experts * r.top_k) / least;
  CompareOptions o;
  o.bound = [=](std::size_t, double v) {
    return 2 * bounds::balance_gradient_relative(k::Float::kF64) * std::fabs(v) + 2 * over_sum;
  };
  const auto compared = compare(Values<double>{{r.tokens, r.experts}, values(want_gradient)},
                                Values<double>{{r.tokens, r.experts}, gradient}, o);
  BOOST_CHECK_MESSAGE(compared.ok(), what << ": " << compared.report());

  // float32 probabilities are the same numbers, so everything but the rounding of the gradient is the same.
  const std::vector<float> narrow(r.p.begin(), r.p.end());
  const Doubles widened(narrow.begin(), narrow.end());
  std::vector<float> narrow_gradient(narrow.size());
  k::BalanceLossArgs<float> a;
  const k::BalanceLossArgs<double> d = args_of(r, c);
  a.probabilities = narrow.data();
  a.chosen = d.chosen, a.valid = d.valid, a.tokens = d.tokens, a.experts = d.experts, a.top_k = d.top_k,
  a.sets = d.sets, a.num_sets = d.num_sets;
  a.counts = d.counts, a.counted_tokens = d.counted_tokens, a.convention = c;
  double narrow_loss = 0, wide_loss = 0;
  k::BalanceLossResult<float> f;
  f.loss = &narrow_loss;
  f.gradient = narrow_gradient.data();
  BOOST_REQUIRE(k::balance_loss(a, f) == k::Status::kOk);
  k::BalanceLossArgs<double> w = d;
  w.probabilities = widened.data();
  result.loss = &wide_loss;
  BOOST_REQUIRE(k::balance_loss(w, result) == k::Status::kOk);
  BOOST_CHECK_MESSAGE(narrow_loss == wide_loss, what << ": float32 inputs");
  for (std::size_t i = 0; i < gradient.size(); ++i)
    BOOST_REQUIRE(narrow_gradient[i] == static_cast<float>(gradient[i]));
}

BOOST_AUTO_TEST_CASE(balance_loss_agrees_with_the_reference) {
  struct Shape {
    std::int64_t tokens, experts, k;
  };
  for (const Shape s : {Shape{1, 1, 1},
                        {1, 8, 8},
                        {7, 8, 2},
                        {256, 8, 2},
                        {257, 60, 4},
                        {600, 144, 6},
                        {300, 160, 6},
                        {520, 384, 32}}) {
    for (int variant = 0; variant < 15; ++variant) {
      Routed r = random_routed(s.tokens, s.experts, s.k, 40 + static_cast<std::uint64_t>(variant));
      k::BalanceConvention c;
      if (variant >= 12) {
        c.averaged = k::Averaged::kOverSum;
        for (double& v : r.p) v = 1 / (1 + std::exp(-8 * v));  // no softmax any more
      }
      if (variant == 13) c.sum_eps = 0.75, r.sets = {0, s.tokens / 3, s.tokens / 3, s.tokens};
      if (variant == 14) c.balanced = k::Balanced::kDevices, c.devices = s.experts % 8 == 0 ? 8 : 1;
      if (variant == 1) c.over_k = false;
      if (variant == 2) c.counted = k::Counted::kFirstChoice;
      if (variant == 3) c.over_sets = k::OverSets::kSum;
      if (variant == 3 || variant == 4 || variant == 5)
        r.sets = {0, s.tokens / 3, s.tokens / 3, s.tokens};  // one is empty
      if ((variant >= 5 && variant < 9) || variant == 13) {
        for (std::int64_t t = 0; t < s.tokens; ++t) r.valid.push_back(t % 3 != 1);
      }
      if (variant == 6) c.divisor = k::Divisor::kAllTokens;
      if (variant == 7 || variant == 10) c.balanced = k::Balanced::kDevices, c.devices = s.experts % 8 == 0 ? 8 : 1;
      if (variant == 8)
        c.balanced = k::Balanced::kCommunication, c.devices = s.experts % 4 == 0 ? 4 : 1, c.most_devices = 3;
      if (variant == 9 || variant == 10) {
        r.counts.assign(static_cast<std::size_t>(s.experts), 3);
        r.counts[0] = 1000;
        r.counted = {777};
        if (variant == 10) r.chosen.clear();
      }
      if (variant == 11) {
        for (std::size_t i = 0; i < r.chosen.size(); i += 3) r.chosen[i] = -1;
      }
      check(r, c,
            std::to_string(s.tokens) + "x" + std::to_string(s.experts) + "/" + std::to_string(s.k) + " variant " +
                std::to_string(variant));
    }
  }
}

/// A probability that is not finite spoils the loss of its set alone, and nothing as padding; gradients hold counts
/// alone.
BOOST_AUTO_TEST_CASE(balance_loss_at_the_edges) {
  Routed r = random_routed(12, 8, 2, 5), denormal = r;
  for (double& p : denormal.p) p *= 0x1p-1030;
  check(denormal, {}, "denormals");
  r.sets = {0, 4, 8, 12};
  const auto run = [](const Routed& x, Doubles* gradient) {
    Doubles each(3);
    double loss = 0;
    k::BalanceLossResult<double> result;
    gradient->resize(x.p.size());
    result.loss = &loss, result.set_loss = each.data(), result.gradient = gradient->data();
    BOOST_REQUIRE(k::balance_loss(args_of(x, {}), result) == k::Status::kOk);
    each.push_back(loss);
    return each;
  };
  Doubles gradient, other;
  const Doubles fine = run(r, &gradient);
  for (const double bad : {std::nan(""), kInf, -kInf}) {
    for (std::size_t e = 0; e < 8; ++e) {  // experts with choices, and without
      Routed w = r;
      w.p[5 * 8 + e] = bad;
      const Doubles got = run(w, &other);
      BOOST_CHECK(got[0] == fine[0] && got[2] == fine[2] && other == gradient);
      const double want = reference_of(w, {}, tensor(w.p, {12, 8})).item<double>();
      BOOST_CHECK_MESSAGE(std::isnan(want) ? std::isnan(got[3]) : got[3] == want,
                          "expert " << e << ": " << got[3] << ", not " << want);
      BOOST_CHECK(!std::isfinite(got[1]) && !std::isfinite(got[3]));
      w.valid.assign(12, 1), w.valid[5] = 0;
      Routed zero = w;
      zero.p[5 * 8 + e] = 0;
      BOOST_CHECK(run(w, &other) == run(zero, &other));
    }
  }
}

/// DeepSeek-V3's loss of every sequence, from the logits of a sigmoid router (arXiv 2412.19437 equations 17 to 20), and
/// back.
BOOST_AUTO_TEST_CASE(sequence_wise_sigmoid_to_the_logits) {
  const std::int64_t tokens = 20, experts = 12, top_k = 3;
  const Doubles logits = [&] {
    std::vector<float> g(static_cast<std::size_t>(tokens * experts));
    k::unit_gaussians(71, 1, 0, tokens * experts, g.data());
    return Doubles(g.begin(), g.end());
  }();
  ref::RouteOptions o;
  o.top_k = top_k, o.score = ref::Score::kSigmoid;
  const at::Tensor z = tensor(logits, {tokens, experts}).set_requires_grad(true);
  Routed r{tokens, experts, top_k, {}, {}, {}, {0, 8, tokens}, {}, {}};
  for (const double e : values(ref::route(z, o).chosen)) r.chosen.push_back(static_cast<std::int32_t>(e));
  k::BalanceConvention c;
  c.averaged = k::Averaged::kOverSum;
  // The equations as printed: f_i = N / (K T) sum_t 1(chosen), P_i = 1 / T sum_t s_it / sum_j s_jt, of each sequence.
  const auto printed = [&](const Doubles& l) {
    double loss = 0;
    for (std::size_t set = 0; set < 2; ++set) {
      const auto first = r.sets[set], last = r.sets[set + 1];
      for (std::int64_t e = 0; e < experts; ++e) {
        double f = 0, p = 0;
        for (std::int64_t t = first; t < last; ++t) {
          double sum = 0;
          for (std::int64_t j = 0; j < experts; ++j)
            sum += 1 / (1 + std::exp(-l[static_cast<std::size_t>(t * experts + j)]));
          p += 1 / (1 + std::exp(-l[static_cast<std::size_t>(t * experts + e)])) / sum /
               static_cast<double>(last - first);
          for (std::int64_t j = 0; j < top_k; ++j) f += r.chosen[static_cast<std::size_t>(t * top_k + j)] == e;
        }
        loss += f * static_cast<double>(experts) / static_cast<double>(top_k * (last - first)) * p / 2;
      }
    }
    return loss;
  };
  r.p = values(ref::scores(z, ref::Score::kSigmoid));
  double loss = 0;
  Doubles of_scores(r.p.size()), of_logits(r.p.size());
  k::BalanceLossResult<double> result;
  result.loss = &loss, result.gradient = of_scores.data();
  BOOST_REQUIRE(k::balance_loss(args_of(r, c), result) == k::Status::kOk);
  const double u = k::unit_roundoff(k::Float::kF64), terms = static_cast<double>(tokens * experts * top_k);
  BOOST_CHECK_SMALL(loss - printed(logits), 2 * bounds::gamma(terms, u) * loss);
  k::RouteBackwardArgs<double> back;
  back.forward.logits = logits.data(), back.forward.tokens = tokens, back.forward.experts = experts;
  back.forward.top_k = top_k, back.forward.score = k::Score::kSigmoid, back.scores = of_scores.data();
  BOOST_REQUIRE(k::route_backward(back, of_logits.data()) == k::Status::kOk);
  const Doubles want = values(gradient_of(reference_of(r, c, ref::scores(z, ref::Score::kSigmoid)), z));
  for (std::size_t i = 0; i < want.size(); ++i) {
    BOOST_CHECK_SMALL(of_logits[i] - want[i], bounds::gamma(4.0 * experts + 40, u));  // numbers of at most 1
    Doubles up = logits, down = logits;
    up[i] += 1e-5, down[i] -= 1e-5;
    BOOST_CHECK_SMALL((printed(up) - printed(down)) / 2e-5 - of_logits[i], 1e-9);
  }
}

/// The loss of every framework in that framework's own arithmetic, and what the conventions make of it.
BOOST_AUTO_TEST_CASE(frameworks_in_their_own_arithmetic) {
  const Routed all = random_routed(24, 8, 2, 90);
  const at::Tensor p = tensor(all.p, {24, 8});
  const at::Tensor one_hot =
      at::one_hot(tensor(Longs(all.chosen.begin(), all.chosen.end()), {24, 2}), 8).to(at::kDouble);
  const at::Tensor map = one_hot.sum(1), first = one_hot.select(1, 0);
  const auto half = [](const at::Tensor& t, int i) { return t.narrow(0, 12 * i, 12); };
  const auto agrees = [](const char* what, const at::Tensor& want, double got) {
    const double truth = want.item<double>();
    BOOST_CHECK_MESSAGE(std::fabs(got - truth) <= 2 * bounds::balance_loss_in_any_order(24, 8, 4) * truth,
                        what << ": " << got << ", not " << truth);
  };
  Routed halves = all;
  halves.sets = {0, 12, 24};
  agrees("Megatron-LM aux_loss, E / (k T T) sum_e sum_t s c", (p.sum(0) * map.sum(0)).sum() * 8 / (2 * 24 * 24),
         loss_of(all));
  const at::Tensor folded = at::cat({half(p, 0), half(p, 1)}, 1), folded_map = at::cat({half(map, 0), half(map, 1)}, 1);
  agrees("Megatron-LM seq_aux_loss, sequences folded into the experts",
         (folded.sum(0) * folded_map.sum(0)).sum() * 8 / (2 * 12 * 12) / 2, loss_of(halves));
  agrees("MegaBlocks, E / (L T k) of two layers' scores and counts side by side",
         (folded.mean(0) * folded_map.sum(0)).sum() * 8 / (2 * 12 * 2), loss_of(halves));
  const at::Tensor seen = at::stack({half(map, 0).sum(0), map.sum(0) / 2});  // c_i = sum of counts so far / i
  Routed running = halves;
  running.counts.clear();
  for (const double n : values(at::cat({half(map, 0).sum(0), map.sum(0)})))
    running.counts.push_back(static_cast<std::int64_t>(n));
  running.counted = {12, 24};
  agrees("Megatron-LM global_aux_loss of two micro-batches",
         ((half(p, 0).sum(0) * seen[0]).sum() + (half(p, 1).sum(0) * seen[1]).sum()) * 8 / (2 * 12 * 12) / 2,
         loss_of(running));
  Routed global = running;
  std::copy(global.counts.begin() + 8, global.counts.end(), global.counts.begin());
  global.counted = {24, 24};
  agrees("Qwen, arXiv 2501.11873: f of the global batch, P of each micro-batch",
         8 * (map.mean(0) / 2 * (half(p, 0).mean(0) + half(p, 1).mean(0)) / 2).sum(), loss_of(global));
  k::BalanceConvention c;
  c.over_k = false;
  agrees("transformers, a choice a row", (one_hot.mean(0) * p.mean(0).unsqueeze(0)).sum() * 8, loss_of(all, c));
  c = {};
  c.counted = k::Counted::kFirstChoice;
  agrees("DeepSpeed top-2, E^2 mean_e", (p.mean(0) * first.mean(0)).mean() * 64, loss_of(all, c));
  agrees("GShard as printed, 1 / E sum_e c_e / S m_e", (first.sum(0) / 24 * p.mean(0)).sum() / 8, loss_of(all, c) / 64);
  Routed groups = all;
  groups.sets = {0, 6, 12, 18, 24};
  agrees("Mesh TensorFlow (ST-MoE): mean over groups of E^2 mean_e density proxy",
         (p.reshape({4, 6, 8}).mean(1) * first.reshape({4, 6, 8}).mean(1)).mean() * 64, loss_of(groups, c));
  // OLMo-core: micro-batches added up and divided by the labels of the whole batch, 20 of 24 tokens.
  Routed labelled = halves;
  for (const double n : values(at::cat({half(map, 0).sum(0), half(map, 1).sum(0)})))
    labelled.counts.push_back(static_cast<std::int64_t>(n));
  labelled.counted = {20, 20};
  c = {};
  c.over_sets = k::OverSets::kSum;
  agrees("OLMo-core, E / (total k) of the micro-batches' dots",
         ((half(p, 0).mean(0) * half(map, 0).sum(0)).sum() + (half(p, 1).mean(0) * half(map, 1).sum(0)).sum()) * 8 /
             (20 * 2),
         loss_of(labelled, c));
}

BOOST_AUTO_TEST_CASE(balance_loss_laws) {
  const Routed r = random_routed(300, 16, 4, 3);
  // Even routing is worth 1, and k without the division; everything on the first k experts E / k.
  Routed even{16, 16, 4, Doubles(256, 1.0 / 16), {}, {}, {}, {}, {}};
  for (std::int32_t t = 0; t < 16; ++t) {
    for (std::int32_t j = 0; j < 4; ++j) even.chosen.push_back((4 * t + j) % 16);
  }
  BOOST_CHECK_CLOSE(loss_of(even), 1.0, 1e-12);
  k::BalanceConvention c;
  c.over_k = false;
  BOOST_CHECK_CLOSE(loss_of(even, c), 4.0, 1e-12);
  for (const k::Balanced b : {k::Balanced::kDevices, k::Balanced::kCommunication}) {
    c = {};
    c.balanced = b;
    c.devices = 4;
    BOOST_CHECK_CLOSE(loss_of(even, c), 1.0, 1e-12);  // every token on one device of four
  }
  Routed one = even;
  for (std::size_t i = 0; i < one.chosen.size(); ++i) one.chosen[i] = static_cast<std::int32_t>(i % 4);
  for (std::size_t i = 0; i < one.p.size(); ++i) one.p[i] = i % 16 < 4 ? 0.25 : 0.0;
  BOOST_CHECK_CLOSE(loss_of(one), 4.0, 1e-12);
  // Experts under other numbers, and tokens in another order: the same loss.
  Routed relabelled = r, shuffled = r;
  for (std::size_t t = 0; t < 300; ++t) {
    for (std::size_t e = 0; e < 16; ++e) {
      relabelled.p[t * 16 + (e * 5 + 3) % 16] = r.p[t * 16 + e];
      shuffled.p[(t * 7 % 300) * 16 + e] = r.p[t * 16 + e];
    }
    for (std::size_t j = 0; j < 4; ++j) {
      relabelled.chosen[t * 4 + j] = (r.chosen[t * 4 + j] * 5 + 3) % 16;
      shuffled.chosen[(t * 7 % 300) * 4 + j] = r.chosen[t * 4 + j];
    }
  }
  BOOST_CHECK_CLOSE(loss_of(relabelled), loss_of(r), 1e-11);
  BOOST_CHECK_CLOSE(loss_of(shuffled), loss_of(r), 1e-11);
  // The loss is linear in the probabilities: a step along one of them changes it by the gradient.
  Doubles gradient(r.p.size());
  double loss = 0;
  k::BalanceLossResult<double> result;
  result.loss = &loss;
  result.gradient = gradient.data();
  BOOST_REQUIRE(k::balance_loss(args_of(r, {}), result) == k::Status::kOk);
  Routed moved = r;
  moved.p[37] += 0.5;
  BOOST_CHECK_SMALL(loss_of(moved) - loss - 0.5 * gradient[37], 1e-14);
}

BOOST_AUTO_TEST_CASE(balance_loss_refuses) {
  Routed r = random_routed(8, 8, 2, 1);
  double loss = 0;
  k::BalanceLossResult<double> result;
  result.loss = &loss;
  const auto status = [&](auto change) {
    Routed copy = r;
    k::BalanceConvention c;
    k::BalanceLossArgs<double> a;
    change(copy, c);
    a = args_of(copy, c);
    return k::balance_loss(a, result);
  };
  using K = k::Status;
  BOOST_CHECK(status([](Routed& x, auto&) { x.chosen[3] = 8; }) == K::kBadShape);
  BOOST_CHECK(status([](Routed& x, auto&) { x.sets = {0, 5, 3, 8}; }) == K::kBadShape);
  BOOST_CHECK(status([](Routed& x, auto&) { x.sets = {0, 5}; }) == K::kBadShape);
  BOOST_CHECK(status([](Routed& x, auto&) { x.sets = {1, 8}; }) == K::kBadShape);
  BOOST_CHECK(status([](Routed& x, auto&) { x.top_k = 9; }) == K::kBadTopK);
  BOOST_CHECK(status([](Routed&, k::BalanceConvention& c) { c.devices = 3; }) == K::kBadShape);
  BOOST_CHECK(status([](Routed&, k::BalanceConvention& c) {
                c.counted = k::Counted::kFirstChoice, c.over_k = false;
              }) == K::kBadOption);
  BOOST_CHECK(status([](Routed& x, auto&) { x.chosen.clear(); }) == K::kNullPointer);
  BOOST_CHECK(status([](Routed& x, auto&) { x.counts.assign(8, 1); }) == K::kNullPointer);
  BOOST_CHECK(status([](Routed& x, auto&) { x.valid.assign(8, 0); }) == K::kOk);
  BOOST_CHECK(loss == 0.0);
}

}  // namespace

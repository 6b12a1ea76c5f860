// Gradients of the router: kernels/host against the autograd of reference/, and both against central differences.
#define BOOST_TEST_MODULE router_backward
#include "kernels/host/router_backward.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "reference/balance_loss.h"
#include "reference/router.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
using Doubles = std::vector<double>;
using Ids = std::vector<std::int32_t>;

Doubles gaussians(std::int64_t n, std::uint64_t stream, double scale = 1) {
  std::vector<float> g(static_cast<std::size_t>(n));
  k::unit_gaussians(13, stream, 0, n, g.data());
  Doubles v;
  for (float x : g) v.push_back(scale * static_cast<double>(x));
  return v;
}
at::Tensor tensor(const Doubles& v, std::int64_t rows) {
  return at::from_blob(const_cast<double*>(v.data()), {rows, static_cast<std::int64_t>(v.size()) / rows}, at::kDouble)
      .clone();
}

struct Case {
  std::string name;
  k::Score score = k::Score::kSoftmax;
  ref::Score reference = ref::Score::kSoftmax;
  bool after = false, renormalise = false;
  double eps = 0, scaling = 1, floor = 0, softcap = 0;
  bool scaled = false;  // by expert
  std::int64_t always = 0;
  double norm = 1, offset = 0;
};
const Case kCases[] = {
    {"softmax"},
    {"softmax renormalised", k::Score::kSoftmax, ref::Score::kSoftmax, false, true},
    {"softmax after top-k", k::Score::kSoftmax, ref::Score::kSoftmax, true},
    {"sigmoid renormalised, scaled", k::Score::kSigmoid, ref::Score::kSigmoid, false, true, 1e-20, 2.5},
    {"sigmoid", k::Score::kSigmoid, ref::Score::kSigmoid},
    {"sqrt softplus renormalised", k::Score::kSqrtSoftplus, ref::Score::kSqrtSoftplus, false, true, 1e-9, 1.5},
    {"sigmoid after top-k", k::Score::kSigmoid, ref::Score::kSigmoid, true, true},
    {"sums around the floor", k::Score::kSoftmax, ref::Score::kSoftmax, false, true, 1e-3, 1, 0.5},
    {"capped logits", k::Score::kSigmoid, ref::Score::kSigmoid, false, true, 0, 1, 0, 3},
    {"softmax of capped logits", k::Score::kSoftmax, ref::Score::kSoftmax, false, false, 0, 1, 0, 3},
    {"scaled by expert", k::Score::kSoftmax, ref::Score::kSoftmax, false, true, 0, 2.5, 0, 0, true},
    {"two experts always", k::Score::kSigmoid, ref::Score::kSigmoid, false, true, 0, 8, 0, 0, false, 2},
    {"all of it", k::Score::kSigmoid, ref::Score::kSigmoid, true, true, 1e-3, 2.5, 1.5, 2, true, 3},
    {"always, not renormalised", k::Score::kSqrtSoftplus, ref::Score::kSqrtSoftplus, false, false, 0, 2, 0, 0, true, 1},
    {"dbrx, p = 2", k::Score::kSoftmax, ref::Score::kSoftmax, false, true, 0, 1, 0, 0, false, 0, 2},
    {"p = 3", k::Score::kSoftmax, ref::Score::kSoftmax, false, true, 0, 1, 0, 0, false, 0, 3},
    {"p = 1.5", k::Score::kSqrtSoftplus, ref::Score::kSqrtSoftplus, false, true, 0, 1.5, 0, 0, false, 0, 1.5},
    {"p = 1/2", k::Score::kSoftmax, ref::Score::kSoftmax, false, true, 0, 1, 0, 0, false, 0, 0.5},
    {"the largest", k::Score::kSoftmax, ref::Score::kSoftmax, false, true, 0, 1, 0, 0, false, 0, HUGE_VAL},
    {"the largest, of always too", k::Score::kSigmoid, ref::Score::kSigmoid, false, true, 0, 1, 0, 0, false, 2, HUGE_VAL},
    {"olmo-core, sigmoid", k::Score::kSigmoid, ref::Score::kSigmoid, false, true, 0, 1, 0, 0, false, 0, 1, 1e-7},
    {"olmo-core, sigmoid, p = 2", k::Score::kSigmoid, ref::Score::kSigmoid, false, true, 0, 1, 0, 0, false, 0, 2, 1e-7},
    {"an offset that is seen", k::Score::kSigmoid, ref::Score::kSigmoid, true, false, 0, 2, 0, 0, true, 1, 1, 0.25},
    {"all of it, p = 3", k::Score::kSigmoid, ref::Score::kSigmoid, true, true, 1e-3, 2.5, 1.5, 2, true, 3, 3, 0.25}};

struct Setup {
  std::int64_t tokens, experts, top_k;
  Doubles logits, bias, upstream;  // upstream: of the weights
  Ids chosen;
  Doubles scale, always, always_upstream;
};

ref::RouteOptions options_of(const Case& c, std::int64_t top_k) {
  ref::RouteOptions o;
  o.top_k = top_k;
  o.score = c.reference;
  o.score_after_top_k = c.after;
  o.renormalise = c.renormalise;
  o.renormalise_eps = c.eps;
  o.renormalise_floor = c.floor;
  o.renormalise_norm = c.norm, o.sigmoid_offset = c.offset;
  o.scaling = c.scaling;
  o.logit_softcap = c.softcap;
  return o;
}

/// What the reference makes of the logits z, of those that every token has, and of the experts' scale.
ref::Routed routed(const Case& c, const Setup& s, const at::Tensor& z, const at::Tensor& always,
                   const at::Tensor& scale) {
  ref::RouteInputs in;
  in.expert_scale = scale;
  in.always_logits = always;
  return ref::route(z, options_of(c, s.top_k), in);
}
at::Tensor scale_of(const Case& c, const Setup& s) {
  return c.scaled ? tensor(s.scale, 1).reshape({-1}) : at::Tensor();
}
at::Tensor always_of(const Case& c, const Setup& s) { return c.always > 0 ? tensor(s.always, s.tokens) : at::Tensor(); }
/// Gradients of the logits, of those that every token has, and of the experts' scale, by autograd.
struct Gradients {
  at::Tensor logits, always, scale = {};
};
Gradients autograd(const Case& c, const Setup& s) {
  at::Tensor z = tensor(s.logits, s.tokens).set_requires_grad(true), always = always_of(c, s), scale = scale_of(c, s);
  if (always.defined()) always.set_requires_grad(true);
  if (scale.defined()) scale.set_requires_grad(true);
  const ref::Routed r = routed(c, s, z, always, scale);
  at::Tensor loss = (r.weights * tensor(s.upstream, s.tokens)).sum();
  if (always.defined()) loss = loss + (r.always_weights * tensor(s.always_upstream, s.tokens)).sum();
  loss.backward();
  return {z.grad(), always.defined() ? always.grad() : at::Tensor(), scale.defined() ? scale.grad() : at::Tensor()};
}

Setup setup(const Case& c, std::int64_t tokens, std::int64_t experts, std::int64_t top_k, double scale) {
  Setup s{tokens,
          experts,
          top_k,
          gaussians(tokens * experts, 1, scale),
          gaussians(experts, 2, 0.1),
          gaussians(tokens * top_k, 3),
          {},
          gaussians(experts, 9),
          gaussians(tokens * c.always, 10, scale),
          gaussians(tokens * c.always, 11)};
  const at::Tensor chosen = routed(c, s, tensor(s.logits, tokens), always_of(c, s), scale_of(c, s)).chosen.contiguous();
  for (std::int64_t i = 0; i < chosen.numel(); ++i)
    s.chosen.push_back(static_cast<std::int32_t>(chosen.data_ptr<std::int64_t>()[i]));
  return s;
}

k::RouteBackwardArgs<double> args_of(const Case& c, const Setup& s) {
  k::RouteBackwardArgs<double> a;
  a.forward.logits = s.logits.data();
  a.forward.tokens = s.tokens, a.forward.experts = s.experts, a.forward.top_k = s.top_k;
  a.forward.score = c.score, a.forward.score_after_top_k = c.after;
  a.forward.renormalise = c.renormalise, a.forward.renormalise_eps = c.eps, a.forward.scaling = c.scaling;
  a.forward.renormalise_floor = c.floor, a.forward.logit_softcap = c.softcap;
  a.forward.renormalise_norm = c.norm, a.forward.sigmoid_offset = c.offset;
  a.forward.expert_scale = c.scaled ? s.scale.data() : nullptr;
  a.forward.always = c.always, a.forward.always_logits = s.always.data();
  a.chosen = s.chosen.data();
  a.weights = s.upstream.data();
  a.always_weights = c.always > 0 ? s.always_upstream.data() : nullptr;
  return a;
}

/// The magnitudes that bounds::route_backward_relative() is relative to; of_scores: gradients of the scores, from
/// elsewhere.
Gradients sizes_of(const Case& c, const Setup& s, const at::Tensor& of_scores = {}) {
  const auto capped = [&](const at::Tensor& v) { return c.softcap > 0 ? c.softcap * at::tanh(v / c.softcap) : v; };
  const auto of_cap = [&](const at::Tensor& size, const at::Tensor& v) {
    return c.softcap > 0 ? size * (1 + at::tanh(v / c.softcap).square()) : size;
  };
  const auto of_slope = [&](const at::Tensor& g, const at::Tensor& score, const at::Tensor& l) {
    return c.score == k::Score::kSigmoid ? g * score * (1 + score) : g * at::sigmoid(l) / (2 * score);
  };
  const at::Tensor raw = tensor(s.logits, s.tokens), z = capped(raw);
  at::Tensor u = tensor(s.upstream, s.tokens).abs();
  const at::Tensor chosen = at::tensor(s.chosen, at::kInt).to(at::kLong).reshape({s.tokens, s.top_k});
  if (c.scaled) u = u * tensor(s.scale, 1).reshape({-1}).abs().index({chosen});
  const at::Tensor score = c.after ? at::zeros_like(z).scatter(1, chosen, ref::scores(z.gather(1, chosen), c.reference))
                                   : ref::scores(z, c.reference);
  const at::Tensor w = score.gather(1, chosen) + c.offset;
  at::Tensor all = w, product = (u * w).sum(1, true), of_always, always_score, always;
  if (c.always > 0) {
    always = tensor(s.always, s.tokens), of_always = tensor(s.always_upstream, s.tokens).abs();
    always_score = ref::scores(capped(always), c.reference);
    all = at::cat({w, always_score + c.offset}, 1);
    product = product + (of_always * (always_score + c.offset)).sum(1, true);
  }
  const at::Tensor norm = at::norm(all, c.norm, at::IntArrayRef{1}, true), total = norm + c.eps;
  const auto norm_slope = [&](const at::Tensor& v) {
    return std::isinf(c.norm) ? (v == norm).to(at::kDouble) : at::pow(v / norm, c.norm - 1);
  };
  // Where rounding might lift a sum to its floor, or drop it below, both terms count.
  const at::Tensor by = at::clamp_min(total, c.floor), along = product / by / by;
  const auto each = [&](const at::Tensor& v, const at::Tensor& of) {
    return std::fabs(c.scaling) * (c.renormalise ? v / by + along * norm_slope(of) : v);
  };
  at::Tensor g = at::zeros_like(z).scatter(1, chosen, each(u, w));
  if (of_scores.defined()) g = g + of_scores.abs();
  return {of_cap(c.score == k::Score::kSoftmax ? score * (g + (g * score).sum(1, true)) : of_slope(g, score, z), raw),
          c.always > 0 ? of_cap(of_slope(each(of_always, always_score + c.offset), always_score, capped(always)), always) : at::Tensor()};
}

/// Relative error of a score of logits that lie `range` apart.
double score_error(const Case& c, const Setup& s) {
  const at::Tensor z = tensor(s.logits, s.tokens);
  const double range = (z.amax(1) - z.amin(1)).max().item<double>();
  const double logit = k::bounds::softcapped(c.softcap, k::Float::kF64);
  const double own = c.score == k::Score::kSoftmax ? k::bounds::softmax_relative(s.experts, logit, range, k::Float::kF64)
                     : c.score == k::Score::kSigmoid ? k::bounds::sigmoid_relative(logit, k::Float::kF64)
                                                     : k::bounds::sqrt_softplus_relative(logit, k::Float::kF64);
  return c.offset > 0 ? k::bounds::offset_relative(own, k::Float::kF64) : own;
}

/// The largest |ln| of a score of the setup.
double largest_logarithm(const Case& c, const Setup& s) {
  const auto of = [&](const Doubles& logits) {
    if (logits.empty()) return 0.0;
    at::Tensor z = tensor(logits, s.tokens);
    if (c.softcap > 0) z = c.softcap * at::tanh(z / c.softcap);
    const at::Tensor score = ref::scores(z, c.reference, c.offset);
    return score.log().abs().max().item<double>();
  };
  return std::max(of(s.logits), of(s.always));
}

/// Both sides are within the bound of the exact gradient.
void check_near(const Doubles& got, const at::Tensor& want, const Case& c, const Setup& s, const at::Tensor& sizes,
                const std::string& what) {
  const at::Tensor w = want.contiguous(), size = sizes.contiguous();
  const std::int64_t terms = s.top_k + c.always;
  const double relative =
      2 * (c.norm == 1 ? k::bounds::route_backward_relative(score_error(c, s), s.experts, terms, c.softcap > 0)
                       : k::bounds::route_backward_normed_relative(score_error(c, s), s.experts, terms, c.norm,
                                                                   largest_logarithm(c, s), c.softcap > 0));
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double off = std::fabs(got[i] - w.data_ptr<double>()[i]), bound = relative * size.data_ptr<double>()[i];
    BOOST_REQUIRE_MESSAGE(off <= bound, what << " at " << i << ": " << got[i] << ", not " << w.data_ptr<double>()[i]
                                             << ", bound " << bound);
  }
}

BOOST_AUTO_TEST_CASE(gradients_agree_with_autograd) {
  struct Shape {
    std::int64_t tokens, experts, k;
  };
  for (const Case& c : kCases) {
    for (const Shape shape : {Shape{1, 1, 1}, {5, 8, 8}, {40, 60, 4}, {9, 144, 6}, {3, 160, 6}, {7, 384, 32}}) {
      for (const double scale : {1e-310, 0.1, 1.0, 12.0}) {  // denormals: every score is tied
        const Setup s = setup(c, shape.tokens, shape.experts, shape.k, scale);
        const std::string what = c.name + " " + std::to_string(shape.experts) + "/" + std::to_string(shape.k);
        const Gradients want = autograd(c, s), sizes = sizes_of(c, s);
        Doubles d(s.logits.size()), d_always(s.always.size());
        k::RouteBackwardArgs<double> a = args_of(c, s);
        a.d_always_logits = d_always.data();
        if (c.always > shape.experts) {
          BOOST_CHECK(k::route_backward(a, d.data()) == k::Status::kBadShape);
          continue;
        }
        BOOST_REQUIRE(k::route_backward(a, d.data()) == k::Status::kOk);
        check_near(d, want.logits, c, s, sizes.logits, what);
        if (c.always > 0) check_near(d_always, want.always, c, s, sizes.always, what + ", always");
      }
    }
  }
}

/// Dropped choices as in losses of capacity: nothing comes from them.
BOOST_AUTO_TEST_CASE(gradients_of_the_scale_of_experts) {
  struct Shape {
    std::int64_t tokens, experts, k;
  };
  std::size_t compared = 0;
  for (const Case& c : kCases) {
    if (!c.scaled) continue;
    for (const Shape shape : {Shape{1, 1, 1}, {5, 8, 8}, {40, 60, 4}, {9, 144, 6}, {7, 384, 32}, {200, 3, 2}}) {
      if (c.always > shape.experts) continue;
      Setup s = setup(c, shape.tokens, shape.experts, shape.k, 1);
      for (std::size_t i = 3; i < s.upstream.size(); i += 7) s.upstream[i] = 0;  // dropped, for autograd
      k::RouteArgs<double> plain = args_of(c, s).forward;
      plain.expert_scale = nullptr;
      Ids chosen(s.chosen.size());
      Doubles unscaled(s.chosen.size()), upstream = s.upstream, d(static_cast<std::size_t>(shape.experts), -7);
      BOOST_REQUIRE(k::route(plain, {chosen.data(), unscaled.data(), nullptr, nullptr}) == k::Status::kOk);
      BOOST_REQUIRE(chosen == s.chosen);
      for (std::size_t i = 3; i < chosen.size(); i += 7) chosen[i] = -1, upstream[i] = std::nan("");
      const k::ExpertScaleBackwardArgs<double> a{unscaled.data(), chosen.data(), upstream.data(),
                                                 s.tokens,        s.top_k,       s.experts};
      BOOST_REQUIRE(k::expert_scale_backward(a, d.data()) == k::Status::kOk);
      const at::Tensor want = autograd(c, s).scale.contiguous();
      Doubles size(d.size());
      std::int64_t terms = 0;
      for (std::size_t i = 0; i < chosen.size(); ++i) {
        if (chosen[i] >= 0) size[static_cast<std::size_t>(chosen[i])] += std::fabs(upstream[i] * unscaled[i]), ++terms;
      }
      double weight = score_error(c, s);
      if (c.renormalise) weight = k::bounds::renormalised_relative(weight, s.top_k + c.always, k::Float::kF64);
      weight = k::bounds::scaled_relative(weight, k::Float::kF64);
      for (std::size_t e = 0; e < d.size(); ++e, ++compared) {
        const double bound = 2 * (k::bounds::sum_in_any_order(terms, 1, size[e]) + 2 * weight * size[e]);
        BOOST_REQUIRE_MESSAGE(std::fabs(d[e] - want.data_ptr<double>()[e]) <= bound,
                              c.name << " of " << s.experts << " at " << e << ": " << d[e] << ", not "
                                     << want.data_ptr<double>()[e]);
      }
      if (shape.tokens == 40) {  // float32 weights: the same sum of the values that they are
        const std::vector<float> narrow(unscaled.begin(), unscaled.end());
        const Doubles widened(narrow.begin(), narrow.end());
        Doubles from_float(d.size()), from_double(d.size());
        const k::ExpertScaleBackwardArgs<double> wide{widened.data(), chosen.data(), upstream.data(), 40, 4, 60};
        const k::ExpertScaleBackwardArgs<float> floats{narrow.data(), chosen.data(), upstream.data(), 40, 4, 60};
        BOOST_REQUIRE(k::expert_scale_backward(floats, from_float.data()) == k::Status::kOk);
        BOOST_REQUIRE(k::expert_scale_backward(wide, from_double.data()) == k::Status::kOk);
        BOOST_CHECK(from_float == from_double);
      }
    }
  }
  BOOST_CHECK_GT(compared, 1000u);
  const Doubles one = {2, 3};
  const Ids beyond = {0, 2}, both = {0, 0};
  double d[2] = {};
  BOOST_CHECK(k::expert_scale_backward(k::ExpertScaleBackwardArgs<double>{one.data(), both.data(), one.data(), 1, 2, 2}, d) ==
              k::Status::kOk);
  BOOST_CHECK(d[0] == 13 && d[1] == 0);
  BOOST_CHECK(k::expert_scale_backward(k::ExpertScaleBackwardArgs<double>{one.data(), beyond.data(), one.data(), 1, 2, 2}, d) ==
              k::Status::kBadShape);
  BOOST_CHECK(k::expert_scale_backward(k::ExpertScaleBackwardArgs<double>{one.data(), nullptr, one.data(), 1, 2, 2}, d) ==
              k::Status::kNullPointer);
  BOOST_CHECK(k::expert_scale_backward(k::ExpertScaleBackwardArgs<double>{nullptr, nullptr, nullptr, 0, 0, 2}, d) ==
              k::Status::kBadTopK);
}

BOOST_AUTO_TEST_CASE(losses_join_in) {
  // The balance loss through the scores, the z-loss through the logits, and dropped choices.
  const Case& c = kCases[1];
  Setup s = setup(c, 30, 16, 4, 1);
  at::Tensor z = tensor(s.logits, s.tokens).set_requires_grad(true);
  const ref::Routed r = ref::route(z, options_of(c, s.top_k));
  const at::Tensor p = ref::scores(z, ref::Score::kSoftmax);
  const Doubles other = gaussians(30 * 16, 8);
  ((r.weights * tensor(s.upstream, s.tokens)).sum() + (p * tensor(other, s.tokens)).sum() + 0.01 * ref::z_loss(z))
      .backward();
  at::Tensor y = tensor(s.logits, s.tokens).set_requires_grad(true);
  (0.01 * ref::z_loss(y)).backward();
  const at::Tensor of_z = y.grad().contiguous();
  k::RouteBackwardArgs<double> a = args_of(c, s);
  a.scores = other.data();
  a.logits = of_z.data_ptr<double>();
  Doubles d(s.logits.size());
  BOOST_REQUIRE(k::route_backward(a, d.data()) == k::Status::kOk);
  check_near(d, z.grad(), c, s, sizes_of(c, s, tensor(other, s.tokens)).logits + of_z.abs(), "with losses");
  // Only losses: no weights, no choices.
  a.weights = nullptr;
  a.chosen = nullptr;
  BOOST_CHECK(k::route_backward(a, d.data()) == k::Status::kOk);
  // A single renormalised choice has weight 1 and no gradient.
  Setup one = setup(c, 6, 8, 1, 1);
  Doubles none(one.logits.size());
  BOOST_REQUIRE(k::route_backward(args_of(c, one), none.data()) == k::Status::kOk);
  check_near(none, at::zeros({6, 8}, at::kDouble), c, one, sizes_of(c, one).logits, "one choice");
  // All dropped.
  std::fill(one.chosen.begin(), one.chosen.end(), -1);
  BOOST_REQUIRE(k::route_backward(args_of(kCases[0], one), none.data()) == k::Status::kOk);
  BOOST_CHECK(none == Doubles(none.size(), 0.0));
}

/// s^(p - 1) of a score of 0 is infinite for p < 1; PyTorch gives such a score no gradient. By hand: the weights are 1 and 0, and a
/// softmax of 1 and 0 passes nothing on.
BOOST_AUTO_TEST_CASE(scores_of_0_have_no_slope_in_their_norm) {
  const Doubles upstream = {3, 5};
  const Ids chosen = {0, 1};
  const auto gradient = [&](auto logits, k::Float dtype) {
    k::RouteBackwardArgs<typename decltype(logits)::value_type> a;
    a.forward.logits = logits.data(), a.forward.tokens = 1, a.forward.experts = a.forward.top_k = 2;
    a.forward.renormalise = true, a.forward.renormalise_norm = 0.5f, a.forward.tensor_dtype = dtype;
    a.chosen = chosen.data(), a.weights = upstream.data();
    Doubles d(2, -7);
    BOOST_REQUIRE(k::route_backward(a, d.data()) == k::Status::kOk);
    return d;
  };
  BOOST_CHECK(gradient(Doubles{0, -800}, k::Float::kF64) == Doubles(2, 0.0));
  BOOST_CHECK(gradient(std::vector<float>{0, -800}, k::Float::kBF16) == Doubles(2, 0.0));
  const at::Tensor z = at::tensor({0.0, -800.0}, at::kDouble).set_requires_grad(true), s = at::softmax(z, 0);
  (s / at::norm(s, 0.5, at::IntArrayRef{0}, true) * at::tensor(upstream)).sum().backward();
  BOOST_CHECK(at::equal(z.grad(), at::zeros({2}, at::kDouble)));
}

BOOST_AUTO_TEST_CASE(norms_and_offsets_that_are_none_are_refused) {
  const Setup s = setup(kCases[4], 2, 8, 2, 1);
  Doubles d(s.logits.size());
  const auto status = [&](double norm, double offset, k::Score score) {
    k::RouteBackwardArgs<double> a = args_of(kCases[4], s);
    a.forward.renormalise_norm = norm, a.forward.sigmoid_offset = offset, a.forward.score = score;
    return k::route_backward(a, d.data());
  };
  BOOST_CHECK(status(2, 1e-7, k::Score::kSigmoid) == k::Status::kOk);
  BOOST_CHECK(status(0, 0, k::Score::kSigmoid) == k::Status::kBadOption);
  BOOST_CHECK(status(std::nan(""), 0, k::Score::kSigmoid) == k::Status::kBadOption);
  BOOST_CHECK(status(2, 1e-7, k::Score::kSoftmax) == k::Status::kBadOption);
  BOOST_CHECK(status(2, -1e-7, k::Score::kSigmoid) == k::Status::kBadOption);
}

// PyTorch's autograd with bfloat16 and float16 tensors (fixtures/make/router_backward_golden.py), bit for bit. But for
// one of its operators: on the CPU the slope of a sigmoid is computed in float16 itself, each step rounded, where
// bfloat16 and every CUDA kernel compute in float32; there two places are allowed, one for each step but the last.
BOOST_AUTO_TEST_CASE(narrow_tensors_have_the_gradients_of_autograd) {
  const auto golden =
      nlohmann::json::parse(std::ifstream(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/router_backward.json"));
  const auto tokens = golden["tokens"].get<std::int64_t>();
  std::size_t compared = 0;
  for (const auto& g : golden["cases"]) {
    const auto floats = [&](const char* key) { return g[key].get<std::vector<float>>(); };
    const auto doubles = [&](const char* key) { return g[key].get<Doubles>(); };
    const std::string name = g["name"].get<std::string>() + " " + g["dtype"].get<std::string>();
    const k::Float dtype = g["dtype"] == "bfloat16" ? k::Float::kBF16 : k::Float::kF16;
    const std::vector<float> logits = floats("logits"), weights = floats("weights");
    const Doubles upstream = doubles("upstream"), gradient = doubles("gradient");
    const Ids chosen = g["chosen"].get<Ids>();
    const Doubles of_scores = g["of_scores"].is_null() ? Doubles() : doubles("of_scores");
    k::RouteBackwardArgs<float> a;
    k::RouteArgs<float>& f = a.forward;
    f.logits = logits.data(), f.tokens = tokens, f.experts = g["experts"], f.top_k = g["top_k"];
    f.score = g["score"] == "softmax"   ? k::Score::kSoftmax
              : g["score"] == "sigmoid" ? k::Score::kSigmoid
                                        : k::Score::kSqrtSoftplus;
    const std::vector<float> scale = g["expert_scale"].is_null() ? std::vector<float>() : floats("expert_scale");
    f.expert_scale = scale.empty() ? nullptr : scale.data();
    f.renormalise_floor = g["floor"], f.logit_softcap = g["softcap"];
    f.renormalise_norm = g["norm"].is_string() ? HUGE_VALF : g["norm"].get<float>(), f.sigmoid_offset = g["offset"];
    f.score_after_top_k = g["score_after_top_k"], f.renormalise = g["renormalise"];
    f.renormalise_eps = g["eps"], f.scaling = g["scaling"], f.tensor_dtype = dtype;
    Ids got_chosen(chosen.size());
    std::vector<float> got_weights(weights.size());
    BOOST_REQUIRE(k::route(f, {got_chosen.data(), got_weights.data(), nullptr, nullptr}) == k::Status::kOk);
    BOOST_CHECK_MESSAGE(got_chosen == chosen, name << ": chosen");
    BOOST_CHECK_MESSAGE(got_weights == weights, name << ": weights");
    a.chosen = chosen.data(), a.weights = upstream.data(), a.scores = of_scores.empty() ? nullptr : of_scores.data();
    Doubles d(gradient.size());
    BOOST_REQUIRE(k::route_backward(a, d.data()) == k::Status::kOk);
    for (std::size_t i = 0; i < d.size(); ++i) {
      ++compared;
      const bool stepwise = f.score == k::Score::kSigmoid && dtype == k::Float::kF16;
      const double allowed = stepwise ? 2 * k::spacing(gradient[i], dtype) : 0.0;
      BOOST_CHECK_MESSAGE(std::fabs(d[i] - gradient[i]) <= allowed,
                          name << " at " << i << ": " << d[i] << ", not " << gradient[i]);
    }
  }
  BOOST_CHECK_GT(compared, 8000u);
}

BOOST_AUTO_TEST_CASE(central_differences) {
  for (const Case& c : kCases) {
    const Setup s = setup(c, 3, 8, 2, 1);
    Doubles d(s.logits.size()), d_always(s.always.size());
    k::RouteBackwardArgs<double> a = args_of(c, s);
    a.d_always_logits = d_always.data();
    BOOST_REQUIRE(k::route_backward(a, d.data()) == k::Status::kOk);
    const auto loss = [&](std::size_t at, double step) {
      Doubles z = s.logits, w(s.chosen.size());
      if (at < z.size()) z[at] += step;
      Ids chosen(s.chosen.size());
      k::RouteArgs<double> f = args_of(c, s).forward;
      Doubles always = s.always, v(always.size());
      if (at >= z.size()) always[at - z.size()] += step;
      f.logits = z.data(), f.always_logits = always.data();
      BOOST_REQUIRE(k::route(f, {chosen.data(), w.data(), nullptr, nullptr, v.data()}) == k::Status::kOk);
      BOOST_REQUIRE(chosen == s.chosen);
      double sum = 0;
      for (std::size_t i = 0; i < w.size(); ++i) sum += w[i] * s.upstream[i];
      for (std::size_t i = 0; i < v.size(); ++i) sum += v[i] * s.always_upstream[i];
      return sum;
    };
    // Step^2 / 6 of the third derivative, at most some tens here, is 1e-9; so is the rounding of the loss over the
    // step.
    d.insert(d.end(), d_always.begin(), d_always.end());
    for (std::size_t i = 0; i < d.size(); ++i) BOOST_CHECK_SMALL((loss(i, 1e-5) - loss(i, -1e-5)) / 2e-5 - d[i], 1e-8);
  }
}

/// A NaN or an infinity spoils the gradient of its token where it spoils that of autograd, and leaves the other tokens
/// their bits; -inf has no slope. (Autograd has 0 / 0 there for the square root of softplus.)
BOOST_AUTO_TEST_CASE(what_is_not_finite_stays_with_its_token) {
  for (const Case& c : kCases) {
    const Setup fine = setup(c, 4, 8, 2, 1);
    Doubles want(fine.logits.size()), d(want.size());
    BOOST_REQUIRE(k::route_backward(args_of(c, fine), want.data()) == k::Status::kOk);
    for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      for (std::size_t e = 0; e < 8; ++e) {
        Setup s = fine;
        s.logits[8 + e] = bad;
        const at::Tensor chosen = routed(c, s, tensor(s.logits, 4), always_of(c, s), scale_of(c, s)).chosen.contiguous(),
                         gradient = autograd(c, s).logits.contiguous();
        for (std::size_t i = 0; i < 8; ++i) s.chosen[i] = static_cast<std::int32_t>(chosen.data_ptr<std::int64_t>()[i]);
        BOOST_REQUIRE(k::route_backward(args_of(c, s), d.data()) == k::Status::kOk);
        const auto finite = [](const double* row) {
          return std::all_of(row, row + 8, [](double v) { return std::isfinite(v); });
        };
        for (std::size_t i = 0; i < d.size(); ++i)
          if (i / 8 != 1) BOOST_CHECK(d[i] == want[i]);
        if (bad == -HUGE_VAL)
          BOOST_CHECK_MESSAGE(finite(d.data() + 8) && d[8 + e] == 0, c.name << " at expert " << e);
        else
          for (std::size_t i = 8; i < 16; ++i)
            BOOST_CHECK_MESSAGE(std::isfinite(d[i]) == std::isfinite(gradient.data_ptr<double>()[i]),
                                c.name << ", " << bad << " at expert " << e << ": the gradient of " << i - 8);
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(gate_gradients) {
  struct Shape {
    std::int64_t tokens, hidden, experts;
    double scale;
  };
  for (const Shape s :
       {Shape{1, 1, 1, 1}, {37, 130, 60, 1}, {5, 33, 144, 1}, {3, 64, 160, 1}, {2, 40, 384, 1}, {4, 9, 8, 1e-310}}) {
    const Doubles x = gaussians(s.tokens * s.hidden, 4, s.scale),
                  w = gaussians(s.experts * s.hidden, 5, 0.05 * s.scale), g = gaussians(s.tokens * s.experts, 6);
    at::Tensor tx = tensor(x, s.tokens).set_requires_grad(true), tw = tensor(w, s.experts).set_requires_grad(true);
    const at::Tensor up = tensor(g, s.tokens);
    (ref::gate_logits(tx, tw) * up).sum().backward();
    Doubles d_w(w.size()), d_x(x.size());
    BOOST_REQUIRE(
        k::gate_backward(k::GateBackwardArgs<double>{g.data(), x.data(), w.data(), s.tokens, s.hidden, s.experts},
                         d_w.data(), d_x.data()) == k::Status::kOk);
    const at::Tensor size_w = up.abs().t().mm(tensor(x, s.tokens).abs()).contiguous(),
                     size_x = up.abs().mm(tensor(w, s.experts).abs()).contiguous();
    const auto check = [](const Doubles& got, const at::Tensor& gradient, const at::Tensor& size, std::int64_t terms) {
      const at::Tensor want = gradient.contiguous();
      for (std::size_t i = 0; i < got.size(); ++i)
        BOOST_CHECK_SMALL(got[i] - want.data_ptr<double>()[i],
                          2 * k::bounds::sum_in_any_order(terms, 1, size.data_ptr<double>()[i]));
    };
    check(d_w, tw.grad(), size_w, s.tokens);
    check(d_x, tx.grad(), size_x, s.experts);
  }
  const std::int64_t tokens = 37, hidden = 130, experts = 60;
  const Doubles x = gaussians(tokens * hidden, 4), w = gaussians(experts * hidden, 5, 0.05),
                g = gaussians(tokens * experts, 6);
  Doubles d_w(w.size());
  const std::vector<float> narrow(x.begin(), x.end());
  const Doubles widened(narrow.begin(), narrow.end());
  Doubles from_float(w.size()), from_double(w.size());
  BOOST_REQUIRE(k::gate_backward(k::GateBackwardArgs<float>{g.data(), narrow.data(), nullptr, tokens, hidden, experts},
                                 from_float.data(), nullptr) == k::Status::kOk);
  BOOST_REQUIRE(
      k::gate_backward(k::GateBackwardArgs<double>{g.data(), widened.data(), nullptr, tokens, hidden, experts},
                       from_double.data(), nullptr) == k::Status::kOk);
  BOOST_CHECK(from_float == from_double);
  BOOST_CHECK(k::gate_backward(k::GateBackwardArgs<double>{g.data(), nullptr, nullptr, tokens, hidden, experts},
                               d_w.data(), nullptr) == k::Status::kNullPointer);
}

}  // namespace

// The noise of routers: kernels/host against reference/ and its autograd; rounding of jittered inputs against
// LibTorch's.
#define BOOST_TEST_MODULE router_noise
#include "kernels/host/router_noise.h"

#include <ATen/ATen.h>

#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "kernels/host/router_backward.h"
#include "reference/router.h"
#include "reference/router_noise.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using k::Float;

std::vector<double> gaussians(std::int64_t n, std::uint64_t stream, double scale) {
  std::vector<float> g(static_cast<std::size_t>(n));
  k::unit_gaussians(23, stream, 0, n, g.data());
  std::vector<double> v;
  for (const float x : g) v.push_back(scale * static_cast<double>(x));
  return v;
}
at::Tensor tensor(const std::vector<double>& v, std::int64_t rows) {
  return at::from_blob(const_cast<double*>(v.data()), {rows, static_cast<std::int64_t>(v.size()) / rows}, at::kDouble)
      .clone();
}

/// On both sides.
double bound(double logit, double noise, double deviation) {
  return 2 * bounds::noisy_logit(logit, std::fabs(noise) * deviation);
}

BOOST_AUTO_TEST_CASE(noisy_logits_and_their_gradient) {
  for (const auto& [tokens, experts] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{1, 1}, {3, 160}, {2, 144}, {2, 384}, {40, 8}}) {
    for (const double eps : {0.0, 1e-2}) {
      const std::int64_t n = tokens * experts;
      const auto logits = gaussians(n, 1, 1), noise = gaussians(n, 2, 1), upstream = gaussians(n, 4, 1);
      auto noise_logits = gaussians(n, 3, 8);  // both sides of softplus's switch at 20, and far below 0
      noise_logits[0] = -50;
      const at::Tensor nl = tensor(noise_logits, tokens).set_requires_grad(true);
      const at::Tensor out = ref::noisy_logits(tensor(logits, tokens), tensor(noise, tokens), nl, eps);
      (out * tensor(upstream, tokens)).sum().backward();
      k::NoisyLogitsArgs<double> a;
      a.logits = logits.data(), a.noise = noise.data(), a.noise_logits = noise_logits.data();
      a.tokens = tokens, a.experts = experts, a.eps = eps;
      std::vector<double> got(static_cast<std::size_t>(n)), gradient(got);
      BOOST_REQUIRE(k::noisy_logits(a, got.data()) == k::Status::kOk);
      BOOST_REQUIRE(k::noisy_logits_backward(a, upstream.data(), gradient.data()) == k::Status::kOk);
      const at::Tensor want = out.detach().contiguous(), slope = nl.grad().contiguous();
      for (std::int64_t i = 0; i < n; ++i) {
        const double deviation =
            std::log1p(std::exp(std::min(noise_logits[i], 20.0))) + std::max(noise_logits[i] - 20, 0.0) + eps;
        BOOST_CHECK_SMALL(got[i] - want.data_ptr<double>()[i], bound(logits[i], noise[i], deviation));
        // Four roundings for a sigmoid, two products; torch has exp(x) / (1 + exp(x)) with as many.
        const double expected = slope.data_ptr<double>()[i];
        BOOST_CHECK_SMALL(gradient[i] - expected,
                          2 * bounds::gamma(7, 0x1p-53) * std::fabs(expected) + bounds::smallest(Float::kF64));
      }
    }
  }
}

/// What is not finite stays in its place, and is what LibTorch makes of it.
BOOST_AUTO_TEST_CASE(what_is_not_finite_stays_in_its_place) {
  const std::int64_t n = 12;
  const auto logits = gaussians(n, 1, 1), noise = gaussians(n, 2, 1), noise_logits = gaussians(n, 3, 1);
  const auto run = [](const std::vector<double>& l, const std::vector<double>& z, const std::vector<double>& s) {
    k::NoisyLogitsArgs<double> a;
    a.logits = l.data(), a.noise = z.data(), a.noise_logits = s.data(), a.tokens = 3, a.experts = 4;
    std::vector<double> out(12);
    BOOST_REQUIRE(k::noisy_logits(a, out.data()) == k::Status::kOk);
    return out;
  };
  const auto fine = run(logits, noise, noise_logits);
  for (const double bad : {HUGE_VAL, -HUGE_VAL, std::nan(""), 5e-324}) {
    for (int of = 0; of < 3; ++of) {
      auto l = logits, z = noise, s = noise_logits;
      (of == 0 ? l : of == 1 ? z : s)[5] = bad;
      const auto got = run(l, z, s);
      const at::Tensor want = ref::noisy_logits(tensor(l, 3), tensor(z, 3), tensor(s, 3), 0).contiguous();
      const double w = want.data_ptr<double>()[5];
      for (std::size_t i = 0; i < 12; ++i) BOOST_CHECK(i == 5 || got[i] == fine[i]);
      const double deviation = std::isfinite(s[5]) ? std::log1p(std::exp(s[5])) : 0;
      BOOST_CHECK_MESSAGE(std::isfinite(w) ? std::fabs(got[5] - w) <= bound(l[5], z[5], deviation)
                          : std::isnan(w)  ? std::isnan(got[5])
                                           : got[5] == w,
                          bad << " in argument " << of << ": " << got[5] << ", not " << w);
    }
  }
}

BOOST_AUTO_TEST_CASE(fixed_deviation_and_float32) {
  const std::vector<float> logits = {1.0f, -2.0f, 3.0f}, noise = {0.5f, 1.0f, -0.25f};
  k::NoisyLogitsArgs<float> a;
  a.logits = logits.data(), a.noise = noise.data(), a.tokens = 1, a.experts = 3, a.scale = 1.0 / 3;
  std::vector<float> got(3);
  BOOST_REQUIRE(k::noisy_logits(a, got.data()) == k::Status::kOk);
  const at::Tensor want = ref::noisy_logits(tensor({1, -2, 3}, 1), tensor({0.5, 1, -0.25}, 1), {}, 0, 1.0 / 3);
  for (int i = 0; i < 3; ++i) BOOST_CHECK_EQUAL(got[i], static_cast<float>(want.data_ptr<double>()[i]));
  double upstream = 1, slope = 0;
  BOOST_CHECK(k::noisy_logits_backward(a, &upstream, &slope) == k::Status::kBadOption);
  a.noise = nullptr;
  BOOST_CHECK(k::noisy_logits(a, got.data()) == k::Status::kNullPointer);
}

// Noisy top-k whole: noise, the k largest, softmax over them (arXiv 1701.06538 equations 3 to 5); gradients of the
// clean logits and of those of the noise against autograd and central differences.
BOOST_AUTO_TEST_CASE(noisy_top_k_and_its_gradients) {
  const std::int64_t tokens = 6, experts = 10, top_k = 3, n = tokens * experts;
  const auto clean = gaussians(n, 11, 1), noise = gaussians(n, 12, 1), raw = gaussians(n, 13, 1),
             upstream = gaussians(tokens * top_k, 14, 1);
  std::vector<double> noisy(static_cast<std::size_t>(n)), weights(upstream.size()), d_clean(noisy), d_raw(noisy);
  std::vector<std::int32_t> chosen(upstream.size());
  k::RouteBackwardArgs<double> b;
  k::RouteArgs<double>& f = b.forward;
  f.logits = noisy.data(), f.tokens = tokens, f.experts = experts, f.top_k = top_k, f.score_after_top_k = true;
  const auto loss = [&](const std::vector<double>& z, const std::vector<double>& r) {
    const k::NoisyLogitsArgs<double> a{z.data(), noise.data(), r.data(), tokens, experts, 1e-2, 0};
    BOOST_REQUIRE(k::noisy_logits(a, noisy.data()) == k::Status::kOk);
    BOOST_REQUIRE(k::route(f, {chosen.data(), weights.data(), nullptr, nullptr}) == k::Status::kOk);
    double sum = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) sum += weights[i] * upstream[i];
    return sum;
  };
  loss(clean, raw);
  b.chosen = chosen.data(), b.weights = upstream.data();
  BOOST_REQUIRE(k::route_backward(b, d_clean.data()) == k::Status::kOk);
  const k::NoisyLogitsArgs<double> a{clean.data(), noise.data(), raw.data(), tokens, experts, 1e-2, 0};
  BOOST_REQUIRE(k::noisy_logits_backward(a, d_clean.data(), d_raw.data()) == k::Status::kOk);
  const at::Tensor z = tensor(clean, tokens).set_requires_grad(true), r = tensor(raw, tokens).set_requires_grad(true);
  ref::RouteOptions o;
  o.top_k = top_k, o.score_after_top_k = true;
  (ref::route(ref::noisy_logits(z, tensor(noise, tokens), r, 1e-2), o).weights * tensor(upstream, tokens))
      .sum()
      .backward();
  const at::Tensor want_clean = z.grad().contiguous(), want_raw = r.grad().contiguous();
  for (std::size_t i = 0; i < noisy.size(); ++i) {
    BOOST_CHECK_SMALL(d_clean[i] - want_clean.data_ptr<double>()[i], 1e-14);  // some 50 roundings of numbers below 2
    BOOST_CHECK_SMALL(d_raw[i] - want_raw.data_ptr<double>()[i], 1e-14);
    for (const bool of_raw : {false, true}) {
      std::vector<double> up = of_raw ? raw : clean, down = up;
      up[i] += 1e-5, down[i] -= 1e-5;
      const double slope = of_raw ? loss(clean, up) - loss(clean, down) : loss(up, raw) - loss(down, raw);
      BOOST_CHECK_SMALL(slope / 2e-5 - (of_raw ? d_raw : d_clean)[i], 1e-9);
    }
  }
}

// In float64 the product of the reference; its gradient is the same function of the upstream.
BOOST_AUTO_TEST_CASE(jitter_and_its_gradient) {
  const auto x = gaussians(50, 21, 3), factor = gaussians(50, 22, 0.01), upstream = gaussians(50, 23, 1);
  std::vector<double> got(50), slope(50);
  BOOST_REQUIRE(k::jitter(x.data(), factor.data(), 50, Float::kF64, got.data()) == k::Status::kOk);
  BOOST_REQUIRE(k::jitter(upstream.data(), factor.data(), 50, Float::kF64, slope.data()) == k::Status::kOk);
  const at::Tensor t = tensor(x, 5).set_requires_grad(true), want = ref::jitter(t, tensor(factor, 5));
  (want * tensor(upstream, 5)).sum().backward();
  const at::Tensor product = want.detach().contiguous(), gradient = t.grad().contiguous();
  for (std::size_t i = 0; i < 50; ++i) {
    BOOST_CHECK_EQUAL(got[i], product.data_ptr<double>()[i]);
    BOOST_CHECK_EQUAL(slope[i], gradient.data_ptr<double>()[i]);
  }
  BOOST_CHECK(k::jitter(x.data(), factor.data(), -1, Float::kF64, got.data()) == k::Status::kBadShape);
}

// LibTorch multiplies two bfloat16 tensors as floats and rounds: bit for bit ours, NaN, infinities and subnormals
// included.
BOOST_AUTO_TEST_CASE(jitter_has_the_bits_of_torch) {
  const std::int64_t n = 4096;
  at::Tensor x = at::randn({n}).to(at::kBFloat16), factor = (at::rand({n}) * 0.02 + 0.99).to(at::kBFloat16);
  x[0] = std::numeric_limits<float>::infinity(), x[1] = std::numeric_limits<float>::quiet_NaN(), x[2] = 1e-40f,
  x[3] = -0.0f, x[4] = 3.38e38f, factor[4] = 1.0078125f;
  const at::Tensor want = (x * factor).to(at::kFloat).contiguous(), xf = x.to(at::kFloat).contiguous(),
                   ff = factor.to(at::kFloat).contiguous();
  std::vector<float> got(static_cast<std::size_t>(n));
  BOOST_REQUIRE(k::jitter(xf.data_ptr<float>(), ff.data_ptr<float>(), n, Float::kBF16, got.data()) == k::Status::kOk);
  for (std::int64_t i = 0; i < n; ++i) {
    const float w = want.data_ptr<float>()[i];
    BOOST_CHECK_MESSAGE((std::isnan(w) && std::isnan(got[i])) || w == got[i], i << ": " << got[i] << " against " << w);
  }
  BOOST_CHECK(std::signbit(got[3]));
}

}  // namespace

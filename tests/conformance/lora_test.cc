// LoRA: kernels/host against reference/ within derived bounds; sizes, merges and what they lose against closed forms;
// gradients against autograd and differences; merges and un-merges of PEFT bit for bit (fixtures/golden/lora.json).
#define BOOST_TEST_MODULE lora
#include "kernels/host/lora.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "audit/inputs/inputs.h"
#include "audit/text/text.h"
#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "kernels/host/quantised_weights.h"
#include "reference/lora.h"
#include "tests/support/on_every_target.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using k::Float;
using k::StackOrder;
using moeaudit::Node;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr double kU = 0x1p-53;

Floats gaussians(std::int64_t n, std::uint64_t stream) {
  Floats g(static_cast<std::size_t>(n));
  k::unit_gaussians(9, stream, 0, n, g.data());
  return g;
}
/// Multiples of 1/64 below 1/4: sums of a few thousand of their products are exact in float32.
Floats sixty_fourths(std::int64_t n, std::uint64_t stream) {
  Floats g = gaussians(n, stream);
  for (float& v : g) v = std::nearbyint(std::clamp(v, -2.0f, 2.0f) * 7) / 64;
  return g;
}
at::Tensor tensor(const Floats& v, at::IntArrayRef shape) {
  return at::from_blob(const_cast<float*>(v.data()), shape, at::kFloat).to(at::kDouble);
}
Doubles doubles(const at::Tensor& t) {
  const at::Tensor c = t.to(at::kDouble).contiguous();
  return {c.data_ptr<double>(), c.data_ptr<double>() + c.numel()};
}
Doubles product_of(const k::LoraUpdate& u) {
  Doubles out(static_cast<std::size_t>(u.rows * u.columns), -7);
  BOOST_REQUIRE(k::lora_product(u, out.data()) == k::Status::kOk);
  return out;
}
bool same_bits(const Doubles& a, const Doubles& b) {
  return a.size() == b.size() && !a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}
template <class F>
void on_every_target(F&& f) {
  BOOST_CHECK(moeaudit::test::on_every_target(f) >= 2);
}

// ---- sizes
// -------------------------------------------------------------------------------------------------------------

BOOST_AUTO_TEST_CASE(sizes_and_break_even) {
  k::LoraSize s;
  BOOST_REQUIRE(k::lora_size(4096, 14336, 8, 16, &s) == k::Status::kOk);  // w1 of Mixtral-8x7B
  BOOST_CHECK(s.adapter == 8 * 16 * (4096 + 14336) && s.full == std::int64_t{8} * 4096 * 14336);
  BOOST_CHECK_CLOSE(s.break_even_rank, 4096.0 * 14336 / 18432, 1e-12);
  BOOST_REQUIRE(k::lora_size(4096, 8, 1, 16, &s) == k::Status::kOk);  // its router: rank 16 is twice the router
  BOOST_CHECK(s.adapter == 65664 && s.full == 32768 && s.first_rank == 8);
  for (std::int64_t in : {1, 2, 7, 64, 2048}) {
    for (std::int64_t out : {1, 8, 63, 64, 128, 384}) {
      for (std::int64_t copies : {1, 128}) {
        k::LoraSize at, below;
        BOOST_REQUIRE(k::lora_size(in, out, copies, 1, &s) == k::Status::kOk);
        BOOST_REQUIRE(k::lora_size(in, out, copies, s.first_rank, &at) == k::Status::kOk);
        BOOST_CHECK(at.adapter >= at.full && s.break_even_rank < static_cast<double>(std::min(in, out)));
        if (s.first_rank == 1) continue;
        BOOST_REQUIRE(k::lora_size(in, out, copies, s.first_rank - 1, &below) == k::Status::kOk);
        BOOST_CHECK(below.adapter < below.full);
      }
    }
  }
  constexpr std::int64_t kBig = std::int64_t{1} << 40;
  BOOST_CHECK(k::lora_size(kBig, kBig, 1, 1, &s) == k::Status::kBadShape);
  BOOST_CHECK(k::lora_size(kBig, 1, kBig, 1, &s) == k::Status::kBadShape);
  BOOST_CHECK(k::lora_size(1, 1, 1, 0, &s) == k::Status::kBadShape);
  BOOST_CHECK(k::lora_size(1, 1, 1, 1, nullptr) == k::Status::kNullPointer);
  BOOST_CHECK(k::lora_scale(32, 16, false) == 2 && k::lora_scale(32, 16, true) == 8);
  BOOST_CHECK_CLOSE(k::lora_scale(16, 2, true), 16 / std::sqrt(2.0), 1e-13);
}

// ---- the update
// --------------------------------------------------------------------------------------------------------

struct Shape {
  std::int64_t rows, columns, rank;
};
constexpr Shape kShapes[] = {{1, 1, 1}, {1, 129, 8}, {384, 1, 3}, {7, 5, 9}, {33, 65, 16}, {160, 64, 64}, {2, 300, 1}};

BOOST_AUTO_TEST_CASE(products_agree_with_the_reference) {
  for (const Shape s : kShapes) {
    const Floats left = gaussians(s.rows * s.rank, 1), right = gaussians(s.rank * s.columns, 2);
    const k::LoraUpdate u{left.data(), right.data(), s.rows, s.columns, s.rank};
    const Doubles got = product_of(u);
    const at::Tensor l = tensor(left, {s.rows, s.rank}), r = tensor(right, {s.rank, s.columns});
    const Doubles want = doubles(l.matmul(r)), size = doubles(l.abs().matmul(r.abs()));
    for (std::size_t i = 0; i < got.size(); ++i)
      BOOST_CHECK_SMALL(got[i] - want[i], 2 * bounds::gamma(static_cast<double>(s.rank), kU) * size[i]);
    on_every_target([&] { BOOST_CHECK(same_bits(product_of(u), got)); });
  }
  const k::LoraUpdate none{nullptr, nullptr, 1, 1, 1};
  double out = 0;
  BOOST_CHECK(k::lora_product(none, &out) == k::Status::kNullPointer);
  BOOST_CHECK(k::lora_product({nullptr, nullptr, 0, 1, 1}, &out) == k::Status::kBadShape);
}

BOOST_AUTO_TEST_CASE(stacks_of_experts) {
  for (const std::int64_t experts : {1, 3, 144, 160, 384}) {
    const std::int64_t rank = 4, in = 6, out = 5;
    const Floats a = gaussians(rank * experts * in, 3), b = gaussians(out * rank * experts, 4);
    const at::Tensor ta = tensor(a, {rank * experts, in}), tb = tensor(b, {out, rank * experts});
    const Doubles want = doubles(ref::expert_updates(ta, tb, experts));
    const double bound =
        2 * bounds::gamma(rank, kU) * ref::expert_updates(ta.abs(), tb.abs(), experts).max().item<double>();
    for (const bool transposed : {false, true}) {
      k::LoraStack stack{a.data(), b.data(), in, out, rank, experts};
      stack.transposed = transposed;
      std::int64_t wrong_orders = 0;
      for (std::int64_t e = 0; e < experts; ++e) {
        const auto of_expert = [&] {
          Floats left(static_cast<std::size_t>(stack.rows() * rank)),
              right(static_cast<std::size_t>(rank * stack.columns()));
          BOOST_REQUIRE(k::lora_factors(stack, e, left.data(), right.data()) == k::Status::kOk);
          return product_of({left.data(), right.data(), stack.rows(), stack.columns(), rank});
        };
        const auto off = [&](const Doubles& got) {
          double worst = 0;
          for (std::int64_t o = 0; o < out; ++o) {
            for (std::int64_t i = 0; i < in; ++i) {
              const auto mine = static_cast<std::size_t>(transposed ? i * out + o : o * in + i);
              worst = std::max(worst, std::fabs(got[mine] - want[static_cast<std::size_t>((e * out + o) * in + i)]));
            }
          }
          return worst;
        };
        BOOST_CHECK_SMALL(off(of_expert()), bound);
        for (const bool of_a : {false, true}) {  // either index the wrong way round is another update
          (of_a ? stack.a_order : stack.b_order) = of_a ? StackOrder::kExpertFast : StackOrder::kExpertSlow;
          wrong_orders += off(of_expert()) > 0.1;
          stack.a_order = StackOrder::kExpertSlow, stack.b_order = StackOrder::kExpertFast;
        }
      }
      BOOST_CHECK(wrong_orders == (experts == 1 ? 0 : 2 * experts));
    }
  }
  const Floats one = {1};
  float left = 0, right = 0;
  const k::LoraStack stack{one.data(), one.data(), 1, 1, 1, 1};
  BOOST_CHECK(k::lora_factors(stack, 1, &left, &right) == k::Status::kBadShape);
  BOOST_CHECK(k::lora_factors({nullptr, one.data(), 1, 1, 1, 1}, 0, &left, &right) == k::Status::kNullPointer);
}

// ---- merges
// ------------------------------------------------------------------------------------------------------------

at::ScalarType torch_of(Float f) {
  return f == Float::kF64 ? at::kDouble : f == Float::kF32 ? at::kFloat : f == Float::kBF16 ? at::kBFloat16 : at::kHalf;
}

BOOST_AUTO_TEST_CASE(merges_round_where_they_say) {
  const std::int64_t rows = 19, columns = 37, rank = 8;
  const Floats left = sixty_fourths(rows * rank, 5), right = sixty_fourths(rank * columns, 6),
               weights = gaussians(rows * columns, 7);
  for (const Float stored : {Float::kF64, Float::kF32, Float::kBF16, Float::kF16}) {
    for (const Float delta : {Float::kF64, Float::kF32, Float::kBF16, Float::kF16}) {
      Doubles w(weights.size()), got(weights.size());
      for (std::size_t i = 0; i < w.size(); ++i) w[i] = k::round_to(0.02 * static_cast<double>(weights[i]), stored);
      const double scale = 7.0 / 3;
      k::LoraMergeArgs a{{left.data(), right.data(), rows, columns, rank}, w.data(), scale, {}};
      const Float wide = delta == Float::kF64 ? Float::kF64 : Float::kF32;
      a.dtypes = {Float::kF64, wide, wide, delta, stored == Float::kF64 ? Float::kF64 : Float::kF32, stored};
      for (const bool unmerge : {false, true}) {
        BOOST_REQUIRE(k::lora_merge(a, unmerge, got.data()) == k::Status::kOk);
        const at::Tensor wt = at::from_blob(w.data(), {rows, columns}, at::kDouble);
        BOOST_CHECK(
            same_bits(got, doubles(ref::lora_merge(wt, tensor(right, {rank, columns}), tensor(left, {rows, rank}),
                                                   scale, torch_of(wide), torch_of(wide), torch_of(delta),
                                                   torch_of(a.dtypes.sum), torch_of(stored), unmerge))));
      }
      const Doubles first = got;
      on_every_target([&] {
        BOOST_REQUIRE(k::lora_merge(a, true, got.data()) == k::Status::kOk);
        BOOST_CHECK(same_bits(got, first));
      });
      k::LoraMergeArgs in_place = a;
      got = w;
      in_place.w = got.data();
      BOOST_REQUIRE(k::lora_merge(in_place, true, got.data()) == k::Status::kOk);
      BOOST_CHECK(same_bits(got, first));
    }
  }
}

k::MergeLoss loss_of(const Doubles& w, const Floats& left, const Floats& right, double scale, Float stored,
                     Float delta = Float::kF64) {
  const auto rows = static_cast<std::int64_t>(left.size()), columns = static_cast<std::int64_t>(right.size());
  k::LoraMergeArgs a{{left.data(), right.data(), rows, columns, 1}, w.data(), scale, {}};
  a.dtypes.stored = stored, a.dtypes.delta = delta;
  k::MergeLoss loss;
  BOOST_REQUIRE(k::lora_merge_loss(a, a.dtypes, &loss) == k::Status::kOk);
  return loss;
}

BOOST_AUTO_TEST_CASE(what_a_merge_loses) {
  const Doubles ones(12, 1.0);
  const Floats left(3, 1.0f), right(4, 1.0f);
  // bfloat16 has steps of 2^-7 above 1 and 2^-8 below it. Half a step up is a tie, to the even 1: nothing arrives, and
  // taking it out again goes a whole step down.
  k::MergeLoss l = loss_of(ones, left, right, 0x1p-8, Float::kBF16);
  BOOST_CHECK(l.elements == 12 && l.changed == 0 && l.swallowed == 12 && l.not_restored == 12);
  BOOST_CHECK(l.delta_squares == 12 * 0x1p-16 && l.moved_squares == 0 && l.dot == 0 && l.error_squares == 12 * 0x1p-16);
  // Three quarters of a step: a whole one arrives. Back down it goes to 1 + 2^-9, which is 1.
  l = loss_of(ones, left, right, 0.75 * 0x1p-7, Float::kBF16);
  BOOST_CHECK(l.changed == 12 && l.swallowed == 0 && l.not_restored == 0);
  BOOST_CHECK_CLOSE(l.dot / l.delta_squares, 4.0 / 3, 1e-12);
  BOOST_CHECK_CLOSE(std::sqrt(l.moved_squares / l.delta_squares), 4.0 / 3, 1e-12);
  BOOST_CHECK_CLOSE(l.error_squares, 12 * 0x1p-18, 1e-12);
  // A large update takes the weight's last bits along: 1 + 2^-7 + 256 is 257 or 256, and back 1 or 0.
  const Doubles more(12, 1.0 + 0x1p-7);
  l = loss_of(more, left, right, 256, Float::kBF16);
  BOOST_CHECK(l.changed == 12 && l.not_restored == 12);
  // float64 loses nothing of a sum that fits, and no update changes nothing.
  l = loss_of(more, left, right, 256, Float::kF64);
  BOOST_CHECK(l.changed == 12 && l.not_restored == 0 && l.error_squares == 0 && l.dot == l.delta_squares);
  l = loss_of(more, left, right, 0, Float::kBF16);
  BOOST_CHECK(l.changed == 0 && l.swallowed == 0 && l.delta_squares == 0);
  // An update in bfloat16 that is subtracted in float32: what PEFT's unmerge does after a merge in float32.
  k::LoraMergeArgs a{{left.data(), right.data(), 3, 4, 1}, ones.data(), 1.0 / 3, {}};
  a.dtypes = k::peft_dtypes(Float::kF32, Float::kF32, k::PeftLayer::kLinear, true, k::PeftCall::kMerge);
  k::MergeDtypes back = a.dtypes;
  back.delta = Float::kBF16;
  BOOST_REQUIRE(k::lora_merge_loss(a, back, &l) == k::Status::kOk);
  BOOST_CHECK(l.not_restored == 12);
  // What is not finite, and denormals.
  const double inf = std::numeric_limits<double>::infinity();
  const Doubles odd = {inf, -inf, std::nan(""), 5e-324, 1.0, 3e38, 0.0, -0.0, 1e-40, 2.0, 3.0, 4.0};
  l = loss_of(odd, left, right, 3e38, Float::kF32);
  BOOST_CHECK(l.elements == 12 && l.changed == 8 && std::isfinite(l.delta_squares));  // 6e38 is infinity in float32
  l = loss_of({5e-324, 0, 0, 0}, {1}, {1, 1, 1, 1}, 5e-324, Float::kF64);
  BOOST_CHECK(l.changed == 4 && l.not_restored == 0);
  BOOST_CHECK(k::lora_merge_loss({{left.data(), right.data(), 3, 4, 1}, nullptr, 1, {}}, {}, &l) ==
              k::Status::kNullPointer);
}

BOOST_AUTO_TEST_CASE(losses_agree_with_sums_of_libtorch) {
  for (const Shape s : kShapes) {
    const Floats left = gaussians(s.rows * s.rank, 1), right = gaussians(s.rank * s.columns, 2),
                 weights = gaussians(s.rows * s.columns, 3);
    Doubles w(weights.size()), m(weights.size());
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = k::round_to(static_cast<double>(weights[i]), Float::kBF16);
    k::LoraMergeArgs a{{left.data(), right.data(), s.rows, s.columns, s.rank}, w.data(), 0.003, {}};
    a.dtypes.stored = Float::kBF16;
    k::MergeLoss got, first;
    BOOST_REQUIRE(k::lora_merge(a, false, m.data()) == k::Status::kOk);
    BOOST_REQUIRE(k::lora_merge_loss(a, a.dtypes, &first) == k::Status::kOk);
    const Doubles product = product_of(a.update);
    const auto t = [](const Doubles& v) {
      return at::from_blob(const_cast<double*>(v.data()), {static_cast<std::int64_t>(v.size())}, at::kDouble);
    };
    const at::Tensor moved = t(m) - t(w), delta = t(product) * 0.003, error = moved - delta;
    BOOST_CHECK(first.elements == s.rows * s.columns && first.changed == moved.ne(0).sum().item<std::int64_t>());
    BOOST_CHECK(first.swallowed == (moved.eq(0) & delta.ne(0)).sum().item<std::int64_t>());
    const auto near = [&](double value, const at::Tensor& terms) {
      BOOST_CHECK_SMALL(value - terms.sum().item<double>(),
                        2 * bounds::sum_in_any_order(terms.numel(), 1, terms.abs().sum().item<double>()));
    };
    near(first.delta_squares, delta * delta);
    near(first.moved_squares, moved * moved);
    near(first.dot, moved * delta);
    near(first.error_squares, error * error);
    on_every_target([&] {
      BOOST_REQUIRE(k::lora_merge_loss(a, a.dtypes, &got) == k::Status::kOk);
      BOOST_CHECK(std::memcmp(&got, &first, sizeof got) == 0);
    });
  }
}

// ---- gradients
// ---------------------------------------------------------------------------------------------------------

struct Gradient {
  Doubles a, b, x;
};
Gradient gradient_of(const k::LoraGradientArgs& g) {
  Gradient r{Doubles(static_cast<std::size_t>(g.rank * g.in), -7),
             Doubles(static_cast<std::size_t>(g.out * g.rank), -7),
             Doubles(static_cast<std::size_t>(std::max<std::int64_t>(1, g.tokens * g.in)), -7)};
  BOOST_REQUIRE(k::lora_gradient(g, {r.a.data(), r.b.data(), r.x.data()}) == k::Status::kOk);
  return r;
}

BOOST_AUTO_TEST_CASE(gradients_are_those_of_autograd) {
  struct Case {
    std::int64_t tokens, in, out, rank;
  };
  for (const Case c : {Case{1, 1, 1, 1}, {1, 33, 7, 4}, {50, 64, 48, 16}, {7, 5, 160, 9}, {3, 100, 1, 1}}) {
    const Floats x = gaussians(c.tokens * c.in, 1), dy = gaussians(c.tokens * c.out, 2),
                 a = gaussians(c.rank * c.in, 3), b = gaussians(c.out * c.rank, 4), w = gaussians(c.out * c.in, 5);
    const double scale = 1.7;
    const k::LoraGradientArgs args{x.data(), dy.data(), a.data(), b.data(), c.tokens, c.in, c.out, c.rank, scale};
    const Gradient got = gradient_of(args);
    at::Tensor xt = tensor(x, {c.tokens, c.in}).set_requires_grad(true),
               at = tensor(a, {c.rank, c.in}).set_requires_grad(true),
               bt = tensor(b, {c.out, c.rank}).set_requires_grad(true);
    const at::Tensor wt = tensor(w, {c.out, c.in}), dyt = tensor(dy, {c.tokens, c.out});
    (ref::lora_forward(xt, wt, at, bt, scale) * dyt).sum().backward();
    const at::Tensor through_w = dyt.matmul(wt);  // the frozen matrix' part of the gradient to x
    // Every element is a sum of products of four numbers; both sides round each of its terms and partial sums.
    const auto check = [&](const Doubles& mine, const at::Tensor& theirs, const at::Tensor& size, double terms) {
      const Doubles want = doubles(theirs), bound = doubles(size);
      for (std::size_t i = 0; i < want.size(); ++i)
        BOOST_CHECK_SMALL(mine[i] - want[i], 2 * bounds::gamma(terms, kU) * bound[i]);
    };
    const at::Tensor h = xt.detach().abs().matmul(at.detach().abs().t()), back = dyt.abs().matmul(bt.detach().abs());
    const double n = static_cast<double>(c.tokens + c.in + c.out + c.rank) + 4;
    check(got.a, at.grad(), back.t().matmul(xt.detach().abs()) * scale, n);
    check(got.b, bt.grad(), dyt.abs().t().matmul(h) * scale, n);
    check(got.x, xt.grad() - through_w, back.matmul(at.detach().abs()) * scale + dyt.abs().matmul(wt.abs()), n);
    on_every_target([&] {
      const Gradient again = gradient_of(args);
      BOOST_CHECK(same_bits(again.a, got.a) && same_bits(again.b, got.b) && same_bits(again.x, got.x));
    });
    // y is linear in A and in B: a difference of 1 in one entry is the gradient itself.
    const at::Tensor x0 = xt.detach(), a0 = at.detach(), b0 = bt.detach();
    const auto sum_of = [&](const at::Tensor& aa, const at::Tensor& bb) {
      return (ref::lora_forward(x0, wt, aa, bb, scale) * dyt).sum().item<double>();
    };
    at::Tensor moved = a0.clone();
    moved[c.rank - 1][c.in / 2] += 1;
    const double size = (dyt.abs().matmul(wt.abs()) * x0.abs()).sum().item<double>() +
                        (back.abs() * h).sum().item<double>() * scale + 1;
    BOOST_CHECK_SMALL(
        sum_of(moved, b0) - sum_of(a0, b0) - got.a[static_cast<std::size_t>((c.rank - 1) * c.in + c.in / 2)],
        16 * bounds::gamma(n, kU) * size);
    moved = b0.clone();
    moved[c.out / 2][0] += 1;
    BOOST_CHECK_SMALL(sum_of(a0, moved) - sum_of(a0, b0) - got.b[static_cast<std::size_t>(c.out / 2 * c.rank)],
                      16 * bounds::gamma(n, kU) * size);
  }
  // At the start B is zero: A does not move, and x sees nothing. No tokens: no gradient.
  const Floats x = gaussians(12, 1), zeros(8, 0.0f), a = gaussians(6, 3);
  Gradient r = gradient_of({x.data(), x.data(), a.data(), zeros.data(), 4, 3, 3, 2, 1.0});
  BOOST_CHECK(r.a == Doubles(6, 0.0) && r.x == Doubles(12, 0.0) && r.b != Doubles(6, 0.0));
  r = gradient_of({nullptr, nullptr, a.data(), a.data(), 0, 3, 3, 2, 1.0});
  BOOST_CHECK(r.a == Doubles(6, 0.0) && r.b == Doubles(6, 0.0));
  double out[6];
  BOOST_CHECK(k::lora_gradient({nullptr, x.data(), a.data(), a.data(), 4, 3, 3, 2, 1.0}, {out, out, nullptr}) ==
              k::Status::kNullPointer);
  BOOST_CHECK(k::lora_gradient({x.data(), x.data(), a.data(), a.data(), 4, 3, 0, 2, 1.0}, {out, out, nullptr}) ==
              k::Status::kBadShape);
}

// ---- PEFT
// --------------------------------------------------------------------------------------------------------------

const Node& at(const Node& node, const char* key) {
  const Node* found = node.find(key);
  BOOST_REQUIRE_MESSAGE(found != nullptr, "no " << key);
  return *found;
}
std::int64_t integer(const Node& node, const char* key) { return at(node, key).as_int().value(); }
Float float_of(const std::string& name) {
  for (const Float f : {Float::kF32, Float::kBF16, Float::kF16}) {
    if (k::name_of(f) == name) return f;
  }
  BOOST_FAIL("dtype " << name);
  return Float::kF64;
}
Floats values(const Node& node, const char* key, Float dtype) {
  const std::string& text = *at(node, key).as_string();
  const std::size_t digits = dtype == Float::kF32 ? 8 : 4;
  Floats out;
  for (std::size_t i = 0; i + digits <= text.size(); i += digits) {
    std::uint32_t bits = 0;
    for (std::size_t b = 0; b < digits; b += 2)
      bits |= static_cast<std::uint32_t>(std::stoi(text.substr(i + b, 2), nullptr, 16)) << 4 * b;
    out.push_back(dtype == Float::kF16 ? k::f16_value(bits)
                                       : std::bit_cast<float>(dtype == Float::kBF16 ? bits << 16 : bits));
  }
  return out;
}

BOOST_AUTO_TEST_CASE(peft_merges_and_unmerges) {
  std::string text, error;
  BOOST_REQUIRE_MESSAGE(moeaudit::read_file(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/lora.json", &text, &error), error);
  Node root;
  moeaudit::TextError where;
  BOOST_REQUIRE_MESSAGE(moeaudit::parse_json(text, &root, nullptr, &where), where.what);
  int seen = 0, stacks = 0, swapped = 0, not_restored = 0, unlike = 0;
  const Node& releases = at(root, "releases");
  for (std::size_t r = 0; r < releases.keys.size(); ++r) {
    const std::string& release = releases.keys[r];
    const bool before_0_19 = release.find("peft 0.18") != std::string::npos;
    for (const Node& c : releases.items[r].items) {
      const std::string model = *at(c, "model").as_string(),
                        what = release + ": " + model + " " + *at(c, "module").as_string();
      const Float stored = float_of(*at(c, "stored").as_string()), adapter = float_of(*at(c, "adapter").as_string());
      const Floats a = values(c, "a", adapter), b = values(c, "b", adapter), w = values(c, "w", stored),
                   merged = values(c, "merged", stored), unmerged = values(c, "unmerged", stored),
                   safe_merged = values(c, "safe_merged", stored);
      k::LoraStack stack{a.data(), b.data(), 0, 0, integer(c, "rank"), integer(c, "copies")};
      stack.in = at(c, "a_shape").items[1].as_int().value(), stack.out = at(c, "b_shape").items[0].as_int().value();
      const bool is_stack = stack.copies > 1;
      const k::PeftLayer layer = is_stack                                          ? k::PeftLayer::kStack
                                 : *at(c, "wrapper").as_string() == "ParamWrapper" ? k::PeftLayer::kParameter
                                                                                   : k::PeftLayer::kLinear;
      // gpt-oss is [E, in, out]; PEFT before 0.19 takes every stack for that.
      stack.transposed = is_stack && (before_0_19 || model == "gpt_oss");
      swapped += is_stack && stack.transposed && model != "gpt_oss";
      const auto& shape = at(c, "shape").items;
      BOOST_REQUIRE_MESSAGE(
          shape[shape.size() - 2].as_int() == stack.rows() && shape.back().as_int() == stack.columns(), what);
      const double scale =
          k::lora_scale(at(c, "alpha").as_double().value(), stack.rank, at(c, "rslora").as_bool().value());
      BOOST_CHECK(scale == at(c, "scale").as_double().value());
      const std::int64_t each = stack.rows() * stack.columns();
      for (std::int64_t e = 0; e < stack.copies; ++e) {
        Floats left(static_cast<std::size_t>(stack.rows() * stack.rank)),
            right(static_cast<std::size_t>(stack.rank * stack.columns()));
        BOOST_REQUIRE(k::lora_factors(stack, e, left.data(), right.data()) == k::Status::kOk);
        const Doubles mine(w.begin() + e * each, w.begin() + (e + 1) * each);
        Doubles there(mine.size()), back(mine.size());
        k::LoraMergeArgs args{
            {left.data(), right.data(), stack.rows(), stack.columns(), stack.rank}, mine.data(), scale, {}};
        args.dtypes = k::peft_dtypes(adapter, stored, layer, true, k::PeftCall::kMerge);
        BOOST_REQUIRE(k::lora_merge(args, false, there.data()) == k::Status::kOk);
        k::LoraMergeArgs safe = args;
        Doubles safely(mine.size());
        safe.dtypes = k::peft_dtypes(adapter, stored, layer, true, k::PeftCall::kSafeMerge);
        BOOST_REQUIRE(k::lora_merge(safe, false, safely.data()) == k::Status::kOk);
        BOOST_CHECK_MESSAGE(
            same_bits(safely, Doubles(safe_merged.begin() + e * each, safe_merged.begin() + (e + 1) * each)),
            what << " merged safely");
        unlike += safely != there;
        k::LoraMergeArgs undo = args;
        undo.w = there.data(), undo.dtypes = k::peft_dtypes(adapter, stored, layer, true, k::PeftCall::kUnmerge);
        BOOST_REQUIRE(k::lora_merge(undo, true, back.data()) == k::Status::kOk);
        BOOST_CHECK_MESSAGE(same_bits(there, Doubles(merged.begin() + e * each, merged.begin() + (e + 1) * each)),
                            what << " merged");
        BOOST_CHECK_MESSAGE(same_bits(back, Doubles(unmerged.begin() + e * each, unmerged.begin() + (e + 1) * each)),
                            what << " un-merged");
        k::MergeLoss loss;
        BOOST_REQUIRE(k::lora_merge_loss(args, undo.dtypes, &loss) == k::Status::kOk);
        std::int64_t differ = 0;
        for (std::size_t i = 0; i < mine.size(); ++i)
          differ += unmerged[static_cast<std::size_t>(e * each) + i] != static_cast<float>(mine[i]);
        BOOST_CHECK_MESSAGE(loss.not_restored == differ, what);
        not_restored += static_cast<int>(differ);
      }
      stacks += is_stack;
      ++seen;
    }
  }
  BOOST_CHECK(seen == 96 && stacks == 48 && swapped == 8);
  BOOST_CHECK(not_restored > 0 && unlike > 0);
}

}  // namespace

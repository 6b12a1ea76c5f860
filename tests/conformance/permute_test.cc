// Permute and combine: kernels/host against reference/, gradients against autograd; what a permutation is.
#define BOOST_TEST_MODULE permute
#include "kernels/host/permute.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <bit>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/dispatch.h"
#include "kernels/host/gaussian.h"
#include "reference/permute.h"
#include "tests/support/compare.h"
#include "tests/support/tensors.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
namespace bounds = moeaudit::kernels::bounds;
using moeaudit::test::compare;
using moeaudit::test::tensor;
using moeaudit::test::values;
using Doubles = std::vector<double>;
using Ids = std::vector<std::int32_t>;
using Longs = std::vector<std::int64_t>;

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Shape {
  std::int64_t tokens, experts, k;
  enum { kSpread, kOneExpert, kNoneAtAll } how = kSpread;
};
const Shape kShapes[] = {{1, 1, 1},
                         {1, 8, 8},
                         {16, 8, 2},
                         {0, 4, 2},
                         {33, 60, 4},
                         {40, 144, 6},
                         {30, 160, 32},
                         {50, 384, 1},
                         {64, 8, 1, Shape::kOneExpert},
                         {9, 4, 2, Shape::kNoneAtAll}};

Ids choices(const Shape& s) {
  Ids chosen;
  for (std::int64_t i = 0; i < s.tokens * s.k; ++i) {
    const std::int64_t t = i / s.k, j = i % s.k;
    if (s.how == Shape::kNoneAtAll || (s.tokens > 1 && i % 9 == 4)) {
      chosen.push_back(-1 - static_cast<std::int32_t>(i));  // any negative id
    } else if (s.how == Shape::kOneExpert) {
      chosen.push_back(5);
    } else {
      chosen.push_back(static_cast<std::int32_t>((t * t + 3 * t / 2 + j) % s.experts));
    }
  }
  return chosen;
}

struct Permuted {
  Longs offsets;
  Ids slot_of_row, row_of_slot;
  k::Status status;
  k::Permutation view() { return {offsets.data(), slot_of_row.data(), row_of_slot.data()}; }
};
Permuted permute(const Shape& s, const Ids& chosen, const Ids& place = {}, std::int64_t capacity = 0) {
  k::PermuteArgs a;
  a.chosen = chosen.data(), a.tokens = s.tokens, a.experts = s.experts, a.top_k = s.k;
  if (!place.empty()) a.place = place.data(), a.capacity = capacity;
  Permuted p;
  p.offsets.assign(static_cast<std::size_t>(s.experts + 1), -7);
  p.slot_of_row.assign(static_cast<std::size_t>(k::permuted_rows(a)) + 1, -7);
  p.row_of_slot.assign(chosen.size() + 1, -7);
  p.status = k::permute(a, p.view());
  p.slot_of_row.pop_back();
  p.row_of_slot.pop_back();
  return p;
}

Doubles gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  k::unit_gaussians(9, stream, 0, n, g.data());
  return {g.begin(), g.end()};
}
at::Tensor tensor(const Ids& v, std::vector<std::int64_t> shape) {
  return at::from_blob(const_cast<std::int32_t*>(v.data()), shape, at::kInt).to(at::kLong);
}

BOOST_AUTO_TEST_CASE(rows_are_those_of_the_reference) {
  for (const Shape& s : kShapes) {
    const Ids chosen = choices(s);
    const Permuted p = permute(s, chosen);
    BOOST_REQUIRE(p.status == k::Status::kOk);
    BOOST_CHECK(p.offsets.front() == 0);
    if (s.tokens > 0) {
      const Doubles want = values(ref::permute(tensor(chosen, {s.tokens, s.k})));
      BOOST_CHECK(Doubles(p.row_of_slot.begin(), p.row_of_slot.end()) == want);
    }
    // Both directions are one permutation; every row lies in the run of its expert; the rest is empty.
    std::int64_t full = 0;
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      if (chosen[i] < 0) continue;
      ++full;
      const auto row = static_cast<std::size_t>(p.row_of_slot[i]), e = static_cast<std::size_t>(chosen[i]);
      BOOST_CHECK(p.slot_of_row[row] == static_cast<std::int32_t>(i));
      BOOST_CHECK(p.row_of_slot[i] >= p.offsets[e] && p.row_of_slot[i] < p.offsets[e + 1]);
    }
    BOOST_CHECK(p.offsets.back() == full);
    for (std::size_t r = static_cast<std::size_t>(full); r < p.slot_of_row.size(); ++r)
      BOOST_CHECK(p.slot_of_row[r] == -1);
  }
}

/// [E, C, d]: dropped choices go nowhere, kept ones to their place.
BOOST_AUTO_TEST_CASE(padded_to_the_capacity) {
  for (const Shape& s : kShapes) {
    for (const std::int64_t capacity : {0, 1, 3, 70}) {
      const Ids chosen = choices(s);
      Ids place(chosen.size() + 1);
      Longs kept(static_cast<std::size_t>(s.experts));
      k::DropArgs<double> d;
      d.chosen = chosen.data(), d.tokens = s.tokens, d.experts = s.experts, d.top_k = s.k, d.capacity = capacity;
      d.order = k::DropOrder::kTokens;
      BOOST_REQUIRE(k::drop(d, {place.data(), nullptr, kept.data(), nullptr, nullptr}) == k::Status::kOk);
      const Permuted p = permute(s, chosen, place, capacity);
      BOOST_REQUIRE(p.status == k::Status::kOk);
      std::int64_t full = 0, all = 0;
      for (const std::int32_t slot : p.slot_of_row) full += slot >= 0;
      for (std::int64_t n : kept) all += n;
      BOOST_CHECK(full == all);
      for (std::int64_t e = 0; e <= s.experts; ++e) BOOST_CHECK(p.offsets[static_cast<std::size_t>(e)] == e * capacity);
      for (std::size_t i = 0; i < chosen.size(); ++i) {
        const bool in = chosen[i] >= 0 && place[i] >= 0;
        BOOST_CHECK(p.row_of_slot[i] == (in ? chosen[i] * static_cast<std::int32_t>(capacity) + place[i] : -1));
      }
      if (capacity != 70) continue;  // nothing dropped, in token order: place + first row is the row without padding
      const Permuted close = permute(s, chosen);
      for (std::size_t i = 0; i < chosen.size(); ++i) {
        if (chosen[i] >= 0)
          BOOST_CHECK(close.row_of_slot[i] == close.offsets[static_cast<std::size_t>(chosen[i])] + place[i]);
      }
    }
  }
}

template <class T>
constexpr k::Float kStored = sizeof(T) == 8   ? k::Float::kF64
                             : sizeof(T) == 4 ? k::Float::kF32
                                              : k::Float::kBF16;
template <class T>
constexpr k::Float kSums = kStored<k::Wide<T>>;

/// Values of T, as T and as doubles.
template <class T>
struct Both {
  std::vector<T> own;
  Doubles wide;
  explicit Both(const Doubles& v) {
    for (const double d : v) {
      own.push_back(k::narrow<T>(d));
      wide.push_back(static_cast<double>(k::widen(own.back())));
    }
  }
};
template <class T>
Doubles doubles(const std::vector<T>& v) {
  Doubles out;
  for (const T& x : v) out.push_back(static_cast<double>(k::widen(x)));
  return out;
}

void check(const Doubles& want, const Doubles& got, const Doubles& bound, const std::string& what) {
  if (want.empty()) return;
  moeaudit::test::CompareOptions o;
  o.bound = [&](std::size_t i, double) { return bound[i]; };
  const auto n = static_cast<std::int64_t>(want.size());
  const auto c = compare({{n}, want}, {{static_cast<std::int64_t>(got.size())}, got}, o);
  BOOST_CHECK_MESSAGE(c.ok(), what << "\n" << c.report());
}

template <class T>
void combine_agrees(const Shape& s, std::int64_t hidden, double scale) {
  const Ids chosen = choices(s);
  Permuted p = permute(s, chosen);
  const std::int64_t slots = s.tokens * s.k;
  const k::RowShape shape{s.tokens, s.k, slots, hidden};
  const std::string what = std::to_string(s.tokens) + "x" + std::to_string(s.experts) + "/" + std::to_string(s.k) +
                           " hidden " + std::to_string(hidden) + " of " + k::name_of(kStored<T>);
  Doubles start = gaussians(slots * hidden, 1), upstream = gaussians(s.tokens * hidden, 3);
  for (double& v : start) v *= scale;
  const Both<T> rows(start), d_y(upstream), x(gaussians(s.tokens * hidden, 4));
  const Both<k::Wide<T>> weights(gaussians(slots, 2));
  std::vector<T> y(d_y.own.size()), d_rows(rows.own.size()), d_x(y.size()), gathered(rows.own.size());
  std::vector<k::Wide<T>> d_weights(weights.own.size());
  BOOST_REQUIRE(k::combine(p.view(), shape, rows.own.data(), weights.own.data(), y.data()) == k::Status::kOk);
  BOOST_REQUIRE(k::combine_backward(p.view(), shape, rows.own.data(), weights.own.data(), d_y.own.data(), d_rows.data(),
                                    d_weights.data()) == k::Status::kOk);
  BOOST_REQUIRE(k::gather(p.view(), shape, x.own.data(), gathered.data()) == k::Status::kOk);
  BOOST_REQUIRE(k::combine(p.view(), shape, rows.own.data(), static_cast<k::Wide<T>*>(nullptr), d_x.data()) ==
                k::Status::kOk);
  if (slots == 0) return;
  const at::Tensor row_of_slot = tensor(p.row_of_slot, {s.tokens, s.k});
  at::Tensor r = tensor(rows.wide, {slots, hidden}), w = tensor(weights.wide, {s.tokens, s.k});
  r.set_requires_grad(true), w.set_requires_grad(true);
  const at::Tensor out = ref::combine(r, row_of_slot, w), up = tensor(d_y.wide, {s.tokens, hidden});
  (out * up).sum().backward();
  const at::Tensor ones = at::ones({s.tokens, s.k}, at::kDouble);
  const auto bound = [&](const at::Tensor& want, const at::Tensor& absolute, std::int64_t terms, double additions,
                         k::Float stored) {
    Doubles b = values(absolute), v = values(want);
    for (std::size_t i = 0; i < b.size(); ++i) {
      const double sum = bounds::sum_of_products(terms, additions, b[i], kSums<T>) +
                         bounds::sum_in_any_order(terms, 1, b[i]);  // the reference's own
      b[i] = bounds::rounded(v[i], sum, stored);
    }
    return b;
  };
  const c10::NoGradGuard guard;
  check(values(out), doubles(y),
        bound(out, ref::combine(r.abs(), row_of_slot, w.abs()), s.k, bounds::combine_additions(s.k), kStored<T>),
        what + " y");
  const at::Tensor sums = ref::combine(r, row_of_slot, ones);
  check(values(sums), doubles(d_x),
        bound(sums, ref::combine(r.abs(), row_of_slot, ones), s.k, bounds::combine_additions(s.k), kStored<T>),
        what + " gradient of gather");
  const at::Tensor spread = r.grad().abs();  // one product each
  check(values(r.grad()), doubles(d_rows), bound(r.grad(), spread, 1, 0, kStored<T>), what + " d rows");
  const at::Tensor moved = r.index_select(0, row_of_slot.clamp_min(0).reshape({-1})).reshape({s.tokens, s.k, hidden});
  const at::Tensor absolute = (moved.abs() * up.abs().unsqueeze(1)).sum(2) * row_of_slot.ge(0).to(at::kDouble);
  check(values(w.grad()), doubles(d_weights),
        bound(w.grad(), absolute, hidden, bounds::lane_additions(hidden), kSums<T>), what + " d weights");
  for (std::size_t i = 0; i < gathered.size(); ++i) {
    const std::int32_t slot = p.slot_of_row[i / static_cast<std::size_t>(hidden)];
    const double want =
        slot < 0 ? 0.0 : x.wide[static_cast<std::size_t>(slot / s.k * hidden) + i % static_cast<std::size_t>(hidden)];
    BOOST_CHECK(static_cast<double>(k::widen(gathered[i])) == want);
  }
}

BOOST_AUTO_TEST_CASE(combine_agrees_with_the_reference_and_its_gradients_with_autograd) {
  for (const Shape& s : kShapes) {
    for (const std::int64_t hidden : {1, 33, 80}) {
      combine_agrees<float>(s, hidden, 1);
      combine_agrees<double>(s, hidden, 1);
      combine_agrees<k::BFloat16>(s, hidden, 1);
    }
    combine_agrees<float>(s, 16, 1e-38);  // products below the smallest normal number
    combine_agrees<double>(s, 16, 1e-308);
  }
}

/// Storing bfloat16: to nearest, ties to even, as torch has it; from float64 in one step.
BOOST_AUTO_TEST_CASE(bfloat16_as_torch_rounds_it) {
  std::uint32_t bits = 1;
  std::vector<float> v;
  for (int i = 0; i < 200000; ++i) {
    bits = bits * 1664525u + 1013904223u;
    const std::uint32_t tie = i % 3 == 0 ? (bits & 0xffff0000u) | 0x8000u : bits;  // a third of them half way
    v.push_back(std::bit_cast<float>(tie));
  }
  for (const float x : {0.0f, -0.0f, 1e-45f, 3.39e38f, 3.4e38f, std::numeric_limits<float>::infinity(), std::nanf("")})
    v.push_back(x);
  const at::Tensor stored =
      at::from_blob(v.data(), {static_cast<std::int64_t>(v.size())}, at::kFloat).to(at::kBFloat16).to(at::kFloat);
  std::size_t differ = 0;
  for (std::size_t i = 0; i < v.size(); ++i) {
    const float want = stored.data_ptr<float>()[i], got = k::widen(k::narrow<k::BFloat16>(v[i])),
                wide = k::widen(k::narrow<k::BFloat16>(static_cast<double>(v[i])));
    const auto same = [](float a, float b) {
      return (a != a && b != b) || std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
    };
    differ += !same(want, got) || !same(want, wide);
  }
  BOOST_TEST(differ == 0u);
  // 1 + 2^-8 + 2^-40 lies above half way; by way of float32 it would be the tie, and go down to 1.
  BOOST_TEST(k::widen(k::narrow<k::BFloat16>(1 + std::ldexp(1, -8) + std::ldexp(1, -40))) == 1.0078125f);
}

/// Sums run in the order of rank: 1e8 + 1 - 1e8 is 0 in float32 only if the ranks come in this order.
BOOST_AUTO_TEST_CASE(sums_run_in_the_order_of_rank) {
  const Shape s{1, 3, 3};
  Permuted p = permute(s, {2, 0, 1});
  const std::vector<float> rows = {1, -1e8f, 1e8f}, weights = {1, 1, 1};  // of experts 0, 1, 2
  float y = 7;
  BOOST_REQUIRE(k::combine(p.view(), {1, 3, 3, 1}, rows.data(), weights.data(), &y) == k::Status::kOk);
  BOOST_TEST(y == 0.0f);
  Permuted q = permute(s, {2, 1, 0});
  BOOST_REQUIRE(k::combine(q.view(), {1, 3, 3, 1}, rows.data(), weights.data(), &y) == k::Status::kOk);
  BOOST_TEST(y == 1.0f);
}

/// A choice that goes nowhere adds nothing, whatever its weight; infinities and NaN of the others come through.
BOOST_AUTO_TEST_CASE(what_is_not_finite) {
  const Shape s{3, 2, 2};
  Permuted p = permute(s, {0, -1, 1, 0, 1, 0});
  const Doubles weights = {1, std::nan(""), kInf, 1, 1, 0};
  const Doubles rows = {2, 3, kInf, 4, std::nan("")};  // expert 0: tokens 0, 1, 2; expert 1: tokens 1, 2
  Doubles y(3), d_rows(6), d_weights(6);
  const k::RowShape shape{3, 2, 6, 1};
  BOOST_REQUIRE(p.offsets == (Longs{0, 3, 5}));
  Doubles all = rows;
  all.push_back(5);  // the empty row
  BOOST_REQUIRE(k::combine(p.view(), shape, all.data(), weights.data(), y.data()) == k::Status::kOk);
  BOOST_TEST(y[0] == 2.0);
  BOOST_TEST(y[1] == kInf);
  BOOST_CHECK(y[2] != y[2]);
  const Doubles ones(3, 1.0);
  BOOST_REQUIRE(k::combine_backward(p.view(), shape, all.data(), weights.data(), ones.data(), d_rows.data(),
                                    d_weights.data()) == k::Status::kOk);
  BOOST_TEST(d_weights[1] == 0.0);
  BOOST_TEST(d_rows[5] == 0.0);
}

BOOST_AUTO_TEST_CASE(refusals) {
  const Shape s{2, 4, 2};
  BOOST_CHECK(permute(s, {0, 1, 2, 4}).status == k::Status::kBadShape);
  BOOST_CHECK(permute(s, {0, 1, 2, 3}, {0, 0, 0, 5}, 5).status == k::Status::kBadShape);
  BOOST_CHECK(permute(s, {0, 1, 0, 3}, {1, 0, 1, 0}, 2).status == k::Status::kBadShape);  // one place twice
  BOOST_CHECK(permute({2, 4, 0}, {}).status == k::Status::kBadTopK);
  k::PermuteArgs a;
  a.tokens = 2, a.experts = 4, a.top_k = 2;
  BOOST_CHECK(k::permute(a, {}) == k::Status::kNullPointer);
  a.tokens = std::int64_t{1} << 31;
  BOOST_CHECK(k::permute(a, {}) == k::Status::kBadShape);
  BOOST_CHECK(k::gather({}, {1, 1, 1, 1}, static_cast<float*>(nullptr), nullptr) == k::Status::kNullPointer);
  BOOST_CHECK(k::gather({}, {-1, 1, 0, 1}, static_cast<float*>(nullptr), nullptr) == k::Status::kBadShape);
}

}  // namespace

// Grouped matrix products: kernels/host against LibTorch's matmul in float64, expert by expert, within bounds.h; the
// order of the sums, term by term; what belongs to nobody stays as it is.
#define BOOST_TEST_MODULE grouped_gemm
#include "kernels/host/grouped_gemm.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "tests/support/compare.h"
#include "tests/support/tensors.h"

namespace {

namespace k = moeaudit::kernels;
namespace bounds = moeaudit::kernels::bounds;
using moeaudit::test::tensor;
using moeaudit::test::values;
namespace test = moeaudit::test;
using Doubles = std::vector<double>;
using Longs = std::vector<std::int64_t>;
using k::GroupedProduct;

constexpr double kInf = std::numeric_limits<double>::infinity();

template <class T>
constexpr k::Float kStored = sizeof(T) == 8   ? k::Float::kF64
                             : sizeof(T) == 4 ? k::Float::kF32
                                              : k::Float::kBF16;
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, k::BFloat16>, double, T>;

template <class T>
std::vector<T> gaussians(std::int64_t n, std::uint64_t stream, double scale = 1) {
  std::vector<float> g(static_cast<std::size_t>(n));
  k::unit_gaussians(31, stream, 0, n, g.data());
  std::vector<T> out;
  for (const float v : g) out.push_back(k::narrow<T>(scale * static_cast<double>(v)));
  return out;
}
template <class T>
Doubles doubles(const std::vector<T>& v) {
  Doubles out;
  for (const T& x : v) out.push_back(static_cast<double>(k::widen(x)));
  return out;
}

struct Case {
  Longs offsets;
  std::int64_t inputs, outputs;
  GroupedProduct product = GroupedProduct::kForward;
  double alpha = 1;
  bool add = false, bias = false;
  double scale = 1;  // of the left operand
  std::int64_t experts() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
  std::int64_t rows() const { return offsets.back() + 2; }  // two are nobody's
  bool forward() const { return product == GroupedProduct::kForward; }
  bool weight() const { return product == GroupedProduct::kWeight; }
  std::int64_t columns() const { return forward() ? outputs : inputs; }
};

template <class T>
struct Operands {
  std::vector<T> left, right, bias, before, out;
  std::vector<k::Wide<T>> weight;
  k::GroupedGemmArgs<T> a;
  explicit Operands(const Case& c)
      : left(gaussians<T>(c.rows() * (c.forward() ? c.inputs : c.outputs), 1, c.scale)),
        right(gaussians<T>(c.weight() ? c.rows() * c.inputs : c.experts() * c.outputs * c.inputs, 2)),
        bias(gaussians<T>(c.experts() * c.outputs, 3)),
        before(gaussians<T>(c.rows() * c.columns(), 4)),
        out(before),
        weight(static_cast<std::size_t>(c.experts() * c.outputs * c.inputs), k::Wide<T>(-7)) {
    a.product = c.product, a.left = left.data(), a.right = right.data(), a.bias = c.bias ? bias.data() : nullptr;
    a.offsets = c.offsets.data(), a.experts = c.experts(), a.rows = c.rows(), a.inputs = c.inputs;
    a.outputs = c.outputs, a.alpha = c.alpha, a.add = c.add, a.out = out.data(), a.weight = weight.data();
  }
};

template <class T>
void agrees(const Case& c) {
  Operands<T> o(c);
  BOOST_REQUIRE(k::grouped_gemm(o.a) == k::Status::kOk);
  const std::string what = std::string(k::name_of(kStored<T>)) + " product " +
                           std::to_string(static_cast<int>(c.product)) + ", " + std::to_string(c.offsets.back()) +
                           " rows, " + std::to_string(c.inputs) + " to " + std::to_string(c.outputs);
  const at::Tensor left = tensor(doubles(o.left), {c.rows(), c.forward() ? c.inputs : c.outputs});
  const at::Tensor right = c.weight() ? tensor(doubles(o.right), {c.rows(), c.inputs})
                                      : tensor(doubles(o.right), {c.experts(), c.outputs, c.inputs});
  const at::Tensor before = tensor(doubles(o.before), {c.rows(), c.columns()});
  const at::Tensor bias = tensor(doubles(o.bias), {c.experts(), c.outputs});
  const Doubles all = c.weight() ? doubles(o.weight) : doubles(o.out);
  for (std::int64_t e = 0; e < c.experts(); ++e) {
    const std::int64_t first = c.offsets[static_cast<std::size_t>(e)],
                       rows = c.offsets[static_cast<std::size_t>(e) + 1] - first;
    const auto product = [&](const at::Tensor& l, const at::Tensor& r) {
      if (c.weight()) return l.narrow(0, first, rows).t().matmul(r.narrow(0, first, rows));
      return l.narrow(0, first, rows).matmul(c.forward() ? r[e].t() : r[e]);
    };
    at::Tensor want = product(left, right) * c.alpha, absolute = product(left.abs(), right.abs()) * std::fabs(c.alpha);
    if (c.add) {
      want = want + before.narrow(0, first, rows);
      absolute = absolute + before.narrow(0, first, rows).abs();
    }
    if (c.bias) {
      want = want + bias[e];
      absolute = absolute + bias[e].abs();
    }
    if (want.numel() == 0) continue;
    const std::int64_t terms = c.weight() ? rows : c.forward() ? c.inputs : c.outputs;
    const Doubles w = values(want), b = values(absolute);
    const std::int64_t from = c.weight() ? e * c.outputs * c.inputs : first * c.columns();
    const Doubles got(all.begin() + from, all.begin() + from + want.numel());
    const k::Float stored = c.weight() ? kStored<k::Wide<T>> : kStored<T>;
    test::CompareOptions options;
    options.bound = [&](std::size_t i, double) {
      const double sum = bounds::sum_of_products(terms, bounds::grouped_gemm_additions(terms), b[i], kStored<Sum<T>>) +
                         bounds::sum_in_any_order(terms + 3, 1, b[i]);  // LibTorch's own
      return bounds::rounded(w[i], sum, stored);
    };
    const auto n = static_cast<std::int64_t>(w.size());
    const auto compared = test::compare({{n}, w}, {{n}, got}, options);
    BOOST_CHECK_MESSAGE(compared.ok(), what << " expert " << e << "\n" << compared.report());
  }
  if (!c.weight()) {
    const auto end = static_cast<std::size_t>(c.offsets.back() * c.columns());
    BOOST_CHECK_MESSAGE(
        std::equal(o.out.begin() + static_cast<long>(end), o.out.end(), o.before.begin() + static_cast<long>(end),
                   [](T a, T b) { return k::widen(a) == k::widen(b); }),
        what << ": rows of nobody");
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  std::vector<Longs> offsets = {{0, 1}, {0, 0, 5, 5, 18}, {0, 300, 300}, {0, 0}};
  Longs many = {0};
  for (int e = 0; e < 384; ++e) many.push_back(many.back() + (e % 7 == 3 ? 2 : 0));
  offsets.push_back(many);
  for (const Longs& o : offsets) {
    for (const auto& [inputs, outputs] : {std::pair<std::int64_t, std::int64_t>{1, 1}, {33, 7}, {257, 16}, {16, 130}}) {
      if (o.size() > 300 && inputs > 33) continue;
      all.push_back({o, inputs, outputs});
      all.push_back({o, inputs, outputs, GroupedProduct::kForward, 0.75, true, true});
      all.push_back({o, inputs, outputs, GroupedProduct::kInput});
      all.push_back({o, inputs, outputs, GroupedProduct::kInput, -1.5, true});
      all.push_back({o, inputs, outputs, GroupedProduct::kWeight, 0.3});
    }
  }
  return all;
}

BOOST_AUTO_TEST_CASE(products_agree_with_libtorch) {
  for (const Case& c : cases()) {
    agrees<float>(c);
    agrees<double>(c);
    agrees<k::BFloat16>(c);
  }
  for (const GroupedProduct p : {GroupedProduct::kForward, GroupedProduct::kInput, GroupedProduct::kWeight}) {
    agrees<float>({{0, 3, 9}, 20, 12, p, 1, false, false, 1e-44});
    agrees<double>({{0, 3, 9}, 20, 12, p, 1, false, false, 1e-320});
  }
}

/// Stretches of kGateRun from 0, the stretches from 0: bit for bit.
template <class T>
void order_is_stated(const Case& c) {
  Operands<T> o(c);
  BOOST_REQUIRE(k::grouped_gemm(o.a) == k::Status::kOk);
  const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  for (std::int64_t e = 0; e < c.experts(); ++e) {
    const std::int64_t first = c.offsets[at(e)], rows = c.offsets[at(e + 1)] - first;
    const std::int64_t terms = c.weight() ? rows : c.forward() ? c.inputs : c.outputs;
    for (std::int64_t line = 0; line < (c.weight() ? c.outputs : rows); ++line) {
      for (std::int64_t n = 0; n < c.columns(); ++n) {
        T sum = 0;
        for (std::int64_t begin = 0; begin < terms; begin += k::kGateRun) {
          T run = 0;
          for (std::int64_t i = begin; i < std::min(terms, begin + k::kGateRun); ++i) {
            const T x =
                c.weight() ? o.left[at((first + i) * c.outputs + line)] : o.left[at((first + line) * terms + i)];
            const T y = c.weight()    ? o.right[at((first + i) * c.inputs + n)]
                        : c.forward() ? o.right[at((e * c.outputs + n) * c.inputs + i)]
                                      : o.right[at((e * c.outputs + i) * c.inputs + n)];
            run += x * y;
          }
          sum += run;
        }
        const T got = c.weight() ? o.weight[at((e * c.outputs + line) * c.inputs + n)]
                                 : o.out[at((first + line) * c.columns() + n)];
        BOOST_REQUIRE(got == sum);
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(sums_run_in_the_stated_order) {
  for (const GroupedProduct p : {GroupedProduct::kForward, GroupedProduct::kInput, GroupedProduct::kWeight}) {
    order_is_stated<float>({{0, 0, 130, 390}, 200, 140, p});
    order_is_stated<double>({{0, 257, 258}, 37, 129, p});
  }
}

/// What is not finite stays in its row, or in the sums that it is a term of.
BOOST_AUTO_TEST_CASE(what_is_not_finite) {
  const Case c{{0, 2, 4}, 5, 3};
  for (const double bad : {kInf, -kInf, std::nan("")}) {
    Operands<double> o(c);
    o.left[1 * 5 + 2] = bad;
    BOOST_REQUIRE(k::grouped_gemm(o.a) == k::Status::kOk);
    for (std::size_t i = 0; i < 12; ++i) BOOST_CHECK(std::isfinite(o.out[i]) == (i / 3 != 1));
    Case input = c, weight = c;  // of the gradients: a row of inputs, and a row of the first expert's weights
    input.product = GroupedProduct::kInput, weight.product = GroupedProduct::kWeight;
    Operands<double> p(input), q(weight);
    p.left[1 * 3 + 2] = q.left[1 * 3 + 2] = bad;
    BOOST_REQUIRE(k::grouped_gemm(p.a) == k::Status::kOk && k::grouped_gemm(q.a) == k::Status::kOk);
    for (std::size_t i = 0; i < 20; ++i) BOOST_CHECK(std::isfinite(p.out[i]) == (i / 5 != 1));
    for (std::size_t i = 0; i < 30; ++i) BOOST_CHECK(std::isfinite(q.weight[i]) == (i / 5 != 2));
  }
}

template <class T>
void sums_agree(const Longs& offsets, std::int64_t columns, bool scaled) {
  const std::int64_t experts = static_cast<std::int64_t>(offsets.size()) - 1, rows = offsets.back();
  const std::vector<T> v = gaussians<T>(rows * columns, 5);
  const std::vector<k::Wide<T>> scale = gaussians<k::Wide<T>>(rows, 6);
  std::vector<k::Wide<T>> sums(static_cast<std::size_t>(experts * columns), k::Wide<T>(-7));
  k::ColumnSumsArgs<T> a;
  a.values = v.data(), a.scale = scaled ? scale.data() : nullptr, a.offsets = offsets.data();
  a.experts = experts, a.rows = rows, a.columns = columns, a.sums = sums.data();
  BOOST_REQUIRE(k::column_sums(a) == k::Status::kOk);
  const at::Tensor values_of = tensor(doubles(v), {rows, columns});
  const at::Tensor by = scaled ? tensor(doubles(scale), {rows, 1}) : at::ones({rows, 1}, at::kDouble);
  for (std::int64_t e = 0; e < experts; ++e) {
    const std::int64_t first = offsets[static_cast<std::size_t>(e)],
                       n = offsets[static_cast<std::size_t>(e) + 1] - first;
    const at::Tensor part = (values_of * by).narrow(0, first, n);
    const Doubles want = values(part.sum(0)), absolute = values(part.abs().sum(0)), all = doubles(sums);
    const Doubles got(all.begin() + e * columns, all.begin() + (e + 1) * columns);
    test::CompareOptions options;
    options.bound = [&](std::size_t i, double) {
      return bounds::sum_of_products(n, bounds::grouped_gemm_additions(n), absolute[i], kStored<k::Wide<T>>) +
             bounds::sum_in_any_order(n, 1, absolute[i]);
    };
    const auto c = test::compare({{columns}, want}, {{columns}, got}, options);
    BOOST_CHECK_MESSAGE(c.ok(), "column sums of expert " << e << "\n" << c.report());
  }
}

BOOST_AUTO_TEST_CASE(column_sums_agree_with_libtorch) {
  for (const bool scaled : {false, true}) {
    sums_agree<float>({0, 0, 1, 700}, 9, scaled);
    sums_agree<double>({0, 129, 129}, 33, scaled);
    sums_agree<k::BFloat16>({0, 400}, 8, scaled);
  }
}

}  // namespace

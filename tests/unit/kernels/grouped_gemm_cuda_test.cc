// Grouped matrix products on a CUDA device: float and double with the bits of the host, bfloat16 on tensor cores within
// the bound of kernels/host/bounds.h.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(GroupedGemmCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <cmath>
#include <string>
#include <vector>

#include "kernels/cuda/grouped_gemm.h"
#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

using test::OnDevice;

class GroupedGemmCuda : public test::OnCuda {};

template <class T>
std::vector<T> gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  unit_gaussians(8, stream, 0, n, g.data());
  std::vector<T> out;
  for (const float v : g) out.push_back(narrow<T>(v));
  return out;
}

struct Case {
  std::vector<std::int64_t> offsets;  // one row beyond the last is nobody's
  std::int64_t inputs, outputs;
  GroupedProduct product;
  double alpha;
  bool add, bias;
  std::string what() const {
    return "product " + std::to_string(static_cast<int>(product)) + " " + std::to_string(offsets.back()) + " rows " +
           std::to_string(inputs) + " to " + std::to_string(outputs) + (add ? " add" : "") + (bias ? " bias" : "");
  }
  std::int64_t experts() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
  std::int64_t rows() const { return offsets.back() + 1; }
};

/// Operands on host and device, and what comes out of each.
template <class T>
struct Products {
  explicit Products(const Case& c)
      : left(gaussians<T>(c.rows() * (c.product == GroupedProduct::kForward ? c.inputs : c.outputs), 1)),
        right(gaussians<T>(
            c.product == GroupedProduct::kWeight ? c.rows() * c.inputs : c.experts() * c.outputs * c.inputs, 2)),
        bias(gaussians<T>(c.experts() * c.outputs, 3)),
        out(gaussians<T>(c.rows() * (c.product == GroupedProduct::kForward ? c.outputs : c.inputs), 4)),
        before(out),
        weight(static_cast<std::size_t>(c.experts() * c.outputs * c.inputs), Wide<T>(-7)),
        d_left(left),
        d_right(right),
        d_bias(bias),
        d_out(out),
        d_weight(weight),
        d_offsets(c.offsets),
        workspace(std::vector<char>(cuda::grouped_gemm_workspace(c.experts()), 1)) {
    a.product = c.product, a.experts = c.experts(), a.rows = c.rows(), a.inputs = c.inputs, a.outputs = c.outputs;
    a.alpha = c.alpha, a.add = c.add;
    a.left = left.data(), a.right = right.data(), a.bias = c.bias ? bias.data() : nullptr, a.out = out.data();
    a.weight = weight.data(), a.offsets = c.offsets.data();
  }
  void run_on_device(const Case& c) {
    GroupedGemmArgs<T> d = a;
    d.left = d_left.data(), d.right = d_right.data(), d.bias = c.bias ? d_bias.data() : nullptr, d.out = d_out.data();
    d.weight = d_weight.data(), d.offsets = d_offsets.data();
    ASSERT_EQ(cuda::grouped_gemm(d, workspace.data(), nullptr), Status::kOk) << c.what();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << c.what();
  }
  std::vector<T> left, right, bias, out, before;
  std::vector<Wide<T> > weight;
  OnDevice<T> d_left, d_right, d_bias, d_out;
  OnDevice<Wide<T> > d_weight;
  OnDevice<std::int64_t> d_offsets;
  OnDevice<char> workspace;
  GroupedGemmArgs<T> a;
};

std::vector<Case> cases(std::vector<std::int64_t> offsets, std::int64_t inputs, std::int64_t outputs) {
  return {{offsets, inputs, outputs, GroupedProduct::kForward, 1, false, false},
          {offsets, inputs, outputs, GroupedProduct::kForward, 0.75, true, true},
          {offsets, inputs, outputs, GroupedProduct::kInput, 1, false, false},
          {offsets, inputs, outputs, GroupedProduct::kInput, 1.5, true, false},
          {offsets, inputs, outputs, GroupedProduct::kWeight, 1.25, false, false}};
}

template <class T>
void same_bits(std::vector<std::int64_t> offsets, std::int64_t inputs, std::int64_t outputs) {
  for (const Case& c : cases(offsets, inputs, outputs)) {
    Products<T> p(c);
    ASSERT_EQ(grouped_gemm(p.a), Status::kOk) << c.what();
    p.run_on_device(c);
    test::expect_same(p.out, p.d_out.fetch(), c.what());
    test::expect_same(p.weight, p.d_weight.fetch(), c.what() + " weight");
  }
}

TEST_F(GroupedGemmCuda, SameBitsAsTheHost) {
  same_bits<float>({0, 1}, 1, 1);
  same_bits<float>({0, 0, 65, 65, 130, 131}, 70, 37);
  same_bits<float>({0, 300, 300}, 129, 64);
  same_bits<double>({0, 0, 65, 65, 130, 131}, 33, 70);
  same_bits<double>({0, 257}, 16, 8);
  std::vector<std::int64_t> many = {0};
  for (int e = 0; e < 1500; ++e)
    many.push_back(many.back() + (e % 5 == 2 ? 1 : 0));  // more experts than a block has threads
  same_bits<float>(many, 3, 5);
}

/// Every value against float64 sums, and a second run against the first.
void within_bounds(std::vector<std::int64_t> offsets, std::int64_t inputs, std::int64_t outputs) {
  for (const Case& c : cases(offsets, inputs, outputs)) {
    Products<BFloat16> p(c);
    p.run_on_device(c);
    const std::vector<BFloat16> got = p.d_out.fetch();
    const std::vector<float> weight = p.d_weight.fetch();
    const bool forward = c.product == GroupedProduct::kForward, to_weight = c.product == GroupedProduct::kWeight;
    const std::int64_t columns = forward ? outputs : inputs;
    double worst = 0;
    const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
    const auto value = [](BFloat16 v) { return static_cast<double>(widen(v)); };
    for (std::int64_t e = 0; e < c.experts(); ++e) {
      const std::int64_t first = c.offsets[at(e)], last = c.offsets[at(e + 1)];
      for (std::int64_t line = 0; line < (to_weight ? outputs : last - first); ++line) {
        for (std::int64_t n = 0; n < columns; ++n) {
          double sum = 0, absolute = 0;
          const std::int64_t terms = to_weight ? last - first : forward ? inputs : outputs;
          for (std::int64_t i = 0; i < terms; ++i) {
            const double x = value(to_weight ? p.left[at((first + i) * outputs + line)]
                                             : p.left[at((first + line) * terms + i)]),
                         y = value(to_weight ? p.right[at((first + i) * inputs + n)]
                                   : forward ? p.right[at((e * outputs + n) * inputs + i)]
                                             : p.right[at((e * outputs + i) * inputs + n)]);
            sum += c.alpha * x * y;
            absolute += std::fabs(c.alpha * x * y);
          }
          double result = to_weight ? static_cast<double>(weight[at((e * outputs + line) * inputs + n)])
                                    : value(got[at((first + line) * columns + n)]);
          if (c.add) sum += value(p.before[at((first + line) * columns + n)]);
          if (c.add) absolute += std::fabs(value(p.before[at((first + line) * columns + n)]));
          if (c.bias) sum += value(p.bias[at(e * outputs + n)]);
          if (c.bias) absolute += std::fabs(value(p.bias[at(e * outputs + n)]));
          const double bound = bounds::rounded(sum, bounds::tensor_core_sum(terms + 2, absolute),
                                               to_weight ? Float::kF32 : Float::kBF16);
          ASSERT_LE(std::fabs(result - sum), bound)
              << c.what() << " expert " << e << " at " << line << ", " << n << ": " << result << " for " << sum;
          if (bound > 0) worst = std::max(worst, std::fabs(result - sum) / bound);
        }
      }
    }
    if (!to_weight) {  // nobody's row
      for (std::int64_t n = 0; n < columns; ++n)
        ASSERT_EQ(got[at(offsets.back() * columns + n)].bits, p.before[at(offsets.back() * columns + n)].bits)
            << c.what();
    }
    Products<BFloat16> again(c);
    again.run_on_device(c);
    const std::vector<BFloat16> second = again.d_out.fetch();
    for (std::size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i].bits, second[i].bits) << c.what();
    test::expect_same(weight, again.d_weight.fetch(), c.what() + " again");
  }
}

TEST_F(GroupedGemmCuda, TensorCoresWithinTheirBound) {
  within_bounds({0, 1}, 8, 8);
  within_bounds({0, 0, 1, 1, 16}, 24, 40);              // narrow tiles
  within_bounds({0, 5, 5, 70}, 64, 72);                 // one narrow, one wide
  within_bounds({0, 0, 127, 255, 384, 385}, 264, 328);  // wide tiles, rows around a tile's 128, ends of every kind
  within_bounds({0, 70, 70}, 1032, 136);                // many stages
  within_bounds({0, 2100}, 72, 80);                     // more lines of tiles than go together
}

TEST_F(GroupedGemmCuda, RefusesWhatTensorCoresCannotTake) {
  Case c{{0, 4}, 12, 8, GroupedProduct::kForward, 1, false, false};
  Products<BFloat16> p(c);
  GroupedGemmArgs<BFloat16> a = p.a;
  a.left = p.d_left.data(), a.right = p.d_right.data(), a.out = p.d_out.data(), a.weight = nullptr;
  a.offsets = p.d_offsets.data();
  EXPECT_EQ(cuda::grouped_gemm(a, p.workspace.data(), nullptr), Status::kBadShape);
  a.inputs = 8, a.left += 1;
  EXPECT_EQ(cuda::grouped_gemm(a, p.workspace.data(), nullptr), Status::kBadShape);
}

template <class T>
void columns(std::vector<std::int64_t> offsets, std::int64_t columns, bool scaled) {
  const std::int64_t experts = static_cast<std::int64_t>(offsets.size()) - 1, rows = offsets.back();
  const std::vector<T> values = gaussians<T>(rows * columns, 5);
  const std::vector<Wide<T> > scale = gaussians<Wide<T> >(rows, 6);
  std::vector<Wide<T> > sums(static_cast<std::size_t>(experts * columns), Wide<T>(-7));
  const OnDevice<T> d_values(values);
  const OnDevice<Wide<T> > d_scale(scale), d_sums(sums);
  const OnDevice<std::int64_t> d_offsets(offsets);
  ColumnSumsArgs<T> a;
  a.experts = experts, a.rows = rows, a.columns = columns;
  a.values = values.data(), a.scale = scaled ? scale.data() : nullptr, a.offsets = offsets.data(), a.sums = sums.data();
  ASSERT_EQ(column_sums(a), Status::kOk);
  a.values = d_values.data(), a.scale = scaled ? d_scale.data() : nullptr, a.offsets = d_offsets.data();
  a.sums = d_sums.data();
  ASSERT_EQ(cuda::column_sums(a, nullptr), Status::kOk);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  test::expect_same(sums, d_sums.fetch(), "column sums");
}

TEST_F(GroupedGemmCuda, ColumnSumsHaveTheBitsOfTheHost) {
  columns<float>({0, 1}, 1, false);
  columns<float>({0, 0, 1200, 1200, 3000}, 70, true);
  columns<double>({0, 129, 1025}, 33, true);
  columns<BFloat16>({0, 700, 700, 2300}, 40, false);
}

}  // namespace
}  // namespace moeaudit::kernels

#endif

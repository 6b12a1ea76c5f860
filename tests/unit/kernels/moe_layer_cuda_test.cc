// One MoE layer on a CUDA device: float and double with the bits of the host, stage by stage; bfloat16 within the
// errors that tests/support/running_layer.h derives for tensor cores.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(MoeLayerCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/cuda/moe_layer.h"
#include "tests/support/compare.h"
#include "tests/support/layer_memory.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

using test::LayerShape;
using test::OnDevice;
using test::OnHost;

class MoeLayerCuda : public test::OnCuda {};

std::string name_of(const LayerShape& s) {
  return std::to_string(s.tokens) + "x" + std::to_string(s.experts) + "/" + std::to_string(s.top_k) + " hidden " +
         std::to_string(s.hidden) + " width " + std::to_string(s.width) + " rank " + std::to_string(s.rank) +
         " shared " + std::to_string(s.shared_width);
}

template <class T>
void run_on_device(test::LayerMemory<T, OnDevice>& m, const std::string& what) {
  const OnDevice<char> forward(std::vector<char>(cuda::moe_layer_workspace(m.args), 1));
  const OnDevice<char> backward(std::vector<char>(cuda::moe_layer_backward_workspace(m.args), 1));
  ASSERT_EQ(cuda::moe_layer(m.args, m.state, m.y, forward.data(), nullptr), Status::kOk) << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what << " forward";
  ASSERT_EQ(cuda::moe_layer_backward(m.args, m.state, m.d_y, m.gradients, backward.data(), nullptr), Status::kOk)
      << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what << " backward";
}

/// What the forward pass leaves, and in the order of the steps, so that a failure names the first that went wrong.
const char* const kOrder[] = {"rows",
                              "gate_up low",
                              "before",
                              "activated",
                              "down low",
                              "out",
                              "shared before",
                              "shared activated",
                              "shared out",
                              "shared weight",
                              "y",
                              "d weights",
                              "d down",
                              "d down lora B",
                              "d gate_up",
                              "d shared down",
                              "d shared gate_up",
                              "d x"};

template <class T>
void same_bits(const LayerShape& s, std::int64_t capacity = 0) {
  const std::string what = name_of(s);
  const test::LayerValues v = test::layer_values<T>(s);
  std::vector<std::int32_t> place, filled(static_cast<std::size_t>(s.experts));
  for (const std::int32_t e : v.chosen) {
    if (capacity == 0) break;
    const std::int32_t next = e < 0 ? -1 : filled[static_cast<std::size_t>(e)]++;
    place.push_back(next < capacity ? next : -1);
  }
  test::LayerMemory<T, OnHost> host(v, place, capacity);
  ASSERT_EQ(moe_layer(host.args, host.state, host.y), Status::kOk) << what;
  ASSERT_EQ(moe_layer_backward(host.args, host.state, host.d_y, host.gradients), Status::kOk) << what;
  test::LayerMemory<T, OnDevice> device(v, place, capacity);
  run_on_device(device, what);
  for (const char* name : kOrder) {
    if (host.results.count(name) != 0)
      test::expect_same(host.results[name](), device.results[name](), what + " " + name);
  }
  for (const auto& [name, fetch] : host.results) test::expect_same(fetch(), device.results[name](), what + " " + name);
}

ExpertForm form(Activation a, bool gated, double alpha = 1, double limit = std::numeric_limits<double>::infinity(),
                double offset = 0) {
  return {a, gated, alpha, limit, offset};
}

TEST_F(MoeLayerCuda, SameBitsAsTheHost) {
  same_bits<float>({1, 1, 1, 3, 5});
  LayerShape s{70, 6, 3, 37, 21};
  same_bits<double>(s);
  s.bias = true, s.rank = 3, s.shared_width = 13, s.shared_gate = true;
  s.form = form(Activation::kSilu, true, 1.702, 0.8, 1);
  same_bits<float>(s);
  same_bits<double>(s);
  same_bits<float>(s, 20);  // padded, and some dropped
  s.weight_on = WeightOn::kInput;
  same_bits<float>(s, 20);
  s.weight_on = WeightOn::kOutput;
  s.form = form(Activation::kRelu2, false), s.shared_gate = false;
  same_bits<float>(s);
  s.form = form(Activation::kGeluTanh, true), s.how = LayerShape::kOneExpert;
  same_bits<float>(s);
  s.how = LayerShape::kNoneAtAll;
  same_bits<float>(s);
  same_bits<float>({40, 384, 8, 16, 8});
  same_bits<float>({0, 4, 2, 8, 8});
}

void within_bounds(const LayerShape& s) {
  const std::string what = name_of(s);
  const test::LayerValues v = test::layer_values<BFloat16>(s);
  test::LayerMemory<BFloat16, OnDevice> m(v);
  run_on_device(m, what);
  // Stages that tensor cores have no part in: the bits of the formula from what lies before them.
  const std::vector<double> before = m.results["before"](), activated = m.results["activated"]();
  const std::int64_t first = first_outputs(s.form, s.width);
  std::int64_t rows = 0;
  for (const std::int32_t e : v.chosen) rows += e >= 0;
  for (std::int64_t i = 0; i < rows * s.width; ++i) {
    const auto at = [&](std::int64_t half) {
      return narrow<BFloat16>(before[static_cast<std::size_t>(i / s.width * first + half * s.width + i % s.width)]);
    };
    const BFloat16 want = activated_element(s.form, at(0), s.form.gated ? at(1) : BFloat16{});
    ASSERT_EQ(static_cast<double>(widen(want)), activated[static_cast<std::size_t>(i)])
        << what << " activated at " << i;
  }
  const test::LayerArithmetic tensor = test::tensor_core_arithmetic(),
                              exact = test::arithmetic_of(Float::kF64, Float::kF64, Float::kF64);
  const test::LayerErrors errors = test::RunningLayer(v, tensor).run(), least = test::RunningLayer(v, exact).run();
  const test::NamedRows bound = test::named(errors), own = test::named(least);
  for (const auto& [name, row] : bound) {
    const auto found = m.results.find(name);
    if (found == m.results.end() || row->empty()) continue;
    std::vector<double> want;
    for (const test::Running& r : *row) want.push_back(r.value);
    const std::vector<double> got = found->second();
    const test::Row& e = *row;
    const test::Row& l = *own.at(name);
    test::CompareOptions o;
    o.bound = [&](std::size_t i, double) { return e[i].error + l[i].error; };
    const auto n = static_cast<std::int64_t>(want.size());
    const auto c = test::compare({{n}, want}, {{static_cast<std::int64_t>(got.size())}, got}, o);
    EXPECT_TRUE(c.ok()) << what << " " << name << "\n" << c.report();
  }
  // And the same bits again.
  test::LayerMemory<BFloat16, OnDevice> again(v);
  run_on_device(again, what);
  for (const auto& [name, fetch] : m.results)
    test::expect_same(fetch(), again.results[name](), what + " again " + name);
}

TEST_F(MoeLayerCuda, TensorCoresWithinTheirBound) {
  within_bounds({1, 1, 1, 8, 8});
  LayerShape s{40, 4, 2, 72, 40};
  within_bounds(s);
  s.bias = true, s.rank = 8, s.shared_width = 48, s.shared_gate = true;
  within_bounds(s);
  s.form = form(Activation::kSilu, true, 1.702, 0.8, 1);
  within_bounds(s);
  s.form = form(Activation::kRelu2, false), s.shared_gate = false, s.weight_on = WeightOn::kInput;
  within_bounds(s);
}

}  // namespace
}  // namespace moeaudit::kernels

#endif

// Replays of routers on a device that works, refuses, fails or is not there: the results are the host's.
#include "audit/measures/replay_backend.h"

#include <gtest/gtest.h>

#include <atomic>

#include "tests/unit/measures/router_checkpoint.h"

namespace moeaudit {
namespace {

using namespace test;  // NOLINT: router_checkpoint.h
using kernels::Status;

/// The host behind the name of a device. After `good` calls of the gate it leaves nonsense behind and returns `then`.
class TestDevice final : public kernels::Backend {
 public:
  TestDevice(int good, Status then) : left_(good), then_(then) {}
  std::string name() const override { return "cuda Test"; }
  std::string last_error() const override { return "injected"; }
  bool on_device() const override { return true; }
  Status gate_logits(const kernels::GateArgs<float, double>& a) override {
    if (left_.fetch_sub(1) > 0) return Backend::gate_logits(a);
    for (std::int64_t i = 0; i < a.tokens * a.experts; ++i) a.logits[i] = 1e30;
    return then_;
  }

 private:
  std::atomic<int> left_;
  Status then_;
};

std::atomic<int> g_opened = 0;
template <int kGood, Status kThen>
std::unique_ptr<kernels::Backend> open_test_device(std::string*) {
  ++g_opened;
  return std::make_unique<TestDevice>(kGood, kThen);
}
std::unique_ptr<kernels::Backend> open_nothing(std::string* why) {
  ++g_opened;
  *why = "no CUDA device: the driver counts none";
  return nullptr;
}

const std::string kHost = std::string("host ") + kernels::host_backend();
constexpr int kAlways = 1 << 30;

class ReplayBackendTest : public testing::Test {
 protected:
  Measured run(Device device, std::unique_ptr<kernels::Backend> (*open)(std::string*)) {
    return measure(facts_of(model_), store_, {}, 2, true, device, open);
  }
  Model model_{2, 16, 128, 4};
  TensorStore store_ = weights_of(model_).open("backend");
  Measured host_ = run(Device::kCpu, open_nothing);
};

TEST_F(ReplayBackendTest, ADeviceIsNamedAndHasTheHostsResults) {
  const Measured m = run(Device::kCuda, open_test_device<kAlways, Status::kOk>);
  expect_same_tables(host_, m);
  EXPECT_EQ(m.records.at(0).backend, "cuda Test");
  EXPECT_EQ(m.records.at(0).warning, "");
  EXPECT_EQ(host_.records.at(0).backend, kHost);
}

TEST_F(ReplayBackendTest, ADeviceThatFailsIsReplacedByTheHostWithAWarning) {
  const Measured later = run(Device::kCuda, open_test_device<3, Status::kLaunchFailed>);
  expect_same_tables(host_, later);
  EXPECT_EQ(later.records.at(0).backend, "cuda Test and " + kHost);
  EXPECT_EQ(later.records.at(0).warning, "cuda Test failed (injected); the host did the rest, with the same results");
  const Measured at_once = run(Device::kCuda, open_test_device<0, Status::kLaunchFailed>);
  expect_same_tables(host_, at_once);
  EXPECT_EQ(at_once.records.at(0).backend, kHost);
  EXPECT_NE(at_once.records.at(0).warning.find("injected"), std::string::npos);
}

TEST_F(ReplayBackendTest, AShapeThatTheDeviceDoesNotDoRunsOnTheHost) {
  const Measured m = run(Device::kCuda, open_test_device<0, Status::kBadShape>);
  expect_same_tables(host_, m);
  EXPECT_EQ(m.records.at(0).backend, "cuda Test and " + kHost);  // the device still routes
  EXPECT_EQ(m.records.at(0).warning, "");
}

TEST_F(ReplayBackendTest, AMissingDeviceIsAWarningWhereItWasAskedFor) {
  const Measured asked = run(Device::kCuda, open_nothing);
  expect_same_tables(host_, asked);
  EXPECT_EQ(asked.records.at(0).warning, "--device cuda: no CUDA device: the driver counts none; the host did it");
}

TEST_F(ReplayBackendTest, AutoAsksForADeviceWhereTheWorkIsLarge) {
  FactSheet facts;
  const TensorStore none;
  std::vector<MeasureRecord> records;
  MeasureContext ctx{facts, none, none, none, none, 1, true, {}, records};
  ctx.open_device = open_test_device<kAlways, Status::kOk>;
  g_opened = 0;
  EXPECT_FALSE(ReplayBackend(ctx, 0.5 * kWorthADevice).on_device());
  EXPECT_EQ(g_opened, 0);
  EXPECT_TRUE(ReplayBackend(ctx, 2 * kWorthADevice).on_device());
  ctx.open_device = open_nothing;
  const ReplayBackend without(ctx, 2 * kWorthADevice);
  EXPECT_FALSE(without.on_device());
  EXPECT_EQ(without.warning(), "");
  EXPECT_EQ(without.tile(), 48);
  ctx.device = Device::kCpu;
  EXPECT_FALSE(ReplayBackend(ctx, 100).on_device());
  EXPECT_EQ(g_opened, 2);
}

}  // namespace
}  // namespace moeaudit

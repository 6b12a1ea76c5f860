// A replay, and the health of a trace, on a device that works, refuses, fails or is not there, and on several threads: the numbers are the same.
#include "audit/measures/trace_replay.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <sstream>

#include "audit/measures/expert_health.h"
#include "audit/measures/replay_backend.h"
#include "audit/traces/trace.h"
#ifdef MOE_AUDIT_HAVE_CUDA
#include "tests/support/on_device.h"
#endif

namespace moeaudit {
namespace {

using kernels::Status;

/// The host behind the name of a device. After `good` calls it leaves nonsense behind and returns `then`.
class TestDevice final : public kernels::Backend {
 public:
  TestDevice(int good, Status then) : left_(good), then_(then) {}
  std::string name() const override { return "cuda Test"; }
  std::string last_error() const override { return "injected"; }
  bool on_device() const override { return true; }
  Status route(const kernels::RouteArgs<double>& a, const kernels::RouteResult<double>& r) override {
    if (left_.fetch_sub(1) > 0) return Backend::route(a, r);
    for (std::int64_t i = 0; i < a.tokens * a.top_k; ++i) r.chosen[i] = 1;
    return then_;
  }
  Status route(const kernels::RouteArgs<float>& a, const kernels::RouteResult<float>& r) override {
    if (left_.fetch_sub(1) > 0) return Backend::route(a, r);
    for (std::int64_t i = 0; i < a.tokens * a.top_k; ++i) r.chosen[i] = 1;
    return then_;
  }
  Status count_choices(const kernels::CountArgs<std::int32_t>& a, std::int64_t* counts, std::int64_t* outside) override {
    if (left_.fetch_sub(1) > 0) return Backend::count_choices(a, counts, outside);
    std::fill(counts, counts + a.experts, 7);
    return then_;
  }
  Status balance_loss(const kernels::BalanceLossArgs<double>& a, const kernels::BalanceLossResult<double>& r) override {
    if (left_.fetch_sub(1) > 0) return Backend::balance_loss(a, r);
    *r.loss = 1e30;
    return then_;
  }
  Status z_loss(const kernels::ZLossArgs<double>& a, const kernels::ZLossResult<double>& r) override {
    if (left_.fetch_sub(1) > 0) return Backend::z_loss(a, r);
    *r.loss = 1e30;
    return then_;
  }

 private:
  std::atomic<int> left_;
  Status then_;
};

template <int kGood, Status kThen>
std::unique_ptr<kernels::Backend> open_test_device(std::string*) {
  return std::make_unique<TestDevice>(kGood, kThen);
}
std::unique_ptr<kernels::Backend> open_nothing(std::string* why) {
  *why = "no CUDA device: the driver counts none";
  return nullptr;
}

constexpr int kAlways = 1 << 30;

struct Replayed {
  ReplayTable table;
  std::vector<WeightProblem> problems;
  std::string backend, warning;
};

Replayed replay(const std::string& name, int threads, Device device = Device::kCpu, OpenDevice open = open_nothing) {
  std::vector<InputProblem> faults;
  const std::unique_ptr<Trace> trace = open_trace(MOE_AUDIT_SOURCE_DIR "/fixtures/traces/" + name, {}, &faults);
  EXPECT_TRUE(trace) << name;
  Replayed out;
  ReplayBackend backend(device, open, 0);
  ReplayOptions options;
  options.threads = threads;
  options.backend = &backend;
  out.table = replay_trace(*trace, options, &out.problems);
  out.backend = backend.name_beside_host(kReplayedOnBackend);
  out.warning = backend.warning();
  return out;
}

/// All of a table, doubles to the bit.
std::string text_of(const ReplayTable& t) {
  std::ostringstream out;
  const auto put = [&](const auto& v) {
    if constexpr (std::is_same_v<std::decay_t<decltype(v)>, double>)
      out << std::bit_cast<std::uint64_t>(v) << '\n';
    else
      out << v << '\n';
  };
  ReplayTable::visit(t, [&](const char*, const auto& column) {
    if constexpr (requires { column.front(); } && !std::is_same_v<std::decay_t<decltype(column)>, std::string>) {
      for (const auto& v : column) put(v);
    } else {
      put(column);
    }
  });
  return out.str();
}
void expect_same(const ReplayTable& a, const ReplayTable& b) {
  ASSERT_FALSE(a.quantity.empty());
  EXPECT_EQ(text_of(a), text_of(b));
}

// A clean run, a named balance loss, a correction bias with groups, bfloat16 with ties, a SparseMixer's draws.
const char* const kTraces[] = {"ga8-aux-tf4.57.6", "qwen3_moe-aux-tf5.5.4", "bias-tf5.23.0", "bf16-tf4.57.6", "mixer-tf5.23.0"};
const std::string kHost = std::string("host ") + kernels::host_backend();

TEST(TraceReplay, TheSameOnAnyNumberOfThreads) {
  for (const char* name : kTraces) {
    const Replayed one = replay(name, 1);
    EXPECT_EQ(one.backend, kHost);
    for (const int threads : {2, 7}) expect_same(one.table, replay(name, threads).table);
  }
}

TEST(TraceReplay, ADeviceIsNamedAndHasTheHostsNumbers) {
  for (const char* name : kTraces) {
    const Replayed host = replay(name, 2);
    const Replayed device = replay(name, 2, Device::kCuda, open_test_device<kAlways, Status::kOk>);
    expect_same(host.table, device.table);
    EXPECT_EQ(device.backend, kHost + "; routing, balance loss and z-loss: cuda Test");
    EXPECT_EQ(device.warning, "");
  }
}

TEST(TraceReplay, ADeviceThatFailsIsReplacedByTheHostWithAWarning) {
  for (const char* name : kTraces) {
    const Replayed host = replay(name, 2);
    const Replayed later = replay(name, 2, Device::kCuda, open_test_device<3, Status::kLaunchFailed>);
    expect_same(host.table, later.table);
    EXPECT_EQ(later.backend, kHost + "; routing, balance loss and z-loss: cuda Test and " + kHost);
    EXPECT_EQ(later.warning, "cuda Test failed (injected); the host did the rest, with the same results");
    const Replayed at_once = replay(name, 2, Device::kCuda, open_test_device<0, Status::kLaunchFailed>);
    expect_same(host.table, at_once.table);
    EXPECT_EQ(at_once.backend, kHost);
    EXPECT_NE(at_once.warning.find("injected"), std::string::npos);
    const Replayed refuses = replay(name, 2, Device::kCuda, open_test_device<0, Status::kBadShape>);
    expect_same(host.table, refuses.table);
    EXPECT_EQ(refuses.warning, "");
  }
}

TEST(TraceReplay, AMissingDeviceIsAWarningWhereItWasAskedFor) {
  const Replayed asked = replay(kTraces[0], 1, Device::kCuda, open_nothing);
  EXPECT_EQ(asked.backend, kHost);
  EXPECT_EQ(asked.warning, "--device cuda: no CUDA device: the driver counts none; the host did it");
  EXPECT_EQ(replay(kTraces[0], 1, Device::kAuto, open_nothing).warning, "");
}

struct Measured {
  std::string numbers, backend, warning;
};
/// Every metric of every layer, doubles to the bit.
Measured health(const std::string& name, Device device, OpenDevice open) {
  std::vector<InputProblem> faults;
  const std::unique_ptr<Trace> trace = open_trace(MOE_AUDIT_SOURCE_DIR "/fixtures/traces/" + name, {}, &faults);
  EXPECT_TRUE(trace) << name;
  ReplayBackend backend(device, open, 0);
  HealthOptions options;
  options.threads = 2, options.backend = &backend;
  const HealthReport r = measure_health(*trace, options);
  EXPECT_FALSE(r.layers.empty());
  std::ostringstream out;
  for (const LayerHealth& l : r.layers) {
    for (const std::int64_t n : l.load) out << n << '\n';
    for (const HealthMetric& m : l.metrics) out << m.name << std::bit_cast<std::uint64_t>(std::isnan(m.value) ? 0 : m.value) << '\n';
  }
  return {out.str(), backend.name_beside_host(kMeasuredOnBackend), backend.warning()};
}

TEST(TraceHealth, OnADeviceThatWorksOrFailsTheSameNumbers) {
  for (const char* name : kTraces) {
    const Measured host = health(name, Device::kCpu, open_nothing);
    EXPECT_EQ(host.backend, kHost);
    const Measured device = health(name, Device::kCuda, open_test_device<kAlways, Status::kOk>);
    EXPECT_EQ(device.numbers, host.numbers);
    EXPECT_EQ(device.backend, kHost + "; routing and counts: cuda Test");
    EXPECT_EQ(device.warning, "");
    const Measured failed = health(name, Device::kCuda, open_test_device<3, Status::kLaunchFailed>);
    EXPECT_EQ(failed.numbers, host.numbers);
    EXPECT_EQ(failed.backend, kHost + "; routing and counts: cuda Test and " + kHost);
    EXPECT_EQ(failed.warning, "cuda Test failed (injected); the host did the rest, with the same results");
  }
}

#ifdef MOE_AUDIT_HAVE_CUDA
class TraceReplayCuda : public test::OnCuda {};
TEST_F(TraceReplayCuda, SameNumbersAsTheHost) {
  for (const char* name : kTraces) {
    const Replayed device = replay(name, 2, Device::kCuda, kernels::open_cuda);
    expect_same(replay(name, 2).table, device.table);
    EXPECT_EQ(device.backend.rfind(kHost + "; routing, balance loss and z-loss: cuda ", 0), 0u) << device.backend;
    EXPECT_EQ(device.backend.find("and host"), std::string::npos) << device.backend;
    EXPECT_EQ(device.warning, "");
    const Measured on_device = health(name, Device::kCuda, kernels::open_cuda);
    EXPECT_EQ(on_device.numbers, health(name, Device::kCpu, open_nothing).numbers);
    EXPECT_EQ(on_device.backend.rfind(kHost + "; routing and counts: cuda ", 0), 0u) << on_device.backend;
    EXPECT_EQ(on_device.backend.find("and host"), std::string::npos) << on_device.backend;
  }
}
#else
TEST(TraceReplayCuda, SameNumbersAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }
#endif

}  // namespace
}  // namespace moeaudit

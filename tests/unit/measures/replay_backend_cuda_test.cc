// The router-precision measure on a CUDA device against the host: the same bytes. And a device that refuses arguments.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(ReplayBackendCuda, SameTableAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include "tests/support/on_device.h"
#include "tests/unit/measures/router_checkpoint.h"

namespace moeaudit {
namespace {

using namespace test;  // NOLINT: router_checkpoint.h

class ReplayBackendCuda : public OnCuda {};

TEST_F(ReplayBackendCuda, SameTableAsTheHost) {
  // 130 values a row are more than one stretch of the gate's sum; 160 experts no multiple of a warp's lanes times 4.
  for (const Model& m : {Model{2, 8, 130, 2}, Model{1, 160, 512, 8}, Model{1, 384, 256, 8}}) {
    if (kEmulated && m.experts > 160) continue;  // half a minute
    const TensorStore store = weights_of(m).open("cuda");
    for (const Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid}) {
      FactSheet facts = facts_of(m);
      Routing routing = facts.routing.value();
      routing.scoring = scoring;
      facts.routing.set(routing, Origin::kFamily, {});
      facts.router_quantised.set(true, Origin::kDerived, {});
      const Measured host = measure(facts, store, {}, 2, true, Device::kCpu);
      const Measured device = measure(facts, store, {}, 2, true, Device::kCuda);
      expect_same_tables(host, device);
      EXPECT_EQ(device.records.at(0).backend.substr(0, 5), "cuda ") << device.records.at(0).backend;
      EXPECT_EQ(device.records.at(0).backend.find("host"), std::string::npos);
      EXPECT_EQ(device.records.at(0).warning, "");
    }
  }
}

TEST_F(ReplayBackendCuda, RefusesAsTheHostDoes) {
  std::string why;
  const std::unique_ptr<kernels::Backend> device = kernels::open_cuda(&why);
  ASSERT_NE(device, nullptr) << why;
  const double logits[4] = {1, 2, 3, 4};
  std::int32_t chosen[5] = {};
  kernels::RouteArgs<double> a;
  a.logits = logits, a.tokens = 1, a.experts = 4, a.top_k = 5;
  for (kernels::RouteResult<double> r : {kernels::RouteResult<double>{chosen}, {}}) {
    const kernels::Status host = kernels::route(a, r);
    EXPECT_NE(host, kernels::Status::kOk);
    EXPECT_EQ(device->route(a, r), host);
  }
  EXPECT_EQ(device->z_loss({nullptr, nullptr, 3, 4}, {}), kernels::Status::kNullPointer);
}

}  // namespace
}  // namespace moeaudit

#endif

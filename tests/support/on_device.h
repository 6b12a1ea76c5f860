// What tests of CUDA kernels share. Only where CUDA is (MOE_AUDIT_HAVE_CUDA).
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "kernels/cuda/router.h"

namespace moeaudit::test {

#ifdef MOE_AUDIT_EMULATED_CUDA
inline constexpr bool kEmulated = true;
#else
inline constexpr bool kEmulated = false;
#endif
/// As many where there is a device; so many where the host emulates one.
constexpr std::int64_t sized(std::int64_t on_device, std::int64_t emulated) { return kEmulated ? emulated : on_device; }

/// Skips where there is no device, and says so.
class OnCuda : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
};

/// Device memory with the values of a vector.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& v) : count_(v.size()) {
    EXPECT_EQ(cudaMalloc(&data_, count_ * sizeof(T)), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(data_, v.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }
  T* data() const { return static_cast<T*>(data_); }
  std::vector<T> fetch() const {
    std::vector<T> v(count_);
    EXPECT_EQ(cudaMemcpy(v.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return v;
  }

 private:
  void* data_ = nullptr;
  std::size_t count_;
};

/// Equal bit for bit, except that any NaN equals any other.
template <class T>
void expect_same(const std::vector<T>& host, const std::vector<T>& device, const std::string& what) {
  ASSERT_EQ(host.size(), device.size());
  for (std::size_t i = 0; i < host.size(); ++i) {
    if (host[i] != host[i] && device[i] != device[i]) continue;
    ASSERT_EQ(std::memcmp(&host[i], &device[i], sizeof(T)), 0)
        << what << " at " << i << ": " << host[i] << " and " << device[i];
  }
}

/// The ways of multiplying on tensor cores that the device has.
inline std::vector<kernels::cuda::TensorCores> tensor_cores() {
  std::vector cores{kernels::cuda::TensorCores::kWarp};
  if (kernels::cuda::warpgroups_present()) cores.push_back(kernels::cuda::TensorCores::kWarpgroup);
  return cores;
}

}  // namespace moeaudit::test

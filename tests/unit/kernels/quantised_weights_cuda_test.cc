// Dequantisation on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(QuantisedWeightsCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <cmath>
#include <string>
#include <vector>

#include "kernels/cuda/quantised_weights.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

using test::expect_same;
using test::OnDevice;

class QuantisedWeightsCuda : public test::OnCuda {};

std::vector<std::uint8_t> every_byte(std::int64_t n) {
  std::vector<std::uint8_t> b(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<std::uint8_t>(i * 37 + i / 256);
  return b;
}

/// `w` has everything but pointers; scales of any type come from `scale_bytes`.
void check(QuantisedWeights w, const std::vector<std::uint8_t>& scale_bytes, const std::string& what) {
  const std::int64_t n = w.matrices * w.rows * w.columns;
  const std::vector<std::uint8_t> codes = every_byte(two_a_byte(w.code) ? (n + 1) / 2 : n);
  const std::vector<float> table(kNf4Values, kNf4Values + 16);
  std::vector<float> map(256), absmax(8);
  for (int i = 0; i < 256; ++i) map[static_cast<std::size_t>(i)] = static_cast<float>(i - 128) / 100.0f;
  for (int i = 0; i < 8; ++i) absmax[static_cast<std::size_t>(i)] = 0.01f * static_cast<float>(i + 1);
  const OnDevice<std::uint8_t> d_codes(codes), d_scales(scale_bytes);
  const OnDevice<float> d_table(table), d_map(map), d_absmax(absmax);
  QuantisedWeights on_device = w;
  w.codes = codes.data(), w.table = table.data(), w.scales = scale_bytes.data();
  w.nested_map = map.data(), w.nested_absmax = absmax.data();
  on_device.codes = d_codes.data(), on_device.table = d_table.data(), on_device.scales = d_scales.data();
  on_device.nested_map = d_map.data(), on_device.nested_absmax = d_absmax.data();
  for (const std::int64_t first : {std::int64_t{0}, n / 3}) {
    const std::int64_t count = n - first - (first > 0 && n > 4 ? 2 : 0);
    std::vector<double> wide(static_cast<std::size_t>(count), -7);
    std::vector<float> narrow(wide.size(), -7);
    const OnDevice<double> d_wide(wide);
    const OnDevice<float> d_narrow(narrow);
    ASSERT_EQ(dequantise(w, first, count, wide.data()), Status::kOk) << what;
    ASSERT_EQ(dequantise(w, first, count, narrow.data()), Status::kOk) << what;
    ASSERT_EQ(cuda::dequantise(on_device, first, count, d_wide.data(), nullptr), Status::kOk) << what;
    ASSERT_EQ(cuda::dequantise(on_device, first, count, d_narrow.data(), nullptr), Status::kOk) << what;
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
    expect_same(wide, d_wide.fetch(), what + " float64");
    expect_same(narrow, d_narrow.fetch(), what + " float32");
  }
}

TEST_F(QuantisedWeightsCuda, SameBitsAsTheHost) {
  struct Shape {
    std::int64_t matrices, rows, columns, row_block, column_block;
  };
  for (const Shape s :
       {Shape{1, 1, 1, 1, 1}, {3, 130, 258, 128, 128}, {2, 6, 96, 1, 32}, {1, 1, 20000, 1, 64}, {1, 300, 7, 1, 7}}) {
    const std::int64_t scales = s.matrices * blocks_of(s.rows, s.row_block) * blocks_of(s.columns, s.column_block);
    for (const WeightCode code :
         {WeightCode::kE4M3, WeightCode::kE5M2, WeightCode::kInt8, WeightCode::kE2M1, WeightCode::kTable}) {
      for (const ScaleType type : {ScaleType::kF64, ScaleType::kF32, ScaleType::kBF16, ScaleType::kF16,
                                   ScaleType::kE4M3, ScaleType::kE8M0, ScaleType::kNested}) {
        QuantisedWeights w;
        w.code = code, w.high_half_first = code == WeightCode::kTable, w.scale_type = type;
        w.matrices = s.matrices, w.rows = s.rows, w.columns = s.columns, w.row_block = s.row_block,
        w.column_block = s.column_block;
        w.nested_block = 64, w.nested_offset = 0.05f;
        w.factor = type == ScaleType::kE4M3 ? 0.0123 : 1, w.divisor = code == WeightCode::kInt8 ? 127 : 1;
        check(w, every_byte(8 * scales),
              "code " + std::to_string(static_cast<int>(code)) + " scales " + std::to_string(static_cast<int>(type)) +
                  " columns " + std::to_string(s.columns));
      }
    }
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif

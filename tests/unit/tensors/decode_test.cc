// Every pattern of the small dtypes against torch (fixtures/tensors/dtype_golden.json) or a second derivation; bounds.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "audit/tensors/safetensors.h"
#include "audit/tensors/tensor_store.h"

namespace moeaudit {
namespace {

using nlohmann::json;

/// A view of `values`, one byte off any alignment.
template <class T>
struct Misaligned {
  explicit Misaligned(DType dtype, const std::vector<T>& values)
      : bytes(values.size() * sizeof(T) + 1), extent(static_cast<std::int64_t>(values.size())) {
    std::memcpy(bytes.data() + 1, values.data(), values.size() * sizeof(T));
    view.dtype = dtype;
    view.shape = {&extent, 1};
    view.bytes = {bytes.data() + 1, values.size() * sizeof(T)};
  }
  std::vector<std::byte> bytes;
  std::int64_t extent;
  TensorView view;
};

template <class Out, class T>
std::vector<Out> decoded(DType dtype, const std::vector<T>& values) {
  const Misaligned<T> m(dtype, values);
  std::vector<Out> out(values.size());
  EXPECT_TRUE(decode(m.view, 0, m.extent, out.data()));
  return out;
}

void expect_same(double got, double want, std::int64_t pattern) {
  if (std::isnan(want)) {
    EXPECT_TRUE(std::isnan(got)) << pattern;
  } else {
    EXPECT_EQ(std::bit_cast<std::uint64_t>(got), std::bit_cast<std::uint64_t>(want))
        << pattern << ": " << got << ", want " << want;
  }
}

TEST(Decode, SmallFloatsAreWhatTorchMakesOfThem) {
  std::ifstream in(MOE_AUDIT_SOURCE_DIR "/fixtures/tensors/dtype_golden.json");
  const json golden = json::parse(in);
  for (const char* name : {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F16", "BF16"}) {
    const DTypeInfo info = dtype_info(name);
    ASSERT_GE(golden[name].size(), 200u);
    for (const json& row : golden[name]) {
      const auto pattern = row[0].get<std::uint16_t>();
      const double want = std::strtod(row[1].get<std::string>().c_str(), nullptr);
      double as_double = 0;
      float as_float = 0;
      if (info.bits == 8) {
        as_double = decoded<double>(info.dtype, std::vector<std::uint8_t>{static_cast<std::uint8_t>(pattern)})[0];
        as_float = decoded<float>(info.dtype, std::vector<std::uint8_t>{static_cast<std::uint8_t>(pattern)})[0];
      } else {
        as_double = decoded<double>(info.dtype, std::vector<std::uint16_t>{pattern})[0];
        as_float = decoded<float>(info.dtype, std::vector<std::uint16_t>{pattern})[0];
      }
      SCOPED_TRACE(name);
      expect_same(as_double, want, pattern);
      expect_same(static_cast<double>(as_float), want, pattern);  // each fits a float exactly
    }
  }
}

/// IEEE 754: sign, exponent with a bias, fraction; from the fields, without bit tricks.
double from_fields(std::uint32_t bits, int exponent_bits, int fraction_bits) {
  const std::uint32_t fraction = bits & ((1u << fraction_bits) - 1);
  const int all = (1 << exponent_bits) - 1, bias = all >> 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & all;
  const double sign = bits >> (exponent_bits + fraction_bits) & 1 ? -1.0 : 1.0;
  if (exponent == all) return fraction ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp((1 << fraction_bits) + static_cast<double>(fraction), exponent - bias - fraction_bits);
}

TEST(Decode, EveryHalfAndEveryBfloat) {
  std::vector<std::uint16_t> all(65536);
  for (std::uint32_t i = 0; i < 65536; ++i) all[i] = static_cast<std::uint16_t>(i);
  const auto halves = decoded<double>(DType::kF16, all), bfloats = decoded<double>(DType::kBF16, all);
  for (std::uint32_t i = 0; i < 65536; ++i) {
    expect_same(halves[i], from_fields(i, 5, 10), i);
    expect_same(bfloats[i], from_fields(i, 8, 7), i);
  }
}

TEST(Decode, IntegersAndWideFloats) {
  EXPECT_EQ(decoded<double>(DType::kI8, std::vector<std::int8_t>{-128, 127}), (std::vector<double>{-128, 127}));
  EXPECT_EQ(decoded<double>(DType::kU8, std::vector<std::uint8_t>{255}), (std::vector<double>{255}));
  EXPECT_EQ(decoded<double>(DType::kI16, std::vector<std::int16_t>{-32768}), (std::vector<double>{-32768}));
  EXPECT_EQ(decoded<double>(DType::kU16, std::vector<std::uint16_t>{65535}), (std::vector<double>{65535}));
  EXPECT_EQ(decoded<double>(DType::kI32, std::vector<std::int32_t>{-2147483647 - 1}),
            (std::vector<double>{-2147483648.0}));
  EXPECT_EQ(decoded<double>(DType::kU32, std::vector<std::uint32_t>{4294967295u}), (std::vector<double>{4294967295.0}));
  EXPECT_EQ(decoded<double>(DType::kI64, std::vector<std::int64_t>{-(1LL << 53)}),
            (std::vector<double>{-9007199254740992.0}));
  EXPECT_EQ(decoded<double>(DType::kU64, std::vector<std::uint64_t>{1ULL << 63}),
            (std::vector<double>{9223372036854775808.0}));
  EXPECT_EQ(decoded<double>(DType::kBool, std::vector<std::uint8_t>{0, 1, 7}), (std::vector<double>{0, 1, 1}));
  EXPECT_EQ(decoded<double>(DType::kF64, std::vector<double>{0.1, -0.0}), (std::vector<double>{0.1, -0.0}));
  EXPECT_EQ(decoded<float>(DType::kF64, std::vector<double>{0.1}), (std::vector<float>{0.1f}));  // rounded to nearest
  EXPECT_EQ(decoded<double>(DType::kF32, std::vector<float>{1e-45f}), (std::vector<double>{0x1p-149}));
}

TEST(Decode, RefusesWhatItCannotReadAndWhatIsNotThere) {
  const Misaligned<float> m(DType::kF32, {1, 2, 3});
  double out[3] = {};
  EXPECT_TRUE(decode(m.view, 1, 2, out));
  EXPECT_EQ(out[0], 2);
  EXPECT_EQ(out[1], 3);
  EXPECT_TRUE(decode(m.view, 3, 0, out));
  EXPECT_FALSE(decode(m.view, 1, 3, out));
  EXPECT_FALSE(decode(m.view, -1, 1, out));
  EXPECT_FALSE(decode(m.view, 0, -1, out));
  EXPECT_FALSE(decode(m.view, 4, 0, out));
  EXPECT_FALSE(decode(m.view, INT64_MAX, INT64_MAX, out));
  for (const DType dtype : {DType::kF4, DType::kF6E2M3, DType::kF6E3M2, DType::kC64, DType::kUnknown}) {
    TensorView view = m.view;
    view.dtype = dtype;
    EXPECT_FALSE(decode(view, 0, 1, out));
  }
}

TEST(Decode, SizesAgreeWithTheFormat) {
  for (const char* name : {"F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I32", "I16", "I8",
                           "U64", "U32", "U16", "U8", "BOOL", "C64"}) {
    EXPECT_EQ(size_of(dtype_info(name).dtype) * 8, dtype_info(name).bits) << name;
    EXPECT_STREQ(name_of(dtype_info(name).dtype), name);
  }
  for (const char* name : {"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "X"})
    EXPECT_EQ(size_of(dtype_info(name).dtype), 0) << name;
}

}  // namespace
}  // namespace moeaudit

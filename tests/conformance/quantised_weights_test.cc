// Dequantisation: kernels/host against reference/ and the long way, every code and scale, every edge of a block, and
// what bitsandbytes, transformers, compressed-tensors and torch make of the same bytes. A value is one code times one
// scale, so the comparison is of bits.
#define BOOST_TEST_MODULE quantised_weights
#include "kernels/host/quantised_weights.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "audit/inputs/inputs.h"
#include "audit/text/text.h"
#include "reference/quantised_weights.h"
#include "tests/support/on_every_target.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
using k::QuantisedWeights;
using k::ScaleType;
using k::WeightCode;
using moeaudit::Node;
using Bytes = std::vector<std::uint8_t>;

constexpr double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

template <class T>
T one_nan(T v) {
  return v == v ? v : static_cast<T>(k::kQuietNaN);
}
/// Bit for bit, where every NaN of `want` stands for the one quiet NaN. How many differ; the first is reported.
template <class T>
std::int64_t differing(const std::vector<T>& got, const std::vector<T>& want, const std::string& what) {
  BOOST_REQUIRE_MESSAGE(got.size() == want.size() && !got.empty(),
                        what << ": " << got.size() << " and " << want.size());
  std::int64_t n = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const T w = one_nan(want[i]);
    if (std::memcmp(&got[i], &w, sizeof w) == 0) continue;
    if (n++ == 0) BOOST_TEST_MESSAGE(what << " at " << i << ": " << got[i] << ", expected " << want[i]);
  }
  return n;
}
#define SAME(got, want, what) BOOST_CHECK_MESSAGE(differing(got, want, what) == 0, what)

template <class T>
std::vector<T> dequantised(const QuantisedWeights& w, std::int64_t first, std::int64_t count) {
  std::vector<T> out(static_cast<std::size_t>(count), T(-7));
  BOOST_REQUIRE(k::dequantise(w, first, count, out.data()) == k::Status::kOk);
  return out;
}
template <class T>
std::vector<T> dequantised(const QuantisedWeights& w) {
  return dequantised<T>(w, 0, w.matrices * w.rows * w.columns);
}
template <class T>
std::vector<T> values_of(const at::Tensor& t) {
  const at::Tensor c = t.to(std::is_same_v<T, float> ? at::kFloat : at::kDouble).contiguous();
  return {c.data_ptr<T>(), c.data_ptr<T>() + c.numel()};
}
at::Tensor tensor_of(const Bytes& b) {
  return at::from_blob(const_cast<std::uint8_t*>(b.data()), {static_cast<std::int64_t>(b.size())}, at::kByte).clone();
}
Bytes random_bytes(std::int64_t n, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes out(static_cast<std::size_t>(n));
  for (auto& b : out) b = static_cast<std::uint8_t>(random() >> 56);
  return out;
}
Bytes all_bytes() {
  Bytes b(256);
  for (int i = 0; i < 256; ++i) b[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(i);
  return b;
}
std::vector<float> random_scales(std::int64_t n, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> out(static_cast<std::size_t>(n));
  for (auto& v : out)
    v = std::ldexp(1.0f + static_cast<float>(random() % 8388608) * 0x1p-23f, -12 + static_cast<int>(random() % 12));
  return out;
}

/// The values of the codes by the definition, float64, one after the other.
at::Tensor code_values(const QuantisedWeights& w, const Bytes& codes) {
  const at::Tensor t = tensor_of(codes);
  switch (w.code) {
    case WeightCode::kE4M3: return ref::small_float_values(t, 4, 3, ref::Specials::kAllOnes);
    case WeightCode::kE5M2: return ref::small_float_values(t, 5, 2, ref::Specials::kIeee);
    case WeightCode::kInt8: return at::where(t.ge(128), t.to(at::kDouble) - 256, t.to(at::kDouble));
    case WeightCode::kE2M1:
      return ref::small_float_values(ref::halves(t, w.high_half_first), 2, 1, ref::Specials::kNone);
    case WeightCode::kTable: {
      const at::Tensor table = at::from_blob(const_cast<void*>(w.table), {16}, at::kFloat).to(at::kDouble);
      return table.index({ref::halves(t, w.high_half_first)});
    }
  }
  return {};
}
constexpr WeightCode kCodes[] = {WeightCode::kE4M3, WeightCode::kE5M2, WeightCode::kInt8, WeightCode::kE2M1,
                                 WeightCode::kTable};

QuantisedWeights one_scale(const Bytes& codes, WeightCode code, const float* scale) {
  QuantisedWeights w;
  w.codes = codes.data(), w.code = code, w.table = k::kNf4Values;
  w.rows = 1, w.columns = static_cast<std::int64_t>(codes.size()) * (k::two_a_byte(code) ? 2 : 1),
  w.column_block = w.columns;
  w.scales = scale;
  return w;
}

BOOST_AUTO_TEST_CASE(every_code_stands_for_what_its_format_says) {
  const Bytes codes = all_bytes();
  for (const WeightCode code : kCodes) {
    for (const bool high_first : {false, true}) {
      const float one = 1;
      QuantisedWeights w = one_scale(codes, code, &one);
      w.high_half_first = high_first;
      const at::Tensor want = code_values(w, codes);
      const std::string what = "code " + std::to_string(static_cast<int>(code));
      SAME(dequantised<double>(w), values_of<double>(want), what);
      SAME(dequantised<float>(w), values_of<float>(want), what);
    }
  }
  // The second derivation: E5M2 is the upper half of a binary16, E4M3 lies one bit further down and 2^8 times higher.
  const at::Tensor c = tensor_of(codes).to(at::kInt);
  const auto halves = [](const at::Tensor& bits) { return bits.to(at::kShort).view(at::kHalf).to(at::kDouble); };
  const float one = 1;
  SAME(dequantised<double>(one_scale(codes, WeightCode::kE5M2, &one)), values_of<double>(halves(c * 256)), "E5M2");
  std::vector<double> e4m3 = values_of<double>(halves(c.remainder(128) * 128 + c.floor_divide(128) * 32768) * 256);
  e4m3[127] = e4m3[255] = kNaN;
  SAME(dequantised<double>(one_scale(codes, WeightCode::kE4M3, &one)), e4m3, "E4M3");
  BOOST_CHECK(e4m3[126] == 448 && e4m3[1] == 0x1p-9 && e4m3[8] == 0x1p-6 && std::signbit(e4m3[128]));
  const Bytes each = {0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE};
  SAME(dequantised<double>(one_scale(each, WeightCode::kE2M1, &one)),
       (std::vector<double>{0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6}), "E2M1");
}

BOOST_AUTO_TEST_CASE(nf4_is_made_of_quantiles) {
  const std::vector<double> want = values_of<double>(ref::nf4_values());
  // The published values were computed in float32: each is off by a few of its roundings, 2^-25 of at most 1.
  for (int i = 0; i < 16; ++i)
    BOOST_CHECK_SMALL(static_cast<double>(k::kNf4Values[i]) - want[static_cast<std::size_t>(i)], 4 * 0x1p-25);
}

BOOST_AUTO_TEST_CASE(every_scale_stands_for_what_its_format_says) {
  // 256 scales of a byte, one a row of 3 values: E8M0 and E4M3 against the definition.
  const Bytes codes = random_bytes(256 * 3, 3), bytes = all_bytes();
  QuantisedWeights w;
  w.codes = codes.data(), w.code = WeightCode::kInt8, w.rows = 256, w.columns = w.column_block = 3,
  w.scales = bytes.data();
  const at::Tensor values = code_values(w, codes).reshape({1, 256, 3});
  const auto expect = [&](ScaleType type, const at::Tensor& scales, const std::string& what) {
    w.scale_type = type;
    SAME(dequantised<double>(w),
         values_of<double>(ref::block_scaled(values, scales.to(at::kDouble).reshape({1, -1, 1}), 1, 3)), what);
    SAME(dequantised<float>(w),
         values_of<float>(ref::block_scaled(values.to(at::kFloat), scales.to(at::kFloat).reshape({1, -1, 1}), 1, 3)),
         what);
  };
  expect(ScaleType::kE8M0, ref::exponent_values(tensor_of(bytes)), "E8M0");
  expect(ScaleType::kE4M3, ref::small_float_values(tensor_of(bytes), 4, 3, ref::Specials::kAllOnes), "E4M3");
  // Every binary16, infinities, NaN and subnormals included, and every bfloat16 (as the upper half of a float32).
  for (int first = 0; first < 65536; first += 256) {
    std::vector<std::int16_t> bits(256);
    for (int i = 0; i < 256; ++i) bits[static_cast<std::size_t>(i)] = static_cast<std::int16_t>(first + i);
    w.scales = bits.data();
    const at::Tensor t = at::from_blob(bits.data(), {256}, at::kShort);
    expect(ScaleType::kF16, t.view(at::kHalf), "binary16 from " + std::to_string(first));
    expect(ScaleType::kBF16, t.view(at::kBFloat16), "bfloat16 from " + std::to_string(first));
  }
}

BOOST_AUTO_TEST_CASE(blocks_of_every_shape) {
  struct Shape {
    std::int64_t matrices, rows, columns, row_block, column_block;
  };
  const Shape shapes[] = {{1, 1, 1, 1, 1},           {1, 1, 127, 128, 128},   {1, 127, 129, 128, 128},
                          {1, 128, 128, 128, 128},   {1, 129, 255, 128, 128}, {3, 130, 258, 128, 128},
                          {2, 300, 2, 128, 128},     {4, 5, 7, 1, 7},         {4, 5, 7, 5, 7},
                          {2, 3, 2050, 2, 33},       {1, 1, 4096, 1, 16},     {2, 6, 96, 1, 32},
                          {1, 1, 64 * 5 + 1, 1, 64}, {160, 2, 3, 2, 3},       {1, 1, 1025, 1, 1}};
  for (const Shape s : shapes) {
    const std::int64_t n = s.matrices * s.rows * s.columns, rows = k::blocks_of(s.rows, s.row_block),
                       columns = k::blocks_of(s.columns, s.column_block);
    const std::vector<float> scales = random_scales(s.matrices * rows * columns, 11);
    const at::Tensor grid = at::from_blob(const_cast<float*>(scales.data()), {s.matrices, rows, columns}, at::kFloat);
    for (const WeightCode code : kCodes) {
      const Bytes codes = random_bytes(k::two_a_byte(code) ? (n + 1) / 2 : n, 5);
      QuantisedWeights w;
      w.codes = codes.data(), w.code = code, w.table = k::kNf4Values, w.scales = scales.data();
      w.matrices = s.matrices, w.rows = s.rows, w.columns = s.columns, w.row_block = s.row_block,
      w.column_block = s.column_block;
      const at::Tensor values = code_values(w, codes).narrow(0, 0, n).reshape({s.matrices, s.rows, s.columns});
      const std::string what = "code " + std::to_string(static_cast<int>(code)) + " " + std::to_string(s.rows) + " x " +
                               std::to_string(s.columns);
      const std::vector<double> whole = dequantised<double>(w);
      SAME(whole, values_of<double>(ref::block_scaled(values, grid.to(at::kDouble), s.row_block, s.column_block)),
           what);
      SAME(dequantised<float>(w),
           values_of<float>(ref::block_scaled(values.to(at::kFloat), grid, s.row_block, s.column_block)), what);
      // Any part of it is a part of the whole, whatever the place it begins at.
      for (const std::int64_t first : {std::int64_t{0}, n / 2, n / 3, n - 1}) {
        for (const std::int64_t count : {std::int64_t{1}, (n - first) / 2, n - first}) {
          if (count < 1) continue;
          SAME(dequantised<double>(w, first, count),
               std::vector<double>(whole.begin() + first, whole.begin() + first + count), what);
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(double_quantisation) {
  // 700 blocks of 64, 3 nested blocks, the last of each kind cut short; everything at odd addresses.
  const std::int64_t n = 700 * 64 - 5, blocks = 700;
  const Bytes codes = random_bytes((n + 1) / 2, 1), absmax = random_bytes(blocks, 2);
  const std::vector<float> map = random_scales(256, 3), nested = random_scales(3, 4);
  std::vector<char> at_odd(1 + 4 * (16 + 256 + 3));
  char* const base = at_odd.data() + 1;
  std::memcpy(base, k::kNf4Values, 64);
  std::memcpy(base + 64, map.data(), 1024);
  std::memcpy(base + 1088, nested.data(), 12);
  QuantisedWeights w;
  w.codes = codes.data(), w.code = WeightCode::kTable, w.high_half_first = true, w.table = base;
  w.rows = 1, w.columns = n, w.column_block = 64, w.scales = absmax.data(), w.scale_type = ScaleType::kNested;
  w.nested_map = base + 64, w.nested_absmax = base + 1088, w.nested_block = 256, w.nested_offset = 0.0613f;
  const auto floats = [](const std::vector<float>& v) {
    return at::from_blob(const_cast<float*>(v.data()), {static_cast<std::int64_t>(v.size())}, at::kFloat);
  };
  const at::Tensor scales =
      ref::nested_scales(tensor_of(absmax), floats(map), floats(nested), 256, 0.0613f).reshape({1, 1, blocks});
  QuantisedWeights aligned = w;
  aligned.table = k::kNf4Values;
  const at::Tensor values = code_values(aligned, codes).narrow(0, 0, n).reshape({1, 1, n});
  SAME(dequantised<double>(w), values_of<double>(ref::block_scaled(values, scales.to(at::kDouble), 1, 64)), "nested");
  SAME(dequantised<float>(w), values_of<float>(ref::block_scaled(values.to(at::kFloat), scales, 1, 64)), "nested");
}

BOOST_AUTO_TEST_CASE(factors_and_extremes) {
  const Bytes codes = all_bytes();
  const std::vector<double> wide = {
      4.9406564584124654e-324, 1e-310, 1.7976931348623157e308, kInf, -kInf, kNaN, 0.0, -0.0, -3.0};
  for (const double scale : wide) {
    for (const WeightCode code : kCodes) {
      QuantisedWeights w = one_scale(codes, code, nullptr);
      w.scales = &scale, w.scale_type = ScaleType::kF64;
      const at::Tensor values = code_values(w, codes);
      SAME(dequantised<double>(w), values_of<double>(values * scale), "scale " + std::to_string(scale));
      SAME(dequantised<float>(w),
           values_of<float>(values.to(at::kFloat) * at::full({}, static_cast<float>(scale), at::kFloat)), "scale");
      w.factor = 0.0123, w.divisor = 777;
      SAME(dequantised<double>(w), values_of<double>(values * (scale * 0.0123 / 777)), "factor");
      const float s = static_cast<float>(scale);
      const auto number = [](float v) { return at::full({}, v, at::kFloat); };
      const at::Tensor narrow = values.to(at::kFloat);
      SAME(dequantised<float>(w),
           values_of<float>(code == WeightCode::kInt8 ? narrow * number(s) * number(static_cast<float>(0.0123 / 777))
                                                      : narrow * number(s * 0.0123f / 777.0f)),
           "factor");
    }
  }
  // float32 denormals as scales, and products that become denormal.
  const float tiny = 1e-44f;
  for (const WeightCode code : kCodes) {
    const QuantisedWeights w = one_scale(codes, code, &tiny);
    const at::Tensor values = code_values(w, codes);
    SAME(dequantised<double>(w), values_of<double>(values * static_cast<double>(tiny)), "denormal");
    SAME(dequantised<float>(w), values_of<float>(values.to(at::kFloat) * at::full({}, tiny, at::kFloat)), "denormal");
  }
}

BOOST_AUTO_TEST_CASE(every_instruction_set_and_the_long_way_agree) {
  const std::int64_t n = 2 * 37 * 131;
  int sets = 0;
  for (const WeightCode code : kCodes) {
    const Bytes codes = random_bytes(n, 21);
    const std::vector<float> scales = random_scales(2 * 5 * 9, 22);
    QuantisedWeights w;
    w.codes = codes.data(), w.code = code, w.table = k::kNf4Values, w.scales = scales.data(), w.divisor = 127;
    w.matrices = 2, w.rows = 37, w.columns = 131, w.row_block = 8, w.column_block = 15;
    std::vector<double> wide;
    std::vector<float> narrow;
    for (std::int64_t i = 0; i < n; ++i) {
      wide.push_back(k::dequantised<double>(w, i));
      narrow.push_back(k::dequantised<float>(w, i));
    }
    sets += moeaudit::test::on_every_target([&] {
      SAME(dequantised<double>(w), wide, k::host_backend());
      SAME(dequantised<float>(w), narrow, k::host_backend());
      SAME(dequantised<double>(w, 1, n - 2), std::vector<double>(wide.begin() + 1, wide.end() - 1), k::host_backend());
    });
  }
  BOOST_CHECK(sets >= 10);
}

BOOST_AUTO_TEST_CASE(wrong_arguments) {
  const Bytes codes = all_bytes();
  const float one = 1;
  double out[256];
  const QuantisedWeights good = one_scale(codes, WeightCode::kE4M3, &one);
  const auto status = [&](auto change, std::int64_t first = 0, std::int64_t count = 256) {
    QuantisedWeights w = good;
    change(w);
    return k::dequantise(w, first, count, out);
  };
  const auto same = [](QuantisedWeights&) {};
  BOOST_CHECK(status(same) == k::Status::kOk);
  BOOST_CHECK(status(same, 256, 0) == k::Status::kOk);
  BOOST_CHECK(status(same, 0, 257) == k::Status::kBadShape);
  BOOST_CHECK(status(same, -1, 1) == k::Status::kBadShape);
  BOOST_CHECK(status(same, 1, std::numeric_limits<std::int64_t>::max()) == k::Status::kBadShape);
  BOOST_CHECK(status([](QuantisedWeights& w) { w.column_block = 0; }) == k::Status::kBadShape);
  BOOST_CHECK(status([](QuantisedWeights& w) { w.rows = std::numeric_limits<std::int64_t>::max(); }) ==
              k::Status::kBadShape);
  BOOST_CHECK(status([](QuantisedWeights& w) { w.scales = nullptr; }) == k::Status::kNullPointer);
  BOOST_CHECK(status([](QuantisedWeights& w) { w.code = WeightCode::kTable, w.table = nullptr; }) ==
              k::Status::kNullPointer);
  BOOST_CHECK(status([](QuantisedWeights& w) { w.scale_type = ScaleType::kNested; }) == k::Status::kNullPointer);
}

// ---- the real libraries
// ------------------------------------------------------------------------------------------------

Bytes unhex(const Node& node, const char* key) {
  Bytes out;
  const Node* field = node.find(key);
  if (field == nullptr) return out;
  const std::string& text = *field->as_string();
  for (std::size_t i = 0; i + 1 < text.size(); i += 2)
    out.push_back(static_cast<std::uint8_t>(std::stoi(text.substr(i, 2), nullptr, 16)));
  return out;
}
std::int64_t integer(const Node& node, const char* key, std::int64_t otherwise) {
  const Node* field = node.find(key);
  return field == nullptr ? otherwise : field->as_int().value();
}
std::vector<float> floats(const Bytes& bytes, int size) {
  std::vector<float> out;
  for (std::size_t i = 0; i < bytes.size(); i += static_cast<std::size_t>(size)) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, bytes.data() + i, static_cast<std::size_t>(size));
    out.push_back(std::bit_cast<float>(size == 2 ? bits << 16 : bits));
  }
  return out;
}

BOOST_AUTO_TEST_CASE(the_libraries_make_the_same_of_the_same_bytes) {
  std::string text, error;
  BOOST_REQUIRE_MESSAGE(
      moeaudit::read_file(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/quantised_weights.json", &text, &error), error);
  Node root;
  moeaudit::TextError where;
  BOOST_REQUIRE_MESSAGE(moeaudit::parse_json(text, &root, nullptr, &where), where.what);
  int seen = 0;
  for (const Node& c : root.find("cases")->items) {
    const std::string name(*c.find("name")->as_string()), what = name + ", " + *c.find("library")->as_string();
    const Bytes codes = unhex(c, "codes"), table = unhex(c, "table"), map = unhex(c, "nested_map"),
                nested = unhex(c, "nested_absmax"), offset = unhex(c, "nested_offset");
    Bytes scales = unhex(c, "scales");
    const std::vector<float> want = floats(unhex(c, "float32"), 4), want_bf16 = floats(unhex(c, "bfloat16"), 2);
    const auto n = static_cast<std::int64_t>(want.size());
    QuantisedWeights w;
    const float one = 1;
    w.codes = codes.data(), w.scales = scales.empty() ? static_cast<const void*>(&one) : scales.data();
    w.rows = 1, w.columns = w.column_block = n;
    if (name.starts_with("every")) {
      if (name == "every e8m0") {  // the codes are the scales of ones
        w.scales = codes.data(), w.scale_type = ScaleType::kE8M0, w.column_block = 1, w.code = WeightCode::kInt8;
        scales.assign(256, 1), w.codes = scales.data();
      } else {
        w.code = name == "every e4m3" ? WeightCode::kE4M3 : WeightCode::kE5M2;
      }
    } else if (name.starts_with("nf4")) {
      w.code = WeightCode::kTable, w.high_half_first = true, w.table = table.data(),
      w.column_block = integer(c, "block", 0);
      if (!map.empty()) {
        w.scale_type = ScaleType::kNested, w.nested_map = map.data(), w.nested_absmax = nested.data();
        w.nested_block = integer(c, "nested_block", 0), w.nested_offset = floats(offset, 4).at(0);
      }
    } else if (name == "int8") {
      w.code = WeightCode::kInt8, w.rows = integer(c, "rows", 0), w.columns = w.column_block = integer(c, "columns", 0),
      w.divisor = 127;
    } else if (name == "mxfp4") {
      w.code = WeightCode::kE2M1, w.scale_type = ScaleType::kE8M0, w.column_block = 16;
    } else if (name == "fp4 in int8") {
      w.code = WeightCode::kE2M1, w.scale_type = ScaleType::kE8M0, w.column_block = 32;
    } else if (name == "nvfp4") {
      w.code = WeightCode::kE2M1, w.scale_type = ScaleType::kE4M3, w.column_block = 16,
      w.divisor = c.find("divisor")->as_double().value();
    } else {
      w.code = name == "blocks e4m3" ? WeightCode::kE4M3 : WeightCode::kE5M2;
      w.matrices = integer(c, "matrices", 0), w.rows = integer(c, "rows", 0), w.columns = integer(c, "columns", 0);
      w.row_block = integer(c, "row_block", 0), w.column_block = integer(c, "column_block", 0);
    }
    std::vector<float> got = dequantised<float>(w), got_bf16(got.size());
    k::round_values(got.data(), n, k::Float::kBF16, got_bf16.data());
    if (name == "mxfp4") {  // scale 255: 2^128 in transformers, NaN in the standard
      for (std::int64_t i = n - 16; i < n; ++i) {
        const float code = k::code_value(w, i), theirs = want[static_cast<std::size_t>(i)];
        BOOST_CHECK(theirs == std::ldexp(code, 128) && std::isnan(got[static_cast<std::size_t>(i)]));
        got[static_cast<std::size_t>(i)] = got_bf16[static_cast<std::size_t>(i)] = theirs;
      }
    }
    SAME(got, want, what);
    if (!want_bf16.empty()) SAME(got_bf16, want_bf16, what + ", bfloat16");
    // Float64 is the value before any rounding: one product of float32 away, two for int8, the scale's two for nvfp4.
    const std::vector<double> wide = dequantised<double>(w);
    for (std::size_t i = 0; i < wide.size(); ++i) {
      if (!std::isfinite(want[i]) || !std::isfinite(wide[i])) continue;
      BOOST_CHECK_SMALL(static_cast<double>(want[i]) - wide[i], 3 * 0x1p-24 * std::fabs(wide[i]) + 0x1p-149);
    }
    ++seen;
  }
  BOOST_CHECK(seen == 13);
}

}  // namespace

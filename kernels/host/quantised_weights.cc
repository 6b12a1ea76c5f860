// Quantised weights: one translation unit, compiled once per instruction set by Highway and chosen at run time. Codes
// become floats in a buffer that stays in the first cache, then each run of one scale is multiplied.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/host/quantised_weights.cc"
#include "kernels/host/quantised_weights.h"

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

HWY_BEFORE_NAMESPACE();
namespace moeaudit::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr std::int64_t kChunk = 1024;  // values unpacked at a time

#if HWY_TARGET != HWY_SCALAR
constexpr std::int64_t kHalves = 16;  // values of one step where two are in a byte

/// The four bytes of each of 16 floats, one vector a byte: a look-up of bytes is on every CPU.
struct Planes {
  std::uint8_t byte[4][kHalves];
  explicit Planes(const QuantisedWeights& w) {
    for (unsigned i = 0; i < kHalves; ++i) {
      const float v = w.code == WeightCode::kE2M1 ? e2m1_value(i) : element_at<float>(w.table, i);
      const auto bits = std::bit_cast<std::uint32_t>(v);
      for (int b = 0; b < 4; ++b) byte[b][i] = static_cast<std::uint8_t>(bits >> 8 * b);
    }
  }
};

/// Whole steps of 16 values from 8 bytes; how many values that were.
std::int64_t unpack_halves(const Planes& planes, bool high_half_first, const std::uint8_t* from, std::int64_t count,
                           float* HWY_RESTRICT out) {
  const hn::FixedTag<std::uint8_t, 16> d;
  const hn::FixedTag<std::uint8_t, 8> d8;
  const hn::FixedTag<std::uint16_t, 8> d16;
  const hn::FixedTag<float, 4> df;
  const auto p0 = hn::LoadU(d, planes.byte[0]), p1 = hn::LoadU(d, planes.byte[1]), p2 = hn::LoadU(d, planes.byte[2]),
             p3 = hn::LoadU(d, planes.byte[3]);
  const auto mask = hn::Set(d8, std::uint8_t{15});
  std::int64_t i = 0;
  for (; i + kHalves <= count; i += kHalves) {
    const auto bytes = hn::LoadU(d8, from + i / 2);
    const auto high = hn::ShiftRight<4>(bytes), low = hn::And(bytes, mask);
    const auto first = hn::ZeroExtendVector(d, high_half_first ? high : low),
               second = hn::ZeroExtendVector(d, high_half_first ? low : high);
    const auto index = hn::InterleaveLower(d, first, second);
    const auto b0 = hn::TableLookupBytes(p0, index), b1 = hn::TableLookupBytes(p1, index),
               b2 = hn::TableLookupBytes(p2, index), b3 = hn::TableLookupBytes(p3, index);
    const auto low_a = hn::BitCast(d16, hn::InterleaveLower(d, b0, b1)),
               low_b = hn::BitCast(d16, hn::InterleaveUpper(d, b0, b1)),
               high_a = hn::BitCast(d16, hn::InterleaveLower(d, b2, b3)),
               high_b = hn::BitCast(d16, hn::InterleaveUpper(d, b2, b3));
    hn::StoreU(hn::BitCast(df, hn::InterleaveLower(d16, low_a, high_a)), df, out + i);
    hn::StoreU(hn::BitCast(df, hn::InterleaveUpper(d16, low_a, high_a)), df, out + i + 4);
    hn::StoreU(hn::BitCast(df, hn::InterleaveLower(d16, low_b, high_b)), df, out + i + 8);
    hn::StoreU(hn::BitCast(df, hn::InterleaveUpper(d16, low_b, high_b)), df, out + i + 12);
  }
  return i;
}

/// Whole vectors of codes of a byte; how many values that were.
template <WeightCode kCode>
std::int64_t unpack_bytes(const std::uint8_t* from, std::int64_t count, float* HWY_RESTRICT out) {
  const hn::ScalableTag<float> df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto codes = hn::LoadU(hn::Rebind<std::uint8_t, decltype(df)>(), from + i);
    if constexpr (kCode == WeightCode::kInt8) {
      const hn::RebindToSigned<decltype(df)> di;
      const auto bytes = hn::BitCast(hn::Rebind<std::int8_t, decltype(df)>(), codes);
      hn::StoreU(hn::ConvertTo(df, hn::PromoteTo(di, bytes)), df, out + i);
    } else {
      // E5M2 is the upper half of a binary16. E4M3 one bit further down is one 2^8 times too small: exact, and its NaN
      // is then +-480, which no other code gives.
      const hn::Rebind<std::uint16_t, decltype(df)> d16;
      const hn::Rebind<hwy::float16_t, decltype(df)> dh;
      auto half = hn::ShiftLeft<8>(hn::PromoteTo(d16, codes));
      if constexpr (kCode == WeightCode::kE4M3) {
        const auto sign = hn::Set(d16, std::uint16_t{0x8000});
        half = hn::Or(hn::And(half, sign), hn::ShiftRight<1>(hn::AndNot(sign, half)));
      }
      auto v = hn::PromoteTo(df, hn::BitCast(dh, half));
      if constexpr (kCode == WeightCode::kE4M3) {
        v = hn::Mul(v, hn::Set(df, 256.0f));
        v = hn::IfThenElse(hn::Eq(hn::Abs(v), hn::Set(df, 480.0f)), hn::Set(df, kQuietNaN), v);
      } else {  // where the CPU does not convert, Highway 1.0 reads infinity and NaN as numbers from 65536 on
        const auto size = hn::Abs(v), least = hn::Set(df, 65536.0f), infinity = hn::Set(df, HUGE_VALF);
        v = hn::IfThenElse(hn::Ge(size, least), hn::CopySign(infinity, v), v);
        v = hn::IfThenElse(hn::Gt(size, least), hn::IfThenElse(hn::Eq(size, infinity), v, hn::Set(df, kQuietNaN)), v);
      }
      hn::StoreU(v, df, out + i);
    }
  }
  return i;
}

/// out[i] = product(values[i], scale, last) for whole vectors; how many values that were.
std::int64_t multiply(const float* HWY_RESTRICT values, std::int64_t count, double scale, double,
                      double* HWY_RESTRICT out) {
  const hn::ScalableTag<double> d;
  const hn::Rebind<float, decltype(d)> df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto s = hn::Set(d, scale), nan = hn::Set(d, static_cast<double>(kQuietNaN));
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto v = hn::Mul(hn::PromoteTo(d, hn::LoadU(df, values + i)), s);
    hn::StoreU(hn::IfThenElse(hn::IsNaN(v), nan, v), d, out + i);
  }
  return i;
}
std::int64_t multiply(const float* HWY_RESTRICT values, std::int64_t count, float scale, float last,
                      float* HWY_RESTRICT out) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto s = hn::Set(d, scale), l = hn::Set(d, last), nan = hn::Set(d, kQuietNaN);
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto v = hn::Mul(hn::Mul(hn::LoadU(d, values + i), s), l);
    hn::StoreU(hn::IfThenElse(hn::IsNaN(v), nan, v), d, out + i);
  }
  return i;
}

/// Values [first, first + count) without their scales, where whole vectors reach; how many that were.
std::int64_t unpack(const QuantisedWeights& w, const Planes* planes, std::int64_t first, std::int64_t count,
                    float* out) {
  switch (w.code) {
    case WeightCode::kE4M3: return unpack_bytes<WeightCode::kE4M3>(w.codes + first, count, out);
    case WeightCode::kE5M2: return unpack_bytes<WeightCode::kE5M2>(w.codes + first, count, out);
    case WeightCode::kInt8: return unpack_bytes<WeightCode::kInt8>(w.codes + first, count, out);
    case WeightCode::kE2M1:
    case WeightCode::kTable:
      return first % 2 == 0 ? unpack_halves(*planes, w.high_half_first, w.codes + first / 2, count, out) : 0;
  }
  return 0;
}

#else  // HWY_SCALAR: the code below does all of it

struct Planes {
  explicit Planes(const QuantisedWeights&) {}
};
std::int64_t unpack(const QuantisedWeights&, const Planes*, std::int64_t, std::int64_t, float*) { return 0; }
template <class T>
std::int64_t multiply(const float*, std::int64_t, T, T, T*) {
  return 0;
}
#endif

template <class T>
void dequantise_range(const QuantisedWeights& w, std::int64_t first, std::int64_t count, T* out) {
  HWY_ALIGN float values[kChunk];
  const Planes planes(two_a_byte(w.code) ? w : QuantisedWeights{.code = WeightCode::kE2M1});
  const T last = last_factor<T>(w);
  std::int64_t row = first / w.columns, column = first % w.columns;
  std::int64_t scales = first_scale_of_row(w, row), block = column / w.column_block, in_block = column % w.column_block;
  while (count > 0) {
    // A first value in the middle of a byte goes by itself.
    const std::int64_t n = two_a_byte(w.code) && first % 2 != 0 ? 1 : std::min(count, kChunk);
    for (std::int64_t i = unpack(w, &planes, first, n, values); i < n; ++i) values[i] = code_value(w, first + i);
    for (std::int64_t i = 0; i < n;) {
      const std::int64_t run = std::min({n - i, w.column_block - in_block, w.columns - column});
      const T scale = scale_value<T>(w, scales + block);
      for (std::int64_t j = multiply(values + i, run, scale, last, out + i); j < run; ++j)
        out[i + j] = product(values[i + j], scale, last);
      i += run, column += run, in_block += run;
      if (column == w.columns) {
        scales = first_scale_of_row(w, ++row);
        column = block = in_block = 0;
      } else if (in_block == w.column_block) {
        ++block;
        in_block = 0;
      }
    }
    first += n, out += n, count -= n;
  }
}
void to_double(const QuantisedWeights& w, std::int64_t first, std::int64_t count, double* out) {
  dequantise_range(w, first, count, out);
}
void to_float(const QuantisedWeights& w, std::int64_t first, std::int64_t count, float* out) {
  dequantise_range(w, first, count, out);
}

}  // namespace moeaudit::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moeaudit::kernels {

HWY_EXPORT(to_double);
HWY_EXPORT(to_float);

Status dequantise(const QuantisedWeights& w, std::int64_t first, std::int64_t count, double* out) {
  const Status status = check_dequantise(w, first, count, out);
  if (status == Status::kOk && count > 0) HWY_DYNAMIC_DISPATCH(to_double)(w, first, count, out);
  return status;
}
Status dequantise(const QuantisedWeights& w, std::int64_t first, std::int64_t count, float* out) {
  const Status status = check_dequantise(w, first, count, out);
  if (status == Status::kOk && count > 0) HWY_DYNAMIC_DISPATCH(to_float)(w, first, count, out);
  return status;
}

const float kNf4Values[16] = {-1.0f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.0f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.0f};

namespace {

float largest_magnitude(const float* w, std::int64_t count) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(w[i]));
  return largest;
}

float nearest_nf4(float v) {
  int n = 0;
  while (n < 15 && v > 0.5f * (kNf4Values[n] + kNf4Values[n + 1])) ++n;
  return kNf4Values[n];
}

}  // namespace

void nf4_round_trip(const float* w, std::int64_t count, float* out) {
  for (std::int64_t first = 0; first < count; first += kNf4Block) {
    const std::int64_t length = std::min(kNf4Block, count - first);
    const float scale = largest_magnitude(w + first, length);
    for (std::int64_t i = first; i < first + length; ++i)
      out[i] = scale > 0.0f ? nearest_nf4(w[i] / scale) * scale : 0.0f;
  }
}

void int8_row_round_trip(const float* w, std::int64_t rows, std::int64_t columns, float* out) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* from = w + row * columns;
    float* to = out + row * columns;
    const float scale = largest_magnitude(from, columns);
    const float up = 127.0f / scale;
    const float down = scale * (1.0f / 127.0f);
    for (std::int64_t i = 0; i < columns; ++i) to[i] = scale > 0.0f ? std::nearbyint(from[i] * up) * down : 0.0f;
  }
}

}  // namespace moeaudit::kernels
#endif  // HWY_ONCE

// Weight scan: one translation unit, compiled once per instruction set by Highway and chosen at run time. Nothing is
// shared between calls; weight_scan.h states the order of every sum, so vector width and threads do not show.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/host/weight_scan.cc"
// Vectors of unknown length cannot sit in arrays; such CPUs also run NEON or the portable code.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#include "kernels/host/weight_scan.h"

#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#ifndef MOE_AUDIT_WEIGHT_SCAN_COMMON
#define MOE_AUDIT_WEIGHT_SCAN_COMMON
namespace moeaudit::kernels {

constexpr std::int64_t kStripe = 64;      // bytes of one step
constexpr std::int64_t kPrefetch = 4096;  // bytes ahead: about what is in flight between memory and one core

constexpr std::uint64_t mix(std::uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

/// The hash runs on the integer units, beside the vector code.
constexpr std::uint64_t key(std::uint64_t i) { return mix((i + 1) * 0x9e3779b97f4a7c15); }
inline constexpr std::uint64_t kKeys[4] = {key(0), key(1), key(2), key(3)};
inline std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}
struct Hash {
  std::uint64_t lane[4] = {key(4), key(5), key(6), key(7)};  // not the keys: the factors must not commute
  HWY_INLINE void add(const std::uint8_t* stripe) {
    std::uint64_t word[8];
    std::memcpy(word, stripe, sizeof word);
    for (int i = 0; i < 4; ++i) lane[i] = fold(word[2 * i] ^ kKeys[i], word[2 * i + 1] ^ lane[i]);
  }
  void add_tail(const std::uint8_t* data, std::int64_t bytes) {
    std::uint8_t stripe[kStripe] = {};
    std::memcpy(stripe, data, static_cast<std::size_t>(bytes));
    add(stripe);
  }
  std::uint64_t digest(std::int64_t bytes) const {
    std::uint64_t h = mix(static_cast<std::uint64_t>(bytes));
    for (const std::uint64_t l : lane) h = mix(h + l);
    return h;
  }
};

/// What is left of a block when its full stripes are through: lanes in the order in which the vectors hold them.
template <class Raw>
struct alignas(64) Lanes {
  double sum[16], square[16];
  Raw min[kStripe / sizeof(Raw)], max[kStripe / sizeof(Raw)];  // ordered codes, see Format
  std::int64_t zeros, non_finite;
  bool zeros_seen;  // there are some, and they were not counted
};

/// Bits of one format. Codes are compared as integers: `ordered` maps sign and magnitude to two's complement and is its
/// own inverse; -0 comes just below +0. Values are finite while ~kInfinity < ordered code < kInfinity.
template <Stored kType>
struct Format;
template <class R, R kInf, bool kSignMagnitude_ = true>
struct FormatOf {
  using Raw = R;
  static constexpr R kInfinity = kInf;
  static constexpr bool kSignMagnitude = kSignMagnitude_;
  static constexpr bool kAlwaysFinite = !kSignMagnitude_;
  static R ordered(R code) {
    return kSignMagnitude && code < 0 ? static_cast<R>(code ^ std::numeric_limits<R>::max()) : code;
  }
  static bool finite(R ordered) { return kAlwaysFinite || (ordered < kInf && ordered > static_cast<R>(~kInf)); }
};
template <>
struct Format<Stored::kF64> : FormatOf<std::int64_t, 0x7ff0000000000000> {
  static double value(Raw c) { return std::bit_cast<double>(c); }
};
template <>
struct Format<Stored::kF32> : FormatOf<std::int32_t, 0x7f800000> {
  static double value(Raw c) { return std::bit_cast<float>(c); }
};
template <>
struct Format<Stored::kBF16> : FormatOf<std::int16_t, 0x7f80> {
  static double value(Raw c) { return std::bit_cast<float>(std::uint32_t{static_cast<std::uint16_t>(c)} << 16); }
};
/// A finite code of sign, exponent and `kMantissa` bits, the smallest subnormal being 2^kLast.
template <int kMantissa, int kLast>
double small_float(int code, int sign) {
  const int magnitude = code & (sign - 1), exponent = magnitude >> kMantissa,
            mantissa = magnitude & ((1 << kMantissa) - 1);
  const double size =
      exponent == 0 ? mantissa : static_cast<double>(mantissa | 1 << kMantissa) * power_of_two(exponent - 1);
  return (code & sign ? -size : size) * power_of_two(kLast);
}
template <>
struct Format<Stored::kF16> : FormatOf<std::int16_t, 0x7c00> {
  static double value(Raw c) { return small_float<10, -24>(c, 0x8000); }
};
template <>
struct Format<Stored::kE4M3> : FormatOf<std::int8_t, 0x7f> {
  static double value(Raw c) { return small_float<3, -9>(c, 0x80); }
};
template <>
struct Format<Stored::kE5M2> : FormatOf<std::int8_t, 0x7c> {
  static double value(Raw c) { return small_float<2, -16>(c, 0x80); }
};
template <>
struct Format<Stored::kI8> : FormatOf<std::int8_t, 0x7f, false> {
  static double value(Raw c) { return c; }
};

/// Formats that the vectors split into even and odd elements rather than into halves.
constexpr bool splits_by_parity(Stored type) { return stored_size(type) == 1 || type == Stored::kBF16; }
constexpr int accumulators(Stored type) { return type == Stored::kF64 ? 8 : 16; }
/// Where `Lanes` keeps accumulator `i`.
constexpr int lane_of(Stored type, int i) { return splits_by_parity(type) ? i % 2 * 8 + i / 2 : i; }
/// The sums are of values divided by this power of two, which changes no rounding: vectors read E4M3 as binary16.
constexpr double scale_of(Stored type) { return type == Stored::kE4M3 ? 256.0 : 1.0; }

/// Values one after the other: the end of a piece, or all of it where there are no vectors.
template <Stored kType>
void add_one_by_one(const std::uint8_t* data, std::int64_t count, Lanes<typename Format<kType>::Raw>* out) {
  using F = Format<kType>;
  using Raw = typename F::Raw;
  for (std::int64_t i = 0; i < count; ++i) {
    Raw code;
    std::memcpy(&code, data + i * static_cast<std::int64_t>(sizeof code), sizeof code);
    const Raw ordered = F::ordered(code);
    if (!F::finite(ordered)) {
      ++out->non_finite;
      continue;
    }
    const double value = F::value(code) / scale_of(kType);
    const int lane = lane_of(kType, static_cast<int>(i % accumulators(kType)));
    out->sum[lane] += value;
    out->square[lane] += value * value;
    out->min[0] = std::min(out->min[0], ordered);
    out->max[0] = std::max(out->max[0], ordered);
    out->zeros += value == 0;
  }
}

template <class F>
std::int64_t first_bad(const std::uint8_t* data, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    typename F::Raw code;
    std::memcpy(&code, data + i * static_cast<std::int64_t>(sizeof code), sizeof code);
    if (!F::finite(F::ordered(code))) return i;
  }
  return -1;
}

}  // namespace moeaudit::kernels
#endif  // MOE_AUDIT_WEIGHT_SCAN_COMMON

HWY_BEFORE_NAMESPACE();
namespace moeaudit::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET != HWY_SCALAR
using DBytes = hn::CappedTag<std::uint8_t, 64>;
using DWords = hn::Repartition<std::uint64_t, DBytes>;
using DInts = hn::Repartition<std::uint32_t, DBytes>;
using DShorts = hn::Repartition<std::int16_t, DBytes>;
using DDouble = hn::Repartition<double, DBytes>;
using DFloat = hn::Repartition<float, DBytes>;
using DHalfFloat = hn::Rebind<float, DDouble>;       // as many floats as doubles
using DHalf16 = hn::Rebind<hwy::float16_t, DFloat>;  // as many halves as floats
using DHalfInts = hn::Rebind<std::int32_t, DDouble>;
constexpr int kVectorBytes = HWY_MAX_BYTES < 64 ? HWY_MAX_BYTES : 64;
constexpr int kVectors = 64 / kVectorBytes;  // vectors of a stripe
constexpr int kDoubles = kVectorBytes / 8;   // doubles of a vector

/// The 16 accumulators of a block. Which lane holds which: lane_of().
struct Sums {
  hn::Vec<DDouble> sum[16 / kDoubles], square[16 / kDoubles];
};

template <bool kExactSquares>
HWY_INLINE void add(hn::Vec<DDouble> x, int at, Sums& s) {
  s.sum[at] = hn::Add(s.sum[at], x);
  s.square[at] = kExactSquares ? hn::MulAdd(x, x, s.square[at]) : hn::Add(s.square[at], hn::Mul(x, x));
}
/// Two vectors of doubles: run `chunk` and the one after it.
HWY_INLINE void add_floats(hn::Vec<DFloat> x, int first, int second, Sums& s) {
  const DDouble d;
  add<true>(hn::PromoteTo(d, hn::LowerHalf(DHalfFloat(), x)), first, s);
  add<true>(hn::PromoteTo(d, hn::UpperHalf(DHalfFloat(), x)), second, s);
}
/// Vector accumulator of run `run` (kDoubles values of one parity, or kDoubles values in a row) counted from a multiple
/// of 16 values.
constexpr int kParityRuns = 8 / kDoubles;
constexpr int kRuns = 16 / kDoubles;

/// Floats that hold the binary16 codes of half a vector.
HWY_INLINE hn::Vec<DFloat> lower_f16(hn::Vec<DShorts> v) {
  return hn::PromoteTo(DFloat(), hn::BitCast(DHalf16(), hn::LowerHalf(v)));
}
HWY_INLINE hn::Vec<DFloat> upper_f16(hn::Vec<DShorts> v) {
  return hn::PromoteTo(DFloat(), hn::BitCast(DHalf16(), hn::UpperHalf(hn::Half<DShorts>(), v)));
}

/// Adds the values of vector `v` of a stripe. E4M3 comes 2^-8 times too small (scale_of()): it goes through binary16.
template <Stored kType>
HWY_INLINE void add_values(hn::Vec<DBytes> raw, int v, Sums& s) {
  if constexpr (kType == Stored::kF64) {
    add<false>(hn::BitCast(DDouble(), raw), v % (8 / kDoubles), s);
  } else if constexpr (kType == Stored::kF32) {
    add_floats(hn::BitCast(DFloat(), raw), 2 * v % kRuns, (2 * v + 1) % kRuns, s);
  } else if constexpr (kType == Stored::kBF16) {
    const DInts d;
    const auto pairs = hn::BitCast(d, raw);
    const auto even = hn::BitCast(DFloat(), hn::ShiftLeft<16>(pairs));
    const auto odd = hn::BitCast(DFloat(), hn::And(pairs, hn::Set(d, 0xffff0000u)));
    const int first = 2 * v % kParityRuns, second = (2 * v + 1) % kParityRuns;
    add_floats(even, first, second, s);
    add_floats(odd, kParityRuns + first, kParityRuns + second, s);
  } else if constexpr (kType == Stored::kF16) {
    const auto codes = hn::BitCast(DShorts(), raw);
    add_floats(lower_f16(codes), 4 * v % kRuns, (4 * v + 1) % kRuns, s);
    add_floats(upper_f16(codes), (4 * v + 2) % kRuns, (4 * v + 3) % kRuns, s);
  } else {
    const DShorts d;
    const auto pairs = hn::BitCast(d, raw);
    const auto add_parity = [&](hn::Vec<DShorts> high, int parity) HWY_ATTR {  // codes in the high bytes
      const int run = parity * kParityRuns, first = 4 * v;
      const auto codes = kType == Stored::kE5M2
                             ? high
                             : hn::And(hn::ShiftRight<1>(high), hn::Set(d, static_cast<std::int16_t>(0xbf80)));
      add_floats(lower_f16(codes), run + first % kParityRuns, run + (first + 1) % kParityRuns, s);
      add_floats(upper_f16(codes), run + (first + 2) % kParityRuns, run + (first + 3) % kParityRuns, s);
    };
    add_parity(hn::ShiftLeft<8>(pairs), 0);
    add_parity(hn::And(pairs, hn::Set(d, static_cast<std::int16_t>(0xff00))), 1);
  }
}
/// Sums of int8 in integers: every sum of a piece is exact in float64, whatever its order, so these are the same. A
/// block of 2^14 values stays below 2^28 in any lane.
struct Int8Sums {
  static constexpr hn::Repartition<std::int32_t, DBytes> d{};
  hn::Vec<hn::Repartition<std::int32_t, DBytes>> sum[2], square[2];

  HWY_INLINE void start() { sum[0] = sum[1] = square[0] = square[1] = hn::Zero(d); }
  HWY_INLINE void add(hn::Vec<DBytes> raw) {
    const DShorts ds;
    const auto pairs = hn::BitCast(ds, raw), one = hn::Set(ds, std::int16_t{1});
    const auto even = hn::ShiftRight<8>(hn::ShiftLeft<8>(pairs)), odd = hn::ShiftRight<8>(pairs);
    sum[0] = hn::ReorderWidenMulAccumulate(d, hn::Add(even, odd), one, sum[0], sum[1]);
    square[0] = hn::ReorderWidenMulAccumulate(d, even, even, square[0], square[1]);
    square[0] = hn::ReorderWidenMulAccumulate(d, odd, odd, square[0], square[1]);
  }
  static HWY_INLINE double total(const hn::Vec<hn::Repartition<std::int32_t, DBytes>>* parts) {
    std::int32_t lane[kVectorBytes / 4];
    std::int64_t all = 0;
    for (int p = 0; p < 2; ++p) {
      hn::StoreU(parts[p], d, lane);
      for (const std::int32_t l : lane) all += l;
    }
    return static_cast<double>(all);
  }
};

template <class D>
HWY_INLINE hn::Vec<D> ordered_codes(D d, hn::Vec<D> code) {
  return hn::Xor(code, hn::And(hn::BroadcastSignBit(code), hn::Set(d, std::numeric_limits<hn::TFromD<D>>::max())));
}
template <class D>
HWY_INLINE hn::Mask<D> is_zero(D d, hn::Vec<D> code, bool sign_magnitude) {
  return hn::Eq(sign_magnitude ? hn::Add(code, code) : code, hn::Zero(d));
}

/// Smallest and largest of codes of sign and magnitude in four instructions a vector: as signed integers the largest
/// positive one wins, as unsigned ones the negative one of largest magnitude; the two minima are needed where a lane
/// has one sign only, and they show zeros.
template <class Raw>
struct Extremes {
  static constexpr Raw kLowest = std::numeric_limits<Raw>::min(), kLargest = std::numeric_limits<Raw>::max();
  static constexpr hn::Repartition<Raw, DBytes> d{};
  static constexpr hn::RebindToUnsigned<decltype(hn::Repartition<Raw, DBytes>())> du{};
  hn::Vec<hn::Repartition<Raw, DBytes>> signed_min, signed_max;
  hn::Vec<hn::RebindToUnsigned<decltype(hn::Repartition<Raw, DBytes>())>> unsigned_min, unsigned_max;

  HWY_INLINE void start() {
    signed_min = hn::Set(d, kLargest);
    signed_max = hn::Set(d, kLowest);
    unsigned_min = hn::Not(hn::Zero(du));
    unsigned_max = hn::Zero(du);
  }
  HWY_INLINE void add(hn::Vec<DBytes> raw) {
    signed_min = hn::Min(signed_min, hn::BitCast(d, raw));
    signed_max = hn::Max(signed_max, hn::BitCast(d, raw));
    unsigned_min = hn::Min(unsigned_min, hn::BitCast(du, raw));
    unsigned_max = hn::Max(unsigned_max, hn::BitCast(du, raw));
  }
  HWY_INLINE auto ordered_min() const {
    const auto most_negative = hn::BitCast(d, unsigned_max), least_positive = hn::BitCast(d, unsigned_min);
    return ordered_codes(d, hn::IfThenElse(hn::Lt(most_negative, hn::Zero(d)), most_negative, least_positive));
  }
  HWY_INLINE auto ordered_max() const {
    return ordered_codes(d, hn::IfThenElse(hn::Lt(signed_max, hn::Zero(d)), signed_min, signed_max));
  }
  HWY_INLINE bool has_zeros() const {
    const auto positive = hn::Eq(hn::BitCast(d, unsigned_min), hn::Zero(d)),
               negative = hn::Eq(signed_min, hn::Set(d, kLowest));
    return !hn::AllFalse(d, hn::Or(positive, negative));
  }
};

/// `stripes` full stripes of a block. kCareful: there are values that are not finite, which are left out and counted;
/// without it they only show in `min` and `max`. kHash: `hash` goes on, too.
template <Stored kType, bool kCareful, bool kHash>
HWY_INLINE void run_block(const std::uint8_t* HWY_RESTRICT data, std::int64_t stripes, Hash* HWY_RESTRICT hash,
                          Lanes<typename Format<kType>::Raw>* HWY_RESTRICT out) {
  using F = Format<kType>;
  using Raw = typename F::Raw;
  const DBytes db;
  const DDouble dd;
  const hn::Repartition<Raw, DBytes> d;
  constexpr Raw kLowest = std::numeric_limits<Raw>::min(), kLargest = std::numeric_limits<Raw>::max();
  // Zeros are rare in these formats, and counted when a block turned out to have some.
  constexpr bool kRareZeros = !kCareful && F::kSignMagnitude && (sizeof(Raw) == 2 || sizeof(Raw) == 4);
  Extremes<Raw> extremes;
  extremes.start();
  Sums sums;
  for (int i = 0; i < kRuns; ++i) sums.sum[i] = sums.square[i] = hn::Zero(dd);
  Int8Sums int8_sums;
  int8_sums.start();
  Hash local = *hash;
  auto low = hn::Set(d, kLargest), high = hn::Set(d, kLowest), zero_lanes = hn::Zero(d);
  std::int64_t zeros = 0, bad_values = 0;
  for (std::int64_t stripe = 0; stripe < stripes; ++stripe) {
    const std::uint8_t* const at = data + stripe * kStripe;
    if (kHash) {
      hwy::Prefetch(at + kPrefetch);
      local.add(at);
    }
    for (int v = 0; v < kVectors; ++v) {
      const auto raw = hn::LoadU(db, at + v * kVectorBytes);
      if constexpr (kRareZeros) {
        extremes.add(raw);
        add_values<kType>(raw, v, sums);
        continue;
      }
      const auto code = hn::BitCast(d, raw);
      const auto ordered = F::kSignMagnitude ? ordered_codes(d, code) : code;
      const auto zero = is_zero(d, code, F::kSignMagnitude);
      if constexpr (sizeof(Raw) == 1) {
        zeros += static_cast<std::int64_t>(hn::CountTrue(d, zero));
      } else {
        zero_lanes = hn::Sub(zero_lanes, hn::VecFromMask(d, zero));
      }
      if constexpr (kCareful) {
        const auto bad = hn::Or(hn::Gt(ordered, hn::Set(d, static_cast<Raw>(F::kInfinity - 1))),
                                hn::Lt(ordered, hn::Set(d, static_cast<Raw>(~F::kInfinity + 1))));
        bad_values += static_cast<std::int64_t>(hn::CountTrue(d, bad));
        low = hn::Min(low, hn::IfThenElse(bad, hn::Set(d, kLargest), ordered));
        high = hn::Max(high, hn::IfThenElse(bad, hn::Set(d, kLowest), ordered));
        add_values<kType>(hn::BitCast(db, hn::IfThenZeroElse(bad, code)), v, sums);
      } else {
        low = hn::Min(low, ordered);
        high = hn::Max(high, ordered);
        if constexpr (kType == Stored::kI8) {
          int8_sums.add(raw);
        } else {
          add_values<kType>(raw, v, sums);
        }
      }
    }
  }
  if (kHash) *hash = local;
  for (int i = 0; i < kRuns; ++i) {
    hn::StoreU(sums.sum[i], dd, out->sum + i * kDoubles);
    hn::StoreU(sums.square[i], dd, out->square + i * kDoubles);
  }
  if constexpr (kType == Stored::kI8) {
    out->sum[0] = Int8Sums::total(int8_sums.sum);
    out->square[0] = Int8Sums::total(int8_sums.square);
  }
  std::fill(out->min, out->min + kStripe / sizeof(Raw), kLargest);
  std::fill(out->max, out->max + kStripe / sizeof(Raw), kLowest);
  if (stripes > 0) {
    hn::StoreU(kRareZeros ? extremes.ordered_min() : low, d, out->min);
    hn::StoreU(kRareZeros ? extremes.ordered_max() : high, d, out->max);
  }
  if constexpr (sizeof(Raw) > 1) {
    Raw count[kVectorBytes / sizeof(Raw)];
    hn::StoreU(zero_lanes, d, count);
    for (const Raw n : count) zeros += n;
  }
  out->zeros = zeros;
  out->non_finite = bad_values;
  out->zeros_seen = kRareZeros && stripes > 0 && extremes.has_zeros();
}

/// Exact zeros of the full stripes of a block.
template <Stored kType>
std::int64_t count_zeros(const std::uint8_t* data, std::int64_t stripes) {
  const hn::Repartition<typename Format<kType>::Raw, DBytes> d;
  std::size_t zeros = 0;
  for (std::int64_t at = 0; at < stripes * kStripe; at += kVectorBytes) {
    zeros +=
        hn::CountTrue(d, is_zero(d, hn::BitCast(d, hn::LoadU(DBytes(), data + at)), Format<kType>::kSignMagnitude));
  }
  return static_cast<std::int64_t>(zeros);
}

#else  // HWY_SCALAR

template <Stored>
std::int64_t count_zeros(const std::uint8_t*, std::int64_t) {
  return 0;  // never asked: values that are taken one by one are counted at once
}

template <Stored kType, bool kCareful, bool kHash>
void run_block(const std::uint8_t* data, std::int64_t stripes, Hash* hash, Lanes<typename Format<kType>::Raw>* out) {
  using Raw = typename Format<kType>::Raw;
  for (std::int64_t stripe = 0; kHash && stripe < stripes; ++stripe) hash->add(data + stripe * kStripe);
  *out = {};
  std::fill(std::begin(out->min), std::end(out->min), std::numeric_limits<Raw>::max());
  std::fill(std::begin(out->max), std::end(out->max), std::numeric_limits<Raw>::min());
  add_one_by_one<kType>(data, stripes * kStripe / stored_size(kType), out);
}
#endif

template <Stored kType>
void scan_type(const std::uint8_t* data, std::int64_t count, ScanResult* out) {
  using F = Format<kType>;
  using Raw = typename F::Raw;
  constexpr std::int64_t kSize = sizeof(Raw), kCount = accumulators(kType), kCodes = kStripe / kSize;
  const std::int64_t bytes = count * kSize;
  Hash hash;
  double sum[16] = {}, square[16] = {};
  Lanes<Raw> total;
  std::fill(total.min, total.min + kCodes, std::numeric_limits<Raw>::max());
  std::fill(total.max, total.max + kCodes, std::numeric_limits<Raw>::min());
  ScanResult r;
  r.elements = count;
  for (std::int64_t at = 0; at < bytes; at += kScanBlock) {
    const std::int64_t length = std::min(kScanBlock, bytes - at), stripes = length / kStripe, tail = length % kStripe;
    Lanes<Raw> block;
    run_block<kType, false, true>(data + at, stripes, &hash, &block);
    if constexpr (!F::kAlwaysFinite) {
      bool finite = true;
      for (std::int64_t i = 0; i < kCodes && stripes > 0; ++i) {
        finite &= (block.min[i] > static_cast<Raw>(~F::kInfinity)) & (block.max[i] < F::kInfinity);
      }
      if (!finite) run_block<kType, true, false>(data + at, stripes, &hash, &block);
    }
    if (block.zeros_seen) block.zeros = count_zeros<kType>(data + at, stripes);
    if (tail > 0) {
      add_one_by_one<kType>(data + at + stripes * kStripe, tail / kSize, &block);
      hash.add_tail(data + at + stripes * kStripe, tail);
    }
    if (block.non_finite > 0 && r.first_non_finite < 0) {
      r.first_non_finite = at / kSize + first_bad<F>(data + at, length / kSize);
    }
    r.non_finite += block.non_finite;
    r.zeros += block.zeros;
    for (int i = 0; i < 16; ++i) {
      sum[i] += block.sum[i];
      square[i] += block.square[i];
    }
    for (std::int64_t i = 0; i < kCodes; ++i) {
      total.min[i] = std::min(total.min[i], block.min[i]);
      total.max[i] = std::max(total.max[i], block.max[i]);
    }
  }
  r.hash = hash.digest(bytes);
  if (r.non_finite < count) {
    constexpr double kScale = scale_of(kType);
    const auto value = [](Raw ordered) { return F::value(F::ordered(ordered)) + 0.0; };
    r.min = value(*std::min_element(total.min, total.min + kCodes));
    r.max = value(*std::max_element(total.max, total.max + kCodes));
    for (int half = static_cast<int>(kCount) / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        sum[lane_of(kType, i)] += sum[lane_of(kType, i + half)];
        square[lane_of(kType, i)] += square[lane_of(kType, i + half)];
      }
    }
    r.sum = sum[0] * kScale;
    r.sum_of_squares = square[0] * (kScale * kScale);
  }
  *out = r;
}

void hash_only(const std::uint8_t* data, std::int64_t bytes, ScanResult* out) {
  Hash hash;
  const std::int64_t stripes = bytes / kStripe, tail = bytes % kStripe;
  for (std::int64_t stripe = 0; stripe < stripes; ++stripe) {
    hwy::Prefetch(data + stripe * kStripe + kPrefetch);
    hash.add(data + stripe * kStripe);
  }
  if (tail > 0) hash.add_tail(data + stripes * kStripe, tail);
  out->elements = bytes;
  out->hash = hash.digest(bytes);
  out->sum = out->sum_of_squares = std::numeric_limits<double>::quiet_NaN();
}

void run_piece(Stored type, const std::uint8_t* data, std::int64_t count, ScanResult* out) {
  switch (type) {
    case Stored::kF64: return scan_type<Stored::kF64>(data, count, out);
    case Stored::kF32: return scan_type<Stored::kF32>(data, count, out);
    case Stored::kBF16: return scan_type<Stored::kBF16>(data, count, out);
    case Stored::kF16: return scan_type<Stored::kF16>(data, count, out);
    case Stored::kE4M3: return scan_type<Stored::kE4M3>(data, count, out);
    case Stored::kE5M2: return scan_type<Stored::kE5M2>(data, count, out);
    case Stored::kI8: return scan_type<Stored::kI8>(data, count, out);
    case Stored::kBytes: return hash_only(data, count, out);
  }
}

}  // namespace moeaudit::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moeaudit::kernels {

HWY_EXPORT(run_piece);

Status scan_piece(Stored type, const void* data, std::int64_t count, ScanResult* piece) {
  if (piece == nullptr || (data == nullptr && count > 0)) return Status::kNullPointer;
  if (count < 0 || count > kScanPiece / stored_size(type)) return Status::kBadShape;
  *piece = ScanResult{};
  HWY_DYNAMIC_DISPATCH(run_piece)(type, static_cast<const std::uint8_t*>(data), count, piece);
  return Status::kOk;
}

void append(const ScanResult& piece, ScanResult* result) {
  if (result->first_non_finite < 0 && piece.first_non_finite >= 0) {
    result->first_non_finite = result->elements + piece.first_non_finite;
  }
  result->elements += piece.elements;
  result->non_finite += piece.non_finite;
  result->zeros += piece.zeros;
  if (!(result->min <= piece.min) && !std::isnan(piece.min)) result->min = piece.min;
  if (!(result->max >= piece.max) && !std::isnan(piece.max)) result->max = piece.max;
  result->sum += piece.sum;
  result->sum_of_squares += piece.sum_of_squares;
  result->hash = mix(result->hash + piece.hash);
}

Status scan(Stored type, const void* data, std::int64_t count, ScanResult* result) {
  if (result == nullptr || (data == nullptr && count > 0)) return Status::kNullPointer;
  if (count < 0) return Status::kBadShape;
  *result = ScanResult{};
  const std::int64_t size = stored_size(type), most = kScanPiece / size;
  for (std::int64_t from = 0; from < count; from += most) {
    ScanResult piece;
    scan_piece(type, static_cast<const std::uint8_t*>(data) + from * size, std::min(most, count - from), &piece);
    append(piece, result);
  }
  return Status::kOk;
}

}  // namespace moeaudit::kernels
#endif  // HWY_ONCE

// Router kernels: one translation unit, compiled once per instruction set by Highway and chosen at run time.
// Every output is owned by one call and computed in the order that router.h states, so neither the vector width nor the
// split over threads shows in the result.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/host/router.cc"
// Vectors of unknown length cannot sit in arrays; such CPUs also run NEON or the portable code.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#include "kernels/host/router.h"

#include <hwy/aligned_allocator.h>
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/host/elementary-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moeaudit::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Experts whose sums one block keeps in registers, as whole panels of 64 bytes, and the tokens that share their
// weights.
template <class Sum>
inline constexpr std::int64_t kPanel = 64 / sizeof(Sum);
template <class Sum>
inline constexpr int kVectors = static_cast<int>(kPanel<Sum> / hn::MaxLanes(hn::CappedTag<Sum, kPanel<Sum>>()));
inline constexpr int kPanels = HWY_MAX_BYTES >= 64 ? 2 : 1;
template <class Sum>
inline constexpr int kBlockTokens = HWY_MAX_BYTES >= 64 ? 12 : (kVectors<Sum> >= 12 ? 1 : 12 / kVectors<Sum>);
inline constexpr std::int64_t kTileTokens = 96;  // their sums stay in the second-level cache; a multiple of every block

/// Asks for the next stretch of kT rows while this one is multiplied, a line of the cache every so often: rows are read a
/// stretch at a time, too little for the machine to see what comes, and all at once would be more than it can have under
/// way.
template <int kT, class In>
struct Ahead {
  static constexpr std::int64_t kPerRow = kGateRun * static_cast<std::int64_t>(sizeof(In)) / 64, kLines = kT * kPerRow;
  const In* rows;  // or null
  std::int64_t hidden;
  HWY_INLINE void step(std::int64_t i) const {
    if (rows == nullptr) return;
    for (std::int64_t line = i * kLines / kGateRun; line < (i + 1) * kLines / kGateRun; ++line)
      hwy::Prefetch(rows + line / kPerRow * hidden + line % kPerRow * (64 / static_cast<std::int64_t>(sizeof(In))));
  }
};

/// sums[t, panels] += x[t, 0..length) * w[panels, 0..length), from zero and in order. Both operands lie packed.
template <int kT, int kP, bool kExactProducts, class In, class Sum>
HWY_INLINE void add_run(const Sum* HWY_RESTRICT x, const Sum* HWY_RESTRICT w, std::int64_t length,
                        Sum* HWY_RESTRICT sums, std::int64_t stride, Ahead<kT, In> ahead) {
  const hn::CappedTag<Sum, kPanel<Sum>> d;
  constexpr int kV = kP * kVectors<Sum>;
  constexpr std::int64_t kWidth = hn::MaxLanes(hn::CappedTag<Sum, kPanel<Sum>>());
  const std::int64_t next_panel = length * kPanel<Sum>;
  hn::Vec<decltype(d)> sum[kT][kV];
  for (int t = 0; t < kT; ++t) {
    for (int v = 0; v < kV; ++v) sum[t][v] = hn::Zero(d);
  }
  for (std::int64_t i = 0; i < length; ++i) {
    ahead.step(i);
    hn::Vec<decltype(d)> weight[kV];
    for (int v = 0; v < kV; ++v) {
      const std::int64_t at = v / kVectors<Sum> * next_panel + i * kPanel<Sum> + v % kVectors<Sum> * kWidth;
      weight[v] = hn::LoadU(d, w + at);
    }
    for (int t = 0; t < kT; ++t) {
      const auto value = hn::Set(d, x[t * kGateRun + i]);
      for (int v = 0; v < kV; ++v) {
        if constexpr (kExactProducts) {
          sum[t][v] = hn::MulAdd(value, weight[v], sum[t][v]);
        } else {
          sum[t][v] = hn::Add(sum[t][v], hn::Mul(value, weight[v]));
        }
      }
    }
  }
  for (int t = 0; t < kT; ++t) {
    for (int v = 0; v < kV; ++v) {
      Sum* to = sums + t * stride + v * kWidth;
      hn::StoreU(hn::Add(hn::LoadU(d, to), sum[t][v]), d, to);
    }
  }
}

/// One stretch of hidden for kT tokens against all experts.
template <int kT, class In, class Sum>
void add_stretch(const GateArgs<In, Sum>& a, std::int64_t token, std::int64_t first, std::int64_t length, Sum* sums) {
  constexpr bool kExactProducts = sizeof(Sum) > sizeof(In);
  HWY_ALIGN Sum x[kT * kGateRun];
  for (int t = 0; t < kT; ++t) {
    const In* row = a.x + (token + t) * a.hidden + first;
    for (std::int64_t i = 0; i < length; ++i) x[t * kGateRun + i] = static_cast<Sum>(row[i]);
  }
  const std::int64_t padded = packed_gate_size<Sum>(a.experts, 1);
  const Sum* w = a.packed + first * padded;
  const bool more = first + 2 * kGateRun <= a.hidden;
  Ahead<kT, In> ahead{more ? a.x + token * a.hidden + first + kGateRun : nullptr, a.hidden};
  std::int64_t e = 0;
  for (; e + kPanels * kPanel<Sum> <= padded; e += kPanels * kPanel<Sum>) {
    add_run<kT, kPanels, kExactProducts>(x, w + e * length, length, sums + e, padded, ahead);
    ahead.rows = nullptr;
  }
  for (; e < padded; e += kPanel<Sum>) {
    add_run<kT, 1, kExactProducts>(x, w + e * length, length, sums + e, padded, ahead);
    ahead.rows = nullptr;
  }
}

template <class In, class Sum>
void gate(const GateArgs<In, Sum>& a) {
  const std::int64_t padded = packed_gate_size<Sum>(a.experts, 1);
  if (a.tokens == 0) return;  // Highway allocates no empty buffers
  // Weights that stay in the second-level cache anyway: one block at a time, so that its rows of x are read straight
  // through.
  const bool small = padded * a.hidden * static_cast<std::int64_t>(sizeof(Sum)) <= (std::int64_t{512} << 10);
  const std::int64_t tile = std::min<std::int64_t>(small ? kBlockTokens<Sum> : kTileTokens, a.tokens);
  const auto buffer = hwy::AllocateAligned<Sum>(tile * padded);
  for (std::int64_t start = 0; start < a.tokens; start += tile) {
    const std::int64_t tokens = std::min(tile, a.tokens - start);
    Sum* sums = buffer.get();
    std::fill(sums, sums + tokens * padded, Sum(0));
    for (std::int64_t first = 0; first < a.hidden; first += kGateRun) {
      const std::int64_t length = std::min(kGateRun, a.hidden - first);
      std::int64_t t = 0;
      for (; t + kBlockTokens<Sum> <= tokens; t += kBlockTokens<Sum>) {
        add_stretch<kBlockTokens<Sum>>(a, start + t, first, length, sums + t * padded);
      }
      for (; t < tokens; ++t) add_stretch<1>(a, start + t, first, length, sums + t * padded);
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      Sum* logits = a.logits + (start + t) * a.experts;
      const Sum* from = sums + t * padded;
      for (std::int64_t e = 0; e < a.experts; ++e) logits[e] = a.bias == nullptr ? from[e] : from[e] + a.bias[e];
    }
  }
}

void gate_f32(const GateArgs<float, float>& a) { gate(a); }
void gate_f64(const GateArgs<double, double>& a) { gate(a); }
void gate_wide(const GateArgs<float, double>& a) { gate(a); }

/// bfloat16: the upper half of a float32; adding half of the last kept place, or a hair less when that place is even,
/// carries where it should, up to infinity.
template <class D>
HWY_INLINE hn::Vec<D> round_bf16(D d, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, v);
  const auto even = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const auto kept = hn::And(hn::Add(bits, hn::Add(even, hn::Set(du, 0x7fffu))), hn::Set(du, 0xffff0000u));
  return hn::IfThenElse(hn::Eq(v, v), hn::BitCast(d, kept), v);
}
/// float16: adding and subtracting 1.5 * 2^23 spacings rounds in the adder, as in round_to().
template <class D>
HWY_INLINE hn::Vec<D> round_f16(D d, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const auto size = hn::Abs(v);
  auto exponent = hn::And(hn::BitCast(du, v), hn::Set(du, 0x7f800000u));
  exponent = hn::Max(exponent, hn::Set(du, (127u - 14u) << 23));
  exponent = hn::Min(exponent, hn::Set(du, (127u + 16u) << 23));
  const auto shift = hn::BitCast(d, hn::Add(exponent, hn::Set(du, (13u << 23) + 0x00400000u)));
  const auto sum = hn::Sub(hn::Add(size, shift), shift);
  const auto infinite = hn::BitCast(d, hn::Set(du, 0x7f800000u));
  const auto finite = hn::IfThenElse(hn::Ge(sum, hn::Set(d, 65536.0f)), infinite, sum);
  return hn::IfThenElse(hn::Eq(v, v), hn::CopySign(finite, v), v);
}

void round_f32(const float* in, std::int64_t count, Float dtype, float* out) {
  if (dtype == Float::kF32 || dtype == Float::kF64) {
    if (in != out) std::copy(in, in + count, out);
    return;
  }
  const hn::ScalableTag<float> d;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  if (dtype == Float::kBF16) {
    for (; i + width <= count; i += width) hn::StoreU(round_bf16(d, hn::LoadU(d, in + i)), d, out + i);
  } else if (dtype == Float::kF16) {
    for (; i + width <= count; i += width) hn::StoreU(round_f16(d, hn::LoadU(d, in + i)), d, out + i);
  }
  for (; i < count; ++i) out[i] = static_cast<float>(round_to(static_cast<double>(in[i]), dtype));
}
void round_f64(const double* in, std::int64_t count, Float dtype, double* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = round_to(in[i], dtype);
}

// ---- route
// -------------------------------------------------------------------------------------------------------------

/// Strictly better: larger, NaN largest of all. Equal values are not better, so the lower index stays in front.
template <class T>
HWY_INLINE bool better(T a, T b) {
  return a > b || (a != a && b == b);
}

/// The `count` best of values[0, n), best first, by insertion: few values ever enter, and one comparison turns the rest
/// away.
template <class T>
HWY_INLINE void best_of(const T* values, std::int64_t n, std::int64_t count, std::int32_t* index) {
  std::int64_t have = 0;
  for (std::int64_t e = 0; e < n; ++e) {
    const T v = values[e];
    if (have == count && (v <= values[index[count - 1]] || !better(v, values[index[count - 1]]))) continue;
    std::int64_t at = have < count ? have++ : count - 1;
    for (; at > 0 && better(v, values[index[at - 1]]); --at) index[at] = index[at - 1];
    index[at] = static_cast<std::int32_t>(e);
  }
}

/// Tokens whose experts are chosen side by side: a round is a chain of dependent steps, and several chains overlap.
inline constexpr std::int64_t kAbreast = 4;

/// Keys (route_key(), router.h) of n values, with struck-out ones up to a whole vector.
HWY_INLINE void keys_of(const float* values, std::int64_t n, std::int32_t* keys) {
  const hn::CappedTag<float, 16> d;
  const hn::RebindToSigned<decltype(d)> di;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t e = 0;
  for (; e + width <= n; e += width) {
    const auto v = hn::Add(hn::LoadU(d, values + e), hn::Zero(d));  // -0 becomes 0
    const auto bits = hn::BitCast(di, v);
    const auto flipped = hn::Xor(bits, hn::And(hn::ShiftRight<31>(bits), hn::Set(di, kLargestKey)));
    hn::StoreU(hn::IfThenElse(hn::RebindMask(di, hn::Eq(v, v)), flipped, hn::Set(di, kLargestKey)), di, keys + e);
  }
  for (; e < n; ++e) keys[e] = route_key(values[e]);
  for (; e % width != 0; ++e) keys[e] = kStruckOut;
}

/// best_of() from keys, for kT tokens with `stride` keys each: a round takes the largest key, at its lowest index, and
/// strikes it out. index [kT, count].
template <int kT>
HWY_INLINE void best_keys(std::int32_t* keys, std::int64_t n, std::int64_t stride, std::int64_t count,
                          std::int32_t* index) {
  const hn::CappedTag<std::int32_t, 16> d;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  const auto lane = hn::Iota(d, 0), none = hn::Set(d, kLargestKey);
  for (std::int64_t j = 0; j < count; ++j) {
    hn::Vec<decltype(d)> most[kT], first[kT];
    for (int t = 0; t < kT; ++t) most[t] = hn::LoadU(d, keys + t * stride);
    for (std::int64_t i = width; i < n; i += width) {
      for (int t = 0; t < kT; ++t) most[t] = hn::Max(most[t], hn::LoadU(d, keys + t * stride + i));
    }
    for (int t = 0; t < kT; ++t) most[t] = hn::MaxOfLanes(d, most[t]), first[t] = none;
    // No early end: where the largest lies is anybody's guess, and a wrong one costs more than the whole pass.
    for (std::int64_t i = 0; i < n; i += width) {
      const auto here = hn::Add(lane, hn::Set(d, static_cast<std::int32_t>(i)));
      for (int t = 0; t < kT; ++t) {
        const auto hit = hn::Eq(hn::LoadU(d, keys + t * stride + i), most[t]);
        first[t] = hn::Min(first[t], hn::IfThenElse(hit, here, none));
      }
    }
    for (int t = 0; t < kT; ++t) first[t] = hn::MinOfLanes(d, first[t]);
    for (int t = 0; t < kT; ++t) {
      const std::int32_t at = hn::GetLane(first[t]);
      index[t * count + j] = at;
      // A whole vector goes back: the next round loads it whole, which a store of four bytes would hold up.
      std::int32_t* row = keys + t * stride + at / width * width;
      const auto struck = hn::Eq(lane, hn::Set(d, static_cast<std::int32_t>(at % width)));
      hn::StoreU(hn::IfThenElse(struck, hn::Set(d, kStruckOut), hn::LoadU(d, row)), d, row);
    }
  }
}

template <class T>
HWY_INLINE T rounded(T v, Float dtype) {
  return static_cast<T>(round_to(static_cast<double>(v), dtype));
}
template <class T>
HWY_INLINE void round_tensor(T* values, std::int64_t n, Float dtype) {
  if (dtype == Float::kF64) return;  // nothing beyond T, and the usual case
  for (std::int64_t i = 0; i < n; ++i) values[i] = rounded(values[i], dtype);
}

/// exp_of_non_positive() on vectors: the same operations in the same order, and so the same bits.
template <class D>
HWY_INLINE hn::Vec<D> fused_lanes(D d, hn::Vec<D> a, hn::Vec<D> b, hn::Vec<D> c) {
#if HWY_NATIVE_FMA
  (void)d;
  return hn::MulAdd(a, b, c);
#else
  HWY_ALIGN float x[16], y[16], z[16];
  hn::Store(a, d, x), hn::Store(b, d, y), hn::Store(c, d, z);
  for (std::size_t i = 0; i < hn::Lanes(d); ++i) x[i] = fused(x[i], y[i], z[i]);
  return hn::Load(d, x);
#endif
}
template <class D>
HWY_INLINE hn::Vec<D> exp_of_non_positive_lanes(D d, hn::Vec<D> x) {
  using namespace exp_float;
  const hn::RebindToUnsigned<D> du;
  const auto c = [d](float v) { return hn::Set(d, v); };
  const auto low = hn::IfThenElse(hn::Lt(x, c(kLowest)), c(kLowest), x);
  const auto k = hn::Sub(fused_lanes(d, low, c(kLog2e), c(kMagic)), c(kMagic));
  const auto r = fused_lanes(d, k, c(-kLn2Low), fused_lanes(d, k, c(-kLn2High), low));
  auto p = c(1.0f / 5040);
  for (const float next : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = fused_lanes(d, p, r, c(next));
  }
  const auto first = hn::IfThenElse(hn::Lt(k, c(-100.0f)), c(-100.0f), k);
  const auto two_to = [&](hn::Vec<D> n) {
    return hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, hn::Add(n, c(kMagic + 127.0f)))));
  };
  return hn::Mul(hn::Mul(p, two_to(first)), two_to(hn::Sub(k, first)));
}

/// Vectors of up to kMost lanes, from i on; returns how far they got.
template <std::size_t kMost>
HWY_INLINE std::int64_t exp_some(const float* in, std::int64_t i, std::int64_t n, float shift, float* out) {
  const hn::CappedTag<float, kMost> d;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  for (; i + width <= n; i += width)
    hn::StoreU(exp_of_non_positive_lanes(d, hn::Sub(hn::LoadU(d, in + i), hn::Set(d, shift))), d, out + i);
  return i;
}
/// out = exp(in - shift), in - shift <= 0.
HWY_INLINE void exp_all(const float* in, std::int64_t n, float shift, float* out) {
  std::int64_t i = exp_some<16>(in, 0, n, shift, out);
  i = exp_some<8>(in, i, n, shift, out);
  i = exp_some<4>(in, i, n, shift, out);
  for (; i < n; ++i) out[i] = exp_of_non_positive(in[i] - shift);
}
HWY_INLINE void exp_all(const double* in, std::int64_t n, double shift, double* out) {
  const hn::ScalableTag<double> d;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + width <= n; i += width)
    hn::StoreU(exp_lanes(d, hn::Sub(hn::LoadU(d, in + i), hn::Set(d, shift))), d, out + i);
  for (; i < n; ++i) out[i] = exp_exact_order(in[i] - shift);
}

HWY_INLINE void sigmoid_all(const float* in, std::int64_t n, float* out) {
  const hn::CappedTag<float, 16> d;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  const auto one = hn::Set(d, 1.0f);
  std::int64_t i = 0;
  for (; i + width <= n; i += width) {
    const auto x = hn::LoadU(d, in + i);
    const auto negative = hn::Lt(x, hn::Zero(d));
    const auto e = exp_of_non_positive_lanes(d, hn::IfThenElse(negative, x, hn::Neg(x)));
    hn::StoreU(hn::Div(hn::IfThenElse(negative, e, one), hn::Add(one, e)), d, out + i);
  }
  for (; i < n; ++i) out[i] = sigmoid_float(in[i]);
}
HWY_INLINE void sigmoid_all(const double* in, std::int64_t n, double* out) {
  const hn::ScalableTag<double> d;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  const auto one = hn::Set(d, 1.0);
  std::int64_t i = 0;
  for (; i + width <= n; i += width)
    hn::StoreU(hn::Div(one, hn::Add(one, exp_lanes(d, hn::Neg(hn::LoadU(d, in + i))))), d, out + i);
  for (; i < n; ++i) out[i] = sigmoid_exact_order(in[i]);
}

/// Vectors that are as wide as kLanes together.
template <class T>
using LaneTag = hn::CappedTag<T, 64 / sizeof(T)>;
template <class T>
inline constexpr int kWidth = static_cast<int>(hn::MaxLanes(LaneTag<T>()));
template <class T>
inline constexpr int kLaneVectors = kLanes / kWidth<T>;

/// Sum of n values in kLanes lanes (elementary.h).
template <class T>
HWY_INLINE T sum_in_lanes(const T* v, std::int64_t n) {
  const LaneTag<T> d;
  hn::Vec<decltype(d)> sum[kLaneVectors<T>];
  for (int j = 0; j < kLaneVectors<T>; ++j) sum[j] = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLaneVectors<T>; ++j) sum[j] = hn::Add(sum[j], hn::LoadU(d, v + i + j * kWidth<T>));
  }
  HWY_ALIGN T lane[kLanes];
  for (int j = 0; j < kLaneVectors<T>; ++j) hn::Store(sum[j], d, lane + j * kWidth<T>);
  for (; i < n; ++i) lane[i % kLanes] += v[i];
  return add_lanes(lane);
}

/// The largest of n values; whether a NaN is among them.
template <class T>
HWY_INLINE T largest_of(const T* v, std::int64_t n, bool* has_nan) {
  const LaneTag<T> d;
  T largest = v[0];
  bool nan = false;
  std::int64_t i = 0;
  if (n >= kWidth<T>) {
    auto most = hn::LoadU(d, v);
    auto equal = hn::Eq(most, most);
    for (i = kWidth<T>; i + kWidth<T> <= n; i += kWidth<T>) {
      const auto x = hn::LoadU(d, v + i);
      equal = hn::And(equal, hn::Eq(x, x));
      most = hn::IfThenElse(hn::Gt(x, most), x, most);
    }
    nan = !hn::AllTrue(d, equal);
    largest = hn::GetLane(hn::MaxOfLanes(d, most));
  }
  for (; i < n; ++i) {
    largest = v[i] > largest ? v[i] : largest;
    nan |= v[i] != v[i];
  }
  *has_nan = nan;
  return largest;
}

/// out = softmax(in) over n values; each result of the arithmetic is a T. A NaN makes all of them NaN.
template <class T>
HWY_INLINE void softmax(const T* in, std::int64_t n, Float dtype, T* out) {
  bool has_nan = false;
  const T largest = largest_of(in, n, &has_nan);
  if (has_nan || largest - largest != 0) return std::fill(out, out + n, std::numeric_limits<T>::quiet_NaN());
  exp_all(in, n, largest, out);
  const T sum = sum_in_lanes(out, n);
  const LaneTag<T> d;
  const auto by = hn::Set(d, sum);
  std::int64_t e = 0;
  for (; e + kWidth<T> <= n; e += kWidth<T>) hn::StoreU(hn::Div(hn::LoadU(d, out + e), by), d, out + e);
  for (; e < n; ++e) out[e] /= sum;
  round_tensor(out, n, dtype);
}

template <class T>
HWY_INLINE void scores_of(const RouteArgs<T>& a, const T* logits, T* scores) {
  if (a.score == Score::kSoftmax) return softmax(logits, a.experts, a.tensor_dtype, scores);
  if (a.score == Score::kSigmoid) {
    sigmoid_all(logits, a.experts, scores);
  } else {
    for (std::int64_t e = 0; e < a.experts; ++e) scores[e] = static_cast<T>(sqrt_softplus_exact_order(logits[e]));
  }
  round_tensor(scores, a.experts, a.tensor_dtype);
}

/// The `count` best of up to kAbreast rows. choice [tokens, experts] in; index [tokens, count] out.
HWY_INLINE void choose(const float* choice, std::int64_t tokens, std::int64_t experts, std::int64_t count,
                       std::int32_t* keys, std::int32_t* index) {
  const std::int64_t stride = (experts + 15) / 16 * 16;
  for (std::int64_t t = 0; t < tokens; ++t) keys_of(choice + t * experts, experts, keys + t * stride);
  if (tokens == kAbreast) return best_keys<kAbreast>(keys, experts, stride, count, index);
  for (std::int64_t t = 0; t < tokens; ++t)
    best_keys<1>(keys + t * stride, experts, stride, count, index + t * count);
}
HWY_INLINE void choose(const double* choice, std::int64_t tokens, std::int64_t experts, std::int64_t count,
                       std::int32_t*, std::int32_t* index) {
  for (std::int64_t t = 0; t < tokens; ++t) best_of(choice + t * experts, experts, count, index + t * count);
}

template <class T>
void mask_groups(const RouteArgs<T>& a, T* choice, T* group_value, std::int32_t* index, std::int32_t* keys) {
  const std::int64_t size = a.experts / a.groups, best = group_members(a);
  for (std::int64_t first = 0; first < a.groups; first += kAbreast) {
    const std::int64_t count = std::min(kAbreast, a.groups - first);
    choose(choice + first * size, count, size, best, keys, index);
    for (std::int64_t g = 0; g < count; ++g) {
      const T* members = choice + (first + g) * size;
      T sum = members[index[g * best]];
      for (std::int64_t j = 1; j < best; ++j) sum += members[index[g * best + j]];
      group_value[first + g] = best > 1 ? rounded(sum, a.tensor_dtype) : sum;
    }
  }
  best_of(group_value, a.groups, a.top_groups, index);
  const T fill = a.group_mask_is_zero ? T(0) : -std::numeric_limits<T>::infinity();
  for (std::int64_t g = 0; g < a.groups; ++g) {
    if (std::find(index, index + a.top_groups, static_cast<std::int32_t>(g)) != index + a.top_groups) continue;
    std::fill(choice + g * size, choice + (g + 1) * size, fill);
  }
}

template <class T>
void weigh(const RouteArgs<T>& a, const T* logits, const T* scores, const std::int32_t* index, T* gathered,
           T* weights) {
  const T* from = a.softmax_after_top_k ? logits : scores;
  for (std::int64_t j = 0; j < a.top_k; ++j) gathered[j] = from[index[j]];
  if (a.softmax_after_top_k) {
    softmax(gathered, a.top_k, a.tensor_dtype, weights);
  } else {
    std::copy(gathered, gathered + a.top_k, weights);
  }
  if (a.renormalise) {
    T sum = 0;
    for (std::int64_t j = 0; j < a.top_k; ++j) sum += weights[j];
    sum = rounded(rounded(sum, a.tensor_dtype) + a.renormalise_eps, a.tensor_dtype);
    for (std::int64_t j = 0; j < a.top_k; ++j) weights[j] /= sum;
    round_tensor(weights, a.top_k, a.tensor_dtype);
  }
  if (a.scaling != T(1)) {
    for (std::int64_t j = 0; j < a.top_k; ++j) weights[j] *= a.scaling;
    round_tensor(weights, a.top_k, a.tensor_dtype);
  }
  round_tensor(weights, a.top_k, a.weights_dtype);
}

template <class T>
void route_all(const RouteArgs<T>& a, const RouteResult<T>& r) {
  const std::int64_t count = std::min(a.top_k + (r.runner_up != nullptr ? 1 : 0), a.experts);
  std::vector<T> scores(kAbreast * a.experts), choice(kAbreast * a.experts), scratch(std::max(a.groups, a.top_k));
  std::vector<std::int32_t> index(kAbreast * count), group(std::max(a.groups, kAbreast * group_members(a)));
  std::vector<std::int32_t> keys(kAbreast * (a.experts + 16));
  for (std::int64_t first = 0; first < a.tokens; first += kAbreast) {
    const std::int64_t tokens = std::min(kAbreast, a.tokens - first);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const T* logits = a.logits + (first + t) * a.experts;
      const T* base = logits;
      if (!a.softmax_after_top_k) {
        scores_of(a, logits, scores.data() + t * a.experts);
        base = scores.data() + t * a.experts;
      }
      T* to = choice.data() + t * a.experts;
      for (std::int64_t e = 0; e < a.experts; ++e) {
        to[e] = a.correction_bias == nullptr ? base[e]
                : a.bias_multiplies          ? base[e] * a.correction_bias[e]
                                             : base[e] + a.correction_bias[e];
      }
      if (a.group_score != GroupScore::kNone) mask_groups(a, to, scratch.data(), group.data(), keys.data());
    }
    choose(choice.data(), tokens, a.experts, count, keys.data(), index.data());
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int32_t* chosen = index.data() + t * count;
      const std::int64_t token = first + t;
      std::copy(chosen, chosen + a.top_k, r.chosen + token * a.top_k);
      if (r.runner_up != nullptr) r.runner_up[token] = count > a.top_k ? chosen[a.top_k] : -1;
      if (r.choice != nullptr)
        std::copy(choice.begin() + t * a.experts, choice.begin() + (t + 1) * a.experts, r.choice + token * a.experts);
      if (r.weights != nullptr) {
        weigh(a, a.logits + token * a.experts, scores.data() + t * a.experts, chosen, scratch.data(),
              r.weights + token * a.top_k);
      }
    }
  }
}
void route_f32(const RouteArgs<float>& a, const RouteResult<float>& r) { route_all(a, r); }
void route_f64(const RouteArgs<double>& a, const RouteResult<double>& r) { route_all(a, r); }

const char* backend() { return hwy::TargetName(HWY_TARGET); }

}  // namespace moeaudit::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cctype>
#include <map>
#include <mutex>
#include <string>

namespace moeaudit::kernels {

HWY_EXPORT(gate_f32);
HWY_EXPORT(gate_f64);
HWY_EXPORT(gate_wide);
HWY_EXPORT(round_f32);
HWY_EXPORT(round_f64);
HWY_EXPORT(route_f32);
HWY_EXPORT(route_f64);
HWY_EXPORT(backend);

const char* name_of(Float f) {
  switch (f) {
    case Float::kF64: return "float64";
    case Float::kF32: return "float32";
    case Float::kBF16: return "bfloat16";
    case Float::kF16: return "float16";
  }
  return "?";
}

const char* name_of(Status status) {
  switch (status) {
    case Status::kOk: return "ok";
    case Status::kNullPointer: return "a required pointer is null";
    case Status::kBadShape: return "a size is negative or zero";
    case Status::kBadTopK: return "top_k is not within 1..experts";
    case Status::kBadGroups:
      return "groups do not divide the experts, top_groups is not within 1..groups, or a group is too small";
    case Status::kBadOption: return "options that exclude each other";
    case Status::kLaunchFailed: return "the device refused the launch";
  }
  return "?";
}

namespace {

template <class In, class Sum>
Status check(const GateArgs<In, Sum>& a) {
  if (a.tokens < 0 || a.hidden < 1 || a.experts < 1) return Status::kBadShape;
  if (a.tokens > 0 && (a.x == nullptr || a.packed == nullptr || a.logits == nullptr)) return Status::kNullPointer;
  return Status::kOk;
}

template <class T>
Status check(const RouteArgs<T>& a, const RouteResult<T>& r) {
  if (a.tokens < 0 || a.experts < 1 || a.experts > std::numeric_limits<std::int32_t>::max()) return Status::kBadShape;
  if (a.tokens > 0 && (a.logits == nullptr || r.chosen == nullptr)) return Status::kNullPointer;
  if (a.top_k < 1 || a.top_k > a.experts) return Status::kBadTopK;
  if (a.softmax_after_top_k && (a.score != Score::kSoftmax || a.group_score != GroupScore::kNone))
    return Status::kBadOption;
  if (a.group_score == GroupScore::kNone) return Status::kOk;
  if (a.groups < 1 || a.experts % a.groups != 0 || a.top_groups < 1 || a.top_groups > a.groups)
    return Status::kBadGroups;
  if (group_members(a) > a.experts / a.groups) return Status::kBadGroups;
  return Status::kOk;
}

}  // namespace

Status gate_logits(const GateArgs<float, float>& args) {
  const Status status = check(args);
  if (status == Status::kOk) HWY_DYNAMIC_DISPATCH(gate_f32)(args);
  return status;
}
Status gate_logits(const GateArgs<double, double>& args) {
  const Status status = check(args);
  if (status == Status::kOk) HWY_DYNAMIC_DISPATCH(gate_f64)(args);
  return status;
}
Status gate_logits(const GateArgs<float, double>& args) {
  const Status status = check(args);
  if (status == Status::kOk) HWY_DYNAMIC_DISPATCH(gate_wide)(args);
  return status;
}
void round_values(const float* in, std::int64_t count, Float dtype, float* out) {
  HWY_DYNAMIC_DISPATCH(round_f32)(in, count, dtype, out);
}
void round_values(const double* in, std::int64_t count, Float dtype, double* out) {
  HWY_DYNAMIC_DISPATCH(round_f64)(in, count, dtype, out);
}
Status check_route(const RouteArgs<float>& args, const RouteResult<float>& result) { return check(args, result); }
Status check_route(const RouteArgs<double>& args, const RouteResult<double>& result) { return check(args, result); }
Status route(const RouteArgs<float>& args, const RouteResult<float>& result) {
  const Status status = check(args, result);
  if (status == Status::kOk) HWY_DYNAMIC_DISPATCH(route_f32)(args, result);
  return status;
}
Status route(const RouteArgs<double>& args, const RouteResult<double>& result) {
  const Status status = check(args, result);
  if (status == Status::kOk) HWY_DYNAMIC_DISPATCH(route_f64)(args, result);
  return status;
}

const char* host_backend() {
  static std::mutex mutex;
  static std::map<std::string, std::string> names;  // interned: callers keep the pointer
  const std::string name = HWY_DYNAMIC_DISPATCH(backend)();
  const std::scoped_lock lock(mutex);
  std::string& lower = names[name];
  if (lower.empty()) {
    for (const char c : name) lower += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return lower.c_str();
}

}  // namespace moeaudit::kernels
#endif  // HWY_ONCE

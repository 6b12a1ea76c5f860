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
#include <array>
#include <bit>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/host/elementary-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moeaudit::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Experts whose sums one block keeps in registers, as whole panels of 64 bytes, and the tokens that share their
// weights.
template <class Sum>
inline constexpr std::int64_t kPanel = 64 / sizeof(Sum);
inline constexpr int kPanels = HWY_MAX_BYTES >= 64 ? 2 : 1;
/// What is multiplied of a panel: all of it, or the first half where the other has no experts.
template <class Sum, bool kHalf>
using PanelTag = hn::CappedTag<Sum, kPanel<Sum> / (kHalf ? 2 : 1)>;
template <class Sum, bool kHalf>
inline constexpr int kVectors = static_cast<int>(kPanel<Sum> / (kHalf ? 2 : 1) / hn::MaxLanes(PanelTag<Sum, kHalf>()));
template <class Sum>
inline constexpr int kBlockTokens = std::max(1, 12 / (HWY_MAX_BYTES >= 64 ? 1 : kVectors<Sum, false>));
inline constexpr std::int64_t kTileTokens = 96;  // their sums stay in the second-level cache; a multiple of every block

inline constexpr std::int64_t kPiece = 16;  // of a stretch, taken at a time
static_assert(kGateRun % kPiece == 0);

/// The sums of one stretch for kT tokens and kP panels of experts, in registers.
template <int kT, int kP, bool kHalf, class Sum>
using BlockSums = hn::Vec<PanelTag<Sum, kHalf>>[kT][kP * kVectors<Sum, kHalf>];

template <int kT, int kP, bool kHalf, class Sum>
HWY_INLINE void set_zero(BlockSums<kT, kP, kHalf, Sum>& sum) {
  for (auto& of_token : sum) {
    for (auto& v : of_token) v = hn::Zero(PanelTag<Sum, kHalf>());
  }
}

/// sum[t, panels] += x[t, i] * w[panels, i], for `count` i in order. Panels of w lie next_panel apart.
template <int kT, int kP, bool kHalf, class In, class Sum>
HWY_INLINE void add_products(const Sum* HWY_RESTRICT x, std::int64_t x_stride, const Sum* HWY_RESTRICT w,
                             std::int64_t next_panel, std::int64_t count, BlockSums<kT, kP, kHalf, Sum>& sum) {
  const PanelTag<Sum, kHalf> d;
  constexpr bool kExactProducts = sizeof(Sum) > sizeof(In);
  constexpr int kOfPanel = kVectors<Sum, kHalf>, kV = kP * kOfPanel;
  constexpr std::int64_t kWidth = hn::MaxLanes(PanelTag<Sum, kHalf>());
  for (std::int64_t i = 0; i < count; ++i) {
    hn::Vec<decltype(d)> weight[kV];
    for (int v = 0; v < kV; ++v)
      weight[v] = hn::LoadU(d, w + v / kOfPanel * next_panel + i * kPanel<Sum> + v % kOfPanel * kWidth);
    for (int t = 0; t < kT; ++t) {
      const auto value = hn::Set(d, x[t * x_stride + i]);
      for (int v = 0; v < kV; ++v) {
        if constexpr (kExactProducts) {
          sum[t][v] = hn::MulAdd(value, weight[v], sum[t][v]);
        } else {
          sum[t][v] = hn::Add(sum[t][v], hn::Mul(value, weight[v]));
        }
      }
    }
  }
}

/// sums[t, panels] += sum[t, panels]: the end of a stretch.
template <int kT, int kP, bool kHalf, class Sum>
HWY_INLINE void add_to(Sum* HWY_RESTRICT sums, std::int64_t stride, const BlockSums<kT, kP, kHalf, Sum>& sum) {
  const PanelTag<Sum, kHalf> d;
  constexpr std::int64_t kWidth = hn::MaxLanes(PanelTag<Sum, kHalf>());
  for (int t = 0; t < kT; ++t) {
    for (int v = 0; v < kP * kVectors<Sum, kHalf>; ++v) {
      Sum* to = sums + t * stride + v * kWidth;
      hn::StoreU(hn::Add(hn::LoadU(d, to), sum[t][v]), d, to);
    }
  }
}

/// One stretch of kT tokens, packed in x, against kP panels. next: the tokens' next stretch in their rows, or null; it
/// is asked for a piece at a time: rows are read a stretch at a time, too little for the machine to see what comes, and
/// all at once would be more than it can have under way.
template <int kT, int kP, class In, class Sum>
void add_block(const Sum* HWY_RESTRICT x, const Sum* HWY_RESTRICT w, std::int64_t length, Sum* HWY_RESTRICT sums,
               std::int64_t stride, const In* next, std::int64_t hidden) {
  BlockSums<kT, kP, false, Sum> sum;
  set_zero<kT, kP, false, Sum>(sum);
  for (std::int64_t i = 0; i < length; i += kPiece) {
    for (int t = 0; next != nullptr && t < kT; ++t) {
      for (std::int64_t line = i; line < i + kPiece; line += 64 / static_cast<std::int64_t>(sizeof(In)))
        hwy::Prefetch(next + t * hidden + line);
    }
    add_products<kT, kP, false, In>(x + i, kGateRun, w + i * kPanel<Sum>, length * kPanel<Sum>,
                                    std::min(kPiece, length - i), sum);
  }
  add_to<kT, kP, false>(sums, stride, sum);
}

/// One stretch of hidden for kT tokens against all experts.
template <int kT, class In, class Sum>
void add_stretch(const GateArgs<In, Sum>& a, std::int64_t token, std::int64_t first, std::int64_t length, Sum* sums) {
  HWY_ALIGN Sum x[kT * kGateRun];
  const In* rows = a.x + token * a.hidden + first;
  for (int t = 0; t < kT; ++t) {
    for (std::int64_t i = 0; i < length; ++i) x[t * kGateRun + i] = static_cast<Sum>(rows[t * a.hidden + i]);
  }
  const std::int64_t padded = packed_gate_size<Sum>(a.experts, 1);
  const Sum* w = a.packed + first * padded;
  const In* next = first + 2 * kGateRun <= a.hidden ? rows + kGateRun : nullptr;
  std::int64_t e = 0;
  for (; e + kPanels * kPanel<Sum> <= padded; e += kPanels * kPanel<Sum>) {
    add_block<kT, kPanels>(x, w + e * length, length, sums + e, padded, next, a.hidden);
    next = nullptr;
  }
  for (; e < padded; e += kPanel<Sum>) {
    add_block<kT, 1>(x, w + e * length, length, sums + e, padded, next, a.hidden);
    next = nullptr;
  }
}

/// All of hidden for kT tokens where one block holds all experts, so that every value of x is used once. x of the sums'
/// type is read in place: kT rows, each in order, which the machine follows by itself.
template <int kT, int kP, bool kHalf, class Sum>
void add_rows(const Sum* rows, const GateArgs<Sum, Sum>& a, Sum* HWY_RESTRICT sums) {
  const std::int64_t padded = packed_gate_size<Sum>(a.experts, 1);
  for (std::int64_t first = 0; first < a.hidden; first += kGateRun) {
    const std::int64_t length = std::min(kGateRun, a.hidden - first);
    BlockSums<kT, kP, kHalf, Sum> sum;
    set_zero<kT, kP, kHalf, Sum>(sum);
    add_products<kT, kP, kHalf, Sum>(rows + first, a.hidden, a.packed + first * padded, length * kPanel<Sum>, length,
                                     sum);
    add_to<kT, kP, kHalf>(sums, padded, sum);
  }
}
/// Wider sums want x converted: a piece ahead, and of that a row at a time, so that the products never wait for it.
template <int kT, int kP, bool kHalf>
void add_rows(const float* rows, const GateArgs<float, double>& a, double* HWY_RESTRICT sums) {
  static_assert(kPiece % kT == 0);
  constexpr std::int64_t kShare = kPiece / kT;  // columns multiplied between two rows
  const std::int64_t padded = packed_gate_size<double>(a.experts, 1);
  alignas(64) double converted[2][kT * kPiece];
  const auto convert = [&](std::int64_t first, int t, std::int64_t count) HWY_ATTR {
    const hn::CappedTag<double, 8> d;
    constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(decltype(d)()));
    const float* HWY_RESTRICT from = rows + t * a.hidden + first;
    double* HWY_RESTRICT to = converted[first / kPiece % 2] + t * kPiece;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      hn::Store(hn::PromoteTo(d, hn::LoadU(hn::Rebind<float, decltype(d)>(), from + i)), d, to + i);
    for (; i < count; ++i) to[i] = from[i];
  };
  for (int t = 0; t < kT; ++t) convert(0, t, std::min(kPiece, a.hidden));
  for (std::int64_t first = 0; first < a.hidden; first += kGateRun) {
    const std::int64_t length = std::min(kGateRun, a.hidden - first), next_panel = length * kPanel<double>;
    BlockSums<kT, kP, kHalf, double> sum;
    set_zero<kT, kP, kHalf, double>(sum);
    for (std::int64_t i = 0; i < length; i += kPiece) {
      const double* x = converted[(first + i) / kPiece % 2];
      const double* w = a.packed + first * padded + i * kPanel<double>;
      const std::int64_t next = first + i + kPiece;
      if (next + kPiece <= a.hidden) {
        for (int t = 0; t < kT; ++t, x += kShare, w += kShare * kPanel<double>) {
          convert(next, t, kPiece);
          add_products<kT, kP, kHalf, float>(x, kPiece, w, next_panel, kShare, sum);
        }
      } else {
        for (int t = 0; t < kT; ++t) convert(next, t, a.hidden - next);
        add_products<kT, kP, kHalf, float>(x, kPiece, w, next_panel, std::min(kPiece, length - i), sum);
      }
    }
    add_to<kT, kP, kHalf>(sums, padded, sum);
  }
}

/// sums [tokens, padded experts] of `tokens` from `start`, from zero. In place no more than six rows: those of whole
/// pages share eight ways of the first-level cache.
template <int kP, bool kHalf, class In, class Sum>
void few_experts(const GateArgs<In, Sum>& a, std::int64_t start, std::int64_t tokens, Sum* sums) {
  constexpr int kV = kP * kVectors<Sum, kHalf>;
  constexpr int kT = std::max(1, sizeof(Sum) > sizeof(In) ? 8 / kV : std::min(6, 12 / kV));
  const std::int64_t padded = packed_gate_size<Sum>(a.experts, 1);
  const In* rows = a.x + start * a.hidden;
  std::int64_t t = 0;
  for (; t + kT <= tokens; t += kT) add_rows<kT, kP, kHalf>(rows + t * a.hidden, a, sums + t * padded);
  for (; t < tokens; ++t) add_rows<1, kP, kHalf>(rows + t * a.hidden, a, sums + t * padded);
}

template <class In, class Sum>
void many_experts(const GateArgs<In, Sum>& a, std::int64_t start, std::int64_t tokens, Sum* sums) {
  constexpr int kT = kBlockTokens<Sum>;
  const std::int64_t padded = packed_gate_size<Sum>(a.experts, 1);
  for (std::int64_t first = 0; first < a.hidden; first += kGateRun) {
    const std::int64_t length = std::min(kGateRun, a.hidden - first);
    std::int64_t t = 0;
    for (; t + kT <= tokens; t += kT) add_stretch<kT>(a, start + t, first, length, sums + t * padded);
    for (; t < tokens; ++t) add_stretch<1>(a, start + t, first, length, sums + t * padded);
  }
}

template <class In, class Sum>
void gate(const GateArgs<In, Sum>& a) {
  const std::int64_t padded = packed_gate_size<Sum>(a.experts, 1);
  if (a.tokens == 0) return;  // Highway allocates no empty buffers
  const std::int64_t tile = std::min(kTileTokens, a.tokens);
  const auto buffer = hwy::AllocateAligned<Sum>(tile * padded);
  for (std::int64_t start = 0; start < a.tokens; start += tile) {
    const std::int64_t tokens = std::min(tile, a.tokens - start);
    Sum* sums = buffer.get();
    std::fill(sums, sums + tokens * padded, Sum(0));
    if (a.experts <= kPanel<Sum> / 2) {
      few_experts<1, true>(a, start, tokens, sums);
    } else if (padded == kPanel<Sum>) {
      few_experts<1, false>(a, start, tokens, sums);
    } else if (padded == kPanels * kPanel<Sum>) {
      few_experts<kPanels, false>(a, start, tokens, sums);
    } else {
      many_experts(a, start, tokens, sums);
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
// One token in each lane of a vector, and the experts one row after the other: no lane ever waits for another, whatever
// the number of experts. Rows lie kWidth apart.

template <class T>
using Tag = hn::CappedTag<T, 64 / sizeof(T)>;
template <class T>
using KeyTag = hn::RebindToSigned<Tag<T>>;
template <class T>
using Key = hn::TFromD<KeyTag<T>>;
template <class T>
inline constexpr std::int64_t kWidth = hn::MaxLanes(Tag<T>());
template <class T>
inline constexpr Key<T> kMostKey = std::numeric_limits<Key<T>>::max();  // kLargestKey of router.h, for both types

#if HWY_TARGET != HWY_SCALAR
/// Four columns of as many rows as a vector has lanes: block b of 16 bytes from row 4 b.
template <class D>
HWY_INLINE hn::Vec<D> every_fourth_row(D d, const hn::TFromD<D>* from, std::int64_t stride) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    return hn::LoadU(d, from);
  } else {
    const hn::Half<D> half;
    const auto low = every_fourth_row(half, from, stride);
    return hn::Combine(d, every_fourth_row(half, from + hn::MaxLanes(D()) / 2 * stride, stride), low);
  }
}
/// to[c, r] = from[r, c] for four columns and as many rows as D has lanes.
template <class D>
HWY_INLINE void four_columns(D d, const hn::TFromD<D>* from, std::int64_t from_stride, hn::TFromD<D>* to,
                             std::int64_t to_stride) {
  const hn::RepartitionToWide<D> pairs;
  const auto a0 = every_fourth_row(d, from, from_stride), a1 = every_fourth_row(d, from + from_stride, from_stride);
  const auto a2 = every_fourth_row(d, from + 2 * from_stride, from_stride);
  const auto a3 = every_fourth_row(d, from + 3 * from_stride, from_stride);
  const auto b0 = hn::BitCast(pairs, hn::InterleaveLower(d, a0, a1));
  const auto b1 = hn::BitCast(pairs, hn::InterleaveUpper(d, a0, a1));
  const auto b2 = hn::BitCast(pairs, hn::InterleaveLower(d, a2, a3));
  const auto b3 = hn::BitCast(pairs, hn::InterleaveUpper(d, a2, a3));
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, b0, b2)), d, to);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, b0, b2)), d, to + to_stride);
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, b1, b3)), d, to + 2 * to_stride);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, b1, b3)), d, to + 3 * to_stride);
}
#endif

/// to[c, r] = from[r, c] for rows x columns, in squares of 4 x 4 or wider.
template <class From, class To>
HWY_INLINE void transpose(const From* HWY_RESTRICT from, std::int64_t from_stride, std::int64_t rows,
                          std::int64_t columns, To* HWY_RESTRICT to, std::int64_t to_stride) {
  std::int64_t r = 0;
#if HWY_TARGET != HWY_SCALAR
  if constexpr (std::is_same_v<From, To> && sizeof(To) == 4) {
    const auto in_vectors = [&](auto d) {
      constexpr std::int64_t kRows = hn::MaxLanes(decltype(d)());
      for (; r + kRows <= rows; r += kRows) {
        std::int64_t c = 0;
        for (; c + 4 <= columns; c += 4)
          four_columns(d, from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
        for (; c < columns; ++c) {
          for (std::int64_t i = r; i < r + kRows; ++i) to[c * to_stride + i] = from[i * from_stride + c];
        }
      }
    };
    in_vectors(Tag<To>());
    in_vectors(hn::CappedTag<To, 4>());
  }
#endif
  for (; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = static_cast<To>(from[r * from_stride + c]);
  }
}

/// route_key() and route_value() (router.h).
template <class T>
HWY_INLINE hn::Vec<KeyTag<T>> key_of(hn::Vec<Tag<T>> v) {
  const KeyTag<T> dk;
  const auto most = hn::Set(dk, kMostKey<T>);
  const auto bits = hn::BitCast(dk, hn::Add(v, hn::Zero(Tag<T>())));  // -0 becomes 0
  const auto flipped = hn::Xor(bits, hn::And(hn::ShiftRight<8 * sizeof(T) - 1>(bits), most));
  return hn::IfThenElse(hn::RebindMask(dk, hn::Eq(v, v)), flipped, most);
}
template <class T>
HWY_INLINE hn::Vec<Tag<T>> value_of(hn::Vec<KeyTag<T>> key) {
  const Tag<T> d;
  const auto most = hn::Set(KeyTag<T>(), kMostKey<T>);
  const auto v = hn::BitCast(d, hn::Xor(key, hn::And(hn::ShiftRight<8 * sizeof(T) - 1>(key), most)));
  return hn::IfThenElse(hn::RebindMask(d, hn::Eq(key, most)), hn::Set(d, std::numeric_limits<T>::quiet_NaN()), v);
}

/// The next kRanks ranks of n rows of values, best first: keys and rows [kRanks]. A row enters before the first that it
/// beats, so the lower one stays in front among equals. kResume: only what comes after the rank in front of these.
template <int kRanks, bool kResume, class T>
HWY_INLINE void choose_some(const T* values, std::int64_t n, Key<T>* keys, Key<T>* rows) {
  const Tag<T> d;
  const KeyTag<T> dk;
  const auto none = hn::Set(dk, std::numeric_limits<Key<T>>::min());
  hn::Vec<KeyTag<T>> best[kRanks], row[kRanks], past = none, past_row = none;
  for (int j = 0; j < kRanks; ++j) best[j] = none, row[j] = hn::Zero(dk);
  if constexpr (kResume) past = hn::Load(dk, keys - kWidth<T>), past_row = hn::Load(dk, rows - kWidth<T>);
  for (std::int64_t e = 0; e < n; ++e) {
    auto key = key_of<T>(hn::Load(d, values + e * kWidth<T>));
    const auto at = hn::Set(dk, static_cast<Key<T>>(e));
    if constexpr (kResume) {
      const auto after = hn::Or(hn::Lt(key, past), hn::And(hn::Eq(key, past), hn::Gt(at, past_row)));
      key = hn::IfThenElse(after, key, none);
    }
    auto beats = hn::Gt(key, best[kRanks - 1]);
    if (kRanks > 2 && e > 4 * kRanks && hn::AllFalse(dk, beats)) continue;
    for (int j = kRanks - 1; j > 0; --j) {
      const auto beats_next = hn::Gt(key, best[j - 1]);
      row[j] = hn::IfThenElse(beats_next, row[j - 1], hn::IfThenElse(beats, at, row[j]));
      best[j] = hn::Max(best[j], hn::Min(best[j - 1], key));
      beats = beats_next;
    }
    row[0] = hn::IfThenElse(beats, at, row[0]);
    best[0] = hn::Max(best[0], key);
  }
  for (int j = 0; j < kRanks; ++j) {
    hn::Store(best[j], dk, keys + j * kWidth<T>);
    hn::Store(row[j], dk, rows + j * kWidth<T>);
  }
}
inline constexpr int kMostRanks = 8;  // of one pass

#if HWY_TARGET != HWY_SCALAR
struct Step {
  int high, low;
};
inline constexpr std::array<Step, 19> kSort = {{{0, 1},
                                                {2, 3},
                                                {4, 5},
                                                {6, 7},
                                                {0, 2},
                                                {1, 3},
                                                {4, 6},
                                                {5, 7},
                                                {1, 2},
                                                {5, 6},
                                                {0, 4},
                                                {1, 5},
                                                {2, 6},
                                                {3, 7},
                                                {2, 4},
                                                {3, 5},
                                                {1, 2},
                                                {3, 4},
                                                {5, 6}}};
inline constexpr std::array<Step, 12> kMerge = {
    {{0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}}};
/// Written out step by step, since vectors must not sit in memory.
template <std::size_t kSteps, class F>
HWY_INLINE void in_turn(const std::array<Step, kSteps>& steps, F&& f) {
  [&]<std::size_t... kAt>(std::index_sequence<kAt...>) __attribute__((always_inline)) {
    (f(steps[kAt].high, steps[kAt].low), ...);
  }
  (std::make_index_sequence<kSteps>());
}

/// choose_some() for eight ranks of float32, without a branch: eight rows at a time are sorted by a network (Batcher's)
/// and merged into the best. A key and the complement of its row are one 64-bit number, so that no two are equal and
/// the lower row is larger; the tokens of even and of odd lanes go separately.
template <bool kResume>
HWY_INLINE void choose_eight(const float* values, std::int64_t n, std::int32_t* keys, std::int32_t* rows) {
  const Tag<float> d;
  const KeyTag<float> dk;
  const hn::RepartitionToWide<KeyTag<float>> pairs;
  constexpr int kTwo = hn::MaxLanes(pairs);
  using Pair = hn::Vec<decltype(pairs)>;
  const auto pair = [&](auto key, auto row, bool odd) {
    return hn::BitCast(pairs, odd ? hn::OddEven(key, hn::DupOdd(row)) : hn::OddEven(hn::DupEven(key), row));
  };
  const auto order = [](Pair & high, Pair & low) __attribute__((always_inline)) {
    const auto larger = hn::Max(high, low);
    low = hn::Min(high, low);
    high = larger;
  };
  HWY_ALIGN std::int64_t best[2][kMostRanks * kTwo];
  std::fill(best[0], best[0] + 2 * kMostRanks * kTwo, std::numeric_limits<std::int64_t>::min());
  for (std::int64_t e = 0; e < n; e += kMostRanks) {
    hn::Vec<KeyTag<float>> key[kMostRanks];
    for (int i = 0; i < kMostRanks; ++i) {
      key[i] = e + i < n ? key_of<float>(hn::Load(d, values + (e + i) * kWidth<float>))
                         : hn::Set(dk, std::numeric_limits<std::int32_t>::min());
    }
    for (int odd = 0; odd < 2; ++odd) {
      Pair v[kMostRanks];
      for (int i = 0; i < kMostRanks; ++i) {
        v[i] = pair(key[i], hn::Set(dk, ~static_cast<std::int32_t>(e + i)), odd != 0);
        if constexpr (kResume) {
          const auto past =
              pair(hn::Load(dk, keys - kWidth<float>), hn::Not(hn::Load(dk, rows - kWidth<float>)), odd != 0);
          v[i] = hn::IfThenElse(hn::Lt(v[i], past), v[i], hn::Set(pairs, std::numeric_limits<std::int64_t>::min()));
        }
      }
      in_turn(
          kSort, [&](int i, int j) __attribute__((always_inline)) { order(v[i], v[j]); });
      std::int64_t* const to = best[odd];
      Pair most[kMostRanks];
      for (int i = 0; i < kMostRanks; ++i) most[i] = hn::Max(hn::Load(pairs, to + i * kTwo), v[kMostRanks - 1 - i]);
      in_turn(
          kMerge, [&](int i, int j) __attribute__((always_inline)) { order(most[i], most[j]); });
      for (int i = 0; i < kMostRanks; ++i) hn::Store(most[i], pairs, to + i * kTwo);
    }
  }
  for (int i = 0; i < kMostRanks; ++i) {
    const auto even = hn::BitCast(dk, hn::Load(pairs, best[0] + i * kTwo));
    const auto odd = hn::BitCast(dk, hn::Load(pairs, best[1] + i * kTwo));
    hn::Store(hn::OddEven(odd, hn::DupOdd(even)), dk, keys + i * kWidth<float>);
    hn::Store(hn::Not(hn::OddEven(hn::DupEven(odd), even)), dk, rows + i * kWidth<float>);
  }
}
#endif

template <bool kResume, class T>
HWY_INLINE void choose_next(const T* values, std::int64_t n, std::int64_t count, Key<T>* keys, Key<T>* rows) {
  if (count <= 2) return choose_some<2, kResume>(values, n, keys, rows);
  if (count <= 4) return choose_some<4, kResume>(values, n, keys, rows);
#if HWY_TARGET != HWY_SCALAR
  if constexpr (sizeof(T) == 4) return choose_eight<kResume>(values, n, keys, rows);
#endif
  return choose_some<kMostRanks, kResume>(values, n, keys, rows);
}

/// The `count` best of n rows of values, count <= n. keys, rows: count rows, and room for kMostRanks more.
template <class T>
HWY_INLINE void choose(const T* values, std::int64_t n, std::int64_t count, Key<T>* keys, Key<T>* rows) {
  choose_next<false>(values, n, count, keys, rows);
  for (std::int64_t j = kMostRanks; j < count; j += kMostRanks)
    choose_next<true>(values, n, count - j, keys + j * kWidth<T>, rows + j * kWidth<T>);
}

/// round_to() on vectors.
template <class T>
HWY_INLINE hn::Vec<Tag<T>> rounded(hn::Vec<Tag<T>> v, Float dtype) {
  const Tag<T> d;
  if (dtype == Float::kF64) return v;  // nothing beyond T, and the usual case
  if constexpr (sizeof(T) == 4) {
    return dtype == Float::kBF16 ? round_bf16(d, v) : dtype == Float::kF16 ? round_f16(d, v) : v;
  } else {
    HWY_ALIGN T lane[kWidth<T>];
    hn::Store(v, d, lane);
    for (T& x : lane) x = round_to(x, dtype);
    return hn::Load(d, lane);
  }
}

/// v[i] = f(v[i]) for n rows.
template <class T, class F>
HWY_INLINE void for_rows(T* v, std::int64_t n, F&& f) {
  const Tag<T> d;
  for (std::int64_t i = 0; i < n; ++i) hn::Store(f(hn::Load(d, v + i * kWidth<T>)), d, v + i * kWidth<T>);
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
HWY_INLINE hn::Vec<Tag<float>> exp_shifted_lanes(Tag<float> d, hn::Vec<Tag<float>> x) {
  using namespace exp_float;
  const hn::RebindToUnsigned<Tag<float>> du;
  const auto c = [d](float v) { return hn::Set(d, v); };
  const auto low = hn::IfThenElse(hn::Lt(x, c(kLowest)), c(kLowest), x);
  const auto k = hn::Sub(fused_lanes(d, low, c(kLog2e), c(kMagic)), c(kMagic));
  const auto r = fused_lanes(d, k, c(-kLn2Low), fused_lanes(d, k, c(-kLn2High), low));
  auto p = c(1.0f / 5040);
  for (const float next : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = fused_lanes(d, p, r, c(next));
  }
  const auto first = hn::IfThenElse(hn::Lt(k, c(-100.0f)), c(-100.0f), k);
  const auto two_to = [&](hn::Vec<Tag<float>> n) {
    return hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, hn::Add(n, c(kMagic + 127.0f)))));
  };
  return hn::Mul(hn::Mul(p, two_to(first)), two_to(hn::Sub(k, first)));
}
HWY_INLINE hn::Vec<Tag<double>> exp_shifted_lanes(Tag<double> d, hn::Vec<Tag<double>> x) { return exp_lanes(d, x); }

/// sigmoid_of() on vectors.
HWY_INLINE hn::Vec<Tag<float>> sigmoid_lanes(Tag<float> d, hn::Vec<Tag<float>> x) {
  const auto one = hn::Set(d, 1.0f);
  const auto negative = hn::Lt(x, hn::Zero(d));
  const auto e = exp_shifted_lanes(d, hn::IfThenElse(negative, x, hn::Neg(x)));
  return hn::Div(hn::IfThenElse(negative, e, one), hn::Add(one, e));
}
HWY_INLINE hn::Vec<Tag<double>> sigmoid_lanes(Tag<double> d, hn::Vec<Tag<double>> x) {
  const auto one = hn::Set(d, 1.0);
  return hn::Div(one, hn::Add(one, exp_lanes(d, hn::Neg(x))));
}

/// v = softmax(v) over n rows; each result of the arithmetic is a T. A NaN makes all of a token's NaN, and so does an
/// infinite largest.
template <class T>
HWY_INLINE void softmax(T* v, std::int64_t n, Float dtype) {
  const Tag<T> d;
  auto largest = hn::Load(d, v), unordered = largest;  // which of two zeros is largest shows nowhere
  for (std::int64_t e = 1; e < n; ++e) {
    const auto x = hn::Load(d, v + e * kWidth<T>);
    unordered = hn::IfThenElse(hn::Eq(x, x), unordered, x);
    largest = hn::Max(x, largest);
  }
  const auto good = hn::And(hn::Eq(unordered, unordered), hn::Eq(hn::Sub(largest, largest), hn::Zero(d)));
  // The sum in kLanes lanes (elementary.h), here rows. Lanes beyond n would add 0 to what is no less.
  HWY_ALIGN T lane[kLanes * kWidth<T>];
  for (std::int64_t e = 0; e < n; ++e) {
    const auto x = exp_shifted_lanes(d, hn::Sub(hn::Load(d, v + e * kWidth<T>), largest));
    hn::Store(x, d, v + e * kWidth<T>);
    T* to = lane + e % kLanes * kWidth<T>;
    hn::Store(e < kLanes ? x : hn::Add(hn::Load(d, to), x), d, to);
  }
  std::int64_t live = std::min<std::int64_t>(n, kLanes);
  for (std::int64_t step = kLanes / 2; step > 0; live = std::min(live, step), step /= 2) {
    for (std::int64_t i = 0; i + step < live; ++i) {
      T* to = lane + i * kWidth<T>;
      hn::Store(hn::Add(hn::Load(d, to), hn::Load(d, to + step * kWidth<T>)), d, to);
    }
  }
  const auto sum = hn::Load(d, lane), nan = hn::Set(d, std::numeric_limits<T>::quiet_NaN());
  for_rows(v, n, [&](auto x) { return hn::IfThenElse(good, rounded<T>(hn::Div(x, sum), dtype), nan); });
}

/// v: n rows of logits in, scores out.
template <class T>
HWY_INLINE void score(const RouteArgs<T>& a, std::int64_t n, T* v) {
  if (a.score == Score::kSoftmax) return softmax(v, n, a.tensor_dtype);
  if (a.score == Score::kSqrtSoftplus) {
    for (std::int64_t i = 0; i < n * kWidth<T>; ++i) v[i] = static_cast<T>(sqrt_softplus_in(v[i], a.tensor_dtype));
  }
  for_rows(v, n, [&](auto x) {
    return rounded<T>(a.score == Score::kSigmoid ? sigmoid_lanes(Tag<T>(), x) : x, a.tensor_dtype);
  });
  if (a.sigmoid_offset != T(0)) {
    const auto offset = hn::Set(Tag<T>(), a.sigmoid_offset);
    for_rows(v, n, [&](auto x) { return rounded<T>(hn::Add(x, offset), a.tensor_dtype); });
  }
}

/// The PNorm of n rows, a lane after the other.
template <class T>
HWY_INLINE hn::Vec<Tag<T>> norm_lanes(T p, const T* v, std::int64_t n) {
  HWY_ALIGN T norms[kWidth<T>];
  for (std::int64_t lane = 0; lane < kWidth<T>; ++lane) {
    PNorm<T> norm{p};
    for (std::int64_t j = 0; j < n; ++j) norm.add(v[j * kWidth<T> + lane]);
    norms[lane] = norm.root();
  }
  return hn::Load(Tag<T>(), norms);
}

template <class T>
HWY_INLINE void mask_groups(const RouteArgs<T>& a, T* choice, T* group_value, Key<T>* keys, Key<T>* rows) {
  const Tag<T> d;
  const KeyTag<T> dk;
  const std::int64_t size = a.experts / a.groups, best = group_members(a);
  for (std::int64_t g = 0; g < a.groups; ++g) {
    choose(choice + g * size * kWidth<T>, size, best, keys, rows);
    auto sum = value_of<T>(hn::Load(dk, keys));
    for (std::int64_t j = 1; j < best; ++j) sum = hn::Add(sum, value_of<T>(hn::Load(dk, keys + j * kWidth<T>)));
    hn::Store(best > 1 ? rounded<T>(sum, a.tensor_dtype) : sum, d, group_value + g * kWidth<T>);
  }
  choose(group_value, a.groups, a.top_groups, keys, rows);
  const auto fill = hn::Set(d, a.group_mask_is_zero ? T(0) : -std::numeric_limits<T>::infinity());
  for (std::int64_t g = 0; g < a.groups; ++g) {
    const auto group = hn::Set(dk, static_cast<Key<T>>(g));
    auto kept = hn::Eq(group, hn::Load(dk, rows));
    for (std::int64_t j = 1; j < a.top_groups; ++j)
      kept = hn::Or(kept, hn::Eq(group, hn::Load(dk, rows + j * kWidth<T>)));
    const auto keep = hn::RebindMask(d, kept);
    for_rows(choice + g * size * kWidth<T>, size, [&](auto x) { return hn::IfThenElse(keep, x, fill); });
  }
}

/// weights [top_k] from those of `from` (scores, or logits) that were chosen; behind them, logits in and weights out,
/// [always].
template <class T>
HWY_INLINE void weigh(const RouteArgs<T>& a, const T* from, const Key<T>* rows, T* weights) {
  const Tag<T> d;
  const KeyTag<T> dk;
  constexpr int kLog = std::bit_width(static_cast<std::uint64_t>(kWidth<T>)) - 1;
  const auto lane = hn::Iota(dk, 0);
  const std::int64_t all = a.top_k + a.always;
  for (std::int64_t j = 0; j < a.top_k; ++j) {
    const auto at = hn::Add(hn::ShiftLeft<kLog>(hn::Load(dk, rows + j * kWidth<T>)), lane);
    hn::Store(hn::GatherIndex(d, from, at), d, weights + j * kWidth<T>);
  }
  if (a.score_after_top_k) score(a, a.top_k, weights);
  if (a.always > 0) score(a, a.always, weights + a.top_k * kWidth<T>);
  if (a.renormalise) {
    auto sum = hn::Zero(d);
    if (a.renormalise_norm == T(1)) {
      for (std::int64_t j = 0; j < all; ++j) sum = hn::Add(sum, hn::Load(d, weights + j * kWidth<T>));
    } else {
      sum = norm_lanes(a.renormalise_norm, weights, all);
    }
    sum = rounded<T>(hn::Add(rounded<T>(sum, a.tensor_dtype), hn::Set(d, a.renormalise_eps)), a.tensor_dtype);
    if (a.renormalise_floor > T(0)) {
      const auto floor = hn::Set(d, a.renormalise_floor);
      sum = hn::IfThenElse(hn::Lt(sum, floor), floor, sum);
    }
    for_rows(weights, all, [&](auto x) { return rounded<T>(hn::Div(x, sum), a.tensor_dtype); });
  }
  if (a.scaling != T(1)) {
    const auto scaling = hn::Set(d, a.scaling);
    for_rows(weights, all, [&](auto x) { return rounded<T>(hn::Mul(x, scaling), a.tensor_dtype); });
  }
  for (std::int64_t i = 0; a.expert_scale != nullptr && i < a.top_k * kWidth<T>; ++i)
    weights[i] = static_cast<T>(round_to(weights[i] * a.expert_scale[rows[i]], a.tensor_dtype));
  if (a.weights_dtype != Float::kF64) for_rows(weights, all, [&](auto x) { return rounded<T>(x, a.weights_dtype); });
}

template <class T>
void route_all(const RouteArgs<T>& a, const RouteResult<T>& r) {
  const Tag<T> d;
  constexpr std::int64_t kW = kWidth<T>;
  const std::int64_t count = std::min(a.top_k + (r.runner_up != nullptr ? 1 : 0), a.experts);
  const bool grouped = a.group_score != GroupScore::kNone, changed = a.correction_bias != nullptr || grouped;
  const std::int64_t ranks = std::max(count, grouped ? std::max(group_members(a), a.top_groups) : 0) + kMostRanks;
  const auto values = hwy::AllocateAligned<T>((a.experts * (changed ? 2 : 1) + a.top_k + a.always + a.groups) * kW);
  const auto places = hwy::AllocateAligned<Key<T>>(2 * ranks * kW);
  T *const base = values.get(), *const choice = changed ? base + a.experts * kW : base;
  T *const weights = choice + a.experts * kW, *const of_always = weights + a.top_k * kW,
           *const group_value = of_always + a.always * kW;
  Key<T>*const keys = places.get(), *const rows = keys + ranks * kW;
  for (std::int64_t first = 0; first < a.tokens; first += kW) {
    const std::int64_t tokens = std::min(kW, a.tokens - first);
    if (tokens < kW) std::fill(base, base + a.experts * kW, T(0));
    transpose(a.logits + first * a.experts, a.experts, tokens, a.experts, base, kW);
    for (std::int64_t i = 0; a.logit_softcap > T(0) && i < a.experts * kW; ++i)
      base[i] = softcapped(base[i], a.logit_softcap, a.tensor_dtype);
    if (!a.score_after_top_k) score(a, a.experts, base);
    if (changed) std::copy(base, base + a.experts * kW, choice);
    for (std::int64_t e = 0; e < a.experts && a.correction_bias != nullptr; ++e) {
      const auto bias = hn::Set(d, a.correction_bias[e]);
      for_rows(choice + e * kW, 1, [&](auto x) { return a.bias_multiplies ? hn::Mul(x, bias) : hn::Add(x, bias); });
    }
    if (grouped) mask_groups(a, choice, group_value, keys, rows);
    if (a.given == nullptr) {
      choose(choice, a.experts, count, keys, rows);
    } else {
      std::fill(rows, rows + a.top_k * kW, Key<T>(0));
      transpose(a.given + first * a.top_k, a.top_k, tokens, a.top_k, rows, kW);
    }
    transpose(rows, kW, a.top_k, tokens, r.chosen + first * a.top_k, a.top_k);
    for (std::int64_t t = 0; t < tokens && r.runner_up != nullptr; ++t) {
      const bool is_there = count > a.top_k && a.given == nullptr;
      r.runner_up[first + t] = is_there ? static_cast<std::int32_t>(rows[a.top_k * kW + t]) : -1;
    }
    if (r.choice != nullptr) transpose(choice, kW, a.experts, tokens, r.choice + first * a.experts, a.experts);
    if (r.weights == nullptr) continue;
    if (a.always > 0) {
      if (tokens < kW) std::fill(of_always, of_always + a.always * kW, T(0));
      transpose(a.always_logits + first * a.always, a.always, tokens, a.always, of_always, kW);
      for (std::int64_t i = 0; i < a.always * kW; ++i)
        of_always[i] = softcapped(of_always[i], a.logit_softcap, a.tensor_dtype);
    }
    weigh(a, base, rows, weights);
    transpose(weights, kW, a.top_k, tokens, r.weights + first * a.top_k, a.top_k);
    if (r.always_weights != nullptr)
      transpose(of_always, kW, a.always, tokens, r.always_weights + first * a.always, a.always);
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
    case Status::kBadShape: return "a size is negative, zero or too large";
    case Status::kBadTopK: return "top_k is not within 1..experts";
    case Status::kBadGroups:
      return "groups do not divide the experts, top_groups is not within 1..groups, or a group is too small";
    case Status::kBadOption: return "an option is out of its range, or options exclude each other";
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
  if (a.tokens < 0 || a.experts < 1 || a.experts > std::numeric_limits<std::int32_t>::max() / 64)
    return Status::kBadShape;
  if (a.always < 0 || a.always > a.experts) return Status::kBadShape;
  if (a.tokens > 0 && (a.logits == nullptr || r.chosen == nullptr || (a.always > 0 && a.always_logits == nullptr)))
    return Status::kNullPointer;
  if (a.top_k < 1 || a.top_k > a.experts) return Status::kBadTopK;
  if ((a.always > 0 && a.score == Score::kSoftmax) || (r.always_weights != nullptr && r.weights == nullptr) ||
      !scores_fit(a))
    return Status::kBadOption;
  if (a.group_score == GroupScore::kNone) return Status::kOk;
  if (a.groups < 1 || a.experts % a.groups != 0 || a.top_groups < 1 || a.top_groups > a.groups)
    return Status::kBadGroups;
  if (group_members(a) > a.experts / a.groups) return Status::kBadGroups;
  return Status::kOk;
}

template <class T>
Status check_all(const RouteArgs<T>& a, const RouteResult<T>& r) {
  const Status status = check(a, r);
  return status == Status::kOk && !given_fits(a) ? Status::kBadShape : status;
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
  const Status status = check_all(args, result);
  if (status == Status::kOk) HWY_DYNAMIC_DISPATCH(route_f32)(args, result);
  return status;
}
Status route(const RouteArgs<double>& args, const RouteResult<double>& result) {
  const Status status = check_all(args, result);
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

// LoRA: one translation unit, compiled once per instruction set by Highway and chosen at run time. Lanes hold different
// columns, or the kLanes sums that lora.h names, so vector width does not show.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/host/lora.cc"
// Vectors of unknown length cannot sit in arrays; such CPUs also run NEON or the portable code.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#include "kernels/host/lora.h"

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <vector>

HWY_BEFORE_NAMESPACE();
namespace moeaudit::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<double, 8>;
using DF = hn::Rebind<float, D>;
constexpr std::int64_t kN = HWY_MAX_BYTES / 8 < 8 ? (HWY_TARGET == HWY_SCALAR ? 1 : HWY_MAX_BYTES / 8) : 8;

/// sum[c] += factor * v[c]; separate, so that inexact products round alike everywhere.
HWY_INLINE void add_times(double factor, const float* HWY_RESTRICT v, std::int64_t n, double* HWY_RESTRICT sum) {
  const D d;
  const auto f = hn::Set(d, factor);
  std::int64_t c = 0;
  for (; c + kN <= n; c += kN)
    hn::StoreU(hn::Add(hn::LoadU(d, sum + c), hn::Mul(f, hn::PromoteTo(d, hn::LoadU(DF(), v + c)))), d, sum + c);
  for (; c < n; ++c) sum[c] += factor * static_cast<double>(v[c]);
}

/// sum_c x[c] y[c] by the lanes of lora.h.
HWY_INLINE double dot(const float* HWY_RESTRICT x, const float* HWY_RESTRICT y, std::int64_t n) {
  const D d;
  hn::Vec<D> sum[kLanes / kN];
  for (auto& s : sum) s = hn::Zero(d);
  std::int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    for (int v = 0; v < kLanes / kN; ++v) {
      const std::int64_t at = c + v * kN;
      sum[v] = hn::Add(sum[v],
                       hn::Mul(hn::PromoteTo(d, hn::LoadU(DF(), x + at)), hn::PromoteTo(d, hn::LoadU(DF(), y + at))));
    }
  }
  HWY_ALIGN double lane[kLanes];
  for (int v = 0; v < kLanes / kN; ++v) hn::Store(sum[v], d, lane + v * kN);
  for (; c < n; ++c) lane[c % kLanes] += static_cast<double>(x[c]) * static_cast<double>(y[c]);
  double all = 0;
  for (const double l : lane) all += l;
  return all;
}

void product_row(const LoraUpdate& u, std::int64_t row, double* out) {
  std::fill(out, out + u.columns, 0.0);
  for (std::int64_t i = 0; i < u.rank; ++i)
    add_times(static_cast<double>(u.left[row * u.rank + i]), u.right + i * u.columns, u.columns, out);
}

void gradient(const LoraGradientArgs& g, const LoraGradient& r) {
  const auto rank = static_cast<std::size_t>(g.rank);
  std::vector<double> h(rank), back(rank);  // A x and B^T grad_y of one token
  std::fill(r.a, r.a + g.rank * g.in, 0.0);
  std::fill(r.b, r.b + g.out * g.rank, 0.0);
  for (std::int64_t t = 0; t < g.tokens; ++t) {
    const float *x = g.x + t * g.in, *dy = g.grad_y + t * g.out;
    std::fill(back.begin(), back.end(), 0.0);
    for (std::int64_t o = 0; o < g.out; ++o)
      add_times(static_cast<double>(dy[o]), g.b + o * g.rank, g.rank, back.data());
    double* const dx = r.x == nullptr ? nullptr : r.x + t * g.in;
    if (dx != nullptr) std::fill(dx, dx + g.in, 0.0);
    for (std::int64_t i = 0; i < g.rank; ++i) {
      const auto at = static_cast<std::size_t>(i);
      h[at] = dot(x, g.a + i * g.in, g.in);
      add_times(back[at], x, g.in, r.a + i * g.in);
      if (dx != nullptr) add_times(back[at], g.a + i * g.in, g.in, dx);
    }
    for (std::int64_t o = 0; o < g.out; ++o) {
      for (std::int64_t i = 0; i < g.rank; ++i)
        r.b[o * g.rank + i] += static_cast<double>(dy[o]) * h[static_cast<std::size_t>(i)];
    }
    for (std::int64_t c = 0; dx != nullptr && c < g.in; ++c) dx[c] *= g.scale;
  }
  for (std::int64_t i = 0; i < g.rank * g.in; ++i) r.a[i] *= g.scale;
  for (std::int64_t i = 0; i < g.out * g.rank; ++i) r.b[i] *= g.scale;
}

}  // namespace moeaudit::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moeaudit::kernels {

HWY_EXPORT(product_row);
HWY_EXPORT(gradient);

Status lora_size(std::int64_t in, std::int64_t out, std::int64_t copies, std::int64_t rank, LoraSize* size) {
  if (size == nullptr) return Status::kNullPointer;
  if (in < 1 || out < 1 || copies < 1 || rank < 1) return Status::kBadShape;
  LoraSize s;
  std::int64_t both = 0, one = 0;
  if (__builtin_add_overflow(in, out, &both) || __builtin_mul_overflow(in, out, &one) ||
      __builtin_mul_overflow(one, copies, &s.full) || __builtin_mul_overflow(both, rank, &s.adapter) ||
      __builtin_mul_overflow(s.adapter, copies, &s.adapter))
    return Status::kBadShape;
  s.break_even_rank = static_cast<double>(one) / static_cast<double>(both);
  s.first_rank = one / both + (one % both != 0);
  *size = s;
  return Status::kOk;
}

double lora_scale(double alpha, std::int64_t rank, bool rank_stabilised) {
  const double r = static_cast<double>(rank);
  return alpha / (rank_stabilised ? std::sqrt(r) : r);
}

Status lora_factors(const LoraStack& s, std::int64_t copy, float* left, float* right) {
  if (s.in < 1 || s.out < 1 || s.rank < 1 || copy < 0 || copy >= s.copies) return Status::kBadShape;
  if (s.a == nullptr || s.b == nullptr || left == nullptr || right == nullptr) return Status::kNullPointer;
  const std::int64_t rows = s.rows(), columns = s.columns();
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < s.rank; ++i) left[row * s.rank + i] = s.left(copy, row, i);
  }
  for (std::int64_t i = 0; i < s.rank; ++i) {
    for (std::int64_t c = 0; c < columns; ++c) right[i * columns + c] = s.right(copy, i, c);
  }
  return Status::kOk;
}

Status lora_product(const LoraUpdate& u, double* out) {
  if (const Status status = check_update(u); status != Status::kOk) return status;
  if (out == nullptr) return Status::kNullPointer;
  for (std::int64_t row = 0; row < u.rows; ++row) HWY_DYNAMIC_DISPATCH(product_row)(u, row, out + row * u.columns);
  return Status::kOk;
}

MergeDtypes peft_dtypes(Float adapter, Float stored, PeftLayer layer, bool on_cpu, PeftCall call) {
  const bool widened = layer != PeftLayer::kStack && on_cpu && (adapter == Float::kBF16 || adapter == Float::kF16);
  const bool cast = layer != PeftLayer::kLinear || call != PeftCall::kMerge;
  const bool to_stored = cast && format_of(stored).bits < format_of(adapter).bits;
  const Float scaled = adapter == Float::kF64 ? Float::kF64 : Float::kF32;
  const bool wide = stored == Float::kF64 || (!cast && adapter == Float::kF64);
  return {.scale = scaled,
          .product = widened ? Float::kF32 : adapter,
          .scaled = scaled,
          .delta = to_stored ? stored : adapter,
          .sum = wide ? Float::kF64 : Float::kF32,
          .stored = stored};
}

Status lora_merge(const LoraMergeArgs& a, bool unmerge, double* out) {
  if (const Status status = check_update(a.update); status != Status::kOk) return status;
  if (a.w == nullptr || out == nullptr) return Status::kNullPointer;
  const std::int64_t columns = a.update.columns;
  std::vector<double> product(static_cast<std::size_t>(columns));
  for (std::int64_t row = 0; row < a.update.rows; ++row) {
    HWY_DYNAMIC_DISPATCH(product_row)(a.update, row, product.data());
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t at = row * columns + c;
      out[at] = merged_value(a.w[at], product[static_cast<std::size_t>(c)], a.scale, a.dtypes, unmerge);
    }
  }
  return Status::kOk;
}

Status lora_merge_loss(const LoraMergeArgs& a, const MergeDtypes& unmerge, MergeLoss* loss) {
  if (const Status status = check_update(a.update); status != Status::kOk) return status;
  if (a.w == nullptr || loss == nullptr) return Status::kNullPointer;
  *loss = {};
  const std::int64_t columns = a.update.columns;
  std::vector<double> product(static_cast<std::size_t>(columns));
  for (std::int64_t row = 0; row < a.update.rows; ++row) {
    HWY_DYNAMIC_DISPATCH(product_row)(a.update, row, product.data());
    MergeLoss lane[kLanes] = {}, of_row;
    for (std::int64_t c = 0; c < columns; ++c) {
      add_merge_loss(a.w[row * columns + c], product[static_cast<std::size_t>(c)], a.scale, a.dtypes, unmerge,
                     &lane[c % kLanes]);
    }
    for (const MergeLoss& l : lane) append(l, &of_row);
    append(of_row, loss);
  }
  return Status::kOk;
}

Status lora_gradient(const LoraGradientArgs& args, const LoraGradient& result) {
  const Status status = check_gradient(args, result);
  if (status == Status::kOk) HWY_DYNAMIC_DISPATCH(gradient)(args, result);
  return status;
}

}  // namespace moeaudit::kernels
#endif  // HWY_ONCE

// Permute and combine: the rows of an MoE layer from token order to expert order and back. Host kernels.
//
// Symbols: T tokens, k choices a token, E experts, C capacity, d hidden, R rows. A slot is one choice: slot t k + j is
// choice j of token t.
#pragma once

#include <cstdint>

#include "kernels/host/bfloat16.h"
#include "kernels/host/router.h"
#include "kernels/host/z_loss.h"  // kLanes

namespace moeaudit::kernels {

// ---- which row a choice goes to
// --------------------------------------------------------------------------------------------

struct PermuteArgs {
  const std::int32_t* chosen = nullptr;  // [tokens, top_k]; negative: no choice, or dropped
  /// [tokens, top_k], the places that drop() gave out: expert e owns the rows e C to (e + 1) C, place p is row e C + p,
  /// rows without a choice stay empty (GShard's [E, C, d], Megatron-LM's moe_pad_expert_input_to_capacity). Null:
  /// the rows of an expert are its choices and no more, in the order of their slots, after those of the expert before
  /// (MegaBlocks, torch's grouped_mm, transformers since 5.0).
  const std::int32_t* place = nullptr;
  std::int64_t tokens = 0, experts = 0, top_k = 0;
  std::int64_t capacity = 0;  // with place
};
/// R: T k, of which the last stay empty if choices were dropped; E C with places.
MOE_AUDIT_HOST_DEVICE inline std::int64_t permuted_rows(const PermuteArgs& a) {
  return a.place != nullptr ? a.experts * a.capacity : a.tokens * a.top_k;
}

struct Permutation {
  std::int64_t* offsets = nullptr;      // [experts + 1]: expert e has the rows offsets[e] to offsets[e + 1]
  std::int32_t* slot_of_row = nullptr;  // [R]; -1: an empty row
  std::int32_t* row_of_slot = nullptr;  // [tokens, top_k]; -1: goes nowhere
};

/// Stable: tokens keep their order within an expert. kBadShape also for an id beyond the experts, a place beyond the
/// capacity or given out twice, and more than 2^31 - 1 slots or rows; kNullPointer.
Status permute(const PermuteArgs& args, const Permutation& result);

inline Status check_permute(const PermuteArgs& a, const Permutation& r) {
  if (a.tokens < 0 || a.experts < 1 || a.capacity < 0) return Status::kBadShape;
  if (a.top_k < 1) return Status::kBadTopK;
  constexpr std::int64_t kMost = 2147483647;
  if (a.tokens > kMost / a.top_k || (a.place != nullptr && a.capacity > kMost / a.experts)) return Status::kBadShape;
  const bool rows = permuted_rows(a) > 0;
  if (r.offsets == nullptr || (a.tokens > 0 && (a.chosen == nullptr || r.row_of_slot == nullptr)) ||
      (rows && r.slot_of_row == nullptr))
    return Status::kNullPointer;
  return Status::kOk;
}

// ---- rows there and back
// ---------------------------------------------------------------------------------------------------

struct RowShape {
  std::int64_t tokens = 0, top_k = 0, rows = 0, hidden = 0;
};

/// What follows calculates in Wide<T> (float32 for bfloat16), each product and each sum rounded, and rounds to T once
/// where it stores; sums over the choices of a token run in the order of rank, from 0, and leave out choices that go
/// nowhere. kBadShape for negative sizes, kNullPointer.

/// rows[r] = x[token of r], 0 for an empty row.
Status gather(const Permutation& p, const RowShape& s, const float* x, float* rows);
Status gather(const Permutation& p, const RowShape& s, const double* x, double* rows);
Status gather(const Permutation& p, const RowShape& s, const BFloat16* x, BFloat16* rows);

/// y[t] = sum_j weights[t, j] rows[row of (t, j)]; weights null: all 1, which is the gradient of gather().
Status combine(const Permutation& p, const RowShape& s, const float* rows, const float* weights, float* y);
Status combine(const Permutation& p, const RowShape& s, const double* rows, const double* weights, double* y);
Status combine(const Permutation& p, const RowShape& s, const BFloat16* rows, const float* weights, BFloat16* y);

/// d_rows[r] = weights[slot of r] d_y[token of r], 0 for an empty row; d_weights[t, j] = sum_i d_y[t, i] rows[row, i],
/// 0 for a choice that goes nowhere: value i belongs to lane i mod kLanes, a lane adds its products in their order from
/// 0, and the lanes are added in theirs, from 0. Either result may be null.
Status combine_backward(const Permutation& p, const RowShape& s, const float* rows, const float* weights,
                        const float* d_y, float* d_rows, float* d_weights);
Status combine_backward(const Permutation& p, const RowShape& s, const double* rows, const double* weights,
                        const double* d_y, double* d_rows, double* d_weights);
Status combine_backward(const Permutation& p, const RowShape& s, const BFloat16* rows, const float* weights,
                        const BFloat16* d_y, BFloat16* d_rows, float* d_weights);

inline Status check_rows(const Permutation& p, const RowShape& s) {
  if (s.tokens < 0 || s.top_k < 1 || s.rows < 0 || s.hidden < 0) return Status::kBadShape;
  if ((s.tokens > 0 && p.row_of_slot == nullptr) || (s.rows > 0 && p.slot_of_row == nullptr))
    return Status::kNullPointer;
  return Status::kOk;
}

/// The sum over a token's choices with one more, weight null: 1.
template <class T>
MOE_AUDIT_HOST_DEVICE inline Wide<T> add_choice(Wide<T> sum, const Wide<T>* weight, T value) {
  return sum + (weight == nullptr ? widen(value) : *weight * widen(value));
}

/// The products of one lane, in their order.
template <class T>
MOE_AUDIT_HOST_DEVICE inline Wide<T> dot_of_lane(const T* a, const T* b, std::int64_t count, int lane) {
  Wide<T> sum = 0;
  for (std::int64_t i = lane; i < count; i += kLanes) sum += widen(a[i]) * widen(b[i]);
  return sum;
}
/// All lanes, one after the other.
template <class T>
inline Wide<T> dot_by_lanes(const T* a, const T* b, std::int64_t count) {
  Wide<T> sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += dot_of_lane(a, b, count, lane);
  return sum;
}

}  // namespace moeaudit::kernels

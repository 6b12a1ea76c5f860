// LoRA: y = W x + s B A x (arXiv 2106.09685). Sizes, scale, the update as PEFT stores it for single matrices and for
// stacks of experts, merging it into W and taking it out again, what a dtype loses of it, gradients. Host kernels.
//
// Symbols: W [out, in] the frozen matrix, A [rank, in], B [out, rank], s the scale, E the experts of a stack. The
// update of the stored matrix [rows, columns] is left right, left [rows, rank] and right [rank, columns]: left = B,
// right = A where it is stored [out, in]; left = A^T, right = B^T where it is stored [in, out].
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/host/low_precision.h"
#include "kernels/host/router.h"
#include "kernels/host/z_loss.h"

namespace moeaudit::kernels {

// ---- sizes and scale
// ---------------------------------------------------------------------------------------------------

struct LoraSize {
  std::int64_t adapter = 0;     // copies rank (in + out): numbers in A and B
  std::int64_t full = 0;        // copies in out: numbers in the matrices themselves
  double break_even_rank = 0;   // in out / (in + out), where the two are the same; below min(in, out) always
  std::int64_t first_rank = 0;  // the smallest rank at which A and B hold at least as many numbers as W
};
/// One target: a linear layer (copies = 1), a router (in = hidden, out = experts), or experts (copies = E), be they
/// modules of their own or a stack under PEFT's target_parameters, whose A [rank E, in] and B [out, rank E] hold as
/// many. kBadShape: a size below 1, or a count beyond 64 bits; kNullPointer.
Status lora_size(std::int64_t in, std::int64_t out, std::int64_t copies, std::int64_t rank, LoraSize* size);

/// alpha / rank (arXiv 2106.09685 section 4.1); rank-stabilised: alpha / sqrt(rank) (arXiv 2312.03732, PEFT's
/// use_rslora).
double lora_scale(double alpha, std::int64_t rank, bool rank_stabilised);

// ---- the update
// --------------------------------------------------------------------------------------------------------

/// Which index of a stack's rows of A [rank E, in], or columns of B [out, rank E], is the slow one.
enum class StackOrder {
  kExpertSlow,  // e rank + i: PEFT's A, lora_A.weight.reshape(E, rank, in)
  kExpertFast,  // i E + e: PEFT's B, lora_B.weight.reshape(out, rank, E)
};
constexpr std::int64_t stack_index(StackOrder order, std::int64_t copies, std::int64_t rank, std::int64_t copy,
                                   std::int64_t i) {
  return order == StackOrder::kExpertSlow ? copy * rank + i : i * copies + copy;
}

/// The factors of one module as PEFT stores them (tuners/lora/layer.py, ParamWrapper.get_delta_weight, the same orders
/// from 0.17.0 to 0.21.2; copies = 1 is its Linear). A stack [E, d1, d2] is [E, in, out] to PEFT before 0.19.0,
/// whatever the model computes; from 0.19.0 on [E, out, in] unless the module says is_transposed (gpt-oss).
/// `transposed` says which: the matrix is stored [in, out].
struct LoraStack {
  const float* a = nullptr;  // [rank copies, in]
  const float* b = nullptr;  // [out, rank copies]
  std::int64_t in = 0, out = 0, rank = 0, copies = 1;
  StackOrder a_order = StackOrder::kExpertSlow, b_order = StackOrder::kExpertFast;
  bool transposed = false;

  std::int64_t rows() const { return transposed ? in : out; }
  std::int64_t columns() const { return transposed ? out : in; }
  float left(std::int64_t copy, std::int64_t row, std::int64_t i) const {
    return transposed ? a_at(copy, i, row) : b_at(copy, row, i);
  }
  float right(std::int64_t copy, std::int64_t i, std::int64_t column) const {
    return transposed ? b_at(copy, column, i) : a_at(copy, i, column);
  }
  float a_at(std::int64_t copy, std::int64_t i, std::int64_t c) const {
    return a[stack_index(a_order, copies, rank, copy, i) * in + c];
  }
  float b_at(std::int64_t copy, std::int64_t o, std::int64_t i) const {
    return b[o * rank * copies + stack_index(b_order, copies, rank, copy, i)];
  }
};
/// left [rows, rank] and right [rank, columns] of expert `copy`. kBadShape, kNullPointer.
Status lora_factors(const LoraStack& stack, std::int64_t copy, float* left, float* right);

struct LoraUpdate {
  const float* left = nullptr;   // [rows, rank]
  const float* right = nullptr;  // [rank, columns]
  std::int64_t rows = 0, columns = 0, rank = 0;
};

/// out [rows, columns] = left right, float64, i of the rank ascending from 0. A product of two floats is exact there.
/// kBadShape, kNullPointer.
Status lora_product(const LoraUpdate& update, double* out);

// ---- merge and un-merge
// ------------------------------------------------------------------------------------------------

/// What each step is rounded to, to nearest even, one after the other; kF64: not beyond float64.
///   p = product(left right)
///   d = delta(scaled(scale(s) p))
///   merged = stored(sum(W + d)), un-merged = stored(sum(W - d))
struct MergeDtypes {
  Float scale = Float::kF64, product = Float::kF64, scaled = Float::kF64, delta = Float::kF64, sum = Float::kF64,
        stored = Float::kF64;
};
enum class PeftLayer { kLinear, kParameter, kStack };  // Linear; ParamWrapper around a matrix; around a stack of them
enum class PeftCall { kMerge, kSafeMerge, kUnmerge };
/// What PEFT 0.18.1 to 0.21.2 rounds (tuners/lora/layer.py, Linear and ParamWrapper: get_delta_weight, merge, unmerge):
/// the product to the adapter's dtype, or on a CPU to float32 if that has 16 bits, stacks excepted; it is scaled in
/// float32 and cast to the adapter's dtype. merge() of a Linear adds that as it is, while unmerge(), safe_merge and
/// ParamWrapper cast it to the dtype of W first: with a float32 adapter on bfloat16 weights, unmerge() of a Linear does
/// not subtract what merge() added. The sum is float32, rounded to the dtype of W. float64 where the tensors are. The
/// products are sums in the library's own order.
MergeDtypes peft_dtypes(Float adapter, Float stored, PeftLayer layer, bool on_cpu, PeftCall call);

struct LoraMergeArgs {
  LoraUpdate update;
  const double* w = nullptr;  // [rows, columns], values of dtype stored
  double scale = 1;
  MergeDtypes dtypes;
};
/// out [rows, columns] = W with the update merged, or taken out. out may be w. kBadShape, kNullPointer.
Status lora_merge(const LoraMergeArgs& args, bool unmerge, double* out);

/// What became of the update D = s left right (float64) in M = merge(W).
struct MergeLoss {
  std::int64_t elements = 0;
  std::int64_t changed = 0;       // M differs from W
  std::int64_t swallowed = 0;     // D is not 0, and M is W all the same
  std::int64_t not_restored = 0;  // un-merging M does not give W back
  double delta_squares = 0;       // sum of D^2
  double moved_squares = 0;       // sum of (M - W)^2; sqrt(moved / delta): norm kept
  double dot = 0;                 // sum of (M - W) D; dot / delta_squares: share of the update that arrived
  double error_squares = 0;       // sum of (M - W - D)^2
};
/// `unmerge` are the dtypes of the way back. Elements where W, M or D is not finite count in `elements` alone. Sums are
/// float64: column c of a row belongs to lane c mod kLanes, which adds in order of c; the lanes of a row are added in
/// theirs, from 0, then the rows in theirs, from 0. kBadShape, kNullPointer.
Status lora_merge_loss(const LoraMergeArgs& args, const MergeDtypes& unmerge, MergeLoss* loss);

// ---- gradients
// ---------------------------------------------------------------------------------------------------------

struct LoraGradientArgs {
  const float* x = nullptr;       // [tokens, in]
  const float* grad_y = nullptr;  // [tokens, out]: d loss / d y
  const float* a = nullptr;       // [rank, in]
  const float* b = nullptr;       // [out, rank]
  std::int64_t tokens = 0, in = 0, out = 0, rank = 0;
  double scale = 1;
};
struct LoraGradient {
  double* a = nullptr;  // [rank, in]: s sum_t (B^T grad_y[t]) x[t]^T
  double* b = nullptr;  // [out, rank]: s sum_t grad_y[t] (A x[t])^T
  double* x = nullptr;  // [tokens, in], or null: s A^T B^T grad_y[t], the adapter's part of d loss / d x
};
/// Float64. A x: column c belongs to lane c mod kLanes, a lane adds in order of c, the lanes are added in theirs. B^T
/// grad_y: in order of out. Over tokens: in their order, from 0; then times s. A^T (B^T grad_y): in order of the rank,
/// from 0, then times s. While B is zero, as it begins, so is the gradient of A. kBadShape, kNullPointer.
Status lora_gradient(const LoraGradientArgs& args, const LoraGradient& result);

// ---- one element: both sides
// -------------------------------------------------------------------------------------------

/// The update as it is added or subtracted, from the exact-order product.
MOE_AUDIT_HOST_DEVICE inline double rounded_delta(double product, double scale, const MergeDtypes& d) {
  return round_to(round_to(round_to(scale, d.scale) * round_to(product, d.product), d.scaled), d.delta);
}
MOE_AUDIT_HOST_DEVICE inline double merged_value(double w, double product, double scale, const MergeDtypes& d,
                                                 bool unmerge) {
  const double delta = rounded_delta(product, scale, d);
  return round_to(round_to(unmerge ? w - delta : w + delta, d.sum), d.stored);
}
/// One element of lora_merge_loss() into the sums of its lane.
MOE_AUDIT_HOST_DEVICE inline void add_merge_loss(double w, double product, double scale, const MergeDtypes& d,
                                                 const MergeDtypes& back, MergeLoss* lane) {
  const double delta = scale * product, m = merged_value(w, product, scale, d, false), moved = m - w;
  ++lane->elements;
  if (!(moved - moved == 0.0 && delta - delta == 0.0)) return;
  lane->changed += moved != 0.0;
  lane->swallowed += moved == 0.0 && delta != 0.0;
  lane->not_restored += merged_value(m, product, scale, back, true) != w;
  const double error = moved - delta;
  lane->delta_squares += delta * delta;
  lane->moved_squares += moved * moved;
  lane->dot += moved * delta;
  lane->error_squares += error * error;
}
MOE_AUDIT_HOST_DEVICE inline void append(const MergeLoss& part, MergeLoss* sum) {
  sum->elements += part.elements;
  sum->changed += part.changed;
  sum->swallowed += part.swallowed;
  sum->not_restored += part.not_restored;
  sum->delta_squares += part.delta_squares;
  sum->moved_squares += part.moved_squares;
  sum->dot += part.dot;
  sum->error_squares += part.error_squares;
}

inline Status check_update(const LoraUpdate& u) {
  if (u.rows < 1 || u.columns < 1 || u.rank < 1) return Status::kBadShape;
  return u.left == nullptr || u.right == nullptr ? Status::kNullPointer : Status::kOk;
}
inline Status check_gradient(const LoraGradientArgs& a, const LoraGradient& r) {
  if (a.tokens < 0 || a.in < 1 || a.out < 1 || a.rank < 1) return Status::kBadShape;
  if (a.a == nullptr || a.b == nullptr || r.a == nullptr || r.b == nullptr) return Status::kNullPointer;
  return a.tokens > 0 && (a.x == nullptr || a.grad_y == nullptr) ? Status::kNullPointer : Status::kOk;
}

}  // namespace moeaudit::kernels

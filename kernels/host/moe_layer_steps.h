// The steps of an MoE layer, forward and backward, over operations that host and CUDA bring: one order for both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "kernels/host/moe_layer.h"

namespace moeaudit::kernels {

template <class T>
std::int64_t rows_of(const MoeLayerArgs<T>& a) {
  return a.place != nullptr ? a.experts * a.capacity : a.tokens * a.top_k;
}

template <class T>
Status check_experts(const ExpertWeights<T>& w, const ExpertState<T>& s, bool some) {
  if (w.width < 1 || w.gate_up.rank < 0 || w.down.rank < 0) return Status::kBadShape;
  if (!some) return Status::kOk;
  if (w.gate_up.weight == nullptr || w.down.weight == nullptr || s.before == nullptr || s.activated == nullptr ||
      s.out == nullptr)
    return Status::kNullPointer;
  const auto lacks = [](const ExpertLinear<T>& l, const T* low) {
    return l.rank > 0 && (l.lora_a == nullptr || l.lora_b == nullptr || low == nullptr);
  };
  return lacks(w.gate_up, s.gate_up_low) || lacks(w.down, s.down_low) ? Status::kNullPointer : Status::kOk;
}

/// The permutation's pointers are permute()'s to check.
template <class T>
Status check_moe_layer(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, const T* y) {
  if (a.tokens < 0 || a.hidden < 1 || a.experts < 1 || a.capacity < 0 || a.shared.width < 0) return Status::kBadShape;
  if (a.top_k < 1) return Status::kBadTopK;
  if (!(a.form.limit > 0) || !std::isfinite(a.form.alpha) || !std::isfinite(a.form.up_offset) ||
      (a.shared_gate != nullptr && a.shared.width == 0))
    return Status::kBadOption;
  const bool some = a.tokens > 0;
  if (some && (a.x == nullptr || a.weights == nullptr || y == nullptr)) return Status::kNullPointer;
  if (rows_of(a) > 0 && s.rows == nullptr) return Status::kNullPointer;
  if (const Status status = check_experts(a.routed, s.routed, rows_of(a) > 0); status != Status::kOk) return status;
  if (a.shared.width == 0) return Status::kOk;
  if (s.shared_offsets == nullptr || (a.shared_gate != nullptr && s.shared_weight == nullptr))
    return Status::kNullPointer;
  return check_experts(a.shared, s.shared, some);
}

template <class T>
Status check_moe_layer_backward(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, const T* d_y) {
  if (const Status status = check_moe_layer(a, s, d_y); status != Status::kOk) return status;
  if (s.permutation.offsets == nullptr) return Status::kNullPointer;
  return check_rows(s.permutation, {a.tokens, a.top_k, rows_of(a), a.hidden});
}

/// Gradients of what is stored between the steps; one set serves the experts and then the shared one.
template <class T>
struct MoeLayerScratch {
  T* d_out = nullptr;          // [rows, hidden]; later the gradient to the rows
  T* d_activated = nullptr;    // [rows, f]
  T* d_before = nullptr;       // [rows, u]
  T* d_low = nullptr;          // [rows, rank]
  Wide<T>* d_logit = nullptr;  // [tokens]
};
/// Cuts `memory` (null: only the size is wanted), each piece aligned to 16 bytes.
template <class T>
MoeLayerScratch<T> cut_scratch(const MoeLayerArgs<T>& a, void* memory, std::size_t* bytes) {
  std::size_t used = 0;
  const auto take = [&](std::int64_t n, std::size_t size) -> void* {
    char* here = memory == nullptr ? nullptr : static_cast<char*>(memory) + used;
    used += (static_cast<std::size_t>(n) * size + 15) / 16 * 16;
    return here;
  };
  const std::int64_t rows = rows_of(a), tokens = a.shared.width > 0 ? a.tokens : 0;
  const auto either = [&](std::int64_t routed, std::int64_t shared) {
    return static_cast<T*>(take(std::max(rows * routed, tokens * shared), sizeof(T)));
  };
  const ExpertWeights<T>&r = a.routed, &s = a.shared;
  MoeLayerScratch<T> c;
  c.d_out = either(a.hidden, a.hidden);
  c.d_activated = either(r.width, s.width);
  c.d_before = either(first_outputs(a.form, r.width), first_outputs(a.form, s.width));
  c.d_low = either(std::max(r.gate_up.rank, r.down.rank), std::max(s.gate_up.rank, s.down.rank));
  c.d_logit = static_cast<Wide<T>*>(take(a.tokens, sizeof(Wide<T>)));
  *bytes = used;
  return c;
}

/// `Ops` has the operations of the headers by their names, elementwise ones on [rows, width], and keeps the first
/// status that is not kOk; after that it does nothing more.
template <class T, class Ops>
class MoeLayerSteps {
 public:
  MoeLayerSteps(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, Ops& ops)
      : a_(a),
        s_(s),
        ops_(ops),
        shape_{a.tokens, a.top_k, rows_of(a), a.hidden},
        routed_{s.permutation.offsets, a.experts, rows_of(a)},
        shared_{s.shared_offsets, 1, a.tokens} {}

  void forward(T* y) {
    PermuteArgs p;
    p.chosen = a_.chosen, p.place = a_.place, p.tokens = a_.tokens, p.experts = a_.experts, p.top_k = a_.top_k;
    p.capacity = a_.capacity;
    ops_.permute(p, s_.permutation);
    if (on_input())
      ops_.combine_backward(s_.permutation, shape_, nullptr, a_.weights, a_.x, s_.rows, nullptr);  // weights x
    else
      ops_.gather(s_.permutation, shape_, a_.x, s_.rows);
    experts(routed_, a_.routed, s_.rows, s_.routed);
    ops_.combine(s_.permutation, shape_, s_.routed.out, on_input() ? nullptr : a_.weights, y);
    if (a_.shared.width == 0) return;
    ops_.one_group(a_.tokens, s_.shared_offsets);
    experts(shared_, a_.shared, a_.x, s_.shared);
    ops_.add_shared(a_, s_, y);
  }

  void backward(const T* d_y, const MoeLayerGradients<T>& g, const MoeLayerScratch<T>& c) {
    if (on_input())
      ops_.gather(s_.permutation, shape_, d_y, c.d_out);
    else
      ops_.combine_backward(s_.permutation, shape_, s_.routed.out, a_.weights, d_y, c.d_out, g.weights);
    const bool to_inputs = g.x != nullptr || (on_input() && g.weights != nullptr);
    experts_backward(routed_, a_.routed, s_.rows, s_.routed, g.gate_up, g.down, c, to_inputs);
    if (on_input() && g.weights != nullptr)
      ops_.combine_backward(s_.permutation, shape_, c.d_out, nullptr, a_.x, nullptr, g.weights);
    if (g.x != nullptr) ops_.combine(s_.permutation, shape_, c.d_out, on_input() ? a_.weights : nullptr, g.x);
    if (a_.shared.width == 0) return;
    ops_.shared_backward(a_, s_, d_y, c.d_out, c.d_logit);
    if (g.shared_gate != nullptr && a_.shared_gate != nullptr) sums(shared_, a_.x, c.d_logit, a_.hidden, g.shared_gate);
    experts_backward(shared_, a_.shared, a_.x, s_.shared, g.shared_gate_up, g.shared_down, c, g.x != nullptr);
    if (g.x != nullptr) ops_.add_shared_gradient(a_, c.d_out, c.d_logit, g.x);
  }

 private:
  bool on_input() const { return a_.weight_on == WeightOn::kInput; }

  struct Groups {
    const std::int64_t* offsets;
    std::int64_t experts, rows;
  };

  GroupedGemmArgs<T> product(GroupedProduct product, const Groups& g, std::int64_t inputs, std::int64_t outputs,
                             const T* left, const T* right) {
    GroupedGemmArgs<T> p;
    p.product = product, p.offsets = g.offsets, p.experts = g.experts, p.rows = g.rows;
    p.inputs = inputs, p.outputs = outputs, p.left = left, p.right = right;
    return p;
  }
  void weight(const Groups& g, std::int64_t inputs, std::int64_t outputs, const T* left, const T* right, double alpha,
              Wide<T>* out) {
    if (out == nullptr) return;
    GroupedGemmArgs<T> p = product(GroupedProduct::kWeight, g, inputs, outputs, left, right);
    p.alpha = alpha, p.weight = out;
    ops_.grouped_gemm(p);
  }
  void sums(const Groups& g, const T* values, const Wide<T>* scale, std::int64_t columns, Wide<T>* out) {
    ColumnSumsArgs<T> c;
    c.values = values, c.scale = scale, c.offsets = g.offsets, c.experts = g.experts, c.rows = g.rows;
    c.columns = columns, c.sums = out;
    ops_.column_sums(c);
  }

  void linear(const Groups& g, const ExpertLinear<T>& l, std::int64_t inputs, std::int64_t outputs, const T* in, T* low,
              T* out) {
    GroupedGemmArgs<T> p = product(GroupedProduct::kForward, g, inputs, outputs, in, l.weight);
    p.bias = l.bias, p.out = out;
    ops_.grouped_gemm(p);
    if (l.rank == 0) return;
    p = product(GroupedProduct::kForward, g, inputs, l.rank, in, l.lora_a);
    p.out = low;
    ops_.grouped_gemm(p);
    p = product(GroupedProduct::kForward, g, l.rank, outputs, low, l.lora_b);
    p.alpha = l.scaling, p.add = true, p.out = out;
    ops_.grouped_gemm(p);
  }
  void experts(const Groups& g, const ExpertWeights<T>& w, const T* in, const ExpertState<T>& s) {
    const std::int64_t first = first_outputs(a_.form, w.width);
    linear(g, w.gate_up, a_.hidden, first, in, s.gate_up_low, s.before);
    ops_.activate(a_.form, g.offsets, g.experts, g.rows, w.width, s.before, s.activated);
    linear(g, w.down, w.width, a_.hidden, s.activated, s.down_low, s.out);
  }

  /// d_in null: not wanted.
  void linear_backward(const Groups& g, const ExpertLinear<T>& l, const ExpertLinearGradients<T>& to,
                       std::int64_t inputs, std::int64_t outputs, const T* in, const T* low, const T* d_out, T* d_low,
                       T* d_in) {
    weight(g, inputs, outputs, d_out, in, 1, to.weight);
    if (to.bias != nullptr) sums(g, d_out, nullptr, outputs, to.bias);
    if (l.rank > 0) {
      weight(g, l.rank, outputs, d_out, low, l.scaling, to.lora_b);
      GroupedGemmArgs<T> p = product(GroupedProduct::kInput, g, l.rank, outputs, d_out, l.lora_b);
      p.alpha = l.scaling, p.out = d_low;
      ops_.grouped_gemm(p);
      weight(g, inputs, l.rank, d_low, in, 1, to.lora_a);
    }
    if (d_in == nullptr) return;
    GroupedGemmArgs<T> p = product(GroupedProduct::kInput, g, inputs, outputs, d_out, l.weight);
    p.out = d_in;
    ops_.grouped_gemm(p);
    if (l.rank == 0) return;
    p = product(GroupedProduct::kInput, g, inputs, l.rank, d_low, l.lora_a);
    p.add = true, p.out = d_in;
    ops_.grouped_gemm(p);
  }
  void experts_backward(const Groups& g, const ExpertWeights<T>& w, const T* in, const ExpertState<T>& s,
                        const ExpertLinearGradients<T>& gate_up, const ExpertLinearGradients<T>& down,
                        const MoeLayerScratch<T>& c, bool to_inputs) {
    const std::int64_t first = first_outputs(a_.form, w.width);
    linear_backward(g, w.down, down, w.width, a_.hidden, s.activated, s.down_low, c.d_out, c.d_low, c.d_activated);
    ops_.activate_backward(a_.form, g.offsets, g.experts, g.rows, w.width, s.before, c.d_activated, c.d_before);
    linear_backward(g, w.gate_up, gate_up, a_.hidden, first, in, s.gate_up_low, c.d_before, c.d_low,
                    to_inputs ? c.d_out : nullptr);
  }

  const MoeLayerArgs<T>& a_;
  const MoeLayerState<T>& s_;
  Ops& ops_;
  RowShape shape_;
  Groups routed_, shared_;
};

}  // namespace moeaudit::kernels

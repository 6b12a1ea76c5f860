// A layer of tests/support/running_layer.h in memory, of the host or of a device, as the kernels take it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/host/gaussian.h"
#include "kernels/host/moe_layer.h"
#include "kernels/host/moe_layer_steps.h"
#include "tests/support/running_layer.h"

namespace moeaudit::test {

/// Host memory, as tests/support/on_device.h has it for a device.
template <class T>
class OnHost {
 public:
  explicit OnHost(std::vector<T> v) : values_(std::move(v)) {}
  T* data() { return values_.data(); }
  std::vector<T> fetch() const { return values_; }

 private:
  std::vector<T> values_;
};

template <class T>
std::vector<T> narrowed(const std::vector<double>& v) {
  std::vector<T> out;
  out.reserve(v.size());
  for (const double d : v) out.push_back(kernels::narrow<T>(d));
  return out;
}
template <class T>
std::vector<double> widened(const std::vector<T>& v) {
  std::vector<double> out;
  out.reserve(v.size());
  for (const T& x : v) out.push_back(static_cast<double>(kernels::widen(x)));
  return out;
}

struct LayerShape {
  std::int64_t tokens, experts, top_k, hidden, width;
  std::int64_t rank = 0, shared_width = 0;
  bool bias = false, shared_gate = false;
  enum How { kSpread, kOneExpert, kNoneAtAll } how = kSpread;
  kernels::ExpertForm form = {};
  double scale = 1;  // of x
  kernels::WeightOn weight_on = kernels::WeightOn::kOutput;
};

/// Gaussian values of T: matrices over the root of their inputs, so that every stage has its own size. Every 9th choice
/// is dropped, but not that of a single token.
template <class T>
LayerValues layer_values(const LayerShape& s) {
  std::uint64_t stream = 0;
  const auto draw = [&stream](std::int64_t n, double scale) {
    std::vector<float> g(static_cast<std::size_t>(n));
    kernels::unit_gaussians(23, ++stream, 0, n, g.data());
    std::vector<double> v;
    for (const float x : g) v.push_back(scale * static_cast<double>(x));
    return widened(narrowed<T>(v));
  };
  LayerValues v;
  v.tokens = s.tokens, v.hidden = s.hidden, v.experts = s.experts, v.top_k = s.top_k, v.width = s.width;
  v.shared_width = s.shared_width, v.form = s.form, v.weight_on = s.weight_on;
  const auto linear = [&](std::int64_t experts, std::int64_t inputs, std::int64_t outputs) {
    const double each = 1 / std::sqrt(static_cast<double>(inputs));
    LinearValues l;
    l.weight = draw(experts * outputs * inputs, each);
    if (s.bias) l.bias = draw(experts * outputs, 0.5);
    l.rank = s.rank;
    l.scaling = s.rank > 0 ? 0.75 : 1;
    l.lora_a = draw(experts * s.rank * inputs, each);
    l.lora_b = draw(experts * outputs * s.rank, 0.5);
    return l;
  };
  v.x = draw(s.tokens * s.hidden, s.scale);
  v.d_y = draw(s.tokens * s.hidden, 1);
  v.weights = draw(s.tokens * s.top_k, 0.5);
  v.gate_up = linear(s.experts, s.hidden, kernels::first_outputs(s.form, s.width));
  v.down = linear(s.experts, s.width, s.hidden);
  if (s.shared_width > 0) {
    v.shared_gate_up = linear(1, s.hidden, kernels::first_outputs(s.form, s.shared_width));
    v.shared_down = linear(1, s.shared_width, s.hidden);
    if (s.shared_gate) v.shared_gate = draw(s.hidden, 1 / std::sqrt(static_cast<double>(s.hidden)));
  }
  for (std::int64_t i = 0; i < s.tokens * s.top_k; ++i) {
    const std::int64_t t = i / s.top_k, j = i % s.top_k;
    const bool dropped = s.how == LayerShape::kNoneAtAll || (s.tokens > 1 && i % 9 == 4);
    const std::int64_t e = s.how == LayerShape::kOneExpert ? s.experts - 1 : (t * t + 3 * t / 2 + j) % s.experts;
    v.chosen.push_back(dropped ? -1 : static_cast<std::int32_t>(e));
  }
  return v;
}

using NamedRows = std::map<std::string, const Row*>;
inline NamedRows named(const LayerErrors& e) {
  NamedRows m = {{"y", &e.y}, {"d x", &e.x}, {"d weights", &e.weights}, {"d shared gate", &e.shared_gate}};
  const auto linear = [&m](const std::string& name, const LinearErrors& l) {
    m["d " + name] = &l.weight, m["d " + name + " bias"] = &l.bias;
    m["d " + name + " lora A"] = &l.lora_a, m["d " + name + " lora B"] = &l.lora_b;
  };
  linear("gate_up", e.gate_up), linear("down", e.down);
  linear("shared gate_up", e.shared_gate_up), linear("shared down", e.shared_down);
  return m;
}

/// Arguments, state and gradients with memory behind them. Array: OnHost or OnDevice.
template <class T, template <class> class Array>
class LayerMemory {
 public:
  using W = kernels::Wide<T>;

  /// place empty: no padding.
  explicit LayerMemory(const LayerValues& v, const std::vector<std::int32_t>& place = {}, std::int64_t capacity = 0) {
    args.tokens = v.tokens, args.hidden = v.hidden, args.experts = v.experts, args.top_k = v.top_k;
    args.form = v.form, args.weight_on = v.weight_on, args.capacity = capacity;
    args.x = in(v.x), args.chosen = keep(v.chosen), args.weights = keep(narrowed<W>(v.weights));
    if (!place.empty()) args.place = keep(place);
    d_y = in(v.d_y);
    y = out<T>("y", v.tokens * v.hidden);
    gradients.x = out<T>("d x", v.tokens * v.hidden);
    gradients.weights = out<W>("d weights", v.tokens * v.top_k);
    const std::int64_t rows = kernels::rows_of(args);
    state.permutation = {out<std::int64_t>(v.experts + 1), out<std::int32_t>(rows),
                         out<std::int32_t>(v.tokens * v.top_k)};
    state.rows = out<T>("rows", rows * v.hidden);
    experts("", v.gate_up, v.down, v.experts, rows, v.width, &args.routed, &state.routed, &gradients.gate_up,
            &gradients.down);
    if (v.shared_width == 0) return;
    experts("shared ", v.shared_gate_up, v.shared_down, 1, v.tokens, v.shared_width, &args.shared, &state.shared,
            &gradients.shared_gate_up, &gradients.shared_down);
    state.shared_offsets = out<std::int64_t>(2);
    if (v.shared_gate.empty()) return;
    args.shared_gate = in(v.shared_gate);
    state.shared_weight = out<W>("shared weight", v.tokens);
    gradients.shared_gate = out<W>("d shared gate", v.hidden);
  }

  kernels::MoeLayerArgs<T> args;
  kernels::MoeLayerState<T> state;
  kernels::MoeLayerGradients<T> gradients;
  const T* d_y = nullptr;
  T* y = nullptr;
  /// Results and what the forward pass left, by name.
  std::map<std::string, std::function<std::vector<double>()>> results;

 private:
  template <class V>
  V* keep(const std::vector<V>& v) {
    auto array = std::make_shared<Array<V>>(v);
    V* data = array->data();
    kept_.push_back(array);
    return data;
  }
  const T* in(const std::vector<double>& v) { return v.empty() ? nullptr : keep(narrowed<T>(v)); }
  template <class V>
  V* out(std::int64_t n) {
    return keep(std::vector<V>(static_cast<std::size_t>(n)));
  }
  template <class V>
  V* out(const std::string& name, std::int64_t n) {
    auto array = std::make_shared<Array<V>>(std::vector<V>(static_cast<std::size_t>(n), kernels::narrow<V>(-7.0)));
    kept_.push_back(array);
    results[name] = [array] { return widened(array->fetch()); };
    return array->data();
  }
  void linear(const std::string& name, const LinearValues& v, std::int64_t experts, std::int64_t inputs,
              std::int64_t outputs, kernels::ExpertLinear<T>* l, kernels::ExpertLinearGradients<T>* g) {
    l->weight = in(v.weight), l->bias = in(v.bias), l->lora_a = in(v.lora_a), l->lora_b = in(v.lora_b);
    l->rank = v.rank, l->scaling = v.scaling;
    g->weight = out<W>("d " + name, experts * outputs * inputs);
    if (!v.bias.empty()) g->bias = out<W>("d " + name + " bias", experts * outputs);
    if (v.rank == 0) return;
    g->lora_a = out<W>("d " + name + " lora A", experts * v.rank * inputs);
    g->lora_b = out<W>("d " + name + " lora B", experts * outputs * v.rank);
  }
  void experts(const std::string& name, const LinearValues& gate_up, const LinearValues& down, std::int64_t experts,
               std::int64_t rows, std::int64_t width, kernels::ExpertWeights<T>* w, kernels::ExpertState<T>* s,
               kernels::ExpertLinearGradients<T>* d_gate_up, kernels::ExpertLinearGradients<T>* d_down) {
    const std::int64_t first = kernels::first_outputs(args.form, width);
    w->width = width;
    linear(name + "gate_up", gate_up, experts, args.hidden, first, &w->gate_up, d_gate_up);
    linear(name + "down", down, experts, width, args.hidden, &w->down, d_down);
    s->before = out<T>(name + "before", rows * first);
    s->activated = out<T>(name + "activated", rows * width);
    s->out = out<T>(name + "out", rows * args.hidden);
    if (gate_up.rank > 0) s->gate_up_low = out<T>(name + "gate_up low", rows * gate_up.rank);
    if (down.rank > 0) s->down_low = out<T>(name + "down low", rows * down.rank);
  }

  std::vector<std::shared_ptr<void>> kept_;
};

}  // namespace moeaudit::test

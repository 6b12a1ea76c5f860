// One MoE layer, forward and backward, written out over numbers that carry a bound of their error: what a kernel may be
// off by, element for element, from kernels/host/bounds.h. The values are plain float64 sums in index order, a
// derivation of its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/moe_layer.h"

namespace moeaudit::test {

/// value: computed here. error: |kernel - exact| at most.
struct Running {
  double value = 0, error = 0;
};
using Row = std::vector<Running>;

/// What a backend calculates in.
struct LayerArithmetic {
  kernels::Float stored = kernels::Float::kF64;  // T
  kernels::Float wide = kernels::Float::kF64;    // Wide<T>
  /// |sum of products - exact| of the grouped GEMM.
  std::function<double(std::int64_t terms, double absolute)> gemm;
  /// Of activations and their products: the kernels' float64, float32 for bfloat16; that of frameworks T.
  kernels::Float elementwise = kernels::Float::kF64;
};
inline LayerArithmetic arithmetic_of(kernels::Float sums, kernels::Float stored, kernels::Float wide) {
  return {stored, wide,
          [sums](std::int64_t terms, double absolute) {
            return kernels::bounds::sum_of_products(terms, static_cast<double>(terms) + 2.0, absolute, sums);
          },
          stored == kernels::Float::kBF16 ? kernels::Float::kF32 : kernels::Float::kF64};
}
inline LayerArithmetic tensor_core_arithmetic() {
  return {kernels::Float::kBF16, kernels::Float::kF32, kernels::bounds::tensor_core_sum, kernels::Float::kF32};
}

/// A layer's inputs as doubles; shapes of kernels/host/moe_layer.h. Empty: not there.
struct LinearValues {
  std::vector<double> weight, bias, lora_a, lora_b;
  std::int64_t rank = 0;
  double scaling = 1;
};
struct LayerValues {
  std::int64_t tokens = 0, hidden = 0, experts = 0, top_k = 0, width = 0, shared_width = 0;
  kernels::ExpertForm form;
  kernels::WeightOn weight_on = kernels::WeightOn::kOutput;
  std::vector<double> x, weights, d_y, shared_gate;
  std::vector<std::int32_t> chosen;
  LinearValues gate_up, down, shared_gate_up, shared_down;
};

struct LinearErrors {
  Row weight, bias, lora_a, lora_b;
};
struct LayerErrors {
  Row y, x, weights, shared_gate;
  LinearErrors gate_up, down, shared_gate_up, shared_down;
};

class RunningLayer {
 public:
  RunningLayer(const LayerValues& v, const LayerArithmetic& a) : v_(v), a_(a) {}

  LayerErrors run() {
    const std::int64_t d = v_.hidden, k = v_.top_k;
    const bool on_input = v_.weight_on == kernels::WeightOn::kInput;
    const auto weight = [this](std::int64_t s, bool there) { return exact(there ? v_.weights[at(s)] : 1); };
    LayerErrors r;
    r.y.resize(v_.x.size()), r.x.resize(v_.x.size()), r.weights.resize(v_.weights.size());
    std::vector<std::vector<std::int64_t>> slots(static_cast<std::size_t>(v_.experts));
    for (std::int64_t i = 0; i < v_.tokens * k; ++i) {
      if (v_.chosen[at(i)] >= 0) slots[at(v_.chosen[at(i)])].push_back(i);
    }
    std::vector<Row> out(v_.weights.size()), d_in(v_.weights.size());
    for (std::int64_t e = 0; e < v_.experts; ++e) {
      std::vector<Row> in, d_out;
      for (const std::int64_t s : slots[at(e)]) {
        in.emplace_back();
        d_out.emplace_back();
        const auto times = [&](bool there, double value) {
          return there ? stored(wide_sum({{weight(s, true), exact(value)}})) : exact(value);
        };
        for (std::int64_t i = 0; i < d; ++i) {
          in.back().push_back(times(on_input, v_.x[at(s / k * d + i)]));
          d_out.back().push_back(times(!on_input, v_.d_y[at(s / k * d + i)]));
        }
      }
      Expert x = expert(v_.gate_up, v_.down, v_.width, e, v_.experts, in, d_out, &r.gate_up, &r.down);
      for (std::size_t j = 0; j < in.size(); ++j) {
        out[at(slots[at(e)][j])] = x.out[j];
        d_in[at(slots[at(e)][j])] = x.d_in[j];
      }
    }
    for (std::int64_t t = 0; t < v_.tokens; ++t) {
      for (std::int64_t i = 0; i < d; ++i) {
        Terms y, x;
        for (std::int64_t s = t * k; s < (t + 1) * k; ++s) {
          if (v_.chosen[at(s)] < 0) continue;
          y.push_back({weight(s, !on_input), out[at(s)][at(i)]});
          x.push_back({weight(s, on_input), d_in[at(s)][at(i)]});
        }
        r.y[at(t * d + i)] = stored(wide_sum(y));
        r.x[at(t * d + i)] = stored(wide_sum(x));
      }
      for (std::int64_t s = t * k; s < (t + 1) * k; ++s) {
        Terms terms;
        for (std::int64_t i = 0; v_.chosen[at(s)] >= 0 && i < d; ++i)
          terms.push_back(on_input ? Term{exact(v_.x[at(t * d + i)]), d_in[at(s)][at(i)]}
                                   : Term{exact(v_.d_y[at(t * d + i)]), out[at(s)][at(i)]});
        r.weights[at(s)] = wide_sum(terms);
      }
    }
    if (v_.shared_width > 0) shared(&r);
    return r;
  }

 private:
  struct Term {
    Running a, b;
  };
  using Terms = std::vector<Term>;
  struct Expert {
    std::vector<Row> out, d_in;
  };

  static std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
  static Running exact(double v) { return {v, 0}; }
  static Row row(const std::vector<double>& v, std::int64_t r, std::int64_t n) {
    Row out;
    for (std::int64_t i = 0; i < n; ++i) out.push_back(exact(v[at(r * n + i)]));
    return out;
  }
  Running rounded(Running x, kernels::Float f) const {
    if (x.error == x.error) x.error = kernels::bounds::rounded(x.value, x.error, f);
    return x;
  }
  Running stored(Running x) const { return rounded(x, a_.stored); }

  /// The sum of products, the inputs' errors carried along; what the sum itself adds comes from `own`.
  template <class Own>
  static Running sum(const Terms& terms, Own own) {
    Running r;
    double absolute = 0;
    for (const Term& t : terms) {
      const double a = std::fabs(t.a.value), b = std::fabs(t.b.value);
      r.value += t.a.value * t.b.value;
      r.error += a * t.b.error + b * t.a.error + t.a.error * t.b.error;
      absolute += (a + t.a.error) * (b + t.b.error);
    }
    if (!terms.empty()) r.error += own(static_cast<std::int64_t>(terms.size()), absolute);
    return r;
  }
  Running gemm_sum(const Terms& t) const { return sum(t, a_.gemm); }
  /// In Wide<T>, at most one addition a term.
  Running wide_sum(const Terms& t) const {
    return sum(t, [this](std::int64_t n, double absolute) {
      return kernels::bounds::sum_of_products(n, static_cast<double>(n), absolute, a_.wide);
    });
  }
  /// Few operations in Wide<T> on a + b: their roundings are relative to the magnitudes.
  Running wide_add(Running a, Running b) const {
    const double size = std::fabs(a.value) + a.error + std::fabs(b.value) + b.error;
    return {a.value + b.value, a.error + b.error + kernels::bounds::gamma(1, kernels::unit_roundoff(a_.wide)) * size};
  }

  /// Every row through a matrix, its bias and its adapter; low: what the adapter keeps.
  std::vector<Row> linear(const LinearValues& l, std::int64_t e, std::int64_t inputs, std::int64_t outputs,
                          const std::vector<Row>& in, std::vector<Row>* low) const {
    std::vector<Row> out;
    for (const Row& x : in) {
      out.emplace_back();
      low->emplace_back();
      for (std::int64_t n = 0; n < outputs; ++n) {
        Terms t;
        for (std::int64_t i = 0; i < inputs; ++i)
          t.push_back({exact(l.weight[at((e * outputs + n) * inputs + i)]), x[at(i)]});
        if (!l.bias.empty()) t.push_back({exact(1), exact(l.bias[at(e * outputs + n)])});
        out.back().push_back(stored(gemm_sum(t)));
      }
      for (std::int64_t q = 0; q < l.rank; ++q) {
        Terms t;
        for (std::int64_t i = 0; i < inputs; ++i)
          t.push_back({exact(l.lora_a[at((e * l.rank + q) * inputs + i)]), x[at(i)]});
        low->back().push_back(stored(gemm_sum(t)));
      }
      for (std::int64_t n = 0; l.rank > 0 && n < outputs; ++n) {
        Terms t = {{exact(1), out.back()[at(n)]}};
        for (std::int64_t q = 0; q < l.rank; ++q)
          t.push_back({exact(l.scaling * l.lora_b[at((e * outputs + n) * l.rank + q)]), low->back()[at(q)]});
        out.back()[at(n)] = stored(gemm_sum(t));
      }
    }
    return out;
  }

  std::vector<Row> linear_backward(const LinearValues& l, std::int64_t e, std::int64_t experts, std::int64_t inputs,
                                   std::int64_t outputs, const std::vector<Row>& in, const std::vector<Row>& low,
                                   const std::vector<Row>& d_out, LinearErrors* g) const {
    const std::size_t rows = in.size();
    const auto product = [&](const std::vector<Row>& a, std::int64_t i, const std::vector<Row>& b, std::int64_t j,
                             double scale) {
      Terms t;
      for (std::size_t r = 0; r < rows; ++r) {
        Running left = a[r][at(i)];
        left.value *= scale, left.error *= std::fabs(scale);
        t.push_back({left, b[r][at(j)]});
      }
      return rounded(gemm_sum(t), a_.wide);
    };
    g->weight.resize(at(experts * outputs * inputs));
    for (std::int64_t n = 0; n < outputs; ++n) {
      for (std::int64_t i = 0; i < inputs; ++i)
        g->weight[at((e * outputs + n) * inputs + i)] = product(d_out, n, in, i, 1);
    }
    g->bias.resize(at(experts * outputs));
    for (std::int64_t n = 0; n < outputs; ++n) {
      Terms t;
      for (std::size_t r = 0; r < rows; ++r) t.push_back({exact(1), d_out[r][at(n)]});
      g->bias[at(e * outputs + n)] = wide_sum(t);
    }
    std::vector<Row> d_low(rows), d_in(rows);
    g->lora_a.resize(at(experts * l.rank * inputs)), g->lora_b.resize(at(experts * outputs * l.rank));
    for (std::int64_t q = 0; q < l.rank; ++q) {
      for (std::size_t r = 0; r < rows; ++r) {
        Terms t;
        for (std::int64_t n = 0; n < outputs; ++n)
          t.push_back({exact(l.scaling * l.lora_b[at((e * outputs + n) * l.rank + q)]), d_out[r][at(n)]});
        d_low[r].push_back(stored(gemm_sum(t)));
      }
      for (std::int64_t n = 0; n < outputs; ++n)
        g->lora_b[at((e * outputs + n) * l.rank + q)] = product(d_out, n, low, q, l.scaling);
      for (std::int64_t i = 0; i < inputs; ++i)
        g->lora_a[at((e * l.rank + q) * inputs + i)] = product(d_low, q, in, i, 1);
    }
    for (std::size_t r = 0; r < rows; ++r) {
      for (std::int64_t i = 0; i < inputs; ++i) {
        Terms t;
        for (std::int64_t n = 0; n < outputs; ++n)
          t.push_back({exact(l.weight[at((e * outputs + n) * inputs + i)]), d_out[r][at(n)]});
        Running v = stored(gemm_sum(t));
        if (l.rank > 0) {
          t = {{exact(1), v}};
          for (std::int64_t q = 0; q < l.rank; ++q)
            t.push_back({exact(l.lora_a[at((e * l.rank + q) * inputs + i)]), d_low[r][at(q)]});
          v = stored(gemm_sum(t));
        }
        d_in[r].push_back(v);
      }
    }
    return d_in;
  }

  /// a [rows, u] to h [rows, f], and back.
  struct Factors {
    Running value, slope, up;  // phi, its slope, clamped a_up + offset
    bool gate_edge, up_edge;   // may be on either side of the limit
    bool gate_in, up_in;
  };
  Factors factors(const Row& a, std::int64_t i, std::int64_t width) const {
    const kernels::ExpertForm& f = v_.form;
    Running gate = a[at(i)], up = f.gated ? a[at(width + i)] : exact(0);
    Factors r;
    r.gate_edge = f.gated && std::fabs(gate.value - f.limit) <= gate.error;
    r.up_edge = f.gated && std::fabs(std::fabs(up.value) - f.limit) <= up.error;
    r.gate_in = !f.gated || gate.value <= f.limit;
    r.up_in = !f.gated || std::fabs(up.value) <= f.limit;
    if (f.gated) {
      gate.value = std::fmin(gate.value, f.limit);
      up.value = std::fmax(std::fmin(up.value, f.limit), -f.limit);
    }
    const kernels::Curve<double> c = curve(gate.value);
    const kernels::bounds::CurveError e = kernels::bounds::activation(f, gate.value, gate.error, a_.elementwise);
    r.value = {c.value, e.value};
    r.slope = {c.slope, e.slope};
    r.up = f.gated ? Running{up.value + f.up_offset, up.error} : exact(1);
    return r;
  }
  /// By tanh and exp of the C library, which the kernels do not use.
  kernels::Curve<double> curve(double z) const {
    const kernels::ExpertForm& f = v_.form;
    switch (f.activation) {
      case kernels::Activation::kSilu: {
        const double s = 0.5 * (1 + std::tanh(0.5 * f.alpha * z));
        return {z / (1 + std::exp(-f.alpha * z)), s + f.alpha * z * s * (1 - s)};
      }
      case kernels::Activation::kGeluTanh: {
        const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (z + 0.044715 * z * z * z));
        return {0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)};
      }
      case kernels::Activation::kRelu: return {z > 0 ? z : 0, z > 0 ? 1.0 : 0.0};
      case kernels::Activation::kRelu2: return {z > 0 ? z * z : 0, z > 0 ? 2 * z : 0};
    }
    return {};
  }
  /// A few roundings, then one to T.
  Running product(std::initializer_list<Running> factors) const {
    double value = 1, low = 1, high = 1;
    for (const Running& f : factors) {
      value *= f.value, low *= std::fabs(f.value), high *= std::fabs(f.value) + f.error;
    }
    const double u = kernels::unit_roundoff(a_.elementwise);
    return stored({value, (high - low) + kernels::bounds::gamma(8, u) * high});
  }

  Expert expert(const LinearValues& gate_up, const LinearValues& down, std::int64_t width, std::int64_t e,
                std::int64_t experts, const std::vector<Row>& in, const std::vector<Row>& d_out,
                LinearErrors* d_gate_up, LinearErrors* d_down) const {
    const std::int64_t first = kernels::first_outputs(v_.form, width);
    std::vector<Row> low, down_low, activated, d_before;
    const std::vector<Row> before = linear(gate_up, e, v_.hidden, first, in, &low);
    for (const Row& a : before) {
      activated.emplace_back();
      for (std::int64_t i = 0; i < width; ++i) {
        const Factors f = factors(a, i, width);
        activated.back().push_back(product({f.value, f.up}));
      }
    }
    Expert r;
    r.out = linear(down, e, width, v_.hidden, activated, &down_low);
    const std::vector<Row> d_activated =
        linear_backward(down, e, experts, width, v_.hidden, activated, down_low, d_out, d_down);
    for (std::size_t j = 0; j < before.size(); ++j) {
      d_before.emplace_back(at(first));
      for (std::int64_t i = 0; i < width; ++i) {
        const Factors f = factors(before[j], i, width);
        const auto side = [](Running g, bool edge, bool in_range) {
          if (edge) return Running{in_range ? g.value : 0, std::fabs(g.value) + g.error};
          return in_range ? g : Running{};
        };
        d_before.back()[at(i)] = side(product({d_activated[j][at(i)], f.up, f.slope}), f.gate_edge, f.gate_in);
        if (v_.form.gated)
          d_before.back()[at(width + i)] = side(product({d_activated[j][at(i)], f.value}), f.up_edge, f.up_in);
      }
    }
    r.d_in = linear_backward(gate_up, e, experts, v_.hidden, first, in, low, d_before, d_gate_up);
    return r;
  }

  void shared(LayerErrors* r) const {
    const std::int64_t d = v_.hidden;
    const bool gated = !v_.shared_gate.empty();
    std::vector<Row> in, d_out;
    Row weight;
    for (std::int64_t t = 0; t < v_.tokens; ++t) {
      in.push_back(row(v_.x, t, d));
      Running w = exact(1);
      if (gated) {
        Terms terms;
        for (std::int64_t i = 0; i < d; ++i) terms.push_back({in.back()[at(i)], exact(v_.shared_gate[at(i)])});
        const Running logit = wide_sum(terms);
        const double s = 1 / (1 + std::exp(-logit.value));
        const double u = kernels::unit_roundoff(kernels::Float::kF64);
        w = rounded({s, 0.25 * logit.error + kernels::bounds::gamma(5.0 + std::fabs(logit.value), u) * s}, a_.wide);
      }
      weight.push_back(w);
      d_out.emplace_back();
      for (std::int64_t i = 0; i < d; ++i)
        d_out.back().push_back(stored(wide_sum({{w, exact(v_.d_y[at(t * d + i)])}})));
    }
    const Expert x = expert(v_.shared_gate_up, v_.shared_down, v_.shared_width, 0, 1, in, d_out, &r->shared_gate_up,
                            &r->shared_down);
    std::vector<Running> d_logit;
    for (std::int64_t t = 0; t < v_.tokens; ++t) {
      Terms terms;
      for (std::int64_t i = 0; i < d; ++i) terms.push_back({exact(v_.d_y[at(t * d + i)]), x.out[at(t)][at(i)]});
      const Running dot = wide_sum(terms), w = weight[at(t)];
      // w (1 - w) has slope at most 1
      Running slope = {w.value * (1 - w.value), w.error + 3 * kernels::unit_roundoff(a_.wide) * w.value};
      d_logit.push_back(wide_sum({{dot, slope}}));
      for (std::int64_t i = 0; i < d; ++i) {
        Running& y = r->y[at(t * d + i)];
        y = stored(wide_add(y, wide_sum({{w, x.out[at(t)][at(i)]}})));
        Running& g = r->x[at(t * d + i)];
        g = wide_add(g, x.d_in[at(t)][at(i)]);
        if (gated) g = wide_add(g, wide_sum({{d_logit.back(), exact(v_.shared_gate[at(i)])}}));
        g = stored(g);
      }
    }
    for (std::int64_t i = 0; gated && i < d; ++i) {
      Terms terms;
      for (std::int64_t t = 0; t < v_.tokens; ++t) terms.push_back({d_logit[at(t)], in[at(t)][at(i)]});
      r->shared_gate.push_back(wide_sum(terms));
    }
  }

  const LayerValues& v_;
  const LayerArithmetic& a_;
};

}  // namespace moeaudit::test

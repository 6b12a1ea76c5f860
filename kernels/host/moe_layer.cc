#include "kernels/host/moe_layer.h"

#include <vector>

#include "kernels/host/moe_layer_steps.h"

namespace moeaudit::kernels {
namespace {

template <class T>
struct HostOps {
  Status status = Status::kOk;

  void keep(Status s) {
    if (status == Status::kOk) status = s;
  }
  bool ok() const { return status == Status::kOk; }

  void permute(const PermuteArgs& a, const Permutation& p) { keep(kernels::permute(a, p)); }
  void gather(const Permutation& p, const RowShape& s, const T* x, T* rows) {
    if (ok()) keep(kernels::gather(p, s, x, rows));
  }
  void combine(const Permutation& p, const RowShape& s, const T* rows, const Wide<T>* weights, T* y) {
    if (ok()) keep(kernels::combine(p, s, rows, weights, y));
  }
  void combine_backward(const Permutation& p, const RowShape& s, const T* rows, const Wide<T>* weights, const T* d_y,
                        T* d_rows, Wide<T>* d_weights) {
    if (ok()) keep(kernels::combine_backward(p, s, rows, weights, d_y, d_rows, d_weights));
  }
  void grouped_gemm(const GroupedGemmArgs<T>& a) {
    if (ok()) keep(kernels::grouped_gemm(a));
  }
  void column_sums(const ColumnSumsArgs<T>& a) {
    if (ok()) keep(kernels::column_sums(a));
  }
  void one_group(std::int64_t tokens, std::int64_t* offsets) { offsets[0] = 0, offsets[1] = tokens; }
  void activate(const ExpertForm& f, const std::int64_t* offsets, std::int64_t experts, std::int64_t,
                std::int64_t width, const T* before, T* activated) {
    for (std::int64_t r = 0; ok() && r < offsets[experts]; ++r) {
      const T* row = before + r * first_outputs(f, width);
      for (std::int64_t i = 0; i < width; ++i)
        activated[r * width + i] = activated_element(f, row[i], f.gated ? row[width + i] : T{});
    }
  }
  void activate_backward(const ExpertForm& f, const std::int64_t* offsets, std::int64_t experts, std::int64_t,
                         std::int64_t width, const T* before, const T* d_activated, T* d_before) {
    for (std::int64_t r = 0; ok() && r < offsets[experts]; ++r) {
      const T* row = before + r * first_outputs(f, width);
      T *d_row = d_before + r * first_outputs(f, width), unused{};
      for (std::int64_t i = 0; i < width; ++i)
        activate_backward_element(f, row[i], f.gated ? row[width + i] : T{}, d_activated[r * width + i], d_row + i,
                                  f.gated ? d_row + width + i : &unused);
    }
  }
  void add_shared(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, T* y) {
    for (std::int64_t t = 0; ok() && t < a.tokens; ++t) {
      const Wide<T>* weight = nullptr;
      if (a.shared_gate != nullptr) {
        const auto logit = static_cast<double>(dot_by_lanes(a.x + t * a.hidden, a.shared_gate, a.hidden));
        s.shared_weight[t] = narrow<Wide<T>>(sigmoid_exact_order(logit));
        weight = s.shared_weight + t;
      }
      for (std::int64_t i = t * a.hidden; i < (t + 1) * a.hidden; ++i)
        y[i] = with_shared(y[i], s.shared.out[i], weight);
    }
  }
  void shared_backward(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, const T* d_y, T* d_out, Wide<T>* d_logit) {
    for (std::int64_t t = 0; ok() && t < a.tokens; ++t) {
      const T* up = d_y + t * a.hidden;
      const bool gated = a.shared_gate != nullptr;
      if (gated) d_logit[t] = gate_slope(dot_by_lanes(up, s.shared.out + t * a.hidden, a.hidden), s.shared_weight[t]);
      for (std::int64_t i = 0; i < a.hidden; ++i)
        d_out[t * a.hidden + i] = gated ? narrow<T>(s.shared_weight[t] * widen(up[i])) : up[i];
    }
  }
  void add_shared_gradient(const MoeLayerArgs<T>& a, const T* through, const Wide<T>* d_logit, T* d_x) {
    const bool gated = a.shared_gate != nullptr;
    for (std::int64_t i = 0; ok() && i < a.tokens * a.hidden; ++i) {
      d_x[i] = with_shared_gradient(d_x[i], through[i], gated ? d_logit + i / a.hidden : nullptr,
                                    gated ? a.shared_gate + i % a.hidden : nullptr);
    }
  }
};

template <class T>
Status forward(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, T* y) {
  if (const Status status = check_moe_layer(a, s, y); status != Status::kOk) return status;
  HostOps<T> ops;
  MoeLayerSteps<T, HostOps<T>>(a, s, ops).forward(y);
  return ops.status;
}

template <class T>
Status backward(const MoeLayerArgs<T>& a, const MoeLayerState<T>& s, const T* d_y, const MoeLayerGradients<T>& g) {
  if (const Status status = check_moe_layer_backward(a, s, d_y); status != Status::kOk) return status;
  std::size_t bytes = 0;
  cut_scratch(a, nullptr, &bytes);
  std::vector<double> memory(bytes / 8 + 2);  // rows beyond the last expert's are 0, and stay so
  const MoeLayerScratch<T> scratch = cut_scratch(a, memory.data(), &bytes);
  HostOps<T> ops;
  MoeLayerSteps<T, HostOps<T>>(a, s, ops).backward(d_y, g, scratch);
  return ops.status;
}

}  // namespace

Status moe_layer(const MoeLayerArgs<float>& a, const MoeLayerState<float>& s, float* y) { return forward(a, s, y); }
Status moe_layer(const MoeLayerArgs<double>& a, const MoeLayerState<double>& s, double* y) { return forward(a, s, y); }
Status moe_layer(const MoeLayerArgs<BFloat16>& a, const MoeLayerState<BFloat16>& s, BFloat16* y) {
  return forward(a, s, y);
}
Status moe_layer_backward(const MoeLayerArgs<float>& a, const MoeLayerState<float>& s, const float* d_y,
                          const MoeLayerGradients<float>& g) {
  return backward(a, s, d_y, g);
}
Status moe_layer_backward(const MoeLayerArgs<double>& a, const MoeLayerState<double>& s, const double* d_y,
                          const MoeLayerGradients<double>& g) {
  return backward(a, s, d_y, g);
}
Status moe_layer_backward(const MoeLayerArgs<BFloat16>& a, const MoeLayerState<BFloat16>& s, const BFloat16* d_y,
                          const MoeLayerGradients<BFloat16>& g) {
  return backward(a, s, d_y, g);
}

}  // namespace moeaudit::kernels

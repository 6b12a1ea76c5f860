#include <mutex>
#include <vector>

#include "kernels/cuda/backend.h"
#include "kernels/cuda/balance_loss.h"
#include "kernels/cuda/dispatch.h"
#include "kernels/cuda/expert_choice.h"
#include "kernels/cuda/expert_load.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/lora.h"
#include "kernels/cuda/moe_layer.h"
#include "kernels/cuda/permute.h"
#include "kernels/cuda/quantised_weights.h"
#include "kernels/cuda/rounded_gate.h"
#include "kernels/cuda/router.h"
#include "kernels/cuda/router_backward.h"
#include "kernels/cuda/router_noise.h"
#include "kernels/cuda/router_regularisers.h"
#include "kernels/cuda/routing_metrics.h"
#include "kernels/cuda/sparse_mixer.h"
#include "kernels/cuda/token_loss.h"
#include "kernels/host/moe_layer_steps.h"

namespace moeaudit::kernels::cuda {
namespace {

/// Device memory of one call. Pointers become those of the device; results go back where they came from.
class Staging {
 public:
  Staging() = default;
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging() {
    for (void* p : memory_) cudaFree(p);
  }
  template <class T>
  Staging& in(const T*& p, std::int64_t n) {
    if (p == nullptr) return *this;
    void* device = allocate(n, sizeof(T));
    if (ok() && n > 0) error_ = cudaMemcpy(device, p, bytes(n, sizeof(T)), cudaMemcpyHostToDevice);
    p = static_cast<const T*>(device);
    return *this;
  }
  Staging& in(const void*& p, std::int64_t count) {  // bytes
    const auto* typed = static_cast<const std::uint8_t*>(p);
    in(typed, count);
    p = typed;
    return *this;
  }
  template <class T>
  Staging& out(T*& p, std::int64_t n) {
    if (p == nullptr) return *this;
    void* device = allocate(n, sizeof(T));
    results_.push_back({p, device, bytes(n, sizeof(T))});
    p = static_cast<T*>(device);
    return *this;
  }
  /// What is read and written: its values go there, too.
  template <class T>
  Staging& both(T*& p, std::int64_t n) {
    const T* host = p;
    out(p, n);
    if (p != nullptr && ok() && n > 0) error_ = cudaMemcpy(p, host, bytes(n, sizeof(T)), cudaMemcpyHostToDevice);
    return *this;
  }
  void* workspace(std::size_t size) { return allocate(static_cast<std::int64_t>(size), 1); }

  /// launch() if everything is there, and its results back.
  template <class Launch>
  Status run(std::string* error, const Launch& launch) {
    Status status = ok() ? launch() : Status::kLaunchFailed;
    if (status == Status::kOk) error_ = cudaDeviceSynchronize();
    for (const Result& r : results_) {
      if (status == Status::kOk && ok() && r.size > 0)
        error_ = cudaMemcpy(r.host, r.device, r.size, cudaMemcpyDeviceToHost);
    }
    if (!ok()) status = Status::kLaunchFailed;
    if (status == Status::kLaunchFailed) *error = cudaGetErrorString(ok() ? cudaGetLastError() : error_);
    return status;
  }

 private:
  struct Result {
    void* host;
    void* device;
    std::size_t size;
  };
  static std::size_t bytes(std::int64_t n, std::size_t each) { return n > 0 ? static_cast<std::size_t>(n) * each : 0; }
  bool ok() const { return error_ == cudaSuccess; }
  void* allocate(std::int64_t n, std::size_t each) {
    void* p = nullptr;
    if (!ok()) return p;
    error_ = cudaMalloc(&p, bytes(n, each) + 16);  // never 0 bytes, which would be a null pointer
    if (ok()) memory_.push_back(p);
    return p;
  }

  cudaError_t error_ = cudaSuccess;
  std::vector<void*> memory_;
  std::vector<Result> results_;
};

std::int64_t size_of(ScaleType t) {
  switch (t) {
    case ScaleType::kF64: return 8;
    case ScaleType::kF32: return 4;
    case ScaleType::kBF16:
    case ScaleType::kF16: return 2;
    default: return 1;
  }
}

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(std::string name) : name_("cuda " + name) {}
  std::string name() const override { return name_; }
  bool on_device() const override { return true; }
  std::string last_error() const override {
    const std::lock_guard lock(mutex_);
    return error_;
  }

  Status gate_logits(const GateArgs<float, float>& a) override { return gate(a); }
  Status gate_logits(const GateArgs<float, double>& a) override { return gate(a); }
  Status gate_logits(const GateArgs<double, double>& a) override { return gate(a); }
  Status rounded_gate_logits(const RoundedGateArgs& args, float* logits) override {
    if (const Status s = check_rounded_gate(args, logits); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    m.in(a.x, a.tokens * a.hidden)
        .in(a.w, a.experts * a.hidden)
        .in(a.bias, a.experts)
        .out(logits, a.tokens * a.experts);
    return m.run(&error_, [&] { return cuda::rounded_gate_logits(a, logits, nullptr); });
  }
  Status route(const RouteArgs<float>& a, const RouteResult<float>& r) override { return route_of(a, r); }
  Status route(const RouteArgs<double>& a, const RouteResult<double>& r) override { return route_of(a, r); }

  Status route_backward(const RouteBackwardArgs<double>& args, double* d_logits) override {
    if (const Status s = check_route_backward(args, d_logits); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    const std::int64_t all = a.forward.tokens * a.forward.experts, slots = a.forward.tokens * a.forward.top_k;
    m.in(a.forward.logits, all).in(a.forward.correction_bias, a.forward.experts).in(a.chosen, slots);
    m.in(a.weights, slots).in(a.scores, all).in(a.logits, all).out(d_logits, all);
    const std::int64_t always = a.forward.tokens * a.forward.always;
    m.in(a.forward.expert_scale, a.forward.experts).in(a.forward.always_logits, always).in(a.always_weights, always);
    m.out(a.d_always_logits, always);
    void* workspace = m.workspace(route_backward_workspace(a.forward.tokens, a.forward.experts));
    return m.run(&error_, [&] { return cuda::route_backward(a, d_logits, workspace, nullptr); });
  }
  Status expert_scale_backward(const ExpertScaleBackwardArgs<double>& args, double* d_scale) override {
    if (const Status s = check_expert_scale_backward(args, d_scale); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    const std::int64_t slots = a.tokens * a.top_k;
    m.in(a.unscaled, slots).in(a.chosen, slots).in(a.weights, slots).out(d_scale, a.experts);
    return m.run(&error_, [&] { return cuda::expert_scale_backward(a, d_scale, nullptr); });
  }
  Status gate_backward(const GateBackwardArgs<double>& args, double* d_w, double* d_x) override {
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    m.in(a.d_logits, a.tokens * a.experts).in(a.x, a.tokens * a.hidden).in(a.w, a.experts * a.hidden);
    m.out(d_w, a.experts * a.hidden).out(d_x, a.tokens * a.hidden);
    return m.run(&error_, [&] { return cuda::gate_backward(a, d_w, d_x, nullptr); });
  }
  Status expert_choice(const ExpertChoiceArgs<double>& args, const ExpertChoiceResult<double>& result) override {
    if (const Status s = check_expert_choice(args, result); s != Status::kOk || args.tokens == 0) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    m.in(a.scores, a.tokens * a.experts).in(a.valid, a.tokens);
    m.out(r.tokens, a.experts * a.capacity).out(r.weights, a.experts * a.capacity).out(r.taken, a.tokens);
    void* workspace = m.workspace(expert_choice_workspace(a.experts, a.capacity));
    return m.run(&error_, [&] { return cuda::expert_choice(a, r, workspace, nullptr); });
  }
  Status expert_choice_backward(const std::int32_t* tokens_of, const double* d_weights, std::int64_t tokens,
                                std::int64_t experts, std::int64_t capacity, double* d_scores) override {
    if (tokens < 0 || experts < 1 || capacity < 0) return Status::kBadShape;
    const std::lock_guard lock(mutex_);
    Staging m;
    m.in(tokens_of, experts * capacity).in(d_weights, experts * capacity).out(d_scores, tokens * experts);
    return m.run(&error_, [&] {
      return cuda::expert_choice_backward(tokens_of, d_weights, tokens, experts, capacity, d_scores, nullptr);
    });
  }
  Status noisy_logits(const NoisyLogitsArgs<double>& args, double* out) override {
    if (const Status s = check_noisy_logits(args, out); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    const std::int64_t all = a.tokens * a.experts;
    m.in(a.logits, all).in(a.noise, all).in(a.noise_logits, all).out(out, all);
    return m.run(&error_, [&] { return cuda::noisy_logits(a, out, nullptr); });
  }
  Status noisy_logits_backward(const NoisyLogitsArgs<double>& args, const double* upstream,
                               double* d_noise_logits) override {
    if (const Status s = check_noisy_logits_backward(args, upstream, d_noise_logits); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    const std::int64_t all = a.tokens * a.experts;
    m.in(a.logits, all).in(a.noise, all).in(a.noise_logits, all).in(upstream, all).out(d_noise_logits, all);
    return m.run(&error_, [&] { return cuda::noisy_logits_backward(a, upstream, d_noise_logits, nullptr); });
  }
  Status jitter(const double* x, const double* factor, std::int64_t count, Float dtype, double* out) override {
    if (count < 0) return Status::kBadShape;
    const std::lock_guard lock(mutex_);
    Staging m;
    m.in(x, count).in(factor, count).out(out, count);
    return m.run(&error_, [&] { return cuda::jitter(x, factor, count, dtype, out, nullptr); });
  }
  Status sparse_mixer(const SparseMixerArgs<float>& a, const SparseMixerResult<float>& r) override { return mix(a, r); }
  Status sparse_mixer(const SparseMixerArgs<double>& a, const SparseMixerResult<double>& r) override {
    return mix(a, r);
  }
  Status sparse_mixer_backward(const SparseMixerBackwardArgs<double>& args, double* d_logits) override {
    if (const Status s = check_sparse_mixer_backward(args, d_logits); s != Status::kOk) return s;
    if (!mixer_ids_fit(args.chosen, args.forward.tokens, args.forward.experts)) return Status::kBadShape;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    const std::int64_t slots = kMixerPicks * a.forward.tokens, all = a.forward.tokens * a.forward.experts;
    m.in(a.forward.logits, all).in(a.forward.given, slots).in(a.chosen, slots).in(a.weights, slots).out(d_logits, all);
    return m.run(&error_, [&] { return cuda::sparse_mixer_backward(a, d_logits, nullptr); });
  }
  Status balance_loss(const BalanceLossArgs<double>& args, const BalanceLossResult<double>& result) override {
    if (const Status s = check_balance_loss(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    m.in(a.probabilities, a.tokens * a.experts).in(a.chosen, a.tokens * a.top_k).in(a.valid, a.tokens);
    m.in(a.sets, a.num_sets + 1).in(a.counts, a.num_sets * a.experts).in(a.counted_tokens, a.num_sets);
    m.out(r.loss, 1).out(r.set_loss, a.num_sets).out(r.counts, a.num_sets * a.experts);
    m.out(r.mean_probability, a.num_sets * a.experts).out(r.gradient, a.tokens * a.experts);
    void* workspace = m.workspace(balance_loss_workspace(a.tokens, a.experts, a.convention.devices, a.num_sets));
    return m.run(&error_, [&] { return cuda::balance_loss(a, r, workspace, nullptr); });
  }
  Status z_loss(const ZLossArgs<double>& args, const ZLossResult<double>& result) override {
    if (const Status s = check_z_loss(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    m.in(a.logits, a.tokens * a.experts).in(a.valid, a.tokens);
    m.out(r.loss, 1).out(r.log_sum_exp, a.tokens).out(r.gradient, a.tokens * a.experts);
    void* workspace = m.workspace(z_loss_workspace(a.tokens));
    return m.run(&error_, [&] { return cuda::z_loss(a, r, workspace, nullptr); });
  }
  Status bias_update(const BiasUpdateArgs& args, double* bias) override {
    if (const Status s = check_bias_update(args, bias); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    const std::int64_t all = a.layers * a.experts;
    m.in(a.bias, all).in(a.counts, a.ranks * a.micro_batches * all).out(bias, all);
    return m.run(&error_, [&] { return cuda::bias_update(a, bias, nullptr); });
  }
  Status cross_entropy(const CrossEntropyArgs<double>& args, const CrossEntropyResult<double>& result) override {
    if (const Status s = check_cross_entropy(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    m.in(a.logits, a.tokens * a.vocabulary).in(a.labels, a.tokens);
    m.out(r.sum, 1).out(r.labels, 1).out(r.token_loss, a.tokens).out(r.gradient, a.tokens * a.vocabulary);
    void* workspace = m.workspace(cross_entropy_workspace(a.tokens));
    return m.run(&error_, [&] { return cuda::cross_entropy(a, r, workspace, nullptr); });
  }
  Status drop(const DropArgs<double>& args, const DropResult<double>& result) override {
    if (const Status s = check_drop(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    const std::int64_t slots = a.tokens * a.top_k;
    m.in(a.chosen, slots).in(a.weights, slots).in(a.keys, slots).in(a.scores, a.tokens * a.experts);
    m.out(r.place, slots).out(r.weights, slots);
    m.out(r.kept, a.experts).out(r.dropped, 1).out(r.tokens_lost, 1);
    void* workspace = m.workspace(drop_workspace(a.tokens, a.experts, a.top_k));
    return m.run(&error_, [&] { return cuda::drop(a, r, workspace, nullptr); });
  }
  Status count_choices(const CountArgs<std::int32_t>& args, std::int64_t* counts, std::int64_t* outside) override {
    if (const Status s = check_count(args, counts, outside); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    m.in(a.chosen, a.tokens * a.top_k).in(a.valid, a.tokens).out(counts, a.experts).out(outside, 1);
    return m.run(&error_, [&] { return cuda::count_choices(a, counts, outside, nullptr); });
  }
  Status routing_statistics(const RoutingStatisticsArgs<double>& args, RoutingStatistics* out) override {
    if (const Status s = check_routing_statistics(args, out); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    m.in(a.probabilities, a.tokens * a.experts).in(a.chosen, a.tokens * a.top_k).in(a.valid, a.tokens).out(out, 1);
    void* workspace = m.workspace(routing_statistics_workspace(a.tokens, a.experts));
    return m.run(&error_, [&] { return cuda::routing_statistics(a, out, workspace, nullptr); });
  }
  Status dequantise(const QuantisedWeights& weights, double* out) override {
    const std::int64_t count = weights.matrices * weights.rows * weights.columns;
    if (const Status s = check_dequantise(weights, 0, count, out); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto w = weights;
    const std::int64_t scales = w.matrices * blocks_of(w.rows, w.row_block) * blocks_of(w.columns, w.column_block);
    m.in(w.codes, two_a_byte(w.code) ? (count + 1) / 2 : count).in(w.table, 16 * 4);
    m.in(w.scales, scales * size_of(w.scale_type)).in(w.nested_map, 256 * 4);
    m.in(w.nested_absmax, blocks_of(scales, w.nested_block) * 4).out(out, count);
    return m.run(&error_, [&] { return cuda::dequantise(w, 0, count, out, nullptr); });
  }
  Status lora_merge(const LoraMergeArgs& args, bool unmerge, double* out) override {
    if (const Status s = check_update(args.update); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    const LoraUpdate& u = args.update;
    m.in(a.update.left, u.rows * u.rank).in(a.update.right, u.rank * u.columns).in(a.w, u.rows * u.columns);
    m.out(out, u.rows * u.columns);
    return m.run(&error_, [&] { return cuda::lora_merge(a, unmerge, out, nullptr); });
  }
  Status lora_gradient(const LoraGradientArgs& args, const LoraGradient& result) override {
    if (const Status s = check_gradient(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    m.in(a.x, a.tokens * a.in).in(a.grad_y, a.tokens * a.out).in(a.a, a.rank * a.in).in(a.b, a.out * a.rank);
    m.out(r.a, a.rank * a.in).out(r.b, a.out * a.rank).out(r.x, a.tokens * a.in);
    void* workspace = m.workspace(lora_gradient_workspace(a.tokens, a.rank));
    return m.run(&error_, [&] { return cuda::lora_gradient(a, r, workspace, nullptr); });
  }
  Status permute(const PermuteArgs& args, const Permutation& result) override {
    if (const Status s = check_permute(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    const std::int64_t slots = a.tokens * a.top_k;
    m.in(a.chosen, slots).in(a.place, slots);
    m.out(r.offsets, a.experts + 1).out(r.slot_of_row, permuted_rows(a)).out(r.row_of_slot, slots);
    void* workspace = m.workspace(permute_workspace(a.tokens, a.experts, a.top_k));
    return m.run(&error_, [&] { return cuda::permute(a, r, workspace, nullptr); });
  }
  Status combine(const Permutation& p, const RowShape& s, const double* rows, const double* weights,
                 double* y) override {
    if (const Status status = check_rows(p, s); status != Status::kOk) return status;
    const std::lock_guard lock(mutex_);
    Staging m;
    Permutation d = placed(p, s, m);
    m.in(rows, s.rows * s.hidden).in(weights, s.tokens * s.top_k).out(y, s.tokens * s.hidden);
    return m.run(&error_, [&] { return cuda::combine(d, s, rows, weights, y, nullptr); });
  }
  Status combine_backward(const Permutation& p, const RowShape& s, const double* rows, const double* weights,
                          const double* d_y, double* d_rows, double* d_weights) override {
    if (const Status status = check_rows(p, s); status != Status::kOk) return status;
    const std::lock_guard lock(mutex_);
    Staging m;
    Permutation d = placed(p, s, m);
    m.in(rows, s.rows * s.hidden).in(weights, s.tokens * s.top_k).in(d_y, s.tokens * s.hidden);
    m.out(d_rows, s.rows * s.hidden).out(d_weights, s.tokens * s.top_k);
    return m.run(&error_, [&] { return cuda::combine_backward(d, s, rows, weights, d_y, d_rows, d_weights, nullptr); });
  }
  Status moe_layer(const MoeLayerArgs<double>& args, const MoeLayerState<double>& state, double* y) override {
    if (const Status s = check_moe_layer(args, state, y); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto s = state;
    stage(&a, &s, m);
    m.out(y, a.tokens * a.hidden);
    void* workspace = m.workspace(moe_layer_workspace(args));
    return m.run(&error_, [&] { return cuda::moe_layer(a, s, y, workspace, nullptr); });
  }
  Status moe_layer_backward(const MoeLayerArgs<double>& args, const MoeLayerState<double>& state, const double* d_y,
                            const MoeLayerGradients<double>& gradients) override {
    if (const Status s = check_moe_layer_backward(args, state, d_y); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto s = state;
    auto g = gradients;
    stage(&a, &s, m);
    m.in(d_y, a.tokens * a.hidden).out(g.x, a.tokens * a.hidden).out(g.weights, a.tokens * a.top_k);
    stage(a.routed, a.experts, a, &g.gate_up, &g.down, m);
    stage(a.shared, 1, a, &g.shared_gate_up, &g.shared_down, m);
    m.out(g.shared_gate, a.hidden);
    void* workspace = m.workspace(moe_layer_backward_workspace(args));
    return m.run(&error_, [&] { return cuda::moe_layer_backward(a, s, d_y, g, workspace, nullptr); });
  }
  Status importance_loss(const ImportanceLossArgs<double>& args, const ImportanceLossResult<double>& result) override {
    if (const Status s = check_importance_loss(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    const std::int64_t all = a.tokens * a.width;
    m.in(a.gates, all).in(a.chosen, all).in(a.valid, a.tokens);
    m.out(r.loss, 1).out(r.importance, a.experts).out(r.gradient, all);
    void* workspace = m.workspace(importance_loss_workspace(a.tokens, a.experts));
    return m.run(&error_, [&] { return cuda::importance_loss(a, r, workspace, nullptr); });
  }
  Status load_loss(const LoadLossArgs<double>& args, const LoadLossResult<double>& result) override {
    if (const Status s = check_load_loss(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    const std::int64_t all = a.tokens * a.experts;
    m.in(a.clean, all).in(a.noise, all).in(a.raw, all).in(a.valid, a.tokens);
    m.out(r.loss, 1).out(r.load, a.experts).out(r.probability, all).out(r.d_clean, all).out(r.d_raw, all);
    void* workspace = m.workspace(load_loss_workspace(a.tokens, a.experts));
    return m.run(&error_, [&] { return cuda::load_loss(a, r, workspace, nullptr); });
  }
  Status entropy_loss(const EntropyLossArgs<double>& args, const EntropyLossResult<double>& result) override {
    if (const Status s = check_entropy_loss(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    const std::int64_t all = a.tokens * a.experts;
    m.in(a.logits, all).in(a.valid, a.tokens).out(r.loss, 1).out(r.entropy, 1).out(r.token_entropy, a.tokens);
    m.out(r.mean_probability, a.experts).out(r.gradient, all);
    void* workspace = m.workspace(entropy_loss_workspace(a.tokens, a.experts));
    return m.run(&error_, [&] { return cuda::entropy_loss(a, r, workspace, nullptr); });
  }
  Status gate_orthogonality(const GateOrthogonalityArgs<double>& args,
                            const GateOrthogonalityResult<double>& result) override {
    if (const Status s = check_gate_orthogonality(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    m.in(a.w, a.experts * a.hidden);
    m.out(r.loss, 1).out(r.gram, a.experts * a.experts).out(r.gradient, a.experts * a.hidden);
    void* workspace = m.workspace(gate_orthogonality_workspace(a.experts));
    return m.run(&error_, [&] { return cuda::gate_orthogonality(a, r, workspace, nullptr); });
  }
  Status expert_overlap(const ExpertOverlapArgs<double>& args, const ExpertOverlapResult<double>& result) override {
    if (const Status s = check_expert_overlap(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    const std::int64_t slots = a.tokens * a.top_k;
    m.in(a.outputs, slots * a.hidden).in(a.chosen, slots).in(a.valid, a.tokens);
    m.out(r.loss, 1).out(r.token, a.tokens).out(r.gradient, slots * a.hidden);
    void* workspace = m.workspace(expert_overlap_workspace(a.tokens, a.top_k));
    return m.run(&error_, [&] { return cuda::expert_overlap(a, r, workspace, nullptr); });
  }
  Status score_variance(const ScoreVarianceArgs<double>& args, const ScoreVarianceResult<double>& result) override {
    if (const Status s = check_score_variance(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    const std::int64_t all = a.tokens * a.experts;
    m.in(a.scores, all).in(a.valid, a.tokens).out(r.loss, 1).out(r.mean, a.experts).out(r.gradient, all);
    void* workspace = m.workspace(score_variance_workspace(a.tokens, a.experts));
    return m.run(&error_, [&] { return cuda::score_variance(a, r, workspace, nullptr); });
  }
  Status routing_margins(const MarginArgs<double>& args, const MarginResult& result) override {
    if (const Status s = check_margins(args, result); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    m.in(a.choice, a.tokens * a.experts).in(a.chosen, a.tokens * a.top_k).in(a.valid, a.tokens);
    m.out(r.margin, a.tokens).out(r.counts, 1);
    return m.run(&error_, [&] { return cuda::routing_margins(a, r, nullptr); });
  }
  Status count_agreement(const AgreementArgs& args, std::int64_t* table, AgreementCounts* counts) override {
    if (const Status s = check_agreement(args, table, counts); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    m.in(a.now, a.tokens * a.now_k).in(a.reference, a.tokens * a.reference_k).in(a.valid, a.tokens);
    m.out(table, agreement_rows(a) * agreement_columns(a)).out(counts, 1);
    return m.run(&error_, [&] { return cuda::count_agreement(a, table, counts, nullptr); });
  }
  Status count_settled(const SettlingArgs& args, std::int64_t* tokens_settled) override {
    if (const Status s = check_settling(args, tokens_settled); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    m.in(a.first, a.checkpoints * a.tokens).in(a.valid, a.tokens);
    m.out(tokens_settled, a.checkpoints);
    return m.run(&error_, [&] { return cuda::count_settled(a, tokens_settled, nullptr); });
  }
  Status count_by_label(const CountArgs<std::int32_t>& args, const std::int32_t* labels, std::int64_t num_labels,
                        std::int64_t* table, std::int64_t* outside) override {
    if (const Status s = check_count_by_label(args, labels, num_labels, table, outside); s != Status::kOk) return s;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    m.in(a.chosen, a.tokens * a.top_k).in(a.valid, a.tokens).in(labels, a.tokens);
    m.out(table, num_labels * a.experts).out(outside, 1);
    return m.run(&error_, [&] { return cuda::count_by_label(a, labels, num_labels, table, outside, nullptr); });
  }

 private:
  template <class In, class Sum>
  Status gate(const GateArgs<In, Sum>& args) {
    if (args.tokens < 0 || args.hidden < 1 || args.experts < 1) return Status::kBadShape;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    m.in(a.x, a.tokens * a.hidden).in(a.packed, packed_gate_size<Sum>(a.experts, a.hidden)).in(a.bias, a.experts);
    m.out(a.logits, a.tokens * a.experts);
    return m.run(&error_, [&] { return cuda::gate_logits(a, nullptr); });
  }
  template <class T>
  Status mix(const SparseMixerArgs<T>& args, const SparseMixerResult<T>& result) {
    if (const Status s = check_sparse_mixer(args, result); s != Status::kOk) return s;
    if (!mixer_ids_fit(args.given, args.tokens, args.experts)) return Status::kBadShape;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    const std::int64_t slots = kMixerPicks * a.tokens, all = slots * a.experts;
    m.in(a.logits, a.tokens * a.experts).in(a.given, slots).in(a.draws, slots);
    m.out(r.chosen, slots).out(r.weights, slots).out(r.kept, all).out(r.probabilities, all);
    return m.run(&error_, [&] { return cuda::sparse_mixer(a, r, nullptr); });
  }
  template <class T>
  Status route_of(const RouteArgs<T>& args, const RouteResult<T>& result) {
    if (const Status s = check_route(args, result); s != Status::kOk) return s;
    if (!given_fits(args)) return Status::kBadShape;
    const std::lock_guard lock(mutex_);
    Staging m;
    auto a = args;
    auto r = result;
    m.in(a.logits, a.tokens * a.experts).in(a.correction_bias, a.experts);
    m.out(r.chosen, a.tokens * a.top_k).out(r.weights, a.tokens * a.top_k).out(r.runner_up, a.tokens);
    m.out(r.choice, a.tokens * a.experts);
    m.in(a.expert_scale, a.experts).in(a.given, a.tokens * a.top_k).in(a.always_logits, a.tokens * a.always);
    m.out(r.always_weights, a.tokens * a.always);
    return m.run(&error_, [&] { return cuda::route(a, r, nullptr); });
  }
  static Permutation placed(const Permutation& p, const RowShape& s, Staging& m) {
    Permutation d = p;
    d.offsets = nullptr;  // combine() asks for rows and slots alone
    m.both(d.slot_of_row, s.rows).both(d.row_of_slot, s.tokens * s.top_k);
    return d;
  }
  static void stage(ExpertLinear<double>* l, std::int64_t experts, std::int64_t inputs, std::int64_t outputs,
                    Staging& m) {
    m.in(l->weight, experts * outputs * inputs).in(l->bias, experts * outputs);
    m.in(l->lora_a, experts * l->rank * inputs).in(l->lora_b, experts * outputs * l->rank);
  }
  static void stage(ExpertWeights<double>* w, std::int64_t experts, const MoeLayerArgs<double>& a, std::int64_t rows,
                    ExpertState<double>* s, Staging& m) {
    if (w->width == 0) return;
    const std::int64_t first = first_outputs(a.form, w->width);
    stage(&w->gate_up, experts, a.hidden, first, m);
    stage(&w->down, experts, w->width, a.hidden, m);
    m.both(s->before, rows * first).both(s->activated, rows * w->width).both(s->out, rows * a.hidden);
    m.both(s->gate_up_low, rows * w->gate_up.rank).both(s->down_low, rows * w->down.rank);
  }
  static void stage(MoeLayerArgs<double>* a, MoeLayerState<double>* s, Staging& m) {
    const std::int64_t rows = rows_of(*a), slots = a->tokens * a->top_k;
    m.in(a->x, a->tokens * a->hidden).in(a->chosen, slots).in(a->place, slots).in(a->weights, slots);
    m.in(a->shared_gate, a->hidden);
    m.both(s->permutation.offsets, a->experts + 1).both(s->permutation.slot_of_row, rows);
    m.both(s->permutation.row_of_slot, slots).both(s->rows, rows * a->hidden);
    m.both(s->shared_offsets, 2).both(s->shared_weight, a->tokens);
    stage(&a->routed, a->experts, *a, rows, &s->routed, m);
    stage(&a->shared, 1, *a, a->tokens, &s->shared, m);
  }
  static void stage(const ExpertWeights<double>& w, std::int64_t experts, const MoeLayerArgs<double>& a,
                    ExpertLinearGradients<double>* gate_up, ExpertLinearGradients<double>* down, Staging& m) {
    const std::int64_t first = first_outputs(a.form, w.width);
    m.out(gate_up->weight, experts * first * a.hidden).out(gate_up->bias, experts * first);
    m.out(gate_up->lora_a, experts * w.gate_up.rank * a.hidden).out(gate_up->lora_b, experts * first * w.gate_up.rank);
    m.out(down->weight, experts * a.hidden * w.width).out(down->bias, experts * a.hidden);
    m.out(down->lora_a, experts * w.down.rank * w.width).out(down->lora_b, experts * a.hidden * w.down.rank);
  }

  std::string name_, error_;
  mutable std::mutex mutex_;
};

}  // namespace

std::unique_ptr<Backend> open_backend(std::string* why_not) {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  cudaDeviceProp properties{};
  if (error == cudaSuccess && devices > 0) error = cudaGetDeviceProperties(&properties, 0);
  if (error == cudaSuccess && devices > 0) return std::make_unique<CudaBackend>(properties.name);
  *why_not =
      std::string("no CUDA device: ") + (error != cudaSuccess ? cudaGetErrorString(error) : "the driver counts none");
  cudaGetLastError();  // the runtime keeps it otherwise
  return nullptr;
}

}  // namespace moeaudit::kernels::cuda

#include "audit/measures/routed_states.h"

#include <algorithm>

#include "audit/measures/measure.h"
#include "audit/measures/router_inputs.h"
#include "audit/measures/router_precision.h"
#include "audit/measures/router_replay.h"
#include "audit/traces/owned_tensors.h"
#include "kernels/host/router.h"

namespace moeaudit {
namespace {

namespace k = kernels;

constexpr std::int64_t kTokens = 1024;

/// One router, ready, and the states it gets.
struct RoutedLayer {
  Router router;
  const TensorView* states = nullptr;
  std::int64_t rows = 0;
  Aligned<double> packed;
  std::vector<double> linear_bias, correction_bias;
};

class StatesSource : public Trace::Source {
 public:
  StatesSource(const TensorStore& hidden_states, Routing routing, std::int64_t top_k)
      : inputs_(hidden_states, k::Float::kF32), routing_(std::move(routing)), top_k_(top_k) {}

  /// "" or why this router is left out.
  std::string add(Router router) {
    if (k::check_route(route_args<double>(routing_, router, top_k_), {}) != k::Status::kOk)
      return router.tensor + " does not fit the family's routing";
    auto layer = std::make_unique<RoutedLayer>();
    layer->states = inputs_.tensor_of(router.layer);
    if (layer->states) layer->rows = RouterInputs::rows_of(*layer->states, router.hidden);
    if (layer->rows == 0)
      return "the hidden states have no float tensor [tokens, " + std::to_string(router.hidden) + "] for " +
             router.tensor;
    layer->packed = Aligned<double>(k::packed_gate_size<double>(router.rows(), router.hidden));
    k::pack_gate(router.w.data(), router.rows(), router.hidden, layer->packed.data());
    layer->linear_bias.assign(router.linear_bias.begin(), router.linear_bias.end());
    layer->correction_bias.assign(router.correction_bias.begin(), router.correction_bias.end());
    layer->router = std::move(router);
    layers_.push_back(std::move(layer));
    return {};
  }
  void sort() {
    std::sort(layers_.begin(), layers_.end(),
              [](const auto& a, const auto& b) { return a->router.layer < b->router.layer; });
  }
  const std::vector<std::unique_ptr<RoutedLayer>>& layers() const { return layers_; }
  void run_on(std::shared_ptr<ReplayBackend> backend) { backend_ = std::move(backend); }

  void open(const MicroBatchRecord& record, MicroBatch* out, std::vector<WeightProblem>*) const override {
    const auto owner = std::make_shared<OwnedTensors>();
    for (const auto& layer : layers_) {
      const Router& r = layer->router;
      const std::int64_t first = record.micro_batch * kTokens, wanted = std::min(kTokens, layer->rows - first);
      if (wanted <= 0) continue;
      std::vector<float> x(static_cast<std::size_t>(wanted * r.hidden));
      const std::int64_t n = inputs_.fill(nullptr, layer->states, r.hidden, first, wanted, layer->rows, x.data());
      std::vector<double> logits(static_cast<std::size_t>(n * r.rows())), always(static_cast<std::size_t>(n * r.always)),
          weights(static_cast<std::size_t>(n * top_k_));
      std::vector<std::int32_t> chosen(weights.size());
      k::GateArgs<float, double> gate{x.data(),
                                      layer->packed.data(),
                                      layer->linear_bias.empty() ? nullptr : layer->linear_bias.data(),
                                      n,
                                      r.hidden,
                                      r.rows(),
                                      logits.data()};
      if (n == 0 || backend_->gate_logits(gate) != k::Status::kOk) continue;
      split_rows(r, n, logits.data(), always.data());
      logits.resize(static_cast<std::size_t>(n * r.experts));
      k::RouteArgs<double> route = route_args<double>(routing_, r, top_k_);
      route.logits = logits.data(), route.always_logits = always.data();
      route.tokens = n;
      route.correction_bias = layer->correction_bias.empty() ? nullptr : layer->correction_bias.data();
      if (route_by(*backend_, routing_, route, k::RouteResult<double>{chosen.data(), weights.data(), nullptr, nullptr},
                   k::Float::kF64) != k::Status::kOk) {
        continue;
      }
      LayerTensors l;
      l.layer = r.layer;
      l.experts = r.experts;
      l.top_k = top_k_;
      const std::string prefix = "layer." + std::to_string(r.layer) + ".";
      l.router_logits = owner->own(prefix + "router_logits", DType::kF64, {n, r.experts}, std::move(logits));
      l.selected_experts = owner->own(prefix + "selected_experts", DType::kI32, {n, top_k_}, std::move(chosen));
      l.routing_weights = owner->own(prefix + "routing_weights", DType::kF64, {n, top_k_}, std::move(weights));
      out->layers.push_back(std::move(l));
    }
    out->memory = owner;
  }

 private:
  RouterInputs inputs_;
  Routing routing_;
  std::int64_t top_k_;
  std::vector<std::unique_ptr<RoutedLayer>> layers_;
  std::shared_ptr<ReplayBackend> backend_;
};

}  // namespace

std::unique_ptr<Trace> route_hidden_states(FactSheet* facts, const TensorStore& model, const TensorStore& hidden_states,
                                           Device device, std::shared_ptr<ReplayBackend>* backend,
                                           std::vector<InputProblem>* problems) {
  const auto refuse = [&](std::string what, std::string remedy) {
    problems->push_back({model.files().empty() ? "" : model.files().front(), 0, 0, std::move(what), std::move(remedy)});
    return nullptr;
  };
  if (model.empty())
    return refuse("there are no weights, so no router", "give a model folder with *.safetensors, or a trace");
  if (hidden_states.empty()) {
    return refuse(
        "weights alone do not say what experts get",
        "give the routers' inputs with --hidden-states FILE (safetensors, [tokens, hidden]), or a recorded trace; dead, collapsed "
        "and duplicate experts that weights alone show are found by moe-audit check");
  }
  TensorStore none;
  std::vector<MeasureRecord> records;
  MeasureContext context{*facts, model, none, none, hidden_states, 1, true, {}, records};
  for (int i = 0; i < kNumMeasures; ++i) {
    if (kMeasures[i]->name == "header_scan") kMeasures[i]->run(context);
  }
  if (!facts->routers.known() || facts->routers.value().layer.empty())
    return refuse("no router was found in the weights", "give a model with routed experts");
  if (!facts->routing.known() || !facts->top_k.known()) {
    return refuse("how this family routes is not known: " + facts->routing.why_unknown(),
                  "give a model folder with config.json of a family that moe-audit knows");
  }
  auto source = std::make_unique<StatesSource>(hidden_states, facts->routing.value(), facts->top_k.value());
  TraceFacts t;
  t.format = "routed-hidden-states";
  t.path = t.head = model.files().front();
  t.model_type = facts->model_type.known() ? facts->model_type.value() : "";
  t.top_k = facts->top_k.value();
  std::int64_t rows = 0;
  for (std::size_t row = 0; row < facts->routers.value().layer.size(); ++row) {
    Router router;
    std::string fault = read_router(model, facts->routers.value(), facts->routing.value(), row, &router);
    if (fault.empty()) fault = source->add(std::move(router));
    if (!fault.empty()) problems->push_back({hidden_states.files().front(), 0, 0, fault, "this layer is left out"});
  }
  source->sort();
  double seconds = 0;
  for (const auto& layer : source->layers()) {
    TraceLayer known;
    known.layer = layer->router.layer;
    known.module = layer->router.tensor;
    known.experts = layer->router.experts;
    known.top_k = facts->top_k.value();
    known.logits_dtype = DType::kF64;
    t.layers.push_back(std::move(known));
    t.hidden_size = layer->router.hidden;
    rows = std::max(rows, layer->rows);
    seconds += static_cast<double>(layer->rows) * core_seconds_a_token({1, layer->router.experts, layer->router.hidden, 1, 0});
  }
  if (t.layers.empty()) return refuse("no router could be replayed", "see the problems above");
  context.device = device;
  *backend = std::make_shared<ReplayBackend>(context, seconds);
  source->run_on(*backend);
  t.note = "The routers in float64 on " + hidden_states.files().front() + ". ";
  std::vector<MicroBatchRecord> micro_batches;
  for (std::int64_t first = 0; first < rows; first += kTokens) {
    MicroBatchRecord r;
    r.micro_batch = first / kTokens;
    r.tokens = std::min(kTokens, rows - first);
    micro_batches.push_back(std::move(r));
  }
  return std::make_unique<Trace>(std::move(t), std::move(micro_batches), std::vector<StepRecord>(), std::move(source),
                                 problems);
}

}  // namespace moeaudit

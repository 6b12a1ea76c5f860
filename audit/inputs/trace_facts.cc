// What a recorded trace says of the run that it was recorded in: packages, training arguments, the model's config,
// experts. What was measured in it is for audit/measures.
#include <algorithm>

#include "audit/inputs/files.h"
#include "audit/inputs/readers.h"
#include "audit/traces/trace.h"

namespace moeaudit {
namespace {

class TraceStatements {
 public:
  TraceStatements(const TraceFacts& facts, Material* material) : facts_(facts), material_(*material) {}

  void state() {
    for (const auto& [package, version] : facts_.packages) {
      if (auto set = VersionSet::parse(version); set && set->exact) {
        material_.versions.push_back({package, std::move(*set), source("packages." + package)});
      }
    }
    integer("gradient_accumulation_steps", "training.gradient_accumulation_steps", facts_.accumulation);
    integer("per_device_train_batch_size", "training.micro_batch_size", facts_.micro_batch_size);
    integer("world_size", "training.world_size", facts_.world_size);
    // What these words mean is known of transformers' Trainer and what derives from it.
    if (facts_.framework.empty() || facts_.framework == "torch" || facts_.framework.starts_with("megatron")) return;
    flag("gradient_checkpointing", "training.gradient_checkpointing", facts_.gradient_checkpointing);
    flag("average_tokens_across_devices", "training.average_tokens_across_devices",
         facts_.average_tokens_across_devices);
    if (facts_.mixed_precision.empty()) return;
    flag("bf16", "training.mixed_precision", facts_.mixed_precision == "bf16");
    flag("fp16", "training.mixed_precision", facts_.mixed_precision == "fp16");
  }

 private:
  Source source(std::string key) const {
    Source s;
    s.role = Role::kTrace;
    s.file = facts_.head;
    s.key = std::move(key);
    return s;
  }
  void integer(const char* name, const char* key, std::optional<std::int64_t> value) {
    if (!value) return;
    Node n;
    n.kind = Node::Kind::kNumber;
    n.text = std::to_string(*value);
    material_.settings.push_back({name, std::move(n), source(key)});
  }
  void flag(const char* name, const char* key, std::optional<bool> value) {
    if (value) material_.settings.push_back({name, bool_node(*value, {}), source(key)});
  }

  const TraceFacts& facts_;
  Material& material_;
};

}  // namespace

void read_trace(const std::string& path, Material* material) {
  const std::shared_ptr<const Trace> trace = open_trace(path, {}, &material->problems);
  if (!trace) return;
  material->trace = trace;
  const TraceFacts& facts = trace->facts();
  TraceStatements(facts, material).state();
  if (facts.config.is_map() && material->configs.empty()) {
    read_model_config(facts.head, facts.config, Role::kCheckpointConfig, material);
  }
  // Of several adapters it does not say which one trained.
  if (facts.adapters.is_map() && facts.adapters.items.size() == 1 && facts.adapters.items[0].is_map())
    read_adapter_of_trace(facts.head, facts.adapters.items[0], material);
}

void read_rollout(const std::string& path, Material* material) {
  TraceOptions options;
  std::vector<InputProblem> problems;
  std::int64_t layers = 0;
  if (material->trace) {
    options.experts = material->trace->facts().experts.value_or(0);
    layers = static_cast<std::int64_t>(material->trace->facts().layers.size());
  }
  std::unique_ptr<Trace> trace = open_trace(path, options, &problems);
  // As many first as the trace has layers, and not so many in the middle: [layers, tokens, k].
  const auto tokens = [](const Trace& t) {
    std::int64_t n = 0;
    for (const MicroBatchRecord& m : t.micro_batches()) n += m.tokens;
    return n;
  };
  if (!trace || (static_cast<std::int64_t>(trace->facts().layers.size()) != layers && tokens(*trace) == layers)) {
    options.layers_first = true;
    std::vector<InputProblem> again;
    if (std::unique_ptr<Trace> turned = open_trace(path, options, &again);
        turned && static_cast<std::int64_t>(turned->facts().layers.size()) == layers)
      trace = std::move(turned), problems = std::move(again);
  }
  material->problems.insert(material->problems.end(), problems.begin(), problems.end());
  material->rollout = std::move(trace);
}

void resolve_trace(const Trace* trace, const std::string& path, const std::string& rollout, FactSheet* facts) {
  Source source;
  source.role = Role::kTrace;
  facts->rollout_given.set(!rollout.empty(), Origin::kAbsent, {Role::kCommandLine, "", 0, 0, "", "", ""});
  if (trace == nullptr) {
    if (path.empty())
      facts->trace_format.set("none", Origin::kAbsent, {Role::kCommandLine, "", 0, 0, "", "", ""});
    else
      facts->trace_format.explain_unknown(path + " could not be read");
    return;
  }
  const TraceFacts& t = trace->facts();
  source.file = t.head;
  facts->trace_format.set(t.format, Origin::kStated, source);
  if (t.expert_parallel) {
    source.key = "training.expert_parallel_size";
    facts->expert_parallel.set(*t.expert_parallel, Origin::kStated, source);
  }
  if (t.layers.empty()) return;
  source.key = "layers";
  // The product of a matrix is as narrow as its result; a wide one may have been widened.
  const DType dtype = t.layers[0].logits_dtype;
  const bool narrow = std::all_of(t.layers.begin(), t.layers.end(), [&](const TraceLayer& l) {
    return (dtype == DType::kBF16 || dtype == DType::kF16) && l.logits_dtype == dtype && l.weight_dtype == dtype;
  });
  if (narrow) facts->router_dtype.set_if_unknown(dtype, Origin::kMeasured, source);
  facts->has_moe.set_if_unknown(true, Origin::kMeasured, source);
  const bool alike = std::all_of(t.layers.begin(), t.layers.end(), [&](const TraceLayer& l) {
    return l.experts == t.layers[0].experts && l.top_k == t.layers[0].top_k;
  });
  if (!alike || t.note.starts_with("E = ")) return;  // E was supposed
  if (t.layers[0].experts > 0) facts->num_experts.set_if_unknown(t.layers[0].experts, Origin::kMeasured, source);
  if (t.layers[0].top_k > 0) facts->top_k.set_if_unknown(t.layers[0].top_k, Origin::kMeasured, source);
}

}  // namespace moeaudit

// The format of docs/trace.md: trace.json, records.jsonl, and one safetensors file a micro-batch and step.
#include <algorithm>
#include <array>
#include <filesystem>
#include <functional>

#include "audit/tensors/shard_index.h"
#include "audit/traces/fields.h"
#include "audit/traces/formats.h"
#include "audit/traces/line_reader.h"

namespace moeaudit {
namespace {

constexpr const char* kRemedy = "docs/trace.md says what a trace holds; record the run again";

// ---- trace.json ------------------------------------------------------------------------------------------------------

/// "torch.bfloat16" and "bfloat16" as torch names dtypes; kUnknown for others.
DType dtype_of(std::string_view name) {
  if (name.starts_with("torch.")) name.remove_prefix(6);
  constexpr std::array<std::pair<std::string_view, DType>, 6> kNames = {{{"float64", DType::kF64},
                                                                         {"float32", DType::kF32},
                                                                         {"bfloat16", DType::kBF16},
                                                                         {"float16", DType::kF16},
                                                                         {"float8_e4m3fn", DType::kF8E4M3},
                                                                         {"float8_e5m2", DType::kF8E5M2}}};
  for (const auto& [text, dtype] : kNames) {
    if (text == name) return dtype;
  }
  return DType::kUnknown;
}

class HeadReader {
 public:
  HeadReader(const std::string& file, std::vector<InputProblem>* problems) : file_(file), problems_(problems) {}

  bool read(TraceFacts* facts) {
    std::string text, error;
    if (!read_file(file_, &text, &error, std::size_t{64} << 20))
      return refuse(0, 0, error.substr(error.rfind(file_ + ": ", 0) == 0 ? file_.size() + 2 : 0));
    TextError where;
    std::vector<DuplicateKey> duplicates;
    Node root;
    if (!parse_json(text, &root, &duplicates, &where)) {
      return refuse(where.line, where.column, "JSON error: " + where.what);
    }
    if (!root.is_map()) return refuse(root.line, root.column, "is no JSON object");
    for (const DuplicateKey& d : duplicates) {
      problems_->push_back({file_, d.line, 0, "key " + d.path + " stands twice; the last one counts",
                            "delete one of the two", false});
    }
    Fields head = fields(root);
    std::string format;
    std::optional<std::int64_t> version;
    head.text("format", &format);
    head.integer("version", &version);
    if (format != "moe-audit-trace") return refuse(1, 1, "\"format\" is not \"moe-audit-trace\"");
    if (version != 1) {
      return refuse(1, 1, version ? "is a trace of version " + std::to_string(*version) + ", this moe-audit reads version 1"
                                  : "states no version of the format");
    }
    facts->format = format;
    recorder(head, facts);
    model(head, facts);
    training(head, facts);
    coefficients(head, facts);
    head.flag("output_router_logits", &facts->output_router_logits);
    if (const Node* map = head.map("adapters")) facts->adapters = *map;
    layers(head, facts);
    return ok_ && head.ok();
  }

 private:
  bool refuse(int line, int column, std::string what) {
    problems_->push_back({file_, line, column, std::move(what), kRemedy});
    return ok_ = false;
  }
  Fields fields(const Node& map) { return Fields(map, file_, 0, problems_); }

  void recorder(Fields& head, TraceFacts* facts) {
    if (const Node* map = head.map("recorder")) {
      Fields f = fields(*map);
      f.text("name", &facts->recorder);
      f.text("version", &facts->recorder_version);
      ok_ &= f.ok();
    }
    if (const Node* map = head.map("packages")) {
      for (std::size_t i = 0; i < map->keys.size(); ++i) {
        if (map->items[i].is_null()) continue;
        if (map->items[i].is_string()) facts->packages.emplace_back(map->keys[i], map->items[i].text);
        else head.refuse(map->items[i], "packages." + map->keys[i], "a version string");
      }
    }
  }

  void model(Fields& head, TraceFacts* facts) {
    const Node* map = head.map("model");
    if (!map) return;
    Fields f = fields(*map);
    f.text("model_type", &facts->model_type);
    f.text("class", &facts->model_class);
    f.integer("hidden_size", &facts->hidden_size, 1, std::int64_t{1} << 31);
    f.integer("num_experts", &facts->experts, 1, kMaxExperts);
    f.integer("top_k", &facts->top_k, 1, kMaxExperts);
    if (const Node* config = f.map("config")) facts->config = *config;
    ok_ &= f.ok();
  }

  void training(Fields& head, TraceFacts* facts) {
    const Node* map = head.map("training");
    if (!map) return;
    Fields f = fields(*map);
    constexpr std::int64_t kMost = std::int64_t{1} << 31;
    f.text("framework", &facts->framework);
    f.text("trainer", &facts->trainer);
    f.text("arguments_class", &facts->arguments_class);
    f.text("mixed_precision", &facts->mixed_precision);
    f.integer("gradient_accumulation_steps", &facts->accumulation, 1, kMost);
    f.integer("world_size", &facts->world_size, 1, kMost);
    f.integer("micro_batch_size", &facts->micro_batch_size, 1, kMost);
    f.integer("tensor_parallel_size", &facts->tensor_parallel, 1, kMost);
    f.integer("context_parallel_size", &facts->context_parallel, 1, kMost);
    f.integer("expert_parallel_size", &facts->expert_parallel, 1, kMost);
    f.integer("pipeline_parallel_size", &facts->pipeline_parallel, 1, kMost);
    f.flag("gradient_checkpointing", &facts->gradient_checkpointing);
    f.flag("model_accepts_loss_kwargs", &facts->accepts_loss_kwargs);
    f.flag("average_tokens_across_devices", &facts->average_tokens_across_devices);
    f.number("max_grad_norm", &facts->max_grad_norm);
    f.number("capacity_factor", &facts->capacity_factor);
    f.integer("min_capacity", &facts->min_capacity, 0, kMost);
    f.integer("capacity_alignment", &facts->capacity_alignment, 1, kMost);
    f.text("drop_policy", &facts->drop_policy);
    f.flag("routing_replayed", &facts->routing_replayed);
    ok_ &= f.ok();
  }

  void coefficients(Fields& head, TraceFacts* facts) {
    const Node* map = head.map("coefficients");
    if (!map) return;
    Fields f = fields(*map);
    f.number("router_aux_loss_coef", &facts->aux_coefficient);
    f.number("router_z_loss_coef", &facts->z_coefficient);
    f.number("bias_update_rate", &facts->bias_update_rate);
    f.flag("bias_update_centred", &facts->bias_update_centred);
    ok_ &= f.ok();
  }

  void dtype(Fields& f, std::string_view key, DType* out) {
    std::string name;
    f.text(key, &name);
    *out = dtype_of(name);
    const Node* node = f.find(key);
    if (node && node->is_string() && *out == DType::kUnknown) f.refuse(*node, key, "a dtype as torch names it (\"bfloat16\")");
  }

  void layers(Fields& head, TraceFacts* facts) {
    const Node* list = head.list("layers");
    if (!list) return;
    if (static_cast<std::int64_t>(list->items.size()) > kMaxTraceLayers) {
      refuse(list->line, list->column, "\"layers\" has " + std::to_string(list->items.size()) + " entries");
      return;
    }
    for (const Node& item : list->items) {
      if (!item.is_map()) {
        head.refuse(item, "layers", "a list of objects");
        continue;
      }
      Fields f = fields(item);
      std::optional<std::int64_t> number, experts = facts->experts, top_k = facts->top_k;
      TraceLayer layer;
      f.integer("layer", &number, 0, kMaxTraceLayers);
      f.integer("num_experts", &experts, 1, kMaxExperts);
      f.integer("top_k", &top_k, 1, kMaxExperts);
      f.text("module", &layer.module);
      f.text("class", &layer.class_name);
      dtype(f, "weight_dtype", &layer.weight_dtype);
      dtype(f, "logits_dtype", &layer.logits_dtype);
      f.flag("trainable", &layer.trainable);
      f.flag("lora", &layer.lora);
      f.flag("experts_trainable", &layer.experts_trainable);
      ok_ &= f.ok();
      if (!number) {
        refuse(item.line, item.column, "an entry of \"layers\" has no \"layer\"");
        continue;
      }
      layer.layer = static_cast<int>(*number);
      layer.experts = experts.value_or(0);
      layer.top_k = top_k.value_or(0);
      if (layer.experts > 0 && layer.top_k > layer.experts) {
        refuse(item.line, item.column, "layer " + std::to_string(layer.layer) + " chooses " + std::to_string(layer.top_k) +
                                           " of " + std::to_string(layer.experts) + " experts");
      }
      facts->layers.push_back(std::move(layer));
    }
    auto& all = facts->layers;
    std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.layer < b.layer; });
    const auto twice = std::adjacent_find(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.layer == b.layer; });
    if (twice != all.end()) refuse(list->line, list->column, "layer " + std::to_string(twice->layer) + " stands twice in \"layers\"");
  }

  const std::string& file_;
  std::vector<InputProblem>* problems_;
  bool ok_ = true;
};

// ---- records.jsonl ---------------------------------------------------------------------------------------------------

constexpr std::int64_t kMaxStep = std::int64_t{1} << 40;

class RecordsReader {
 public:
  RecordsReader(std::string file, std::vector<InputProblem>* problems) : file_(std::move(file)), list_(file_, problems) {}

  std::vector<MicroBatchRecord> micro_batches;
  std::vector<StepRecord> steps;

  void read(std::size_t most) {
    LineReader lines;
    std::string why;
    if (!lines.open(file_, &why)) return list_.add(0, 0, why, "a trace holds records.jsonl beside trace.json");
    std::string_view line;
    while (lines.next(&line)) {
      if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      Node root;
      TextError error;
      TextLimits limits;
      limits.max_nodes = 10'000;
      if (!parse_json(line, &root, nullptr, &error, limits)) {
        if (lines.complete()) list_.add(lines.number(), error.column, "JSON error: " + error.what, kRemedy);
        else list_.add(lines.number(), error.column, "the last line is cut short: the run ended while it was written; it is left out",
                       "nothing: the records before it are whole", false);
        continue;
      }
      take(root, lines.number());
      if (list_.count() >= kMaxTraceProblems) return;
      if (micro_batches.size() + steps.size() > most) {
        return list_.add(lines.number(), 0, "more than 4,000,000 records in the trace: the rest is left out", "split the trace");
      }
    }
    if (!lines.error().empty()) list_.add(lines.number(), 0, lines.error(), "make the file readable");
  }

 private:
  void take(const Node& root, int line) {
    std::vector<InputProblem> found;
    Fields f(root, file_, line, &found);
    std::string kind;
    if (!root.is_map()) return list_.add(line, 1, "is no JSON object", kRemedy);
    f.text("kind", &kind);
    if (kind == "micro_batch") micro_batch(f, line);
    else if (kind == "step") step(f, line);
    else list_.add(line, 1, "\"kind\" is \"" + kind.substr(0, 40) + "\", not \"micro_batch\" or \"step\"", kRemedy);
    for (InputProblem& p : found) list_.add(p.line, p.column, std::move(p.what), std::move(p.remedy));
  }

  /// The number, or a problem.
  bool need(Fields& f, std::string_view key, int line, std::int64_t* out, std::int64_t most = kMaxStep) {
    std::optional<std::int64_t> value;
    f.integer(key, &value, 0, most);
    if (!value && f.ok()) list_.add(line, 1, "the record has no \"" + std::string(key) + "\"", kRemedy);
    *out = value.value_or(0);
    return value.has_value();
  }

  bool file_name(Fields& f, int line, std::string* out) {
    f.text("file", out);
    if (out->empty() || (inside_folder(*out) && out->ends_with(".safetensors"))) return true;
    list_.add(line, 1, "names the file \"" + out->substr(0, 80) + "\", which is no .safetensors file inside the folder of the trace: not opened", kRemedy);
    return false;
  }

  void micro_batch(Fields& f, int line) {
    MicroBatchRecord r;
    r.line = line;
    std::optional<std::int64_t> rank = 0, tokens;
    if (!need(f, "step", line, &r.step) || !need(f, "micro_batch", line, &r.micro_batch)) return;
    f.integer("rank", &rank, 0, 1 << 24);
    f.integer("tokens", &tokens, 0, kMaxTokens);
    f.integer("sampled_tokens", &r.sampled_tokens, 0, kMaxTokens);
    f.integer("label_tokens", &r.label_tokens, 0, kMaxTokens);
    f.integer("num_items_in_batch", &r.num_items_in_batch, 0, kMaxTokens);
    f.flag("training", &r.training);
    f.number("loss", &r.loss);
    f.number("ce", &r.ce);
    f.number("aux_loss", &r.aux_loss);
    f.number("z_loss", &r.z_loss);
    f.number("returned_loss", &r.returned_loss);
    f.number("loss_grad", &r.loss_grad);
    f.flag("aux_loss_requires_grad", &r.aux_loss_requires_grad);
    f.number("aux_loss_grad", &r.aux_loss_grad);
    r.rank = *rank;
    r.tokens = tokens.value_or(0);
    if (const Node* batch = f.list("batch")) {
      const auto extent = [&](std::size_t i) {
        const auto n = i < batch->items.size() ? batch->items[i].as_int() : std::nullopt;
        return n && *n >= 0 && *n <= kMaxTokens ? *n : -1;
      };
      std::int64_t product = -1;
      r.sequences = extent(0);
      r.sequence_length = extent(1);
      if (batch->items.size() != 2 || r.sequences < 0 || r.sequence_length < 0 ||
          __builtin_mul_overflow(r.sequences, r.sequence_length, &product)) {
        f.refuse(*batch, "batch", "[sequences, tokens of each]");
      } else if (tokens && product != r.tokens) {
        list_.add(line, 1, "\"batch\" has " + std::to_string(product) + " tokens, \"tokens\" says " + std::to_string(r.tokens), kRemedy);
        return;
      }
      if (!tokens && product > 0) r.tokens = product;
    }
    if (r.sampled_tokens && r.tokens > 0 && *r.sampled_tokens > r.tokens) {
      list_.add(line, 1, "\"sampled_tokens\" is " + std::to_string(*r.sampled_tokens) + " of " + std::to_string(r.tokens) + " tokens", kRemedy);
      return;
    }
    if (file_name(f, line, &r.file) && f.ok()) micro_batches.push_back(std::move(r));
  }

  void step(Fields& f, int line) {
    StepRecord r;
    r.line = line;
    std::optional<std::int64_t> rank = 0;
    if (!need(f, "step", line, &r.step)) return;
    f.integer("rank", &rank, 0, 1 << 24);
    f.number("grad_norm", &r.grad_norm);
    f.number("learning_rate", &r.learning_rate);
    f.number("applied_grad_norm", &r.applied_grad_norm);
    f.number("clip_coefficient", &r.clip_coefficient);
    f.number("loss_scale", &r.loss_scale);
    f.integer("micro_batches", &r.micro_batches, 0, kMaxTokens);
    r.rank = *rank;
    if (const Node* reported = f.map("reported")) {
      for (std::size_t i = 0; i < reported->keys.size(); ++i) {
        if (const auto value = reported->items[i].as_double()) r.reported.emplace_back(reported->keys[i], *value);
      }
    }
    if (file_name(f, line, &r.file) && f.ok()) steps.push_back(std::move(r));
  }

  std::string file_;
  ProblemList list_;
};

// ---- tensors ---------------------------------------------------------------------------------------------------------

enum class Kind { kFloat, kInteger, kFlag };

bool is_of(Kind kind, DType d) {
  switch (d) {
    case DType::kF64:
    case DType::kF32:
    case DType::kBF16:
    case DType::kF16: return kind == Kind::kFloat;
    case DType::kI64:
    case DType::kI32:
    case DType::kI16: return kind == Kind::kInteger;
    case DType::kU8: return kind != Kind::kFloat;
    case DType::kBool: return kind == Kind::kFlag;
    default: return false;
  }
}

/// One extent of a shape: the number wanted (0: any, the first tensor decides) and what it is.
struct Extent {
  std::int64_t* size;
  const char* name;
};

class TensorTable {
 public:
  TensorTable(const TraceFacts& facts, std::shared_ptr<const TensorStore> store, std::string file,
              std::vector<WeightProblem>* problems)
      : facts_(facts), store_(std::move(store)), file_(std::move(file)), problems_(problems) {}

  void micro_batch(MicroBatch* out) {
    const MicroBatchRecord& record = *out->record;
    std::int64_t rows = record.sampled_tokens.value_or(0);
    whole("sampled", Kind::kInteger, {&rows, "sampled tokens"}, &out->sampled);
    if (out->sampled && !ascending(*out->sampled, record.tokens)) out->sampled.reset();
    if (rows == 0 && !record.sampled_tokens) rows = record.tokens;
    const Extent all{&rows, record.sampled_tokens || out->sampled ? "sampled tokens" : "tokens"};
    whole("token_mask", Kind::kFlag, all, &out->token_mask);
    whole("label_mask", Kind::kFlag, all, &out->label_mask);
    whole("token_loss", Kind::kFloat, all, &out->token_loss);
    each_layer([&](int number, const TraceLayer& known, const Find& find) {
      LayerTensors l;
      l.layer = number;
      l.experts = known.experts;
      l.top_k = known.top_k;
      std::int64_t hidden = facts_.hidden_size.value_or(0), seen = 0;
      take(find("seen"), Kind::kInteger, {Extent{&seen, "seen tokens"}}, &l.seen);
      if (l.seen && !ascending(*l.seen, rows)) return;  // nobody knows whose rows its tensors hold
      if (l.saw_nothing()) return out->layers.push_back(std::move(l));
      const Extent t = l.seen ? Extent{&seen, "seen tokens"} : all;
      const Extent e{&l.experts, "num_experts"}, k{&l.top_k, "top_k"}, d{&hidden, "hidden_size"};
      take(find("router_logits"), Kind::kFloat, {t, e}, &l.router_logits);
      take(find("returned_router_logits"), Kind::kFloat, {t, e}, &l.returned_router_logits);
      if (l.router_logits && known.logits_dtype != DType::kUnknown && l.router_logits->dtype != known.logits_dtype) {
        fault(*l.router_logits, std::string("holds ") + name_of(l.router_logits->dtype) + ", trace.json says " +
                                    name_of(known.logits_dtype));
        l.router_logits.reset();
      }
      take(find("hidden_states"), Kind::kFloat, {t, d}, &l.hidden_states);
      take(find("selected_experts"), Kind::kInteger, {t, k}, &l.selected_experts);
      take(find("routing_weights"), Kind::kFloat, {t, k}, &l.routing_weights);
      take(find("recomputed_selected_experts"), Kind::kInteger, {t, k}, &l.recomputed_selected_experts);
      take(find("dropped"), Kind::kFlag, {t, k}, &l.dropped);
      take(find("tokens_per_expert"), Kind::kInteger, {e}, &l.tokens_per_expert);
      take(find("logits_grad"), Kind::kFloat, {t, e}, &l.logits_grad);
      out->layers.push_back(std::move(l));
    });
    out->memory = store_;
  }

  void step(StepTensors* out) {
    each_layer([&](int number, const TraceLayer& known, const Find& find) {
      StepLayerTensors l;
      l.layer = number;
      std::int64_t experts = known.experts, hidden = facts_.hidden_size.value_or(0);
      const Extent e{&experts, "num_experts"}, d{&hidden, "hidden_size"};
      take(find("router_weight"), Kind::kFloat, {e, d}, &l.router_weight);
      take(find("router_grad"), Kind::kFloat, {e, d}, &l.router_grad);
      take(find("router_grad_ce"), Kind::kFloat, {e, d}, &l.router_grad_ce);
      take(find("router_grad_aux"), Kind::kFloat, {e, d}, &l.router_grad_aux);
      take(find("correction_bias_before"), Kind::kFloat, {e}, &l.correction_bias_before);
      take(find("correction_bias_after"), Kind::kFloat, {e}, &l.correction_bias_after);
      take(find("expert_grad_norm"), Kind::kFloat, {e}, &l.expert_grad_norm);
      take(find("expert_counter"), Kind::kInteger, {e}, &l.expert_counter);
      out->layers.push_back(std::move(l));
    });
    out->memory = store_;
  }

 private:
  using Find = std::function<const TensorView*(std::string_view)>;

  void fault(const TensorView& view, std::string what) {
    if (faults_++ < kMaxTraceProblems) problems_->push_back({file_, view.offset, std::string(view.name), std::move(what)});
  }

  /// f(number, what trace.json says, find) for every layer that the file names and trace.json knows, ascending.
  template <class F>
  void each_layer(F&& f) {
    std::vector<int> numbers;
    for (std::size_t i = 0; i < store_->size(); ++i) {
      const TensorView& view = (*store_)[i];
      if (!view.name.starts_with("layer.")) continue;
      const std::size_t dot = view.name.find('.', 6);
      const auto number = dot == std::string_view::npos ? std::nullopt : plain_number(view.name.substr(6, dot - 6));
      if (!number || *number > kMaxTraceLayers) {
        fault(view, "names no layer");
        continue;
      }
      if (numbers.empty() || numbers.back() != *number) numbers.push_back(static_cast<int>(*number));
    }
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
    for (const int number : numbers) {
      const std::string prefix = "layer." + std::to_string(number) + ".";
      const TraceLayer* known = facts_.layer(number);
      if (!known) {
        if (faults_++ < kMaxTraceProblems) {
          problems_->push_back({file_, -1, prefix + "*", "trace.json lists no layer " + std::to_string(number) + " in \"layers\""});
        }
        continue;
      }
      f(number, *known, Find([&](std::string_view name) { return store_->find(prefix + std::string(name)); }));
    }
  }

  void whole(std::string_view name, Kind kind, Extent extent, std::optional<TensorView>* out) {
    take(store_->find(name), kind, {extent}, out);
  }

  void take(const TensorView* view, Kind kind, std::initializer_list<Extent> shape, std::optional<TensorView>* out) {
    if (!view) return;
    if (!is_of(kind, view->dtype)) {
      constexpr const char* kWanted[] = {"F64, F32, BF16 or F16", "I64, I32, I16 or U8", "U8 or BOOL"};
      return fault(*view, "holds " + std::string(view->dtype_text) + ", not " + kWanted[static_cast<int>(kind)]);
    }
    bool fits = view->shape.size() == shape.size();
    std::size_t i = 0;
    for (const Extent& e : shape) fits = fits && (*e.size == 0 || view->shape[i] == *e.size) && view->shape[i++] >= 0;
    if (!fits) return fault(*view, wrong_shape(*view, shape));
    i = 0;
    for (const Extent& e : shape) *e.size = view->shape[i++];
    *out = *view;
  }

  static std::string wrong_shape(const TensorView& view, std::initializer_list<Extent> shape) {
    std::string is, wanted, names;
    for (const std::int64_t n : view.shape) is += (is.empty() ? "" : ", ") + std::to_string(n);
    for (const Extent& e : shape) {
      wanted += (wanted.empty() ? "" : ", ") + (*e.size == 0 ? std::string("any") : std::to_string(*e.size));
      names += (names.empty() ? "" : ", ") + std::string(e.name);
    }
    return "has shape [" + is + "], not [" + wanted + "] ([" + names + "])";
  }

  /// Token positions: ascending, each once, below `tokens`.
  bool ascending(const TensorView& view, std::int64_t tokens) {
    std::vector<std::int64_t> at(static_cast<std::size_t>(std::min<std::int64_t>(view.elements(), 1 << 16)));
    std::int64_t before = -1;
    for (std::int64_t first = 0; first < view.elements(); first += static_cast<std::int64_t>(at.size())) {
      const std::int64_t n = std::min(view.elements() - first, static_cast<std::int64_t>(at.size()));
      if (!read_counts(view, first, n, at.data())) {
        fault(view, "cannot be read");
        return false;
      }
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t value = at[static_cast<std::size_t>(i)];
        if (value <= before || (tokens > 0 && value >= tokens)) {
          fault(view, "position " + std::to_string(value) + " at index " + std::to_string(first + i) +
                          " is not after the one before it and below " + std::to_string(tokens) + " tokens");
          return false;
        }
        before = value;
      }
    }
    return true;
  }

  const TraceFacts& facts_;
  std::shared_ptr<const TensorStore> store_;
  std::string file_;
  std::vector<WeightProblem>* problems_;
  int faults_ = 0;
};

class FolderSource : public Trace::Source {
 public:
  FolderSource(std::string folder, const TraceFacts& facts) : folder_(std::move(folder)), facts_(facts) {}

  void open(const MicroBatchRecord& record, MicroBatch* out, std::vector<WeightProblem>* problems) const override {
    if (auto store = open_file(record.file, problems)) TensorTable(facts_, store, path(record.file), problems).micro_batch(out);
  }
  void open(const StepRecord& record, StepTensors* out, std::vector<WeightProblem>* problems) const override {
    if (auto store = open_file(record.file, problems)) TensorTable(facts_, store, path(record.file), problems).step(out);
  }

 private:
  std::string path(const std::string& file) const { return (std::filesystem::path(folder_) / file).string(); }
  std::shared_ptr<const TensorStore> open_file(const std::string& file, std::vector<WeightProblem>* problems) const {
    if (file.empty()) return nullptr;
    auto store = std::make_shared<const TensorStore>(TensorStore::open(path(file), "", problems));
    return store->empty() ? nullptr : store;
  }

  std::string folder_;
  TraceFacts facts_;
};

}  // namespace

std::unique_ptr<Trace> open_moe_audit_trace(const std::string& folder, std::vector<InputProblem>* problems) {
  const auto in = [&](const char* name) { return (std::filesystem::path(folder) / name).string(); };
  TraceFacts facts;
  facts.path = folder;
  facts.head = in("trace.json");
  if (!HeadReader(facts.head, problems).read(&facts)) return nullptr;
  std::vector<std::pair<std::int64_t, std::string>> files = {{0, in("records.jsonl")}};  // rank 0; each other rank has its own
  std::error_code ec;
  for (std::filesystem::directory_iterator it(folder, ec), end; !ec && it != end && files.size() < 100'000; it.increment(ec)) {
    if (const auto rank = numbered(it->path().filename().string(), "records_rank", ".jsonl")) {
      files.emplace_back(*rank, it->path().string());
    }
  }
  std::sort(files.begin(), files.end());
  std::vector<MicroBatchRecord> micro_batches;
  std::vector<StepRecord> steps;
  for (const auto& [rank, file] : files) {
    RecordsReader records(file, problems);
    records.read(kMaxRecords - std::min(kMaxRecords, micro_batches.size() + steps.size()));
    std::move(records.micro_batches.begin(), records.micro_batches.end(), std::back_inserter(micro_batches));
    std::move(records.steps.begin(), records.steps.end(), std::back_inserter(steps));
  }
  if (micro_batches.empty() && steps.empty()) {
    problems->push_back({in("records.jsonl"), 0, 0, "holds no record that can be used",
                         "record at least one step: the recorder writes a line after each micro-batch"});
    return nullptr;
  }
  auto source = std::make_unique<FolderSource>(folder, facts);
  return std::make_unique<Trace>(std::move(facts), std::move(micro_batches), std::move(steps), std::move(source), problems);
}

}  // namespace moeaudit

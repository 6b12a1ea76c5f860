// A recorded run, whatever wrote it: static facts, then steps, micro-batches and ranks, with their tensors one file at a
// time. The format is docs/trace.md; other formats (Megatron-LM, routed-experts arrays, plain counts) are read into the
// same types by files of their own in this folder.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/facts/finding.h"
#include "audit/facts/values.h"
#include "audit/tensors/tensor_store.h"
#include "audit/text/text.h"

namespace moeaudit {

/// One router of the model.
struct TraceLayer {
  int layer = 0;               // the number in the names of its tensors
  std::string module;          // "model.layers.0.mlp.gate"; "mtp.0.1" for a layer of a prediction head; may be empty
  std::string class_name;      // "MixtralTopKRouter"
  std::int64_t experts = 0;    // E; 0: unknown
  std::int64_t top_k = 0;      // k; 0: unknown
  DType weight_dtype = DType::kUnknown, logits_dtype = DType::kUnknown;
  std::optional<bool> trainable, lora, experts_trainable;
};

/// What trace.json says. Nothing in here is guessed: an empty string, nullopt or a null node is unknown.
struct TraceFacts {
  std::string format;  // "moe-audit-trace", "megatron-router-trace", "megatron-tokens-per-expert", "routed-experts",
                       // "expert-counts", "routed-hidden-states"
  std::string path;    // of the folder or file, as given
  std::string head;    // of trace.json (or of the one file), for places in messages
  std::string recorder, recorder_version;
  std::vector<std::pair<std::string, std::string>> packages;  // name, version; as written
  // model
  std::string model_type, model_class;
  std::optional<std::int64_t> hidden_size, experts, top_k;
  Node config;  // config.json of the model; a null node if it is not there
  // training
  std::string framework, trainer, arguments_class;  // class of the trainer's arguments: "SFTConfig"
  std::optional<std::int64_t> accumulation, world_size, micro_batch_size, tensor_parallel, context_parallel,
      expert_parallel, pipeline_parallel;
  std::string mixed_precision;  // "bf16", "fp16", "no"
  std::optional<bool> gradient_checkpointing, accepts_loss_kwargs, average_tokens_across_devices;
  std::optional<double> max_grad_norm;
  // capacity, where experts have one
  std::optional<double> capacity_factor;
  std::optional<std::int64_t> min_capacity, capacity_alignment;
  std::string drop_policy;  // "position", "choices", "probs", "batch_prioritised", "random"; docs/trace.md
  std::optional<bool> routing_replayed;  // the forward took the experts of a rollout instead of choosing
  Node adapters;                         // PEFT's, by name; a null node if the run trains none
  // coefficients
  std::optional<double> aux_coefficient, z_coefficient, bias_update_rate;
  std::optional<bool> bias_update_centred;  // the mean of the step, or of the bias, is taken from it
  std::optional<bool> output_router_logits;
  std::vector<TraceLayer> layers;  // in order of `layer`, each once
  std::string note;                // what a reader had to suppose: "E = 64: the largest expert id is 63"

  const TraceLayer* layer(int number) const;  // nullptr: not in the trace
};

/// One micro-batch on one rank, as records.jsonl states it. A number that was recorded as NaN is a NaN; nullopt was not
/// recorded.
struct MicroBatchRecord {
  std::int64_t step = 0, micro_batch = 0, rank = 0;
  std::string file;                               // beside trace.json; empty: scalars only
  std::int64_t tokens = 0;                        // rows of the batch, padding included; 0 unknown
  std::int64_t sequences = 0, sequence_length = 0;  // batch; 0 unknown. sequences * sequence_length == tokens
  std::optional<std::int64_t> sampled_tokens;     // rows of the per-token tensors, if fewer than tokens
  std::optional<bool> training;
  std::optional<std::int64_t> label_tokens, num_items_in_batch;
  /// loss: what the trainer back-propagated, after its own scaling; ce, aux_loss, z_loss: what the model reported;
  /// returned_loss: the model's output.loss.
  std::optional<double> loss, ce, aux_loss, z_loss, returned_loss;
  /// Gradient of the back-propagated loss with respect to what the model returned as loss and as aux_loss.
  std::optional<double> loss_grad, aux_loss_grad;
  std::optional<bool> aux_loss_requires_grad;  // false: it was computed and cannot train anything
  int line = 0;  // of records.jsonl (or of the file that the record came from)

  /// Rows of the per-token tensors of its layers.
  std::int64_t rows() const { return sampled_tokens.value_or(tokens); }
};

/// One optimizer step on one rank.
struct StepRecord {
  std::int64_t step = 0, rank = 0;
  std::string file;
  std::optional<double> grad_norm, learning_rate;  // grad_norm: as the trainer reported it
  std::optional<double> applied_grad_norm;         // of the gradients that the optimizer got, after clipping
  std::optional<double> clip_coefficient, loss_scale;
  std::optional<std::int64_t> micro_batches;       // that the recorder counted in this step
  std::vector<std::pair<std::string, double>> reported;  // what the trainer logged, under its own names
  int line = 0;

  std::optional<double> find(std::string_view name) const;  // in `reported`
};

/// The tensors of one layer in one micro-batch. Rows are tokens, batch x sequence flattened row by row, padding
/// included (or the tokens of MicroBatch::sampled); where a router saw only some of them, those. Each is absent, or has the shape and kind of dtype given here: that
/// was checked. Values were not: an id may be no expert, a logit no number.
struct LayerTensors {
  int layer = 0;
  std::int64_t experts = 0, top_k = 0;                  // E and k of this layer as its tensors have them; 0 unknown
  std::optional<TensorView> seen;                       // [n] integer, ascending: which of the micro-batch's rows are this layer's
  std::optional<TensorView> router_logits;              // [rows, E] float
  std::optional<TensorView> returned_router_logits;     // [rows, E] float: what the model returned, if it differs
  std::optional<TensorView> hidden_states;              // [rows, d] float: input of the router
  std::optional<TensorView> selected_experts;           // [rows, k] int16, int32, int64, uint8
  std::optional<TensorView> routing_weights;            // [rows, k] float
  std::optional<TensorView> recomputed_selected_experts;  // [rows, k] integer: second forward under checkpointing
  std::optional<TensorView> dropped;                    // [rows, k] uint8 or bool: 1 where the choice was dropped
  std::optional<TensorView> tokens_per_expert;          // [E] int64, over all tokens, also with sampling
  std::optional<TensorView> logits_grad;                // [rows, E] float

  std::int64_t rows(const MicroBatchRecord& m) const { return seen ? seen->shape[0] : m.rows(); }
  bool saw_nothing() const { return seen && seen->shape[0] == 0; }
};

/// The same for an optimizer step.
struct StepLayerTensors {
  int layer = 0;
  std::optional<TensorView> router_weight;                        // [E, d] float, before the update
  std::optional<TensorView> router_grad, router_grad_ce, router_grad_aux;  // [E, d] float
  std::optional<TensorView> correction_bias_before, correction_bias_after;  // [E] float
  std::optional<TensorView> expert_grad_norm;                     // [E] float
  std::optional<TensorView> expert_counter;                       // [E] integer: what the run itself counted
};

/// One micro-batch with its file open. Owns the memory that its views point into: keep it while you read, drop it before
/// you open the next, and a trace of any size needs the memory of one file (and that memory is file cache).
struct MicroBatch {
  const MicroBatchRecord* record = nullptr;  // lives in the Trace
  std::optional<TensorView> token_mask;      // [rows] uint8 or bool, 0 for padding
  std::optional<TensorView> label_mask;      // [rows] uint8 or bool: the label of the next token counts
  std::optional<TensorView> token_loss;      // [rows] float: cross-entropy of that label, 0 where it does not count
  std::optional<TensorView> sampled;         // [rows] integer: the tokens kept in per-token tensors, ascending
  std::vector<LayerTensors> layers;          // in order of `layer`; those with at least one tensor
  std::shared_ptr<const void> memory;

  const LayerTensors* layer(int number) const;
};

struct StepTensors {
  const StepRecord* record = nullptr;
  std::vector<StepLayerTensors> layers;
  std::shared_ptr<const void> memory;

  const StepLayerTensors* layer(int number) const;
};

/// Where the records of one step lie: micro_batches() [first_micro_batch, + micro_batches), ordered by micro-batch, then
/// rank; steps_on_ranks() [first_rank, + ranks), ordered by rank.
struct TraceStep {
  std::int64_t step = 0;
  std::size_t first_micro_batch = 0, micro_batches = 0;
  std::size_t first_rank = 0, ranks = 0;
};

/// A trace, open. Holds what trace.json and records.jsonl say (some hundred bytes a micro-batch); tensors stay on the
/// disk until open(). Reading is const; several threads may open micro-batches of one trace.
class Trace {
 public:
  /// One format: how the tensors of a record are found.
  class Source {
   public:
    virtual ~Source() = default;
    virtual void open(const MicroBatchRecord& record, MicroBatch* out, std::vector<WeightProblem>* problems) const = 0;
    virtual void open(const StepRecord&, StepTensors*, std::vector<WeightProblem>*) const {}
  };

  const TraceFacts& facts() const { return facts_; }
  /// For formats that do not say what model it is: its config.json.
  void take_model(std::string model_type, Node config) {
    facts_.model_type = std::move(model_type);
    facts_.config = std::move(config);
  }
  std::span<const TraceStep> steps() const { return steps_; }
  std::span<const MicroBatchRecord> micro_batches() const { return micro_batches_; }
  std::span<const StepRecord> steps_on_ranks() const { return step_records_; }
  std::span<const MicroBatchRecord> micro_batches_of(const TraceStep& s) const {
    return micro_batches().subspan(s.first_micro_batch, s.micro_batches);
  }
  std::span<const StepRecord> ranks_of(const TraceStep& s) const {
    return steps_on_ranks().subspan(s.first_rank, s.ranks);
  }

  /// Opens the file of a record. What is wrong with it (missing, cut short, a tensor of another shape or dtype than
  /// trace.json says) goes to `problems` with file, place and tensor; what is sound is there.
  MicroBatch open(const MicroBatchRecord& record, std::vector<WeightProblem>* problems) const;
  StepTensors open(const StepRecord& record, std::vector<WeightProblem>* problems) const;

  /// For readers of a format: takes the records in any order. Two records of one (step, micro-batch, rank) are a
  /// problem; the later one counts, as in a run that was resumed.
  Trace(TraceFacts facts, std::vector<MicroBatchRecord> micro_batches, std::vector<StepRecord> steps,
        std::unique_ptr<Source> source, std::vector<InputProblem>* problems);

 private:
  TraceFacts facts_;
  std::vector<MicroBatchRecord> micro_batches_;
  std::vector<StepRecord> step_records_;
  std::vector<TraceStep> steps_;
  std::unique_ptr<const Source> source_;
};

// ---- opening ---------------------------------------------------------------------------------------------------------

struct TraceOptions {
  std::int64_t experts = 0;   // E where the format does not say; 0: the largest id + 1, and `note` says so
  bool layers_first = false;  // a routed-experts array is [layers, tokens, k]; vLLM and SGLang write [tokens, layers, k]
};

/// What a path is, by the names in it and, for a JSON file, by its first keys. Reads at most 64 KiB.
enum class TraceFormat { kNone, kTrace, kMegatronRouterTrace, kMegatronCounts, kRoutedExperts, kExpertCounts };
TraceFormat recognise_trace(const std::string& path);

/// Opens a trace of any format; nullptr with a fatal problem (file, line, remedy) if there is nothing to be used. A
/// record that is not sound is left out, with a problem that is not fatal.
std::unique_ptr<Trace> open_trace(const std::string& path, const TraceOptions& options,
                                  std::vector<InputProblem>* problems);

// ---- reading values --------------------------------------------------------------------------------------------------
// Copies of parts of a view. False if the file became unreadable under the map (disk, network, somebody cut it short) or
// the part is not inside the tensor.

bool read_values(const TensorView& view, std::int64_t first, std::int64_t count, double* out);
bool read_values(const TensorView& view, std::int64_t first, std::int64_t count, float* out);
/// Integers of any width; one that int32 does not hold becomes INT32_MAX, which is no expert.
bool read_ids(const TensorView& view, std::int64_t first, std::int64_t count, std::int32_t* out);
bool read_counts(const TensorView& view, std::int64_t first, std::int64_t count, std::int64_t* out);
bool read_flags(const TensorView& view, std::int64_t first, std::int64_t count, std::uint8_t* out);  // 0 or 1

/// Gives back the memory of the pages that lie wholly inside the first `count` elements of the view.
void drop_pages(const TensorView& view, std::int64_t count);

}  // namespace moeaudit

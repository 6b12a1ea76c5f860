// Value types of facts that are more than a number or a word. Columns hold one row a layer, module or step and have
// one origin for the whole column (docs/architecture.md). All vectors of one column have equal length. Each struct has
// visit(self, f), which calls f("field", value) for every field in order: writers and test readers go through it.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace moeaudit {

// ---- words -------------------------------------------------------------------------------------------------------

enum class DType {
  kUnknown, kF64, kF32, kBF16, kF16, kF8E4M3, kF8E5M2, kF8E8M0, kF4, kF6E2M3, kF6E3M2,
  kI64, kI32, kI16, kI8, kU64, kU32, kU16, kU8, kBool, kC64,
};
/// safetensors spelling: "BF16", "F8_E4M3", ... ; "?" for kUnknown.
const char* name_of(DType dtype);

enum class Scoring { kSoftmax, kSigmoid, kSqrtSoftplus };          // what turns logits into scores
enum class Method { kFull, kLora, kQlora, kOtherAdapter };         // what is trained
/// kAutocast*: weights keep their dtype and torch.autocast lowers matmuls; kPure*: everything runs in that dtype.
enum class Precision { kFp32, kAutocastBf16, kAutocastFp16, kPureBf16, kPureFp16 };
/// What happens to the balance loss when output_router_logits resolves to true.
enum class AuxEffect { kAdded, kIgnored, kCrash, kKeywordOnly, kNoField };
/// How a family keeps its experts balanced while it is being fine-tuned with this stack.
enum class Balance { kAuxLoss, kBiasUpdate, kBiasFrozen, kNone };
/// Where a module of the network belongs.
enum class Part { kRouter, kRoutedExpert, kSharedExpert, kSharedExpertGate, kDenseMlp, kAttention, kEmbedding, kHead, kNorm, kOther };

/// How group-limited routing scores a group: best expert, sum of its two best, or no groups.
enum class GroupScore { kNone, kMax, kTop2Sum };

/// Why PEFT stops at an entry of the adapter configuration: it splits the string into letters (0.19 on transformers 5); a
/// parameter with dropout; half of a fused projection; anything else.
enum class TargetFault { kNone, kSplitString, kDropout, kLacksPartner, kElsewhere, kRefused };
/// How the shape of a tensor differs from the family's: its axes in another order; one axis divided by the same number in
/// every differing tensor (one rank of tensor parallelism); otherwise.
enum class ShapeFault { kOther, kTransposed, kSharded };
/// What is wrong with a pair of LoRA matrices: one is missing; they do not fit each other; another rank than configured;
/// another matrix than the model's; the stack's sides the way round that another PEFT release wants them.
enum class AdapterFault { kNoPair, kMisfit, kRank, kBaseShape, kStackOrder };

const char* name_of(Scoring v);
const char* name_of(GroupScore v);
const char* name_of(Method v);
const char* name_of(Precision v);
const char* name_of(AuxEffect v);
const char* name_of(Balance v);
const char* name_of(Part v);
const char* name_of(TargetFault v);
const char* name_of(ShapeFault v);
const char* name_of(AdapterFault v);

/// The routing conventions of a family, as its modelling code has them (order: logits, +linear bias, score, +correction
/// bias for selection only, group mask, top-k, gather, renormalise, scale).
struct Routing {
  Scoring scoring = Scoring::kSoftmax;
  bool score_after_top_k = false;     // top-k on logits, then the score of the k alone: gpt_oss softmax, llama4 sigmoid
  bool linear_bias = false;           // a bias that is part of the logits
  bool correction_bias = false;       // added to the scores for selection only
  GroupScore group_score = GroupScore::kNone;
  std::int64_t groups = 1, top_groups = 1;
  bool group_mask_is_zero = false;    // masked groups get 0.0 instead of -inf (transformers before 5.6, axk2)
  bool renormalise = false;
  double renormalise_eps = 0.0;       // added to the sum
  double renormalise_floor = 0.0;     // the sum is at least this (ernie4_5_moe)
  double renormalise_norm = 1.0;      // p: divided by their p-norm, of which 1 is the sum and infinity the largest (dbrx)
  double scaling = 1.0;
  double logit_softcap = 0.0;         // > 0: logits become cap tanh(logit / cap) first (laguna)
  bool sparse_mixer = false;          // two picks, each weighed by a softmax over what lies within 2 jitters of the best (phimoe)
  double mixer_jitter = 0.0;
  DType logits_dtype = DType::kUnknown;  // as written; kUnknown: the dtype of the activations
  DType scores_dtype = DType::kF32;      // dtype in which softmax/sigmoid runs
  bool scores_cast_back = false;         // the scores are rounded to the dtype of the activations before the choice
  std::string weight_tensor;             // "model.layers.{L}.mlp.gate.weight"
  std::string linear_bias_tensor;        // empty if none
  std::string correction_bias_tensor;    // empty if none
  std::string input_norm_tensor;         // RMSNorm weight in front of the MoE block, for the probe
  bool input_norm_adds_one = false;      // that norm multiplies by 1 + weight (zero-centred)
  bool input_norm_over_root = false;     // what it gives is divided by the root of the hidden size (gemma4)
  std::string expert_scale_tensor;       // [experts], multiplies the finished weights (gemma4); empty if none
  bool always_rows = false;              // the router's rows beyond the experts are experts that every token has: their scores
                                         // join the sum of renormalise (inkling)
  std::string global_scale_tensor;       // [1], multiplies every weight (inkling); empty if none

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("scoring", s.scoring);
    f("score_after_top_k", s.score_after_top_k);
    f("linear_bias", s.linear_bias);
    f("correction_bias", s.correction_bias);
    f("group_score", s.group_score);
    f("groups", s.groups);
    f("top_groups", s.top_groups);
    f("group_mask_is_zero", s.group_mask_is_zero);
    f("renormalise", s.renormalise);
    f("renormalise_eps", s.renormalise_eps);
    f("renormalise_floor", s.renormalise_floor);
    f("renormalise_norm", s.renormalise_norm);
    f("scaling", s.scaling);
    f("logit_softcap", s.logit_softcap);
    f("sparse_mixer", s.sparse_mixer);
    f("mixer_jitter", s.mixer_jitter);
    f("logits_dtype", s.logits_dtype);
    f("scores_dtype", s.scores_dtype);
    f("scores_cast_back", s.scores_cast_back);
    f("weight_tensor", s.weight_tensor);
    f("linear_bias_tensor", s.linear_bias_tensor);
    f("correction_bias_tensor", s.correction_bias_tensor);
    f("input_norm_tensor", s.input_norm_tensor);
    f("input_norm_adds_one", s.input_norm_adds_one);
    f("input_norm_over_root", s.input_norm_over_root);
    f("expert_scale_tensor", s.expert_scale_tensor);
    f("always_rows", s.always_rows);
    f("global_scale_tensor", s.global_scale_tensor);
  }
  bool softmax_over_chosen() const { return score_after_top_k && scoring == Scoring::kSoftmax; }
};

// ---- weights -----------------------------------------------------------------------------------------------------

/// One fault of a weight file (CK000). `offset` is a byte offset in `file`, -1 when it does not apply.
struct WeightProblem {
  std::string file;
  std::int64_t offset = -1;
  std::string tensor;  // empty: the file as a whole
  std::string what;    // "header length 9000000000 exceeds the file size 4096"

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("file", s.file);
    f("offset", s.offset);
    f("tensor", s.tensor);
    f("what", s.what);
  }
};

/// One row per MoE layer found in the tensor headers, whatever the on-disk layout.
struct RouterTable {
  std::vector<int> layer;
  std::vector<std::string> tensor;         // router weight, [experts, hidden], or the other way round where input_major says so
  std::vector<std::string> file;
  std::vector<DType> dtype;
  std::vector<std::int64_t> experts;       // of the router weight
  std::vector<std::int64_t> hidden;        // of the router weight, -1 if it is packed or the last matrix of an MLP
  std::vector<std::int64_t> expert_count;  // experts for which expert tensors exist in this layer
  std::vector<std::int64_t> expert_hidden; // hidden size as the expert tensors have it, -1 unknown (packed, or they disagree)
  std::vector<char> fused;                 // 1: one 3-D stack a layer; 0: one tensor an expert
  std::vector<std::string> bias;           // correction bias tensor, empty if none
  std::vector<char> input_major;           // 1: the router weight is stored [hidden, experts]

  bool is_input_major(std::size_t row) const { return row < input_major.size() && input_major[row] != 0; }

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("tensor", s.tensor);
    f("file", s.file);
    f("dtype", s.dtype);
    f("experts", s.experts);
    f("hidden", s.hidden);
    f("expert_count", s.expert_count);
    f("expert_hidden", s.expert_hidden);
    f("fused", s.fused);
    f("bias", s.bias);
    f("input_major", s.input_major);
  }
};

/// One row per router tensor (weight, linear bias, correction bias) whose values were read.
struct RouterValues {
  std::vector<int> layer;
  std::vector<std::string> tensor;
  std::vector<std::string> file;
  std::vector<char> is_buffer;               // correction bias and other buffers
  std::vector<std::int64_t> non_finite;      // count of NaN and infinities
  std::vector<std::int64_t> first_index;     // flat index of the first one, -1 if none
  std::vector<std::int64_t> zero_rows;       // rows that are exactly zero
  std::vector<std::int64_t> first_zero_row;  // -1 if none

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("tensor", s.tensor);
    f("file", s.file);
    f("is_buffer", s.is_buffer);
    f("non_finite", s.non_finite);
    f("first_index", s.first_index);
    f("zero_rows", s.zero_rows);
    f("first_zero_row", s.first_zero_row);
  }
};

/// One row per unit of the full weight scan: a tensor, or one expert's slice of a fused stack. Sums run in float64 over
/// the finite values in a fixed order (docs/architecture.md, "Deterministic"). Quantised tensors with their scales at
/// hand are scanned as the values they stand for. What holds no values (codes that cannot be decoded, indices) has a hash
/// only: non_finite and zeros are 0, min, max and both sums NaN. Side tensors whose scales went into the values of another
/// tensor have no row.
struct WeightScan {
  std::vector<std::string> tensor;
  std::vector<std::string> file;
  std::vector<DType> dtype;               // as stored
  std::vector<Part> part;
  std::vector<int> layer, expert;         // -1 none
  std::vector<std::string> projection;    // the name without layer and expert: "model.layers.{L}.mlp.experts.{e}.up_proj.weight"
  std::vector<std::int64_t> first;        // flat index, in the tensor, of the unit's first element
  std::vector<std::int64_t> elements;
  std::vector<std::int64_t> columns;      // length of a row of values: the last dimension; 0 if there are no values
  std::vector<std::int64_t> non_finite;   // NaN and infinities
  std::vector<std::int64_t> first_index;  // flat index, in the tensor, of the first one; -1 if none
  std::vector<std::int64_t> zeros;        // exact zeros of either sign
  std::vector<double> min, max;           // over the finite values; NaN if there is none
  std::vector<double> sum, sum_of_squares;
  std::vector<std::string> hash;          // 64 bits of the stored bytes (of the values if quantised), 16 hex digits

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("tensor", s.tensor);
    f("file", s.file);
    f("dtype", s.dtype);
    f("part", s.part);
    f("layer", s.layer);
    f("expert", s.expert);
    f("projection", s.projection);
    f("first", s.first);
    f("elements", s.elements);
    f("columns", s.columns);
    f("non_finite", s.non_finite);
    f("first_index", s.first_index);
    f("zeros", s.zeros);
    f("min", s.min);
    f("max", s.max);
    f("sum", s.sum);
    f("sum_of_squares", s.sum_of_squares);
    f("hash", s.hash);
  }
};

/// One row per row of every router weight (one expert's vector), from the full scan or from the routers alone.
struct RouterRows {
  std::vector<int> layer, expert;
  std::vector<std::string> tensor;
  std::vector<std::string> file;
  std::vector<std::int64_t> elements, non_finite, zeros;
  std::vector<double> min, max, sum, sum_of_squares;
  std::vector<std::string> hash;          // 64 bits of the stored bytes of the row, 16 hex digits

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("expert", s.expert);
    f("tensor", s.tensor);
    f("file", s.file);
    f("elements", s.elements);
    f("non_finite", s.non_finite);
    f("zeros", s.zeros);
    f("min", s.min);
    f("max", s.max);
    f("sum", s.sum);
    f("sum_of_squares", s.sum_of_squares);
    f("hash", s.hash);
  }
};

/// One row per matrix of a routed expert, from a block of it (audit/measures/stable_ranks.cc).
struct StableRanks {
  std::vector<int> layer, expert;
  std::vector<std::string> tensor;
  std::vector<std::string> file;
  std::vector<std::string> projection;      // as in WeightScan
  std::vector<std::int64_t> rows, columns;  // of the block
  std::vector<double> stable_rank;          // |W|_F^2 / |W|_2^2 of the block; never too small

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("expert", s.expert);
    f("tensor", s.tensor);
    f("file", s.file);
    f("projection", s.projection);
    f("rows", s.rows);
    f("columns", s.columns);
    f("stable_rank", s.stable_rank);
  }
};

/// Names the family expects and the files do not have, and the other way round. Tied weights are not listed.
struct TensorDiff {
  std::vector<std::string> missing;
  std::vector<std::string> missing_shard;    // shard file the index names for it; empty if the index does not know it
  std::vector<std::string> unexpected;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("missing", s.missing);
    f("missing_shard", s.missing_shard);
    f("unexpected", s.unexpected);
  }
};

/// One row per tensor whose shape is not the family's at the sizes of the config. Vocabulary rows, packed (quantised) bytes
/// and prediction layers are not judged.
struct ShapeTable {
  std::vector<std::string> tensor;
  std::vector<std::string> file;
  std::vector<std::string> pattern;       // the family's name for it, "model.layers.{L}.mlp.gate.weight"
  std::vector<Part> part;
  std::vector<std::string> expected;      // "[8, 128, 64]"; "?" where the family leaves a size open
  std::vector<std::string> found;
  std::vector<ShapeFault> fault;
  std::int64_t divisor = 0;               // kSharded: by how much
  std::int64_t judged = 0;                // tensors that were compared

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("tensor", s.tensor);
    f("file", s.file);
    f("pattern", s.pattern);
    f("part", s.part);
    f("expected", s.expected);
    f("found", s.found);
    f("fault", s.fault);
    f("divisor", s.divisor);
    f("judged", s.judged);
  }
};

/// One row per correction bias (added to the scores for the choice of experts only).
struct CorrectionBias {
  std::vector<int> layer;
  std::vector<std::string> tensor;
  std::vector<std::string> file;
  std::vector<DType> dtype;               // as stored
  std::vector<std::int64_t> elements, zeros;
  std::vector<std::int64_t> distinct;     // different values
  std::vector<std::int64_t> off_bf16;     // values that bfloat16 does not have
  std::vector<std::int64_t> off_fp16;
  std::vector<double> max_abs;
  std::vector<double> bf16_spacing;       // distance of neighbours in bfloat16 at max_abs
  std::vector<double> fp16_spacing;
  bool kept_fp32 = false;                 // the family keeps it in float32

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("tensor", s.tensor);
    f("file", s.file);
    f("dtype", s.dtype);
    f("elements", s.elements);
    f("zeros", s.zeros);
    f("distinct", s.distinct);
    f("off_bf16", s.off_bf16);
    f("off_fp16", s.off_fp16);
    f("max_abs", s.max_abs);
    f("bf16_spacing", s.bf16_spacing);
    f("fp16_spacing", s.fp16_spacing);
    f("kept_fp32", s.kept_fp32);
  }
};

/// How the weights of routed experts lie in the files: one row per stored dtype. Scales and other side tensors of a
/// quantiser are not counted.
struct ExpertStorage {
  std::vector<DType> dtype;
  std::vector<std::int64_t> tensors;
  std::vector<std::int64_t> elements;     // of the stored type: packed 4-bit weights hold two to a byte
  std::vector<std::int64_t> bytes;
  std::vector<std::string> example;       // name of the first

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("dtype", s.dtype);
    f("tensors", s.tensors);
    f("elements", s.elements);
    f("bytes", s.bytes);
    f("example", s.example);
  }
};

// ---- a recorded trace ------------------------------------------------------------------------------------------------

/// One row per layer of a trace (docs/health.md defines the numbers). NaN: not in the trace.
struct TraceLoads {
  std::vector<int> layer;
  std::vector<std::string> module;             // may be empty
  std::vector<std::int64_t> experts, top_k;    // top_k 0: unknown
  std::vector<std::int64_t> tokens;            // without padding
  std::vector<double> fair_share;              // choices an expert
  std::vector<double> max_violation;           // all tokens together
  std::vector<double> max_violation_floor;     // of an even router in so few tokens
  std::vector<double> low, high;               // 95 % interval of max_violation
  std::vector<double> normalised_entropy;
  std::vector<std::int64_t> idle, below_tenth; // experts with no choice; with under a tenth of the fair share
  std::vector<std::string> idle_experts;       // which: "3-5, 12"
  std::vector<char> can_judge;                 // fair_share >= 100
  std::vector<char> idle_is_dead;              // an expert with a tenth of the fair share would hardly be idle
  std::vector<double> off_the_top_k;           // share of tokens whose choice is not the top k of the logits
  std::vector<double> near_ties_bf16;          // share of tokens that rounding the logits to bfloat16 may move
  std::vector<double> non_finite;              // share of tokens with a NaN or infinite logit
  std::vector<double> recompute_changed;       // share of tokens with other experts in the second forward
  std::vector<double> dropped;                 // share of choices
  std::vector<double> busiest_rank;            // load of the busiest expert-parallel rank / mean of the ranks
  double straggler_factor = std::numeric_limits<double>::quiet_NaN();  // of these ranks, over all layers

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("module", s.module);
    f("experts", s.experts);
    f("top_k", s.top_k);
    f("tokens", s.tokens);
    f("fair_share", s.fair_share);
    f("max_violation", s.max_violation);
    f("max_violation_floor", s.max_violation_floor);
    f("low", s.low);
    f("high", s.high);
    f("normalised_entropy", s.normalised_entropy);
    f("idle", s.idle);
    f("below_tenth", s.below_tenth);
    f("idle_experts", s.idle_experts);
    f("can_judge", s.can_judge);
    f("idle_is_dead", s.idle_is_dead);
    f("off_the_top_k", s.off_the_top_k);
    f("near_ties_bf16", s.near_ties_bf16);
    f("non_finite", s.non_finite);
    f("recompute_changed", s.recompute_changed);
    f("dropped", s.dropped);
    f("busiest_rank", s.busiest_rank);
    f("straggler_factor", s.straggler_factor);
  }
};

// ---- router precision ----------------------------------------------------------------------------------------------

/// One row per router and mode. Share = tokens whose selected expert set differs from the float64 truth / tokens.
struct PrecisionTable {
  std::vector<int> layer;
  std::vector<std::string> tensor;
  std::vector<std::string> mode;         // "fp32", "bf16", "fp16", "executed", "nf4", "int8"; of the correction bias alone:
                                         // "bias bf16", "bias fp16" (rounded), "bias bf16 lost", "bias fp16 lost" (moved by
                                         // what a rounding in the past may have taken)
  std::vector<std::int64_t> tokens;
  std::vector<double> flipped;           // share of tokens with another expert set
  std::vector<double> low, high;         // 95 % Wilson interval of `flipped`
  std::vector<double> near_ties;         // share of tokens whose k-th and (k+1)-th score differ by less than the rounding
  std::vector<double> weight_error;      // largest absolute error of a routing weight, over tokens with equal sets
  std::vector<double> max_abs_logit;     // float64 truth
  std::vector<std::int64_t> overflowed;  // logits that are non-finite in this mode and finite in float64
  std::string input;                     // "hidden states FILE" or "probe: seeded unit Gaussian through the norm weight"
  bool probe = true;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("tensor", s.tensor);
    f("mode", s.mode);
    f("tokens", s.tokens);
    f("flipped", s.flipped);
    f("low", s.low);
    f("high", s.high);
    f("near_ties", s.near_ties);
    f("weight_error", s.weight_error);
    f("max_abs_logit", s.max_abs_logit);
    f("overflowed", s.overflowed);
    f("input", s.input);
    f("probe", s.probe);
  }
};

// ---- adapters ------------------------------------------------------------------------------------------------------

/// One row per module (or parameter) that the adapter reaches, resolved under the pinned PEFT and transformers.
struct AdapterModules {
  std::vector<std::string> module;     // path in memory
  std::vector<Part> part;
  std::vector<int> layer;              // -1 outside layers
  std::vector<int> expert;             // -1 unless one expert's module; fused stacks have -1
  std::vector<std::int64_t> rank;      // 0: the module is trained whole (modules_to_save)
  std::vector<std::int64_t> in, out;   // matrix size; 0 unknown
  std::vector<std::int64_t> copies;    // E for a fused stack, else 1
  std::vector<std::int64_t> adapter_parameters;
  std::vector<std::int64_t> base_parameters;
  std::vector<char> by_parameter;      // 1: through target_parameters

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("module", s.module);
    f("part", s.part);
    f("layer", s.layer);
    f("expert", s.expert);
    f("rank", s.rank);
    f("in", s.in);
    f("out", s.out);
    f("copies", s.copies);
    f("adapter_parameters", s.adapter_parameters);
    f("base_parameters", s.base_parameters);
    f("by_parameter", s.by_parameter);
  }
};

/// One row per entry of target_modules / target_parameters / modules_to_save as the user wrote it.
struct AdapterTargets {
  std::vector<std::string> entry;
  std::vector<std::string> field;       // "target_modules", "target_parameters", "modules_to_save", "exclude_modules"
  std::vector<std::int64_t> hits;       // modules reached under the best case of the version set
  std::vector<std::string> reaches;     // "attention 16, router 4"; empty if nothing
  std::vector<char> names_experts;      // the entry is a name of routed-expert projections (w1, gate_proj, experts...)
  std::vector<std::string> file;        // where the user wrote it
  std::vector<int> line;                // in `file`; 0 unknown
  std::vector<char> certain;            // 1: the same hits under every version of the set
  std::vector<std::string> why;         // why nothing is reached, or why PEFT stops at this entry; may be empty
  std::vector<TargetFault> fault;       // PEFT stops at this entry under every version of the set; kElsewhere: nobody knows what it reaches
  std::vector<std::string> partner;     // kLacksPartner: the entry that has to stand beside this one

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("entry", s.entry);
    f("field", s.field);
    f("hits", s.hits);
    f("reaches", s.reaches);
    f("names_experts", s.names_experts);
    f("file", s.file);
    f("line", s.line);
    f("certain", s.certain);
    f("why", s.why);
    f("fault", s.fault);
    f("partner", s.partner);
  }
};

/// One row per adapted module found in adapter_model.safetensors.
struct AdapterTensors {
  std::vector<std::string> module;
  std::vector<Part> part;
  std::vector<int> layer;
  std::vector<int> expert;              // -1 unless one expert's; for a fused stack one row per expert slice
  std::vector<std::int64_t> rank;
  std::vector<std::int64_t> in, out;    // columns of A, rows of B
  std::vector<double> norm_a, norm_b;   // Frobenius norms, float64
  std::vector<double> norm_ba;          // of the product B A, without the scale
  std::vector<double> scale;            // alpha / r, or alpha / sqrt(r) with rsLoRA; NaN if alpha is not known
  std::vector<char> b_zero;             // B is exactly zero
  std::vector<std::int64_t> non_finite;
  std::vector<std::string> bad_tensor;  // the tensor with the first of them
  std::vector<std::int64_t> bad_index;  // its flat index there; -1 none

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("module", s.module);
    f("part", s.part);
    f("layer", s.layer);
    f("expert", s.expert);
    f("rank", s.rank);
    f("in", s.in);
    f("out", s.out);
    f("norm_a", s.norm_a);
    f("norm_b", s.norm_b);
    f("norm_ba", s.norm_ba);
    f("scale", s.scale);
    f("b_zero", s.b_zero);
    f("non_finite", s.non_finite);
    f("bad_tensor", s.bad_tensor);
    f("bad_index", s.bad_index);
  }
};

/// One row per adapted module of adapter_model.safetensors whose matrices do not fit.
struct AdapterLayout {
  std::vector<std::string> module;
  std::vector<Part> part;
  std::vector<int> layer;
  std::vector<AdapterFault> fault;
  std::vector<std::string> tensor;      // A, or B where there is no A
  std::vector<std::string> found;       // "A [16, 64], B [32, 16]"
  std::vector<std::string> expected;
  std::string stack_order;              // kStackOrder: what the releases in question want, "PEFT 0.19 or later: A [E x r, in]"
  bool loads_silently = false;          // kStackOrder: square stacks, which load and are applied transposed
  std::int64_t judged = 0;              // modules that were compared with the model
  std::int64_t found_total = 0;         // modules in the file

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("module", s.module);
    f("part", s.part);
    f("layer", s.layer);
    f("fault", s.fault);
    f("tensor", s.tensor);
    f("found", s.found);
    f("expected", s.expected);
    f("stack_order", s.stack_order);
    f("loads_silently", s.loads_silently);
    f("judged", s.judged);
    f("found_total", s.found_total);
  }
};

/// One row per pattern of parameter names to train (Axolotl's unfrozen_parameters).
struct UnfrozenTargets {
  std::vector<std::string> pattern;
  std::vector<int> line;                // where the user wrote it; 0 unknown
  std::vector<std::int64_t> hits;       // parameters reached under the best case of the version set
  std::vector<std::string> reaches;     // "router 32, routed_expert 512"; empty if nothing
  std::vector<std::string> anywhere;    // nothing is reached: a parameter that holds the pattern further on; may be empty
  std::vector<std::string> why;         // why the pattern could not be tried; may be empty

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("pattern", s.pattern);
    f("line", s.line);
    f("hits", s.hits);
    f("reaches", s.reaches);
    f("anywhere", s.anywhere);
    f("why", s.why);
  }
};

// ---- two models of one lineage: a base and what was trained from it ------------------------------------------------------

/// What training changed: one row per router tensor, one per routed expert (all its matrices), and one for each other part
/// of the network as a whole. A base stored in a wider dtype is first rounded to the dtype of the trained tensor: what the
/// save alone did is no change. Norms are Frobenius norms in float64.
struct BaseChanges {
  std::vector<Part> part;
  std::vector<int> layer, expert;          // -1 none
  std::vector<std::string> tensor;         // of the trained model; the first one of several
  std::vector<std::string> file;
  std::vector<char> is_buffer;             // correction bias
  std::vector<std::int64_t> tensors;
  std::vector<std::int64_t> elements;
  std::vector<std::int64_t> changed;       // elements with another value
  std::vector<double> base_norm;
  std::vector<double> change_norm;         // ||W1 - W0||
  std::vector<double> along;               // cosine of W1 - W0 and W0; -1: only shrunk; 0 where nothing changed

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("part", s.part);
    f("layer", s.layer);
    f("expert", s.expert);
    f("tensor", s.tensor);
    f("file", s.file);
    f("is_buffer", s.is_buffer);
    f("tensors", s.tensors);
    f("elements", s.elements);
    f("changed", s.changed);
    f("base_norm", s.base_norm);
    f("change_norm", s.change_norm);
    f("along", s.along);
  }
};

/// One row per router: how many of the base's choices the trained router still makes on the same inputs, each router
/// behind the norm of its own model. kept = mean over tokens of |S0 and S1| / k.
struct RoutingKept {
  std::vector<int> layer;
  std::vector<std::string> tensor;
  std::vector<std::int64_t> tokens;
  std::vector<double> kept;
  std::vector<double> low, high;           // 95 % interval of `kept`: mean +- 1.96 standard errors
  std::vector<double> same;                // share of tokens with the same expert set
  std::vector<double> chance;              // k / E: what independent uniform choices would keep
  std::string input;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("tensor", s.tensor);
    f("tokens", s.tokens);
    f("kept", s.kept);
    f("low", s.low);
    f("high", s.high);
    f("same", s.same);
    f("chance", s.chance);
    f("input", s.input);
  }
};

/// How tensors of a part are stored in the two models: one row per part and pair of dtypes.
struct DTypePairs {
  std::vector<Part> part;
  std::vector<DType> base, trained;
  std::vector<std::int64_t> tensors;
  std::vector<std::string> first;          // name of the first one
  std::vector<std::string> file;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("part", s.part);
    f("base", s.base);
    f("trained", s.trained);
    f("tensors", s.tensors);
    f("first", s.first);
    f("file", s.file);
  }
};

/// One row per correction bias of the base.
struct BiasChanges {
  std::vector<int> layer;
  std::vector<std::string> tensor;
  std::vector<std::string> file;           // of the trained model
  std::vector<char> present;               // the trained model has it
  std::vector<std::int64_t> elements;
  std::vector<std::int64_t> base_non_zero, non_zero, changed;  // against the base as stored, unrounded
  std::vector<std::string> rounded_to;     // "BF16", "F16": the base rounded to it is the trained one; "" otherwise
  std::vector<double> largest_change;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("tensor", s.tensor);
    f("file", s.file);
    f("present", s.present);
    f("elements", s.elements);
    f("base_non_zero", s.base_non_zero);
    f("non_zero", s.non_zero);
    f("changed", s.changed);
    f("rounded_to", s.rounded_to);
    f("largest_change", s.largest_change);
  }
};

/// Keys of config.json that say how the MoE works and that the two models do not share. `effect`: "routing" (what a token
/// is computed by), "training" (the balance loss), "shape"; "chosen" where the training config itself overrides the key.
struct ConfigChanges {
  std::vector<std::string> key, base, trained, effect;
  std::vector<int> base_line, line;        // 0: a default
  std::string base_file, file;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("key", s.key);
    f("base", s.base);
    f("trained", s.trained);
    f("effect", s.effect);
    f("base_line", s.base_line);
    f("line", s.line);
    f("base_file", s.base_file);
    f("file", s.file);
  }
};

/// Is the trained model the base with the adapter merged in? One row per adapted matrix (per expert of a stack), and one per
/// other tensor that differs although no adapter reaches it (rank 0).
struct MergeTable {
  std::vector<std::string> module;
  std::vector<Part> part;
  std::vector<int> layer, expert;          // -1 none
  std::vector<std::string> tensor;         // in the merged model
  std::vector<std::string> file;
  std::vector<std::int64_t> rank;
  std::vector<std::int64_t> elements;
  std::vector<std::int64_t> outside;       // elements that no rounding of base + scale B A explains
  std::vector<double> worst;               // largest |M - W - scale B A| over its bound
  std::vector<double> scale;               // that the adapter's configuration asks for
  std::vector<double> fitted;              // <M - W, B A> / ||B A||^2
  std::vector<double> residual;            // ||M - W - fitted B A|| / ||M - W||; 0 where nothing changed
  std::vector<std::string> form;           // "": as it should be; "scale alpha / sqrt(r)", "twice", "none", "unknown", ...
  std::int64_t unadapted = 0;              // tensors without an adapter that were compared with the base

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("module", s.module);
    f("part", s.part);
    f("layer", s.layer);
    f("expert", s.expert);
    f("tensor", s.tensor);
    f("file", s.file);
    f("rank", s.rank);
    f("elements", s.elements);
    f("outside", s.outside);
    f("worst", s.worst);
    f("scale", s.scale);
    f("fitted", s.fitted);
    f("residual", s.residual);
    f("form", s.form);
    f("unadapted", s.unadapted);
  }
};

// ---- logs and configs ----------------------------------------------------------------------------------------------

/// One row per entry of trainer_state.json's log_history. NaN where an entry has no such number; `has_*` tells a
/// written NaN from an absent one.
struct LogTable {
  std::vector<std::int64_t> step;
  std::vector<double> loss, grad_norm, eval_loss, aux_loss, learning_rate;
  std::vector<double> ce, z_loss;  // cross-entropy alone; router z-loss
  std::vector<char> has_loss, has_grad_norm, has_eval_loss, has_aux_loss, has_ce, has_z_loss;
  std::vector<int> line;
  std::string file;
  int aux_digits = 0;                      // significant digits that aux_loss is written with, at most; 0: not known

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("step", s.step);
    f("loss", s.loss);
    f("grad_norm", s.grad_norm);
    f("eval_loss", s.eval_loss);
    f("aux_loss", s.aux_loss);
    f("learning_rate", s.learning_rate);
    f("ce", s.ce);
    f("z_loss", s.z_loss);
    f("has_loss", s.has_loss);
    f("has_grad_norm", s.has_grad_norm);
    f("has_eval_loss", s.has_eval_loss);
    f("has_aux_loss", s.has_aux_loss);
    f("has_ce", s.has_ce);
    f("has_z_loss", s.has_z_loss);
    f("line", s.line);
    f("file", s.file);
    f("aux_digits", s.aux_digits);
  }
};

/// One row per quantity of the log that has finite values: loss, ce, aux_loss, z_loss, grad_norm, eval_loss.
struct LogColumns {
  std::vector<std::string> name;
  std::vector<std::int64_t> entries;
  std::vector<int> line;                   // of the first one
  std::vector<double> first, last, least, greatest;
  std::vector<double> level;               // median of the second half of the entries
  std::vector<double> unit;                // one unit of the last digit printed, at `level`

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("name", s.name);
    f("entries", s.entries);
    f("line", s.line);
    f("first", s.first);
    f("last", s.last);
    f("least", s.least);
    f("greatest", s.greatest);
    f("level", s.level);
    f("unit", s.unit);
  }
};

/// share = (loss - cross-entropy - z-loss) / aux_loss, within what the printed digits of every entry leave open: it is
/// coefficient x n. The columns hold the simplest n that fit, where the coefficient is known.
struct LogBalance {
  std::int64_t entries = 0;
  int line = 0;                            // of the first entry
  double least = 0, greatest = 0;          // share
  bool solved = false;                     // false: no cross-entropy in the log, bounded by 0 <= cross-entropy <= 15
  std::string z;                           // how the z-loss is in it: "", "once", "n times", "not"
  std::vector<std::string> factor;         // "1", "M", "M W", "2"; empty: none of the settings explains it
  std::vector<double> value;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("entries", s.entries);
    f("line", s.line);
    f("least", s.least);
    f("greatest", s.greatest);
    f("solved", s.solved);
    f("z", s.z);
    f("factor", s.factor);
    f("value", s.value);
  }
};

/// A key that the framework that reads the file ignores (CF001), as opposed to one that we did not read.
struct IgnoredKey {
  std::string file;
  int line = 0;
  std::string key;
  std::string framework;   // "axolotl 0.18.0", "transformers MixtralConfig"
  bool about_moe = false;
  std::string instead;     // the line that would have the effect, may be empty
  std::string why;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("file", s.file);
    f("line", s.line);
    f("key", s.key);
    f("framework", s.framework);
    f("about_moe", s.about_moe);
    f("instead", s.instead);
    f("why", s.why);
  }
};
/// One setting, two values: the launcher's or engine's file against the trainer's (CF002).
struct SettingConflict {
  std::string setting;     // as the file with the lower word spells it: "gradient_accumulation_steps"
  std::string value;       // "4"
  std::string file;
  int line = 0;
  std::string other;       // the trainer's name of it: "gradient_accumulation_steps"
  std::string other_value;
  std::string other_file;  // "" if it is the trainer's default
  int other_line = 0;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("setting", s.setting);
    f("value", s.value);
    f("file", s.file);
    f("line", s.line);
    f("other", s.other);
    f("other_value", s.other_value);
    f("other_file", s.other_file);
    f("other_line", s.other_line);
  }
};
struct UnreadKey {
  std::string file;
  int line = 0;
  std::string key;

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("file", s.file);
    f("line", s.line);
    f("key", s.key);
  }
};

}  // namespace moeaudit

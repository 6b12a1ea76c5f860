// Right and wrong formulas as settings of the kernels. A form that the kernels do not have as such gets other inputs,
// never another implementation. Ids are those of docs/replay.md.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/backend.h"

namespace moeaudit::variants {

/// One layer of one micro-batch.
struct RoutedLayer {
  std::int64_t tokens = 0, experts = 0, top_k = 0, sequences = 1;
  int times = 1;                                       // that the framework's balance loss counts it
  std::vector<double> logits;                          // [tokens, experts]
  std::vector<std::int32_t> chosen;                    // [tokens, top_k]: as recorded; empty: not recorded
  std::vector<std::uint8_t> dropped;                   // [tokens, top_k]; empty: not recorded
  std::vector<std::uint8_t> valid;                     // [tokens], 0 padding; empty: all
  std::vector<double> bias;                            // [experts] correction bias; empty: none
  kernels::Score score = kernels::Score::kSoftmax;     // of the router
  kernels::Float dtype = kernels::Float::kF64;         // that the logits were recorded in
  double logit_error = 0;                              // how far each may be off: recomputed, or capped
  double softcap = 0;                                  // > 0: `logits` are cap tanh(gate / cap)
  kernels::Float scores_dtype = kernels::Float::kF64;  // that the framework's softmax of them is rounded to
  /// How often each expert was chosen, and among how many tokens: in the whole step; in this micro-batch on all ranks;
  /// in the step up to this micro-batch; in the whole step on this rank. Empty: not known.
  struct Pool {
    std::vector<std::int64_t> counts;
    std::int64_t tokens = 0;
  };
  Pool step, ranks, running, own_step;
  kernels::Backend* backend = &kernels::on_host();  // runs route, balance_loss and z_loss; the bits are the same
  double lowest = 0, highest = 0;                      // of the logits
  /// Of a softmax router, by prepare(): scores of these very logits, the top k, and what would come next. Else empty.
  std::vector<double> softmax;
  std::vector<std::int32_t> top, next;

  bool prepare();  // after the logits changed; false: one is NaN or infinite
};

// ---- balance loss
// ----------------------------------------------------------------------------------------------------

enum class Probabilities {
  kRouter,       // the router's scores, over their sum where they are no softmax
  kSoftmax,      // softmax of the logits, whatever the router's score is (transformers)
  kDouble,       // softmax of the softmax
  kChosenOnly,   // renormalised over the chosen experts, 0 elsewhere
  kOfChosen,     // softmax of those (gpt_oss of transformers 4)
  kLogits,       // the logits themselves
  kUnnormalised  // sigmoid without its sum
};
enum class Choices { kRecorded, kScores, kSoftmax, kKept, kEven };
enum class Padding { kOut, kCounted, kOutOfSums };
enum class Counts { kOwn, kStep, kRanks, kRunning, kOwnStep };
enum class Layers { kMean, kOneSet };

struct BalanceForm {
  std::string_view id, name;
  Probabilities probabilities = Probabilities::kRouter;
  Choices choices = Choices::kRecorded;
  Padding padding = Padding::kOut;
  Counts counts = Counts::kOwn;
  kernels::Counted counted = kernels::Counted::kAllChoices;
  bool by_sequence = false;
  Layers layers = Layers::kMean;
  bool over_k = true;
  double eps = 0;  // A34: added to the sum that scores are divided by
};

/// What a framework means by its balance loss.
enum class BalanceFamily { kPerLayer, kTransformers };
BalanceForm held_to(BalanceFamily family);
/// Each of the catalogue's deviations from that form; the first is the form itself.
std::vector<BalanceForm> balance_forms(BalanceFamily family, bool softmax_router);

/// A balance loss, a layer at a time.
class BalanceSum {
 public:
  explicit BalanceSum(const BalanceForm& form) : form_(form) {}
  void add(const RoutedLayer& layer);
  void add(const BalanceSum& layers);  // those that come after
  double value() const;                // NaN: a layer lacked what the form needs
  const BalanceForm& form() const { return form_; }
  /// Of one set of all layers: how often each expert counts, and among how many rows.
  const std::vector<std::int64_t>& counts() const { return counts_; }
  std::int64_t rows() const { return counted_; }
  /// How much the value can change where experts tie for the last place: of all layers added so far, relative.
  double tie_slack() const { return ties_; }
  /// Of one set of all layers: choices that may be of other experts, for that reason.
  double tied() const { return tied_; }

 private:
  void add_once(const RoutedLayer& layer);
  BalanceForm form_;
  int layers_ = 0;
  double sum_ = 0, ties_ = 0, tied_ = 0;
  std::vector<double> p_;             // [layers, experts] mean probabilities
  std::vector<double> rows_;          // [layers] that they are the means of
  std::vector<std::int64_t> counts_;  // [experts]
  std::int64_t counted_ = 0, experts_ = 0, top_k_ = 0;
};

// ---- z-loss
// ----------------------------------------------------------------------------------------------------------

enum class ZKind {
  kSquare,
  kProbabilities,
  kMeanSquaredLogit,
  kSquaredLogits,
  kSquareOfMean,
  kNoSquare,
  kChosen,
  kNoShift,
  kLogitsBf16,  // of logits rounded to bfloat16
  kLseBf16,     // the log-sum-exp rounded to bfloat16
  kStepsBf16    // each operation of it rounded to bfloat16
};
struct ZForm {
  std::string_view id, name;
  ZKind kind = ZKind::kSquare;
  Padding padding = Padding::kOut;
};
std::span<const ZForm> z_forms();  // the first is the right one
double z_value(const ZForm& form, const RoutedLayer& layer);

// ---- weights and selection
// -------------------------------------------------------------------------------------------

struct RouteForm {
  std::string_view id, name;
  kernels::RouteArgs<double> args;  // conventions; logits, bias and sizes are filled in by route_with()
  bool bias_weighs = false;         // W1: weights are those of the biased scores
  bool bias_on_logits = false;      // W2
  bool softmax_first = false;       // W4: the scores of the softmax
  bool ignore_bias = false;         // the correction bias takes no part
  kernels::Float logits_dtype = kernels::Float::kF64;  // W12: rounded before the choice
  double times = 1;                                    // on the weights: W8
  bool over_kept = false;                              // W7: renormalised over what was not dropped
  bool mask_first = false;                             // W11: softmax over the experts of the chosen groups alone
};
/// Deviations from `right` that the catalogue knows; the first is `right` itself.
std::vector<RouteForm> route_forms(const kernels::RouteArgs<double>& right, bool has_bias);
/// chosen [tokens, top_k], weights [tokens, top_k]. False: the form does not go with this layer.
bool route_with(const RouteForm& form, const RoutedLayer& layer, std::vector<std::int32_t>* chosen,
                std::vector<double>* weights);

// ---- cross-entropy over a step
// ---------------------------------------------------------------------------------------

struct NormalisationForm {
  std::string_view id, name;
  kernels::Normalisation how;
};
std::span<const NormalisationForm> normalisation_forms();  // the first is the right one

// ---- correction bias
// -------------------------------------------------------------------------------------------------

struct BiasForm {
  std::string_view id, name;
  double rate = 1;  // times the configured one; -1: the wrong way
  kernels::BiasStep step = kernels::BiasStep::kSign;
  kernels::Centre centre = kernels::Centre::kNothing;
  bool per_micro_batch = false;  // B2
  bool own_rank = false;         // B3
  bool padding = false;          // B9: padding counts, too
  bool kept = false;             // B10: counts after drops
  bool evaluation = false;       // B8: tokens of evaluations counted
  bool earlier = false;          // B11: earlier steps' counts in them
  kernels::Float counts_dtype = kernels::Float::kF64, step_dtype = kernels::Float::kF64,
                 bias_dtype = kernels::Float::kF64;
};
std::span<const BiasForm> bias_forms();  // the first two are right: without and with centring

}  // namespace moeaudit::variants

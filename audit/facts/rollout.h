// How far the experts of a training forward are those that an inference engine chose for the same tokens. Types only;
// audit/measures/rollout_agreement.cc fills them, docs/replay.md says what they mean.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moeaudit {

struct RolloutAgreement {
  // One row a layer, at the alignment as given.
  std::vector<int> layer;
  std::vector<std::int64_t> tokens;  // compared
  std::vector<std::int64_t> other;   // of them: another set of experts
  std::vector<double> overlap;       // mean share of the k experts that both have
  std::vector<double> chance;        // of the overlap, if the two chose independently with the loads they have

  std::string training, rollout;          // paths
  std::int64_t training_tokens = 0, rollout_tokens = 0;
  std::int64_t training_layers = 0, rollout_layers = 0;
  std::int64_t tokens_with_other = 0;     // tokens with another set in at least one layer
  std::int64_t reordered = 0;             // sets that agree with the experts in another order
  bool replayed = false;                  // the trace says that its forward took the rollout's experts
  double overall = 0, overall_chance = 0;  // mean over layers
  std::string misaligned;                 // the alignment under which far more agree: "token t has its row t + 1"; "" none
  double aligned = 0;                     // mean overlap under it

  template <class Self, class F>
  static void visit(Self& s, F&& f) {
    f("layer", s.layer);
    f("tokens", s.tokens);
    f("other", s.other);
    f("overlap", s.overlap);
    f("chance", s.chance);
    f("training", s.training);
    f("rollout", s.rollout);
    f("training_tokens", s.training_tokens);
    f("rollout_tokens", s.rollout_tokens);
    f("training_layers", s.training_layers);
    f("rollout_layers", s.rollout_layers);
    f("tokens_with_other", s.tokens_with_other);
    f("reordered", s.reordered);
    f("replayed", s.replayed);
    f("overall", s.overall);
    f("overall_chance", s.overall_chance);
    f("misaligned", s.misaligned);
    f("aligned", s.aligned);
  }
};

}  // namespace moeaudit

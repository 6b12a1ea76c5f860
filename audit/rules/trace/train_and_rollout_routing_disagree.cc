// TR026: training and inference choose other experts for the same tokens.
#include <algorithm>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
`--trace DIR --rollout FILE`: the share of routers (a token in a layer) whose set of experts in the recorded training forward
is not the one that the inference engine chose for the same token, over all layers. Above 5 % is a warning.

## Why it matters
Reinforcement learning then takes gradients through other experts than those that wrote the tokens. Measured on
Qwen3-30B-A3B between two engines: 10 % of the routers differ and 94 % of the tokens in at least one layer, and three of
three GRPO runs collapsed (arXiv 2510.11370; NVIDIA/Megatron-LM issue 4168).

## How to fix
Replay the rollout's experts in the training forward (R3), or correct for the difference (truncated importance sampling), and
run both routers in float32.

## Limits
5 % is half of what the collapsed runs had; how much is harmless is not known. A misaligned array is TR025's.
)md";

Outcome check(Facts& f) {
  const bool* given = f.require(f->rollout_given);
  if (given && !*given) return Outcome::not_applicable("no rollout was given");
  const RolloutAgreement* r = f.require(f->rollout);
  if (f.missing()) return f.cannot_tell();

  if (r->replayed) return Outcome::not_applicable("the training forward took the rollout's experts");
  if (!r->misaligned.empty()) return Outcome::not_applicable("the array is misaligned, which TR025 reports");
  std::int64_t other = 0, all = 0;
  std::size_t worst = 0;
  for (std::size_t i = 0; i < r->layer.size(); ++i) {
    other += r->other[i], all += r->tokens[i];
    if (r->overlap[i] < r->overlap[worst]) worst = i;
  }
  const double share = all > 0 ? static_cast<double>(other) / static_cast<double>(all) : 0;
  if (share <= 0.05)
    return Outcome::pass(say::percent(share) + " of the routers choose other experts than the rollout");
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = say::percent(share) + " of the routers (" + say::count(other) + " of " + say::count(all) +
                    ") choose other experts in the training forward than in the rollout, and " +
                    say::percent(static_cast<double>(r->tokens_with_other) / static_cast<double>(std::max<std::int64_t>(1, r->tokens[worst]))) +
                    " of the tokens in at least one layer. Worst is layer " + std::to_string(r->layer[worst]) + ": " +
                    say::percent(r->overlap[worst]) + " of the choices agree, " + say::percent(r->chance[worst]) + " by chance.";
  for (std::size_t i = 0; i < r->layer.size() && i < 8; ++i) {
    finding.evidence.push_back({"trace.rollout of layer " + std::to_string(r->layer[i]),
                                say::percent(r->overlap[i]) + " agree, by chance " + say::percent(r->chance[i]), {r->rollout, 0, "", ""}});
  }
  finding.remedy = "Replay the rollout's experts in the training forward; NeMo RL:\n    policy.router_replay.enabled=true";
  finding.does_not_show = "That this run will collapse.";
  finding.locations = {{r->rollout, 0, "", ""}};
  finding.sources = {"Rollout Routing Replay, arXiv 2510.11370", "NVIDIA/Megatron-LM issue 4168", "docs.nvidia.com/nemo/rl 0.8.0 guides/router-replay"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_train_and_rollout_routing_disagree;
const Rule rule_train_and_rollout_routing_disagree = {
    .id = "TR026",
    .name = "train-and-rollout-routing-disagree",
    .since = "0.3.0",
    .severity = Severity::kWarning,
    .summary = "The training forward chooses other experts than the inference engine did.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

// BL003: neither loss nor bias update keeps this family's experts balanced under this stack.
#include <algorithm>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The routers are trained, and this family's training code in transformers has no balance loss and never updates its
selection bias. DeepSeek-V3 and its relatives are balanced in pretraining by a bias that is adjusted after each
step; in transformers the bias (`e_score_correction_bias`) is loaded, used and never changed.

## Why it matters
The router moves, the bias that balanced it stands still. DeepSeek-V3 moves it by 0.001 a step until the last 500B
tokens (arXiv 2412.19437). With that update a 1B model has a MaxVio of 0.04 instead of 0.72 (MaxVio = busiest load /
mean - 1, arXiv 2408.15664); without any balance term the busiest of 256 experts got 17.8 times the mean (arXiv
1701.06538 Table 6).

A measured imbalance makes it a warning from 80 % of full collapse on (E/k - 1: every token takes the same k
experts), or above 6. Both lie above healthy released models: OLMoE reaches 5.16, which is 74 % of its collapse
value of 7, in one layer on GitHub code (counts published by its authors, allenai/OLMoE); Mixtral-8x7B stays below
0.4 of 3.

## How to fix
Leave the routers out of what is trained, or watch the loads and stop when they drift.

## Limits
A short fine-tune of a frozen or slowly moving router usually keeps its balance. The rule knows the training code of
transformers; a Trainer subclass or a callback of yours that updates the bias is not seen.
)md";

/// MaxVio from which a measured imbalance is past what released models show on any corpus (see the doc).
bool alarming(Facts& f, double max_vio) {
  constexpr double kAboveReleasedModels = 6.0, kShareOfCollapse = 0.8;
  if (max_vio > kAboveReleasedModels) return true;
  const std::int64_t* experts = f.want(f->num_experts);
  const std::int64_t* k = f.want(f->top_k);
  if (!experts || !k || *k < 1 || *experts <= *k) return false;
  return max_vio >= kShareOfCollapse * (static_cast<double>(*experts) / static_cast<double>(*k) - 1.0);
}

Outcome check(Facts& f) {
  const bool* trains = f.require(f->router_trains);
  if (trains && !*trains) return Outcome::not_applicable("no gradient updates the routers");
  const Balance* balance = f.require(f->balance);
  if (f.missing()) return f.cannot_tell();
  if (*balance == Balance::kAuxLoss) return Outcome::pass("this family has a balance loss");
  if (*balance == Balance::kBiasUpdate) return Outcome::pass("this family's training code updates the selection bias");

  // With trust_remote_code the code that comes with the model runs, where it comes with some; DeepSeek-V2's has a balance loss.
  if (const bool* trusts = f.want(f->trust_remote_code); trusts && *trusts) {
    const bool* comes = f.require(f->remote_code);
    if (f.missing()) return f.cannot_tell();
    if (*comes) return Outcome::not_applicable("the model's own code is trained (trust_remote_code), which is not described here");
  }

  const double* imbalance = f.want(f->imbalance);
  const std::string* family = f.want(f->family);
  const std::string name = family ? *family : "this family";
  Finding finding;
  finding.severity = imbalance && alarming(f, *imbalance) ? Severity::kWarning : Severity::kNote;
  finding.message =
      "The routers of " + name + " are trained, and nothing balances them: its training code has no balance loss" +
      (*balance == Balance::kBiasFrozen ? " and never updates the selection bias." : " and no selection bias.");
  if (imbalance) {
    finding.message += " Measured: the busiest expert gets " + say::number(1.0 + *imbalance) + " times the mean load.";
    finding.evidence.push_back(say::evidence(f->imbalance));
  }
  finding.evidence.push_back(say::evidence(f->balance));
  finding.evidence.push_back(say::evidence(f->router_trains));
  if (family) finding.evidence.push_back(say::evidence(f->family));
  const std::string leaf = say::router_leaf(f);
  finding.remedy =
      "Freeze the routers: an adapter that leaves them out, or before training:\n"
      "    for name, p in model.named_parameters():\n"
      "        if name.endswith(\"." +
      leaf +
      ".weight\"): p.requires_grad_(False)\n"
      "To accept it:\n    moe-audit check --ignore BL003";
  finding.does_not_show = imbalance ? "Whether the imbalance came with the model or from this run."
                                    : "That the load is or becomes uneven: no loads were recorded.";
  finding.locations = {location_of(f->router_trains.source())};
  finding.sources =
      say::sources({f->balance.source().cite, "arXiv 2412.19437", "arXiv 2408.15664", "arXiv 1701.06538 Table 6"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_family_never_balances;
const Rule rule_family_never_balances = {
    .id = "BL003",
    .name = "family-never-balances",
    .since = "0.1.0",
    .severity = Severity::kNote,
    .summary = "Trained routers of a family that neither loss nor bias update balances.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

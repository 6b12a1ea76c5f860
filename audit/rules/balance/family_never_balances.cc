// BL003: neither loss nor bias update keeps this family's experts balanced under this stack.
#include <cmath>
#include <optional>

#include "audit/rules/health/loads.h"
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

With a trace or expert counts (`--trace`) it says how even the least even layer is, and is a warning where that layer has
collapsed as HE002 defines it: an evenness (N - k) / (E - k) of at most 0.2, N the effective experts. MaxVio does not
serve: a healthy OLMoE has 6.81 on arXiv, layer 0, and full collapse of 8 out of 64 has 7.

## How to fix
Leave the routers out of what is trained, or watch the loads and stop when they drift.

## Limits
A short fine-tune of a frozen or slowly moving router usually keeps its balance. The rule knows the training code of
transformers; a Trainer subclass or a callback of yours that updates the bias is not seen.
)md";

/// The least even layer of those that have tokens enough.
std::optional<std::size_t> least_even(const TraceLoads& t) {
  std::optional<std::size_t> worst;
  for (std::size_t i = 0; i < t.layer.size(); ++i) {
    const double evenness = loads::evenness(t, i);
    if (t.can_judge[i] && std::isfinite(evenness) && (!worst || evenness < loads::evenness(t, *worst))) worst = i;
  }
  return worst;
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

  const TraceLoads* trace = f.want(f->trace_loads);
  const std::optional<std::size_t> measured = trace ? least_even(*trace) : std::nullopt;
  const std::string* family = f.want(f->family);
  const std::string name = family ? *family : "this family";
  Finding finding;
  finding.severity = measured && loads::collapsed(*trace, *measured) ? Severity::kWarning : Severity::kNote;
  finding.message =
      "The routers of " + name + " are trained, and nothing balances them: its training code has no balance loss" +
      (*balance == Balance::kBiasFrozen ? " and never updates the selection bias." : " and no selection bias.");
  if (measured) {
    const std::string experts = loads::rounded(loads::effective_experts(*trace, *measured)) + " experts, of " +
                                std::to_string(trace->experts[*measured]);
    finding.message += " Measured: the loads are least even in layer " + std::to_string(trace->layer[*measured]) +
                       ", those of " + experts + ".";
    finding.evidence.push_back(loads::evidence(f, *trace, *measured, "effective experts", experts));
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
  finding.does_not_show = measured ? "Whether the imbalance came with the model or from this run."
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

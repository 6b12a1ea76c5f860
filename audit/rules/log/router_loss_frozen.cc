// LG005: a balance loss or z-loss that does not move.
#include <cmath>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
aux_loss is one and the same number, but for float32 rounding, in all of 10 log entries or more, printed with 4
significant digits or more, while the training loss moves. And: z_loss lies, in all of 20 entries or more, between (ln
E + 1/E)^2 and ln^2(E + e - 1), where the z-loss of *probabilities* must lie, within 1 % of one value while the
training loss moves by 10 %, with E of 32 or more.

## Why it matters
A balance loss is made of the loads of the batch, which differ from step to step, in the fourth digit even where
routing is balanced as well as published models are. A constant has no gradient: nothing balances. Exactly 1 is what a
routing map padded to the capacity gives (NVIDIA/Megatron-LM issue 1617), forced balance
(`--moe-router-force-load-balancing`, a benchmark switch), or k = E. A z-loss of softmaxed logits is frozen at ln^2 E
and penalises nothing (Megatron-LM in January 2024): logits then grow until bfloat16 rounds them.

## How to fix
Compute both from the raw logits, and the loads from the choices before padding and dropping; take benchmark switches
out.

## Limits
An error only where a coefficient above 0 is known and the routers train, a note where k is E. A value of exactly 0 is
LG002's, NaN LG001's. A loss that is nearly constant, as after a second softmax (transformers 5.0 to 5.5, AV001), is
not told from a balanced router.
)md";

constexpr double kFewestDigits = 1000;
constexpr double kRounding = 1e-6;  // of the sums of float32 that a balance loss is

Outcome check(Facts& f) {
  const LogTable* log = f.require(f->log);
  if (f.missing()) return f.cannot_tell();
  const LogColumns* columns = f.require(f->log_columns);
  if (f.missing()) return f.cannot_tell();
  if (const bool* moe = f.want(f->has_moe); moe && !*moe)
    return Outcome::not_applicable("the model has no routed experts");
  const auto find = [&](std::string_view name) {
    std::size_t i = 0;
    while (i < columns->name.size() && columns->name[i] != name) ++i;
    return i;
  };
  const std::size_t none = columns->name.size();
  const std::size_t aux = find("aux_loss"), z = find("z_loss");
  const std::size_t loss = find("loss") != none ? find("loss") : find("ce");
  if (aux == none && z == none) return Outcome::not_applicable("the log holds no balance loss and no z-loss");
  if (loss == none) return Outcome::not_applicable("the log holds no training loss");
  const double moved = columns->greatest[loss] - columns->least[loss];

  std::vector<Finding> findings;
  const bool* trains = f.want(f->router_trains);
  const auto report = [&](std::size_t i, Severity severity, std::string message, std::string remedy) {
    Finding finding;
    const Location where{log->file, columns->line[i], columns->name[i], ""};
    finding.severity = severity;
    finding.message = std::move(message);
    finding.evidence = {{"log.history " + columns->name[i] + ", least", say::number(columns->least[i]), where},
                        {"log.history " + columns->name[i] + ", greatest", say::number(columns->greatest[i]), where},
                        {"log.history " + columns->name[i] + ", entries", std::to_string(columns->entries[i]), where},
                        {"log.history " + columns->name[loss] + ", least to greatest",
                         say::number(columns->least[loss]) + " to " + say::number(columns->greatest[loss]), where}};
    finding.remedy = std::move(remedy);
    finding.does_not_show =
        "Whether the number that is logged is the one that is trained on; a trace of one step would (moe-audit "
        "replay).";
    finding.locations = {where};
    finding.sources = {"NVIDIA/Megatron-LM issue 1617",
                       "NVIDIA/Megatron-LM megatron/core/transformer/moe/router.py at d98e8a6"};
    findings.push_back(std::move(finding));
  };
  const bool still =
      aux != none && columns->greatest[aux] - columns->least[aux] <= kRounding * std::abs(columns->level[aux]);
  if (still && columns->entries[aux] >= 10 && columns->level[aux] != 0 &&
      std::abs(columns->level[aux]) >= kFewestDigits * columns->unit[aux] && moved > 0) {
    const double* coefficient = f.want(f->aux_coefficient);
    const std::int64_t *k = f.want(f->top_k), *e = f.want(f->num_experts);
    const std::string value = say::number(columns->level[aux]);
    const bool uniform = columns->level[aux] == 1 || (k && columns->level[aux] == static_cast<double>(*k));
    std::string cause =
        uniform
            ? ", the value of perfectly even loads: a routing map padded to the capacity, forced balance, or a constant"
            : "";
    const bool everyone = k && e && *k == *e;
    if (everyone) cause = ": k is E, every token goes to every expert";
    report(aux,
           everyone                                               ? Severity::kNote
           : coefficient && *coefficient > 0 && trains && *trains ? Severity::kError
                                                                  : Severity::kWarning,
           "aux_loss is " + value + " in all " + say::plural(columns->entries[aux], "entry", "entries") +
               " of the log, while the loss goes from " + say::number(columns->first[loss]) + " to " +
               say::number(columns->last[loss]) + cause + ". It has no gradient.",
           "Recompute it from one batch's router logits and choices, before padding and dropping:\n    f, P = counts / "
           "(tokens * k), probs.mean(0)\n"
           "    aux_loss = E * (f * P).sum()\nIn Megatron-LM, take --moe-router-force-load-balancing out.");
  }
  const std::int64_t* experts = z != none ? f.want(f->num_experts) : nullptr;
  if (experts && *experts >= 32 && columns->entries[z] >= 20 && moved >= 0.1 * std::abs(columns->first[loss])) {
    const double e = static_cast<double>(*experts);
    const double low = std::pow(std::log(e) + 1 / e, 2), high = std::pow(std::log(e + std::exp(1.0) - 1), 2);
    if (columns->least[z] >= low && columns->greatest[z] <= high &&
        columns->greatest[z] - columns->least[z] <= 0.01 * columns->level[z]) {
      report(z, Severity::kWarning,
             "z_loss stays between " + say::number(columns->least[z]) + " and " + say::number(columns->greatest[z]) +
                 " in all " + say::plural(columns->entries[z], "entry", "entries") + ": within " + say::number(low) +
                 " to " + say::number(high) + ", where the log-sum-exp of probabilities over " +
                 std::to_string(*experts) + " experts must lie. It is taken of the softmax, not of the logits.",
             "Take it of the logits, before any softmax:\n    z_loss = torch.logsumexp(logits.float(), "
             "-1).square().mean()");
    }
  }
  return Outcome::findings_or_pass(std::move(findings), "the logged router losses move");
}

}  // namespace

extern const Rule rule_router_loss_frozen;
const Rule rule_router_loss_frozen = {
    .id = "LG005",
    .name = "router-loss-frozen",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The logged balance loss is a constant, or the z-loss is that of probabilities.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

// LG004: the log's own numbers give the balance loss another weight than the configuration.
#include <algorithm>

#include "audit/rules/balance/aux_loss.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The log has loss, cross-entropy and aux_loss at 3 steps or more. (loss - cross-entropy) / aux_loss is then coefficient
x n, and one n must fit every step within the digits that were printed (half a unit of the last one of each number,
and 16 roundings of float32; bfloat16 where all values of a column are). The rule speaks where n = 1 does not fit. n
is looked for among 0, 2, the accumulation steps M, the processes W, MoE layers L, k, E, the coefficient, their
inverses and products of two; what fits equally is all named. A z-loss in the log is taken off first, with its own
coefficient.

Without cross-entropy in the log, 0 <= cross-entropy <= 15 bounds n; that is used only where the balance loss makes up
most of the loss, so that one of M, W and M W is left.

## Why it matters
The coefficient that acts is coefficient x n. In public reports: loss 930.5 at coefficient 0.9 and aux_loss 4.0105,
which is 256 accumulation steps too much (modelscope/ms-swift issue 5627); n = 2 where the model and the trainer both
add it (huggingface/trl issue 4070); n = 0 where a compute_loss of one's own takes the logits and forgets it.

## How to fix
M or W: divide each micro-batch's balance loss by it, or the coefficient. 2: take one of the two additions out. 0: add
`model.router_aux_loss_coef * outputs.aux_loss` to the loss that is returned. L, k and E are conventions of the loss:
scale the coefficient to the one that the loss has.

## Limits
It believes the names of the columns. An error where the training configuration states the coefficient and n is 0, 2,
M, W or M W; a warning where the coefficient came with the model or n is none of these, a note for L, k and E. n = 0
is a warning where nothing says that the loss is added: Megatron-LM hands its gradient on without adding the value. A
factor that the release brings (balance.aux_multiplier) is BL004's. Averages over different steps give no common n;
the rule then does not apply, nor where aux_loss moves so little that a constant explains the difference as well.
)md";

std::string interval(double low, double high) {
  const std::string a = say::number(low), b = say::number(high);
  return a == b ? a : a + " to " + b;
}

/// "M (gradient_accumulation_steps)"
std::string meaning(const std::string& factor) {
  if (factor == "0") return "0: it is not in the loss";
  if (factor == "2") return "2: it is in the loss twice";
  if (factor == "M") return "the accumulation steps: it is summed over micro-batches";
  if (factor == "W") return "the processes: it is multiplied by the world size";
  if (factor == "M W") return "accumulation steps x processes";
  if (factor == "1 / M") return "1 / the accumulation steps: it is divided by them once too often";
  if (factor == "1 / W") return "1 / the processes: it is divided by them once too often";
  if (factor == "L") return "the MoE layers: the loss has their sum, the log their mean";
  if (factor == "1 / L") return "1 / the MoE layers: the log has their sum, the loss their mean";
  if (factor == "k") return "k: the loss lacks the division by k that the log has";
  if (factor == "1 / k") return "1 / k: the loss has a division by k that the log lacks";
  if (factor == "coefficient") return "the coefficient: it is multiplied by it twice";
  if (factor == "1 / coefficient") return "1 / the coefficient: it is never multiplied by it";
  return factor + " (M accumulation steps, W processes, L MoE layers)";
}

bool only_of(const std::string& factor, std::string_view letters) {
  return std::all_of(factor.begin(), factor.end(), [&](char c) { return letters.find(c) != std::string_view::npos; });
}

/// The level of aux_loss in the log: NaN-free, 0 if it is not there.
double level_of(Facts& f) {
  const LogColumns* columns = f.want(f->log_columns);
  for (std::size_t i = 0; columns && i < columns->name.size(); ++i) {
    if (columns->name[i] == "aux_loss") return columns->level[i];
  }
  return 0;
}

Outcome check(Facts& f) {
  const LogTable* log = f.require(f->log);
  if (f.missing()) return f.cannot_tell();
  const LogBalance* b = f.want(f->log_balance);
  if (!b) return Outcome::not_applicable(f->log_balance.why_unknown());
  const double* coefficient = f.require(f->aux_coefficient);
  if (f.missing()) return f.cannot_tell();
  const double c = *coefficient;
  const Location where{log->file, b->line, "loss", ""};

  std::vector<std::string> names = b->factor;
  if (!b->solved && (names.empty() || c <= 0))
    return Outcome::not_applicable("the log holds no cross-entropy beside the loss");
  const bool once = b->least <= c && c <= b->greatest;
  if (once)
    return Outcome::pass("loss - cross-entropy is " + say::number(c) + " x aux_loss in " +
                         say::plural(b->entries, "entry", "entries"));
  const double* multiplier = f.want(f->aux_multiplier);
  if (multiplier && b->least <= c * *multiplier && c * *multiplier <= b->greatest)
    return Outcome::pass("the balance loss counts " + say::number(*multiplier) +
                         " times, as this release has it (BL004)");
  // The log's aux_loss may hold the coefficient already; what it levels off at tells.
  const auto unscaled = std::find(names.begin(), names.end(), "1 / coefficient");
  if (unscaled != names.end() && level_of(f) < 0.7)
    return Outcome::pass("aux_loss holds the coefficient already, and is added once");
  if (std::find(names.begin(), names.end(), "1 / L") != names.end())
    return Outcome::pass("the log has the sum over layers, the loss their mean, with the configured coefficient");

  const bool chosen = say::chosen_for_training(f->aux_coefficient.origin(), f->aux_coefficient.source());
  const bool convention = !names.empty() && std::all_of(names.begin(), names.end(),
                                                        [](const std::string& n) { return only_of(n, "LkE1 /"); });
  const bool known = !names.empty() && std::all_of(names.begin(), names.end(), [](const std::string& n) {
    return only_of(n, "MW 1/02") || n.ends_with("coefficient");
  });
  const bool* added = f.want(f->aux_added);
  const bool absent = !names.empty() && names[0] == "0" && b->greatest < 0.2 * c;
  if (absent && added && !*added)
    return Outcome::not_applicable("nothing adds the balance loss to the loss (BL001, BL005)");

  std::string n, what;
  for (const std::string& name : names) what += (what.empty() ? "" : "; or ") + meaning(name);
  n = c > 0 ? interval(b->least / c, b->greatest / c) : "";
  const std::string key = aux::coefficient_key(f);
  Finding finding;
  finding.severity = convention                                          ? Severity::kNote
                     : known && chosen && (!absent || (added && *added)) ? Severity::kError
                                                                         : Severity::kWarning;
  finding.message =
      c <= 0 ? key + " is 0" + say::at(f->aux_coefficient.source()) + ", but the logged loss holds " +
                   interval(b->least, b->greatest) + " x aux_loss."
      : absent
          ? "The logged loss is the cross-entropy alone in " + say::plural(b->entries, "entry", "entries") +
                ", although " + key + " is " + say::number(c) + say::at(f->aux_coefficient.source()) +
                " and aux_loss is logged: the balance loss is not in it."
          : std::string(b->solved ? "loss - cross-entropy is " : "The logged loss holds ") +
                interval(b->least, b->greatest) + " x aux_loss in all " + say::plural(b->entries, "entry", "entries") +
                ", " + n + " times the " + say::number(c) + " of " + key + say::at(f->aux_coefficient.source()) + ". " +
                (names.empty() ? "None of the settings explains the factor." : "The factor is " + what + ".");
  if (names.size() > 1) finding.message += " Which of them, a short run with another accumulation or world size tells.";
  finding.evidence = {{"log.history (loss - cross-entropy) / aux_loss", interval(b->least, b->greatest), where},
                      {"log.history entries", std::to_string(b->entries), where},
                      say::evidence(f->aux_coefficient)};
  for (const auto* fact : {&f->accumulation, &f->world_size}) {
    if (f.want(*fact)) finding.evidence.push_back(say::evidence(*fact));
  }
  if (absent) {
    finding.remedy =
        "In the compute_loss that the run uses, after the cross-entropy:\n    loss = loss + model.router_aux_loss_coef "
        "* outputs.aux_loss\n"
        "or say that it is off. " +
        say::model_config(f, {{key, "0"}});
  } else {
    const double acts = b->value.empty() || c <= 0 ? (b->least + b->greatest) / 2 : c * b->value[0];
    finding.remedy = c <= 0 ? "State what acts. " + say::model_config(f, {{key, say::literal(acts)}})
                            : "Take the factor out where the loss is put together, or out of the coefficient. " +
                                  say::model_config(f, {{key, say::literal(c * c / acts)}});
  }
  finding.does_not_show =
      absent
          ? "That no gradient of it reaches the routers: a framework can hand it on without adding the value to the "
            "loss."
          : "That the stronger or weaker balance loss does harm; it shows that its weight is not the configured one.";
  finding.locations = {where, location_of(f->aux_coefficient.source())};
  finding.sources = {"modelscope/ms-swift issue 5627", "huggingface/trl issue 4070",
                     "NVIDIA-NeMo/Automodel issue 1408"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_balance_loss_weight_differs;
const Rule rule_balance_loss_weight_differs = {
    .id = "LG004",
    .name = "balance-loss-weight-differs",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "In the log the balance loss weighs a multiple of its coefficient, or nothing.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

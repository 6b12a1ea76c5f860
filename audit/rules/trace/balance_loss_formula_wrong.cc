// TR002: aux_loss is not the framework's balance loss of these logits.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"
#include "audit/rules/trace/replay_rows.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
From a recorded trace: aux_loss recomputed in float64 from the recorded logits, by the framework's formula, does not give
the reported number within what rounding can do. Every formula of the catalogue is tried, times the factors of the run;
the one that fits is named, with the next best and how much worse it is.

## Why it matters
A balance loss of the wrong formula looks healthy in a log. Softmax of the softmax (transformers 5.0 to 5.5,
huggingface/transformers issue 45120) is 2.00 to 2.05 with 8 experts and top-2 whatever the load, and its gradient on the
gate is an eighth of the right one. Loads of the wrong tokens or of biased choices push the router where the data is not.

## How to fix
Use a release that computes it right; the finding says which, where that is known.

## Limits
The formula is known of transformers (load_balancing_loss_func) and the families of the table; of other frameworks and
families any of the common conventions passes, and a number that no formula of the catalogue gives cannot be judged. Padding is TR004's. A band is relative: 1e-6 of the value from float32 logits, 1e-2 from bfloat16, where more
names fit.
)md";

bool padding(const ReplayTable& t, std::size_t row) { return t.formula[row] == "A16" || t.formula[row] == "A17"; }

Outcome check(Facts& f) {
  Outcome otherwise;
  const ReplayTable* t = replay::table(f, &otherwise);
  if (!t) return otherwise;
  const replay::Rows rows = replay::rows_of(*t, "aux_loss");
  if (rows.differ.empty())
    return replay::nothing_differs(f, rows, "the trace reports no balance loss",
                                   "the reported balance loss is the framework's, of the recorded logits");
  const std::size_t row = rows.differ[0];
  if (padding(*t, row)) return Outcome::not_applicable("TR004 reports that padding counts in it");
  Finding finding;
  const bool known = !t->name[row].empty();
  finding.severity = known ? Severity::kError : Severity::kWarning;
  finding.message = "aux_loss is " + say::number(t->recorded[row]) + ", and the logits give " +
                    say::number(t->expected[row]) + " (" + t->held_to[row] + "; " + replay::bands(t->distance[row]) +
                    " apart, in " + say::count(t->differing[row]) + " of " + say::count(t->compared[row]) +
                    " micro-batches). " + replay::named(*t, row);
  finding.evidence = {replay::evidence(*t, row), {"trace packages", t->packages, replay::head(*t)}};
  finding.remedy =
      t->formula[row] == "A8" && t->framework == "transformers"
          ? "transformers 5.6.0 hands the logits to the balance loss again:\n    pip install \"transformers>=5.6.0\""
          : "Compare the code that computes aux_loss with transformers' load_balancing_loss_func, then record again:\n"
            "    moe-audit replay " +
                t->path;
  finding.does_not_show = "That the experts are unevenly loaded (moe-audit health measures that).";
  finding.locations = {replay::where(*t, row), replay::head(*t)};
  finding.sources = {"huggingface/transformers issue 45120",
                     "transformers src/transformers/models/mixtral/modeling_mixtral.py load_balancing_loss_func"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_balance_loss_formula_wrong;
const Rule rule_balance_loss_formula_wrong = {
    .id = "TR002",
    .name = "balance-loss-formula-wrong",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "The reported balance loss is another formula than the framework's.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

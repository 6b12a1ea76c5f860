// AD007: an adapter holds NaN or infinity.
#include <map>

#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Every value of every LoRA matrix in adapter_model.safetensors is finite.

## Why it matters
The product B A is added to the weight: one NaN in A poisons a row of every output, one in B a whole output, for all tokens
that reach the module; one in an expert's adapter only those routed there, so a short test may look fine. A merge writes it
into the model for good. A saved NaN is also the end of the run: every optimizer step keeps it. With learning rate 1e20 all
values of fixtures/runs/mixtral-nan-loss are NaN after 2 steps, and the trainer went on to step 10.

## How to fix
Go back to the last checkpoint whose adapter is finite; look at loss and gradient norm before it (LG001), lower the learning
rate, clip gradients, and do not train in pure float16.

## Limits
LoRA pairs only: modules that were saved whole (modules_to_save) are not scanned. The place of a NaN is not its cause.
)md";

struct Tally {
  std::int64_t values = 0, rows = 0;
  std::size_t first = 0;
};

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const AdapterTensors* t = f.require(f->adapter_tensors);
  if (f.missing()) return f.cannot_tell();
  std::map<Part, Tally> by_part;
  Tally all;
  for (std::size_t i = 0; i < t->module.size(); ++i) {
    if (t->non_finite[i] == 0) continue;
    if (all.rows == 0) all.first = i;
    for (Tally* tally : {&all, &by_part[t->part[i]]}) {
      tally->values += t->non_finite[i];
      ++tally->rows;
    }
  }
  if (all.rows == 0) return Outcome::pass("every value of the adapter is finite");

  const std::size_t i = all.first;
  const Location where{f->adapter_tensors.source().file, 0, "", t->bad_tensor[i]};
  std::vector<std::string> parts;
  for (const auto& [part, tally] : by_part) parts.push_back(std::string(name_of(part)) + " " + say::count(tally.rows));
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = say::plural(all.values, "value of the adapter is", "values of the adapter are") + " NaN or infinite, in " +
                    say::count(all.rows) + " of " + say::plural(static_cast<std::int64_t>(t->module.size()), "module", "modules") +
                    " (" + say::some(parts, 6) + "); the first is " + t->bad_tensor[i] +
                    (t->bad_index[i] >= 0 ? " at index " + std::to_string(t->bad_index[i]) : "") +
                    (t->expert[i] >= 0 ? ", expert " + std::to_string(t->expert[i]) : "") + ".";
  finding.evidence = {{"values that are not finite", say::count(all.values), where},
                      {"modules with such values", say::count(all.rows), where}};
  if (f.want(f->optimizer_steps)) finding.evidence.push_back(say::evidence(f->optimizer_steps));
  finding.remedy = "Resume from the last checkpoint whose adapter is finite, with gradients clipped:\n    "
                   "trainer.train(resume_from_checkpoint=\"checkpoint-BEFORE\")";
  finding.does_not_show = "Which step or operation made it.";
  finding.locations = {where};
  finding.sources = {"arXiv 2106.09685 equation 3 (h = W x + B A x)"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_non_finite_adapter;
const Rule rule_non_finite_adapter = {
    .id = "AD007",
    .name = "non-finite-adapter",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "The adapter holds NaN or infinity.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

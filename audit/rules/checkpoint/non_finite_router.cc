// CK001: a router holds NaN or infinity.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Every value of every router weight and bias in the checkpoint is a finite number.

## Why it matters
One NaN in a router weight makes that expert's logit NaN for every token, and the softmax over all experts with it:
the layer's output is NaN for the whole batch. The checkpoint cannot be trained on nor served. It usually means that
the loss was NaN for steps before the save (LG001): Trainer's logging_nan_inf_filter, on by default, keeps that out
of the logged loss (huggingface/trl issue 6702).

A buffer (a selection bias such as `e_score_correction_bias`) that is not finite is a note: transformers loads it
and never updates it, and a bias of -inf can be a way to switch an expert off.

## How to fix
Go back to the last checkpoint whose routers are finite, and find out why the loss left the finite numbers.

## Limits
Routers only. A full scan of all weights is not done here.
)md";

/// "row 3 (expert 3), column 17" of a router weight, "expert 5" of a bias.
std::string position(Facts& f, const RouterValues& values, std::size_t i) {
  const std::int64_t index = values.first_index[i];
  const std::int64_t* hidden = f.want(f->hidden_size);
  if (values.is_buffer[i]) return "expert " + std::to_string(index);
  if (!hidden || *hidden < 1) return "element " + std::to_string(index);
  return "element " + std::to_string(index) + " (expert " + std::to_string(index / *hidden) + ", column " +
         std::to_string(index % *hidden) + ")";
}

Outcome check(Facts& f) {
  const RouterValues* values = f.require(f->router_values);
  if (f.missing()) return f.cannot_tell();
  if (values->tensor.empty()) return Outcome::not_applicable("the weight files hold no router");
  std::vector<Finding> findings;
  for (std::size_t i = 0; i < values->tensor.size(); ++i) {
    if (values->non_finite[i] == 0) continue;
    const Location where{values->file[i], 0, "", values->tensor[i]};
    Finding finding;
    finding.severity = values->is_buffer[i] ? Severity::kNote : Severity::kError;
    finding.message = values->tensor[i] + " holds " + say::plural(values->non_finite[i], "value", "values") +
                      " that are NaN or infinite, first at " + position(f, *values, i) + ".";
    finding.evidence = {{"non-finite values", say::count(values->non_finite[i]), where},
                        {"first index", std::to_string(values->first_index[i]), where}};
    finding.remedy =
        "Resume from a checkpoint before this one, whose routers are finite:\n"
        "    trainer.train(resume_from_checkpoint=\"checkpoint-N\")";
    finding.does_not_show = "When it happened: compare with earlier checkpoints and the log.";
    finding.locations = {where};
    finding.sources = {"huggingface/trl issue 6702 (NaN steps hidden from the log)"};
    findings.push_back(std::move(finding));
  }
  return Outcome::findings_or_pass(std::move(findings),
                                   "all " + std::to_string(values->tensor.size()) + " router tensors are finite");
}

}  // namespace

extern const Rule rule_non_finite_router;
const Rule rule_non_finite_router = {
    .id = "CK001",
    .name = "non-finite-router",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "A router holds NaN or infinity.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

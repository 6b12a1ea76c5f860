// TR000: a tensor file of the trace is not what trace.json says.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Every tensor file that the records of the trace name is there and well formed, and every tensor in it has the shape and the
dtype that `trace.json` says: rows are the tokens of the micro-batch (or its sampled tokens), columns the experts, choices or
hidden size of the layer.

## Why it matters
The replay leaves out what does not fit, so a check may say nothing of a step that was recorded. A file that is cut short usually
means that the disk was full (8,192 tokens of a model with 48 layers, 128 experts and k = 8 take 210 MB a micro-batch), and then
later records are missing, too.

## How to fix
Record the steps again. A trace that another tool writes must follow docs/trace.md.

## Limits
Shapes, dtypes and sizes only: a tensor of the right shape with another layer's numbers is not seen here. A corrupt `trace.json` or
line of `records.jsonl` is no finding but an input that could not be read (exit code 2).
)md";

Outcome check(Facts& f) {
  const std::string* format = f.require(f->trace_format);
  if (format && *format == "none") return Outcome::not_applicable("no trace was given");
  const std::vector<WeightProblem>* problems = f.require(f->trace_problems);
  if (f.missing()) return f.cannot_tell();
  std::vector<Finding> findings;
  for (const WeightProblem& p : *problems) {
    Finding finding;
    finding.severity = Severity::kError;
    finding.message = p.file + (p.offset >= 0 ? ", byte " + std::to_string(p.offset) : "") +
                      (p.tensor.empty() ? "" : ", tensor " + p.tensor) + ": " + p.what +
                      ". It is left out of every check.";
    const Location where{p.file, 0, "", p.tensor};
    finding.evidence = {{"file", p.file, where}};
    finding.remedy =
        "Record these steps again, into an empty folder:\n    trainer.add_callback(MoeAuditCallback(\"trace\", "
        "steps=[0, 1]))";
    finding.does_not_show = "That the run itself is wrong: this is about its recording.";
    finding.locations = {where};
    finding.sources = {"docs/trace.md"};
    findings.push_back(std::move(finding));
  }
  return Outcome::findings_or_pass(std::move(findings), "every tensor of the trace fits trace.json");
}

}  // namespace

extern const Rule rule_unreadable_trace;
const Rule rule_unreadable_trace = {
    .id = "TR000",
    .name = "unreadable-trace",
    .since = "0.3.0",
    .severity = Severity::kError,
    .summary = "A tensor file of the trace is missing, corrupt, or not of the shape that trace.json says.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

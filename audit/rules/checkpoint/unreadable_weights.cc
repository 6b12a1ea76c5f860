// CK000: a weight file is corrupt.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The weight files keep the rules of the safetensors format: length and syntax of the header, offsets inside the file
that neither overlap nor leave gaps, sizes that follow from shape and dtype, no tensor twice, every shard of the
index there.

## Why it matters
Mixtral-8x7B is 93 GB in 19 shards, and a shard whose last byte is missing still has a valid header: loaders that
map the file stop late or read what is not there. A shard that was not copied costs the layers in it. One corrupt
file also voids everything said about its tensors, which is why the rest is audited without them.

## How to fix
Fetch or save the file again. Do not repair a weight file by hand.

## Limits
Structure only: a flipped bit inside the numbers is not seen here (CK001 sees those that made a value non-finite).
What is sound in the other files is still audited.
)md";

Outcome check(Facts& f) {
  const std::vector<WeightProblem>* problems = f.require(f->weight_problems);
  if (f.missing()) return f.cannot_tell();
  std::vector<Finding> findings;
  for (const WeightProblem& p : *problems) {
    Finding finding;
    finding.severity = Severity::kError;
    finding.message = p.file + (p.offset >= 0 ? ", byte " + std::to_string(p.offset) : "") +
                      (p.tensor.empty() ? "" : ", tensor " + p.tensor) + ": " + p.what + ".";
    const Location where{p.file, 0, "", p.tensor};
    finding.evidence = {{"file", p.file, where}};
    if (p.offset >= 0) finding.evidence.push_back({"byte offset", std::to_string(p.offset), where});
    finding.remedy = "Fetch this file again:\n    hf download MODEL " + p.file.substr(p.file.rfind('/') + 1) +
                     " --force-download\nor save it again from the run that wrote it.";
    finding.does_not_show = "Whether the numbers in the rest of the file are right.";
    finding.locations = {where};
    finding.sources = {"huggingface/safetensors README.md (Format)"};
    findings.push_back(std::move(finding));
  }
  return Outcome::findings_or_pass(std::move(findings), "every weight file is well formed");
}

}  // namespace

extern const Rule rule_unreadable_weights;
const Rule rule_unreadable_weights = {
    .id = "CK000",
    .name = "unreadable-weights",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "A weight file is corrupt.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

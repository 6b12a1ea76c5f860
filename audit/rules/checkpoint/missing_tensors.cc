// CK003: tensors that the model needs are not in its files.
#include <algorithm>
#include <map>

#include "audit/rules/routing/shape_check.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Every tensor that this family has at the sizes of config.json is in the weight files, in one of the two layouts (one
tensor an expert, or one stack a layer). Tensors the family does not know are a note.

## Why it matters
from_pretrained fills a missing tensor with random numbers and says so in one warning. One expert of Mixtral-8x7B is
3 tensors and 176 million parameters (3 x 4096 x 14336); missing, it answers its share of the tokens, 1 in 4 under
even load, with noise. A missing router sends all tokens anywhere. It happens with shards that were not copied,
savers that knew other names (a fused stack where per-expert names were expected, and the other way round), and
experts that were pruned.

## How to fix
Fetch or save the missing files again. For a layout that only another loader knows, convert the checkpoint first.

## Limits
Names and shards, not values. Tied and optional tensors are not expected. Tensors in a corrupt file are CK000's, and
where config and tensors contradict each other RT003 speaks first, since nobody knows then what to expect. Unknown
tensors are often meant: DeepSeek-V3 ships its multi-token prediction layer, which transformers leaves out.
)md";

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

/// Missing because the file that should hold it is there and corrupt, which is CK000's. A file that is not there has no
/// offset: then the list of what was lost with it is worth having.
bool lost_in_corrupt_file(const std::string& shard, const std::vector<WeightProblem>& problems) {
  return std::any_of(problems.begin(), problems.end(), [&](const WeightProblem& p) {
    return p.offset >= 0 && (shard.empty() || base_name(p.file) == base_name(shard));
  });
}

Finding missing_finding(Facts& f, const std::map<std::string, std::vector<std::string>>& by_shard, std::int64_t count) {
  const Location where = location_of(f->tensor_diff.source());
  Finding finding;
  finding.severity = Severity::kError;
  finding.message =
      say::plural(count, "tensor", "tensors") + " of this model " + (count == 1 ? "is" : "are") + " not in its files: ";
  std::string shards;
  bool first = true;
  for (const auto& [shard, names] : by_shard) {
    finding.message +=
        (first ? "" : "; ") + say::some(names) + (shard.empty() ? "" : " (the index names " + shard + ")");
    first = false;
    if (!shard.empty()) shards += " " + shard;
    finding.evidence.push_back({shard.empty() ? "missing" : "missing from " + shard, say::some(names, 8), where});
    finding.locations.push_back({shard.empty() ? where.file : shard, 0, "", names.front()});
  }
  finding.message += ". The loader fills " + std::string(count == 1 ? "it" : "them") + " with random numbers.";
  finding.evidence.push_back({"missing tensors", say::count(count), where});
  finding.remedy = shards.empty()
                       ? "Save the model again from the run that trained it:\n    model.save_pretrained(\"fixed\")"
                       : "Fetch what is missing:\n    hf download MODEL" + shards;
  finding.does_not_show = "Whether a loader with its own conversion would find them under other names.";
  finding.sources = {"huggingface/transformers src/transformers/modeling_utils.py (newly initialized weights)"};
  return finding;
}

Finding extra_finding(Facts& f, const std::vector<std::string>& extra) {
  Finding finding;
  finding.severity = Severity::kNote;
  finding.message = say::plural(static_cast<std::int64_t>(extra.size()), "tensor is", "tensors are") +
                    " in the files and unknown to this family: " + say::some(extra) + ".";
  finding.evidence = {{"unknown tensors", say::some(extra, 8), location_of(f->tensor_diff.source())}};
  finding.remedy = "Nothing, if another loader uses them. To accept it:\n    moe-audit check --ignore CK003";
  finding.does_not_show = "That anything is wrong: loaders leave tensors they do not know alone.";
  finding.locations = {{f->tensor_diff.source().file, 0, "", extra.front()}};
  finding.sources = {"huggingface/transformers src/transformers/modeling_utils.py (unexpected keys)"};
  return finding;
}

Outcome check(Facts& f) {
  const TensorDiff* diff = f.require(f->tensor_diff);
  if (f.missing()) return f.cannot_tell();
  if (f.want(f->routers) && !routing::disagreements(f).empty()) {
    return Outcome::not_applicable("config and tensors contradict each other (RT003): what to expect is not known");
  }
  const std::vector<WeightProblem>* problems = f.want(f->weight_problems);
  std::map<std::string, std::vector<std::string>> by_shard;
  std::int64_t count = 0, lost = 0;
  for (std::size_t i = 0; i < diff->missing.size(); ++i) {
    if (problems && lost_in_corrupt_file(diff->missing_shard[i], *problems)) {
      ++lost;
      continue;
    }
    by_shard[diff->missing_shard[i]].push_back(diff->missing[i]);
    ++count;
  }
  std::vector<Finding> findings;
  if (count > 0) findings.push_back(missing_finding(f, by_shard, count));
  if (!diff->unexpected.empty()) findings.push_back(extra_finding(f, diff->unexpected));
  if (findings.empty() && lost > 0) {
    return Outcome::not_applicable(say::plural(lost, "tensor is", "tensors are") +
                                   " in files that CK000 reports as corrupt");
  }
  return Outcome::findings_or_pass(std::move(findings), "the files hold every tensor of this family");
}

}  // namespace

extern const Rule rule_missing_tensors;
const Rule rule_missing_tensors = {
    .id = "CK003",
    .name = "missing-tensors",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "Tensors that the model needs are not in its files.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

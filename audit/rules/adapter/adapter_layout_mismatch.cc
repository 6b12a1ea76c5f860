// AD008: the matrices of an adapter do not fit each other, the model, or the PEFT release.
#include <map>

#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Each lora_A has its lora_B and their ranks agree; the rank is the one of adapter_config.json (r, or one of rank_pattern); A
has as many columns and B as many rows as the model's matrix has inputs and outputs; and a LoRA on a stack of experts
(target_parameters) has the sides of A and B in the order of the PEFT release that the run uses.

## Why it matters
PEFT stores the adapters of a stack of E experts as A [E x r, in] and B [out, E x r]. Which side of a stack [E, x, y] is "in"
depends on the release: x before 0.19.0; in 0.19.0 y for modules that say is_transposed (gpt_oss on transformers 5) and x for
all others; since 0.19.1 x for those and y for all others. An adapter of the other kind stops the load with a size mismatch;
where x = y it loads, and every matrix is applied transposed, silently (both run: fixtures/peft/layout.json). A pair that is
half there loads with a warning, and the rest of it is fresh.

## How to fix
Load with the release that wrote the file (adapter_config.json has peft_version since 0.18), or convert it.

## Limits
Shapes, not values: of a square stack they tell nothing, and only the two releases are compared. Modules whose sizes neither the family nor the weights at hand give are only
compared with themselves. Rank patterns are taken as a set: which module has which rank is not compared. Embeddings and heads
are left out, for they are resized at will.
)md";

std::string what(AdapterFault fault) {
  switch (fault) {
    case AdapterFault::kNoPair: return "one of the two matrices is missing";
    case AdapterFault::kMisfit: return "A and B do not go together";
    case AdapterFault::kRank: return "the rank is not the one of adapter_config.json";
    case AdapterFault::kBaseShape: return "the matrices do not fit the model's";
    case AdapterFault::kStackOrder: return "the sides of the stack are the wrong way round for the PEFT release of this run";
  }
  return {};
}

std::string remedy(Facts& f, AdapterFault fault) {
  switch (fault) {
    case AdapterFault::kStackOrder: {
      const bool old = f.want(f->peft) && f->peft.value().inside({std::nullopt, Version::parse("0.19.1")});
      return std::string("Load it with the kind of release that wrote it:\n    pip install \"peft==") + (old ? "0.21.2" : "0.18.1") + "\"";
    }
    case AdapterFault::kRank: return "Put the rank of the tensors into adapter_config.json (alpha stays):\n    \"r\": RANK_OF_A";
    case AdapterFault::kBaseShape:
      return "Load it on the model it was trained on:\n    PeftModel.from_pretrained(base, ADAPTER)  # base_model_name_or_path of "
             "adapter_config.json";
    default: break;
  }
  return "Save the adapter again from the run that trained it:\n    model.save_pretrained(\"fixed\")";
}

Finding finding_for(Facts& f, const AdapterLayout& t, AdapterFault fault, const std::vector<std::size_t>& rows) {
  const std::size_t first = rows.front();
  const std::int64_t n = static_cast<std::int64_t>(rows.size());
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "In " + say::count(n) + " of " + say::plural(t.found_total, "adapted module", "adapted modules") + ", " + what(fault) +
                    ": " + t.module[first] + " has " + t.found[first] + ", expected " + t.expected[first] + ".";
  if (fault == AdapterFault::kStackOrder) {
    finding.message += " " + t.stack_order + (t.loads_silently ? "; square stacks load all the same, and every matrix is applied transposed."
                                                               : ": the load stops with a size mismatch.");
  }
  for (std::size_t k = 0; k < rows.size() && k < 8; ++k) {
    const std::size_t i = rows[k];
    const Location where{f->adapter_layout.source().file, 0, "", t.tensor[i]};
    finding.evidence.push_back({"shapes", t.found[i] + ", expected " + t.expected[i], where});
    finding.locations.push_back(where);
  }
  if (fault == AdapterFault::kRank) finding.evidence.push_back(say::evidence(f->adapter_rank));
  if (f.want(f->peft)) finding.evidence.push_back(say::evidence(f->peft));
  finding.remedy = remedy(f, fault);
  finding.does_not_show = "What the values of the matrices do once they fit.";
  finding.sources = {"huggingface/peft src/peft/tuners/lora/layer.py (ParamWrapper.update_layer)", "huggingface/peft pull request 3083",
                     "fixtures/peft/layout.json"};
  return finding;
}

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const AdapterLayout* t = f.require(f->adapter_layout);
  if (f.missing()) return f.cannot_tell();
  std::map<AdapterFault, std::vector<std::size_t>> by_fault;
  for (std::size_t i = 0; i < t->module.size(); ++i) by_fault[t->fault[i]].push_back(i);
  std::vector<Finding> findings;
  for (const auto& [fault, rows] : by_fault) findings.push_back(finding_for(f, *t, fault, rows));
  return Outcome::findings_or_pass(std::move(findings), say::plural(t->judged, "adapted module fits", "adapted modules fit"));
}

}  // namespace

extern const Rule rule_adapter_layout_mismatch;
const Rule rule_adapter_layout_mismatch = {
    .id = "AD008",
    .name = "adapter-layout-mismatch",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "The adapter's matrices do not fit each other, the model or the PEFT release.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

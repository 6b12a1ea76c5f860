// BT002: the merged model is not base + scale B A.
#include "audit/rules/base/pair.h"
#include "audit/rules/rule.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Given base, adapter and merged model: every adapted matrix M, experts in stacks included, is W + s B A up to
rounding, with s = lora_alpha / r (lora_alpha / sqrt(r) with use_rslora, alpha_pattern and the rank of the matrix
itself observed); modules saved whole (modules_to_save) are what the adapter file holds; everything else is the base's.

The bound holds for every dtype in which a merge can run, so one element outside is proof:
ulp(M)/2 + (ulp(W)/2 if W is not a value of M's dtype) + s |B_i| |A_j| (2 u' + gamma(r + 2, 2^-24)) + 3 u |s B A|,
u the unit roundoff of the coarser of adapter and stored dtype, u' = u if the adapter file is finer than that, else 0.

Where an element is outside, the wrong form is named if one puts every element inside: not merged, merged twice,
alpha / sqrt(r) against alpha / r, alpha or r ignored, r / alpha, subtracted, transposed, gate and up halves swapped or
interleaved, experts of a stack in the other order, summed in 16 bits and stored in 32. Otherwise the form is
"unknown", with the scale that least squares fits, <M - W, B A> / ||B A||^2, and the share it leaves unexplained.

## Why it matters
A merge fails silently: the model loads and answers, as the base (scale 0) or with an update of the wrong size. With
rank-stabilised LoRA (arXiv 2312.03732) the scale is sqrt(r) times larger: 4 x at r = 16. Stacks of experts keep the
expert as the slow index of A's rows and the fast index of B's columns (huggingface/peft
src/peft/tuners/lora/layer.py, ParamWrapper.get_delta_weight): read the other way round each expert gets a mixture of
all experts' updates.

## How to fix
Merge again with merge_and_unload() of the PEFT release that trained the adapter.

## Limits
LoRA only; DoRA, PiSSA, OLoRA and others that change the base weights are not judged. A merge into de-quantised 4-bit
weights differs from the base by the quantisation error and shows as unknown. Where the whole update is smaller than
the rounding of M, every form fits and the rule passes. Routers that changed without an adapter are BT001's.
A merge summed in 16 bits and stored in 32 is a warning: it is the right sum, rounded more than the file shows.
)md";

struct Group {
  std::vector<std::size_t> rows;
  std::int64_t outside = 0, elements = 0;
};

/// Rows with one form. Differences that need no adapter to show have form and rank 0.
std::map<std::string, Group> grouped(Facts& f, const MergeTable& t) {
  const bool* router_trains = f.want(f->router_trains);
  const bool bt001 = router_trains && !*router_trains;
  std::map<std::string, Group> groups;
  for (std::size_t i = 0; i < t.form.size(); ++i) {
    if (t.form[i].empty() || (bt001 && t.rank[i] == 0 && t.part[i] == Part::kRouter)) continue;
    Group& g = groups[t.form[i]];
    g.rows.push_back(i);
    g.outside += t.outside[i];
    g.elements += t.elements[i];
  }
  return groups;
}

std::string range(const MergeTable& t, const Group& g, std::vector<double> MergeTable::*column) {
  double low = INFINITY, high = -INFINITY;
  for (std::size_t i : g.rows) {
    low = std::min(low, (t.*column)[i]);
    high = std::max(high, (t.*column)[i]);
  }
  return say::number(low) == say::number(high) ? say::number(low) : say::number(low) + " to " + say::number(high);
}

Finding describe(Facts& f, const MergeTable& t, const std::string& form, const Group& g, std::int64_t adapted) {
  const std::size_t first = g.rows.front();
  const bool plain = t.rank[first] == 0;
  std::vector<std::string> names;
  for (std::size_t i : g.rows) {
    const std::string expert = std::to_string(t.expert[i]);
    const bool slice = t.expert[i] >= 0 && !plain && t.module[i].find("experts." + expert + ".") == std::string::npos;
    names.push_back(t.module[i] + (slice ? " expert " + expert : ""));
  }
  const Location where{t.file[first], 0, "", t.tensor[first]};
  Finding finding;
  finding.severity = form.find("before it was stored") != std::string::npos ? Severity::kWarning : Severity::kError;
  const std::int64_t n = static_cast<std::int64_t>(g.rows.size());
  if (plain) {
    finding.message = say::plural(n, "matrix of the merged model ", "matrices of the merged model: each ") + form + ": " + say::some(names) + "; " +
                      say::count(g.outside) + " of " + say::count(g.elements) + " elements.";
  } else {
    finding.message = say::count(n) + " of " + say::count(adapted) + " adapted matrices are not base + " + range(t, g, &MergeTable::scale) +
                      " x B A (" + say::some(names) + "): " + form + ". Least squares fits " + range(t, g, &MergeTable::fitted) + " and leaves " +
                      range(t, g, &MergeTable::residual) + " of the change unexplained.";
    f.want(f->adapter_alpha);
    finding.evidence.push_back({"scale asked for", range(t, g, &MergeTable::scale), location_of(f->adapter_alpha.source())});
    finding.evidence.push_back({"scale fitted", range(t, g, &MergeTable::fitted), where});
  }
  finding.evidence.push_back({"elements outside the rounding bound", say::count(g.outside) + " of " + say::count(g.elements), where});
  finding.remedy =
      "Merge again, once, from base and adapter:\n"
      "    base = AutoModelForCausalLM.from_pretrained(\"BASE\", dtype=torch.bfloat16)\n"
      "    PeftModel.from_pretrained(base, \"ADAPTER\").merge_and_unload().save_pretrained(\"MERGED\")";
  finding.does_not_show = form == "unknown" ? "What was done instead, or whether base and adapter are the ones that were merged."
                                            : "Which tool did it.";
  for (std::size_t i : g.rows) {
    if (finding.locations.size() < 4) finding.locations.push_back({t.file[i], 0, "", t.tensor[i]});
  }
  finding.sources = {"huggingface/peft src/peft/tuners/lora/layer.py (get_delta_weight, merge)", "arXiv 2106.09685 section 4.1", "arXiv 2312.03732"};
  return finding;
}

Outcome check(Facts& f) {
  if (pair::no_pair(f)) return Outcome::not_applicable(pair::kNoPair);
  if (!pair::trains_adapter(f)) return Outcome::not_applicable("no adapter is among the inputs");
  const MergeTable* merge = f.require(f->merge);
  if (f.missing()) return f.cannot_tell();
  std::int64_t adapted = 0;
  for (std::int64_t rank : merge->rank) adapted += rank > 0;
  std::vector<Finding> findings;
  for (const auto& [form, group] : grouped(f, *merge)) findings.push_back(describe(f, *merge, form, group, adapted));
  return Outcome::findings_or_pass(std::move(findings), say::plural(adapted, "adapted matrix is", "adapted matrices are") + " base + scale B A to rounding, " +
                                                            say::count(merge->unadapted) + " other tensors are the base's");
}

}  // namespace

extern const Rule rule_merge_mismatch;
const Rule rule_merge_mismatch = {
    .id = "BT002",
    .name = "merge-mismatch",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "The merged model is not base + scale B A.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

// CK007: tensors have another shape than the family's.
#include <algorithm>
#include <map>

#include "audit/rules/routing/shape_check.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Every tensor of the files that this family has, has the shape that the family's code gives it at the sizes of config.json,
in the layout (one tensor an expert, or one stack a layer) that the files use.

## Why it matters
from_pretrained stops at a wrong shape, or, with ignore_mismatched_sizes, fills the tensor with random numbers. Loaders that
only count elements take a stack [E, H, 2 x I] for [E, 2 x I, H] and compute nonsense: gpt_oss stores its experts input-major,
all other families here output-major, and converters mix them up. Files of one rank of tensor or expert parallelism have 1/n
of a side everywhere; on their own they are no model.

## How to fix
Transpose what is transposed, merge what was split, or correct the size in config.json.

## Limits
Shapes from the headers, not values: a square matrix that is transposed is not seen. Rows of vocabulary are not judged (they
are padded and resized at will, and tied heads are not stored), nor sizes that the family leaves open (attention heads, shared
and dense widths), nor packed weights of a quantiser, nor prediction layers that transformers leaves out. Missing tensors are
CK003's. Where the routers contradict the config, RT003 speaks first.
)md";

/// "model.layers.{L}.mlp.gate.weight is [8, 32], expected [8, 64] (4 tensors)", the first few.
std::string describe(const ShapeTable& t, const std::vector<std::size_t>& rows) {
  std::vector<std::string> order;
  std::map<std::string, std::int64_t> count;
  for (std::size_t i : rows) {
    std::string text = t.pattern[i] + " is " + t.found[i] + ", expected " + t.expected[i];
    if (count[text]++ == 0) order.push_back(std::move(text));
  }
  for (std::string& text : order) text += " (" + say::plural(count[text], "tensor", "tensors") + ")";
  return say::some(order);
}

std::string remedy(const ShapeTable& t, const std::vector<std::size_t>& rows, ShapeFault fault) {
  switch (fault) {
    case ShapeFault::kSharded: return "Merge the ranks into one model first, and audit that:\n    moe-audit check MERGED_MODEL";
    case ShapeFault::kTransposed:
      return "Exchange the last two sides where the files are written:\n    tensors[\"" + t.tensor[rows.front()] +
             "\"] = tensors[\"" + t.tensor[rows.front()] + "\"].transpose(-1, -2).contiguous()";
    case ShapeFault::kOther: break;
  }
  return "Correct the size in config.json, or save the model again from the run that trained it:\n    "
         "model.save_pretrained(\"fixed\")";
}

Finding finding_for(Facts& f, const ShapeTable& t, const std::vector<std::size_t>& rows, ShapeFault fault) {
  const std::int64_t n = static_cast<std::int64_t>(rows.size());
  Finding finding;
  finding.severity = fault == ShapeFault::kSharded ? Severity::kWarning : Severity::kError;
  finding.message = say::plural(n, "tensor has", "tensors have") + " another shape than " + f->family.value() +
                    " at the sizes of the config: " + describe(t, rows) + ".";
  if (fault == ShapeFault::kTransposed) finding.message += " The sizes are right and stand in another order.";
  if (fault == ShapeFault::kSharded) {
    finding.message += " Every matrix of the experts has 1/" + std::to_string(t.divisor) +
                       " of one side: these look like the files of one rank of " + std::to_string(t.divisor) + ".";
  }
  for (std::size_t k = 0; k < rows.size() && k < 8; ++k) {
    const std::size_t i = rows[k];
    finding.evidence.push_back({"shape", t.found[i] + ", expected " + t.expected[i], {t.file[i], 0, "", t.tensor[i]}});
    finding.locations.push_back({t.file[i], 0, "", t.tensor[i]});
  }
  if (f.want(f->expert_width)) finding.evidence.push_back(say::evidence(f->expert_width));
  finding.evidence.push_back({"tensors compared", say::count(t.judged), {}});
  finding.remedy = remedy(t, rows, fault);
  finding.does_not_show = "Whether the values are right once the shape is.";
  finding.sources = {"huggingface/transformers src/transformers/modeling_utils.py (size mismatch)",
                     "audit/families: shapes with file and line of the modelling code"};
  return finding;
}

Outcome check(Facts& f) {
  const ShapeTable* shapes = f.require(f->weight_shapes);
  const std::string* family = f.require(f->family);
  if (f.missing() || !family) return f.cannot_tell();
  if (f.want(f->routers) && !routing::disagreements(f).empty()) {
    return Outcome::not_applicable("config and tensors contradict each other (RT003): which shapes to expect is not known");
  }
  std::map<ShapeFault, std::vector<std::size_t>> by_fault;
  for (std::size_t i = 0; i < shapes->tensor.size(); ++i) by_fault[shapes->fault[i]].push_back(i);
  std::vector<Finding> findings;
  for (const auto& [fault, rows] : by_fault) findings.push_back(finding_for(f, *shapes, rows, fault));
  return Outcome::findings_or_pass(std::move(findings), say::plural(shapes->judged, "tensor has", "tensors have") +
                                                            " the shape of the family");
}

}  // namespace

extern const Rule rule_mis_shaped_tensor;
const Rule rule_mis_shaped_tensor = {
    .id = "CK007",
    .name = "mis-shaped-tensor",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "A tensor has another shape than the family's code gives it.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

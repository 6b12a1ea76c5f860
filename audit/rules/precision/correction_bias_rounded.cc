// PR003: the correction bias of the router lost its float32 precision, in the files or on loading them.
#include <algorithm>

#include "audit/rules/precision/flips.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The family keeps the correction bias (e_score_correction_bias: added to the scores for the choice of experts, moved by the
load instead of by gradients) in float32. Here it is stored in bfloat16 or float16; or stored in float32 with every value on
the grid of such a type, so that it went through one; or the run's release of transformers rounds it when it loads the weights
in half precision. The report says how many tokens change experts by it.

## Why it matters
The bias decides between experts whose scores differ in the third digit. It moves by 0.001 a step (DeepSeek-V3, arXiv
2412.19437 section 4.2; loss-free balancing, arXiv 2408.15664); neighbours in bfloat16 are 0.002 apart from 0.25 on, 0.004
from 0.5 on, 0.03 from 4 on. So rounding it undoes many updates at once, and a bias kept in bfloat16 stops moving where half
the distance exceeds the step: from |b| = 0.5 on. Seen in Megatron-LM (issue 1482: Float16Module cast it; issue 7081) and in
transformers before 5.0, which cast it on load (pull request 42580, _keep_in_fp32_modules_strict since).

## How to fix
Take the float32 values from the checkpoint before the rounding; load with a release that keeps them; do not call
model.to(torch.bfloat16) after loading, which casts buffers too.

## Limits
What a past rounding took cannot be known: for a bias that is on the grid already, the share is of one seeded draw, each value
moved at random within what rounds to it. A bias of zeros (a fresh model) is passed. A bias whose update speed is a power of
two stays on the grid without any rounding. Prediction layers are not judged.
)md";

enum class Loss { kStored, kOnGrid, kOnLoad };

struct Case {
  Loss loss;
  std::string_view dtype;  // "bf16"
  std::vector<std::size_t> rows;
};

bool is_low(DType d) { return d == DType::kBF16 || d == DType::kF16; }
const char* word(DType d) { return d == DType::kBF16 ? "bf16" : "fp16"; }
const char* long_word(const Case& c) { return c.dtype[0] == 'b' ? "bfloat16" : "float16"; }

/// Rows whose stored values have been through a half-precision type. A few values may lie on its grid by accident (one in
/// 65,536 does), a whole layer does not.
std::vector<Case> stored_cases(const CorrectionBias& t) {
  std::vector<Case> cases;
  auto rows_of = [&](Loss loss, std::string_view dtype) -> std::vector<std::size_t>& {
    for (Case& c : cases) {
      if (c.loss == loss && c.dtype == dtype) return c.rows;
    }
    return cases.emplace_back(Case{loss, dtype, {}}).rows;
  };
  for (std::size_t i = 0; i < t.layer.size(); ++i) {
    if (t.zeros[i] == t.elements[i]) continue;
    if (is_low(t.dtype[i])) rows_of(Loss::kStored, word(t.dtype[i])).push_back(i);
    else if (t.distinct[i] < 4) continue;
    else if (t.off_bf16[i] == 0) rows_of(Loss::kOnGrid, "bf16").push_back(i);
    else if (t.off_fp16[i] == 0) rows_of(Loss::kOnGrid, "fp16").push_back(i);
  }
  return cases;
}

std::string layers(const CorrectionBias& t, const Case& c) {
  if (c.rows.size() == 1) return "layer " + std::to_string(t.layer[c.rows.front()]);
  std::vector<std::int64_t> all;
  for (std::size_t i : c.rows) all.push_back(t.layer[i]);
  return "layers " + to_text(all);
}

std::string share(const std::optional<precision::Flips>& flips, const Case& c) {
  if (!flips) return precision::sentence(flips);
  return std::string(c.loss == Loss::kOnLoad ? "Rounded to " + std::string(long_word(c)) + ", the bias"
                                             : "Moved at random within what rounds to the stored values, the bias") +
         " gives " + say::percent(flips->share) + " of " + say::count(flips->tokens) + " tokens of layer " +
         std::to_string(flips->layer) + ", the worst, other experts (95 % interval " + say::percent(flips->low) + " to " +
         say::percent(flips->high) + "; " + flips->input + ").";
}

/// What a step of 0.001 does to a value at the largest |b|.
std::string step(double most, double spacing, const char* dtype) {
  constexpr double kSpeed = 0.001;  // DeepSeek-V3's bias update speed
  const std::string text = "|b| reaches " + say::number(most) + ", where neighbours in " + dtype + " are " + say::number(spacing) + " apart: ";
  if (spacing / 2 > kSpeed) return text + "an update of 0.001 is lost there.";
  if (spacing > kSpeed) return text + "an update of 0.001 counts as " + say::number(spacing) + " there.";
  return text + "updates of 0.001 are kept to half a unit.";
}

std::string remedy(const CorrectionBias& t, const Case& c) {
  const std::string& name = t.tensor[c.rows.front()];
  if (c.loss == Loss::kOnLoad) {
    return "Load with a release that keeps it in float32:\n    pip install \"transformers==5.23.0\"\nor load the weights in float32.";
  }
  return "Take it in float32 from the checkpoint before it was rounded, for each layer:\n    tensors[\"" + name +
         "\"] = original[\"" + name + "\"].float()";
}

Finding finding_for(Facts& f, const CorrectionBias& t, const Case& c) {
  const std::size_t worst = *std::max_element(c.rows.begin(), c.rows.end(), [&](std::size_t a, std::size_t b) { return t.max_abs[a] < t.max_abs[b]; });
  const bool bf16 = c.dtype[0] == 'b';
  const std::string mode = "bias " + std::string(c.dtype);
  const auto flips = precision::measured(f, c.loss == Loss::kOnLoad ? mode : mode + " lost");
  Finding finding;
  finding.severity = flips && flips->share == 0 ? Severity::kNote : Severity::kWarning;
  finding.message = "The correction bias of " + layers(t, c);
  switch (c.loss) {
    case Loss::kStored: finding.message += " is stored in " + std::string(name_of(t.dtype[worst])) + ", this family keeps it in F32. "; break;
    case Loss::kOnGrid:
      finding.message += " is stored in " + std::string(name_of(t.dtype[worst])) + ", but every value is one that " + long_word(c) +
                         " has: it was rounded before. ";
      break;
    case Loss::kOnLoad:
      finding.message += " is stored in " + std::string(name_of(t.dtype[worst])) + " and rounded to " + long_word(c) + " on loading" +
                         say::at(f->load_dtype.source()) + ". ";
      break;
  }
  finding.message += share(flips, c) + " " + step(t.max_abs[worst], bf16 ? t.bf16_spacing[worst] : t.fp16_spacing[worst], long_word(c));
  const Location where{t.file[worst], 0, "", t.tensor[worst]};
  finding.evidence = {{"dtype of the bias", name_of(t.dtype[worst]), where},
                      {"values that " + std::string(long_word(c)) + " does not have", say::count(bf16 ? t.off_bf16[worst] : t.off_fp16[worst]) +
                                                                                       " of " + say::count(t.elements[worst]), where},
                      {"largest |b|", say::number(t.max_abs[worst]), where}};
  if (c.loss == Loss::kOnLoad) {
    finding.evidence.push_back(say::evidence(f->load_dtype));
    finding.evidence.push_back(say::evidence(f->bias_kept_fp32));
  }
  precision::add_evidence(flips, &finding);
  finding.remedy = remedy(t, c);
  finding.does_not_show = c.loss == Loss::kOnLoad ? "What other experts for these tokens do to the loss."
                                                  : "The original values: the share is of a random draw, not of the rounding that happened.";
  finding.locations = {where};
  finding.sources = say::sources({c.loss == Loss::kOnLoad ? f->bias_kept_fp32.source().cite : std::string(),
                                  "arXiv 2412.19437 section 4.2", "arXiv 2408.15664", "NVIDIA/Megatron-LM issue 1482",
                                  "huggingface/transformers pull request 42580"});
  return finding;
}

Outcome check(Facts& f) {
  const Routing* routing = f.want(f->routing);
  if (routing && !routing->correction_bias) return Outcome::not_applicable("this family has no correction bias");
  const CorrectionBias* table = f.require(f->correction_bias);
  if (f.missing()) return f.cannot_tell();
  if (!table->kept_fp32) return Outcome::not_applicable("this family is not known to keep its correction bias in float32");
  f.want(f->router_precision);
  std::vector<Case> cases = stored_cases(*table);
  if (cases.empty()) {
    const DType* load = f.require(f->load_dtype);
    const bool* kept = load && is_low(*load) ? f.require(f->bias_kept_fp32) : nullptr;
    if (f.missing()) return f.cannot_tell();
    Case on_load{Loss::kOnLoad, is_low(*load) ? word(*load) : "", {}};
    for (std::size_t i = 0; kept && !*kept && i < table->layer.size(); ++i) {
      const std::int64_t off = *load == DType::kBF16 ? table->off_bf16[i] : table->off_fp16[i];
      if (off > 0) on_load.rows.push_back(i);
    }
    if (!on_load.rows.empty()) cases.push_back(std::move(on_load));
  }
  std::vector<Finding> findings;
  for (const Case& c : cases) findings.push_back(finding_for(f, *table, c));
  return Outcome::findings_or_pass(std::move(findings), "the correction bias is in float32, in the files and when it is loaded");
}

}  // namespace

extern const Rule rule_correction_bias_rounded;
const Rule rule_correction_bias_rounded = {
    .id = "PR003",
    .name = "correction-bias-rounded",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "The correction bias was rounded to half precision; says how many tokens change experts.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

// PR001: the router computes in float16.
#include "audit/rules/precision/flips.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The matrix product of the router runs in float16, once load dtype, autocast and the upcasts of the modelling code
are resolved.

## Why it matters
float16 holds magnitudes up to 65504. A router logit or a product inside it that passes this becomes infinite,
softmax turns it into NaN or into all the weight on one expert, and the loss follows. Below that, float16 rounds
finer than bfloat16 (11 significant bits against 8), so the selection of experts suffers less: on Gaussian inputs
well under 1 % of tokens change experts. Authors who say anything keep the router in float32: Switch casts the
router input up and its experiment without this, in bfloat16, diverged (-3.780 against -1.716, arXiv 2101.03961
Table 2).

## How to fix
Train in bfloat16, or in float32, or keep the router out of autocast.

## Limits
A warning; an error where an overflow was measured on this checkpoint, or the family documents a float32 router. The
measure looks at this checkpoint's weights: training moves them, and a probe is not your data (give --hidden-states
for that). A frozen router is judged too, since the selection depends on it all the same.
)md";

Outcome check(Facts& f) {
  const DType* dtype = f.require(f->router_dtype);
  if (f.missing()) return f.cannot_tell();
  if (*dtype != DType::kF16) return Outcome::pass("the router computes in " + std::string(name_of(*dtype)));

  const bool* documented = f.want(f->router_documented_fp32);
  const auto flips = precision::executed_or(f, "fp16");
  const bool overflow = flips && flips->overflowed > 0;
  const Source& where = f->precision.known() ? f->precision.source() : f->router_dtype.source();
  Finding finding;
  finding.severity = overflow || (documented && *documented) ? Severity::kError : Severity::kWarning;
  finding.message = "The router computes in F16 (largest value 65504)" + say::at(where) + ".";
  if (overflow) {
    finding.message += " " + say::plural(flips->overflowed, "logit overflows", "logits overflow") +
                       " on this checkpoint, first in " + flips->overflow_tensor + ", where the true values reach " +
                       say::number(flips->max_abs_logit) + ".";
    finding.evidence.push_back(
        {"overflowed logits", say::count(flips->overflowed), {"", 0, "", flips->overflow_tensor}});
  }
  if (documented && *documented) finding.message += " This family documents a float32 router.";
  finding.message += " " + precision::sentence(flips);
  finding.evidence.push_back(say::evidence(f->router_dtype));
  if (f.want(f->precision)) finding.evidence.push_back(say::evidence(f->precision));
  if (documented) finding.evidence.push_back(say::evidence(f->router_documented_fp32));
  precision::add_evidence(flips, &finding);
  finding.remedy = say::training(f, {{"bf16", "true"}, {"fp16", "false"}}) +
                   "\nand load the weights in bfloat16 or float32, not in float16.";
  finding.does_not_show = overflow ? "Whether your own data reaches the inputs that overflow."
                                   : "That a logit overflows in training, or that quality suffers.";
  finding.locations = {location_of(where)};
  finding.sources = say::sources(
      {f->router_dtype.source().cite, f->router_documented_fp32.source().cite, "arXiv 2101.03961 Table 2"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_router_in_fp16;
const Rule rule_router_in_fp16 = {
    .id = "PR001",
    .name = "router-in-fp16",
    .since = "0.1.0",
    .severity = Severity::kWarning,
    .summary = "The router computes in float16.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

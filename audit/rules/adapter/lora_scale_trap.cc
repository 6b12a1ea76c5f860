// AD005: rsLoRA with an alpha that was chosen for alpha/r.
#include <cmath>

#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
use_rslora is on, so the adapter is scaled by alpha / sqrt(r), and alpha is r, 2 r or 4 r with r of at least 16: the
settings one takes for a scale of 1, 2 or 4 under alpha / r.

## Why it matters
Multiples of r are conventions of the plain scale: the LoRA paper sets alpha to the first r it tries (arXiv
2106.09685 section 4.1), LLaMA-Factory fills in 2 r, and 2 r is the common advice. Under rsLoRA the same alpha means
alpha / r x sqrt(r): alpha = 2 r scales by 2 sqrt(r), 8 at r = 16, 16 at r = 64, 32 at r = 256, instead of 2. The
update of the weights starts that much larger at the same learning rate. rsLoRA is meant for an alpha that stays the
same while r grows (arXiv 2312.03732): 16 gives 2 at r = 64 and 1 at r = 256.

## How to fix
Keep the scale you meant: alpha = scale x sqrt(r). Or switch rsLoRA off.

## Limits
Below r = 16 the two scales differ by less than 4 and nothing is said; nor for alpha up to 16, which is a usual
fixed alpha. A large scale can be made up for by a small learning rate: that is why this is a warning.
)md";

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const bool* rslora = f.require(f->adapter_rslora);
  if (rslora && !*rslora) return Outcome::not_applicable("use_rslora is off: the scale is alpha / r");
  const std::int64_t* rank = f.require(f->adapter_rank);
  const double* alpha = f.require(f->adapter_alpha);
  if (f.missing()) return f.cannot_tell();
  if (*rank < 1) return Outcome::not_applicable("the rank is " + std::to_string(*rank));

  const double r = static_cast<double>(*rank);
  const double ratio = *alpha / r;
  const double scale = *alpha / std::sqrt(r);
  const bool conventional = ratio == 1 || ratio == 2 || ratio == 4;
  if (!conventional || *rank < 16 || *alpha <= 16) {
    return Outcome::pass("alpha / sqrt(r) is " + say::number(scale));
  }
  const double wanted = std::round(ratio * std::sqrt(r));
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = "use_rslora scales the adapter by alpha / sqrt(r) = " + say::number(*alpha) + " / sqrt(" +
                    std::to_string(*rank) + ") = " + say::number(scale) + say::at(f->adapter_rslora.source()) +
                    "; alpha / r, for which alpha = " + (ratio == 1 ? "" : say::number(ratio) + " ") +
                    "r is usual, would give " + say::number(ratio) + ".";
  finding.evidence = {say::evidence(f->adapter_rslora),
                      say::evidence(f->adapter_rank),
                      say::evidence(f->adapter_alpha),
                      {"scale alpha / sqrt(r)", say::number(scale), {}},
                      {"scale alpha / r", say::number(ratio), {}}};
  finding.remedy = "To keep a scale of " + say::number(ratio) + ". " +
                   say::lora(f, {{"lora_alpha", say::number(wanted)}}) + "\nor go back to alpha / r. " +
                   say::lora(f, {{"use_rslora", "false"}});
  finding.does_not_show = "That the scale is too large for your learning rate.";
  finding.locations = {location_of(f->adapter_alpha.source()), location_of(f->adapter_rslora.source())};
  finding.sources = say::sources(
      {"arXiv 2312.03732", "arXiv 2106.09685 section 4.1", "huggingface/peft src/peft/tuners/lora/layer.py"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_lora_scale_trap;
const Rule rule_lora_scale_trap = {
    .id = "AD005",
    .name = "lora-scale-trap",
    .since = "0.1.0",
    .severity = Severity::kWarning,
    .summary = "rsLoRA with an alpha chosen for alpha/r.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

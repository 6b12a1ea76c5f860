// QU004: the conversion of linear layers to float8 takes the router along.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Training converts linear layers to float8 (Axolotl `fp8: true`, Accelerate `mixed_precision: fp8`), the router is an
nn.Linear in memory, both its sizes are divisible by 16, and nothing keeps it out.

## Why it matters
Accelerate's filter leaves out the first and the last linear layer and those whose sizes 16 does not divide, nothing
else (utils/ao.py, filter_linear_layers). A router of 16, 64 or 128 experts passes. Its logits are then products of
values with 3 bits of mantissa under one scale a tensor: a relative error of 2^-4 in each factor, against 2^-9 in bf16.
Axolotl keeps routers out since 0.18.0, for routing decisions flipped between steps and full fine-tunes ended in NaN
gradients (monkeypatch/accelerate/float8_moe_filter.py); torchtitan's and torchao's recipes keep them out too.

## How to fix
Axolotl 0.18.0 or newer, or no fp8.

## Limits
With transformers 5 most routers are no nn.Linear and are not converted. How many tokens change experts is not measured
here: the scale depends on the activations of the run.
)md";

Outcome check(Facts& f) {
  const bool* fp8 = f.require(f->fp8);
  if (fp8 && !*fp8) return Outcome::not_applicable("linear layers do not compute in float8");
  const bool* skips = f.require(f->fp8_skips_router);
  const bool* linear = f.require(f->router_is_linear);
  const std::int64_t* experts = f.require(f->num_experts);
  const std::int64_t* hidden = f.require(f->hidden_size);
  if (fp8 && skips && *skips) return Outcome::pass("the framework keeps routers out of the conversion");
  if (fp8 && linear && !*linear) return Outcome::pass("the router is no nn.Linear, and is not converted");
  if (fp8 && experts && *experts % 16 != 0) {
    return Outcome::pass(std::to_string(*experts) + " experts: 16 does not divide them, and the router is not converted");
  }
  if (f.missing()) return f.cannot_tell();
  if (*hidden % 16 != 0) return Outcome::pass("16 does not divide the hidden size, and the router is not converted");
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = "Linear layers are converted to float8" + say::at(f->fp8.source()) + ", the routers (" + std::to_string(*experts) + " x " +
                    std::to_string(*hidden) + ") among them: nothing keeps them out" + say::at(f->fp8_skips_router.source()) + ".";
  finding.evidence = {say::evidence(f->fp8), say::evidence(f->fp8_skips_router), say::evidence(f->router_is_linear), say::evidence(f->num_experts)};
  const std::string* framework = f.want(f->framework);
  finding.remedy = framework && *framework == "axolotl"
                       ? "Keep routers out:\n    pip install \"axolotl>=0.18.0\"\nor train without it. " + say::training(f, {{"fp8", "false"}, {"bf16", "true"}})
                       : say::training(f, {{"bf16", "true"}}) + "\nand mixed_precision: bf16 in the Accelerate config:\n    mixed_precision: bf16";
  finding.does_not_show = "How many tokens change experts: that depends on the scales of the run.";
  finding.locations = {location_of(f->fp8.source())};
  finding.sources = say::sources({f->fp8_skips_router.source().cite, "axolotl-ai-cloud/axolotl pull request 3791",
                                  "accelerate src/accelerate/utils/ao.py (filter_linear_layers)"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_router_in_fp8;
const Rule rule_router_in_fp8 = {
    .id = "QU004",
    .name = "router-in-fp8",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "The conversion of linear layers to float8 takes the router along.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

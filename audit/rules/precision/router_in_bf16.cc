// PR002: the router computes in bfloat16.
#include "audit/rules/precision/flips.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The matrix product of the router runs in bfloat16, once load dtype, autocast and the upcasts of the modelling code
are resolved. The report says how many tokens of this checkpoint change experts by it.

## Why it matters
bfloat16 has 8 significant bits: logits of 128 and 128.5 become equal, which moves a softmax by 36 % (ST-MoE, arXiv
2202.08906) and leaves the choice of experts to the order of ties. With exact products, wide accumulation and one
rounding of the logits, as GPUs do it, a Gaussian probe changes experts for about 0.2 % of tokens with 8 experts and
k = 2, and for 3 to 4 % with 128 experts and k = 8. Trained only in bfloat16, Switch diverged (-3.780 against -1.716
with a float32 router, arXiv 2101.03961 Table 2). The same checkpoint then routes differently in an engine that runs
the gate in float32.

## How to fix
Most families run their gate in the dtype of the activations and are trained so: nothing to do unless the share is
large, or an inference engine must route alike. Where the family documents a float32 router, keep it in float32.

## Limits
A note; a warning where the family documents a float32 router that this run lowers. A measured share holds for this
checkpoint and input, not for its effect on quality; of PhiMoE, which in training draws among the
experts close to the best, for its choice at an evaluation. Lowered by autocast although the code upcasts: that is PR004.
)md";

Outcome check(Facts& f) {
  f.want(f->router_precision);  // measured in any case: the report shows what each precision would change
  const DType* dtype = f.require(f->router_dtype);
  if (f.missing()) return f.cannot_tell();
  if (*dtype == DType::kF16) return Outcome::not_applicable("the router computes in F16, which PR001 judges");
  if (*dtype != DType::kBF16) return Outcome::pass("the router computes in " + std::string(name_of(*dtype)));
  const bool* undone = f.want(f->router_undone);
  if (undone && *undone) return Outcome::not_applicable("autocast undoes a float32 router, which PR004 judges");

  const bool* documented = f.want(f->router_documented_fp32);
  const bool lowers = documented && *documented;
  const auto flips = precision::executed_or(f, "bf16");
  const std::string leaf = say::router_leaf(f);
  const Source& where = f->precision.known() ? f->precision.source() : f->router_dtype.source();
  Finding finding;
  finding.severity = lowers ? Severity::kWarning : Severity::kNote;
  finding.message = "The router computes in BF16 (8 significant bits)" + say::at(where) + ".";
  if (lowers) finding.message += " This family documents a float32 router.";
  finding.message += " " + precision::sentence(flips);
  finding.evidence = {say::evidence(f->router_dtype)};
  if (f.want(f->precision)) finding.evidence.push_back(say::evidence(f->precision));
  if (documented) finding.evidence.push_back(say::evidence(f->router_documented_fp32));
  precision::add_evidence(flips, &finding);
  finding.remedy = lowers ? say::training(f, {{"bf16", "false"}}) + "\nand load the weights in float32, or keep the " +
                                leaf + " module in float32 yourself."
                          : "Nothing, if the share is small. To accept it:\n    moe-audit check --ignore PR002";
  finding.does_not_show =
      "Whether the tokens that change experts change the loss: a change between two near-equal experts "
      "may not matter.";
  finding.locations = {location_of(where)};
  finding.sources = say::sources({f->router_dtype.source().cite, f->router_documented_fp32.source().cite,
                                  "arXiv 2202.08906", "arXiv 2101.03961 Table 2"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_router_in_bf16;
const Rule rule_router_in_bf16 = {
    .id = "PR002",
    .name = "router-in-bf16",
    .since = "0.1.0",
    .severity = Severity::kNote,
    .summary = "The router computes in bfloat16; says how many tokens change experts.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

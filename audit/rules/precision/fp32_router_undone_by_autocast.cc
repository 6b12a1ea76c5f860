// PR004: the family upcasts its router to float32 and autocast takes it back.
#include "audit/rules/precision/flips.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The family's code upcasts inputs and weight of the router, `F.linear(x.float(), W.float())`, and this run trains
under autocast, which lowers the product to bfloat16 again.

## Why it matters
The code says float32 and the GPU computes bfloat16. torch.autocast casts the inputs of `linear` to its own dtype
whatever they were before; only `autocast(enabled=False)` around it keeps float32. Measured in a Trainer step with
bf16=True: the router logits of deepseek_v3 and of every family written like it come out in bfloat16, and its
sigmoid runs in bfloat16 too; without autocast, with the same bfloat16 weights, both are float32
(fixtures/oracle/autocast.json, transformers 5.23.0).

Such a router selects by score + bias over many near-equal scores: with 256 experts and k = 8 several per cent of
tokens get other experts than in float32, in training only, since inference engines run this gate in float32.

## How to fix
Train without autocast and with the weights in bfloat16, where the upcast holds, or switch autocast off around the
router.

## Limits
An error where the lowering was measured in the real library, a warning where it was read from code. It cannot see a
patch of yours that switches autocast off around the router. float16 is PR001's.
)md";

std::string remedy(Facts& f) {
  const std::string* framework = f.want(f->framework);
  const bool axolotl = framework && framework->rfind("axolotl", 0) == 0;
  // Axolotl: full is bfloat16 without autocast; its key bfloat16 reaches TrainingArguments as bf16 (_configure_precision_settings).
  const say::Settings pure = {{"bf16", axolotl ? "full" : "false"}};
  return say::training(f, pure) +
         "\nwith the weights loaded in bfloat16. Or keep autocast, and switch it off around each router:\n"
         "    for name, m in model.named_modules():\n"
         "        if name.endswith(\"." +
         say::router_leaf(f) +
         "\"): m.forward = torch.autocast(\"cuda\", enabled=False)(m.forward)\n"
         "which moe-audit cannot see; then:\n    moe-audit check --ignore PR004";
}

Outcome check(Facts& f) {
  const bool* undone = f.require(f->router_undone);
  const DType* dtype = f.want(f->router_dtype);
  const Routing* routing = f.want(f->routing);
  if (routing && routing->logits_dtype != DType::kF32) {
    return Outcome::not_applicable("this family's code does not upcast its router: there is nothing to undo");
  }
  if (f.missing()) return f.cannot_tell();
  if (!*undone) return Outcome::pass("the float32 router stays in float32");
  if (dtype && *dtype == DType::kF16) return Outcome::not_applicable("the router computes in F16, which PR001 judges");

  const bool* measured = f.want(f->router_undone_measured);
  const std::string* family = f.want(f->family);
  const auto flips = precision::executed_or(f, "bf16");
  Finding finding;
  finding.severity = measured && *measured ? Severity::kError : Severity::kWarning;
  finding.message = "The code of " + (family ? *family : "this family") + " runs the router in F32, and autocast" +
                    say::at(f->precision.source()) + " lowers it to " + (dtype ? name_of(*dtype) : "BF16") +
                    " again. " + precision::sentence(flips);
  finding.evidence = {say::evidence(f->router_undone)};
  if (f.want(f->precision)) finding.evidence.push_back(say::evidence(f->precision));
  if (dtype) finding.evidence.push_back(say::evidence(f->router_dtype));
  if (measured) finding.evidence.push_back(say::evidence(f->router_undone_measured));
  precision::add_evidence(flips, &finding);
  finding.remedy = remedy(f);
  finding.does_not_show =
      "That the run diverges or ends worse; it shows that training routes otherwise than the code says.";
  finding.locations = {location_of(f->precision.known() ? f->precision.source() : f->router_undone.source())};
  finding.sources = say::sources({f->router_undone.source().cite, "fixtures/oracle/autocast.json"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_fp32_router_undone_by_autocast;
const Rule rule_fp32_router_undone_by_autocast = {
    .id = "PR004",
    .name = "fp32-router-undone-by-autocast",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "The code upcasts the router to float32, and autocast lowers it again.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

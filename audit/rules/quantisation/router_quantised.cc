// QU001: the router's weight is quantised.
#include "audit/rules/precision/flips.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The router's weight is stored or loaded in 4 or 8 bits. The report says how many tokens of this checkpoint change
experts when the router is rounded that way.

## Why it matters
bitsandbytes replaces every nn.Linear that is not on the skip list, and in transformers 4 the router is one:
`load_in_4bit` quantises it unasked. (In transformers 5 it is a bare parameter and stays as it is.) The router is
0.002 % of Mixtral's weights, so nothing is saved, and it decides which experts run: nf4 keeps 16 levels a block of
64 (arXiv 2305.14314). Unsloth skips it by name, ms-swift skips `mlp.gate` (which Mixtral's `block_sparse_moe.gate`
is not), Axolotl, TRL and LLaMA-Factory have no skip list for it.

## How to fix
Put the router on the skip list. A list of your own replaces the default one, so repeat lm_head, or it is quantised
too (huggingface/transformers issue 45674).

## Limits
A warning; an error where the configuration claims to skip the router and it is quantised all the same. A share of
changed tokens is of this checkpoint on this input. A LoRA on the router may learn to make up for part of the
rounding.
)md";

std::string mode_of(Facts& f) {
  const std::string* method = f.want(f->quant_method);
  const std::int64_t* bits = f.want(f->quant_bits);
  if (method && method->find("nf4") != std::string::npos) return "nf4";
  if ((method && method->find("int8") != std::string::npos) || (bits && *bits == 8)) return "int8";
  return {};
}

Outcome check(Facts& f) {
  const std::int64_t* bits = f.want(f->quant_bits);
  if (bits && *bits == 0) return Outcome::not_applicable("nothing is quantised");
  const bool* quantised = f.require(f->router_quantised);
  if (f.missing()) return f.cannot_tell();
  if (!*quantised) return Outcome::pass("the router keeps its own dtype");

  const bool* claimed = f.want(f->router_quant_claimed_skipped);
  const bool contradiction = claimed && *claimed;
  const std::string* method = f.want(f->quant_method);
  const std::string mode = mode_of(f);
  const auto flips = mode.empty() ? std::nullopt : precision::measured(f, mode);
  const std::string leaf = say::router_leaf(f);
  Finding finding;
  finding.severity = contradiction ? Severity::kError : Severity::kWarning;
  finding.message = "The router (" + leaf + ") is quantised" + (method ? " by " + *method : "") +
                    (bits ? " to " + std::to_string(*bits) + " bits" : "") + say::at(f->router_quantised.source()) +
                    ".";
  if (contradiction) finding.message += " The configuration claims to skip it" + say::at(f->quant_skip.source()) + ".";
  finding.message += mode.empty()
                         ? " How many tokens change experts by it is not known: this format is not replayed here."
                         : " " + precision::sentence(flips);
  finding.evidence = {say::evidence(f->router_quantised)};
  if (bits) finding.evidence.push_back(say::evidence(f->quant_bits));
  if (method) finding.evidence.push_back(say::evidence(f->quant_method));
  if (contradiction) finding.evidence.push_back(say::evidence(f->quant_skip));
  precision::add_evidence(flips, &finding);
  finding.remedy = say::quantisation_skip(f, {leaf, "lm_head"});
  finding.does_not_show = "Whether training with the rounded router ends worse.";
  finding.locations = {location_of(contradiction && f->quant_skip.known() ? f->quant_skip.source()
                                   : f->quant_bits.known()                ? f->quant_bits.source()
                                                                          : f->router_quantised.source())};
  finding.sources = say::sources({f->router_quantised.source().cite,
                                  "huggingface/transformers src/transformers/integrations/"
                                  "bitsandbytes.py",
                                  "arXiv 2305.14314", "huggingface/transformers issue 45674"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_router_quantised;
const Rule rule_router_quantised = {
    .id = "QU001",
    .name = "router-quantised",
    .since = "0.1.0",
    .severity = Severity::kWarning,
    .summary = "The router's weight is quantised.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

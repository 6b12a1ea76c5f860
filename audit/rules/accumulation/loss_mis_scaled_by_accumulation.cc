// GA001: loss and gradients are a multiple of what they should be.
#include <cmath>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
gradient_accumulation_steps is over 1, and every version this run may use scales the loss of this class and trainer
wrongly.

## Why it matters
The gradient is a multiple of the true one. Adam hides most of it: its step hardly depends on the scale. What does
not scale along breaks: max_grad_norm clips at the wrong place (a factor of 8 with the default 1.0 clips all steps
instead of the rare ones), SGD-like optimizers step 8 times as far, weight decay and the balance loss lose or gain
weight, logged losses cannot be compared between runs.

Measured, one optimizer step of the real Trainer at GA 8 against one batch of the same tokens, tiny Mixtral, OLMoE
and Qwen2-MoE, with and without PEFT (fixtures/oracle/accumulation.json): 8 times too large in 4.47.0 and 4.48.0,
right in 4.47.1 and 4.48.1 to 5.0.0, 8 times too small in 5.2.0, right again in 5.5.4. The thinker of Qwen3-Omni is 8 times too
large in 4.57 to 5.1 and 5.5.4 to 5.16 (fixtures/oracle/advisories.jsonl). Reported in
huggingface/transformers issues 35663 and 45305 and, as a first loss of 83.7 instead of 10.5, in
axolotl-ai-cloud/axolotl issue 2262.

## How to fix
Use a version that was measured right, or move the accumulation into the micro-batch.

## Limits
Only measured rows count: other trainers, DeepSpeed and patched stacks get cannot_tell. The mean of means over
micro-batches of unequal length (before 4.46) is another, smaller bias and not meant here.
)md";

/// First loss of the log: at a factor of 8 it shows as a start of 8 x ln(vocabulary).
void add_first_loss(Facts& f, Finding* finding) {
  const LogTable* log = f.want(f->log);
  if (!log) return;
  for (std::size_t i = 0; i < log->step.size(); ++i) {
    if (!log->has_loss[i]) continue;
    finding->evidence.push_back({"log.history loss at step " + std::to_string(log->step[i]),
                                 say::number(log->loss[i]),
                                 {log->file, log->line[i], "loss", ""}});
    return;
  }
}

Outcome check(Facts& f) {
  const std::int64_t* steps = f.require(f->accumulation);
  if (steps && *steps <= 1)
    return Outcome::not_applicable("one micro-batch per optimizer step: there is nothing to scale");
  const double* factor = f.require(f->loss_factor);
  if (f.missing()) return f.cannot_tell();
  if (std::abs(*factor - 1.0) < 1e-9) return Outcome::pass("the loss is scaled rightly at this accumulation");

  const VersionSet* version = f.want(f->transformers);
  const std::string how =
      *factor > 1 ? say::number(*factor) + " times too large" : say::number(1 / *factor) + " times too small";
  Finding finding;
  finding.severity = Severity::kError;
  finding.message = "Loss gradients are " + how + ": gradient_accumulation_steps is " + std::to_string(*steps) +
                    say::at(f->accumulation.source()) + (version ? " and transformers " + to_text(*version) : "") +
                    " mis-scales it by " + say::number(*factor) + ".";
  finding.evidence = {say::evidence(f->loss_factor), say::evidence(f->accumulation)};
  if (version) finding.evidence.push_back(say::evidence(f->transformers));
  add_first_loss(f, &finding);
  const std::int64_t* micro = f.want(f->micro_batch);
  const std::string* family = f.want(f->family);
  const bool thinker = family && *family == "qwen3_omni_moe_thinker";  // right since 5.17.0 alone
  finding.remedy =
      std::string("Move to a release that was measured right:\n    pip install \"transformers==") + (thinker ? "5.23.0" : "4.57.6") +
      "\"\nor, with the same tokens per step if they fit. " +
      say::training(f, {{"gradient_accumulation_steps", "1"},
                        {"per_device_train_batch_size", std::to_string(*steps * (micro ? *micro : 1))}});
  finding.does_not_show =
      "That the weights are spoilt: under Adam the step length hardly changes; clipping, weight decay and "
      "the balance loss change against it.";
  finding.locations = {location_of(version ? f->transformers.source() : f->accumulation.source()),
                       location_of(f->accumulation.source())};
  finding.sources = say::sources({f->loss_factor.source().cite, "fixtures/oracle/accumulation.json",
                                  "huggingface/transformers issues 35663, 45305"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_loss_mis_scaled_by_accumulation;
const Rule rule_loss_mis_scaled_by_accumulation = {
    .id = "GA001",
    .name = "loss-mis-scaled-by-accumulation",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "Gradients are a multiple of what they should be at this accumulation.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

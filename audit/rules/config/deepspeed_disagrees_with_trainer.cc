// CF002: the DeepSpeed JSON and the trainer's arguments state one setting differently.
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
What the DeepSpeed JSON (or the `deepspeed_config` of an Accelerate file) states in numbers or flags against
TrainingArguments: gradient_accumulation_steps, micro batch, gradient clipping, bf16, fp16.

## Why it matters
transformers compares both before training and raises `ValueError: Please correct the following DeepSpeed config values
that mismatch TrainingArguments values` (integrations/deepspeed.py, trainer_config_finalize; the same in 4.57.6 and
5.23.0). The run stops after the model was loaded, which for a large MoE takes minutes on every node.

## How to fix
Write "auto" in the JSON: TrainingArguments then speaks alone. Or state the same value in both.

## Limits
Values that one side leaves to its default are compared as their defaults. Learning rate, betas, weight decay and
train_batch_size are compared by transformers too, and not here. A script that hands the JSON to DeepSpeed itself,
without transformers, is not refused: it then accumulates as the JSON says.
)md";

Outcome check(Facts& f) {
  const bool* engine = f.require(f->deepspeed);
  if (engine && !*engine) return Outcome::not_applicable("DeepSpeed is not in use");
  const std::vector<SettingConflict>* conflicts = f.require(f->setting_conflicts);
  if (f.missing()) return f.cannot_tell();
  std::vector<Finding> findings;
  for (const SettingConflict& c : *conflicts) {
    const Location here{c.file, c.line, c.setting, ""};
    const Location there{c.other_file, c.other_line, c.other, ""};
    auto place = [](const std::string& file, int line) {
      return file.empty() ? std::string(" (a default)")
                          : " (" + file + (line > 0 ? ":" + std::to_string(line) : std::string()) + ")";
    };
    Finding finding;
    finding.severity = Severity::kError;
    finding.message = "DeepSpeed's " + c.setting + " is " + c.value + place(c.file, c.line) + " and the trainer's " + c.other +
                      " is " + c.other_value + place(c.other_file, c.other_line) +
                      ": transformers refuses to start with two values.";
    finding.evidence = {{c.setting, c.value, here}, {c.other, c.other_value, there}};
    const std::size_t dot = c.setting.rfind('.');
    finding.remedy = "Leave it to the trainer, in the DeepSpeed config" +
                     (dot == std::string::npos ? std::string() : " under \"" + c.setting.substr(0, dot) + "\"") +
                     ":\n    \"" + (dot == std::string::npos ? c.setting : c.setting.substr(dot + 1)) + "\": \"auto\"";
    finding.does_not_show = "Which of the two values was meant.";
    finding.locations = {here};
    if (!c.other_file.empty()) finding.locations.push_back(there);
    finding.sources = {"huggingface/transformers src/transformers/integrations/deepspeed.py "
                       "HfTrainerDeepSpeedConfig.trainer_config_process"};
    findings.push_back(std::move(finding));
  }
  return Outcome::findings_or_pass(std::move(findings), "the DeepSpeed config and the trainer agree");
}

}  // namespace

extern const Rule rule_deepspeed_disagrees_with_trainer;
const Rule rule_deepspeed_disagrees_with_trainer = {
    .id = "CF002",
    .name = "deepspeed-disagrees-with-trainer",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "The DeepSpeed config and the trainer state one setting differently.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

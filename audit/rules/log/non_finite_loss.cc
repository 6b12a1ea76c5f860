// LG001: the loss left the finite numbers.
#include <algorithm>
#include <cmath>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The log of the trainer: a loss (training, evaluation or balance) that is NaN or infinite; a training loss of exactly
0.0 after a finite start; a gradient norm that is NaN or infinite.

## Why it matters
A NaN gradient is written into the weights by the next optimizer step, and everything after it is lost. The loss
need not show it: with logging_nan_inf_filter, on by default, Trainer replaces a NaN step by the mean of the steps
since the last log line, which is 0.0 when they all were NaN (transformers/trainer.py; huggingface/trl issue 6702).
So "loss 0.0, grad_norm nan" is what a dead run looks like.

In fp16 a non-finite gradient norm now and then is normal: the loss scaler skips that step and halves its scale,
starting at 2^16, so up to 16 in a row at the start and single ones later are only a note.

## How to fix
Stop, go back to a checkpoint before the first bad step, change one thing: precision, learning rate or clipping.

## Limits
It reads what was logged: with logging_steps 100 the step is one of a hundred. A loss below 0.00005 is printed as
0.0 by transformers 4; where the loss stood at 0.1 or more one line before, or the gradient norm says otherwise, it
is reported. GRPO, RLOO and PPO losses are 0 by construction and are not judged for it.
)md";

struct Bad {
  std::int64_t entries = 0;
  std::size_t first = 0;
  double last_finite = std::nan("");
};

/// First non-finite value of a column, and the last finite one before it.
Bad scan(const std::vector<char>& has, const std::vector<double>& value) {
  Bad bad;
  for (std::size_t i = 0; i < value.size(); ++i) {
    if (!has[i]) continue;
    if (std::isfinite(value[i])) {
      if (bad.entries == 0) bad.last_finite = value[i];
    } else if (bad.entries++ == 0) {
      bad.first = i;
    }
  }
  return bad;
}

Location place(const LogTable& log, std::size_t i, const char* key) { return {log.file, log.line[i], key, ""}; }

std::string remedy(Facts& f, const LogTable& log, std::size_t i) {
  const Precision* precision = f.want(f->precision);
  const bool fp16 = precision && (*precision == Precision::kAutocastFp16 || *precision == Precision::kPureFp16);
  const double rate = log.learning_rate[i];
  const std::string lower = std::isfinite(rate) && rate > 0 ? say::literal(rate / 10) : "1.0e-05";
  const say::Settings change = fp16 ? say::Settings{{"bf16", "true"}, {"fp16", "false"}}
                                    : say::Settings{{"learning_rate", lower}, {"max_grad_norm", "1.0"}};
  return "Stop, and resume from a checkpoint before step " + std::to_string(log.step[i]) + ". " +
         say::training(f, change);
}

Finding bad_value(Facts& f, const LogTable& log, const char* name, const std::vector<double>& value, const Bad& bad) {
  Finding finding;
  finding.severity = Severity::kError;
  finding.message =
      std::string(name) + " is " + to_text(value[bad.first]) + " at step " + std::to_string(log.step[bad.first]) +
      " and in " + say::plural(bad.entries, "log entry", "log entries") + " in all" +
      (std::isfinite(bad.last_finite) ? "; the last finite value before it was " + say::number(bad.last_finite) : "") +
      ".";
  finding.evidence = {{"log.history " + std::string(name) + " at step " + std::to_string(log.step[bad.first]),
                       to_text(value[bad.first]), place(log, bad.first, name)}};
  if (std::isfinite(log.learning_rate[bad.first])) {
    finding.evidence.push_back(
        {"learning_rate", say::number(log.learning_rate[bad.first]), place(log, bad.first, "learning_rate")});
  }
  finding.remedy = remedy(f, log, bad.first);
  finding.does_not_show = "What made it non-finite: data, precision, learning rate or a kernel.";
  finding.locations = {place(log, bad.first, name)};
  finding.sources = {"huggingface/transformers src/transformers/trainer.py (logging_nan_inf_filter)",
                     "huggingface/trl issue 6702"};
  return finding;
}

/// First entry whose loss is 0.0 although it cannot have been learnt: from 0.1 or more within one line of the log, or
/// with a gradient norm that contradicts it (zero, non-finite, or as large as ever).
std::size_t dead_zero(const LogTable& log, double* before) {
  constexpr double kCannotVanishInOneLine = 0.1, kNormOfAFinishedRun = 0.1;
  double last = 0.0;
  for (std::size_t i = 0; i < log.loss.size(); ++i) {
    if (!log.has_loss[i]) continue;
    if (log.loss[i] != 0.0) {
      last = log.loss[i];
      continue;
    }
    const double norm = log.grad_norm[i];
    const bool learnt = log.has_grad_norm[i] && std::isfinite(norm) && norm > 0 && norm < kNormOfAFinishedRun;
    if (std::isfinite(last) && last >= kCannotVanishInOneLine && !learnt) {
      *before = last;
      return i;
    }
  }
  return log.loss.size();
}

bool zero_by_construction(Facts& f) {
  const std::string* trainer = f.want(f->trainer);
  if (!trainer) return false;
  return trainer->find("GRPO") != std::string::npos || trainer->find("RLOO") != std::string::npos ||
         trainer->find("PPO") != std::string::npos;
}

/// Longest runs of non-finite gradient norms: the one that opens the log, and any later one.
struct Runs {
  std::int64_t at_start = 0, later = 0;
};

Runs runs_of(const LogTable& log) {
  Runs runs;
  std::int64_t current = 0;
  bool start = true;
  for (std::size_t i = 0; i < log.grad_norm.size(); ++i) {
    if (!log.has_grad_norm[i]) continue;
    if (std::isfinite(log.grad_norm[i])) {
      start = false;
      current = 0;
      continue;
    }
    std::int64_t& longest = start ? runs.at_start : runs.later;
    longest = std::max(longest, ++current);
  }
  return runs;
}

Outcome check(Facts& f) {
  const LogTable* log = f.require(f->log);
  if (f.missing()) return f.cannot_tell();
  if (log->step.empty()) return Outcome::not_applicable("the log has no entries");
  std::vector<Finding> findings;
  const Bad loss = scan(log->has_loss, log->loss), eval = scan(log->has_eval_loss, log->eval_loss);
  const Bad aux = scan(log->has_aux_loss, log->aux_loss), norm = scan(log->has_grad_norm, log->grad_norm);
  if (loss.entries > 0) findings.push_back(bad_value(f, *log, "loss", log->loss, loss));
  if (eval.entries > 0) findings.push_back(bad_value(f, *log, "eval_loss", log->eval_loss, eval));
  if (aux.entries > 0) findings.push_back(bad_value(f, *log, "aux_loss", log->aux_loss, aux));

  double before = 0;
  const std::size_t zero = loss.entries > 0 || zero_by_construction(f) ? log->loss.size() : dead_zero(*log, &before);
  if (zero < log->loss.size()) {
    Finding finding = bad_value(f, *log, "loss", log->loss, {1, zero, before});
    finding.message = "loss is exactly 0 at step " + std::to_string(log->step[zero]) + ", after " +
                      say::number(before) + " in the entry before" +
                      (log->has_grad_norm[zero] ? ", with grad_norm " + to_text(log->grad_norm[zero]) : "") +
                      ": Trainer prints 0 where every step since the last entry was NaN.";
    findings.push_back(std::move(finding));
  }
  if (!findings.empty() || norm.entries == 0)
    return Outcome::findings_or_pass(std::move(findings), "every logged loss is finite");

  const Precision* precision = f.want(f->precision);
  const bool scaled = !precision || *precision == Precision::kAutocastFp16;  // only fp16 autocast has a loss scaler
  const Runs runs = runs_of(*log);
  constexpr std::int64_t kHalvingsOfTheScale = 16;  // torch.amp.GradScaler starts at 2^16
  Finding finding = bad_value(f, *log, "grad_norm", log->grad_norm, norm);
  if (scaled && runs.at_start <= kHalvingsOfTheScale && runs.later <= 1) {
    finding.severity = Severity::kNote;
    finding.message += std::string(precision ? " In fp16 the loss scaler skips such steps"
                                             : " If this is fp16, the loss scaler skips such steps") +
                       ", and every loss is finite.";
    finding.remedy = "Nothing, while they stay rare. In bf16 there is no loss scale. " +
                     say::training(f, {{"bf16", "true"}, {"fp16", "false"}});
  }
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_non_finite_loss;
const Rule rule_non_finite_loss = {
    .id = "LG001",
    .name = "non-finite-loss",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "The loss is NaN, infinite, or exactly 0 after a finite start.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

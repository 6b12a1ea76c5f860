// LG003: training loss and evaluation loss differ by the accumulation steps or the processes.
#include <algorithm>
#include <cmath>
#include <optional>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
gradient_accumulation_steps, the number of processes or their product is 4 or more, the log has at least 3 pairs of a
training and an evaluation loss no more than one logging interval apart, and in at least three quarters of them the
ratio is within 15 % of one of these numbers, or of one over the accumulation steps.

## Why it matters
Evaluation neither accumulates nor sums over processes, so its loss is the true scale. A training loss that is 8 times it at 8 accumulation
steps has been summed over the micro-batches instead of averaged; an eighth of it has been divided twice. The gradient
goes along: max_grad_norm then clips every step, or none (GA001). Seen as a first loss of 83.7 instead of 10.5
(axolotl-ai-cloud/axolotl issue 2262).

## How to fix
Move to a release whose scaling was measured right (fixtures/oracle/accumulation.json), or do without accumulation.

## Limits
A warning, for some releases mis-scale what they *log* and not the gradient; an error only where GA001 knows from a
measured row that the gradient has the same factor. Under 4 an honest gap between training and evaluation data
could look the same.
)md";

constexpr double kLeastFactor = 4;
constexpr std::size_t kLeastPairs = 3;
constexpr double kWithin = 0.15, kMostOfThem = 0.75;

struct Pair {
  std::size_t train, eval;
  double ratio;
};

/// Median distance of the steps at which a training loss was logged.
std::int64_t logging_interval(const LogTable& log) {
  std::vector<std::int64_t> gaps;
  std::int64_t last = -1;
  for (std::size_t i = 0; i < log.step.size(); ++i) {
    if (!log.has_loss[i]) continue;
    if (last >= 0 && log.step[i] > last) gaps.push_back(log.step[i] - last);
    last = log.step[i];
  }
  if (gaps.empty()) return 0;
  std::nth_element(gaps.begin(), gaps.begin() + static_cast<std::ptrdiff_t>(gaps.size() / 2), gaps.end());
  return gaps[gaps.size() / 2];
}

std::vector<Pair> pairs_of(const LogTable& log) {
  const std::int64_t interval = logging_interval(log);
  std::vector<Pair> pairs;
  for (std::size_t e = 0; e < log.step.size(); ++e) {
    if (!log.has_eval_loss[e] || !std::isfinite(log.eval_loss[e]) || log.eval_loss[e] <= 0) continue;
    std::optional<std::size_t> nearest;
    for (std::size_t t = 0; t < log.step.size(); ++t) {
      if (!log.has_loss[t] || !std::isfinite(log.loss[t]) || log.loss[t] <= 0) continue;
      const std::int64_t distance = std::abs(log.step[t] - log.step[e]);
      if (distance <= interval && (!nearest || distance < std::abs(log.step[*nearest] - log.step[e]))) nearest = t;
    }
    if (nearest) pairs.push_back({*nearest, e, log.loss[*nearest] / log.eval_loss[e]});
  }
  return pairs;
}

bool near(double ratio, double factor) { return std::abs(ratio / factor - 1) <= kWithin; }

/// What the loss may have been multiplied by, each 4 or more or the inverse of it.
struct Factor {
  double value;
  std::string of;  // "the accumulation steps"
  bool accumulation;
};

Outcome check(Facts& f) {
  const std::int64_t* steps = f.require(f->accumulation);
  const std::int64_t* world = f.want(f->world_size);
  const double ga = steps ? static_cast<double>(*steps) : 1, w = world ? static_cast<double>(*world) : 1;
  if (steps && std::max({ga, w, ga * w}) < kLeastFactor) {
    return Outcome::not_applicable("gradient_accumulation_steps is " + std::to_string(*steps) +
                                   (world ? " on " + say::plural(*world, "process", "processes") : "") +
                                   ": a factor under 4 cannot be told from an honest gap between training and evaluation");
  }
  const LogTable* log = f.require(f->log);
  if (f.missing()) return f.cannot_tell();
  const std::vector<Pair> pairs = pairs_of(*log);
  if (pairs.size() < kLeastPairs) {
    return Outcome::not_applicable("the log has " + say::plural(static_cast<std::int64_t>(pairs.size()), "pair", "pairs") +
                                   " of training and evaluation loss close to each other; 3 are needed");
  }
  std::vector<Factor> factors;
  for (const Factor& each : {Factor{ga, ga == w ? "the accumulation steps (or the processes)" : "the accumulation steps", true}, Factor{w, "the processes", false},
                             Factor{ga > 1 && w > 1 ? ga * w : 1, "accumulation steps x processes", false}}) {
    if (each.value < kLeastFactor) continue;
    factors.push_back(each);
    if (each.accumulation) factors.push_back({1 / each.value, each.of, true});
  }
  for (const auto& [factor, of, accumulation] : factors) {
    std::size_t hits = 0;
    const Pair* first = nullptr;
    for (const Pair& p : pairs) {
      if (!near(p.ratio, factor)) continue;
      if (hits++ == 0) first = &p;
    }
    if (hits < kLeastPairs || static_cast<double>(hits) < kMostOfThem * static_cast<double>(pairs.size())) continue;
    const double* known = f.want(f->loss_factor);
    const bool agrees = accumulation && known && near(*known, factor);
    const Location where{log->file, log->line[first->train], "loss", ""};
    Finding finding;
    finding.severity = agrees ? Severity::kError : Severity::kWarning;
    finding.message = "The logged training loss is " + say::number(factor > 1 ? factor : 1 / factor) + (factor > 1 ? " times" : " times less than") +
                      " the evaluation loss in " + std::to_string(hits) + " of " + std::to_string(pairs.size()) +
                      " places of the log (first " + say::number(log->loss[first->train]) + " against " +
                      say::number(log->eval_loss[first->eval]) + " at step " + std::to_string(log->step[first->eval]) +
                      "): " + of + say::at(accumulation ? f->accumulation.source() : f->world_size.source()) + " are " + (factor > 1 ? "in" : "divided out of") +
                      " it" + (factor > 1 ? "." : " once too often.");
    finding.evidence = {{"log.history loss / eval_loss", say::number(first->ratio), where},
                        {"log.history pairs", std::to_string(pairs.size()), where},
                        say::evidence(f->accumulation)};
    if (world) finding.evidence.push_back(say::evidence(f->world_size));
    if (known) finding.evidence.push_back(say::evidence(f->loss_factor));
    const std::int64_t* micro = f.want(f->micro_batch);
    finding.remedy = !accumulation ? "Average the loss over processes where it is summed:\n    loss = loss / accelerator.num_processes"
                                   : "Move to a release that was measured right:\n    pip install \"transformers==4.57.6\"\nor do without accumulation. " +
                     say::training(f, {{"gradient_accumulation_steps", "1"},
                                       {"per_device_train_batch_size", std::to_string(*steps * (micro ? *micro : 1))}});
    finding.does_not_show = agrees ? "That the weights are spoilt: under Adam the step length hardly changes."
                                   : "That the gradient has the factor too: it may be the log alone.";
    finding.locations = {where, location_of(f->accumulation.source())};
    finding.sources = {"axolotl-ai-cloud/axolotl issue 2262", "fixtures/oracle/accumulation.json"};
    return Outcome::finding(std::move(finding));
  }
  return Outcome::pass("training and evaluation loss do not differ by the accumulation steps or the processes");
}

}  // namespace

extern const Rule rule_loss_scaled_by_accumulation;
const Rule rule_loss_scaled_by_accumulation = {
    .id = "LG003",
    .name = "loss-scaled-by-accumulation",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "Training loss over evaluation loss is the number of accumulation steps, or of processes.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

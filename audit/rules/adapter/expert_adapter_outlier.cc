// AD009: one expert's adapter is far larger than those beside it.
#include <algorithm>
#include <cmath>
#include <map>

#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The change that an expert's adapter makes, scale x |B A| (Frobenius norm, scale = alpha / r or alpha / sqrt(r)), is more than
10 times the median of the experts of the same projection in the same layer.

## Why it matters
Adam moves an entry by about the learning rate a step whatever the size of its gradient, so experts that get tokens in most
steps end within a small factor of each other: in the ten trained checkpoints of fixtures/runs the largest is at most 1.7
times its median. An expert ten times beyond was driven by something else: a collapsed router that sends it nearly everything,
a learning rate or rank of its own, a burst of gradients, or a merge of adapters at different scales. Its output changes by
ten times what its neighbours' does, for just the tokens that are routed there.

## How to fix
Look at the expert load and the gradient norms of the run; train the router with its balance loss; clip gradients.

## Limits
A note; a warning from 100 times on. Small adapters are not reported: an expert that got few tokens is AD006's. At least four
adapted experts of a projection in a layer are needed, and SGD, which scales with the gradient, spreads further than Adam.
The change is not compared with the base weight.
)md";

constexpr double kNote = 10, kWarning = 100;
constexpr std::size_t kFewest = 4;

struct Row {
  std::size_t index;
  double change;
};

/// "model.layers.3.mlp.experts.{e}.w1" for both layouts.
std::string projection(const AdapterTensors& t, std::size_t i) {
  const std::string number = ".experts." + std::to_string(t.expert[i]) + ".";
  const std::size_t at = t.module[i].find(number);
  return at == std::string::npos ? t.module[i] : t.module[i].substr(0, at) + ".experts.{e}." + t.module[i].substr(at + number.size());
}

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const AdapterTensors* t = f.require(f->adapter_tensors);
  if (f.missing()) return f.cannot_tell();
  std::map<std::string, std::vector<Row>> groups;
  for (std::size_t i = 0; i < t->module.size(); ++i) {
    if (t->part[i] != Part::kRoutedExpert || t->expert[i] < 0) continue;
    const double scale = std::isfinite(t->scale[i]) ? t->scale[i] : 1;  // one for all: ratios do not need it
    const double change = scale * t->norm_ba[i];
    if (std::isfinite(change) && change > 0) groups[projection(*t, i)].push_back({i, change});
  }
  std::vector<Row> outliers;
  std::map<std::size_t, double> medians;
  std::size_t judged = 0;
  double widest = 0;
  for (auto& [name, rows] : groups) {
    if (rows.size() < kFewest) continue;
    ++judged;
    std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.change < b.change; });
    const double median = rows[(rows.size() - 1) / 2].change;
    widest = std::max(widest, rows.back().change / median);
    for (const Row& row : rows) {
      if (row.change <= kNote * median) continue;
      outliers.push_back(row);
      medians[row.index] = median;
    }
  }
  if (judged == 0) return Outcome::not_applicable("no layer has four trained expert adapters of one projection");
  if (outliers.empty()) return Outcome::pass("the largest expert adapter is " + say::number(widest) + " times its layer's median");

  auto ratio = [&](const Row& r) { return r.change / medians[r.index]; };
  std::stable_sort(outliers.begin(), outliers.end(), [&](const Row& a, const Row& b) { return ratio(a) > ratio(b); });
  const Row& worst = outliers.front();
  const std::size_t i = worst.index;
  Finding finding;
  finding.severity = ratio(worst) > kWarning ? Severity::kWarning : Severity::kNote;
  finding.message = say::plural(static_cast<std::int64_t>(outliers.size()), "expert adapter is", "expert adapters are") +
                    " more than 10 times the median of its layer; the largest, expert " + std::to_string(t->expert[i]) + " of layer " +
                    std::to_string(t->layer[i]) + " (" + t->module[i] + "), " + say::number(ratio(worst)) + " times: scale x |B A| is " +
                    say::number(worst.change) + ", the median " + say::number(medians[i]) + ".";
  for (std::size_t k = 0; k < outliers.size() && k < 8; ++k) {
    const std::size_t row = outliers[k].index;
    finding.evidence.push_back({"scale x |B A|, expert " + std::to_string(t->expert[row]),
                                say::number(outliers[k].change) + " (" + say::number(ratio(outliers[k])) + " x median)",
                                {f->adapter_tensors.source().file, 0, "", t->module[row]}});
  }
  if (std::isfinite(t->scale[i])) finding.evidence.push_back({"scale", say::number(t->scale[i]), {}});
  if (f.want(f->adapter_alpha)) finding.evidence.push_back(say::evidence(f->adapter_alpha));
  finding.remedy = say::training(f, {{"max_grad_norm", "1.0"}}) + "\nTo accept it:\n    moe-audit check --ignore AD009";
  finding.does_not_show = "Whether the expert earned it: a task may need one expert more than others.";
  finding.locations = {{f->adapter_tensors.source().file, 0, "", t->module[i]}};
  finding.sources = {"arXiv 1412.6980 section 2.1 (steps of Adam are bounded by the learning rate)", "arXiv 2106.09685 section 4.1"};
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_expert_adapter_outlier;
const Rule rule_expert_adapter_outlier = {
    .id = "AD009",
    .name = "expert-adapter-outlier",
    .since = "0.2.0",
    .severity = Severity::kNote,
    .summary = "One expert's adapter is far larger than those beside it.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

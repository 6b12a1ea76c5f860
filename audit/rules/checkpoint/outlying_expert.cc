// CK005: an expert is exactly zero, dead by norm, or of a size far from its layer's experts.
#include <algorithm>
#include <cmath>
#include <map>

#include "audit/rules/checkpoint/experts.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
The root mean square (RMS) of every matrix of every routed expert, against the median over the experts of its layer.

| found | verdict |
|---|---|
| a matrix of an expert is exactly zero, and the same matrix of other experts of the layer is not | error |
| a matrix is exactly zero in all experts of the layer | warning |
| RMS at most 1/32 of the layer's median: dead by norm | warning |
| RMS at most 1/4 or at least 4 times the median | note |

The last two also ask for 6 robust deviations of the logarithm (1.4826 x median distance from the median) and 4
experts.

## Why it matters
An expert of zeros answers its share of the tokens with 0, and where gate, up and down are all zero its gradient is
zero as well: down x h with h = 0 on one side, a zero down_proj on the other. It cannot recover. Training does not
produce exact zeros; a sharded save that gathered an empty parameter, or a pruning mask, does.

Load does not show an expert that is small: it gets its tokens and adds nothing to them. Decoupled weight decay
shrinks an expert that gets no gradient by 1 - lr x decay a step: with 3e-4 and 0.1 to 1/32 in 115,500 steps. The
output of an expert is a product of its matrices, so 1/32 in one of them is 3 % of the output and in all three 0.003
%.

## How to fix
Zero: go back to a checkpoint or source in which the expert is not zero. Dead by norm: look at its load on your data
before you spend memory on it, and at the balance loss (BL002 to BL006) if you train on.

## Limits
The thresholds are calibrated so that healthy layers stay silent: a random matrix of n values has a relative deviation
of 1/sqrt(2 n) (under 0.01 % for a real expert); the models that transformers itself initialises, and the fixtures
trained from them, stay within 10 % of the median. Of simulated healthy layers whose RMS spreads log-normally
(fixtures/make/outlier_rates.py), per layer and matrix: at a spread of a factor 1.22 none of 10^6 fires; at 1.35, 4 in
10^5 of 8 experts, 2 in 10^5 of 64, none of 128; at 1.65, 0.6 % of 8, 0.015 % of 64, none of 256; dead by norm, none.
Released checkpoints were not measured, so what is merely far is advice. Packed codes (GPTQ, AWQ) are not judged, nor
layers of fewer than 4 experts, except for zeros. Needs `--full` if the files hold more than 2 GB.
)md";

constexpr double kFar = 4.0;
constexpr double kDead = 32.0;
constexpr double kDeviations = 6.0;
constexpr std::size_t kExpertsToCompare = 4;
constexpr std::size_t kSingle = 6;  // so many experts of one kind get a finding each; more share one

/// One expert and what is wrong with it, matrix by matrix.
struct Odd {
  int layer, expert;
  std::size_t unit;                // the first of its matrices, in the scan
  std::vector<std::string> parts;  // "up_proj.weight 0.01"
  double farthest = 0;             // |logarithm of the ratio|
};

struct Found {
  std::vector<Odd> zero, dead, far;
  std::vector<Odd> zero_layers;  // expert -1: all of them
  double widest = 0;             // |logarithm of the ratio| of the sound ones
  std::size_t layers = 0;
};

Odd& entry(std::map<int, Odd>* odd, int layer, int expert, std::size_t unit) {
  return odd->emplace(expert, Odd{layer, expert, unit, {}}).first->second;
}

void judge(const WeightScan& scan, const experts::Layer& layer, Found* out) {
  std::map<std::string, std::vector<std::pair<int, std::size_t>>> by_projection;
  for (const auto& [expert, units] : layer.units) {
    for (std::size_t i : units) {
      if (experts::is_matrix(scan, i)) by_projection[scan.projection[i]].emplace_back(expert, i);
    }
  }
  std::map<int, Odd> zero, dead, far;
  for (const auto& [projection, members] : by_projection) {
    const std::string name = experts::short_name(projection);
    std::vector<std::pair<int, std::size_t>> sound, zeros;
    std::vector<double> logs;
    for (const auto& [expert, i] : members) {
      if (scan.zeros[i] == scan.elements[i]) {
        zeros.emplace_back(expert, i);
      } else if (scan.non_finite[i] == 0 && scan.sum_of_squares[i] > 0) {  // CK001's otherwise
        sound.emplace_back(expert, i);
        logs.push_back(0.5 * std::log(scan.sum_of_squares[i] / static_cast<double>(scan.elements[i])));
      }
    }
    if (zeros.size() == members.size()) {
      out->zero_layers.push_back({layer.layer, -1, zeros.front().second, {name}});
      continue;
    }
    for (const auto& [expert, i] : zeros) entry(&zero, layer.layer, expert, i).parts.push_back(name);
    if (sound.size() < kExpertsToCompare) continue;
    const experts::Centre centre = experts::centre(logs);
    for (std::size_t n = 0; n < sound.size(); ++n) {
      const double off = logs[n] - centre.median, size = std::fabs(off);
      if (size < std::log(kFar) || size < kDeviations * centre.deviation) {
        out->widest = std::max(out->widest, size);
        continue;
      }
      Odd& odd = entry(off <= -std::log(kDead) ? &dead : &far, layer.layer, sound[n].first, sound[n].second);
      odd.parts.push_back(name + " " + experts::rounded(std::exp(off)));
      odd.farthest = std::max(odd.farthest, size);
    }
  }
  for (auto& [expert, odd] : zero) out->zero.push_back(std::move(odd));
  for (auto& [expert, odd] : far) {
    const auto same = dead.find(expert);
    if (same == dead.end()) {
      out->far.push_back(std::move(odd));
    } else {
      same->second.parts.insert(same->second.parts.end(), odd.parts.begin(), odd.parts.end());
    }
  }
  for (auto& [expert, odd] : dead) out->dead.push_back(std::move(odd));
}

std::string who(const Odd& odd) {
  return "expert " + std::to_string(odd.expert) + " of layer " + std::to_string(odd.layer);
}

Finding describe(
    Severity severity, const WeightScan& scan, const std::vector<Odd>& odd, const std::string& what,
    const std::string& says) {  // "Expert 3 of layer 1 (RMS against the layer's median: up_proj.weight 0.01)..."
  Finding finding;
  finding.severity = severity;
  std::vector<std::string> texts;
  for (const Odd& o : odd) {
    texts.push_back((o.expert < 0 ? "layer " + std::to_string(o.layer) : who(o)) + " (" + what + ": " +
                    say::some(o.parts, 6) + ")");
    if (finding.locations.size() >= 8) continue;
    const Location where{scan.file[o.unit], 0, "", scan.tensor[o.unit]};
    finding.locations.push_back(where);
    finding.evidence.push_back({what, texts.back(), where});
  }
  std::string subject = say::some(texts);
  if (odd.size() > 1) subject = say::count(static_cast<std::int64_t>(odd.size())) + " cases, each alike: " + subject;
  subject[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(subject[0])));
  finding.message = subject + says;
  return finding;
}

std::string fetch_again(const Finding& finding) {
  const std::string& file = finding.locations.front().file;
  return "Go back to a checkpoint or a source in which these values are not zero:\n    hf download MODEL " +
         file.substr(file.rfind('/') + 1) +
         " --force-download\nIf they were pruned on purpose:\n"
         "    moe-audit check --ignore CK005";
}

Finding zero(const WeightScan& scan, const std::vector<Odd>& odd) {
  Finding finding = describe(Severity::kError, scan, odd, "exactly zero",
                             ", while the layer's other experts are not: the tokens routed there get nothing.");
  finding.remedy = fetch_again(finding);
  finding.does_not_show = "How many tokens are routed there, or whether it was pruned on purpose.";
  finding.sources = {"huggingface/transformers src/transformers/models/mixtral/modeling_mixtral.py (MixtralExperts)"};
  return finding;
}

Finding zero_layers(const WeightScan& scan, const std::vector<Odd>& odd) {
  Finding finding = describe(Severity::kWarning, scan, odd, "exactly zero in all experts",
                             ": the layer's experts add nothing to any token.");
  finding.remedy = fetch_again(finding);
  finding.does_not_show = "Whether this is a start of training that sets output projections to zero on purpose.";
  finding.sources = {"huggingface/transformers src/transformers/models/mixtral/modeling_mixtral.py (MixtralExperts)"};
  return finding;
}

Finding dead(const WeightScan& scan, const std::vector<Odd>& odd) {
  Finding finding =
      describe(Severity::kWarning, scan, odd, "RMS against the layer's median", " is dead by norm, whatever its load.");
  finding.remedy =
      "Count its tokens on your data before you train or serve it; to go on with it as it is:\n"
      "    moe-audit check --ignore CK005";
  finding.does_not_show = "How many tokens are routed there.";
  finding.sources = {"arXiv 1711.05101 (decoupled weight decay)"};
  return finding;
}

Finding far(const WeightScan& scan, const std::vector<Odd>& odd) {
  Finding finding = describe(Severity::kNote, scan, odd, "RMS against the layer's median",
                             " is far in size from the other experts of its layer.");
  finding.remedy =
      "Compare with the base model (an expert that was far there is a trait, one that moved is a fault); to accept "
      "it:\n"
      "    moe-audit check --ignore CK005";
  finding.does_not_show = "That anything is wrong: experts of a trained model may differ in size.";
  finding.sources = {"arXiv 2406.18219 (experts of larger output are chosen more often)"};
  return finding;
}

template <class Describe>
void report(const WeightScan& scan, const std::vector<Odd>& odd, std::vector<Finding>* findings, Describe one_of) {
  if (odd.size() > kSingle) return findings->push_back(one_of(scan, odd));
  for (const Odd& o : odd) findings->push_back(one_of(scan, {o}));
}

Outcome check(Facts& f) {
  if (const bool* moe = f.want(f->has_moe); moe && !*moe)
    return Outcome::not_applicable("the model has no routed experts");
  const WeightScan* scan = f.require(f->weight_scan);
  if (f.missing()) return f.cannot_tell();
  Found found;
  for (const experts::Layer& layer : experts::layers(*scan)) {
    const bool any = std::any_of(layer.units.begin(), layer.units.end(), [&](const auto& expert) {
      return std::any_of(expert.second.begin(), expert.second.end(),
                         [&](std::size_t i) { return experts::is_matrix(*scan, i); });
    });
    if (!any) continue;
    ++found.layers;
    judge(*scan, layer, &found);
  }
  if (found.layers == 0)
    return Outcome::not_applicable("the weight files hold no two routed experts of a layer as values");
  std::vector<Finding> findings;
  report(*scan, found.zero, &findings, zero);
  if (!found.zero_layers.empty()) findings.push_back(zero_layers(*scan, found.zero_layers));
  report(*scan, found.dead, &findings, dead);
  report(*scan, found.far, &findings, far);
  return Outcome::findings_or_pass(std::move(findings),
                                   "in " + say::plural(static_cast<std::int64_t>(found.layers), "layer", "layers") +
                                       " no expert is zero, and each RMS is within a factor of " +
                                       experts::rounded(std::exp(found.widest)) + " of its layer's median");
}

}  // namespace

extern const Rule rule_outlying_expert;
const Rule rule_outlying_expert = {
    .id = "CK005",
    .name = "outlying-expert",
    .since = "0.2.0",
    .severity = Severity::kError,
    .summary = "An expert is exactly zero, dead by norm, or of a size far from its layer's experts.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

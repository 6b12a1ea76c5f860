// RT001: more experts are to be chosen than there are to choose from.
#include <algorithm>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
k is larger than the number of experts E, or larger than what group-limited routing leaves: top_groups x E / groups.

## Why it matters
k > E stops the first forward: torch.topk raises "selected index k out of range". Over the group limit nothing
stops. Experts of groups that were not chosen are masked, and with too few left the top-k takes masked ones: they
are masked with score 0 in transformers before 5.6 and run all the same, so the group limit that the config states
is not kept; masked with -inf they get weight 0 or NaN. DeepSeek-V3 leaves 4 of 8 groups of 32, so 128 of 256
experts for k = 8 (arXiv 2412.19437).

It happens when experts are pruned or a small model is made from a large one's config.

## How to fix
Lower k, or raise the number of groups a token may use.

## Limits
Compares numbers of the config. Whether they fit the weights is RT003's.
)md";

Finding too_many(Facts& f, std::int64_t k, std::int64_t available, const std::string& why) {
  const std::string& full = f->top_k.source().key;
  const std::size_t dot = full.rfind('.');
  const std::string key = full.empty() ? "num_experts_per_tok" : dot == std::string::npos ? full : full.substr(dot + 1);
  Finding finding;
  finding.severity = Severity::kError;
  finding.message =
      "Each token is to choose " + std::to_string(k) + " experts" + say::at(f->top_k.source()) + ", and " + why + ".";
  finding.evidence = {say::evidence(f->top_k), say::evidence(f->num_experts)};
  finding.remedy = say::model_config(f, {{key, std::to_string(available)}});
  finding.does_not_show = "Which of the numbers is the wrong one.";
  finding.locations = {location_of(f->top_k.source()), location_of(f->num_experts.source())};
  finding.sources = {"torch.topk: k must not exceed the size of the dimension"};
  return finding;
}

Outcome check(Facts& f) {
  const std::int64_t* k = f.require(f->top_k);
  const std::int64_t* experts = f.require(f->num_experts);
  if (f.missing()) return f.cannot_tell();
  if (*k > *experts) {
    return Outcome::finding(
        too_many(f, *k, std::max<std::int64_t>(1, *experts), "there are " + std::to_string(*experts)));
  }
  const std::int64_t* groups = f.want(f->num_groups);
  const std::int64_t* top = f.want(f->top_groups);
  if (!groups || !top || *groups <= 1 || *top < 1)
    return Outcome::pass("k = " + std::to_string(*k) + " of E = " + std::to_string(*experts));
  const std::int64_t left = std::min(*top, *groups) * (*experts / *groups);
  if (*k <= left)
    return Outcome::pass("k = " + std::to_string(*k) + " of the " + std::to_string(left) + " that group limits leave");
  Finding finding = too_many(f, *k, std::max<std::int64_t>(1, left),
                             std::to_string(*top) + " of " + std::to_string(*groups) + " groups leave " +
                                 std::to_string(left) + " of " + std::to_string(*experts));
  finding.evidence.push_back(say::evidence(f->num_groups));
  finding.evidence.push_back(say::evidence(f->top_groups));
  finding.sources = say::sources({"arXiv 2412.19437 section 2.1.2", f->routing.source().cite});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_top_k_exceeds_experts;
const Rule rule_top_k_exceeds_experts = {
    .id = "RT001",
    .name = "top-k-exceeds-experts",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "k is larger than the number of experts, or than group limits leave.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

// AD002: the LoRA on the router has as many parameters as the router.
#include <algorithm>

#include "audit/rules/adapter/reach.h"
#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
A LoRA of rank r on a router of E experts and width d has r (d + E) parameters, the router itself d E. Fires when
the adapter is not smaller.

## Why it matters
Routers are flat: E is 8 to 512 where d is thousands. Break-even is r = d E / (d + E), always below E. For Mixtral
(d 4096, E 8) it is 7.98: r = 8 costs 32,832 parameters for a matrix of 32,768. And no update of an E x d matrix has
a rank above E, so ranks beyond E add parameters and optimizer state that can express nothing new: at r = 16 half of
them. The low rank, which is all that LoRA restrains, restrains nothing here; the router is trained whole, at a
learning rate meant for adapters.

## How to fix
Leave the router out (AD001). If it shall be trained, give it a rank below break-even, or train it whole as
modules_to_save with a learning rate of its own.

## Limits
Sizes only; nothing is said about the quality of the result.
)md";

Outcome check(Facts& f) {
  if (adapter::no_adapter(f)) return Outcome::not_applicable(adapter::kNoAdapter);
  const AdapterModules* modules = f.require(f->adapter_modules);
  if (f.missing()) return f.cannot_tell();
  std::int64_t lora_routers = 0, too_large = 0;
  std::size_t worst = 0;
  for (std::size_t i = 0; i < modules->part.size(); ++i) {
    const std::int64_t r = modules->rank[i], d = modules->in[i], e = modules->out[i];
    if (modules->part[i] != Part::kRouter || r == 0 || d <= 0 || e <= 0) continue;  // rank 0: trained whole
    ++lora_routers;
    if (r * (d + e) < d * e) continue;
    if (too_large == 0 || r > modules->rank[worst]) worst = i;
    ++too_large;
  }
  if (lora_routers == 0) return Outcome::not_applicable("no LoRA on a router");
  if (too_large == 0) return Outcome::pass("every LoRA on a router is smaller than the router");

  const std::int64_t r = modules->rank[worst], d = modules->in[worst], e = modules->out[worst];
  const double even = static_cast<double>(d) * static_cast<double>(e) / static_cast<double>(d + e);
  const std::int64_t fits = std::max<std::int64_t>(1, (d * e - 1) / (d + e));  // largest r with r (d + E) < d E
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = "The LoRA on " + say::plural(too_large, "router", "routers") + " has " + say::count(r * (d + e)) +
                    " parameters each at r = " + std::to_string(r) + "; the router has " + say::count(d * e) + " (" +
                    std::to_string(e) + " x " + std::to_string(d) + "). Break-even is r = " + say::number(even) +
                    ", and no update of this matrix has a rank above " + std::to_string(std::min(d, e)) + ".";
  const Location where = location_of(f->adapter_modules.source());
  finding.evidence = {{"router", modules->module[worst], where},
                      {"rank r", std::to_string(r), where},
                      {"adapter parameters r (d + E)", say::count(r * (d + e)), where},
                      {"router parameters d E", say::count(d * e), where},
                      {"break-even rank d E / (d + E)", say::number(even), {}},
                      {"useful rank, at most", std::to_string(std::min(d, e)), {}}};
  const std::string leaf = say::router_leaf(f);
  finding.remedy = "Leave the router out (AD001), or give it a rank that restrains something. " +
                   say::lora(f, {{"rank_pattern", "{\"" + leaf + "\": " + std::to_string(fits) + "}"}});
  finding.does_not_show = "That the larger adapter trains worse; it shows that it saves nothing and restrains nothing.";
  finding.locations = {location_of(f->adapter_rank.known() ? f->adapter_rank.source() : f->adapter_modules.source())};
  finding.sources = say::sources({"arXiv 2106.09685 section 4.1 (LoRA: B A with r far below both sizes)"});
  return Outcome::finding(std::move(finding));
}

}  // namespace

extern const Rule rule_router_adapter_larger_than_router;
const Rule rule_router_adapter_larger_than_router = {
    .id = "AD002",
    .name = "router-adapter-larger-than-router",
    .since = "0.1.0",
    .severity = Severity::kWarning,
    .summary = "The LoRA on the router has as many parameters as the router.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit

#include "audit/measures/peft_regimes.h"

#include <algorithm>
#include <initializer_list>

#include "audit/behaviours/behaviour.h"

namespace moeaudit {
namespace {

using Topics = std::initializer_list<std::string_view>;

/// A stretch of versions of one package over which all topics give one answer.
struct Stretch {
  std::string text;
  std::vector<std::string> values;  // in the order of the topics
  std::string cite;
};

VersionWindow overlap(const VersionWindow& a, const VersionWindow& b) {
  VersionWindow out = a;
  if (b.from && (!out.from || *out.from < *b.from)) out.from = b.from;
  if (b.until && (!out.until || *b.until < *out.until)) out.until = b.until;
  return out;
}

std::string window_text(std::string_view package, const VersionWindow& w) {
  std::string text(package);
  if (!w.from && !w.until) return "any " + text;
  if (w.from) text += " " + w.from->text + (w.until ? "" : " or later");
  if (w.until) text += (w.from ? " to" : "") + std::string(" before ") + w.until->text;
  return text;
}

/// The set, cut at every bound of a row of these topics.
std::vector<VersionSet> cut(std::string_view package, Topics topics, const VersionSet* versions) {
  if (versions && versions->exact) return {*versions};
  std::vector<Version> bounds;
  for (int i = 0; i < kNumBehaviours; ++i) {
    const BehaviourRow& row = kBehaviours[i];
    if (row.package != package || std::find(topics.begin(), topics.end(), row.topic) == topics.end()) continue;
    for (std::string_view text : {row.from, row.until}) {
      if (const auto v = Version::parse(text); v && !text.empty()) bounds.push_back(*v);
    }
  }
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  std::vector<VersionSet> out;
  for (std::size_t i = 0; i <= bounds.size(); ++i) {
    VersionWindow window;
    if (i > 0) window.from = bounds[i - 1];
    if (i < bounds.size()) window.until = bounds[i];
    if (versions && !versions->intersects(window)) continue;
    VersionSet& set = out.emplace_back();
    set.window = versions ? overlap(window, versions->window) : window;
    set.text = window_text(package, set.window);
  }
  return out;
}

/// Neighbours that answer alike are one stretch. Empty with `why` if some version has no answer.
std::vector<Stretch> stretches(std::string_view package, const std::string& family, Topics topics, const VersionSet* versions,
                               std::string* why) {
  std::vector<Stretch> out;
  for (const VersionSet& set : cut(package, topics, versions)) {
    Stretch s;
    s.text = set.exact ? std::string(package) + " " + set.exact->text : set.text;
    for (std::string_view topic : topics) {
      const BehaviourAnswer answer = ask({package, topic, {{"family", family}}}, &set);
      if (!answer.value) {
        *why = answer.why;
        return {};
      }
      s.values.push_back(*answer.value);
      if (s.cite.find(answer.cite) == std::string::npos) s.cite += (s.cite.empty() ? "" : "; ") + answer.cite;
    }
    const auto same = std::find_if(out.begin(), out.end(), [&](const Stretch& o) { return o.values == s.values; });
    if (same == out.end()) out.push_back(std::move(s));
    else same->text += ", " + s.text.substr(package.size() + 1);
  }
  return out;
}

}  // namespace

std::vector<PeftRegime> peft_regimes(const std::string& family, const VersionSet* transformers, const VersionSet* peft,
                                     std::string* why) {
  const std::vector<Stretch> models =
      stretches("transformers", family, {"router_is_linear", "experts_fused", "peft_conversion"}, transformers, why);
  const std::vector<Stretch> tools = models.empty()
                                         ? std::vector<Stretch>{}
                                         : stretches("peft", family, {"has_exclude_modules", "has_target_parameters",
                                                                      "modules_to_save_excludes", "layers_to_transform_index",
                                                                      "rewrites_moe_targets", "all_linear_breaks"}, peft, why);
  std::vector<PeftRegime> out;
  for (const Stretch& model : models) {
    for (const Stretch& tool : tools) {
      PeftRegime r;
      r.layout = {model.values[0] == "true", model.values[1] == "true"};
      r.rules.has_exclude_modules = tool.values[0] == "true";
      r.rules.has_target_parameters = tool.values[1] == "true";
      r.rules.saved_as_pattern = tool.values[2] == "pattern";
      r.rules.first_index_is_layer = tool.values[3] == "first";
      if (tool.values[4] == "true" && model.values[2] != "none") {
        r.rules.conversion = model.values[2];
        r.rules.strings_become_letters = tool.values[5] == "true";
      }
      r.text = model.text + ", " + tool.text;
      r.cite = model.cite + "; " + tool.cite;
      const bool seen = std::any_of(out.begin(), out.end(), [&](const PeftRegime& o) { return o.layout == r.layout && o.rules == r.rules; });
      if (!seen) out.push_back(std::move(r));
    }
  }
  return out;
}

}  // namespace moeaudit

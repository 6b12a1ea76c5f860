#include "audit/rules/advisory.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <type_traits>

#include "audit/rules/say.h"

namespace moeaudit {
namespace {

enum class Truth { kNo, kUnknown, kYes };

double number_of(std::string_view text) {
  double v = 0;
  std::from_chars(text.data(), text.data() + text.size(), v);  // cmake/advisory_tables.cc has checked it
  return v;
}

bool compare_numbers(double a, Comparison how, std::span<const std::string_view> values) {
  const auto equals = [&](std::string_view v) { return a == number_of(v); };
  const double b = number_of(values[0]);
  switch (how) {
    case Comparison::kEqual: return a == b;
    case Comparison::kNotEqual: return a != b;
    case Comparison::kLess: return a < b;
    case Comparison::kAtMost: return a <= b;
    case Comparison::kMore: return a > b;
    case Comparison::kAtLeast: return a >= b;
    case Comparison::kIn: return std::any_of(values.begin(), values.end(), equals);
    case Comparison::kContains: return false;
  }
  return false;
}

bool any_of_words(const std::string& word, std::span<const std::string_view> values) {
  return std::find(values.begin(), values.end(), word) != values.end();
}

template <class T>
bool holds(const T& value, const AdvisoryCondition& c) {
  if constexpr (std::is_same_v<T, std::int64_t> || std::is_same_v<T, double>) {
    return compare_numbers(static_cast<double>(value), c.comparison, c.values);
  } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
    return std::any_of(value.begin(), value.end(), [&](const std::string& item) { return any_of_words(item, c.values); });
  } else {
    const bool in = any_of_words(to_text(value), c.values);
    return c.comparison == Comparison::kNotEqual ? !in : in;
  }
}

/// Calls f(fact) for the one fact that `info` describes.
template <class F>
void with_fact(Facts& facts, const FactInfo* info, F&& f) {
  facts->visit([&](const auto& fact) {
    if (&fact.info() == info) f(fact);
  });
}

Truth truth_of(Facts& facts, const AdvisoryCondition& c) {
  Truth truth = Truth::kUnknown;
  with_fact(facts, c.fact, [&](const auto& fact) {
    if (const auto* value = facts.want(fact)) truth = holds(*value, c) ? Truth::kYes : Truth::kNo;
  });
  return truth;
}

VersionWindow affected_part(const AdvisoryWindow& w) {
  VersionWindow window;
  if (!w.from.empty()) window.from = Version::parse(w.from);
  if (!w.until.empty()) window.until = Version::parse(w.until);
  if (!w.seen.empty()) window.until = VersionSet::parse("<=" + std::string(w.seen))->window.until;
  return window;
}

/// Do the releases of `set` have the fault: all, none, or is it open?
Truth affects(const AffectedPackage& package, const VersionSet& set) {
  if (package.windows.empty()) return Truth::kYes;
  bool touched = false;
  for (const AdvisoryWindow& w : package.windows) {
    VersionWindow window = affected_part(w);
    if (set.inside(window)) return Truth::kYes;
    if (!w.seen.empty()) window.until.reset();  // what came later is unknown
    touched = touched || set.intersects(window);
  }
  return touched ? Truth::kUnknown : Truth::kNo;
}

const VersionSet* versions_of(Facts& facts, const AffectedPackage& package) {
  const VersionSet* set = nullptr;
  with_fact(facts, package.versions, [&](const auto& fact) {
    if constexpr (std::is_same_v<std::decay_t<decltype(fact)>, Fact<VersionSet>>) set = facts.want(fact);
  });
  return set;
}

Truth truth_of(Facts& facts, const AffectedPackage& package) {
  if (package.windows.empty()) return Truth::kYes;
  const VersionSet* set = versions_of(facts, package);
  return set ? affects(package, released(*set)) : Truth::kUnknown;
}

std::string with_version(Facts& facts, const AffectedPackage& package) {
  const VersionSet* set = versions_of(facts, package);
  return std::string(package.name) + (set ? " " + to_text(*set) : "");
}

std::string why_not(Facts& facts, const AdvisoryCondition& c) {
  std::string why;
  with_fact(facts, c.fact, [&](const auto& fact) {
    why = std::string(c.fact->name) + " is " + to_text(fact.value()) + say::at(fact.source());
  });
  return why + "; it bites where " + std::string(c.text);
}

Outcome cannot_tell(Facts& facts, const Advisory& a) {
  for (const AdvisoryCondition& c : a.when) {
    with_fact(facts, c.fact, [&](const auto& fact) { facts.require(fact); });
  }
  std::vector<Missing> straddles;
  for (const AffectedPackage& package : a.affected) {
    if (truth_of(facts, package) != Truth::kUnknown) continue;
    const VersionSet* set = versions_of(facts, package);
    with_fact(facts, package.versions, [&](const auto& fact) { facts.require(fact); });
    if (!set) continue;
    straddles.push_back({std::string(package.versions->name), std::string(package.versions->supply),
                         to_text(*set) + " is not clear of, nor wholly in, what is affected: " + text_of(package)});
  }
  Outcome outcome = facts.cannot_tell();
  std::move(straddles.begin(), straddles.end(), std::back_inserter(outcome.missing));
  return outcome;
}

std::string remedy(Facts& facts, const Advisory& a) {
  std::string text;
  if (!a.release.empty()) text = "Use a release without it:\n    pip install \"" + std::string(a.release) + "\"";
  if (!a.advice.empty()) {
    std::string advice(a.advice);
    if (text.empty()) advice[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(advice[0])));
    text += (text.empty() ? "" : "\nor: ") + advice;
  }
  if (!a.paste.empty()) text += "\n" + std::string(a.paste);
  using Paste = std::string (*)(Facts&, const say::Settings&);
  for (const auto& [where, paste] : {std::pair<PasteInto, Paste>{PasteInto::kTraining, say::training},
                                     {PasteInto::kModelConfig, say::model_config},
                                     {PasteInto::kLora, say::lora}}) {
    say::Settings settings;
    for (const AdvisorySetting& s : a.settings) {
      if (s.where == where) settings.emplace_back(s.key, s.value);
    }
    if (!settings.empty()) text += (text.empty() ? "" : "\n") + paste(facts, settings);
  }
  return text;
}

Outcome report(Facts& facts, const Advisory& a) {
  Finding finding;
  finding.severity = a.severity;
  const auto note = [&](const auto& fact) {
    if (!fact.known()) return;
    finding.evidence.push_back(say::evidence(fact));
    if (!fact.source().file.empty()) finding.locations.push_back(location_of(fact.source()));
  };
  for (const AffectedPackage& package : a.affected) {
    finding.message += (finding.message.empty() ? "" : ", ") + with_version(facts, package);
    with_fact(facts, package.versions, [&](const auto& fact) {
      finding.message += say::at(fact.source());
      note(fact);
    });
  }
  finding.message += ": " + std::string(a.text);
  for (const AdvisoryCondition& c : a.when) with_fact(facts, c.fact, note);
  if (finding.locations.empty() && !finding.evidence.empty()) finding.locations.push_back(finding.evidence[0].where);
  finding.remedy = remedy(facts, a);
  finding.does_not_show = std::string(a.does_not_show);
  for (std::string_view source : a.sources) finding.sources.emplace_back(source);
  return Outcome::finding(std::move(finding));
}

}  // namespace

std::string text_of(const AffectedPackage& affected) {
  std::string text;
  for (const AdvisoryWindow& w : affected.windows) {
    std::string part = std::string(w.from);
    if (!w.seen.empty())
      part += (part.empty() ? "up to " : " to ") + std::string(w.seen) + ", not fixed there";
    else if (!w.until.empty())
      part += (part.empty() ? "before " : " to before ") + std::string(w.until);
    else
      part += " on";
    text += (text.empty() ? "" : ", ") + part;
  }
  return text.empty() ? "every release" : text;
}

Outcome judge(const Advisory& a, Facts& facts) {
  Truth configured = Truth::kYes, released_with_it = Truth::kYes;
  for (const AdvisoryCondition& c : a.when) {
    const Truth truth = truth_of(facts, c);
    if (truth == Truth::kNo) return Outcome::not_applicable(why_not(facts, c));
    configured = std::min(configured, truth);
  }
  for (const AffectedPackage& package : a.affected) {
    const Truth truth = truth_of(facts, package);
    released_with_it = std::min(released_with_it, truth);
    if (truth != Truth::kNo) continue;
    const std::string why = with_version(facts, package) + " does not have it (affected: " + text_of(package) + ")";
    return configured == Truth::kYes ? Outcome::pass(why) : Outcome::not_applicable(why);
  }
  if (std::min(configured, released_with_it) == Truth::kUnknown) return cannot_tell(facts, a);
  return report(facts, a);
}

}  // namespace moeaudit

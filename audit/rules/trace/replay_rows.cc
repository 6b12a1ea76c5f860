#include "audit/rules/trace/replay_rows.h"

#include <algorithm>
#include <cmath>

#include "audit/rules/say.h"

namespace moeaudit::replay {
namespace {

/// Rows that count tokens have no band.
bool counts_tokens(const ReplayTable& t, std::size_t i) {
  return t.quantity[i].ends_with("selection") || t.quantity[i] == "group_limit";
}

std::string off(const ReplayTable& t, std::size_t i) {
  if (!counts_tokens(t, i)) return bands(t.runner_up_fit[i]) + " off";
  return say::plural(static_cast<std::int64_t>(t.runner_up_fit[i]), "token", "tokens") + " off";
}

}  // namespace

const ReplayTable* table(Facts& f, Outcome* otherwise) {
  const std::string* format = f.require(f->trace_format);
  if (format && *format == "none") {
    *otherwise = Outcome::not_applicable("no recorded trace was given");
    return nullptr;
  }
  const ReplayTable* t = f.require(f->replay);
  if (f.missing()) *otherwise = f.cannot_tell();
  return f.missing() ? nullptr : t;
}

Rows rows_of(const ReplayTable& t, std::string_view quantity) {
  Rows rows;
  for (std::size_t i = 0; i < t.quantity.size(); ++i) {
    if (t.quantity[i] != quantity) continue;
    if (t.compared[i] == 0)
      rows.missing = t.missing[i];
    else
      (t.differing[i] > 0 ? rows.differ : rows.agree).push_back(i);
  }
  return rows;
}

Outcome nothing_differs(Facts& f, const Rows& rows, std::string none, std::string pass) {
  if (!rows.any()) return Outcome::not_applicable(std::move(none));
  if (!rows.agree.empty()) return Outcome::pass(std::move(pass));
  Outcome o;
  o.kind = Outcome::Kind::kCannotTell;
  o.missing.push_back({std::string(f->replay.info().name), "a trace that records it", rows.missing});
  return o;
}

std::string bands(double distance) {
  if (!std::isfinite(distance) || distance >= 1e9) return "over 10^9 bands";
  if (distance >= 10) return say::count(static_cast<std::int64_t>(distance)) + " bands";
  return say::number(std::round(distance * 100) / 100) + " bands";
}

std::string layers_of(const ReplayTable& t, const std::vector<std::size_t>& rows) {
  std::vector<std::int64_t> layers;
  for (const std::size_t i : rows) layers.push_back(t.layer[i]);
  return (layers.size() == 1 ? "layer " : "layers ") + to_text(layers);
}

std::string named(const ReplayTable& t, std::size_t i) {
  std::string text;
  if (t.name[i].empty()) {
    text = "No formula of the catalogue gives it";
    if (!t.runner_up[i].empty())
      text += "; the nearest, " + t.runner_up[i] + ", is " + off(t, i);
    return text + ".";
  }
  text = "It is " + (t.formula[i].empty() ? "" : t.formula[i] + ", ") + t.name[i];
  const std::string value = say::number(t.factor_value[i]);
  if (!t.factor[i].empty() && t.factor[i] != "0")
    text += " (a factor of " + t.factor[i] + (t.factor[i] == value ? "" : " = " + value) + ")";
  if (!t.also[i].empty()) text += "; this trace cannot tell it from " + t.also[i];
  // Neither what the finding starts from nor the same formula otherwise is another candidate.
  if (!t.runner_up[i].empty() && t.runner_up[i] != t.held_to[i] && !t.runner_up[i].starts_with(t.formula[i] + " "))
    text += "; the next candidate, " + t.runner_up[i] + ", is " + off(t, i);
  return text + ".";
}

Evidence evidence(const ReplayTable& t, std::size_t i) {
  const std::string name =
      "trace " + t.quantity[i] + (t.layer[i] >= 0 ? " of layer " + std::to_string(t.layer[i]) : "");
  if (counts_tokens(t, i))
    return {name, say::count(t.differing[i]) + " of " + say::count(t.compared[i]) + " tokens, expected 0", where(t, i)};
  std::string value = say::number(t.recorded[i]);
  if (!std::isnan(t.expected[i]))
    value += ", expected " + say::number(t.expected[i]) + " (" + bands(t.distance[i]) + ")";
  return {name, value, where(t, i)};
}

Location where(const ReplayTable& t, std::size_t i) {
  return t.file[i].empty() ? head(t) : Location{t.file[i], t.line[i], t.quantity[i], ""};
}
Location head(const ReplayTable& t) { return {t.path + "/trace.json", 0, "", ""}; }

std::string version_of(const ReplayTable& t, std::string_view package) {
  const std::string all = ", " + t.packages + ",", key = ", " + std::string(package) + " ";
  const std::size_t at = all.find(key);
  if (at == std::string::npos) return "";
  const std::size_t from = at + key.size();
  return all.substr(from, all.find(',', from) - from);
}

}  // namespace moeaudit::replay

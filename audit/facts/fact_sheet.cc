#include "audit/facts/fact_sheet.h"

#include <charconv>
#include <cmath>
#include <map>

namespace moeaudit {
namespace {

std::string rows(std::size_t n, const char* one, const char* many) {
  return std::to_string(n) + " " + (n == 1 ? one : many);
}

}  // namespace

std::string to_text(bool v) { return v ? "true" : "false"; }
std::string to_text(std::int64_t v) { return std::to_string(v); }
std::string to_text(const std::string& v) { return v; }

std::string to_text(double v) {
  if (std::isnan(v)) return "nan";
  if (std::isinf(v)) return v > 0 ? "inf" : "-inf";
  char buffer[64];
  const auto result = std::to_chars(buffer, buffer + sizeof buffer, v);
  return std::string(buffer, result.ptr);
}

std::string to_text(const std::vector<std::int64_t>& v) {
  std::string text;
  for (std::size_t i = 0; i < v.size();) {
    std::size_t end = i + 1;
    while (end < v.size() && v[end] == v[end - 1] + 1) ++end;
    if (!text.empty()) text += ", ";
    text += std::to_string(v[i]);
    if (end - i > 2) {
      text += "-" + std::to_string(v[end - 1]);
      i = end;
    } else {
      ++i;
    }
  }
  return text.empty() ? "none" : text;
}

std::string to_text(const std::vector<std::string>& v) {
  std::string text;
  for (const std::string& item : v) text += (text.empty() ? "" : ", ") + item;
  return text.empty() ? "none" : text;
}

std::string to_text(const Routing& v) {
  std::string text = name_of(v.scoring);
  if (v.sparse_mixer) text += " for each pick, over those within " + to_text(200 * v.mixer_jitter) + " % of the best (SparseMixer)";
  else if (v.score_after_top_k) text += " over the chosen experts";
  if (v.linear_bias) text += ", linear bias";
  if (v.correction_bias) text += ", selection bias";
  if (v.groups > 1) {
    text += ", " + std::to_string(v.top_groups) + " of " + std::to_string(v.groups) + " groups by " + name_of(v.group_score) +
            (v.group_mask_is_zero ? ", others masked by 0" : "");
  }
  if (v.logit_softcap > 0) text += ", logits capped at " + to_text(v.logit_softcap);
  text += v.renormalise ? ", renormalised" : ", not renormalised";
  if (v.renormalise && v.renormalise_norm != 1.0) text += " by the norm of p = " + to_text(v.renormalise_norm);
  if (v.always_rows) text += " with experts that every token has";
  if (v.scaling != 1.0) text += ", scaled by " + to_text(v.scaling);
  if (!v.expert_scale_tensor.empty()) text += ", scaled by expert";
  return text;
}

std::string to_text(const RouterTable& v) { return rows(v.layer.size(), "router", "routers"); }
std::string to_text(const RouterValues& v) { return rows(v.layer.size(), "router tensor", "router tensors") + " scanned"; }
std::string to_text(const WeightScan& v) { return rows(v.tensor.size(), "tensor or expert", "tensors and experts") + " scanned"; }
std::string to_text(const RouterRows& v) { return rows(v.layer.size(), "router row", "router rows"); }
std::string to_text(const StableRanks& v) { return rows(v.layer.size(), "matrix", "matrices") + " of routed experts"; }
std::string to_text(const TensorDiff& v) {
  return std::to_string(v.missing.size()) + " missing, " + std::to_string(v.unexpected.size()) + " unexpected";
}
std::string to_text(const ShapeTable& v) {
  return std::to_string(v.tensor.size()) + " of " + std::to_string(v.judged) + " tensors differ";
}
std::string to_text(const CorrectionBias& v) { return rows(v.layer.size(), "correction bias", "correction biases"); }
std::string to_text(const ExpertStorage& v) {
  std::string text;
  for (std::size_t i = 0; i < v.dtype.size(); ++i) {
    text += (i ? ", " : "") + std::string(name_of(v.dtype[i])) + " " + std::to_string(v.bytes[i]) + " bytes";
  }
  return text.empty() ? "none" : text;
}
std::string to_text(const TraceLoads& v) { return rows(v.layer.size(), "layer", "layers"); }
std::string to_text(const PrecisionTable& v) {
  return rows(v.layer.size(), "row", "rows") + " (router and mode); " + v.input;
}
std::string to_text(const UnfrozenTargets& v) { return rows(v.pattern.size(), "pattern", "patterns"); }
std::string to_text(const AdapterTargets& v) { return rows(v.entry.size(), "entry", "entries"); }
std::string to_text(const AdapterLayout& v) {
  return std::to_string(v.module.size()) + " of " + std::to_string(v.found_total) + " modules do not fit";
}
std::string to_text(const AdapterTensors& v) { return rows(v.module.size(), "adapted module", "adapted modules"); }

std::string to_text(const AdapterModules& v) {
  std::map<Part, std::size_t> count;
  for (Part part : v.part) ++count[part];
  std::string text = rows(v.module.size(), "module", "modules");
  const char* separator = ": ";
  for (const auto& [part, n] : count) {
    text += separator + std::string(name_of(part)) + " " + std::to_string(n);
    separator = ", ";
  }
  return text;
}

std::string to_text(const BaseChanges& v) { return rows(v.part.size(), "row", "rows") + " (routers, experts, other parts)"; }
std::string to_text(const RoutingKept& v) { return rows(v.layer.size(), "router", "routers") + "; " + v.input; }
std::string to_text(const DTypePairs& v) {
  std::string text;
  for (std::size_t i = 0; i < v.part.size(); ++i) {
    if (v.base[i] == v.trained[i]) continue;
    text += (text.empty() ? "" : ", ") + std::string(name_of(v.part[i])) + " " + name_of(v.base[i]) + " -> " + name_of(v.trained[i]);
  }
  return text.empty() ? "as in the base" : text;
}
std::string to_text(const BiasChanges& v) { return rows(v.layer.size(), "correction bias", "correction biases"); }
std::string to_text(const ConfigChanges& v) {
  std::string text;
  for (std::size_t i = 0; i < v.key.size(); ++i) text += (i ? ", " : "") + v.key[i] + " " + v.base[i] + " -> " + v.trained[i];
  return text.empty() ? "none" : text;
}
std::string to_text(const MergeTable& v) { return rows(v.module.size(), "matrix", "matrices"); }

std::string to_text(const LogTable& v) {
  std::string text = rows(v.step.size(), "entry", "entries");
  if (!v.step.empty()) text += ", steps " + std::to_string(v.step.front()) + " to " + std::to_string(v.step.back());
  return text;
}
std::string to_text(const LogColumns& v) {
  std::string text;
  for (std::size_t i = 0; i < v.name.size(); ++i)
    text += (i ? ", " : "") + v.name[i] + " " + to_text(v.first[i]) + " to " + to_text(v.last[i]);
  return text.empty() ? "none" : text;
}
std::string to_text(const LogBalance& v) { return to_text(v.least) + " to " + to_text(v.greatest); }
std::string to_text(const ReplayTable& v) {
  std::size_t compared = 0, differ = 0;
  for (std::size_t i = 0; i < v.quantity.size(); ++i) {
    compared += v.compared[i] > 0;
    differ += v.differing[i] > 0;
  }
  return rows(compared, "quantity", "quantities") + " compared, " + std::to_string(differ) + " differ";
}
std::string to_text(const RolloutAgreement& v) { return rows(v.layer.size(), "layer", "layers"); }
std::string to_text(const std::vector<WeightProblem>& v) { return rows(v.size(), "problem", "problems"); }
std::string to_text(const std::vector<IgnoredKey>& v) { return rows(v.size(), "key", "keys"); }
std::string to_text(const std::vector<UnreadKey>& v) { return rows(v.size(), "key", "keys"); }
std::string to_text(const std::vector<SettingConflict>& v) { return rows(v.size(), "setting", "settings"); }

}  // namespace moeaudit

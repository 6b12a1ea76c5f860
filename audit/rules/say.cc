#include "audit/rules/say.h"

#include <cmath>
#include <cstdio>

namespace moeaudit::say {
namespace {

bool starts_with(const std::string& text, std::string_view with) { return text.rfind(with, 0) == 0; }

enum class Dialect { kAxolotl, kLlamaFactory, kPython };

Dialect dialect(Facts& f) {
  const std::string* framework = f.want(f->framework);
  if (framework && starts_with(*framework, "axolotl")) return Dialect::kAxolotl;
  if (framework && starts_with(*framework, "llama-factory")) return Dialect::kLlamaFactory;
  return Dialect::kPython;
}

std::string python(const std::string& yaml) {
  if (yaml == "true") return "True";
  if (yaml == "false") return "False";
  if (yaml == "null") return "None";
  return yaml;
}

std::string yaml_lines(const Settings& settings, const std::string& indent) {
  std::string text;
  for (const auto& [key, value] : settings) text += "\n" + indent + key + ": " + value;
  return text;
}

std::string call(const std::string& name, const Settings& settings) {
  std::string text;
  for (const auto& [key, value] : settings) text += (text.empty() ? "" : ", ") + key + "=" + python(value);
  return "\n    " + name + "(" + text + ")";
}

std::string renamed(std::string_view key, std::initializer_list<std::pair<std::string_view, std::string_view>> names) {
  for (const auto& [from, to] : names) {
    if (from == key) return std::string(to);
  }
  return std::string(key);
}

std::string training_key(Dialect d, std::string_view key) {
  if (d == Dialect::kAxolotl) return renamed(key, {{"per_device_train_batch_size", "micro_batch_size"}});
  return std::string(key);
}

/// TRL's trainers set flag and coefficient themselves, from their own router_aux_loss_coef: SFT since 1.7.0, DPO since
/// 1.8.0 (huggingface/trl pull requests 6085 and 6208). A coefficient in config.json is overwritten there.
std::string trl_config(Facts& f, const Settings& settings) {
  const std::string* framework = f.want(f->framework);
  if (!framework || !starts_with(*framework, "trl")) return {};
  const std::string* trainer = f.want(f->trainer);
  const bool dpo = trainer && *trainer == "DPOTrainer";
  const std::string config = dpo ? "DPOConfig" : "SFTConfig";
  const VersionSet* trl = f.want(f->trl);
  if (trl && trl->inside({std::nullopt, Version::parse(dpo ? "1.8.0" : "1.7.0")})) return {};  // no such field yet
  for (const auto& [key, value] : settings) {
    if (key == "router_aux_loss_coef") return call(config, {{key, value}});
  }
  return {};
}

}  // namespace

std::string number(double v) {
  if (!std::isfinite(v)) return to_text(v);
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.6g", v);
  return buffer;
}

std::string count(std::int64_t v) {
  std::string digits = std::to_string(v);
  const std::size_t first = v < 0 ? 1 : 0;
  for (std::size_t i = digits.size(); i > first + 3;) digits.insert(i -= 3, ",");
  return digits;
}

std::string percent(double share) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.3g %%", 100.0 * share);
  return buffer;
}

std::string plural(std::int64_t n, std::string_view one, std::string_view many) {
  return count(n) + " " + std::string(n == 1 ? one : many);
}

std::string literal(double v) {
  std::string text = number(v);
  const std::size_t e = text.find('e');
  if (e == std::string::npos || text.find('.') != std::string::npos) return text;
  return text.insert(e, ".0");
}

std::string at(const Source& source) {
  if (source.file.empty()) return {};
  return " (" + source.file + (source.line > 0 ? ":" + std::to_string(source.line) : "") + ")";
}

std::string whence(Origin origin, const Source& source) {
  const bool is_default = origin == Origin::kFrameworkDefault || origin == Origin::kFamily;
  return source.file.empty() && is_default ? " (a default)" : at(source);
}

std::string some(const std::vector<std::string>& items, std::size_t most) {
  std::string text;
  for (std::size_t i = 0; i < items.size() && i < most; ++i) text += (i == 0 ? "" : ", ") + items[i];
  if (items.size() > most) text += " and " + count(static_cast<std::int64_t>(items.size() - most)) + " more";
  return text;
}

std::vector<std::string> sources(std::vector<std::string> all) {
  std::vector<std::string> kept;
  for (std::string& s : all) {
    if (!s.empty()) kept.push_back(std::move(s));
  }
  return kept;
}

std::string list_literal(const std::vector<std::string>& items) {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "\"" : ", \"") + item + "\"";
  return "[" + text + "]";
}

/// "text_config" where the language model's config lies inside another; what is set outside does not reach it.
static std::string inside(Facts& f) {
  if (!f.want(f->model_type)) return {};
  const std::string& key = f->model_type.source().key;
  return key.find('.') == std::string::npos ? std::string() : key.substr(0, key.rfind('.'));
}

std::string model_config(Facts& f, const Settings& settings) {
  const std::string outer = inside(f);
  if (dialect(f) == Dialect::kAxolotl && outer.empty())
    return "In the Axolotl config:\n    model_config:" + yaml_lines(settings, "      ");
  if (const std::string text = trl_config(f, settings); !text.empty()) {
    return "In the training script (TRL sets flag and coefficient of the model from it):" + text;
  }
  std::string text = "In the config.json of the model that is trained:";
  if (!outer.empty()) {
    text += "\n    \"" + outer + "\": {";
    for (std::size_t i = 0; i < settings.size(); ++i) {
      text += (i > 0 ? ", \"" : "\"") + settings[i].first + "\": " + settings[i].second;
    }
    return text + "}";
  }
  for (std::size_t i = 0; i < settings.size(); ++i) {
    text += "\n    \"" + settings[i].first + "\": " + settings[i].second + (i + 1 < settings.size() ? "," : "");
  }
  return text;
}

std::string training(Facts& f, const Settings& settings) {
  const Dialect d = dialect(f);
  Settings named;
  for (const auto& [key, value] : settings) named.emplace_back(training_key(d, key), value);
  if (d == Dialect::kPython) return "In the training script:" + call("TrainingArguments", named);
  return "In the training config:" + yaml_lines(named, "    ");
}

std::string lora_key(Facts& f, std::string_view key) {
  switch (dialect(f)) {
    case Dialect::kAxolotl:
      return renamed(key, {{"r", "lora_r"},
                           {"target_modules", "lora_target_modules"},
                           {"target_parameters", "lora_target_parameters"},
                           {"modules_to_save", "lora_modules_to_save"},
                           {"use_rslora", "peft_use_rslora"},
                           {"rank_pattern", "lora_rank_pattern"}});
    case Dialect::kLlamaFactory:
      return renamed(key,
                     {{"r", "lora_rank"}, {"target_modules", "lora_target"}, {"modules_to_save", "additional_target"}});
    case Dialect::kPython: break;
  }
  return std::string(key);
}

std::string lora(Facts& f, const Settings& settings) {
  Settings named;
  for (const auto& [key, value] : settings) named.emplace_back(lora_key(f, key), value);
  if (dialect(f) == Dialect::kPython) return "In the training script:" + call("LoraConfig", named);
  return "In the training config:" + yaml_lines(named, "    ");
}

std::string quantisation_skip(Facts& f, const std::vector<std::string>& modules) {
  const std::int64_t* bits = f.want(f->quant_bits);
  const std::string load = bits && *bits == 8 ? "load_in_8bit" : "load_in_4bit";
  if (dialect(f) == Dialect::kAxolotl) {
    return "In the Axolotl config:\n    bnb_config_kwargs:\n      llm_int8_skip_modules: " + list_literal(modules);
  }
  return "In the training script:" +
         call("BitsAndBytesConfig", {{load, "true"}, {"llm_int8_skip_modules", list_literal(modules)}});
}

std::string router_leaf(Facts& f) {
  const Routing* routing = f.want(f->routing);
  const std::string name = routing ? routing->weight_tensor : std::string();
  const std::size_t end = name.rfind('.');
  if (end == std::string::npos || end == 0) return "gate";
  const std::size_t begin = name.rfind('.', end - 1);
  return begin == std::string::npos ? name.substr(0, end) : name.substr(begin + 1, end - begin - 1);
}

bool chosen_for_training(Origin origin, const Source& source) {
  if (origin != Origin::kStated && origin != Origin::kAssumed) return false;
  return source.role == Role::kTrainingConfig || source.role == Role::kTrainingArguments ||
         source.role == Role::kCommandLine;
}

}  // namespace moeaudit::say

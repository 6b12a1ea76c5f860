// Host tool of the build: turns audit/families/*.yaml and audit/behaviours/*.yaml into constant C++ tables.
//   compile_tables <families-dir> <behaviours-dir> <out-dir>     writes families.cc and behaviours.cc
// It is the only reader of these files, so it checks them hard: a mistake stops the build with file, line and remedy.
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "audit/facts/version.h"

namespace {

namespace fs = std::filesystem;
using moeaudit::Version;
using Words = std::map<std::string, std::string>;  // word in YAML -> C++ enumerator

const std::set<std::string> kFactNames = {
#define FACT(member, type, name, meaning, supply) name,
#include "audit/facts/fact_list.inc"
#undef FACT
};

// What every family must say: in keys:, or in absent: (the family has no such thing), or in unknown:.
const std::vector<std::string> kRequiredFacts = {
    "model.num_layers",  "model.moe_layers",      "model.hidden_size",  "model.expert_width",  "model.num_shared_experts",
    "router.num_experts", "router.top_k",         "router.num_groups",  "router.top_groups",   "router.renormalised",
    "router.routed_scaling", "balance.aux_flag", "balance.aux_coefficient"};

const Words kParts = {{"router", "kRouter"}, {"routed_expert", "kRoutedExpert"}, {"shared_expert", "kSharedExpert"},
                      {"shared_expert_gate", "kSharedExpertGate"}, {"dense_mlp", "kDenseMlp"}, {"attention", "kAttention"},
                      {"embedding", "kEmbedding"}, {"head", "kHead"}, {"norm", "kNorm"}, {"other", "kOther"}};
const Words kLayers = {{"moe", "kMoe"}, {"dense", "kDense"}, {"all", "kAll"}, {"none", "kNone"}};
const Words kWhere = {{"hub", "kHub"}, {"memory", "kMemory"}, {"both", ""}};
const Words kScoring = {{"softmax", "kSoftmax"}, {"sigmoid", "kSigmoid"}, {"sqrtsoftplus", "kSqrtSoftplus"}};
const Words kGroupScore = {{"none", "kNone"}, {"max", "kMax"}, {"top2_sum", "kTop2Sum"}};
const Words kBalance = {{"aux_loss", "kAuxLoss"}, {"bias_update", "kBiasUpdate"}, {"bias_frozen", "kBiasFrozen"}, {"none", "kNone"}};
const Words kDTypes = {{"activations", "kUnknown"}, {"logits", "kUnknown"}, {"float32", "kF32"}, {"bfloat16", "kBF16"}};
const Words kRenormalise = {{"always", ""}, {"never", ""}, {"config", ""}};
const Words kMoeLayerRules = {{"all", ""}, {"from first_k_dense_replace", ""}, {"decoder_sparse_step", ""}};
// Closed values of topics that code switches on; other topics are free text (defaults, key names).
const std::map<std::string, std::set<std::string>> kClosedTopics = {
    {"aux_flag_effect", {"added", "ignored", "crash", "keyword_only", "no_field"}},
    {"aux_formula", {"hf", "double_softmax", "topk_scores"}},
    {"aux_multiplier", {"1", "GA", "W", "GA*W", "1/GA", "transformers"}},
    {"loss_factor", {"1", "GA", "W", "GA*W", "1/GA"}},
    {"aux_path", {"model", "none", "own"}},
    {"router_is_linear", {"true", "false"}},
    {"experts_fused", {"true", "false"}},
    {"autocast_lowers_router", {"true", "false"}}};
// Issue 2, section 5: these are never taken from reading.
const std::set<std::string> kMeasuredOnly = {"aux_multiplier", "loss_factor", "autocast_lowers_router"};

[[noreturn]] void fail(const std::string& file, const YAML::Mark& mark, const std::string& what) {
  throw std::runtime_error(file + ":" + std::to_string(mark.line + 1) + ": error: " + what);
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    c == '\n' ? out += "\\n" : out += c;
  }
  return out + "\"";
}

std::string joined(const std::vector<std::string>& words, const std::string& separator) {
  std::string out;
  for (const std::string& w : words) out += (out.empty() ? "" : separator) + w;
  return out;
}

/// One mapping of a file, read key by key. done() refuses whatever nobody asked for: a misspelt key is never ignored.
class Map {
 public:
  Map(std::string file, const YAML::Node& node) : file_(std::move(file)), node_(node) {
    if (!node.IsMap()) fail(file_, node.Mark(), "expected a mapping");
    for (const auto& entry : node) {
      if (!keys_.emplace(entry.first.Scalar(), entry.first.Mark()).second) {
        fail(file_, entry.first.Mark(), "key '" + entry.first.Scalar() + "' is written twice");
      }
    }
  }
  const std::string& file() const { return file_; }
  YAML::Mark mark() const { return node_.Mark(); }
  bool has(const std::string& key) {
    asked_.insert(key);
    return keys_.count(key) != 0;
  }
  YAML::Node node(const std::string& key) {
    if (!has(key)) fail(file_, mark(), "missing key '" + key + "'");
    return node_[key];
  }
  std::string text(const std::string& key) {
    const YAML::Node n = node(key);
    if (!n.IsScalar() || n.Scalar().empty()) fail(file_, n.Mark(), "'" + key + "' must be a word or a number, and not empty");
    return n.Scalar();
  }
  std::string text_or(const std::string& key, const std::string& fallback) { return has(key) ? text(key) : fallback; }
  bool flag(const std::string& key, bool fallback) {
    if (!has(key)) return fallback;
    const std::string t = text(key);
    if (t != "true" && t != "false") fail(file_, node(key).Mark(), "'" + key + "' must be true or false, not '" + t + "'");
    return t == "true";
  }
  std::string number(const std::string& key, const std::string& fallback) {
    if (!has(key)) return fallback;
    const YAML::Node n = node(key);
    double value = 0;
    if (!YAML::convert<double>::decode(n, value)) fail(file_, n.Mark(), "'" + key + "' must be a number");
    return n.Scalar();
  }
  std::string word(const std::string& key, const Words& words) {
    const std::string t = text(key);
    const auto found = words.find(t);
    if (found == words.end()) {
      std::vector<std::string> known;
      for (const auto& w : words) known.push_back(w.first);
      fail(file_, node(key).Mark(), "'" + t + "' is no value of '" + key + "'; write one of: " + joined(known, ", "));
    }
    return found->second;
  }
  std::vector<std::string> list(const std::string& key, bool required) {
    std::vector<std::string> out;
    if (!required && !has(key)) return out;
    const YAML::Node n = node(key);
    if (!n.IsSequence()) fail(file_, n.Mark(), "'" + key + "' must be a list");
    for (const auto& item : n) {
      if (!item.IsScalar() || item.Scalar().empty()) fail(file_, item.Mark(), "'" + key + "': every entry must be one word");
      out.push_back(item.Scalar());
    }
    return out;
  }
  void done() const {
    for (const auto& [key, where] : keys_) {
      if (!asked_.count(key)) {
        fail(file_, where, "unknown key '" + key + "'; known here: " + joined({asked_.begin(), asked_.end()}, ", "));
      }
    }
  }

 private:
  std::string file_;
  YAML::Node node_;
  std::map<std::string, YAML::Mark> keys_;
  std::set<std::string> asked_;
};

/// `sources:` gives long citations short names: "code:96" becomes "<what code stands for>:96".
class Sources {
 public:
  explicit Sources(Map& top) : file_(top.file()) {
    if (!top.has("sources")) return;
    Map map(file_, top.node("sources"));
    for (const auto& entry : top.node("sources")) text_[entry.first.Scalar()] = map.text(entry.first.Scalar());
    map.done();
  }
  /// "code:96", "code:96, config:3", or free text without a known short name in front (an issue, a fixtures/oracle row).
  std::string expand(const std::string& cite, const YAML::Mark& mark) const {
    std::vector<std::string> parts;
    std::stringstream stream(cite);
    for (std::string part; std::getline(stream, part, ',');) {
      part.erase(0, part.find_first_not_of(' '));
      const std::size_t colon = part.find(':');
      const std::string head = part.substr(0, colon);
      const auto found = text_.find(head);
      const bool bare_word = head.find_first_of(" /@.#") == std::string::npos;
      if (found != text_.end()) part = found->second + (colon == std::string::npos ? "" : part.substr(colon));
      else if (bare_word) fail(file_, mark, "cite '" + part + "': '" + head + "' is not in sources:");
      parts.push_back(part);
    }
    return joined(parts, "; ");
  }
  std::string cite(Map& map) const { return expand(map.text("cite"), map.node("cite").Mark()); }

 private:
  std::string file_;
  std::map<std::string, std::string> text_;
};

/// Writes constexpr arrays and hands back the expression that names them.
class Writer {
 public:
  std::string strings(const std::vector<std::string>& items) {
    if (items.empty()) return "{}";
    std::vector<std::string> q;
    for (const std::string& i : items) q.push_back(quoted(i));
    return array("std::string_view", q);
  }
  std::string array(const std::string& type, const std::vector<std::string>& items) {
    if (items.empty()) return "{}";
    const std::string text = "constexpr " + type + " ";
    const std::string body = "[] = {" + joined(items, ",\n    ") + "};\n";
    const auto [found, added] = names_.emplace(text + body, "k" + std::to_string(names_.size()));
    if (added) arrays_ << text << found->second << body;
    return found->second;
  }
  std::string text() const { return arrays_.str(); }

 private:
  std::map<std::string, std::string> names_;  // equal arrays are written once
  std::ostringstream arrays_;
};

YAML::Node load(const fs::path& path) {
  try {
    return YAML::LoadFile(path.string());
  } catch (const YAML::Exception& e) {
    fail(path.string(), e.mark, e.msg);
  }
}

void write_file(const fs::path& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  if (!out.flush()) throw std::runtime_error(path.string() + ": error: cannot be written");
}

std::vector<fs::path> yaml_files(const fs::path& dir) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(dir)) {
    if (entry.path().extension() == ".yaml") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

// ---- families ------------------------------------------------------------------------------------------------------

struct FamilyTables {
  Writer writer;
  std::vector<std::string> families, hub_models;
  std::map<std::string, std::string> owner_of_model_type;
  std::map<std::string, std::set<std::string>> config_keys;  // family -> every spelling of every key
  std::set<std::string> hub_ids;
};

/// `keys:` fact -> spellings and default. No spelling: the default is a constant of the family.
std::string family_keys(Map& top, const Sources& sources, FamilyTables& t, const std::string& family, std::set<std::string>* given) {
  std::vector<std::string> rows;
  const YAML::Node keys = top.node("keys");
  if (!keys.IsMap()) fail(top.file(), keys.Mark(), "'keys' must be a mapping from fact to spellings");
  for (const auto& entry : keys) {
    const std::string fact = entry.first.Scalar();
    if (!kFactNames.count(fact)) fail(top.file(), entry.first.Mark(), "'" + fact + "' is no fact of audit/facts/fact_list.inc");
    if (!given->insert(fact).second) fail(top.file(), entry.first.Mark(), "fact '" + fact + "' is given twice");
    Map row(top.file(), entry.second);
    const std::vector<std::string> spellings = row.list("keys", false);
    const std::string fallback = row.has("default") ? row.text("default") : "";
    if (spellings.empty() && fallback.empty()) fail(top.file(), entry.first.Mark(), "'" + fact + "' has neither keys nor a default");
    rows.push_back("{" + quoted(fact) + ", " + t.writer.strings(spellings) + ", " + quoted(fallback) + ", " + quoted(sources.cite(row)) + "}");
    t.config_keys[family].insert(spellings.begin(), spellings.end());
    row.done();
  }
  return t.writer.array("FamilyKey", rows);
}

/// Every dimension: a product of symbols and numbers, or "?".
std::string shape_of(Map& row) {
  const std::vector<std::string> dims = row.list("shape", true);
  for (const std::string& dim : dims) {
    if (dim == "?") continue;
    std::stringstream stream(dim);
    for (std::string factor; std::getline(stream, factor, '*');) {
      const bool symbol = factor.size() == 1 && std::string("EHISV").find(factor[0]) != std::string::npos;
      const bool digits = !factor.empty() && factor.find_first_not_of("0123456789") == std::string::npos;
      if (!symbol && !digits) {
        fail(row.file(), row.node("shape").Mark(), "shape '" + dim + "': write E, H, I, S, V, numbers, products like 2*I, or ?");
      }
    }
  }
  return joined(dims, ",");
}

std::string family_tensors(Map& top, FamilyTables& t, std::set<std::string>* names) {
  struct Seen { std::string instead; YAML::Mark mark; };
  std::vector<std::string> rows;
  std::vector<Seen> alternatives;
  for (const auto& entry : top.node("tensors")) {
    Map row(top.file(), entry);
    const std::string name = row.text("name"), layers = row.word("layers", kLayers), where = row.word("where", kWhere);
    const bool layered = name.find("{L}") != std::string::npos;
    if (layered == (layers == "kNone")) fail(top.file(), entry.Mark(), "'" + name + "': {L} and 'layers: none' exclude each other, and one is needed");
    const std::string instead = row.text_or("instead", ""), when = row.text_or("optional", "");
    if (!instead.empty()) alternatives.push_back({instead, entry.Mark()});
    const std::string shape = shape_of(row), part = row.word("part", kParts);
    for (const char* w : {"kHub", "kMemory"}) {
      if (!where.empty() && where != w) continue;
      if (!names->insert(std::string(w) + name).second) fail(top.file(), entry.Mark(), "tensor '" + name + "' is listed twice");
      const std::string why = instead.empty() ? when : "the checkpoint has " + instead + " instead";
      rows.push_back("{" + quoted(name) + ", " + quoted(shape) + ", Part::" + part + ", FamilyTensor::Where::" + w +
                     ", FamilyTensor::Layers::" + layers + ", " + (why.empty() ? "false" : "true") + ", " + quoted(why) + ", " + quoted(instead) + "}");
    }
    row.done();
  }
  for (const Seen& a : alternatives) {
    if (!names->count("kHub" + a.instead) && !names->count("kMemory" + a.instead)) fail(top.file(), a.mark, "instead: '" + a.instead + "' is no tensor of this family");
  }
  return t.writer.array("FamilyTensor", rows);
}

/// The routing conventions, as the initialiser of audit/facts/values.h Routing.
std::string family_routing(Map& top, const Sources& sources, const std::set<std::string>& tensors, std::string* renormalise) {
  Map m(top.file(), top.node("routing"));
  m.word("renormalise", kRenormalise);
  *renormalise = m.text("renormalise");
  auto tensor = [&](const std::string& key, bool required) {
    if (!required && !m.has(key)) return std::string("{}");
    const std::string name = m.text(key);
    if (!tensors.count("kHub" + name)) fail(top.file(), m.node(key).Mark(), key + ": '" + name + "' is no hub tensor of this family");
    return quoted(name);
  };
  auto yes = [&](const std::string& key) { return m.flag(key, false) ? std::string("true") : std::string("false"); };
  const std::string bias = yes("linear_bias"), correction = yes("correction_bias");
  std::string out = "{.scoring = Scoring::" + m.word("scoring", kScoring) + ", .softmax_after_top_k = " + yes("softmax_after_top_k") +
                    ", .linear_bias = " + bias + ", .correction_bias = " + correction;
  if (m.has("group_score")) out += ", .group_score = GroupScore::" + m.word("group_score", kGroupScore);
  out += ", .renormalise = " + std::string(*renormalise == "always" ? "true" : "false") + ", .renormalise_eps = " + m.number("renormalise_eps", "0");
  out += ", .logits_dtype = DType::" + m.word("logits_dtype", kDTypes) + ", .scores_dtype = DType::" + m.word("scores_dtype", kDTypes);
  out += ", .weight_tensor = " + tensor("weight", true) + ", .linear_bias_tensor = " + tensor("linear_bias_tensor", bias == "true") +
         ", .correction_bias_tensor = " + tensor("correction_bias_tensor", correction == "true") +
         ", .input_norm_tensor = " + tensor("input_norm", true) + "}";
  sources.cite(m);
  m.done();
  return out;
}

void check_complete(Map& top, const std::set<std::string>& given, const std::vector<std::string>& unknown) {
  std::set<std::string> said = given;
  for (const std::string& fact : top.list("absent", false)) {
    if (!kFactNames.count(fact)) fail(top.file(), top.node("absent").Mark(), "absent: '" + fact + "' is no fact of fact_list.inc");
    if (!said.insert(fact).second) fail(top.file(), top.node("absent").Mark(), "absent: '" + fact + "' is also given in keys:");
  }
  said.insert(unknown.begin(), unknown.end());
  for (const std::string& fact : kRequiredFacts) {
    if (!said.count(fact)) fail(top.file(), top.mark(), "nothing is said of '" + fact + "': give it in keys:, or list it under absent: or unknown:");
  }
}

void read_family(const fs::path& path, FamilyTables& t) {
  Map top(path.string(), load(path));
  const std::string name = top.text("family");
  if (name != path.stem().string()) fail(top.file(), top.node("family").Mark(), "family '" + name + "' must live in " + name + ".yaml");
  const Sources sources(top);
  const std::vector<std::string> model_types = top.list("model_types", true), unknown = top.list("unknown", false);
  for (const std::string& type : model_types) {
    const auto [found, added] = t.owner_of_model_type.emplace(type, path.string());
    if (!added) fail(top.file(), top.node("model_types").Mark(), "model_type '" + type + "' belongs to " + found->second + " already");
  }
  std::set<std::string> given, tensor_names;
  const std::string keys = family_keys(top, sources, t, name, &given);
  const std::string tensors = family_tensors(top, t, &tensor_names);
  std::string renormalise;
  const std::string routing = family_routing(top, sources, tensor_names, &renormalise);
  if ((renormalise == "config") != (given.count("router.renormalised") != 0)) {
    fail(top.file(), top.node("routing").Mark(), "renormalise: config and a key for router.renormalised belong together");
  }
  if (renormalise != "config") given.insert("router.renormalised");
  check_complete(top, given, unknown);

  top.word("moe_layer_rule", kMoeLayerRules);
  Map balance(top.file(), top.node("balance"));
  const std::string kind = balance.word("kind", kBalance), per_k = balance.number("uniform_value_per_k", "0");
  if (kind == "kAuxLoss" && !balance.has("uniform_value_per_k")) fail(top.file(), balance.mark(), "an auxiliary loss needs uniform_value_per_k (1: uniform routing gives k; 0: gives 1)");
  sources.cite(balance);
  balance.done();
  Map fp32(top.file(), top.node("documented_fp32_router"));
  const bool documented = fp32.flag("value", false);
  const std::string fp32_cite = sources.cite(fp32);
  fp32.node("value");
  fp32.done();
  std::vector<std::string> cites;
  for (const std::string& c : top.list("cites", true)) cites.push_back(sources.expand(c, top.node("cites").Mark()));

  Writer& w = t.writer;
  std::ostringstream out;
  out << "{" << quoted(name) << ", " << w.strings(model_types) << ", " << w.strings(top.list("classes", true)) << ", " << keys << ", "
      << tensors << ",\n     " << quoted(top.text("moe_layer_rule")) << ", " << routing << ",\n     " << quoted(renormalise)
      << ", Balance::" << kind << ", " << per_k << ", " << (documented ? "true" : "false") << ", " << quoted(fp32_cite) << ",\n     "
      << w.strings(top.list("fp32_tensors", false)) << ", " << w.strings(top.list("expert_names", true)) << ", "
      << w.strings(top.list("router_names", true)) << ", " << w.strings(top.list("extras", false)) << ", " << w.strings(unknown)
      << ", " << w.strings(cites) << "}";
  top.done();
  t.families.push_back(out.str());
}

void read_hub_ids(const fs::path& path, FamilyTables& t) {
  Map top(path.string(), load(path));
  const Sources sources(top);
  for (const auto& entry : top.node("models")) {
    Map m(top.file(), entry);
    const std::string family = m.text("family");
    const auto keys = t.config_keys.find(family);
    if (keys == t.config_keys.end()) fail(top.file(), m.node("family").Mark(), "family '" + family + "' has no file");
    std::vector<std::string> config;
    Map values(top.file(), m.node("config"));
    for (const auto& value : m.node("config")) {
      const std::string key = value.first.Scalar();
      if (!keys->second.count(key)) fail(top.file(), value.first.Mark(), "'" + key + "' is no config key of family '" + family + "'");
      config.push_back("{" + quoted(key) + ", " + quoted(values.text(key)) + "}");
    }
    const std::string cite = sources.cite(m);
    for (const std::string& id : m.list("ids", true)) {
      std::string lower = id;
      std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
      if (!t.hub_ids.insert(lower).second) fail(top.file(), m.node("ids").Mark(), "hub id '" + id + "' is listed twice");
      t.hub_models.push_back("{" + quoted(id) + ", " + quoted(family) + ", " + t.writer.array("KeyValue", config) + ", " + quoted(cite) + "}");
    }
    m.done();
  }
  top.done();
}

std::string families_source(const fs::path& dir) {
  FamilyTables t;
  for (const fs::path& path : yaml_files(dir)) {
    if (path.filename() != "hub_ids.yaml") read_family(path, t);
  }
  if (fs::exists(dir / "hub_ids.yaml")) read_hub_ids(dir / "hub_ids.yaml", t);
  return "// Generated by cmake/compile_tables.cc from audit/families. Do not edit.\n#include \"audit/families/family.h\"\n\n"
         "namespace moeaudit {\nnamespace {\nusing KeyValue = std::pair<std::string_view, std::string_view>;\n" + t.writer.text() +
         "}  // namespace\n\nconst Family kFamilies[] = {\n    " + joined(t.families, ",\n    ") + "};\nconst int kNumFamilies = " +
         std::to_string(t.families.size()) + ";\n\nconstexpr HubModel kHubModels[] = {\n    " +
         (t.hub_models.empty() ? "{}" : joined(t.hub_models, ",\n    ")) +
         "};\nconst int kNumHubModels = " + std::to_string(t.hub_models.size()) + ";\n}  // namespace moeaudit\n";
}

// ---- behaviours ----------------------------------------------------------------------------------------------------

struct Row {
  std::string package, topic, from, until, value, cite, file;
  std::map<std::string, std::vector<std::string>> when;
  bool measured = false;
  YAML::Mark mark;
};

std::optional<Version> version_of(Map& map, const std::string& key, std::string* text) {
  *text = map.text_or(key, "");
  if (text->empty()) return std::nullopt;
  const std::optional<Version> v = Version::parse(*text);
  if (!v) fail(map.file(), map.node(key).Mark(), key + ": '" + *text + "' is no version (write 4.46.0; in quotes where YAML would read a number)");
  return v;
}

void read_window(Map& map, Row* row) {
  const auto from = version_of(map, "from", &row->from), until = version_of(map, "until", &row->until);
  if (from && until && !(*from < *until)) fail(map.file(), map.mark(), "the window [" + row->from + ", " + row->until + ") is empty");
}

void read_row(Map& map, const Sources& sources, Row row, std::vector<Row>* rows) {
  row.topic = map.text("topic");
  read_window(map, &row);
  row.value = map.text("value");
  row.measured = map.flag("measured", false);
  row.cite = sources.cite(map);
  row.mark = map.mark();
  if (map.has("when")) {
    Map when(map.file(), map.node("when"));
    for (const auto& condition : map.node("when")) row.when[condition.first.Scalar()] = when.list(condition.first.Scalar(), true);
  }
  if (const auto closed = kClosedTopics.find(row.topic); closed != kClosedTopics.end() && !closed->second.count(row.value)) {
    fail(map.file(), map.node("value").Mark(), "'" + row.value + "' is no value of topic '" + row.topic + "'; write one of: " + joined({closed->second.begin(), closed->second.end()}, ", "));
  }
  if (kMeasuredOnly.count(row.topic) && (!row.measured || row.cite.find("fixtures/oracle/") == std::string::npos)) {
    fail(map.file(), map.mark(), "topic '" + row.topic + "' takes measured rows only: measured: true, and cite the row of fixtures/oracle/");
  }
  map.done();
  rows->push_back(std::move(row));
}

/// `known_keys:` one entry a list of a framework: versions it was read from, and each key with its window.
void read_known_keys(Map& top, const Sources& sources, const Row& base, std::vector<Row>* rows) {
  if (!top.has("known_keys")) return;
  for (const auto& entry : top.node("known_keys")) {
    Map list(top.file(), entry);
    Row row = base;
    row.topic = "known_key";
    row.measured = false;
    row.cite = sources.cite(list);
    row.when["list"] = {list.text("list")};
    for (const auto& group : list.node("groups")) {
      Map g(top.file(), group);
      row.mark = g.mark();
      read_window(g, &row);
      if (row.from.empty() || row.until.empty()) fail(top.file(), g.mark(), "a list of keys is known for a closed window only: give from and until");
      for (const std::string& key : g.list("keys", true)) {
        row.value = key;
        rows->push_back(row);
      }
      g.done();
    }
    list.done();
  }
}

bool windows_overlap(const Row& a, const Row& b) {
  auto before = [](const std::string& until, const std::string& from) {
    return !until.empty() && !from.empty() && !(*Version::parse(from) < *Version::parse(until));
  };
  return !before(a.until, b.from) && !before(b.until, a.from);
}

/// Can one subject meet both rows? Only a key that both name, with no value in common, keeps them apart.
bool conditions_overlap(const Row& a, const Row& b) {
  for (const auto& [key, values] : a.when) {
    const auto other = b.when.find(key);
    if (other == b.when.end()) continue;
    if (std::none_of(values.begin(), values.end(), [&](const std::string& v) {
          return std::find(other->second.begin(), other->second.end(), v) != other->second.end();
        })) return false;
  }
  return true;
}

/// No two rows may answer the same question differently; equal answers may overlap, except that a key is listed once.
void check_contradictions(const std::vector<Row>& rows) {
  std::map<std::string, std::vector<const Row*>> groups;
  for (const Row& r : rows) groups[r.package + " " + r.topic + (r.topic == "known_key" ? " " + r.value : "")].push_back(&r);
  for (const auto& [name, group] : groups) {
    for (std::size_t i = 0; i < group.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        const Row &a = *group[j], &b = *group[i];
        if (!windows_overlap(a, b) || !conditions_overlap(a, b)) continue;
        if (a.value == b.value && a.topic != "known_key") continue;
        fail(b.file, b.mark, name + ": " + (a.value == b.value ? "listed twice" : "'" + b.value + "' contradicts '" + a.value + "'") + " of " +
             a.file + ":" + std::to_string(a.mark.line + 1) + " (same subject, overlapping versions)");
      }
    }
  }
}

std::string behaviours_source(const fs::path& dir) {
  std::vector<Row> rows;
  for (const fs::path& path : yaml_files(dir)) {
    Map top(path.string(), load(path));
    const Sources sources(top);
    Row base;
    base.package = top.text("package");
    base.file = path.string();
    if (top.has("rows")) {
      for (const auto& entry : top.node("rows")) {
        Map map(top.file(), entry);
        read_row(map, sources, base, &rows);
      }
    }
    read_known_keys(top, sources, base, &rows);
    top.done();
  }
  check_contradictions(rows);
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    return std::tie(a.package, a.topic) < std::tie(b.package, b.topic);
  });
  Writer w;
  std::vector<std::string> out;
  for (const Row& r : rows) {
    std::vector<std::string> when;
    for (const auto& [key, values] : r.when) when.push_back("{" + quoted(key) + ", " + w.strings(values) + "}");
    out.push_back("{" + quoted(r.package) + ", " + quoted(r.topic) + ", " + w.array("BehaviourCondition", when) + ", " + quoted(r.from) + ", " +
                  quoted(r.until) + ", " + quoted(r.value) + ", " + (r.measured ? "true" : "false") + ", " + quoted(r.cite) + "}");
  }
  return "// Generated by cmake/compile_tables.cc from audit/behaviours. Do not edit.\n#include \"audit/behaviours/behaviour.h\"\n\n"
         "namespace moeaudit {\nnamespace {\n" + w.text() + "}  // namespace\n\nconstexpr BehaviourRow kBehaviours[] = {\n    " +
         (out.empty() ? "{}" : joined(out, ",\n    ")) + "};\nconst int kNumBehaviours = " + std::to_string(rows.size()) + ";\n}  // namespace moeaudit\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: compile_tables <families-dir> <behaviours-dir> <out-dir>\n";
    return 2;
  }
  try {
    fs::create_directories(argv[3]);
    write_file(fs::path(argv[3]) / "families.cc", families_source(argv[1]));
    write_file(fs::path(argv[3]) / "behaviours.cc", behaviours_source(argv[2]));
  } catch (const std::exception& e) {
    std::cerr << e.what() << '\n';
    return 1;
  }
  return 0;
}

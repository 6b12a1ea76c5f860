// audit/families/*.yaml -> the source of kFamilies and kHubModels (compile_tables.cc). Schema: docs/add_a_family.md.
#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cmake/table_yaml.h"

namespace tables {
namespace {

namespace fs = std::filesystem;

const std::set<std::string> kFactNames = {
#define FACT(member, type, name, meaning, supply) name,
#include "audit/facts/fact_list.inc"
#undef FACT
};

// What every family must say: in keys:, or in absent: (the family has no such thing), or in unknown:.
const std::vector<std::string> kRequiredFacts = {
    "model.num_layers",         "model.moe_layers",    "model.hidden_size",     "model.expert_width",
    "model.num_shared_experts", "router.num_experts",  "router.top_k",          "router.num_groups",
    "router.top_groups",        "router.renormalised", "router.routed_scaling", "balance.aux_flag",
    "balance.aux_coefficient"};

const Words kParts = {{"router", "kRouter"},
                      {"routed_expert", "kRoutedExpert"},
                      {"shared_expert", "kSharedExpert"},
                      {"shared_expert_gate", "kSharedExpertGate"},
                      {"dense_mlp", "kDenseMlp"},
                      {"attention", "kAttention"},
                      {"embedding", "kEmbedding"},
                      {"head", "kHead"},
                      {"norm", "kNorm"},
                      {"other", "kOther"}};
const Words kLayers = {{"moe", "kMoe"}, {"dense", "kDense"}, {"all", "kAll"}, {"none", "kNone"}};
const Words kWhere = {{"hub", "kHub"}, {"memory", "kMemory"}, {"both", ""}, {"older", "kOlder"}};
const Words kScoring = {{"softmax", "kSoftmax"}, {"sigmoid", "kSigmoid"}, {"sqrtsoftplus", "kSqrtSoftplus"}};
const Words kGroupScore = {{"none", "kNone"}, {"max", "kMax"}, {"top2_sum", "kTop2Sum"}};
const Words kGroupMask = {{"zero", "true"}};
const Words kBalance = {
    {"aux_loss", "kAuxLoss"}, {"bias_update", "kBiasUpdate"}, {"bias_frozen", "kBiasFrozen"}, {"none", "kNone"}};
const std::string kByVersion = "by_version";
const Words kScoresDTypes = {{"logits", "kUnknown"}, {"float32", "kF32"}, {kByVersion, "kUnknown"}};
const Words kDTypes = {{"activations", "kUnknown"}, {"float32", "kF32"}, {kByVersion, "kUnknown"}};
const Words kWeightScaling = {{"routed", "kRouted"}, {"behind_experts", "kBehindExperts"}, {"inverse_k", "kInverseK"}};
const Words kRenormalise = {{"always", ""}, {"never", ""}, {"config", ""}};

struct FamilyTables {
  Writer writer;
  std::vector<std::string> families, hub_models;
  std::map<std::string, std::string> owner_of_model_type;
  std::map<std::string, std::set<std::string>> config_keys;  // family -> every spelling of every key
  std::set<std::string> hub_ids;
};

/// `keys:` fact -> spellings and default. No spelling: the default is a constant of the family.
std::string family_keys(Map& top, const Sources& sources, FamilyTables& t, const std::string& family,
                        std::set<std::string>* given) {
  std::vector<std::string> rows;
  const YAML::Node keys = top.node("keys");
  if (!keys.IsMap()) fail(top.file(), keys.Mark(), "'keys' must be a mapping from fact to spellings");
  for (const auto& entry : keys) {
    const std::string fact = entry.first.Scalar();
    if (!kFactNames.count(fact))
      fail(top.file(), entry.first.Mark(), "'" + fact + "' is no fact of audit/facts/fact_list.inc");
    if (!given->insert(fact).second) fail(top.file(), entry.first.Mark(), "fact '" + fact + "' is given twice");
    Map row(top.file(), entry.second);
    const std::vector<std::string> spellings = row.list("keys", false);
    const std::string fallback = row.has("default") ? row.text("default") : "";
    if (spellings.empty() && fallback.empty())
      fail(top.file(), entry.first.Mark(), "'" + fact + "' has neither keys nor a default");
    rows.push_back("{" + quoted(fact) + ", " + t.writer.strings(spellings) + ", " + quoted(fallback) + ", " +
                   quoted(sources.cite(row)) + "}");
    t.config_keys[family].insert(spellings.begin(), spellings.end());
    row.done();
  }
  return t.writer.array("FamilyKey", rows);
}

/// Every dimension: a sum of products of symbols and numbers, or "?".
std::string shape_of(Map& row) {
  const std::vector<std::string> dims = row.list("shape", true);
  for (const std::string& dim : dims) {
    if (dim == "?") continue;
    std::stringstream stream(dim);
    for (std::string term; std::getline(stream, term, '+');) {
      std::stringstream product(term);
      for (std::string factor; std::getline(product, factor, '*');) {
        const bool symbol = factor.size() == 1 && std::string("EHISVXZ").find(factor[0]) != std::string::npos;
        const bool digits = !factor.empty() && factor.find_first_not_of("0123456789") == std::string::npos;
        if (!symbol && !digits) {
          fail(row.file(), row.node("shape").Mark(),
               "shape '" + dim + "': write E, H, I, S, V, X, Z, numbers, products like 2*I, sums like E+X, or ?");
        }
      }
    }
  }
  return joined(dims, ",");
}

using Prefixes = std::vector<std::pair<std::string, std::string>>;

Prefixes prefixes_of(const std::string& file, const YAML::Node& rename) {
  Prefixes out;
  if (!rename) return out;
  Map map(file, rename);
  for (const auto& entry : rename) out.emplace_back(entry.first.Scalar(), map.text(entry.first.Scalar()));
  return out;
}

std::string renamed(const std::string& name, const Prefixes& prefixes) {
  for (const auto& [from, to] : prefixes) {
    if (name.rfind(from, 0) == 0) return to + name.substr(from.size());
  }
  return name;
}

/// `where: word` or a list of words, as names of FamilyTensor::Where.
std::vector<std::string> wheres_of(Map& row) {
  std::vector<std::string> out;
  row.node("where");
  for (const std::string& word : row.words("where")) {
    if (!kWhere.count(word)) fail(row.file(), row.node("where").Mark(), "where: '" + word + "' is none of hub, memory, both, older");
    if (word == "both") out.insert(out.end(), {"kHub", "kMemory"});
    else out.push_back(kWhere.at(word));
  }
  return out;
}

/// Where released files have other names than save_pretrained writes, those are the hub's with the prefixes of `released`.
std::string family_tensors(Map& top, FamilyTables& t, std::set<std::string>* names) {
  struct Seen {
    std::vector<std::string> instead;
    YAML::Mark mark;
  };
  std::vector<std::string> rows;
  std::vector<Seen> alternatives;
  const Prefixes released = top.has("released") ? prefixes_of(top.file(), top.node("released")) : Prefixes();
  for (const auto& entry : top.node("tensors")) {
    Map row(top.file(), entry);
    const std::string name = row.text("name"), layers = row.word("layers", kLayers);
    const bool layered = name.find("{L}") != std::string::npos || name.find("{D}") != std::string::npos;
    if (layered == (layers == "kNone"))
      fail(top.file(), entry.Mark(), "'" + name + "': {L} or {D} and 'layers: none' exclude each other, and one is needed");
    const std::string when = row.text_or("optional", "");
    const std::vector<std::string> instead = row.words("instead");
    alternatives.push_back({instead, entry.Mark()});
    const std::string shape = shape_of(row), part = row.word("part", kParts);
    const bool beyond = row.flag("beyond", false);
    if (beyond && name.find("{e}") == std::string::npos) fail(top.file(), entry.Mark(), "'" + name + "': beyond: true needs {e}");
    if (name.find("{v}") != std::string::npos && part != "kOther") fail(top.file(), entry.Mark(), "'" + name + "': {v} is of a second set of experts, part: other");
    std::vector<std::string> wheres = wheres_of(row);
    if (!released.empty() && std::find(wheres.begin(), wheres.end(), "kHub") != wheres.end()) wheres.push_back("kReleased");
    for (const std::string& w : wheres) {
      const Prefixes prefixes = w == "kReleased" ? released : Prefixes();
      const std::string called = renamed(name, prefixes);
      std::vector<std::string> others;
      for (const std::string& other : instead) others.push_back(renamed(other, prefixes));
      if (!names->insert(w + called).second)
        fail(top.file(), entry.Mark(), "tensor '" + called + "' is listed twice");
      const std::string why = others.empty() ? when : "the checkpoint has " + joined(others, " or ") + " instead";
      rows.push_back("{" + quoted(called) + ", " + quoted(shape) + ", Part::" + part + ", FamilyTensor::Where::" + w +
                     ", FamilyTensor::Layers::" + layers + ", " + (why.empty() ? "false" : "true") + ", " +
                     quoted(why) + ", " + t.writer.strings(others) + (beyond ? ", true}" : ", false}"));
    }
    row.done();
  }
  for (const Seen& a : alternatives) {
    for (const std::string& other : a.instead) {
      if (!names->count("kHub" + other) && !names->count("kMemory" + other))
        fail(top.file(), a.mark, "instead: '" + other + "' is no tensor of this family");
    }
  }
  return t.writer.array("FamilyTensor", rows);
}

/// `key: {config_key: value, ...}` as initialisers of FamilyConditions.
std::vector<std::string> conditions(Map& m, const std::string& key) {
  std::vector<std::string> out;
  if (!m.has(key)) return out;
  const YAML::Node node = m.node(key);
  if (!node.IsMap() || node.size() == 0) fail(m.file(), node.Mark(), "'" + key + "' must be {config_key: value}");
  for (const auto& entry : node) {
    const std::string name = entry.first.Scalar();
    out.push_back("{" + quoted(name) + ", " + quoted(Map(m.file(), node).text(name)) + "}");
  }
  return out;
}

/// The same where there can be but one.
std::string condition(Map& m, const std::string& key) {
  const std::vector<std::string> all = conditions(m, key);
  if (all.size() > 1) fail(m.file(), m.node(key).Mark(), "'" + key + "' must be one {config_key: value}");
  return all.empty() ? "{}" : all[0];
}

/// `all`, or a mapping of MoeLayerRule's fields, numbers as config_key=fallback or as a constant.
std::string layer_rule(Map& top, const std::string& key, Writer& w) {
  const YAML::Node node = top.node(key);
  if (node.IsScalar() && node.Scalar() == "all") return "{{\"\", 0}, {\"\", -1}, {\"\", 1}, {\"\", -1}, \"\", \"\", {}, false}";
  if (!node.IsMap()) fail(top.file(), node.Mark(), "'" + key + "' is 'all' or a mapping (docs/add_a_family.md)");
  Map m(top.file(), node);
  auto number = [&](const std::string& key, const std::string& otherwise) {
    const std::string text = m.text_or(key, otherwise);
    const std::size_t equals = text.find('=');
    const std::string value = equals == std::string::npos ? text : text.substr(equals + 1);
    if (value.empty() || (value != otherwise && value.find_first_not_of("0123456789") != std::string::npos))
      fail(m.file(), m.node(key).Mark(), "'" + key + "': write a number, or config_key=number");
    return "{" + quoted(equals == std::string::npos ? "" : text.substr(0, equals)) + ", " + value + "}";
  };
  std::vector<std::string> types;
  for (const std::string& text : m.words("types")) {
    const std::size_t equals = text.find('=');
    if (equals == std::string::npos) fail(m.file(), m.node("types").Mark(), "'types': write config_key=word");
    types.push_back("{" + quoted(text.substr(0, equals)) + ", " + quoted(text.substr(equals + 1)) + "}");
  }
  const bool counts = m.flag("counts", false);
  if (counts && types.empty()) fail(m.file(), m.node("counts").Mark(), "counts: true needs 'types', the list that counts");
  const std::string out = "{" + number("from", "0") + ", " + number("to", "-1") + ", " + number("every", "1") + ", " +
                          number("offset", "-1") + ", " + quoted(m.text_or("dense", "")) + ", " +
                          quoted(m.text_or("only", "")) + ", " +
                          w.array("FamilyCondition", types) + (counts ? ", true}" : ", false}");
  m.done();
  return out;
}

struct RoutingText {
  std::string routing;      // initialiser of audit/facts/values.h Routing
  std::string around;       // of the fields of Family that follow it
  std::string renormalise;  // "always", "never", "config"
};

/// The routing conventions.
RoutingText family_routing(Map& top, const Sources& sources, const std::set<std::string>& tensors, Writer& w) {
  Map m(top.file(), top.node("routing"));
  m.word("renormalise", kRenormalise);
  const std::string renormalise = m.text("renormalise");
  auto tensor = [&](const std::string& key, bool required) {
    if (!required && !m.has(key)) return std::string("{}");
    const std::string name = m.text(key);
    if (!tensors.count("kHub" + name))
      fail(top.file(), m.node(key).Mark(), key + ": '" + name + "' is no hub tensor of this family");
    return quoted(name);
  };
  auto yes = [&](const std::string& key) { return m.flag(key, false) ? std::string("true") : std::string("false"); };
  const std::string bias = yes("linear_bias"), correction = yes("correction_bias");
  std::string out = "{.scoring = Scoring::" + m.word("scoring", kScoring) +
                    ", .score_after_top_k = " + yes("score_after_top_k") + ", .linear_bias = " + bias +
                    ", .correction_bias = " + correction;
  if (m.has("group_score")) out += ", .group_score = GroupScore::" + m.word("group_score", kGroupScore);
  if (m.has("group_mask")) out += ", .group_mask_is_zero = " + m.word("group_mask", kGroupMask);
  out += ", .renormalise = " + std::string(renormalise == "always" ? "true" : "false") +
         ", .renormalise_eps = " + m.number("renormalise_eps", "0");
  if (m.has("sparse_mixer")) {
    if (!m.flag("score_after_top_k", false) || renormalise != "never")
      fail(m.file(), m.node("sparse_mixer").Mark(), "sparse_mixer picks the two best logits: it needs score_after_top_k: true and renormalise: never");
    out += ", .sparse_mixer = true";
  }
  out += ", .logits_dtype = DType::" + m.word("logits_dtype", kDTypes) +
         ", .scores_dtype = DType::" + m.word("scores_dtype", kScoresDTypes) +
         ", .scores_cast_back = " + yes("scores_cast_back");
  out += ", .weight_tensor = " + tensor("weight", true) +
         ", .linear_bias_tensor = " + tensor("linear_bias_tensor", bias == "true") +
         ", .correction_bias_tensor = " + tensor("correction_bias_tensor", correction == "true") +
         ", .input_norm_tensor = " + tensor("input_norm", false) +
         ", .input_norm_adds_one = " + yes("input_norm_adds_one") +
         ", .input_norm_over_root = " + yes("input_norm_over_root") +
         ", .expert_scale_tensor = " + tensor("expert_scale_tensor", false) +
         ", .always_rows = " + yes("always_rows") +
         ", .global_scale_tensor = " + tensor("global_scale_tensor", false) + "}";
  const std::string groups_if = condition(m, "groups_if");
  const auto config_number = [&](const std::string& key, const std::string& otherwise = "0") {
    const std::string text = m.text_or(key, otherwise);
    const std::size_t equals = text.find('=');
    const std::string value = equals == std::string::npos ? text : text.substr(equals + 1);
    double number = 0;
    if (!YAML::convert<double>::decode(YAML::Node(value), number) || !(number >= 0))
      fail(m.file(), m.node(key).Mark(), "'" + key + "': write a number, or config_key=number");
    return "{" + quoted(equals == std::string::npos ? "" : text.substr(0, equals)) + ", " + value + "}";
  };
  const std::string around = config_number("logit_softcap") + ", " + config_number("renormalise_floor") + ", " +
                             config_number("sparse_mixer") + ", " + config_number("renormalise_norm", "1") + ", " + groups_if + ", " +
                             w.array("FamilyCondition", conditions(m, "holds_if")) + ", " +
                             (m.text("logits_dtype") == kByVersion ? "true, " : "false, ") + "WeightScaling::" +
                             (m.has("weight_scaling") ? m.word("weight_scaling", kWeightScaling) : "kRouted") + ", " +
                             (m.text("scores_dtype") == kByVersion ? "true" : "false") + ", " +
                             quoted(m.text_or("not_replayed", ""));
  sources.cite(m);
  m.done();
  return {out, around, renormalise};
}

void check_complete(Map& top, const std::set<std::string>& given, const std::vector<std::string>& unknown) {
  std::set<std::string> said = given;
  for (const std::string& fact : top.list("absent", false)) {
    if (!kFactNames.count(fact))
      fail(top.file(), top.node("absent").Mark(), "absent: '" + fact + "' is no fact of fact_list.inc");
    if (!said.insert(fact).second)
      fail(top.file(), top.node("absent").Mark(), "absent: '" + fact + "' is also given in keys:");
  }
  said.insert(unknown.begin(), unknown.end());
  for (const std::string& fact : kRequiredFacts) {
    if (!said.count(fact))
      fail(top.file(), top.mark(),
           "nothing is said of '" + fact + "': give it in keys:, or list it under absent: or unknown:");
  }
}

/// `like: other`: everything that this file does not say is as in other.yaml, its tensor names with the prefixes of `rename`;
/// where memory has others than files, with those of `rename_memory`; `files: memory`: files have the names of memory.
YAML::Node read_like(const fs::path& path, const YAML::Node& own) {
  const YAML::Node like = own["like"];
  if (!like) return own;
  const fs::path other = path.parent_path() / (like.Scalar() + ".yaml");
  if (!fs::exists(other)) fail(path.string(), like.Mark(), "like: there is no " + like.Scalar() + ".yaml");
  YAML::Node out = load(other);
  if (out["like"]) fail(path.string(), like.Mark(), "like: '" + like.Scalar() + "' is itself like another family");
  const Prefixes files = prefixes_of(path.string(), own["rename"]);
  const Prefixes memory = own["rename_memory"] ? prefixes_of(path.string(), own["rename_memory"]) : files;
  const YAML::Node layout = own["files"];
  if (layout && layout.Scalar() != "memory") fail(path.string(), layout.Mark(), "'files' can say memory only");
  YAML::Node tensors;
  for (const YAML::Node& tensor : out["tensors"]) {
    for (const auto& [where, prefixes] : {std::pair{"hub", files}, std::pair{"memory", memory}}) {
      if (tensor["where"].Scalar() != (layout ? "memory" : where) && tensor["where"].Scalar() != "both") continue;
      YAML::Node one = YAML::Clone(tensor);
      one["where"] = where;
      one["name"] = renamed(one["name"].Scalar(), prefixes);
      if (one["instead"]) {
        std::vector<std::string> instead = Map(path.string(), tensor).words("instead");
        for (std::string& other : instead) other = renamed(other, prefixes);
        one["instead"] = instead;
      }
      tensors.push_back(one);
    }
  }
  out["tensors"] = tensors;
  for (const char* key : {"weight", "linear_bias_tensor", "correction_bias_tensor", "input_norm", "expert_scale_tensor",
                          "global_scale_tensor"}) {
    if (YAML::Node routing = out["routing"]; routing[key]) routing[key] = renamed(routing[key].Scalar(), files);
  }
  for (const auto& entry : own) {
    const std::string key = entry.first.Scalar();
    if (key != "like" && key != "rename" && key != "rename_memory" && key != "files") out[key] = entry.second;
  }
  return out;
}

void read_family(const fs::path& path, FamilyTables& t) {
  Map top(path.string(), read_like(path, load(path)));
  const std::string name = top.text("family");
  if (name != path.stem().string())
    fail(top.file(), top.node("family").Mark(), "family '" + name + "' must live in " + name + ".yaml");
  const Sources sources(top);
  const std::vector<std::string> model_types = top.list("model_types", true), unknown = top.list("unknown", false);
  for (const std::string& type : model_types) {
    const auto [found, added] = t.owner_of_model_type.emplace(type, path.string());
    if (!added)
      fail(top.file(), top.node("model_types").Mark(),
           "model_type '" + type + "' belongs to " + found->second + " already");
  }
  std::set<std::string> given, tensor_names;
  const std::string keys = family_keys(top, sources, t, name, &given);
  const std::string tensors = family_tensors(top, t, &tensor_names);
  const auto [routing, around, renormalise] = family_routing(top, sources, tensor_names, t.writer);
  if ((renormalise == "config") != (given.count("router.renormalised") != 0)) {
    fail(top.file(), top.node("routing").Mark(),
         "renormalise: config and a key for router.renormalised belong together");
  }
  if (renormalise != "config") given.insert("router.renormalised");
  if (top.node("moe_layer_rule").IsMap() && top.node("moe_layer_rule")["counts"]) given.insert("model.num_layers");
  check_complete(top, given, unknown);

  Map balance(top.file(), top.node("balance"));
  const std::string kind = balance.word("kind", kBalance), per_k = balance.number("uniform_value_per_k", "0"), twice = balance.text_or("counted_twice", "");
  if (kind == "kAuxLoss" && !balance.has("uniform_value_per_k"))
    fail(top.file(), balance.mark(),
         "an auxiliary loss needs uniform_value_per_k (1: uniform routing gives k; 0: gives 1)");
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
  out << "{" << quoted(name) << ", " << w.strings(model_types) << ", " << w.strings(top.list("classes", true)) << ", "
      << keys << ", " << tensors << ",\n     " << layer_rule(top, "moe_layer_rule", w) << ", "
      << layer_rule(top, top.has("decoder_layer_rule") ? "decoder_layer_rule" : "moe_layer_rule", w) << ", "
      << condition(top, "chosen_by_table") << ", " << condition(top, "moe_if") << ", " << routing << ", " << around << ",\n     "
      << quoted(renormalise) << ", Balance::" << kind << ", " << per_k << ", " << quoted(twice) << ", " << (documented ? "true" : "false")
      << ", " << quoted(fp32_cite) << ",\n     " << w.strings(top.list("fp32_tensors", false)) << ", "
      << w.strings(top.list("expert_names", true)) << ", " << w.strings(top.list("router_names", true)) << ", "
      << w.strings(top.list("extras", false)) << ", " << w.strings(top.list("towers", false)) << ", " << w.strings(unknown) << ", " << w.strings(cites) << "}";
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
      if (!keys->second.count(key))
        fail(top.file(), value.first.Mark(), "'" + key + "' is no config key of family '" + family + "'");
      config.push_back("{" + quoted(key) + ", " + quoted(values.text(key)) + "}");
    }
    const std::string cite = sources.cite(m);
    for (const std::string& id : m.list("ids", true)) {
      std::string lower = id;
      std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
      if (!t.hub_ids.insert(lower).second)
        fail(top.file(), m.node("ids").Mark(), "hub id '" + id + "' is listed twice");
      t.hub_models.push_back("{" + quoted(id) + ", " + quoted(family) + ", " + t.writer.array("KeyValue", config) +
                             ", " + quoted(cite) + "}");
    }
    m.done();
  }
  top.done();
}

}  // namespace

std::string families_source(const fs::path& dir) {
  FamilyTables t;
  // Files that are `like` another come last: what is wrong in the other file is then reported where it stands.
  std::vector<fs::path> files = yaml_files(dir);
  std::stable_partition(files.begin(), files.end(), [](const fs::path& p) { return !load(p)["like"]; });
  for (const fs::path& path : files) {
    if (path.filename() != "hub_ids.yaml") read_family(path, t);
  }
  if (fs::exists(dir / "hub_ids.yaml")) read_hub_ids(dir / "hub_ids.yaml", t);
  return "// Generated by cmake/compile_tables.cc from audit/families. Do not edit.\n#include "
         "\"audit/families/family.h\"\n\n"
         "namespace moeaudit {\nnamespace {\nusing KeyValue = std::pair<std::string_view, std::string_view>;\n" +
         t.writer.text() + "}  // namespace\n\nconst Family kFamilies[] = {\n    " + joined(t.families, ",\n    ") +
         "};\nconst int kNumFamilies = " + std::to_string(t.families.size()) +
         ";\n\nconstexpr HubModel kHubModels[] = {\n    " +
         (t.hub_models.empty() ? "{}" : joined(t.hub_models, ",\n    ")) +
         "};\nconst int kNumHubModels = " + std::to_string(t.hub_models.size()) + ";\n}  // namespace moeaudit\n";
}

}  // namespace tables

#include "tests/support/facts_from_json.h"

#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace moeaudit::testing {
namespace {

using nlohmann::json;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

/// A word among those that name_of() gives for the enumerators up to `last`.
template <class E>
E word(const json& j, E first, E last) {
  const std::string text = j.get<std::string>();
  for (int i = static_cast<int>(first); i <= static_cast<int>(last); ++i) {
    if (text == name_of(static_cast<E>(i))) return static_cast<E>(i);
  }
  fail("unknown word '" + text + "'");
}

void read(const json& j, bool* v) { *v = j.get<bool>(); }
void read(const json& j, char* v) { *v = j.is_boolean() ? j.get<bool>() : j.get<int>() != 0; }
void read(const json& j, int* v) { *v = j.get<int>(); }
void read(const json& j, std::int64_t* v) {
  if (!j.is_number_integer()) fail("not an integer: " + j.dump());
  *v = j.get<std::int64_t>();
}
void read(const json& j, double* v) {  // JSON has no word for them; the reports write the same strings
  if (j.is_string()) {
    const std::string text = j.get<std::string>();
    if (text == "nan")
      *v = std::nan("");
    else if (text == "inf")
      *v = std::numeric_limits<double>::infinity();
    else if (text == "-inf")
      *v = -std::numeric_limits<double>::infinity();
    else
      fail("not a number: " + text);
    return;
  }
  if (!j.is_number()) fail("not a number: " + j.dump());
  *v = j.get<double>();
}
void read(const json& j, std::string* v) { *v = j.get<std::string>(); }
void read(const json& j, DType* v) { *v = word(j, DType::kUnknown, DType::kC64); }
void read(const json& j, Scoring* v) { *v = word(j, Scoring::kSoftmax, Scoring::kSqrtSoftplus); }
void read(const json& j, GroupScore* v) { *v = word(j, GroupScore::kNone, GroupScore::kTop2Sum); }
void read(const json& j, Method* v) { *v = word(j, Method::kFull, Method::kOtherAdapter); }
void read(const json& j, Precision* v) { *v = word(j, Precision::kFp32, Precision::kPureFp16); }
void read(const json& j, AuxEffect* v) { *v = word(j, AuxEffect::kAdded, AuxEffect::kNoField); }
void read(const json& j, Balance* v) { *v = word(j, Balance::kAuxLoss, Balance::kNone); }
void read(const json& j, Part* v) { *v = word(j, Part::kRouter, Part::kOther); }
void read(const json& j, TargetFault* v) { *v = word(j, TargetFault::kNone, TargetFault::kRefused); }
void read(const json& j, ShapeFault* v) { *v = word(j, ShapeFault::kOther, ShapeFault::kSharded); }
void read(const json& j, AdapterFault* v) { *v = word(j, AdapterFault::kNoPair, AdapterFault::kStackOrder); }
void read(const json& j, VersionSet* v) {
  const auto parsed = VersionSet::parse(j.get<std::string>());
  if (!parsed) fail("not a version constraint: " + j.dump());
  *v = *parsed;
}

struct Ignore {
  void operator()(const char*, auto&) const {}
};
/// A struct of audit/facts/values.h.
template <class T>
concept Visitable = requires(T& v) { T::visit(v, Ignore{}); };

// Declared ahead: the templates below find them by ordinary lookup only.
void read(const json& j, TensorDiff* v);
void read(const json& j, LogTable* v);
template <Visitable T>
void read(const json& j, T* v);

template <class T>
void read(const json& j, std::vector<T>* v) {
  if (!j.is_array()) fail("not an array: " + j.dump());
  for (const json& item : j) {
    T value{};
    read(item, &value);
    v->push_back(std::move(value));
  }
}

/// Reads members of an object by name; what is left over is an error, so a misspelt column cannot pass unseen.
class Members {
 public:
  explicit Members(const json& j) : json_(j) {
    if (!j.is_object()) fail("not an object: " + j.dump());
    for (const auto& item : j.items()) left_.insert(item.key());
  }
  template <class T>
  Members& operator()(const char* name, T* v) {
    if (left_.erase(name)) read(json_.at(name), v);
    return *this;
  }
  void done() const {
    if (!left_.empty()) fail("unknown member '" + *left_.begin() + "'");
  }

 private:
  const json& json_;
  std::set<std::string> left_;
};

// What a column holds in every row if a case does not give it; nothing here: 0, false or "".
template <class T>
json blanks_of(const T*) {
  return json::object();
}
json blanks_of(const RouterTable*) { return {{"dtype", "BF16"}, {"expert_hidden", -1}}; }
json blanks_of(const RouterValues*) { return {{"first_index", -1}, {"first_zero_row", -1}}; }
json blanks_of(const WeightScan*) { return {{"part", "routed_expert"}, {"dtype", "BF16"}, {"layer", -1}, {"expert", -1}, {"first_index", -1}}; }
json blanks_of(const AdapterModules*) { return {{"part", "other"}, {"layer", -1}, {"expert", -1}, {"copies", 1}}; }
json blanks_of(const AdapterTargets*) { return {{"field", "target_modules"}, {"certain", true}}; }
json blanks_of(const BaseChanges*) { return {{"part", "routed_expert"}, {"layer", -1}, {"expert", -1}, {"tensors", 1}}; }
json blanks_of(const DTypePairs*) { return {{"part", "other"}, {"base", "BF16"}, {"trained", "BF16"}, {"tensors", 1}}; }
json blanks_of(const BiasChanges*) { return {{"present", true}}; }
json blanks_of(const MergeTable*) { return {{"part", "attention"}, {"layer", -1}, {"expert", -1}}; }
json blanks_of(const AdapterTensors*) {
  return {{"part", "routed_expert"}, {"layer", -1}, {"expert", -1}, {"norm_a", 1.0}, {"scale", "nan"}, {"bad_index", -1}};
}
json blanks_of(const AdapterLayout*) { return {{"part", "routed_expert"}, {"layer", -1}}; }
json blanks_of(const ShapeTable*) { return {{"part", "routed_expert"}}; }
json blanks_of(const CorrectionBias*) { return {{"dtype", "F32"}}; }
json blanks_of(const ExpertStorage*) { return {{"dtype", "BF16"}}; }

/// Any struct that has visit(): its single values, and its columns, of which those that are not given are filled up to
/// the length of those that are.
template <Visitable T>
void read(const json& j, T* v) {
  Members members(j);
  std::size_t rows = 0;
  std::string longest;
  T::visit(*v, [&](const char* name, auto& field) {
    members(name, &field);
    if constexpr (requires { field.push_back({}); field.front(); } && !std::is_same_v<std::decay_t<decltype(field)>, std::string>) {
      if (field.empty()) return;
      if (!longest.empty() && field.size() != rows) fail("columns '" + longest + "' and '" + name + "' differ in length");
      rows = field.size();
      longest = name;
    }
  });
  members.done();
  const json blanks = blanks_of(static_cast<const T*>(v));
  T::visit(*v, [&](const char* name, auto& field) {
    if constexpr (requires { field.push_back({}); field.front(); } && !std::is_same_v<std::decay_t<decltype(field)>, std::string>) {
      if (!field.empty()) return;
      typename std::decay_t<decltype(field)>::value_type blank{};
      if (blanks.contains(name)) read(blanks.at(name), &blank);
      field.assign(rows, blank);
    }
  });
}

constexpr char kNo = 0;
const double kNan = std::numeric_limits<double>::quiet_NaN();

void read(const json& j, TensorDiff* v) {
  Members m(j);
  m("missing", &v->missing)("missing_shard", &v->missing_shard)("unexpected", &v->unexpected).done();
  if (v->missing_shard.empty()) v->missing_shard.assign(v->missing.size(), "");
  if (v->missing_shard.size() != v->missing.size()) fail("'missing_shard' has another length than 'missing'");
}

/// A number in a column of the log: null is "not in this entry", "nan" is a written NaN.
void read_logged(const json& j, const char* name, std::size_t rows, std::vector<double>* value,
                 std::vector<char>* has) {
  value->assign(rows, kNan);
  if (has) has->assign(rows, kNo);
  if (!j.contains(name)) return;
  if (j.at(name).size() != rows) fail(std::string("column '") + name + "' has another length");
  for (std::size_t i = 0; i < rows; ++i) {
    if (j.at(name)[i].is_null()) continue;
    read(j.at(name)[i], &(*value)[i]);
    if (has) (*has)[i] = 1;
  }
}

void read(const json& j, LogTable* v) {
  const std::set<std::string> known = {"step", "loss", "grad_norm", "eval_loss", "aux_loss", "learning_rate", "ce", "z_loss", "line", "file", "aux_digits"};
  for (const auto& item : j.items()) {
    if (!known.count(item.key())) fail("unknown member '" + item.key() + "'");
  }
  if (j.contains("step")) read(j.at("step"), &v->step);
  const std::size_t rows = v->step.size();
  read_logged(j, "loss", rows, &v->loss, &v->has_loss);
  read_logged(j, "grad_norm", rows, &v->grad_norm, &v->has_grad_norm);
  read_logged(j, "eval_loss", rows, &v->eval_loss, &v->has_eval_loss);
  read_logged(j, "aux_loss", rows, &v->aux_loss, &v->has_aux_loss);
  read_logged(j, "learning_rate", rows, &v->learning_rate, nullptr);
  read_logged(j, "ce", rows, &v->ce, &v->has_ce);
  read_logged(j, "z_loss", rows, &v->z_loss, &v->has_z_loss);
  if (j.contains("line")) read(j.at("line"), &v->line);
  if (v->line.empty()) v->line.assign(rows, 0);
  if (v->line.size() != rows) fail("column 'line' has another length");
  if (j.contains("file")) read(j.at("file"), &v->file);
  if (j.contains("aux_digits")) read(j.at("aux_digits"), &v->aux_digits);
}

Origin origin_of(const std::string& text) {
  for (int i = 0; i <= static_cast<int>(Origin::kAbsent); ++i) {
    if (text == name_of(static_cast<Origin>(i))) return static_cast<Origin>(i);
  }
  fail("unknown origin '" + text + "'");
}

Role role_of(const std::string& text) {
  for (int i = 0; i <= static_cast<int>(Role::kBehaviourTable); ++i) {
    if (text == name_of(static_cast<Role>(i))) return static_cast<Role>(i);
  }
  fail("unknown role '" + text + "'");
}

template <class T>
void set_fact(Fact<T>* fact, const json& j) {
  if (j.is_null()) return;
  const bool wrapped = j.is_object() && (j.contains("value") || j.contains("unknown"));
  if (!wrapped) {
    Source source;
    source.role = Role::kTrainingConfig;
    T value{};
    read(j, &value);
    fact->set(std::move(value), Origin::kStated, std::move(source));
    return;
  }
  if (j.contains("unknown")) return fact->explain_unknown(j.at("unknown").get<std::string>());
  json members = j;
  if (members.contains("shadowed")) {
    for (const json& older : members.at("shadowed")) set_fact(fact, older);
    members.erase("shadowed");
  }
  std::string origin = "stated", role = "training_config";
  Source source;
  T value{};
  Members m(members);
  m("value", &value)("origin", &origin)("role", &role)("file", &source.file)("line", &source.line)("key", &source.key);
  m("tensor", &source.tensor)("cite", &source.cite).done();
  source.role = role_of(role);
  fact->set(std::move(value), origin_of(origin), std::move(source));
}

}  // namespace

FactSheet facts_from_json(const json& facts) {
  FactSheet sheet;
  std::set<std::string> left;
  for (const auto& item : facts.items()) left.insert(item.key());
#define FACT(member, type, name, meaning, supply)                    \
  if (left.erase(name)) {                                            \
    try {                                                            \
      set_fact(&sheet.member, facts.at(name));                       \
    } catch (const std::exception& e) {                              \
      throw std::runtime_error(std::string(name) + ": " + e.what()); \
    }                                                                \
  }
#include "audit/facts/fact_list.inc"
#undef FACT
  if (!left.empty()) throw std::runtime_error("no fact is called '" + *left.begin() + "'");
  return sheet;
}

}  // namespace moeaudit::testing

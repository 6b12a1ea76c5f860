#include "tests/support/facts_from_json.h"

#include <cmath>
#include <functional>
#include <initializer_list>
#include <limits>
#include <set>
#include <stdexcept>
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
void read(const json& j, VersionSet* v) {
  const auto parsed = VersionSet::parse(j.get<std::string>());
  if (!parsed) fail("not a version constraint: " + j.dump());
  *v = *parsed;
}

// Declared ahead: the templates below find them by ordinary lookup only.
void read(const json& j, Routing* v);
void read(const json& j, RouterTable* v);
void read(const json& j, RouterValues* v);
void read(const json& j, TensorDiff* v);
void read(const json& j, PrecisionTable* v);
void read(const json& j, AdapterModules* v);
void read(const json& j, AdapterTargets* v);
void read(const json& j, AdapterTensors* v);
void read(const json& j, LogTable* v);
void read(const json& j, WeightProblem* v);
void read(const json& j, IgnoredKey* v);
void read(const json& j, UnreadKey* v);

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

/// Columns of one table: those that are not given are filled up to the length of those that are.
class Columns {
 public:
  explicit Columns(const json& j) : members_(j) {}
  template <class T>
  Columns& operator()(const char* name, std::vector<T>* v, T blank) {
    members_(name, v);
    if (!v->empty()) {
      if (rows_ > 0 && v->size() != rows_) fail(std::string("column '") + name + "' has another length");
      rows_ = v->size();
    }
    fill_.push_back([v, blank](std::size_t n) {
      if (v->empty()) v->assign(n, blank);
    });
    return *this;
  }
  Members& members() { return members_; }
  void done() {
    for (const auto& fill : fill_) fill(rows_);
    members_.done();
  }

 private:
  Members members_;
  std::size_t rows_ = 0;
  std::vector<std::function<void(std::size_t)>> fill_;
};

constexpr char kNo = 0;
const std::string kBlank;
const double kNan = std::numeric_limits<double>::quiet_NaN();

void read(const json& j, Routing* v) {
  Members m(j);
  m("scoring", &v->scoring)("softmax_after_top_k", &v->softmax_after_top_k)("linear_bias", &v->linear_bias);
  m("correction_bias", &v->correction_bias)("group_score", &v->group_score)("groups", &v->groups)("top_groups",
                                                                                                  &v->top_groups);
  m("group_mask_is_zero", &v->group_mask_is_zero)("renormalise", &v->renormalise)("renormalise_eps",
                                                                                  &v->renormalise_eps);
  m("scaling", &v->scaling)("logits_dtype", &v->logits_dtype)("scores_dtype", &v->scores_dtype);
  m("weight_tensor", &v->weight_tensor)("linear_bias_tensor", &v->linear_bias_tensor);
  m("correction_bias_tensor", &v->correction_bias_tensor)("input_norm_tensor", &v->input_norm_tensor).done();
}

void read(const json& j, RouterTable* v) {
  Columns c(j);
  c("layer", &v->layer, 0)("tensor", &v->tensor, kBlank)("file", &v->file, kBlank)("dtype", &v->dtype, DType::kBF16);
  c("experts", &v->experts, std::int64_t{0})("hidden", &v->hidden, std::int64_t{0});
  c("expert_count", &v->expert_count, std::int64_t{0})("expert_hidden", &v->expert_hidden, std::int64_t{-1});
  c("fused", &v->fused, kNo)("bias", &v->bias, kBlank).done();
}

void read(const json& j, RouterValues* v) {
  Columns c(j);
  c("layer", &v->layer, 0)("tensor", &v->tensor, kBlank)("file", &v->file, kBlank)("is_buffer", &v->is_buffer, kNo);
  c("non_finite", &v->non_finite, std::int64_t{0})("first_index", &v->first_index, std::int64_t{-1});
  c("zero_rows", &v->zero_rows, std::int64_t{0})("first_zero_row", &v->first_zero_row, std::int64_t{-1}).done();
}

void read(const json& j, TensorDiff* v) {
  Members m(j);
  m("missing", &v->missing)("missing_shard", &v->missing_shard)("unexpected", &v->unexpected).done();
  if (v->missing_shard.empty()) v->missing_shard.assign(v->missing.size(), "");
  if (v->missing_shard.size() != v->missing.size()) fail("'missing_shard' has another length than 'missing'");
}

void read(const json& j, PrecisionTable* v) {
  Columns c(j);
  c("layer", &v->layer, 0)("tensor", &v->tensor, kBlank)("mode", &v->mode, kBlank)("tokens", &v->tokens,
                                                                                   std::int64_t{0});
  c("flipped", &v->flipped, 0.0)("low", &v->low, 0.0)("high", &v->high, 0.0)("near_ties", &v->near_ties, 0.0);
  c("weight_error", &v->weight_error, 0.0)("max_abs_logit", &v->max_abs_logit, 0.0)("overflowed", &v->overflowed,
                                                                                    std::int64_t{0});
  c.members()("input", &v->input)("probe", &v->probe);
  c.done();
}

void read(const json& j, AdapterModules* v) {
  Columns c(j);
  c("module", &v->module, kBlank)("part", &v->part, Part::kOther)("layer", &v->layer, -1)("expert", &v->expert, -1);
  c("rank", &v->rank, std::int64_t{0})("in", &v->in, std::int64_t{0})("out", &v->out, std::int64_t{0});
  c("copies", &v->copies, std::int64_t{1})("adapter_parameters", &v->adapter_parameters, std::int64_t{0});
  c("base_parameters", &v->base_parameters, std::int64_t{0})("by_parameter", &v->by_parameter, kNo).done();
}

void read(const json& j, AdapterTargets* v) {
  Columns c(j);
  c("entry", &v->entry, kBlank)("field", &v->field, std::string("target_modules"))("hits", &v->hits, std::int64_t{0});
  c("reaches", &v->reaches, kBlank)("names_experts", &v->names_experts, kNo)("line", &v->line, 0)("certain",
                                                                                                  &v->certain, char{1});
  c("file", &v->file, kBlank)("why", &v->why, kBlank);
  c.done();
}

void read(const json& j, AdapterTensors* v) {
  Columns c(j);
  c("module", &v->module, kBlank)("part", &v->part, Part::kRoutedExpert)("layer", &v->layer, -1)("expert", &v->expert,
                                                                                                 -1);
  c("rank", &v->rank, std::int64_t{0})("norm_a", &v->norm_a, 1.0)("norm_b", &v->norm_b, 0.0)("b_zero", &v->b_zero, kNo);
  c("non_finite", &v->non_finite, std::int64_t{0}).done();
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
  const std::set<std::string> known = {"step",     "loss",          "grad_norm", "eval_loss",
                                       "aux_loss", "learning_rate", "line",      "file"};
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
  if (j.contains("line")) read(j.at("line"), &v->line);
  if (v->line.empty()) v->line.assign(rows, 0);
  if (v->line.size() != rows) fail("column 'line' has another length");
  if (j.contains("file")) read(j.at("file"), &v->file);
}

void read(const json& j, WeightProblem* v) {
  Members m(j);
  m("file", &v->file)("offset", &v->offset)("tensor", &v->tensor)("what", &v->what).done();
}
void read(const json& j, IgnoredKey* v) {
  Members m(j);
  m("file", &v->file)("line", &v->line)("key", &v->key)("framework", &v->framework)("about_moe", &v->about_moe);
  m("instead", &v->instead)("why", &v->why).done();
}
void read(const json& j, UnreadKey* v) {
  Members m(j);
  m("file", &v->file)("line", &v->line)("key", &v->key).done();
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

// Facts of a fixture's config.json, weight files written by a test, and a context to run a measure in.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "audit/families/family.h"
#include "audit/measures/measure.h"
#include "tests/support/facts_from_json.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit::test {

inline nlohmann::json read_json(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file) << path;
  return nlohmann::json::parse(file);
}

/// Layers with experts, by the family's rule, for configs that say nothing unusual.
inline std::vector<std::int64_t> moe_layers_of(const Family& family, const nlohmann::json& config) {
  std::int64_t first = family.moe_layer_rule.from.fallback;
  if (const std::string key(family.moe_layer_rule.from.key); !key.empty()) first = config.value(key, first);
  if (const std::string key(family.moe_layer_rule.every.key); !key.empty()) {
    EXPECT_EQ(config.at(key), 1);
  }
  std::vector<std::int64_t> layers;
  for (std::int64_t l = first; l < config.at(config.contains("num_layers") ? "num_layers" : "num_hidden_layers").get<std::int64_t>(); ++l) layers.push_back(l);
  return layers;
}

/// What the resolver takes from config.json, as far as measures read it; "family" stays unknown for a model type nobody
/// described.
inline nlohmann::json model_facts(const std::string& folder) {
  const nlohmann::json root = read_json(folder + "/config.json");
  const nlohmann::json& config = root.contains("text_config") ? root["text_config"] : root;
  nlohmann::json facts;
  const std::string type = root.at("model_type");
  facts["model.type"] = type;
  const Family* family = find_family_by_model_type(type);
  if (!family) return facts;
  facts["model.family"] = std::string(family->name);
  facts["model.moe_layers"] = moe_layers_of(*family, config);
  for (const FamilyKey& row : family->keys) {
    const std::string fact(row.fact);
    if (fact != "model.num_layers" && fact != "model.hidden_size" && fact != "model.expert_width" && fact != "router.num_experts") continue;
    for (std::string_view key : row.keys) {
      if (!config.contains(key)) continue;
      facts[fact] = config.at(std::string(key));
      break;
    }
  }
  return facts;
}

inline TensorStore open_weights(const std::string& path, const char* stem = "model") {
  std::vector<WeightProblem> problems;
  TensorStore store = TensorStore::open(path, stem, &problems);
  for (const WeightProblem& p : problems) ADD_FAILURE() << p.file << ": " << p.what;
  return store;
}

/// Everything a measure runs on.
struct Bench {
  FactSheet facts;
  TensorStore model, base, adapter, hidden_states;
  std::vector<MeasureRecord> records;
  int threads = 1;

  void run(const Measure& measure) {
    MeasureContext context{facts, model, base, adapter, hidden_states, threads, true, {}, records};
    measure.run(context);
  }
};

/// A safetensors file in the making.
class WeightFile {
 public:
  void add(const std::string& name, const std::string& dtype, const std::vector<std::int64_t>& shape, const std::string& bytes) {
    header_[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {data_.size(), data_.size() + bytes.size()}}};
    data_ += bytes;
  }
  void add_f32(const std::string& name, const std::vector<std::int64_t>& shape, const std::vector<float>& values) {
    add(name, "F32", shape, std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)));
  }
  /// Zeros, where only the header matters.
  void add_zeros(const std::string& name, const std::vector<std::int64_t>& shape, const std::string& dtype = "F32") {
    std::size_t n = dtype == "F32" ? 4 : dtype == "BF16" ? 2 : 1;
    for (std::int64_t d : shape) n *= static_cast<std::size_t>(d);
    add(name, dtype, shape, std::string(n, '\0'));
  }
  /// A tensor of another file, under the same or another name.
  void copy(const TensorView& t, const std::string& name) {
    add(name, std::string(t.dtype_text), {t.shape.begin(), t.shape.end()},
        std::string(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size()));
  }
  std::string text() const {
    const std::string header = header_.dump();
    const std::uint64_t length = header.size();
    std::string out(8, '\0');
    std::memcpy(out.data(), &length, 8);
    return out + header + data_;
  }

 private:
  nlohmann::json header_ = nlohmann::json::object();
  std::string data_;
};

}  // namespace moeaudit::test

// The vectors of `moe-audit selftest`: inputs with the values that the LibTorch reference has for them, in a file that is
// compiled into the binary (fixtures/selftest/vectors.json, written by moe-audit-reference --write-vectors).
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/backend.h"

namespace moeaudit {

using Json = nlohmann::ordered_json;
using Values = std::vector<double>;  // integers of the vectors are small: exact

struct StoredOutput {
  Values values;
  /// What two right computations of a value may differ by: n u / (1 - n u) scale, n the roundings of both together.
  double bound = 0;
};

/// A row of the catalogue of wrong formulas: the part of an output that tells it from the others.
struct CatalogueRow {
  std::string id, formula, output;
  std::size_t first = 0, count = 1;
  std::vector<std::string> published;  // digits computed apart from all of this; may be empty
};

struct StoredVector {
  std::string id, stem, operation, source;
  Json options;
  std::map<std::string, Values> inputs;
  std::map<std::string, std::vector<std::int64_t>> shapes;  // of the inputs
  std::map<std::string, StoredOutput> outputs;
  std::optional<CatalogueRow> row;
};

struct StoredVectors {
  std::string written_by;
  std::vector<StoredVector> vectors;
  Json not_reached;  // rows that no vector can show, and why
};

extern const char kStoredVectors[];  // the file

/// Throws nlohmann::json::exception for a file of another form.
StoredVectors parse_vectors(std::string_view text);

/// True if a device has no form of this operation: a few numbers that the host adds up.
bool host_only(const StoredVector& vector);

/// What the kernels make of the inputs. Throws std::runtime_error where they refuse, with their status.
std::map<std::string, Values> run_vector(const StoredVector& vector, kernels::Backend& backend);

}  // namespace moeaudit

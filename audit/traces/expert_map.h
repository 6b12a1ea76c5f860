// Where the experts of each layer lie: which ranks hold which, once or in copies.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "audit/facts/finding.h"

namespace moeaudit {

struct ExpertMap {
  std::string path;  // empty: contiguous runs, no file
  std::int64_t ranks = 0;
  /// A row a layer, or one for all of them.
  struct Row {
    std::vector<std::int32_t> expert, rank;  // of each slot
    int line = 0;
  };
  std::vector<Row> rows;
};

/// JSON, one of
///   [rank of expert 0, rank of expert 1, ...], or a list of such lists, one a layer; or the same as "expert_to_rank" of an
///     object;
///   {"physical_to_logical_map": [[expert of slot 0, ...], ...]}: of DeepSeek's EPLB, vLLM and SGLang; the slots of a rank
///     lie next to each other, and an expert may have several.
/// `ranks` 0: the largest rank + 1; a physical_to_logical_map does not say, so it needs them. A fatal problem with file,
/// line and remedy, and nullopt, for what is none of these.
std::optional<ExpertMap> read_expert_map(const std::string& path, std::int64_t ranks, std::vector<InputProblem>* problems);

}  // namespace moeaudit

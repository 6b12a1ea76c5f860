// Typed access to the keys of one JSON object of a trace. A key that is absent or null leaves its target alone; one of
// the wrong kind or out of range is a fatal problem with its place.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/finding.h"
#include "audit/text/text.h"

namespace moeaudit {

class Fields {
 public:
  /// `line`: of the object in the file where `map` is one line of it; 0: the lines of the nodes hold.
  Fields(const Node& map, std::string file, int line, std::vector<InputProblem>* problems)
      : map_(map), file_(std::move(file)), line_(line), problems_(problems) {}

  bool ok() const { return ok_; }
  const Node* find(std::string_view key) const;  // nullptr also for a null
  void text(std::string_view key, std::string* out);
  void flag(std::string_view key, std::optional<bool>* out);
  void number(std::string_view key, std::optional<double>* out);
  void integer(std::string_view key, std::optional<std::int64_t>* out, std::int64_t least = 0,
               std::int64_t most = std::numeric_limits<std::int64_t>::max());
  const Node* map(std::string_view key);
  const Node* list(std::string_view key);
  /// Says that `node` (the value of `key`) is not what was expected.
  void refuse(const Node& node, std::string_view key, std::string_view expected);

 private:
  const Node& map_;
  std::string file_;
  int line_;
  std::vector<InputProblem>* problems_;
  bool ok_ = true;
};

/// At most this many problems of one file are listed one by one.
inline constexpr int kMaxTraceProblems = 20;

}  // namespace moeaudit

// The readers behind open_trace(), one a format.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "audit/traces/trace.h"

namespace moeaudit {

std::unique_ptr<Trace> open_moe_audit_trace(const std::string& folder, std::vector<InputProblem>* problems);
std::unique_ptr<Trace> open_megatron_router_trace(const std::string& folder, const TraceOptions& options,
                                                  std::vector<InputProblem>* problems);
std::unique_ptr<Trace> open_megatron_counts(const std::string& folder, const TraceOptions& options,
                                            std::vector<InputProblem>* problems);
std::unique_ptr<Trace> open_routed_experts(const std::string& path, const TraceOptions& options,
                                           std::vector<InputProblem>* problems);
std::unique_ptr<Trace> open_expert_counts(const std::string& path, const TraceOptions& options,
                                          std::vector<InputProblem>* problems);

// ---- what the formats of text share
// ----------------------------------------------------------------------------------

/// The most that is believed of a file: beyond it a number is a fault of the file.
inline constexpr std::int64_t kMaxExperts = 1 << 16, kMaxTraceLayers = 1 << 14, kMaxTokens = std::int64_t{1} << 40;
inline constexpr std::size_t kMaxRecords = 4'000'000;

/// Adds a fatal problem and counts: after kMaxTraceProblems only one that says that there are more.
class ProblemList {
 public:
  ProblemList(std::string file, std::vector<InputProblem>* problems) : file_(std::move(file)), problems_(problems) {}
  void add(int line, int column, std::string what, std::string remedy, bool fatal = true);
  int count() const { return count_; }

 private:
  std::string file_;
  std::vector<InputProblem>* problems_;
  int count_ = 0;
};

/// "0012" -> nullopt; "12" -> 12. Only digits, at most nine of them.
std::optional<std::int64_t> plain_number(std::string_view text);
/// The number in prefix + number + suffix: 3 of "rank3.jsonl".
std::optional<std::int64_t> numbered(std::string_view name, std::string_view prefix, std::string_view suffix);

}  // namespace moeaudit

// What a path is, and which reader it goes to.
#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>

#include "audit/text/text.h"
#include "audit/traces/fields.h"
#include "audit/traces/formats.h"

namespace moeaudit {
namespace {

namespace fs = std::filesystem;

bool is_file(const fs::path& path) {
  std::error_code ec;
  return fs::is_regular_file(path, ec);
}

/// True if the folder has a file of this form: prefix, digits, suffix.
bool holds(const fs::path& folder, std::string_view prefix, std::string_view suffix) {
  std::error_code ec;
  int looked = 0;
  for (fs::directory_iterator it(folder, ec), end; !ec && it != end && looked++ < 100'000; it.increment(ec)) {
    const std::string name = it->path().filename().string();
    if (numbered(name, prefix, suffix) && is_file(it->path())) return true;
  }
  return false;
}

std::string first_bytes(const std::string& path) {
  std::string text(std::size_t{64} << 10, '\0');
  std::ifstream in(path, std::ios::binary);
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(std::max<std::streamsize>(in.gcount(), 0)));
  return text;
}

TraceFormat of_folder(const std::string& path) {
  const fs::path folder(path);
  if (is_file(folder / "trace.json")) return TraceFormat::kTrace;
  if (holds(folder, "router_trace_rank", ".jsonl")) return TraceFormat::kMegatronRouterTrace;
  if (folder.filename() == "tokens_per_expert" && holds(folder, "rank", ".jsonl")) return TraceFormat::kMegatronCounts;
  if (holds(folder / "tokens_per_expert", "rank", ".jsonl")) return TraceFormat::kMegatronCounts;
  return TraceFormat::kNone;
}

/// The model of a trace that does not say it, from the config.json that its user put beside it.
void read_model(const std::string& path, Trace* trace, std::vector<InputProblem>* problems) {
  if (!is_file(path)) return;
  ProblemList list(path, problems);
  constexpr const char* kRemedy = "put the config.json of the traced model there, as transformers writes it, or none";
  std::string text, error;
  if (!read_file(path, &text, &error, std::size_t{64} << 20))
    return list.add(0, 0, error, "make the file readable", false);
  Node root;
  TextError where;
  if (!parse_json(text, &root, nullptr, &where))
    return list.add(where.line, where.column, "JSON error: " + where.what, kRemedy, false);
  const Node* type = root.is_map() ? root.find("model_type") : nullptr;
  if (!type || type->text.empty()) return list.add(1, 1, "has no model_type", kRemedy, false);
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}) {
    const Node* node = root.find(key);
    const auto experts = node ? node->as_int() : std::nullopt;
    const std::optional<std::int64_t> here = trace->facts().experts;
    if (experts && here && *experts != *here)
      return list.add(node->line, node->column,
                      "says " + std::to_string(*experts) + " experts, the trace has " + std::to_string(*here), kRemedy,
                      false);
  }
  trace->take_model(type->text, std::move(root));
}

}  // namespace

std::optional<std::int64_t> numbered(std::string_view name, std::string_view prefix, std::string_view suffix) {
  if (name.size() <= prefix.size() + suffix.size() || !name.starts_with(prefix) || !name.ends_with(suffix))
    return std::nullopt;
  return plain_number(name.substr(prefix.size(), name.size() - prefix.size() - suffix.size()));
}

std::optional<std::int64_t> plain_number(std::string_view text) {
  std::int64_t value = 0;
  if (text.empty() || text.size() > 9 || (text.size() > 1 && text[0] == '0')) return std::nullopt;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

void ProblemList::add(int line, int column, std::string what, std::string remedy, bool fatal) {
  if (++count_ < kMaxTraceProblems) {
    problems_->push_back({file_, line, column, std::move(what), std::move(remedy), fatal});
  } else if (count_ == kMaxTraceProblems) {
    problems_->push_back(
        {file_, line, 0, "more faults than are listed: the rest of the file is not read", std::move(remedy)});
  }
}

TraceFormat recognise_trace(const std::string& path) {
  std::error_code ec;
  const fs::file_status status = fs::status(path, ec);
  if (fs::is_directory(status)) return of_folder(path);
  if (!fs::is_regular_file(status)) return TraceFormat::kNone;
  const fs::path file(path);
  if (file.filename() == "trace.json") {
    return first_bytes(path).find("\"moe-audit-trace\"") != std::string::npos ? TraceFormat::kTrace
                                                                              : TraceFormat::kNone;
  }
  if (numbered(file.filename().string(), "router_trace_rank", ".jsonl")) return TraceFormat::kMegatronRouterTrace;
  if (path.ends_with(".npy") || path.ends_with(".npz")) return TraceFormat::kRoutedExperts;
  if (path.ends_with(".safetensors") && first_bytes(path).find("\"routed_experts\"") != std::string::npos)
    return TraceFormat::kRoutedExperts;
  if (path.ends_with(".json")) {
    const std::string text = first_bytes(path);
    const auto has = [&](const char* key) { return text.find(key) != std::string::npos; };
    if (has("\"num_experts\"") && has("\"layers\"") && has("\"top_k\"")) return TraceFormat::kExpertCounts;
  }
  return TraceFormat::kNone;
}

std::unique_ptr<Trace> open_trace(const std::string& path, const TraceOptions& options,
                                  std::vector<InputProblem>* problems) {
  const fs::path file(path);
  std::error_code ec;
  const std::string folder = fs::is_directory(path, ec) ? path
                             : file.has_parent_path()   ? file.parent_path().string()
                                                        : ".";
  switch (recognise_trace(path)) {
    case TraceFormat::kTrace: return open_moe_audit_trace(folder, problems);
    case TraceFormat::kMegatronRouterTrace: {
      auto trace = open_megatron_router_trace(folder, options, problems);
      if (trace) read_model((fs::path(folder) / "config.json").string(), trace.get(), problems);
      return trace;
    }
    case TraceFormat::kMegatronCounts: return open_megatron_counts(folder, options, problems);
    case TraceFormat::kRoutedExperts: return open_routed_experts(path, options, problems);
    case TraceFormat::kExpertCounts: return open_expert_counts(path, options, problems);
    case TraceFormat::kNone: break;
  }
  problems->push_back(
      {path, 0, 0, "is no trace that moe-audit knows",
       "known are folders with trace.json or router_trace_rank*.jsonl, tokens_per_expert/rank*.jsonl, a "
       "routed-experts array (.npy, .npz or .safetensors), and the JSON of expert counts (docs/trace.md); of a model "
       "health needs "
       "--hidden-states FILE"});
  return nullptr;
}

}  // namespace moeaudit

// Counts alone, without the choices behind them.
//
// Megatron-LM --save-tokens-per-expert-interval (megatron/training/activation_logging.py at d98e8a6): a line of
// tokens_per_expert/rank{r}.jsonl holds, for one layer and iteration, what each micro-batch sent to the experts that
// this rank holds. Counts are taken in front of the experts: after dispatch over the expert-parallel group, after
// drops, and after padding where the experts' GEMM wants it. With E known and fewer experts on a rank, neighbouring
// ranks make up one group (Megatron's default order of ranks with tensor parallel size 1), and one record.
#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <tuple>

#include "audit/traces/fields.h"
#include "audit/traces/formats.h"
#include "audit/traces/line_reader.h"
#include "audit/traces/owned_tensors.h"

namespace moeaudit {
namespace {

namespace fs = std::filesystem;

using Counts = std::map<int, std::vector<std::int64_t>>;  // layer -> [E]

/// Counts are small: some kilobytes a micro-batch. They are read once and kept.
class CountsSource : public Trace::Source {
 public:
  explicit CountsSource(std::vector<std::pair<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Counts>> counts)
      : counts_(std::move(counts)) {}

  void open(const MicroBatchRecord& record, MicroBatch* out, std::vector<WeightProblem>*) const override {
    const auto key = std::tuple(record.step, record.micro_batch, record.rank);
    const auto it =
        std::lower_bound(counts_.begin(), counts_.end(), key, [](const auto& c, const auto& k) { return c.first < k; });
    if (it == counts_.end() || it->first != key) return;
    const auto owner = std::make_shared<OwnedTensors>();
    for (const auto& [layer, counts] : it->second) {
      LayerTensors l;
      l.layer = layer;
      l.experts = static_cast<std::int64_t>(counts.size());
      l.tokens_per_expert =
          owner->own("layer." + std::to_string(layer) + ".tokens_per_expert", DType::kI64, {l.experts}, counts);
      out->layers.push_back(std::move(l));
    }
    out->memory = owner;
  }

 private:
  std::vector<std::pair<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Counts>> counts_;
};

struct Line {
  std::int64_t rank = 0, step = 0, head = -1, layer = 0;
  int line = 0;
  std::vector<std::vector<std::int64_t>> counts;  // [micro-batches][experts of the rank]
};

bool read_line(const Node& root, const std::string& file, int number, Line* out, std::vector<InputProblem>* problems) {
  Fields f(root, file, number, problems);
  std::optional<std::int64_t> step, layer, head;
  std::string block;
  f.integer("iter", &step, 0, kMaxTokens);
  f.integer("layer", &layer, 0, kMaxTraceLayers);
  f.integer("mtp_idx", &head, 0, 999);
  f.text("block", &block);
  const Node* list = f.list("tpe");
  if (!f.ok()) return false;
  if (!step || !layer || !list) {
    problems->push_back({file, number, 1, "has not all of iter, layer and tpe", ""});
    return false;
  }
  for (const Node& micro_batch : list->items) {
    std::vector<std::int64_t> counts;
    for (const Node& n : micro_batch.items) {
      const auto count = n.as_int();
      if (count && *count >= 0 && *count <= kMaxTokens) counts.push_back(*count);
    }
    if (!micro_batch.is_list() || counts.empty() || counts.size() != micro_batch.items.size() ||
        static_cast<std::int64_t>(counts.size()) > kMaxExperts) {
      f.refuse(micro_batch, "tpe", "a list of counts, one list a micro-batch");
      return false;
    }
    out->counts.push_back(std::move(counts));
  }
  out->step = *step;
  out->layer = *layer;
  out->head = block == "mtp" ? head.value_or(0) : -1;
  out->line = number;
  return true;
}

std::vector<Line> read_lines(const std::string& folder, std::vector<InputProblem>* problems) {
  std::vector<std::pair<std::int64_t, std::string>> found;
  std::error_code ec;
  for (fs::directory_iterator it(folder, ec), end; !ec && it != end && found.size() < 100'000; it.increment(ec)) {
    if (const auto rank = numbered(it->path().filename().string(), "rank", ".jsonl"))
      found.emplace_back(*rank, it->path().string());
  }
  std::sort(found.begin(), found.end());
  std::vector<Line> lines;
  std::size_t numbers = 0;
  for (const auto& [rank, path] : found) {
    ProblemList list(path, problems);
    LineReader file;
    std::string why;
    std::string_view text;
    if (!file.open(path, &why)) {
      list.add(0, 0, why, "make the file readable");
      continue;
    }
    while (list.count() < kMaxTraceProblems && file.next(&text)) {
      if (text.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      Node root;
      TextError error;
      Line line;
      std::vector<InputProblem> faults;
      if (!parse_json(text, &root, nullptr, &error)) {
        const bool torn = !file.complete();
        list.add(file.number(), error.column,
                 torn ? "the last line is cut short: the run ended while it was written" : "JSON error: " + error.what,
                 torn ? "nothing: the lines before it are whole" : "repair or delete the line", !torn);
      } else if (read_line(root, path, file.number(), &line, &faults)) {
        line.rank = rank;
        for (const auto& counts : line.counts) numbers += counts.size();
        lines.push_back(std::move(line));
      }
      for (InputProblem& p : faults)
        list.add(p.line, p.column, std::move(p.what), "this is not what --save-tokens-per-expert-interval writes");
      if (numbers <= 50'000'000) continue;
      list.add(file.number(), 0, "more than 50,000,000 counts: the rest is left out", "give fewer iterations");
      return lines;
    }
    if (!file.error().empty()) list.add(file.number(), 0, file.error(), "make the file readable");
  }
  return lines;
}

}  // namespace

std::unique_ptr<Trace> open_megatron_counts(const std::string& path, const TraceOptions& options,
                                            std::vector<InputProblem>* problems) {
  std::error_code ec;
  const fs::path inner = fs::path(path) / "tokens_per_expert";
  const std::string folder = fs::is_directory(inner, ec) ? inner.string() : path;
  const std::vector<Line> lines = read_lines(folder, problems);
  if (lines.empty()) {
    problems->push_back({folder, 0, 0, "its rank*.jsonl hold no line that can be used",
                         "write them with --save-tokens-per-expert-interval"});
    return nullptr;
  }
  std::int64_t local = 0, next_layer = 0;
  std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> heads;
  for (const Line& l : lines) {
    for (const auto& counts : l.counts) local = local == 0 ? static_cast<std::int64_t>(counts.size()) : local;
    if (l.head < 0)
      next_layer = std::max(next_layer, l.layer + 1);
    else
      heads[{l.head, l.layer}] = 0;
  }
  for (auto& [key, layer] : heads) layer = next_layer++;
  if (local == 0) {
    problems->push_back(
        {folder, 0, 0, "no micro-batch is in its lines", "write them with --save-tokens-per-expert-interval"});
    return nullptr;
  }

  TraceFacts facts;
  facts.path = facts.head = folder;
  facts.format = "megatron-tokens-per-expert";
  facts.framework = "megatron-lm";
  const std::int64_t experts = options.experts > 0 ? options.experts : local;
  if (experts % local != 0) {
    problems->push_back(
        {folder, 0, 0,
         "a rank holds " + std::to_string(local) + " experts, which does not divide " + std::to_string(experts),
         "give the number of experts a layer with --experts E"});
    return nullptr;
  }
  const std::int64_t group = experts / local;
  facts.experts = experts;
  if (options.experts == 0) {
    facts.note = "E = " + std::to_string(local) +
                 ", as if each rank held all experts; with expert parallelism say --experts E. ";
  } else if (group > 1) {
    facts.expert_parallel = group;
    facts.note = "ranks " + std::to_string(0) + " to " + std::to_string(group - 1) +
                 ", and so on, are taken for one expert-parallel group. ";
  }

  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Counts> all;
  std::set<int> known_layers;
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t, int>, std::int64_t> parts;
  ProblemList list(folder, problems);
  for (const Line& l : lines) {
    const int layer = static_cast<int>(l.head < 0 ? l.layer : heads[{l.head, l.layer}]);
    TraceLayer known;
    known.layer = layer;
    known.module = l.head < 0 ? "decoder.layers." + std::to_string(l.layer) + ".mlp.router"
                              : "mtp." + std::to_string(l.head) + "." + std::to_string(l.layer);
    known.experts = experts;
    if (known_layers.insert(layer).second) facts.layers.push_back(std::move(known));
    for (std::size_t m = 0; m < l.counts.size(); ++m) {
      if (static_cast<std::int64_t>(l.counts[m].size()) != local) {
        list.add(l.line, 0,
                 "rank " + std::to_string(l.rank) + " has " + std::to_string(l.counts[m].size()) +
                     " experts, others have " + std::to_string(local),
                 "give files of one run");
        continue;
      }
      const auto key = std::tuple(l.step, static_cast<std::int64_t>(m), l.rank / group);
      std::vector<std::int64_t>& counts = all[key][layer];
      counts.resize(static_cast<std::size_t>(experts));
      const auto part = l.rank % group;
      std::copy(l.counts[m].begin(), l.counts[m].end(), counts.begin() + static_cast<std::ptrdiff_t>(part * local));
      ++parts[{std::get<0>(key), std::get<1>(key), std::get<2>(key), layer}];
    }
  }
  std::sort(facts.layers.begin(), facts.layers.end(), [](const auto& a, const auto& b) { return a.layer < b.layer; });
  // A group of which a rank's file is missing would look as if its experts got nothing.
  for (const auto& [key, count] : parts) {
    if (count >= group) continue;
    const auto& [step, micro_batch, rank, layer] = key;
    list.add(0, 0,
             "iteration " + std::to_string(step) + ", layer " + std::to_string(layer) + ": " + std::to_string(count) +
                 " of the " + std::to_string(group) + " ranks of an expert-parallel group are here; left out",
             "give the files of all ranks");
    all[{step, micro_batch, rank}].erase(layer);
  }
  std::vector<MicroBatchRecord> records;
  std::vector<std::pair<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Counts>> sorted;
  for (auto& [key, counts] : all) {
    if (counts.empty()) continue;
    MicroBatchRecord r;
    std::tie(r.step, r.micro_batch, r.rank) = key;
    records.push_back(std::move(r));
    sorted.emplace_back(key, std::move(counts));
  }
  return std::make_unique<Trace>(std::move(facts), std::move(records), std::vector<StepRecord>(),
                                 std::make_unique<CountsSource>(std::move(sorted)), problems);
}

// ---- counts as JSON
// --------------------------------------------------------------------------------------------------

/// {"model", "num_experts", "top_k", "corpus", "layers": {"0": [count of each expert], ...}}: one window, as the OLMoE
/// authors published theirs; "hidden_size" and "expert_parallel_size" may be there.
std::unique_ptr<Trace> open_expert_counts(const std::string& path, const TraceOptions&,
                                          std::vector<InputProblem>* problems) {
  constexpr const char* kRemedy = "docs/trace.md says what a file of expert counts holds";
  std::string text, error;
  Node root;
  TextError where;
  if (!read_file(path, &text, &error, std::size_t{64} << 20)) {
    problems->push_back({path, 0, 0, error, "make the file readable"});
    return nullptr;
  }
  if (!parse_json(text, &root, nullptr, &where)) {
    problems->push_back({path, where.line, where.column, "JSON error: " + where.what, "repair the file at this place"});
    return nullptr;
  }
  TraceFacts facts;
  facts.path = facts.head = path;
  facts.format = "expert-counts";
  Fields f(root, path, 0, problems);
  std::string corpus;
  f.text("model", &facts.model_class);
  f.text("corpus", &corpus);
  f.integer("num_experts", &facts.experts, 1, kMaxExperts);
  f.integer("top_k", &facts.top_k, 1, kMaxExperts);
  f.integer("hidden_size", &facts.hidden_size, 1, kMaxTokens);
  f.integer("expert_parallel_size", &facts.expert_parallel, 1, kMaxExperts);
  const Node* layers = f.map("layers");
  if (!f.ok()) return nullptr;
  if (!layers || layers->items.empty() || !facts.experts || !facts.top_k || *facts.top_k > *facts.experts) {
    problems->push_back(
        {path, root.line, root.column, "has not num_experts, top_k (at most num_experts) and layers", kRemedy});
    return nullptr;
  }
  Counts counts;
  MicroBatchRecord record;
  for (std::size_t i = 0; i < layers->items.size(); ++i) {
    const Node& list = layers->items[i];
    const auto number = plain_number(layers->keys[i]);
    std::vector<std::int64_t> values;
    std::int64_t sum = 0;
    for (const Node& n : list.items) {
      const auto count = n.as_int();
      if (!count || *count < 0 || *count > kMaxTokens) continue;
      values.push_back(*count);
      sum += *count;
    }
    if (!number || *number > kMaxTraceLayers || !list.is_list() || values.size() != list.items.size() ||
        static_cast<std::int64_t>(values.size()) != *facts.experts) {
      problems->push_back({path, list.line, list.column,
                           "layer \"" + layers->keys[i].substr(0, 20) + "\" is no list of " +
                               std::to_string(*facts.experts) + " counts",
                           kRemedy});
      return nullptr;
    }
    TraceLayer layer;
    layer.layer = static_cast<int>(*number);
    layer.experts = *facts.experts;
    layer.top_k = *facts.top_k;
    if (counts.emplace(layer.layer, std::move(values)).second) facts.layers.push_back(std::move(layer));
    record.tokens = std::max(record.tokens, sum / *facts.top_k);
    record.line = list.line;
  }
  std::sort(facts.layers.begin(), facts.layers.end(), [](const auto& a, const auto& b) { return a.layer < b.layer; });
  if (!corpus.empty()) facts.note = "text: " + corpus.substr(0, 80) + ". ";
  std::vector<std::pair<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Counts>> all;
  all.emplace_back(std::tuple(record.step, record.micro_batch, record.rank), std::move(counts));
  return std::make_unique<Trace>(std::move(facts), std::vector<MicroBatchRecord>{record}, std::vector<StepRecord>(),
                                 std::make_unique<CountsSource>(std::move(all)), problems);
}

}  // namespace moeaudit

// Megatron-LM --moe-routing-trace-path (megatron/core/transformer/moe/router_trace.py at d98e8a6): a line of
// router_trace_rank{r}.jsonl is one call of one router; logits_rank{r}.bin and hidden_states_rank{r}.bin hold bfloat16
// behind the offsets that the lines state. router_state_rank{r}.pt is a pickle and is not read.
//
// The n-th call of a layer within a step is taken for micro-batch n. With activation recomputation the hook fires again
// in the backward pass, and the calls are then counted twice: the file does not say which is which.
#include <algorithm>
#include <filesystem>
#include <map>
#include <tuple>

#include "audit/text/json_pull.h"
#include "audit/traces/fields.h"
#include "audit/traces/formats.h"
#include "audit/traces/line_reader.h"
#include "audit/traces/owned_tensors.h"

namespace moeaudit {
namespace {

namespace fs = std::filesystem;

/// Where a tensor lies in a sidecar file; bytes 0: not recorded.
struct Sidecar {
  std::int64_t offset = 0, bytes = 0, rows = 0, columns = 0;
};

/// One line.
struct Call {
  std::int64_t step = -1, layer = -1, rank = -1, tokens = -1, top_k = -1, head = -1;  // head: mtp_idx
  bool prediction = false;                                                            // block "mtp"
  Sidecar logits, hidden;
  std::int64_t largest_id = -1;
  std::int64_t at = 0, length = 0;  // of the line in its file
  int line = 0, file = 0;
  std::int64_t micro_batch = 0;
};

/// Reads a line. `ids`: where top_indices go, row by row; null: they are only checked.
class CallParser {
 public:
  CallParser(std::string_view text, std::vector<std::int32_t>* ids) : pull_(text, 8), ids_(ids) {}

  /// "" or what is wrong.
  std::string parse(Call* call) {
    using Token = JsonPull::Token;
    if (pull_.next() != Token::kObjectBegin) return wrong("no JSON object");
    for (Token t = pull_.next(); t != Token::kObjectEnd; t = pull_.next()) {
      if (t != Token::kKey) return wrong("no JSON object");
      const std::string key(pull_.text());
      if (!value(key, call)) return wrong_.empty() ? wrong("\"" + key + "\" is not what Megatron-LM writes") : wrong_;
    }
    if (pull_.next() != Token::kEnd) return wrong("text behind the object");
    if (call->step < 0 || call->layer < 0 || call->rank < 0 || call->tokens < 0 || call->top_k < 1) {
      return "has not all of step, layer, rank, num_tokens and topk";
    }
    if (rows_ != call->tokens || (call->tokens > 0 && columns_ != call->top_k)) {
      return "top_indices is [" + std::to_string(rows_) + ", " + std::to_string(columns_) + "], not [num_tokens " +
             std::to_string(call->tokens) + ", topk " + std::to_string(call->top_k) + "]";
    }
    call->largest_id = largest_;
    return "";
  }
  int column() const { return pull_.column(); }

 private:
  std::string wrong(std::string what) {
    return pull_.error().what.empty() ? what : "JSON error: " + pull_.error().what;
  }

  bool integer(std::int64_t* out, std::int64_t least, std::int64_t most) {
    return pull_.next() == JsonPull::Token::kNumber && parse_number(out) && *out >= least && *out <= most;
  }
  bool parse_number(std::int64_t* out) {
    const std::string_view text = pull_.text();
    const bool negative = text.starts_with('-');
    const auto n = plain_number(text.substr(negative));
    if (!n && !long_number(text, out)) return false;
    if (n) *out = negative ? -*n : *n;
    return true;
  }
  static bool long_number(std::string_view text, std::int64_t* out) {  // offsets of sidecars go beyond nine digits
    if (text.empty() || text.size() > 18) return false;
    std::int64_t value = 0;
    for (const char c : text) {
      if (c < '0' || c > '9') return false;
      value = value * 10 + (c - '0');
    }
    *out = value;
    return true;
  }

  bool value(const std::string& key, Call* call) {
    constexpr std::int64_t kBytes = std::int64_t{1} << 50;
    if (key == "step") return integer(&call->step, 0, kMaxTokens);
    if (key == "layer") return integer(&call->layer, 0, kMaxTraceLayers);
    if (key == "rank") return integer(&call->rank, 0, 1 << 24);
    if (key == "num_tokens") return integer(&call->tokens, 0, std::int64_t{1} << 31);
    if (key == "topk") return integer(&call->top_k, 1, kMaxExperts);
    if (key == "mtp_idx") return integer(&call->head, 0, 999);
    if (key == "block") {
      if (pull_.next() != JsonPull::Token::kString) return false;
      call->prediction = pull_.text() == "mtp";
      return true;
    }
    if (key == "top_indices") return indices();
    if (key == "logit_offset") return integer(&call->logits.offset, 0, kBytes);
    if (key == "logit_bytes") return integer(&call->logits.bytes, 0, kBytes);
    if (key == "logit_shape") return shape(&call->logits);
    if (key == "hs_offset") return integer(&call->hidden.offset, 0, kBytes);
    if (key == "hs_bytes") return integer(&call->hidden.bytes, 0, kBytes);
    if (key == "hs_shape") return shape(&call->hidden);
    return pull_.skip();
  }

  bool shape(Sidecar* sidecar) {
    using Token = JsonPull::Token;
    if (pull_.next() != Token::kArrayBegin || !integer(&sidecar->rows, 0, std::int64_t{1} << 31) ||
        !integer(&sidecar->columns, 1, std::int64_t{1} << 24)) {
      return false;
    }
    return pull_.next() == Token::kArrayEnd;
  }

  bool indices() {
    using Token = JsonPull::Token;
    if (pull_.next() != Token::kArrayBegin) return false;
    for (Token t = pull_.next(); t != Token::kArrayEnd; t = pull_.next()) {
      if (t != Token::kArrayBegin) return false;
      std::int64_t columns = 0;
      for (Token e = pull_.next(); e != Token::kArrayEnd; e = pull_.next(), ++columns) {
        std::int64_t id = 0;
        if (e != Token::kNumber || !parse_number(&id) || id < -1 || id >= kMaxExperts) {
          wrong_ = wrong("an expert id in top_indices is no integer from -1 to 65535");
          return false;
        }
        largest_ = std::max(largest_, id);
        if (ids_) ids_->push_back(static_cast<std::int32_t>(id));
      }
      if (rows_++ > 0 && columns != columns_) {
        wrong_ = "rows of top_indices differ in length";
        return false;
      }
      columns_ = columns;
    }
    return true;
  }

  JsonPull pull_;
  std::vector<std::int32_t>* ids_;
  std::int64_t rows_ = 0, columns_ = 0, largest_ = -1;
  std::string wrong_;
};

auto group_of(const Call& c) { return std::tuple(c.step, c.micro_batch, c.rank); }

class RouterTraceSource : public Trace::Source {
 public:
  RouterTraceSource(std::string folder, std::vector<std::string> paths, std::vector<std::unique_ptr<LineReader>> files,
                    std::vector<Call> calls, const TraceFacts& facts)
      : folder_(std::move(folder)),
        paths_(std::move(paths)),
        files_(std::move(files)),
        calls_(std::move(calls)),
        facts_(facts) {}

  void open(const MicroBatchRecord& record, MicroBatch* out, std::vector<WeightProblem>* problems) const override {
    const auto key = std::tuple(record.step, record.micro_batch, record.rank);
    auto it = std::lower_bound(calls_.begin(), calls_.end(), key,
                               [](const Call& c, const auto& k) { return group_of(c) < k; });
    const auto owner = std::make_shared<OwnedTensors>();
    std::shared_ptr<MappedFile> logits, hidden;
    for (; it != calls_.end() && group_of(*it) == key; ++it) {
      LayerTensors l;
      l.layer = static_cast<int>(it->layer);
      l.experts = facts_.layer(l.layer)->experts;
      l.top_k = it->top_k;
      const std::string prefix = "layer." + std::to_string(l.layer) + ".";
      if (it->tokens != record.tokens) {
        problems->push_back({paths_[static_cast<std::size_t>(it->file)], it->at, prefix + "selected_experts",
                             "has " + std::to_string(it->tokens) + " tokens, the first layer of this micro-batch " +
                                 std::to_string(record.tokens)});
        continue;
      }
      std::string text;
      std::vector<std::int32_t> ids;
      Call again;
      if (!files_[static_cast<std::size_t>(it->file)]->read_at(it->at, it->length, &text) ||
          !CallParser(text, &ids).parse(&again).empty()) {
        problems->push_back({paths_[static_cast<std::size_t>(it->file)], it->at, prefix + "selected_experts",
                             "line " + std::to_string(it->line) + " cannot be read again: the file was changed"});
        continue;
      }
      l.selected_experts =
          owner->own(prefix + "selected_experts", DType::kI32, {it->tokens, it->top_k}, std::move(ids));
      sidecar(it->logits, it->tokens, l.experts, "logits", prefix + "router_logits", record.rank, &logits, owner.get(),
              &l.router_logits, problems);
      sidecar(it->hidden, it->tokens, facts_.hidden_size.value_or(0), "hidden_states", prefix + "hidden_states",
              record.rank, &hidden, owner.get(), &l.hidden_states, problems);
      out->layers.push_back(std::move(l));
    }
    out->memory = owner;
  }

 private:
  void sidecar(const Sidecar& at, std::int64_t tokens, std::int64_t columns, const char* stem, std::string name,
               std::int64_t rank, std::shared_ptr<MappedFile>* file, OwnedTensors* owner,
               std::optional<TensorView>* out, std::vector<WeightProblem>* problems) const {
    if (at.bytes == 0) return;
    const std::string path =
        (fs::path(folder_) / (std::string(stem) + "_rank" + std::to_string(rank) + ".bin")).string();
    const auto fault = [&](std::string what) { problems->push_back({path, at.offset, name, std::move(what)}); };
    if (!*file) {
      *file = std::make_shared<MappedFile>();
      std::string why;
      if (!(*file)->open(path, &why)) fault(why);
      owner->keep(*file);
    }
    if (!(*file)->data()) return;
    std::int64_t bytes = 0;
    if (at.rows != tokens || (columns > 0 && at.columns != columns) ||
        __builtin_mul_overflow(at.rows * 2, at.columns, &bytes) || bytes != at.bytes) {
      return fault("is stated as [" + std::to_string(at.rows) + ", " + std::to_string(at.columns) + "] bfloat16 in " +
                   std::to_string(at.bytes) + " bytes, for " + std::to_string(tokens) + " tokens and " +
                   std::to_string(columns) + " columns");
    }
    if (at.offset > (*file)->size() || at.bytes > (*file)->size() - at.offset) {
      return fault("ends at byte " + std::to_string(at.offset + at.bytes) + " of a file of " +
                   std::to_string((*file)->size()));
    }
    *out = owner->map(std::move(name), DType::kBF16, {at.rows, at.columns}, **file, at.offset, at.bytes);
  }

  std::string folder_;
  std::vector<std::string> paths_;
  std::vector<std::unique_ptr<LineReader>> files_;
  std::vector<Call> calls_;
  TraceFacts facts_;
};

}  // namespace

std::unique_ptr<Trace> open_megatron_router_trace(const std::string& folder, const TraceOptions& options,
                                                  std::vector<InputProblem>* problems) {
  std::vector<std::pair<std::int64_t, std::string>> found;
  bool state = false;
  std::error_code ec;
  for (fs::directory_iterator it(folder, ec), end; !ec && it != end && found.size() < 100'000; it.increment(ec)) {
    const std::string name = it->path().filename().string();
    if (const auto rank = numbered(name, "router_trace_rank", ".jsonl")) found.emplace_back(*rank, it->path().string());
    state |= numbered(name, "router_state_rank", ".pt").has_value();
  }
  std::sort(found.begin(), found.end());

  std::vector<std::string> paths;
  std::vector<std::unique_ptr<LineReader>> files;
  std::vector<Call> calls;
  for (const auto& [rank, path] : found) {
    ProblemList list(path, problems);
    auto file = std::make_unique<LineReader>();
    std::string why;
    if (!file->open(path, &why)) {
      list.add(0, 0, why, "make the file readable");
      continue;
    }
    std::string_view text;
    std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, std::int64_t> seen;  // (step, head, layer) -> calls
    while (list.count() < kMaxTraceProblems && file->next(&text)) {
      if (text.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      Call call;
      CallParser parser(text, nullptr);
      std::string wrong = parser.parse(&call);
      if (wrong.empty() && call.rank != rank)
        wrong = "is of rank " + std::to_string(call.rank) + ", the file's name says " + std::to_string(rank);
      if (!wrong.empty()) {
        const bool torn = !file->complete();
        list.add(file->number(), parser.column(),
                 torn ? "the last line is cut short: the run ended while it was written" : wrong,
                 torn ? "nothing: the lines before it are whole" : "trace again with --moe-routing-trace-path", !torn);
        continue;
      }
      call.at = file->offset();
      call.length = static_cast<std::int64_t>(text.size());
      call.line = file->number();
      call.file = static_cast<int>(files.size());
      call.micro_batch = seen[{call.step, call.prediction ? call.head : -1, call.layer}]++;
      calls.push_back(call);
      if (calls.size() > kMaxRecords) {
        list.add(call.line, 0, "more than 4,000,000 lines: the rest is left out",
                 "trace fewer steps: --moe-routing-trace-max-training-iters N");
        break;
      }
    }
    if (!file->error().empty()) list.add(file->number(), 0, file->error(), "make the file readable");
    paths.push_back(path);
    files.push_back(std::move(file));
  }
  if (calls.empty()) {
    problems->push_back({folder, 0, 0, "its router_trace_rank*.jsonl hold no line that can be used",
                         "trace with --moe-routing-trace-path, without CUDA graphs (--cuda-graph-impl none)"});
    return nullptr;
  }

  // Prediction heads come behind the decoder's layers, since both count from 0.
  std::int64_t next_layer = 0;
  for (const Call& c : calls) next_layer = std::max(next_layer, c.prediction ? 0 : c.layer + 1);
  std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> heads;  // (head, layer) -> layer
  for (const Call& c : calls) {
    if (c.prediction) heads[{c.head, c.layer}] = 0;
  }
  for (auto& [key, layer] : heads) layer = next_layer++;
  std::map<std::int64_t, TraceLayer> layers;
  std::int64_t largest = -1, logit_columns = 0, hidden_columns = 0;
  for (Call& c : calls) {
    TraceLayer layer;
    layer.module = c.prediction ? "mtp." + std::to_string(c.head) + "." + std::to_string(c.layer)
                                : "decoder.layers." + std::to_string(c.layer) + ".mlp.router";
    if (c.prediction) c.layer = heads[{c.head, c.layer}];
    layer.layer = static_cast<int>(c.layer);
    layer.top_k = c.top_k;
    layer.logits_dtype = c.logits.bytes > 0 ? DType::kBF16 : DType::kUnknown;
    layers.emplace(c.layer, std::move(layer));
    largest = std::max(largest, c.largest_id);
    if (logit_columns == 0) logit_columns = c.logits.columns;
    if (hidden_columns == 0) hidden_columns = c.hidden.columns;
  }

  TraceFacts facts;
  facts.path = facts.head = folder;
  facts.format = "megatron-router-trace";
  facts.framework = "megatron-lm";
  if (hidden_columns > 0) facts.hidden_size = hidden_columns;
  std::int64_t experts = logit_columns > 0 ? logit_columns : options.experts;
  if (experts == 0) {
    experts = largest + 1;
    facts.note = "E = " + std::to_string(experts) + " because the largest expert id is " + std::to_string(largest) +
                 "; --experts E knows better. ";
  }
  facts.experts = experts;
  if (state) facts.note += "router_state_rank*.pt is a pickle and is not read. ";
  for (auto& [number, layer] : layers) {
    layer.experts = experts;
    facts.layers.push_back(std::move(layer));
  }
  facts.top_k = facts.layers.front().top_k;

  std::stable_sort(calls.begin(), calls.end(), [](const Call& a, const Call& b) {
    return std::tuple(a.step, a.micro_batch, a.rank, a.layer) < std::tuple(b.step, b.micro_batch, b.rank, b.layer);
  });
  std::vector<MicroBatchRecord> records;
  for (const Call& c : calls) {
    const bool fresh = records.empty() ||
                       std::tuple(records.back().step, records.back().micro_batch, records.back().rank) != group_of(c);
    if (fresh) {
      MicroBatchRecord r;
      r.step = c.step;
      r.micro_batch = c.micro_batch;
      r.rank = c.rank;
      r.tokens = c.tokens;
      r.line = c.line;
      r.file = fs::path(paths[static_cast<std::size_t>(c.file)]).filename().string();
      records.push_back(std::move(r));
    }
  }
  auto source =
      std::make_unique<RouterTraceSource>(folder, std::move(paths), std::move(files), std::move(calls), facts);
  return std::make_unique<Trace>(std::move(facts), std::move(records), std::vector<StepRecord>(), std::move(source),
                                 problems);
}

}  // namespace moeaudit

// Arrays of the experts that an inference engine chose: vLLM --enable-return-routed-experts and SGLang give
// [tokens, layers, k] (int16, int32 or uint8) for a response, which people save with numpy.save. The array is cut into
// blocks of tokens, each a record, so that memory is bounded and the blocks can be compared.
#include <algorithm>
#include <array>
#include <bit>
#include <filesystem>

#include "audit/tensors/guarded_read.h"
#include "audit/traces/fields.h"
#include "audit/traces/formats.h"
#include "audit/traces/npy.h"
#include "audit/traces/owned_tensors.h"

namespace moeaudit {
namespace {

constexpr std::int64_t kMaxBlockBytes = std::int64_t{64} << 20;

class ArraySource : public Trace::Source {
 public:
  ArraySource(std::string path, std::shared_ptr<const MappedFile> file, const NpyHeader& header, bool layers_first,
              std::int64_t block, const TraceFacts& facts)
      : path_(std::move(path)),
        file_(std::move(file)),
        header_(header),
        layers_first_(layers_first),
        block_(block),
        facts_(facts) {}

  void open(const MicroBatchRecord& record, MicroBatch* out, std::vector<WeightProblem>* problems) const override {
    const std::int64_t k = header_.shape[2], layers = header_.shape[layers_first_ ? 0 : 1];
    const std::int64_t all = header_.shape[layers_first_ ? 1 : 0], first = record.micro_batch * block_;
    const std::int64_t layer_step = layers_first_ ? all * k : k, token_step = layers_first_ ? k : layers * k;
    TensorView whole;
    whole.dtype = header_.dtype;
    whole.bytes = {file_->data() + header_.data, static_cast<std::size_t>(header_.bytes)};
    const auto owner = std::make_shared<OwnedTensors>();
    const ReadGuard guard;  // one for all of the reads below
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      std::vector<std::int32_t> ids(static_cast<std::size_t>(record.tokens * k));
      bool ok = true;
      for (std::int64_t t = 0; ok && t < record.tokens; ++t) {
        ok = read_ids(whole, layer * layer_step + (first + t) * token_step, k, ids.data() + t * k);
      }
      if (!ok) {
        problems->push_back({path_, header_.data, "", "could not be read: the file became shorter or the disk failed"});
        return;
      }
      LayerTensors l;
      l.layer = static_cast<int>(layer);
      l.experts = *facts_.experts;
      l.top_k = k;
      l.selected_experts = owner->own("layer." + std::to_string(layer) + ".selected_experts", DType::kI32,
                                      {record.tokens, k}, std::move(ids));
      out->layers.push_back(std::move(l));
    }
    out->memory = owner;
  }

 private:
  std::string path_;
  std::shared_ptr<const MappedFile> file_;
  NpyHeader header_;
  bool layers_first_;
  std::int64_t block_;
  TraceFacts facts_;
};

}  // namespace

std::unique_ptr<Trace> open_routed_experts(const std::string& path, const TraceOptions& options,
                                           std::vector<InputProblem>* problems) {
  constexpr const char* kRemedy = "save the array [tokens, layers, k] of expert ids with numpy.save, in C order";
  const auto refuse = [&](std::string what) {
    problems->push_back({path, 0, 0, std::move(what), kRemedy});
    return nullptr;
  };
  const auto file = std::make_shared<MappedFile>();
  std::string why;
  if (!file->open(path, &why)) return refuse(why);
  NpyHeader header;
  std::array<char, kMaxNpyHeader> start;
  const std::size_t length = static_cast<std::size_t>(std::min<std::int64_t>(file->size(), kMaxNpyHeader));
  const ReadGuard guard;
  if (length > 0 && !guard.guarded([&] { std::memcpy(start.data(), file->data(), length); }))
    return refuse("could not be read");
  if (!parse_npy_header({start.data(), length}, file->size(), &header, &why)) return refuse(why);
  if (header.shape.size() == 4 && !options.layers_first) {  // [sequences, tokens of each, layers, k]: verl
    header.shape[1] *= header.shape[0];  // in bounds: the product of all is the size of the file
    header.shape.erase(header.shape.begin());
  }
  if (header.shape.size() != 3)
    return refuse("is an array of " + std::to_string(header.shape.size()) + " dimensions, not 3");
  const std::int64_t tokens = header.shape[options.layers_first ? 1 : 0],
                     layers = header.shape[options.layers_first ? 0 : 1];
  const std::int64_t k = header.shape[2];
  if (tokens == 0 || layers == 0 || k == 0) return refuse("holds no expert id");
  if (layers > kMaxTraceLayers || k > kMaxExperts) {
    return refuse("would be " + std::to_string(layers) + " layers of " + std::to_string(k) +
                  " choices; is it [layers, tokens, k]? Say --layers-first");
  }
  TraceFacts facts;
  facts.path = facts.head = path;
  facts.format = "routed-experts";
  facts.top_k = k;
  facts.experts = options.experts;
  if (options.experts == 0) {
    TensorView whole;
    whole.dtype = header.dtype;
    whole.bytes = {file->data() + header.data, static_cast<std::size_t>(header.bytes)};
    std::vector<std::int32_t> ids(1 << 16);
    std::int32_t largest = 0;
    const std::int64_t count = tokens * layers * k;
    for (std::int64_t first = 0; first < count; first += static_cast<std::int64_t>(ids.size())) {
      const std::int64_t n = std::min(count - first, static_cast<std::int64_t>(ids.size()));
      if (!read_ids(whole, first, n, ids.data())) return refuse("could not be read");
      largest = std::max(largest, *std::max_element(ids.begin(), ids.begin() + n));
    }
    if (largest >= kMaxExperts) return refuse("holds " + std::to_string(largest) + ", which is no expert id");
    facts.experts = largest + 1;
    facts.note = "E = " + std::to_string(largest + 1) + " because the largest expert id is " + std::to_string(largest) +
                 "; --experts E knows better. ";
  }
  if (k > *facts.experts)
    return refuse("has " + std::to_string(k) + " choices a token of " + std::to_string(*facts.experts) + " experts");
  facts.note +=
      std::to_string(tokens) + " tokens, " + std::to_string(layers) + " layers, " + std::to_string(k) + " choices";
  facts.note += options.layers_first ? " (--layers-first). " : ", read as [tokens, layers, k]. ";
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    TraceLayer l;
    l.layer = static_cast<int>(layer);
    l.experts = *facts.experts;
    l.top_k = k;
    facts.layers.push_back(std::move(l));
  }
  const std::int64_t block = std::clamp<std::int64_t>(kMaxBlockBytes / (layers * k * 4), 1, 1024);
  std::vector<MicroBatchRecord> records;
  for (std::int64_t first = 0; first < tokens; first += block) {
    if (records.size() >= kMaxRecords) return refuse("has more tokens than are read");
    MicroBatchRecord r;
    r.micro_batch = first / block;
    r.tokens = std::min(block, tokens - first);
    records.push_back(std::move(r));
  }
  auto source = std::make_unique<ArraySource>(path, file, header, options.layers_first, block, facts);
  return std::make_unique<Trace>(std::move(facts), std::move(records), std::vector<StepRecord>(), std::move(source),
                                 problems);
}

}  // namespace moeaudit

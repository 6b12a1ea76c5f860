// Arrays of the experts that an inference engine chose: vLLM --enable-return-routed-experts and SGLang give
// [tokens, layers, k] (int16, int32 or uint8) for a response; verl carries [batch, tokens, layers, k] beside an
// attention_mask [batch, tokens]. Saved by numpy.save, by numpy.savez or as safetensors. The array is cut into blocks of
// tokens, each a record, so that memory is bounded and the blocks can be compared.
#include <algorithm>
#include <array>
#include <bit>
#include <filesystem>

#include "audit/tensors/guarded_read.h"
#include "audit/tensors/zip.h"
#include "audit/text/text.h"
#include "audit/traces/fields.h"
#include "audit/traces/formats.h"
#include "audit/traces/npy.h"
#include "audit/traces/owned_tensors.h"

namespace moeaudit {
namespace {

constexpr std::int64_t kMaxBlockBytes = std::int64_t{64} << 20;
constexpr std::string_view kIds = "routed_experts", kMask = "attention_mask";

/// Numbers somewhere in memory or in a mapped file, with their shape.
struct Array {
  DType dtype = DType::kUnknown;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;

  TensorView view() const {
    TensorView v;
    v.dtype = dtype;
    v.shape = shape;
    v.bytes = bytes;
    return v;
  }
};

struct Arrays {
  Array ids;
  std::optional<Array> mask;
  std::shared_ptr<const void> memory;
};

bool is_integer(DType d) {
  return d == DType::kU8 || d == DType::kI8 || d == DType::kU16 || d == DType::kI16 || d == DType::kU32 ||
         d == DType::kI32 || d == DType::kU64 || d == DType::kI64 || d == DType::kBool;
}

/// From the bytes of a .npy file that are all there.
bool npy_array(std::string_view file, std::string_view start, Array* out, std::string* why) {
  NpyHeader header;
  if (!parse_npy_header(start, static_cast<std::int64_t>(file.size()), &header, why)) return false;
  out->dtype = header.dtype;
  out->shape = std::move(header.shape);
  out->bytes = std::as_bytes(std::span(file)).subspan(static_cast<std::size_t>(header.data), static_cast<std::size_t>(header.bytes));
  return true;
}

bool read_npy(const std::string& path, Arrays* out, std::string* why) {
  const auto file = std::make_shared<MappedFile>();
  if (!file->open(path, why)) return false;
  std::array<char, kMaxNpyHeader> start;
  const std::size_t length = static_cast<std::size_t>(std::min<std::int64_t>(file->size(), kMaxNpyHeader));
  const ReadGuard guard;
  if (length > 0 && !guard.guarded([&] { std::memcpy(start.data(), file->data(), length); })) {
    *why = "could not be read";
    return false;
  }
  out->memory = file;
  return npy_array({reinterpret_cast<const char*>(file->data()), static_cast<std::size_t>(file->size())},
                   {start.data(), length}, &out->ids, why);
}

/// numpy.savez: a zip of .npy files. It is read as a whole, so it may not be large; a .npy may.
bool read_npz(const std::string& path, Arrays* out, std::string* why) {
  const auto text = std::make_shared<std::string>();
  if (!read_file(path, text.get(), why)) return false;
  out->memory = text;
  const auto array = [&](std::string name, Array* into) {
    std::string_view entry;
    return find_zip_entry(*text, name + ".npy", &entry, why) && npy_array(entry, entry.substr(0, kMaxNpyHeader), into, why);
  };
  Array mask;
  std::string none;
  std::string_view entry;
  if (find_zip_entry(*text, std::string(kMask) + ".npy", &entry, &none)) {
    if (!array(std::string(kMask), &mask)) return false;
    out->mask = std::move(mask);
  }
  if (array(std::string(kIds), &out->ids)) return true;
  none = *why;
  if (array("arr_0", &out->ids)) return true;  // numpy.savez(file, array)
  *why = none;
  return false;
}

bool read_safetensors(const std::string& path, Arrays* out, std::string* why) {
  std::vector<WeightProblem> problems;
  const auto store = std::make_shared<TensorStore>(TensorStore::open(path, "", &problems));
  const TensorView* ids = store->find(kIds);
  if (!ids) {
    *why = problems.empty() ? "holds no tensor " + std::string(kIds) : problems.front().what;
    return false;
  }
  const auto copy = [&](const TensorView& v, Array* into) {
    if (!is_integer(v.dtype)) {
      *why = std::string(v.name) + " is of " + std::string(v.dtype_text) + ", not of integers";
      return false;
    }
    into->dtype = v.dtype;
    into->shape.assign(v.shape.begin(), v.shape.end());
    into->bytes = v.bytes;
    return true;
  };
  out->memory = store;
  if (!copy(*ids, &out->ids)) return false;
  if (const TensorView* mask = store->find(kMask)) {
    out->mask.emplace();
    if (!copy(*mask, &*out->mask)) return false;
  }
  return true;
}

struct Layout {
  std::int64_t tokens = 0, layers = 0, k = 0;
  std::int64_t sequences = 0;  // of [batch, tokens, layers, k]; 0: one list of tokens
  bool layers_first = false;
};

class ArraySource : public Trace::Source {
 public:
  ArraySource(std::string path, Arrays arrays, Layout layout, std::int64_t block, std::int64_t experts)
      : path_(std::move(path)), arrays_(std::move(arrays)), layout_(layout), block_(block), experts_(experts) {}

  void open(const MicroBatchRecord& record, MicroBatch* out, std::vector<WeightProblem>* problems) const override {
    const std::int64_t k = layout_.k, layers = layout_.layers, first = record.micro_batch * block_;
    const std::int64_t layer_step = layout_.layers_first ? layout_.tokens * k : k,
                       token_step = layout_.layers_first ? k : layers * k;
    const TensorView whole = arrays_.ids.view();
    const auto owner = std::make_shared<OwnedTensors>();
    const ReadGuard guard;  // one for all of the reads below
    const auto torn = [&] {
      problems->push_back({path_, -1, "", "could not be read: the file became shorter or the disk failed"});
    };
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      std::vector<std::int32_t> ids(static_cast<std::size_t>(record.tokens * k));
      for (std::int64_t t = 0; t < record.tokens; ++t) {
        if (!read_ids(whole, layer * layer_step + (first + t) * token_step, k, ids.data() + t * k)) return torn();
      }
      LayerTensors l;
      l.layer = static_cast<int>(layer);
      l.experts = experts_;
      l.top_k = k;
      l.selected_experts = owner->own("layer." + std::to_string(layer) + ".selected_experts", DType::kI32,
                                      {record.tokens, k}, std::move(ids));
      out->layers.push_back(std::move(l));
    }
    if (arrays_.mask) {
      std::vector<std::uint8_t> mask(static_cast<std::size_t>(record.tokens));
      if (!read_flags(arrays_.mask->view(), first, record.tokens, mask.data())) return torn();
      out->token_mask = owner->own("token_mask", DType::kU8, {record.tokens}, std::move(mask));
    }
    out->memory = owner;
  }

 private:
  std::string path_;
  Arrays arrays_;
  Layout layout_;
  std::int64_t block_, experts_;
};

}  // namespace

std::unique_ptr<Trace> open_routed_experts(const std::string& path, const TraceOptions& options,
                                           std::vector<InputProblem>* problems) {
  const auto refuse = [&](std::string what) {
    problems->push_back({path, 0, 0, std::move(what),
                         "save expert ids [tokens, layers, k], in C order, with numpy.save, or as routed_experts with "
                         "numpy.savez or safetensors"});
    return nullptr;
  };
  Arrays arrays;
  std::string why;
  const bool read = path.ends_with(".npz")           ? read_npz(path, &arrays, &why)
                    : path.ends_with(".safetensors") ? read_safetensors(path, &arrays, &why)
                                                     : read_npy(path, &arrays, &why);
  if (!read) return refuse(why);
  const std::vector<std::int64_t>& shape = arrays.ids.shape;
  if (shape.size() != 3 && shape.size() != 4)
    return refuse("is an array of " + std::to_string(shape.size()) + " dimensions, not 3 or 4");
  if (shape.size() == 4 && options.layers_first) return refuse("has 4 dimensions, and --layers-first is about 3");
  Layout layout;
  layout.layers_first = options.layers_first;
  layout.tokens = shape[options.layers_first ? 1 : 0];
  layout.layers = shape[options.layers_first ? 0 : shape.size() - 2];
  layout.k = shape.back();
  if (shape.size() == 4) layout.sequences = shape[0], layout.tokens = shape[0] * shape[1];
  const auto [tokens, layers, k] = std::tuple(layout.tokens, layout.layers, layout.k);
  if (tokens == 0 || layers == 0 || k == 0) return refuse("holds no expert id");
  if (layers > kMaxTraceLayers || k > kMaxExperts) {
    return refuse("would be " + std::to_string(layers) + " layers of " + std::to_string(k) +
                  " choices; is it [layers, tokens, k]? Say --layers-first");
  }
  if (arrays.mask) {
    const auto& rows = arrays.mask->shape;
    const bool fits = layout.sequences > 0 ? rows == std::vector{shape[0], shape[1]} : rows == std::vector{tokens};
    if (!fits) return refuse("has an attention_mask of another shape than the tokens of routed_experts");
  }
  TraceFacts facts;
  facts.path = facts.head = path;
  facts.format = "routed-experts";
  facts.top_k = k;
  facts.experts = options.experts;
  if (options.experts == 0) {
    std::vector<std::int32_t> ids(1 << 16);
    std::int32_t largest = 0;
    const std::int64_t count = tokens * layers * k;
    const TensorView whole = arrays.ids.view();
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
  facts.note += std::to_string(tokens) + " tokens" +
                (layout.sequences > 0 ? " of " + std::to_string(layout.sequences) + " sequences" : "") + ", " +
                std::to_string(layers) + " layers, " + std::to_string(k) + " choices";
  facts.note += options.layers_first ? " (--layers-first). " : layout.sequences > 0 ? "" : ", read as [tokens, layers, k]. ";
  if (layout.sequences > 0)
    facts.note += arrays.mask ? ", padding by attention_mask. " : "; without an attention_mask padding counts as tokens. ";
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    TraceLayer l;
    l.layer = static_cast<int>(layer);
    l.experts = *facts.experts;
    l.top_k = k;
    facts.layers.push_back(std::move(l));
  }
  // A record is a block of tokens; of sequences, where there are some and one fits.
  const std::int64_t most = std::max<std::int64_t>(kMaxBlockBytes / (layers * k * 4), 1);
  const bool by_sequence = layout.sequences > 0 && shape[1] <= most;
  const std::int64_t block =
      by_sequence ? shape[1] * std::clamp<std::int64_t>(std::min<std::int64_t>(most, 4096) / shape[1], 1, layout.sequences)
                  : std::min<std::int64_t>(most, 1024);
  std::vector<MicroBatchRecord> records;
  for (std::int64_t first = 0; first < tokens; first += block) {
    if (records.size() >= kMaxRecords) return refuse("has more tokens than are read");
    MicroBatchRecord r;
    r.micro_batch = first / block;
    r.tokens = std::min(block, tokens - first);
    if (by_sequence) r.sequences = r.tokens / shape[1], r.sequence_length = shape[1];
    records.push_back(std::move(r));
  }
  const std::int64_t experts = *facts.experts;
  auto source = std::make_unique<ArraySource>(path, std::move(arrays), layout, block, experts);
  return std::make_unique<Trace>(std::move(facts), std::move(records), std::vector<StepRecord>(), std::move(source),
                                 problems);
}

}  // namespace moeaudit

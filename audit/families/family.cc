// Look-ups over the table of families, expansion of their tensor patterns, and naming of parts by tensor or module
// name.
#include "audit/families/family.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>

namespace moeaudit {
namespace {

using Names = std::vector<std::string_view>;

bool equal_ignoring_case(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](unsigned char x, unsigned char y) { return std::tolower(x) == std::tolower(y); });
}

template <class Range>
bool contains(const Range& range, std::string_view word) {
  return std::find(std::begin(range), std::end(range), word) != std::end(range);
}

/// Digits only, and small enough to be a layer or an expert.
int as_index(std::string_view text) {
  int value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value >= 0 ? value : -1;
}

Names split(std::string_view text, char separator) {
  Names out;
  for (std::size_t from = 0;;) {
    const std::size_t to = text.find(separator, from);
    out.push_back(text.substr(from, to - from));
    if (to == std::string_view::npos) return out;
    from = to + 1;
  }
}

// ---- expand --------------------------------------------------------------------------------------------------------

std::int64_t symbol_value(char symbol, const FamilyShape& s) {
  switch (symbol) {
    case 'E': return s.experts;
    case 'H': return s.hidden;
    case 'I': return s.expert_width;
    case 'S': return s.shared_width;
    case 'V': return s.vocabulary;
    case 'X': return s.extra_rows;
    case 'Z': return s.expert_input > 0 ? s.expert_input : s.hidden;
  }
  return 0;
}

/// "2*I" -> 2 * expert_width, "E+X" -> experts + extra_rows; -1 where a symbol is unknown.
std::int64_t dimension(std::string_view text, const FamilyShape& shape) {
  std::int64_t sum = 0;
  for (std::string_view term : split(text, '+')) {
    std::int64_t product = 1;
    for (std::string_view factor : split(term, '*')) {
      const int number = as_index(factor);
      const std::int64_t value = number >= 0 ? number : factor.empty() ? 0 : symbol_value(factor[0], shape);
      // Numbers come from a config.json: a product that overflows is as unknown as a missing one.
      if (value <= 0 || __builtin_mul_overflow(product, value, &product)) return -1;
    }
    if (__builtin_add_overflow(sum, product, &sum)) return -1;
  }
  return sum;
}

std::vector<std::int64_t> dimensions(std::string_view text, const FamilyShape& shape) {
  std::vector<std::int64_t> out;
  if (text.empty()) return out;
  for (std::string_view d : split(text, ',')) out.push_back(dimension(d, shape));
  return out;
}

std::string replaced(std::string_view pattern, const FamilyShape& shape, std::int64_t layer, std::int64_t expert) {
  std::string out;
  out.reserve(pattern.size() + 8);
  for (std::size_t i = 0; i < pattern.size();) {
    if (pattern.substr(i, 3) == "{L}")
      out += std::to_string(layer), i += 3;
    else if (pattern.substr(i, 3) == "{D}")
      out += std::to_string(layer - shape.encoder_layers), i += 3;
    else if (pattern.substr(i, 3) == "{e}" || pattern.substr(i, 3) == "{v}")
      out += std::to_string(expert), i += 3;
    else
      out += pattern[i++];
  }
  return out;
}

std::vector<std::int64_t> layers_of(const FamilyTensor& tensor, const FamilyShape& shape) {
  std::vector<std::int64_t> out;
  if (tensor.layers == FamilyTensor::Layers::kNone) return {-1};
  const bool decoder = tensor.name.find("{D}") != std::string_view::npos;
  const std::int64_t first = decoder ? shape.encoder_layers : 0;
  const std::int64_t end = decoder || shape.encoder_layers == 0 ? shape.layers : shape.encoder_layers;
  if (tensor.layers == FamilyTensor::Layers::kMoe) {
    for (std::int64_t l : shape.moe_layers) {
      if (l >= first && l < end) out.push_back(l);
    }
    return out;
  }
  for (std::int64_t l = first; l < end; ++l) {
    const bool moe = std::find(shape.moe_layers.begin(), shape.moe_layers.end(), l) != shape.moe_layers.end();
    if (tensor.layers == FamilyTensor::Layers::kAll || !moe) out.push_back(l);
  }
  return out;
}

// ---- classify ------------------------------------------------------------------------------------------------------

// Wrappers that PEFT, FSDP, DDP and torch.compile put into a path without changing what it names.
constexpr std::array<std::string_view, 6> kWrappers = {
    "_orig_mod",  "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
    "base_layer", "original_module",      "parametrizations"};
constexpr std::array<std::string_view, 9> kTensorSuffixes = {"weight",       "bias",        "weight_scale_inv",
                                                             "weight_scale", "input_scale", "original",
                                                             "original0",    "original1",   "default"};
// Steps in front of a name that say nothing of its part.
constexpr std::array<std::string_view, 7> kRoots = {"module", "base_model", "model", "language_model", "transformer", "thinker", "llm"};
constexpr std::array<std::string_view, 5> kLayerLists = {"layers", "layer", "h", "blocks", "block"};
constexpr std::array<std::string_view, 14> kOtherTowers = {"visual",      "audio",        "vision_tower",          "vision_model", "vision_encoder",
                                                           "audio_tower", "audio_model",  "multi_modal_projector", "talker",       "code2wav",
                                                           "sam_model",   "qwen2_model", "resampler_model", "mm_projector"};
constexpr std::array<std::string_view, 6> kRouters = {"gate", "router", "router_gate", "gating", "moe_gate", "wg"};
constexpr std::array<std::string_view, 9> kAttentions = {"self_attn",      "attn",        "attention",
                                                         "self_attention", "linear_attn", "cross_attn",
                                                         "SelfAttention",  "EncDecAttention", "cross_attention"};
constexpr std::array<std::string_view, 11> kAttentionLeaves = {
    "q_proj",    "k_proj", "v_proj", "o_proj", "qkv_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa",
    "kv_b_proj", "Wqkv",   "sinks"};
constexpr std::array<std::string_view, 9> kEmbeddings = {"embed_tokens", "embed_tokens_per_layer", "embed", "wte",            "wpe",
                                                         "word_embeddings", "tok_embeddings", "shared", "embeddings"};
constexpr std::array<std::string_view, 5> kHeads = {"lm_head", "head", "embed_out", "score", "unembed"};
constexpr std::array<std::string_view, 7> kMlps = {"mlp", "mlps", "feed_forward", "ffn", "block_sparse_moe", "moe", "mixer"};
constexpr std::array<std::string_view, 16> kMlpLeaves = {
    "gate_proj", "linear_gate", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "fc1", "fc2", "c_fc", "c_proj", "wi", "wo",
    "w13_dn", "w2_md"};
constexpr std::array<std::string_view, 4> kStackLeaves = {"input_linear", "output_linear",  // GraniteMoE, JetMoE
                                                            "down_embed", "up_embed"};        // Doge

bool starts_with(std::string_view text, std::string_view prefix) { return text.substr(0, prefix.size()) == prefix; }

/// A method's own tensors inside a module: lora_A, lora_embedding_B, ia3_l, hada_w1_a, oft_R, ...
bool is_adapter_tensor(std::string_view part) {
  for (std::string_view prefix : {"lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_", "adalora_"}) {
    if (starts_with(part, prefix)) return true;
  }
  return false;
}

/// A name without wrappers, adapter and tensor suffixes, cut into the part behind "layers.N." and the indices.
struct Path {
  Names tail;
  int layer = -1;
  bool decoder = false;  // below a module called decoder
  bool other_tower = false;
};

Path parse(std::string_view name) {
  Names parts;
  for (std::string_view part : split(name, '.')) {
    if (is_adapter_tensor(part) || part == "modules_to_save") break;
    if (!part.empty() && !contains(kWrappers, part)) parts.push_back(part);
  }
  while (parts.size() > 1 && contains(kTensorSuffixes, parts.back())) parts.pop_back();
  Path path;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    path.other_tower |= contains(kOtherTowers, parts[i]);
    path.decoder |= path.layer < 0 && parts[i] == "decoder";
    if (path.layer < 0 && i + 1 < parts.size() && contains(kLayerLists, parts[i]) && as_index(parts[i + 1]) >= 0) {
      path.layer = as_index(parts[i + 1]);
      begin = i + 2;
    }
  }
  if (path.layer < 0) {
    while (begin + 1 < parts.size() && contains(kRoots, parts[begin])) ++begin;
  }
  path.tail.assign(parts.begin() + static_cast<std::ptrdiff_t>(begin), parts.end());
  return path;
}

/// The pattern's parts behind "{L}.", without the tensor suffix.
Names pattern_tail(std::string_view pattern) {
  const std::size_t layer = std::min(pattern.find("{L}."), pattern.find("{D}."));
  Names tail = split(layer == std::string_view::npos ? pattern : pattern.substr(layer + 4), '.');
  while (layer == std::string_view::npos && tail.size() > 1 && contains(kRoots, tail[0])) tail.erase(tail.begin());
  if (tail.size() > 1 && contains(kTensorSuffixes, tail.back())) tail.pop_back();
  return tail;
}

constexpr int kNoMatch = -2;

/// The number at the placeholder with which a segment of a pattern ends ("{e}", "expert_{e}"); -1 if it has none.
int match_segment(std::string_view pattern, std::string_view segment) {
  const std::size_t at = pattern.find('{');
  if (at == std::string_view::npos) return pattern == segment ? -1 : kNoMatch;
  const int index = starts_with(segment, pattern.substr(0, at)) ? as_index(segment.substr(at)) : -1;
  return index >= 0 ? index : kNoMatch;
}

bool matches_at(const Names& tail, const Names& pattern, std::size_t at) {
  if (at + tail.size() > pattern.size()) return false;
  for (std::size_t i = 0; i < tail.size(); ++i) {
    if (match_segment(pattern[at + i], tail[i]) == kNoMatch) return false;
  }
  return true;
}

/// The part that all patterns of the family agree on which `path` names or contains; nullopt if none or several.
std::optional<Part> part_by_family(const Family& family, const Path& path) {
  std::optional<Part> found;
  bool ambiguous = false;
  for (const FamilyTensor& tensor : family.tensors) {
    const Names pattern = pattern_tail(tensor.name);
    const bool layered = tensor.layers != FamilyTensor::Layers::kNone;
    if (path.layer >= 0 && !layered) continue;
    // A path with its layer starts where the pattern does; a bare name ("mlp.gate", "w1") may sit anywhere in it.
    const std::size_t last = path.layer >= 0 ? 0 : pattern.size();
    for (std::size_t at = 0; at <= last; ++at) {
      if (!matches_at(path.tail, pattern, at)) continue;
      if (at == 0 && path.tail.size() == pattern.size()) return tensor.part;
      ambiguous |= found && *found != tensor.part;
      found = tensor.part;
    }
  }
  return ambiguous ? std::nullopt : found;
}

/// "block_sparse_moe.input_linear", and "moe.gate_proj" of step3p5: the matrices of all experts where a module of experts has none.
bool is_stack(const Names& tail) {
  if (tail.size() == 2 && tail.front() == "moe" && contains(kMlpLeaves, tail.back())) return true;
  return !tail.empty() && contains(kStackLeaves, tail.back()) &&
         std::any_of(tail.begin(), tail.end(), [](auto part) { return contains(kMlps, part); });
}

Part part_by_common_names(const Path& path) {
  const Names& tail = path.tail;
  if (path.other_tower || tail.empty()) return Part::kOther;
  auto any = [&](const auto& words) {
    return std::any_of(tail.begin(), tail.end(), [&](auto p) { return contains(words, p); });
  };
  auto any_prefix = [&](std::string_view prefix) {
    return std::any_of(tail.begin(), tail.end(), [&](auto p) { return starts_with(p, prefix); });
  };
  // One of several norms of a layer is called input_layernorm.1 (LongCat).
  const std::string_view leaf = tail.size() > 1 && as_index(tail.back()) >= 0 ? tail[tail.size() - 2] : tail.back();
  if (leaf == "shared_expert_gate") return Part::kSharedExpertGate;
  if (leaf == "e_score_correction_bias" || leaf == "expert_bias" || leaf == "router_bias") return Part::kRouter;
  if (any_prefix("share_expert") || any_prefix("shared_expert") || any_prefix("shared_mlp")) return Part::kSharedExpert;
  const bool expert = contains(tail, "experts") || contains(tail, "local_experts");
  if (expert && !any(kAttentions)) return Part::kRoutedExpert;  // JetMoE's attention is a mixture, too
  if (any(kRouters) && !any(kAttentions)) return Part::kRouter;
  const bool in_norm = std::any_of(tail.begin(), tail.end(), [](auto p) { return p.ends_with("layernorm"); });  // a gated one of A.X-K2
  if (in_norm || leaf.find("norm") != std::string_view::npos || starts_with(leaf, "ln_")) return Part::kNorm;
  if (any(kAttentions) || contains(kAttentionLeaves, leaf)) return Part::kAttention;
  if (is_stack(tail)) return Part::kRoutedExpert;
  if (any(kMlps) && contains(kMlpLeaves, leaf)) return Part::kDenseMlp;
  if (contains(kEmbeddings, leaf)) return Part::kEmbedding;
  if (contains(kHeads, leaf) || (leaf == "output" && tail.size() == 1 && path.layer < 0)) return Part::kHead;  // output: Mistral's own files
  return Part::kOther;
}

/// "experts.3" and "experts.expert_3" (Switch).
int expert_index(const Names& tail) {
  for (std::size_t i = 0; i + 1 < tail.size(); ++i) {
    if (tail[i] != "experts" && tail[i] != "local_experts") continue;
    std::string_view next = tail[i + 1];
    if (starts_with(next, "expert_")) next.remove_prefix(7);
    return as_index(next);
  }
  return -1;
}

}  // namespace

double weight_scaling(const Family& family, double routed_scaling, std::int64_t top_k) {
  if (family.weight_scaling == WeightScaling::kBehindExperts) return 1;
  if (family.weight_scaling == WeightScaling::kInverseK) return top_k > 0 ? 1.0 / static_cast<double>(top_k) : 1.0;
  return routed_scaling;
}

const Family* find_family_by_model_type(std::string_view model_type) {
  for (int i = 0; i < kNumFamilies; ++i) {
    if (contains(kFamilies[i].model_types, model_type)) return &kFamilies[i];
  }
  return nullptr;
}

const Family* find_family(std::string_view name) {
  for (int i = 0; i < kNumFamilies; ++i) {
    if (kFamilies[i].name == name) return &kFamilies[i];
  }
  return nullptr;
}

const HubModel* find_hub_model(std::string_view id) {
  for (int i = 0; i < kNumHubModels; ++i) {
    if (equal_ignoring_case(kHubModels[i].id, id)) return &kHubModels[i];
  }
  return nullptr;
}

std::vector<ExpandedTensor> expand(const Family& family, const FamilyShape& shape, FamilyTensor::Where where) {
  std::vector<ExpandedTensor> out;
  for (const FamilyTensor& tensor : family.tensors) {
    if (tensor.where != where) continue;
    const std::vector<std::int64_t> dims = dimensions(tensor.shape, shape);
    const bool second = tensor.name.find("{v}") != std::string_view::npos;
    const bool per_expert = second || tensor.name.find("{e}") != std::string_view::npos;
    for (std::int64_t layer : layers_of(tensor, shape)) {
      const std::int64_t first = second ? shape.experts : 0, experts = first + (per_expert ? shape.experts : 1);
      for (std::int64_t e = first; e < experts + (tensor.beyond ? shape.extra_rows : 0); ++e) {
        std::vector<std::string> alternatives;
        for (std::string_view other : tensor.alternatives) alternatives.push_back(replaced(other, shape, layer, e));
        out.push_back({replaced(tensor.name, shape, layer, e), dims, tensor.part, static_cast<int>(layer),
                       per_expert ? static_cast<int>(e) : -1, tensor.optional || e >= experts, std::move(alternatives)});
      }
    }
  }
  return out;
}

bool has_second_set(const Family& family) {
  return std::any_of(family.tensors.begin(), family.tensors.end(),
                     [](const FamilyTensor& t) { return t.name.find("{v}") != std::string_view::npos; });
}

bool matches_glob(std::string_view pattern, std::string_view name) {
  if (!starts_with(name, pattern.substr(0, pattern.find('*')))) return false;  // most names end here
  const Names runs = split(pattern, '*');
  if (runs.size() == 1) return pattern == name;
  std::size_t at = runs.front().size();
  for (std::size_t i = 1; i + 1 < runs.size(); ++i) {
    const std::size_t found = name.find(runs[i], at);
    if (found == std::string_view::npos) return false;
    at = found + runs[i].size();
  }
  return name.size() >= at + runs.back().size() && name.substr(name.size() - runs.back().size()) == runs.back();
}

bool is_known_extra(const Family& family, std::string_view name) {
  const auto fits = [&](std::string_view pattern) { return matches_glob(pattern, name); };
  return std::any_of(family.extras.begin(), family.extras.end(), fits) || std::any_of(family.towers.begin(), family.towers.end(), fits);
}

std::optional<PatternMatch> match_pattern(std::string_view pattern, std::string_view name, std::int64_t encoder_layers) {
  const Names want = split(pattern, '.'), have = split(name, '.');
  if (want.size() != have.size()) return std::nullopt;
  PatternMatch out;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const int index = match_segment(want[i], have[i]);
    if (index == kNoMatch) return std::nullopt;
    if (want[i] == "{L}") out.layer = index;
    if (want[i] == "{D}") out.layer = index + static_cast<int>(encoder_layers);
    if (index >= 0 && want[i].find("{e}") != std::string_view::npos) out.expert = index;
  }
  return out;
}

NamedPart classify(const Family* family, std::string_view name, std::int64_t encoder_layers, std::int64_t experts) {
  const Path path = parse(name);
  NamedPart out;
  out.layer = path.other_tower ? -1 : path.layer;
  if (out.layer >= 0 && path.decoder) out.layer += static_cast<int>(encoder_layers);
  if (path.tail.empty() || path.other_tower) return out;
  const std::optional<Part> by_family = family ? part_by_family(*family, path) : std::nullopt;
  out.part = by_family ? *by_family : part_by_common_names(path);
  if (out.part != Part::kRoutedExpert) return out;
  out.expert = expert_index(path.tail);
  if (experts > 0 && out.expert >= experts && family && has_second_set(*family)) {
    out.part = Part::kOther;
    return out;
  }
  const bool stack = contains(path.tail, "experts") || contains(path.tail, "local_experts") || is_stack(path.tail) ||
                     contains(kStackLeaves, path.tail.back());
  out.fused = stack && out.expert < 0;
  return out;
}

}  // namespace moeaudit

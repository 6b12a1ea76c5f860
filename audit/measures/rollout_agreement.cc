// The experts of a training forward against those that an inference engine chose for the same tokens: how often they
// agree, what chance would give, and whether another alignment of the two gives far more.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "audit/facts/fact_sheet.h"
#include "audit/measures/measure.h"
#include "audit/traces/trace.h"

namespace moeaudit {
namespace {

constexpr std::int64_t kMostTokens = 1 << 14;                 // compared; what lies behind them is not read
constexpr std::int64_t kMostIds = std::int64_t{1} << 26;      // 256 MiB of ids
constexpr std::int64_t kProbe = 256, kProbeLayers = 3, kMostShift = 4096;

/// The choices of some tokens in all layers: ids [tokens, layers, k].
struct Choices {
  std::int64_t layers = 0, top_k = 0, experts = 0, all_tokens = 0;  // all_tokens: with those that were not read
  std::int64_t not_padding = 0;
  std::vector<int> number;             // of each layer
  std::vector<std::int64_t> position;  // of each token among all, padding included
  std::vector<std::int64_t> valid;     // and among those that are not padding; -1: it is padding
  std::vector<std::int32_t> ids;
  std::int64_t tokens() const { return static_cast<std::int64_t>(position.size()); }
  const std::int32_t* at(std::int64_t token, std::int64_t layer) const {
    return ids.data() + (token * layers + layer) * top_k;
  }
};

/// The choices that a trace holds, micro-batch after micro-batch. Empty, or why they cannot be compared.
std::string read_choices(const Trace& trace, Choices* c, std::vector<WeightProblem>* problems) {
  const TraceFacts& facts = trace.facts();
  for (const TraceLayer& l : facts.layers) {
    c->number.push_back(l.layer);
    c->experts = std::max(c->experts, l.experts);
  }
  c->layers = static_cast<std::int64_t>(c->number.size());
  bool masks = true;
  for (const MicroBatchRecord& m : trace.micro_batches()) {
    const std::int64_t before = c->all_tokens;
    c->all_tokens += m.tokens;
    if (c->tokens() >= kMostTokens) continue;
    const MicroBatch mb = trace.open(m, problems);
    if (static_cast<std::int64_t>(mb.layers.size()) != c->layers) return "not every layer has its choices in it";
    const std::int64_t rows = m.rows();
    if (c->top_k == 0) c->top_k = mb.layers[0].top_k;
    if (c->top_k < 1 || rows > kMostIds / (c->layers * c->top_k) - c->tokens()) return "it holds too many choices";
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(rows), 1);
    if (mb.token_mask && !read_flags(*mb.token_mask, 0, rows, mask.data())) return "its token_mask could not be read";
    std::vector<std::int32_t> position(static_cast<std::size_t>(m.sampled_tokens ? rows : 0));
    if (m.sampled_tokens && (!mb.sampled || !read_ids(*mb.sampled, 0, rows, position.data())))
      return "it is a sample of the tokens and does not say which";
    masks = masks && !m.sampled_tokens;
    const std::int64_t first = c->tokens();
    for (std::int64_t t = 0; t < rows; ++t) {
      const auto i = static_cast<std::size_t>(t);
      c->position.push_back(before + (m.sampled_tokens ? position[i] : t));
      c->valid.push_back(mask[i] && masks ? c->not_padding++ : -1);
    }
    c->ids.resize(static_cast<std::size_t>(c->tokens() * c->layers * c->top_k));
    std::vector<std::int32_t> ids(static_cast<std::size_t>(rows * c->top_k));
    for (std::int64_t l = 0; l < c->layers; ++l) {
      const LayerTensors& t = mb.layers[static_cast<std::size_t>(l)];
      if (!t.selected_experts || t.top_k != c->top_k) return "not every layer has its choices in it";
      if (t.seen) return "a router saw only some of its tokens";
      if (!read_ids(*t.selected_experts, 0, rows * c->top_k, ids.data())) return "its choices could not be read";
      for (std::int64_t token = 0; token < rows; ++token)
        std::copy_n(ids.data() + token * c->top_k, c->top_k,
                    c->ids.data() + ((first + token) * c->layers + l) * c->top_k);
    }
  }
  if (!masks) std::fill(c->valid.begin(), c->valid.end(), -1);
  return c->tokens() == 0 ? "it holds no choices" : "";
}

std::int64_t in_common(const std::int32_t* a, const std::int32_t* b, std::int64_t k) {
  std::int64_t n = 0;
  for (std::int64_t i = 0; i < k; ++i) n += std::find(b, b + k, a[i]) != b + k;
  return n;
}

/// Where a token and a layer of the training forward lie in the rollout; negative: nowhere.
struct Alignment {
  std::string text;  // "" as given
  std::function<std::int64_t(std::int64_t token)> row;
  std::function<std::int64_t(std::int64_t layer)> layer;
  bool view = false;  // rows and layers are those of the array read as [layers, tokens]
};

class Comparison {
 public:
  Comparison(const Choices& training, const Choices& rollout) : t_(training), r_(rollout) {}

  const std::int32_t* counterpart(const Alignment& a, std::int64_t token, std::int64_t layer) const {
    std::int64_t row = a.row(token), of = a.layer(layer);
    if (a.view) {
      const std::int64_t flat = of * r_.all_tokens + row;
      if (row < 0 || row >= r_.all_tokens || of < 0 || of >= r_.layers) return nullptr;
      row = flat / r_.layers, of = flat % r_.layers;
    }
    return row < 0 || row >= r_.tokens() || of < 0 || of >= r_.layers ? nullptr : r_.at(row, of);
  }

  /// Mean overlap of a probe of tokens and layers; nothing where less than half of them has a counterpart.
  double probe(const Alignment& a, std::int64_t most_layers) const {
    const std::int64_t step = std::max<std::int64_t>(1, t_.tokens() / kProbe);
    const std::int64_t skip = most_layers < t_.layers ? (t_.layers - 1) / (most_layers - 1) : 1;
    std::int64_t pairs = 0, common = 0, all = 0;
    for (std::int64_t token = 0; token < t_.tokens(); token += step) {
      for (std::int64_t l = 0; l < t_.layers; l += skip) {
        ++all;
        const std::int32_t* other = counterpart(a, token, l);
        if (!other) continue;
        ++pairs;
        common += in_common(t_.at(token, l), other, t_.top_k);
      }
    }
    if (2 * pairs < all || pairs == 0) return -1;
    return static_cast<double>(common) / static_cast<double>(pairs * t_.top_k);
  }

  /// Tokens in the probe: what the standard error of its overlap rests on (layers of one token are not independent).
  double probed() const {
    const std::int64_t step = std::max<std::int64_t>(1, t_.tokens() / kProbe);
    return static_cast<double>((t_.tokens() + step - 1) / step);
  }

  void fill(const Alignment& a, RolloutAgreement* out) const {
    std::vector<char> other(static_cast<std::size_t>(t_.tokens()));
    for (std::int64_t l = 0; l < t_.layers; ++l) {
      std::vector<double> of_training(static_cast<std::size_t>(std::max(t_.experts, r_.experts)));
      std::vector<double> of_rollout(of_training.size());
      const auto count = [&](const std::int32_t* ids, std::vector<double>* into) {
        for (std::int64_t j = 0; j < t_.top_k; ++j) {
          if (ids[j] >= 0 && static_cast<std::size_t>(ids[j]) < into->size()) ++(*into)[static_cast<std::size_t>(ids[j])];
        }
      };
      std::int64_t tokens = 0, sets = 0, common = 0;
      for (std::int64_t token = 0; token < t_.tokens(); ++token) {
        const std::int32_t *mine = t_.at(token, l), *theirs = counterpart(a, token, l);
        if (!theirs) continue;
        ++tokens;
        const std::int64_t n = in_common(mine, theirs, t_.top_k);
        common += n;
        if (n < t_.top_k)
          ++sets, other[static_cast<std::size_t>(token)] = 1;
        else
          out->reordered += !std::equal(mine, mine + t_.top_k, theirs);
        count(mine, &of_training);
        count(theirs, &of_rollout);
      }
      if (tokens == 0) continue;
      const auto n = static_cast<double>(tokens), k = static_cast<double>(t_.top_k);
      double chance = 0;
      for (std::size_t e = 0; e < of_training.size(); ++e) chance += of_training[e] / n * (of_rollout[e] / n) / k;
      out->layer.push_back(t_.number[static_cast<std::size_t>(l)]);
      out->tokens.push_back(tokens);
      out->other.push_back(sets);
      out->overlap.push_back(static_cast<double>(common) / (n * k));
      out->chance.push_back(chance);
    }
    out->tokens_with_other = std::count(other.begin(), other.end(), 1);
    for (std::size_t i = 0; i < out->layer.size(); ++i) {
      out->overall += out->overlap[i] / static_cast<double>(out->layer.size());
      out->overall_chance += out->chance[i] / static_cast<double>(out->layer.size());
    }
  }

  /// As the trainer would lay the array over its tokens and layers: by their numbers of tokens and layers.
  Alignment as_given() const {
    Alignment a;
    a.row = r_.all_tokens != t_.all_tokens && r_.all_tokens == t_.not_padding ? by_valid() : by_position();
    const bool by_number = r_.layers > t_.layers && t_.number.back() < r_.layers;
    a.layer = by_number ? numbers() : indices();
    return a;
  }

  /// The alignment that gives most; `given` where nothing gives more.
  Alignment best(const Alignment& given, double* overlap) const {
    Alignment best = given;
    *overlap = probe(given, t_.layers);
    const auto offer = [&](const Alignment& a) {
      const double got = probe(a, t_.layers);
      if (got > *overlap) *overlap = got, best = a;
    };
    std::vector<Alignment> rows = {given};
    const bool padded = t_.not_padding < t_.tokens() && t_.not_padding > 0;
    if (padded) {
      const bool counted = r_.all_tokens == t_.all_tokens;
      rows.push_back({counted ? "its tokens are without padding" : "its tokens are with padding",
                      counted ? by_valid() : by_position(), given.layer});
      offer(rows.back());
    }
    for (const Alignment& base : rows) {
      const std::int64_t shift = best_shift(base);
      std::vector<Alignment> shifted = {base};
      if (shift != 0) shifted.push_back(with_shift(base, shift));
      if (shift != 0) offer(shifted.back());
      for (const Alignment& s : shifted) {
        if (r_.layers > t_.layers) {
          offer({joined(s.text, "MoE layers are counted without the dense ones"), s.row, indices()});
          offer({joined(s.text, "layers are counted with the dense ones"), s.row, numbers()});
        }
        for (std::int64_t d = 1 - t_.layers; d < r_.layers; ++d) {
          if (d == 0) continue;
          const auto of = s.layer;
          offer({joined(s.text, "MoE layer l has its column l" + plus(d)), s.row,
                 [of, d](std::int64_t l) { return of(l) + d; }});
        }
      }
    }
    if (r_.layers == t_.layers)
      offer({"it is [tokens, layers] in memory and was viewed as [layers, tokens] instead of transposed", by_position(), indices(), true});
    return best;
  }

 private:
  std::function<std::int64_t(std::int64_t)> by_position() const {
    return [this](std::int64_t token) { return t_.position[static_cast<std::size_t>(token)]; };
  }
  std::function<std::int64_t(std::int64_t)> by_valid() const {
    return [this](std::int64_t token) { return t_.valid[static_cast<std::size_t>(token)]; };
  }
  static std::function<std::int64_t(std::int64_t)> indices() {
    return [](std::int64_t l) { return l; };
  }
  std::function<std::int64_t(std::int64_t)> numbers() const {
    return [this](std::int64_t l) { return std::int64_t{t_.number[static_cast<std::size_t>(l)]}; };
  }
  static std::string plus(std::int64_t n) { return (n < 0 ? " - " : " + ") + std::to_string(std::abs(n)); }
  static std::string joined(const std::string& a, const std::string& b) { return a.empty() ? b : a + ", and " + b; }

  Alignment with_shift(const Alignment& base, std::int64_t shift) const {
    std::string text = "token t has its row t" + plus(shift);
    if (shift < -1 && r_.all_tokens <= t_.all_tokens + shift + 1) text += ": it begins behind the prompt";
    const auto row = base.row;
    return {joined(base.text, text),
            [row, shift](std::int64_t token) {
              const std::int64_t at = row(token);
              return at < 0 ? at : std::max<std::int64_t>(at + shift, -1);
            },
            base.layer};
  }

  std::int64_t best_shift(const Alignment& base) const {
    const std::int64_t most = std::min({kMostShift, std::max(t_.tokens(), r_.tokens()) - 1});
    std::int64_t best = 0;
    double overlap = probe(base, kProbeLayers);
    for (std::int64_t s = -most; s <= most; ++s) {
      const double got = s == 0 ? -1 : probe(with_shift(base, s), kProbeLayers);
      if (got > overlap) overlap = got, best = s;
    }
    return best;
  }

  const Choices &t_, &r_;
};

void run(MeasureContext& ctx) {
  auto& fact = ctx.facts.rollout;
  if (ctx.trace == nullptr) return fact.explain_unknown("no trace was given, or it could not be opened");
  if (ctx.rollout == nullptr) return fact.explain_unknown("no rollout was given, or it could not be opened");
  Choices training, rollout;
  std::vector<WeightProblem> problems;
  if (const std::string why = read_choices(*ctx.trace, &training, &problems); !why.empty())
    return fact.explain_unknown(ctx.trace->facts().path + ": " + why);
  if (const std::string why = read_choices(*ctx.rollout, &rollout, &problems); !why.empty())
    return fact.explain_unknown(ctx.rollout->facts().path + ": " + why);
  if (training.top_k != rollout.top_k)
    return fact.explain_unknown("the trace has " + std::to_string(training.top_k) + " experts a token, the rollout " +
                                std::to_string(rollout.top_k));
  RolloutAgreement out;
  out.training = ctx.trace->facts().path;
  out.rollout = ctx.rollout->facts().path;
  out.training_tokens = training.all_tokens, out.rollout_tokens = rollout.all_tokens;
  out.training_layers = training.layers, out.rollout_layers = rollout.layers;
  out.replayed = ctx.trace->facts().routing_replayed.value_or(false);
  const Comparison comparison(training, rollout);
  const Alignment given = comparison.as_given();
  const double as_given = comparison.probe(given, training.layers);
  const Alignment best = comparison.best(given, &out.aligned);
  // Five standard errors of a share among so many tokens, and not less than a tenth.
  const bool far = out.aligned - std::max(as_given, 0.0) > std::max(0.1, 2.5 / std::sqrt(comparison.probed()));
  if (far) out.misaligned = best.text;
  comparison.fill(given, &out);
  if (out.layer.empty() && !far) return fact.explain_unknown("the trace and the rollout have no token in common");
  Source source;
  source.role = Role::kTrace;
  source.file = out.rollout;
  ctx.records.push_back({"rollout_agreement", "host", std::to_string(training.tokens()) + " tokens of " +
                                                          std::to_string(training.layers) + " layers"});
  fact.set(std::move(out), Origin::kMeasured, std::move(source));
}

constexpr std::string_view kSupplies[] = {"trace.rollout"};

}  // namespace

extern const Measure measure_rollout_agreement;
const Measure measure_rollout_agreement = {.name = "rollout_agreement", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit

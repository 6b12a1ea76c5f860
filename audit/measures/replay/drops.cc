#include "audit/measures/replay/drops.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <optional>

#include "kernels/host/dispatch.h"
#include "kernels/host/elementary.h"

namespace moeaudit::replay {
namespace {

struct Form {
  std::string_view id, name, framework;
  k::CapacityForm form;
  enum { kAsIs, kNoTopK, kNotOverExperts, kAllRanks, kWithoutPadding } with = kAsIs;
};
constexpr Form kForms[] = {
    {"C0", "ceil(T k / E x factor), Megatron-LM", "megatron", k::CapacityForm::kMegatron},
    {"C1", "max(ceil(T / E x factor x k), minimum), DeepSpeed", "deepspeed", k::CapacityForm::kDeepSpeed},
    {"C2", "floor(factor k T ep / E), MegaBlocks", "megablocks", k::CapacityForm::kMegaBlocks},
    {"C3", "ep x floor(factor k T / E) up to 8, OLMo-core", "olmo", k::CapacityForm::kOlmoCore},
    {"C4", "k floor(factor ceil(T / E)), Tutel", "tutel", k::CapacityForm::kTutel},
    {"C5", "ceil(factor T) k / E, FastMoE", "fastmoe", k::CapacityForm::kFastMoE},
};

/// The capacity of one form under the settings; nullopt: they do not go with it.
std::optional<std::int64_t> capacity_of(const Form& f, const TraceFacts& facts, std::int64_t tokens, std::int64_t valid,
                                        std::int64_t experts, std::int64_t top_k, std::int64_t largest) {
  k::CapacityArgs a;
  a.form = f.form;
  a.tokens = f.with == Form::kWithoutPadding ? valid : tokens;
  if (f.with == Form::kAllRanks) a.tokens *= facts.world_size.value_or(1);
  a.experts = f.with == Form::kNotOverExperts ? 1 : experts;
  a.top_k = f.with == Form::kNoTopK ? 1 : top_k;
  a.factor = *facts.capacity_factor;
  a.min_capacity = facts.min_capacity.value_or(0);
  a.expert_parallel_size = facts.expert_parallel.value_or(1);
  a.alignment = facts.capacity_alignment.value_or(1);
  a.largest_count = &largest;  // of this rank: where another's is larger, nothing is dropped here in either case
  std::int64_t places = 0;
  if (k::capacity(a, &places) != k::Status::kOk) return std::nullopt;
  return places;
}

/// That of a framework; nullopt: nobody said whose it is.
std::optional<Form> form_of(const std::string& framework) {
  for (const Form& f : kForms) {
    if (framework.find(f.framework) != std::string::npos) return f;
  }
  return std::nullopt;
}

std::string in_short(double v) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", v);
  return text;
}

/// What the form says with this factor.
std::string name_of(const Form& f, double factor) {
  const bool tutel = f.form == k::CapacityForm::kTutel;
  if (factor == 0 && (tutel || f.form == k::CapacityForm::kMegaBlocks)) return "the largest count, " + std::string(tutel ? "Tutel" : "MegaBlocks") + " at factor 0";
  return factor < 0 && tutel ? "min(largest count, k floor(-factor ceil(T / E))), Tutel" : std::string(f.name);
}

double score_of(k::Score score, double logit) {  // of softmax the numerator, as it is
  return score == k::Score::kSigmoid ? k::sigmoid_exact_order(logit) : score == k::Score::kSqrtSoftplus ? k::sqrt_softplus_exact_order(logit) : std::exp(logit);
}

constexpr const char* kByLogits = "the logits, with 0 for every token of others";

}  // namespace

/// Orders of filling an expert that drop exactly what was dropped.
std::vector<std::string> Drops::orders_of(const LayerTensors& t, const v::RoutedLayer* logits,
                                          const std::vector<std::int32_t>& chosen,
                                          const std::vector<std::uint8_t>& dropped, Seen* s) const {
  std::vector<std::string> found;
  k::DropArgs<double> a;
  a.chosen = chosen.data();
  a.tokens = s->tokens, a.experts = s->experts, a.top_k = s->top_k, a.capacity = s->most_kept;
  const auto offer = [&](const char* text, k::DropOrder order, const double* weights, const double* scores) {
    a.order = order;
    a.weights = weights, a.scores = scores;
    std::vector<std::int32_t> place(chosen.size());
    k::DropResult<double> result;
    result.place = place.data();
    if (k::drop(a, result) != k::Status::kOk) return;
    for (std::size_t i = 0; i < place.size(); ++i) {
      if (chosen[i] >= 0 && (place[i] < 0) != (dropped[i] != 0)) return;
    }
    if (std::find(found.begin(), found.end(), text) == found.end()) found.push_back(text);
  };
  if (s->one_size) {
    offer("position", k::DropOrder::kTokens, nullptr, nullptr);
    offer("choices", k::DropOrder::kChoices, nullptr, nullptr);
  }
  // Weights as they were before the drops: recorded, unless what was dropped was recorded as 0, or of the logits.
  std::vector<double> weights(chosen.size());
  bool recorded = t.routing_weights && read_values(*t.routing_weights, 0, static_cast<std::int64_t>(weights.size()), weights.data());
  for (std::size_t i = 0; recorded && i < weights.size(); ++i) recorded = !dropped[i] || weights[i] != 0.0;
  if (recorded && s->one_size) offer("probs", k::DropOrder::kWeights, weights.data(), nullptr);
  const auto experts = static_cast<std::size_t>(s->experts), top_k = static_cast<std::size_t>(s->top_k);
  s->scored = logits && logits->logits.size() == static_cast<std::size_t>(s->tokens) * experts;
  s->weighed = recorded || s->scored;
  if (!s->scored) return found;
  std::vector<double> of_all(chosen.size()), of_chosen(chosen.size()), scores(logits->logits.size());
  for (std::size_t token = 0; token < static_cast<std::size_t>(s->tokens); ++token) {
    const double* row = logits->logits.data() + token * experts;
    double* score = scores.data() + token * experts;
    const bool softmax = logits->score == k::Score::kSoftmax;
    const double top = softmax ? *std::max_element(row, row + experts) : 0.0;
    double all = 0, ours = 0;
    for (std::size_t e = 0; e < experts; ++e) all += score[e] = score_of(logits->score, row[e] - top);
    for (std::size_t e = 0; softmax && e < experts; ++e) score[e] /= all;
    for (std::size_t j = token * top_k; j < (token + 1) * top_k; ++j) {
      of_all[j] = chosen[j] < 0 ? 0.0 : score[static_cast<std::size_t>(chosen[j])];
      ours += of_all[j];
    }
    for (std::size_t j = token * top_k; j < (token + 1) * top_k; ++j) of_chosen[j] = of_all[j] / ours;
  }
  if (s->one_size) {
    offer("probs", k::DropOrder::kWeights, of_all.data(), nullptr);
    offer("probs", k::DropOrder::kWeights, of_chosen.data(), nullptr);
    offer("batch_prioritised", k::DropOrder::kBatchPrioritised, nullptr, scores.data());
  }
  // The C largest of a column that holds the logits of its tokens and 0 for all others: one below 0 loses against them.
  const std::optional<std::int64_t> capacity = configured(*s);
  if (!capacity || *capacity >= s->tokens) return found;
  std::vector<std::vector<std::pair<double, std::size_t>>> of_expert(experts);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (chosen[i] < 0) continue;
    const auto e = static_cast<std::size_t>(chosen[i]);
    of_expert[e].push_back({logits->logits[i / top_k * experts + e], i});
  }
  bool by_logits = true;
  for (auto& list : of_expert) {
    std::sort(list.begin(), list.end(), [](const auto& x, const auto& y) { return x.first > y.first || (x.first == y.first && x.second < y.second); });
    const std::int64_t zeros = s->tokens - static_cast<std::int64_t>(list.size());
    std::int64_t rank = 0;
    for (const auto& [logit, i] : list) {
      const std::int64_t before = rank++ + (logit < 0 ? zeros : 0);
      by_logits = by_logits && (before >= *capacity) == (dropped[i] != 0);
    }
  }
  if (by_logits && found.empty()) found.push_back(kByLogits);
  return found;
}

std::optional<std::int64_t> Drops::configured(const Seen& s) const {
  if (!ctx_.facts.capacity_factor) return std::nullopt;
  return capacity_of(form_of(ctx_.facts.framework).value_or(kForms[0]), ctx_.facts, s.tokens, s.valid, s.experts, s.top_k, s.most_wanted);
}

void Drops::add(const MicroBatch& mb, const Shared& shared, const LayerTensors& t, const v::RoutedLayer* logits) {
  const MicroBatchRecord& m = *mb.record;
  if (!t.dropped || !t.selected_experts || t.top_k < 1 || t.experts < 1 || m.sampled_tokens) return;
  Row& r = ctx_.row("capacity", t.layer);
  r.missing = ctx_.facts.capacity_factor ? "selected_experts or dropped is of a dtype that holds no ids or flags" : "needs training.capacity_factor in trace.json";
  const std::int64_t rows = m.rows(), n = rows * t.top_k;
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(n));
  std::vector<std::uint8_t> dropped(chosen.size());
  if (!read_ids(*t.selected_experts, 0, n, chosen.data()) || !read_flags(*t.dropped, 0, n, dropped.data())) return;
  for (std::int32_t& id : chosen) id = id >= t.experts ? -1 : id;
  Seen s;
  s.place = ctx_.place_of(m);
  s.tokens = rows, s.experts = t.experts, s.top_k = t.top_k;
  s.valid = shared.valid.empty() ? rows : std::accumulate(shared.valid.begin(), shared.valid.end(), std::int64_t{0});
  std::vector<std::int64_t> kept(static_cast<std::size_t>(t.experts)), wanted(kept.size());
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (chosen[i] < 0) continue;
    ++wanted[static_cast<std::size_t>(chosen[i])];
    kept[static_cast<std::size_t>(chosen[i])] += !dropped[i];
    s.dropped += dropped[i];
  }
  std::int64_t full = -1;
  for (std::size_t e = 0; e < kept.size(); ++e) {
    s.most_kept = std::max(s.most_kept, kept[e]);
    s.most_wanted = std::max(s.most_wanted, wanted[e]);
    if (kept[e] == wanted[e]) continue;
    s.one_size = s.one_size && (full < 0 || full == kept[e]);
    full = kept[e];
  }
  s.one_size = s.one_size && (full < 0 || full == s.most_kept);
  if (s.dropped > 0) s.orders = orders_of(t, logits, chosen, dropped, &s);
  const std::scoped_lock lock(mutex_);
  seen_[t.layer].push_back(std::move(s));
}

void Drops::finish() {
  const std::optional<Form> held = form_of(ctx_.facts.framework);
  for (auto& [layer, list] : seen_) {
    std::int64_t dropped = 0;
    bool by_logits = false;
    for (const Seen& s : list) {
      dropped += s.dropped;
      by_logits = by_logits || (s.orders.size() == 1 && s.orders[0] == kByLogits);
    }
    // Which order, where every micro-batch with drops agrees.
    Row& order = ctx_.row("drop_order", layer);
    order.held_to = ctx_.facts.drop_policy.empty() ? "no policy stated" : "drop_policy " + ctx_.facts.drop_policy;
    order.missing = "nothing was dropped";
    std::optional<std::vector<std::string>> common;
    for (const Seen& s : list) {
      if (s.dropped == 0 || (!s.one_size && !by_logits)) continue;
      const std::string& policy = ctx_.facts.drop_policy;
      if ((policy == "probs" && !s.weighed) || (policy == "batch_prioritised" && !s.scored)) {
        order.missing = policy == "probs" ? "needs routing_weights, or logits of a router that is replayed" : "needs logits of a router that is replayed";
        continue;
      }
      ++order.compared;
      if (!common) common = s.orders;
      std::erase_if(*common, [&](const std::string& o) { return std::find(s.orders.begin(), s.orders.end(), o) == s.orders.end(); });
      const bool unknown = ctx_.facts.drop_policy.empty() || ctx_.facts.drop_policy == "random";
      const bool fits = (unknown && !by_logits) || std::find(s.orders.begin(), s.orders.end(), ctx_.facts.drop_policy) != s.orders.end();
      if (!fits && ++order.differing == 1) order.place = s.place;
    }
    order.recorded = order.distance = static_cast<double>(order.differing);
    order.expected = order.band = 0;
    if (common && !common->empty()) {
      order.name.found = true;
      order.name.id = by_logits ? "X5" : "";
      order.name.name = "dropped by " + common->front();
      for (std::size_t i = 1; i < common->size(); ++i) order.name.also += (i > 1 ? "; by " : "by ") + (*common)[i];
    }
    if (!ctx_.facts.capacity_factor) continue;
    const double factor = *ctx_.facts.capacity_factor;

    Row& r = ctx_.row("capacity", layer);
    const Form base = held ? *held : kForms[0];
    const auto of = [&](const Form& f, const Seen& s) {
      return capacity_of(f, ctx_.facts, s.tokens, s.valid, s.experts, s.top_k, s.most_wanted);
    };
    if (!std::all_of(list.begin(), list.end(), [&](const Seen& s) { return of(base, s); })) {
      r.missing = "training.capacity_factor " + in_short(factor) + " gives no capacity in the form " + std::string(base.name);
      if (!held) r.missing += "; of a factor up to 0 Tutel makes one, of 0 MegaBlocks, and training.framework names neither";
      continue;
    }
    std::vector<Form> forms(std::begin(kForms), std::end(kForms));
    for (const auto& [id, name, with] :
         {std::tuple{"X1", "without k", Form::kNoTopK}, {"X2", "not over the experts", Form::kNotOverExperts},
          {"X3", "from the tokens of all ranks", Form::kAllRanks}, {"X4", "from the tokens that are not padding", Form::kWithoutPadding}}) {
      Form f = base;
      f.id = id, f.name = name, f.with = decltype(f.with)(with);
      forms.push_back(f);
    }
    const auto fits = [&](const Form& f, const Seen& s) {
      if (by_logits) return true;  // more is dropped than the capacity asks for: drop_order speaks of it
      const auto c = of(f, s);
      return c && (s.dropped > 0 ? s.one_size && s.most_kept == std::min(*c, s.most_wanted) && *c < s.most_wanted
                                 : *c >= s.most_wanted);
    };
    r.held_to = name_of(base, factor) + (held ? "" : ", if it is that framework's");
    for (const Seen& s : list) {
      const double want = static_cast<double>(std::min(*of(base, s), s.most_wanted));
      const double got = static_cast<double>(s.most_kept);
      r.add(fits(base, s) ? want : got == want ? got + 1 : got, want, 0.5, s.place);
    }
    if (r.differing > 0) {
      if (dropped == 0) {
        r.name.found = true;
        r.name.id = "X6";
        r.name.name = "nothing is dropped, whatever the capacity";
      }
      for (const Form& f : forms) {
        if (!std::all_of(list.begin(), list.end(), [&](const Seen& s) { return fits(f, s); })) continue;
        const std::string text = std::string(f.id) + " " + std::string(f.name);
        if (r.name.found) {
          r.name.also += (r.name.also.empty() ? "" : "; ") + text;
          continue;
        }
        r.name.found = true;
        r.name.id = f.id;
        r.name.name = f.name;
        // Nobody said whose form it is: any framework's is right.
        if (!held && f.id[0] == 'C') r.differing = 0;
      }
    }
  }
}

}  // namespace moeaudit::replay

#include "audit/measures/replay/drops.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "kernels/host/dispatch.h"

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
                                        std::int64_t experts, std::int64_t top_k) {
  k::CapacityArgs a;
  a.form = f.form;
  a.tokens = f.with == Form::kWithoutPadding ? valid : tokens;
  if (f.with == Form::kAllRanks) a.tokens *= facts.world_size.value_or(1);
  a.experts = f.with == Form::kNotOverExperts ? 1 : experts;
  a.top_k = f.with == Form::kNoTopK ? 1 : top_k;
  a.factor = *facts.capacity_factor;
  a.min_capacity = facts.min_capacity.value_or(0);
  a.expert_parallel_size = facts.expert_parallel.value_or(1);
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

constexpr const char* kByLogits = "the logits, with 0 for every token of others";

}  // namespace

/// Orders of filling an expert that drop exactly what was dropped.
std::vector<std::string> Drops::orders_of(const LayerTensors& t, const v::RoutedLayer* logits,
                                          const std::vector<std::int32_t>& chosen,
                                          const std::vector<std::uint8_t>& dropped, const Seen& s) const {
  std::vector<std::string> found;
  k::DropArgs<double> a;
  a.chosen = chosen.data();
  a.tokens = s.tokens, a.experts = s.experts, a.top_k = s.top_k, a.capacity = s.most_kept;
  const auto offer = [&](const char* text, k::DropOrder order, const double* weights) {
    a.order = order;
    a.weights = weights;
    std::vector<std::int32_t> place(chosen.size());
    k::DropResult<double> result;
    result.place = place.data();
    if (k::drop(a, result) != k::Status::kOk) return;
    for (std::size_t i = 0; i < place.size(); ++i) {
      if (chosen[i] >= 0 && (place[i] < 0) != (dropped[i] != 0)) return;
    }
    if (std::find(found.begin(), found.end(), text) == found.end()) found.push_back(text);
  };
  if (s.one_size) {
    offer("position", k::DropOrder::kTokens, nullptr);
    offer("choices", k::DropOrder::kChoices, nullptr);
  }
  // Weights as they were before the drops: recorded, unless what was dropped was recorded as 0, or of the logits.
  std::vector<double> weights(chosen.size());
  bool recorded = t.routing_weights && read_values(*t.routing_weights, 0, static_cast<std::int64_t>(weights.size()), weights.data());
  for (std::size_t i = 0; recorded && i < weights.size(); ++i) recorded = !dropped[i] || weights[i] != 0.0;
  if (recorded && s.one_size) {
    offer("probs", k::DropOrder::kWeights, weights.data());
    offer("batch_prioritised", k::DropOrder::kBatchPrioritised, weights.data());
  }
  const auto experts = static_cast<std::size_t>(s.experts), top_k = static_cast<std::size_t>(s.top_k);
  if (!logits || logits->logits.size() != static_cast<std::size_t>(s.tokens) * experts) return found;
  std::vector<double> of_all(chosen.size()), of_chosen(chosen.size());
  for (std::size_t token = 0; token < static_cast<std::size_t>(s.tokens); ++token) {
    const double* row = logits->logits.data() + token * experts;
    const double top = *std::max_element(row, row + experts);
    double all = 0, ours = 0;
    for (std::size_t e = 0; e < experts; ++e) all += std::exp(row[e] - top);
    for (std::size_t j = token * top_k; j < (token + 1) * top_k; ++j) {
      of_all[j] = chosen[j] < 0 ? 0.0 : std::exp(row[static_cast<std::size_t>(chosen[j])] - top);
      ours += of_all[j];
    }
    for (std::size_t j = token * top_k; j < (token + 1) * top_k; ++j) of_chosen[j] = of_all[j] / ours, of_all[j] /= all;
  }
  if (s.one_size) {
    offer("probs", k::DropOrder::kWeights, of_all.data());
    offer("probs", k::DropOrder::kWeights, of_chosen.data());
    offer("batch_prioritised", k::DropOrder::kBatchPrioritised, of_all.data());
  }
  // The C largest of a column that holds the logits of its tokens and 0 for all others: one below 0 loses against them.
  const std::optional<std::int64_t> capacity = configured(s);
  if (!capacity || *capacity >= s.tokens) return found;
  std::vector<std::vector<std::pair<double, std::size_t>>> of_expert(experts);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (chosen[i] < 0) continue;
    const auto e = static_cast<std::size_t>(chosen[i]);
    of_expert[e].push_back({logits->logits[i / top_k * experts + e], i});
  }
  bool by_logits = true;
  for (auto& list : of_expert) {
    std::sort(list.begin(), list.end(), [](const auto& x, const auto& y) { return x.first > y.first || (x.first == y.first && x.second < y.second); });
    const std::int64_t zeros = s.tokens - static_cast<std::int64_t>(list.size());
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
  if (!ctx_.facts.capacity_factor || !(*ctx_.facts.capacity_factor > 0)) return std::nullopt;
  return capacity_of(form_of(ctx_.facts.framework).value_or(kForms[0]), ctx_.facts, s.tokens, s.valid, s.experts, s.top_k);
}

void Drops::add(const MicroBatch& mb, const Shared& shared, const LayerTensors& t, const v::RoutedLayer* logits) {
  const MicroBatchRecord& m = *mb.record;
  if (!t.dropped || !t.selected_experts || t.top_k < 1 || t.experts < 1 || m.sampled_tokens) return;
  Row& r = ctx_.row("capacity", t.layer);
  r.missing = "needs training.capacity_factor in trace.json";
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
  if (s.dropped > 0) s.orders = orders_of(t, logits, chosen, dropped, s);
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
    if (!ctx_.facts.capacity_factor || !(*ctx_.facts.capacity_factor > 0)) continue;

    Row& r = ctx_.row("capacity", layer);
    std::vector<Form> forms(std::begin(kForms), std::end(kForms));
    const Form base = held ? *held : kForms[0];
    for (const auto& [id, name, with] :
         {std::tuple{"X1", "without k", Form::kNoTopK}, {"X2", "not over the experts", Form::kNotOverExperts},
          {"X3", "from the tokens of all ranks", Form::kAllRanks}, {"X4", "from the tokens that are not padding", Form::kWithoutPadding}}) {
      Form f = base;
      f.id = id, f.name = name, f.with = decltype(f.with)(with);
      forms.push_back(f);
    }
    const auto fits = [&](const Form& f, const Seen& s) {
      if (by_logits) return true;  // more is dropped than the capacity asks for: drop_order speaks of it
      const auto c = capacity_of(f, ctx_.facts, s.tokens, s.valid, s.experts, s.top_k);
      return c && (s.dropped > 0 ? s.one_size && s.most_kept == std::min(*c, s.most_wanted) && *c < s.most_wanted
                                 : *c >= s.most_wanted);
    };
    r.held_to = std::string(base.name) + (held ? "" : ", if it is that framework's");
    for (const Seen& s : list) {
      const auto c = capacity_of(base, ctx_.facts, s.tokens, s.valid, s.experts, s.top_k);
      const double want = c ? static_cast<double>(std::min(*c, s.most_wanted)) : kNan;
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

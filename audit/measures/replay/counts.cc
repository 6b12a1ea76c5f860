#include "audit/measures/replay/counts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moeaudit::replay {
namespace {

/// One way to count, and what it is called.
struct Way {
  std::string_view id;
  std::string name;
  std::vector<double> counts;
};

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return kInf;
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) most = std::max(most, std::fabs(a[i] - b[i]));
  return most;
}

double sum_of(const std::vector<double>& v) { return std::accumulate(v.begin(), v.end(), 0.0); }

/// `got` against right ways to count (id ""), then wrong ones: counts are integers, so a name must fit exactly.
void judge(Context* ctx, int layer, const std::vector<double>& got, const std::vector<Way>& ways, const Place& where) {
  Row& r = ctx->row("expert_counter", layer);
  const Way* right = nullptr;
  for (const Way& w : ways) {
    if (w.counts.empty() || !w.id.empty()) continue;
    if (!right || largest_difference(got, w.counts) == 0.0) right = &w;
  }
  if (!right) return;
  r.held_to = right->name;
  const bool differs = largest_difference(got, right->counts) > 0.0;
  r.add(sum_of(got), sum_of(right->counts), 0.5, where);
  if (!differs) return;
  if (sum_of(got) == sum_of(right->counts)) ++r.differing;  // as many, of other experts
  v::Name name;
  const auto take = [&](std::string_view id, const std::string& text, double factor) {
    if (name.found) {
      name.also += (name.also.empty() ? "" : "; ") + std::string(id) + " " + text;
      return;
    }
    name.found = true, name.id = id, name.name = text;
    if (factor != 1) name.factor = std::to_string(static_cast<int>(factor)), name.factor_value = factor;
  };
  std::vector<double> twice = right->counts;
  for (double& c : twice) c *= 2;
  if (largest_difference(got, twice) == 0.0) take("B7", "every token counted twice", 2);
  for (const Way& w : ways) {
    if (!w.id.empty() && largest_difference(got, w.counts) == 0.0) take(w.id, w.name, 1);
  }
  // A name must hold wherever the counts differ: the same again, or none.
  if (r.differing == 1)
    r.name = name;
  else if (r.name.id != name.id)
    r.name = {};
}

std::vector<double> as_double(const std::vector<std::int64_t>& v) { return {v.begin(), v.end()}; }

}  // namespace

std::vector<double> counts_of(const Context& ctx, int layer, const Counting& how, std::int64_t micro) {
  std::vector<double> sum;
  const auto add_all = [&](const std::map<int, StepLoads>& from, std::int64_t only) {
    const auto of_layer = from.find(layer);
    if (of_layer == from.end()) return false;
    for (const auto& [at, l] : of_layer->second) {
      if ((how.ranks && how.ranks->count(at.second) == 0) || (only >= 0 && at.first != only)) continue;
      const auto& c = how.padding ? l.all : how.kept ? l.kept : l.valid;
      if (sum.empty()) sum.resize(c.size());
      if (sum.size() != c.size()) return false;
      for (std::size_t e = 0; e < c.size(); ++e) sum[e] += static_cast<double>(c[e]);
    }
    return true;
  };
  if (!add_all(ctx.loads, micro)) return {};
  if (how.evaluation && !add_all(ctx.evaluation, -1)) return {};
  if (how.evaluation_before && !add_all(ctx.evaluation_before, -1)) return {};
  if (how.earlier && !add_all(ctx.earlier, -1)) return {};
  return sum;
}

std::vector<std::pair<std::string, std::set<std::int64_t>>> rank_groups(const Context& ctx, int layer,
                                                                        std::int64_t rank) {
  std::vector<std::pair<std::string, std::set<std::int64_t>>> out;
  const auto of_layer = ctx.loads.find(layer);
  if (of_layer == ctx.loads.end()) return out;
  std::set<std::int64_t> all;
  for (const auto& [at, l] : of_layer->second) all.insert(at.second);
  const auto n = static_cast<std::int64_t>(all.size());
  if (n < 4 || *all.rbegin() != n - 1) return out;  // a gap: which ranks stand next to each other is not known
  for (std::int64_t size = 2; size < n; ++size) {
    if (n % size != 0) continue;
    std::set<std::int64_t> next, apart;
    for (std::int64_t i = 0; i < size; ++i) {
      next.insert(rank / size * size + i);
      apart.insert(rank % (n / size) + i * (n / size));
    }
    const std::string of = std::to_string(size) + " of " + std::to_string(n) + " ranks";
    out.emplace_back("summed over " + of + ", neighbours", next);
    out.emplace_back("summed over " + of + ", " + std::to_string(n / size) + " apart", apart);
  }
  return out;
}

void replay_counter(Context* ctx, const StepTensors& tensors) {
  for (const StepLayerTensors& t : tensors.layers) {
    const auto of_layer = ctx->loads.find(t.layer);
    if (!t.expert_counter) continue;
    Row& r = ctx->row("expert_counter", t.layer);
    if (of_layer == ctx->loads.end()) {
      if (r.missing.empty()) r.missing = "needs selected_experts of every micro-batch";
      continue;
    }
    const std::size_t experts = of_layer->second.begin()->second.valid.size();
    std::vector<std::int64_t> got(experts);
    if (!read_counts(*t.expert_counter, 0, static_cast<std::int64_t>(experts), got.data())) continue;
    if (std::all_of(got.begin(), got.end(), [](std::int64_t c) { return c == 0; })) {
      if (r.missing.empty()) r.missing = "the counter had been set back to 0 before it was recorded";
      continue;
    }
    const std::set<std::int64_t> own = {tensors.record->rank};
    std::vector<Way> ways;
    for (const std::set<std::int64_t>* ranks : {static_cast<const std::set<std::int64_t>*>(nullptr), &own}) {
      if (ranks && counts_of(*ctx, t.layer, {.ranks = ranks}) == ways[0].counts) continue;  // there is no other rank
      const std::string of = ranks ? " on this rank" : "";
      const auto add = [&](std::string_view id, const std::string& name, Counting how) {
        how.ranks = ranks;
        ways.push_back({id, name + of, counts_of(*ctx, t.layer, how)});
      };
      add("", "the tokens of the step", {});
      add("B8", "with the tokens of evaluations", {.evaluation = true});
      add("B8", "with the tokens of evaluations", {.evaluation_before = true});
      add("B9", "padding counted", {.padding = true});
      add("B10", "from the counts after drops", {.kept = true});
      add("B11", "with the counts of earlier steps", {.earlier = true});
    }
    const auto groups = rank_groups(*ctx, t.layer, tensors.record->rank);
    for (const auto& [name, ranks] : groups) ways.push_back({"B4", name, counts_of(*ctx, t.layer, {.ranks = &ranks})});
    judge(ctx, t.layer, as_double(got), ways, ctx->place_of(*tensors.record));
  }
}

}  // namespace moeaudit::replay

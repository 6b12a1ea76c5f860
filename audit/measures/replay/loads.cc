#include "audit/measures/replay/loads.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <optional>

namespace moeaudit::replay {
namespace {

struct Counted {
  std::string_view text, symbol;
  double times;
};

}  // namespace

void replay_loads(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t) {
  if (!t.tokens_per_expert || ctx->facts.format != "moe-audit-trace" || t.experts < 1) return;
  std::vector<std::int64_t> got(static_cast<std::size_t>(t.experts));
  if (!read_counts(*t.tokens_per_expert, 0, t.experts, got.data())) return;
  const TraceLayer* stated = ctx->facts.layer(t.layer);
  const std::int64_t top_k = t.top_k > 0 ? t.top_k : stated ? stated->top_k : 0;
  Row& r = ctx->row("loads", t.layer);
  r.held_to = "each choice of each token once";
  r.missing = "needs selected_experts of all tokens, or their number and top_k";
  const auto name = [&](std::string_view text, std::string_view factor = "", double times = 1) {
    v::Name n;
    n.found = true;
    n.id = "B7";
    n.name = text;
    n.factor = factor;
    n.factor_value = times;
    if (r.differing == 1)
      r.name = n;  // it must hold in every micro-batch that differs
    else if (r.name.name != n.name)
      r.name = {};
  };
  const auto size = [](const std::optional<std::int64_t>& n) { return static_cast<double>(n.value_or(1)); };
  std::vector<Counted> factors = {{"counted twice", "2", 2},
                                  {"counted once a micro-batch", "M", static_cast<double>(ctx->accumulation)},
                                  {"counted once a rank", "W", size(ctx->facts.world_size)},
                                  {"counted once a tensor-parallel rank", "TP", size(ctx->facts.tensor_parallel)},
                                  {"counted once a context-parallel rank", "CP", size(ctx->facts.context_parallel)},
                                  {"counted once a choice of the token", "k", static_cast<double>(top_k)}};
  std::erase_if(factors, [](const Counted& f) { return f.times <= 1; });
  const Loads* own = t.selected_experts && !m.sampled_tokens ? ctx->loads_of(m, t.layer) : nullptr;
  const auto sum = [](const std::vector<std::int64_t>& v) { return std::accumulate(v.begin(), v.end(), std::int64_t{0}); };
  if (own && own->all.size() == got.size()) {
    // With or without padding, before or after drops: conventions, all of them.
    const bool fine = got == own->all || got == own->valid || got == own->kept;
    if (got == own->all && own->all != own->valid) r.held_to = "each choice of each token once, padding counted";
    std::size_t at = 0;
    for (std::size_t e = 0; e < got.size(); ++e) {
      if (std::llabs(got[e] - own->all[e]) > std::llabs(got[at] - own->all[at])) at = e;
    }
    const double want = fine ? static_cast<double>(got[at]) : static_cast<double>(own->all[at]);
    if (!r.add(static_cast<double>(got[at]), want, 0.5, ctx->place_of(m))) return;
    for (const auto* counts : {&own->all, &own->valid, &own->kept}) {
      for (const Counted& f : factors) {
        bool fits = true;
        for (std::size_t e = 0; e < got.size(); ++e)
          fits = fits && static_cast<double>(got[e]) == f.times * static_cast<double>((*counts)[e]);
        if (fits) return name(f.text, f.symbol, f.times);
      }
    }
    return name(sum(got) == sum(own->all) ? "as many, of other experts" : "not the choices of this micro-batch");
  }
  const std::int64_t tokens = t.seen && !m.sampled_tokens ? t.rows(m) : m.tokens;
  if (top_k < 1 || tokens < 1) return;
  const double want = static_cast<double>(top_k * tokens), total = static_cast<double>(sum(got));
  // Padding and drops make it fewer; nothing makes it more.
  if (!r.add(total, total <= want ? total : want, 0.5, ctx->place_of(m))) return;
  for (const Counted& f : factors) {
    if (total == f.times * want) return name(f.text, f.symbol, f.times);
  }
  name("more than every choice once");
}

}  // namespace moeaudit::replay

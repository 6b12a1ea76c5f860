#include "audit/measures/replay/bias.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>

#include "audit/measures/replay/counts.h"

namespace moeaudit::replay {
namespace {

std::vector<double> read_bias(const TensorView& view, std::size_t experts) {
  std::vector<double> bias(experts);
  if (!read_values(view, 0, static_cast<std::int64_t>(experts), bias.data())) bias.clear();
  return bias;
}

/// What the bias would be after the step.
struct Candidate {
  std::string_view id;
  std::string name;
  std::vector<double> bias;  // empty: the trace lacks what it needs
  double updates = 1;        // roundings that it went through
};

/// The bias after the step under one form; empty where the trace lacks what it needs.
std::vector<double> bias_after(const Context& ctx, const v::BiasForm& form, const std::vector<double>& before,
                               int layer, const Counting& how, double rate) {
  std::set<std::int64_t> micro = {-1};
  if (form.per_micro_batch) {
    micro.clear();
    for (const auto& [at, l] : ctx.loads.at(layer)) micro.insert(at.first);
  }
  std::vector<double> bias = before;
  for (const std::int64_t m : micro) {
    const std::vector<double> counts = counts_of(ctx, layer, how, m);
    if (counts.size() != bias.size()) return {};
    k::BiasUpdateArgs a;
    a.bias = bias.data();
    a.counts = counts.data();
    a.experts = static_cast<std::int64_t>(bias.size());
    a.rate = form.rate * rate;
    a.step = form.step;
    a.centre = form.centre;
    a.counts_dtype = form.counts_dtype;
    a.step_dtype = form.step_dtype;
    a.bias_dtype = form.bias_dtype;
    if (k::bias_update(a, bias.data()) != k::Status::kOk) return {};
  }
  return bias;
}

/// All that is right, then all that is wrong, of the layer on the rank.
void candidates(const Context& ctx, int layer, std::int64_t rank, const std::vector<double>& before, double rate,
                std::vector<Candidate>* right, std::vector<Candidate>* wrong) {
  const std::set<std::int64_t> own = {rank};
  const auto forms = v::bias_forms();
  for (v::BiasForm form : forms) {
    Counting how{.padding = form.padding, .kept = form.kept, .evaluation = form.evaluation, .earlier = form.earlier};
    if (form.own_rank) how.ranks = &own;
    const double updates = form.per_micro_batch ? static_cast<double>(ctx.accumulation) : 1;
    const bool centred = form.id == "B18";
    const bool as_stated = !ctx.facts.bias_update_centred || *ctx.facts.bias_update_centred == centred;
    // What is wrong besides is wrong in the run's own way of centring.
    if (!form.id.empty() && ctx.facts.bias_update_centred.value_or(false) && !centred) form.centre = k::Centre::kStep;
    Candidate c{form.id, std::string(form.name), bias_after(ctx, form, before, layer, how, rate), updates};
    if ((form.id.empty() || centred) && as_stated) {
      right->push_back(std::move(c));
      continue;
    }
    if (form.id.empty()) c.id = "B18", c.name = "the mean of the step not taken from it";
    wrong->push_back(std::move(c));
    if (!form.evaluation) continue;
    how.evaluation = false, how.evaluation_before = true;
    wrong->push_back({form.id, std::string(form.name), bias_after(ctx, form, before, layer, how, rate), updates});
  }
  for (const auto& [name, ranks] : rank_groups(ctx, layer, rank))
    wrong->push_back({"B4", name, bias_after(ctx, forms[0], before, layer, {.ranks = &ranks}, rate), 1});
}

v::Name named(std::string_view id, std::string_view name) {
  v::Name n;
  n.found = true, n.id = id, n.name = name;
  return n;
}

/// Those of `a` that are in `b`, too.
std::vector<v::Name> common(const std::vector<v::Name>& a, const std::vector<v::Name>& b) {
  std::vector<v::Name> out;
  for (const v::Name& x : a) {
    if (std::any_of(b.begin(), b.end(), [&](const v::Name& y) { return x.id == y.id && x.name == y.name; }))
      out.push_back(x);
  }
  return out;
}

/// A step that is the right one times a constant.
void name_multiple(const std::vector<double>& before, const std::vector<double>& after,
                   const std::vector<double>& plain, double band, v::Name* name) {
  std::optional<double> ratio;
  for (std::size_t e = 0; e < before.size(); ++e) {
    const double want = plain[e] - before[e], got = after[e] - before[e];
    if (want == 0.0) {
      if (std::fabs(got) > band) return;
      continue;
    }
    if (!ratio) ratio = got / want;
    if (std::fabs(got - *ratio * want) > 2 * band) return;
  }
  if (!ratio || *ratio == 0.0) return;
  name->found = true;
  name->id = "B12";
  name->name = "another rate than the configured one";
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", *ratio);
  name->factor = text;
  name->factor_value = *ratio;
}

}  // namespace

void Biases::read(const StepTensors& tensors) {
  for (const StepLayerTensors& l : tensors.layers) {
    if (!l.correction_bias_before || l.correction_bias_before->shape.empty()) continue;
    const auto n = static_cast<std::size_t>(l.correction_bias_before->shape[0]);
    std::vector<double> bias = read_bias(*l.correction_bias_before, n);
    if (bias.empty()) continue;
    keep(*tensors.record, l.layer, bias, float_of(l.correction_bias_before->dtype));
    ctx_.biases[{tensors.record->rank, l.layer}] = std::move(bias);
  }
}

/// The bias before a step is the one after the step before.
void Biases::keep(const StepRecord& s, int layer, const std::vector<double>& before, Float stored) {
  Row& r = ctx_.row("bias_kept", layer);
  r.held_to = "the bias after the step before";
  if (r.missing.empty()) r.missing = "needs the bias of two steps, one after the other";
  const auto found = last_.find({s.rank, layer});
  if (found == last_.end() || found->second.step + 1 != s.step || found->second.after.size() != before.size()) return;
  const Kept& last = found->second;
  std::size_t at = 0;
  for (std::size_t e = 0; e < before.size(); ++e) {
    if (std::fabs(before[e] - last.after[e]) > std::fabs(before[at] - last.after[at])) at = e;
  }
  const double band = 0.5 * k::spacing(last.after[at], unit(stored) > unit(last.stored) ? stored : last.stored);
  if (!r.add(before[at], last.after[at], band, ctx_.place_of(s))) return;
  const auto every = [&](auto&& same) {
    for (std::size_t e = 0; e < before.size(); ++e) {
      if (!same(e)) return false;
    }
    return true;
  };
  v::Name name;
  if (every([&](std::size_t e) { return before[e] == 0.0; })) {
    name = named("B13", "set back to 0: it was not saved, or not loaded");
  } else if (before == last.before) {
    name = named("B19", "set back to what it was before the last step");
  } else if (every([&](std::size_t e) { return before[e] == k::round_to(last.after[e], Float::kBF16); })) {
    name = named("B19", "rounded to bfloat16 between the steps");
  } else if (every([&](std::size_t e) {
               const double shift = before[0] - last.after[0];
               return std::fabs(before[e] - last.after[e] - shift) <= 4 * k::spacing(last.after[e], stored) + 4 * band;
             })) {
    name = named("B18", "shifted by a constant, which chooses the same experts");
  }
  if (r.differing == 1)
    r.name = name;
  else if (r.name.id != name.id)
    r.name = {};
}

void Biases::step(const StepTensors& tensors) {
  const StepRecord& s = *tensors.record;
  for (const StepLayerTensors& t : tensors.layers) {
    if (!t.correction_bias_before || !t.correction_bias_after) continue;
    const auto before = ctx_.biases.find({s.rank, t.layer});
    if (before == ctx_.biases.end()) continue;
    const Kept moved{s.step, before->second, read_bias(*t.correction_bias_after, before->second.size()),
                     float_of(t.correction_bias_after->dtype)};
    if (moved.after.empty()) continue;
    last_[{s.rank, t.layer}] = moved;
    Row& r = ctx_.row("bias_step", t.layer);
    const TraceLayer* stated = ctx_.facts.layer(t.layer);
    const bool frozen = stated && stated->trainable && !*stated->trainable;
    const bool still = frozen || (ctx_.facts.bias_update_rate && *ctx_.facts.bias_update_rate == 0.0);
    if (still) {
      r.held_to = frozen ? "the bias of a frozen router stays" : "at rate 0 the bias stays";
      name(s, t.layer, moved, 0, true, &r);
    } else if (!ctx_.facts.bias_update_rate) {
      r.missing = "needs coefficients.bias_update_rate in trace.json";
    } else if (ctx_.loads.count(t.layer) == 0) {
      r.missing = "needs selected_experts or tokens_per_expert of every micro-batch";
    } else {
      name(s, t.layer, moved, *ctx_.facts.bias_update_rate, false, &r);
    }
  }
}

void Biases::name(const StepRecord& s, int layer, const Kept& moved, double rate, bool still, Row* r) {
  const std::vector<double>&before = moved.before, &after = moved.after;
  double size = std::fabs(rate);
  for (std::size_t e = 0; e < before.size(); ++e) size = std::max({size, std::fabs(before[e]), std::fabs(after[e])});
  // Two roundings of the dtype that the bias is stored in: of the step, which is added, and of the sum.
  const double band = k::spacing(size, moved.stored) + 2 * unit(Float::kF32) * std::fabs(rate);
  const auto worst = [&](const Candidate& c, std::size_t* where) {
    double most = c.bias.empty() ? kInf : 0;
    for (std::size_t e = 0; e < c.bias.size(); ++e) {
      const double off = std::fabs(c.bias[e] - after[e]) / (c.updates * band);
      if (off > most) most = off, *where = e;
    }
    return most;
  };
  std::vector<Candidate> right, wrong;
  if (still)
    right.push_back({"", r->held_to, before});
  else
    candidates(ctx_, layer, s.rank, before, rate, &right, &wrong);
  // Where centring is left open, the form that fits counts, the plain one first.
  const Candidate* held = &right[0];
  for (const Candidate& c : right) {
    std::size_t ignored = 0;
    if (worst(*held, &ignored) > 1 && worst(c, &ignored) <= 1) held = &c;
  }
  if (held->bias.empty()) return;
  r->held_to = held->name;
  std::size_t at = 0;
  const double off = worst(*held, &at);
  r->add(after[at] - before[at], held->bias[at] - before[at], band, ctx_.place_of(s));
  if (off <= 1) return;

  std::vector<v::Name> fits;
  double nearest = kInf;
  for (const Candidate& c : wrong) {
    std::size_t ignored = 0;
    const double d = worst(c, &ignored);
    if (d <= 1) {
      fits.push_back(named(c.id, c.name));
      fits.back().fit = d;
    } else if (d < nearest) {
      nearest = d, r->name.runner_up = std::string(c.id) + " " + c.name, r->name.runner_up_fit = d;
    }
  }
  if (still) {
    fits = {named("B15", "moved where nothing was to move it")};
  } else if (after == before) {
    fits = {named("B17", "the bias did not move")};
    fits[0].factor = "0", fits[0].factor_value = 0;
    fits[0].also = "B11 counters set back to 0 before they were used";
  } else if (fits.empty()) {
    v::Name times;
    name_multiple(before, after, held->bias, band, &times);
    if (times.found) fits.push_back(times);
  }
  const auto known = fits_.find(layer);
  fits_[layer] = known == fits_.end() ? fits : common(known->second, fits);  // a name must hold in every step
}

void Biases::finish() {
  const std::vector<Row*> rows = ctx_.layers_of("bias_step");
  // One cause in all layers, if there is one; else each has its own.
  std::optional<std::vector<v::Name>> all;
  for (const auto& [layer, fits] : fits_) all = all ? common(*all, fits) : fits;
  for (Row* r : rows) {
    const auto mine = fits_.find(r->layer);
    if (mine == fits_.end()) continue;
    const std::vector<v::Name>& fits = all->empty() ? mine->second : *all;
    if (fits.empty()) continue;
    const v::Name next = r->name;
    r->name = fits[0];
    r->name.runner_up = next.runner_up, r->name.runner_up_fit = next.runner_up_fit;
    for (std::size_t i = 1; i < fits.size(); ++i)
      r->name.also += (r->name.also.empty() ? "" : "; ") + fits[i].id + " " + fits[i].name;
  }
  // A layer that stays while others move was left out.
  const auto unmoved = [](const Row* r) { return r->name.found && r->name.id == "B17"; };
  if (std::all_of(rows.begin(), rows.end(), unmoved)) return;
  for (Row* r : rows) {
    if (!unmoved(r)) continue;
    r->name.id = "B16", r->name.name = "this layer's bias stays while others move";
    r->name.also.clear();
  }
}

}  // namespace moeaudit::replay

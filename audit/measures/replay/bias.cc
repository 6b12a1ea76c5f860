#include "audit/measures/replay/bias.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace moeaudit::replay {

void read_biases(Context* ctx, const StepTensors& tensors) {
  for (const StepLayerTensors& l : tensors.layers) {
    if (!l.correction_bias_before) continue;
    const std::int64_t n = l.correction_bias_before->shape.empty() ? 0 : l.correction_bias_before->shape[0];
    std::vector<double> bias(static_cast<std::size_t>(n));
    if (read_values(*l.correction_bias_before, 0, n, bias.data()))
      ctx->biases[{tensors.record->rank, l.layer}] = std::move(bias);
  }
}

namespace {

std::vector<double> bias_after(const v::BiasForm& form, const std::vector<double>& before, const StepLoads& loads,
                               std::int64_t rank, double rate) {
  std::vector<double> bias = before;
  std::map<std::int64_t, std::vector<double>> counts;  // by micro-batch, or all under 0
  for (const auto& [at, l] : loads) {
    if (form.own_rank && at.second != rank) continue;
    const auto& c = form.padding ? l.all : form.kept ? l.kept : l.valid;
    if (c.size() != before.size()) return {};
    auto& sum = counts[form.per_micro_batch ? at.first : 0];
    sum.resize(before.size());
    for (std::size_t e = 0; e < sum.size(); ++e) sum[e] += static_cast<double>(c[e]);
  }
  for (const auto& [micro, c] : counts) {
    k::BiasUpdateArgs a;
    a.bias = bias.data();
    a.counts = c.data();
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

void name_bias_multiple(const std::vector<double>& before, const std::vector<double>& after,
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

void name_bias(const Context& ctx, const StepRecord& s, const std::vector<double>& before,
               const std::vector<double>& after, const StepLoads& loads, Float stored, Row* r) {
  const double signed_rate = *ctx.facts.bias_update_rate, rate = std::fabs(signed_rate);
  double size = rate;
  for (std::size_t e = 0; e < before.size(); ++e) size = std::max({size, std::fabs(before[e]), std::fabs(after[e])});
  // Two roundings of the dtype that the bias is stored in: of the step, which is added, and of the sum.
  const double band = k::spacing(size, stored) + 2 * unit(Float::kF32) * rate;
  const auto worst = [&](const std::vector<double>& bias, std::size_t* where, double updates = 1) {
    double most = 0;
    for (std::size_t e = 0; e < bias.size(); ++e) {
      const double off = std::fabs(bias[e] - after[e]) / (updates * band);
      if (off > most) most = off, *where = e;
    }
    return bias.empty() ? kInf : most;
  };
  // Where centring cannot be told apart, the first of the right ones counts.
  const auto forms = v::bias_forms();
  std::size_t at = 0;
  const std::vector<double> plain = bias_after(forms[0], before, loads, s.rank, signed_rate);
  double off = worst(plain, &at);
  std::size_t ignored = 0;
  const bool centred =
      off > 1 && std::min(worst(bias_after(forms[1], before, loads, s.rank, signed_rate), &ignored),
                          worst(bias_after(forms[2], before, loads, s.rank, signed_rate), &ignored)) <= 1;
  if (centred) off = 0;
  r->held_to = centred ? forms[1].name : forms[0].name;
  if (plain.empty()) return;
  r->add(centred ? plain[at] - before[at] : after[at] - before[at], plain[at] - before[at], band, ctx.place_of(s));
  if (off <= 1) return;
  v::Name name;
  double nearest = kInf;
  for (const v::BiasForm& form : forms) {
    if (&form == &forms[0]) continue;
    const double d = worst(bias_after(form, before, loads, s.rank, signed_rate), &ignored,
                           form.per_micro_batch ? static_cast<double>(ctx.accumulation) : 1);
    const std::string text = std::string(form.id) + " " + std::string(form.name);
    if (d <= 1 && name.found)
      name.also += (name.also.empty() ? "" : "; ") + text;
    else if (d <= 1)
      name.found = true, name.id = form.id, name.name = form.name, name.fit = d;
    else if (d < nearest)
      nearest = d, name.runner_up = text, name.runner_up_fit = d;
  }
  if (after == before) {
    name.found = true, name.id = "B17", name.name = "the bias did not move", name.fit = 0, name.factor = "0",
    name.factor_value = 0;
  } else if (!name.found) {
    name_bias_multiple(before, after, plain, band, &name);
  }
  // A name must hold in every step: the same again, or none.
  if (!r->name.found && r->name.runner_up.empty())
    r->name = name;
  else if (r->name.id != name.id)
    r->name.found = false;
}

}  // namespace

void replay_bias(Context* ctx, const StepTensors& tensors) {
  const StepRecord& s = *tensors.record;
  for (const StepLayerTensors& t : tensors.layers) {
    if (!t.correction_bias_before || !t.correction_bias_after) continue;
    const auto before = ctx->biases.find({s.rank, t.layer});
    if (before == ctx->biases.end()) continue;
    const auto n = static_cast<std::int64_t>(before->second.size());
    std::vector<double> after(before->second.size());
    if (!read_values(*t.correction_bias_after, 0, n, after.data())) continue;
    Row& r = ctx->row("bias_step", t.layer);
    const auto loads = ctx->loads.find(t.layer);
    if (!ctx->facts.bias_update_rate) {
      r.missing = "needs coefficients.bias_update_rate in trace.json";
      continue;
    }
    if (loads == ctx->loads.end()) {
      r.missing = "needs selected_experts or tokens_per_expert of every micro-batch";
      continue;
    }
    name_bias(*ctx, s, before->second, after, loads->second, float_of(t.correction_bias_after->dtype), &r);
  }
}

}  // namespace moeaudit::replay

#include "audit/measures/replay/gradients.h"

#include <algorithm>
#include <cmath>

#include "kernels/host/bounds.h"
#include "kernels/host/router_backward.h"

namespace moeaudit::replay {

namespace {

constexpr std::size_t kSplit = 8;  // micro-batches whose logits' gradient is split

/// How far of_logits() may be off: by `rounded` relative to the magnitudes of its terms (those of route_backward_relative()
/// in bounds.h), and by slopes of which each is known up to `tied`.
std::vector<double> band_of(const v::RoutedLayer& l, const std::vector<double>& by_expert, double rounded, double tied) {
  std::vector<double> out(l.logits.size());
  for (std::int64_t t = 0; t < l.tokens; ++t) {
    if (!l.valid.empty() && !l.valid[static_cast<std::size_t>(t)]) continue;
    const double* x = l.logits.data() + t * l.experts;
    double* band = out.data() + t * l.experts;
    const double largest = *std::max_element(x, x + l.experts);
    double sum = 0, mean = 0;
    for (std::int64_t e = 0; e < l.experts; ++e) sum += band[e] = std::exp(x[e] - largest);
    for (std::int64_t e = 0; e < l.experts; ++e) mean += by_expert[static_cast<std::size_t>(e)] * (band[e] /= sum);
    for (std::int64_t e = 0; e < l.experts; ++e) {
      const double capped = l.softcap > 0 ? x[e] / l.softcap : 0;
      band[e] *= (rounded * (by_expert[static_cast<std::size_t>(e)] + mean) + 2 * tied) * l.times * (1 + capped * capped);
    }
  }
  return out;
}

/// Softmax, its backward and the sum of the gradients of both losses round each term a few times.
double roundings(const LayerTensors& t, const v::RoutedLayer& l) {
  double sum = 64 * unit(Float::kF32) + 4 * std::expm1(2 * l.logit_error);
  for (const auto& tensor : {t.logits_grad, t.router_logits}) {
    if (tensor && k::is_narrow(float_of(tensor->dtype))) sum += 4 * unit(float_of(tensor->dtype));
  }
  return sum;
}

/// d balance loss / d logits of one layer, where expert e has the slope `by_expert` in every token's probability.
std::vector<double> of_logits(const v::RoutedLayer& l, const std::vector<double>& by_expert) {
  std::vector<double> slopes(l.logits.size()), out(l.logits.size());
  for (std::int64_t t = 0; t < l.tokens; ++t) {
    if (l.valid.empty() || l.valid[static_cast<std::size_t>(t)])
      std::copy(by_expert.begin(), by_expert.end(), slopes.begin() + t * l.experts);
  }
  k::RouteBackwardArgs<double> a;
  a.forward.logits = l.logits.data();
  a.forward.tokens = l.tokens;
  a.forward.experts = l.experts;
  a.forward.top_k = l.top_k;
  a.scores = slopes.data();
  if (k::route_backward(a, out.data()) != k::Status::kOk) out.clear();
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double t = l.softcap > 0 ? l.logits[i] / l.softcap : 0;  // the trace's gradient is that of the product, before the cap
    out[i] *= l.times * (1 - t * t);
  }
  return out;
}

}  // namespace

void Gradients::read(const StepTensors& tensors) {
  for (const StepLayerTensors& t : tensors.layers) {
    const TraceLayer* stated = ctx_.facts.layer(t.layer);
    if (stated && stated->trainable && !*stated->trainable) continue;
    const auto largest = [&](const TensorView& g) {
      std::int64_t n = 1;
      for (const std::int64_t d : g.shape) n *= d;
      std::vector<double> values(static_cast<std::size_t>(n));
      double most = 0;
      if (!read_values(g, 0, n, values.data())) return kNan;
      for (const double x : values) {
        if (std::isnan(x)) return kNan;
        most = std::max(most, std::fabs(x));
      }
      return most;
    };
    const auto judge = [&](std::string_view quantity, const TensorView& g) {
      const double most = largest(g);
      if (std::isnan(most)) return;
      Row& r = ctx_.row(quantity, t.layer);
      if (most == 0.0 && !ctx_.may_be_zero.empty()) {
        r.missing = "a gradient of 0 says nothing: " + ctx_.may_be_zero;
        return;
      }
      ++r.compared;
      r.held_to = "a gradient that is not zero";
      r.differing += most == 0.0;
      if (r.compared == 1 || most == 0.0) r.place = ctx_.place_of(*tensors.record);
      r.recorded = r.compared == 1 ? most : std::min(r.recorded, most);
    };
    if (t.router_grad) judge("router_grad", *t.router_grad);
    if (t.router_grad_ce) judge("router_grad_ce", *t.router_grad_ce);
    if (t.router_grad_aux) wanted_.insert(t.layer);
  }
}

/// What the balance loss puts on the logits of a micro-batch is known: its slope in every probability is E f_e / rows, for every
/// time that it counts them.
void Gradients::add(const MicroBatch& mb, const Shared& shared) {
  const MicroBatchRecord& m = *mb.record;
  if (!Context::trains(m) || m.sampled_tokens || !m.aux_loss || mb.layers.size() != ctx_.facts.layers.size() ||
      ctx_.balance != v::BalanceFamily::kTransformers)
    return;
  const bool splits = m.aux_loss_grad && *m.aux_loss_grad != 0.0 && split_ < kSplit &&
                      std::any_of(mb.layers.begin(), mb.layers.end(), [](const auto& t) { return t.logits_grad; });
  if (!splits && wanted_.empty()) return;
  v::BalanceSum loss(v::held_to(ctx_.balance));
  for (const LayerTensors& t : mb.layers) {
    v::RoutedLayer l;
    if (t.saw_nothing()) continue;
    if (!ctx_.read_layer(m, shared, t, &l)) return;
    loss.add(l);
  }
  // Of another formula than the framework's nothing is known.
  const double off = ctx_.balance_known ? 1e-2 : 1e-4;
  if (loss.rows() < 1 || !(std::fabs(loss.value() - *m.aux_loss) <= off * std::fabs(*m.aux_loss))) return;
  std::vector<double> slopes;
  const auto rows = static_cast<double>(loss.rows()), experts = static_cast<double>(loss.counts().size());
  for (const std::int64_t c : loss.counts()) slopes.push_back(experts * static_cast<double>(c) / rows / rows);
  const double tied = experts * loss.tied() / rows / rows;
  split_ += splits ? 1 : 0;
  for (const LayerTensors& t : mb.layers) {
    v::RoutedLayer l;
    if (t.saw_nothing()) continue;
    if (!ctx_.read_layer(m, shared, t, &l)) return;
    const std::vector<double> of_balance = of_logits(l, slopes);
    if (of_balance.empty()) return;
    if (splits && t.logits_grad) split(m, t, of_balance, band_of(l, slopes, roundings(t, l), tied));
    if (wanted_.count(t.layer) > 0 && t.hidden_states) sum(m, t, of_balance);
  }
}

/// The gradient of the logits less the balance loss's part is the cross-entropy's; 0 everywhere, up to what the balance
/// loss's own part is rounded by: there is none.
void Gradients::split(const MicroBatchRecord& m, const LayerTensors& t, const std::vector<double>& of_balance,
                      const std::vector<double>& band) {
  const TraceLayer* stated = ctx_.facts.layer(t.layer);
  if (stated && stated->trainable && !*stated->trainable) return;
  std::vector<double> all(of_balance.size());
  if (!read_values(*t.logits_grad, 0, static_cast<std::int64_t>(all.size()), all.data())) return;
  const double weight = *m.aux_loss_grad;
  const double least = 4 * k::bounds::smallest(float_of(t.logits_grad->dtype));
  double rest = 0;  // of what is no rounding
  bool within = true;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const double off = std::fabs(all[i] - weight * of_balance[i]);
    within = within && off <= std::fabs(weight) * band[i] + least;
    rest = std::max(rest, off);
  }
  Row& r = ctx_.row("router_grad_ce", t.layer);
  if (within && !ctx_.may_be_zero.empty()) {
    r.missing = "a gradient of 0 says nothing: " + ctx_.may_be_zero;
    return;
  }
  ++r.compared;
  r.held_to = "a gradient beside the balance loss's";
  r.differing += within;
  if (r.compared == 1 || within) r.place = ctx_.place_of(m);
  if (within && ctx_.routing && ctx_.routing->renormalise && stated && stated->top_k == 1) {
    r.name.found = true, r.name.id = "W5";
    r.name.name = "one expert a token, its weight divided by itself: 1 whatever the logits";
  }
  const double shown = within ? 0.0 : rest;
  r.recorded = r.compared == 1 ? shown : std::min(r.recorded, shown);
}

void Gradients::sum(const MicroBatchRecord& m, const LayerTensors& t, const std::vector<double>& of_balance) {
  const std::int64_t tokens = t.hidden_states->shape[0], d = t.hidden_states->shape[1];
  std::vector<double> x(static_cast<std::size_t>(tokens * d));
  if (!read_values(*t.hidden_states, 0, tokens * d, x.data())) return;
  const auto add = [&](std::vector<double>* to, const std::vector<double>& d_logits,
                       const std::vector<double>& inputs) {
    std::vector<double> w(static_cast<std::size_t>(t.experts * d));
    k::GateBackwardArgs<double> a;
    a.d_logits = d_logits.data();
    a.x = inputs.data();
    a.tokens = tokens, a.hidden = d, a.experts = t.experts;
    if (k::gate_backward(a, w.data(), nullptr) != k::Status::kOk) return;
    to->resize(w.size());
    for (std::size_t i = 0; i < w.size(); ++i) (*to)[i] += w[i];
  };
  Part& p = parts_[{m.rank, t.layer}];
  if (p.hidden != 0 && p.hidden != d) return;
  p.hidden = d;
  ++p.micro_batches;
  p.tokens += static_cast<double>(tokens);
  for (const DType stored : {t.hidden_states->dtype, t.router_logits->dtype}) {
    if (unit(float_of(stored)) > unit(p.dtype)) p.dtype = float_of(stored);
  }
  add(&p.gradient, of_balance, x);
  std::vector<double> sizes = of_balance;
  for (double& v : sizes) v = std::fabs(v);
  for (double& v : x) v = std::fabs(v);
  add(&p.absolute, sizes, x);
}

void Gradients::step(const std::vector<StepTensors>& of_ranks) {
  const std::size_t ranks = of_ranks.size();
  const bool all_ranks = !ctx_.facts.world_size || static_cast<std::int64_t>(ranks) == *ctx_.facts.world_size;
  for (const StepTensors& tensors : of_ranks) {
    for (const StepLayerTensors& t : tensors.layers) {
      if (!t.router_grad_aux || !ctx_.facts.aux_coefficient || !(*ctx_.facts.aux_coefficient > 0)) continue;
      Row& r = ctx_.row("router_grad_aux", t.layer);
      r.held_to = "coefficient, of the mean over micro-batches and ranks";
      if (r.missing.empty())
        r.missing = "needs hidden_states, router_logits and aux_loss of every micro-batch, by transformers' formula";
      std::vector<double> want, size, got;
      double tokens = 0;
      Float dtype = float_of(t.router_grad_aux->dtype);
      bool whole = true;
      for (const StepTensors& of : of_ranks) {
        if (!all_ranks && of.record->rank != tensors.record->rank) continue;
        const auto found = parts_.find({of.record->rank, t.layer});
        whole = whole && found != parts_.end() && found->second.micro_batches == ctx_.accumulation;
        if (!whole) break;
        const Part& p = found->second;
        want.resize(p.gradient.size()), size.resize(p.gradient.size());
        if (want.size() != p.gradient.size()) break;
        const double weight = *ctx_.facts.aux_coefficient / static_cast<double>(p.micro_batches) /
                              (all_ranks ? static_cast<double>(ranks) : 1);
        for (std::size_t i = 0; i < want.size(); ++i) {
          want[i] += weight * p.gradient[i];
          size[i] += weight * p.absolute[i];
        }
        tokens += p.tokens;
        if (unit(p.dtype) > unit(dtype)) dtype = p.dtype;
      }
      got.resize(want.size());
      if (!whole || !read_values(*t.router_grad_aux, 0, static_cast<std::int64_t>(got.size()), got.data())) continue;
      double dot = 0, square = 0, got_square = 0, rest = 0, slack = 0;
      for (std::size_t i = 0; i < want.size(); ++i)
        dot += got[i] * want[i], square += want[i] * want[i], got_square += got[i] * got[i], slack += size[i] * size[i];
      if (!(square > 0)) continue;
      const double ratio = dot / square;
      for (std::size_t i = 0; i < want.size(); ++i) rest += std::pow(got[i] - ratio * want[i], 2);
      const double band = (reduction(tokens) + 64 * unit(Float::kF32) + 4 * (k::is_narrow(dtype) ? unit(dtype) : 0)) *
                          std::sqrt(slack / square);
      const bool multiple = got_square == 0.0 || std::sqrt(rest / got_square) <= 2 * band;
      r.observe(ratio, 1.0, multiple ? band : kNan, ctx_.place_of(*tensors.record));
    }
  }
  wanted_.clear();
  parts_.clear();
}

void Gradients::finish() {
  for (Row* r : ctx_.layers_of("router_grad_aux")) {
    if (r->differing == 0) continue;
    const std::vector<v::Formula> formulas = {{"", r->held_to, r->all_expected}};
    r->name =
        v::name_formula("router_grad_aux", {r->all_recorded, r->all_band}, formulas, v::factors_of(ctx_.symbols(true)));
  }
}

}  // namespace moeaudit::replay

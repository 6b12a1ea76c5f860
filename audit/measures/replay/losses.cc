#include "audit/measures/replay/losses.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

namespace moeaudit::replay {

void StepLosses::add(const MicroBatch& mb) {
  const MicroBatchRecord& m = *mb.record;
  if (!mb.token_loss || !mb.label_mask || m.sampled_tokens) return;
  std::vector<double> loss(static_cast<std::size_t>(m.rows()));
  std::vector<std::uint8_t> mask(loss.size());
  if (!read_values(*mb.token_loss, 0, m.rows(), loss.data()) || !read_flags(*mb.label_mask, 0, m.rows(), mask.data()))
    return;
  TokenLoss t;
  for (std::size_t i = 0; i < loss.size(); ++i) {
    if (!mask[i]) continue;
    t.sum += loss[i];
    ++t.labels;
  }
  token_losses_[&m] = t;
}

void StepLosses::add(const TraceStep& s) {
  Step l;
  std::set<std::int64_t> ranks;
  for (const MicroBatchRecord& m : ctx_.trace.micro_batches_of(s)) {
    if (!Context::trains(m)) continue;
    l.micro_batches.push_back(&m);
    ranks.insert(m.rank);
  }
  l.all_ranks = !ctx_.facts.world_size || static_cast<std::int64_t>(ranks.size()) == *ctx_.facts.world_size;
  if (!l.micro_batches.empty()) steps_.push_back(std::move(l));
}

double StepLosses::divisor(const MicroBatchRecord& m, Divided d) const {
  const auto it = token_losses_.find(&m);
  if (d == Divided::kItems) return m.num_items_in_batch ? static_cast<double>(*m.num_items_in_batch) : kNan;
  return it == token_losses_.end() ? kNan : static_cast<double>(it->second.labels);
}

void StepLosses::finish() {
  std::optional<Divided> divided;
  Row in_loss;
  in_loss.missing = "needs token_loss, label_mask and returned_loss of every micro-batch";
  for (const Divided d : {Divided::kItems, Divided::kLabels}) {
    Row r = try_returned_loss(d);
    if (r.compared == 0) continue;
    if (!divided || (r.name.found && !in_loss.name.found && in_loss.differing > 0) ||
        (r.differing == 0 && in_loss.differing > 0)) {
      divided = d;
      in_loss = std::move(r);
    }
  }
  const bool any_aux = std::any_of(ctx_.trace.micro_batches().begin(), ctx_.trace.micro_batches().end(),
                                   [](const MicroBatchRecord& m) { return m.aux_loss.has_value(); });
  if (any_aux && divided) ctx_.row("aux_in_loss") = in_loss;
  if (divided) loss_weights(*divided);
  aux_weights();
}

Row StepLosses::try_returned_loss(Divided d) const {
  Row r;
  r.quantity = "aux_in_loss";
  r.held_to = "the model's loss = cross-entropy + coefficient x aux_loss";
  bool fits_without = true;
  for (const Step& s : steps_) {
    for (const MicroBatchRecord* m : s.micro_batches) {
      const auto it = token_losses_.find(m);
      const double by = divisor(*m, d);
      if (it == token_losses_.end() || !(by > 0) || !m->returned_loss || it->second.labels == 0) continue;
      const double ce = it->second.sum / by;
      if (!std::isfinite(ce + *m->returned_loss + m->aux_loss.value_or(0))) continue;  // finite_losses says so
      const double error = (reduction(static_cast<double>(it->second.labels)) + 6 * unit(Float::kF32)) *
                           std::max(std::fabs(ce), std::fabs(*m->returned_loss));
      if (!m->aux_loss || *m->aux_loss == 0 || !ctx_.facts.aux_coefficient || *ctx_.facts.aux_coefficient == 0) {
        fits_without = fits_without && std::fabs(*m->returned_loss - ce) <= error;
        ++r.compared;
        r.differing += std::fabs(*m->returned_loss - ce) > error;
        continue;
      }
      const double one = *ctx_.facts.aux_coefficient * *m->aux_loss;
      const double n = (*m->returned_loss - ce) / one;
      // A number near 0 has no relative band: it is 0 if it lies within the absolute one.
      const double band = error / std::fabs(one) + 4 * unit(Float::kF32);
      r.observe(std::fabs(n) <= band ? 0.0 : n, 1.0, band / std::max(std::fabs(n), 1.0), ctx_.place_of(*m));
    }
  }
  if (r.differing > 0 && !r.all_recorded.empty()) {
    const std::vector<v::Formula> formulas = {{"", r.held_to, r.all_expected}};
    r.name = v::name_formula("aux_in_loss", {r.all_recorded, r.all_band}, formulas, v::factors_of(ctx_.symbols(true)));
  }
  return r;
}

void StepLosses::loss_weights(Divided d) {
  Row& r = ctx_.row("loss_weight");
  r.held_to = v::normalisation_forms()[0].name;
  r.missing = "needs loss_grad of every micro-batch, and the records of all ranks";
  std::vector<v::Formula> formulas;
  for (const v::NormalisationForm& f : v::normalisation_forms())
    formulas.push_back({std::string(f.id), std::string(f.name), {}});
  formulas.push_back({"G0", "divided by num_items_in_batch, which is not the labels of the step", {}});
  for (const Step& s : steps_) {
    if (!s.all_ranks) continue;
    std::map<std::int64_t, std::vector<const MicroBatchRecord*>> by_rank;
    bool sound = true;
    for (const MicroBatchRecord* m : s.micro_batches) {
      by_rank[m->rank].push_back(m);
      sound = sound && m->loss_grad && token_losses_.count(m) && divisor(*m, d) > 0;
    }
    const auto ranks = static_cast<std::int64_t>(by_rank.size());
    const std::size_t micro = by_rank.empty() ? 0 : by_rank.begin()->second.size();
    for (const auto& [rank, list] : by_rank) sound = sound && list.size() == micro;
    if (!sound || micro == 0) continue;
    std::vector<double> sums, recorded;
    std::vector<std::int64_t> labels;
    for (const auto& [rank, list] : by_rank) {
      for (const MicroBatchRecord* m : list) {
        const TokenLoss& t = token_losses_.at(m);
        sums.push_back(t.sum);
        labels.push_back(t.labels);
        recorded.push_back(*m->loss_grad / divisor(*m, d) /
                           static_cast<double>(ranks));  // DDP takes the mean of the gradients
      }
    }
    const auto all = static_cast<double>(std::accumulate(labels.begin(), labels.end(), std::int64_t{0}));
    if (all == 0) continue;
    std::vector<std::vector<double>> values;
    for (const v::NormalisationForm& f : v::normalisation_forms()) {
      double loss = 0;
      std::vector<double> weight(sums.size(), kNan);
      k::normalise(f.how, sums.data(), labels.data(), ranks, static_cast<std::int64_t>(micro), &loss, weight.data());
      values.push_back(std::move(weight));
    }
    std::size_t i = 0;
    for (const auto& [rank, list] : by_rank) {
      for (const MicroBatchRecord* m : list) {
        if (labels[i] > 0) {
          r.observe(recorded[i] * all, values[0][i] * all, 8 * unit(Float::kF32), ctx_.place_of(*m));
          for (std::size_t f = 0; f < values.size(); ++f) formulas[f].values.push_back(values[f][i] * all);
          const double items = divisor(*m, Divided::kItems);
          formulas[values.size()].values.push_back(items != all ? all / items : kNan);
        }
        ++i;
      }
    }
  }
  if (r.compared > 0 && r.differing > 0) {
    r.name = v::name_formula("loss_weight", {r.all_recorded, r.all_band}, formulas, v::factors_of(ctx_.symbols(true)));
    if (r.name.found && r.name.factor_value > 0) loss_factor_ = r.name.factor_value;
  }
}

/// Weight of the balance loss in what was back-propagated, over coefficient x the mean over micro-batches and ranks,
/// relative to the cross-entropy's. Coefficient 0: the weight itself.
void StepLosses::aux_weights() {
  if (!ctx_.facts.aux_coefficient || !(*ctx_.facts.aux_coefficient >= 0)) return;
  const double coefficient = *ctx_.facts.aux_coefficient;
  const auto& all = ctx_.trace.micro_batches();
  if (coefficient == 0.0 &&
      std::none_of(all.begin(), all.end(), [](const MicroBatchRecord& m) { return m.aux_loss_grad.has_value(); }))
    return;
  Row& r = ctx_.row("aux_weight");
  r.held_to = coefficient > 0 ? "coefficient, of the mean over micro-batches and ranks" : "coefficient 0: none";
  r.missing = std::any_of(all.begin(), all.end(), [](const MicroBatchRecord& m) { return m.aux_loss.has_value(); })
                  ? "needs aux_loss_grad of every micro-batch"
                  : "no micro-batch has an aux_loss: the model computed no balance loss, or did not return it";
  v::Formula last{"G10", "with the scale of the last micro-batch for all", {}, true};
  for (const Step& s : steps_) {
    double sum = 0, labels = 0, of_last = 0;
    std::set<std::int64_t> ranks;
    bool sound = true;
    for (const MicroBatchRecord* m : s.micro_batches) {
      ranks.insert(m->rank);
      if (m->aux_loss_grad)
        sum += *m->aux_loss_grad;
      else
        sound = sound && m->aux_loss_requires_grad && !*m->aux_loss_requires_grad;
      const double n = m->label_tokens ? static_cast<double>(*m->label_tokens) : kNan;
      labels += n;
      if (m->micro_batch == s.micro_batches.back()->micro_batch) of_last += n;
    }
    if (s.micro_batches.front()->aux_loss_grad && !s.micro_batches.front()->aux_loss) sound = false;
    if (!sound) {
      if (ctx_.facts.output_router_logits && !*ctx_.facts.output_router_logits)
        r.missing = "no balance loss was computed: output_router_logits is false";
      continue;
    }
    const double n = sum / (coefficient > 0 ? coefficient : 1) / static_cast<double>(ranks.size()) / loss_factor_;
    const double band = (static_cast<double>(s.micro_batches.size()) + 6) * unit(Float::kF32);
    r.observe(n, coefficient > 0 ? 1.0 : 0.0, band, ctx_.place_of(*s.micro_batches.front()));
    last.values.push_back(of_last * static_cast<double>(s.micro_batches.size()) / static_cast<double>(ranks.size()) /
                          labels);
  }
  if (r.differing == 0) return;
  if (coefficient == 0.0) {
    r.name.found = true, r.name.id = "G13", r.name.name = "back-propagated though its coefficient is 0";
    return;
  }
  const std::vector<v::Formula> formulas = {{"", r.held_to, r.all_expected}, last};
  r.name = v::name_formula("aux_weight", {r.all_recorded, r.all_band}, formulas, v::factors_of(ctx_.symbols(true)));
}

}  // namespace moeaudit::replay

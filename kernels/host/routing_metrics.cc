#include "kernels/host/routing_metrics.h"

#include <algorithm>
#include <vector>

#include "kernels/host/elementary.h"

namespace moeaudit::kernels {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }
double ratio(std::int64_t a, std::int64_t b) { return static_cast<double>(a) / static_cast<double>(b); }

template <class T>
Status margins(const MarginArgs<T>& a, const MarginResult& r) {
  if (const Status status = check_margins(a, r); status != Status::kOk) return status;
  for (std::int64_t i = 0; i < a.tokens * a.top_k; ++i) {
    if (a.chosen[i] >= a.experts) return Status::kBadShape;
  }
  MarginCounts c;
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    const TokenMargin m = token_margin(a, t);
    if (r.margin != nullptr) r.margin[t] = m.margin;
    if (a.valid != nullptr && a.valid[t] == 0) continue;
    ++c.tokens;
    c.near_ties += m.near;
    c.ties += m.margin == 0.0;
    c.inverted += m.margin < 0.0;
    c.nan += m.margin != m.margin;
  }
  *r.counts = c;
  return Status::kOk;
}

/// Row and column sums of a table; false for a negative count.
struct Sums {
  std::vector<std::int64_t> rows, columns;
  std::int64_t all = 0;
};
bool add_up(const std::int64_t* table, std::int64_t rows, std::int64_t columns, Sums* s) {
  s->rows.assign(size(rows), 0);
  s->columns.assign(size(columns), 0);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t n = table[r * columns + c];
      if (n < 0) return false;
      s->rows[size(r)] += n;
      s->columns[size(c)] += n;
      s->all += n;
    }
  }
  return true;
}

/// Means that leave NaN out.
struct Mean {
  double sum = 0;
  std::int64_t n = 0;
  void add(double v) {
    if (v == v) sum += v, ++n;
  }
  double value() const { return n == 0 ? kNan : sum / static_cast<double>(n); }
};

}  // namespace

Status routing_margins(const MarginArgs<float>& a, const MarginResult& r) { return margins(a, r); }
Status routing_margins(const MarginArgs<double>& a, const MarginResult& r) { return margins(a, r); }

Status order_statistics(const double* values, const std::uint8_t* valid, std::int64_t n, const double* shares,
                        std::int64_t count, double* out) {
  if (n < 0 || count < 0) return Status::kBadShape;
  if ((n > 0 && values == nullptr) || (count > 0 && (shares == nullptr || out == nullptr))) return Status::kNullPointer;
  std::vector<double> sorted;
  for (std::int64_t i = 0; i < n; ++i) {
    if ((valid == nullptr || valid[i] != 0) && values[i] == values[i]) sorted.push_back(values[i]);
  }
  std::sort(sorted.begin(), sorted.end());
  for (std::int64_t i = 0; i < count; ++i) {
    if (!(shares[i] >= 0.0 && shares[i] <= 1.0)) return Status::kBadOption;
    out[i] =
        sorted.empty() ? kNan : sorted[static_cast<std::size_t>(shares[i] * static_cast<double>(sorted.size() - 1))];
  }
  return Status::kOk;
}

Status ratio_interval(const double* above, const double* below, std::int64_t blocks, std::int64_t draws,
                      std::uint64_t seed, Interval* out) {
  if (blocks < 2 || blocks >= (std::int64_t{1} << 31) || draws < 40) return Status::kBadShape;
  if (above == nullptr || below == nullptr || out == nullptr) return Status::kNullPointer;
  std::vector<double> ratios;
  for (std::int64_t d = 0; d < draws; ++d) {
    double over = 0, under = 0;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t drawn = drawn_block(seed, d * blocks + b, blocks);
      over += above[drawn];
      under += below[drawn];
    }
    ratios.push_back(over / under);
  }
  const double shares[] = {0.025, 0.975};
  double ends[2];
  const Status status =
      order_statistics(ratios.data(), nullptr, static_cast<std::int64_t>(ratios.size()), shares, 2, ends);
  *out = {ends[0], ends[1]};
  return status;
}

Status check_agreement(const AgreementArgs& a, const std::int64_t* table, const AgreementCounts* counts) {
  if (a.tokens < 0) return Status::kBadShape;
  if (a.now_k < 1 || a.reference_k < 1) return Status::kBadTopK;
  const bool some = a.tokens > 0 && (a.now == nullptr || a.reference == nullptr);
  return table == nullptr || counts == nullptr || some ? Status::kNullPointer : Status::kOk;
}

Status count_agreement(const AgreementArgs& a, std::int64_t* table, AgreementCounts* counts) {
  if (const Status status = check_agreement(a, table, counts); status != Status::kOk) return status;
  std::fill_n(table, agreement_rows(a) * agreement_columns(a), std::int64_t{0});
  AgreementCounts c;
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    if (a.valid != nullptr && a.valid[t] == 0) continue;
    const TokenAgreement s = token_agreement(a, t);
    if (s.shared >= agreement_rows(a)) return Status::kBadShape;  // an id twice in a set
    ++c.tokens;
    c.same_first += s.same_first;
    c.chosen_now += s.now;
    c.chosen_then += s.then;
    ++table[s.shared * agreement_columns(a) + (s.now + s.then - s.shared)];
  }
  *counts = c;
  return Status::kOk;
}

Status agreement(const AgreementArgs& a, const std::int64_t* table, const AgreementCounts& counts, std::int64_t experts,
                 Agreement* out) {
  if (const Status status = check_agreement(a, table, &counts); status != Status::kOk) return status;
  if (out == nullptr) return Status::kNullPointer;
  if (a.now_k > experts || a.reference_k > experts) return Status::kBadTopK;
  std::int64_t shared = 0, identical = 0, some = 0;
  double jaccard = 0;
  for (std::int64_t s = 0; s < agreement_rows(a); ++s) {
    for (std::int64_t u = 0; u < agreement_columns(a); ++u) {
      const std::int64_t n = table[s * agreement_columns(a) + u];
      shared += s * n;
      identical += s == u ? n : 0;
      some += u > 0 ? n : 0;
      if (n > 0 && u > 0) jaccard += static_cast<double>(n) * ratio(s, u);
    }
  }
  *out = {};
  out->saturation = ratio(shared, counts.chosen_then);
  out->changed = 1.0 - out->saturation;
  out->jaccard = jaccard / static_cast<double>(some);
  out->identical = ratio(identical, counts.tokens);
  out->same_first = ratio(counts.same_first, counts.tokens);
  out->saturation_chance = ratio(a.now_k, experts);
  out->same_first_chance = ratio(1, experts);
  // Hypergeometric weights by their ratio, from the least |A and B| that there can be, 1 for it.
  double weight = 1, sum = 0, mean = 0;
  for (std::int64_t s = std::max<std::int64_t>(0, a.now_k + a.reference_k - experts); s < agreement_rows(a); ++s) {
    sum += weight;
    mean += weight * ratio(s, a.now_k + a.reference_k - s);
    weight *= ratio((a.now_k - s) * (a.reference_k - s), (s + 1) * (experts - a.now_k - a.reference_k + s + 1));
  }
  out->jaccard_chance = mean / sum;
  return Status::kOk;
}

Status count_settled(const SettlingArgs& a, std::int64_t* tokens_settled) {
  if (const Status status = check_settling(a, tokens_settled); status != Status::kOk) return status;
  std::fill_n(tokens_settled, a.checkpoints, std::int64_t{0});
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    if (a.valid == nullptr || a.valid[t] != 0) ++tokens_settled[settled_at(a, t)];
  }
  return Status::kOk;
}

Status count_by_label(const CountArgs<std::int32_t>& a, const std::int32_t* labels, std::int64_t num_labels,
                      std::int64_t* table, std::int64_t* outside) {
  if (const Status status = check_count_by_label(a, labels, num_labels, table, outside); status != Status::kOk)
    return status;
  std::fill_n(table, num_labels * a.experts, std::int64_t{0});
  *outside = 0;
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    if (a.valid != nullptr && a.valid[t] == 0) continue;
    const bool known = labels[t] >= 0 && labels[t] < num_labels;
    for (std::int64_t j = 0; j < a.top_k; ++j) {
      const std::int32_t e = a.chosen[t * a.top_k + j];
      if (known && e >= 0 && e < a.experts)
        ++table[labels[t] * a.experts + e];
      else
        ++*outside;
    }
  }
  return Status::kOk;
}

Status dependence(const std::int64_t* table, std::int64_t labels, std::int64_t experts, std::int64_t top_k,
                  Dependence* out) {
  if (labels < 1 || experts < 1) return Status::kBadShape;
  if (top_k < 1 || top_k > experts) return Status::kBadTopK;
  if (table == nullptr || out == nullptr) return Status::kNullPointer;
  Sums s;
  if (!add_up(table, labels, experts, &s)) return Status::kBadShape;
  *out = {};
  out->choices = s.all;
  out->labels_seen = std::count_if(s.rows.begin(), s.rows.end(), [](auto n) { return n > 0; });
  out->experts_seen = std::count_if(s.columns.begin(), s.columns.end(), [](auto n) { return n > 0; });
  const double all = static_cast<double>(s.all);
  for (std::int64_t l = 0; l < labels; ++l) {
    double row = 0;
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t n = table[l * experts + e];
      if (n > 0)
        row += ratio(n, s.all) * log_exact_order(static_cast<double>(n) / static_cast<double>(s.rows[size(l)]) *
                                                 (all / static_cast<double>(s.columns[size(e)])));
    }
    out->mutual_information += row;
  }
  for (const std::int64_t n : s.columns) {
    if (n > 0) out->expert_entropy -= ratio(n, s.all) * log_exact_order(ratio(n, s.all));
  }
  if (s.all == 0) out->mutual_information = out->expert_entropy = kNan;
  out->explained = out->mutual_information / out->expert_entropy;
  out->chance = static_cast<double>(out->labels_seen - 1) *
                static_cast<double>(std::max<std::int64_t>(0, out->experts_seen - top_k)) / (2.0 * all);
  if (s.all == 0) out->chance = kNan;
  return Status::kOk;
}

Status lift(const std::int64_t* table, std::int64_t rows, std::int64_t columns, LiftOver over, double* out) {
  if (rows < 1 || columns < 1) return Status::kBadShape;
  if (table == nullptr || out == nullptr) return Status::kNullPointer;
  Sums s;
  if (!add_up(table, rows, columns, &s)) return Status::kBadShape;
  for (std::int64_t i = 0; i < rows * columns; ++i) {
    const double one_over_share =
        over == LiftOver::kEven ? static_cast<double>(columns) : ratio(s.all, s.columns[size(i % columns)]);
    out[i] = ratio(table[i], s.rows[size(i / columns)]) * one_over_share;
  }
  return Status::kOk;
}

Status co_activation_rates(const std::int64_t* together, std::int64_t experts, std::int64_t top_k, std::int64_t tokens,
                           double* rate, double* lift, CoActivation* chance) {
  if (experts < 1 || tokens < 0) return Status::kBadShape;
  if (top_k < 1 || top_k > experts) return Status::kBadTopK;
  if (together == nullptr || chance == nullptr) return Status::kNullPointer;
  for (std::int64_t i = 0; i < experts; ++i) {
    for (std::int64_t j = 0; j < experts; ++j) {
      const std::int64_t at = i * experts + j, both = together[at];
      const double with = ratio(both, together[i * experts + i]);
      if (rate != nullptr) rate[at] = i == j ? kNan : with;
      if (lift != nullptr) lift[at] = i == j ? kNan : with * ratio(tokens, together[j * experts + j]);
    }
  }
  chance->rate_chance = ratio(top_k - 1, experts - 1);
  chance->lift_chance = chance->rate_chance * ratio(experts, top_k);
  return Status::kOk;
}

Status load_scopes(const std::int64_t* counts, std::int64_t steps, std::int64_t micro_batches, std::int64_t experts,
                   LoadScopes* out) {
  if (steps < 1 || micro_batches < 1 || experts < 1) return Status::kBadShape;
  if (counts == nullptr || out == nullptr) return Status::kNullPointer;
  *out = {};
  std::vector<std::int64_t> step(size(experts)), all(size(experts));
  Mean micro_violation, micro_cv, step_violation, step_cv;
  LoadStatistics s;
  for (std::int64_t i = 0; i < steps; ++i) {
    std::fill(step.begin(), step.end(), 0);
    for (std::int64_t m = 0; m < micro_batches; ++m) {
      const std::int64_t* row = counts + (i * micro_batches + m) * experts;
      if (const Status status = load_statistics(row, experts, 1, 1, &s); status != Status::kOk) return status;
      micro_violation.add(s.max_violation);
      micro_cv.add(s.cv_population);
      out->empty += s.choices == 0;
      for (std::size_t e = 0; e < step.size(); ++e) {
        if (__builtin_add_overflow(all[e], row[e], &all[e])) return Status::kBadShape;
        step[e] += row[e];
      }
    }
    if (const Status status = load_statistics(step.data(), experts, 1, 1, &s); status != Status::kOk) return status;
    step_violation.add(s.max_violation);
    step_cv.add(s.cv_population);
  }
  if (const Status status = load_statistics(all.data(), experts, 1, 1, &s); status != Status::kOk) return status;
  out->micro_max_violation = micro_violation.value();
  out->micro_cv = micro_cv.value();
  out->step_max_violation = step_violation.value();
  out->step_cv = step_cv.value();
  out->pooled_max_violation = s.max_violation;
  out->pooled_cv = s.cv_population;
  return Status::kOk;
}

Status coverage(const std::int64_t* counts, std::int64_t experts, std::int64_t busiest, double* share) {
  if (experts < 1) return Status::kBadShape;
  if (busiest < 1 || busiest > experts) return Status::kBadTopK;
  if (counts == nullptr || share == nullptr) return Status::kNullPointer;
  std::vector<std::int64_t> sorted(counts, counts + experts);
  std::sort(sorted.rbegin(), sorted.rend());
  if (sorted.back() < 0) return Status::kBadShape;
  std::int64_t top = 0, all = 0;
  for (std::int64_t i = 0; i < experts; ++i) {
    all += sorted[size(i)];
    if (i < busiest) top += sorted[size(i)];
  }
  *share = ratio(top, all);
  return Status::kOk;
}

Status placement_load(const PlacementArgs& a, double* loads, Placement* out) {
  if (a.experts < 1 || a.slots < a.experts || a.ranks < 1 || a.ranks > std::numeric_limits<std::int32_t>::max() ||
      a.tokens < 0)
    return Status::kBadShape;
  if (a.top_k < 1 || a.top_k > a.experts) return Status::kBadTopK;
  if (a.counts == nullptr || a.slot_expert == nullptr || a.slot_rank == nullptr || out == nullptr)
    return Status::kNullPointer;
  const double experts = static_cast<double>(a.experts), k = static_cast<double>(a.top_k);
  double choices = 0, speeds = 0;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    if (a.counts[e] < 0) return Status::kBadShape;
    choices += static_cast<double>(a.counts[e]);
  }
  for (std::int64_t r = 0; r < a.ranks; ++r) {
    const double speed = a.speed == nullptr ? 1.0 : a.speed[r];
    if (!(speed > 0 && speed <= std::numeric_limits<double>::max())) return Status::kBadShape;
    speeds += speed;
  }
  std::vector<std::int64_t> copies(size(a.experts));
  for (std::int64_t i = 0; i < a.slots; ++i) {
    if (a.slot_expert[i] < 0 || a.slot_expert[i] >= a.experts || a.slot_rank[i] < 0 || a.slot_rank[i] >= a.ranks)
      return Status::kBadShape;
    ++copies[size(a.slot_expert[i])];
  }
  if (std::find(copies.begin(), copies.end(), 0) != copies.end()) return Status::kBadShape;
  // Of each rank: its choices, the sum over experts of their share on it, and of the square of that share.
  std::vector<double> load(size(a.ranks)), share(load), squares(load);
  std::vector<std::int64_t> order(size(a.slots));
  for (std::int64_t i = 0; i < a.slots; ++i) order[size(i)] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t x, std::int64_t y) {
    return a.slot_rank[x] != a.slot_rank[y] ? a.slot_rank[x] < a.slot_rank[y] : a.slot_expert[x] < a.slot_expert[y];
  });
  for (std::size_t i = 0; i < order.size();) {
    const std::int32_t rank = a.slot_rank[order[i]], e = a.slot_expert[order[i]];
    double held = 0;
    for (; i < order.size() && a.slot_rank[order[i]] == rank && a.slot_expert[order[i]] == e; ++i) ++held;
    held /= static_cast<double>(copies[size(e)]);
    load[size(rank)] += held * static_cast<double>(a.counts[e]);
    share[size(rank)] += held;
    squares[size(rank)] += held * held;
  }
  *out = {};
  out->ideal = choices / speeds;
  const double z = std::sqrt(2.0 * log_exact_order(static_cast<double>(a.ranks)));
  for (std::int64_t r = 0; r < a.ranks; ++r) {
    const double speed = a.speed == nullptr ? 1.0 : a.speed[r], m = share[size(r)];
    if (load[size(r)] / speed > out->slowest) out->slowest = load[size(r)] / speed, out->slowest_rank = r;
    out->idle_ranks += load[size(r)] == 0;
    if (m == 0) continue;
    const double variance = std::max(0.0, squares[size(r)] / experts - m / experts * (m / experts));
    const double relative =
        a.experts == 1 ? 0.0 : (experts - k) * experts * variance * experts / (k * (experts - 1) * m * m);
    const double floor = a.tokens == 0 ? 0.0 : z * std::sqrt(relative / static_cast<double>(a.tokens));
    out->even_router = std::max(out->even_router, m / experts / (speed / speeds) * (1.0 + floor));
  }
  out->max_over_mean = out->slowest / out->ideal;
  if (loads != nullptr) std::copy(load.begin(), load.end(), loads);
  return Status::kOk;
}

}  // namespace moeaudit::kernels

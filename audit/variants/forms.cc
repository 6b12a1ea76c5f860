#include "audit/variants/forms.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/host/bounds.h"

namespace moeaudit::variants {
namespace {

namespace k = kernels;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Smallest and largest, and whether none is NaN or infinite.
struct Extremes {
  double low, high;
  bool finite;
};
Extremes extremes_of(std::span<const double> values) {
  constexpr std::size_t kLanes = 8;
  double low[kLanes], high[kLanes], zero[kLanes] = {};
  std::fill(low, low + kLanes, std::numeric_limits<double>::infinity());
  std::fill(high, high + kLanes, -std::numeric_limits<double>::infinity());
  const auto add = [&](double v, std::size_t lane) {
    low[lane] = v < low[lane] ? v : low[lane];
    high[lane] = v > high[lane] ? v : high[lane];
    zero[lane] += v * 0.0;  // NaN from a NaN or an infinity on
  };
  std::size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) add(values[i + lane], lane);
  }
  for (; i < values.size(); ++i) add(values[i], i % kLanes);
  return {*std::min_element(low, low + kLanes), *std::max_element(high, high + kLanes),
          std::accumulate(zero, zero + kLanes, 0.0) == 0.0};
}

/// The k largest of each token, largest first, the lower index first among equals, and what would come next.
struct Top {
  std::vector<std::int32_t> chosen, next;
};

/// Scores of all experts, for logits of the layer's shape, and the top k by them.
std::vector<double> scores_of(const std::vector<double>& logits, const RoutedLayer& l, k::Score score,
                              Top* top = nullptr) {
  if (&logits == &l.logits && score == k::Score::kSoftmax && !l.softmax.empty()) {
    if (top) *top = {l.top, l.next};
    return l.softmax;
  }
  k::RouteArgs<double> a;
  a.logits = logits.data();
  a.tokens = l.tokens;
  a.experts = l.experts;
  a.top_k = top ? l.top_k : 1;
  a.score = score;
  Top ours;
  if (!top) top = &ours;
  top->chosen.resize(static_cast<std::size_t>(l.tokens * a.top_k));
  top->next.resize(static_cast<std::size_t>(l.tokens));
  std::vector<double> out(logits.size());
  const k::RouteResult<double> r{top->chosen.data(), nullptr, top->next.data(), out.data()};
  return l.backend->route(a, r) == k::Status::kOk ? out : std::vector<double>();
}

void divide_by_sum(std::vector<double>* p, std::int64_t experts, double eps) {
  const auto e = static_cast<std::size_t>(experts);
  for (std::size_t row = 0; row < p->size(); row += e) {
    double sum = eps;
    for (std::size_t i = 0; i < e; ++i) sum += (*p)[row + i];
    for (std::size_t i = 0; i < e; ++i) (*p)[row + i] /= sum;
  }
}

/// Turns the top k by `scores` into that by scores as the framework holds them: rounded to the dtype of the logits,
/// where ties can arise.
bool round_top(const std::vector<double>& scores, const RoutedLayer& l, Top* top) {
  const auto e = static_cast<std::size_t>(l.experts), n = static_cast<std::size_t>(l.top_k);
  bool tie = false;
  for (std::size_t t = 0; t < static_cast<std::size_t>(l.tokens) && !tie && l.scores_dtype != k::Float::kF64; ++t) {
    double before = std::numeric_limits<double>::infinity();
    for (std::size_t j = 0; j <= n && !tie; ++j) {
      const std::int32_t id = j < n ? top->chosen[t * n + j] : top->next[t];
      if (id < 0) break;
      const double held = k::round_to(scores[t * e + static_cast<std::size_t>(id)], l.scores_dtype);
      tie = held == before;
      before = held;
    }
  }
  if (!tie) return true;  // rounding keeps the order
  std::vector<double> held(scores.size());
  k::round_values(scores.data(), static_cast<std::int64_t>(scores.size()), l.scores_dtype, held.data());
  k::RouteArgs<double> a;
  a.logits = held.data();
  a.tokens = l.tokens;
  a.experts = l.experts;
  a.top_k = l.top_k;
  a.score_after_top_k = true;  // the choice is by the values themselves
  return l.backend->route(a, {top->chosen.data(), nullptr, top->next.data(), nullptr}) == k::Status::kOk;
}

/// Choices of the tokens that count that may be others by the framework's rounding. Linear attention leaves zeros where
/// padding is: all of its experts tie, and none of the k is certain.
double ties_of(const std::vector<double>& scores, const Top& top, const RoutedLayer& l, Padding padding) {
  const auto e = static_cast<std::size_t>(l.experts), n = static_cast<std::size_t>(l.top_k);
  const auto apart = [&](double range) { return 2 * k::bounds::softmax_relative(l.experts, 0, range, k::Float::kF32); };
  const double most = apart(l.highest - l.lowest);
  double ties = 0;
  for (std::size_t t = 0; t < static_cast<std::size_t>(l.tokens) && l.top_k < l.experts; ++t) {
    if (padding != Padding::kCounted && !l.valid.empty() && !l.valid[t]) continue;
    const double last = scores[t * e + static_cast<std::size_t>(top.chosen[(t + 1) * n - 1])];
    const double after = scores[t * e + static_cast<std::size_t>(top.next[t])];
    const bool same = k::round_to(last, l.scores_dtype) == k::round_to(after, l.scores_dtype);
    if (!same && last - after > most * last) continue;
    const Extremes x = extremes_of({l.logits.data() + t * e, e});
    const double by = apart(x.high - x.low) * last;
    if (!same && last - after > by) continue;
    for (std::size_t j = t * n; j < (t + 1) * n; ++j) {
      const double chosen = scores[t * e + static_cast<std::size_t>(top.chosen[j])];
      ties += chosen - after <= by || k::round_to(chosen, l.scores_dtype) == k::round_to(after, l.scores_dtype);
    }
  }
  return ties;
}

/// And the top k by them, where they are the scores of a router; else `top` stays as it is.
std::vector<double> probabilities_of(const BalanceForm& form, const RoutedLayer& l, Top* top) {
  switch (form.probabilities) {
    case Probabilities::kLogits: return l.logits;
    case Probabilities::kSoftmax: return scores_of(l.logits, l, k::Score::kSoftmax, top);
    case Probabilities::kDouble: {
      const auto once = scores_of(l.logits, l, k::Score::kSoftmax);
      return scores_of(once, l, k::Score::kSoftmax, top);
    }
    case Probabilities::kUnnormalised: return scores_of(l.logits, l, l.score);
    case Probabilities::kRouter: {
      auto p = scores_of(l.logits, l, l.score, l.score == k::Score::kSoftmax ? top : nullptr);
      if (l.score != k::Score::kSoftmax) divide_by_sum(&p, l.experts, form.eps);
      return p;
    }
    case Probabilities::kOfChosen:
    case Probabilities::kChosenOnly: {
      if (l.chosen.empty()) return {};
      const auto all = scores_of(l.logits, l, l.score);
      std::vector<double> p(all.size());
      for (std::int64_t t = 0; t < l.tokens; ++t) {
        double sum = 0;
        for (std::int64_t j = 0; j < l.top_k; ++j) {
          const std::int32_t e = l.chosen[static_cast<std::size_t>(t * l.top_k + j)];
          if (e >= 0) sum += all[static_cast<std::size_t>(t * l.experts + e)];
        }
        for (std::int64_t j = 0; j < l.top_k; ++j) {
          const std::int32_t e = l.chosen[static_cast<std::size_t>(t * l.top_k + j)];
          if (e >= 0)
            p[static_cast<std::size_t>(t * l.experts + e)] = all[static_cast<std::size_t>(t * l.experts + e)] / sum;
        }
      }
      if (form.probabilities == Probabilities::kOfChosen) return scores_of(p, l, k::Score::kSoftmax);
      return p;
    }
  }
  return {};
}

}  // namespace

bool RoutedLayer::prepare() {
  const Extremes x = extremes_of(logits);
  lowest = x.low, highest = x.high;
  softmax.clear();
  if (!x.finite || score != k::Score::kSoftmax) return x.finite;
  Top by;
  softmax = scores_of(logits, *this, k::Score::kSoftmax, &by);
  top = std::move(by.chosen), next = std::move(by.next);
  return true;
}

// ---- balance loss
// ----------------------------------------------------------------------------------------------------

BalanceForm held_to(BalanceFamily family) {
  BalanceForm f;
  if (family == BalanceFamily::kTransformers) {
    // transformers' load_balancing_loss_func: layers one after the other, no k, softmax of what the model returned.
    f.name = "transformers: one set of all layers, not divided by k";
    f.probabilities = Probabilities::kSoftmax;
    f.choices = Choices::kSoftmax;
    f.layers = Layers::kOneSet;
    f.over_k = false;
  } else {
    // f from the scores alone, whatever correction bias or groups choose by (DeepSeek-V3, arXiv 2412.19437 eq. 18).
    f.name = "mean over layers of E sum f P, f over k";
    f.choices = Choices::kScores;
  }
  return f;
}

std::vector<BalanceForm> balance_forms(BalanceFamily family, bool softmax_router) {
  const BalanceForm right = held_to(family);
  std::vector<BalanceForm> all = {right};
  const auto add = [&](std::string_view id, std::string_view name, auto&& change) {
    BalanceForm f = right;
    f.id = id;
    f.name = name;
    change(f);
    all.push_back(f);
  };
  if (right.layers == Layers::kOneSet) {
    add("A0", "each layer by itself, then the mean", [](BalanceForm& f) { f.layers = Layers::kMean; });
  } else {
    add("A2", "layers in one set: opposite imbalances cancel", [](BalanceForm& f) { f.layers = Layers::kOneSet; });
  }
  add("A7", "loads from the first choice alone", [](BalanceForm& f) {
    f.counted = k::Counted::kFirstChoice;
    f.over_k = true;
  });
  add("A8", "softmax of the softmax", [](BalanceForm& f) { f.probabilities = Probabilities::kDouble; });
  add("A9", "probabilities renormalised over the chosen",
      [](BalanceForm& f) { f.probabilities = Probabilities::kChosenOnly; });
  add("A9", "softmax of the chosen experts' weights, with zeros for the others", [](BalanceForm& f) {
    f.probabilities = Probabilities::kOfChosen;
    f.choices = Choices::kRecorded;
  });
  add("A10", "logits instead of probabilities", [](BalanceForm& f) { f.probabilities = Probabilities::kLogits; });
  if (!softmax_router) {
    const auto chosen = [](BalanceForm& f) { f.choices = Choices::kRecorded; };
    const auto unnormalised = [](BalanceForm& f) { f.probabilities = Probabilities::kUnnormalised; };
    add("A11", "scores not divided by their sum", unnormalised);
    add("A11", "scores not divided by their sum, loads from the router's own choice",
        [&](BalanceForm& f) { unnormalised(f), chosen(f); });
    if (right.probabilities == Probabilities::kRouter) {
      const auto softmax = [](BalanceForm& f) { f.probabilities = Probabilities::kSoftmax; };
      add("A34", "scores divided by their sum plus 1e-20, which is no smaller", [](BalanceForm& f) { f.eps = 1e-20; });
      add("A12", "softmax for a router that scores otherwise", softmax);
      add("A12", "softmax for a router that scores otherwise, loads from its own choice",
          [&](BalanceForm& f) { softmax(f), chosen(f); });
    } else {
      add("A0", "the router's own scores", [](BalanceForm& f) { f.probabilities = Probabilities::kRouter; });
    }
  }
  add("A13", "each sequence by itself, then the mean", [](BalanceForm& f) { f.by_sequence = true; });
  add("A16", "padding counted", [](BalanceForm& f) { f.padding = Padding::kCounted; });
  add("A17", "padding left out of the sums, not of their divisor",
      [](BalanceForm& f) { f.padding = Padding::kOutOfSums; });
  add("A18", "loads from the router's own choice, with its bias and groups",
      [](BalanceForm& f) { f.choices = Choices::kRecorded; });
  add("A19", "loads after drops", [](BalanceForm& f) { f.choices = Choices::kKept; });
  add("A20", "loads padded to the capacity: all equal", [](BalanceForm& f) { f.choices = Choices::kEven; });
  add("A23", "loads of the whole step", [](BalanceForm& f) { f.counts = Counts::kStep; });
  add("A23", "loads of the whole step on one rank", [](BalanceForm& f) { f.counts = Counts::kOwnStep; });
  add("A24", "running loads of the step", [](BalanceForm& f) { f.counts = Counts::kRunning; });
  add("A25", "loads of all ranks", [](BalanceForm& f) { f.counts = Counts::kRanks; });
  return all;
}

void BalanceSum::add(const RoutedLayer& l) {
  for (int i = 0; i < l.times; ++i) add_once(l);
}

void BalanceSum::add_once(const RoutedLayer& l) {
  ++layers_;
  Top top;
  const std::vector<double> p = probabilities_of(form_, l, &top);
  std::vector<std::int32_t> chosen;
  bool sound = !p.empty() && l.tokens > 0;
  double slack = 0;
  if (form_.choices == Choices::kScores || form_.choices == Choices::kSoftmax) {
    const k::Score score = form_.choices == Choices::kScores ? l.score : k::Score::kSoftmax;
    const bool by_p = !top.next.empty() && score == k::Score::kSoftmax &&
                      (form_.choices == Choices::kSoftmax || form_.probabilities != Probabilities::kDouble);
    std::vector<double> others;
    if (!by_p) others = scores_of(l.logits, l, score, &top);
    const std::vector<double>& by = by_p ? p : others;
    sound = sound && !by.empty() && round_top(by, l, &top);
    if (sound) slack = ties_of(by, top, l, form_.padding);
    chosen = std::move(top.chosen);
  } else {
    sound = sound && !l.chosen.empty();
    if (form_.choices == Choices::kKept) {
      sound = sound && !l.dropped.empty();
      chosen = l.chosen;
      for (std::size_t i = 0; sound && i < chosen.size(); ++i) {
        if (l.dropped[i]) chosen[i] = -1;
      }
    } else {
      chosen = l.chosen;
    }
  }
  const RoutedLayer::Pool& given = form_.counts == Counts::kStep      ? l.step
                                   : form_.counts == Counts::kRanks   ? l.ranks
                                   : form_.counts == Counts::kOwnStep ? l.own_step
                                                                      : l.running;
  if (form_.counts != Counts::kOwn && given.counts.empty()) sound = false;
  if (!sound) {
    sum_ = kNan;
    return;
  }

  const std::int64_t n = form_.by_sequence ? l.sequences : 1;
  if (n < 1 || l.tokens % n != 0) {
    sum_ = kNan;
    return;
  }
  std::vector<std::int64_t> sets;
  for (std::int64_t i = 0; i <= n; ++i) sets.push_back(l.tokens / n * i);
  const auto width = static_cast<std::size_t>(n * l.experts);
  std::vector<std::int64_t> counts(width), counted(static_cast<std::size_t>(n));
  std::vector<double> mean(width);
  double loss = 0;
  k::BalanceLossArgs<double> a;
  a.probabilities = p.data();
  a.chosen = chosen.data();
  a.valid = l.valid.empty() || form_.padding == Padding::kCounted ? nullptr : l.valid.data();
  a.tokens = l.tokens;
  a.experts = l.experts;
  a.top_k = l.top_k;
  a.sets = sets.data();
  a.num_sets = n;
  a.convention.over_k = form_.over_k;
  a.convention.counted = form_.counted;
  a.convention.divisor = form_.padding == Padding::kOutOfSums ? k::Divisor::kAllTokens : k::Divisor::kValidTokens;
  k::BalanceLossResult<double> r;
  r.loss = &loss;
  r.mean_probability = mean.data();
  r.counts = counts.data();
  if (form_.choices == Choices::kEven) {
    // As many for each expert: the counts of a map padded to the capacity.
    std::fill(counts.begin(), counts.end(), l.top_k);
    std::fill(counted.begin(), counted.end(), l.experts);
  } else if (form_.counts != Counts::kOwn) {
    counts.clear();
    for (std::int64_t i = 0; i < n; ++i) counts.insert(counts.end(), given.counts.begin(), given.counts.end());
    std::fill(counted.begin(), counted.end(), given.tokens);
  }
  if (form_.choices == Choices::kEven || form_.counts != Counts::kOwn) {
    a.counts = counts.data();
    a.counted_tokens = counted.data();
    r.counts = nullptr;
  }
  if (l.backend->balance_loss(a, r) != k::Status::kOk) {
    sum_ = kNan;
    return;
  }
  // A token whose last choice is a tie moves one count between two experts.
  double spread = 0, least = std::numeric_limits<double>::infinity();
  for (const double v : mean) spread = std::max(spread, v), least = std::min(least, v);
  const double per = static_cast<double>(l.experts) /
                     (static_cast<double>(l.tokens) * (form_.over_k ? static_cast<double>(l.top_k) : 1.0));
  if (loss > 0) ties_ = std::max(ties_, slack * per * (spread - least) / loss);

  if (form_.layers == Layers::kMean) {
    sum_ += loss;
    return;
  }
  if (form_.by_sequence) {  // sequences and one set of layers do not go together
    sum_ = kNan;
    return;
  }
  if (experts_ == 0) experts_ = l.experts, top_k_ = l.top_k, counts_.resize(static_cast<std::size_t>(l.experts));
  if (experts_ != l.experts || top_k_ != l.top_k) {
    sum_ = kNan;
    return;
  }
  p_.insert(p_.end(), mean.begin(), mean.end());
  for (std::size_t e = 0; e < counts_.size(); ++e) counts_[e] += counts[e];
  tied_ += slack;
  const bool all = a.valid == nullptr || form_.padding == Padding::kOutOfSums;
  const std::int64_t rows = all ? l.tokens : std::accumulate(l.valid.begin(), l.valid.end(), std::int64_t{0});
  rows_.push_back(static_cast<double>(rows));
  counted_ += a.counts != nullptr ? counted[0] : rows;
}

void BalanceSum::add(const BalanceSum& layers) {
  if (layers.layers_ == 0) return;
  if (experts_ == 0) experts_ = layers.experts_, top_k_ = layers.top_k_, counts_.resize(layers.counts_.size());
  layers_ += layers.layers_;
  sum_ += layers.sum_;
  ties_ = std::max(ties_, layers.ties_);
  if (layers.experts_ == 0) return;
  if (experts_ != layers.experts_ || top_k_ != layers.top_k_) {
    sum_ = kNan;
    return;
  }
  p_.insert(p_.end(), layers.p_.begin(), layers.p_.end());
  rows_.insert(rows_.end(), layers.rows_.begin(), layers.rows_.end());
  for (std::size_t e = 0; e < counts_.size(); ++e) counts_[e] += layers.counts_[e];
  tied_ += layers.tied_;
  counted_ += layers.counted_;
}

double BalanceSum::value() const {
  if (layers_ == 0) return kNan;
  if (form_.layers == Layers::kMean) return sum_ / layers_;
  if (std::isnan(sum_)) return kNan;
  // One set of all layers: its mean probabilities are the means of the layers', each with the weight of its tokens.
  std::vector<double> p = p_;
  const double each = std::accumulate(rows_.begin(), rows_.end(), 0.0) / static_cast<double>(layers_);
  for (std::size_t l = 0; l < rows_.size(); ++l) {
    if (rows_[l] == each) continue;
    for (auto e = static_cast<std::size_t>(experts_), i = l * e; i < (l + 1) * e; ++i) p[i] *= rows_[l] / each;
  }
  double loss = 0;
  k::BalanceLossArgs<double> a;
  a.probabilities = p.data();
  a.tokens = layers_;
  a.experts = experts_;
  a.top_k = top_k_;
  a.counts = counts_.data();
  a.counted_tokens = &counted_;
  a.convention.over_k = form_.over_k;
  a.convention.counted = form_.counted;
  k::BalanceLossResult<double> r;
  r.loss = &loss;
  return k::balance_loss(a, r) == k::Status::kOk ? loss : kNan;
}

// ---- z-loss
// ----------------------------------------------------------------------------------------------------------

std::span<const ZForm> z_forms() {
  static constexpr ZForm kForms[] = {
      {"", "mean over layers of the mean of lse^2"},
      {"Z3", "of probabilities instead of logits", ZKind::kProbabilities},
      {"Z4", "mean of squared logits", ZKind::kMeanSquaredLogit},
      {"Z5", "sum of squared logits of a token", ZKind::kSquaredLogits},
      {"Z6", "square of the mean lse", ZKind::kSquareOfMean},
      {"Z7", "lse not squared", ZKind::kNoSquare},
      {"Z9", "lse of the chosen experts alone", ZKind::kChosen},
      {"Z11", "padding counted", ZKind::kSquare, Padding::kCounted},
      {"Z12", "padding left out of the sum, not of its divisor", ZKind::kSquare, Padding::kOutOfSums},
      {"Z13", "exponentials not shifted by the largest logit", ZKind::kNoShift},
      {"Z14", "logits rounded to bfloat16 first", ZKind::kLogitsBf16},
      {"Z14", "lse rounded to bfloat16", ZKind::kLseBf16},
      {"Z14", "every step of the lse in bfloat16", ZKind::kStepsBf16},
  };
  return kForms;
}

double z_value(const ZForm& form, const RoutedLayer& l) {
  std::vector<double> others;
  std::int64_t experts = l.experts;
  if (form.kind == ZKind::kProbabilities) others = scores_of(l.logits, l, k::Score::kSoftmax);
  const auto narrow = [](double v) { return k::round_to(v, k::Float::kBF16); };
  if (form.kind == ZKind::kLogitsBf16 || form.kind == ZKind::kStepsBf16) {
    others = l.logits;
    std::transform(others.begin(), others.end(), others.begin(), narrow);
  }
  if (form.kind == ZKind::kChosen) {
    if (l.chosen.empty()) return kNan;
    experts = l.top_k;
    for (std::int64_t i = 0; i < l.tokens * l.top_k; ++i) {
      const std::int32_t e = l.chosen[static_cast<std::size_t>(i)];
      if (e < 0 || e >= l.experts) return kNan;
      others.push_back(l.logits[static_cast<std::size_t>(i / l.top_k * l.experts + e)]);
    }
  }
  std::vector<double> lse(static_cast<std::size_t>(l.tokens));
  double loss = 0;
  k::ZLossArgs<double> a;
  a.logits = others.empty() ? l.logits.data() : others.data();
  a.valid = l.valid.empty() || form.padding == Padding::kCounted ? nullptr : l.valid.data();
  a.tokens = l.tokens;
  a.experts = experts;
  a.divisor = form.padding == Padding::kOutOfSums ? k::Divisor::kAllTokens : k::Divisor::kValidTokens;
  k::ZLossResult<double> r;
  r.loss = &loss;
  r.log_sum_exp = lse.data();
  if (l.backend->z_loss(a, r) != k::Status::kOk) return kNan;
  if (form.kind == ZKind::kSquare || form.kind == ZKind::kProbabilities || form.kind == ZKind::kChosen ||
      form.kind == ZKind::kLogitsBf16)
    return loss;
  double sum = 0, n = 0;
  for (std::int64_t t = 0; t < l.tokens; ++t) {
    if (a.valid && !a.valid[t]) continue;
    n += 1;
    const double* row = l.logits.data() + t * l.experts;
    if (form.kind == ZKind::kMeanSquaredLogit || form.kind == ZKind::kSquaredLogits) {
      for (std::int64_t e = 0; e < l.experts; ++e) sum += row[e] * row[e];
    } else if (form.kind == ZKind::kNoShift) {
      // In float32, where exp overflows beyond 88.7.
      const double largest = *std::max_element(row, row + l.experts);
      const double v = largest > 88.72 ? std::numeric_limits<double>::infinity() : lse[static_cast<std::size_t>(t)];
      sum += v * v;
    } else if (form.kind == ZKind::kLseBf16) {
      const double v = narrow(lse[static_cast<std::size_t>(t)]);
      sum += v * v;
    } else if (form.kind == ZKind::kStepsBf16) {
      // As torch.logsumexp: the largest taken off, exp, sum in float32, log, the largest added; each a bfloat16 tensor.
      const double* z = others.data() + t * l.experts;
      const double largest = *std::max_element(z, z + l.experts);
      double total = 0;
      for (std::int64_t e = 0; e < l.experts; ++e) total += narrow(k::exp_exact_order(narrow(z[e] - largest)));
      const double v = narrow(narrow(k::log_exact_order(narrow(total))) + largest);
      sum += narrow(v * v);
    } else {
      sum += lse[static_cast<std::size_t>(t)];
    }
  }
  if (n == 0) return 0;
  if (form.kind == ZKind::kMeanSquaredLogit) return sum / (n * static_cast<double>(l.experts));
  return form.kind == ZKind::kSquareOfMean ? sum / n * (sum / n) : sum / n;
}

// ---- weights and selection
// -------------------------------------------------------------------------------------------

std::vector<RouteForm> route_forms(const k::RouteArgs<double>& right, bool has_bias) {
  std::vector<RouteForm> all;
  const auto add = [&](std::string_view id, std::string_view name, auto&& change) {
    RouteForm f;
    f.id = id;
    f.name = name;
    f.args = right;
    change(f);
    all.push_back(f);
  };
  add("", "the family's order", [](RouteForm&) {});
  if (has_bias) {
    add("W1", "weights of the biased scores", [](RouteForm& f) { f.bias_weighs = true; });
    add("W2", "bias added to the logits", [](RouteForm& f) { f.bias_on_logits = true; });
    add("A18", "chosen without the correction bias", [](RouteForm& f) { f.ignore_bias = true; });
  }
  if (!right.score_after_top_k || right.score != k::Score::kSoftmax) {
    if (right.top_k == 1 && !right.renormalise)
      add("W5", "the one weight over itself: 1, without a gradient", [](RouteForm& f) { f.args.renormalise = true; });
    else
      add("W3", right.renormalise ? "not renormalised over the chosen" : "renormalised over the chosen",
          [](RouteForm& f) { f.args.renormalise = !f.args.renormalise, f.args.renormalise_norm = 1; });
    if (right.renormalise && right.renormalise_norm != 1)
      add("W3", "over the sum of the chosen instead of their p-norm", [](RouteForm& f) { f.args.renormalise_norm = 1; });
  }
  if (right.score == k::Score::kSoftmax) {
    add("W4", "softmax of the softmax", [](RouteForm& f) { f.softmax_first = true; });
    if (right.score_after_top_k) {
      add("W3", "softmax over all experts, not renormalised", [](RouteForm& f) { f.args.score_after_top_k = false; });
    }
    add("W3", "sigmoid instead of softmax", [](RouteForm& f) {
      f.args.score = k::Score::kSigmoid;
      f.args.score_after_top_k = false;
    });
  } else {
    add("W3", "softmax instead of the family's score", [](RouteForm& f) { f.args.score = k::Score::kSoftmax; });
  }
  if (right.scaling != 1.0) {
    add("W8", "scaling factor left out", [](RouteForm& f) { f.args.scaling = 1; });
    add("W8", "scaling factor applied twice", [](RouteForm& f) { f.times = f.args.scaling; });
  }
  if (right.groups > 1) {
    add("W9", "no limit to groups",
        [](RouteForm& f) { f.args.groups = f.args.top_groups = 1, f.args.group_score = k::GroupScore::kNone; });
    add("W9",
        right.group_score == k::GroupScore::kMax ? "groups scored by their two best" : "groups scored by their best",
        [](RouteForm& f) {
          f.args.group_score =
              f.args.group_score == k::GroupScore::kMax ? k::GroupScore::kTop2Sum : k::GroupScore::kMax;
        });
    add("W10", right.group_mask_is_zero ? "other groups masked by -inf" : "other groups masked by 0",
        [](RouteForm& f) { f.args.group_mask_is_zero = !f.args.group_mask_is_zero; });
  }
  if (right.groups > 1 && right.group_score != k::GroupScore::kTopShareSum && right.top_k / right.top_groups != 2)
    add("W9", "groups scored by their k / groups best", [](RouteForm& f) { f.args.group_score = k::GroupScore::kTopShareSum; });
  if (right.groups > 1 && right.score == k::Score::kSoftmax)
    add("W11", "softmax over the experts of the chosen groups", [](RouteForm& f) { f.mask_first = true; });
  add("W7", "renormalised over the choices that were not dropped", [](RouteForm& f) { f.over_kept = true; });
  add("W12", "logits rounded to bfloat16 first", [](RouteForm& f) { f.logits_dtype = k::Float::kBF16; });
  return all;
}

bool route_with(const RouteForm& form, const RoutedLayer& l, std::vector<std::int32_t>* chosen,
                std::vector<double>* weights) {
  std::vector<double> logits, bias = form.ignore_bias ? std::vector<double>() : l.bias;
  const auto e = static_cast<std::size_t>(l.experts);
  const auto weigh_by = [&](const std::vector<double>& scores) {
    for (std::int64_t t = 0; t < l.tokens; ++t) {
      k::PNorm<double> norm{form.args.renormalise_norm};
      for (std::int64_t j = 0; j < l.top_k; ++j) {
        const auto i = static_cast<std::size_t>(t * l.top_k + j);
        (*weights)[i] = scores[static_cast<std::size_t>(t) * e + static_cast<std::size_t>((*chosen)[i])];
        norm.add((*weights)[i]);
      }
      const double by = norm.root() + form.args.renormalise_eps;
      for (std::int64_t j = 0; j < l.top_k; ++j) {
        double& w = (*weights)[static_cast<std::size_t>(t * l.top_k + j)];
        w = (form.args.renormalise ? w / by : w) * form.args.scaling;
      }
    }
  };
  const bool as_it_is = !form.softmax_first && !form.bias_on_logits && form.logits_dtype == k::Float::kF64 &&
                        !form.mask_first && !form.over_kept && form.times == 1 && bias.empty();
  if (as_it_is && !k::is_rare(form.args) && !l.softmax.empty() && form.args.score == k::Score::kSoftmax && !form.args.score_after_top_k &&
      form.args.group_score == k::GroupScore::kNone) {
    *chosen = l.top;
    weights->resize(chosen->size());
    weigh_by(l.softmax);
    return true;
  }
  logits = form.softmax_first ? scores_of(l.logits, l, k::Score::kSoftmax) : l.logits;
  if (form.bias_on_logits) {
    for (std::size_t i = 0; i < logits.size(); ++i) logits[i] += bias[i % e];
    bias.clear();
  }
  if (form.logits_dtype != k::Float::kF64)
    k::round_values(logits.data(), static_cast<std::int64_t>(logits.size()), form.logits_dtype, logits.data());
  if (form.over_kept && l.dropped.empty()) return false;
  k::RouteArgs<double> a = form.args;
  if (form.mask_first) {
    k::RouteArgs<double> groups = a;
    groups.logits = logits.data();
    groups.tokens = l.tokens, groups.experts = l.experts, groups.top_k = l.top_k;
    groups.group_mask_is_zero = false;
    std::vector<std::int32_t> ignored(static_cast<std::size_t>(l.tokens * l.top_k));
    std::vector<double> choice(logits.size());
    if (k::route(groups, k::RouteResult<double>{ignored.data(), nullptr, nullptr, choice.data()}) != k::Status::kOk)
      return false;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (std::isinf(choice[i])) logits[i] = -std::numeric_limits<double>::infinity();
    }
    a.groups = a.top_groups = 1;
    a.group_score = k::GroupScore::kNone;
  }
  a.logits = logits.data();
  a.correction_bias = bias.empty() ? nullptr : bias.data();
  a.tokens = l.tokens;
  a.experts = l.experts;
  a.top_k = l.top_k;
  chosen->resize(static_cast<std::size_t>(l.tokens * l.top_k));
  weights->resize(chosen->size());
  std::vector<double> choice(form.bias_weighs ? logits.size() : 0);
  k::RouteResult<double> r{chosen->data(), weights->data(), nullptr, form.bias_weighs ? choice.data() : nullptr};
  if (l.backend->route(a, r) != k::Status::kOk) return false;
  if (form.bias_weighs) weigh_by(choice);
  if (form.over_kept) {
    for (std::size_t first = 0; first < weights->size(); first += static_cast<std::size_t>(l.top_k)) {
      k::PNorm<double> sum{form.args.renormalise_norm};
      for (std::size_t j = first; j < first + static_cast<std::size_t>(l.top_k); ++j) {
        // The drops are of the recorded choices, in their order.
        const auto* at = std::find(l.chosen.data() + first, l.chosen.data() + first + l.top_k, (*chosen)[j]);
        if (at == l.chosen.data() + first + l.top_k || l.dropped[static_cast<std::size_t>(at - l.chosen.data())]) (*weights)[j] = 0;
        sum.add((*weights)[j]);
      }
      const double by = sum.root();
      for (std::size_t j = first; j < first + static_cast<std::size_t>(l.top_k); ++j)
        (*weights)[j] *= by > 0 ? form.args.scaling / by : 0.0;
    }
  }
  for (double& w : *weights) w *= form.times;
  return true;
}

// ---- cross-entropy over a step
// ---------------------------------------------------------------------------------------

std::span<const NormalisationForm> normalisation_forms() {
  static constexpr NormalisationForm kForms[] = {
      {"", "sum of token losses over the labels of the step", k::Normalisation::kTokens},
      {"G1", "mean of each micro-batch, then the mean over them", k::Normalisation::kMeanOfMeans},
      {"G1", "ranks weigh the same, whatever labels they hold", k::Normalisation::kTokensOfRank},
      {"G12", "not divided by any count of tokens", k::Normalisation::kSum},
  };
  return kForms;
}

// ---- correction bias
// -------------------------------------------------------------------------------------------------

std::span<const BiasForm> bias_forms() {
  static constexpr std::array kForms = [] {
    std::array<BiasForm, 16> f{};
    std::size_t n = 0;
    const auto add = [&](std::string_view id, std::string_view name) -> BiasForm& {
      f[n].id = id;
      f[n].name = name;
      return f[n++];
    };
    add("", "rate times the sign of mean - count");
    add("B18", "the mean of the step taken from it").centre = k::Centre::kStep;
    add("B18", "the mean of the bias taken from it").centre = k::Centre::kBias;
    add("B1", "the wrong way: experts above the mean pushed up").rate = -1;
    add("B2", "once a micro-batch instead of once a step").per_micro_batch = true;
    add("B3", "from the counts of one rank").own_rank = true;
    add("B5", "bias kept in bfloat16").bias_dtype = k::Float::kBF16;
    add("B6", "counts kept in bfloat16").counts_dtype = k::Float::kBF16;
    add("B6", "step computed in bfloat16").step_dtype = k::Float::kBF16;
    add("B9", "padding counted").padding = true;
    add("B10", "from the counts after drops").kept = true;
    add("B8", "with the tokens of evaluations").evaluation = true;
    add("B11", "with the counts of earlier steps").earlier = true;
    add("B14", "by the distance from the mean instead of its sign").step = k::BiasStep::kProportional;
    BiasForm& wrong = add("B1", "the wrong way, once a micro-batch");
    wrong.rate = -1, wrong.per_micro_batch = true;
    BiasForm& low = add("B6", "counts and step in bfloat16");
    low.counts_dtype = low.step_dtype = k::Float::kBF16;
    return f;
  }();
  return kForms;
}

}  // namespace moeaudit::variants

#include "audit/measures/replay/sparse_mixer.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/host/bounds.h"

namespace moeaudit::replay {
namespace {

constexpr std::size_t kNamedWeights = 4096;  // weights of a layer that a name must fit

/// What both picks are weighed by: the family's, or a wrong one. kF64 where a dtype is the family's.
struct Form {
  std::string_view id, name;
  bool masked = true;        // softmax over what lies close to the pick alone
  bool own_softmax = true;   // else the second weight is of the first pick's softmax
  bool renormalise = false;  // over the two
  double midpoint = k::kMixerMidpoint;
  Float softmax = Float::kF64;  // what it alone is rounded to
  Float tensors = Float::kF64;  // what it and the weight are rounded to
  Float logits = Float::kF64;   // what these are rounded to first
};
const Form kForms[] = {
    {.id = "", .name = "the family's order"},
    {.id = "W3", .name = "renormalised over the chosen", .renormalise = true},
    {.id = "W12", .name = "logits rounded to bfloat16 first", .logits = Float::kBF16},
    {.id = "W18", .name = "softmax over all experts, none of them masked", .masked = false},
    {.id = "W19", .name = "softmax rounded to bfloat16", .softmax = Float::kBF16},
    {.id = "W19", .name = "softmax rounded to float16", .softmax = Float::kF16},
    {.id = "W19", .name = "all of it in bfloat16", .tensors = Float::kBF16, .logits = Float::kBF16},
    {.id = "W19", .name = "softmax not rounded", .tensors = Float::kF32},
    {.id = "W20", .name = "both weights of the first pick's softmax", .own_softmax = false},
    {.id = "W21", .name = "1 / 3 where the family has 0.3333", .midpoint = 1.0 / 3},
};

/// A weight that may come out, and how far rounding alone carries it.
struct Weight {
  double value = 0, band = 0;
};

class Mixer {
 public:
  Mixer(const Context& ctx, const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l)
      : l_(l),
        training_(Context::trains(m)),
        limit_(2 * ctx.routing->mixer_jitter),
        experts_(static_cast<std::size_t>(l.experts)) {
    stored_ = t.routing_weights ? float_of(t.routing_weights->dtype) : l.dtype;
    // Autocast on a GPU runs a softmax in float32, on a CPU in the dtype of its argument: the weights have its dtype.
    tensors_ = unit(stored_) < unit(l.dtype) ? stored_ : l.dtype;
    // Whatever is no expert stands for the first of both, and is not looked at.
    given_.reserve(l.chosen.size());
    for (const std::int32_t e : l.chosen) given_.push_back(e < 0 ? 0 : e);
    k::SparseMixerArgs<double> a;
    a.logits = l.logits.data(), a.tokens = l.tokens, a.experts = l.experts, a.jitter = ctx.routing->mixer_jitter;
    a.given = given_.data();
    a.logits_dtype = l.dtype;
    std::vector<std::int32_t> chosen(given_.size());
    kept_.resize(given_.size() * experts_), p_.resize(kept_.size());
    works_ = l.backend->sparse_mixer(a, {chosen.data(), nullptr, kept_.data(), p_.data()}) == k::Status::kOk;
  }
  bool works() const { return works_; }
  bool training() const { return training_; }
  bool is_expert(std::size_t slot) const { return l_.chosen[slot] >= 0; }

  /// Whether the pick can be what was recorded, of these logits or of what they may be off by. As drawn: also at an
  /// evaluation.
  bool allows(std::size_t slot, bool as_drawn = false) const {
    const std::int32_t e = l_.chosen[slot];
    if (e == before(slot)) return false;
    if (training_ || as_drawn)
      return kept_[slot * experts_ + static_cast<std::size_t>(e)] != 0 || keeps(slot, e) != Kept::kNo;
    return logits(slot)[e] + 2 * l_.logit_error >= largest(slot);
  }

  /// The weights that may come out for the recorded choice by a form; none: what the logits are off by decides, or so
  /// large are they that their rounding does.
  std::vector<Weight> weights(std::size_t slot, const Form& form) const {
    if (form.masked && l_.logit_error > 0) {
      for (std::int64_t e = 0; e < l_.experts; ++e) {
        if (e != before(slot) && keeps(slot, e) == Kept::kMaybe) return {};
      }
    }
    const Float dtype = form.tensors == Float::kF64 ? tensors_ : form.tensors;
    const std::vector<double> p = probabilities(slot, form);
    const auto own = static_cast<std::size_t>(l_.chosen[slot]);
    double low = kInf, high = -kInf;
    std::int64_t among = 0;
    for (std::size_t e = 0; e < experts_; ++e) {
      if (p[e] <= 0) continue;
      low = std::min(low, logits(slot)[e]), high = std::max(high, logits(slot)[e]), ++among;
    }
    const double off = k::bounds::softmax_relative(among, l_.logit_error, among > 0 ? high - low : 0,
                                                   dtype == Float::kF64 ? dtype : Float::kF32);
    if (!(off < kTellsNothing)) return {};
    const auto rounded = [&](double v) { return k::round_to(v, dtype); };
    const auto of_softmax = [&](double v) { return rounded(k::round_to(v, form.softmax)); };
    bool surely_best = true;  // by the library's own numbers: the first of the largest
    for (std::size_t e = 0; e < experts_ && surely_best; ++e) {
      if (e == own) continue;
      surely_best = p[e] == p[own] ? own < e
                                   : of_softmax(p[own] * (1 - off)) > of_softmax(p[e] * (1 + off)) ||
                                         (own < e && of_softmax(p[own] * (1 - off)) >= of_softmax(p[e] * (1 + off)));
    }
    std::vector<Weight> out;
    for (const double times : {1.0, rounded(form.midpoint)}) {
      const auto at = [&](double sign) { return rounded(of_softmax(p[own] * (1 + sign * off)) * times); };
      const double value = at(0);
      // What lies on the grid of its dtype is told apart from the next number there.
      const double place = 0.5 * std::max(k::spacing(value, dtype), k::spacing(value, stored_));
      out.push_back({value, std::max(at(1) - value, value - at(-1)) + place});
      if (!training_ || surely_best) break;
    }
    return out;
  }

 private:
  enum class Kept { kNo, kMaybe, kYes };
  std::int32_t before(std::size_t slot) const { return slot % 2 == 0 ? -1 : given_[slot - 1]; }
  const double* logits(std::size_t slot) const { return l_.logits.data() + slot / 2 * experts_; }
  double largest(std::size_t slot) const {
    double m = -kInf;
    for (std::int64_t e = 0; e < l_.experts; ++e) {
      if (e != before(slot)) m = std::max(m, logits(slot)[e]);
    }
    return m;
  }
  /// By logits that may each be off; two roundings of their dtype besides.
  Kept keeps(std::size_t slot, std::int64_t e) const {
    if (l_.logit_error == 0) return kept_[slot * experts_ + static_cast<std::size_t>(e)] != 0 ? Kept::kYes : Kept::kNo;
    const double m = largest(slot), z = logits(slot)[e], over = std::max(std::fabs(z), m), off = l_.logit_error;
    const double relative = 3 * unit(l_.dtype), gap = std::max(m - z, 0.0);
    if (!(over > off)) return Kept::kMaybe;
    if ((gap + 2 * off) / (over - off) * (1 + relative) <= limit_) return Kept::kYes;
    return std::max(gap - 2 * off, 0.0) / (over + off) * (1 - relative) > limit_ ? Kept::kNo : Kept::kMaybe;
  }
  std::vector<double> probabilities(std::size_t slot, const Form& form) const {
    const std::size_t of = form.own_softmax ? slot : slot - slot % 2;
    std::vector<double> p(p_.begin() + static_cast<std::ptrdiff_t>(of * experts_),
                          p_.begin() + static_cast<std::ptrdiff_t>((of + 1) * experts_));
    if (!form.masked) {
      const double m = largest(of);
      double sum = 0;
      for (std::size_t e = 0; e < experts_; ++e) {
        p[e] = static_cast<std::int32_t>(e) == before(of) ? 0 : k::exp_exact_order(logits(of)[e] - m);
        sum += p[e];
      }
      for (double& x : p) x /= sum;
    }
    if (form.renormalise) {
      const std::size_t first = slot - slot % 2;
      const double sum = p_[first * experts_ + static_cast<std::size_t>(given_[first])] +
                         p_[(first + 1) * experts_ + static_cast<std::size_t>(given_[first + 1])];
      for (double& x : p) x /= sum;
    }
    return p;
  }

  const v::RoutedLayer& l_;
  const bool training_;
  const double limit_;
  const std::size_t experts_;
  Float stored_, tensors_;
  bool works_ = false;
  std::vector<std::int32_t> given_;
  std::vector<std::uint8_t> kept_;
  std::vector<double> p_;
};

/// The nearest of what may come out, in bands.
std::pair<double, Weight> nearest(double got, const std::vector<Weight>& may) {
  std::pair<double, Weight> best{kInf, {}};
  for (const Weight& w : may) {
    const double d = got == w.value ? 0 : std::fabs(got - w.value) / w.band;
    if (d < best.first || best.second.band == 0) best = {std::isnan(d) ? kInf : d, w};
  }
  return best;
}

void name_weights(const Context& ctx, const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l,
                  const std::vector<std::size_t>& used, const std::vector<double>& recorded, Row* w) {
  v::RoutedLayer rounded = l;
  rounded.dtype = Float::kBF16;
  k::round_values(rounded.logits.data(), static_cast<std::int64_t>(rounded.logits.size()), rounded.dtype,
                  rounded.logits.data());
  const Mixer as_recorded(ctx, m, t, l), in_bfloat16(ctx, m, t, rounded);
  double least = kInf;
  for (const Form& form : kForms) {
    if (form.id.empty()) continue;
    double worst = 0;
    for (const std::size_t slot : used) {
      const std::vector<Weight> may = (form.logits == Float::kF64 ? as_recorded : in_bfloat16).weights(slot, form);
      if (!may.empty()) worst = std::max(worst, nearest(recorded[slot], may).first);
    }
    const std::string text = std::string(form.id) + " " + std::string(form.name);
    if (worst <= 1 && w->name.found) {
      w->name.also += (w->name.also.empty() ? "" : "; ") + text;
    } else if (worst <= 1) {
      w->name.found = true;
      w->name.id = form.id, w->name.name = form.name, w->name.fit = worst;
    } else if (worst < least) {
      least = worst;
      w->name.runner_up = text, w->name.runner_up_fit = worst;
    }
  }
}

}  // namespace

void replay_sparse_mixer(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, const v::RoutedLayer& l,
                         Row* selection, Row* weights) {
  const auto unknown = [&](const char* why) {
    if (selection->missing.empty()) selection->missing = why;
    if (weights->missing.empty()) weights->missing = why;
  };
  if (l.top_k != k::kMixerPicks) return unknown("SparseMixer picks two experts, and the trace holds another number");
  const Mixer mixer(*ctx, m, t, l);
  if (!mixer.works()) return unknown("this order of routing is not replayed");
  const Place place = ctx->place_of(m);
  char within[48];
  std::snprintf(within, sizeof within, "%g", 2 * ctx->routing->mixer_jitter);
  const std::string of = std::string(t.router_logits ? "recorded" : "recomputed") + " logits, by " +
                         ctx->facts.model_type + "'s SparseMixer";
  selection->held_to =
      std::string("the best and the next of the ") + of + "; in training one within " + within + " of each";
  std::vector<double> recorded;
  if (t.routing_weights) {
    recorded.resize(l.chosen.size());
    if (!read_values(*t.routing_weights, 0, l.tokens * l.top_k, recorded.data())) recorded.clear();
    weights->held_to =
        "each pick's own softmax of the " + of + "; in training it, or a third of it for one that is not the best";
  }
  std::int64_t differing = 0;
  bool drawn = true;  // wherever the choices differ
  std::vector<std::size_t> used;
  for (std::int64_t token = 0; token < l.tokens; ++token) {
    const auto first = static_cast<std::size_t>(2 * token);
    if (std::find(l.chosen.data() + first, l.chosen.data() + first + 2, -1) != l.chosen.data() + first + 2)
      continue;  // not recorded
    ++selection->compared;
    const bool experts = mixer.is_expert(first) && mixer.is_expert(first + 1);
    if (!experts || !mixer.allows(first) || !mixer.allows(first + 1)) {
      drawn = drawn && experts && mixer.allows(first, true) && mixer.allows(first + 1, true);
      if (selection->differing + ++differing == 1) selection->place = place;
      continue;  // weights of another pick say nothing
    }
    for (std::size_t slot = first; slot < first + 2 && !recorded.empty(); ++slot) {
      if (!l.dropped.empty() && l.dropped[slot]) continue;  // its weight is used by nothing
      const std::vector<Weight> may = mixer.weights(slot, kForms[0]);
      if (may.empty()) continue;
      const Weight w = nearest(recorded[slot], may).second;
      weights->add(recorded[slot], w.value, w.band, place);
      if (used.size() < kNamedWeights) used.push_back(slot);
    }
  }
  selection->differing += differing;
  selection->recorded = selection->distance = static_cast<double>(selection->differing);
  selection->expected = selection->band = 0;
  if (selection->compared == 0) unknown("no token has both of its choices recorded");
  if (!recorded.empty() && weights->compared == 0)
    unknown(l.logit_error > 0 ? "recomputed logits do not say which experts lie close enough to share a weight"
                              : "the logits are so large that rounding them can change a weight by half");
  if (differing > 0 && !mixer.training() && !selection->name.found) {
    selection->name.found = drawn;
    selection->name.id = drawn ? "W17" : "";
    selection->name.name = drawn ? "drawn at an evaluation as in training" : "";
  }
  if (weights->differing > 0 && !weights->name.found && weights->name.runner_up.empty())
    name_weights(*ctx, m, t, l, used, recorded, weights);
}

}  // namespace moeaudit::replay

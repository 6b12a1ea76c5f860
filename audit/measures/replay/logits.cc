#include "audit/measures/replay/logits.h"

#include <algorithm>
#include <cmath>

#include "audit/measures/replay/routing.h"
#include "audit/measures/router_replay.h"
#include "kernels/host/bounds.h"
#include "kernels/host/low_precision.h"

namespace moeaudit::replay {
namespace {

constexpr std::int64_t kMostInputs = std::int64_t{1} << 28;  // of one layer of one micro-batch: 1 GiB
constexpr double kJitterBand = 0.25;  // relative, of the size of noise that is the configured one
constexpr double kEulerGamma = 0.57721566490153286, kGumbelDeviation = 1.2825498301618641;  // pi / sqrt(6)

void product(const std::vector<float>& x, const std::vector<float>& w, std::int64_t tokens, std::int64_t experts,
             std::int64_t hidden, std::vector<double>* out) {
  Aligned<double> packed(k::packed_gate_size<double>(experts, hidden));
  k::pack_gate(w.data(), experts, hidden, packed.data());
  out->resize(static_cast<std::size_t>(tokens * experts));
  k::GateArgs<float, double> a;
  a.x = x.data();
  a.packed = packed.data();
  a.tokens = tokens, a.experts = experts, a.hidden = hidden;
  a.logits = out->data();
  if (k::gate_logits(a) != k::Status::kOk) out->clear();
}

/// Rounding of a value that is stored wider than `f`.
double narrowing(DType stored, Float f) {
  return float_of(stored) == f || unit(float_of(stored)) >= unit(f) ? 0.0 : unit(f);
}

std::string three_digits(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", x);
  return text;
}

/// The jitter that the model's config or the trainer states; 0: none.
double configured_jitter(const TraceFacts& facts) {
  const auto stated = [](const Node& config) -> double {
    for (const std::string_view key : {"router_jitter_noise", "input_jitter_noise", "moe_input_jitter_eps", "moe_jitter_eps"}) {
      const Node* node = config.find(key);
      if (node && node->as_double()) return *node->as_double();
    }
    return 0;
  };
  if (!facts.config.is_map()) return 0;
  if (const double jitter = stated(facts.config); jitter > 0) return jitter;
  for (const Node& part : facts.config.items) {  // ffn_config, text_config
    if (part.is_map() && stated(part) > 0) return stated(part);
  }
  return 0;
}

/// No micro-batch of its step and rank trains after it, and some did before.
bool behind_the_step(const Trace& trace, const MicroBatchRecord& m) {
  const auto all = trace.micro_batches();
  const auto at = static_cast<std::size_t>(&m - all.data());
  const auto trains = [&](const MicroBatchRecord& other) { return other.rank == m.rank && Context::trains(other); };
  for (std::size_t i = at; i < all.size() && all[i].step == m.step; ++i) {
    if (trains(all[i])) return false;
  }
  bool before = false;
  for (std::size_t i = at; i-- > 0 && all[i].step == m.step;) before = before || trains(all[i]);
  return before;
}

}  // namespace

bool recompute_logits(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, bool after_the_step,
                      Recomputed* out, std::string* why) {
  const auto no = [&](std::string text) {
    *why = std::move(text);
    return false;
  };
  if (!t.hidden_states) return no("needs hidden_states");
  const Family* family = ctx->facts.model_type.empty() ? nullptr : find_family_by_model_type(ctx->facts.model_type);
  if (!family) return no(ctx->facts.model_type.empty() ? "the trace does not say model_type (trace.json, key model)"
                                                       : "no family for model_type " + ctx->facts.model_type);
  const std::optional<DType> written = family->logits_dtype_by_version ? dtype_of_release(ctx->facts, *family, "router_logits_dtype")
                                                                       : family->routing.logits_dtype;
  if (!written) return no("the dtype of the logits is another in other releases of the class, and of this release it is not known");
  if (family->routing.linear_bias) return no("the router has a bias, which a trace does not hold");
  const TraceLayer* stated = ctx->facts.layer(t.layer);
  if (stated && stated->lora.value_or(false)) return no("the router has an adapter, which rounds in between");
  const TensorView* weight = ctx->router_weight(m, t.layer, after_the_step);
  if (!weight) return no("needs router_weight of the step");
  const std::int64_t experts = weight->shape[0], hidden = weight->shape[1], tokens = t.rows(m);
  if (t.hidden_states->shape.size() != 2 || t.hidden_states->shape[1] != hidden || experts != t.experts ||
      tokens > kMostInputs / std::max(hidden, experts))
    return no("hidden_states and router_weight do not go together");
  out->hidden = hidden;
  out->x.resize(static_cast<std::size_t>(tokens * hidden));
  out->w.resize(static_cast<std::size_t>(experts * hidden));
  if (!read_values(*t.hidden_states, 0, tokens * hidden, out->x.data()) ||
      !read_values(*weight, 0, experts * hidden, out->w.data()))
    return no("hidden_states or router_weight could not be read");
  const auto finite = [](const std::vector<float>& v) {
    return std::all_of(v.begin(), v.end(), [](float x) { return std::isfinite(x); });
  };
  if (!finite(out->x) || !finite(out->w)) return no("hidden_states or router_weight are not finite");
  // Autocast takes the product in its dtype, whatever the class asks for.
  out->stated = ctx->facts.mixed_precision == "bf16"   ? Float::kBF16
                : ctx->facts.mixed_precision == "fp16" ? Float::kF16
                : *written == DType::kUnknown ? float_of(t.hidden_states->dtype)
                                              : float_of(*written);
  if (out->stated == Float::kF64) out->stated = Float::kF32;
  product(out->x, out->w, tokens, experts, hidden, &out->logits);
  std::vector<float> x(out->x.size()), w(out->w.size());
  std::vector<double> absolute;
  std::transform(out->x.begin(), out->x.end(), x.begin(), [](float v) { return std::fabs(v); });
  std::transform(out->w.begin(), out->w.end(), w.begin(), [](float v) { return std::fabs(v); });
  product(x, w, tokens, experts, hidden, &absolute);
  for (float& v : x) v *= v;
  for (float& v : w) v *= v;
  product(x, w, tokens, experts, hidden, &out->length);
  if (out->logits.empty() || absolute.empty() || out->length.empty()) return no("the product could not be computed");
  const double inputs = narrowing(t.hidden_states->dtype, out->stated) + narrowing(weight->dtype, out->stated);
  out->band.resize(out->logits.size());
  for (std::size_t i = 0; i < out->band.size(); ++i) {
    out->length[i] = std::sqrt(out->length[i]);
    double error = k::bounds::gate(hidden, absolute[i], Float::kF32, false) + inputs * absolute[i];
    if (out->stated != Float::kF32)
      error = k::bounds::rounded(out->logits[i], error + k::bounds::tensor_core_dot(hidden, absolute[i]), out->stated);
    out->band[i] = error;
  }
  return true;
}

void Logits::add(const MicroBatch& mb, const LayerTensors& t) {
  const MicroBatchRecord& m = *mb.record;
  if (!t.hidden_states || !t.router_logits) return;
  const bool training = Context::trains(m);
  Row& r = ctx_.row(training ? "logits" : "evaluation_logits", t.layer);
  const std::int64_t count = t.rows(m) * t.experts;
  std::vector<double> recorded(static_cast<std::size_t>(count));
  if (!read_values(*t.router_logits, 0, count, recorded.data()) ||
      !std::all_of(recorded.begin(), recorded.end(), [](double x) { return std::isfinite(x); })) {
    r.missing = "the recorded logits are not finite";
    return;
  }
  Recomputed c;
  std::string why;
  // An evaluation behind the last micro-batch of a step has the weights that the next one starts from.
  const bool after = !training && behind_the_step(ctx_.trace, m);
  if (!recompute_logits(&ctx_, m, t, after, &c, &why)) {
    if (r.missing.empty()) r.missing = after ? "needs router_weight of the next step: the evaluation is after the update" : why;
    return;
  }
  r.held_to = "hidden_states x router_weight in " + std::string(k::name_of(c.stated));
  Residuals& s = residuals(training, t.layer);
  std::int64_t off = 0;
  for (std::size_t i = 0; i < recorded.size(); ++i) {
    const double d = recorded[i] - c.logits[i];
    off += r.add(recorded[i], c.logits[i], c.band[i], ctx_.place_of(m));
    if (!(c.length[i] > 0)) continue;
    ++s.n, s.r += d, s.r2 += d * d, s.ratio2 += std::pow(d / c.length[i], 2), s.log_a += std::log(c.length[i]);
  }
  if (off == 0 && s.narrow.empty()) return;
  for (const Float f : {Float::kBF16, Float::kF16}) {
    if (unit(f) <= unit(c.stated)) continue;
    std::vector<float> x(c.x.size()), w(c.w.size());
    k::round_values(c.x.data(), static_cast<std::int64_t>(x.size()), f, x.data());
    k::round_values(c.w.data(), static_cast<std::int64_t>(w.size()), f, w.data());
    std::vector<double> narrow;
    product(x, w, t.rows(m), t.experts, c.hidden, &narrow);
    double& worst = s.narrow[f];
    for (std::size_t i = 0; i < narrow.size(); ++i)
      worst = std::max(worst, std::fabs(recorded[i] - narrow[i]) /
                                  (k::bounds::rounded(narrow[i], c.band[i], f) + 1e-300));
  }
}

void Logits::finish() {
  const double jitter = configured_jitter(ctx_.facts);
  for (const auto& [at, s] : residuals_) {
    const auto& [training, layer] = at;
    Row& r = ctx_.row(training ? "logits" : "evaluation_logits", layer);
    if (r.differing == 0) continue;
    for (const auto& [f, worst] : s.narrow) {
      if (worst > 1 || r.name.found) continue;
      r.name.found = true;
      r.name.id = "W12";
      r.name.name = "computed in " + std::string(k::name_of(f));
      r.name.fit = worst;
    }
    // A few logits off are no noise: it moves all of them.
    if (r.name.found || s.n < 32 || 4 * r.differing < r.compared) continue;
    const double mean = s.r / s.n, deviation = std::sqrt(std::max(0.0, s.r2 / s.n - mean * mean));
    const double ratio = std::sqrt(s.ratio2 / s.n), size = std::sqrt(3.0) * ratio;
    const bool shifted = std::fabs(mean) > 5 * deviation / std::sqrt(s.n);
    v::Name name;
    name.found = true;
    name.id = "W13";
    // Which deviation explains the residuals better, by the likelihood of a normal distribution.
    const bool multiplies = !shifted && -s.n * std::log(ratio) - s.log_a > -s.n * std::log(std::sqrt(s.r2 / s.n));
    if (shifted && std::fabs(mean - kEulerGamma) < 0.1 && std::fabs(deviation - kGumbelDeviation) < 0.2) {
      name.id = "W14";
      name.name = "Gumbel noise added to the logits";
    } else if (shifted) {
      continue;
    } else if (multiplies && size <= 0x1p-10) {  // both inputs rounded to 11 bits: sqrt(2) 2^-11
      name.id = "W12";
      name.name = "computed in TensorFloat-32";
      name.also = "noise of 1 +- " + three_digits(size) + " on the router's input";
    } else if (multiplies) {
      name.name = "the router's input multiplied by noise of 1 +- " + three_digits(size);
      if (jitter > 0 && std::fabs(size / jitter - 1) < kJitterBand) {
        name.name += ", the configured jitter";
        if (training) {  // held to what was configured instead
          r.differing = 0;
          r.recorded = size, r.expected = jitter, r.band = kJitterBand * jitter;
          r.distance = std::fabs(size - jitter) / r.band;
          r.held_to += ", with noise of 1 +- the configured jitter on its input";
        }
      } else {
        name.also = "a router_weight that is not the recorded one";
      }
    } else {
      name.name = "noise of deviation " + three_digits(deviation) + " added to the logits";
      name.also = "a router_weight that is not the recorded one";
    }
    r.name = name;
  }
}

}  // namespace moeaudit::replay

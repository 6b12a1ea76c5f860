// How many tokens change experts when the gate is computed in a lower precision, on this checkpoint's own routers.
//
// Every mode sees the same x (router_inputs.h), rounded once to the dtype of the activations, and the router weight as
// stored (a float64 weight is taken as float32).
//
// Modes: "fp32"; "bf16" and "fp16" (inputs of that dtype, exact products, wide sums, one rounding of the logits);
// "nf4" and "int8" (weight through the quantiser and back, then as the activations' dtype), when the router is known to
// be quantised; "executed": the dtype that router.dtype_executed resolved, with the weight in the dtype it is loaded
// in. After the logits every mode follows the family: scores in float32, or in the logits' dtype where the family says
// so.
//
// Modes of a correction bias, with all else in float64: "bias bf16" and "bias fp16" (the bias rounded to that dtype, where
// that changes it); where all its values lie on the grid of such a dtype already, "bias bf16 lost" or "bias fp16 lost": each
// value moved by a seeded draw, uniform over the half spacings to its neighbours, which is all that is left to know of what
// the rounding took.
#include "audit/measures/router_precision.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "audit/families/family.h"
#include "audit/measures/measure.h"
#include "audit/measures/replay_backend.h"
#include "audit/measures/router_inputs.h"
#include "audit/measures/router_replay.h"
#include "kernels/host/gaussian.h"
#include "kernels/host/low_precision.h"
#include "kernels/host/router.h"

namespace moeaudit {
namespace {

namespace k = kernels;
using k::Float;

constexpr std::int64_t kMostTokens = 4096;

std::optional<Float> float_of(DType d) {
  switch (d) {
    case DType::kF32: return Float::kF32;
    case DType::kBF16: return Float::kBF16;
    case DType::kF16: return Float::kF16;
    default: return std::nullopt;
  }
}

const char* mode_name(Float f) { return f == Float::kF32 ? "fp32" : f == Float::kBF16 ? "bf16" : "fp16"; }

/// Dtype of the activations that reach the router. Where nobody says, bfloat16: what fine-tuning runs use.
Float activation_dtype(const FactSheet& facts) {
  if (const Precision* p = facts.precision.get()) {
    if (*p == Precision::kFp32) return Float::kF32;
    return *p == Precision::kAutocastFp16 || *p == Precision::kPureFp16 ? Float::kF16 : Float::kBF16;
  }
  return Float::kBF16;
}

// ---- the measure
// -----------------------------------------------------------------------------------------------------------

void append_row(PrecisionTable* table, const Router& r, const std::string& mode, std::int64_t tokens, double max_logit,
                const Tally& tally) {
  const double n = tokens > 0 ? static_cast<double>(tokens) : 1.0;
  const auto [low, high] = wilson_interval(static_cast<double>(tally.flipped), static_cast<double>(tokens));
  table->layer.push_back(r.layer);
  table->tensor.push_back(r.tensor);
  table->mode.push_back(mode);
  table->tokens.push_back(tokens);
  table->flipped.push_back(static_cast<double>(tally.flipped) / n);
  table->low.push_back(low);
  table->high.push_back(high);
  table->near_ties.push_back(static_cast<double>(tally.near_ties) / n);
  table->weight_error.push_back(tally.weight_error);
  table->max_abs_logit.push_back(max_logit);
  table->overflowed.push_back(tally.overflowed);
}

std::vector<Mode> modes_of(const FactSheet& facts, Float activations) {
  std::vector<Mode> modes = {{"fp32", Float::kF32, Float::kF64, Trip::kNone},
                             {"bf16", Float::kBF16, Float::kF64, Trip::kNone},
                             {"fp16", Float::kF16, Float::kF64, Trip::kNone}};
  if (facts.router_quantised.known() && facts.router_quantised.value()) {
    const std::int64_t bits = facts.quant_bits.known() ? facts.quant_bits.value() : 0;
    if (bits != 8) modes.push_back({"nf4", activations, Float::kF64, Trip::kNf4});
    if (bits != 4) modes.push_back({"int8", activations, Float::kF64, Trip::kInt8});
  }
  return modes;
}

constexpr std::uint64_t kBiasSeed = 20241202;

/// Every value moved within the cell that rounds to it.
std::vector<double> within_rounding(const std::vector<float>& bias, Float dtype, int layer) {
  std::vector<double> out;
  for (std::size_t e = 0; e < bias.size(); ++e) {
    const auto words = k::philox4x32({static_cast<std::uint32_t>(e), static_cast<std::uint32_t>(layer), 0, 0},
                                     {static_cast<std::uint32_t>(kBiasSeed), static_cast<std::uint32_t>(kBiasSeed >> 32)});
    const double u = (static_cast<double>(words[0]) + 0.5) / 4294967296.0 - 0.5;
    out.push_back(bias[e] + u * k::spacing(bias[e], dtype));
  }
  return out;
}

void add_bias_modes(const Router& r, std::vector<Mode>* modes) {
  if (std::all_of(r.correction_bias.begin(), r.correction_bias.end(), [](float v) { return v == 0; })) return;
  for (Float dtype : {Float::kBF16, Float::kF16}) {
    Mode mode{std::string("bias ") + mode_name(dtype), Float::kF64, Float::kF64, Trip::kNone};
    bool changes = false;
    for (float v : r.correction_bias) {
      mode.correction.push_back(k::round_to(v, dtype));
      changes |= mode.correction.back() != v;
    }
    if (!changes) {
      mode.name += " lost";
      mode.correction = within_rounding(r.correction_bias, dtype, r.layer);
    }
    modes->push_back(std::move(mode));
    if (!changes) return;  // what bfloat16 can hold, float16 mostly can: only the coarser grid tells something
  }
}

class RouterPrecision {
 public:
  explicit RouterPrecision(MeasureContext& ctx)
      : ctx_(ctx),
        routing_(ctx.facts.routing.value()),
        activations_(activation_dtype(ctx.facts)),
        inputs_(ctx.hidden_states, activations_),
        modes_(modes_of(ctx.facts, activations_)),
        budget_(affordable_tokens(work())),
        backend_(ctx, core_seconds_a_token(work()) * static_cast<double>(budget_) / std::max(ctx.threads, 1)) {}

  void run() {
    const RouterTable& routers = ctx_.facts.routers.value();
    for (std::size_t row = 0; row < routers.layer.size(); ++row) {
      const std::string fault = run_router(row);
      if (!fault.empty()) faults_.push_back(fault);
      if (ctx_.progress) {
        ctx_.progress("router precision", static_cast<double>(row + 1) / static_cast<double>(routers.layer.size()));
      }
    }
    conclude();
  }

 private:
  RouterWork work() const {
    const RouterTable& t = ctx_.facts.routers.value();
    RouterWork w;
    w.routers = static_cast<std::int64_t>(t.layer.size());
    for (std::size_t i = 0; i < t.layer.size(); ++i) {
      w.experts = std::max(w.experts, t.experts[i]);
      w.hidden = std::max(w.hidden, t.hidden[i]);
    }
    w.float_modes = 1;
    w.wide_modes = static_cast<int>(modes_.size());  // the truth and all modes but fp32
    return w;
  }

  /// Empty, or why this router was left out.
  std::string run_router(std::size_t row) {
    Router r;
    const RouterTable& routers = ctx_.facts.routers.value();
    const Family* family = ctx_.facts.family.known() ? find_family(ctx_.facts.family.value()) : nullptr;
    if (family && !family->table_layers.key.empty() && routing_.correction_bias && routers.bias[row].empty())
      return routers.tensor[row] + " weighs experts that a table of token ids gives";
    std::string fault = read_router(ctx_.model, routers, routing_, row, &r);
    if (!fault.empty()) return fault;
    const std::int64_t top_k = ctx_.facts.top_k.value();
    const k::Status status = k::check_route(route_args<float>(routing_, r, top_k), {});
    if (status != k::Status::kOk) return r.tensor + ": " + k::name_of(status);

    std::int64_t tokens = budget_;
    const TensorView* view = nullptr;
    fault = inputs_.probe() ? prepare_probe(&r, tokens) : prepare_states(r, &view, &tokens);
    if (!fault.empty()) return fault;

    const RouterReplay replay(r, routing_, top_k, activations_, modes_for(r), backend_);
    const std::int64_t tile_size = backend_.tile(), tiles = (tokens + tile_size - 1) / tile_size;
    std::vector<TileTally> tallies(static_cast<std::size_t>(tiles));
    std::vector<Scratch> scratch;
    for (int w = 0; w < std::clamp<std::int64_t>(ctx_.threads, 1, tiles); ++w)
      scratch.emplace_back(r, top_k, tile_size);
    parallel_for(ctx_.threads, tiles, [&](std::int64_t tile, int worker) {
      Scratch& s = scratch[static_cast<std::size_t>(worker)];
      const std::int64_t first = tile * tile_size;
      const std::int64_t n = inputs_.fill(r.norm.data(), view, r.hidden, first,
                                          std::min(tile_size, tokens - first), tokens, s.x.data());
      if (n > 0) replay.run(n, s, &tallies[static_cast<std::size_t>(tile)]);
    });
    return report(r, replay.modes(), tallies, tokens);
  }

  std::string prepare_probe(Router* r, std::int64_t tokens) {
    std::string name = beside(r->tensor, routing_.weight_tensor, routing_.input_norm_tensor);
    if (ctx_.model.find(name) == nullptr) name = with_layer(routing_.input_norm_tensor, r->layer);
    const std::string fault =
        name.empty() ? "the family names none" : read_floats(ctx_.model, name, r->hidden, &r->norm);
    if (!fault.empty()) {
      r->norm.assign(static_cast<std::size_t>(r->hidden), 1.0f);
      ++without_norm_;
    } else if (routing_.input_norm_adds_one) {
      for (float& w : r->norm) w += 1.0f;
    } else if (routing_.input_norm_over_root) {
      for (float& w : r->norm) w /= std::sqrt(static_cast<float>(r->hidden));
    }
    inputs_.make_probe(tokens, r->hidden, ctx_.threads);
    return {};
  }

  std::string prepare_states(const Router& r, const TensorView** view, std::int64_t* tokens) {
    *view = inputs_.tensor_of(r.layer);
    if (*view == nullptr) return "the hidden states have no tensor for layer " + std::to_string(r.layer);
    const std::int64_t rows = RouterInputs::rows_of(**view, r.hidden);
    if (rows == 0) {
      return "the hidden states tensor " + std::string((*view)->name) + " is not a float tensor [tokens, " +
             std::to_string(r.hidden) + "] as " + r.tensor + " needs it";
    }
    *tokens = std::min(*tokens, rows);
    return {};
  }

  /// The modes of all routers, and where loading changes this router's weight, the executed one apart.
  std::vector<Mode> modes_for(const Router& r) const {
    std::vector<Mode> modes = modes_;
    const std::optional<Float> loaded =
        ctx_.facts.load_dtype.known() ? float_of(ctx_.facts.load_dtype.value()) : std::nullopt;
    if (const std::optional<Float> executed = executed_dtype(); executed && loaded && !survives(r, *loaded)) {
      modes.push_back({"executed", *executed, *loaded, Trip::kNone});
    }
    add_bias_modes(r, &modes);
    return modes;
  }

  std::optional<Float> executed_dtype() const {
    return ctx_.facts.router_dtype.known() ? float_of(ctx_.facts.router_dtype.value()) : std::nullopt;
  }

  std::string report(const Router& r, const std::vector<ReadyMode>& modes, const std::vector<TileTally>& tallies,
                     std::int64_t asked) {
    TileTally sum;
    sum.modes.resize(modes.size());
    for (const TileTally& t : tallies) {
      sum.tokens += t.tokens;
      sum.max_abs_logit = std::max(sum.max_abs_logit, t.max_abs_logit);
      for (std::size_t m = 0; m < t.modes.size(); ++m) sum.modes[m].add(t.modes[m]);
    }
    if (sum.tokens == 0)
      return "no row of the hidden states for " + r.tensor + " is finite in " + k::name_of(activations_);
    left_out_ += asked - sum.tokens;
    most_tokens_ = std::max(most_tokens_, sum.tokens);
    bool has_executed = false;
    for (std::size_t m = 0; m < modes.size(); ++m) {
      has_executed = has_executed || modes[m].mode.name == "executed";
      append_row(&table_, r, modes[m].mode.name, sum.tokens, sum.max_abs_logit, sum.modes[m]);
    }
    if (const std::optional<Float> executed = executed_dtype(); executed && !has_executed) {
      for (std::size_t m = 0; m < modes.size(); ++m) {
        if (modes[m].mode.name != mode_name(*executed)) continue;
        append_row(&table_, r, "executed", sum.tokens, sum.max_abs_logit, sum.modes[m]);
      }
    }
    ++measured_;
    return {};
  }

  void conclude() {
    std::string skipped;
    if (!faults_.empty()) {
      skipped = std::to_string(faults_.size()) + " router" + (faults_.size() > 1 ? "s" : "") +
                " left out, the first because " + faults_.front();
    }
    std::string note = std::to_string(measured_) + " routers, " + std::to_string(most_tokens_) + " tokens each";
    table_.probe = inputs_.probe();
    Source source;
    if (inputs_.probe()) {
      table_.input = "probe: seeded unit Gaussian through the norm weight";
      if (without_norm_ > 0)
        table_.input += " (norm weight not found for " + std::to_string(without_norm_) + " routers: taken as 1)";
      source = ctx_.facts.routers.source();
      source.role = Role::kModelWeights;
    } else {
      source.role = Role::kHiddenStates;
      source.file = ctx_.hidden_states.files().empty() ? std::string() : ctx_.hidden_states.files().front();
      table_.input = "hidden states " + source.file;
      if (left_out_ > 0) note += "; " + std::to_string(left_out_) + " rows that are not finite left out";
    }
    note += ", x in " + std::string(k::name_of(activations_)) + ", " + table_.input;
    if (!skipped.empty()) note += "; " + skipped;
    ctx_.records.push_back({"router_precision", backend_.name(), note, backend_.warning()});
    if (measured_ == 0) {
      ctx_.facts.router_precision.explain_unknown(skipped);
    } else {
      ctx_.facts.router_precision.set(std::move(table_), Origin::kMeasured, std::move(source));
    }
  }

  MeasureContext& ctx_;
  Routing routing_;
  Float activations_;
  RouterInputs inputs_;
  std::vector<Mode> modes_;
  std::int64_t budget_;
  ReplayBackend backend_;
  PrecisionTable table_;
  std::vector<std::string> faults_;
  std::int64_t measured_ = 0, without_norm_ = 0, left_out_ = 0, most_tokens_ = 0;
};

void run(MeasureContext& ctx) {
  const auto skip = [&ctx](const std::string& why) {
    ctx.facts.router_precision.explain_unknown(why);
    ctx.records.push_back({"router_precision", "", "skipped: " + why});
  };
  if (!ctx.replays) return skip("--static");
  if (!ctx.facts.routers.known() || ctx.facts.routers.value().layer.empty())
    return skip("no router found in the weights");
  if (!ctx.facts.routing.known()) return skip("the routing conventions of this model are not known");
  if (!ctx.facts.top_k.known()) return skip("router.top_k is not known");
  RouterPrecision(ctx).run();
}

constexpr std::string_view kSupplies[] = {"router.precision"};
constexpr std::string_view kWants[] = {"weights.routers", "quantisation.router_quantised"};

}  // namespace

std::pair<double, double> wilson_interval(double hits, double n) {
  if (n <= 0) return {0.0, 1.0};
  constexpr double z = 1.959963984540054;  // normal quantile of 0.975
  const double p = hits / n;
  const double centre = (p + z * z / (2 * n)) / (1 + z * z / n);
  const double half = z * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n);
  return {hits == 0 ? 0.0 : centre - half, hits == n ? 1.0 : centre + half};
}

double core_seconds_a_token(const RouterWork& work) {
  constexpr double kWideFlops = 40e9, kFloatFlops = 60e9;
  const double experts = static_cast<double>((work.experts + 7) / 8 * 8), hidden = static_cast<double>(work.hidden);
  const double gate = 2 * experts * hidden * (work.wide_modes / kWideFlops + work.float_modes / kFloatFlops);
  const double input = 1e-9 * hidden;
  const double route = (8e-9 * experts + 1e-7) * (1 + work.wide_modes + work.float_modes);
  return static_cast<double>(work.routers) * (gate + input + route);
}

std::int64_t affordable_tokens(const RouterWork& work) {
  constexpr double kCoreSeconds = 5.0;
  const double token = core_seconds_a_token(work);
  const double tokens = token > 0 ? kCoreSeconds / token : static_cast<double>(kMostTokens);
  if (tokens >= static_cast<double>(kMostTokens)) return kMostTokens;
  return std::max<std::int64_t>(static_cast<std::int64_t>(tokens) / Scratch::kTile * Scratch::kTile, Scratch::kTile);
}

extern const Measure measure_router_precision;
const Measure measure_router_precision = {"router_precision", kSupplies, kWants, run};

}  // namespace moeaudit

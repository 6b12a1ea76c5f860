#include "audit/measures/replay/finite.h"

#include <cmath>

namespace moeaudit::replay {
namespace {

/// `bad` of `n` are not finite; the first of them are told in held_to.
void add(Row* r, const char* held_to, std::int64_t n, std::int64_t bad, const Place& place) {
  r->compared += n;
  if (r->differing == 0) r->held_to = held_to;
  if (bad > 0 && r->differing == 0) r->place = place;
  r->differing += bad;
  r->recorded = static_cast<double>(r->differing);
  r->expected = 0, r->band = 1, r->distance = r->recorded;
}

}  // namespace

void replay_finite(Context* ctx, const MicroBatchRecord& m, const LayerTensors& t, bool replayed) {
  const std::int64_t rows = t.rows(m);
  if (!t.router_logits || rows < 1 || t.experts < 1) return;
  std::int64_t bad = 0;
  if (!replayed) {
    std::vector<double> row(static_cast<std::size_t>(t.experts));
    for (std::int64_t i = 0; i < rows; ++i) {
      if (!read_values(*t.router_logits, i * t.experts, t.experts, row.data())) return;
      bool one = false, wrong = false;  // -inf masks an expert; all of them it may not
      for (const double x : row) {
        one = one || std::isfinite(x);
        wrong = wrong || std::isnan(x) || x == kInf;
      }
      bad += wrong || !one;
    }
  }
  add(&ctx->row("finite_logits", t.layer), "finite router_logits", rows, bad, ctx->place_of(m));
}

void replay_finite(Context* ctx, const MicroBatchRecord& m) {
  const std::pair<const char*, const std::optional<double>*> losses[] = {{"a finite loss", &m.loss},
                                                                         {"a finite ce", &m.ce},
                                                                         {"a finite aux_loss", &m.aux_loss},
                                                                         {"a finite z_loss", &m.z_loss},
                                                                         {"a finite returned_loss", &m.returned_loss}};
  for (const auto& [held_to, loss] : losses) {
    if (!*loss) continue;
    const bool named = loss == &m.z_loss && std::isinf(**loss);  // an overflow that the row z_loss names
    add(&ctx->row("finite_losses"), held_to, 1, std::isfinite(**loss) || named ? 0 : 1, ctx->place_of(m));
  }
}

void replay_finite(Context* ctx, const StepTensors& tensors) {
  const StepRecord& s = *tensors.record;
  if (s.loss_scale || ctx->facts.mixed_precision == "fp16") return;  // the scaler skips such a step, and means to
  if (s.grad_norm)
    add(&ctx->row("finite_losses"), "a finite grad_norm", 1, std::isfinite(*s.grad_norm) ? 0 : 1, ctx->place_of(s));
  for (const StepLayerTensors& t : tensors.layers) {
    const std::pair<const char*, const std::optional<TensorView>*> gradients[] = {
        {"a finite router_grad", &t.router_grad}, {"a finite expert_grad_norm", &t.expert_grad_norm}};
    for (const auto& [held_to, gradient] : gradients) {
      if (!*gradient) continue;
      std::int64_t n = 1, bad = 0;
      for (const std::int64_t d : (*gradient)->shape) n *= d;
      std::vector<double> values(static_cast<std::size_t>(n));
      if (!read_values(**gradient, 0, n, values.data())) continue;
      for (const double x : values) bad += !std::isfinite(x);
      add(&ctx->row("finite_gradients", t.layer), held_to, n, bad, ctx->place_of(s));
    }
  }
}

}  // namespace moeaudit::replay

// Drops beyond the capacity on LibTorch.
#include "reference/dispatch.h"

#include <ATen/ATen.h>

#include <vector>

namespace moeaudit::reference {

at::Tensor capacity(CapacityForm form, const at::Tensor& cases, const at::Tensor& factors) {
  const auto column = [&](std::int64_t i) { return cases.select(1, i).to(at::kDouble); };
  const at::Tensor t = column(0), e = column(1), k = column(2), ep = column(4), world = column(5), alignment = column(6), largest = column(7);
  at::Tensor places;
  switch (form) {
    case CapacityForm::kMegatron: places = at::ceil(t * k / e * factors); break;
    case CapacityForm::kDeepSpeed: places = at::maximum(at::ceil((t / e).to(at::kFloat) * (factors * k).to(at::kFloat)), column(3)); break;
    case CapacityForm::kMegaBlocks: places = at::floor(factors * (k * t * ep / e)); places = at::where(places.eq(0), largest, places); break;
    case CapacityForm::kOlmoCore: places = ep * at::ceil(at::floor(factors * (k * t / e)) / 8) * 8; break;
    case CapacityForm::kTutel: {
      const at::Tensor configured = k * at::floor(factors.abs() * at::ceil(t / e));
      places = at::where(factors.gt(0), configured, at::where(factors.eq(0), largest, at::minimum(largest, configured)));
      places = at::ceil(places / alignment) * alignment;
      break;
    }
    case CapacityForm::kFastMoE: places = at::div(at::ceil(factors * t) * k, world * at::div(e, world, "floor"), "floor"); break;
  }
  return places.to(at::kLong);
}

at::Tensor drop(const at::Tensor& chosen, const at::Tensor& weights, const at::Tensor& keys, const at::Tensor& scores,
                DropOrder order, std::int64_t capacity) {
  const std::int64_t tokens = chosen.size(0), k = chosen.size(1);
  const at::Tensor token = at::arange(tokens).unsqueeze(1).expand({tokens, k}),
                   rank = at::arange(k).unsqueeze(0).expand({tokens, k});
  // What decides, most significant first; smaller comes first.
  std::vector<at::Tensor> by;
  if (order == DropOrder::kWeights) by = {-weights, token, rank};
  if (order == DropOrder::kKeys) by = {keys, token, rank};
  if (order == DropOrder::kTokens) by = {token, rank};
  if (order == DropOrder::kChoices) by = {rank, token};
  if (order == DropOrder::kBatchPrioritised) by = {rank, -scores.amax(1, true).expand({tokens, k}), token};
  const at::Tensor expert = chosen.reshape({-1});
  at::Tensor before = at::zeros({tokens * k, tokens * k}, at::kBool), level = at::ones_like(before);
  for (const at::Tensor& t : by) {  // before[i, j]: j comes before i
    const at::Tensor v = t.to(at::kDouble).reshape({-1});
    before = before.logical_or(level.logical_and(v.unsqueeze(0).lt(v.unsqueeze(1))));
    level = level.logical_and(v.unsqueeze(0).eq(v.unsqueeze(1)));
  }
  const at::Tensor same = expert.unsqueeze(0).eq(expert.unsqueeze(1)).logical_and(expert.ge(0).unsqueeze(0));
  const at::Tensor place = before.logical_and(same).sum(1);
  const at::Tensor kept = place.lt(capacity).logical_and(expert.ge(0));
  return at::where(kept, place, at::full_like(place, -1)).reshape({tokens, k});
}

at::Tensor kept_weights(const at::Tensor& weights, const at::Tensor& place, bool renormalise, double smallest) {
  const at::Tensor kept = weights.to(at::kDouble) * place.ge(0).to(at::kDouble);
  return renormalise ? kept / kept.sum(1, true).clamp_min(smallest) : kept;
}

}  // namespace moeaudit::reference

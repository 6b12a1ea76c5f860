#include "kernels/host/dispatch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace moeaudit::kernels {
namespace {

/// A double that is a whole number, kept within what the caller can hold.
std::int64_t whole(double v) {
  return v >= 9e18 ? std::numeric_limits<std::int64_t>::max() : static_cast<std::int64_t>(v);
}

template <class T>
Status run(const DropArgs<T>& a, const DropResult<T>& r) {
  if (const Status status = check_drop(a, r); status != Status::kOk) return status;
  const std::int64_t choices = a.tokens * a.top_k;
  std::vector<std::int64_t> start(static_cast<std::size_t>(a.experts + 1));  // of each expert's choices in `order`
  for (std::int64_t i = 0; i < choices; ++i) {
    if (a.chosen[i] >= a.experts) return Status::kBadShape;
    if (a.chosen[i] >= 0) ++start[static_cast<std::size_t>(a.chosen[i]) + 1];
  }
  for (std::size_t e = 1; e < start.size(); ++e) start[e] += start[e - 1];
  std::vector<std::int64_t> order(static_cast<std::size_t>(start.back())), next(start.begin(), start.end() - 1);
  for (std::int64_t i = 0; i < choices; ++i) {
    if (a.chosen[i] >= 0) order[static_cast<std::size_t>(next[static_cast<std::size_t>(a.chosen[i])]++)] = i;
  }
  std::fill(r.place, r.place + choices, -1);
  std::int64_t dropped = 0;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    const auto first = order.begin() + start[static_cast<std::size_t>(e)],
               last = order.begin() + start[static_cast<std::size_t>(e) + 1];
    if (a.order != DropOrder::kTokens)
      std::sort(first, last, [&](std::int64_t x, std::int64_t y) { return comes_before(a, x, y); });
    const std::int64_t kept = std::min<std::int64_t>(a.capacity, last - first);
    for (std::int64_t i = 0; i < kept; ++i) r.place[first[i]] = static_cast<std::int32_t>(i);
    dropped += (last - first) - kept;
    if (r.kept != nullptr) r.kept[e] = kept;
  }
  std::int64_t lost = 0;
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    bool had = false, has = false;
    for (std::int64_t j = t * a.top_k; j < (t + 1) * a.top_k; ++j) {
      had |= a.chosen[j] >= 0;
      has |= r.place[j] >= 0;
    }
    lost += had && !has;
    if (r.weights != nullptr) kept_weights(a, t, r.place, std::numeric_limits<T>::epsilon(), r.weights);
  }
  if (r.dropped != nullptr) *r.dropped = dropped;
  if (r.tokens_lost != nullptr) *r.tokens_lost = lost;
  return Status::kOk;
}

}  // namespace

Status capacity(const CapacityArgs& a, std::int64_t* places) {
  if (a.tokens < 0 || a.experts < 1 || a.top_k < 1 || a.expert_parallel_size < 1 || a.world_size < 1 ||
      a.experts % a.world_size != 0)
    return Status::kBadShape;
  if (!(a.factor > 0) || a.factor - a.factor != 0) return Status::kBadOption;
  if (places == nullptr) return Status::kNullPointer;
  const double t = static_cast<double>(a.tokens), e = static_cast<double>(a.experts), k = static_cast<double>(a.top_k);
  const double ep = static_cast<double>(a.expert_parallel_size);
  switch (a.form) {
    case CapacityForm::kMegatron: *places = whole(std::ceil(t * k / e * a.factor)); break;
    case CapacityForm::kDeepSpeed:
      *places =
          std::max(whole(std::ceil(static_cast<float>(t / e) * static_cast<float>(a.factor * k))), a.min_capacity);
      break;
    case CapacityForm::kMegaBlocks: *places = whole(a.factor * (k * t * ep / e)); break;
    case CapacityForm::kOlmoCore:
      *places = a.expert_parallel_size * ((whole(a.factor * (k * t / e)) + 7) / 8 * 8);
      break;
    case CapacityForm::kTutel:
      *places = a.top_k * whole(a.factor * static_cast<double>((a.tokens + a.experts - 1) / a.experts));
      break;
    case CapacityForm::kFastMoE: *places = whole(std::ceil(a.factor * t)) * a.top_k / a.experts; break;
  }
  return Status::kOk;
}

Status drop(const DropArgs<float>& args, const DropResult<float>& result) { return run(args, result); }
Status drop(const DropArgs<double>& args, const DropResult<double>& result) { return run(args, result); }

}  // namespace moeaudit::kernels

#include "kernels/host/dispatch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace moeaudit::kernels {
namespace {

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
  std::vector<T> important;
  if (a.order == DropOrder::kBatchPrioritised) {
    for (std::int64_t t = 0; t < a.tokens; ++t) important.push_back(importance(a, t));
  }
  std::fill(r.place, r.place + choices, -1);
  std::int64_t dropped = 0;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    const auto first = order.begin() + start[static_cast<std::size_t>(e)],
               last = order.begin() + start[static_cast<std::size_t>(e) + 1];
    if (a.order != DropOrder::kTokens)
      std::sort(first, last, [&](std::int64_t x, std::int64_t y) { return comes_before(a, important.data(), x, y); });
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

/// A whole number that no int64 may hold.
struct Whole {
  Whole(std::int64_t v) : value(v) {}  // NOLINT(google-explicit-constructor)
  explicit Whole(double v) {           // rounded towards 0
    fits = v > -0x1p63 && v < 0x1p63;
    if (fits) value = static_cast<std::int64_t>(v);
  }
  std::int64_t value = 0;
  bool fits = true;
};
Whole operator*(Whole a, Whole b) {
  a.fits = a.fits && b.fits && !__builtin_mul_overflow(a.value, b.value, &a.value);
  return a;
}
Whole up_to_multiple(Whole a, std::int64_t of) {
  const std::int64_t over = a.value % of;
  a.fits = a.fits && (over == 0 || !__builtin_add_overflow(a.value, of - over, &a.value));
  return a;
}

}  // namespace

Status capacity(const CapacityArgs& a, std::int64_t* places) {
  if (a.tokens < 0 || a.experts < 1 || a.top_k < 1 || a.expert_parallel_size < 1 || a.world_size < 1 ||
      a.experts % a.world_size != 0 || a.alignment < 1 || (a.largest_count != nullptr && *a.largest_count < 0))
    return Status::kBadShape;
  const bool tutel = a.form == CapacityForm::kTutel, megablocks = a.form == CapacityForm::kMegaBlocks;
  if (!std::isfinite(a.factor) || (a.factor < 0 && !tutel) || (a.factor == 0 && !tutel && !megablocks))
    return Status::kBadOption;
  if (places == nullptr) return Status::kNullPointer;
  const double t = static_cast<double>(a.tokens), e = static_cast<double>(a.experts), k = static_cast<double>(a.top_k);
  const double ep = static_cast<double>(a.expert_parallel_size);
  Whole c = 0;
  bool largest = tutel && a.factor <= 0;  // the largest count, or at most that
  switch (a.form) {
    case CapacityForm::kMegatron: c = Whole(std::ceil(t * k / e * a.factor)); break;
    case CapacityForm::kDeepSpeed:
      c = Whole(std::ceil(static_cast<double>(static_cast<float>(t / e) * static_cast<float>(a.factor * k))));
      c.value = std::max(c.value, a.min_capacity);
      break;
    case CapacityForm::kMegaBlocks:
      c = Whole(a.factor * (k * t * ep / e));
      largest = c.fits && c.value == 0;
      break;
    case CapacityForm::kOlmoCore:
      c = Whole(a.expert_parallel_size) * up_to_multiple(Whole(a.factor * (k * t / e)), 8);
      break;
    case CapacityForm::kTutel:
      c = Whole(a.top_k) *
          Whole(std::fabs(a.factor) * static_cast<double>(a.tokens / a.experts + (a.tokens % a.experts != 0)));
      break;
    case CapacityForm::kFastMoE:
      c = Whole(std::ceil(a.factor * t)) * Whole(a.top_k);
      c.value /= a.experts;
      break;
  }
  if (largest) {
    if (a.largest_count == nullptr) return Status::kNullPointer;
    if (!(a.factor < 0 && c.fits && c.value < *a.largest_count)) c = *a.largest_count;
  }
  if (tutel) c = up_to_multiple(c, a.alignment);
  if (!c.fits) return Status::kBadOption;
  *places = c.value;
  return Status::kOk;
}

Status drop(const DropArgs<float>& args, const DropResult<float>& result) { return run(args, result); }
Status drop(const DropArgs<double>& args, const DropResult<double>& result) { return run(args, result); }

}  // namespace moeaudit::kernels

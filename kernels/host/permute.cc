#include "kernels/host/permute.h"

#include <algorithm>
#include <vector>

namespace moeaudit::kernels {
namespace {

template <class T>
Status run_gather(const Permutation& p, const RowShape& s, const T* x, T* rows) {
  if (const Status status = check_rows(p, s); status != Status::kOk) return status;
  if (s.rows > 0 && s.hidden > 0 && (rows == nullptr || (s.tokens > 0 && x == nullptr))) return Status::kNullPointer;
  for (std::int64_t r = 0; r < s.rows; ++r) {
    T* to = rows + r * s.hidden;
    if (p.slot_of_row[r] < 0) {
      std::fill(to, to + s.hidden, T{});
    } else {
      const T* from = x + p.slot_of_row[r] / s.top_k * s.hidden;
      std::copy(from, from + s.hidden, to);
    }
  }
  return Status::kOk;
}

template <class T>
Status run_combine(const Permutation& p, const RowShape& s, const T* rows, const Wide<T>* weights, T* y) {
  if (const Status status = check_rows(p, s); status != Status::kOk) return status;
  if (s.tokens > 0 && s.hidden > 0 && (y == nullptr || (s.rows > 0 && rows == nullptr))) return Status::kNullPointer;
  for (std::int64_t t = 0; t < s.tokens; ++t) {
    for (std::int64_t i = 0; i < s.hidden; ++i) {
      Wide<T> sum = 0;
      for (std::int64_t slot = t * s.top_k; slot < (t + 1) * s.top_k; ++slot) {
        const std::int64_t row = p.row_of_slot[slot];
        if (row >= 0) sum = add_choice(sum, weights == nullptr ? nullptr : weights + slot, rows[row * s.hidden + i]);
      }
      y[t * s.hidden + i] = narrow<T>(sum);
    }
  }
  return Status::kOk;
}

template <class T>
Status run_combine_backward(const Permutation& p, const RowShape& s, const T* rows, const Wide<T>* weights,
                            const T* d_y, T* d_rows, Wide<T>* d_weights) {
  if (const Status status = check_rows(p, s); status != Status::kOk) return status;
  const bool some = s.tokens > 0 && s.hidden > 0;
  if (some && (d_y == nullptr || (d_weights != nullptr && s.rows > 0 && rows == nullptr))) return Status::kNullPointer;
  for (std::int64_t r = 0; d_rows != nullptr && r < s.rows; ++r) {
    const std::int64_t slot = p.slot_of_row[r];
    for (std::int64_t i = 0; i < s.hidden; ++i) {
      if (slot < 0) {
        d_rows[r * s.hidden + i] = T{};
        continue;
      }
      const Wide<T> d = widen(d_y[slot / s.top_k * s.hidden + i]);
      d_rows[r * s.hidden + i] = narrow<T>(weights == nullptr ? d : weights[slot] * d);
    }
  }
  for (std::int64_t slot = 0; d_weights != nullptr && slot < s.tokens * s.top_k; ++slot) {
    const std::int64_t row = p.row_of_slot[slot];
    d_weights[slot] =
        row < 0 ? Wide<T>(0) : dot_by_lanes(d_y + slot / s.top_k * s.hidden, rows + row * s.hidden, s.hidden);
  }
  return Status::kOk;
}

}  // namespace

Status permute(const PermuteArgs& a, const Permutation& r) {
  if (const Status status = check_permute(a, r); status != Status::kOk) return status;
  const std::int64_t slots = a.tokens * a.top_k;
  std::fill(r.offsets, r.offsets + a.experts + 1, 0);
  for (std::int64_t i = 0; i < slots; ++i) {
    if (a.chosen[i] >= a.experts) return Status::kBadShape;
    if (a.place != nullptr && a.place[i] >= a.capacity) return Status::kBadShape;
    if (a.chosen[i] >= 0) ++r.offsets[a.chosen[i] + 1];
  }
  for (std::int64_t e = 1; e <= a.experts; ++e)
    r.offsets[e] = a.place != nullptr ? e * a.capacity : r.offsets[e] + r.offsets[e - 1];
  std::fill(r.slot_of_row, r.slot_of_row + permuted_rows(a), -1);
  std::vector<std::int64_t> next(r.offsets, r.offsets + a.experts);
  for (std::int64_t i = 0; i < slots; ++i) {
    std::int64_t row = -1;
    if (a.chosen[i] >= 0 && a.place == nullptr) row = next[static_cast<std::size_t>(a.chosen[i])]++;
    if (a.chosen[i] >= 0 && a.place != nullptr && a.place[i] >= 0) row = a.chosen[i] * a.capacity + a.place[i];
    r.row_of_slot[i] = static_cast<std::int32_t>(row);
    if (row < 0) continue;
    if (r.slot_of_row[row] >= 0) return Status::kBadShape;
    r.slot_of_row[row] = static_cast<std::int32_t>(i);
  }
  return Status::kOk;
}

Status gather(const Permutation& p, const RowShape& s, const float* x, float* rows) {
  return run_gather(p, s, x, rows);
}
Status gather(const Permutation& p, const RowShape& s, const double* x, double* rows) {
  return run_gather(p, s, x, rows);
}
Status gather(const Permutation& p, const RowShape& s, const BFloat16* x, BFloat16* rows) {
  return run_gather(p, s, x, rows);
}
Status combine(const Permutation& p, const RowShape& s, const float* rows, const float* weights, float* y) {
  return run_combine(p, s, rows, weights, y);
}
Status combine(const Permutation& p, const RowShape& s, const double* rows, const double* weights, double* y) {
  return run_combine(p, s, rows, weights, y);
}
Status combine(const Permutation& p, const RowShape& s, const BFloat16* rows, const float* weights, BFloat16* y) {
  return run_combine(p, s, rows, weights, y);
}
Status combine_backward(const Permutation& p, const RowShape& s, const float* rows, const float* weights,
                        const float* d_y, float* d_rows, float* d_weights) {
  return run_combine_backward(p, s, rows, weights, d_y, d_rows, d_weights);
}
Status combine_backward(const Permutation& p, const RowShape& s, const double* rows, const double* weights,
                        const double* d_y, double* d_rows, double* d_weights) {
  return run_combine_backward(p, s, rows, weights, d_y, d_rows, d_weights);
}
Status combine_backward(const Permutation& p, const RowShape& s, const BFloat16* rows, const float* weights,
                        const BFloat16* d_y, BFloat16* d_rows, float* d_weights) {
  return run_combine_backward(p, s, rows, weights, d_y, d_rows, d_weights);
}

}  // namespace moeaudit::kernels

#include "reference/weight_scan.h"

#include <ATen/ATen.h>

#include <limits>

namespace moeaudit::reference {

WeightScan weight_scan(const at::Tensor& values) {
  const at::Tensor x = values.to(at::kDouble).reshape({-1});
  const at::Tensor finite = at::isfinite(x);
  const at::Tensor bad = at::nonzero(finite.logical_not());
  const at::Tensor kept = x.masked_select(finite);
  WeightScan r;
  r.non_finite = bad.size(0);
  if (r.non_finite > 0) r.first_non_finite = bad[0][0].item<std::int64_t>();
  r.min = r.max = std::numeric_limits<double>::quiet_NaN();
  if (kept.numel() == 0) return r;
  r.zeros = kept.eq(0).sum().item<std::int64_t>();
  r.min = kept.min().item<double>();
  r.max = kept.max().item<double>();
  r.sum = kept.sum().item<double>();
  r.sum_of_squares = (kept * kept).sum().item<double>();
  r.absolute = kept.abs().sum().item<double>();
  return r;
}

}  // namespace moeaudit::reference

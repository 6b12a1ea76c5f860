#include "audit/measures/log_numbers.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdint>

namespace moeaudit {

bool LogColumn::at(std::size_t i, double* v) const {
  if (!(*has)[i] || !std::isfinite((*value)[i])) return false;
  *v = (*value)[i];
  return true;
}

std::vector<LogColumn> columns_of(const LogTable& log) {
  return {{"loss", &log.loss, &log.has_loss},
          {"ce", &log.ce, &log.has_ce},
          {"aux_loss", &log.aux_loss, &log.has_aux_loss},
          {"z_loss", &log.z_loss, &log.has_z_loss},
          {"grad_norm", &log.grad_norm, &log.has_grad_norm},
          {"eval_loss", &log.eval_loss, &log.has_eval_loss}};
}

void PrintedDigits::add(double v) {
  if (!std::isfinite(v) || v == 0) return;
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, std::fabs(v), std::chars_format::scientific).ptr;
  const char* const e = std::find(text, static_cast<char*>(end), 'e');
  const int digits = e - text > 1 ? static_cast<int>(e - text) - 1 : 1;  // "1.25e-03" has 3
  int exponent = 0;
  std::from_chars(e + (e[1] == '+' ? 2 : 1), end, exponent);
  decimals_ = std::max(decimals_, digits - 1 - exponent);
  significant_ = std::max(significant_, digits);
  ++values_;
  const float f = static_cast<float>(v);
  bf16_ = bf16_ && static_cast<double>(f) == v && (std::bit_cast<std::uint32_t>(f) & 0xffffu) == 0;
}

void PrintedDigits::at_least(int significant) {
  if (significant <= significant_) return;
  decimals_ += significant - significant_;
  significant_ = significant;
  bf16_ = false;
}

double PrintedDigits::unit(double v) const {
  if (values_ == 0 || v == 0) return std::pow(10.0, -decimals_);
  const double exponent = std::floor(std::log10(std::fabs(v)));
  const double printed = std::max(std::pow(10.0, -decimals_), std::pow(10.0, exponent - significant_ + 1));
  return bf16_ ? std::max(printed, std::ldexp(1.0, std::ilogb(v) - 7)) : printed;
}

double PrintedDigits::slack(double v) const {
  constexpr double kFloat32Sums = 16 * 0x1p-24;  // losses are sums of float32: one rounding a micro-batch and mean
  return 0.5 * unit(v) + kFloat32Sums * std::fabs(v);
}

PrintedDigits digits_of(const LogColumn& column) {
  PrintedDigits digits;
  double v = 0;
  for (std::size_t i = 0; i < column.value->size(); ++i) {
    if (column.at(i, &v)) digits.add(v);
  }
  return digits;
}

}  // namespace moeaudit

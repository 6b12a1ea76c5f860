// Numbers of a training log, and how exactly they were printed.
#pragma once

#include <string_view>
#include <vector>

#include "audit/facts/values.h"

namespace moeaudit {

/// A quantity of the log by its name: loss, ce, aux_loss, z_loss, grad_norm, eval_loss.
struct LogColumn {
  std::string_view name;
  const std::vector<double>* value;
  const std::vector<char>* has;
  bool at(std::size_t i, double* v) const;  // false: not there, or not finite
};
std::vector<LogColumn> columns_of(const LogTable& log);

/// The digits of a column, found in its values: a double that was read from n digits has no more than n in its
/// shortest decimal form, so the longest of the column is what its writer prints. Fixed decimals and fixed significant
/// digits cannot be told apart then, and the coarser of the two holds; so does bfloat16 where every value is one.
class PrintedDigits {
 public:
  void add(double v);
  void at_least(int significant);  // what is known to be written with so many digits
  int significant() const { return significant_; }
  double unit(double v) const;   // one unit of the last digit of v
  double slack(double v) const;  // how far v can lie from what was computed: half a unit, and float32 sums

 private:
  int decimals_ = 0, significant_ = 1, values_ = 0;
  bool bf16_ = true;
};
PrintedDigits digits_of(const LogColumn& column);

}  // namespace moeaudit

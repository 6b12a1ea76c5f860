// The one comparator of numbers in the tests.
#include "tests/support/compare.h"

#include <cmath>
#include <limits>
#include <sstream>

namespace moeaudit::test {
namespace {

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

template <class T>
bool fits(const Values<T>& v) {
  std::int64_t product = 1;
  for (const std::int64_t n : v.shape) product *= n;
  return product == static_cast<std::int64_t>(v.data.size());
}

void keep_larger(Worst* worst, double value, std::size_t i, double expected, double actual) {
  if (value > worst->value) *worst = {value, i, expected, actual};
}

void count_non_finite(Comparison* c, double expected, double actual) {
  if (std::isfinite(expected) != std::isfinite(actual)) {
    ++c->non_finite_one_side;
  } else if ((std::isnan(expected) && std::isnan(actual)) || expected == actual) {
    ++c->non_finite_same;
  } else {
    ++c->non_finite_differ;
  }
}

void count_finite(Comparison* c, std::size_t i, double expected, double actual, const CompareOptions& o) {
  const double error = std::fabs(actual - expected);
  const double bound = o.bound ? o.bound(i, expected) : 0.0;
  if (!(error <= bound)) ++c->over_bound;
  if (expected == 0 && actual == 0) {
    c->signed_zeros += std::signbit(expected) != std::signbit(actual) ? 1 : 0;
  } else if (actual == 0) {
    ++c->rounded_to_zero;
  } else if (expected != 0 && std::signbit(expected) != std::signbit(actual)) {
    ++c->sign_flips;
  }
  keep_larger(&c->max_abs, error, i, expected, actual);
  if (expected != 0) keep_larger(&c->max_rel, error / std::fabs(expected), i, expected, actual);
  keep_larger(&c->max_ulp, error / kernels::spacing(expected, o.format), i, expected, actual);
  if (error > 0) {
    const double used = bound > 0 ? error / bound : std::numeric_limits<double>::infinity();
    keep_larger(&c->bound_used, used, i, expected, actual);
  }
}

template <class E, class A>
Comparison compare_all(const Values<E>& expected, const Values<A>& actual, const CompareOptions& o) {
  Comparison c;
  c.shape = expected.shape;
  c.shapes = text_of(expected.shape) + " against " + text_of(actual.shape);
  c.accepts_same_non_finite = o.same_non_finite_is_equal;
  c.same_shape = expected.shape == actual.shape && fits(expected) && fits(actual);
  if (!c.same_shape) return c;
  c.count = expected.data.size();
  for (std::size_t i = 0; i < c.count; ++i) {
    const double e = static_cast<double>(expected.data[i]), a = static_cast<double>(actual.data[i]);
    if (std::isfinite(e) && std::isfinite(a)) {
      count_finite(&c, i, e, a, o);
    } else {
      count_non_finite(&c, e, a);
    }
  }
  return c;
}

void print(std::ostringstream& out, const char* name, const Worst& w, const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> at(shape.size());
  std::size_t rest = w.at;
  for (std::size_t d = shape.size(); d-- > 0;) {
    const auto n = static_cast<std::size_t>(shape[d] > 0 ? shape[d] : 1);
    at[d] = static_cast<std::int64_t>(rest % n);
    rest /= n;
  }
  out << "\n  " << name << " " << w.value << " at " << text_of(at) << ": expected " << w.expected << ", got "
      << w.actual;
}

}  // namespace

bool Comparison::ok() const {
  return same_shape && count > 0 && over_bound == 0 && non_finite_one_side == 0 && non_finite_differ == 0 &&
         (accepts_same_non_finite || non_finite_same == 0);
}

std::string Comparison::report() const {
  std::ostringstream out;
  out.precision(17);
  out << (ok() ? "equal within bounds: " : "not equal: ") << shapes;
  if (!same_shape) return out.str() + " (shapes differ, or do not fit the data)";
  if (count == 0) return out.str() + " (nothing to compare)";
  out << ", over bound " << over_bound << ", non-finite on one side " << non_finite_one_side
      << ", different non-finite " << non_finite_differ << ", same non-finite " << non_finite_same << ", sign flips "
      << sign_flips << ", signed zeros " << signed_zeros << ", rounded to zero " << rounded_to_zero;
  print(out, "largest absolute error", max_abs, shape);
  print(out, "largest relative error", max_rel, shape);
  print(out, "largest error in places", max_ulp, shape);
  print(out, "largest share of the bound", bound_used, shape);
  return out.str();
}

Comparison compare(const Values<double>& expected, const Values<double>& actual, const CompareOptions& options) {
  return compare_all(expected, actual, options);
}
Comparison compare(const Values<float>& expected, const Values<float>& actual, const CompareOptions& options) {
  return compare_all(expected, actual, options);
}
Comparison compare(const Values<double>& expected, const Values<float>& actual, const CompareOptions& options) {
  return compare_all(expected, actual, options);
}

}  // namespace moeaudit::test

// From a recorded number to the formula that gives it: right and wrong formulas times the small factors that bugs put
// in front, ranked by how far they lie from what was recorded, in multiples of what rounding can do.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moeaudit::variants {

/// A number that a run multiplies or divides by where it should not. 0 or 1: the trace does not say, or it cannot show.
struct Symbol {
  std::string text;  // "M"
  double value = 0;
  bool alone = false;  // no product of it with another is tried
};

/// A product of at most two symbols, or its inverse.
struct Factor {
  std::string text;  // "M W"; "1 / k"; "" is 1
  double value = 1;
  int terms = 0;       // symbols in it
  std::string equals;  // other products of as few symbols with the same value: "E"
};
/// All of them with different values, the simplest of each value first; 1 is among them, 0 too ("0").
std::vector<Factor> factors_of(std::span<const Symbol> symbols);

/// One formula, evaluated for every observation.
struct Formula {
  std::string id;              // "A8"; "" for what the numbers are held to
  std::string name;            // "softmax of the softmax"
  std::vector<double> values;  // one an observation; NaN: the trace lacks what it needs
  bool alone = false;          // no factor is tried with it
};

struct Observations {
  std::span<const double> recorded;
  std::span<const double> band;  // relative: how far rounding alone can carry each
};

struct Name {
  bool found = false;
  std::string id, name, factor;
  double factor_value = 1;
  double fit = 0;         // the largest distance over the observations, in bands
  std::string also;       // what fits as well and is as simple
  std::string runner_up;  // the nearest that does not fit
  double runner_up_fit = 0;
};

/// What a factor is called in one quantity: ("aux_weight", "M") -> A22.
struct FactorRow {
  std::string_view quantity, text, id, name, source;
  std::string_view of = "";  // the formula that it stands before; "": the one that the numbers are held to
};
std::span<const FactorRow> factor_rows();

/// The simplest formula times factor within the band of every observation: fewest deviations, then the smallest
/// distance. What is as simple and fits too is in `also`. Nothing fits: found is false, and runner_up the nearest.
Name name_formula(std::string_view quantity, const Observations& seen, std::span<const Formula> formulas,
                  std::span<const Factor> factors);

}  // namespace moeaudit::variants

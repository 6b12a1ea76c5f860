#include "audit/measures/log_balance.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "audit/measures/log_numbers.h"
#include "audit/measures/measure.h"
#include "audit/variants/naming.h"

namespace moeaudit {
namespace {

constexpr std::string_view kSupplies[] = {"log.columns", "log.balance_share"};
constexpr std::int64_t kLeastEntries = 3;
constexpr double kMostCrossEntropy = 15;  // ln of a vocabulary of 262,144 is 12.5

LogColumns describe(const LogTable& log) {
  LogColumns out;
  const std::vector<LogColumn> columns = columns_of(log);
  for (const LogColumn& c : columns) {
    std::vector<double> values;
    int line = 0;
    double v = 0;
    for (std::size_t i = 0; i < log.step.size(); ++i) {
      if (!c.at(i, &v)) continue;
      if (values.empty()) line = log.line[i];
      values.push_back(v);
    }
    if (values.empty()) continue;
    const auto [least, greatest] = std::minmax_element(values.begin(), values.end());
    PrintedDigits digits = digits_of(c);
    // One number over and over shows no digits of its own: what was written with trailing zeros does, and a log whose
    // losses are not rounded at all.
    if (*least == *greatest && *least != 0 && c.name == "aux_loss") {
      PrintedDigits others = digits_of(columns[0]);
      for (std::size_t i = 0; i < log.step.size(); ++i) {
        if (columns[1].at(i, &v)) others.add(v);
      }
      constexpr int kUnrounded = 9;  // digits that every float32 has
      if (others.significant() >= kUnrounded) digits = others;
      digits.at_least(log.aux_digits);
    }
    out.name.emplace_back(c.name);
    out.entries.push_back(static_cast<std::int64_t>(values.size()));
    out.line.push_back(line);
    out.first.push_back(values.front());
    out.last.push_back(values.back());
    out.least.push_back(*least);
    out.greatest.push_back(*greatest);
    std::vector<double> late(values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
    std::nth_element(late.begin(), late.begin() + static_cast<std::ptrdiff_t>(late.size() / 2), late.end());
    out.level.push_back(late[late.size() / 2]);
    out.unit.push_back(digits.unit(out.level.back()));
  }
  return out;
}

struct Interval {
  double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();
  void cut(double l, double h) { low = std::max(low, l), high = std::min(high, h); }
  bool empty() const { return low > high; }
};

/// [a, b] / [c, d] with c > 0.
void cut_by_quotient(Interval* all, double a, double b, double c, double d) {
  all->cut(a / (a >= 0 ? d : c), b / (b >= 0 ? c : d));
}

class Solver {
 public:
  explicit Solver(const LogTable& log) : log_(log), columns_(columns_of(log)) {
    for (const LogColumn& c : columns_) digits_.push_back(digits_of(c));
  }

  /// Share of the balance loss, with the z-loss `z_weight` times in the loss, or n times with coefficient `tied`.
  /// Nothing where a constant fits as well: aux_loss then moved too little to be what the difference is made of.
  std::optional<LogBalance> solve(bool with_ce, double z_weight, double tied) const {
    LogBalance out;
    out.solved = with_ce;
    Interval share, constant;
    for (std::size_t i = 0; i < log_.step.size(); ++i) {
      double loss = 0, ce = 0, aux = 0, z = 0;
      if (!columns_[0].at(i, &loss) || !columns_[2].at(i, &aux)) continue;
      if (with_ce && !columns_[1].at(i, &ce)) continue;
      if ((z_weight != 0 || tied != 0) && !columns_[3].at(i, &z)) continue;
      const double by = aux + tied * z, by_slack = digits_[2].slack(aux) + tied * digits_[3].slack(z);
      if (by - by_slack <= 0) continue;
      const double slack =
          digits_[0].slack(loss) + (with_ce ? digits_[1].slack(ce) : 0) + z_weight * digits_[3].slack(z);
      const double rest = loss - ce - z_weight * z;
      constant.cut(rest - slack, rest + slack);
      cut_by_quotient(&share, rest - slack - (with_ce ? 0 : kMostCrossEntropy), rest + slack, by - by_slack,
                      by + by_slack);
      if (out.entries++ == 0) out.line = log_.line[i];
    }
    if (out.entries < kLeastEntries || share.empty()) return std::nullopt;
    if (with_ce && !constant.empty() && (constant.low > 0 || constant.high < 0)) return std::nullopt;
    out.least = share.low;
    out.greatest = share.high;
    return out;
  }

  bool has(std::size_t column) const {
    double v = 0;
    for (std::size_t i = 0; i < log_.step.size(); ++i) {
      if (columns_[column].at(i, &v)) return true;
    }
    return false;
  }

 private:
  const LogTable& log_;
  std::vector<LogColumn> columns_;
  std::vector<PrintedDigits> digits_;
};

void name(const FactSheet& f, LogBalance* out) {
  const double c = f.aux_coefficient.value();
  const auto of = [](const Fact<std::int64_t>& fact) { return fact.known() ? static_cast<double>(fact.value()) : 0.0; };
  std::vector<variants::Symbol> symbols = {{"M", of(f.accumulation)}, {"W", of(f.world_size)}};
  if (out->solved) {
    const double layers = f.moe_layers.known() ? static_cast<double>(f.moe_layers.value().size()) : 0.0;
    for (const variants::Symbol& s : {variants::Symbol{"L", layers},
                                      {"k", of(f.top_k)},
                                      {"E", of(f.num_experts)},
                                      {"2", 2, true},
                                      {"coefficient", c, true}})
      symbols.push_back(s);
  } else if (out->least <= 0 || out->greatest > 1.5 * out->least) {
    return;
  }
  int fewest = 3;
  for (const variants::Factor& factor : variants::factors_of(symbols)) {
    const double share = factor.value * c;
    if (share < out->least || share > out->greatest || factor.terms > fewest || factor.text.ends_with("^2")) continue;
    if (factor.terms < fewest) out->factor.clear(), out->value.clear();
    fewest = factor.terms;
    const std::string all =
        (factor.text.empty() ? "1" : factor.text) + (factor.equals.empty() ? "" : ", ") + factor.equals;
    for (std::size_t begin = 0; begin < all.size();) {
      const std::size_t end = std::min(all.find(", ", begin), all.size());
      out->factor.push_back(all.substr(begin, end - begin));
      out->value.push_back(factor.value);
      begin = end + 2;
    }
  }
}

}  // namespace

std::optional<LogBalance> balance_in(const FactSheet& f, std::string* why) {
  const Solver solver(f.log.value());
  if (!solver.has(0) || !solver.has(2)) {
    *why = "the log does not hold both loss and aux_loss";
    return std::nullopt;
  }
  if (!solver.has(1)) {
    *why = "the log holds no cross-entropy beside the loss";
    return solver.solve(false, 0, 0);
  }
  *why = "loss - cross-entropy is no one multiple of aux_loss at three steps or more, or a constant as well";
  const double z = f.z_coefficient.known() ? f.z_coefficient.value() : 0;
  const double c = f.aux_coefficient.known() ? f.aux_coefficient.value() : 0;
  const bool with_z = solver.has(3) && z > 0;
  struct Try {
    const char* how;
    double weight, tied;
  };
  for (const Try& t : {Try{"once", z, 0}, Try{"n times", 0, c > 0 ? z / c : 0}, Try{"not", 0, 0}}) {
    if (!with_z && t.how != std::string_view("not")) continue;
    if (t.how == std::string_view("n times") && t.tied == 0) continue;
    std::optional<LogBalance> out = solver.solve(true, t.weight, t.tied);
    if (!out) continue;
    if (with_z) out->z = t.how;
    return out;
  }
  return std::nullopt;
}

namespace {

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (!f.log.known()) {
    f.log_columns.explain_unknown("no log was given");
    f.log_balance.explain_unknown("no log was given");
    return;
  }
  LogColumns columns = describe(f.log.value());
  std::string why;
  std::optional<LogBalance> share = balance_in(f, &why);
  if (share && f.aux_coefficient.known() && f.aux_coefficient.value() > 0) name(f, &*share);
  if (share)
    f.log_balance.set(std::move(*share), Origin::kMeasured, f.log.source());
  else
    f.log_balance.explain_unknown(why);
  context.records.push_back({"log_balance", "host float64", to_text(f.log.value())});
  f.log_columns.set(std::move(columns), Origin::kMeasured, f.log.source());
}

}  // namespace

extern const Measure measure_log_balance;
const Measure measure_log_balance = {.name = "log_balance", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit

#include "audit/measures/run_pair.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <set>

#include "audit/measures/log_balance.h"
#include "audit/measures/log_numbers.h"
#include "audit/variants/naming.h"

namespace moeaudit {
namespace {

namespace v = variants;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Numbers of one step that do not depend on how its batch was split, if the run is right. NaN: not recorded.
struct Step {
  double labels = 0, cross_entropy = kNan;    // over all micro-batches and ranks; the mean over labels
  double loss = kNan, ce_weight = kNan;       // back-propagated: averaged over ranks, summed over micro-batches
  double aux_weight = kNan, aux_loss = kNan;  // d loss / d aux_loss, likewise; mean of the reported ones
  double grad_norm = kNan, router_grad = kNan, expert_grad = kNan;  // before clipping
  double bias_step = kNan;                                          // largest move of a correction bias
  double sequences = 0, micro_batches = 0, ranks = 0;
  std::map<int, std::pair<double, double>> routers;  // before the update, by layer: sum of the weights, and their norm
};

double norm(const TensorView& view) {
  std::int64_t n = 1;
  for (const std::int64_t d : view.shape) n *= d;
  std::vector<double> values(static_cast<std::size_t>(n));
  if (!read_values(view, 0, n, values.data())) return kNan;
  double sum = 0;
  for (const double x : values) sum += x * x;
  return sum;
}

double sum_of(const TensorView& view) {
  std::vector<double> values(static_cast<std::size_t>(view.shape[0] * view.shape[1]));
  if (!read_values(view, 0, static_cast<std::int64_t>(values.size()), values.data())) return kNan;
  return std::accumulate(values.begin(), values.end(), 0.0);
}

/// A layer whose router is not the same in both, or -1. Sums of unlike weights are about their norm apart; of one matrix
/// in two dtypes a thousandth of that.
int other_router(const Step& a, const Step& b) {
  for (const auto& [layer, first] : a.routers) {
    const auto second = b.routers.find(layer);
    if (second == b.routers.end()) continue;
    if (std::fabs(first.first - second->second.first) > 0.01 * std::max(first.second, second->second.second)) return layer;
  }
  return -1;
}

/// The sum of token losses and how many labels there are; false: not recorded whole.
bool token_losses(const MicroBatch& mb, double* sum, double* labels) {
  const MicroBatchRecord& m = *mb.record;
  if (!mb.token_loss || !mb.label_mask || m.sampled_tokens) return false;
  std::vector<double> loss(static_cast<std::size_t>(m.rows()));
  std::vector<std::uint8_t> mask(loss.size());
  if (!read_values(*mb.token_loss, 0, m.rows(), loss.data()) || !read_flags(*mb.label_mask, 0, m.rows(), mask.data())) {
    return false;
  }
  for (std::size_t i = 0; i < loss.size(); ++i) {
    if (mask[i]) *sum += loss[i], *labels += 1;
  }
  return true;
}

Step step_of(const Trace& trace, std::vector<WeightProblem>* problems) {
  Step s;
  for (const TraceStep& at : trace.steps()) {
    std::set<std::int64_t> ranks;
    double sum = 0, loss = 0, ce = 0, aux_grad = 0, aux = 0;
    bool whole = true, has_loss = true, has_grad = true, has_aux_grad = true, has_aux = true;
    for (const MicroBatchRecord& m : trace.micro_batches_of(at)) {
      if (!m.training.value_or(true)) continue;
      ranks.insert(m.rank);
      s.micro_batches += 1;
      s.sequences = std::max(s.sequences, static_cast<double>(m.sequences));
      double of_batch = 0, labels = 0;
      whole = token_losses(trace.open(m, problems), &of_batch, &labels) && whole;
      sum += of_batch;
      s.labels += labels;
      has_loss = has_loss && m.loss;
      loss += m.loss.value_or(0);
      const double divisor = m.num_items_in_batch ? static_cast<double>(*m.num_items_in_batch) : labels;
      has_grad = has_grad && m.loss_grad && divisor > 0;
      if (m.loss_grad && divisor > 0) ce += *m.loss_grad * of_batch / divisor;
      has_aux_grad = has_aux_grad && (m.aux_loss_grad || m.aux_loss_requires_grad == false);
      aux_grad += m.aux_loss_grad.value_or(0);
      has_aux = has_aux && m.aux_loss;
      aux += m.aux_loss.value_or(0);
    }
    if (s.micro_batches == 0) continue;
    s.ranks = static_cast<double>(ranks.size());
    if (whole && s.labels > 0) s.cross_entropy = sum / s.labels;
    if (has_loss) s.loss = loss / s.ranks;
    if (whole && has_grad && sum > 0) s.ce_weight = ce / s.ranks / (sum / s.labels);
    if (has_aux_grad) s.aux_weight = aux_grad / s.ranks;
    if (has_aux) s.aux_loss = aux / s.micro_batches;
    s.micro_batches /= s.ranks;
    std::map<int, std::vector<double>> expert_norms;  // by layer; an expert's is on the ranks that hold it
    for (const StepRecord& r : trace.ranks_of(at)) {
      const StepTensors tensors = trace.open(r, problems);
      for (const StepLayerTensors& l : tensors.layers) {
        if (!l.expert_grad_norm) continue;
        std::vector<double> norms(static_cast<std::size_t>(l.expert_grad_norm->shape[0])),
            &most = expert_norms[l.layer];
        if (!read_values(*l.expert_grad_norm, 0, l.expert_grad_norm->shape[0], norms.data())) continue;
        most.resize(norms.size());
        for (std::size_t e = 0; e < norms.size(); ++e)
          most[e] = std::max(most[e], norms[e] / r.clip_coefficient.value_or(1));
      }
      if (r.rank != 0) continue;
      if (r.grad_norm) s.grad_norm = *r.grad_norm;
      double squares = 0, moved = -1;
      for (const StepLayerTensors& l : tensors.layers) {
        if (l.router_weight) s.routers[l.layer] = {sum_of(*l.router_weight), std::sqrt(norm(*l.router_weight))};
        if (l.router_grad) squares += norm(*l.router_grad);
        if (!l.correction_bias_before || !l.correction_bias_after) continue;
        const std::int64_t n = l.correction_bias_before->shape[0];
        std::vector<double> before(static_cast<std::size_t>(n)), after(before.size());
        if (!read_values(*l.correction_bias_before, 0, n, before.data()) ||
            !read_values(*l.correction_bias_after, 0, n, after.data())) {
          continue;
        }
        for (std::size_t e = 0; e < before.size(); ++e) moved = std::max(moved, std::fabs(after[e] - before[e]));
      }
      if (squares > 0) s.router_grad = std::sqrt(squares) / r.clip_coefficient.value_or(1);
      if (moved >= 0) s.bias_step = moved;
    }
    double squares = 0;
    for (const auto& [layer, norms] : expert_norms) {
      for (const double x : norms) squares += x * x;
    }
    if (squares > 0) s.expert_grad = std::sqrt(squares);
    return s;
  }
  return s;
}

void add_row(std::string_view quantity, double first, double second, const char* rule, std::span<const v::Factor> factors,
             double farthest, PairReport* out) {
  if (std::isnan(first) || std::isnan(second) || first == 0.0) return;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  PairRow row;
  row.quantity = quantity;
  row.a = first, row.b = second, row.ratio = second / first;
  row.off = kInfinity;
  for (const v::Factor& c : factors) {
    const double off = c.value == 0.0  ? (row.ratio == 0.0 ? 0.0 : kInfinity)
                       : row.ratio > 0 ? std::fabs(std::log(row.ratio / c.value))
                                       : kInfinity;
    if (off >= row.off) continue;
    row.off = off, row.factor_value = c.value;
    row.factor = c.text + (c.equals.empty() ? "" : " or " + c.equals);
  }
  for (std::size_t at; (at = row.factor.find(", ")) != std::string::npos;) row.factor.replace(at, 2, " or ");
  row.named = row.off <= farthest;
  if (!row.factor.empty()) row.rule = rule;
  out->rows.push_back(std::move(row));
}

}  // namespace

void compare_runs(const Trace& a, const Trace& b, PairReport* out) {
  const Step x = step_of(a, &out->weight_problems), y = step_of(b, &out->weight_problems);
  const auto setting = [](std::optional<std::int64_t> n, double seen) {
    return n ? static_cast<double>(*n) : std::max(seen, 1.0);
  };
  const TraceFacts &f = a.facts(), &g = b.facts();
  struct Split {
    const char* name;
    double a, b;
  };
  const Split splits[] = {{"M", x.micro_batches, y.micro_batches},
                          {"W", setting(f.world_size, x.ranks), setting(g.world_size, y.ranks)},
                          {"S", x.sequences, y.sequences},
                          {"TP", setting(f.tensor_parallel, 1), setting(g.tensor_parallel, 1)},
                          {"CP", setting(f.context_parallel, 1), setting(g.context_parallel, 1)},
                          {"EP", setting(f.expert_parallel, 1), setting(g.expert_parallel, 1)}};
  std::vector<v::Symbol> symbols;
  for (const Split& s : splits) {
    if (s.a == s.b || !(s.a > 0) || !(s.b > 0)) continue;
    char text[64];
    std::snprintf(text, sizeof text, "%s %.6g -> %.6g", s.name, s.a, s.b);
    out->differs.push_back(text);
    // S is what M or W took from it: the other way round it would be a second name for one thing.
    if (std::string_view(s.name) != "S" || symbols.empty()) symbols.push_back({s.name, s.b / s.a});
  }
  if (x.micro_batches == 0 || y.micro_batches == 0) {
    out->not_comparable = "one of them has no training micro-batch";
  } else if (x.labels != y.labels) {
    char text[128];
    std::snprintf(text, sizeof text, "their steps hold %.0f and %.0f labels: not the same data", x.labels, y.labels);
    out->not_comparable = text;
  } else if (const int layer = other_router(x, y); layer >= 0) {
    out->not_comparable = "their routers differ before that step (layer " + std::to_string(layer) + "): not the same weights";
  } else if (symbols.empty()) {
    out->not_comparable =
        "they split the batch alike: there is nothing to compare; moe-audit replay judges each by itself";
  }
  if (!out->not_comparable.empty()) return;
  constexpr double kSameBatch = 2e-3;  // bfloat16 sums in another order stay within
  if (std::fabs(y.cross_entropy - x.cross_entropy) > kSameBatch * std::fabs(x.cross_entropy))
    out->note = "the mean cross-entropy of the labels differs: other weights or data, dropout or noise; every ratio holds that, too";

  const auto factors = v::factors_of(symbols);
  const auto add = [&](const char* quantity, double first, double second, const char* rule) {
    add_row(quantity, first, second, rule, factors, std::numeric_limits<double>::infinity(), out);
  };
  add("cross_entropy", x.cross_entropy, y.cross_entropy, "");
  add("loss", x.loss, y.loss, "TR006");
  add("cross_entropy_weight", x.ce_weight, y.ce_weight, "TR006");
  add("aux_weight", x.aux_weight, y.aux_weight, "TR001");
  add("aux_loss", x.aux_loss, y.aux_loss, "TR002");
  add("grad_norm", x.grad_norm, y.grad_norm, "TR006");
  add("router_grad", x.router_grad, y.router_grad, "TR001");
  // No rule: one trace cannot show it. Off by EP where the gradient norm is not: G11, averaged over the wrong ranks.
  add("expert_grad", x.expert_grad, y.expert_grad, "");
  add("bias_step", x.bias_step, y.bias_step, "TR011");
}

RunSettings settings_of(const FactSheet& f) {
  RunSettings out;
  const auto put = [&](const char* name, const Fact<std::int64_t>& fact) {
    if (fact.known() && fact.value() > 0) out[name] = static_cast<double>(fact.value());
  };
  put("M", f.accumulation);
  put("W", f.world_size);
  put("S", f.micro_batch);
  put("EP", f.expert_parallel);
  put("k", f.top_k);
  put("E", f.num_experts);
  if (f.gradient_checkpointing.known()) out["recompute"] = f.gradient_checkpointing.value() ? 2 : 1;
  if (f.moe_layers.known() && !f.moe_layers.value().empty()) out["L"] = static_cast<double>(f.moe_layers.value().size());
  return out;
}

void compare_logs(const FactSheet& a, const FactSheet& b, const RunSettings& of_a, const RunSettings& of_b,
                  PairReport* out) {
  if (!a.log.known() || !b.log.known()) {
    out->not_comparable = (a.log.known() ? out->b : out->a) + " holds no trainer_state.json: give the log file itself";
    return;
  }
  std::vector<v::Symbol> symbols, shared;
  for (const char* name : {"M", "W", "S", "TP", "CP", "EP", "recompute", "L", "k", "E"}) {
    const auto first = of_a.find(name), second = of_b.find(name);
    if (first == of_a.end() || second == of_b.end()) continue;
    if (first->second == second->second) {
      if (first->second != 1.0) shared.push_back({name, first->second});
      continue;
    }
    char text[64];
    std::snprintf(text, sizeof text, "%s %.6g -> %.6g", name, first->second, second->second);
    out->differs.push_back(text);
    if (std::string_view(name) == "S" && !symbols.empty()) continue;  // what M or W took from it
    symbols.push_back({name, second->second / first->second});
  }
  if (symbols.empty()) {
    symbols = std::move(shared);
    out->note = "no setting that is known differs: ratios are looked for among 2";
    for (const v::Symbol& s : symbols) {
      char text[64];
      std::snprintf(text, sizeof text, ", %s = %.6g", s.text.c_str(), s.value);
      out->note += text;
    }
    symbols.push_back({"2", 2, true});
  }
  std::vector<v::Symbol> of_loss;  // what can multiply a cross-entropy
  for (const v::Symbol& s : symbols) {
    if (s.text == "M" || s.text == "W" || s.text == "TP" || s.text == "CP" || s.text == "EP" || s.text == "2")
      of_loss.push_back(s);
  }

  const LogTable &x = a.log.value(), &y = b.log.value();
  const auto factors = v::factors_of(symbols), factors_of_loss = v::factors_of(of_loss);
  const std::vector<LogColumn> p = columns_of(x), q = columns_of(y);
  constexpr double kFarthest = 0.1;  // a split changes the loads of a micro-batch, and with them losses and norms, by less
  const auto add = [&](std::string_view quantity, double first, double second, const char* rule) {
    const bool router = quantity.starts_with("aux") || quantity.starts_with("z_");
    add_row(quantity, first, second, rule, router ? factors : factors_of_loss, kFarthest, out);
  };
  constexpr const char* kQuantities[] = {"loss", "cross_entropy", "aux_loss", "z_loss", "grad_norm", "eval_loss"};
  constexpr const char* kRules[] = {"GA001", "GA001", "LG006", "LG006", "GA001", ""};
  std::map<std::string_view, std::pair<double, double>> at_first;  // by quantity, and the step
  std::map<std::string_view, std::int64_t> step_of;
  for (std::size_t c = 0; c < p.size(); ++c) {
    std::map<std::int64_t, double> by_step;  // the first of each step
    double first = 0, second = 0;
    for (std::size_t j = 0; j < y.step.size(); ++j) {
      if (q[c].at(j, &second)) by_step.emplace(y.step[j], second);
    }
    for (std::size_t i = 0; i < x.step.size(); ++i) {
      if (x.step[i] < 0 || !p[c].at(i, &first)) continue;
      const auto found = by_step.find(x.step[i]);
      if (found == by_step.end()) continue;
      at_first[kQuantities[c]] = {first, found->second};
      step_of[kQuantities[c]] = x.step[i];
      add(kQuantities[c], first, found->second, kRules[c]);
      break;
    }
  }
  std::string why;
  const auto share_a = balance_in(a, &why), share_b = balance_in(b, &why);
  if (share_a && share_b && share_a->solved && share_b->solved) {
    add("aux_weight", (share_a->least + share_a->greatest) / 2, (share_b->least + share_b->greatest) / 2, "LG004");
  } else if (at_first.count("aux_loss") && at_first.count("loss") && step_of["aux_loss"] == step_of["loss"] &&
             a.aux_coefficient.known() && a.aux_coefficient.value() > 0) {
    // No cross-entropy in the log: it is the same in both runs, and the first adds its balance loss once. Means of means
    // and printed digits may move a loss by a thousandth: only a balance loss well above that shows in the difference.
    const double c = a.aux_coefficient.value();
    const auto [loss_a, loss_b] = at_first["loss"];
    const auto [aux_a, aux_b] = at_first["aux_loss"];
    if (aux_b != 0 && c * aux_a >= 0.01 * loss_a) add("aux_weight", c, (loss_b - loss_a + c * aux_a) / aux_b, "LG004");
  }
  if (out->rows.empty()) out->not_comparable = "their logs share no step at which both have the same quantity";
}

}  // namespace moeaudit

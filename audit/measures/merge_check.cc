// Is the trained model the base with the adapter merged in, M = W + s B A up to rounding, and if not, which wrong form is it?
//
// What may be rounded where, so that one violation is proof whatever the merge ran on (huggingface/peft
// src/peft/tuners/lora/layer.py, Linear.get_delta_weight and ParamWrapper.get_delta_weight): A and B to the dtype of the
// merge, the GEMM's sums in float32 or wider, B A and s B A each to the dtype of adapter or model, W to the dtype the model
// is loaded in, and the sum once to the dtype it is stored in. With u the unit roundoff of the coarser of adapter and stored
// dtype, u' = u if the adapter file is finer than that and 0 otherwise, and |B A| <= |B_i| |A_j| =: N (Cauchy-Schwarz):
//   |M - (W + s B A)| <= ulp(M)/2 + [ulp(W)/2 if W is not a value of M's dtype] + |s| N (2 u' + gamma_{r+2}(2^-24)) + 3 u |s B A|
#include <algorithm>
#include <charconv>
#include <cmath>
#include <unordered_map>
#include <unordered_set>

#include "audit/measures/adapter_file.h"
#include "audit/measures/measure.h"
#include "audit/measures/python_regex.h"
#include "audit/measures/router_inputs.h"
#include "audit/measures/weight_pairs.h"
#include "kernels/host/bounds.h"
#include "kernels/host/lora.h"
#include "kernels/host/router.h"

namespace moeaudit {
namespace {

namespace k = kernels;
using k::Float;

constexpr std::string_view kSupplies[] = {"merge.modules"};
constexpr std::int64_t kBlock = std::int64_t{1} << 16;       // elements checked at a time
constexpr std::int64_t kMostFactors = std::int64_t{1} << 28;  // elements of A and B of one module that are held

std::optional<Float> float_of(DType d) {
  switch (d) {
    case DType::kF64: return Float::kF64;
    case DType::kF32: return Float::kF32;
    case DType::kBF16: return Float::kBF16;
    case DType::kF16: return Float::kF16;
    default: return std::nullopt;
  }
}
Float coarser(Float a, Float b) { return k::format_of(a).bits < k::format_of(b).bits ? a : b; }

// ---- the scale that the configuration asks for ----------------------------------------------------------------------

struct AlphaPattern {
  PythonRegex regex;
  double alpha;
};

/// PEFT (utils/other.py get_pattern_key): the first key that matches "(.*\.)?(key)$" from the start of the path.
std::vector<AlphaPattern> alpha_patterns(const FactSheet& f) {
  std::vector<AlphaPattern> out;
  if (!f.alpha_pattern.known()) return out;
  for (const std::string& entry : f.alpha_pattern.value()) {
    const std::size_t equals = entry.rfind('=');
    double alpha = 0;
    std::from_chars(entry.data() + equals + 1, entry.data() + entry.size(), alpha);
    RegexError error;
    if (auto regex = PythonRegex::compile("(.*\\.)?(" + entry.substr(0, equals) + ")$", &error)) out.push_back({std::move(*regex), alpha});
  }
  return out;
}

double alpha_of(const std::string& path, const std::vector<AlphaPattern>& patterns, double otherwise) {
  std::int64_t steps = 1'000'000;
  for (const AlphaPattern& p : patterns) {
    if (p.regex.match(path, &steps) == RegexAnswer::kYes) return p.alpha;
  }
  return otherwise;
}

// ---- one adapted matrix --------------------------------------------------------------------------------------------

/// How the two factors could be taken for an update of the matrix.
enum class Layout { kPlain, kTransposed, kStackSlow, kFactorsFast, kHalvesSwapped, kInterleaved };

/// One matrix of the model and its part of a module's update.
struct Target {
  const WeightPair* pair = nullptr;
  std::int64_t copy = 0;          // expert of a stack
  std::int64_t row = 0;           // of the module's update, where the matrix begins
  std::int64_t all_rows = 0;      // of the update
  bool swapped = false;           // the matrix is [in, out]: the update is (B A)^T
  bool either = false;            // a square stack: which of the two depends on the PEFT release
};

/// A and B of a module, as float: exact for what PEFT stores.
struct Factors {
  std::vector<float> a, b;        // [copies * rank, in], [out, rank * copies]
};

/// Update = left right: left [rows, rank], right [rank, columns].
struct Update {
  std::int64_t rows = 0, columns = 0, rank = 0;
  std::vector<float> left, right;
  std::vector<double> left_norm, right_norm;
};

std::int64_t delta_row(Layout layout, std::int64_t row, std::int64_t all) {
  if (layout == Layout::kHalvesSwapped) return (row + all / 2) % all;
  if (layout == Layout::kInterleaved) return row < all / 2 ? 2 * row : 2 * (row - all / 2) + 1;
  return row;
}

Update update_of(const AdapterFileModule& m, const Factors& f, const Target& t, Layout layout) {
  const std::int64_t r = m.rank;
  k::LoraStack stack{f.a.data(), f.b.data(), m.in, m.out, r, m.copies};
  if (layout == Layout::kFactorsFast) stack.a_order = k::StackOrder::kExpertFast;
  if (layout == Layout::kStackSlow) stack.b_order = k::StackOrder::kExpertSlow;
  stack.transposed = t.swapped != (layout == Layout::kTransposed);
  Update u;
  u.rank = r;
  u.rows = t.pair->trained.matrix.rows;
  u.columns = t.pair->trained.matrix.columns;
  u.left.resize(static_cast<std::size_t>(u.rows * r));
  u.right.resize(static_cast<std::size_t>(r * u.columns));
  u.left_norm.assign(static_cast<std::size_t>(u.rows), 0);
  u.right_norm.assign(static_cast<std::size_t>(u.columns), 0);
  for (std::int64_t row = 0; row < u.rows; ++row) {
    const std::int64_t from = delta_row(layout, t.row + row, t.all_rows);
    for (std::int64_t i = 0; i < r; ++i) {
      const float v = stack.left(t.copy, from, i);
      u.left[static_cast<std::size_t>(row * r + i)] = v;
      u.left_norm[static_cast<std::size_t>(row)] += static_cast<double>(v) * v;
    }
  }
  for (std::int64_t i = 0; i < r; ++i) {
    for (std::int64_t c = 0; c < u.columns; ++c) {
      const float v = stack.right(t.copy, i, c);
      u.right[static_cast<std::size_t>(i * u.columns + c)] = v;
      u.right_norm[static_cast<std::size_t>(c)] += static_cast<double>(v) * v;
    }
  }
  for (double& n : u.left_norm) n = std::sqrt(n);
  for (double& n : u.right_norm) n = std::sqrt(n);
  return u;
}

/// A form the merge may have: so many times the update, in this layout.
struct Form {
  std::string name;
  double scale = 0;
  Layout layout = Layout::kPlain;
  int roundings = 1;                    // of the sum: two for a second merge on top of the first
  std::optional<Float> through;         // merged in a coarser dtype than the stored one
  double slack = 0;                     // uncertainty of `scale`, for a fitted one
};

/// What one form leaves unexplained, and least squares, over some elements.
struct Fit {
  std::int64_t outside = 0;
  double worst = 0;
  double yd = 0, dd = 0, yy = 0, noise = 0;  // <M-W, BA>, ||BA||^2, ||M-W||^2, sum of (rounding)^2 (BA)^2 / 3
  void add(const Fit& o) {
    outside += o.outside;
    worst = std::max(worst, o.worst);
    yd += o.yd;
    dd += o.dd;
    yy += o.yy;
    noise += o.noise;
  }
};

class Checker {
 public:
  Checker(const AdapterFileModule& m, int threads) : m_(m), threads_(threads) {
    adapter_ = coarser(float_of(m.a->dtype).value_or(Float::kF32), float_of(m.b->dtype).value_or(Float::kF32));
  }

  bool load() {
    const std::int64_t wide = m_.copies * m_.rank;
    if (m_.in > kMostFactors / wide || m_.out > kMostFactors / wide) return false;
    f_.a.resize(static_cast<std::size_t>(wide * m_.in));
    f_.b.resize(static_cast<std::size_t>(wide * m_.out));
    return is_plain_float(m_.a->dtype) && is_plain_float(m_.b->dtype) && decode(*m_.a, 0, wide * m_.in, f_.a.data()) &&
           decode(*m_.b, 0, wide * m_.out, f_.b.data());
  }

  /// False if a matrix cannot be decoded.
  bool check(const Target& t, const Form& form, Fit* out) const {
    const Update u = update_of(m_, f_, t, form.layout);
    const std::int64_t step = std::max<std::int64_t>(1, kBlock / std::max<std::int64_t>(1, u.columns));
    const std::int64_t blocks = (u.rows + step - 1) / step;
    std::vector<Fit> fits(static_cast<std::size_t>(blocks));
    std::vector<char> read(static_cast<std::size_t>(blocks), 1);
    parallel_for(threads_, blocks, [&](std::int64_t i, int) {
      const std::int64_t first = i * step;
      read[static_cast<std::size_t>(i)] = check_rows(t, form, u, first, std::min(step, u.rows - first), &fits[static_cast<std::size_t>(i)]);
    });
    for (const Fit& fit : fits) out->add(fit);  // in order
    return std::all_of(read.begin(), read.end(), [](char ok) { return ok != 0; });
  }

 private:
  bool check_rows(const Target& t, const Form& form, const Update& u, std::int64_t first, std::int64_t count, Fit* out) const {
    const Matrix &base = t.pair->base.matrix, &merged = t.pair->trained.matrix;
    const std::size_t n = static_cast<std::size_t>(count * u.columns);
    std::vector<double> w(n), m(n), product(n);
    if (!read_rows(base, first, count, w.data()) || !read_rows(merged, first, count, m.data())) return false;
    const k::LoraUpdate rows{u.left.data() + first * u.rank, u.right.data(), count, u.columns, u.rank};
    if (k::lora_product(rows, product.data()) != k::Status::kOk) return false;
    const Float stored = float_of(merged.tensor->dtype).value_or(Float::kF32);
    const Float summed = form.through.value_or(stored);
    const Float low = coarser(adapter_, summed);
    const double unit = k::unit_roundoff(low);
    const double factors = k::format_of(adapter_).bits > k::format_of(low).bits ? 2 * unit : 0;
    const double per_norm = std::fabs(form.scale) * (factors + k::bounds::gamma(static_cast<double>(u.rank) + 2, k::unit_roundoff(Float::kF32)));
    for (std::int64_t r = 0; r < count; ++r) {
      const double norm = u.left_norm[static_cast<std::size_t>(first + r)];
      for (std::int64_t c = 0; c < u.columns; ++c) {
        const auto at = static_cast<std::size_t>(r * u.columns + c);
        const double wv = w[at], mv = m[at], d = product[at];
        if (!std::isfinite(wv) || !std::isfinite(mv) || !std::isfinite(d)) continue;  // CK001 and its like speak of these
        const double y = mv - wv, step = 0.5 * form.roundings * k::spacing(mv, summed);
        const double loaded = k::round_to(wv, summed) == wv ? 0.0 : 0.5 * k::spacing(wv, summed);
        const double bound = step + loaded + per_norm * norm * u.right_norm[static_cast<std::size_t>(c)] + 3 * unit * std::fabs(form.scale * d) +
                             form.slack * std::fabs(d);
        const double off = std::fabs(y - form.scale * d);
        out->outside += off > bound;
        if (bound > 0) out->worst = std::max(out->worst, off / bound);
        out->yd += y * d;
        out->dd += d * d;
        out->yy += y * y;
        out->noise += step * step * d * d / 3;
      }
    }
    return true;
  }

  const AdapterFileModule& m_;
  int threads_;
  Float adapter_ = Float::kF32;
  Factors f_;
};

// ---- which form it is ----------------------------------------------------------------------------------------------

struct Scales {
  double alpha = 0, plain_alpha = 0, rank = 0, expected = 0;
  bool rslora = false;
};

/// Wrong forms, likeliest first. One that is the right scale after all is left out, two with one scale become one.
std::vector<Form> wrong_forms(const Scales& s, const Target& t, const AdapterFileModule& m, Float stored) {
  std::vector<Form> out;
  auto scale = [&](const char* name, double v, int roundings = 1) {
    if (!std::isfinite(v) || std::fabs(v - s.expected) <= 1e-9 * std::fabs(s.expected)) return;
    for (Form& f : out) {
      if (std::fabs(f.scale - v) <= 1e-9 * std::fabs(v)) {
        f.name += std::string(" or ") + name;
        f.roundings = std::max(f.roundings, roundings);
        return;
      }
    }
    out.push_back({name, v, Layout::kPlain, roundings, {}, 0});
  };
  scale("not merged at all (scale 0)", 0);
  scale("merged twice (2 x the scale)", 2 * s.expected, 2);
  scale(s.rslora ? "scale alpha / r instead of alpha / sqrt(r)" : "scale alpha / sqrt(r) instead of alpha / r",
        k::lora_scale(s.alpha, m.rank, !s.rslora));
  if (s.plain_alpha != s.alpha) scale("alpha_pattern ignored", k::lora_scale(s.plain_alpha, m.rank, s.rslora));
  scale("alpha and r ignored (scale 1)", 1);
  scale("r ignored (scale alpha)", s.alpha);
  scale("scale r / alpha", s.rank / s.alpha);
  scale("subtracted instead of added", -s.expected);
  auto layout = [&](const char* name, Layout l) { out.push_back({name, s.expected, l, 1, {}, 0}); };
  if (t.pair->trained.matrix.rows == t.pair->trained.matrix.columns && t.all_rows == t.pair->trained.matrix.rows) layout("the update transposed", Layout::kTransposed);
  if (m.copies > 1) {
    layout("B of the stack read with the expert as the slow index of its columns", Layout::kStackSlow);
    layout("A of the stack read with the expert as the fast index of its rows", Layout::kFactorsFast);
  }
  if (t.all_rows == 2 * t.pair->trained.matrix.rows) {
    layout("gate and up halves swapped", Layout::kHalvesSwapped);
    layout("gate and up rows taken for interleaved", Layout::kInterleaved);
  }
  for (Float f : {Float::kBF16, Float::kF16}) {
    if (k::format_of(f).bits >= k::format_of(stored).bits) continue;
    out.push_back({std::string("summed in ") + k::name_of(f) + " before it was stored", s.expected, Layout::kPlain, 1, f, 0});
  }
  return out;
}

struct Verdict {
  Fit expected;
  double fitted = 0, residual = 0;
  std::string form;
};

bool judge(const Checker& checker, const Target& t, const Scales& s, const AdapterFileModule& m, Verdict* out) {
  const Form expected{"", s.expected, Layout::kPlain, 1, {}, 0};
  if (!checker.check(t, expected, &out->expected)) return false;
  if (t.either && out->expected.outside > 0) {
    Target other = t;
    other.swapped = !other.swapped;
    Fit fit;
    if (!checker.check(other, expected, &fit)) return false;
    if (fit.outside == 0) out->expected = fit;
  }
  const Fit& e = out->expected;
  out->fitted = e.dd > 0 ? e.yd / e.dd : 0;
  out->residual = e.yy > 0 && e.dd > 0 ? std::sqrt(std::max(0.0, 1 - e.yd * e.yd / (e.yy * e.dd))) : 0;
  if (e.outside == 0) return true;
  const Float stored = float_of(t.pair->trained.matrix.tensor->dtype).value_or(Float::kF32);
  for (const Form& form : wrong_forms(s, t, m, stored)) {
    Fit fit;
    if (!checker.check(t, form, &fit)) return false;
    if (fit.outside == 0) out->form += (out->form.empty() ? "" : " or ") + form.name;
  }
  if (out->form.empty() && e.dd > 0) {
    Form form{"another scale", out->fitted, Layout::kPlain, 1, {}, 4 * std::sqrt(e.noise) / e.dd};
    Fit fit;
    if (checker.check(t, form, &fit) && fit.outside == 0) out->form = form.name;
  }
  if (out->form.empty()) out->form = "unknown";
  return true;
}

// ---- the whole model -----------------------------------------------------------------------------------------------

class MergeCheck {
 public:
  MergeCheck(MeasureContext& ctx, const AdapterFile& file, const UnitNames& names, const WeightPairs& pairs)
      : ctx_(ctx), file_(file), names_(names), pairs_(pairs), patterns_(alpha_patterns(ctx.facts)) {
    for (const WeightPair& p : pairs.pairs) by_key_.emplace(p.trained.key, &p);
  }

  void run() {
    std::size_t done = 0;
    for (const AdapterFileModule& m : file_.modules) {
      if (m.rank > 0) check_module(m);
      if (ctx_.progress) ctx_.progress("merge", static_cast<double>(++done) / static_cast<double>(file_.modules.size()));
    }
    check_whole();
    check_unadapted();
    std::string note = std::to_string(adapted_) + " adapted matrices, " + std::to_string(out_.unadapted) + " other tensors";
    if (!left_out_.empty()) note += ", " + std::to_string(left_out_.size()) + " modules left out, the first " + left_out_.front();
    ctx_.records.push_back({"merge_check", "host float64", note});
    if (adapted_ == 0) {
      ctx_.facts.merge.explain_unknown("no matrix of the adapter could be compared: " + (left_out_.empty() ? std::string("it has none") : left_out_.front()));
      return;
    }
    Source source;
    source.role = Role::kModelWeights;
    source.file = ctx_.model.files().front();
    ctx_.facts.merge.set(std::move(out_), Origin::kMeasured, std::move(source));
  }

 private:
  /// The matrices of one copy; empty with `why` if the model does not have them or they have other shapes.
  std::vector<Target> targets(const AdapterFileModule& m, std::int64_t copy, std::string* why) const {
    std::vector<std::string> keys;
    if (m.copies > 1) keys = names_.stack_keys(m.path, static_cast<int>(copy));
    else keys = {names_.key_of(m.is_parameter ? m.path : m.path + ".weight")};
    std::vector<Target> out;
    std::int64_t rows = 0, columns = 0;
    for (const std::string& key : keys) {
      const auto at = by_key_.find(key);
      if (at == by_key_.end()) {
        *why = m.path + " (not in both models)";
        return {};
      }
      Target t;
      t.pair = at->second;
      t.copy = copy;
      t.row = rows;
      rows += t.pair->trained.matrix.rows;
      columns = t.pair->trained.matrix.columns;
      out.push_back(t);
    }
    const bool as_is = rows == m.out && columns == m.in, swapped = rows == m.in && columns == m.out;
    if (!as_is && !swapped) {
      *why = m.path + " (adapter " + std::to_string(m.out) + "x" + std::to_string(m.in) + ", matrix " + std::to_string(rows) + "x" + std::to_string(columns) + ")";
      return {};
    }
    for (Target& t : out) {
      t.all_rows = rows;
      t.swapped = !as_is || (swapped && m.embedding);
      t.either = as_is && swapped && m.copies > 1;
    }
    return out;
  }

  void check_module(const AdapterFileModule& m) {
    Checker checker(m, ctx_.threads);
    std::string why = m.path + " (cannot be decoded)";
    Scales s;
    s.rank = static_cast<double>(m.rank);
    s.plain_alpha = ctx_.facts.adapter_alpha.value();
    s.alpha = alpha_of(m.path, patterns_, s.plain_alpha);
    s.rslora = ctx_.facts.adapter_rslora.known() && ctx_.facts.adapter_rslora.value();
    s.expected = k::lora_scale(s.alpha, m.rank, s.rslora);
    bool all = checker.load();
    for (std::int64_t copy = 0; copy < m.copies; ++copy) {
      // What cannot be compared is still adapted: it does not have to equal the base.
      for (const Target& t : targets(m, copy, &why)) {
        touched_.insert(t.pair->trained.key);
        Verdict v;
        const bool plain = is_plain_float(t.pair->base.matrix.tensor->dtype) && is_plain_float(t.pair->trained.matrix.tensor->dtype);
        if (!all || !plain || !judge(checker, t, s, m, &v)) {
          all = false;
          continue;
        }
        append(m.path, *t.pair, m.rank, v, s.expected);
        ++adapted_;
        why.clear();
      }
    }
    if (!all || !why.empty()) left_out_.push_back(why.empty() ? m.path + " (cannot be decoded)" : why);
  }

  void append(const std::string& module, const WeightPair& p, std::int64_t rank, const Verdict& v, double scale) {
    const WeightUnit& u = p.trained;
    out_.module.push_back(module);
    out_.part.push_back(u.part.part);
    out_.layer.push_back(u.part.layer);
    out_.expert.push_back(u.part.expert);
    out_.tensor.emplace_back(u.matrix.tensor->name);
    out_.file.push_back(ctx_.model.files()[static_cast<std::size_t>(u.matrix.tensor->file)]);
    out_.rank.push_back(rank);
    out_.elements.push_back(u.matrix.elements());
    out_.outside.push_back(v.expected.outside);
    out_.worst.push_back(v.expected.worst);
    out_.scale.push_back(scale);
    out_.fitted.push_back(v.fitted);
    out_.residual.push_back(v.residual);
    out_.form.push_back(v.form);
  }

  void append_plain(const WeightPair& p, const PairSums& sums, const std::string& form) {
    Verdict v;
    v.expected.outside = sums.changed;
    v.form = form;
    append(std::string(p.trained.matrix.tensor->name), p, 0, v, 0);
  }

  /// Modules that were trained and saved whole: the merged model holds what the adapter file holds.
  void check_whole() {
    std::vector<TensorView> views;
    views.reserve(file_.whole.size());
    std::vector<WeightUnit> units;
    for (const auto& [name, view] : file_.whole) {
      views.push_back(*view);
      views.back().name = name;
      names_.cut(views.back(), &units);
    }
    std::vector<WeightPair> pairs;
    for (WeightUnit& unit : units) {
      touched_.insert(unit.key);
      const auto at = by_key_.find(unit.key);
      if (at == by_key_.end()) continue;
      const Matrix& m = at->second->trained.matrix;
      if (m.rows == unit.matrix.rows && m.columns == unit.matrix.columns) pairs.push_back({std::move(unit), at->second->trained});
    }
    compare_plain(pairs, "differs from what the adapter saved whole");
  }

  void check_unadapted() {
    std::vector<WeightPair> pairs;
    for (const WeightPair& p : pairs_.pairs) {
      if (!touched_.count(p.trained.key)) pairs.push_back(p);
    }
    out_.unadapted = static_cast<std::int64_t>(pairs.size());
    compare_plain(pairs, "differs from the base without an adapter");
  }

  void compare_plain(const std::vector<WeightPair>& pairs, const std::string& form) {
    std::vector<const WeightPair*> list;
    for (const WeightPair& p : pairs) list.push_back(&p);
    const std::vector<PairSums> sums = compare(list, ctx_.threads, nullptr);
    for (std::size_t i = 0; i < pairs.size(); ++i) {
      if (sums[i].read && sums[i].changed > 0) append_plain(pairs[i], sums[i], form_of(pairs[i], form));
    }
  }

  /// A base that went through 16 bits on its way into a wider file is rounded, not changed.
  std::string form_of(const WeightPair& p, const std::string& otherwise) const {
    const Float stored = float_of(p.trained.matrix.tensor->dtype).value_or(Float::kF16);
    for (Float through : {Float::kBF16, Float::kF16}) {
      if (k::format_of(through).bits >= k::format_of(stored).bits) continue;
      if (compare({&p}, ctx_.threads, nullptr, through).front().changed == 0) return std::string("rounded to ") + k::name_of(through) + " before it was stored";
    }
    return otherwise;
  }

  MeasureContext& ctx_;
  const AdapterFile& file_;
  const UnitNames& names_;
  const WeightPairs& pairs_;
  std::vector<AlphaPattern> patterns_;
  std::unordered_map<std::string_view, const WeightPair*> by_key_;
  std::unordered_set<std::string> touched_;
  MergeTable out_;
  std::vector<std::string> left_out_;
  std::int64_t adapted_ = 0;
};

void run(MeasureContext& ctx) {
  FactSheet& f = ctx.facts;
  const auto unknown = [&](const std::string& why) { f.merge.explain_unknown(why); };
  if (ctx.model.empty() || ctx.base.empty() || ctx.adapter.empty()) {
    return unknown("base, adapter and merged model are not all among the inputs");
  }
  if (!ctx.replays) return unknown("--static");
  if (f.method.known() && f.method.value() == Method::kOtherAdapter) return unknown("the adapter is not LoRA");
  if (f.adapter_variant.known() && f.adapter_variant.value() != "lora") {
    return unknown("the adapter is " + f.adapter_variant.value() + ": its merge is not base + scale B A");
  }
  if (!f.adapter_alpha.known()) return unknown("lora_alpha is not known: adapter_config.json says it");
  const Family* family = f.family.known() ? find_family(f.family.value()) : nullptr;
  const AdapterFile file = read_adapter_file(ctx.adapter, family, f);
  if (file.magnitudes) return unknown("the adapter holds magnitudes of DoRA: its merge is not base + scale B A");
  const UnitNames names(family, f.num_experts.known() ? f.num_experts.value() : 0);
  const WeightPairs pairs = pair_weights(ctx.base, ctx.model, names);
  MergeCheck(ctx, file, names, pairs).run();
}

}  // namespace

extern const Measure measure_merge_check;
const Measure measure_merge_check = {.name = "merge_check", .supplies = kSupplies, .wants = {}, .run = run};

}  // namespace moeaudit

// One pass over a trace. Each layer has its own sums, filled in the order of records and rows, so the result depends
// neither on threads nor on how a file is cut into pieces.
#include "audit/measures/expert_health.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <set>

#include "audit/families/family.h"
#include "audit/measures/router_inputs.h"
#include "audit/measures/router_precision.h"
#include "audit/measures/trace_replay.h"
#include "audit/tensors/guarded_read.h"
#include "kernels/host/elementary.h"
#include "kernels/host/expert_load.h"
#include "kernels/host/low_precision.h"
#include "kernels/host/router.h"
#include "kernels/host/routing_metrics.h"

namespace moeaudit {
namespace {

namespace k = kernels;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t kValues = 1 << 18;   // logits read at a time
constexpr std::int64_t kMostBlocks = 256;   // that intervals are drawn from
constexpr std::int64_t kFewestBlocks = 10;  // below it there is no interval
constexpr std::int64_t kDraws = 1000;
constexpr std::uint64_t kSeed = 20250117;
constexpr std::int64_t kMostPaired = 512;  // experts: beyond it no table of pairs is kept
constexpr std::size_t kPairsShown = 10;

// ---- small collectors
// ------------------------------------------------------------------------------------------------

/// Sums over blocks of tokens, a row each. When there are too many, neighbours become one.
template <class T>
class Blocks {
 public:
  void add(const std::vector<T>& row) {
    if (pending_.empty()) pending_.resize(row.size());
    for (std::size_t e = 0; e < row.size(); ++e) pending_[e] += row[e];
    if (++pending_size_ < stride_) return;
    rows_.insert(rows_.end(), pending_.begin(), pending_.end());
    std::fill(pending_.begin(), pending_.end(), T{});
    pending_size_ = 0;
    if (size() == 2 * kMostBlocks) halve();
  }
  std::int64_t size() const {
    return pending_.empty() ? 0 : static_cast<std::int64_t>(rows_.size() / pending_.size());
  }
  std::size_t width() const { return pending_.size(); }
  const T* data() const { return rows_.data(); }
  const T* row(std::int64_t b) const { return rows_.data() + static_cast<std::size_t>(b) * width(); }

 private:
  void halve() {
    for (std::size_t b = 0; b < static_cast<std::size_t>(kMostBlocks); ++b) {
      for (std::size_t e = 0; e < width(); ++e)
        rows_[b * width() + e] = rows_[2 * b * width() + e] + rows_[(2 * b + 1) * width() + e];
    }
    rows_.resize(static_cast<std::size_t>(kMostBlocks) * width());
    stride_ *= 2;
  }

  std::vector<T> rows_, pending_;
  std::int64_t pending_size_ = 0, stride_ = 1;
};

/// What of a block is summed beside its counts: these, then the importance and the gate mass of each expert.
enum Total {
  kScored, kEntropy, kConfidence, kSquares, kGateSquares,                          // probabilities
  kCompared, kOffTopK, kJaccard, kMargins, kNearRecorded, kNearBf16,               // choice and logits
  kWithLogits, kNotFinite, kChoices, kOutside, kTokens, kTwice,                    //
  kRecomputed, kRecomputeChanged, kDropChoices, kDropped, kDropTokens, kAllDropped,  //
  kAgainst, kAgainstChanged, kAgainstThen, kAgainstShared,                         //
  kTotals
};

/// Order statistics of non-negative numbers to within 0.8 %: 128 bins a power of two.
class LogHistogram {
 public:
  void add(double v) {
    ++n_;
    least_ = std::min(least_, v);
    if (v < 0x1p-40) return ++zero_, void();
    const auto bits = std::bit_cast<std::uint64_t>(std::min(v, 0x1p23));
    ++bins_[static_cast<std::size_t>((bits >> 45) - (std::bit_cast<std::uint64_t>(0x1p-40) >> 45))];
  }
  std::int64_t size() const { return n_; }
  double least() const { return n_ > 0 ? least_ : kNan; }
  /// The nearest rank's bin, at its lower end; 0 where that is below 2^-40.
  double percentile(double share) const {
    if (n_ == 0) return kNan;
    const auto rank = static_cast<std::int64_t>(std::ceil(share * static_cast<double>(n_)));
    std::int64_t seen = zero_;
    if (seen >= rank) return std::max(0.0, least_);
    for (std::size_t i = 0; i < bins_.size(); ++i) {
      seen += bins_[i];
      if (seen >= rank)
        return std::max(least_, std::bit_cast<double>(((std::bit_cast<std::uint64_t>(0x1p-40) >> 45) + i) << 45));
    }
    return kNan;
  }

 private:
  std::array<std::int64_t, 128 * 64> bins_{};
  std::int64_t n_ = 0, zero_ = 0;
  double least_ = std::numeric_limits<double>::infinity();
};

/// Two choices of k experts for the same tokens, counted over many pieces of them.
class Agreement {
 public:
  void add(const std::int32_t* now, const std::int32_t* reference, const std::uint8_t* valid, std::int64_t tokens,
           std::int64_t top_k) {
    args_ = {now, reference, valid, tokens, top_k, top_k};
    const auto size = static_cast<std::size_t>(k::agreement_rows(args_) * k::agreement_columns(args_));
    piece_.resize(size), table_.resize(size);
    k::AgreementCounts c;
    if (k::count_agreement(args_, piece_.data(), &c) != k::Status::kOk) return;
    for (std::size_t i = 0; i < size; ++i) table_[i] += piece_[i];
    counts_.tokens += c.tokens;
    counts_.same_first += c.same_first;
    counts_.chosen_now += c.chosen_now;
    counts_.chosen_then += c.chosen_then;
  }
  std::int64_t tokens() const { return counts_.tokens; }
  std::int64_t then() const { return counts_.chosen_then; }
  std::int64_t shared() const {
    std::int64_t sum = 0;
    const std::int64_t columns = table_.empty() ? 1 : k::agreement_columns(args_);
    for (std::size_t i = 0; i < table_.size(); ++i) sum += static_cast<std::int64_t>(i) / columns * table_[i];
    return sum;
  }
  k::Agreement result(std::int64_t experts) const {
    k::Agreement out;
    k::agreement(args_, table_.data(), counts_, experts, &out);
    return out;
  }
  /// Tokens with another set.
  std::int64_t changed() const {
    std::int64_t same = 0;
    for (std::int64_t s = 0; !table_.empty() && s < k::agreement_rows(args_); ++s)
      same += table_[static_cast<std::size_t>(s * k::agreement_columns(args_) + s)];
    return counts_.tokens - same;
  }

 private:
  k::AgreementArgs args_;  // of the last piece; its pointers are not used again
  std::vector<std::int64_t> table_, piece_;
  k::AgreementCounts counts_;
};

/// MaxVio of many windows.
struct Windows {
  Blocks<double> blocks;  // value, 1
  std::int64_t n = 0;
  double sum = 0, worst = -1, floor_sum = 0, least_share = std::numeric_limits<double>::infinity();

  void add(const k::LoadStatistics& s) {
    if (s.choices == 0) return;
    ++n;
    blocks.add({s.max_violation, 1});
    sum += s.max_violation;
    worst = std::max(worst, s.max_violation);
    floor_sum += s.max_violation_floor;
    least_share = std::min(least_share, s.fair_share);
  }
};

std::string number(double v) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", v);
  return text;
}

// ---- one layer
// -------------------------------------------------------------------------------------------------------

/// What of a micro-batch all layers share.
struct Frame {
  std::vector<std::uint8_t> valid;  // [rows]; empty: no mask, all count
  std::vector<std::int64_t> cuts;   // ends of the blocks, ascending, the last is rows
};

/// One worker's memory for a piece of rows.
struct Scratch {
  std::vector<std::int32_t> ids, top, runner_up, other_ids;
  std::vector<std::uint8_t> valid, sets, others, usable, flags;  // sets: valid rows of k different experts
  std::vector<float> logits, probabilities, weights;
  k::Backend* backend = nullptr;
};

class LayerSums {
 public:
  LayerSums(const TraceLayer& layer, Scoring score, std::int64_t sources)
      : layer_(layer), score_(score), sources_(sources) {}

  /// Adds the rows of a micro-batch. `other`: the same tokens in another trace, or null.
  void add(const Frame& frame, const LayerTensors& t, const LayerTensors* other, Scratch* piece,
           std::vector<WeightProblem>* problems) {
    const auto fault = [&](std::string what) {
      problems->push_back({"", -1, "layer." + std::to_string(layer_.layer) + ".*", std::move(what)});
    };
    if (experts_ == 0) experts_ = t.experts;
    if (top_k_ == 0) top_k_ = t.top_k > 0 ? t.top_k : layer_.top_k;
    if (experts_ < 1) return;
    if (t.experts != experts_ || (t.selected_experts && t.top_k != top_k_) || top_k_ > experts_) {
      return fault("has " + std::to_string(t.experts) + " experts and " + std::to_string(t.top_k) +
                   " choices a token, the layer before had " + std::to_string(experts_) + " and " +
                   std::to_string(top_k_));
    }
    if (counts_.empty()) start();
    piece_ = piece;
    const bool from_logits = !t.selected_experts && !t.tokens_per_expert && t.router_logits && top_k_ > 0;
    const bool rows = (t.selected_experts && top_k_ > 0) || from_logits;
    if (!rows && t.tokens_per_expert) add_counts(*t.tokens_per_expert, problems);
    if (!rows) return;
    choices_from_ = from_logits ? "top k of the logits" : "selected_experts";
    std::int64_t begin = 0;
    for (const std::int64_t end : frame.cuts) {
      std::fill(block_.begin(), block_.end(), 0);
      const std::int64_t most = std::clamp<std::int64_t>(kValues / experts_, 16, 1024);
      for (std::int64_t first = begin; first < end; first += most) {
        if (!add_rows(frame, t, other, first, std::min(most, end - first)))
          return fault("a tensor could not be read: its file became shorter or the disk failed");
      }
      finish_block();
      // Read once: a file larger than the memory must not fill it.
      for (const auto* view :
           {&t.router_logits, &t.selected_experts, &t.routing_weights, &t.recomputed_selected_experts, &t.dropped}) {
        if (*view) drop_pages(**view, end * (*view)->shape[1]);
      }
      begin = end;
    }
  }

  void end_micro_batch(std::int64_t rank) {
    if (sources_ > 0 && !micro_.empty()) {
      by_source_.resize(static_cast<std::size_t>(sources_ * experts_));
      for (std::size_t e = 0; e < micro_.size(); ++e)
        by_source_[static_cast<std::size_t>(rank % sources_) * micro_.size() + e] += micro_[e];
    }
    end_window(&micro_, &micro_tokens_, &micro_windows_);
  }
  void end_step() { end_window(&step_, &step_tokens_, &step_windows_); }

  LayerHealth report(bool keep_pairs) const;
  bool any() const { return !counts_.empty(); }

 private:
  void start() {
    const auto e = static_cast<std::size_t>(experts_);
    counts_.resize(e), micro_.resize(e), step_.resize(e), block_.resize(e), chunk_.resize(e), stamp_.resize(e, -1);
    if (experts_ <= kMostPaired) pairs_.resize(e * e), pair_chunk_.resize(e * e);
  }

  std::int64_t k_or_one() const { return std::clamp<std::int64_t>(top_k_, 1, experts_); }

  k::LoadStatistics statistics(const std::vector<std::int64_t>& counts, std::int64_t tokens) const {
    k::LoadStatistics s;
    if (k::load_statistics(counts.data(), experts_, k_or_one(), tokens, &s) != k::Status::kOk)  // no counts: NaN
      k::load_statistics(std::vector<std::int64_t>(counts.size()).data(), experts_, k_or_one(), tokens, &s);
    return s;
  }

  void end_window(std::vector<std::int64_t>* counts, std::int64_t* tokens, Windows* windows) {
    if (counts->empty() || *tokens == 0) return;
    windows->add(statistics(*counts, *tokens));
    std::fill(counts->begin(), counts->end(), 0);
    *tokens = 0;
  }

  void add_tokens(std::int64_t tokens) {
    tokens_ += tokens;
    micro_tokens_ += tokens;
    step_tokens_ += tokens;
  }

  void finish_block() {
    for (std::size_t e = 0; e < block_.size(); ++e) {
      counts_[e] += block_[e];
      micro_[e] += block_[e];
      step_[e] += block_[e];
    }
    blocks_.add(block_);
    for (const std::int64_t c : block_) choices_ += c;
    std::vector<double> now = totals(), row = now;
    for (std::size_t i = 0; i < seen_.size(); ++i) row[i] -= seen_[i];
    seen_ = std::move(now);
    sums_.add(row);
  }

  /// Of all tokens until now.
  std::vector<double> totals() const {
    std::vector<double> v(kTotals + 2 * static_cast<std::size_t>(experts_));
    const auto set = [&](Total t, auto value) { v[t] = static_cast<double>(value); };
    set(kScored, scored_tokens_), set(kEntropy, entropy_sum_), set(kConfidence, confidence_sum_);
    set(kSquares, squares_), set(kGateSquares, gate_squares_);
    set(kCompared, top_k_agreement_.tokens()), set(kOffTopK, not_top_k_), set(kMargins, margins_.size());
    if (top_k_agreement_.tokens() > 0)
      set(kJaccard, top_k_agreement_.result(experts_).jaccard * static_cast<double>(top_k_agreement_.tokens()));
    set(kNearRecorded, near_recorded_), set(kNearBf16, near_bf16_);
    set(kWithLogits, logit_tokens_), set(kNotFinite, not_finite_);
    set(kChoices, choices_ + outside_), set(kOutside, outside_), set(kTokens, tokens_), set(kTwice, repeated_);
    set(kRecomputed, recompute_.tokens()), set(kRecomputeChanged, recompute_.changed());
    set(kDropChoices, drop_choices_), set(kDropped, dropped_), set(kDropTokens, drop_tokens_);
    set(kAllDropped, all_dropped_);
    set(kAgainst, against_.tokens()), set(kAgainstChanged, against_.changed());
    set(kAgainstThen, against_.then()), set(kAgainstShared, against_.shared());
    std::copy(importance_.begin(), importance_.end(), v.begin() + kTotals);
    std::copy(gate_.begin(), gate_.end(), v.begin() + kTotals + experts_);
    return v;
  }

  HealthMetric share(std::string name, Total hits, Total n) const;
  std::pair<double, double> share_interval(double hits, double n, const std::function<double(std::int64_t)>& hits_of,
                                           const std::function<double(std::int64_t)>& n_of) const;
  void resample(LayerHealth* out) const;

  void add_counts(const TensorView& view, std::vector<WeightProblem>* problems) {
    choices_from_ = "tokens_per_expert";
    std::int64_t sum = 0;
    bool sound = read_counts(view, 0, experts_, block_.data());
    for (const std::int64_t n : block_) sound = sound && n >= 0 && !__builtin_add_overflow(sum, n, &sum);
    if (!sound || sum > (std::int64_t{1} << 50)) {
      problems->push_back({"", view.offset, std::string(view.name), "holds a count that is no count"});
      return;
    }
    add_tokens(sum / k_or_one());
    finish_block();
  }

  bool add_rows(const Frame& frame, const LayerTensors& t, const LayerTensors* other, std::int64_t first,
                std::int64_t n);
  bool add_logits(const TensorView& logits, std::int64_t first, std::int64_t n);
  void compare_with_logits(std::int64_t n, k::Float dtype);
  std::int64_t drop_repeated(const std::int32_t* ids, std::int64_t n, std::vector<std::uint8_t>* rows);

  TraceLayer layer_;
  Scoring score_;
  std::int64_t sources_;  // ranks of a group, where the trace says on which one a token was; else 0
  std::int64_t experts_ = 0, top_k_ = 0;
  std::string choices_from_;
  // counts
  std::vector<std::int64_t> counts_, micro_, step_, block_, chunk_, by_source_;
  std::int64_t tokens_ = 0, micro_tokens_ = 0, step_tokens_ = 0, outside_ = 0;
  Blocks<std::int64_t> blocks_;
  Blocks<double> sums_;        // of the same blocks
  std::vector<double> seen_;   // totals() at the end of the last one
  std::int64_t choices_ = 0;
  Windows micro_windows_, step_windows_;
  std::vector<std::int64_t> pairs_, pair_chunk_;
  // probabilities
  std::vector<double> importance_, gate_;
  double entropy_sum_ = 0, confidence_sum_ = 0, squares_ = 0, gate_squares_ = 0;
  std::int64_t scored_tokens_ = 0, logit_tokens_ = 0, not_finite_ = 0;
  bool gates_ = false;
  // the choice against the logits
  LogHistogram margins_;
  std::int64_t not_top_k_ = 0, near_recorded_ = 0, near_bf16_ = 0;
  Agreement top_k_agreement_, recompute_, against_;
  std::int64_t repeated_ = 0;
  std::vector<std::int64_t> dropped_of_;
  std::int64_t drop_choices_ = 0, dropped_ = 0, drop_tokens_ = 0, all_dropped_ = 0;
  std::vector<std::int64_t> stamp_;
  std::int64_t now_ = 0;
  Scratch* piece_ = nullptr;  // while add() runs
};

/// Takes rows that name an expert twice out of `rows`: no set of k experts. Returns how many.
std::int64_t LayerSums::drop_repeated(const std::int32_t* ids, std::int64_t n, std::vector<std::uint8_t>* rows) {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    ++now_;
    bool twice = false;
    for (std::int64_t j = 0; j < top_k_; ++j) {
      const std::int32_t id = ids[i * top_k_ + j];
      if (id < 0 || id >= experts_) continue;
      twice = twice || stamp_[static_cast<std::size_t>(id)] == now_;
      stamp_[static_cast<std::size_t>(id)] = now_;
    }
    std::uint8_t& row = (*rows)[static_cast<std::size_t>(i)];
    found += twice && row;
    if (twice) row = 0;
  }
  return found;
}

bool LayerSums::add_rows(const Frame& frame, const LayerTensors& t, const LayerTensors* other, std::int64_t first,
                         std::int64_t n) {
  const auto size = static_cast<std::size_t>(n * top_k_);
  piece_->valid.assign(static_cast<std::size_t>(n), 1);
  if (!frame.valid.empty()) std::copy_n(frame.valid.begin() + first, n, piece_->valid.begin());
  const bool logits = t.router_logits.has_value();
  if (logits && !add_logits(*t.router_logits, first, n)) return false;
  piece_->ids.resize(size);
  if (t.selected_experts) {
    if (!read_ids(*t.selected_experts, first * top_k_, n * top_k_, piece_->ids.data())) return false;
  } else {
    piece_->ids = piece_->top;
    for (std::int64_t i = 0; i < n; ++i)
      piece_->valid[static_cast<std::size_t>(i)] &= piece_->usable[static_cast<std::size_t>(i)];
  }
  std::int64_t outside = 0, tokens = 0;
  piece_->backend->count_choices(k::CountArgs<std::int32_t>{piece_->ids.data(), piece_->valid.data(), n, top_k_, experts_},
                                 chunk_.data(), &outside);
  for (std::size_t e = 0; e < chunk_.size(); ++e) block_[e] += chunk_[e];
  for (const std::uint8_t v : piece_->valid) tokens += v;
  add_tokens(tokens);
  outside_ += outside;
  piece_->sets = piece_->valid;
  repeated_ += drop_repeated(piece_->ids.data(), n, &piece_->sets);
  if (!pairs_.empty()) {
    k::co_activation({piece_->ids.data(), piece_->valid.data(), n, top_k_, experts_}, pair_chunk_.data());
    for (std::size_t i = 0; i < pairs_.size(); ++i) pairs_[i] += pair_chunk_[i];
  }
  if (logits) {
    const DType d = t.router_logits->dtype;
    compare_with_logits(n, d == DType::kBF16  ? k::Float::kBF16
                           : d == DType::kF16 ? k::Float::kF16
                           : d == DType::kF32 ? k::Float::kF32
                                              : k::Float::kF64);
  }
  if (t.routing_weights) {
    piece_->weights.resize(size);
    if (!read_values(*t.routing_weights, first * top_k_, n * top_k_, piece_->weights.data())) return false;
    gates_ = true;
    gate_.resize(static_cast<std::size_t>(experts_));
    for (std::size_t i = 0; i < size; ++i) {
      const std::int32_t id = piece_->ids[i];
      if (piece_->valid[i / static_cast<std::size_t>(top_k_)] && id >= 0 && id < experts_ &&
          std::isfinite(piece_->weights[i])) {
        const double mass = static_cast<double>(piece_->weights[i]);
        gate_[static_cast<std::size_t>(id)] += mass;
        gate_squares_ += mass * mass;
      }
    }
  }
  const auto compare = [&](const TensorView& view, Agreement* with) {
    piece_->other_ids.resize(size);
    if (!read_ids(view, first * top_k_, n * top_k_, piece_->other_ids.data())) return false;
    piece_->others = piece_->sets;
    drop_repeated(piece_->other_ids.data(), n, &piece_->others);
    with->add(piece_->other_ids.data(), piece_->ids.data(), piece_->others.data(), n, top_k_);
    return true;
  };
  if (t.recomputed_selected_experts && !compare(*t.recomputed_selected_experts, &recompute_)) return false;
  if (other && other->selected_experts && other->top_k == top_k_ && !compare(*other->selected_experts, &against_))
    return false;
  if (t.dropped) {
    piece_->flags.resize(size);
    dropped_of_.resize(static_cast<std::size_t>(experts_));
    if (!read_flags(*t.dropped, first * top_k_, n * top_k_, piece_->flags.data())) return false;
    for (std::int64_t i = 0; i < n; ++i) {
      if (!piece_->valid[static_cast<std::size_t>(i)]) continue;
      std::int64_t gone = 0;
      for (std::int64_t j = i * top_k_; j < (i + 1) * top_k_; ++j) {
        if (!piece_->flags[static_cast<std::size_t>(j)]) continue;
        ++gone;
        const std::int32_t id = piece_->ids[static_cast<std::size_t>(j)];
        if (id >= 0 && id < experts_) ++dropped_of_[static_cast<std::size_t>(id)];
      }
      drop_choices_ += top_k_;
      dropped_ += gone;
      ++drop_tokens_;
      all_dropped_ += gone == top_k_;
    }
  }
  return true;
}

/// Reads the logits, and makes of them probabilities, the top k and the runner-up. piece_->usable: valid rows of finite
/// logits.
bool LayerSums::add_logits(const TensorView& view, std::int64_t first, std::int64_t n) {
  const std::int64_t e = experts_, top_k = k_or_one();
  const auto size = static_cast<std::size_t>(n * e);
  piece_->logits.resize(size), piece_->probabilities.resize(size);
  if (!read_values(view, first * e, n * e, piece_->logits.data())) return false;
  piece_->usable = piece_->valid;
  for (std::int64_t i = 0; i < n; ++i) {
    logit_tokens_ += piece_->valid[static_cast<std::size_t>(i)];
    const bool finite = std::all_of(piece_->logits.begin() + i * e, piece_->logits.begin() + (i + 1) * e,
                                    [](float z) { return std::isfinite(z); });
    if (finite) continue;
    not_finite_ += piece_->valid[static_cast<std::size_t>(i)];
    piece_->usable[static_cast<std::size_t>(i)] = 0;
  }
  piece_->top.resize(static_cast<std::size_t>(n * top_k)), piece_->runner_up.resize(static_cast<std::size_t>(n));
  k::RouteArgs<float> args;
  args.logits = piece_->logits.data();
  args.tokens = n;
  args.experts = e;
  args.top_k = top_k;
  args.score = score_ == Scoring::kSoftmax   ? k::Score::kSoftmax
               : score_ == Scoring::kSigmoid ? k::Score::kSigmoid
                                             : k::Score::kSqrtSoftplus;
  k::RouteResult<float> result;
  result.chosen = piece_->top.data();
  result.runner_up = piece_->runner_up.data();
  result.choice = piece_->probabilities.data();
  if (piece_->backend->route(args, result) != k::Status::kOk) return false;
  if (score_ != Scoring::kSoftmax) {
    for (std::int64_t i = 0; i < n; ++i) {
      float* p = piece_->probabilities.data() + i * e;
      double sum = 0;
      for (std::int64_t j = 0; j < e; ++j) sum += static_cast<double>(p[j]);
      for (std::int64_t j = 0; sum > 0 && j < e; ++j) p[j] = static_cast<float>(static_cast<double>(p[j]) / sum);
    }
  }
  return true;
}

/// The choice against the logits, for usable rows that chose k different experts.
void LayerSums::compare_with_logits(std::int64_t n, k::Float dtype) {
  const std::int64_t e = experts_;
  importance_.resize(static_cast<std::size_t>(e));
  if (top_k_ < 1) return;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint8_t& row = piece_->usable[static_cast<std::size_t>(i)];
    const std::int32_t* chosen = piece_->ids.data() + i * top_k_;
    row = row && piece_->sets[static_cast<std::size_t>(i)] &&
          std::all_of(chosen, chosen + top_k_, [&](std::int32_t id) { return id >= 0 && id < e; });
    if (!row) continue;
    const float* p = piece_->probabilities.data() + i * e;
    for (std::int64_t j = 0; j < e; ++j) {
      const double mass = static_cast<double>(p[j]);
      importance_[static_cast<std::size_t>(j)] += mass;
      squares_ += mass * mass;
    }
  }
  if (top_k_ < e) {
    top_k_agreement_.add(piece_->top.data(), piece_->ids.data(), piece_->usable.data(), n, top_k_);
    const k::AgreementArgs sets{piece_->top.data(), piece_->ids.data(), nullptr, n, top_k_, top_k_};
    for (std::int64_t i = 0; i < n; ++i) {
      if (!piece_->usable[static_cast<std::size_t>(i)]) continue;
      // Where the choice is the top k, its last and the runner-up are all that the margin depends on.
      const float* z = piece_->logits.data() + i * e;
      const bool is_top = k::token_agreement(sets, i).shared == top_k_;
      const float pair[2] = {z[piece_->top[static_cast<std::size_t>((i + 1) * top_k_ - 1)]],
                             z[piece_->runner_up[static_cast<std::size_t>(i)]]};
      constexpr std::int32_t kFirst = 0;
      const auto margin_in = [&](k::Float f) {
        return is_top ? k::token_margin(k::MarginArgs<float>{pair, &kFirst, nullptr, 1, 2, 1, f}, 0)
                      : k::token_margin(
                            k::MarginArgs<float>{z, piece_->ids.data() + i * top_k_, nullptr, 1, e, top_k_, f}, 0);
      };
      const k::TokenMargin m = margin_in(k::Float::kBF16);
      not_top_k_ += m.margin < 0;
      if (m.margin < 0) continue;
      margins_.add(m.margin);
      near_bf16_ += m.near;
      near_recorded_ += m.near && (dtype == k::Float::kBF16 || margin_in(dtype).near);
    }
  }
  std::int64_t usable = 0;
  for (const std::uint8_t u : piece_->usable) usable += u;
  k::RoutingStatistics s;
  if (usable == 0 ||
      k::routing_statistics(k::RoutingStatisticsArgs<float>{piece_->probabilities.data(), piece_->ids.data(),
                                                            piece_->usable.data(), n, e, top_k_},
                            &s) != k::Status::kOk)
    return;
  scored_tokens_ += usable;
  entropy_sum_ += s.token_entropy * static_cast<double>(usable);
  confidence_sum_ += s.confidence * static_cast<double>(usable);
}

// ---- from sums to metrics
// --------------------------------------------------------------------------------------------

double entropy_of(const std::vector<double>& masses, double sum) {
  double h = 0;
  for (const double m : masses) h += m > 0 ? -(m / sum) * k::log_exact_order(m / sum) : 0;
  return h;
}

double cv_of(const std::vector<double>& relative) {  // of values relative to their mean
  double squares = 0;
  for (const double u : relative) squares += (u - 1) * (u - 1);
  return std::sqrt(squares / static_cast<double>(relative.size()));
}

std::vector<double> relative_to_fair(const std::vector<double>& mass) {
  double sum = 0;
  for (const double m : mass) sum += m;
  std::vector<double> out;
  for (const double m : mass) out.push_back(m / (sum / static_cast<double>(mass.size())));
  return out;
}

/// Wilson's interval with as many tokens as the blocks' variance says that there are independent ones (Kish's design
/// effect; 1 where there are fewer than kFewestBlocks, or no hit, or nothing else).
std::pair<double, double> LayerSums::share_interval(double hits, double n, const std::function<double(std::int64_t)>& hits_of,
                                                    const std::function<double(std::int64_t)>& n_of) const {
  double effect = 1;
  const std::int64_t blocks = sums_.size();
  if (blocks >= kFewestBlocks && hits > 0 && hits < n) {
    double h = 0, all = 0, squares = 0;
    for (std::int64_t b = 0; b < blocks; ++b) h += hits_of(b), all += n_of(b);
    const double r = h / all, count = static_cast<double>(blocks);
    for (std::int64_t b = 0; b < blocks; ++b) squares += (hits_of(b) - r * n_of(b)) * (hits_of(b) - r * n_of(b));
    if (r > 0 && r < 1) effect = std::max(1.0, squares * count / (count - 1) / (all * r * (1 - r)));
  }
  return wilson_interval(hits / effect, n / effect);
}

HealthMetric LayerSums::share(std::string name, Total hits, Total n) const {
  HealthMetric m;
  m.name = std::move(name);
  const std::vector<double> all = totals();
  if (all[n] == 0) return m;
  m.value = all[hits] / all[n];
  std::tie(m.low, m.high) = share_interval(
      all[hits], all[n], [&](std::int64_t b) { return sums_.row(b)[hits]; }, [&](std::int64_t b) { return sums_.row(b)[n]; });
  return m;
}

/// Basic bootstrap over the blocks: 2 value - the middle 95 % of the resamples. (A resample is less even than the sample by
/// about as much as the sample than the text; their percentiles alone would leave out the value of an even router.)
void LayerSums::resample(LayerHealth* out) const {
  const std::int64_t blocks = out->blocks;
  if (blocks < kFewestBlocks) return;
  const double e = static_cast<double>(experts_), log_e = experts_ > 1 ? k::log_exact_order(e) : 1;
  const auto set = [&](const char* name, double low, double high, double least, double most) {
    for (HealthMetric& m : out->metrics) {
      if (m.name != name || std::isnan(m.value)) continue;
      m.low = std::clamp(2 * m.value - high, least, most);
      m.high = std::clamp(2 * m.value - low, least, most);
    }
  };
  constexpr double kMost = std::numeric_limits<double>::infinity();
  k::LoadIntervals i;
  if (k::load_intervals(blocks_.data(), blocks, experts_, kDraws, kSeed, &i) == k::Status::kOk) {
    const double sample = experts_ > 1 ? std::sqrt(e / (e - 1)) : 1;
    set("max_violation_pooled", i.max_violation.low, i.max_violation.high, 0, e - 1);
    set("min_violation_pooled", i.min_violation.low, i.min_violation.high, 0, 1);
    set("cv_population", i.cv_population.low, i.cv_population.high, 0, kMost);
    set("cv_sample", i.cv_population.low * sample, i.cv_population.high * sample, 0, kMost);
    set("gini", i.gini.low, i.gini.high, 0, 1);
    set("normalised_entropy", i.normalised_entropy.low, i.normalised_entropy.high, 0, 1);
    // The same interval, in other units.
    const HealthMetric* entropy = out->find("normalised_entropy");
    const double low = entropy->low, high = entropy->high;
    for (HealthMetric& m : out->metrics) {
      if (m.name == "effective_experts") m.low = std::exp(low * log_e), m.high = std::exp(high * log_e);
      if (m.name == "kl_to_uniform") m.low = (1 - high) * log_e, m.high = (1 - low) * log_e;
    }
  }

  struct Statistic {
    const char* name;
    double least, most;
    std::function<double(const std::vector<double>& sums, const std::vector<std::int64_t>& counts)> of;
    std::vector<double> draws = {};
  };
  using Sums = const std::vector<double>&;
  using Counts = const std::vector<std::int64_t>&;
  const auto part = [&](Sums s, std::size_t from) {
    const auto begin = s.begin() + static_cast<std::ptrdiff_t>(from);
    return std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(experts_));
  };
  const auto mean_entropy = [&](Sums s) {
    const std::vector<double> mass = part(s, kTotals);
    return entropy_of(mass, std::accumulate(mass.begin(), mass.end(), 0.0));
  };
  std::vector<Statistic> statistics = {
      {"share_of_busiest_eighth", 0, 1,
       [&](Sums, Counts c) {
         double covered = kNan;
         k::coverage(c.data(), experts_, (experts_ + 7) / 8, &covered);
         return covered;
       }},
      {"importance_cv_population", 0, kMost, [&](Sums s, Counts) { return cv_of(relative_to_fair(part(s, kTotals))); }},
      {"token_entropy", 0, 1, [&](Sums s, Counts) { return s[kEntropy] / s[kScored]; }},
      {"mean_entropy", 0, 1, [&](Sums s, Counts) { return mean_entropy(s) / log_e; }},
      {"mutual_information", 0, kMost, [&](Sums s, Counts) { return mean_entropy(s) - s[kEntropy] / s[kScored] * log_e; }},
      {"confidence", 0, 1, [&](Sums s, Counts) { return s[kConfidence] / s[kScored]; }},
      {"gate_mass_cv_population", 0, kMost,
       [&](Sums s, Counts) { return cv_of(relative_to_fair(part(s, kTotals + static_cast<std::size_t>(experts_)))); }},
      {"choice_jaccard", 0, 1, [&](Sums s, Counts) { return s[kJaccard] / s[kCompared]; }},
      {"saturation", 0, 1, [&](Sums s, Counts) { return s[kAgainstShared] / s[kAgainstThen]; }},
  };
  std::erase_if(statistics, [&](const Statistic& s) { return out->find(s.name) == nullptr; });
  std::vector<double> sums(sums_.width());
  std::vector<std::int64_t> counts(blocks_.width());
  for (std::int64_t d = 0; d < kDraws; ++d) {
    std::fill(sums.begin(), sums.end(), 0.0);
    std::fill(counts.begin(), counts.end(), 0);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t drawn = k::drawn_block(kSeed, d * blocks + b, blocks);
      const double* row = sums_.row(drawn);
      const std::int64_t* chosen = blocks_.row(drawn);
      for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += row[j];
      for (std::size_t j = 0; j < counts.size(); ++j) counts[j] += chosen[j];
    }
    for (Statistic& s : statistics) s.draws.push_back(s.of(sums, counts));
  }
  for (const Statistic& s : statistics) {
    const double shares[] = {0.025, 0.975};
    double ends[2];
    if (k::order_statistics(s.draws.data(), nullptr, kDraws, shares, 2, ends) == k::Status::kOk)
      set(s.name, ends[0], ends[1], s.least, s.most);
  }
}

LayerHealth LayerSums::report(bool keep_pairs) const {
  LayerHealth out;
  out.layer = layer_.layer;
  out.module = layer_.module;
  out.experts = experts_;
  out.top_k = top_k_;
  out.tokens = top_k_ > 0 ? tokens_ : 0;
  out.choices_from = choices_from_;
  out.load = counts_;
  out.load_by_source = by_source_;
  const k::LoadStatistics s = statistics(counts_, tokens_);
  out.choices = s.choices;
  const double e = static_cast<double>(experts_), log_e = experts_ > 1 ? k::log_exact_order(e) : 1;
  std::string few;
  if (s.choices == 0)
    few = "no choice was recorded";
  else if (!s.can_judge)
    few = "fair share of " + number(s.fair_share) + " choices an expert; below 100 chance alone looks like this";

  const auto add = [&](const char* name, double value) -> HealthMetric& {
    HealthMetric& m = out.metrics.emplace_back();
    m.name = name;
    m.value = value;
    return m;
  };
  const auto load_metric = [&](const char* name, double value, double chance, double floor) {
    HealthMetric& m = add(name, value);
    m.chance = chance;
    m.floor = floor;
    m.cannot_tell = few;
  };
  load_metric("max_violation_pooled", s.max_violation, 0, s.max_violation_floor);
  load_metric("min_violation_pooled", s.min_violation, 0, std::min(1.0, s.max_violation_floor));
  load_metric("cv_population", s.cv_population, 0, s.cv_floor);
  load_metric("cv_sample", s.cv_sample, 0, experts_ > 1 ? s.cv_floor * std::sqrt(e / (e - 1)) : kNan);
  // An even router's q_e deviates by CV_0; to second order its entropy falls short by CV_0^2 / 2, and the Gini index of
  // a normal deviation is CV / sqrt(pi).
  const double short_of = s.cv_floor * s.cv_floor / 2;
  load_metric("normalised_entropy", s.normalised_entropy, 1, 1 - short_of / log_e);
  load_metric("effective_experts", s.effective_experts, e, e * (1 - short_of));
  load_metric("kl_to_uniform", s.kl_to_uniform, 0, short_of);
  load_metric("gini", s.gini, 0, s.cv_floor / std::sqrt(3.14159265358979323846));
  double covered = kNan;
  const std::int64_t busiest = (experts_ + 7) / 8;
  k::coverage(counts_.data(), experts_, busiest, &covered);
  // The part p of the largest of many normal values has a mean of phi(z) / p, z the quantile of 1 - p.
  constexpr double kDensityAtEighth = 0.20585;  // phi(1.15035)
  load_metric("share_of_busiest_eighth", covered, static_cast<double>(busiest) / e,
              busiest == 1 ? (1 + s.max_violation_floor) / e : static_cast<double>(busiest) / e + kDensityAtEighth * s.cv_floor);
  add("idle_experts", static_cast<double>(s.idle)).chance = 0;
  HealthMetric& dead = add("dead_experts", static_cast<double>(s.idle));
  dead.chance = 0;
  if (!s.idle_is_dead) {
    dead.cannot_tell =
        "fair share of " + number(s.fair_share) +
        " choices an expert; below 69 an expert with a tenth of it is idle by chance more often than once in 1000";
  }
  HealthMetric& cold = add("cold_experts", static_cast<double>(s.below_tenth));
  cold.chance = 0;
  cold.cannot_tell = few;

  const auto windows = [&](const char* mean, const char* worst, const Windows& w) {
    if (w.n < 2) return;  // one window is all tokens together
    const double count = static_cast<double>(w.n);
    std::string why;
    if (w.least_share < 100)
      why = "fair share of " + number(w.least_share) +
            " choices an expert in the smallest; below 100 chance alone looks like this";
    for (const bool of_worst : {false, true}) {
      HealthMetric& m = add(of_worst ? worst : mean, of_worst ? w.worst : w.sum / count);
      m.chance = 0;
      m.floor = w.floor_sum / count;
      m.cannot_tell = why;
    }
    std::vector<double> values, ones;
    for (std::int64_t b = 0; b < w.blocks.size(); ++b) values.push_back(w.blocks.row(b)[0]), ones.push_back(w.blocks.row(b)[1]);
    k::Interval i;
    HealthMetric& m = out.metrics[out.metrics.size() - 2];  // the mean
    if (w.blocks.size() >= kFewestBlocks &&
        k::ratio_interval(values.data(), ones.data(), w.blocks.size(), kDraws, kSeed, &i) == k::Status::kOk)
      m.low = i.low, m.high = i.high;
  };
  windows("max_violation_step_mean", "max_violation_step_worst", step_windows_);
  windows("max_violation_micro_batch_mean", "max_violation_micro_batch_worst", micro_windows_);

  out.blocks = blocks_.size();
  for (const std::int64_t c : counts_) out.utilisation.push_back(static_cast<double>(c) / s.fair_share);
  if (out.blocks >= kFewestBlocks && s.choices > 0) {
    double surely = 0, perhaps = 0;
    for (std::size_t x = 0; x < counts_.size(); ++x) {
      const auto [low, high] = share_interval(
          static_cast<double>(counts_[x]), static_cast<double>(s.choices),
          [&](std::int64_t b) { return static_cast<double>(blocks_.row(b)[x]); },
          [&](std::int64_t b) { return sums_.row(b)[kChoices] - sums_.row(b)[kOutside]; });
      out.utilisation_interval.push_back({low * e, high * e});
      surely += high * e < 0.1, perhaps += low * e < 0.1;
    }
    HealthMetric& m = *std::find_if(out.metrics.begin(), out.metrics.end(), [](const auto& x) { return x.name == "cold_experts"; });
    m.low = surely, m.high = perhaps;
  }

  if (scored_tokens_ > 0) {
    const double t = static_cast<double>(scored_tokens_);
    out.importance = relative_to_fair(importance_);
    double mass = 0;
    for (const double m : importance_) mass += m;
    const double mean_entropy = entropy_of(importance_, mass);
    // Probabilities of independent tokens with equal means: their squares say how far the sum of T of them strays.
    const double floor = std::sqrt(std::max(0.0, e * squares_ / t - 1) / t);
    load_metric("importance_cv_population", cv_of(out.importance), 0, floor);
    add("token_entropy", entropy_sum_ / t);
    load_metric("mean_entropy", mean_entropy / log_e, 1, 1 - floor * floor / 2 / log_e);
    load_metric("mutual_information", mean_entropy - entropy_sum_ / t * log_e, 0, kNan);
    add("confidence", confidence_sum_ / t).chance = static_cast<double>(top_k_) / e;
  }
  if (gates_ && s.choices > 0) {
    out.gate_mass = relative_to_fair(gate_);
    const double t = static_cast<double>(tokens_), mean = std::accumulate(gate_.begin(), gate_.end(), 0.0) / t;
    load_metric("gate_mass_cv_population", cv_of(out.gate_mass), 0,
                std::sqrt(std::max(0.0, e * gate_squares_ / t / (mean * mean) - 1) / t));
  }
  if (const std::int64_t compared = top_k_agreement_.tokens(); compared > 0) {
    const std::string other = not_top_k_ == 0
                                  ? ""
                                  : number(100 * static_cast<double>(not_top_k_) / static_cast<double>(compared)) +
                                        " % of the choices are not the top k of the logits (correction bias, groups, "
                                        "jitter): their margin lies elsewhere";
    const bool mostly = not_top_k_ * 1000 > compared;
    const k::Agreement agreement = top_k_agreement_.result(experts_);
    out.metrics.push_back(share("choices_off_the_top_k", kOffTopK, kCompared));
    add("choice_jaccard", agreement.jaccard).chance = agreement.jaccard_chance;
    add("margin_min", margins_.least()).cannot_tell = mostly ? other : "";
    for (const auto& [name, p] : {std::pair{"margin_p01", 0.01}, {"margin_p10", 0.10}, {"margin_p50", 0.50}}) {
      HealthMetric& m = add(name, margins_.percentile(p));
      m.cannot_tell = mostly ? other : "";
      // The rank of a percentile among independent tokens is binomial.
      const double spread = 1.96 * std::sqrt(p * (1 - p) / static_cast<double>(std::max<std::int64_t>(margins_.size(), 1)));
      m.low = margins_.percentile(std::max(0.0, p - spread));
      m.high = margins_.percentile(std::min(1.0, p + spread));
    }
    for (const auto& [name, hits] :
         {std::pair{"near_ties_as_recorded", kNearRecorded}, {"near_ties_in_bf16", kNearBf16}}) {
      HealthMetric m = share(name, hits, kMargins);
      if (mostly) m.cannot_tell = other;
      out.metrics.push_back(std::move(m));
    }
  }
  if (logit_tokens_ > 0) out.metrics.push_back(share("tokens_with_non_finite_logits", kNotFinite, kWithLogits));
  if (choices_from_ == "selected_experts") {
    out.metrics.push_back(share("choices_of_no_expert", kOutside, kChoices));
    out.metrics.push_back(share("tokens_with_an_expert_twice", kTwice, kTokens));
  }
  if (recompute_.tokens() > 0) {
    out.metrics.push_back(share("recompute_changed", kRecomputeChanged, kRecomputed));
    out.metrics.back().chance = 0;
  }
  if (drop_choices_ > 0) {
    out.dropped = dropped_of_;
    out.metrics.push_back(share("dropped_choices", kDropped, kDropChoices));
    out.metrics.push_back(share("tokens_with_all_dropped", kAllDropped, kDropTokens));
  }
  if (against_.tokens() > 0) {
    const k::Agreement agreement = against_.result(experts_);
    add("saturation", agreement.saturation).chance = agreement.saturation_chance;
    out.metrics.push_back(share("routing_changed", kAgainstChanged, kAgainst));
  }

  resample(&out);

  std::vector<double> lift(pairs_.size());
  k::CoActivation chance;
  if (!pairs_.empty() && k::co_activation_rates(pairs_.data(), experts_, k_or_one(), tokens_, nullptr, lift.data(),
                                                &chance) == k::Status::kOk) {
    out.lift_chance = chance.lift_chance;
    for (std::int64_t a = 0; a < experts_; ++a) {
      for (std::int64_t b = a + 1; b < experts_; ++b) {
        const auto at = static_cast<std::size_t>(a * experts_ + b);
        if (pairs_[at] < 30) continue;  // the lift of fewer is noise: its deviation is about 1 / sqrt(n)
        out.together.push_back({static_cast<int>(a), static_cast<int>(b), pairs_[at], lift[at]});
      }
    }
    std::stable_sort(out.together.begin(), out.together.end(),
                     [](const auto& x, const auto& y) { return x.lift > y.lift; });
    if (out.together.size() > kPairsShown) out.together.resize(kPairsShown);
    if (keep_pairs) out.co_activation = pairs_;
  }
  return out;
}

// ---- the pass
// --------------------------------------------------------------------------------------------------------

/// Blocks of alike tokens: sequences, where the file says where they end; else a sixteenth of the micro-batch.
Frame frame_of(const MicroBatch& mb, std::int64_t rows, const std::optional<TensorView>& seen) {
  Frame frame;
  const MicroBatchRecord& r = *mb.record;
  if (mb.token_mask) {
    const std::int64_t all = seen ? mb.token_mask->elements() : rows;
    frame.valid.resize(static_cast<std::size_t>(all));
    if (mb.token_mask->elements() != all || !read_flags(*mb.token_mask, 0, all, frame.valid.data()))
      frame.valid.clear();
    std::vector<std::int32_t> at(static_cast<std::size_t>(seen && !frame.valid.empty() ? rows : 0));
    if (!at.empty() && read_ids(*seen, 0, rows, at.data())) {
      std::vector<std::uint8_t> own;
      for (const std::int32_t i : at) own.push_back(frame.valid[static_cast<std::size_t>(i)]);
      frame.valid = std::move(own);
    }
  }
  if (r.sequences > 1 && r.sequence_length > 0 && !seen && (rows == r.tokens || mb.sampled)) {
    std::vector<std::int64_t> at;
    if (mb.sampled) {
      at.resize(static_cast<std::size_t>(rows));
      if (mb.sampled->elements() != rows || !read_counts(*mb.sampled, 0, rows, at.data())) at.clear();
    }
    for (std::int64_t s = 1; s <= r.sequences; ++s) {
      const std::int64_t end = s * r.sequence_length;
      const std::int64_t cut = mb.sampled ? std::lower_bound(at.begin(), at.end(), end) - at.begin() : end;
      if (frame.cuts.empty() ? cut > 0 : cut > frame.cuts.back()) frame.cuts.push_back(std::min(cut, rows));
    }
  } else {
    const std::int64_t piece = std::max<std::int64_t>(64, (rows + 15) / 16);
    for (std::int64_t end = piece; end < rows; end += piece) frame.cuts.push_back(end);
  }
  if (rows > 0 && (frame.cuts.empty() || frame.cuts.back() != rows)) frame.cuts.push_back(rows);
  return frame;
}

std::int64_t rows_of(const LayerTensors& t) {
  for (const auto* view : {&t.selected_experts, &t.router_logits}) {
    if (*view) return (*view)->shape[0];
  }
  return 0;
}

AcrossLayers across(std::string name, const std::vector<LayerHealth>& layers, bool large_is_bad) {
  AcrossLayers out;
  out.name = std::move(name);
  std::vector<std::pair<double, int>> values;
  for (const LayerHealth& l : layers) {
    const HealthMetric* m = l.find(out.name);
    if (m && m->cannot_tell.empty() && std::isfinite(m->value)) values.emplace_back(m->value, l.layer);
  }
  out.layers = static_cast<std::int64_t>(values.size());
  if (values.empty()) return out;
  for (const auto& [value, layer] : values) out.mean += value / static_cast<double>(values.size());
  std::sort(values.begin(), values.end(), [&](const auto& a, const auto& b) {
    return a.first != b.first ? (a.first < b.first) == large_is_bad : a.second > b.second;
  });
  const auto rank = [&](double share) {
    return values[static_cast<std::size_t>(std::max(1.0, std::ceil(share * static_cast<double>(values.size())))) - 1]
        .first;
  };
  out.p50 = rank(0.50), out.p75 = rank(0.75), out.p90 = rank(0.90), out.p95 = rank(0.95);
  std::tie(out.worst, out.worst_layer) = values.back();
  return out;
}

class Pass {
 public:
  Pass(const Trace& trace, const HealthOptions& options) : trace_(trace), options_(options) {
    for (Scratch& s : scratch_) s.backend = options.backend;
  }

  HealthReport run() {
    const TraceFacts& f = trace_.facts();
    report_.path = f.path;
    report_.format = f.format;
    report_.recorder = f.recorder + (f.recorder_version.empty() ? "" : " " + f.recorder_version);
    report_.model = !f.model_class.empty() ? f.model_class : f.model_type;
    report_.note = f.note;
    const Scoring score = scoring();
    const std::int64_t sources = knows_sources() ? options_.placement.size() : 0;
    for (const TraceLayer& layer : f.layers) sums_.emplace_back(layer, score, sources);
    if (options_.against) report_.compared_with = options_.against->facts().path;
    read();
    for (const LayerSums& sums : sums_) {
      if (sums.any()) report_.layers.push_back({});
    }
    std::vector<const LayerSums*> used;
    for (const LayerSums& sums : sums_) {
      if (sums.any()) used.push_back(&sums);
    }
    parallel_for(options_.threads, static_cast<std::int64_t>(used.size()), [&](std::int64_t i, int) {
      report_.layers[static_cast<std::size_t>(i)] = used[static_cast<std::size_t>(i)]->report(options_.co_activation);
    });
    const bool scored = std::any_of(report_.layers.begin(), report_.layers.end(),
                                    [](const LayerHealth& l) { return !l.importance.empty(); });
    if (!scored) report_.score = report_.score_from = "";
    for (const auto& [name, large_is_bad] : {std::pair{"max_violation_pooled", true},
                                             {"max_violation_step_mean", true},
                                             {"max_violation_micro_batch_mean", true},
                                             {"min_violation_pooled", true},
                                             {"cv_population", true},
                                             {"normalised_entropy", false},
                                             {"gini", true},
                                             {"token_entropy", false},
                                             {"mutual_information", false},
                                             {"near_ties_in_bf16", true},
                                             {"dropped_choices", true},
                                             {"recompute_changed", true},
                                             {"saturation", false}}) {
      AcrossLayers a = across(name, report_.layers, large_is_bad);
      if (a.layers > 1) report_.across.push_back(std::move(a));
    }
    const bool compared = std::any_of(report_.layers.begin(), report_.layers.end(),
                                      [](const LayerHealth& l) { return l.find("saturation") != nullptr; });
    if (options_.against && !compared) {
      report_.problems.push_back({report_.compared_with, 0, 0, "has no layer with choices for the same tokens",
                                  "give a trace of the same micro-batches in the same order, routed by another checkpoint"});
    }
    if (options_.placement.size() > 0) report_.placement = forecast_placement(report_.layers, placement(), &report_.problems);
    return std::move(report_);
  }

 private:
  PlacementOptions placement() const {
    PlacementOptions o = options_.placement;
    if (o.hidden_size == 0) o.hidden_size = trace_.facts().hidden_size.value_or(0);
    return o;
  }

  /// Ranks are counted 0 .. m R - 1, and R neighbours are a group: rank mod R is the place in it. A trace of fewer ranks, or
  /// of counts that were taken behind the dispatch, does not say where the tokens came from.
  bool knows_sources() const {
    const std::int64_t group = options_.placement.size();
    const std::string& format = trace_.facts().format;
    if (group == 0 || (format != "moe-audit-trace" && format != "megatron-router-trace")) return false;
    std::set<std::int64_t> ranks;
    for (const MicroBatchRecord& r : trace_.micro_batches()) ranks.insert(r.rank);
    const auto count = static_cast<std::int64_t>(ranks.size());
    return count > 0 && count % group == 0 && *ranks.rbegin() == count - 1;
  }

  Scoring scoring() {
    Scoring score = Scoring::kSoftmax;
    report_.score_from = "assumed";
    const Family* family = find_family_by_model_type(trace_.facts().model_type);
    if (family) score = family->routing.scoring, report_.score_from = "family";
    if (options_.score) score = *options_.score, report_.score_from = "given";
    report_.score = name_of(score);
    return score;
  }

  void read() {
    const ReadGuard guard;  // one for all of the reads below
    std::set<std::int64_t> ranks;
    std::size_t done = 0;
    for (const TraceStep& step : trace_.steps()) {
      for (const MicroBatchRecord& record : trace_.micro_batches_of(step)) {
        ranks.insert(record.rank);
        if (record.training.value_or(true)) micro_batch(record);
        if (options_.progress)
          options_.progress("expert health",
                            static_cast<double>(++done) / static_cast<double>(trace_.micro_batches().size()));
      }
      for (LayerSums& sums : sums_) sums.end_step();
      report_.steps += step.micro_batches > 0;
    }
    report_.ranks = static_cast<std::int64_t>(ranks.size());
  }

  void micro_batch(const MicroBatchRecord& record) {
    ++report_.micro_batches;
    std::vector<WeightProblem> problems;
    const MicroBatch mb = trace_.open(record, &problems);
    MicroBatch other;
    if (options_.against) {
      const auto index = static_cast<std::size_t>(&record - trace_.micro_batches().data());
      const auto theirs = options_.against->micro_batches();
      if (index < theirs.size()) other = options_.against->open(theirs[index], &problems);
    }
    std::map<std::pair<std::int64_t, int>, Frame> frames;  // by rows; those of a layer that saw fewer tokens are its own
    const auto frame_at = [](const LayerTensors& t) { return std::pair(rows_of(t), t.seen ? t.layer : -1); };
    for (const LayerTensors& t : mb.layers) {
      if (!frames.contains(frame_at(t))) frames.emplace(frame_at(t), frame_of(mb, rows_of(t), t.seen));
    }
    std::vector<std::vector<WeightProblem>> found(mb.layers.size());
    parallel_for(options_.threads, static_cast<std::int64_t>(mb.layers.size()), [&](std::int64_t i, int worker) {
      const LayerTensors& t = mb.layers[static_cast<std::size_t>(i)];
      const auto at = std::lower_bound(trace_.facts().layers.begin(), trace_.facts().layers.end(), t.layer,
                                       [](const TraceLayer& l, int number) { return l.layer < number; });
      LayerSums& sums = sums_[static_cast<std::size_t>(at - trace_.facts().layers.begin())];
      if (t.saw_nothing()) return;
      const LayerTensors* theirs = other.layer(t.layer);
      if (theirs && rows_of(*theirs) != rows_of(t)) theirs = nullptr;
      sums.add(frames.at(frame_at(t)), t, theirs, &scratch_[static_cast<std::size_t>(worker)],
               &found[static_cast<std::size_t>(i)]);
      sums.end_micro_batch(record.rank);
    });
    for (auto& list : found) problems.insert(problems.end(), list.begin(), list.end());
    for (WeightProblem& p : problems) {
      if (p.file.empty()) p.file = record.file.empty() ? trace_.facts().path : trace_.facts().path + "/" + record.file;
      if (report_.weight_problems.size() < 100) report_.weight_problems.push_back(std::move(p));
    }
  }

  const Trace& trace_;
  const HealthOptions& options_;
  HealthReport report_;
  std::vector<LayerSums> sums_;
  std::vector<Scratch> scratch_{static_cast<std::size_t>(std::max(options_.threads, 1))};
};

}  // namespace

/// Routing and counts are estimated, not measured apart, at a fifth of a replay.
double health_seconds(const Trace& trace) { return 0.2 * host_seconds(trace); }

HealthReport measure_health(const Trace& trace, const HealthOptions& options) { return Pass(trace, options).run(); }

}  // namespace moeaudit

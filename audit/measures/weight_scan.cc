// Reads every value of every tensor once, in the order of the files, on all threads.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <map>
#include <thread>
#include <unordered_map>
#include <unordered_set>

#include "audit/families/family.h"
#include "audit/measures/measure.h"
#include "audit/measures/tensor_name.h"
#include "audit/measures/value_scan.h"
#include "audit/tensors/guarded_read.h"
#include "kernels/host/router.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 1> kSupplies = {"weights.scan"};
constexpr std::array<std::string_view, 1> kWants = {"weights.routers"};

// ---- what is scanned -----------------------------------------------------------------------------------------------

/// One row of the table: a tensor, or the slice of one expert in a stack.
struct Unit {
  std::size_t tensor;            // in TensorStore, Plan::scans and Plan::parts
  std::int64_t first, elements;  // values of the tensor
  int expert;
};

struct Plan {
  std::vector<ValueScan> scans;  // of every tensor
  std::vector<NamedPart> parts;
  std::vector<Unit> units;  // not of side tensors
  std::int64_t bytes = 0;
};

std::string plain_name(const ValueScan& scan, std::string_view name) {
  constexpr std::string_view kPacked = "_packed", kBlocks = "_blocks";
  const std::string_view scheme = scan.values().scheme();
  if (scheme == "nvfp4" && name.ends_with(kPacked)) return std::string(name.substr(0, name.size() - kPacked.size()));
  if (scheme == "mxfp4") return std::string(name.substr(0, name.size() - kBlocks.size()));
  return std::string(name);
}

/// How many experts lie one behind the other in the tensor; 1 if it is no stack.
std::int64_t slices(const TensorView& t, const ValueScan& scan, const NamedPart& part,
                    const std::unordered_map<int, std::int64_t>& experts) {
  if (part.part != Part::kRoutedExpert || !part.fused || t.shape.size() < 2 || t.shape[0] < 2) return 1;
  const auto known = experts.find(part.layer);
  if (known == experts.end() || known->second != t.shape[0]) return 1;
  const std::int64_t each = scan.values().elements() / t.shape[0];
  const bool divides = scan.values().elements() % t.shape[0] == 0 && (!scan.values().two_a_byte() || each % 2 == 0);
  return divides ? t.shape[0] : 1;
}

Plan make_plan(const MeasureContext& context) {
  const FactSheet& f = context.facts;
  const TensorStore& model = context.model;
  const Family* family = f.family.known() ? find_family(f.family.value()) : nullptr;
  std::unordered_map<int, std::int64_t> experts;
  if (f.routers.known()) {
    const RouterTable& r = f.routers.value();
    for (std::size_t i = 0; i < r.layer.size(); ++i) experts.emplace(r.layer[i], r.expert_count[i]);
  }
  const std::int64_t encoder_layers = f.encoder_layers.known() ? f.encoder_layers.value() : 0;
  const std::int64_t first_set = f.num_experts.known() ? f.num_experts.value() : 0;
  Plan plan;
  std::unordered_set<const TensorView*> side;
  plan.scans.reserve(model.size());
  for (std::size_t i = 0; i < model.size(); ++i) {
    plan.scans.emplace_back(model, model[i]);
    const auto& depends = plan.scans[i].values().side();
    side.insert(depends.begin(), depends.end());
  }
  plan.parts.reserve(model.size());
  for (std::size_t i = 0; i < model.size(); ++i) {
    const ValueScan& scan = plan.scans[i];
    plan.parts.push_back(classify(family, plain_name(scan, model[i].name), encoder_layers, first_set));
    if (side.count(&model[i])) continue;
    const NamedPart& part = plan.parts[i];
    const std::int64_t n = slices(model[i], scan, part, experts);
    const std::int64_t each = scan.values().elements() / n;
    for (std::int64_t e = 0; e < n; ++e) {
      plan.units.push_back({i, e * each, each, n > 1 ? static_cast<int>(e) : part.expert});
    }
    plan.bytes += static_cast<std::int64_t>(model[i].bytes.size());
  }
  return plan;
}

// ---- reading -------------------------------------------------------------------------------------------------------

constexpr std::int64_t kBatch = std::int64_t{64}
                                << 20;  // bytes between two steps of all threads; twice that is resident

struct Piece {
  std::size_t unit;
  std::int64_t first, count;  // values of the tensor
};

struct Batch {
  std::vector<Piece> pieces;
  std::vector<kernels::ScanResult> results;  // aligned with pieces
  std::vector<char> unreadable;
};

void advise(std::span<const std::byte> bytes, int what) {
  if (bytes.empty()) return;
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes.data()) / page * page;
  const auto end = reinterpret_cast<std::uintptr_t>(bytes.data() + bytes.size());
  ::madvise(reinterpret_cast<void*>(begin), end - begin, what);
}

/// Starts reading what is not in memory. Whether the last page is tells it for a piece: asking for pages that are there
/// costs a tenth of the scan.
void read_ahead(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto last = (reinterpret_cast<std::uintptr_t>(bytes.data()) + bytes.size() - 1) / page * page;
  unsigned char there = 0;
  if (::mincore(reinterpret_cast<void*>(last), page, &there) == 0 && (there & 1) != 0) return;
  advise(bytes, MADV_WILLNEED);
}

class Reader {
 public:
  Reader(const Plan& plan, const MeasureContext& context) : plan_(plan), context_(context), units_(plan.units.size()) {}

  /// Results aligned with Plan::units. False entries of readable(): the file gave no more bytes.
  void run() {
    const int threads = std::max(1, context_.threads);
    fill(&next_);
    std::barrier gate(threads);
    const ReadGuard guard;
    const auto work = [&](bool leads) {
      std::vector<double> scratch(static_cast<std::size_t>(ValueScan::scratch_length()));
      for (;;) {
        if (leads) turn();
        gate.arrive_and_wait();
        if (batch_.pieces.empty()) return;
        if (leads) fill(&next_);  // asks for its pages while the others scan
        for (std::size_t i; (i = taken_.fetch_add(1)) < batch_.pieces.size();) scan(guard, i, scratch.data());
        gate.arrive_and_wait();
        if (leads) close();
      }
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back(work, false);
    work(true);
    for (std::thread& t : helpers) t.join();
  }

  const kernels::ScanResult& result(std::size_t unit) const { return units_[unit]; }
  const std::vector<const TensorView*>& unreadable() const { return unreadable_; }

 private:
  const ValueScan& scan_of(const Piece& p) const { return plan_.scans[plan_.units[p.unit].tensor]; }

  /// The next pieces in the order of the files, and the system told that they are coming.
  void fill(Batch* batch) {
    batch->pieces.clear();
    for (std::int64_t bytes = 0; bytes < kBatch && unit_ < plan_.units.size();) {
      const Unit& u = plan_.units[unit_];
      if (at_ == u.elements) {
        ++unit_;
        at_ = 0;
        continue;
      }
      const Piece piece = {unit_, u.first + at_, std::min(plan_.scans[u.tensor].piece_length(), u.elements - at_)};
      const auto span = scan_of(piece).bytes(piece.first, piece.count);
      read_ahead(span);
      bytes += static_cast<std::int64_t>(span.size());
      at_ += piece.count;
      batch->pieces.push_back(piece);
    }
    batch->results.assign(batch->pieces.size(), {});
    batch->unreadable.assign(batch->pieces.size(), 0);
  }

  void turn() {
    std::swap(batch_, next_);
    taken_ = 0;
  }

  void scan(const ReadGuard& guard, std::size_t i, double* scratch) {
    const Piece& p = batch_.pieces[i];
    const ValueScan& values = scan_of(p);
    batch_.unreadable[i] = !guard.guarded([&] { batch_.results[i] = values.piece(p.first, p.count, scratch); });
  }

  void close() {
    for (std::size_t i = 0; i < batch_.pieces.size(); ++i) {
      const Piece& p = batch_.pieces[i];
      const Unit& u = plan_.units[p.unit];
      const ValueScan& values = plan_.scans[u.tensor];
      const auto bytes = values.bytes(p.first, p.count);
      kernels::append(batch_.results[i], &units_[p.unit]);
      const TensorView* tensor = &context_.model[u.tensor];
      if (batch_.unreadable[i] && (unreadable_.empty() || unreadable_.back() != tensor)) unreadable_.push_back(tensor);
      advise(bytes, MADV_DONTNEED);  // unmapped, not thrown out of the page cache
      if (p.first + p.count == u.first + u.elements) {
        for (const TensorView* side : values.values().side()) advise(side->bytes, MADV_DONTNEED);
      }
      done_ += static_cast<std::int64_t>(bytes.size());
    }
    report();
  }

  void report() {
    using Clock = std::chrono::steady_clock;
    if (!context_.progress) return;
    const auto now = Clock::now();
    if (now - reported_ < std::chrono::milliseconds(100) && done_ < plan_.bytes) return;
    reported_ = now;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const double rate = static_cast<double>(done_) / std::max(seconds, 1e-3);
    char stage[96];
    std::snprintf(stage, sizeof stage, "weight scan, %.1f GB/s, %.0f s left", rate / 1e9,
                  static_cast<double>(plan_.bytes - done_) / rate);
    context_.progress(stage, static_cast<double>(done_) / static_cast<double>(std::max<std::int64_t>(plan_.bytes, 1)));
  }

  const Plan& plan_;
  const MeasureContext& context_;
  std::vector<kernels::ScanResult> units_;
  std::vector<const TensorView*> unreadable_;
  Batch batch_, next_;
  std::atomic<std::size_t> taken_{0};
  std::size_t unit_ = 0;  // where fill() goes on
  std::int64_t at_ = 0;
  std::int64_t done_ = 0;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point reported_ = start_;
};

// ---- the table -----------------------------------------------------------------------------------------------------

WeightScan make_table(const MeasureContext& context, const Plan& plan, const Reader& reader) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::unordered_set<const TensorView*> unreadable(reader.unreadable().begin(), reader.unreadable().end());
  WeightScan out;
  for (std::size_t i = 0; i < plan.units.size(); ++i) {
    const Unit& u = plan.units[i];
    const TensorView& t = context.model[u.tensor];
    if (unreadable.count(&t)) continue;
    const ValueScan& scan = plan.scans[u.tensor];
    const kernels::ScanResult& r = reader.result(i);
    const bool opaque = scan.values().kind() == StoredValues::Kind::kOpaque;
    out.tensor.emplace_back(t.name);
    out.file.push_back(context.model.files()[static_cast<std::size_t>(t.file)]);
    out.dtype.push_back(t.dtype);
    out.part.push_back(plan.parts[u.tensor].part);
    out.layer.push_back(plan.parts[u.tensor].layer);
    out.expert.push_back(u.expert);
    out.projection.push_back(pattern_of(plain_name(scan, t.name)).text);
    out.first.push_back(u.first);
    out.elements.push_back(u.elements);
    out.columns.push_back(scan.values().columns());
    out.non_finite.push_back(r.non_finite);
    out.first_index.push_back(r.first_non_finite < 0 ? -1 : u.first + r.first_non_finite);
    out.zeros.push_back(r.zeros);
    out.min.push_back(r.min);
    out.max.push_back(r.max);
    out.sum.push_back(opaque ? nan : r.sum);
    out.sum_of_squares.push_back(opaque ? nan : r.sum_of_squares);
    out.hash.push_back(hash_text(r.hash));
  }
  return out;
}

std::string size_text(std::int64_t bytes) {
  char text[32];
  const bool large = bytes >= 1'000'000'000;
  std::snprintf(text, sizeof text, large ? "%.1f GB" : "%.1f MB", static_cast<double>(bytes) / (large ? 1e9 : 1e6));
  return text;
}

/// "; not decoded: 4 tensors, the first X.qweight (I32)", and so on.
std::string remarks(const MeasureContext& context, const Plan& plan, const Reader& reader) {
  std::map<std::string_view, std::size_t> schemes;
  std::size_t opaque = 0;
  const TensorView* first = nullptr;
  std::size_t last = plan.scans.size();
  for (const Unit& u : plan.units) {
    if (u.tensor == last) continue;  // another slice of it
    last = u.tensor;
    const StoredValues& v = plan.scans[u.tensor].values();
    if (v.kind() == StoredValues::Kind::kCoded) ++schemes[v.scheme()];
    if (v.kind() == StoredValues::Kind::kOpaque && opaque++ == 0) first = &context.model[u.tensor];
  }
  std::string text;
  for (const auto& [scheme, n] : schemes)
    text += ", " + std::to_string(n) + " of them " + std::string(scheme) + " with scales";
  if (first) {
    text += "; hashed only, since their values cannot be decoded: " + std::to_string(opaque) + ", the first " +
            std::string(first->name) + " (" + std::string(first->dtype_text) + ")";
  }
  if (!reader.unreadable().empty()) {
    text += "; could not be read: " + std::to_string(reader.unreadable().size()) + ", the first " +
            std::string(reader.unreadable().front()->name);
  }
  return text;
}

/// A tensor whose bytes went away is a fault of its file (CK000).
void report_unreadable(MeasureContext& context, const Reader& reader, const Source& source) {
  if (reader.unreadable().empty()) return;
  FactSheet& f = context.facts;
  std::vector<WeightProblem> problems =
      f.weight_problems.known() ? f.weight_problems.value() : std::vector<WeightProblem>();
  for (const TensorView* t : reader.unreadable()) {
    problems.push_back(
        {context.model.files()[static_cast<std::size_t>(t->file)], t->offset, std::string(t->name),
         "its values cannot be read: the file became shorter while it was open, or its disk gives an error"});
  }
  f.weight_problems.set(std::move(problems), Origin::kMeasured, source);
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (context.model.empty()) {
    f.weight_scan.explain_unknown("no weights of the model are among the inputs");
    return;
  }
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < context.model.size(); ++i)
    bytes += static_cast<std::int64_t>(context.model[i].bytes.size());
  if (!context.full && (!context.replays || bytes > kUnaskedScan)) {
    f.weight_scan.explain_unknown(context.replays ? "the files hold " + size_text(bytes) +
                                                        ", and an audit without --full reads the values of at most " +
                                                        size_text(kUnaskedScan)
                                                  : "the values were not read; --full reads them all");
    return;
  }
  const Plan plan = make_plan(context);
  Reader reader(plan, context);
  reader.run();
  Source source;
  source.role = Role::kModelWeights;
  source.file = context.model.files().front();
  report_unreadable(context, reader, source);
  context.records.push_back({"weight_scan", std::string("host ") + kernels::host_backend(),
                             std::to_string(plan.units.size()) + " tensors and experts of stacks, " + size_text(bytes) +
                                 (context.full ? "" : " (up to " + size_text(kUnaskedScan) + " without --full)") +
                                 remarks(context, plan, reader)});
  f.weight_scan.set(make_table(context, plan, reader), Origin::kMeasured, source);
}

}  // namespace

extern const Measure measure_weight_scan;
const Measure measure_weight_scan = {.name = "weight_scan", .supplies = kSupplies, .wants = kWants, .run = run};

}  // namespace moeaudit

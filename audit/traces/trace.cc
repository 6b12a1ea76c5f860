// The order of records, and looking things up.
#include "audit/traces/trace.h"

#include <algorithm>
#include <tuple>

namespace moeaudit {
namespace {

auto key_of(const MicroBatchRecord& r) { return std::tuple(r.step, r.micro_batch, r.rank); }
auto key_of(const StepRecord& r) { return std::tuple(r.step, std::int64_t{0}, r.rank); }

/// Sorts the records, keeps the last of those with one key, and counts how many were dropped.
template <class Record>
std::int64_t put_in_order(std::vector<Record>* records) {
  std::stable_sort(records->begin(), records->end(),
                   [](const Record& a, const Record& b) { return key_of(a) < key_of(b); });
  std::size_t kept = 0;
  for (std::size_t i = 0; i < records->size(); ++i) {
    if (kept > 0 && key_of((*records)[kept - 1]) == key_of((*records)[i])) --kept;
    if (kept != i) (*records)[kept] = std::move((*records)[i]);
    ++kept;
  }
  const std::size_t dropped = records->size() - kept;
  records->resize(kept);
  return static_cast<std::int64_t>(dropped);
}

template <class Layers>
auto find_layer(const Layers& layers, int number) -> decltype(layers.data()) {
  const auto it = std::lower_bound(layers.begin(), layers.end(), number,
                                   [](const auto& layer, int wanted) { return layer.layer < wanted; });
  return it != layers.end() && it->layer == number ? &*it : nullptr;
}

}  // namespace

const TraceLayer* TraceFacts::layer(int number) const { return find_layer(layers, number); }
const LayerTensors* MicroBatch::layer(int number) const { return find_layer(layers, number); }
const StepLayerTensors* StepTensors::layer(int number) const { return find_layer(layers, number); }

std::optional<double> StepRecord::find(std::string_view name) const {
  for (const auto& [key, value] : reported) {
    if (key == name) return value;
  }
  return std::nullopt;
}

Trace::Trace(TraceFacts facts, std::vector<MicroBatchRecord> micro_batches, std::vector<StepRecord> steps,
             std::unique_ptr<Source> source, std::vector<InputProblem>* problems)
    : facts_(std::move(facts)),
      micro_batches_(std::move(micro_batches)),
      step_records_(std::move(steps)),
      source_(std::move(source)) {
  const std::int64_t twice = put_in_order(&micro_batches_) + put_in_order(&step_records_);
  if (twice > 0) {
    problems->push_back({facts_.head, 0, 0,
                         std::to_string(twice) + " records of a step, micro-batch and rank that were recorded again "
                                                 "later; the last one counts",
                         "record a resumed run into a folder of its own", false});
  }
  std::size_t m = 0, s = 0;
  while (m < micro_batches_.size() || s < step_records_.size()) {
    TraceStep step;
    step.step = m == micro_batches_.size()  ? step_records_[s].step
                : s == step_records_.size() ? micro_batches_[m].step
                                            : std::min(micro_batches_[m].step, step_records_[s].step);
    step.first_micro_batch = m;
    step.first_rank = s;
    while (m < micro_batches_.size() && micro_batches_[m].step == step.step) ++m;
    while (s < step_records_.size() && step_records_[s].step == step.step) ++s;
    step.micro_batches = m - step.first_micro_batch;
    step.ranks = s - step.first_rank;
    steps_.push_back(step);
  }
}

MicroBatch Trace::open(const MicroBatchRecord& record, std::vector<WeightProblem>* problems) const {
  MicroBatch out;
  out.record = &record;
  source_->open(record, &out, problems);
  return out;
}

StepTensors Trace::open(const StepRecord& record, std::vector<WeightProblem>* problems) const {
  StepTensors out;
  out.record = &record;
  source_->open(record, &out, problems);
  return out;
}

}  // namespace moeaudit

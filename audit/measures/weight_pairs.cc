#include "audit/measures/weight_pairs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_map>

#include "audit/measures/router_inputs.h"
#include "kernels/host/router.h"

namespace moeaudit {
namespace {

namespace k = kernels;

constexpr std::int64_t kBlock = std::int64_t{1} << 17;       // elements compared at a time
constexpr std::int64_t kWidest = std::int64_t{1} << 22;      // columns of a strided matrix: bounds the memory of a block

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}
bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// "model.layers.3.mlp.experts.5.w1" -> "model.layers.#.mlp.experts.#.w1" and {3, 5}; also "expert_5" -> "expert_#". A number
/// too long to be an index stays in the name.
std::string numbers_out(std::string_view name, std::vector<int>* numbers) {
  std::string out;
  for (std::size_t i = 0; i < name.size();) {
    const bool begins = i > 0 && (name[i - 1] == '.' || ends_with(name.substr(0, i), "expert_"));
    std::size_t end = i;
    int value = 0;
    while (end < name.size() && is_digit(name[end]) && end - i < 7) value = 10 * value + (name[end++] - '0');
    if (begins && end > i && (end == name.size() || name[end] == '.')) {
      numbers->push_back(value);
      out += '#';
      i = end;
    } else {
      out += name[i++];
    }
  }
  return out;
}

/// The n-th '#' becomes first + n.
std::string numbers_in(std::string_view pattern, int first) {
  std::string out;
  for (char c : pattern) c == '#' ? out += std::to_string(first++) : out += c;
  return out;
}

/// "w1" of "...experts.5.w1.weight" and "gate_up_proj" of "...experts.gate_up_proj"; `suffix` gets ".weight", ".bias" or "".
std::string leaf_of(std::string_view name, std::string* suffix) {
  suffix->clear();
  for (std::string_view end : {".weight", ".bias"}) {
    if (!ends_with(name, end)) continue;
    *suffix = end == ".bias" ? ".bias" : "";
    name.remove_suffix(end.size());
    break;
  }
  return std::string(name.substr(name.rfind('.') + 1));
}

/// gate, up, down; "" for other leaves.
std::string_view role_of(std::string_view leaf) {
  if (leaf == "gate_proj" || leaf == "w1") return "gate";
  if (leaf == "up_proj" || leaf == "w3") return "up";
  if (leaf == "down_proj" || leaf == "w2") return "down";
  return {};
}

std::string_view behind_layer(std::string_view pattern) {
  const std::size_t at = pattern.find("{L}");
  return at == std::string_view::npos ? std::string_view{} : pattern.substr(at + 3);
}

std::string_view in_front(std::string_view pattern) { return pattern.substr(0, pattern.find("{L}")); }

bool has(const Family& family, FamilyTensor::Where where, std::string_view name) {
  return std::any_of(family.tensors.begin(), family.tensors.end(), [&](const FamilyTensor& t) { return t.where == where && t.name == name; });
}

Matrix whole(const TensorView& t) {
  Matrix m;
  m.tensor = &t;
  m.rows = t.shape.size() < 2 ? 1 : t.shape[0];
  m.columns = m.rows > 0 ? t.elements() / m.rows : 0;
  m.row_stride = m.columns;
  return m;
}

std::string shape_text(const Matrix& m) { return std::to_string(m.rows) + "x" + std::to_string(m.columns); }

/// A stretch of one pair: rows where either side is strided, else elements of the flat matrix.
struct Stretch {
  std::size_t pair;
  bool flat;
  std::int64_t first, count;
};

bool comparable(const WeightPair& p) {
  const Matrix &b = p.base.matrix, &t = p.trained.matrix;
  return size_of(b.tensor->dtype) > 0 && size_of(t.tensor->dtype) > 0 && (b.contiguous() || b.columns <= kWidest) &&
         (t.contiguous() || t.columns <= kWidest);
}

void add_stretches(const WeightPair& p, std::size_t index, std::vector<Stretch>* out) {
  const Matrix& m = p.trained.matrix;
  const bool flat = m.contiguous() && p.base.matrix.contiguous();
  const std::int64_t total = flat ? m.elements() : m.rows;
  const std::int64_t step = flat ? kBlock : std::max<std::int64_t>(1, kBlock / std::max<std::int64_t>(1, m.columns));
  for (std::int64_t at = 0; at < total; at += step) out->push_back({index, flat, at, std::min(step, total - at)});
}

bool read_stretch(const Matrix& m, const Stretch& s, std::vector<double>* out) {
  const std::int64_t n = s.flat ? s.count : s.count * m.columns;
  out->resize(static_cast<std::size_t>(n));
  return s.flat ? decode(*m.tensor, m.first + s.first, n, out->data()) : read_rows(m, s.first, s.count, out->data());
}

PairSums compare_values(const double* w0, const double* w1, std::size_t n, bool values) {
  PairSums sums;
  double base[4] = {}, change[4] = {}, dot[4] = {};
  for (std::size_t i = 0; i < n; ++i) {
    const double a = w0[i], b = w1[i];
    sums.changed += !(a == b || (a != a && b != b));
    if (!values || !std::isfinite(a) || !std::isfinite(b)) continue;
    const double d = b - a;
    base[i & 3] += a * a;
    change[i & 3] += d * d;
    dot[i & 3] += d * a;
  }
  sums.base_squares = (base[0] + base[1]) + (base[2] + base[3]);
  sums.change_squares = (change[0] + change[1]) + (change[2] + change[3]);
  sums.dot = (dot[0] + dot[1]) + (dot[2] + dot[3]);
  return sums;
}

PairSums compare_stretch(const WeightPair& p, const Stretch& s, std::optional<k::Float> through, std::vector<double>* w0, std::vector<double>* w1) {
  const DType from = p.base.matrix.tensor->dtype, to = p.trained.matrix.tensor->dtype;
  if (!read_stretch(p.base.matrix, s, w0) || !read_stretch(p.trained.matrix, s, w1)) {
    PairSums none;
    none.read = false;
    return none;
  }
  if (const auto f = through ? through : rounding(from, to)) k::round_values(w0->data(), static_cast<std::int64_t>(w0->size()), *f, w0->data());
  return compare_values(w0->data(), w1->data(), w0->size(), is_plain_float(from) && is_plain_float(to));
}

}  // namespace

bool is_plain_float(DType d) { return d == DType::kF64 || d == DType::kF32 || d == DType::kBF16 || d == DType::kF16; }

std::optional<k::Float> rounding(DType base, DType trained) {
  if (base == trained || !is_plain_float(base)) return std::nullopt;
  switch (trained) {
    case DType::kBF16: return k::Float::kBF16;
    case DType::kF16: return k::Float::kF16;
    case DType::kF32: return base == DType::kF64 ? std::optional(k::Float::kF32) : std::nullopt;
    default: return std::nullopt;
  }
}

bool read_rows(const Matrix& m, std::int64_t row, std::int64_t count, double* out) {
  if (m.contiguous()) return decode(*m.tensor, m.first + row * m.columns, count * m.columns, out);
  bool ok = true;
  if (m.column_stride == 1) {
    for (std::int64_t r = 0; r < count; ++r) ok = ok && decode(*m.tensor, m.first + (row + r) * m.row_stride, m.columns, out + r * m.columns);
    return ok;
  }
  std::vector<double> column(static_cast<std::size_t>(count));  // rows are neighbours: a transposed stack
  for (std::int64_t c = 0; c < m.columns && ok; ++c) {
    for (std::int64_t r = 0; r < count && ok; r += m.row_stride == 1 ? count : 1) {
      ok = decode(*m.tensor, m.first + (row + r) * m.row_stride + c * m.column_stride, m.row_stride == 1 ? count : 1, column.data() + r);
    }
    for (std::int64_t r = 0; r < count; ++r) out[r * m.columns + c] = column[static_cast<std::size_t>(r)];
  }
  return ok;
}

// ---- names ---------------------------------------------------------------------------------------------------------

UnitNames::UnitNames(const Family* family, std::int64_t experts) : family_(family), experts_(experts) {
  if (!family) return;
  second_set_ = has_second_set(*family);
  bool apart = false, stacked = false;
  for (const FamilyTensor& t : family->tensors) {
    if (t.part == Part::kRoutedExpert) {
      const bool one = t.name.find("{e}") != std::string_view::npos;
      apart |= one && t.where == FamilyTensor::Where::kHub;
      if (one) continue;
      if (t.where == FamilyTensor::Where::kMemory) {
        stacked = true;
        // [E, in, out] where the experts' own tensors are [out, in].
        std::string suffix;
        const std::string leaf = leaf_of(t.name, &suffix);
        if (t.shape == "E,H,2*I" || (leaf == "down_proj" && t.shape == "E,I,H")) input_major_.push_back(leaf);
      }
    }
    if (t.where != FamilyTensor::Where::kHub || behind_layer(t.name).empty() || has(*family, FamilyTensor::Where::kMemory, t.name)) continue;
    const auto same = std::find_if(family->tensors.begin(), family->tensors.end(), [&](const FamilyTensor& m) {
      return m.where == FamilyTensor::Where::kMemory && behind_layer(m.name) == behind_layer(t.name);
    });
    if (same != family->tensors.end()) {  // model.layers.3. -> model.language_model.layers.3.
      const std::pair<std::string, std::string> front(in_front(t.name), in_front(same->name));
      if (std::find(fronts_.begin(), fronts_.end(), front) == fronts_.end()) fronts_.push_back(front);
      continue;
    }
    for (const FamilyTensor& m : family->tensors) {  // block_sparse_moe.gate -> mlp.gate, input_linear -> experts.gate_up_proj
      if (m.where != FamilyTensor::Where::kMemory || m.part != t.part || m.shape != t.shape || m.layers != t.layers) continue;
      if (has(*family, FamilyTensor::Where::kHub, m.name)) continue;
      const std::string_view hub = behind_layer(t.name), memory = behind_layer(m.name);
      const bool same_leaf = hub.substr(hub.rfind('.')) == memory.substr(std::min(memory.rfind('.'), memory.size()));
      if (memory.empty() || (t.part != Part::kRoutedExpert && !same_leaf)) continue;  // of stacks the leaf is the parameter
      renamed_.emplace_back(hub, memory);
      break;
    }
  }
  two_layouts_ = apart && stacked;
}

NamedPart UnitNames::part_of(std::string_view tensor) const {
  std::vector<int> numbers;
  const std::string pattern = numbers_out(tensor, &numbers);
  auto at = std::lower_bound(places_.begin(), places_.end(), pattern, [](const auto& a, const std::string& b) { return a.first < b; });
  if (at == places_.end() || at->first != pattern) {
    // Numbers that name themselves tell which of them is the layer and which the expert.
    constexpr int kFirst = 1'000'000;
    Place place;
    place.part = classify(family_, numbers_in(pattern, kFirst));
    place.layer_at = place.part.layer >= kFirst ? place.part.layer - kFirst : -1;
    place.expert_at = place.part.expert >= kFirst ? place.part.expert - kFirst : -1;
    at = places_.insert(at, {pattern, place});
  }
  NamedPart part = at->second.part;
  const int n = static_cast<int>(numbers.size());
  part.layer = at->second.layer_at >= 0 && at->second.layer_at < n ? numbers[at->second.layer_at] : -1;
  part.expert = at->second.expert_at >= 0 && at->second.expert_at < n ? numbers[at->second.expert_at] : -1;
  if (second_set_ && experts_ > 0 && part.expert >= experts_) part.part = Part::kOther;
  return part;
}

std::string UnitNames::in_memory(std::string_view name) const {
  const auto front = std::find_if(fronts_.begin(), fronts_.end(), [&](const auto& f) { return name.starts_with(f.first); });
  const std::string own = front == fronts_.end() ? std::string(name) : front->second + std::string(name.substr(front->first.size()));
  for (const auto& [hub, memory] : renamed_) {
    if (ends_with(own, hub)) return own.substr(0, own.size() - hub.size()) + memory;
  }
  return own;
}

std::string UnitNames::expert_key(const NamedPart& part, std::string_view role) const {
  return "layer " + std::to_string(part.layer) + " expert " + std::to_string(part.expert) + " " + std::string(role);
}

std::string UnitNames::key_of(std::string_view tensor) const {
  const NamedPart part = part_of(tensor);
  if (two_layouts_ && (part.part == Part::kRoutedExpert || second_set_) && part.expert >= 0) {
    std::string suffix;
    const std::string leaf = leaf_of(tensor, &suffix);
    if (const std::string_view role = role_of(leaf); !role.empty()) return expert_key(part, std::string(role) + suffix);
  }
  return in_memory(tensor);
}

std::vector<std::string> UnitNames::stack_keys(std::string_view parameter, int expert) const {
  NamedPart part = part_of(parameter);
  part.expert = expert + static_cast<int>(second_set_ && part.part == Part::kOther ? experts_ : 0);
  std::string suffix;
  const std::string leaf = leaf_of(parameter, &suffix);
  if (two_layouts_ && leaf == "gate_up_proj") return {expert_key(part, "gate" + suffix), expert_key(part, "up" + suffix)};
  if (two_layouts_ && !role_of(leaf).empty()) return {expert_key(part, std::string(role_of(leaf)) + suffix)};
  return {in_memory(parameter) + "/" + std::to_string(expert)};
}

bool UnitNames::either_way_round(std::string_view stack) const {
  if (!family_) return false;
  const auto rows = [&](FamilyTensor::Where where) {
    return std::find_if(family_->tensors.begin(), family_->tensors.end(),
                        [&](const FamilyTensor& t) { return t.where == where && match_pattern(t.name, stack); });
  };
  const auto hub = rows(FamilyTensor::Where::kHub), memory = rows(FamilyTensor::Where::kMemory);
  return hub != family_->tensors.end() && memory != family_->tensors.end() && hub->part == Part::kRoutedExpert && hub->shape != memory->shape;
}

bool UnitNames::cut(const TensorView& t, std::vector<WeightUnit>* out) const {
  const NamedPart part = part_of(t.name);
  const auto& s = t.shape;
  const bool stack = part.part == Part::kRoutedExpert && part.expert < 0 && s.size() >= 2 && s[0] > 0 &&
                     (s.size() >= 3 || s[0] == experts_);
  if (!stack) {
    out->push_back({key_of(t.name), part, whole(t)});
    return !t.shape.empty();
  }
  const std::int64_t slice = t.elements() / s[0];
  std::string suffix;
  const bool transposed = two_layouts_ && s.size() == 3 &&
                          std::find(input_major_.begin(), input_major_.end(), leaf_of(t.name, &suffix)) != input_major_.end();
  for (std::int64_t e = 0; e < s[0]; ++e) {
    WeightUnit unit;
    unit.part = part;
    unit.part.expert = static_cast<int>(e);
    const std::vector<std::string> keys = stack_keys(t.name, static_cast<int>(e));
    Matrix m;
    m.tensor = &t;
    m.first = e * slice;
    m.rows = s.size() >= 3 ? s[1] : 1;
    m.columns = m.rows > 0 ? slice / m.rows : 0;
    m.row_stride = m.columns;
    if (transposed) {
      std::swap(m.rows, m.columns);
      std::swap(m.row_stride, m.column_stride);
    }
    if (m.rows % static_cast<std::int64_t>(keys.size()) != 0) {
      unit.key = std::string(t.name) + "/" + std::to_string(e);
      unit.matrix = m;
      out->push_back(std::move(unit));
      continue;
    }
    m.rows /= static_cast<std::int64_t>(keys.size());
    for (const std::string& key : keys) {
      unit.key = key;
      unit.matrix = m;
      out->push_back(unit);
      m.first += m.rows * m.row_stride;
    }
  }
  return true;
}

// ---- pairs ---------------------------------------------------------------------------------------------------------

WeightPairs pair_weights(const TensorStore& base, const TensorStore& trained, const UnitNames& names) {
  std::vector<WeightUnit> from, to;
  for (std::size_t i = 0; i < base.size(); ++i) names.cut(base[i], &from);
  for (std::size_t i = 0; i < trained.size(); ++i) names.cut(trained[i], &to);
  std::unordered_map<std::string_view, std::size_t> by_key;
  for (std::size_t i = 0; i < from.size(); ++i) by_key.emplace(from[i].key, i);
  WeightPairs out;
  std::vector<char> met(from.size());
  auto once = [](std::vector<std::string>* list, std::string name) {
    if (list->empty() || list->back() != name) list->push_back(std::move(name));
  };
  for (WeightUnit& unit : to) {
    const auto found = by_key.find(unit.key);
    if (found == by_key.end()) {
      once(&out.only_trained, std::string(unit.matrix.tensor->name));
      continue;
    }
    met[found->second] = 1;
    WeightUnit& b = from[found->second];
    const bool turned = b.matrix.rows == unit.matrix.columns && b.matrix.columns == unit.matrix.rows && b.matrix.rows != b.matrix.columns;
    if (turned && unit.part.part == Part::kRoutedExpert && names.either_way_round(unit.matrix.tensor->name)) {
      std::swap(b.matrix.rows, b.matrix.columns);
      std::swap(b.matrix.row_stride, b.matrix.column_stride);
    }
    if (b.matrix.rows != unit.matrix.rows || b.matrix.columns != unit.matrix.columns) {
      once(&out.other_shape, std::string(unit.matrix.tensor->name) + " (" + shape_text(b.matrix) + " in the base, " + shape_text(unit.matrix) + " here)");
      continue;
    }
    out.pairs.push_back({b, std::move(unit)});
  }
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (!met[i]) once(&out.only_base, std::string(from[i].matrix.tensor->name));
  }
  return out;
}

void PairSums::add(const PairSums& o) {
  changed += o.changed;
  base_squares += o.base_squares;
  change_squares += o.change_squares;
  dot += o.dot;
  read = read && o.read;
}

std::vector<PairSums> compare(const std::vector<const WeightPair*>& pairs, int threads, const std::function<void(double)>& progress,
                              std::optional<k::Float> through) {
  std::vector<PairSums> out(pairs.size());
  std::vector<Stretch> stretches;
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    if (comparable(*pairs[i])) {
      add_stretches(*pairs[i], i, &stretches);
    } else {  // packed 4- and 6-bit types: bytes or nothing
      const TensorView &b = *pairs[i]->base.matrix.tensor, &t = *pairs[i]->trained.matrix.tensor;
      const bool same = b.bytes.size() == t.bytes.size() && std::memcmp(b.bytes.data(), t.bytes.data(), b.bytes.size()) == 0;
      out[i].read = same;
    }
  }
  std::vector<PairSums> sums(stretches.size());
  const int workers = std::max(1, threads);
  std::vector<std::vector<double>> w0(static_cast<std::size_t>(workers)), w1(static_cast<std::size_t>(workers));
  parallel_for(workers, static_cast<std::int64_t>(stretches.size()), [&](std::int64_t i, int worker) {
    const Stretch& s = stretches[static_cast<std::size_t>(i)];
    sums[static_cast<std::size_t>(i)] = compare_stretch(*pairs[s.pair], s, through, &w0[static_cast<std::size_t>(worker)], &w1[static_cast<std::size_t>(worker)]);
    if (worker == 0 && progress) progress(static_cast<double>(i + 1) / static_cast<double>(stretches.size()));
  });
  for (std::size_t i = 0; i < stretches.size(); ++i) out[stretches[i].pair].add(sums[i]);  // in order
  return out;
}

}  // namespace moeaudit

// A counting sort by hash, then a sort inside each bucket (one or two names, unless somebody chose them to collide).
#include "audit/tensors/name_index.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace moeaudit {
namespace {

/// Multiply and fold, eight bytes at a time. Only the spread matters: nothing depends on its value.
std::uint64_t hash_of(std::string_view text) {
  constexpr std::uint64_t kMultiplier = 0x9E3779B97F4A7C15u;
  std::uint64_t h = text.size() * kMultiplier;
  const auto mix = [&h](std::uint64_t word) {
    const unsigned __int128 product = static_cast<unsigned __int128>(h ^ word) * kMultiplier;
    h = static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
  };
  std::size_t i = 0;
  std::uint64_t word;
  for (; i + sizeof word <= text.size(); i += sizeof word) {
    std::memcpy(&word, text.data() + i, sizeof word);
    mix(word);
  }
  word = 0;
  std::memcpy(&word, text.data() + i, text.size() - i);
  mix(word);
  return h * kMultiplier;
}

}  // namespace

bool NameIndex::less(const Slot& a, const Slot& b) const {
  if (a.tag != b.tag) return a.tag < b.tag;
  const int order = names_[a.position].compare(names_[b.position]);
  return order < 0 || (order == 0 && a.position < b.position);
}

void NameIndex::build(std::vector<std::string_view> names) {
  names_ = std::move(names);
  const int log_buckets = std::max(1, static_cast<int>(std::bit_width(names_.size())));
  shift_ = 64 - log_buckets;  // the bucket is the upper end of the hash, the tag the lower
  starts_.assign((std::size_t{1} << log_buckets) + 1, 0);
  slots_.resize(names_.size());
  std::vector<std::uint64_t> hashes(names_.size());
  for (std::size_t i = 0; i < names_.size(); ++i) {
    hashes[i] = hash_of(names_[i]);
    ++starts_[(hashes[i] >> shift_) + 1];
  }
  for (std::size_t b = 1; b < starts_.size(); ++b) starts_[b] += starts_[b - 1];
  std::vector<std::uint32_t> next(starts_.begin(), starts_.end() - 1);
  for (std::size_t i = 0; i < names_.size(); ++i) {
    slots_[next[hashes[i] >> shift_]++] = {static_cast<std::uint32_t>(hashes[i]), static_cast<std::uint32_t>(i)};
  }
  for (std::size_t b = 0; b + 1 < starts_.size(); ++b) {
    if (starts_[b + 1] - starts_[b] < 2) continue;
    std::sort(slots_.begin() + starts_[b], slots_.begin() + starts_[b + 1],
              [this](const Slot& x, const Slot& y) { return less(x, y); });
  }
}

std::int64_t NameIndex::find(std::string_view name) const {
  if (names_.empty()) return -1;
  const std::uint64_t hash = hash_of(name);
  const std::uint32_t tag = static_cast<std::uint32_t>(hash);
  const std::size_t bucket = hash >> shift_;
  const auto begin = slots_.begin() + starts_[bucket], end = slots_.begin() + starts_[bucket + 1];
  const auto after = std::upper_bound(begin, end, name, [&](std::string_view n, const Slot& slot) {
    return tag != slot.tag ? tag < slot.tag : n < names_[slot.position];
  });
  if (after == begin) return -1;
  const Slot& last = *(after - 1);
  return last.tag == tag && names_[last.position] == name ? static_cast<std::int64_t>(last.position) : -1;
}

std::vector<std::pair<std::size_t, std::size_t>> NameIndex::duplicates() const {
  std::vector<std::pair<std::size_t, std::size_t>> pairs;
  for (std::size_t i = 1; i < slots_.size(); ++i) {  // equal names are neighbours in one bucket, by position
    const Slot &a = slots_[i - 1], &b = slots_[i];
    if (a.tag == b.tag && names_[a.position] == names_[b.position]) pairs.emplace_back(a.position, b.position);
  }
  std::sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return pairs;
}

}  // namespace moeaudit

// Finds one name among many thousands. Buckets by hash, each sorted by name: no choice of names makes it quadratic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace moeaudit {

class NameIndex {
 public:
  /// What the views point to must outlive the index; the span itself need not.
  void build(std::vector<std::string_view> names);
  /// Position of the name, of the last one among equal names; -1 if absent.
  std::int64_t find(std::string_view name) const;
  /// (earlier, later) for each name that comes again, by later.
  std::vector<std::pair<std::size_t, std::size_t>> duplicates() const;

 private:
  /// `tag` is part of the hash: names are compared only where it is equal.
  struct Slot {
    std::uint32_t tag = 0;
    std::uint32_t position = 0;
  };
  bool less(const Slot& a, const Slot& b) const;

  std::vector<std::string_view> names_;
  std::vector<std::uint32_t> starts_;  // slots of bucket b: starts_[b] up to starts_[b + 1]
  std::vector<Slot> slots_;            // in each bucket by tag, name, position
  int shift_ = 63;
};

}  // namespace moeaudit

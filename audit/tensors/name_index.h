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
  std::size_t bucket_of(std::string_view name) const;

  std::vector<std::string_view> names_;
  std::vector<std::uint32_t> starts_;  // slots of bucket b: starts_[b] up to starts_[b + 1]
  std::vector<std::uint32_t> slots_;   // positions in names_, by name, then position
  int shift_ = 63;
};

}  // namespace moeaudit

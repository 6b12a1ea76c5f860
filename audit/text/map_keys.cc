// Equal keys are found by sorting.
#include "audit/text/map_keys.h"

#include <algorithm>
#include <numeric>

namespace moeaudit {

EqualKeys equal_keys(const std::vector<std::string>& identity) {
  std::vector<std::size_t> order(identity.size());  // sorted, not hashed: no choice of keys makes this slow
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const int c = identity[a].compare(identity[b]);
    return c < 0 || (c == 0 && a < b);
  });
  EqualKeys groups;
  for (std::size_t i = 0; i < order.size();) {
    std::size_t end = i + 1;
    while (end < order.size() && identity[order[end]] == identity[order[i]]) ++end;
    if (end - i > 1)
      groups.emplace_back(order.begin() + static_cast<std::ptrdiff_t>(i),
                          order.begin() + static_cast<std::ptrdiff_t>(end));
    i = end;
  }
  return groups;
}

void merge_equal_keys(const EqualKeys& groups, Node* map) {
  if (groups.empty()) return;
  std::vector<char> drop(map->keys.size());
  for (const std::vector<std::size_t>& group : groups) {
    map->items[group.front()] = std::move(map->items[group.back()]);
    map->key_lines[group.front()] = map->key_lines[group.back()];
    for (std::size_t i = 1; i < group.size(); ++i) drop[group[i]] = 1;
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < drop.size(); ++i) {
    if (drop[i]) continue;
    if (kept != i) {
      map->keys[kept] = std::move(map->keys[i]);
      map->key_lines[kept] = map->key_lines[i];
      map->items[kept] = std::move(map->items[i]);
    }
    ++kept;
  }
  map->keys.resize(kept);
  map->key_lines.resize(kept);
  map->items.resize(kept);
}

}  // namespace moeaudit

#include "audit/traces/expert_map.h"

#include <algorithm>

#include "audit/text/text.h"
#include "audit/traces/formats.h"

namespace moeaudit {
namespace {

constexpr std::int64_t kMostSlots = 1 << 20;  // of a layer

}  // namespace

std::optional<ExpertMap> read_expert_map(const std::string& path, std::int64_t ranks, std::vector<InputProblem>* problems) {
  const auto refuse = [&](int line, int column, std::string what, std::string remedy = "") {
    if (remedy.empty())
      remedy = "give the rank of each expert, [0, 0, 1, 1], one list or one a layer, or EPLB's physical_to_logical_map";
    problems->push_back({path, line, column, std::move(what), std::move(remedy)});
    return std::nullopt;
  };
  std::string text, error;
  Node root;
  TextError where;
  if (!read_file(path, &text, &error, std::size_t{64} << 20)) return refuse(0, 0, error, "make the file readable");
  if (!parse_json(text, &root, nullptr, &where))
    return refuse(where.line, where.column, "JSON error: " + where.what, "repair the file at this place");
  const Node* physical = root.is_map() ? root.find("physical_to_logical_map") : nullptr;
  const Node* list = physical ? physical : root.is_map() ? root.find("expert_to_rank") : &root;
  if (!list || !list->is_list() || list->items.empty())
    return refuse(root.line, root.column, "is no map of experts: neither a list, nor expert_to_rank, nor physical_to_logical_map");
  if (physical && ranks == 0)
    return refuse(physical->line, physical->column, "does not say on how many ranks its slots lie", "say --expert-parallel N");

  ExpertMap map;
  map.path = path;
  std::vector<const Node*> rows;
  if (list->items[0].is_list()) {
    for (const Node& row : list->items) rows.push_back(&row);
  } else {
    rows.push_back(list);
  }
  if (static_cast<std::int64_t>(rows.size()) > kMaxTraceLayers) return refuse(list->line, list->column, "has more layers than are read");
  std::int64_t largest = -1;
  for (const Node* node : rows) {
    ExpertMap::Row row;
    row.line = node->line;
    const auto slots = static_cast<std::int64_t>(node->items.size());
    if (!node->is_list() || slots == 0 || slots > kMostSlots)
      return refuse(node->line, node->column, "holds something beside lists of numbers");
    if (physical && slots % ranks != 0) {
      return refuse(node->line, node->column,
                    "has " + std::to_string(slots) + " slots, which " + std::to_string(ranks) + " ranks cannot hold in equal numbers",
                    "give the --expert-parallel N that the map was made for");
    }
    for (std::int64_t i = 0; i < slots; ++i) {
      const Node& item = node->items[static_cast<std::size_t>(i)];
      const auto value = item.as_int();
      const std::int64_t beyond = physical || ranks == 0 ? kMaxExperts : ranks;
      if (!value || *value < 0 || *value >= beyond) {
        return refuse(item.line, item.column,
                      physical                ? "slot " + std::to_string(i) + " holds no expert id"
                      : value && *value >= 0 && ranks > 0
                          ? "expert " + std::to_string(i) + " is on rank " + std::to_string(*value) + ", the ranks are 0 to " +
                                std::to_string(ranks - 1)
                          : "the rank of expert " + std::to_string(i) + " is no number from 0 on");
      }
      row.expert.push_back(static_cast<std::int32_t>(physical ? *value : i));
      row.rank.push_back(static_cast<std::int32_t>(physical ? i / (slots / ranks) : *value));
      largest = std::max<std::int64_t>(largest, row.rank.back());
    }
    map.rows.push_back(std::move(row));
  }
  map.ranks = ranks > 0 ? ranks : largest + 1;
  for (const ExpertMap::Row& row : map.rows) {
    if (static_cast<std::int64_t>(row.expert.size()) < map.ranks)
      return refuse(row.line, 0, "has fewer experts than the " + std::to_string(map.ranks) + " ranks");
  }
  if (map.ranks < 2) return refuse(list->line, list->column, "has one rank: there is nothing to forecast");
  return map;
}

}  // namespace moeaudit

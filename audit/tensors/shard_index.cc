// Read with the pull parser: an index of 90,000 tensors needs no tree.
#include "audit/tensors/shard_index.h"

#include <algorithm>
#include <filesystem>
#include <map>

#include "audit/text/json_pull.h"

namespace moeaudit {
namespace {

using Token = JsonPull::Token;

bool parse_weight_map(JsonPull* pull, std::vector<std::pair<std::string, std::string>>* map, std::string* wrong) {
  if (pull->next() != Token::kObjectBegin) {
    *wrong = "weight_map is not a JSON object";
    return false;
  }
  for (;;) {
    const Token key = pull->next();
    if (key == Token::kObjectEnd) return true;
    if (key != Token::kKey) return false;
    std::string tensor(pull->text());
    if (pull->next() != Token::kString) {
      *wrong = "weight_map has a value that is not a file name, for " + tensor;
      return false;
    }
    map->emplace_back(std::move(tensor), pull->text());
  }
}

ShardIndex sorted_by_shard(std::vector<std::pair<std::string, std::string>> map) {
  ShardIndex index;
  std::map<std::string, std::size_t> position;
  for (const auto& [tensor, shard] : map) position.emplace(shard, 0);
  for (auto& [shard, i] : position) {
    i = index.shards.size();
    index.shards.push_back(shard);
  }
  index.first_tensor.resize(index.shards.size());
  for (auto& [tensor, shard] : map) {
    const std::size_t i = position.find(shard)->second;
    if (index.first_tensor[i].empty()) index.first_tensor[i] = tensor;
    index.weight_map.emplace_back(std::move(tensor), i);
  }
  return index;
}

}  // namespace

bool parse_shard_index(std::string_view text, ShardIndex* index, std::int64_t* offset, std::string* wrong) {
  JsonPull pull(text, 16);
  std::vector<std::pair<std::string, std::string>> map;
  bool seen = false;
  const auto walk = [&] {
    if (pull.next() != Token::kObjectBegin) return false;
    for (;;) {
      const Token token = pull.next();
      if (token == Token::kObjectEnd) return pull.next() == Token::kEnd;
      if (token != Token::kKey) return false;
      if (pull.text() == "weight_map") {
        seen = true;
        map.clear();
        if (!parse_weight_map(&pull, &map, wrong)) return false;
      } else if (!pull.skip()) {
        return false;
      }
    }
  };
  const bool ok = walk();
  *offset = static_cast<std::int64_t>(pull.offset());
  if (ok && seen) {
    *index = sorted_by_shard(std::move(map));
    return true;
  }
  if (!pull.error().what.empty()) {
    *wrong = "the index is not JSON (line " + std::to_string(pull.error().line) + ", column " +
             std::to_string(pull.error().column) + "): " + pull.error().what;
  } else if (wrong->empty()) {
    *wrong = "the index has no weight_map";
  }
  return false;
}

bool inside_folder(std::string_view shard) {
  if (shard.empty() || shard.find('\0') != std::string_view::npos) return false;
  const std::filesystem::path path(shard);
  return path.is_relative() &&
         std::none_of(path.begin(), path.end(), [](const std::filesystem::path& p) { return p == ".."; });
}

}  // namespace moeaudit

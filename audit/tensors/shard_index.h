// model.safetensors.index.json: which tensor is in which shard.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moeaudit {

/// The index file: which tensor is in which shard.
struct ShardIndex {
  std::vector<std::string> shards;                              // by name
  std::vector<std::pair<std::string, std::size_t>> weight_map;  // tensor -> position in shards, as written
  std::vector<std::string> first_tensor;                        // of each shard, for messages
};

/// False, with what is wrong and the byte where, if the text is not an index. total_size is not compared: nothing that
/// loads a model reads it.
bool parse_shard_index(std::string_view text, ShardIndex* index, std::int64_t* offset, std::string* wrong);

/// Is this shard name a path inside the folder of the index? ("../x" and "/x" are not.)
bool inside_folder(std::string_view shard);

}  // namespace moeaudit

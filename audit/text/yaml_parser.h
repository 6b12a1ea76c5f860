// YAML tokens into a graph of nodes: anchors are resolved, nothing is copied, tags are spelled out.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "audit/text/yaml_scanner.h"

namespace moeaudit {

/// A node as written. Children are positions in YamlGraph::nodes; an alias is the position of its anchor.
struct YamlNode {
  enum class Kind : std::uint8_t { kScalar, kSequence, kMapping };
  Kind kind = Kind::kScalar;
  bool implicit = false;  // scalar whose type its looks decide
  YamlMark mark;
  std::string tag;                    // in full; empty: none stated
  std::string text;                   // scalar
  std::vector<std::size_t> children;  // sequence: items; mapping: key, value, key, value, ...
};

struct YamlGraph {
  std::vector<YamlNode> nodes;
  bool empty = true;  // no document at all
  std::size_t root = 0;
};

/// Parses the one document of a stream; throws YamlFault.
YamlGraph parse_yaml_graph(std::string_view text, const TextLimits& limits);

}  // namespace moeaudit

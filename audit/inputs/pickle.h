// An inert reader of pickles (protocols 2-5), as torch.save writes them inside a zip. It builds plain nodes and imports
// nothing: a global becomes a kGlobal node, a call of it a kObject node with its name and arguments. A call into os,
// subprocess, builtins and their like is refused by name, unless it is on a short list (builtins.set, builtins.getattr,
// copyreg._reconstructor, ...), as are persistent ids, extension codes and opcodes that these protocols do not write.
// An object that contains itself is refused, too.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/text/text.h"

namespace moeaudit {

struct PickleNode {
  enum class Kind : std::uint8_t {
    kNone,
    kBool,
    kInt,
    kFloat,
    kString,
    kBytes,
    kList,
    kTuple,
    kSet,
    kDict,
    kGlobal,
    kObject
  };
  Kind kind = Kind::kNone;
  bool boolean = false;
  std::int64_t integer = 0;  // integers beyond 64 bits are kept as kString in decimal
  double real = 0;
  std::string text;  // string, bytes, or "module.name" of a global or of an object's class
  std::vector<std::shared_ptr<PickleNode>> items;  // list, tuple, set, constructor arguments
  std::vector<std::pair<std::shared_ptr<PickleNode>, std::shared_ptr<PickleNode>>> entries;  // dict, or object state

  /// Value of a string key of a dict or of an object's state; nullptr if absent.
  const PickleNode* find(std::string_view key) const;
};

/// `bytes` is the pickle stream itself. False with what was refused and at which offset. Nodes that the pickle shares
/// are shared; spelled out as a tree they are at most a million, at most 100 deep.
bool read_pickle(std::string_view bytes, std::shared_ptr<PickleNode>* out, std::string* error);

/// Reads `data.pkl` out of a torch zip (stored or, refused by name, compressed), or a bare pickle. The zip is bounded
/// and checked (central directory, sizes, names); nothing else in it is read.
bool read_torch_pickle(const std::string& path, std::shared_ptr<PickleNode>* out, std::string* error);

}  // namespace moeaudit

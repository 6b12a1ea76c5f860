// The pickle machine (Python's pickletools.py documents each opcode) without its power: a stack and a memo of positions
// in an arena of plain cells. Used by pickle.cc only.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/inputs/pickle.h"

namespace moeaudit {

/// Position of a cell in the arena.
using PicklePosition = std::uint32_t;

/// A node under construction: children are positions, so that a stream can build cycles without leaking.
struct PickleCell {
  PickleNode::Kind kind = PickleNode::Kind::kNone;
  bool boolean = false;
  std::int64_t integer = 0;
  double real = 0;
  std::string text;
  std::vector<PicklePosition> items;
  std::vector<std::pair<PicklePosition, PicklePosition>> entries;
};

/// Thrown inside the pickle reader only; read_pickle() catches it.
struct PickleRefused {
  std::string what;
};

class PickleMachine {
 public:
  explicit PickleMachine(std::string_view bytes);

  /// Runs to STOP and returns the position of the result. Throws PickleRefused.
  PicklePosition run();
  std::size_t opcode_at() const { return opcode_at_; }
  std::size_t end() const { return at_; }
  std::vector<PickleCell>* arena() { return &arena_; }

 private:
  using Kind = PickleNode::Kind;
  using Position = PicklePosition;
  using Positions = std::vector<Position>;

  // the stream
  std::uint64_t number(int size);
  std::string_view take(std::uint64_t size);
  std::string_view line();

  // the stack
  PickleCell& push(Kind kind);
  void push_again(Position p);
  void push_int(std::int64_t value) { push(Kind::kInt).integer = value; }
  void push_long(std::uint64_t size);
  void push_float();
  void push_string(std::string_view bytes);
  void push_bytes(std::string_view bytes) { push(Kind::kBytes).text = bytes; }
  void push_items(Kind kind, Positions items);
  Position pop();
  Position top() const;
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  void push_mark();
  Positions pop_to_mark();
  void pop_or_unmark();
  PickleCell& cell_at(Position p, std::initializer_list<Kind> kinds, const char* what);
  void spend(std::size_t places);

  // opcodes, by group; each returns false if the opcode is not its own
  bool scalar(unsigned char opcode);
  bool container(unsigned char opcode);
  bool memo(unsigned char opcode);
  bool object(unsigned char opcode);

  void short_tuple(std::size_t n);
  void add_items(std::initializer_list<Kind> kinds, const char* what, const Positions& values);
  void set_items(Position target, const Positions& pairs);
  void put(std::uint64_t index);
  void get(std::uint64_t index);
  void global(std::string_view module, std::string_view name);
  void stack_global();
  void call(bool reduce);
  void call_with_keywords();
  void build();
  void copy_entries(Position from, Position to);

  std::string_view in_;
  std::size_t at_ = 0, opcode_at_ = 0;
  std::vector<PickleCell> arena_;
  Positions stack_;
  std::vector<std::size_t> marks_;
  std::size_t places_left_;
  std::map<std::uint64_t, Position> memo_;  // a tree: no choice of indices makes it slow
};

}  // namespace moeaudit

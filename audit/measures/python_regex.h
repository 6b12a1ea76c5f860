// Python's `re`, as far as PEFT configurations use it: does a pattern match a module path? std::regex is no help: it recurses
// once per character (a hostile pattern overflows the stack) and its grammar is ECMAScript's, not Python's.
#pragma once

#include <bitset>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace moeaudit {

/// Whether a pattern matches. kGaveUp: the step budget ran out, or the text is not ASCII.
enum class RegexAnswer { kNo, kYes, kGaveUp };

struct RegexError {
  bool invalid = false;     // true: Python's re.compile() raises too; false: valid Python that is not supported here
  std::size_t position = 0;
  std::string what;         // "lookbehind (?<!", "nothing to repeat", ...
};

/// Supported: literals, escapes, `.`, classes, groups (plain, (?:, (?P<name>), alternation, * + ? {m,n} greedy and lazy,
/// ^ $ \A \Z \b \B, lookahead (?= and (?!, a leading (?i). Not: backreferences, lookbehind, possessive quantifiers, atomic
/// groups, conditionals, other flags, non-ASCII patterns.
///
/// Nothing supported looks back at what a group matched, so whether (instruction, position) leads to a match is a plain
/// reachability question: each pair is visited once, and the cost is bounded by pattern size x text length.
class PythonRegex {
 public:
  static std::optional<PythonRegex> compile(std::string_view pattern, RegexError* error);

  /// re.fullmatch(pattern, text) is not None. Takes its steps from `steps_left`, which callers share over many texts.
  RegexAnswer full_match(std::string_view text, std::int64_t* steps_left) const;
  /// re.match(pattern, text) is not None: anchored at the start only.
  RegexAnswer match(std::string_view text, std::int64_t* steps_left) const;

  enum class Op : std::uint8_t { kSet, kSplit, kJump, kBegin, kEnd, kEndOfText, kWordEdge, kNotWordEdge, kLook, kNotLook, kMatch };
  struct Instruction {
    Op op;
    int a = 0;  // kSet: index of the set; kSplit, kJump: relative target; kLook*: length of the sub-program that follows
    int b = 0;  // kSplit: second relative target
  };
  using Set = std::bitset<256>;

 private:
  RegexAnswer run(std::string_view text, bool whole, std::int64_t* steps_left) const;
  std::vector<Instruction> program_;
  std::vector<Set> sets_;
};

}  // namespace moeaudit

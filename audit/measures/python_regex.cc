#include "audit/measures/python_regex.h"

#include <algorithm>
#include <utility>

namespace moeaudit {
namespace {

using Op = PythonRegex::Op;
using Instruction = PythonRegex::Instruction;
using Set = PythonRegex::Set;
using Code = std::vector<Instruction>;  // position independent: all targets are relative

constexpr std::size_t kMaxProgram = 20000;      // a{1000}{1000} is refused instead of expanded
constexpr std::size_t kMaxPattern = 10000;
constexpr std::size_t kMaxVisited = 1u << 23;   // bits of one visited table: 1 MiB, times the nested lookaheads
constexpr int kMaxDepth = 100;                  // nested groups
constexpr int kUnlimited = -1;

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_word(unsigned char c) { return c == '_' || is_digit(static_cast<char>(c)) || is_letter(static_cast<char>(c)); }
/// 0 to 15, or -1.
int hex_digit(char c) {
  if (is_digit(c)) return c - '0';
  const char lower = static_cast<char>(c | 32);
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

Set word_set() {
  Set s;
  for (int c = 0; c < 128; ++c) s[c] = is_word(static_cast<unsigned char>(c));
  return s;
}
Set range_set(unsigned char first, unsigned char last) {
  Set s;
  for (int c = first; c <= last; ++c) s.set(c);
  return s;
}
Set one(unsigned char c) { return range_set(c, c); }
Set space_set() { return range_set(9, 13) | range_set(28, 32); }  // str.isspace() over ASCII

/// The set of \d, \W and so on; nullopt for other letters.
std::optional<Set> category(char c) {
  switch (c) {
    case 'd': return range_set('0', '9');
    case 'D': return ~range_set('0', '9');
    case 'w': return word_set();
    case 'W': return ~word_set();
    case 's': return space_set();
    case 'S': return ~space_set();
    default: return std::nullopt;
  }
}

class Parser {
 public:
  Parser(std::string_view pattern, RegexError* error) : text_(pattern), error_(error) {}
  std::vector<Set> sets;

  std::optional<Code> parse() {
    if (text_.size() > kMaxPattern) return unsupported("a pattern of more than 10,000 characters", kMaxPattern);
    for (std::size_t i = 0; i < text_.size(); ++i) {
      if (static_cast<unsigned char>(text_[i]) >= 128) return unsupported("a non-ASCII character", i);
    }
    if (text_.substr(0, 4) == "(?i)") {
      ignore_case_ = true;
      pos_ = 4;
    }
    std::optional<Code> code = alternatives(0);
    if (code && pos_ < text_.size()) return invalid("unbalanced parenthesis");
    return code;
  }

 private:
  bool end() const { return pos_ >= text_.size(); }
  char peek() const { return text_[pos_]; }
  bool take(std::string_view what) {
    if (text_.substr(pos_, what.size()) != what) return false;
    pos_ += what.size();
    return true;
  }
  std::nullopt_t invalid(std::string what) {
    *error_ = {true, pos_, std::move(what)};
    return std::nullopt;
  }
  std::nullopt_t unsupported(std::string what, std::size_t where) {
    *error_ = {false, where, std::move(what)};
    return std::nullopt;
  }

  Code set_code(Set s) {
    if (ignore_case_) {
      for (int c = 'a'; c <= 'z'; ++c) {
        if (s[c] || s[c - 32]) s.set(c).set(c - 32);
      }
    }
    sets.push_back(s);
    return {{Op::kSet, static_cast<int>(sets.size()) - 1, 0}};
  }

  std::optional<Code> alternatives(int depth) {
    if (depth > kMaxDepth) return unsupported("groups nested deeper than 100", pos_);
    std::optional<Code> left = sequence(depth);
    while (left && take("|")) {
      std::optional<Code> right = sequence(depth);
      if (!right) return right;
      const int n = static_cast<int>(left->size()), m = static_cast<int>(right->size());
      Code both = {{Op::kSplit, 1, n + 2}};
      both.insert(both.end(), left->begin(), left->end());
      both.push_back({Op::kJump, m + 1, 0});
      both.insert(both.end(), right->begin(), right->end());
      left = std::move(both);
      if (left->size() > kMaxProgram) return unsupported("a pattern of more than 20,000 steps", pos_);
    }
    return left;
  }

  std::optional<Code> sequence(int depth) {
    Code all;
    while (!end() && peek() != '|' && peek() != ')') {
      repeatable_ = true;
      std::optional<Code> item = atom(depth);
      if (item) item = repeated(std::move(*item));
      if (!item) return item;
      all.insert(all.end(), item->begin(), item->end());
      if (all.size() > kMaxProgram) return unsupported("a pattern of more than 20,000 steps", pos_);
    }
    return all;
  }

  std::optional<Code> atom(int depth) {
    const char c = peek();
    if (c == '(') return group(depth);
    if (c == '[') return char_class();
    if (c == '\\') return escape();
    if (c == '*' || c == '+' || c == '?') return invalid("nothing to repeat");
    int low = 0, high = 0;
    std::size_t length = 0;
    if (c == '{' && braces(&low, &high, &length)) return invalid("nothing to repeat");
    ++pos_;
    if (c == '.') return set_code(~one('\n'));
    if (c == '^' || c == '$') {
      repeatable_ = false;
      return Code{{c == '^' ? Op::kBegin : Op::kEnd, 0, 0}};
    }
    return set_code(one(static_cast<unsigned char>(c)));
  }

  std::optional<Code> group(int depth) {
    const std::size_t start = pos_;
    ++pos_;
    std::optional<Op> look;
    if (take("?")) {
      if (take(":")) {
      } else if (take("=")) {
        look = Op::kLook;
      } else if (take("!")) {
        look = Op::kNotLook;
      } else if (take("P<")) {
        const std::size_t close = text_.find('>', pos_);
        if (close == std::string_view::npos) return invalid("missing >, unterminated name");
        for (std::size_t i = pos_; i < close; ++i) {
          const bool good = is_word(static_cast<unsigned char>(text_[i])) && !(i == pos_ && is_digit(text_[i]));
          if (!good) return invalid("bad character in group name");
        }
        if (close == pos_) return invalid("missing group name");
        const std::string_view name = text_.substr(pos_, close - pos_);
        if (std::find(names_.begin(), names_.end(), name) != names_.end()) return invalid("redefinition of group name");
        names_.push_back(name);
        pos_ = close + 1;
      } else {
        const bool behind = text_.substr(start, 3) == "(?<";
        return unsupported((behind ? "lookbehind " : "group ") + std::string(text_.substr(start, behind ? 4 : 3)), start);
      }
    }
    std::optional<Code> body = alternatives(depth + 1);
    if (!body) return body;
    if (!take(")")) {
      pos_ = start;
      return invalid("missing ), unterminated subpattern");
    }
    repeatable_ = true;
    if (look) {
      body->push_back({Op::kMatch, 0, 0});
      body->insert(body->begin(), {*look, static_cast<int>(body->size()), 0});
    }
    return body;
  }

  /// After a backslash outside a class.
  std::optional<Code> escape() {
    const std::size_t start = pos_;
    if (pos_ + 1 >= text_.size()) return invalid("bad escape (end of pattern)");
    const char c = text_[pos_ + 1];
    const Op edge = c == 'A' ? Op::kBegin : c == 'Z' ? Op::kEndOfText : c == 'b' ? Op::kWordEdge : Op::kNotWordEdge;
    if (c == 'A' || c == 'Z' || c == 'b' || c == 'B') {
      pos_ += 2;
      repeatable_ = false;
      return Code{{edge, 0, 0}};
    }
    if (c >= '1' && c <= '9') return unsupported(std::string("backreference \\") + c, start);
    std::optional<Set> s = escaped_set();
    if (!s) return std::nullopt;
    return set_code(*s);
  }

  /// `\x` where it stands for one or more characters; in and outside a class.
  std::optional<Set> escaped_set() {
    const std::size_t start = pos_;
    if (pos_ + 1 >= text_.size()) return invalid("bad escape (end of pattern)");
    const char c = text_[pos_ + 1];
    pos_ += 2;
    if (std::optional<Set> s = category(c)) return s;
    constexpr std::string_view kNames = "abfnrtv", kValues = "\a\b\f\n\r\t\v";
    if (const std::size_t i = kNames.find(c); i != std::string_view::npos) return one(static_cast<unsigned char>(kValues[i]));
    if (c == 'x') {
      unsigned value = 0;
      for (int i = 0; i < 2; ++i, ++pos_) {
        const int digit = end() ? -1 : hex_digit(peek());
        if (digit < 0) return invalid("incomplete escape \\x");
        value = value * 16 + static_cast<unsigned>(digit);
      }
      return one(static_cast<unsigned char>(value));
    }
    if (is_digit(c) || c == 'u' || c == 'U' || c == 'N') return unsupported(std::string("escape \\") + c, start);
    if (is_letter(c)) return invalid(std::string("bad escape \\") + c);
    return one(static_cast<unsigned char>(c));
  }

  std::optional<Code> char_class() {
    const std::size_t start = pos_;
    ++pos_;
    const bool negate = take("^");
    Set all;
    for (bool first = true;; first = false) {
      if (end()) {
        pos_ = start;
        return invalid("unterminated character set");
      }
      if (peek() == ']' && !first) break;
      std::optional<Set> low = class_item();
      if (!low) return std::nullopt;
      if (!end() && peek() == '-' && pos_ + 1 < text_.size() && text_[pos_ + 1] != ']') {
        ++pos_;
        std::optional<Set> high = class_item();
        if (!high) return std::nullopt;
        if (low->count() != 1 || high->count() != 1) return invalid("bad character range");
        const auto from = low->_Find_first(), to = high->_Find_first();
        if (from > to) return invalid("bad character range");
        all |= range_set(static_cast<unsigned char>(from), static_cast<unsigned char>(to));
      } else {
        all |= *low;
      }
    }
    ++pos_;
    if (ignore_case_) {  // before negation: [^a] with (?i) excludes A too
      for (int c = 'a'; c <= 'z'; ++c) {
        if (all[c] || all[c - 32]) all.set(c).set(c - 32);
      }
    }
    sets.push_back(negate ? ~all : all);
    return Code{{Op::kSet, static_cast<int>(sets.size()) - 1, 0}};
  }

  std::optional<Set> class_item() {
    if (peek() == '\\') return escaped_set();
    return one(static_cast<unsigned char>(text_[pos_++]));
  }

  /// `{m}`, `{m,}`, `{,n}`, `{m,n}` at pos_; anything else is a literal brace, as in Python.
  bool braces(int* low, int* high, std::size_t* length) const {
    std::size_t i = pos_ + 1;
    auto number = [&](int fallback) {
      if (i >= text_.size() || !is_digit(text_[i])) return fallback;
      int n = 0;
      while (i < text_.size() && is_digit(text_[i])) n = std::min(n * 10 + (text_[i++] - '0'), 1'000'000);
      return n;
    };
    if (i < text_.size() && text_[i] == '}') return false;
    const bool has_low = i < text_.size() && is_digit(text_[i]);
    *low = number(0);
    if (i < text_.size() && text_[i] == ',') {
      ++i;
      *high = number(kUnlimited);
    } else {
      if (!has_low) return false;
      *high = *low;
    }
    if (i >= text_.size() || text_[i] != '}') return false;
    *length = i + 1 - pos_;
    return true;
  }

  /// One quantifier: its bounds and length at pos_; false if there is none.
  bool quantifier(int* low, int* high, std::size_t* length) const {
    if (end()) return false;
    *length = 1;
    *high = kUnlimited;
    switch (peek()) {
      case '*': *low = 0; return true;
      case '+': *low = 1; return true;
      case '?': *low = 0; *high = 1; return true;
      case '{': return braces(low, high, length);
      default: return false;
    }
  }

  std::optional<Code> repeated(Code item) {
    int low = 0, high = 0, unused = 0;
    std::size_t length = 0;
    if (!quantifier(&low, &high, &length)) return item;
    if (!repeatable_) return invalid("nothing to repeat");
    if (high != kUnlimited && high < low) return invalid("min repeat greater than max repeat");
    pos_ += length;
    if (!end() && peek() == '+') return unsupported("possessive quantifier", pos_);
    take("?");  // greedy or lazy: the same texts match
    if (quantifier(&unused, &unused, &length)) return invalid("multiple repeat");

    const int n = static_cast<int>(item.size());
    const std::size_t copies = static_cast<std::size_t>(high == kUnlimited ? low + 1 : high);
    if (copies * (item.size() + 2) > kMaxProgram) return unsupported("a repetition of more than 20,000 steps", pos_);
    Code all;
    for (int i = 0; i < low; ++i) all.insert(all.end(), item.begin(), item.end());
    if (high == kUnlimited) {
      all.push_back({Op::kSplit, 1, n + 2});
      all.insert(all.end(), item.begin(), item.end());
      all.push_back({Op::kJump, -(n + 1), 0});
    }
    for (int i = low; i < high; ++i) {
      all.push_back({Op::kSplit, 1, (high - i) * (n + 1)});
      all.insert(all.end(), item.begin(), item.end());
    }
    return all;
  }

  std::string_view text_;
  RegexError* error_;
  std::size_t pos_ = 0;
  bool ignore_case_ = false;
  bool repeatable_ = true;  // the last atom may take a quantifier
  std::vector<std::string_view> names_;
};

/// Depth-first search over (instruction, position), each pair once.
class Search {
 public:
  Search(const std::vector<Instruction>& program, const std::vector<Set>& sets, std::string_view text, std::int64_t* steps)
      : program_(program), sets_(sets), text_(text), steps_(steps) {}

  /// `first`..`last`: the (sub-)program; its positions outside are never reached.
  RegexAnswer run(std::size_t first, std::size_t last, std::size_t start, bool whole) {
    const std::size_t width = text_.size() + 1;
    if ((last - first) * width > kMaxVisited) return RegexAnswer::kGaveUp;
    *steps_ -= static_cast<std::int64_t>((last - first) * width / 512);  // clearing the table is work too
    std::vector<bool> visited((last - first) * width);
    std::vector<std::pair<std::size_t, std::size_t>> todo = {{first, start}};
    while (!todo.empty()) {
      auto [pc, at] = todo.back();
      todo.pop_back();
      if (visited[(pc - first) * width + at]) continue;
      visited[(pc - first) * width + at] = true;
      if (--*steps_ < 0) return RegexAnswer::kGaveUp;
      const Instruction& in = program_[pc];
      switch (in.op) {
        case Op::kMatch:
          if (!whole || at == text_.size()) return RegexAnswer::kYes;
          break;
        case Op::kSet:
          if (at < text_.size() && sets_[in.a][static_cast<unsigned char>(text_[at])]) todo.emplace_back(pc + 1, at + 1);
          break;
        case Op::kSplit: todo.emplace_back(pc + in.b, at); [[fallthrough]];
        case Op::kJump: todo.emplace_back(pc + in.a, at); break;
        case Op::kLook:
        case Op::kNotLook: {
          const RegexAnswer inner = run(pc + 1, pc + 1 + in.a, at, false);
          if (inner == RegexAnswer::kGaveUp) return inner;
          if ((inner == RegexAnswer::kYes) == (in.op == Op::kLook)) todo.emplace_back(pc + 1 + in.a, at);
          break;
        }
        default:
          if (holds(in.op, at)) todo.emplace_back(pc + 1, at);
      }
    }
    return RegexAnswer::kNo;
  }

 private:
  bool holds(Op op, std::size_t at) const {
    const std::size_t n = text_.size();
    if (op == Op::kBegin) return at == 0;
    if (op == Op::kEndOfText) return at == n;
    if (op == Op::kEnd) return at == n || (at + 1 == n && text_[at] == '\n');
    if (n == 0) return false;  // \b and \B alike: Python's \B does not match the empty string before 3.14
    const bool before = at > 0 && is_word(static_cast<unsigned char>(text_[at - 1]));
    const bool after = at < n && is_word(static_cast<unsigned char>(text_[at]));
    return (before != after) == (op == Op::kWordEdge);
  }

  const std::vector<Instruction>& program_;
  const std::vector<Set>& sets_;
  std::string_view text_;
  std::int64_t* steps_;
};

}  // namespace

std::optional<PythonRegex> PythonRegex::compile(std::string_view pattern, RegexError* error) {
  Parser parser(pattern, error);
  std::optional<Code> code = parser.parse();
  if (!code) return std::nullopt;
  PythonRegex regex;
  regex.program_ = std::move(*code);
  regex.program_.push_back({Op::kMatch, 0, 0});
  regex.sets_ = std::move(parser.sets);
  return regex;
}

RegexAnswer PythonRegex::run(std::string_view text, bool whole, std::int64_t* steps_left) const {
  for (char c : text) {
    if (static_cast<unsigned char>(c) >= 128) return RegexAnswer::kGaveUp;
  }
  return Search(program_, sets_, text, steps_left).run(0, program_.size(), 0, whole);
}

RegexAnswer PythonRegex::full_match(std::string_view text, std::int64_t* steps_left) const { return run(text, true, steps_left); }
RegexAnswer PythonRegex::match(std::string_view text, std::int64_t* steps_left) const { return run(text, false, steps_left); }

}  // namespace moeaudit

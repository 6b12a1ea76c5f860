// The pickle machine (Python's pickletools.py documents each opcode) without its power: a stack and a memo of positions
// in an arena of plain nodes. Only at the end does the arena become a tree of shared nodes, so a cycle is seen before it
// could leak, and what the stream made and dropped costs nothing.
#include "audit/inputs/pickle.h"

#include <algorithm>
#include <bit>
#include <initializer_list>
#include <map>

#include "audit/inputs/zip.h"
#include "audit/text/utf8.h"

namespace moeaudit {
namespace {

using Kind = PickleNode::Kind;
using Position = std::uint32_t;

// training_args.bin has some 6 kB, 300 values and 10 levels.
constexpr std::size_t kMaxFileBytes = std::size_t{16} << 20;
constexpr std::size_t kMaxNodes = 200'000;
constexpr std::size_t kMaxTreeNodes = 1'000'000;
constexpr std::size_t kMaxPlaces = 1'000'000;
constexpr std::size_t kMaxMarks = 1'000;
constexpr int kMaxDepth = 100;
constexpr std::size_t kMaxIntegerBytes = 512;

/// Modules of the standard library through which a call can run code or reach files and network. A pickle that calls into
/// them, but for the list below, does something other than describe data.
constexpr std::string_view kPowerfulModules[] = {
    "__builtin__", "_codecs",  "_io",        "_operator",  "_pickle",  "_posixsubprocess", "_thread",   "asyncio",    "atexit",
    "bdb",         "builtins", "cProfile",   "codecs",     "codeop",   "commands",         "copy_reg",  "copyreg",    "ctypes",
    "distutils",   "doctest",  "ensurepip",  "fileinput",  "ftplib",   "functools",        "gc",        "http",       "imaplib",
    "imp",         "importlib", "inspect",   "io",         "linecache", "logging",         "mailbox",   "marshal",    "mmap",
    "multiprocessing", "nntplib", "nt",      "ntpath",     "operator", "os",               "pdb",       "pickle",     "pip",
    "pkgutil",     "poplib",   "posix",      "posixpath",  "pty",      "py_compile",       "pydoc",     "runpy",      "setuptools",
    "shelve",      "shutil",   "signal",     "site",       "smtplib",  "socket",           "socketserver", "sqlite3", "ssl",
    "subprocess",  "sys",      "tarfile",    "telnetlib",  "tempfile", "threading",        "timeit",    "types",      "unittest",
    "urllib",      "venv",     "webbrowser", "xmlrpc",     "zipapp",   "zipfile",          "zipimport"};

constexpr std::string_view kHarmlessCalls[] = {
    "__builtin__.bytearray", "__builtin__.complex", "__builtin__.frozenset",    "__builtin__.getattr", "__builtin__.set",
    "_codecs.encode",        "builtins.bytearray",  "builtins.complex",         "builtins.dict",       "builtins.frozenset",
    "builtins.getattr",      "builtins.list",       "builtins.set",             "builtins.tuple",      "copy_reg._reconstructor",
    "copyreg.__newobj__",    "copyreg._reconstructor"};

bool call_is_harmless(std::string_view name) {
  const std::string_view module = name.substr(0, name.find('.'));
  const bool powerful = std::find(std::begin(kPowerfulModules), std::end(kPowerfulModules), module) != std::end(kPowerfulModules);
  return !powerful || std::find(std::begin(kHarmlessCalls), std::end(kHarmlessCalls), name) != std::end(kHarmlessCalls);
}

/// A node under construction: children are positions in the arena.
struct Cell {
  Kind kind = Kind::kNone;
  bool boolean = false;
  std::int64_t integer = 0;
  double real = 0;
  std::string text;
  std::vector<Position> items;
  std::vector<std::pair<Position, Position>> entries;
};

struct Refused {
  std::string what;
};

/// Decimal text of a two's-complement little-endian integer of any size within the bound.
std::string decimal_text(std::string_view bytes) {
  std::vector<unsigned char> magnitude(bytes.begin(), bytes.end());
  const bool negative = !bytes.empty() && (magnitude.back() & 0x80);
  if (negative) {
    unsigned carry = 1;
    for (unsigned char& byte : magnitude) {
      carry += static_cast<unsigned char>(~byte);
      byte = static_cast<unsigned char>(carry);
      carry >>= 8;
    }
  }
  std::string digits;
  for (bool left = true; left;) {  // divide by ten, keep the remainder
    unsigned remainder = 0;
    left = false;
    for (std::size_t i = magnitude.size(); i-- > 0;) {
      const unsigned value = remainder << 8 | magnitude[i];
      magnitude[i] = static_cast<unsigned char>(value / 10);
      remainder = value % 10;
      left = left || magnitude[i] != 0;
    }
    digits.push_back(static_cast<char>('0' + remainder));
  }
  if (negative) digits.push_back('-');
  std::reverse(digits.begin(), digits.end());
  return digits;
}

/// Arena to tree: cycles are refused, shared nodes stay shared, depth and the size as a tree are bounded.
class TreeMaker {
 public:
  explicit TreeMaker(std::vector<Cell>* arena) : arena_(arena), done_(arena->size()), size_(arena->size()), height_(arena->size()), open_(arena->size()) {}

  std::shared_ptr<PickleNode> make(Position p, int depth) {
    if (done_[p]) return done_[p];
    if (open_[p]) throw Refused{"an object that contains itself"};
    if (depth > kMaxDepth) throw Refused{"objects nested deeper than " + std::to_string(kMaxDepth) + " levels"};
    open_[p] = 1;
    Cell& cell = (*arena_)[p];
    auto node = std::make_shared<PickleNode>();
    node->kind = cell.kind;
    node->boolean = cell.boolean;
    node->integer = cell.integer;
    node->real = cell.real;
    node->text = std::move(cell.text);
    std::size_t size = 1;
    const auto child = [&](Position c) {
      std::shared_ptr<PickleNode> made = make(c, depth + 1);
      size += size_[c];
      height_[p] = std::max(height_[p], height_[c] + 1);
      if (height_[p] > kMaxDepth) throw Refused{"objects nested deeper than " + std::to_string(kMaxDepth) + " levels"};
      if (size > kMaxTreeNodes) throw Refused{"more than " + std::to_string(kMaxTreeNodes) + " values where shared ones are counted each time"};
      return made;
    };
    for (const Position c : cell.items) node->items.push_back(child(c));
    for (const auto& [key, value] : cell.entries) {
      std::shared_ptr<PickleNode> k = child(key);
      node->entries.emplace_back(std::move(k), child(value));
    }
    size_[p] = size;
    open_[p] = 0;
    return done_[p] = node;
  }

 private:
  std::vector<Cell>* arena_;
  std::vector<std::shared_ptr<PickleNode>> done_;
  std::vector<std::size_t> size_;
  std::vector<int> height_;
  std::vector<char> open_;
};

class Machine {
 public:
  explicit Machine(std::string_view bytes) : in_(bytes) {}

  /// Runs to STOP and returns the position of the result. Throws Refused.
  Position run() {
    if (number(1) != 0x80) throw Refused{"no pickle of protocol 2 to 5: it does not start with PROTO"};
    if (const auto version = number(1); version < 2 || version > 5) throw Refused{"pickle protocol " + std::to_string(version)};
    for (;;) {
      opcode_at_ = at_;
      const unsigned char opcode = static_cast<unsigned char>(number(1));
      if (opcode == '.') break;
      if (!scalar(opcode) && !container(opcode) && !memo(opcode) && !object(opcode)) refuse_opcode(opcode);
    }
    if (stack_.size() != 1 || !marks_.empty()) throw Refused{"the pickle ends with " + std::to_string(stack_.size()) + " values"};
    return stack_[0];
  }

  std::size_t opcode_at() const { return opcode_at_; }
  std::size_t end() const { return at_; }
  std::vector<Cell>* arena() { return &arena_; }

 private:
  // --- the stream
  std::uint64_t number(int size) {
    const std::string_view raw = take(static_cast<std::uint64_t>(size));
    std::uint64_t value = 0;
    for (int i = size - 1; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(raw[static_cast<std::size_t>(i)]);
    return value;
  }
  std::string_view take(std::uint64_t size) {
    if (size > in_.size() - at_) throw Refused{"cut short: " + std::to_string(size) + " bytes wanted, " + std::to_string(in_.size() - at_) + " left"};
    const std::string_view bytes = in_.substr(at_, size);
    at_ += size;
    return bytes;
  }
  std::string_view line() {
    const std::size_t end = in_.find('\n', at_);
    if (end == std::string_view::npos) throw Refused{"cut short: a line without its end"};
    const std::string_view text = in_.substr(at_, end - at_);
    at_ = end + 1;
    return text;
  }
  std::string utf8(std::string_view bytes) {
    if (utf8_first_bad(bytes) != std::string_view::npos) throw Refused{"a string that is not UTF-8"};
    return std::string(bytes);
  }

  // --- the stack
  Cell& push(Kind kind) {
    if (arena_.size() >= kMaxNodes) throw Refused{"more than " + std::to_string(kMaxNodes) + " values"};
    arena_.emplace_back().kind = kind;
    stack_.push_back(static_cast<Position>(arena_.size() - 1));
    return arena_.back();
  }
  void push_again(Position p) {
    if (stack_.size() >= kMaxNodes) throw Refused{"more than " + std::to_string(kMaxNodes) + " values"};
    stack_.push_back(p);
  }
  /// Every place in a container is paid for: a tuple from the memo can be copied into many objects.
  void spend(std::size_t places) {
    if (places > places_left_) throw Refused{"containers of more than " + std::to_string(kMaxPlaces) + " places in all"};
    places_left_ -= places;
  }
  void push_text(Kind kind, std::string text) { push(kind).text = std::move(text); }
  Position pop() {
    if (stack_.size() <= floor()) throw Refused{"a value is wanted where there is none"};
    const Position p = stack_.back();
    stack_.pop_back();
    return p;
  }
  Position top() const {
    if (stack_.size() <= floor()) throw Refused{"a value is wanted where there is none"};
    return stack_.back();
  }
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  std::vector<Position> pop_to_mark() {
    if (marks_.empty()) throw Refused{"a mark is wanted where there is none"};
    const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<Position> values(begin, stack_.end());
    stack_.erase(begin, stack_.end());
    marks_.pop_back();
    return values;
  }
  Cell& cell_at(Position p, std::initializer_list<Kind> kinds, const char* what) {
    Cell& cell = arena_[p];
    if (std::find(kinds.begin(), kinds.end(), cell.kind) == kinds.end()) throw Refused{std::string(what) + " to something of another kind"};
    return cell;
  }

  // --- opcodes, by group; each returns false if the opcode is not its own
  bool scalar(unsigned char opcode) {
    switch (opcode) {
      case 'N': push(Kind::kNone); return true;
      case 0x88: push(Kind::kBool).boolean = true; return true;                       // NEWTRUE
      case 0x89: push(Kind::kBool).boolean = false; return true;                      // NEWFALSE
      case 'K': push_int(static_cast<std::int64_t>(number(1))); return true;          // BININT1
      case 'M': push_int(static_cast<std::int64_t>(number(2))); return true;          // BININT2
      case 'J': push_int(static_cast<std::int32_t>(number(4))); return true;          // BININT
      case 0x8A: push_long(number(1)); return true;                                   // LONG1
      case 0x8B: push_long(number(4)); return true;                                   // LONG4 (a negative length is a giant one)
      case 'G': push_float(); return true;                                            // BINFLOAT
      case 'X': push_text(Kind::kString, utf8(take(number(4)))); return true;         // BINUNICODE
      case 0x8C: push_text(Kind::kString, utf8(take(number(1)))); return true;        // SHORT_BINUNICODE
      case 0x8D: push_text(Kind::kString, utf8(take(number(8)))); return true;        // BINUNICODE8
      case 'U': push_text(Kind::kString, utf8(take(number(1)))); return true;         // SHORT_BINSTRING (Python 2's str)
      case 'T': push_text(Kind::kString, utf8(take(number(4)))); return true;         // BINSTRING
      case 'C': push_text(Kind::kBytes, std::string(take(number(1)))); return true;   // SHORT_BINBYTES
      case 'B': push_text(Kind::kBytes, std::string(take(number(4)))); return true;   // BINBYTES
      case 0x8E:                                                                      // BINBYTES8
      case 0x96: push_text(Kind::kBytes, std::string(take(number(8)))); return true;  // BYTEARRAY8
      default: return false;
    }
  }
  void push_int(std::int64_t value) { push(Kind::kInt).integer = value; }
  void push_long(std::uint64_t size) {
    if (size > kMaxIntegerBytes) throw Refused{"an integer of " + std::to_string(size) + " bytes"};
    const std::string_view raw = take(size);
    if (size > 8) return push_text(Kind::kString, decimal_text(raw));
    std::uint64_t value = size > 0 && (raw.back() & 0x80) ? ~std::uint64_t{0} : 0;
    for (std::size_t i = raw.size(); i-- > 0;) value = value << 8 | static_cast<unsigned char>(raw[i]);
    push_int(static_cast<std::int64_t>(value));
  }
  void push_float() {
    std::uint64_t bits = 0;  // big-endian
    for (const char c : take(8)) bits = bits << 8 | static_cast<unsigned char>(c);
    push(Kind::kFloat).real = std::bit_cast<double>(bits);
  }

  bool container(unsigned char opcode) {
    switch (opcode) {
      case '(':
        if (marks_.size() >= kMaxMarks) throw Refused{"more than " + std::to_string(kMaxMarks) + " open marks"};
        marks_.push_back(stack_.size());
        return true;
      case ')': push(Kind::kTuple); return true;
      case ']': push(Kind::kList); return true;
      case '}': push(Kind::kDict); return true;
      case 0x8F: push(Kind::kSet); return true;
      case 't': tuple(pop_to_mark()); return true;
      case 0x85: short_tuple(1); return true;
      case 0x86: short_tuple(2); return true;
      case 0x87: short_tuple(3); return true;
      case 'l': push_items(Kind::kList, pop_to_mark()); return true;
      case 'd': {
        const std::vector<Position> pairs = pop_to_mark();
        push(Kind::kDict);
        set_items(top(), pairs);
        return true;
      }
      case 0x91: push_items(Kind::kSet, pop_to_mark()); return true;  // FROZENSET
      case 'a': append(one()); return true;
      case 'e': append(pop_to_mark()); return true;
      case 0x90: add_items(pop_to_mark()); return true;
      case 's': {
        const Position value = pop(), key = pop();
        set_items(top(), {key, value});
        return true;
      }
      case 'u': {
        const std::vector<Position> pairs = pop_to_mark();
        set_items(top(), pairs);
        return true;
      }
      case '0':  // POP takes a mark, too
        if (!marks_.empty() && stack_.size() == marks_.back()) marks_.pop_back();
        else pop();
        return true;
      case '1': pop_to_mark(); return true;
      case '2': push_again(top()); return true;  // DUP
      default: return false;
    }
  }
  std::vector<Position> one() { return {pop()}; }
  void push_items(Kind kind, std::vector<Position> items) {
    spend(items.size());
    push(kind).items = std::move(items);
  }
  void tuple(std::vector<Position> items) { push_items(Kind::kTuple, std::move(items)); }
  void short_tuple(std::size_t n) {
    std::vector<Position> items(n);
    for (std::size_t i = n; i-- > 0;) items[i] = pop();
    tuple(std::move(items));
  }
  void append(const std::vector<Position>& values) {
    spend(values.size());
    std::vector<Position>& items = cell_at(top(), {Kind::kList, Kind::kObject}, "APPEND").items;
    items.insert(items.end(), values.begin(), values.end());
  }
  void add_items(const std::vector<Position>& values) {
    spend(values.size());
    std::vector<Position>& items = cell_at(top(), {Kind::kSet}, "ADDITEMS").items;
    items.insert(items.end(), values.begin(), values.end());
  }
  void set_items(Position target, const std::vector<Position>& pairs) {
    if (pairs.size() % 2 != 0) throw Refused{"a key without a value"};
    spend(pairs.size());
    Cell& cell = cell_at(target, {Kind::kDict, Kind::kObject}, "SETITEM");
    for (std::size_t i = 0; i < pairs.size(); i += 2) cell.entries.emplace_back(pairs[i], pairs[i + 1]);
  }

  bool memo(unsigned char opcode) {
    switch (opcode) {
      case 'q': put(number(1)); return true;          // BINPUT
      case 'r': put(number(4)); return true;          // LONG_BINPUT
      case 0x94: put(memo_.size()); return true;      // MEMOIZE
      case 'h': get(number(1)); return true;          // BINGET
      case 'j': get(number(4)); return true;          // LONG_BINGET
      case 0x95: number(8); return true;              // FRAME: only says how much to read ahead
      default: return false;
    }
  }
  void put(std::uint64_t index) {
    memo_[index] = top();
    if (memo_.size() > kMaxNodes) throw Refused{"more than " + std::to_string(kMaxNodes) + " memo entries"};
  }
  void get(std::uint64_t index) {
    const auto found = memo_.find(index);
    if (found == memo_.end()) throw Refused{"a memo entry " + std::to_string(index) + " that was never made"};
    push_again(found->second);
  }

  bool object(unsigned char opcode) {
    switch (opcode) {
      case 'c': {  // GLOBAL
        const std::string_view module = line(), name = line();
        global(module, name);
        return true;
      }
      case 0x93: {  // STACK_GLOBAL
        const Position name = pop(), module = pop();
        if (arena_[name].kind != Kind::kString || arena_[module].kind != Kind::kString) throw Refused{"a global whose name is no string"};
        global(std::string(arena_[module].text), std::string(arena_[name].text));
        return true;
      }
      case 'R': {  // REDUCE: callable, arguments
        const Position arguments = pop(), callable = pop();
        call(callable, arguments, true);
        return true;
      }
      case 0x81: {  // NEWOBJ: class, arguments
        const Position arguments = pop(), cls = pop();
        call(cls, arguments, false);
        return true;
      }
      case 0x92: {  // NEWOBJ_EX: class, arguments, keyword arguments
        const Position keywords = pop(), arguments = pop(), cls = pop();
        call(cls, arguments, false);
        cell_at(keywords, {Kind::kDict}, "NEWOBJ_EX");
        copy_entries(keywords, top());
        return true;
      }
      case 'b': {  // BUILD
        const Position state = pop();
        build(top(), state);
        return true;
      }
      default: return false;
    }
  }
  void global(std::string_view module, std::string_view name) {
    const auto plain = [](std::string_view text) {
      return !text.empty() && text.size() < 256 && std::all_of(text.begin(), text.end(), [](unsigned char c) { return c > 0x20 && c < 0x7F; });
    };
    if (!plain(module) || !plain(name)) throw Refused{"a global whose name is none"};
    push_text(Kind::kGlobal, std::string(module).append(".").append(name));
  }
  void call(Position callable, Position arguments, bool reduce) {
    const Cell& what = arena_[callable];
    if (what.kind != Kind::kGlobal) throw Refused{"a call of something that is not a global"};
    if (reduce && !call_is_harmless(what.text)) throw Refused{"a call of " + what.text + ", which no training arguments need: loading this file would run it"};
    std::string name = what.text;
    spend(cell_at(arguments, {Kind::kTuple}, "arguments").items.size());
    std::vector<Position> items = arena_[arguments].items;
    Cell& made = push(Kind::kObject);
    made.text = std::move(name);
    made.items = std::move(items);
  }
  /// State is a dict, or (dict or None, dict of slots), or something that the class's own __setstate__ reads.
  void build(Position target, Position state) {
    cell_at(target, {Kind::kObject}, "BUILD");
    const Cell& from = arena_[state];
    if (from.kind == Kind::kDict) return copy_entries(state, target);
    const auto dict_or_none = [&](Position p) { return arena_[p].kind == Kind::kDict || arena_[p].kind == Kind::kNone; };
    if (from.kind == Kind::kTuple && from.items.size() == 2 && dict_or_none(from.items[0]) && dict_or_none(from.items[1])) {
      for (const Position part : from.items) copy_entries(part, target);
      return;
    }
    spend(1);
    arena_[target].items.push_back(state);
  }
  void copy_entries(Position from, Position to) {  // never the same: one is a dict, the other an object
    const std::vector<std::pair<Position, Position>>& entries = arena_[from].entries;
    spend(2 * entries.size());
    arena_[to].entries.insert(arena_[to].entries.end(), entries.begin(), entries.end());
  }

  [[noreturn]] static void refuse_opcode(unsigned char opcode) {
    struct Named {
      unsigned char opcode;
      const char* name;
    };
    constexpr Named kNames[] = {{'P', "PERSID"}, {'Q', "BINPERSID"}, {0x82, "EXT1"}, {0x83, "EXT2"}, {0x84, "EXT4"}, {0x97, "NEXT_BUFFER"},
                                {0x98, "READONLY_BUFFER"}, {'I', "INT"}, {'L', "LONG"}, {'F', "FLOAT"}, {'S', "STRING"}, {'V', "UNICODE"},
                                {'i', "INST"}, {'o', "OBJ"}, {'p', "PUT"}, {'g', "GET"}, {0x80, "PROTO"}};
    for (const Named& n : kNames) {
      if (n.opcode == opcode) throw Refused{std::string("opcode ") + n.name + " is not read here"};
    }
    throw Refused{"opcode " + std::to_string(opcode) + ", which does not exist"};
  }

  std::string_view in_;
  std::size_t at_ = 0, opcode_at_ = 0;
  std::vector<Cell> arena_;
  std::vector<Position> stack_;
  std::vector<std::size_t> marks_;
  std::size_t places_left_ = kMaxPlaces;
  std::map<std::uint64_t, Position> memo_;  // a tree: no choice of indices makes it slow
};

/// One pickle; `used` is where it ends.
bool read_one(std::string_view bytes, std::shared_ptr<PickleNode>* out, std::size_t* used, std::string* error) {
  Machine machine(bytes);
  try {
    const Position root = machine.run();
    *used = machine.end();
    *out = TreeMaker(machine.arena()).make(root, 0);
    return true;
  } catch (const Refused& refused) {
    *error = refused.what + " (byte " + std::to_string(machine.opcode_at()) + " of the pickle)";
    return false;
  }
}

/// torch.save before 1.6 wrote no zip, but pickles one after another: a magic number, a version, system information, the
/// object (torch/serialization.py, _legacy_save).
constexpr std::string_view kLegacyMagic = "119547037146038801333356";

}  // namespace

const PickleNode* PickleNode::find(std::string_view key) const {
  for (std::size_t i = entries.size(); i-- > 0;) {  // the last one wins, as in a dict
    if (entries[i].first->kind == Kind::kString && entries[i].first->text == key) return entries[i].second.get();
  }
  return nullptr;
}

bool read_pickle(std::string_view bytes, std::shared_ptr<PickleNode>* out, std::string* error) {
  std::size_t used = 0;
  if (!read_one(bytes, out, &used, error)) return false;
  if ((*out)->kind != Kind::kString || (*out)->text != kLegacyMagic) return true;
  for (int i = 0; i < 3; ++i) {
    bytes.remove_prefix(used);
    if (!read_one(bytes, out, &used, error)) return false;
  }
  return true;
}

bool read_torch_pickle(const std::string& path, std::shared_ptr<PickleNode>* out, std::string* error) {
  std::string bytes, why;
  if (!read_file(path, &bytes, error, kMaxFileBytes)) return false;
  std::string_view pickle = bytes;
  if (looks_like_zip(bytes) && !find_zip_entry(bytes, "data.pkl", &pickle, &why)) {
    *error = path + ": " + why;
    return false;
  }
  if (read_pickle(pickle, out, &why)) return true;
  *error = path + ": " + why;
  return false;
}

}  // namespace moeaudit

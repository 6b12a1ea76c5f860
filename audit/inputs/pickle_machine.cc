// The opcodes of protocols 2 to 5. What the stream makes is counted and bounded as it is made.
#include "audit/inputs/pickle_machine.h"

#include <algorithm>
#include <bit>

#include "audit/text/utf8.h"

namespace moeaudit {
namespace {

using Refused = PickleRefused;
using Cell = PickleCell;

// training_args.bin has some 6 kB, 300 values and 10 levels.
constexpr std::size_t kMaxNodes = 200'000;
constexpr std::size_t kMaxPlaces = 1'000'000;
constexpr std::size_t kMaxMarks = 1'000;
constexpr std::size_t kMaxIntegerBytes = 512;

/// Modules of the standard library through which a call can run code or reach files and network. A pickle that calls
/// into them, but for the list below, does something other than describe data.
constexpr std::string_view kPowerfulModules =
    " __builtin__ _codecs _io _operator _pickle _posixsubprocess _thread asyncio atexit bdb builtins cProfile "
    "codecs codeop commands copy_reg copyreg ctypes distutils doctest ensurepip fileinput ftplib functools gc "
    "http imaplib imp importlib inspect io linecache logging mailbox marshal mmap multiprocessing nntplib nt "
    "ntpath operator os pdb pickle pip pkgutil poplib posix posixpath pty py_compile pydoc runpy setuptools "
    "shelve shutil signal site smtplib socket socketserver sqlite3 ssl subprocess sys tarfile telnetlib tempfile "
    "threading timeit types unittest urllib venv webbrowser xmlrpc zipapp zipfile zipimport ";

constexpr std::string_view kHarmlessCalls[] = {
    "__builtin__.bytearray", "__builtin__.complex", "__builtin__.frozenset",   "__builtin__.getattr",
    "__builtin__.set",       "_codecs.encode",      "builtins.bytearray",      "builtins.complex",
    "builtins.dict",         "builtins.frozenset",  "builtins.getattr",        "builtins.list",
    "builtins.set",          "builtins.tuple",      "copy_reg._reconstructor", "copyreg.__newobj__",
    "copyreg._reconstructor"};

bool call_is_harmless(std::string_view name) {
  const std::string word = std::string(" ").append(name.substr(0, name.find('.'))).append(" ");
  if (kPowerfulModules.find(word) == std::string_view::npos) return true;
  return std::find(std::begin(kHarmlessCalls), std::end(kHarmlessCalls), name) != std::end(kHarmlessCalls);
}

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

[[noreturn]] void refuse_opcode(unsigned char opcode) {
  struct Named {
    unsigned char opcode;
    const char* name;
  };
  constexpr Named kNames[] = {{'P', "PERSID"},       {'Q', "BINPERSID"}, {0x82, "EXT1"},
                              {0x83, "EXT2"},        {0x84, "EXT4"},     {'I', "INT"},
                              {0x97, "NEXT_BUFFER"}, {'L', "LONG"},      {0x98, "READONLY_BUFFER"},
                              {'F', "FLOAT"},        {'S', "STRING"},    {'V', "UNICODE"},
                              {'i', "INST"},         {'o', "OBJ"},       {'p', "PUT"},
                              {'g', "GET"},          {0x80, "PROTO"}};
  for (const Named& n : kNames) {
    if (n.opcode == opcode) throw Refused{std::string("opcode ") + n.name + " is not read here"};
  }
  throw Refused{"opcode " + std::to_string(opcode) + ", which does not exist"};
}

}  // namespace

PickleMachine::PickleMachine(std::string_view bytes) : in_(bytes), places_left_(kMaxPlaces) {}

PicklePosition PickleMachine::run() {
  if (number(1) != 0x80) throw Refused{"no pickle of protocol 2 to 5: it does not start with PROTO"};
  if (const auto version = number(1); version < 2 || version > 5) {
    throw Refused{"pickle protocol " + std::to_string(version)};
  }
  for (;;) {
    opcode_at_ = at_;
    const unsigned char opcode = static_cast<unsigned char>(number(1));
    if (opcode == '.') break;
    if (!scalar(opcode) && !container(opcode) && !memo(opcode) && !object(opcode)) refuse_opcode(opcode);
  }
  if (stack_.size() != 1 || !marks_.empty()) {
    throw Refused{"the pickle ends with " + std::to_string(stack_.size()) + " values"};
  }
  return stack_[0];
}

// --- the stream -----------------------------------------------------------------------------------------------------

std::uint64_t PickleMachine::number(int size) {
  const std::string_view raw = take(static_cast<std::uint64_t>(size));
  std::uint64_t value = 0;
  for (std::size_t i = raw.size(); i-- > 0;) value = value << 8 | static_cast<unsigned char>(raw[i]);
  return value;
}

std::string_view PickleMachine::take(std::uint64_t size) {
  const std::size_t left = in_.size() - at_;
  if (size > left) {
    throw Refused{"cut short: " + std::to_string(size) + " bytes wanted, " + std::to_string(left) + " left"};
  }
  const std::string_view bytes = in_.substr(at_, size);
  at_ += size;
  return bytes;
}

std::string_view PickleMachine::line() {
  const std::size_t end = in_.find('\n', at_);
  if (end == std::string_view::npos) throw Refused{"cut short: a line without its end"};
  const std::string_view text = in_.substr(at_, end - at_);
  at_ = end + 1;
  return text;
}

// --- the stack ------------------------------------------------------------------------------------------------------

PickleCell& PickleMachine::push(Kind kind) {
  if (arena_.size() >= kMaxNodes) throw Refused{"more than " + std::to_string(kMaxNodes) + " values"};
  arena_.emplace_back().kind = kind;
  stack_.push_back(static_cast<Position>(arena_.size() - 1));
  return arena_.back();
}

void PickleMachine::push_again(Position p) {
  if (stack_.size() >= kMaxNodes) throw Refused{"more than " + std::to_string(kMaxNodes) + " values"};
  stack_.push_back(p);
}

/// LONG1 and LONG4: two's complement, little-endian.
void PickleMachine::push_long(std::uint64_t size) {
  if (size > kMaxIntegerBytes) throw Refused{"an integer of " + std::to_string(size) + " bytes"};
  const std::string_view raw = take(size);
  if (size > 8) {
    push(Kind::kString).text = decimal_text(raw);
    return;
  }
  std::uint64_t value = size > 0 && (raw.back() & 0x80) ? ~std::uint64_t{0} : 0;
  for (std::size_t i = raw.size(); i-- > 0;) value = value << 8 | static_cast<unsigned char>(raw[i]);
  push_int(static_cast<std::int64_t>(value));
}

/// BINFLOAT is big-endian.
void PickleMachine::push_float() {
  std::uint64_t bits = 0;
  for (const char c : take(8)) bits = bits << 8 | static_cast<unsigned char>(c);
  push(Kind::kFloat).real = std::bit_cast<double>(bits);
}

void PickleMachine::push_string(std::string_view bytes) {
  if (utf8_first_bad(bytes) != std::string_view::npos) throw Refused{"a string that is not UTF-8"};
  push(Kind::kString).text = bytes;
}

void PickleMachine::push_items(Kind kind, Positions items) {
  spend(items.size());
  push(kind).items = std::move(items);
}

PicklePosition PickleMachine::top() const {
  if (stack_.size() <= floor()) throw Refused{"a value is wanted where there is none"};
  return stack_.back();
}

PicklePosition PickleMachine::pop() {
  const Position p = top();
  stack_.pop_back();
  return p;
}

void PickleMachine::push_mark() {
  if (marks_.size() >= kMaxMarks) throw Refused{"more than " + std::to_string(kMaxMarks) + " open marks"};
  marks_.push_back(stack_.size());
}

PickleMachine::Positions PickleMachine::pop_to_mark() {
  if (marks_.empty()) throw Refused{"a mark is wanted where there is none"};
  const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
  Positions values(begin, stack_.end());
  stack_.erase(begin, stack_.end());
  marks_.pop_back();
  return values;
}

/// POP takes a value, or a mark that lies on top.
void PickleMachine::pop_or_unmark() {
  if (!marks_.empty() && stack_.size() == marks_.back()) {
    marks_.pop_back();
  } else {
    pop();
  }
}

PickleCell& PickleMachine::cell_at(Position p, std::initializer_list<Kind> kinds, const char* what) {
  Cell& cell = arena_[p];
  if (std::find(kinds.begin(), kinds.end(), cell.kind) == kinds.end()) {
    throw Refused{std::string(what) + " to something of another kind"};
  }
  return cell;
}

/// Every place in a container is paid for: a tuple from the memo can be copied into many objects.
void PickleMachine::spend(std::size_t places) {
  if (places > places_left_) {
    throw Refused{"containers of more than " + std::to_string(kMaxPlaces) + " places in all"};
  }
  places_left_ -= places;
}

// --- opcodes --------------------------------------------------------------------------------------------------------

bool PickleMachine::scalar(unsigned char opcode) {
  switch (opcode) {
    case 'N': push(Kind::kNone); return true;
    case 0x88: push(Kind::kBool).boolean = true; return true;               // NEWTRUE
    case 0x89: push(Kind::kBool).boolean = false; return true;              // NEWFALSE
    case 'K': push_int(static_cast<std::int64_t>(number(1))); return true;  // BININT1
    case 'M': push_int(static_cast<std::int64_t>(number(2))); return true;  // BININT2
    case 'J': push_int(static_cast<std::int32_t>(number(4))); return true;  // BININT
    case 0x8A: push_long(number(1)); return true;                           // LONG1
    case 0x8B: push_long(number(4)); return true;                           // LONG4
    case 'G': push_float(); return true;                                    // BINFLOAT
    case 'X': push_string(take(number(4))); return true;                    // BINUNICODE
    case 0x8C: push_string(take(number(1))); return true;                   // SHORT_BINUNICODE
    case 0x8D: push_string(take(number(8))); return true;                   // BINUNICODE8
    case 'U': push_string(take(number(1))); return true;                    // SHORT_BINSTRING (Python 2's str)
    case 'T': push_string(take(number(4))); return true;                    // BINSTRING
    case 'C': push_bytes(take(number(1))); return true;                     // SHORT_BINBYTES
    case 'B': push_bytes(take(number(4))); return true;                     // BINBYTES
    case 0x8E: push_bytes(take(number(8))); return true;                    // BINBYTES8
    case 0x96: push_bytes(take(number(8))); return true;                    // BYTEARRAY8
    default: return false;
  }
}

bool PickleMachine::container(unsigned char opcode) {
  switch (opcode) {
    case '(': push_mark(); return true;
    case ')': push(Kind::kTuple); return true;
    case ']': push(Kind::kList); return true;
    case '}': push(Kind::kDict); return true;
    case 0x8F: push(Kind::kSet); return true;
    case 't': push_items(Kind::kTuple, pop_to_mark()); return true;
    case 'l': push_items(Kind::kList, pop_to_mark()); return true;
    case 0x91: push_items(Kind::kSet, pop_to_mark()); return true;  // FROZENSET
    case 0x85: short_tuple(1); return true;
    case 0x86: short_tuple(2); return true;
    case 0x87: short_tuple(3); return true;
    case 'd': {
      const Positions pairs = pop_to_mark();
      push(Kind::kDict);
      set_items(top(), pairs);
      return true;
    }
    case 'a': add_items({Kind::kList, Kind::kObject}, "APPEND", {pop()}); return true;
    case 'e': add_items({Kind::kList, Kind::kObject}, "APPENDS", pop_to_mark()); return true;
    case 0x90: add_items({Kind::kSet}, "ADDITEMS", pop_to_mark()); return true;
    case 's': {
      const Position value = pop(), key = pop();
      set_items(top(), {key, value});
      return true;
    }
    case 'u': {
      const Positions pairs = pop_to_mark();
      set_items(top(), pairs);
      return true;
    }
    case '0': pop_or_unmark(); return true;
    case '1': pop_to_mark(); return true;      // POP_MARK
    case '2': push_again(top()); return true;  // DUP
    default: return false;
  }
}

void PickleMachine::short_tuple(std::size_t n) {
  Positions items(n);
  for (std::size_t i = n; i-- > 0;) items[i] = pop();
  push_items(Kind::kTuple, std::move(items));
}

void PickleMachine::add_items(std::initializer_list<Kind> kinds, const char* what, const Positions& values) {
  spend(values.size());
  Positions& items = cell_at(top(), kinds, what).items;
  items.insert(items.end(), values.begin(), values.end());
}

void PickleMachine::set_items(Position target, const Positions& pairs) {
  if (pairs.size() % 2 != 0) throw Refused{"a key without a value"};
  spend(pairs.size());
  Cell& cell = cell_at(target, {Kind::kDict, Kind::kObject}, "SETITEM");
  for (std::size_t i = 0; i < pairs.size(); i += 2) cell.entries.emplace_back(pairs[i], pairs[i + 1]);
}

bool PickleMachine::memo(unsigned char opcode) {
  switch (opcode) {
    case 'q': put(number(1)); return true;      // BINPUT
    case 'r': put(number(4)); return true;      // LONG_BINPUT
    case 0x94: put(memo_.size()); return true;  // MEMOIZE
    case 'h': get(number(1)); return true;      // BINGET
    case 'j': get(number(4)); return true;      // LONG_BINGET
    case 0x95: number(8); return true;          // FRAME: only says how much to read ahead
    default: return false;
  }
}

void PickleMachine::put(std::uint64_t index) {
  memo_[index] = top();
  if (memo_.size() > kMaxNodes) throw Refused{"more than " + std::to_string(kMaxNodes) + " memo entries"};
}

void PickleMachine::get(std::uint64_t index) {
  const auto found = memo_.find(index);
  if (found == memo_.end()) throw Refused{"a memo entry " + std::to_string(index) + " that was never made"};
  push_again(found->second);
}

bool PickleMachine::object(unsigned char opcode) {
  switch (opcode) {
    case 'c': {  // GLOBAL
      const std::string_view module = line(), name = line();
      global(module, name);
      return true;
    }
    case 0x93: stack_global(); return true;
    case 'R': call(true); return true;             // REDUCE
    case 0x81: call(false); return true;           // NEWOBJ
    case 0x92: call_with_keywords(); return true;  // NEWOBJ_EX
    case 'b': build(); return true;
    default: return false;
  }
}

void PickleMachine::global(std::string_view module, std::string_view name) {
  const auto plain = [](std::string_view text) {
    const auto printable = [](unsigned char c) { return c > 0x20 && c < 0x7F; };
    return !text.empty() && text.size() < 256 && std::all_of(text.begin(), text.end(), printable);
  };
  if (!plain(module) || !plain(name)) throw Refused{"a global whose name is none"};
  std::string full = std::string(module).append(".").append(name);  // the views may lie in the arena, which push moves
  push(Kind::kGlobal).text = std::move(full);
}

void PickleMachine::stack_global() {
  const Position name = pop(), module = pop();
  if (arena_[name].kind != Kind::kString || arena_[module].kind != Kind::kString) {
    throw Refused{"a global whose name is no string"};
  }
  global(arena_[module].text, arena_[name].text);
}

/// On the stack: a callable (REDUCE) or a class (NEWOBJ), and a tuple of arguments.
void PickleMachine::call(bool reduce) {
  const Position arguments = pop(), callable = pop();
  std::string name = arena_[callable].text;
  if (arena_[callable].kind != Kind::kGlobal) throw Refused{"a call of something that is not a global"};
  if (reduce && !call_is_harmless(name)) {
    throw Refused{"a call of " + name + ", which no training arguments need: loading this file would run it"};
  }
  spend(cell_at(arguments, {Kind::kTuple}, "arguments").items.size());
  Positions items = arena_[arguments].items;
  Cell& made = push(Kind::kObject);
  made.text = std::move(name);
  made.items = std::move(items);
}

void PickleMachine::call_with_keywords() {
  const Position keywords = pop();
  cell_at(keywords, {Kind::kDict}, "NEWOBJ_EX");
  call(false);
  copy_entries(keywords, top());
}

/// State is a dict, or (dict or None, dict of slots), or something that the class's own __setstate__ reads.
void PickleMachine::build() {
  const Position state = pop(), target = top();
  cell_at(target, {Kind::kObject}, "BUILD");
  const Cell& from = arena_[state];
  const auto dict_or_none = [&](Position p) { return arena_[p].kind == Kind::kDict || arena_[p].kind == Kind::kNone; };
  if (from.kind == Kind::kDict) {
    copy_entries(state, target);
  } else if (from.kind == Kind::kTuple && from.items.size() == 2 && dict_or_none(from.items[0]) &&
             dict_or_none(from.items[1])) {
    for (const Position part : from.items) copy_entries(part, target);
  } else {
    spend(1);
    arena_[target].items.push_back(state);
  }
}

/// Never within one cell: `from` is a dict or None, `to` an object.
void PickleMachine::copy_entries(Position from, Position to) {
  const auto& entries = arena_[from].entries;
  spend(2 * entries.size());
  arena_[to].entries.insert(arena_[to].entries.end(), entries.begin(), entries.end());
}

}  // namespace moeaudit

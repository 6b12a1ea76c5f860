// Fact<T>: a value with its origin, its place, and what it shadowed.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "audit/facts/origin.h"

namespace moeaudit {

/// What a fact means and how a user can supply it. One per line of fact_list.inc.
struct FactInfo {
  std::string_view name;     // dotted: "router.top_k"; the same string in code, JSON, docs and messages
  std::string_view meaning;  // one line, with units and convention
  std::string_view supply;   // what the user can give to make it known: "--model DIR", "--assume peft=VERSION"
};

template <class T>
class Fact {
 public:
  struct Shadowed {
    T value;
    Origin origin;
    Source source;
  };

  explicit Fact(const FactInfo* info) : info_(info) {}

  bool known() const { return value_.has_value(); }
  const T& value() const { return *value_; }
  const T* get() const { return value_ ? &*value_ : nullptr; }
  Origin origin() const { return origin_; }
  const Source& source() const { return source_; }
  const std::vector<Shadowed>& shadowed() const { return shadowed_; }
  const std::string& why_unknown() const { return why_unknown_; }
  const FactInfo& info() const { return *info_; }

  /// The strongest word so far: an earlier value is kept as shadowed (also when equal: agreement is evidence too).
  void set(T value, Origin origin, Source source) {
    if (value_) shadowed_.push_back({std::move(*value_), origin_, std::move(source_)});
    value_ = std::move(value);
    origin_ = origin;
    source_ = std::move(source);
  }
  /// Fills a gap; where a value is known already, this one is recorded as shadowed by it.
  void set_if_unknown(T value, Origin origin, Source source) {
    if (value_) {
      shadowed_.push_back({std::move(value), origin, std::move(source)});
    } else {
      set(std::move(value), origin, std::move(source));
    }
  }
  /// Why nobody can tell, e.g. "depends on transformers: 4.46.0 gives 8, 4.48.1 gives 1". Kept only while unknown.
  void explain_unknown(std::string why) { why_unknown_ = std::move(why); }

 private:
  const FactInfo* info_;
  std::optional<T> value_;
  Origin origin_ = Origin::kUnknown;
  Source source_;
  std::vector<Shadowed> shadowed_;
  std::string why_unknown_;
};

}  // namespace moeaudit

// Package versions as sets. A run rarely says "transformers 4.46.3"; it says ">=4.45" or nothing. A fact that depends
// on a version holds only if it is equal over the whole set (design: "a version is a set").
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace moeaudit {

/// A release "5.2.0", "4.48.1", "5.10.0.dev0", "2.13.0+cpu", "1.0rc1", after PEP 440: local part (+cpu) ignored,
/// missing components are zero, dev < a < b < rc < final < post.
struct Version {
  std::vector<int> release;  // {4, 48, 1}
  int phase = 3;             // -1 dev, 0 alpha, 1 beta, 2 rc, 3 final, 4 post
  int phase_number = 0;
  int post = -1;             // of a pre-release that has both: 1.0rc1.post2
  int dev = kNoDev;          // of a release that has another phase, too: 1.0rc1.dev3, 1.0.post1.dev2
  std::string text;          // as written

  static constexpr int kNoDev = 0x7fffffff;

  static std::optional<Version> parse(std::string_view text);
};
int compare(const Version& a, const Version& b);  // -1, 0, 1
inline bool operator<(const Version& a, const Version& b) { return compare(a, b) < 0; }
inline bool operator==(const Version& a, const Version& b) { return compare(a, b) == 0; }

/// A half-open interval [from, until) of versions; an empty bound is open.
struct VersionWindow {
  std::optional<Version> from;
  std::optional<Version> until;
  bool contains(const Version& v) const;
};

/// The set of versions a package may have: one pinned release, or an interval of them.
/// Constraint grammar (PEP 440 subset): "==4.46.3", "==4.46.*", ">=4.45,<4.50", "~=4.45.1", "4.46.3" (as ==), "!=" is
/// accepted and takes nothing out. Anything else (direct URL, git pin), and a set without any version, parses to nullopt:
/// unknown. As installers do, an open interval leaves out the pre-releases at its ends: "<4.50" ends before 4.50.dev0,
/// "==4.46.*" begins with 4.46, and ">4.45" begins with 4.45.1 (no one releases 4.45.0.1).
struct VersionSet {
  std::optional<Version> exact;
  VersionWindow window;  // meaning only where !exact
  std::string text;      // as written, e.g. "transformers>=4.45,<4.50"

  static std::optional<VersionSet> parse(std::string_view constraint);
  bool intersects(const VersionWindow& w) const;  // some version of the set lies in w
  bool inside(const VersionWindow& w) const;      // every version of the set lies in w
};
/// In released versions. A release candidate holds the code of its release; a development build lies somewhere between the
/// release before and its own, so it may do as either.
VersionSet released(const VersionSet& set);
std::string to_text(const VersionSet& set);
inline bool operator==(const VersionSet& a, const VersionSet& b) { return a.text == b.text; }

}  // namespace moeaudit

// Takes out findings that the user has accepted, by a comment in a file or by a baseline; nothing is lost, they are
// listed with who said so and why.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "audit/facts/finding.h"

namespace moeaudit {

/// Moves suppressed findings from `run->rules` to `run->suppressed`. A comment suppresses a finding of its rules that
/// has a location on its line (or anywhere in its file); a baseline entry one of its rule at the same first location
/// (file, key, tensor) that is not worse than it was. Comments that name no rule, or suppress nothing although every
/// rule they name was judged, are non-fatal problems.
void suppress(RunResult* run, std::span<const Suppression> comments, const Baseline& baseline);

/// The path without "./" and doubled slashes: "./runs//a/config.yml" and "runs/a/config.yml" are one file.
std::string plain_path(std::string_view path);

}  // namespace moeaudit

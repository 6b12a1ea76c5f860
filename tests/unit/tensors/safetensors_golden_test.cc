// The header parser against the safetensors library on the same bytes (fixtures/make/safetensors_golden.py).
// MOE_AUDIT_SAFETENSORS_GOLDEN names another golden file, for a run over more random files than are committed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "audit/tensors/safetensors.h"

namespace moeaudit {
namespace {

using nlohmann::json;

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return bytes;
}

SafetensorsHeader read(const std::string& file) {
  std::vector<SafetensorsFault> faults;
  const auto size = static_cast<std::int64_t>(file.size());
  const std::int64_t length = safetensors_header_length(file, size, &faults);
  SafetensorsHeader header;
  if (length < 0) header.faults = faults;
  return length < 0
             ? std::move(header)
             : parse_safetensors_header(std::string_view(file).substr(8, static_cast<std::size_t>(length)), size);
}

/// Where this reader is meant to differ. The library refuses a dtype it does not know; here the tensor is listed, not
/// decoded. The library lets a later entry of one name replace the first; the format forbids it ("Duplicate keys are
/// disallowed") and the tensor store reports it (tensor_store_test.cc), so the header parser keeps both.
bool differs_on_purpose(const json& one, const SafetensorsHeader& mine, const std::string& file) {
  if (!one["ok"].get<bool>() && one["why"].get<std::string>().find("unknown variant") != std::string::npos) {
    return std::any_of(mine.tensors.begin(), mine.tensors.end(),
                       [](const auto& t) { return dtype_info(t.dtype_text).bits == 0; });
  }
  std::multiset<std::string> names;
  const auto count = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth == 1 && event == json::parse_event_t::key) names.insert(parsed.get<std::string>());
    return true;
  };
  [[maybe_unused]] const json parsed = json::parse(file.substr(std::min<std::size_t>(8, file.size())), count, false);
  return std::any_of(names.begin(), names.end(), [&](const std::string& name) { return names.count(name) > 1; });
}

TEST(SafetensorsGolden, SameVerdictAndTensorsAsTheLibrary) {
  const char* other = std::getenv("MOE_AUDIT_SAFETENSORS_GOLDEN");
  std::ifstream in(other ? other : MOE_AUDIT_SOURCE_DIR "/fixtures/tensors/safetensors_golden.json");
  const json all = json::parse(in);
  ASSERT_GE(all["cases"].size(), 600u);
  std::size_t accepted = 0, on_purpose = 0;
  for (const json& one : all["cases"]) {
    const std::string file = from_hex(one["bytes"]);
    const SafetensorsHeader mine = read(file);
    if (differs_on_purpose(one, mine, file)) {
      ++on_purpose;
      continue;
    }
    const std::string about =
        one["name"].get<std::string>() + ": " + file.substr(std::min<std::size_t>(8, file.size()));
    const std::string fault = mine.faults.empty() ? "" : mine.faults[0].what;
    ASSERT_EQ(mine.faults.empty(), one["ok"].get<bool>())
        << about << "\nhere: " << fault << "\nlibrary: " << one.value("why", "accepted");
    if (!one["ok"]) continue;
    ++accepted;
    std::map<std::string, json> got;
    for (const SafetensorsTensor& t : mine.tensors) {
      const auto shape = mine.shape(t);
      got[std::string(t.name)] =
          json{std::string(t.name), std::string(t.dtype_text), std::vector<std::int64_t>(shape.begin(), shape.end())};
    }
    ASSERT_EQ(got.size(), one["tensors"].size()) << about;
    for (const json& t : one["tensors"]) EXPECT_EQ(got[t[0].get<std::string>()], t) << about;
  }
  EXPECT_GE(accepted, 40u);
  EXPECT_LE(on_purpose, all["cases"].size() / 5);
}

TEST(SafetensorsHeader, FaultsSayWhereAndWhat) {
  const auto parse = [](const std::string& text, std::int64_t data) {
    return parse_safetensors_header(text, 8 + static_cast<std::int64_t>(text.size()) + data);
  };
  const std::string cut =
      R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}})";
  const SafetensorsHeader short_file = parse(cut, 20);
  ASSERT_EQ(short_file.faults.size(), 1u);
  EXPECT_EQ(short_file.faults[0].tensor, "b");
  EXPECT_EQ(short_file.faults[0].offset, 8 + static_cast<std::int64_t>(cut.size()) + 20);
  EXPECT_NE(short_file.faults[0].what.find("cut short"), std::string::npos);
  ASSERT_EQ(short_file.tensors.size(), 1u);  // a is whole
  EXPECT_EQ(short_file.tensors[0].name, "a");

  const std::string wrong =
      R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}})";
  const SafetensorsHeader one_bad = parse(wrong, 32);
  ASSERT_EQ(one_bad.faults.size(), 1u);  // and no hole where a was
  EXPECT_EQ(one_bad.faults[0].what, "shape [3] in F32 takes 12 bytes, data_offsets give 16");
  EXPECT_EQ(one_bad.faults[0].offset, 9);
  ASSERT_EQ(one_bad.tensors.size(), 1u);
  EXPECT_EQ(one_bad.tensors[0].name, "b");

  const SafetensorsHeader no_json = parse("{\"a\":{\"dtype\":\n  oops}}", 0);
  ASSERT_EQ(no_json.faults.size(), 1u);
  EXPECT_EQ(no_json.faults[0].offset, 8 + 17);
  EXPECT_EQ(no_json.faults[0].what,
            "the header is not JSON (line 2, column 3 of the header): expected a value, found 'o'");
  EXPECT_TRUE(no_json.tensors.empty());
}

TEST(SafetensorsHeader, DepthAndNumberOfFaultsAreBounded) {
  EXPECT_FALSE(parse_safetensors_header(R"({"a":)" + std::string(100'000, '['), 1 << 20).faults.empty());
  std::string many = "{";
  for (int i = 0; i < 5000; ++i)
    many += (i ? ",\"" : "\"") + std::to_string(i) + R"(":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]})";
  const SafetensorsHeader header = parse_safetensors_header(many + "}", 1 << 20);
  ASSERT_EQ(header.faults.size(), 21u);
  EXPECT_EQ(header.faults.back().what, "and 4980 more faults in this header");
  const std::string zeros = R"({"a":{"dtype":"F32","shape":[)" +
                            std::string(65, '0').replace(1, 64, std::string(64, ' ')) + R"(],"data_offsets":[0,0]}})";
  EXPECT_EQ(parse_safetensors_header(zeros, 8 + static_cast<std::int64_t>(zeros.size())).faults.size(), 0u);
  std::string dims = "0";
  for (int i = 0; i < 64; ++i) dims += ",0";
  const std::string deep = R"({"a":{"dtype":"F32","shape":[)" + dims + R"(],"data_offsets":[0,0]}})";
  const SafetensorsHeader too_many = parse_safetensors_header(deep, 8 + static_cast<std::int64_t>(deep.size()));
  ASSERT_EQ(too_many.faults.size(), 1u);
  EXPECT_EQ(too_many.faults[0].what, "shape has more than 64 values");
}

}  // namespace
}  // namespace moeaudit

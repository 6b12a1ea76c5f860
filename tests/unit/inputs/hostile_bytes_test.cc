// Some thousand damaged inputs for each reader of untrusted bytes: no crash, no hang, and an error is never silent. The
// long version of this is tests/fuzz; this one is quick and the same in every run.
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <random>

#include "audit/inputs/pickle.h"
#include "audit/tensors/zip.h"
#include "audit/tensors/safetensors.h"
#include "audit/text/text.h"

namespace moeaudit {
namespace {

namespace fs = std::filesystem;

/// Files of the fixtures with one of the endings, shortest first, `most` of them.
std::vector<std::string> seeds(const std::vector<std::string>& endings, std::size_t most) {
  std::vector<std::string> found;
  for (const auto& entry : fs::recursive_directory_iterator(MOE_AUDIT_SOURCE_DIR "/fixtures")) {
    const std::string path = entry.path().string();
    const bool fits =
        std::any_of(endings.begin(), endings.end(), [&](const std::string& e) { return path.ends_with(e); });
    std::string bytes, error;
    if (fits && entry.is_regular_file() && entry.file_size() < 300'000 && read_file(path, &bytes, &error))
      found.push_back(bytes);
  }
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.size() != b.size() ? a.size() < b.size() : a < b; });
  if (found.size() > most) found.resize(most);
  return found;
}

std::string damaged(std::mt19937* random, std::string bytes) {
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>((*random)() % std::max<std::size_t>(n, 1)); };
  for (std::size_t n = below(6) + 1; n > 0; --n) {
    const std::size_t at = below(bytes.size() + 1);
    switch (below(6)) {
      case 0: bytes.insert(at, 1, static_cast<char>(below(256))); break;
      case 1: bytes.erase(at, below(20)); break;
      case 2:
        if (at < bytes.size()) bytes[at] = static_cast<char>(below(256));
        break;
      case 3: bytes.insert(at, std::string(bytes, below(bytes.size() + 1), below(200))); break;
      case 4: bytes.insert(at, std::string(below(300), "[{(-\"'0 \n\xff"[below(11)])); break;
      case 5: bytes.resize(at); break;
    }
  }
  return bytes;
}

/// Runs the reader over the seeds as they are (which must be read) and damaged.
void attack(const std::vector<std::string>& from, const std::function<bool(const std::string&, std::string*)>& read,
            int rounds) {
  ASSERT_FALSE(from.empty());
  std::mt19937 random(2025);
  int refused = 0;
  for (const std::string& seed : from) {
    std::string error;
    EXPECT_TRUE(read(seed, &error)) << error;
  }
  for (int i = 0; i < rounds; ++i) {
    std::string error;
    const std::string bytes = damaged(&random, from[static_cast<std::size_t>(i) % from.size()]);
    if (read(bytes, &error)) continue;
    ++refused;
    ASSERT_FALSE(error.empty());
  }
  EXPECT_GT(refused, rounds / 20);
}

TEST(HostileBytes, Json) {
  attack(
      seeds({"config.json", "trainer_state.json", "adapter_config.json"}, 20),
      [](const std::string& bytes, std::string* error) {
        Node root;
        TextError e;
        std::vector<DuplicateKey> duplicates;
        const bool ok = parse_json(bytes, &root, &duplicates, &e);
        *error = e.what;
        return ok;
      },
      4000);
}

TEST(HostileBytes, Yaml) {
  attack(
      seeds({".yaml", ".yml"}, 20),
      [](const std::string& bytes, std::string* error) {
        Node root;
        TextError e;
        std::vector<DuplicateKey> duplicates;
        const bool ok = parse_yaml(bytes, &root, &duplicates, &e);
        *error = e.what;
        return ok;
      },
      4000);
}

TEST(HostileBytes, Safetensors) {
  attack(
      seeds({".safetensors"}, 6),
      [](const std::string& bytes, std::string* error) {
        SafetensorsHeader header;
        const auto size = static_cast<std::int64_t>(bytes.size());
        const std::int64_t length = safetensors_header_length(bytes, size, &header.faults);
        if (length >= 0)
          header = parse_safetensors_header(std::string_view(bytes).substr(8, static_cast<std::size_t>(length)), size);
        for (const SafetensorsTensor& t : header.tensors) {
          EXPECT_TRUE(8 + length <= t.begin && t.begin <= t.end && t.end <= size);  // what is kept lies in the file
        }
        for (const SafetensorsFault& f : header.faults) *error += f.what;
        return header.faults.empty();
      },
      2000);
}

TEST(HostileBytes, PicklesInZips) {
  attack(
      seeds({"training_args.bin"}, 8),
      [](const std::string& bytes, std::string* error) {
        std::string_view pickle;
        std::shared_ptr<PickleNode> root;
        return find_zip_entry(bytes, "data.pkl", &pickle, error) && read_pickle(pickle, &root, error);
      },
      4000);
}

TEST(HostileBytes, BarePickles) {
  std::vector<std::string> pickles;
  for (const std::string& zip : seeds({"training_args.bin"}, 8)) {
    std::string_view pickle;
    std::string error;
    ASSERT_TRUE(find_zip_entry(zip, "data.pkl", &pickle, &error)) << error;
    pickles.emplace_back(pickle);
  }
  attack(
      pickles,
      [](const std::string& bytes, std::string* error) {
        std::shared_ptr<PickleNode> root;
        return read_pickle(bytes, &root, error);
      },
      8000);
}

}  // namespace
}  // namespace moeaudit

// Files, shards and folders: what is sound is found, each fault is reported once, with its file.
#include "audit/tensors/tensor_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>

#include "audit/tensors/name_index.h"

namespace moeaudit {
namespace {

namespace fs = std::filesystem;
const std::string kModels = MOE_AUDIT_SOURCE_DIR "/fixtures/models/";

class TensorFolder : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::path(testing::TempDir()) /
            ("tensor_store_" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    fs::remove_all(root_);
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  std::string write(const std::string& name, const std::string& bytes) const {
    fs::create_directories((root_ / name).parent_path());
    std::ofstream(root_ / name, std::ios::binary) << bytes;
    return (root_ / name).string();
  }
  /// A file with float32 tensors of one element, named and valued as given.
  std::string write_floats(const std::string& name, const std::vector<std::pair<std::string, float>>& tensors) const {
    std::string header = "{", data;
    for (const auto& [tensor, value] : tensors) {
      const std::size_t at = data.size();
      data.append(reinterpret_cast<const char*>(&value), sizeof value);
      header += (header.size() > 1 ? ",\"" : "\"") + tensor + R"(":{"dtype":"F32","shape":[1],"data_offsets":[)" +
                std::to_string(at) + "," + std::to_string(data.size()) + "]}";
    }
    header += "}";
    const std::uint64_t length = header.size();
    return write(name, std::string(reinterpret_cast<const char*>(&length), 8) + header + data);
  }
  TensorStore open(const std::string& name = "", std::string_view stem = "model") {
    problems_.clear();
    return TensorStore::open(name.empty() ? root_.string() : (root_ / name).string(), stem, &problems_);
  }
  static double value(const TensorView* t) {
    double v = 0;
    EXPECT_TRUE(t && decode(*t, 0, 1, &v));
    return v;
  }

  fs::path root_;
  std::vector<WeightProblem> problems_;
};

TEST_F(TensorFolder, SingleFileAndShardsOfTheSameModelAgree) {
  const TensorStore whole = TensorStore::open(kModels + "mixtral-tf4", "model", &problems_);
  const TensorStore shards = TensorStore::open(kModels + "mixtral-tf4-sharded", "model", &problems_);
  const TensorStore by_index =
      TensorStore::open(kModels + "mixtral-tf4-sharded/model.safetensors.index.json", "model", &problems_);
  EXPECT_TRUE(problems_.empty());
  ASSERT_GT(whole.size(), 100u);
  EXPECT_EQ(whole.size(), shards.size());
  EXPECT_EQ(by_index.size(), shards.size());
  EXPECT_EQ(shards.files().size(), 4u);
  EXPECT_TRUE(shards.missing_in_index().empty());
  for (std::size_t i = 0; i < whole.size(); ++i) {
    const TensorView& a = whole[i];
    const TensorView* b = shards.find(a.name);
    ASSERT_NE(b, nullptr) << a.name;
    EXPECT_TRUE(std::equal(a.shape.begin(), a.shape.end(), b->shape.begin(), b->shape.end()));
    EXPECT_EQ(a.dtype, DType::kBF16);
    EXPECT_EQ(a.elements() * 2, static_cast<std::int64_t>(a.bytes.size()));
    ASSERT_EQ(a.bytes.size(), b->bytes.size());
    EXPECT_EQ(std::memcmp(a.bytes.data(), b->bytes.data(), a.bytes.size()), 0) << a.name;
    EXPECT_EQ(whole.find(a.name), &a);
  }
  for (std::size_t i = 1; i < shards.size(); ++i) {
    EXPECT_TRUE(shards[i - 1].file < shards[i].file ||
                (shards[i - 1].file == shards[i].file && shards[i - 1].offset < shards[i].offset));
  }
  EXPECT_EQ(whole.find("model.layers.0"), nullptr);
  EXPECT_EQ(whole.find(""), nullptr);
}

TEST_F(TensorFolder, EveryShippedWeightFileIsSound) {
  int files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(MOE_AUDIT_SOURCE_DIR "/fixtures/models")) {
    if (entry.path().extension() != ".safetensors") continue;
    const TensorStore store = TensorStore::open(entry.path().string(), "model", &problems_);
    EXPECT_GT(store.size(), 0u) << entry.path();
    ++files;
  }
  EXPECT_TRUE(problems_.empty()) << problems_[0].file << " " << problems_[0].what;
  EXPECT_GE(files, 15);
}

TEST_F(TensorFolder, EmptyFolderIsNoProblem) {
  EXPECT_TRUE(open().empty());
  EXPECT_TRUE(problems_.empty());
  EXPECT_TRUE(open().files().empty());
}

TEST_F(TensorFolder, MissingFile) {
  EXPECT_TRUE(open("nothing.safetensors").empty());
  ASSERT_EQ(problems_.size(), 1u);
  EXPECT_EQ(problems_[0].what, "No such file or directory");
}

TEST_F(TensorFolder, NotAFile) {
  fs::create_directories(root_ / "model.safetensors");
  EXPECT_TRUE(open().empty());
  ASSERT_EQ(problems_.size(), 1u);
  EXPECT_EQ(problems_[0].what, "not a regular file");
}

TEST_F(TensorFolder, AdapterStem) {
  write_floats("adapter_model.safetensors", {{"x", 1.5f}});
  EXPECT_TRUE(open().empty());
  EXPECT_EQ(value(open("", "adapter_model").find("x")), 1.5);
}

TEST_F(TensorFolder, GitLfsPointerIsNamed) {
  write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4920000000\n");
  EXPECT_TRUE(open().empty());
  ASSERT_EQ(problems_.size(), 1u);
  EXPECT_NE(problems_[0].what.find("git lfs pull"), std::string::npos);
}

TEST_F(TensorFolder, TruncatedFileKeepsTheTensorsThatAreWhole) {
  const std::string path = write_floats("model.safetensors", {{"a", 1}, {"b", 2}, {"c", 3}});
  fs::resize_file(path, fs::file_size(path) - 5);
  const TensorStore store = open();
  EXPECT_EQ(value(store.find("a")), 1);
  EXPECT_EQ(store.find("b"), nullptr);
  EXPECT_EQ(store.find("c"), nullptr);
  ASSERT_EQ(problems_.size(), 1u);
  EXPECT_EQ(problems_[0].tensor, "b");
  EXPECT_EQ(problems_[0].offset, static_cast<std::int64_t>(fs::file_size(path)));
}

TEST_F(TensorFolder, NameTwiceInOneFile) {
  write_floats("model.safetensors", {{"a", 1}, {"b", 2}, {"a", 3}});
  const TensorStore store = open();
  EXPECT_EQ(store.size(), 2u);
  EXPECT_EQ(value(store.find("a")), 3);  // as the library, which keeps the last
  ASSERT_EQ(problems_.size(), 1u);
  EXPECT_EQ(problems_[0].tensor, "a");
}

TEST_F(TensorFolder, ShardMissingTensorMissingAndTensorElsewhere) {
  write_floats("model-00001-of-00003.safetensors", {{"a", 1}, {"c", 4}});
  write_floats("model-00002-of-00003.safetensors", {{"b", 2}});
  write("model.safetensors.index.json",
        R"({"metadata":{"total_size":1e3},"weight_map":{"a":"model-00001-of-00003.safetensors",
    "b":"model-00001-of-00003.safetensors","c":"model-00001-of-00003.safetensors","d":"model-00002-of-00003.safetensors",
    "e":"model-00003-of-00003.safetensors","f":"model-00002-of-00003.safetensors"}})");
  const TensorStore store = open();
  EXPECT_EQ(store.size(), 3u);
  EXPECT_EQ(store.files().size(), 2u);
  EXPECT_EQ(store.missing_in_index(),
            (std::vector<std::pair<std::string, std::string>>{{"d", "model-00002-of-00003.safetensors"},
                                                              {"e", "model-00003-of-00003.safetensors"},
                                                              {"f", "model-00002-of-00003.safetensors"}}));
  ASSERT_EQ(problems_.size(), 2u);
  EXPECT_EQ(problems_[0].file, (root_ / "model-00003-of-00003.safetensors").string());
  EXPECT_NE(problems_[0].what.find("missing"), std::string::npos);
  EXPECT_EQ(problems_[1].tensor, "b");
  EXPECT_NE(problems_[1].what.find("model-00002-of-00003.safetensors"), std::string::npos);
}

TEST_F(TensorFolder, ShardsOutsideOfTheFolderAreNotOpened) {
  write_floats("outside.safetensors", {{"a", 1}});
  for (const std::string shard : {"../outside.safetensors", "x/../../outside.safetensors", "/etc/passwd", ""}) {
    write("in/model.safetensors.index.json", R"({"weight_map":{"a":")" + shard + R"("}})");
    EXPECT_TRUE(open("in").empty()) << shard;
    ASSERT_EQ(problems_.size(), 1u) << shard;
    EXPECT_NE(problems_[0].what.find("not a path inside its folder"), std::string::npos);
  }
  write_floats("in/sub/a.safetensors", {{"a", 1}});
  write("in/model.safetensors.index.json", R"({"weight_map":{"a":"sub/a.safetensors"}})");
  EXPECT_EQ(open("in").size(), 1u);
  EXPECT_TRUE(problems_.empty());
}

TEST_F(TensorFolder, BrokenIndex) {
  const std::pair<const char*, const char*> cases[] = {
      {"{",
       "the index is not JSON (line 1, column 2): expected a key in double quotes or '}', found the end of the text"},
      {"{}", "the index has no weight_map"},
      {"[]", "the index has no weight_map"},
      {R"({"weight_map":[]})", "weight_map is not a JSON object"},
      {R"({"weight_map":{"a":1}})", "weight_map has a value that is not a file name, for a"},
      {R"({"weight_map":{}} x)",
       "the index is not JSON (line 1, column 19): text after the end of the JSON value, from 'x' on"},
  };
  for (const auto& [text, what] : cases) {
    write("model.safetensors.index.json", text);
    EXPECT_TRUE(open().empty());
    ASSERT_EQ(problems_.size(), 1u) << text;
    EXPECT_EQ(problems_[0].what, what);
  }
}

TEST_F(TensorFolder, ShardsWithoutAnIndexAreReadAndReported) {
  write_floats("model-00001-of-00002.safetensors", {{"a", 1}});
  write_floats("model-00002-of-00002.safetensors", {{"b", 2}});
  EXPECT_EQ(open().size(), 2u);
  ASSERT_EQ(problems_.size(), 1u);
  EXPECT_NE(problems_[0].what.find("2 shards but no model.safetensors.index.json"), std::string::npos);
}

TEST_F(TensorFolder, OneFileWinsOverAnIndexAsInFromPretrained) {
  write_floats("model.safetensors", {{"a", 1}});
  write_floats("model-00001-of-00001.safetensors", {{"a", 2}});
  write("model.safetensors.index.json", R"({"weight_map":{"a":"model-00001-of-00001.safetensors"}})");
  EXPECT_EQ(value(open().find("a")), 1);
}

TEST_F(TensorFolder, MovedStoreKeepsItsViews) {
  write_floats("model.safetensors", {{"a", 7}});
  TensorStore first = open();
  const TensorView* view = first.find("a");
  const TensorStore second = std::move(first);
  EXPECT_EQ(second.find("a"), view);
  EXPECT_EQ(value(view), 7);
  EXPECT_TRUE(first.empty());  // NOLINT: a store that was moved from answers as an empty one
  EXPECT_EQ(first.find("a"), nullptr);
}

TEST(NameIndex, FindsEveryNameAndNoOther) {
  std::vector<std::string> text;
  for (int i = 0; i < 20'000; ++i)
    text.push_back("model.layers." + std::to_string(i % 61) + ".mlp.experts." + std::to_string(i) + ".up_proj.weight");
  std::vector<std::string_view> names(text.begin(), text.end());
  NameIndex index;
  index.build(names);
  EXPECT_TRUE(index.duplicates().empty());
  for (std::size_t i = 0; i < names.size(); ++i) ASSERT_EQ(index.find(names[i]), static_cast<std::int64_t>(i));
  for (const std::string& name : text) ASSERT_EQ(index.find(name + "x"), -1);
  names.push_back(names[7]);
  names.push_back(names[7]);
  index.build(names);
  EXPECT_EQ(index.find(names[7]), 20'001);
  EXPECT_EQ(index.duplicates(), (std::vector<std::pair<std::size_t, std::size_t>>{{7, 20'000}, {20'000, 20'001}}));
  EXPECT_EQ(NameIndex().find("a"), -1);
}

}  // namespace
}  // namespace moeaudit

// The inert pickle reader against Python's own machine on the real files, and against pickles written by hand.
#include "audit/inputs/pickle.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "audit/tensors/zip.h"

namespace moeaudit {
namespace {

using nlohmann::json;
using Kind = PickleNode::Kind;
using namespace std::string_literals;
using namespace nlohmann::literals;

json canonical(const PickleNode& node);

json pairs_of(const PickleNode& node) {
  json rows = json::array();
  for (const auto& [key, value] : node.entries) rows.push_back(json::array({canonical(*key), canonical(*value)}));
  return rows;
}

json items_of(const PickleNode& node) {
  json rows = json::array();
  for (const auto& item : node.items) rows.push_back(canonical(*item));
  return rows;
}

/// The form that fixtures/make/training_args_golden.py writes.
json canonical(const PickleNode& node) {
  switch (node.kind) {
    case Kind::kNone: return nullptr;
    case Kind::kBool: return node.boolean;
    case Kind::kInt: return {{"int", std::to_string(node.integer)}};
    case Kind::kFloat: return {{"float", node.real}};
    case Kind::kString: return node.text;
    case Kind::kBytes: return {{"bytes", node.text}};
    case Kind::kList: return {{"list", items_of(node)}};
    case Kind::kTuple: return {{"tuple", items_of(node)}};
    case Kind::kSet: return {{"set", items_of(node)}};
    case Kind::kDict: return {{"dict", pairs_of(node)}};
    case Kind::kGlobal: return {{"global", node.text}};
    case Kind::kObject: return {{"object", node.text}, {"args", items_of(node)}, {"state", pairs_of(node)}};
  }
  return nullptr;
}

/// Python's repr of a float, as a number.
void floats_from_text(json* value) {
  if (value->is_object() && value->contains("float"))
    (*value)["float"] = std::strtod((*value)["float"].get<std::string>().c_str(), nullptr);
  if (value->is_structured()) {
    for (json& child : *value) floats_from_text(&child);
  }
}

TEST(Pickle, RealTrainingArgumentsAreWhatPythonReads) {
  std::ifstream in(MOE_AUDIT_SOURCE_DIR "/fixtures/text/training_args_golden.json");
  json golden = json::parse(in);
  ASSERT_GE(golden.size(), 15u);
  for (json& row : golden) {
    const std::string path = MOE_AUDIT_SOURCE_DIR "/" + row["file"].get<std::string>();
    std::shared_ptr<PickleNode> root;
    std::string error;
    ASSERT_TRUE(read_torch_pickle(path, &root, &error)) << error;
    floats_from_text(&row["value"]);
    EXPECT_EQ(canonical(*root), row["value"]) << path;
    const PickleNode* steps = root->find("gradient_accumulation_steps");
    ASSERT_TRUE(steps && steps->kind == Kind::kInt) << path;
    EXPECT_GE(steps->integer, 1);
    const PickleNode* strategy = root->find("save_strategy");
    ASSERT_TRUE(strategy && strategy->kind == Kind::kObject && strategy->items.size() == 1) << path;
    EXPECT_EQ(strategy->text, "transformers.trainer_utils.SaveStrategy");
  }
}

json read(const std::string& bytes) {
  std::shared_ptr<PickleNode> root;
  std::string error;
  return read_pickle(bytes, &root, &error) ? canonical(*root) : json{{"refused", error}};
}

/// `body` after PROTO 2 and before STOP.
json body(const std::string& b) { return read("\x80\x02"s + b + "."); }

std::string refusal(const std::string& b) {
  const json out = body(b);
  return out.contains("refused") ? out["refused"].get<std::string>() : "accepted " + out.dump();
}

TEST(Pickle, Values) {
  EXPECT_EQ(body("N"), nullptr);
  EXPECT_EQ(body("\x88"), true);
  EXPECT_EQ(body("\x89"), false);
  EXPECT_EQ(body("K\xff"), json({{"int", "255"}}));
  EXPECT_EQ(body("M\xff\xff"), json({{"int", "65535"}}));
  EXPECT_EQ(body("J\xfe\xff\xff\xff"), json({{"int", "-2"}}));
  EXPECT_EQ(body("\x8a\x00"s), json({{"int", "0"}}));
  EXPECT_EQ(body("\x8a\x01\xff"), json({{"int", "-1"}}));
  EXPECT_EQ(body("\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80"s), json({{"int", "-9223372036854775808"}}));
  EXPECT_EQ(body("\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x80\x00"s), "9223372036854775808");               // 2^63: text
  EXPECT_EQ(body("\x8a\x09\xff\xff\xff\xff\xff\xff\xff\x7f\xff"s), "-9223372036854775809");              // -2^63 - 1
  EXPECT_EQ(body("\x8a\x0a"s + "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"s), "4722366482869645213696");  // 2^72
  EXPECT_EQ(body("\x8b\x02\x00\x00\x00\x01\x01"s), json({{"int", "257"}}));
  EXPECT_EQ(body("G\xbf\xf8\x00\x00\x00\x00\x00\x00"s), json({{"float", -1.5}}));
  EXPECT_EQ(body("X\x03\x00\x00\x00"s + "a\xC3\xA9"), "a\xC3\xA9");
  EXPECT_EQ(body("\x8c\x01z"), "z");
  EXPECT_EQ(body("\x8d\x01\x00\x00\x00\x00\x00\x00\x00z"s), "z");
  EXPECT_EQ(body("C\x02\x00\x41"s), json({{"bytes", "\0A"s}}));
}

TEST(Pickle, ContainersAndTheMemo) {
  EXPECT_EQ(body("](K\x01K\x02"
                 "e"),
            json({{"list", {{{"int", "1"}}, {{"int", "2"}}}}}));
  EXPECT_EQ(body("]K\x01"
                 "a"),
            json({{"list", {{{"int", "1"}}}}}));
  EXPECT_EQ(body("}\x8c\x01"
                 "aK\x01s\x8c\x01"
                 "bNs"),
            R"({"dict": [["a", {"int": "1"}], ["b", null]]})"_json);
  EXPECT_EQ(body("}(\x8c\x01"
                 "aK\x01\x8c\x01"
                 "bNu"),
            R"({"dict": [["a", {"int": "1"}], ["b", null]]})"_json);
  EXPECT_EQ(body("NN\x86"), json({{"tuple", {nullptr, nullptr}}}));
  EXPECT_EQ(body("(NNNNt"), json({{"tuple", {nullptr, nullptr, nullptr, nullptr}}}));
  EXPECT_EQ(body("(\x8c\x01kNd"), R"({"dict": [["k", null]]})"_json);
  EXPECT_EQ(body("(Nl"), json({{"list", {nullptr}}}));
  EXPECT_EQ(body("\x8f(N\x90"), json({{"set", {nullptr}}}));
  EXPECT_EQ(body("(N\x91"), json({{"set", {nullptr}}}));
  EXPECT_EQ(body("]q\x00h\x00\x86"s), json({{"tuple", {{{"list", json::array()}}, {{"list", json::array()}}}}}));
  EXPECT_EQ(body("]\x94N\x94h\x00\x87"s), R"({"tuple": [{"list": []}, null, {"list": []}]})"_json);
  EXPECT_EQ(body("(N0N1]"), json({{"list", json::array()}}));
  EXPECT_EQ(body("]2\x86"), json({{"tuple", {{{"list", json::array()}}, {{"list", json::array()}}}}}));
}

TEST(Pickle, GlobalsAndObjectsAreNodes) {
  EXPECT_EQ(body("ctorch\nfloat16\n"), json({{"global", "torch.float16"}}));
  EXPECT_EQ(body("\x8c\x05torch\x8c\x07"
                 "float16\x93"),
            json({{"global", "torch.float16"}}));
  const json device = {{"object", "torch.device"}, {"args", {"cpu"}}, {"state", json::array()}};
  EXPECT_EQ(body("ctorch\ndevice\n\x8c\x03"
                 "cpu\x85R"),
            device);
  EXPECT_EQ(body("cmy.args\nArgs\n)\x81}\x8c\x01"
                 "aK\x07sb"),
            R"({"object": "my.args.Args", "args": [], "state": [["a", {"int": "7"}]]})"_json);
  EXPECT_EQ(body("cm\nC\n)\x81(N}\x8c\x01"
                 "aNstb"),
            R"({"object": "m.C", "args": [], "state": [["a", null]]})"_json);  // slots
  EXPECT_EQ(body("cm\nC\n)}\x8c\x01kNs\x92"), R"({"object": "m.C", "args": [], "state": [["k", null]]})"_json);
  EXPECT_EQ(body("ccollections\nOrderedDict\n)R\x8c\x01kNs"),
            R"({"object": "collections.OrderedDict", "args": [], "state": [["k", null]]})"_json);
  EXPECT_EQ(body("cbuiltins\nset\n](Ne\x85R")["object"], "builtins.set");
}

TEST(Pickle, WhatWouldRunCodeIsRefusedByName) {
  const char* wanted = ", which no training arguments need: loading this file would run it";
  for (const char* name :
       {"os\nsystem", "posix\nsystem", "subprocess\nPopen", "builtins\neval", "builtins\nexec", "__builtin__\neval",
        "sys\nexit", "importlib\nimport_module", "runpy\nrun_path", "pickle\nloads", "functools\npartial",
        "operator\nattrgetter", "types\nFunctionType", "socket\nsocket"}) {
    const std::string text = refusal("c"s + name + "\n\x8c\x02id\x85R");
    std::string dotted = name;
    dotted[dotted.find('\n')] = '.';
    EXPECT_EQ(text.substr(0, text.find(" (byte")), "a call of " + dotted + wanted);
  }
  const std::pair<std::string, const char*> opcodes[] = {{"P1\n", "opcode PERSID"},
                                                         {"NQ", "opcode BINPERSID"},
                                                         {"\x82\x01", "opcode EXT1"},
                                                         {"\x83\x01\x01", "opcode EXT2"},
                                                         {"\x84\x01\x01\x01\x01", "opcode EXT4"},
                                                         {"\x97", "opcode NEXT_BUFFER"},
                                                         {"(ios\nsystem\n", "opcode INST"},
                                                         {"(cos\nsystem\n\x8c\x02ido", "opcode OBJ"},
                                                         {"I1\n", "opcode INT"},
                                                         {"S'a'\n", "opcode STRING"},
                                                         {"\xff", "opcode 255, which does not exist"}};
  for (const auto& [bytes, name] : opcodes) EXPECT_EQ(refusal(bytes).substr(0, std::string(name).size()), name);
}

TEST(Pickle, BrokenStreams) {
  EXPECT_NE(read("")["refused"].get<std::string>().find("cut short"), std::string::npos);
  EXPECT_NE(read("}.")["refused"].get<std::string>().find("PROTO"), std::string::npos);
  EXPECT_NE(read("\x80\x01N.")["refused"].get<std::string>().find("protocol 1"), std::string::npos);
  EXPECT_NE(read("\x80\x06N.")["refused"].get<std::string>().find("protocol 6"), std::string::npos);
  EXPECT_NE(read("\x80\x02N")["refused"].get<std::string>().find("cut short"), std::string::npos);
  for (const std::string bytes : {"",
                                  "NN",
                                  "(N",
                                  "0",
                                  "t",
                                  "a",
                                  "Na",
                                  "](Ns",
                                  "}(Nu",
                                  "NNs",
                                  "e",
                                  "h\x07",
                                  "q\x01",
                                  "2",
                                  "1",
                                  "R",
                                  "NNR",
                                  "ca\nb\nNR",
                                  "ca\nb\nN\x81",
                                  "Nb",
                                  "NNb",
                                  "\x93",
                                  "NN\x93",
                                  "c\n\n",
                                  "ca",
                                  "ca\n",
                                  "c a\nb\n",
                                  "X\xff\xff\xff\xff",
                                  "\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
                                  "\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
                                  "\x8b\xff\xff\xff\x7f",
                                  "\x8c\x01\xff",
                                  "(N0b",
                                  "]N\x90",
                                  "\x8fN"
                                  "a"}) {
    EXPECT_NE(refusal(bytes).find(" of the pickle)"), std::string::npos)
        << json(bytes).dump(-1, ' ', true, json::error_handler_t::replace) << " " << refusal(bytes);
  }
  EXPECT_EQ(refusal("NN"), "the pickle ends with 2 values (byte 4 of the pickle)");
  EXPECT_EQ(refusal("\x8b\xff\xff\xff\xff"), "an integer of 4294967295 bytes (byte 2 of the pickle)");
}

TEST(Pickle, CyclesAndBombsAreRefused) {
  EXPECT_EQ(refusal("]q\x01h\x01"
                    "a")
                .substr(0, 30),
            "an object that contains itself");
  EXPECT_EQ(refusal("}q\x01\x8c\x01kh\x01s").substr(0, 30), "an object that contains itself");
  EXPECT_EQ(refusal("cm\nC\n)\x81q\x01}\x8c\x01kh\x01sb").substr(0, 30), "an object that contains itself");
  std::string deep, laughs = "]", copies = "(";
  for (int i = 0; i < 5000; ++i) deep += "]";
  for (int i = 0; i < 4999; ++i) deep += "a";
  EXPECT_EQ(refusal(deep).substr(0, 27), "objects nested deeper than ");
  std::string chain = "]q\x01";  // deep through the memo, where each step is shallow
  for (int i = 0; i < 300; ++i)
    chain +=
        "0](h\x01"
        "eq\x01";
  EXPECT_EQ(refusal(chain).substr(0, 27), "objects nested deeper than ");
  for (int i = 0; i < 60; ++i)
    laughs +=
        "q\x01"
        "0](h\x01h\x01"
        "e";
  EXPECT_NE(refusal(laughs).find("where shared ones are counted each time"), std::string::npos);
  for (int i = 0; i < 50'000; ++i) copies += "N";
  copies +=
      "tq\x01"
      "0cm\nC\nq\x02"
      "0";
  for (int i = 0; i < 100; ++i) copies += "h\x02h\x01R0";
  EXPECT_NE(refusal(copies + "N").find("places in all"), std::string::npos);
  EXPECT_NE(refusal(std::string(300'000, '(')).find("open marks"), std::string::npos);
  EXPECT_NE(refusal(std::string(300'000, ']')).find("more than 200000 values"), std::string::npos);
  EXPECT_NE(refusal("N" + std::string(300'000, '2')).find("more than 200000 values"), std::string::npos);
  EXPECT_NE(refusal("N" + std::string(300'000, '\x94')).find("memo entries"), std::string::npos);
}

TEST(Pickle, SharedNodesAreShared) {
  std::shared_ptr<PickleNode> root;
  std::string error;
  ASSERT_TRUE(read_pickle("\x80\x02]q\x01h\x01\x86."s, &root, &error)) << error;
  EXPECT_EQ(root->items[0], root->items[1]);
}

TEST(Pickle, TheLegacyFormatOfTorchSave) {
  const std::string magic = "\x80\x02\x8a\nl\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", version = "\x80\x02M\xe9\x03.",
                    system = "\x80\x02}.";
  EXPECT_EQ(read(magic + version + system + "\x80\x02K\x07."), json({{"int", "7"}}));
  EXPECT_TRUE(read(magic + version + system).contains("refused"));
}

// --- zip
// --------------------------------------------------------------------------------------------------------------

std::string little(std::uint64_t v, int n) {
  std::string s;
  for (int i = 0; i < n; ++i) s.push_back(static_cast<char>(v >> (8 * i)));
  return s;
}

struct ZipMember {
  std::string name, data;
  std::uint64_t method = 0, flags = 0;
};

/// A zip file as the specification lays it out; `zip64` writes sizes and offsets in the extra field.
std::string zip_of(const std::vector<ZipMember>& members, bool zip64 = false, const std::string& comment = "") {
  std::string out, directory;
  for (const ZipMember& m : members) {
    const std::uint64_t at = out.size(), n = m.data.size();
    const std::uint64_t short_n = zip64 ? 0xFFFFFFFFu : n, short_at = zip64 ? 0xFFFFFFFFu : at;
    const std::string extra = zip64 ? little(1, 2) + little(24, 2) + little(n, 8) + little(n, 8) + little(at, 8) : "";
    out += little(0x04034b50, 4) + little(20, 2) + little(m.flags, 2) + little(m.method, 2) + little(0, 8) +
           little(n, 4) + little(n, 4) + little(m.name.size(), 2) + little(0, 2) + m.name + m.data;
    directory += little(0x02014b50, 4) + little(20, 2) + little(20, 2) + little(m.flags, 2) + little(m.method, 2) +
                 little(0, 8) + little(short_n, 4) + little(short_n, 4) + little(m.name.size(), 2) +
                 little(extra.size(), 2) + little(0, 2) + little(0, 2) + little(0, 2) + little(0, 4) +
                 little(short_at, 4) + m.name + extra;
  }
  const std::uint64_t begin = out.size(), size = directory.size(), n = members.size();
  out += directory;
  if (zip64) {
    const std::uint64_t end64 = out.size();
    out += little(0x06064b50, 4) + little(44, 8) + little(45, 2) + little(45, 2) + little(0, 8) + little(n, 8) +
           little(n, 8) + little(size, 8) + little(begin, 8);
    out += little(0x07064b50, 4) + little(0, 4) + little(end64, 8) + little(1, 4);
    return out + little(0x06054b50, 4) + little(0, 4) + little(0xFFFF, 2) + little(0xFFFF, 2) + little(0xFFFFFFFF, 4) +
           little(0xFFFFFFFF, 4) + little(comment.size(), 2) + comment;
  }
  return out + little(0x06054b50, 4) + little(0, 4) + little(n, 2) + little(n, 2) + little(size, 4) + little(begin, 4) +
         little(comment.size(), 2) + comment;
}

std::string entry_of(const std::string& zip) {
  std::string_view entry;
  std::string error;
  return find_zip_entry(zip, "data.pkl", &entry, &error) ? std::string(entry) : "refused: " + error;
}

TEST(Zip, FindsTheEntryAnywhere) {
  EXPECT_EQ(entry_of(zip_of({{"data.pkl", "x"}})), "x");
  EXPECT_EQ(
      entry_of(zip_of({{"archive/version", "3"}, {"archive/data.pkl", "hello"}, {"archive/byteorder", "little"}})),
      "hello");
  EXPECT_EQ(entry_of(zip_of({{"a/data.pkl", "hello"}}, true)), "hello");
  EXPECT_EQ(entry_of(zip_of({{"a/data.pkl", ""}}, false, "a comment")), "");
}

TEST(Zip, RefusesByName) {
  EXPECT_EQ(entry_of(zip_of({{"a/other", "x"}})), "refused: the zip file holds no data.pkl");
  EXPECT_EQ(entry_of(zip_of({{"a/xdata.pkl", "x"}})), "refused: the zip file holds no data.pkl");
  EXPECT_EQ(entry_of(zip_of({{"a/data.pkl", "x"}, {"b/data.pkl", "y"}})),
            "refused: the zip file holds a/data.pkl and b/data.pkl: which is meant is not clear");
  EXPECT_EQ(entry_of(zip_of({{"a/data.pkl", "x", 8}})),
            "refused: the zip entry a/data.pkl is compressed (method 8); only stored entries are read, as "
            "torch.save and numpy.savez write them");
  EXPECT_EQ(entry_of(zip_of({{"a/data.pkl", "x", 0, 1}})), "refused: the zip entry a/data.pkl is encrypted");
  EXPECT_EQ(entry_of(""), "refused: the zip file has no end record: it is cut short or not a zip file");
}

TEST(Zip, EveryCutAndEveryChangedByteIsHandled) {
  for (const bool zip64 : {false, true}) {
    const std::string good = zip_of({{"archive/version", "3"}, {"archive/data.pkl", "hello"}}, zip64);
    for (std::size_t n = 0; n < good.size(); ++n) EXPECT_EQ(entry_of(good.substr(0, n)).substr(0, 8), "refused:") << n;
    for (std::size_t i = 0; i < good.size(); ++i) {
      for (const char c : {'\0', '\x01', '\x7f', '\xff'}) {
        std::string changed = good;
        changed[i] = c;
        EXPECT_LE(entry_of(changed).size(), 300u);  // either refused, or an entry inside the file
      }
    }
  }
}

TEST(Zip, OverlappingEntriesAreRefused) {
  std::string zip = zip_of({{"a/data.pkl", std::string(100, 'x')}, {"b/other", "y"}});
  const std::size_t second = zip.rfind("b/other") - 46;  // its record in the directory
  const std::string other_name = "a/data.pkl";
  ASSERT_EQ(zip.substr(second, 4), little(0x02014b50, 4));
  zip.replace(second + 42, 4, little(0, 4));          // points at the first entry's header,
  EXPECT_EQ(entry_of(zip).substr(0, 8), "refused:");  // whose name is another
  std::string twice = zip_of({{"a/data.pkl", "x"}, {"a/data.pkx", "y"}});
  const std::size_t record = twice.rfind("a/data.pkx") - 46;
  twice.replace(record + 42, 4, little(0, 4)).replace(record + 46, 10, "a/data.pkl");
  EXPECT_EQ(entry_of(twice), "refused: the zip file holds a/data.pkl and a/data.pkl: which is meant is not clear");
}

TEST(TorchPickle, BareAndZippedAndBroken) {
  namespace fs = std::filesystem;
  const std::string path = (fs::path(testing::TempDir()) / "torch_pickle_test.bin").string();
  const auto write = [&](const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; };
  std::shared_ptr<PickleNode> root;
  std::string error;
  write("\x80\x02K\x05.");
  ASSERT_TRUE(read_torch_pickle(path, &root, &error)) << error;
  EXPECT_EQ(root->integer, 5);
  write(zip_of({{"training_args/data.pkl", "\x80\x02K\x06."}}));
  ASSERT_TRUE(read_torch_pickle(path, &root, &error)) << error;
  EXPECT_EQ(root->integer, 6);
  write(zip_of({{"training_args/data.pkl", "\x80\x02P1\n."}}));
  EXPECT_FALSE(read_torch_pickle(path, &root, &error));
  EXPECT_EQ(error, path + ": opcode PERSID is not read here (byte 2 of the pickle)");
  fs::remove(path);
  EXPECT_FALSE(read_torch_pickle(path, &root, &error));
  EXPECT_EQ(error, path + ": No such file or directory");
}

}  // namespace
}  // namespace moeaudit

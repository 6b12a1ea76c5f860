// Package versions out of text files.
#include <gtest/gtest.h>

#include "audit/inputs/readers.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

Material read(const std::string& name, const std::string& text, bool expected = true) {
  test::TempTree tree;
  Material m;
  EXPECT_EQ(read_versions(tree.write(name, text), &m), expected) << name;
  return m;
}

std::string text_of(const Material& m, std::string_view package) {
  const VersionSet* set = version_of(m, package);
  return set ? to_text(*set) : "unknown";
}
void expect_exact(const Material& m, std::string_view package, std::string_view version) {
  const VersionSet* set = version_of(m, package);
  ASSERT_TRUE(set && set->exact) << package;
  EXPECT_TRUE(*set->exact == *Version::parse(version)) << package << " " << to_text(*set);
}

TEST(Versions, Requirements) {
  const Material m = read("requirements.txt",
                          "# a comment\n"
                          "transformers==4.46.3  # pinned\n"
                          "peft[extra]>=0.13,<0.15 ; python_version < '3.13'\n"
                          "Flash_Attn==2.7.0 \\\n    --hash=sha256:abc\n"
                          "trl (==0.12.0)\n"
                          "numpy\n"
                          "--extra-index-url https://example.invalid/simple\n");
  expect_exact(m, "transformers", "4.46.3");
  expect_exact(m, "flash-attn", "2.7.0");
  expect_exact(m, "trl", "0.12.0");
  const VersionSet* peft = version_of(m, "peft");
  ASSERT_TRUE(peft && !peft->exact);
  EXPECT_TRUE(peft->window.contains(*Version::parse("0.14.0")));
  EXPECT_FALSE(peft->window.contains(*Version::parse("0.15.0")));
  EXPECT_FALSE(peft->window.contains(*Version::parse("0.12.0")));
  EXPECT_EQ(m.versions[0].source.line, 2);
  EXPECT_EQ(m.versions[0].source.role, Role::kVersions);
  EXPECT_TRUE(m.problems.empty());  // numpy without a version concerns nobody
}

TEST(Versions, WhatARequirementDoesNotTellIsSaid) {
  const Material m = read("requirements.txt",
                          "accelerate==1.0.0\n"
                          "transformers @ git+https://example.invalid/transformers@main\n"
                          "-e git+https://example.invalid/peft.git#egg=peft\n"
                          "trl\n"
                          "-r more.txt\n");
  EXPECT_EQ(m.versions.size(), 1u);
  ASSERT_EQ(m.problems.size(), 4u);
  const char* const remedies[] = {"--assume transformers=VERSION", "--assume peft=VERSION", "--assume trl=VERSION",
                                  "give that file too, with --env FILE"};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(m.problems[i].line, i + 2);
    EXPECT_EQ(m.problems[i].remedy, remedies[i]);
    EXPECT_FALSE(m.problems[i].fatal);
  }
}

TEST(Versions, PipList) {
  const Material m = read("packages.txt",
                          "Package           Version\n----------------- -----------\ntransformers      4.57.1\ntorch   "
                          "          2.5.1+cu124\n");
  expect_exact(m, "transformers", "4.57.1");
  expect_exact(m, "torch", "2.5.1");
}

TEST(Versions, UvLock) {
  const Material m = read("uv.lock",
                          "version = 1\nrequires-python = \">=3.11\"\n\n"
                          "[[package]]\nname = \"transformers\"\nversion = \"4.57.1\"\nsource = { registry = "
                          "\"https://example.invalid\" }\n"
                          "dependencies = [\n    { name = \"numpy\", version = \"9.9.9\" },\n]\n\n"
                          "[package.metadata]\nversion = \"0.0.0\"\n\n"
                          "[[package]]\nname = \"torch\"\nversion = \"2.5.1\"\n\n"
                          "[[package]]\nname = \"torch\"\nversion = \"2.6.0\"\n");
  expect_exact(m, "transformers", "4.57.1");
  EXPECT_EQ(m.versions.size(), 1u);
  EXPECT_EQ(m.versions[0].source.line, 6);
  ASSERT_EQ(m.problems.size(), 1u);  // two torches for two platforms: nobody can tell which
  EXPECT_NE(m.problems[0].what.find("2.5.1, 2.6.0"), std::string::npos) << m.problems[0].what;
}

TEST(Versions, PoetryLock) {
  const Material m = read("poetry.lock",
                          "[[package]]\nname = \"peft\"\nversion = \"0.18.0\"\ndescription = "
                          "\"x\"\n\n[package.dependencies]\ntorch = \">=1.13\"\n");
  expect_exact(m, "peft", "0.18.0");
  EXPECT_EQ(m.versions.size(), 1u);
}

TEST(Versions, ModelCards) {
  const Material peft = read("README.md", "# Card\n- PEFT 9.9\n\n### Framework versions\n\n- PEFT 0.14.0");
  expect_exact(peft, "peft", "0.14.0");
  EXPECT_EQ(peft.versions.size(), 1u);  // the line above the heading is prose
  const Material trl = read("README.md",
                            "### Framework versions\n\n- TRL: 1.16.0\n- Transformers: 5.23.0\n- Pytorch: "
                            "2.13.0+cpu\n\n## Citations\n- TRL: 0.0\n");
  expect_exact(trl, "trl", "1.16.0");
  expect_exact(trl, "transformers", "5.23.0");
  expect_exact(trl, "torch", "2.13.0");
  EXPECT_EQ(trl.versions.size(), 3u);
  const Material axolotl =
      read("README.md",
           "<details><summary>See axolotl config</summary>\n\naxolotl version: `0.9.2`\n```yaml\nbase_model: x\n```\n");
  expect_exact(axolotl, "axolotl", "0.9.2");
  read("README.md", "# just a readme\n- transformers 4.0\n", false);
}

TEST(Versions, RealModelCards) {
  Material m;
  ASSERT_TRUE(read_versions(test::fixture("runs/mixtral-sft-trl/README.md"), &m));
  expect_exact(m, "transformers", "5.23.0");
  expect_exact(m, "trl", "1.16.0");
  expect_exact(m, "torch", "2.13.0");
  expect_exact(m, "datasets", "5.2.0");
  expect_exact(m, "tokenizers", "0.23.3");
  Material adapter;
  ASSERT_TRUE(read_versions(test::fixture("runs/mixtral-qlora-broken/checkpoint-10/README.md"), &adapter));
  expect_exact(adapter, "peft", "0.14.0");
  EXPECT_EQ(adapter.versions.size(), 1u);
}

TEST(Versions, TextThatIsNone) {
  read("notes.txt", "the loss went up\nat step 100\n", false);
  read("train.yml", "transformers==4.0\n", false);
  read("uv.lock", "version = 1\n", false);
  read("empty.txt", "", false);
  read("binary.txt", std::string("\0\xff\x01==\n", 6), false);
}

TEST(Versions, Assumptions) {
  Material m;
  read_assumption("Transformers", "4.57.1", &m);
  read_assumption("peft", ">=0.18,<0.19", &m);
  EXPECT_TRUE(m.problems.empty());
  expect_exact(m, "transformers", "4.57.1");
  EXPECT_EQ(m.versions[0].source.role, Role::kCommandLine);
  EXPECT_EQ(m.versions[0].source.key, "--assume transformers");
  read_assumption("trl", "latest", &m);
  read_assumption("numpy", "1.0", &m);
  ASSERT_EQ(m.problems.size(), 2u);
  EXPECT_TRUE(m.problems[0].fatal && m.problems[1].fatal);
  EXPECT_EQ(text_of(m, "trl"), "unknown");
}

}  // namespace
}  // namespace moeaudit

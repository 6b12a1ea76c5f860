// Host tool of the build: turns audit/families/*.yaml and audit/behaviours/*.yaml into constant C++ tables.
//   compile_tables <families-dir> <behaviours-dir> <out-dir>     writes families.cc, behaviours.cc and advisories.cc (<behaviours-dir>/advisories)
// It is the only reader of these files, so it checks them hard: a mistake stops the build with file, line and remedy.
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

#include "cmake/table_yaml.h"

namespace {

namespace fs = std::filesystem;

void write_file(const fs::path& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  if (!out.flush()) throw std::runtime_error(path.string() + ": error: cannot be written");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: compile_tables <families-dir> <behaviours-dir> <out-dir>\n";
    return 2;
  }
  try {
    fs::create_directories(argv[3]);
    write_file(fs::path(argv[3]) / "families.cc", tables::families_source(argv[1]));
    write_file(fs::path(argv[3]) / "behaviours.cc", tables::behaviours_source(argv[2]));
    write_file(fs::path(argv[3]) / "advisories.cc", tables::advisories_source(fs::path(argv[2]) / "advisories"));
  } catch (const std::exception& e) {
    std::cerr << e.what() << '\n';
    return 1;
  }
  return 0;
}

// Recursive descent over the tokens, after the grammar in PyYAML's parser.py; composing (anchors) happens on the way.
#include "audit/text/yaml_parser.h"

#include <initializer_list>
#include <optional>

#include "audit/text/yaml_scalar.h"

namespace moeaudit {
namespace {

using Kind = YamlToken::Kind;

class YamlParser {
 public:
  YamlParser(std::string_view text, const TextLimits& limits)
      : scanner_(text, limits.max_depth), max_depth_(limits.max_depth), max_nodes_(limits.max_nodes) {}

  YamlGraph parse() {
    scanner_.take();  // the start of the stream
    set_default_handles();
    if (!next_is({Kind::kDirective, Kind::kDocumentStart, Kind::kStreamEnd})) {
      graph_.empty = false;
      graph_.root = node(true, false);
      if (next_is({Kind::kDocumentEnd})) scanner_.take();
    } else if (document_start()) {
      graph_.empty = false;
      const bool nothing = next_is({Kind::kDirective, Kind::kDocumentStart, Kind::kDocumentEnd, Kind::kStreamEnd});
      graph_.root = nothing ? empty_scalar() : node(true, false);
      if (next_is({Kind::kDocumentEnd})) scanner_.take();
    }
    if (!graph_.empty && document_start())
      fail(document_start_, "a second document begins: only one can be read from a file");
    return std::move(graph_);
  }

 private:
  [[noreturn]] static void fail(const YamlToken& token, std::string what) {
    throw YamlFault{{token.mark.line + 1, token.mark.column(), std::move(what)}};
  }
  bool next_is(std::initializer_list<Kind> kinds) {
    const Kind next = scanner_.peek().kind;
    for (const Kind kind : kinds) {
      if (kind == next) return true;
    }
    return false;
  }
  [[noreturn]] void unexpected(const char* wanted, const char* what, const YamlMark& start) {
    fail(scanner_.peek(), std::string("expected ") + wanted + " in the " + what + " that starts in line " +
                              std::to_string(start.line + 1) + ", found " + name_of(scanner_.peek().kind));
  }

  void set_default_handles() {
    handles_.emplace("!", "!");
    handles_.emplace("!!", kYamlTagPrefix);
  }

  /// Skips '...' and reads directives and '---'. False at the end of the stream.
  bool document_start() {
    while (next_is({Kind::kDocumentEnd})) scanner_.take();
    if (next_is({Kind::kStreamEnd})) return false;
    handles_.clear();
    bool version_seen = false;
    while (next_is({Kind::kDirective})) {
      const YamlToken token = scanner_.take();
      if (token.has_handle) {
        if (!handles_.emplace(token.handle, token.text).second)
          fail(token, "a second %TAG for the handle " + token.handle);
      } else if (token.text == "YAML") {
        if (version_seen) fail(token, "a second %YAML directive");
        if (token.major_version != 1) fail(token, "YAML of another major version than 1");
        version_seen = true;
      }
    }
    set_default_handles();
    if (!next_is({Kind::kDocumentStart})) {
      fail(scanner_.peek(), std::string("expected the end of the file or '---', found ") +
                                name_of(scanner_.peek().kind) + ": is it indented like what it belongs to?");
    }
    document_start_ = scanner_.take();
    return true;
  }

  std::size_t add(YamlNode node) {
    if (graph_.nodes.size() >= max_nodes_) {
      throw YamlFault{{node.mark.line + 1, node.mark.column(), "more than " + std::to_string(max_nodes_) + " values"}};
    }
    graph_.nodes.push_back(std::move(node));
    return graph_.nodes.size() - 1;
  }

  std::size_t empty_scalar() {
    YamlNode n;
    n.implicit = true;
    n.mark = scanner_.peek().mark;
    return add(std::move(n));
  }

  struct Properties {
    std::optional<YamlToken> anchor, tag;
    std::string full_tag;
  };

  Properties properties() {
    Properties p;
    for (int i = 0; i < 2; ++i) {
      if (!p.anchor && next_is({Kind::kAnchor}))
        p.anchor = scanner_.take();
      else if (!p.tag && next_is({Kind::kTag}))
        p.tag = scanner_.take();
    }
    if (!p.tag) return p;
    p.full_tag = p.tag->text;
    if (!p.tag->has_handle) return p;
    const auto prefix = handles_.find(p.tag->handle);
    if (prefix == handles_.end()) fail(*p.tag, "a tag handle that no %TAG declares: " + p.tag->handle);
    p.full_tag = prefix->second + p.tag->text;
    return p;
  }

  std::size_t alias() {
    const YamlToken token = scanner_.take();
    const auto anchor = anchors_.find(token.text);
    if (anchor == anchors_.end())
      fail(token, "the alias *" + token.text + " has no anchor &" + token.text + " before it");
    return anchor->second;
  }

  /// Any node. `block`: block collections may start here; `indentless`: a list that is not indented, too.
  std::size_t node(bool block, bool indentless) {
    if (next_is({Kind::kAlias})) return alias();
    if (++depth_ > max_depth_) fail(scanner_.peek(), "nested deeper than " + std::to_string(max_depth_) + " levels");
    const Properties p = properties();
    YamlNode n;
    n.mark = p.anchor ? p.anchor->mark : p.tag ? p.tag->mark : scanner_.peek().mark;
    n.tag = p.full_tag == "!" ? "" : p.full_tag;
    const bool list_here = indentless && next_is({Kind::kBlockEntry});
    const bool block_list = block && next_is({Kind::kBlockSequenceStart});
    const bool block_map = block && next_is({Kind::kBlockMappingStart});
    if (next_is({Kind::kScalar})) {
      YamlToken token = scanner_.take();
      n.implicit = (token.plain && !p.tag) || p.full_tag == "!";
      n.text = std::move(token.text);
      n.mark = p.anchor || p.tag ? n.mark : token.mark;
    } else if (list_here || block_list || next_is({Kind::kFlowSequenceStart})) {
      n.kind = YamlNode::Kind::kSequence;
    } else if (block_map || next_is({Kind::kFlowMappingStart})) {
      n.kind = YamlNode::Kind::kMapping;
    } else if (p.anchor || p.tag) {
      n.implicit = n.tag.empty();
    } else {
      fail(scanner_.peek(), std::string("expected a value, found ") + name_of(scanner_.peek().kind));
    }
    const std::size_t self = add(std::move(n));
    if (p.anchor && !anchors_.emplace(p.anchor->text, self).second) {
      fail(*p.anchor, "the anchor &" + p.anchor->text + " is there twice");
    }
    if (graph_.nodes[self].kind != YamlNode::Kind::kScalar) collection(self, list_here, block_list || block_map);
    --depth_;
    return self;
  }

  void collection(std::size_t self, bool indentless, bool block) {
    const bool list = graph_.nodes[self].kind == YamlNode::Kind::kSequence;
    std::vector<std::size_t> children = indentless      ? indentless_list()
                                        : list && block ? block_list()
                                        : block         ? block_map()
                                        : list          ? flow_list()
                                                        : flow_map();
    graph_.nodes[self].children = std::move(children);
  }

  /// A node, or nothing where one of `ends` follows.
  std::size_t node_unless(std::initializer_list<Kind> ends, bool block, bool indentless) {
    return next_is(ends) ? empty_scalar() : node(block, indentless);
  }

  std::vector<std::size_t> block_list() {
    std::vector<std::size_t> items;
    const YamlMark start = scanner_.take().mark;
    while (next_is({Kind::kBlockEntry})) {
      scanner_.take();
      items.push_back(node_unless({Kind::kBlockEntry, Kind::kBlockEnd}, true, false));
    }
    if (!next_is({Kind::kBlockEnd})) unexpected("'- ' or less indentation", "list", start);
    scanner_.take();
    return items;
  }

  std::vector<std::size_t> indentless_list() {
    std::vector<std::size_t> items;
    while (next_is({Kind::kBlockEntry})) {
      scanner_.take();
      items.push_back(node_unless({Kind::kBlockEntry, Kind::kKey, Kind::kValue, Kind::kBlockEnd}, true, false));
    }
    return items;
  }

  std::vector<std::size_t> block_map() {
    std::vector<std::size_t> pairs;
    const YamlMark start = scanner_.take().mark;
    while (next_is({Kind::kKey})) {
      scanner_.take();
      pairs.push_back(node_unless({Kind::kKey, Kind::kValue, Kind::kBlockEnd}, true, true));
      if (next_is({Kind::kValue})) {
        scanner_.take();
        pairs.push_back(node_unless({Kind::kKey, Kind::kValue, Kind::kBlockEnd}, true, true));
      } else {
        pairs.push_back(empty_scalar());
      }
    }
    if (!next_is({Kind::kBlockEnd})) unexpected("a key or less indentation", "mapping", start);
    scanner_.take();
    return pairs;
  }

  /// KEY node? (VALUE node?)? inside brackets, from the key on.
  void flow_pair(Kind end, std::vector<std::size_t>* pairs) {
    scanner_.take();
    pairs->push_back(node_unless({Kind::kValue, Kind::kFlowEntry, end}, false, false));
    if (next_is({Kind::kValue})) {
      scanner_.take();
      pairs->push_back(node_unless({Kind::kFlowEntry, end}, false, false));
    } else {
      pairs->push_back(empty_scalar());
    }
  }

  void flow_separator(const char* wanted, const char* what, const YamlMark& start) {
    if (!next_is({Kind::kFlowEntry})) unexpected(wanted, what, start);
    scanner_.take();
  }

  std::vector<std::size_t> flow_list() {
    constexpr Kind kEnd = Kind::kFlowSequenceEnd;
    std::vector<std::size_t> items;
    const YamlMark start = scanner_.take().mark;
    for (bool first = true; !next_is({kEnd}); first = false) {
      if (!first) flow_separator("',' or ']'", "list", start);
      if (next_is({Kind::kKey})) {  // [a: b] holds a mapping of one pair
        YamlNode pair;
        pair.kind = YamlNode::Kind::kMapping;
        pair.mark = scanner_.peek().mark;
        const std::size_t self = add(std::move(pair));
        std::vector<std::size_t> children;
        flow_pair(kEnd, &children);
        graph_.nodes[self].children = std::move(children);
        items.push_back(self);
      } else if (!next_is({kEnd})) {
        items.push_back(node(false, false));
      }
    }
    scanner_.take();
    return items;
  }

  std::vector<std::size_t> flow_map() {
    constexpr Kind kEnd = Kind::kFlowMappingEnd;
    std::vector<std::size_t> pairs;
    const YamlMark start = scanner_.take().mark;
    for (bool first = true; !next_is({kEnd}); first = false) {
      if (!first) flow_separator("',' or '}'", "mapping", start);
      if (next_is({Kind::kKey})) {
        flow_pair(kEnd, &pairs);
      } else if (!next_is({kEnd})) {
        pairs.push_back(node(false, false));
        pairs.push_back(empty_scalar());
      }
    }
    scanner_.take();
    return pairs;
  }

  YamlScanner scanner_;
  YamlToken document_start_;
  YamlGraph graph_;
  std::map<std::string, std::size_t, std::less<>> anchors_;
  std::map<std::string, std::string, std::less<>> handles_;
  int depth_ = 0, max_depth_;
  std::size_t max_nodes_;
};

}  // namespace

YamlGraph parse_yaml_graph(std::string_view text, const TextLimits& limits) { return YamlParser(text, limits).parse(); }

}  // namespace moeaudit

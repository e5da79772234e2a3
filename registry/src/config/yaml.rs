//! YAML and JSON texts to trees of located nodes.
//!
//! Scalars follow the core schema of YAML 1.2 where Kubernetes agrees with it: `true` and `false` are the only
//! booleans, quoted text stays text, and what the two would read differently (`0755`, `yes`) stays text as well,
//! so that the message about the field says what to write.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use granit_parser::{Event, Marker, Parser, ScalarStyle, Span, Tag};
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Number, Value};

use super::node::{Content, Entry, Location, Node, quoted};

/// Longest text that is read, in bytes.
pub const MAX_TEXT: usize = 32 << 20;
/// How deep maps and lists may be nested.
pub const MAX_DEPTH: usize = 64;
/// How many nodes all aliases of a text may stand for.
pub const MAX_ALIASED: usize = 100_000;

/// After so many documents with an error in their syntax the rest is not read.
const MAX_SYNTAX_ERRORS: usize = 100;

/// What is wrong with the text itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyntaxError {
    /// Where.
    pub at: Location,
    /// What.
    pub message: String,
}

/// The documents of a text and what is wrong with it. A document with an error in its syntax is left out, and
/// reading goes on with the next one.
#[must_use]
pub fn read(text: &str) -> (Vec<Node>, Vec<SyntaxError>) {
    if text.len() > MAX_TEXT {
        let message = format!("the text must have at most {MAX_TEXT} bytes, it has {}", text.len());
        return (Vec::new(), vec![SyntaxError { at: Location { line: 1, column: 1 }, message }]);
    }
    let mut loader = Loader::default();
    let options = granit_parser::options! { emit_comments: false };
    let mut parser = Parser::new_from_str_with_options(text, options);
    while let Some(next) = parser.next_event() {
        let error = match next {
            Ok((event, span)) => match loader.event(event, &span) {
                Ok(()) => continue,
                Err(error) => error,
            },
            Err(error) => match json(text) {
                Some(documents) => return (documents, Vec::new()),
                None => SyntaxError { at: place(error.marker()), message: error.info() },
            },
        };
        loader.abandon(error);
        let more = parser.proceed_next_document().unwrap_or(false);
        if !more || loader.errors.len() >= MAX_SYNTAX_ERRORS {
            break;
        }
    }
    (loader.documents, loader.errors)
}

/// As [`read`], of one value that was read already; its nodes have no places.
#[must_use]
pub fn of_value(value: &Value) -> (Vec<Node>, Vec<SyntaxError>) {
    let node = Node::from_json(value);
    if measure(&node).1 <= MAX_DEPTH {
        return (vec![node], Vec::new());
    }
    (Vec::new(), vec![SyntaxError { at: Location::default(), message: too_deep() }])
}

fn too_deep() -> String {
    format!("maps and lists may be nested {MAX_DEPTH} deep at most")
}

/// JSON that the YAML parser does not take: the tree is the same, without places.
fn json(text: &str) -> Option<Vec<Node>> {
    if !text.trim_start().starts_with(['{', '[']) {
        return None;
    }
    let documents: Result<Vec<JsonNode>, _> = serde_json::Deserializer::from_str(text).into_iter().collect();
    let documents: Vec<Node> = documents.ok()?.into_iter().map(|JsonNode(node)| node).collect();
    documents.iter().all(|document| measure(document).1 <= MAX_DEPTH).then_some(documents)
}

/// A tree read by serde, which refuses keys that are there twice.
struct JsonNode(Node);

impl<'de> Deserialize<'de> for JsonNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let content = deserializer.deserialize_any(JsonVisitor)?;
        Ok(Self(Node { at: Location::default(), content }))
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Content, E> {
        Number::from_f64(value).map(Content::Number).ok_or_else(|| E::custom("a number without value"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Content, E> {
        Ok(Content::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Content, A::Error> {
        let mut out = Vec::new();
        while let Some(JsonNode(node)) = items.next_element()? {
            out.push(node);
        }
        Ok(Content::List(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let mut seen = BTreeSet::new();
        let mut out = Vec::new();
        while let Some((key, JsonNode(value))) = map.next_entry::<String, JsonNode>()? {
            if !seen.insert(key.clone()) {
                return Err(de::Error::custom("a key is there twice"));
            }
            out.push(Entry { key, at: Location::default(), value });
        }
        Ok(Content::Map(out))
    }
}

fn place(marker: &Marker) -> Location {
    let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Location { line: narrow(marker.line()), column: narrow(marker.col().saturating_add(1)) }
}

/// A collection that is being read.
struct Frame {
    at: Location,
    anchor: usize,
    collected: Collected,
}

enum Collected {
    List(Vec<Node>),
    Map(OpenMap),
}

#[derive(Default)]
struct OpenMap {
    entries: Vec<Entry>,
    seen: BTreeMap<String, Location>,
    /// The key whose value comes next.
    key: Option<(Key, Location)>,
    merges: Vec<Node>,
}

enum Key {
    Name(String),
    Merge,
}

#[derive(Default)]
struct Loader {
    documents: Vec<Node>,
    errors: Vec<SyntaxError>,
    stack: Vec<Frame>,
    anchors: BTreeMap<usize, Node>,
    aliased: usize,
}

type Step = Result<(), SyntaxError>;

fn fail<T>(at: Location, message: impl Into<String>) -> Result<T, SyntaxError> {
    Err(SyntaxError { at, message: message.into() })
}

impl Loader {
    #[expect(clippy::wildcard_enum_match_arm, reason = "events without a value, and those still to come")]
    fn event(&mut self, event: Event<'_>, span: &Span) -> Step {
        let at = place(&span.start);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let content = scalar(&text, style, tag.as_deref(), at)?;
                let merge = style == ScalarStyle::Plain && text == "<<";
                self.value(Node { at, content }, anchor, merge)
            }
            Event::SequenceStart(_, anchor, tag) => {
                collection_tag(tag.as_deref(), "seq", at)?;
                self.open(at, anchor, Collected::List(Vec::new()))
            }
            Event::MappingStart(_, anchor, tag) => {
                collection_tag(tag.as_deref(), "map", at)?;
                self.open(at, anchor, Collected::Map(OpenMap::default()))
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(),
            Event::Alias(anchor) => self.alias(anchor, at),
            Event::UnresolvedAlias(name) => fail(at, format!("no anchor &{name} comes before this alias")),
            Event::DocumentEnd => {
                self.anchors.clear();
                Ok(())
            }
            // Starts, ends and comments carry no value; the enum may grow such events.
            _ => Ok(()),
        }
    }

    /// The document that is being read has an error; its parts are dropped.
    fn abandon(&mut self, error: SyntaxError) {
        self.errors.push(error);
        self.stack.clear();
        self.anchors.clear();
    }

    fn open(&mut self, at: Location, anchor: usize, collected: Collected) -> Step {
        if self.stack.len() >= MAX_DEPTH {
            return fail(at, too_deep());
        }
        if let Some(Frame { collected: Collected::Map(map), .. }) = self.stack.last()
            && map.key.is_none()
        {
            return fail(at, "a key must be text, found a list or a map");
        }
        self.stack.push(Frame { at, anchor, collected });
        Ok(())
    }

    fn close(&mut self) -> Step {
        let Some(frame) = self.stack.pop() else { return Ok(()) };
        let content = match frame.collected {
            Collected::List(items) => Content::List(items),
            Collected::Map(map) => Content::Map(self.merged(map)),
        };
        self.value(Node { at: frame.at, content }, frame.anchor, false)
    }

    /// Adds what `<<` brings; keys that are written win, then the earlier map.
    fn merged(&mut self, map: OpenMap) -> Vec<Entry> {
        let OpenMap { mut entries, mut seen, merges, .. } = map;
        for node in merges {
            let at = node.at;
            let sources = if let Content::List(items) = node.content { items } else { vec![node] };
            for source in sources {
                let Content::Map(more) = source.content else {
                    let message =
                        "<< must be followed by an alias of a map or a list of such aliases".to_owned();
                    self.errors.push(SyntaxError { at, message });
                    continue;
                };
                for entry in more {
                    if !seen.contains_key(&entry.key) {
                        seen.insert(entry.key.clone(), entry.at);
                        entries.push(entry);
                    }
                }
            }
        }
        entries
    }

    fn alias(&mut self, anchor: usize, at: Location) -> Step {
        let Some(node) = self.anchors.get(&anchor) else {
            return fail(at, "an alias may not stand inside what it stands for");
        };
        let (nodes, depth) = measure(node);
        self.aliased = self.aliased.saturating_add(nodes);
        if self.aliased > MAX_ALIASED {
            return fail(at, format!("the aliases of this text stand for more than {MAX_ALIASED} values"));
        }
        if self.stack.len() + depth > MAX_DEPTH {
            return fail(at, too_deep());
        }
        let node = node.clone();
        self.value(node, 0, false)
    }

    /// A value is complete: it belongs to the collection around it, or is a document.
    fn value(&mut self, node: Node, anchor: usize, merge: bool) -> Step {
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
            self.aliased = self.aliased.saturating_add(measure(&node).0);
            if self.aliased > MAX_ALIASED {
                return fail(
                    node.at,
                    format!("the anchors of this text stand for more than {MAX_ALIASED} values"),
                );
            }
        }
        let Some(frame) = self.stack.last_mut() else {
            self.documents.push(node);
            return Ok(());
        };
        match &mut frame.collected {
            Collected::List(items) => items.push(node),
            Collected::Map(map) => match map.key.take() {
                None => {
                    let key = if merge { Key::Merge } else { Key::Name(key_text(&node)?) };
                    map.key = Some((key, node.at));
                }
                Some((Key::Merge, _)) => map.merges.push(node),
                Some((Key::Name(key), at)) => {
                    if let Some(first) = map.seen.get(&key) {
                        let message = format!("the key {key} is written twice, first in line {}", first.line);
                        self.errors.push(SyntaxError { at, message });
                    } else {
                        map.seen.insert(key.clone(), at);
                        map.entries.push(Entry { key, at, value: node });
                    }
                }
            },
        }
        Ok(())
    }
}

/// How many nodes a tree has, and how deep it is.
fn measure(node: &Node) -> (usize, usize) {
    let children: Vec<(usize, usize)> = match &node.content {
        Content::List(items) => items.iter().map(measure).collect(),
        Content::Map(entries) => entries.iter().map(|entry| measure(&entry.value)).collect(),
        Content::Null | Content::Bool(_) | Content::Number(_) | Content::String(_) => return (1, 0),
    };
    let nodes = children.iter().map(|(nodes, _)| nodes).sum::<usize>() + 1;
    let depth = children.iter().map(|(_, depth)| *depth).max().unwrap_or(0) + 1;
    (nodes, depth)
}

fn key_text(node: &Node) -> Result<String, SyntaxError> {
    match &node.content {
        Content::String(text) => Ok(text.clone()),
        Content::Number(number) => Ok(number.to_string()),
        Content::Bool(value) => Ok(value.to_string()),
        Content::Null | Content::List(_) | Content::Map(_) => {
            fail(node.at, format!("a key must be text, found {}", node.describe()))
        }
    }
}

fn collection_tag(tag: Option<&Tag>, core: &str, at: Location) -> Step {
    match tag {
        None => Ok(()),
        Some(tag) if tag.core_suffix() == Some(core) => Ok(()),
        Some(tag) => fail(at, format!("the tag {} cannot be used here", tag.original())),
    }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>, at: Location) -> Result<Content, SyntaxError> {
    let plain = style == ScalarStyle::Plain;
    let Some(tag) = tag else {
        return Ok(if plain { resolve(text) } else { Content::String(text.to_owned()) });
    };
    let content = match tag.core_suffix() {
        Some("str") => return Ok(Content::String(text.to_owned())),
        Some("int" | "float" | "bool" | "null") => resolve(text),
        _ if tag.original() == "!" => return Ok(Content::String(text.to_owned())),
        _ => return fail(at, format!("the tag {} cannot be used here", tag.original())),
    };
    let fits = match (&content, tag.core_suffix()) {
        (Content::Number(number), Some("int")) => !number.is_f64(),
        (Content::Number(_), Some("float"))
        | (Content::Bool(_), Some("bool"))
        | (Content::Null, Some("null")) => true,
        _ => false,
    };
    if fits { Ok(content) } else { fail(at, format!("{} is no {}", quoted(text), tag.original())) }
}

/// What unquoted text stands for.
fn resolve(text: &str) -> Content {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Content::Null,
        "true" | "True" | "TRUE" => return Content::Bool(true),
        "false" | "False" | "FALSE" => return Content::Bool(false),
        _ => {}
    }
    match number(text) {
        Some(number) => Content::Number(number),
        None => Content::String(text.to_owned()),
    }
}

fn number(text: &str) -> Option<Number> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, text.get(1..)?),
        b'+' => (false, text.get(1..)?),
        _ => (false, text),
    };
    for (prefix, radix) in [("0x", 16), ("0o", 8)] {
        if let Some(rest) = text.strip_prefix(prefix) {
            let plain = rest.bytes().all(|b| b.is_ascii_alphanumeric());
            return u64::from_str_radix(rest, radix).ok().filter(|_| plain).map(Number::from);
        }
    }
    let whole = digits.bytes().take_while(u8::is_ascii_digit).count();
    let rest = digits.get(whole..)?;
    // A leading zero means octal to some and nothing to others.
    if whole > 1 && digits.starts_with('0') {
        return None;
    }
    if rest.is_empty() {
        if !negative && let Ok(n) = digits.parse::<u64>() {
            return Some(Number::from(n));
        }
        if let Ok(n) = text.strip_prefix('+').unwrap_or(text).parse::<i64>() {
            return Some(Number::from(n));
        }
    } else if !is_fraction(whole, rest) {
        return None;
    }
    text.parse::<f64>().ok().and_then(Number::from_f64)
}

/// Is this what may follow the whole part of a number?
fn is_fraction(whole: usize, rest: &str) -> bool {
    let (fraction, exponent) = match rest.find(['e', 'E']) {
        Some(position) => (rest.get(..position).unwrap_or(""), rest.get(position + 1..)),
        None => (rest, None),
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let fraction_fits = match fraction.strip_prefix('.') {
        Some("") => whole > 0,
        Some(after) => digits(after),
        None => fraction.is_empty() && whole > 0,
    };
    fraction_fits && exponent.is_none_or(|e| digits(e.strip_prefix(['-', '+']).unwrap_or(e)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[track_caller]
    fn check(text: &str, expected: Value) {
        let (documents, errors) = read(text);
        assert_eq!(errors, [], "{text}");
        let got: Vec<Value> = documents.iter().map(Node::to_json).collect();
        assert_eq!(Value::Array(got), expected, "{text}");
    }

    #[track_caller]
    fn check_error(text: &str, line: u32, column: u32, fragment: &str) {
        let (_, errors) = read(text);
        let error = errors.first().expect("an error");
        assert_eq!((error.at.line, error.at.column), (line, column), "{error:?}");
        assert!(error.message.contains(fragment), "{error:?}");
    }

    #[test]
    fn scalars_are_read_as_kubernetes_and_the_core_schema_agree() {
        check("[true, false, yes, on, no]", json!([[true, false, "yes", "on", "no"]]));
        check("[1, -7, +3, 0, 0755, 08, 0x1F, 0o17]", json!([[1, -7, 3, 0, "0755", "08", 31, 15]]));
        check("[1.5, .5, 1., 1e3, 1.2.3, 1_000, .]", json!([[1.5, 0.5, 1.0, 1000.0, "1.2.3", "1_000", "."]]));
        check("[\"1\", '2', ~, null, '', .inf, 10s]", json!([["1", "2", null, null, "", ".inf", "10s"]]));
        check("18446744073709551615", json!([18_446_744_073_709_551_615_u64]));
        check("!!str 5", json!(["5"]));
        check("a: |\n  x\n  y\nb: >\n  x\n  y\n", json!([{"a": "x\ny\n", "b": "x y\n"}]));
        check("8080: x\ntrue: y\n", json!([{"8080": "x", "true": "y"}]));
    }

    #[test]
    fn documents_anchors_and_merges_are_read() {
        check("a: 1\n---\nb: 2\n...\n", json!([{"a": 1}, {"b": 2}]));
        check("x: &x {a: 1, b: 2}\ny: *x\n", json!([{"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 2}}]));
        check(
            "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n",
            json!([{"x": {"a": 1, "b": 2}, "y": {"b": 3, "a": 1}}]),
        );
        check("{\"a\": \"\\u00e9\\/\", \"b\": [1,2]}", json!([{"a": "é/", "b": [1, 2]}]));
        check("{\n\t\"a\": \"\\ud83d\\ude00\"\n}", json!([{"a": "\u{1f600}"}]));
    }

    #[test]
    fn places_are_of_keys_and_values() {
        let (documents, _) = read("spec:\n  http:\n  - route: [{weight: 5}]\n");
        let http = documents[0].get("spec").unwrap().entry("http").unwrap();
        assert_eq!(http.at, Location { line: 2, column: 3 });
        let path = super::super::node::Path::spec().key("http").index(0).key("route").index(0).key("weight");
        assert_eq!(documents[0].locate(&path), Location { line: 3, column: 22 });
    }

    #[test]
    fn bad_texts_are_refused_with_a_place() {
        check_error("a: 1\nb: 2\na: 3\n", 3, 1, "written twice, first in line 1");
        check_error("a: *x\n", 1, 4, "");
        check_error("a: [1, 2\nb: 3\n", 2, 2, "");
        check_error("a: !foo 1\n", 1, 9, "tag !foo");
        check_error("? [a]\n: 1\n", 1, 3, "a key must be text");
        let deep = "[".repeat(100) + &"]".repeat(100);
        check_error(&deep, 1, 65, "nested");
    }

    #[test]
    fn documents_after_a_bad_one_are_read() {
        let (documents, errors) = read("a: [1\n---\nb: 2\n---\n? [x]\n: 1\n---\nc: 3\n");
        let got: Vec<Value> = documents.iter().map(Node::to_json).collect();
        assert_eq!(got, [json!({"b": 2}), json!({"c": 3})]);
        assert_eq!(errors.iter().map(|error| error.at.line).collect::<Vec<_>>(), [1, 5]);
    }

    #[test]
    fn a_billion_laughs_are_refused() {
        let mut text = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n".to_owned();
        for i in 1..12 {
            let before = format!("*a{}", i - 1);
            let items = vec![before; 9].join(", ");
            text.push_str(&format!("a{i}: &a{i} [{items}]\n"));
        }
        let (_, errors) = read(&text);
        assert!(errors[0].message.contains("stand for more than"), "{errors:?}");
    }
}

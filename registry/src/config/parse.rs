//! Texts to objects, with every mistake told at once.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde_json::{Value, json};

use super::decode::{Decode, Decoder, Finding, nearest};
use super::node::{Content, Entry, Location, Node, Path, Segment, quoted};
use super::object::{Kind, Object, Spec, seconds};
use super::validate::{Checker, Remark, grammar, validate_spec};
use super::written::Memo;
use super::yaml;
use crate::model::mesh::MeshConfig;

/// A mistake in a configuration text: `mesh/reviews.yaml:14:7: spec.http[0].timeout: must be ...`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", told(file, *line, *column, path, message))]
pub struct ConfigError {
    /// The file, as it was given.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
    /// Which value; empty when the text itself cannot be read.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Something that is accepted and should be known; shown as [`ConfigError`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The file, as it was given.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
    /// Which value.
    pub path: String,
    /// What to know.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&told(&self.file, self.line, self.column, &self.path, &self.message))
    }
}

fn told(file: &str, line: u32, column: u32, path: &str, message: &str) -> String {
    if path.is_empty() {
        format!("{file}:{line}:{column}: {message}")
    } else {
        format!("{file}:{line}:{column}: {path}: {message}")
    }
}

/// Reads the objects of a YAML or JSON text and checks each of them.
///
/// Several documents, `List` objects and empty documents are possible. Objects that name no namespace are in
/// `default`.
///
/// # Errors
///
/// Every mistake of the text, in the order of its lines. Nothing is returned of a text with a mistake.
pub fn parse(file_name: &str, text: &str) -> Result<(Vec<Object>, Vec<Warning>), Vec<ConfigError>> {
    parse_in("default", file_name, text)
}

/// Like [`parse`], with objects that name no namespace in `namespace`.
///
/// # Errors
///
/// As [`parse`].
pub fn parse_in(
    namespace: &str,
    file_name: &str,
    text: &str,
) -> Result<(Vec<Object>, Vec<Warning>), Vec<ConfigError>> {
    objects(namespace, file_name, yaml::read(text))
}

/// Like [`parse_in`], of a document that was read already: its mistakes have no lines.
///
/// # Errors
///
/// As [`parse`], in the order of the fields.
pub fn parse_value(
    namespace: &str,
    file_name: &str,
    value: &Value,
) -> Result<(Vec<Object>, Vec<Warning>), Vec<ConfigError>> {
    objects(namespace, file_name, yaml::of_value(value))
}

fn objects(
    namespace: &str,
    file_name: &str,
    (documents, syntax): (Vec<Node>, Vec<yaml::SyntaxError>),
) -> Result<(Vec<Object>, Vec<Warning>), Vec<ConfigError>> {
    let mut reader = Reader { namespace, objects: Vec::new(), told: Told::default() };
    for document in documents.iter().filter(|document| !document.is_null()) {
        reader.document(document, Path::default(), 0);
    }
    let twice = duplicates(&reader.objects);
    let Reader { objects, mut told, .. } = reader;
    told.warnings.extend(twice);
    let syntax = syntax.into_iter().map(|e| Finding { at: e.at, path: Path::default(), message: e.message });
    told.errors.extend(syntax);
    let warnings = told.finish(file_name)?;
    Ok((objects.into_iter().map(|(object, _)| object).collect(), warnings))
}

/// Reads mesh-wide settings alone: the value of `mesh` in Istio's configuration map, and what was written.
///
/// # Errors
///
/// Every mistake of the text, in the order of its lines.
pub fn parse_mesh(
    file_name: &str,
    text: &str,
) -> Result<(MeshConfig, Value, Vec<Warning>), Vec<ConfigError>> {
    let (documents, syntax) = yaml::read(text);
    let mut told = Told::default();
    told.errors.extend(syntax.into_iter().map(|e| Finding {
        at: e.at,
        path: Path::default(),
        message: e.message,
    }));
    let mut out = (MeshConfig::default(), json!({}));
    for document in documents.iter().filter(|document| !document.is_null()) {
        let mut cx = Decoder::default().with_original_names();
        let mesh = MeshConfig::decode(document, &mut cx).unwrap_or_default();
        let spec = Spec::MeshConfig(Box::new(mesh));
        told.checked(document, &Path::default(), cx, validate_spec("istio-system", &spec));
        if let Spec::MeshConfig(mesh) = spec {
            out = (*mesh, document.to_json());
        }
    }
    let warnings = told.finish(file_name)?;
    Ok((out.0, out.1, warnings))
}

#[derive(Default)]
struct Told {
    errors: Vec<Finding>,
    warnings: Vec<Finding>,
}

impl Told {
    fn error(&mut self, at: Location, path: Path, message: impl Into<String>) {
        self.errors.push(Finding { at, path, message: message.into() });
    }

    /// Adds what decoding and the rules say about a specification.
    fn checked(&mut self, spec: &Node, prefix: &Path, cx: Decoder, checker: Checker) {
        let place = |remark: &Remark| {
            // The rules speak of `spec...`; the specification may stand elsewhere.
            let inner = Path(remark.path.0.iter().skip(1).cloned().collect());
            let mut path = prefix.clone();
            path.0.extend(inner.0.iter().cloned());
            Finding { at: spec.locate(&inner), path, message: remark.message.clone() }
        };
        let found: Vec<Finding> =
            checker.errors.iter().map(place).filter(|f| !follows(f, &cx.errors)).collect();
        self.warnings.extend(checker.warnings.iter().map(place));
        self.errors.extend(cx.errors);
        self.errors.extend(found);
        self.warnings.extend(cx.warnings);
    }

    fn finish(self, file: &str) -> Result<Vec<Warning>, Vec<ConfigError>> {
        let Self { mut errors, mut warnings } = self;
        errors.sort_by_key(|f| (f.at, f.path.to_string()));
        warnings.sort_by_key(|f| (f.at, f.path.to_string()));
        if errors.is_empty() {
            return Ok(warnings
                .into_iter()
                .map(|Finding { at, path, message }| Warning {
                    file: file.to_owned(),
                    line: at.line,
                    column: at.column,
                    path: path.to_string(),
                    message,
                })
                .collect());
        }
        Err(errors
            .into_iter()
            .map(|Finding { at, path, message }| ConfigError {
                file: file.to_owned(),
                line: at.line,
                column: at.column,
                path: path.to_string(),
                message,
            })
            .collect())
    }
}

/// Is a rule broken only because the value could not be read?
fn follows(finding: &Finding, unread: &[Finding]) -> bool {
    unread.iter().any(|error| {
        let child = error.path.0.len() == finding.path.0.len() + 1 && error.path.starts_with(&finding.path);
        child || finding.path.starts_with(&error.path)
    })
}

/// Objects that a text has twice; the later one replaces the earlier.
fn duplicates(objects: &[(Object, Location)]) -> Vec<Finding> {
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    let mut out = Vec::new();
    for (object, at) in objects {
        if let Some(line) = seen.insert(object.id(), at.line) {
            let path = Path::default().key("metadata").key("name");
            let message = format!("{} is there twice; this one replaces that of line {line}", object.id());
            out.push(Finding { at: *at, path, message });
        }
    }
    out
}

struct Reader<'a> {
    /// Of objects that name none.
    namespace: &'a str,
    objects: Vec<(Object, Location)>,
    told: Told,
}

/// Fields that an object may have at its top.
const TOP: &[&str] = &["apiVersion", "kind", "metadata", "spec", "status"];
/// How deep lists of objects may be nested in each other.
const MAX_LISTS: usize = 4;

impl Reader<'_> {
    fn document(&mut self, node: &Node, path: Path, depth: usize) {
        let Content::Map(entries) = &node.content else {
            self.told.error(
                node.at,
                path,
                format!("must be an object with apiVersion and kind, found {}", node.describe()),
            );
            return;
        };
        let kind = node.get("kind").and_then(Node::as_str).unwrap_or_default();
        if let Some(items) = node.get("items").filter(|_| kind.ends_with("List")) {
            let Content::List(items) = &items.content else {
                let message = format!("must be a list, found {}", items.describe());
                self.told.error(items.at, path.key("items"), message);
                return;
            };
            if depth >= MAX_LISTS {
                self.told.error(node.at, path, "lists may not be nested so deep");
                return;
            }
            for (index, item) in items.iter().enumerate() {
                self.document(item, path.clone().key("items").index(index), depth + 1);
            }
            return;
        }
        if kind == "ConfigMap" {
            self.config_map(node, &path);
            return;
        }
        if let Some(kind) = self.kind(node, entries, &path) {
            self.object(node, entries, kind, &path);
        }
    }

    /// The kind and its version; a message when either is wrong.
    fn kind(&mut self, node: &Node, entries: &[Entry], path: &Path) -> Option<Kind> {
        let mut text = |field: &str| -> Option<(String, Location)> {
            match node.get(field) {
                None => {
                    self.told.error(node.at, path.clone().key(field), "is required");
                    None
                }
                Some(value) => match value.as_str() {
                    Some(text) => Some((text.to_owned(), value.at)),
                    None => {
                        let message = format!("must be a string, found {}", value.describe());
                        self.told.error(value.at, path.clone().key(field), message);
                        None
                    }
                },
            }
        };
        let version = text("apiVersion");
        let Some((name, at)) = text("kind") else {
            self.unknown_top(entries, path);
            return None;
        };
        let Some(kind) = Kind::ALL.iter().copied().find(|kind| kind.as_str() == name) else {
            let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
            let hint = match nearest(&name, &known) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("kinds are: {}", known.join(", ")),
            };
            self.told.error(at, path.clone().key("kind"), format!("unknown kind {}; {hint}", quoted(&name)));
            return None;
        };
        let (version, at) = version?;
        let known: Vec<String> = kind.versions().iter().map(|v| format!("{}/{v}", kind.group())).collect();
        if !known.contains(&version) {
            let message = format!("must be {} for a {kind}, found {}", known.join(", "), quoted(&version));
            self.told.error(at, path.clone().key("apiVersion"), message);
            return None;
        }
        Some(kind)
    }

    fn unknown_top(&mut self, entries: &[Entry], path: &Path) {
        let mut cx = Decoder::at(path.clone());
        for entry in entries.iter().filter(|entry| !TOP.contains(&entry.key.as_str())) {
            cx.unknown(entry, TOP);
        }
        self.told.errors.extend(cx.errors);
    }

    fn object(&mut self, node: &Node, entries: &[Entry], kind: Kind, path: &Path) {
        self.unknown_top(entries, path);
        let metadata = self.metadata(node, path);
        let nothing = Node { at: node.at, content: Content::Map(Vec::new()) };
        let spec = node.get("spec").unwrap_or(&nothing);
        let prefix = path.clone().key("spec");
        let mut cx = Decoder::at(prefix.clone());
        if kind == Kind::MeshConfig {
            cx = cx.with_original_names();
        }
        let Some(typed) = kind.decode(spec, &mut cx) else {
            self.told.errors.extend(cx.errors);
            return;
        };
        self.told.checked(spec, &prefix, cx, validate_spec(&metadata.namespace, &typed));
        let api_version = node.get("apiVersion").and_then(Node::as_str).unwrap_or_default().to_owned();
        let object = Object {
            kind,
            api_version,
            name: metadata.name,
            namespace: metadata.namespace,
            labels: metadata.labels,
            annotations: metadata.annotations,
            created: metadata.created,
            generation: 0,
            revision: 0,
            spec: Arc::new(typed),
            raw: spec.to_json(),
            memo: Memo::default(),
        };
        self.objects.push((object, node.at));
    }

    fn metadata(&mut self, node: &Node, path: &Path) -> Metadata {
        let path = path.clone().key("metadata");
        let mut out = Metadata { namespace: self.namespace.to_owned(), ..Metadata::default() };
        let Some(metadata) = node.get("metadata") else {
            self.told.error(node.at, path, "is required, with a name");
            return out;
        };
        let mut cx = Decoder::at(path);
        let Some(entries) = cx.map(metadata) else {
            self.told.errors.extend(cx.errors);
            return out;
        };
        let has_name = metadata.get("name").is_some();
        for entry in entries {
            match entry.key.as_str() {
                "name" => {
                    cx.field(entry, &mut out.name);
                    check_name(
                        &mut cx,
                        entry,
                        grammar::is_subdomain(&out.name),
                        "1 to 253 lower-case letters, digits, - and .",
                    );
                }
                "namespace" => {
                    cx.field(entry, &mut out.namespace);
                    check_name(
                        &mut cx,
                        entry,
                        grammar::is_label(&out.namespace),
                        "1 to 63 lower-case letters, digits and -",
                    );
                }
                "labels" => {
                    cx.field(entry, &mut out.labels);
                    check_labels(&mut cx, entry, true);
                }
                "annotations" => {
                    cx.field(entry, &mut out.annotations);
                    check_labels(&mut cx, entry, false);
                }
                "creationTimestamp" => out.created = entry.value.as_str().map_or(0, seconds),
                // Kubernetes adds many more, which are its own.
                _ => {}
            }
        }
        if !has_name {
            cx.within(Segment::Key("name".to_owned()), |cx| cx.error(metadata.at, "is required"));
        }
        self.told.errors.extend(cx.errors);
        out
    }

    /// Istio's own form of mesh-wide settings: a ConfigMap with a text `mesh`.
    fn config_map(&mut self, node: &Node, path: &Path) {
        let metadata = self.metadata(node, path);
        let path = path.clone().key("data").key("mesh");
        let Some(text) = node.get("data").and_then(|data| data.get("mesh")) else {
            let message = "is required: of ConfigMaps only Istio's mesh configuration is read";
            self.told.error(node.at, path, message);
            return;
        };
        let inner = text.as_str().unwrap_or_default();
        match parse_mesh("mesh", inner) {
            Ok((mesh, raw, warnings)) => {
                let object = Object {
                    spec: Arc::new(Spec::MeshConfig(Box::new(mesh))),
                    ..Object::new(Kind::MeshConfig, &metadata.namespace, &metadata.name, raw)
                };
                self.objects.push((object, node.at));
                self.told.warnings.extend(warnings.into_iter().map(|w| Finding {
                    at: text.at,
                    path: path.clone(),
                    message: format!("line {} of the text: {}: {}", w.line, w.path, w.message),
                }));
            }
            Err(errors) => self.told.errors.extend(errors.into_iter().map(|e| Finding {
                at: text.at,
                path: path.clone(),
                message: format!("line {} of the text: {}: {}", e.line, e.path, e.message),
            })),
        }
    }
}

#[derive(Default)]
struct Metadata {
    name: String,
    namespace: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    created: i64,
}

fn check_name(cx: &mut Decoder, entry: &Entry, fits: bool, wanted: &str) {
    if let Some(text) = entry.value.as_str().filter(|_| !fits) {
        let message =
            format!("must have {wanted}, with a letter or digit at both ends, found {}", quoted(text));
        cx.within(Segment::Key(entry.key.clone()), |cx| cx.error(entry.value.at, message));
    }
}

fn check_labels(cx: &mut Decoder, entry: &Entry, values: bool) {
    let Content::Map(labels) = &entry.value.content else { return };
    cx.within(Segment::Key(entry.key.clone()), |cx| {
        for label in labels {
            cx.within(Segment::Key(label.key.clone()), |cx| {
                if let Err(why) = grammar::label_key(&label.key) {
                    cx.error(label.at, why);
                }
                if let Some(Err(why)) = label.value.as_str().filter(|_| values).map(grammar::label_value) {
                    cx.error(label.value.at, why);
                }
            });
        }
    });
}

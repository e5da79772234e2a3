//! What a YAML or JSON text says, with the place of every key and value.

use std::fmt;

use serde_json::{Map, Number, Value};

/// A place in a file; both numbers count from 1, and 0 stands for "not from a file".
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// One value of a document and where it starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Where the value starts.
    pub at: Location,
    /// The value.
    pub content: Content,
}

/// The value of a [`Node`]: JSON's types, maps in the order of the text.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Nothing, `~` or `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole or fractional number.
    Number(Number),
    /// Text.
    String(String),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping; keys are unique.
    Map(Vec<Entry>),
}

/// One key of a mapping with its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The key; numbers and booleans in their written form.
    pub key: String,
    /// Where the key starts.
    pub at: Location,
    /// The value.
    pub value: Node,
}

impl Node {
    /// The tree of a JSON value, without places.
    #[must_use]
    pub fn from_json(value: &Value) -> Self {
        let content = match value {
            Value::Null => Content::Null,
            Value::Bool(b) => Content::Bool(*b),
            Value::Number(n) => Content::Number(n.clone()),
            Value::String(s) => Content::String(s.clone()),
            Value::Array(items) => Content::List(items.iter().map(Self::from_json).collect()),
            Value::Object(map) => Content::Map(
                map.iter()
                    .map(|(key, value)| Entry {
                        key: key.clone(),
                        at: Location::default(),
                        value: Self::from_json(value),
                    })
                    .collect(),
            ),
        };
        Self { at: Location::default(), content }
    }

    /// The JSON value this tree stands for, in the same order.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match &self.content {
            Content::Null => Value::Null,
            Content::Bool(b) => Value::Bool(*b),
            Content::Number(n) => Value::Number(n.clone()),
            Content::String(s) => Value::String(s.clone()),
            Content::List(items) => Value::Array(items.iter().map(Self::to_json).collect()),
            Content::Map(entries) => {
                let mut map = Map::new();
                for entry in entries {
                    map.insert(entry.key.clone(), entry.value.to_json());
                }
                Value::Object(map)
            }
        }
    }

    /// The entry of a mapping with this key.
    #[must_use]
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|e| e.key == key),
            Content::Null | Content::Bool(_) | Content::Number(_) | Content::String(_) | Content::List(_) => {
                None
            }
        }
    }

    /// The value of a mapping under this key; a null value counts as absent.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|e| &e.value).filter(|v| !v.is_null())
    }

    /// Is there nothing here?
    #[must_use]
    pub fn is_null(&self) -> bool {
        matches!(self.content, Content::Null)
    }

    /// The text, when the value is a string.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match &self.content {
            Content::String(s) => Some(s),
            Content::Null | Content::Bool(_) | Content::Number(_) | Content::List(_) | Content::Map(_) => {
                None
            }
        }
    }

    /// What a person would call the value: `the number 5`, `a map`.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.content {
            Content::Null => "nothing".to_owned(),
            Content::Bool(b) => format!("the boolean {b}"),
            Content::Number(n) => format!("the number {n}"),
            Content::String(s) => format!("the string {}", quoted(s)),
            Content::List(_) => "a list".to_owned(),
            Content::Map(_) => "a map".to_owned(),
        }
    }

    /// Where the value at `path` starts, or the deepest part of it that exists.
    #[must_use]
    pub fn locate(&self, path: &Path) -> Location {
        let mut at = self.at;
        let mut node = self;
        for segment in &path.0 {
            let next = match (segment, &node.content) {
                (Segment::Key(key), Content::Map(_)) => match node.entry(key) {
                    Some(entry) => {
                        at = if entry.value.is_null() { entry.at } else { entry.value.at };
                        Some(&entry.value)
                    }
                    None => None,
                },
                (Segment::Index(i), Content::List(items)) => items.get(*i).inspect(|item| at = item.at),
                _ => None,
            };
            match next {
                Some(next) => node = next,
                None => break,
            }
        }
        at
    }
}

/// A text in double quotes, cut when it is long.
pub(crate) fn quoted(text: &str) -> String {
    const SHOWN: usize = 60;
    if text.chars().count() <= SHOWN {
        format!("{text:?}")
    } else {
        let cut: String = text.chars().take(SHOWN).collect();
        format!("{:?}", format!("{cut}..."))
    }
}

/// One step of a [`Path`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Segment {
    /// A field or the key of a map.
    Key(String),
    /// A position in a list, from 0.
    Index(usize),
}

/// The way from the top of an object to a value: `spec.http[0].route[1].weight`.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path(pub Vec<Segment>);

impl Path {
    /// The path of `spec`.
    #[must_use]
    pub fn spec() -> Self {
        Self(vec![Segment::Key("spec".to_owned())])
    }

    /// This path and one more field.
    #[must_use]
    pub fn key(mut self, key: &str) -> Self {
        self.0.push(Segment::Key(key.to_owned()));
        self
    }

    /// This path and one more position.
    #[must_use]
    pub fn index(mut self, index: usize) -> Self {
        self.0.push(Segment::Index(index));
        self
    }

    /// Does this path begin with all of `other`?
    #[must_use]
    pub fn starts_with(&self, other: &Self) -> bool {
        self.0.starts_with(&other.0)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Key(key) if is_plain(key) => {
                    let dot = if position == 0 { "" } else { "." };
                    write!(f, "{dot}{key}")?;
                }
                Segment::Key(key) => write!(f, "[{key:?}]")?,
                Segment::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

fn is_plain(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

//! From a located tree to typed messages: every mistake is recorded with its place, none stops the reading.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use serde_json::{Number, Value};

mod declare;

pub(crate) use declare::{enumeration, message, oneof};

use super::node::{Content, Entry, Location, Node, Path, Segment, quoted};

/// So many mistakes of one object are told, and no more.
pub(crate) const MAX_FINDINGS: usize = 1000;

/// Something to tell about one place of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Where the value (or, for an unknown field, its name) starts.
    pub at: Location,
    /// Which value.
    pub path: Path,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Reads typed values out of a tree and collects what is wrong with it.
#[derive(Debug, Default)]
pub struct Decoder {
    path: Path,
    original_names: bool,
    /// What must be corrected.
    pub errors: Vec<Finding>,
    /// What is accepted, and should be known.
    pub warnings: Vec<Finding>,
}

/// A value that can be read from a [`Node`].
pub trait Decode: Sized {
    /// The value, or `None` when the node has the wrong type; each mistake is recorded in `cx`.
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self>;
}

/// A choice among fields of which at most one may be set (proto `oneof`).
pub trait OneOf: Sized {
    /// The names of the fields.
    const NAMES: &'static [&'static str];

    /// The choice that the field `name` with this value makes.
    fn decode_field(name: &str, node: &Node, cx: &mut Decoder) -> Option<Self>;

    /// The name of the field that made this choice.
    fn name(&self) -> &'static str;
}

impl Decoder {
    /// A decoder whose paths begin with `path`.
    #[must_use]
    pub fn at(path: Path) -> Self {
        Self { path, ..Self::default() }
    }

    /// Accepts `snake_case` names of fields as well, as proto JSON does; Kubernetes objects do not.
    #[must_use]
    pub fn with_original_names(mut self) -> Self {
        self.original_names = true;
        self
    }

    /// The name of a field as JSON has it.
    pub(crate) fn canonical(&self, key: &str) -> String {
        if !self.original_names || !key.contains('_') {
            return key.to_owned();
        }
        let mut out = String::with_capacity(key.len());
        let mut upper = false;
        for c in key.chars() {
            match c {
                '_' => upper = true,
                c if upper => {
                    out.extend(c.to_uppercase());
                    upper = false;
                }
                c => out.push(c),
            }
        }
        out
    }

    /// Records a mistake at the current path.
    pub fn error(&mut self, at: Location, message: impl Into<String>) {
        if self.errors.len() < MAX_FINDINGS {
            self.errors.push(Finding { at, path: self.path.clone(), message: message.into() });
        }
    }

    /// Runs `read` with one more field in the path.
    pub fn within<T>(&mut self, segment: Segment, read: impl FnOnce(&mut Self) -> T) -> T {
        self.path.0.push(segment);
        let out = read(self);
        self.path.0.pop();
        out
    }

    /// Reads the value of a field into its place; a null value leaves the default.
    pub(crate) fn field<T: Decode>(&mut self, entry: &Entry, slot: &mut T) {
        if entry.value.is_null() {
            return;
        }
        self.within(Segment::Key(entry.key.clone()), |cx| {
            if let Some(value) = T::decode(&entry.value, cx) {
                *slot = value;
            }
        });
    }

    /// Reads one field of a choice; a second one is a mistake.
    pub(crate) fn one_of<T: OneOf>(&mut self, name: &str, entry: &Entry, slot: &mut Option<T>) {
        if entry.value.is_null() {
            return;
        }
        self.within(Segment::Key(entry.key.clone()), |cx| {
            if let Some(other) = slot.as_ref().map(OneOf::name) {
                cx.error(
                    entry.at,
                    format!("only one of {} may be set, and {other} is set already", T::NAMES.join(", ")),
                );
            } else if let Some(value) = T::decode_field(name, &entry.value, cx) {
                *slot = Some(value);
            }
        });
    }

    /// Records that a field is read but should be replaced.
    pub(crate) fn deprecated(&mut self, entry: &Entry, instead: &str) {
        if self.warnings.len() >= MAX_FINDINGS {
            return;
        }
        let path = self.path.clone().key(&entry.key);
        self.warnings.push(Finding { at: entry.at, path, message: format!("is deprecated; {instead}") });
    }

    /// Records a field that does not exist, with the name that was meant.
    pub(crate) fn unknown(&mut self, entry: &Entry, known: &[&str]) {
        if self.errors.len() >= MAX_FINDINGS {
            return;
        }
        let hint = match nearest(&entry.key, known) {
            Some(name) => format!("did you mean {name}?"),
            None => {
                let mut names = known.to_vec();
                names.sort_unstable();
                format!("fields here are: {}", names.join(", "))
            }
        };
        self.within(Segment::Key(entry.key.clone()), |cx| {
            cx.error(entry.at, format!("unknown field; {hint}"));
        });
    }

    /// The entries of a map.
    pub(crate) fn map<'n>(&mut self, node: &'n Node) -> Option<&'n [Entry]> {
        if let Content::Map(entries) = &node.content {
            return Some(entries);
        }
        self.wrong(node, "a map");
        None
    }

    /// Records a value of the wrong type.
    pub(crate) fn wrong(&mut self, node: &Node, wanted: &str) {
        self.error(node.at, format!("must be {wanted}, found {}", node.describe()));
    }
}

/// The known name that differs least from `name`, if it is close enough to be meant.
#[must_use]
pub fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let lower = name.to_lowercase();
    let limit = (name.chars().count() / 3).clamp(1, 4);
    known
        .iter()
        .map(|candidate| (distance(&lower, &candidate.to_lowercase()), *candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// How many single letters must be added, removed, replaced or swapped.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    let mut previous = None;
    for (i, ca) in a.chars().enumerate() {
        let mut row = vec![i + 1];
        for (j, cb) in b.iter().enumerate() {
            let get = |row: &[usize], at: usize| row.get(at).copied().unwrap_or(usize::MAX / 2);
            let mut best = (get(&above, j) + usize::from(ca != *cb)).min(get(&above, j + 1) + 1);
            best = best.min(get(&row, j) + 1);
            let swapped = j > 0 && previous == Some(*cb) && b.get(j - 1) == Some(&ca);
            if swapped {
                best = best.min(get(&before, j - 1) + 1);
            }
            row.push(best);
        }
        previous = Some(ca);
        before = std::mem::replace(&mut above, row);
    }
    above.last().copied().unwrap_or(0)
}

impl<T: Decode> Decode for Option<T> {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        T::decode(node, cx).map(Some)
    }
}

impl<T: Decode> Decode for Box<T> {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        T::decode(node, cx).map(Self::new)
    }
}

impl<T: Decode + Default> Decode for Vec<T> {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        let Content::List(items) = &node.content else {
            cx.wrong(node, "a list");
            return None;
        };
        let mut out = Self::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            // A bad element keeps its place, so that later messages name the right index.
            out.push(cx.within(Segment::Index(index), |cx| T::decode(item, cx)).unwrap_or_default());
        }
        Some(out)
    }
}

/// A type that the keys of a map are read as.
pub trait MapKey: Ord + Sized {
    /// The key, or what it must be.
    ///
    /// # Errors
    ///
    /// A sentence that says what a key must be.
    fn from_key(key: &str) -> Result<Self, &'static str>;
}

impl MapKey for String {
    fn from_key(key: &str) -> Result<Self, &'static str> {
        Ok(key.to_owned())
    }
}

impl MapKey for u16 {
    fn from_key(key: &str) -> Result<Self, &'static str> {
        key.parse().ok().filter(|port| *port != 0).ok_or("the key must be a port number, 1 to 65535")
    }
}

impl<K: MapKey, V: Decode + Default> Decode for BTreeMap<K, V> {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        let entries = cx.map(node)?;
        let mut out = Self::new();
        for entry in entries {
            cx.within(Segment::Key(entry.key.clone()), |cx| {
                let key = K::from_key(&entry.key).map_err(|message| cx.error(entry.at, message)).ok();
                // A null value of a map is an empty message, as `header: {}` is.
                let value =
                    if entry.value.is_null() { Some(V::default()) } else { V::decode(&entry.value, cx) };
                if let (Some(key), Some(value)) = (key, value) {
                    out.insert(key, value);
                }
            });
        }
        Some(out)
    }
}

impl Decode for String {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        match &node.content {
            Content::String(text) => Some(text.clone()),
            Content::Number(_) | Content::Bool(_) => {
                cx.error(node.at, format!("must be a string, found {}; put it in quotes", node.describe()));
                None
            }
            Content::Null | Content::List(_) | Content::Map(_) => {
                cx.wrong(node, "a string");
                None
            }
        }
    }
}

impl Decode for bool {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        if let Content::Bool(value) = node.content {
            return Some(value);
        }
        cx.wrong(node, "true or false");
        None
    }
}

impl Decode for f64 {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        let value = match &node.content {
            Content::Number(number) => number.as_f64(),
            Content::Null | Content::Bool(_) | Content::String(_) | Content::List(_) | Content::Map(_) => {
                None
            }
        };
        if value.is_none() {
            cx.wrong(node, "a number");
        }
        value
    }
}

impl Decode for Value {
    fn decode(node: &Node, _: &mut Decoder) -> Option<Self> {
        Some(node.to_json())
    }
}

/// A whole number as `i128`, so that every width can check its own range.
fn whole(number: &Number) -> Option<i128> {
    if let Some(n) = number.as_i64() {
        return Some(i128::from(n));
    }
    if let Some(n) = number.as_u64() {
        return Some(i128::from(n));
    }
    // `5.0` is a whole number in JSON.
    let float = number.as_f64()?;
    if float.fract() == 0.0 && float.abs() < 9.0e15 { format!("{float:.0}").parse().ok() } else { None }
}

macro_rules! integers {
    ($($ty:ty, $text:literal, $wanted:literal;)*) => {$(
        impl Decode for $ty {
            fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
                let number = match &node.content {
                    Content::Number(number) => whole(number),
                    Content::String(text) if $text => text.parse::<i128>().ok(),
                    Content::Null | Content::Bool(_) | Content::String(_) | Content::List(_) | Content::Map(_) => None,
                };
                let value = number.and_then(|n| <$ty>::try_from(n).ok());
                if value.is_none() {
                    cx.wrong(node, $wanted);
                }
                value
            }
        }
    )*};
}

integers! {
    u16, false, "a port number, 1 to 65535";
    i32, false, "a whole number between -2147483648 and 2147483647";
    u32, false, "a whole number between 0 and 4294967295";
    i64, true, "a whole number";
    u64, true, "a whole number that is not negative";
}

impl Decode for Duration {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        let Some(text) = node.as_str() else {
            cx.wrong(node, "a duration such as \"10s\", \"500ms\" or \"1h30m\"");
            return None;
        };
        match parse_duration(text) {
            Ok(duration) => Some(duration),
            Err(why) => {
                cx.error(node.at, format!("{why}, found {}", quoted(text)));
                None
            }
        }
    }
}

/// Reads a duration as Kubernetes does: numbers with the units ns, us, ms, s, m and h.
///
/// # Errors
///
/// A sentence that says what a duration must be.
pub fn parse_duration(text: &str) -> Result<Duration, &'static str> {
    const WANTED: &str = "must be a duration such as \"10s\", \"500ms\" or \"1h30m\"";
    if text.starts_with('-') {
        return Err("must be a duration that is not negative");
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(WANTED);
    }
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(WANTED)?;
        let (number, tail) = rest.split_at_checked(digits).ok_or(WANTED)?;
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(unit_end).ok_or(WANTED)?;
        let scale: u128 = match unit {
            "ns" => 1,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return Err(WANTED),
        };
        nanos = nanos.checked_add(scaled(number, scale).ok_or(WANTED)?).ok_or(WANTED)?;
        rest = tail;
    }
    u64::try_from(nanos).map(Duration::from_nanos).map_err(|_| "must be a duration below 584 years")
}

/// `1.5` times a scale, without floats.
fn scaled(number: &str, scale: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || whole.len() > 20 || fraction.contains('.') {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut total = whole.checked_mul(scale)?;
    let mut unit = scale;
    for digit in fraction.chars() {
        unit /= 10;
        total = total.checked_add(unit.checked_mul(u128::from(digit.to_digit(10)?))?)?;
    }
    Some(total)
}

/// Bytes, written as base64 in JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Decode for Bytes {
    fn decode(node: &Node, cx: &mut Decoder) -> Option<Self> {
        let text = String::decode(node, cx)?;
        let url = text.contains(['-', '_']);
        let unpadded = text.trim_end_matches('=');
        let engine = if url {
            base64::engine::general_purpose::URL_SAFE_NO_PAD
        } else {
            base64::engine::general_purpose::STANDARD_NO_PAD
        };
        match engine.decode(unpadded) {
            Ok(bytes) => Some(Self(bytes)),
            Err(_) => {
                cx.error(node.at, format!("must be base64, found {}", quoted(&text)));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_duration(text: &str, nanos: Option<u64>) {
        assert_eq!(parse_duration(text).ok(), nanos.map(Duration::from_nanos), "{text}");
    }

    #[test]
    fn durations_are_read_as_kubernetes_reads_them() {
        check_duration("10s", Some(10_000_000_000));
        check_duration("1h30m", Some(5_400_000_000_000));
        check_duration("1.5s", Some(1_500_000_000));
        check_duration("0.25ms", Some(250_000));
        check_duration("0s", Some(0));
        check_duration("0", Some(0));
        check_duration("", None);
        check_duration("10", None);
        check_duration("ten", None);
        check_duration("-1s", None);
        check_duration("1d", None);
        check_duration("99999999999999999999999h", None);
        check_duration(".s", None);
        check_duration("1..2s", None);
    }

    #[test]
    fn the_nearest_name_is_found_over_swaps_and_case() {
        assert_eq!(nearest("tiemout", &["timeout", "retries"]), Some("timeout"));
        assert_eq!(nearest("trafficpolicy", &["trafficPolicy", "host"]), Some("trafficPolicy"));
        assert_eq!(nearest("bananas", &["trafficPolicy", "host"]), None);
    }
}

//! Takes settings out of a located document, and keeps every mistake with its place.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use registry::config::Location;
use registry::config::node::{Content, Node};
use registry::config::yaml;

use super::{SETTINGS, Span};

/// Something wrong: where, in which setting, what.
type Mistake = (Location, String, String);

/// The values of a file.
pub(super) struct Reader {
    document: Option<Node>,
    mistakes: Vec<Mistake>,
}

impl Reader {
    /// Reads a text and tells what in it is not a setting. An empty text has no values.
    pub(super) fn new(text: &str) -> Self {
        let (documents, errors) = yaml::read(text);
        let mut reader = Self { document: None, mistakes: Vec::new() };
        for error in errors {
            reader.mistake(error.at, "", error.message);
        }
        let mut documents = documents.into_iter().filter(|document| !document.is_null());
        reader.document = documents.next();
        if let Some(second) = documents.next() {
            reader.mistake(second.at, "", "must be one document; this is a second one".to_owned());
        }
        if let Some(document) = reader.document.clone() {
            reader.refuse_unknown(&document, "");
        }
        reader
    }

    /// All mistakes in the order of the file, each as `file:line:column: setting: what`.
    pub(super) fn mistakes(mut self, file: &str) -> Vec<String> {
        self.mistakes.sort_by_key(|(at, ..)| *at);
        let told = |(at, name, message): Mistake| {
            let place = if at == Location::default() { file.to_owned() } else { format!("{file}:{at}") };
            if name.is_empty() {
                format!("{place}: {message}")
            } else {
                format!("{place}: {name}: {message}")
            }
        };
        self.mistakes.into_iter().map(told).collect()
    }

    /// Tells a mistake at the place of a setting.
    pub(super) fn wrong(&mut self, name: &str, message: String) {
        let at = self.find(name).map_or_else(Location::default, |node| node.at);
        self.mistake(at, name, message);
    }

    /// The value of a setting; its default if it is not in the file, and after a mistake.
    pub(super) fn take<T>(
        &mut self,
        name: &str,
        default: T,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> T {
        debug_assert!(SETTINGS.iter().any(|known| known.name == name), "{name} is not in the reference");
        let Some(node) = self.find(name) else { return default };
        let text = match &node.content {
            Content::String(text) => Ok(text.clone()),
            Content::Number(number) => Ok(number.to_string()),
            Content::Bool(answer) => Ok(answer.to_string()),
            Content::Null | Content::List(_) | Content::Map(_) => {
                Err(format!("must be one value, this is {}", node.describe()))
            }
        };
        text.and_then(|text| read(&text)).unwrap_or_else(|message| {
            self.wrong(name, message);
            default
        })
    }

    /// The values of a setting that is a list, or one value; none if it is not in the file.
    pub(super) fn take_list<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        debug_assert!(SETTINGS.iter().any(|known| known.name == name), "{name} is not in the reference");
        let Some(node) = self.find(name).cloned() else { return Vec::new() };
        let items = match node.content {
            Content::List(items) => items,
            Content::Null => Vec::new(),
            Content::String(_) | Content::Number(_) | Content::Bool(_) | Content::Map(_) => vec![node],
        };
        let mut values = Vec::with_capacity(items.len());
        for item in items {
            let value = match &item.content {
                Content::String(text) => read(text),
                Content::Null
                | Content::Bool(_)
                | Content::Number(_)
                | Content::List(_)
                | Content::Map(_) => Err(format!("must be a list of texts, this is {}", item.describe())),
            };
            match value {
                Ok(value) => values.push(value),
                Err(message) => self.mistake(item.at, name, message),
            }
        }
        values
    }

    /// Whether the file has a setting.
    pub(super) fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    fn find(&self, name: &str) -> Option<&Node> {
        let document = self.document.as_ref()?;
        name.split('.').try_fold(document, |node, part| node.get(part))
    }

    fn mistake(&mut self, at: Location, name: &str, message: String) {
        self.mistakes.push((at, name.to_owned(), message));
    }

    fn refuse_unknown(&mut self, node: &Node, section: &str) {
        let Content::Map(entries) = &node.content else {
            let found = node.describe();
            return self.mistake(node.at, section, format!("must be a map of settings, this is {found}"));
        };
        for entry in entries {
            let name =
                if section.is_empty() { entry.key.clone() } else { format!("{section}.{}", entry.key) };
            let inside = format!("{name}.");
            if SETTINGS.iter().any(|known| known.name.starts_with(&inside)) {
                if !entry.value.is_null() {
                    self.refuse_unknown(&entry.value, &name);
                }
            } else if !SETTINGS.iter().any(|known| known.name == name) {
                self.mistake(entry.at, &name, unknown(section, &entry.key));
            }
        }
    }
}

/// What is said about a name that is no setting: the one that was probably meant, or those that there are.
fn unknown(section: &str, key: &str) -> String {
    let split = |name: &'static str| name.split_once('.').unwrap_or(("", name));
    let plain = key.replace(['_', '-'], "");
    let alike =
        SETTINGS.iter().map(|known| known.name).find(|known| split(known).1.eq_ignore_ascii_case(&plain));
    if let Some(known) = alike {
        return format!("no such setting; is it {known}?");
    }
    let mut here: Vec<&str> = SETTINGS.iter().map(|known| known.name).collect();
    if section.is_empty() {
        here.iter_mut().for_each(|name| *name = name.split_once('.').map_or(*name, |(section, _)| section));
        here.dedup();
    } else {
        here.retain(|name| split_section(name) == section);
    }
    format!("no such setting; there are: {}", here.join(", "))
}

fn split_section(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(section, _)| section)
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("must be an IP address and a port such as 127.0.0.1:15080, this is {text:?}"))
}

pub(super) fn host_port(text: &str) -> Result<Option<String>, String> {
    let good = text
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0));
    if good {
        return Ok(Some(text.to_owned()));
    }
    Err(format!("must be a host and a port such as istiod.example.com:15012, this is {text:?}"))
}

/// A DNS name or an IP address.
pub(super) fn name(text: &str) -> Result<String, String> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'*');
    if text.parse::<IpAddr>().is_ok() || !text.is_empty() && text.bytes().all(good) {
        return Ok(text.to_owned());
    }
    Err(format!("must be a DNS name or an IP address, this is {text:?}"))
}

pub(super) fn answer(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("must be true or false, this is {text:?}"))
}

pub(super) fn whole(text: &str, least: u64) -> Result<u64, String> {
    let number: Option<u64> = text.parse().ok().filter(|number| *number >= least);
    number.ok_or_else(|| format!("must be a whole number from {least}, this is {text:?}"))
}

/// A duration such as `10ms`, `1h30m` or `90d`.
pub(super) fn span(text: &str, least: Duration) -> Result<Duration, String> {
    let wrong = || format!("must be a duration such as 10ms, 20s, 1h30m or 90d, this is {text:?}");
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, next) = tail.split_at(letters);
        let millis: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let part = number.checked_mul(millis).ok_or_else(wrong)?;
        total = total.checked_add(Duration::from_millis(part)).ok_or_else(wrong)?;
        rest = next;
    }
    if text.is_empty() {
        return Err(wrong());
    }
    if total < least {
        return Err(format!("must be at least {}, this is {text:?}", Span(least)));
    }
    Ok(total)
}

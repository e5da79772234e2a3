//! Header operations of routes: what to add, set and remove, ready to be carried out.

use envoy_types::pb::envoy::config::core::v3 as core;
use http::{HeaderName, HeaderValue};

use super::decode::{Invalid, Under as _, header_name, header_value};
use super::format::Format;

/// What happens when the header is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Append {
    /// Add another value.
    AppendOrAdd,
    /// Leave what is there.
    AddIfAbsent,
    /// Put the new value in place of all others.
    Overwrite,
    /// As `Overwrite`, and nothing if the header is absent.
    OverwriteIfExists,
}

/// A header's new value.
#[derive(Debug, Clone)]
pub enum NewValue {
    /// The same for every request.
    Static(HeaderValue),
    /// Made from the request.
    Format(Format),
}

/// One header to write.
#[derive(Debug, Clone)]
pub struct HeaderAdd {
    /// Which.
    pub name: HeaderName,
    /// Its value.
    pub value: NewValue,
    /// What happens to values it has already.
    pub append: Append,
    /// Write it even if the value turns out empty.
    pub keep_empty: bool,
}

/// Removals, then additions: one level's operations.
#[derive(Debug, Clone, Default)]
pub struct HeaderOps {
    /// Headers that go.
    pub remove: Box<[HeaderName]>,
    /// Headers that come.
    pub add: Box<[HeaderAdd]>,
    /// Whether one of their values is made from the request.
    pub from_request: bool,
}

impl HeaderOps {
    /// From their protos; `side` is `request` or `response` and stands in error messages.
    ///
    /// # Errors
    ///
    /// A name or value that is not valid, or a header that may not be changed (`host` and pseudo headers).
    pub fn new(add: Vec<core::HeaderValueOption>, remove: &[String], side: &str) -> Result<Self, Invalid> {
        let remove_field = format!("{side}_headers_to_remove");
        let remove = remove.iter().map(|n| changeable(n, &remove_field)).collect::<Result<_, _>>()?;
        let add_field = format!("{side}_headers_to_add");
        let add = add
            .into_iter()
            .enumerate()
            .map(|(i, pb)| header_add(pb).at(&add_field, i))
            .collect::<Result<Box<[HeaderAdd]>, _>>()?;
        let from_request = add.iter().any(|a| matches!(a.value, NewValue::Format(_)));
        Ok(Self { remove, add, from_request })
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }
}

fn changeable(name: &str, field: &str) -> Result<HeaderName, Invalid> {
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        return Err(Invalid::new(field, format!("`{name}` may not be changed; use a rewrite")));
    }
    header_name(name, field)
}

fn header_add(pb: core::HeaderValueOption) -> Result<HeaderAdd, Invalid> {
    use core::header_value_option::HeaderAppendAction as Action;
    let header = pb.header.ok_or_else(|| Invalid::missing("header"))?;
    let text = if header.raw_value.is_empty() {
        header.value
    } else {
        String::from_utf8(header.raw_value).map_err(|_| Invalid::new("header.raw_value", "is not UTF-8"))?
    };
    #[expect(deprecated, reason = "older servers still send it, and it means the same there")]
    let append = match (pb.append, Action::try_from(pb.append_action)) {
        (Some(b), _) if b.value => Append::AppendOrAdd,
        (Some(_), _) => Append::Overwrite,
        (None, Ok(Action::AppendIfExistsOrAdd)) => Append::AppendOrAdd,
        (None, Ok(Action::AddIfAbsent)) => Append::AddIfAbsent,
        (None, Ok(Action::OverwriteIfExistsOrAdd)) => Append::Overwrite,
        (None, Ok(Action::OverwriteIfExists)) => Append::OverwriteIfExists,
        (None, Err(_)) => {
            return Err(Invalid::new("append_action", format!("unknown value {}", pb.append_action)));
        }
    };
    let format = Format::parse(&text).under("header.value")?;
    let value = match format.constant() {
        Some(text) => NewValue::Static(header_value(text, "header.value")?),
        None => NewValue::Format(format),
    };
    Ok(HeaderAdd {
        name: changeable(&header.key, "header.key")?,
        value,
        append,
        keep_empty: pb.keep_empty_value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(key: &str, value: &str) -> core::HeaderValueOption {
        core::HeaderValueOption {
            header: Some(core::HeaderValue { key: key.into(), value: value.into(), raw_value: Vec::new() }),
            ..Default::default()
        }
    }

    #[test]
    fn constants_are_prepared_and_formats_parsed() {
        let ops =
            HeaderOps::new(vec![add("X-A", "b%%"), add("x-b", "%REQ(x-c)%")], &["X-Gone".into()], "request")
                .unwrap();
        assert!(matches!(&ops.add[0].value, NewValue::Static(v) if v == "b%"));
        assert!(matches!(&ops.add[1].value, NewValue::Format(_)));
        assert_eq!(ops.remove[0], "x-gone");
    }

    #[test]
    fn host_and_pseudo_headers_are_refused() {
        for name in ["host", ":path", "a b", ""] {
            assert!(HeaderOps::new(vec![add(name, "x")], &[], "request").is_err(), "{name}");
            assert!(HeaderOps::new(Vec::new(), &[name.into()], "request").is_err(), "{name}");
        }
        assert_eq!(
            HeaderOps::new(vec![add("x", "a\nb")], &[], "request").unwrap_err().field,
            "request_headers_to_add[0].header.value"
        );
    }
}

//! One encoding for one content.
//!
//! Protobuf leaves the order of map entries open, and `prost` writes them in the order of a hash map, so the
//! same message has different bytes in two processes. Resource versions are hashes of content and must be
//! equal on every member; so messages are re-encoded here with map entries in the order of their keys, inside
//! every nested message and every `Any` too.

use std::collections::HashMap;
use std::sync::LazyLock;

use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use prost_reflect::Kind;

use crate::TYPE_URL_PREFIX;
use crate::pool::pool;

/// A message packed into an `Any` with canonical bytes.
#[must_use]
pub fn any<M: Message + Name>(message: &M) -> Any {
    let name = M::full_name();
    Any { type_url: format!("{TYPE_URL_PREFIX}{name}"), value: bytes(&name, &message.encode_to_vec()) }
}

/// The canonical form of an encoded message of the given full name. Bytes that cannot be read as that message
/// are returned as they are.
#[must_use]
pub fn bytes(full_name: &str, encoded: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(encoded.len());
    let known = LAYOUTS.by_name.get(full_name).copied();
    match known.and_then(|layout| rewrite(layout, encoded, &mut out)) {
        Some(()) => out,
        None => encoded.to_vec(),
    }
}

/// What a field holds, as far as map order is concerned.
#[derive(Clone, Copy)]
enum Field {
    /// A map whose entry message has this layout.
    Map(usize),
    /// A message (single or repeated) that has maps somewhere below.
    Message(usize),
}

/// The fields of one message below which a map may be.
#[derive(Default)]
struct Layout {
    fields: Vec<(u32, Field)>,
    is_any: bool,
}

#[derive(Default)]
struct Layouts {
    by_name: HashMap<String, usize>,
    layouts: Vec<Layout>,
}

static LAYOUTS: LazyLock<Layouts> = LazyLock::new(|| {
    let Ok(pool) = pool() else { return Layouts::default() };
    let messages: Vec<_> = pool.all_messages().collect();
    let by_name: HashMap<String, usize> =
        messages.iter().enumerate().map(|(i, m)| (m.full_name().to_owned(), i)).collect();
    let mut layouts: Vec<Layout> = messages
        .iter()
        .map(|message| Layout {
            is_any: message.full_name() == "google.protobuf.Any",
            fields: message
                .fields()
                .filter_map(|field| {
                    let Kind::Message(inner) = field.kind() else { return None };
                    let inner = *by_name.get(inner.full_name())?;
                    let kind = if field.is_map() { Field::Map(inner) } else { Field::Message(inner) };
                    Some((field.number(), kind))
                })
                .collect(),
        })
        .collect();
    keep_only_paths_to_maps(&mut layouts);
    Layouts { by_name, layouts }
});

/// Drops every message field below which neither a map nor an `Any` can be, so that those bytes are copied whole.
fn keep_only_paths_to_maps(layouts: &mut [Layout]) {
    let mut matters: Vec<bool> = layouts
        .iter()
        .map(|l| l.is_any || l.fields.iter().any(|(_, f)| matches!(f, Field::Map(_))))
        .collect();
    loop {
        let next: Vec<bool> = layouts
            .iter()
            .zip(&matters)
            .map(|(l, known)| *known || l.fields.iter().any(|(_, f)| below(&matters, *f)))
            .collect();
        if next == matters {
            break;
        }
        matters = next;
    }
    for layout in layouts {
        layout.fields.retain(|(_, field)| matches!(field, Field::Map(_)) || below(&matters, *field));
    }
}

fn below(matters: &[bool], field: Field) -> bool {
    let (Field::Map(inner) | Field::Message(inner)) = field;
    matters.get(inner).copied().unwrap_or(false)
}

/// Copies one encoded message, sorting map entries; `None` when the bytes are not a message.
fn rewrite(layout: usize, mut input: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let layout = LAYOUTS.layouts.get(layout)?;
    if layout.is_any {
        return rewrite_any(input, out);
    }
    if layout.fields.is_empty() {
        out.extend_from_slice(input);
        return Some(());
    }
    let mut entries: Vec<Vec<u8>> = Vec::new();
    let mut open_map = None;
    while !input.is_empty() {
        let (tag, whole, content, rest) = next_field(input)?;
        input = rest;
        let field = layout.fields.iter().find(|(number, _)| *number == tag >> 3).map(|(_, field)| *field);
        if open_map.is_some_and(|open| open != tag) {
            flush(&mut entries, out);
            open_map = None;
        }
        match (field, content) {
            (Some(Field::Map(inner)), Some(content)) => {
                open_map = Some(tag);
                let mut entry = Vec::with_capacity(content.len());
                rewrite(inner, content, &mut entry)?;
                entries.push(framed(tag, &entry));
            }
            (Some(Field::Message(inner)), Some(content)) => {
                let mut message = Vec::with_capacity(content.len());
                rewrite(inner, content, &mut message)?;
                out.extend_from_slice(&framed(tag, &message));
            }
            _ => out.extend_from_slice(whole),
        }
    }
    flush(&mut entries, out);
    Some(())
}

/// Entries begin with their key, so the order of their content is the order of keys; length prefixes do not count.
fn flush(entries: &mut Vec<Vec<u8>>, out: &mut Vec<u8>) {
    entries.sort_by(|a, b| content_of(a).cmp(content_of(b)));
    for entry in entries.drain(..) {
        out.extend_from_slice(&entry);
    }
}

fn content_of(framed: &[u8]) -> &[u8] {
    next_field(framed).and_then(|(_, _, content, _)| content).unwrap_or(framed)
}

fn rewrite_any(input: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let any = Any::decode(input).ok()?;
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    let value = bytes(name, &any.value);
    Any { type_url: any.type_url.clone(), value }.encode(out).ok()
}

fn framed(tag: u32, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(content.len() + 10);
    prost::encoding::encode_varint(u64::from(tag), &mut out);
    prost::encoding::encode_varint(content.len() as u64, &mut out);
    out.extend_from_slice(content);
    out
}

/// One field: its tag, all its bytes, its content when it is length-delimited, and what follows.
type Split<'a> = (u32, &'a [u8], Option<&'a [u8]>, &'a [u8]);

fn next_field(input: &[u8]) -> Option<Split<'_>> {
    let mut rest = input;
    let tag = u32::try_from(prost::encoding::decode_varint(&mut rest).ok()?).ok()?;
    let (content, rest) = match tag & 7 {
        0 => {
            prost::encoding::decode_varint(&mut rest).ok()?;
            (None, rest)
        }
        1 => (None, rest.get(8..)?),
        2 => {
            let length = usize::try_from(prost::encoding::decode_varint(&mut rest).ok()?).ok()?;
            (Some(rest.get(..length)?), rest.get(length..)?)
        }
        5 => (None, rest.get(4..)?),
        _ => return None,
    };
    let whole = input.get(..input.len() - rest.len())?;
    Some((tag, whole, content, rest))
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::Metadata;
    use envoy_types::pb::envoy::config::endpoint::v3::{
        ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints,
    };
    use envoy_types::pb::google::protobuf::{Struct, Value, value};

    use super::*;

    fn metadata() -> Metadata {
        let text = |s: &str| Value { kind: Some(value::Kind::StringValue(s.to_owned())) };
        let fields = || (0..20).map(|i| (format!("key-{i}"), text(&format!("value-{}", i * 7)))).collect();
        let structs = (0..9).map(|i| (format!("filter-{i}"), Struct { fields: fields() }));
        Metadata { filter_metadata: structs.collect(), ..Metadata::default() }
    }

    fn assignment() -> ClusterLoadAssignment {
        let endpoint = || LbEndpoint { metadata: Some(metadata()), ..LbEndpoint::default() };
        ClusterLoadAssignment {
            cluster_name: "a".to_owned(),
            endpoints: vec![LocalityLbEndpoints {
                lb_endpoints: vec![endpoint(), endpoint()],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn the_same_message_always_has_the_same_bytes() {
        let first = any(&assignment());
        for _ in 0..20 {
            assert_eq!(any(&assignment()), first);
        }
    }

    #[test]
    fn the_content_is_unchanged() {
        let decoded = ClusterLoadAssignment::decode(any(&assignment()).value.as_slice()).unwrap();
        assert_eq!(decoded, assignment());
    }

    #[test]
    fn maps_inside_an_any_are_sorted_too() {
        let outer = || Metadata {
            typed_filter_metadata: [(
                "x".to_owned(),
                Any {
                    type_url: format!("{TYPE_URL_PREFIX}{}", Metadata::full_name()),
                    value: metadata().encode_to_vec(),
                },
            )]
            .into(),
            ..Metadata::default()
        };
        assert_eq!(any(&outer()), any(&outer()));
    }

    #[test]
    fn bytes_that_are_no_message_stay_as_they_are() {
        assert_eq!(bytes("envoy.config.core.v3.Metadata", &[0xff, 0xff]), vec![0xff, 0xff]);
        assert_eq!(bytes("no.such.Message", &[1, 2, 3]), vec![1, 2, 3]);
    }
}

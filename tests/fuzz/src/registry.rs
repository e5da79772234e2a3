//! Parsers of the registry.

use std::sync::LazyLock;

use registry::config::Object;
use registry::config::parse::{parse_in, parse_mesh, parse_value};
use registry::source::consul::answer;
use registry::source::consul::convert::{Mapping, convert};
use registry::state::{Revision, State, StoredCommand};

use crate::{choice, text};

/// Istio's objects as YAML or JSON: what is accepted comes back unchanged, and what is refused says where.
pub fn istio(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    match parse_in("shop", "f", text) {
        Ok((objects, _warnings)) => {
            for object in objects {
                let shown = object.to_json();
                let (again, _) =
                    parse_value("shop", "f", &shown).unwrap_or_else(|e| panic!("{e:?}\n{shown}"));
                assert_eq!(again.len(), 1);
                assert_eq!((&again[0].spec, again[0].id()), (&object.spec, object.id()), "{shown}");
                let stored = Object::from_stored(&shown).expect("a known kind");
                assert_eq!(stored.to_json(), shown);
            }
        }
        Err(mistakes) => {
            assert!(!mistakes.is_empty());
            // a carriage return ends a line, too (YAML 1.2.2, section 5.4)
            let lines = u32::try_from(text.matches(['\r', '\n']).count()).unwrap_or(u32::MAX);
            for mistake in mistakes {
                assert!((1..=lines.saturating_add(2)).contains(&mistake.line), "{mistake}");
                assert!(mistake.column >= 1 && !mistake.message.is_empty(), "{mistake}");
            }
        }
    }
}

/// Settings of the whole mesh.
pub fn mesh(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    if let Err(mistakes) = parse_mesh("f", text) {
        assert!(!mistakes.is_empty());
    }
}

static MAPPING: LazyLock<Mapping> = LazyLock::new(|| Mapping::new("c", "dc1"));

/// Answers of a Consul server.
pub fn consul(bytes: &[u8]) {
    let Some((kind, body)) = choice(bytes) else { return };
    match kind % 4 {
        0 => {
            let Ok(named) = answer::services(body) else { return };
            for name in named.keys() {
                for host in MAPPING.hosts(name).unwrap_or_default() {
                    let dns = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
                    assert!(host.len() <= 253 && host.bytes().all(dns), "{host}");
                }
            }
        }
        1 => {
            let Ok(instances) = answer::instances(body) else { return };
            let first = convert("web", &instances, &MAPPING, None);
            assert!(first.problems.len() <= 5 && first.endpoints.len() <= instances.len());
            let again = convert("web", &instances, &MAPPING, Some(&first.service));
            assert_eq!(first, again, "a service changes by itself");
        }
        2 => drop(answer::node(body)),
        _ => drop(answer::refusals(body)),
    }
}

/// A log entry: whatever it says, it can be applied, and applied again changes nothing.
pub fn command(bytes: &[u8]) {
    let Ok(batch) = StoredCommand::decode(bytes) else { return };
    let encoded = StoredCommand::encode(&batch);
    let again = StoredCommand::decode(&encoded).expect("what was written is read");
    assert_eq!(StoredCommand::encode(&again), encoded);
    let mut state = State::default();
    let _applied = state.apply(Revision(1), &batch);
    let stored = state.encode();
    let read = State::decode(&stored).expect("what was written is read");
    assert_eq!(read.encode(), stored);
}

/// A whole state as it is stored; its checksum is always right here.
pub fn state(bytes: &[u8]) {
    assert!(bytes.len() < 4 || State::decode(bytes).is_err() || bytes.starts_with(b"MESHST"));
    let Ok(state) = State::decode(&[bytes, &crc32c::crc32c(bytes).to_le_bytes()].concat()) else { return };
    let stored = state.encode();
    let read = State::decode(&stored).expect("what was written is read");
    assert_eq!(read.encode(), stored);
}

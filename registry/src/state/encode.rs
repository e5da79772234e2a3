//! The whole state as bytes, and as single keys and values for the store.
//!
//! Both are deterministic: equal states give equal bytes. Every value begins with its version, so that a value of an
//! older program is read for ever. Values may be of any size; the store cuts them to its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::changes::Changes;
use super::command::{ObjectKey, Registration, Revision, WorkloadKey};
use super::history::History;
use super::stored::{EndpointV1, HistoryV1, ObjectV1, RegistrationV1, ServiceV1, SourceV1, source_text};
use super::vip::VipTable;
use super::{DecodeError, State, history};
use crate::config::{Kind, Object};
use crate::model::service::{Endpoint, Hostname, Service, SourceId};

/// First bytes of an encoded state; the last of them is the version of the form.
const MAGIC: &[u8; 8] = b"MESHST\0\x01";
/// Version of every value.
const VALUE_VERSION: u8 = 1;

/// What one entry of the store is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum StoreKey {
    Meta,
    Mesh,
    Object(ObjectKey),
    Service(Hostname, SourceId),
    Endpoints(Hostname, SourceId),
    Workload(WorkloadKey),
    Vip(Hostname),
    History(Revision),
}

impl StoreKey {
    fn bytes(&self) -> Vec<u8> {
        let text = match self {
            Self::Meta => "meta".to_owned(),
            Self::Mesh => "mesh".to_owned(),
            Self::Object(key) => format!("object/{key}"),
            Self::Service(host, source) => format!("service/{host}/{}", source_text(source)),
            Self::Endpoints(host, source) => format!("endpoints/{host}/{}", source_text(source)),
            Self::Workload(key) => format!("workload/{key}"),
            Self::Vip(host) => format!("vip/{host}"),
            // Sixteen digits, so that the order of keys is the order of revisions.
            Self::History(revision) => format!("history/{:016x}", revision.0),
        };
        text.into_bytes()
    }
}

#[derive(Serialize, Deserialize)]
struct MetaV1 {
    revision: u64,
    history_limit: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    history_age_ms: u64,
    /// The newest revision that history forgot.
    #[serde(default, skip_serializing_if = "is_zero")]
    history_forgotten: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

#[derive(Serialize, Deserialize)]
struct EndpointsV1 {
    host: String,
    source: SourceV1,
    endpoints: Vec<EndpointV1>,
}

#[derive(Serialize, Deserialize)]
struct VipV1 {
    host: String,
    index: u32,
}

impl State {
    /// What must be written after `changes`: each key with its new value, or none when it is to be removed. In the order
    /// of the keys.
    #[must_use]
    pub fn writes(&self, changes: &Changes) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let entries: BTreeMap<_, _> =
            changes.written.iter().map(|key| (key.bytes(), self.value(key))).collect();
        entries.into_iter().collect()
    }

    /// The whole state as keys and values, in the order of the keys.
    #[must_use]
    pub fn pairs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let keys = [StoreKey::Meta, StoreKey::Mesh]
            .into_iter()
            .chain(self.objects.keys().map(|key| StoreKey::Object(key.clone())))
            .chain(self.services.keys().map(|(host, source)| StoreKey::Service(host.clone(), source.clone())))
            .chain(
                self.endpoints.keys().map(|(host, source)| StoreKey::Endpoints(host.clone(), source.clone())),
            )
            .chain(self.workloads.keys().map(|key| StoreKey::Workload(key.clone())))
            .chain(self.vips.iter().map(|(host, _)| StoreKey::Vip(host.clone())))
            .chain(self.history.entries().map(|entry| StoreKey::History(entry.revision)));
        keys.filter_map(|key| Some((key.bytes(), self.value(&key)?))).collect()
    }

    fn value(&self, key: &StoreKey) -> Option<Vec<u8>> {
        match key {
            StoreKey::Meta => Some(value(&MetaV1 {
                revision: self.revision.0,
                history_limit: self.history.limit(),
                history_age_ms: self.history.age_ms(),
                history_forgotten: self.history.forgotten().0,
            })),
            StoreKey::Mesh => self.mesh.as_deref().map(value),
            StoreKey::Object(key) => self.objects.get(key).map(|object| value(&ObjectV1::stored(object))),
            StoreKey::Service(host, source) => {
                let service = self.services.get(&(host.clone(), source.clone()))?;
                Some(value(&ServiceV1::from(&**service)))
            }
            StoreKey::Endpoints(host, source) => {
                let endpoints = self.endpoints.get(&(host.clone(), source.clone()))?;
                Some(value(&EndpointsV1 {
                    host: host.clone(),
                    source: source.into(),
                    endpoints: endpoints.iter().map(EndpointV1::from).collect(),
                }))
            }
            StoreKey::Workload(key) => self.workloads.get(key).map(|r| value(&RegistrationV1::from(&**r))),
            StoreKey::Vip(host) => {
                self.vips.get(host).map(|index| value(&VipV1 { host: host.clone(), index }))
            }
            StoreKey::History(revision) => {
                self.history.entry(*revision).map(|entry| value(&HistoryV1::from(&**entry)))
            }
        }
    }

    /// The state that these keys and values make.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] when a key or a value is not one that [`State::writes`] or [`State::pairs`] made, or when a newer
    /// program made it.
    pub fn from_pairs<K, V>(pairs: impl IntoIterator<Item = (K, V)>) -> Result<Self, DecodeError>
    where
        K: AsRef<[u8]>,
        V: AsRef<[u8]>,
    {
        let mut parts = Parts::default();
        for (key, value) in pairs {
            parts.read(key.as_ref(), value.as_ref())?;
        }
        Ok(parts.finish())
    }

    /// The whole state as bytes, with a checksum.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        let pairs = self.pairs();
        out.extend((pairs.len() as u64).to_le_bytes());
        for part in pairs.iter().flat_map(|(key, value)| [key, value]) {
            out.extend((part.len() as u64).to_le_bytes());
            out.extend(part);
        }
        out.extend(crc32c::crc32c(&out).to_le_bytes());
        out
    }

    /// The state that [`State::encode`] wrote.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Damaged`] when the bytes were cut or changed; others as [`State::from_pairs`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let damaged = |what| DecodeError::Damaged { what };
        let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(damaged("too short"))?;
        let magic = body.strip_prefix(MAGIC);
        if magic.is_none() {
            return Err(match body.strip_prefix(b"MESHST\0").and_then(<[u8]>::first) {
                Some(found) => DecodeError::Version { found: u32::from(*found), newest: 1 },
                None => damaged("it does not begin as a state does"),
            });
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
            return Err(damaged("the checksum differs"));
        }
        let mut rest = magic.unwrap_or_default();
        let count = number(&mut rest).ok_or(damaged("no count"))?;
        let mut parts = Parts::default();
        for _ in 0..count {
            let key = part(&mut rest).ok_or(damaged("a key is cut"))?;
            let value = part(&mut rest).ok_or(damaged("a value is cut"))?;
            parts.read(key, value)?;
        }
        if rest.is_empty() { Ok(parts.finish()) } else { Err(damaged("it is too long")) }
    }
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    let (number, tail) = rest.split_first_chunk::<8>()?;
    *rest = tail;
    Some(u64::from_le_bytes(*number))
}

fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(number(rest)?).ok()?;
    let (part, tail) = rest.split_at_checked(len)?;
    *rest = tail;
    Some(part)
}

/// A stored value: its version, then JSON.
fn value<T: Serialize + ?Sized>(of: &T) -> Vec<u8> {
    let mut out = vec![VALUE_VERSION];
    // Writing plain data with text keys to memory cannot fail.
    out.extend(serde_json::to_vec(of).unwrap_or_default());
    out
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    match bytes.split_first() {
        Some((&VALUE_VERSION, json)) => Ok(serde_json::from_slice(json)?),
        Some((&found, _)) => Err(DecodeError::Version { found: u32::from(found), newest: 1 }),
        None => Err(DecodeError::Damaged { what: "an empty value" }),
    }
}

/// A state that is being put together.
#[derive(Default)]
struct Parts {
    state: State,
    vips: BTreeMap<Hostname, u32>,
    history: BTreeMap<Revision, history::Entry>,
    retention: history::Retention,
    forgotten: Revision,
}

impl Parts {
    fn read(&mut self, key: &[u8], value: &[u8]) -> Result<(), DecodeError> {
        let state = &mut self.state;
        let kind = key.split(|byte| *byte == b'/').next().unwrap_or_default();
        match kind {
            b"meta" => {
                let meta: MetaV1 = read(value)?;
                state.revision = Revision(meta.revision);
                self.retention =
                    history::Retention { entries: meta.history_limit, age_ms: meta.history_age_ms };
                self.forgotten = Revision(meta.history_forgotten);
            }
            b"mesh" => state.mesh = Some(Arc::new(read::<Value>(value)?)),
            b"object" => {
                let object = Object::try_from(read::<ObjectV1>(value)?)?;
                state.objects.insert(ObjectKey::of(&object), Arc::new(object));
            }
            b"service" => {
                let service = Service::from(read::<ServiceV1>(value)?);
                state.services.insert((service.hostname.clone(), service.source.clone()), Arc::new(service));
            }
            b"endpoints" => {
                let EndpointsV1 { host, source, endpoints } = read(value)?;
                let endpoints = endpoints.into_iter().map(Endpoint::from).collect();
                state.endpoints.insert((host, source.into()), endpoints);
            }
            b"workload" => {
                let registration = Registration::from(read::<RegistrationV1>(value)?);
                state.workloads.insert(registration.key(), Arc::new(registration));
            }
            b"vip" => {
                let VipV1 { host, index } = read(value)?;
                self.vips.insert(host, index);
            }
            b"history" => {
                let entry = history::Entry::from(read::<HistoryV1>(value)?);
                self.history.insert(entry.revision, entry);
            }
            _ => return Err(DecodeError::Key { key: String::from_utf8_lossy(key).into_owned() }),
        }
        Ok(())
    }

    fn finish(self) -> State {
        let mut state = self.state;
        state.vips = VipTable::restore(self.vips);
        state.history = History::restore(self.retention, self.forgotten, self.history);
        let entries: BTreeSet<ObjectKey> =
            state.objects_of(Kind::ServiceEntry).map(|(key, _)| key.clone()).collect();
        for key in entries {
            let object = state.objects.get(&key).cloned();
            state.index_service_entry(&key, None, object.as_deref());
        }
        state
    }
}

//! The mesh as what the log drives: the registry's state and the certificate authority's, side by side.
//!
//! A [`Command`] is for one of them, or for both at once when a workload joins. Each part is applied by its own
//! crate; here they are only told apart, stored under their own keys, and shown to the publisher.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use ca::state::{CaCommand, CaOutcome, CaState};
use prost::Message as _;
use registry::state::{Batch, Changes, Outcome as RegistryOutcome, Revision, State, StoredCommand};

use super::machine::{Frozen, Halt, StateMachine};
use super::store::{Pairs, Write};
use super::wire::mesh_command::Part;
use super::wire::{JoinCommand, MeshCommand, MeshState};
use crate::publish::Publisher;

/// The version of commands and states that this program writes; it reads this one and all before it.
const VERSION: u32 = 1;
/// Keys of the registry in the store.
const REGISTRY_KEYS: &[u8] = b"r/";
/// Keys of the certificate authority in the store.
const CA_KEYS: &[u8] = b"c/";

/// One entry of the log.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// A change of the mesh.
    Registry(Batch),
    /// A change of the certificate authority's state.
    Ca(CaCommand),
    /// A workload joins: the token is redeemed and, only if that is done, the workload registered.
    Join {
        /// The redemption.
        redeem: CaCommand,
        /// The registration.
        register: Batch,
    },
}

/// What became of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Of [`Command::Registry`].
    Registry(RegistryOutcome),
    /// Of [`Command::Ca`].
    Ca(CaOutcome),
    /// Of [`Command::Join`].
    Join {
        /// What became of the token.
        redeemed: CaOutcome,
        /// What became of the registration; nothing if the token was refused.
        registered: Option<RegistryOutcome>,
    },
}

impl Command {
    /// The bytes that the log holds.
    ///
    /// # Errors
    ///
    /// If a value has no stored form, which is a mistake of this program.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let part = match self {
            Self::Registry(batch) => Part::Registry(StoredCommand::encode(batch).into()),
            Self::Ca(command) => Part::Ca(serde_json::to_vec(command)?.into()),
            Self::Join { redeem, register } => Part::Join(JoinCommand {
                redeem: serde_json::to_vec(redeem)?.into(),
                register: StoredCommand::encode(register).into(),
            }),
        };
        Ok(MeshCommand { version: VERSION, part: Some(part) }.encode_to_vec())
    }

    /// The command that the log holds at `index`.
    ///
    /// # Errors
    ///
    /// [`Halt`] if a newer program wrote it, or the bytes are no command.
    pub fn decode(index: u64, bytes: &[u8]) -> Result<Self, Halt> {
        let halt = |reason: String| Halt { index, reason };
        let stored = MeshCommand::decode(bytes).map_err(|error| halt(format!("not a command: {error}")))?;
        if stored.version > VERSION {
            return Err(halt(newer("the command", stored.version)));
        }
        let registry = |bytes: &[u8]| StoredCommand::decode(bytes).map_err(|error| halt(error.to_string()));
        let ca = |bytes: &[u8]| {
            serde_json::from_slice(bytes)
                .map_err(|error| halt(format!("an unknown command of the CA: {error}")))
        };
        Ok(match stored.part {
            Some(Part::Registry(batch)) => Self::Registry(registry(&batch)?),
            Some(Part::Ca(command)) => Self::Ca(ca(&command)?),
            Some(Part::Join(join)) => {
                Self::Join { redeem: ca(&join.redeem)?, register: registry(&join.register)? }
            }
            None => return Err(halt("a command of an unknown kind; upgrade this member".to_owned())),
        })
    }
}

fn newer(what: &str, found: u32) -> String {
    format!("{what} has version {found}, this program knows up to {VERSION}; upgrade this member")
}

/// The whole state at one point: two values that nobody changes.
#[derive(Debug, Clone)]
pub struct View {
    /// The last applied index.
    pub revision: Revision,
    /// The mesh.
    pub registry: Arc<State>,
    /// The certificate authority's state.
    pub ca: Arc<CaState>,
}

/// The replicated mesh.
#[derive(Debug)]
pub struct Mesh {
    applied: u64,
    /// Copied on the next change only while somebody still holds a [`View`].
    registry: Arc<State>,
    ca: Arc<CaState>,
    publisher: Publisher,
    /// Since the last publication; the revision that was published.
    unshown: Changes,
    shown: Revision,
    /// The state did not come from the one before: the next snapshot is built from nothing.
    replaced: bool,
    /// Since the last writes.
    unwritten: Changes,
    ca_writes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Mesh {
    /// An empty mesh that shows itself through `publisher`.
    #[must_use]
    pub fn new(publisher: Publisher) -> Self {
        Self {
            applied: 0,
            registry: Arc::default(),
            ca: Arc::default(),
            publisher,
            unshown: Changes::default(),
            shown: Revision(0),
            replaced: false,
            unwritten: Changes::default(),
            ca_writes: BTreeMap::new(),
        }
    }

    /// The state as it is now.
    #[must_use]
    pub fn view(&self) -> View {
        View { revision: Revision(self.applied), registry: self.registry.clone(), ca: self.ca.clone() }
    }

    fn apply_registry(&mut self, index: u64, batch: &Batch) -> RegistryOutcome {
        let (changes, outcome) = Arc::make_mut(&mut self.registry).apply(Revision(index), batch);
        self.unshown.merge(&changes);
        self.unwritten.merge(&changes);
        outcome
    }

    fn apply_ca(&mut self, command: CaCommand) -> CaOutcome {
        let effect = Arc::make_mut(&mut self.ca).apply(command);
        self.note_ca(effect.writes);
        effect.outcome
    }

    fn note_ca(&mut self, writes: Vec<ca::state::Write>) {
        self.ca_writes.extend(writes.into_iter().map(|write| (write.key.into_bytes(), write.value)));
    }

    /// Another state in place of this one.
    fn replace(&mut self, index: u64, registry: State, ca: CaState) {
        self.applied = index;
        self.registry = Arc::new(registry);
        self.ca = Arc::new(ca);
        self.unshown = Changes::default();
        self.unwritten = Changes::default();
        self.ca_writes.clear();
        self.replaced = true;
    }
}

impl StateMachine for Mesh {
    type Answer = Outcome;

    fn apply(&mut self, index: u64, command: &[u8]) -> Result<Outcome, Halt> {
        let command = Command::decode(index, command)?;
        self.applied = index;
        Ok(match command {
            Command::Registry(batch) => Outcome::Registry(self.apply_registry(index, &batch)),
            Command::Ca(command) => Outcome::Ca(self.apply_ca(command)),
            Command::Join { redeem, register } => {
                let redeemed = self.apply_ca(redeem);
                let welcome = matches!(redeemed, CaOutcome::Redeemed { .. });
                let registered = welcome.then(|| self.apply_registry(index, &register));
                Outcome::Join { redeemed, registered }
            }
        })
    }

    fn take_writes(&mut self) -> Vec<Write> {
        let changes = std::mem::take(&mut self.unwritten);
        let registry = self.registry.writes(&changes).into_iter();
        let ca = std::mem::take(&mut self.ca_writes).into_iter();
        let mut writes: Vec<Write> =
            registry.map(|(key, value)| Write { key: [REGISTRY_KEYS, &key].concat(), value }).collect();
        writes.extend(ca.map(|(key, value)| Write { key: [CA_KEYS, &key].concat(), value }));
        writes
    }

    fn all_writes(&mut self) -> Vec<Write> {
        self.unwritten = Changes::default();
        self.ca_writes.clear();
        let registry = self.registry.pairs().into_iter();
        let mut writes: Vec<Write> = registry
            .map(|(key, value)| Write { key: [REGISTRY_KEYS, &key].concat(), value: Some(value) })
            .collect();
        let ca = self.ca.entries().into_iter();
        writes.extend(
            ca.map(|entry| Write { key: [CA_KEYS, entry.key.as_bytes()].concat(), value: entry.value }),
        );
        writes
    }

    fn publish(&mut self, index: u64, now: Instant) {
        self.applied = index;
        let changes = std::mem::take(&mut self.unshown);
        if std::mem::take(&mut self.replaced) {
            // Everything may be different: the mesh-wide settings stand for all that depends on them.
            let mut everything = Changes::default();
            everything.mesh = true;
            let snapshot = self.publisher.rebuild(&self.registry);
            self.publisher.publish_snapshot(snapshot, everything, now);
        } else if self.registry.revision() != self.shown {
            self.publisher.publish(&self.registry, changes, now);
        }
        self.shown = self.registry.revision();
    }

    fn freeze(&self) -> Frozen {
        let (registry, ca) = (self.registry.clone(), self.ca.clone());
        Box::new(move || {
            let state =
                MeshState { version: VERSION, registry: registry.encode().into(), ca: ca.encode().into() };
            Ok(state.encode_to_vec())
        })
    }

    fn restore(&mut self, index: u64, snapshot: &[u8]) -> Result<(), Halt> {
        let halt = |reason: String| Halt { index, reason };
        let stored = MeshState::decode(snapshot).map_err(|error| halt(format!("not a state: {error}")))?;
        if stored.version > VERSION {
            return Err(halt(newer("the snapshot", stored.version)));
        }
        let registry = State::decode(&stored.registry).map_err(|error| halt(error.to_string()))?;
        let ca = CaState::decode(&stored.ca).map_err(|error| halt(error.to_string()))?;
        self.replace(index, registry, ca);
        Ok(())
    }

    fn load(&mut self, index: u64, pairs: Pairs) -> Result<(), Halt> {
        let halt = |reason: String| Halt { index, reason };
        let part = |prefix: &'static [u8]| {
            let pairs = pairs.iter();
            pairs.filter_map(move |(key, value)| Some((key.strip_prefix(prefix)?, value.as_slice())))
        };
        let registry = State::from_pairs(part(REGISTRY_KEYS)).map_err(|error| halt(error.to_string()))?;
        let ca: Result<Vec<_>, _> =
            part(CA_KEYS).map(|(key, value)| Ok((std::str::from_utf8(key)?, value))).collect();
        let ca = ca.map_err(|error: std::str::Utf8Error| halt(error.to_string()))?;
        let ca = CaState::from_entries(ca).map_err(|error| halt(error.to_string()))?;
        self.replace(index, registry, ca);
        Ok(())
    }
}

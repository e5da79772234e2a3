//! The members of the control plane, as the log knows them, and what changes them.
//!
//! [`ClusterState`] is who is a member, who shall vote, and which tickets are out. Raft's own members follow: the
//! leader's [`keeper`] asks [`plan`] what lies between the two and does it, one safe step at a time. Targets are 1, 3
//! or 5 voters, reached by joint consensus in one step (1 to 3, 3 to 5), so that no even number is ever in force: a
//! member that waits for another one is a learner. [`boot`] makes a member out of a data folder, [`ticket`] is what a new member joins with, [`enrol`] takes it in,
//! [`secrets`] is what it keeps, and [`Members`](self::members::Members) is how operators ask for all of it.

pub mod boot;
pub mod enrol;
pub(crate) mod fleet;
pub mod keeper;
pub mod members;
pub mod plan;
pub mod secrets;
pub mod ticket;

use std::collections::{BTreeMap, BTreeSet};

use ca::authn::Hash;
use serde::{Deserialize, Serialize};

use crate::raft::part::{Part, PartError};
use crate::raft::peers::Directory;

/// The numbers of voters that may be asked for.
pub const VOTERS: [usize; 3] = [1, 3, 5];

/// The name of the mesh's root among the sealed secrets.
pub const ROOT: &str = "root";

const MEMBER_KEYS: &[u8] = b"m/";
const TICKET_KEYS: &[u8] = b"t/";
const SEALED_KEYS: &[u8] = b"s/";
const CLUSTER_KEY: &[u8] = b"c";

/// What a member says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// For people.
    pub name: String,
    /// `HOST:PORT` of its peer port.
    pub peer: String,
    /// `HOST:PORT` of xDS and certificates.
    pub xds: String,
    /// `HOST:PORT` of the admin API.
    pub admin: String,
    /// The version of its program.
    pub program: String,
    /// The newest version of commands that it reads.
    pub reads: u32,
}

/// One member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// What it says of itself.
    pub description: Description,
    /// It becomes a voter by itself, when there is room and it has caught up.
    #[serde(default)]
    pub wants_vote: bool,
    /// The member in whose place it steps when it has caught up.
    #[serde(default)]
    pub replaces: Option<u64>,
    /// Which machine it is: the one that drew this may ask again.
    #[serde(default)]
    pub instance: Option<Hash>,
}

/// A ticket that was given out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TicketRecord {
    /// Of the secret.
    pub secret: Hash,
    /// Seconds since 1970 after which it is worth nothing.
    pub expires_at: u64,
    /// Its bearer becomes a voter when there is room.
    pub wants_vote: bool,
    /// The member that its bearer replaces.
    #[serde(default)]
    pub replaces: Option<u64>,
    /// The member that it made, and the machine that asked.
    #[serde(default)]
    pub redeemed: Option<(u64, Hash)>,
}

/// Values that are one pair together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Common {
    voters: BTreeSet<u64>,
    retired: BTreeSet<u64>,
    last: u64,
}

/// The members, who shall vote, and the tickets that are out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterState {
    members: BTreeMap<u64, Member>,
    tickets: BTreeMap<String, TicketRecord>,
    sealed: BTreeMap<String, String>,
    common: Common,
    /// Keys that changed and are not written.
    unwritten: BTreeSet<Vec<u8>>,
}

/// A change of the members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterCommand {
    /// The founder enters itself.
    Found {
        /// Its number.
        id: u64,
        /// Who it is.
        description: Description,
    },
    /// A member says again who it is.
    Describe {
        /// Which one.
        id: u64,
        /// Who it is now.
        description: Description,
    },
    /// A ticket is given out.
    AddTicket {
        /// Its public part.
        id: String,
        /// What is kept of it.
        ticket: TicketRecord,
    },
    /// A ticket is worth nothing any more.
    RevokeTicket {
        /// Its public part.
        id: String,
    },
    /// Tickets that have ended are forgotten.
    Prune {
        /// Those that ended before, in seconds since 1970.
        before: u64,
    },
    /// A new member introduces itself with a ticket.
    Enrol {
        /// The public part of the ticket.
        ticket: String,
        /// The hash of the secret that it presented.
        secret: Hash,
        /// Which machine it is.
        instance: Hash,
        /// Who it is.
        description: Description,
        /// When, in seconds since 1970.
        now: u64,
    },
    /// A member whose data is lost asks for a new number in the place of its old one.
    Reenrol {
        /// The old number.
        old: u64,
        /// Which machine it is now.
        instance: Hash,
        /// Who it is.
        description: Description,
    },
    /// Other voters, and members that go.
    Change {
        /// The voters that whoever asks has seen.
        expected: BTreeSet<u64>,
        /// The voters that shall be.
        voters: BTreeSet<u64>,
        /// Who goes, for ever.
        remove: BTreeSet<u64>,
    },
    /// A secret of the cluster, sealed under the cluster's key, in base64. One that is there stays.
    Seal {
        /// What it is.
        name: String,
        /// The sealed bytes.
        sealed: String,
    },
}

/// What became of a [`ClusterCommand`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterOutcome {
    /// Done, or it was so already.
    Done,
    /// The member has this number.
    Enrolled(u64),
    /// Nothing changed.
    Refused(ClusterRefusal),
}

/// Why a change of the members is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterRefusal {
    /// Somebody else founded it.
    #[error("the cluster has been founded already")]
    Founded,
    /// There is no such member.
    #[error("there is no member {}{}", .0, removed(*.1))]
    NoMember(u64, bool),
    /// There is no such ticket, or not with this secret.
    #[error("the ticket is not known; make one with `istioctl members add`")]
    NoTicket,
    /// The ticket has ended.
    #[error("the ticket has expired; make another one with `istioctl members add`")]
    Expired,
    /// Another machine was quicker.
    #[error("the ticket was used by another machine; make another one with `istioctl members add`")]
    Used,
    /// The voters would not be 1, 3 or 5.
    #[error("{0}")]
    Voters(String),
    /// The voters have changed meanwhile.
    #[error("the voters have changed meanwhile, they are {0}; look again and repeat")]
    Conflict(String),
}

fn removed(retired: bool) -> &'static str {
    if retired { "; it was removed, and its number is never used again" } else { "" }
}

/// Numbers as people read them.
#[must_use]
pub fn listed(ids: &BTreeSet<u64>) -> String {
    let ids: Vec<String> = ids.iter().map(u64::to_string).collect();
    if ids.is_empty() { "nobody".to_owned() } else { ids.join(", ") }
}

impl ClusterState {
    /// The members by number.
    #[must_use]
    pub fn members(&self) -> &BTreeMap<u64, Member> {
        &self.members
    }

    /// One member.
    #[must_use]
    pub fn member(&self, id: u64) -> Option<&Member> {
        self.members.get(&id)
    }

    /// The members that shall vote.
    #[must_use]
    pub fn voters(&self) -> &BTreeSet<u64> {
        &self.common.voters
    }

    /// Numbers that are never used again.
    #[must_use]
    pub fn retired(&self) -> &BTreeSet<u64> {
        &self.common.retired
    }

    /// The tickets that are out, by their public part.
    #[must_use]
    pub fn tickets(&self) -> &BTreeMap<String, TicketRecord> {
        &self.tickets
    }

    /// A sealed secret of the cluster, in base64.
    #[must_use]
    pub fn sealed(&self, name: &str) -> Option<&str> {
        self.sealed.get(name).map(String::as_str)
    }

    /// The newest version of commands that all members read; nothing while there are none.
    #[must_use]
    pub fn level(&self) -> Option<u32> {
        self.members.values().map(|member| member.description.reads).min()
    }

    /// Where the members are.
    #[must_use]
    pub fn directory(&self) -> Directory {
        let address = |(id, member): (&u64, &Member)| (*id, member.description.peer.clone());
        Directory {
            addresses: self.members.iter().map(address).collect(),
            retired: self.common.retired.clone(),
        }
    }

    /// Whether the members may become these voters after `remove` have gone.
    ///
    /// # Errors
    ///
    /// [`ClusterRefusal`].
    pub fn check(&self, voters: &BTreeSet<u64>, remove: &BTreeSet<u64>) -> Result<(), ClusterRefusal> {
        for id in voters.iter().chain(remove) {
            if !self.members.contains_key(id) {
                return Err(ClusterRefusal::NoMember(*id, self.common.retired.contains(id)));
            }
        }
        if let Some(id) = voters.intersection(remove).next() {
            return Err(ClusterRefusal::Voters(format!("member {id} cannot both go and vote")));
        }
        let going = self.common.voters.difference(voters).map(u64::to_string).collect::<Vec<_>>().join(" ");
        match voters.len() {
            0 => Err(ClusterRefusal::Voters(
                "the last voter cannot go; let another member take its place first (`istioctl members replace`)"
                    .to_owned(),
            )),
            count if VOTERS.contains(&count) => Ok(()),
            count if count > 5 => Err(ClusterRefusal::Voters(format!("at most 5 members vote, these are {count}"))),
            count => Err(ClusterRefusal::Voters(format!(
                "1, 3 or 5 members vote, this would leave {count}: replace the member instead (`istioctl members \
                 replace {going}`), or change two voters at once"
            ))),
        }
    }

    fn found(&mut self, id: u64, description: Description) -> Result<ClusterOutcome, ClusterRefusal> {
        if !self.members.is_empty() {
            return Err(ClusterRefusal::Founded);
        }
        self.put(id, Member { description, wants_vote: true, replaces: None, instance: None });
        self.change(|common| {
            common.voters = [id].into();
            common.last = common.last.max(id);
        });
        Ok(ClusterOutcome::Done)
    }

    fn describe(&mut self, id: u64, description: Description) -> Result<ClusterOutcome, ClusterRefusal> {
        let retired = self.common.retired.contains(&id);
        let mut member = self.members.get(&id).cloned().ok_or(ClusterRefusal::NoMember(id, retired))?;
        member.description = description;
        self.put(id, member);
        Ok(ClusterOutcome::Done)
    }

    fn enrol(
        &mut self,
        id: String,
        (secret, instance): (Hash, Hash),
        description: Description,
        now: u64,
    ) -> Result<ClusterOutcome, ClusterRefusal> {
        let ticket = self.tickets.get(&id).filter(|ticket| ticket.secret.matches(&secret));
        let mut ticket = ticket.cloned().ok_or(ClusterRefusal::NoTicket)?;
        if let Some((member, by)) = &ticket.redeemed {
            let again = *by == instance && self.members.contains_key(member);
            return if again { Ok(ClusterOutcome::Enrolled(*member)) } else { Err(ClusterRefusal::Used) };
        }
        if ticket.expires_at < now {
            return Err(ClusterRefusal::Expired);
        }
        let number = self.add(description, ticket.wants_vote, ticket.replaces, instance);
        ticket.redeemed = Some((number, instance));
        self.put_ticket(id, Some(ticket));
        Ok(ClusterOutcome::Enrolled(number))
    }

    fn reenrol(
        &mut self,
        old: u64,
        instance: Hash,
        description: Description,
    ) -> Result<ClusterOutcome, ClusterRefusal> {
        let same = self.members.iter().find(|(_, member)| member.instance == Some(instance));
        if let Some((id, _)) = same {
            return Ok(ClusterOutcome::Enrolled(*id));
        }
        let retired = self.common.retired.contains(&old);
        let wants_vote = self.members.get(&old).ok_or(ClusterRefusal::NoMember(old, retired))?.wants_vote;
        Ok(ClusterOutcome::Enrolled(self.add(description, wants_vote, Some(old), instance)))
    }

    fn add(
        &mut self,
        description: Description,
        wants_vote: bool,
        replaces: Option<u64>,
        instance: Hash,
    ) -> u64 {
        let id = self.common.last + 1;
        self.change(|common| common.last = id);
        self.put(id, Member { description, wants_vote, replaces, instance: Some(instance) });
        id
    }

    fn change_members(
        &mut self,
        expected: &BTreeSet<u64>,
        voters: BTreeSet<u64>,
        remove: &BTreeSet<u64>,
    ) -> Result<ClusterOutcome, ClusterRefusal> {
        if *expected != self.common.voters {
            return Err(ClusterRefusal::Conflict(listed(&self.common.voters)));
        }
        self.check(&voters, remove)?;
        for id in remove {
            self.members.remove(id);
            self.unwritten.insert(key(MEMBER_KEYS, id));
        }
        self.change(|common| {
            common.voters = voters;
            common.retired.extend(remove);
        });
        Ok(ClusterOutcome::Done)
    }

    fn put(&mut self, id: u64, member: Member) {
        self.unwritten.insert(key(MEMBER_KEYS, &id));
        self.members.insert(id, member);
    }

    fn put_ticket(&mut self, id: String, ticket: Option<TicketRecord>) {
        self.unwritten.insert([TICKET_KEYS, id.as_bytes()].concat());
        match ticket {
            Some(ticket) => self.tickets.insert(id, ticket),
            None => self.tickets.remove(&id),
        };
    }

    fn change(&mut self, change: impl FnOnce(&mut Common)) {
        change(&mut self.common);
        self.unwritten.insert(CLUSTER_KEY.to_vec());
    }
}

fn key(prefix: &[u8], id: &u64) -> Vec<u8> {
    [prefix, &id.to_be_bytes()].concat()
}

/// JSON with fields in the order of the type: equal values give equal bytes.
fn encoded(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

impl Part for ClusterState {
    type Command = ClusterCommand;
    type Outcome = ClusterOutcome;

    fn apply(&mut self, _index: u64, command: ClusterCommand) -> ClusterOutcome {
        let applied = match command {
            ClusterCommand::Found { id, description } => self.found(id, description),
            ClusterCommand::Describe { id, description } => self.describe(id, description),
            ClusterCommand::AddTicket { id, ticket } => {
                self.put_ticket(id, Some(ticket));
                Ok(ClusterOutcome::Done)
            }
            ClusterCommand::RevokeTicket { id } => {
                let known = self.tickets.contains_key(&id);
                if known {
                    self.put_ticket(id, None);
                }
                if known { Ok(ClusterOutcome::Done) } else { Err(ClusterRefusal::NoTicket) }
            }
            ClusterCommand::Prune { before } => {
                let ended = self.tickets.iter().filter(|(_, ticket)| ticket.expires_at < before);
                for id in ended.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
                    self.put_ticket(id, None);
                }
                Ok(ClusterOutcome::Done)
            }
            ClusterCommand::Enrol { ticket, secret, instance, description, now } => {
                self.enrol(ticket, (secret, instance), description, now)
            }
            ClusterCommand::Reenrol { old, instance, description } => {
                self.reenrol(old, instance, description)
            }
            ClusterCommand::Change { expected, voters, remove } => {
                self.change_members(&expected, voters, &remove)
            }
            ClusterCommand::Seal { name, sealed } => {
                if !self.sealed.contains_key(&name) {
                    self.unwritten.insert([SEALED_KEYS, name.as_bytes()].concat());
                    self.sealed.insert(name, sealed);
                }
                Ok(ClusterOutcome::Done)
            }
        };
        applied.unwrap_or_else(ClusterOutcome::Refused)
    }

    fn take_changed(&mut self) -> BTreeSet<Vec<u8>> {
        std::mem::take(&mut self.unwritten)
    }

    fn value(&self, key: &[u8]) -> Option<Vec<u8>> {
        let text = |bytes| std::str::from_utf8(bytes).ok();
        if let Some(id) = key.strip_prefix(MEMBER_KEYS) {
            return self.members.get(&u64::from_be_bytes(id.try_into().ok()?)).map(encoded);
        }
        if let Some(id) = key.strip_prefix(TICKET_KEYS) {
            return self.tickets.get(text(id)?).map(encoded);
        }
        if let Some(name) = key.strip_prefix(SEALED_KEYS) {
            return self.sealed.get(text(name)?).map(|sealed| sealed.clone().into_bytes());
        }
        (key == CLUSTER_KEY && self.common != Common::default()).then(|| encoded(&self.common))
    }

    fn pairs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let members = self.members.keys().map(|id| key(MEMBER_KEYS, id));
        let tickets = self.tickets.keys().map(|id| [TICKET_KEYS, id.as_bytes()].concat());
        let sealed = self.sealed.keys().map(|name| [SEALED_KEYS, name.as_bytes()].concat());
        let keys = members.chain(tickets).chain(sealed).chain([CLUSTER_KEY.to_vec()]);
        keys.filter_map(|key| Some((key.clone(), self.value(&key)?))).collect()
    }

    fn from_pairs<'a>(pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<Self, PartError> {
        let mut state = Self::default();
        for (key, value) in pairs {
            let wrong = |error: serde_json::Error| PartError::new(key, error);
            let text =
                |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|error| PartError::new(key, error));
            if let Some(id) = key.strip_prefix(MEMBER_KEYS) {
                let id = id.try_into().map_err(|_| PartError::new(key, "not the number of a member"))?;
                let member = serde_json::from_slice(value).map_err(wrong)?;
                state.members.insert(u64::from_be_bytes(id), member);
            } else if let Some(id) = key.strip_prefix(TICKET_KEYS) {
                state.tickets.insert(text(id)?, serde_json::from_slice(value).map_err(wrong)?);
            } else if let Some(name) = key.strip_prefix(SEALED_KEYS) {
                state.sealed.insert(text(name)?, text(value)?);
            } else if key == CLUSTER_KEY {
                state.common = serde_json::from_slice(value).map_err(wrong)?;
            } else {
                return Err(PartError::new(key, "unknown key"));
            }
        }
        Ok(state)
    }
}

#[cfg(test)]
#[path = "cluster/tests.rs"]
mod tests;

//! What operators ask of the members: who is there, who comes, who goes, who leads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ca::authn::Hash;
use ca::renewal::Clock;
use ca::state::unix_seconds;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::plan::caught_up;
use super::ticket::{Ticket, TicketError};
use super::{
    ClusterCommand, ClusterOutcome, ClusterRefusal, ClusterState, Description, TicketRecord, listed,
};
use crate::raft::node::{Progress, Status};
use crate::raft::peers::links::Connected;
use crate::raft::wire::{LoadRequest, LookRequest, WaitReply, WaitRequest};
use crate::raft::{Command, Origin, Outcome, ProposeError, Raft};

/// Leadership that has not moved within this time did not.
const TRANSFER: Duration = Duration::from_secs(10);
/// A leader that does not say how the members stand within this time is not asked further.
const ASK: Duration = Duration::from_secs(2);

/// A member that does not tell of its proxies within this time is left out.
const LOOK: Duration = Duration::from_secs(5);

/// What other members said of the proxies that they serve.
pub(crate) struct Looked<T> {
    /// Of each that answered.
    pub(crate) answers: Vec<T>,
    /// Some member did not answer.
    pub(crate) partial: bool,
}

/// The members of the control plane, for operators. Clones are the same.
#[derive(Clone)]
pub struct Members {
    raft: Raft,
    peers: Option<Peers>,
    clock: Clock,
}

/// What is only there when this member has a peer port.
#[derive(Clone)]
pub struct Peers {
    /// Those connected.
    pub connected: Connected,
    /// The fingerprint of the peers' root.
    pub ca: Hash,
}

/// How a member takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Part {
    /// It leads.
    Leader,
    /// It votes.
    Voter,
    /// It follows and serves, and does not vote.
    Learner,
    /// It was taken in and is not known to Raft yet.
    Joining,
}

/// A member as operators see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberView {
    /// Its number.
    pub id: u64,
    /// For people.
    pub name: String,
    /// How it takes part.
    pub part: Part,
    /// `HOST:PORT` of its peer port.
    pub peer: String,
    /// `HOST:PORT` of xDS.
    pub xds: String,
    /// `HOST:PORT` of the admin API.
    pub admin: String,
    /// Its program.
    pub program: String,
    /// It becomes a voter by itself when there is room.
    pub wants_vote: bool,
    /// The member in whose place it steps when it has caught up.
    pub replaces: Option<u64>,
    /// How many entries its log is behind the leader's, as far as the leader is known.
    pub behind: Option<u64>,
    /// Whether the leader hears it.
    pub heard: Option<bool>,
}

/// What a new member shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMember {
    /// It becomes a voter when there is room; otherwise it only serves.
    pub voter: bool,
    /// The member whose place it takes.
    pub replaces: Option<u64>,
    /// How long the ticket may be used.
    pub ttl: Duration,
}

/// Why something was not done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MembersError {
    /// It is not safe, or makes no sense; the reason says what to do.
    #[error("{0}")]
    Refused(String),
    /// There is no such member.
    #[error("{0}")]
    NotFound(String),
    /// The log did not take it.
    #[error(transparent)]
    Log(#[from] ProposeError),
}

impl From<ClusterRefusal> for MembersError {
    fn from(refusal: ClusterRefusal) -> Self {
        let text = refusal.to_string();
        if matches!(refusal, ClusterRefusal::NoMember(..)) {
            Self::NotFound(text)
        } else {
            Self::Refused(text)
        }
    }
}

impl From<TicketError> for MembersError {
    fn from(error: TicketError) -> Self {
        Self::Refused(error.to_string())
    }
}

/// How the leader sees the members.
struct Standing {
    leader: Option<u64>,
    last: u64,
    progress: BTreeMap<u64, Progress>,
}

impl Standing {
    fn of(&self, id: u64) -> Option<Progress> {
        if self.leader == Some(id) {
            return Some(Progress { matched: self.last, active: true });
        }
        self.progress.get(&id).copied()
    }
}

impl Members {
    /// The members, through this member's log.
    #[must_use]
    pub fn new(raft: Raft, peers: Option<Peers>, clock: Clock) -> Self {
        Self { raft, peers, clock }
    }

    /// Waits at most so long until the proxies that other members serve run a revision, and gives what each says. A
    /// member that does not answer serves nobody: its proxies are on their way to others.
    pub(crate) async fn wait(&self, revision: u64, within: Duration) -> Vec<WaitReply> {
        let Some(peers) = &self.peers else { return Vec::new() };
        let within_milliseconds = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let asked = peers.connected.all().into_values().map(|mut client| async move {
            let waiting = client.wait(WaitRequest { revision, within_milliseconds });
            let answer = tokio::time::timeout(within + ASK, waiting).await;
            Some(answer.ok()?.ok()?.into_inner())
        });
        futures::future::join_all(asked).await.into_iter().flatten().collect()
    }

    /// Asks every other member about the proxies that it serves.
    pub(crate) async fn look<T: DeserializeOwned>(&self, request: LookRequest) -> Looked<T> {
        let status = self.raft.status().borrow().clone();
        let others = status.voters.iter().chain(&status.learners).filter(|id| **id != status.id);
        let asked = others.map(|id| {
            let client = self.peers.as_ref().and_then(|peers| peers.connected.client(*id));
            let request = request.clone();
            async move {
                let answer = tokio::time::timeout(LOOK, client?.look(request)).await.ok()?;
                let refused =
                    |error: &_| tracing::info!(member = id, %error, "a member does not tell of its proxies");
                serde_json::from_slice(&answer.inspect_err(refused).ok()?.into_inner().json).ok()
            }
        });
        let told: Vec<Option<T>> = futures::future::join_all(asked).await;
        let partial = told.iter().any(Option::is_none);
        Looked { answers: told.into_iter().flatten().collect(), partial }
    }

    /// All members, in the order of their numbers.
    ///
    /// # Errors
    ///
    /// [`MembersError::Log`] when this member has stopped.
    pub async fn list(&self) -> Result<Vec<MemberView>, MembersError> {
        let cluster = self.raft.cluster().borrow().clone();
        let status = self.raft.status().borrow().clone();
        let standing = self.standing(&status).await;
        if cluster.members().is_empty() {
            return Ok(vec![alone(&status)]);
        }
        let view = |(id, member): (&u64, &super::Member)| {
            let Description { name, peer, xds, admin, program, .. } = member.description.clone();
            let progress = standing.of(*id);
            MemberView {
                id: *id,
                name,
                part: part(*id, &status),
                peer,
                xds,
                admin,
                program,
                wants_vote: member.wants_vote,
                replaces: member.replaces.filter(|old| cluster.member(*old).is_some()),
                behind: progress.map(|progress| standing.last.saturating_sub(progress.matched)),
                heard: progress.map(|progress| progress.active),
            }
        };
        Ok(cluster.members().iter().map(view).collect())
    }

    /// Makes a ticket for a new member. It is shown this once.
    ///
    /// # Errors
    ///
    /// [`MembersError`]; also when this member has no peer port.
    pub async fn add(&self, new: NewMember, origin: Option<&Origin>) -> Result<Ticket, MembersError> {
        let Some(peers) = &self.peers else {
            return Err(MembersError::Refused(
                "this member stands alone: give it `peers.advertise` in its settings first".to_owned(),
            ));
        };
        let cluster = self.cluster().await?;
        if let Some(old) = new.replaces {
            known(&cluster, &[old].into())?;
        }
        let addresses = cluster.directory().addresses.into_values().collect();
        let ticket = Ticket::generate(addresses, peers.ca)?;
        let record = TicketRecord {
            secret: ticket.secret.hash(),
            expires_at: unix_seconds((self.clock)() + new.ttl),
            wants_vote: new.voter,
            replaces: new.replaces,
            redeemed: None,
        };
        self.command(ClusterCommand::AddTicket { id: ticket.id.clone(), ticket: record }, origin).await?;
        Ok(ticket)
    }

    /// Learners become voters, all at once.
    ///
    /// # Errors
    ///
    /// [`MembersError::Refused`] if the voters would not be 1, 3 or 5, or one of them is behind or not heard.
    pub async fn promote(&self, ids: &BTreeSet<u64>, origin: Option<&Origin>) -> Result<(), MembersError> {
        let cluster = self.cluster().await?;
        known(&cluster, ids)?;
        let voters: BTreeSet<u64> = cluster.voters().union(ids).copied().collect();
        cluster.check(&voters, &BTreeSet::new())?;
        let standing = self.standing_of_leader().await?;
        for id in ids {
            let ready = standing.of(*id).is_some_and(|progress| caught_up(progress, standing.last));
            if !ready {
                let behind = match standing.of(*id) {
                    Some(progress) if progress.active => {
                        format!("is {} entries behind", standing.last.saturating_sub(progress.matched))
                    }
                    Some(_) => "is not heard".to_owned(),
                    None => "has not begun to follow".to_owned(),
                };
                return Err(MembersError::Refused(format!(
                    "member {id} {behind}: it may vote when it has caught up"
                )));
            }
        }
        self.change(&cluster, voters, BTreeSet::new(), origin).await
    }

    /// Members go, for ever.
    ///
    /// # Errors
    ///
    /// [`MembersError::Refused`] if the voters left would not be 1, 3 or 5, or most of them are not heard.
    pub async fn remove(&self, ids: &BTreeSet<u64>, origin: Option<&Origin>) -> Result<(), MembersError> {
        let cluster = self.cluster().await?;
        known(&cluster, ids)?;
        let voters: BTreeSet<u64> = cluster.voters().difference(ids).copied().collect();
        cluster.check(&voters, ids)?;
        if voters != *cluster.voters() {
            let standing = self.standing_of_leader().await?;
            let heard = |id: &&u64| standing.of(**id).is_some_and(|progress| progress.active);
            let here = voters.iter().filter(heard).count();
            if here * 2 <= voters.len() {
                return Err(MembersError::Refused(format!(
                    "of the voters left ({}) only {here} are heard: without a majority nothing could be written",
                    listed(&voters)
                )));
            }
        }
        self.change(&cluster, voters, ids.clone(), origin).await
    }

    /// Leadership moves to a voter.
    ///
    /// # Errors
    ///
    /// [`MembersError::Refused`] if it does not vote, or did not take over in time.
    pub async fn transfer(&self, to: u64) -> Result<(), MembersError> {
        let cluster = self.cluster().await?;
        known(&cluster, &[to].into())?;
        let mut status = self.raft.status();
        if !status.borrow().voters.contains(&to) {
            return Err(MembersError::Refused(format!("member {to} does not vote, so it cannot lead")));
        }
        self.raft.transfer(to);
        let moved = tokio::time::timeout(TRANSFER, status.wait_for(|status| status.leader == Some(to))).await;
        match moved {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(MembersError::Log(ProposeError::Stopped(None))),
            Err(_) => Err(MembersError::Refused(format!("member {to} did not take over in time"))),
        }
    }

    /// The members as of now, on all members.
    async fn cluster(&self) -> Result<std::sync::Arc<ClusterState>, MembersError> {
        self.raft.read_index().await?;
        Ok(self.raft.cluster().borrow().clone())
    }

    async fn change(
        &self,
        cluster: &ClusterState,
        voters: BTreeSet<u64>,
        remove: BTreeSet<u64>,
        origin: Option<&Origin>,
    ) -> Result<(), MembersError> {
        let expected = cluster.voters().clone();
        self.command(ClusterCommand::Change { expected, voters, remove }, origin).await
    }

    async fn command(&self, command: ClusterCommand, origin: Option<&Origin>) -> Result<(), MembersError> {
        let command = Command::Cluster(command);
        let (_, outcome) = match origin {
            Some(origin) => self.raft.propose_as(&command, origin).await?,
            None => self.raft.propose(&command).await?,
        };
        if let Outcome::Cluster(ClusterOutcome::Refused(refusal)) = outcome {
            return Err(refusal.into());
        }
        Ok(())
    }

    async fn standing_of_leader(&self) -> Result<Standing, MembersError> {
        let status = self.raft.status().borrow().clone();
        let standing = self.standing(&status).await;
        if standing.leader.is_some() && (status.leading || !standing.progress.is_empty()) {
            return Ok(standing);
        }
        Err(MembersError::Refused("the leader does not say how the members stand; try again".to_owned()))
    }

    /// How the leader sees the members; what is not known is left out.
    async fn standing(&self, status: &Status) -> Standing {
        if status.leading {
            let (leader, last) = (Some(status.id), status.last_index);
            return Standing { leader, last, progress: status.progress.clone() };
        }
        let mut standing =
            Standing { leader: status.leader, last: status.last_index, progress: BTreeMap::new() };
        let client = status.leader.and_then(|leader| self.peers.as_ref()?.connected.client(leader));
        let Some(mut client) = client else { return standing };
        if let Ok(Ok(reply)) = tokio::time::timeout(ASK, client.load(LoadRequest::default())).await {
            let reply = reply.into_inner();
            standing.last = reply.last_index;
            let told = reply.progress.into_iter();
            standing.progress =
                told.map(|peer| (peer.id, Progress { matched: peer.matched, active: peer.active })).collect();
        }
        standing
    }
}

fn known(cluster: &ClusterState, ids: &BTreeSet<u64>) -> Result<(), MembersError> {
    let missing = ids.iter().find(|id| cluster.member(**id).is_none());
    missing.map_or(Ok(()), |id| Err(ClusterRefusal::NoMember(*id, cluster.retired().contains(id)).into()))
}

/// A member that stands alone and has said nothing of itself.
fn alone(status: &Status) -> MemberView {
    MemberView {
        id: status.id,
        name: String::new(),
        part: part(status.id, status),
        peer: String::new(),
        xds: String::new(),
        admin: String::new(),
        program: env!("CARGO_PKG_VERSION").to_owned(),
        wants_vote: true,
        replaces: None,
        behind: Some(0),
        heard: Some(true),
    }
}

fn part(id: u64, status: &Status) -> Part {
    if status.leader == Some(id) {
        Part::Leader
    } else if status.voters.contains(&id) {
        Part::Voter
    } else if status.learners.contains(&id) {
        Part::Learner
    } else {
        Part::Joining
    }
}

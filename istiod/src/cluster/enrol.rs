//! A new member is taken in: what it asks, and what a member answers.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ca::authn::Hash;
use ca::identity::TrustDomain;
use ca::renewal::Clock;
use ca::state::unix_seconds;
use ca::tls::IdentityWatch;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tonic::{Code, Status};

use super::secrets::Secrets;
use super::ticket::Ticket;
use super::{ClusterCommand, ClusterOutcome, Description};
use crate::api::served::Served;
use crate::raft::peers::service::Host;
use crate::raft::peers::tls;
use crate::raft::wire::peers_client::PeersClient;
use crate::raft::wire::{
    EnrolReply, EnrolRequest, HeardAgent, LookReply, LookRequest, PeerAddress, PeerDescription, WaitReply,
};
use crate::raft::{Command, Outcome, Raft};

/// Pause before all members are asked again.
const PAUSE: Duration = Duration::from_secs(1);

impl From<PeerDescription> for Description {
    fn from(said: PeerDescription) -> Self {
        let PeerDescription { name, peer, xds, admin, program, reads } = said;
        Self { name, peer, xds, admin, program, reads }
    }
}

impl From<Description> for PeerDescription {
    fn from(said: Description) -> Self {
        let Description { name, peer, xds, admin, program, reads } = said;
        Self { name, peer, xds, admin, program, reads }
    }
}

/// The part of a member that takes others in.
pub struct Door {
    /// The log.
    pub raft: Raft,
    /// What a new member is given.
    pub secrets: Secrets,
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// What time it is.
    pub clock: Clock,
    /// What this member serves, once it does.
    pub serving: Arc<OnceLock<Serving>>,
}

/// What a member tells its peers of those it serves.
pub struct Serving {
    /// Connected xDS streams.
    pub streams: watch::Receiver<u64>,
    /// Its proxies.
    pub served: Served,
    /// The agents that it heard within a time.
    pub heard: Box<dyn Fn(Duration) -> Vec<HeardAgent> + Send + Sync>,
}

impl Door {
    async fn take_in(&self, request: EnrolRequest, known: Option<u64>) -> Result<EnrolReply, Status> {
        let EnrolRequest { ticket, secret, instance, member } = request;
        let description = Description::from(member.unwrap_or_default());
        let written = self.raft.cluster().borrow().level().unwrap_or(1);
        if description.reads < written {
            return Err(Status::failed_precondition(format!(
                "this program reads commands up to version {}, the cluster writes version {written}: upgrade it first",
                description.reads
            )));
        }
        if description.peer.is_empty() || instance.is_empty() {
            return Err(Status::invalid_argument("a member says where its peer port is"));
        }
        let name = description.name.clone();
        let instance = Hash::of(instance.as_bytes());
        let command = match known {
            Some(old) => ClusterCommand::Reenrol { old, instance, description },
            None => {
                let secret = Hash::of(secret.as_bytes());
                let now = unix_seconds((self.clock)());
                ClusterCommand::Enrol { ticket, secret, instance, description, now }
            }
        };
        let answer = self.raft.propose(&Command::Cluster(command)).await;
        match answer.map_err(|error| Status::unavailable(error.to_string()))? {
            (_, Outcome::Cluster(ClusterOutcome::Enrolled(id))) => {
                tracing::info!(member = id, name, old = known, "a member was taken in");
                let mut reply = self.secrets.reply(id, self.trust_domain.as_str());
                let addresses = self.raft.cluster().borrow().directory().addresses;
                reply.peers =
                    addresses.into_iter().map(|(id, address)| PeerAddress { id, address }).collect();
                Ok(reply)
            }
            (_, Outcome::Cluster(ClusterOutcome::Refused(refusal))) => {
                tracing::warn!(name, error = %refusal, "a machine was not taken in");
                Err(Status::permission_denied(refusal.to_string()))
            }
            (_, other) => Err(Status::internal(format!("the log answered something else: {other:?}"))),
        }
    }
}

impl Host for Door {
    fn enrol(&self, request: EnrolRequest, known: Option<u64>) -> BoxFuture<'_, Result<EnrolReply, Status>> {
        Box::pin(self.take_in(request, known))
    }

    fn streams(&self) -> u64 {
        self.serving.get().map_or(0, |serving| *serving.streams.borrow())
    }

    fn heard(&self, within: Duration) -> Vec<HeardAgent> {
        self.serving.get().map_or_else(Vec::new, |serving| (serving.heard)(within))
    }

    fn wait(&self, revision: u64, within: Duration) -> BoxFuture<'_, WaitReply> {
        Box::pin(async move {
            let Some(serving) = self.serving.get() else { return WaitReply::default() };
            let report = serving.served.status.wait(revision, tokio::time::Instant::now() + within).await;
            crate::api::waited(&report)
        })
    }

    fn look(&self, request: LookRequest) -> BoxFuture<'_, Result<LookReply, Status>> {
        Box::pin(async move {
            let serving =
                self.serving.get().ok_or_else(|| Status::unavailable("this member does not serve yet"))?;
            let looked = serving.served.look(request).await;
            Ok(LookReply { json: looked.map_err(|error| Status::unknown(error.to_string()))?.into() })
        })
    }
}

/// Why a machine was not taken in.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// A member said no.
    #[error("the cluster does not take this machine in: {0}")]
    Refused(String),
    /// TLS cannot be set up.
    #[error("no TLS towards the members")]
    Tls(#[from] rustls::Error),
}

/// Joins with a ticket: asks its members in turn, again and again, until one takes it in or refuses.
///
/// # Errors
///
/// [`EnrolError`].
pub async fn join(
    ticket: &Ticket,
    instance: &str,
    description: &Description,
) -> Result<EnrolReply, EnrolError> {
    let request = EnrolRequest {
        ticket: ticket.id.clone(),
        secret: ticket.secret.expose().to_owned(),
        instance: instance.to_owned(),
        member: Some(description.clone().into()),
    };
    let tls = ca::client::bootstrap_tls(ticket.ca, &tls::domain())?;
    loop {
        for address in &ticket.peers {
            let asked = async {
                let channel = ca::client::connect(address, Arc::clone(&tls)).await.map_err(String::from)?;
                Ok(PeersClient::new(channel).enrol(request.clone()).await)
            };
            if let Some(reply) = judged(address, asked.await)? {
                return Ok(reply);
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Asks for a new number with the certificate of the old one, because the data of the old one is lost. Asks `peers` in
/// turn until one decides.
///
/// # Errors
///
/// [`EnrolError`].
pub async fn rejoin(
    peers: &[(u64, String)],
    identity: IdentityWatch,
    instance: &str,
    description: &Description,
) -> Result<EnrolReply, EnrolError> {
    let request = EnrolRequest {
        instance: instance.to_owned(),
        member: Some(description.clone().into()),
        ..EnrolRequest::default()
    };
    let config = tls::client_config(identity)?;
    loop {
        for (id, address) in peers {
            let asked = async {
                let channel = tls::connect(address, *id, Arc::clone(&config)).await?;
                Ok(PeersClient::new(channel).reenrol(request.clone()).await)
            };
            if let Some(reply) = judged(address, asked.await)? {
                return Ok(reply);
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The reply, a refusal, or nothing if another member or another moment may do better.
#[expect(clippy::wildcard_enum_match_arm, reason = "all other codes may pass")]
fn judged(
    address: &str,
    answer: Result<Result<tonic::Response<EnrolReply>, Status>, String>,
) -> Result<Option<EnrolReply>, EnrolError> {
    let why = match answer {
        Ok(Ok(reply)) => return Ok(Some(reply.into_inner())),
        Ok(Err(status)) => match status.code() {
            Code::PermissionDenied
            | Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::Unauthenticated => return Err(EnrolError::Refused(status.message().to_owned())),
            _ => status.message().to_owned(),
        },
        Err(error) => error,
    };
    tracing::warn!(member = address, error = why, "not taken in yet");
    Ok(None)
}

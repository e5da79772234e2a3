//! What agents ask for: a certificate for a join token, and the registration of their workload.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ca::authn::{Caller, Hash, PresentedToken};
use ca::authority::Authority;
use ca::identity::SpiffeId;
use ca::renewal::Clock;
use ca::service::{Backend, RedeemError};
use ca::state::{CaCommand, CaOutcome};
use ca::tls::PeerCertificates;
use registry::source::vm::{self, Join};
use registry::state::{Batch, Command as Change, CommandOutcome, WorkloadKey};
use tonic::{Request, Response, Status};
use wire::mesh::workload_service_server::WorkloadService;
use wire::mesh::{
    DeregisterRequest, DeregisterResponse, HealthRequest, HealthResponse, RegisterRequest, RegisterResponse,
};

use crate::raft::{Command, Outcome, ProposeError, Raft};

/// How long a registration outlives the last sign of life of its agent.
const LEASE: Duration = Duration::from_secs(60);

/// Label that names the workload to telemetry; the entry's own name has the address in it.
const WORKLOAD_NAME_LABEL: &str = "service.istio.io/workload-name";

/// The certificate service's and the workload service's way to the log.
#[derive(Clone)]
pub(crate) struct Joining {
    /// The log.
    pub(crate) raft: Raft,
    /// This member's authority.
    pub(crate) authority: Arc<Authority>,
    /// What time it is.
    pub(crate) clock: Clock,
}

impl Backend for Joining {
    async fn redeem(&self, token: PresentedToken, key_hash: Hash) -> Result<Caller, RedeemError> {
        let unavailable = |e: ProposeError| RedeemError::Unavailable(e.to_string());
        let now = (self.clock)();
        // Whoever has no good token writes nothing to the log.
        self.raft.view().await.map_err(unavailable)?.ca.check_redeem(&token, key_hash, now)?;
        let command = Command::Ca(CaCommand::redeem(&token, key_hash, now));
        match self.raft.propose(&command).await.map_err(unavailable)? {
            (_, Outcome::Ca(CaOutcome::Redeemed { namespace, service_account, .. })) => {
                let identity = SpiffeId::workload(self.authority.trust_domain(), &namespace, &service_account);
                Ok(Caller::from_redeemed_token(identity.map_err(ca::state::TokenRefused::from)?, token.id))
            }
            (_, Outcome::Ca(CaOutcome::Refused(reason))) => Err(reason.into()),
            (_, Outcome::Ca(CaOutcome::Changed | CaOutcome::Unchanged) | Outcome::Registry(_) | Outcome::Join { .. }) => {
                Err(RedeemError::Unavailable("the log answered something else".to_owned()))
            }
        }
    }

    fn authority(&self) -> Arc<Authority> {
        self.authority.clone()
    }
}

impl Joining {
    /// Namespace and service account of the caller, from its certificate and from nothing else.
    fn caller<T>(&self, request: &Request<T>) -> Result<(String, String), Status> {
        let peer = request.extensions().get::<PeerCertificates>();
        let peer = peer.ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        let caller = Caller::from_certificate(peer.chain(), (self.clock)())
            .map_err(|e| Status::unauthenticated(e.to_string()))?;
        let parts = caller.identity().workload_parts();
        let (namespace, account) = parts.ok_or_else(|| Status::permission_denied("the certificate is not a workload's"))?;
        Ok((namespace.to_owned(), account.to_owned()))
    }

    async fn change(&self, author: &str, change: Change) -> Result<(u64, CommandOutcome), Status> {
        let since = (self.clock)().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let batch = Batch {
            time_ms: i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
            author: author.to_owned(),
            commands: vec![change],
        };
        let committed = self.raft.propose(&Command::Registry(batch)).await;
        let (revision, outcome) = committed.map_err(|e| Status::unavailable(e.to_string()))?;
        let Outcome::Registry(outcome) = outcome else {
            return Err(Status::internal("the log answered something else"));
        };
        let of_change = outcome.commands.into_iter().next();
        Ok((revision.0, of_change.ok_or_else(|| Status::internal("the log answered something else"))?))
    }
}

#[tonic::async_trait]
impl WorkloadService for Joining {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<RegisterResponse>, Status> {
        let (namespace, service_account) = self.caller(&request)?;
        let request = request.into_inner();
        own("namespace", &request.namespace, &namespace)?;
        own("service account", &request.service_account, &service_account)?;
        let join = join(request, namespace, service_account)?;
        let author = format!("agent {}/{}", join.namespace, join.workload);
        let mut registration = vm::register(None, &join).map_err(|e| Status::invalid_argument(e.to_string()))?;
        // Its proxy learns what to listen on from this registration; traffic comes when the agent says so.
        registration.healthy = false;
        let name = registration.name.clone();
        let change = Change::RegisterWorkload { registration: Arc::new(registration) };
        let (revision, _) = self.change(&author, change).await?;
        Ok(Response::new(RegisterResponse { revision, name }))
    }

    async fn report_health(&self, request: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        let (namespace, _) = self.caller(&request)?;
        let HealthRequest { name, namespace: of, session, healthy } = request.into_inner();
        own("namespace", &of, &namespace)?;
        let author = format!("agent {namespace}/{name}");
        let key = WorkloadKey { namespace, name };
        let (revision, outcome) = self.change(&author, Change::WorkloadHealth { key, session, healthy }).await?;
        if outcome == CommandOutcome::Fenced {
            return Err(Status::failed_precondition("another session speaks for this workload; register again"));
        }
        Ok(Response::new(HealthResponse { revision }))
    }

    async fn deregister(&self, request: Request<DeregisterRequest>) -> Result<Response<DeregisterResponse>, Status> {
        let (namespace, _) = self.caller(&request)?;
        let DeregisterRequest { name, namespace: of, session } = request.into_inner();
        own("namespace", &of, &namespace)?;
        let author = format!("agent {namespace}/{name}");
        let key = WorkloadKey { namespace, name };
        let (revision, _) = self.change(&author, Change::RemoveWorkload { key, session }).await?;
        Ok(Response::new(DeregisterResponse { revision }))
    }
}

/// What a caller says of itself must be what its certificate says.
fn own(what: &str, said: &str, certified: &str) -> Result<(), Status> {
    if said == certified {
        return Ok(());
    }
    Err(Status::permission_denied(format!("the certificate is of {what} `{certified}`, the request says `{said}`")))
}

fn join(request: RegisterRequest, namespace: String, service_account: String) -> Result<Join, Status> {
    let address: IpAddr = request
        .address
        .parse()
        .map_err(|_| Status::invalid_argument(format!("address: `{}` is not an IP address", request.address)))?;
    let port = |(name, port): (String, u32)| match u16::try_from(port) {
        Ok(port) if port > 0 => Ok((name, port)),
        Ok(_) | Err(_) => Err(Status::invalid_argument(format!("ports.{name}: {port} is not a port"))),
    };
    let mut labels = request.labels;
    labels.entry(WORKLOAD_NAME_LABEL.to_owned()).or_insert_with(|| request.name.clone());
    Ok(Join {
        namespace,
        service_account,
        workload: request.name,
        address,
        ports: request.ports.into_iter().map(port).collect::<Result<_, _>>()?,
        labels,
        network: request.network,
        locality: request.locality,
        cluster: String::new(),
        instance: address.to_string(),
        session: request.session,
        lease: LEASE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_registered_must_be_ones_own() {
        assert!(own("namespace", "shop", "shop").is_ok());
        assert_eq!(own("namespace", "bank", "shop").unwrap_err().code(), tonic::Code::PermissionDenied);
    }

    #[test]
    fn a_registration_needs_an_address_and_ports_that_are_some() {
        let request = |address: &str, port| RegisterRequest {
            name: "a".to_owned(),
            address: address.to_owned(),
            ports: [("http".to_owned(), port)].into(),
            ..RegisterRequest::default()
        };
        let join = |request| join(request, "default".to_owned(), "a".to_owned());
        assert!(join(request("10.0.0.1", 80)).is_ok());
        assert!(join(request("localhost", 80)).is_err());
        assert!(join(request("10.0.0.1", 0)).is_err());
        assert!(join(request("10.0.0.1", 70_000)).is_err());
    }
}

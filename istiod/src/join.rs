//! What agents ask for: a certificate for a join token, and the registration of their workload.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ca::authn::{Caller, Hash, PresentedToken, Proof};
use ca::authority::Authority;
use ca::identity::SpiffeId;
use ca::renewal::Clock;
use ca::service::{Backend, NotAdmitted, RedeemError};
use ca::state::{CaCommand, CaOutcome, Redemption};
use ca::tls::PeerCertificates;
use futures::{Stream, StreamExt};
use registry::config::{Kind, Object};
use registry::model::workload::WorkloadGroup;
use registry::snapshot::Snapshot;
use registry::source::vm::{self, Join};
use registry::state::{Batch, Command as Change, CommandOutcome, Presence, Registration, WorkloadKey};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use wire::mesh::workload_service_server::WorkloadService;
use wire::mesh::{
    DeregisterRequest, DeregisterResponse, HealthRequest, HealthResponse, Members, Names, RegisterRequest,
    RegisterResponse, WatchMembersRequest, WatchNamesRequest,
};
use xds::balance::Fleet;

use crate::api::NODE_ANNOTATION;
use crate::authority::Issuing;
use crate::liveness::Liveness;
use crate::names::{Asker, Basis};
use crate::raft::state_machine::REASONS;
use crate::raft::{Command, Outcome, ProposeError, Raft};
use crate::readiness;
use crate::revoked::{self, Revoked};

/// The most registrations of one service account.
const MOST: usize = 1000;

/// An agent that leaves waits at most this long for the proxies that may still send to it.
const LEAVING: Duration = Duration::from_secs(3);

/// How long changes are gathered before agents are told other names.
const GATHER: Duration = Duration::from_millis(200);

/// Label that names the workload to telemetry; the entry's own name has the address in it.
const WORKLOAD_NAME_LABEL: &str = "service.istio.io/workload-name";

/// The certificate service's and the workload service's way to the log.
#[derive(Clone)]
pub(crate) struct Joining {
    /// The log.
    pub(crate) raft: Raft,
    /// The newest snapshot.
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
    /// What proxies run.
    pub(crate) status: xds::status::Status,
    /// This member's authority.
    pub(crate) issuing: Issuing,
    /// Which agents are alive.
    pub(crate) liveness: Liveness,
    /// What time it is.
    pub(crate) clock: Clock,
    /// Who the members are.
    pub(crate) fleet: watch::Receiver<Fleet>,
    /// Which nodes are revoked.
    pub(crate) revoked: Revoked,
    /// How long after the end of its certificate a machine may come back.
    pub(crate) dormancy: Duration,
    /// Ends what goes on for long.
    pub(crate) stop: CancellationToken,
}

impl Backend for Joining {
    async fn redeem(
        &self,
        token: PresentedToken,
        key_hash: Hash,
        from: Option<IpAddr>,
    ) -> Result<Caller, RedeemError> {
        let unavailable = |e: ProposeError| RedeemError::Unavailable(e.to_string());
        let now = (self.clock)();
        // Whoever has no good token writes nothing to the log.
        let mut view = self.raft.view().await.map_err(unavailable)?;
        if view.ca.check_redeem(&token, key_hash, from, now).is_err() {
            // The token may have been made at another member a moment ago: refuse only by what holds everywhere.
            drop(view);
            self.raft.read_index().await.map_err(unavailable)?;
            view = self.raft.view().await.map_err(unavailable)?;
        }
        if view.ca.check_redeem(&token, key_hash, from, now)? == Redemption::Repeated
            && let Some(record) = view.ca.token(&token.id)
        {
            let identity = record.identity(self.authority().trust_domain()).map_err(RedeemError::from)?;
            return Ok(Caller::from_redeemed_token(identity, token.id));
        }
        drop(view);
        let command = Command::Ca(CaCommand::redeem(&token, key_hash, now));
        match self.raft.propose(&command).await.map_err(unavailable)? {
            (_, Outcome::Ca(CaOutcome::Redeemed { namespace, service_account, .. })) => {
                let identity =
                    SpiffeId::workload(self.authority().trust_domain(), &namespace, &service_account);
                Ok(Caller::from_redeemed_token(identity.map_err(ca::state::TokenRefused::from)?, token.id))
            }
            (_, Outcome::Ca(CaOutcome::Refused(reason))) => Err(reason.into()),
            (
                _,
                Outcome::Ca(CaOutcome::Changed | CaOutcome::Unchanged)
                | Outcome::Registry(_)
                | Outcome::Join { .. }
                | Outcome::Cluster(_)
                | Outcome::Access(_)
                | Outcome::Audit(_),
            ) => Err(RedeemError::Unavailable("the log answered something else".to_owned())),
        }
    }

    async fn admit(&self, caller: &Caller) -> Result<(), NotAdmitted> {
        let Some(node) = caller.node() else { return Ok(()) };
        let revoked = if *caller.proof() == Proof::EndedCertificate {
            // It may have been revoked while this member was behind, which is no reason to let it come back.
            let unavailable = |e: ProposeError| NotAdmitted::Unavailable(e.to_string());
            self.raft.read_index().await.map_err(unavailable)?;
            self.raft.view().await.map_err(unavailable)?.ca.revoked().get(&node).map(revoked::told)
        } else {
            self.revoked.borrow().get(&node).map(revoked::told)
        };
        revoked.map_or(Ok(()), |told| Err(NotAdmitted::Revoked(told)))
    }

    fn dormancy(&self) -> Duration {
        self.dormancy
    }

    fn authority(&self) -> Arc<Authority> {
        self.issuing.load_full()
    }
}

/// Namespace and service account of a workload's certificate.
fn workload_of(caller: &Caller) -> Result<(String, String), Status> {
    let parts = caller.identity().workload_parts();
    let (namespace, account) =
        parts.ok_or_else(|| Status::permission_denied("the certificate is not a workload's"))?;
    Ok((namespace.to_owned(), account.to_owned()))
}

impl Joining {
    /// Who calls, from its certificate and from nothing else.
    fn certified<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let peer = request.extensions().get::<PeerCertificates>();
        let peer = peer.ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        Caller::from_certificate(peer.chain(), (self.clock)())
            .map_err(|e| Status::unauthenticated(e.to_string()))
    }

    /// Namespace and service account of the caller.
    fn caller<T>(&self, request: &Request<T>) -> Result<(String, String), Status> {
        workload_of(&self.certified(request)?)
    }

    /// The registration of a workload, and the revision at which it was looked up.
    fn registered(&self, key: &WorkloadKey) -> (Option<Arc<Registration>>, u64) {
        let snapshot = self.snapshots.borrow();
        let registered = snapshot.workload(key).and_then(|workload| workload.registration.clone());
        (registered, snapshot.revision().0)
    }

    /// The registration of a workload as this session made it. What another member has just been told may not be here
    /// yet, so nobody is said to be unknown before this member has caught up.
    async fn registered_by(
        &self,
        key: &WorkloadKey,
        session: &str,
    ) -> Result<(Arc<Registration>, u64), Status> {
        let known =
            |(found, revision): (Option<Arc<Registration>>, u64)| found.map(|found| (found, revision));
        if let Some(found) = known(self.registered(key)).filter(|(found, _)| found.session == session) {
            return Ok(found);
        }
        self.raft.read_index().await.map_err(|e| Status::unavailable(e.to_string()))?;
        known(self.registered(key))
            .ok_or_else(|| Status::failed_precondition("this workload is not registered; register again"))
    }

    /// Whether every member reads this version of commands.
    fn all_read(&self, version: u32) -> bool {
        self.raft.cluster().borrow().level().is_none_or(|level| level >= version)
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

/// The members, and again whenever they change; `UNAVAILABLE` when this member stops.
type MembersStream = Pin<Box<dyn Stream<Item = Result<Members, Status>> + Send>>;
/// The names, and again whenever they change; `UNAVAILABLE` when this member stops.
type NamesStream = Pin<Box<dyn Stream<Item = Result<Names, Status>> + Send>>;

#[tonic::async_trait]
impl WorkloadService for Joining {
    type WatchMembersStream = MembersStream;
    type WatchNamesStream = NamesStream;

    async fn watch_members(
        &self,
        request: Request<WatchMembersRequest>,
    ) -> Result<Response<MembersStream>, Status> {
        self.caller(&request)?;
        let (fleet, stop) = (self.fleet.clone(), self.stop.clone());
        let told = futures::stream::unfold((fleet, Vec::new()), async |(mut fleet, told)| {
            let other = fleet.wait_for(|fleet| !fleet.addresses().eq(told.iter().map(String::as_str))).await;
            let addresses: Vec<String> = other.ok()?.addresses().map(str::to_owned).collect();
            Some((Ok(Members { addresses: addresses.clone() }), (fleet, addresses)))
        });
        let end = futures::stream::once(async { Err(Status::unavailable("the server is shutting down")) });
        Ok(Response::new(Box::pin(told.take_until(stop.cancelled_owned()).chain(end))))
    }

    async fn watch_names(
        &self,
        request: Request<WatchNamesRequest>,
    ) -> Result<Response<NamesStream>, Status> {
        let (namespace, _) = self.caller(&request)?;
        let WatchNamesRequest { labels, loopback_block } = request.into_inner();
        let block =
            (!loopback_block.is_empty()).then(|| loopback_block.parse()).transpose().map_err(|_| {
                Status::invalid_argument(format!(
                    "loopback_block: `{loopback_block}` is not a block of addresses"
                ))
            })?;
        let asker = Arc::new(Asker { namespace, labels: labels.into_iter().collect(), block });
        let told = futures::stream::unfold((self.snapshots.clone(), None), move |(mut snapshots, told)| {
            let asker = Arc::clone(&asker);
            async move {
                let (names, basis) = other_names(&asker, &mut snapshots, told).await?;
                Some((Ok(names), (snapshots, Some(basis))))
            }
        });
        let end = futures::stream::once(async { Err(Status::unavailable("the server is shutting down")) });
        Ok(Response::new(Box::pin(told.take_until(self.stop.clone().cancelled_owned()).chain(end))))
    }

    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let caller = self.certified(&request)?;
        let (namespace, service_account) = workload_of(&caller)?;
        let request = request.into_inner();
        own("namespace", &request.namespace, &namespace)?;
        own("service account", &request.service_account, &service_account)?;
        let mut join = join(request, namespace, service_account, self.liveness.term())?;
        let author = format!("agent {}/{}", join.namespace, join.workload);
        let snapshot = self.snapshots.borrow().clone();
        let group = group_of(&snapshot, &join)?;
        if let Some(group) = group {
            as_the_group_says(group, &mut join)?;
        }
        let mut registration =
            vm::register(group, &join).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let node = caller.node().map(|node| (NODE_ANNOTATION.to_owned(), node.to_string()));
        registration.annotations.extend(node);
        let of_account = snapshot.workloads().filter(|workload| {
            workload.key.namespace == join.namespace
                && workload.registration.as_ref().is_some_and(|r| r.service_account == join.service_account)
        });
        if snapshot.workload(&registration.key()).is_none() && of_account.count() >= MOST {
            return Err(Status::resource_exhausted(format!(
                "{MOST} workloads of service account `{}` are registered; give others one of their own",
                join.service_account
            )));
        }
        // Its proxy learns what to listen on from this registration; traffic comes when the agent says so. A session that
        // goes on has said so already.
        let (known, _) = self.registered(&registration.key());
        let known = known.filter(|known| known.session == join.session);
        registration.healthy = known.as_ref().is_some_and(|known| known.healthy);
        registration.reason = known.map(|known| known.reason.clone()).unwrap_or_default();
        let readiness = Some(readiness::of(&snapshot, &registration));
        let (name, healthy) = (registration.name.clone(), registration.healthy);
        let key = registration.key();
        let change = Change::RegisterWorkload { registration: Arc::new(registration) };
        let (revision, outcome) = self.change(&author, change).await?;
        if outcome == CommandOutcome::Fenced {
            return Err(Status::permission_denied(format!(
                "the workload `{name}` is registered by another service account"
            )));
        }
        self.liveness.heard(&key, &join.session);
        let lease = u64::try_from(self.liveness.term().as_millis()).unwrap_or(u64::MAX);
        Ok(Response::new(RegisterResponse { revision, name, lease_milliseconds: lease, healthy, readiness }))
    }

    async fn report_health(
        &self,
        request: Request<HealthRequest>,
    ) -> Result<Response<HealthResponse>, Status> {
        let (namespace, account) = self.caller(&request)?;
        let HealthRequest { name, namespace: of, session, healthy, reason } = request.into_inner();
        own("namespace", &of, &namespace)?;
        let author = format!("agent {namespace}/{name}");
        let key = WorkloadKey { namespace, name };
        let (registered, revision) = self.registered_by(&key, &session).await?;
        own("service account", &registered.service_account, &account)?;
        let fenced =
            || Status::failed_precondition("another session speaks for this workload; register again");
        if registered.session != session {
            return Err(fenced());
        }
        self.liveness.heard(&key, &session);
        let reason = if self.all_read(REASONS) { readiness::reason(healthy, &reason) } else { String::new() };
        let readiness = Some(readiness::of(&self.snapshots.borrow(), &registered));
        let as_before = registered.healthy == healthy && registered.reason == reason;
        if as_before && registered.presence == Presence::Heard {
            // Nothing changes: a sign of life is remembered here and nowhere else.
            return Ok(Response::new(HealthResponse { revision, readiness }));
        }
        let change = Change::WorkloadHealth { key, session, healthy, reason };
        let (revision, outcome) = self.change(&author, change).await?;
        if outcome == CommandOutcome::Fenced {
            return Err(fenced());
        }
        Ok(Response::new(HealthResponse { revision, readiness }))
    }

    async fn deregister(
        &self,
        request: Request<DeregisterRequest>,
    ) -> Result<Response<DeregisterResponse>, Status> {
        let (namespace, account) = self.caller(&request)?;
        let DeregisterRequest { name, namespace: of, session } = request.into_inner();
        own("namespace", &of, &namespace)?;
        let author = format!("agent {namespace}/{name}");
        let key = WorkloadKey { namespace, name };
        if let (Some(registered), _) = self.registered(&key) {
            own("service account", &registered.service_account, &account)?;
        }
        self.liveness.release(&key, &session);
        // First nobody is sent to it any more; only then its proxy loses what it serves with.
        let (of, by) = (key.clone(), session.clone());
        let out = Change::WorkloadHealth { key: of, session: by, healthy: false, reason: String::new() };
        let (revision, _) = self.change(&author, out).await?;
        self.status.decided(revision, Instant::now() + LEAVING).await;
        let (revision, _) = self.change(&author, Change::RemoveWorkload { key, session }).await?;
        Ok(Response::new(DeregisterResponse { revision }))
    }
}

/// Waits until there are other names than those that were told; nothing when this member ends.
async fn other_names(
    asker: &Asker,
    snapshots: &mut watch::Receiver<Arc<Snapshot>>,
    told: Option<Basis>,
) -> Option<(Names, Basis)> {
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        let basis = asker.basis(&snapshot);
        if told.as_ref() != Some(&basis) {
            return Some((asker.names(&basis, snapshot.domain_suffix()), basis));
        }
        snapshots.changed().await.ok()?;
        // Changes come in bursts, and whoever asks for a name a moment earlier does not know it either.
        tokio::time::sleep(GATHER).await;
    }
}

/// What a caller says of itself must be what its certificate says.
fn own(what: &str, said: &str, certified: &str) -> Result<(), Status> {
    if said == certified {
        return Ok(());
    }
    Err(Status::permission_denied(format!(
        "the certificate is of {what} `{certified}`, the request says `{said}`"
    )))
}

/// The `WorkloadGroup` whose template names the caller's service account: it says what such a workload is. The name
/// that the agent tells chooses among several.
fn group_of<'a>(snapshot: &'a Snapshot, join: &Join) -> Result<Option<&'a Object>, Status> {
    let groups = snapshot.objects_of(Kind::WorkloadGroup).filter(|object| {
        let template = object.get::<WorkloadGroup>().and_then(|group| group.template.as_ref());
        object.namespace == join.namespace
            && template.is_some_and(|template| template.service_account == join.service_account)
    });
    let groups: Vec<&Object> = groups.map(AsRef::as_ref).collect();
    match groups.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        several => {
            let named = several.iter().find(|group| group.name == join.workload);
            named.map(|group| Some(*group)).ok_or_else(|| {
                Status::invalid_argument(format!(
                    "several WorkloadGroups are of service account `{}`; the name of the workload must be one of theirs",
                    join.service_account
                ))
            })
        }
    }
}

/// What a group says of its workloads holds: an agent may repeat it and not change it. Its proxy's rules are chosen by
/// the labels that it tells, so it must know them.
fn as_the_group_says(group: &Object, join: &mut Join) -> Result<(), Status> {
    let Some(spec) = group.get::<WorkloadGroup>() else { return Ok(()) };
    let (metadata, template) =
        (spec.metadata.clone().unwrap_or_default(), spec.template.clone().unwrap_or_default());
    let mut labels = template.labels;
    labels.extend(metadata.labels);
    let mut told = std::mem::take(&mut join.labels);
    told.retain(|key, _| key != WORKLOAD_NAME_LABEL || labels.contains_key(key));
    if told != labels {
        let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        return Err(Status::invalid_argument(format!(
            "labels: those of WorkloadGroup {}/{} are needed: {}",
            group.namespace,
            group.name,
            labels.join(",")
        )));
    }
    join.labels.insert(WORKLOAD_NAME_LABEL.to_owned(), group.name.clone());
    join.ports.retain(|name, _| !template.ports.contains_key(name));
    Ok(())
}

fn join(
    request: RegisterRequest,
    namespace: String,
    service_account: String,
    lease: Duration,
) -> Result<Join, Status> {
    let address: IpAddr = request.address.parse().map_err(|_| {
        Status::invalid_argument(format!("address: `{}` is not an IP address", request.address))
    })?;
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
        lease,
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
        let join = |request| join(request, "default".to_owned(), "a".to_owned(), Duration::from_secs(60));
        assert!(join(request("10.0.0.1", 80)).is_ok());
        assert!(join(request("localhost", 80)).is_err());
        assert!(join(request("10.0.0.1", 0)).is_err());
        assert!(join(request("10.0.0.1", 70_000)).is_err());
    }

    #[test]
    fn a_group_says_what_its_workloads_are() {
        let spec = serde_json::json!({"template": {"serviceAccount": "a", "labels": {"app": "pay"}, "ports": {"http": 80}}});
        let group = Object::new(Kind::WorkloadGroup, "default", "pay", spec);
        let told = |labels: &[(&str, &str)]| {
            let request = RegisterRequest {
                name: "w".to_owned(),
                address: "10.0.0.1".to_owned(),
                labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
                ports: [("http".to_owned(), 81), ("grpc".to_owned(), 82)].into(),
                session: "s".to_owned(),
                ..RegisterRequest::default()
            };
            let account = ("default".to_owned(), "a".to_owned());
            let mut join = join(request, account.0, account.1, Duration::from_secs(60)).unwrap();
            as_the_group_says(&group, &mut join).map(|()| vm::register(Some(&group), &join).unwrap())
        };
        let made = told(&[("app", "pay")]).unwrap();
        assert_eq!(made.ports, [("grpc".to_owned(), 82), ("http".to_owned(), 80)].into());
        assert_eq!((made.labels["app"].as_str(), made.group.as_str()), ("pay", "pay"));
        for wrong in [&[("app", "bank")][..], &[], &[("app", "pay"), ("role", "admin")]] {
            let refused = told(wrong).unwrap_err();
            assert!(refused.message().contains("default/pay are needed: app=pay"), "{refused}");
        }
    }
}

//! The peer port: what other members send, checked, and handed to the raft thread.

use std::sync::Arc;
use std::time::Duration;

use ca::tls::accept::PeerCertificates;
use ca::tls::{ServerContext, accept};
use futures::future::BoxFuture;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::{Directory, MESSAGE_LIMIT, REMOVED, snapshot, tls};
use crate::raft::machine::StateMachine;
use crate::raft::node::thread::{Node, RequestError};
use crate::raft::node::{Event, Refusal};
use crate::raft::snapshots::Snapshots;
use crate::raft::wire::peers_server::{Peers, PeersServer};
use crate::raft::wire::{
    EnrolReply, EnrolRequest, ForwardReply, ForwardRequest, ForwardVerdict, HeardAgent, LoadReply,
    LoadRequest, LookReply, LookRequest, Message, MessageType, MessagesEnded, PeerProgress, SnapshotPart,
    SnapshotProgress, WaitReply, WaitRequest,
};

/// Nobody waits longer for proxies.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// What the peer port asks of the rest of the member.
pub trait Host: Send + Sync + 'static {
    /// A new member introduces itself; `known` is its old number if it has a peer's certificate.
    fn enrol(&self, request: EnrolRequest, known: Option<u64>) -> BoxFuture<'_, Result<EnrolReply, Status>>;

    /// Connected xDS streams.
    fn streams(&self) -> u64;

    /// The agents that this member itself heard within a time.
    fn heard(&self, within: Duration) -> Vec<HeardAgent>;

    /// Waits at most so long until the proxies that this member serves run a revision.
    fn wait(&self, _revision: u64, _within: Duration) -> BoxFuture<'_, WaitReply> {
        Box::pin(async { WaitReply::default() })
    }

    /// Tells of the proxies that this member serves.
    fn look(&self, _request: LookRequest) -> BoxFuture<'_, Result<LookReply, Status>> {
        Box::pin(async { Err(Status::unavailable("this member serves no proxies")) })
    }
}

/// A host that takes nobody in.
#[derive(Debug, Clone, Copy, Default)]
pub struct Closed;

impl Host for Closed {
    fn enrol(&self, _: EnrolRequest, _: Option<u64>) -> BoxFuture<'_, Result<EnrolReply, Status>> {
        Box::pin(async { Err(Status::unavailable("this member does not take in others yet")) })
    }

    fn streams(&self) -> u64 {
        0
    }

    fn heard(&self, _: Duration) -> Vec<HeardAgent> {
        Vec::new()
    }
}

/// The service of the peer port.
pub struct PeerService<M: StateMachine> {
    /// This member.
    pub id: u64,
    /// The raft thread.
    pub node: Node<M>,
    /// Who is a member.
    pub directory: watch::Receiver<Arc<Directory>>,
    /// Where received snapshots are put together.
    pub snapshots: Snapshots,
    /// The rest of the member.
    pub host: Arc<dyn Host>,
    /// Where streams run.
    pub tasks: TaskTracker,
    /// When they end.
    pub stop: CancellationToken,
}

/// Serves the peer port on `listener`, until the service's stop.
pub fn serve<M: StateMachine>(listener: TcpListener, tls: Arc<ServerConfig>, service: PeerService<M>) {
    let (tasks, stop) = (service.tasks.clone(), service.stop.clone());
    let connections = accept::incoming(listener, ServerContext::from(tls), &tasks, stop.clone());
    let calls = Calls { service: Arc::new(service), receiving: Arc::new(Semaphore::new(1)) };
    let server = PeersServer::new(calls)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
    let router = self::tls::server().add_service(server);
    tasks.spawn(async move {
        let served = router.serve_with_incoming_shutdown(connections, stop.clone().cancelled_owned());
        if let Err(error) = served.await {
            tracing::error!(%error, "the peer port has ended");
        }
    });
}

struct Calls<M: StateMachine> {
    service: Arc<PeerService<M>>,
    /// One snapshot is received at a time.
    receiving: Arc<Semaphore>,
}

impl<M: StateMachine> PeerService<M> {
    /// The member that calls. Without a certificate, nobody does.
    fn caller<T>(&self, request: &Request<T>) -> Result<u64, Status> {
        let id = known(request).ok_or_else(|| Status::unauthenticated("a peer's certificate is needed"))?;
        if self.directory.borrow().retired.contains(&id) {
            return Err(Status::permission_denied(REMOVED));
        }
        Ok(id)
    }

    /// Hands a message to the raft thread, if it is from who sent it and for this member.
    fn deliver(&self, from: u64, message: Message) -> Result<(), Status> {
        // A follower passes on the wish that another member lead, in that member's name.
        let speaks = message.from == from || message.msg_type() == MessageType::TransferLeader;
        if !speaks || message.to != self.id {
            return Err(Status::permission_denied("a peer speaks only for itself, and to this member"));
        }
        let message = raft::eraftpb::Message::try_from(message)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.node.tell(Event::Message(Box::new(message)));
        Ok(())
    }

    async fn take_messages(&self, from: u64, messages: &mut Streaming<Message>) -> Result<(), Status> {
        let mut directory = self.directory.clone();
        let removed = async {
            // Whoever keeps the directory has gone: this member is stopping, and nobody is removed any more.
            if directory.wait_for(|directory| directory.retired.contains(&from)).await.is_err() {
                std::future::pending().await
            }
        };
        let mut removed = std::pin::pin!(removed);
        loop {
            let message = tokio::select! {
                () = self.stop.cancelled() => return Err(Status::unavailable("this member is stopping")),
                () = &mut removed => return Err(Status::permission_denied(REMOVED)),
                message = messages.message() => message?,
            };
            let Some(message) = message else { return Ok(()) };
            if message.msg_type() == MessageType::Snapshot {
                return Err(Status::invalid_argument("snapshots have a call of their own"));
            }
            self.deliver(from, message)?;
        }
    }
}

fn known<T>(request: &Request<T>) -> Option<u64> {
    tls::member_of(request.extensions().get::<PeerCertificates>()?)
}

#[tonic::async_trait]
impl<M: StateMachine> Peers for Calls<M> {
    async fn messages(
        &self,
        request: Request<Streaming<Message>>,
    ) -> Result<Response<MessagesEnded>, Status> {
        let from = self.service.caller(&request)?;
        self.service.take_messages(from, &mut request.into_inner()).await?;
        Ok(Response::new(MessagesEnded {}))
    }

    type InstallSnapshotStream = ReceiverStream<Result<SnapshotProgress, Status>>;

    async fn install_snapshot(
        &self,
        request: Request<Streaming<SnapshotPart>>,
    ) -> Result<Response<Self::InstallSnapshotStream>, Status> {
        let from = self.service.caller(&request)?;
        let turn = Arc::clone(&self.receiving).try_acquire_owned();
        let turn = turn.map_err(|_| Status::resource_exhausted("another snapshot is being received"))?;
        let (progress, answers) = mpsc::channel(4);
        let (service, mut parts) = (Arc::clone(&self.service), request.into_inner());
        self.service.tasks.spawn(async move {
            let receiving = async {
                let message = snapshot::receive(&mut parts, &service.snapshots, from, &progress).await?;
                service.deliver(from, message)
            };
            let received = service.stop.run_until_cancelled(receiving).await;
            let told = received.unwrap_or_else(|| Err(Status::unavailable("this member is stopping")));
            if let Err(status) = &told {
                tracing::info!(peer = from, error = status.message(), "a snapshot was not received");
            }
            drop(turn);
            let told = told.map(|()| SnapshotProgress { offset: 0, complete: true });
            progress.send(told).await.unwrap_or_default();
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn forward(&self, request: Request<ForwardRequest>) -> Result<Response<ForwardReply>, Status> {
        self.service.caller(&request)?;
        let taken = self.service.node.take_forwarded(request.into_inner().proposal).await;
        let leader = self.service.node.status().borrow().leader.unwrap_or(0);
        let (verdict, reason) = match taken {
            Ok(()) => (ForwardVerdict::Accepted, String::new()),
            Err(RequestError::Refused(refusal)) => (verdict(&refusal), refusal.to_string()),
            Err(error @ RequestError::Stopped(_)) => return Err(Status::unavailable(error.to_string())),
        };
        Ok(Response::new(ForwardReply { verdict: verdict.into(), leader, reason }))
    }

    async fn load(&self, request: Request<LoadRequest>) -> Result<Response<LoadReply>, Status> {
        self.service.caller(&request)?;
        let within = Duration::from_millis(request.into_inner().heard_within_ms);
        let heard = if within.is_zero() { Vec::new() } else { self.service.host.heard(within) };
        let status = self.service.node.status().borrow().clone();
        let progress = status.progress.iter().map(|(id, progress)| PeerProgress {
            id: *id,
            matched: progress.matched,
            active: progress.active,
        });
        Ok(Response::new(LoadReply {
            streams: self.service.host.streams(),
            id: self.service.id,
            term: status.term,
            leader: status.leader.unwrap_or(0),
            applied: status.applied,
            last_index: status.last_index,
            progress: progress.collect(),
            program: env!("CARGO_PKG_VERSION").to_owned(),
            heard,
        }))
    }

    async fn wait(&self, request: Request<WaitRequest>) -> Result<Response<WaitReply>, Status> {
        self.service.caller(&request)?;
        let WaitRequest { revision, within_milliseconds } = request.into_inner();
        let within = Duration::from_millis(within_milliseconds.into()).min(LONGEST_WAIT);
        let waited = self.service.stop.run_until_cancelled(self.service.host.wait(revision, within));
        let reply = waited.await.ok_or_else(|| Status::unavailable("this member is stopping"))?;
        Ok(Response::new(reply))
    }

    async fn look(&self, request: Request<LookRequest>) -> Result<Response<LookReply>, Status> {
        self.service.caller(&request)?;
        let looking = self.service.host.look(request.into_inner());
        let looked = self.service.stop.run_until_cancelled(looking).await;
        Ok(Response::new(looked.ok_or_else(|| Status::unavailable("this member is stopping"))??))
    }

    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolReply>, Status> {
        Ok(Response::new(self.service.host.enrol(request.into_inner(), None).await?))
    }

    async fn reenrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolReply>, Status> {
        let known = self.service.caller(&request)?;
        Ok(Response::new(self.service.host.enrol(request.into_inner(), Some(known)).await?))
    }
}

fn verdict(refusal: &Refusal) -> ForwardVerdict {
    match refusal {
        Refusal::NotLeader(_) | Refusal::NoLeader => ForwardVerdict::NotLeader,
        Refusal::Busy => ForwardVerdict::Busy,
        Refusal::Unknown | Refusal::Duplicate => ForwardVerdict::Unknown,
        Refusal::Invalid(_) => ForwardVerdict::Refused,
        Refusal::NoSpace(_) => ForwardVerdict::NoSpace,
    }
}

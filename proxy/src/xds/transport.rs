//! The driver of [`Client`] and [`Choice`]: connects, moves messages, and connects again. It decides nothing: neither
//! about resources, nor whom to call.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint, Uri};
use wire::members::{self, Hint};

use super::client::{Client, Protocol, Request, Response, TypeStatus};
use super::decode::{Address, Kind};
use super::last_good;
use super::members::{Choice, Ended};
use crate::tables::TableWriter;

/// Requests waiting for the stream to take them. Full means that the server does not read: we wait, and the
/// connection's keepalive decides whether it lives.
const REQUESTS: usize = 64;
/// The largest response we take, in bytes. A full push of a large mesh is one message.
const MAX_MESSAGE: usize = 512 << 20;
/// How long connecting may take, TLS and all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a server may take from the call until it begins to answer; one that has hung is left for another.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// A stream that lived so long has worked, though nothing came on it: whoever has everything is sent nothing.
const WORKED: Duration = Duration::from_secs(5);

/// Where the control plane is and how it is spoken to.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Servers; the next one is tried when one fails.
    pub servers: Vec<Address>,
    /// The members of the control plane (`host:port`), always the latest, where somebody follows them; they are
    /// preferred to `servers`.
    pub members: Option<watch::Receiver<Vec<String>>>,
    /// TLS; `None`: plain text.
    pub tls: Option<ServerTls>,
    /// Which form of the protocol.
    pub protocol: Protocol,
    /// The `:authority` of the stream; `None`: the server's address.
    pub authority: Option<String>,
}

/// TLS towards a control plane.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// How.
    pub config: Arc<rustls::ClientConfig>,
    /// The name that is sent; `None`: the server's own.
    pub name: Option<ServerName<'static>>,
}

/// How the stream is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// The server of the open stream.
    pub connected: Option<String>,
    /// The newest revision that a control plane of ours has sent.
    pub revision: Option<u64>,
    /// All that was asked for at the start is there.
    pub initialized: bool,
    /// What is held, by type.
    pub types: BTreeMap<Kind, TypeStatus>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No connection came about.
    #[error("cannot connect to {server}")]
    Connect {
        /// To which server.
        server: Address,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// The server's address makes no URI.
    #[error("`{0}` is not an authority")]
    Authority(String),
    /// The server ended it.
    #[error("the server closed the stream: {0}")]
    Closed(#[source] Box<tonic::Status>),
    /// The server ended it without an error.
    #[error("the server ended the stream")]
    Ended,
    /// The server took the call, and says nothing.
    #[error("{0} does not answer")]
    Silent(Address),
    /// What came is older than what is held.
    #[error("the server sent revision {sent}, and {held} is held")]
    Older {
        /// What came.
        sent: u64,
        /// What is held.
        held: u64,
    },
}

impl StreamError {
    /// The server wants us elsewhere.
    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Closed(status) => Hint::from_metadata(status.metadata()),
            Self::Older { .. } => Some(Hint::Behind),
            Self::Connect { .. } | Self::Authority(_) | Self::Silent(_) | Self::Ended => None,
        }
    }

    /// The members that the server named when it ended the stream.
    fn members(&self) -> Option<Vec<String>> {
        match self {
            Self::Closed(status) => members::told(status.metadata()),
            Self::Older { .. }
            | Self::Connect { .. }
            | Self::Authority(_)
            | Self::Silent(_)
            | Self::Ended => None,
        }
    }
}

/// The task that owns the stream and writes the tables.
#[derive(Debug)]
pub struct Transport {
    /// Where to.
    pub settings: Settings,
    /// The protocol.
    pub client: Client,
    /// The tables.
    pub writer: TableWriter,
    /// Tells how the stream is doing.
    pub status: watch::Sender<Status>,
    /// For jitter.
    pub rng: fastrand::Rng,
    /// What time it is, for the dates in configuration dumps.
    pub clock: fn() -> jiff::Timestamp,
}

enum Session {
    Delta(Streaming<DeltaDiscoveryResponse>, mpsc::Sender<DeltaDiscoveryRequest>),
    Sotw(Streaming<DiscoveryResponse>, mpsc::Sender<DiscoveryRequest>),
}

/// How far an attempt came.
#[derive(Debug, Default)]
struct Progress {
    opened: Option<Instant>,
    answered: bool,
    /// The server is one of ours: its versions are revisions.
    ours: bool,
}

impl Progress {
    fn ended(&self, error: &StreamError, now: Instant) -> Ended {
        let hint = error.hint();
        let worked =
            self.answered || self.opened.is_some_and(|at| now.saturating_duration_since(at) >= WORKED);
        match (error, hint) {
            (StreamError::Older { .. }, Some(hint)) => Ended::Refused(hint),
            (_, Some(hint)) if self.opened.is_none() => Ended::Refused(hint),
            (_, Some(hint)) => Ended::Lost(Some(hint)),
            (_, None) if worked => Ended::Lost(None),
            (_, None) => Ended::Failed,
        }
    }
}

impl Transport {
    /// Takes what an earlier process was told last; a control plane is told what is held, and to be no older.
    pub fn resume(&mut self, responses: Vec<Response>) {
        let revision = last_good::revision(&responses);
        for response in responses {
            // Nobody waits for an answer.
            self.take(response);
        }
        for (kind, of_kind) in self.client.status() {
            if let Some(error) = of_kind.last_error {
                tracing::warn!(kind = %kind, error, "some of the last good configuration cannot be used");
            }
        }
        self.status.send_modify(|s| s.revision = revision);
    }

    /// Keeps a stream open until `stop`. What was taken stays in use while there is none.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut choice = Choice::new(self.client.node_id(), self.settings.servers.clone());
        if let Some(revision) = self.status.borrow().revision {
            choice.on_revision(revision);
        }
        if let Some(members) = &mut self.settings.members {
            members.mark_changed();
        }
        loop {
            // Only what is news: a member may have told more with its refusal.
            if let Some(members) = &mut self.settings.members
                && members.has_changed().unwrap_or_default()
            {
                choice.on_members(&members.borrow_and_update());
            }
            let Some(server) = choice.next() else { return };
            let mut progress = Progress::default();
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.stream(&server, &mut choice, &mut progress) => ended,
            };
            self.status.send_modify(|s| s.connected = None);
            choice.on_members(&ended.members().unwrap_or_default());
            let how = progress.ended(&ended, Instant::now());
            let pause = choice.on_end(&server, &how, &mut self.rng);
            let reason: &dyn std::error::Error = &ended;
            match ended.hint() {
                Some(hint) => tracing::info!(%server, %hint, "the control plane asks to call another member"),
                None => {
                    tracing::info!(%server, error = chain(reason), retry_ms = pause.as_millis(), "control plane lost");
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.wait(pause) => {}
            }
        }
    }

    /// Waits before the next attempt; what is waited for in the tables may fall due meanwhile.
    async fn wait(&mut self, pause: Duration) {
        let until = Instant::now() + pause;
        loop {
            let due = self.client.deadline().map(Instant::from_std).filter(|due| *due < until);
            tokio::time::sleep_until(due.unwrap_or(until)).await;
            if due.is_none() {
                return;
            }
            self.tick();
        }
    }

    fn tick(&mut self) {
        let update = self.client.on_tick(Instant::now().into_std());
        self.writer.apply(&update);
        self.report();
    }

    async fn stream(
        &mut self,
        server: &Address,
        choice: &mut Choice,
        progress: &mut Progress,
    ) -> StreamError {
        let opening = self.client.on_connect();
        let opened = tokio::time::timeout(OPEN_TIMEOUT, self.open(server, opening, choice));
        let (mut session, told) = match opened.await {
            Ok(Ok(opened)) => opened,
            Ok(Err(e)) => return e,
            Err(_) => return StreamError::Silent(server.clone()),
        };
        progress.opened = Some(Instant::now());
        choice.on_open();
        if let Some(members) = members::told(&told) {
            progress.ours = true;
            choice.on_members(&members);
        }
        tracing::info!(%server, "control plane connected");
        self.status.send_modify(|s| s.connected = Some(server.to_string()));
        loop {
            let due = self.client.deadline().map(Instant::from_std);
            let response = tokio::select! {
                response = session.message() => response,
                () = until(due) => {
                    self.tick();
                    continue;
                }
            };
            let response = match response {
                Ok(Some(response)) => response,
                Ok(None) => return StreamError::Ended,
                Err(status) => return StreamError::Closed(Box::new(status)),
            };
            progress.answered = true;
            if let Some(revision) = response.version().parse().ok().filter(|_| progress.ours) {
                match choice.revision().filter(|held| *held > revision) {
                    Some(held) => return StreamError::Older { sent: revision, held },
                    None => choice.on_revision(revision),
                }
                self.status.send_modify(|s| s.revision = Some(revision));
            }
            for request in self.take(response) {
                if !session.send(request).await {
                    return StreamError::Ended;
                }
            }
        }
    }

    /// A response becomes tables, and only then an answer.
    fn take(&mut self, response: Response) -> Vec<Request> {
        let Some(received) = self.client.on_response(response, (self.clock)()) else { return Vec::new() };
        let refused = self.writer.apply(&received.update);
        let requests = self.client.on_applied(received, refused, Instant::now().into_std());
        self.report();
        requests
    }

    fn report(&self) {
        let (initialized, types) = (self.client.is_initialized(), self.client.status());
        self.status.send_modify(|s| {
            s.initialized |= initialized;
            s.types = types;
        });
    }

    /// Opens a stream with these requests; gives it and what the server tells with its answer.
    async fn open(
        &self,
        server: &Address,
        opening: Vec<Request>,
        choice: &Choice,
    ) -> Result<(Session, MetadataMap), StreamError> {
        let channel = self.connect(server).await?;
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let closed = |status| StreamError::Closed(Box::new(status));
        match self.settings.protocol {
            Protocol::Delta => {
                let (sender, requests) = mpsc::channel(REQUESTS);
                for request in opening {
                    if let Request::Delta(request) = request {
                        sender.try_send(*request).map_err(|_| StreamError::Ended)?;
                    }
                }
                let stream =
                    client.delta_aggregated_resources(asking(requests, choice)).await.map_err(closed)?;
                let (told, stream, _) = stream.into_parts();
                Ok((Session::Delta(stream, sender), told))
            }
            Protocol::Sotw => {
                let (sender, requests) = mpsc::channel(REQUESTS);
                for request in opening {
                    if let Request::Sotw(request) = request {
                        sender.try_send(*request).map_err(|_| StreamError::Ended)?;
                    }
                }
                let stream =
                    client.stream_aggregated_resources(asking(requests, choice)).await.map_err(closed)?;
                let (told, stream, _) = stream.into_parts();
                Ok((Session::Sotw(stream, sender), told))
            }
        }
    }

    async fn connect(&self, server: &Address) -> Result<Channel, StreamError> {
        let authority = match (&self.settings.authority, server) {
            (Some(authority), _) => authority.clone(),
            (None, Address::Pipe(_)) => "localhost".to_owned(),
            (None, other) => other.to_string(),
        };
        let uri: Uri =
            format!("http://{authority}").parse().map_err(|_| StreamError::Authority(authority.clone()))?;
        let connector = Connector { server: server.clone(), tls: self.settings.tls.clone() };
        Endpoint::from(uri)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(20))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let connector = connector.clone();
                async move { tokio::time::timeout(CONNECT_TIMEOUT, connector.connect()).await? }
            }))
            .await
            .map_err(|source| StreamError::Connect { server: server.clone(), source })
    }
}

impl Session {
    async fn message(&mut self) -> Result<Option<Response>, tonic::Status> {
        Ok(match self {
            Self::Delta(stream, _) => stream.message().await?.map(|m| Response::Delta(Box::new(m))),
            Self::Sotw(stream, _) => stream.message().await?.map(|m| Response::Sotw(Box::new(m))),
        })
    }

    async fn send(&self, request: Request) -> bool {
        match (self, request) {
            (Self::Delta(_, sender), Request::Delta(request)) => sender.send(*request).await.is_ok(),
            (Self::Sotw(_, sender), Request::Sotw(request)) => sender.send(*request).await.is_ok(),
            (Self::Delta(..), Request::Sotw(_)) | (Self::Sotw(..), Request::Delta(_)) => false,
        }
    }
}

/// Ends at this moment, or never.
async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// A stream of requests, with what a member must know to serve it.
fn asking<T>(requests: mpsc::Receiver<T>, choice: &Choice) -> tonic::Request<ReceiverStream<T>> {
    let mut request = tonic::Request::new(ReceiverStream::new(requests));
    let metadata = request.metadata_mut();
    metadata.insert(members::REFUSALS, choice.refusals().into());
    if let Some(revision) = choice.revision() {
        metadata.insert(members::REVISION, revision.into());
    }
    request
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A stream to a control plane.
trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for T {}

#[derive(Clone)]
struct Connector {
    server: Address,
    tls: Option<ServerTls>,
}

impl Connector {
    async fn connect(self) -> std::io::Result<TokioIo<Box<dyn Stream>>> {
        let (plain, own): (Box<dyn Stream>, _) = match &self.server {
            Address::Socket(address) => {
                (Box::new(tcp(&[*address]).await?), ServerName::IpAddress(address.ip().into()))
            }
            Address::Name(host, port) => {
                let addresses: Vec<_> = tokio::net::lookup_host((&**host, *port)).await?.collect();
                let name = ServerName::try_from(host.to_string()).map_err(std::io::Error::other)?;
                (Box::new(tcp(&addresses).await?), name)
            }
            Address::Pipe(path) => {
                let name = ServerName::try_from("localhost").map_err(std::io::Error::other)?;
                (Box::new(UnixStream::connect(path).await?), name)
            }
        };
        let Some(tls) = self.tls else { return Ok(TokioIo::new(plain)) };
        let name = tls.name.unwrap_or(own);
        let stream = tokio_rustls::TlsConnector::from(tls.config).connect(name, plain).await?;
        Ok(TokioIo::new(Box::new(stream)))
    }
}

async fn tcp(addresses: &[SocketAddr]) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(addresses).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests;

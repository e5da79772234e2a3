//! The driver of a [`Datacenter`]: sockets, timers and files. It decides nothing.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::answer::Answer;
use super::client::{Client, Credentials, Server, TlsFiles};
use super::datacenter::{Action, Datacenter, Query, Status};
use crate::state::Command;

/// How often token and certificates are looked at, and the status is told if nothing happens.
const LOOK: Duration = Duration::from_secs(1);
/// With nothing to wait for, the machine is asked again after this time.
const IDLE: Duration = Duration::from_secs(60);

/// How the servers are reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Where they listen.
    pub servers: Vec<Server>,
    /// File with the ACL token.
    pub token: Option<PathBuf>,
    /// Files for TLS; plain text without them.
    pub tls: Option<TlsFiles>,
}

/// Changes that are to be in the state.
#[derive(Debug)]
pub struct Proposal {
    /// In this order.
    pub commands: Vec<Command>,
    /// Whether they are in the state now.
    pub done: oneshot::Sender<bool>,
}

/// What is under way beside the questions.
type Publishing = Pin<Box<dyn Future<Output = bool> + Send>>;

/// The way to the servers, with the credentials that the files hold.
pub(super) struct Link {
    connection: Connection,
    credentials: Option<Credentials>,
    /// Or why there is none.
    client: Result<Arc<Client>, String>,
}

/// What is sent to a server, by its position.
pub(super) struct Call {
    pub(super) server: usize,
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) body: Vec<u8>,
    pub(super) timeout: Duration,
}

struct Drive {
    machine: Datacenter,
    link: Link,
    asking: JoinSet<(u64, Result<Answer, String>)>,
    publishing: Option<Publishing>,
    proposals: mpsc::Sender<Proposal>,
}

/// Watches a datacenter until `stop`. What changes goes to `proposals`, how it stands to `status`.
pub async fn watch(
    machine: Datacenter,
    connection: Connection,
    proposals: mpsc::Sender<Proposal>,
    status: watch::Sender<Status>,
    stop: CancellationToken,
) {
    let mut drive =
        Drive { machine, link: Link::new(connection), asking: JoinSet::new(), publishing: None, proposals };
    let mut looks = tokio::time::interval(LOOK);
    let actions = drive.machine.tick(now());
    drive.act(actions);
    loop {
        let due = drive.machine.next_due().map_or_else(|| Instant::now() + IDLE, Instant::from_std);
        let actions = tokio::select! {
            () = stop.cancelled() => return,
            Some(done) = drive.asking.join_next(), if !drive.asking.is_empty() => match done {
                Ok((id, Ok(answer))) => drive.machine.on_answer(id, &answer, now()),
                Ok((id, Err(reason))) => drive.machine.on_failure(id, &reason, now()),
                // A question that was ended by us, which only happens at the end.
                Err(_) => drive.machine.tick(now()),
            },
            done = published(&mut drive.publishing) => {
                drive.publishing = None;
                drive.machine.on_published(done, now())
            }
            _ = looks.tick() => {
                let changed = drive.link.reload();
                status.send_if_modified(|told| {
                    let next = drive.machine.status(now());
                    let differs = *told != next;
                    *told = next;
                    differs
                });
                if changed { drive.machine.on_credentials(now()) } else { drive.machine.tick(now()) }
            }
            () = tokio::time::sleep_until(due) => drive.machine.tick(now()),
        };
        drive.act(actions);
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// Waits for what is being published; for ever while nothing is.
async fn published(publishing: &mut Option<Publishing>) -> bool {
    match publishing {
        Some(publishing) => publishing.await,
        None => std::future::pending().await,
    }
}

impl Link {
    /// A link with the credentials that there are now.
    pub(super) fn new(connection: Connection) -> Self {
        let client = Err("no credentials were read yet".to_owned());
        let mut link = Self { connection, credentials: None, client };
        link.reload();
        link
    }

    /// Reads token and certificates again; true when they have changed.
    pub(super) fn reload(&mut self) -> bool {
        let Connection { servers, token, tls } = &self.connection;
        let read = match Credentials::read(token.as_ref(), tls.as_ref()) {
            Ok(read) => read,
            Err(reason) => {
                // What was read before is better than nothing.
                if self.credentials.is_none() {
                    self.client = Err(reason);
                }
                return false;
            }
        };
        if self.credentials.as_ref() == Some(&read) {
            return false;
        }
        self.client = Client::new(servers, tls.as_ref(), &read).map(Arc::new);
        self.credentials = Some(read);
        true
    }

    /// The answer to a call, or why there is none.
    pub(super) fn call(&self, call: Call) -> impl Future<Output = Result<Answer, String>> + Send + use<> {
        let client = self.client.clone();
        async move {
            let Call { server, method, path, body, timeout } = call;
            match tokio::time::timeout(timeout, client?.send(server, method, &path, body)).await {
                Ok(answer) => answer.map_err(|error| told(&error)),
                Err(_) => Err(format!("no answer within {} s", timeout.as_secs())),
            }
        }
    }
}

impl Drive {
    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Ask(Query { id, server, path, timeout }) => {
                    let call = Call { server, method: Method::GET, path, body: Vec::new(), timeout };
                    let answer = self.link.call(call);
                    self.asking.spawn(async move { (id, answer.await) });
                }
                Action::Publish(commands) => {
                    let proposals = self.proposals.clone();
                    self.publishing = Some(Box::pin(async move {
                        let (done, told) = oneshot::channel();
                        let sent = proposals.send(Proposal { commands, done }).await;
                        sent.is_ok() && told.await.unwrap_or(false)
                    }));
                }
            }
        }
    }
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |told, cause| format!("{told}: {cause}"))
}

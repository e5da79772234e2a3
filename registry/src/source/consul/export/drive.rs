//! The driver of a [`Writer`]: sockets, timers and files. It decides nothing.

use std::sync::Arc;
use std::time::Duration;

use ca::renewal::Clock;
use ca::state::unix_seconds;
use http::Method;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::desired::{Basis, desired};
use super::writer::{Call, Status, Time, Writer};
use crate::snapshot::Snapshot;
use crate::source::consul::answer::Answer;
use crate::source::consul::drive::{self, Connection, Link};

/// How often token and certificates are looked at, and the status is told if nothing happens.
const LOOK: Duration = Duration::from_secs(1);
/// Snapshots that follow each other sooner are looked at together.
const TOGETHER: Duration = Duration::from_millis(200);
/// And of the time no more than one part in so many is spent on looking at them.
const PART: u32 = 10;
/// With nothing to wait for, the machine is asked again after this time.
const IDLE: Duration = Duration::from_secs(60);

/// What the driver is given of the outside.
#[derive(Clone)]
pub struct World {
    /// How the servers are reached.
    pub connection: Connection,
    /// The mesh.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// The time, for leases.
    pub clock: Clock,
}

type Answers = JoinSet<(u64, Result<Answer, String>)>;

/// Keeps a catalog as the mesh is, until `stop`. How it stands goes to `status`.
pub async fn write(mut writer: Writer, world: World, status: watch::Sender<Status>, stop: CancellationToken) {
    let World { connection, mut snapshots, clock } = world;
    let time = || Time { at: Instant::now().into_std(), unix: unix_seconds(clock()) };
    let settings = writer.settings().clone();
    let mut link = Link::new(connection);
    let mut answers = Answers::new();
    let mut looks = tokio::time::interval(LOOK);
    let (mut next_look, mut basis) = (Instant::now(), Basis::default());
    snapshots.mark_changed();
    loop {
        let due = writer.next_due().map_or_else(|| Instant::now() + IDLE, Instant::from_std);
        let calls = tokio::select! {
            () = stop.cancelled() => return,
            Some(done) = answers.join_next(), if !answers.is_empty() => match done {
                Ok((id, Ok(answer))) => writer.on_answer(id, &answer, time()),
                Ok((id, Err(reason))) => writer.on_failure(id, &reason, time()),
                // A call that was ended by us, which only happens at the end.
                Err(_) => writer.tick(time()),
            },
            Ok(()) = changed(&mut snapshots, next_look) => {
                let snapshot = Arc::clone(&snapshots.borrow_and_update());
                let began = Instant::now();
                let looked = basis.differs(&snapshot, &settings).then(|| desired(&snapshot, &settings));
                next_look = Instant::now() + TOGETHER.max(began.elapsed() * PART);
                match looked {
                    Some((desired, unfit)) => writer.on_desired(desired, unfit, time()),
                    None => writer.tick(time()),
                }
            }
            _ = looks.tick() => {
                if link.reload() { writer.on_credentials(time()) } else { writer.tick(time()) }
            }
            () = tokio::time::sleep_until(due) => writer.tick(time()),
        };
        for call in calls {
            let Call { id, server, path, body, timeout } = call;
            let method = if body.is_some() { Method::PUT } else { Method::GET };
            let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
            let answer = link.call(drive::Call { server, method, path, body, timeout });
            answers.spawn(async move { (id, answer.await) });
        }
        status.send_if_modified(|told| {
            let next = writer.status();
            let differs = *told != next;
            *told = next;
            differs
        });
    }
}

/// Waits for another snapshot, and no less than until `from`.
async fn changed(
    snapshots: &mut watch::Receiver<Arc<Snapshot>>,
    from: Instant,
) -> Result<(), watch::error::RecvError> {
    tokio::time::sleep_until(from).await;
    snapshots.changed().await
}

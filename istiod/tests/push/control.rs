//! The control plane from state to sockets, without Raft.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use istiod::publish::Publisher;
use istiod::push::{Push, Settings};
use prometheus_client::registry::Registry;
use registry::snapshot::Snapshot;
use registry::state::{Batch, ObjectKey, Revision, State};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use xds::balance::{Fleet, Spread};
use xds::debounce::Limits;
use xds::proxy::Proxy;
use xds::resources::Type;
use xds::server::{Ads, Authentication, JOINS, tune};
use xds::status::{Metrics, Status, WaitReport};
use xds::translate::translate;

use crate::client::{self, Held};

/// A test that waits longer than this has failed.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

/// Type and name to version.
pub(crate) type Versions = BTreeMap<(Type, String), u64>;

pub(crate) struct Control {
    pub(crate) status: Status,
    state: State,
    snapshot: Arc<Snapshot>,
    publisher: Publisher,
    address: String,
    registry: Registry,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Control {
    pub(crate) async fn start(debounce: Limits) -> Self {
        let state = State::default();
        let (publisher, updates) = Publisher::new(&state);
        let mut registry = Registry::default();
        let status = Status::new(Metrics::register(&mut registry));
        let (joins, joined) = mpsc::channel(JOINS);
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let push = Push::new(
            Settings { debounce, ..Settings::default() },
            updates,
            joined,
            status.clone(),
            tasks.clone(),
        );
        tasks.spawn(push.run(stop.clone()));
        let (_, fleet) = watch::channel(Fleet::alone("own:1"));
        let ads = Ads {
            spread: Spread::new(fleet),
            joins,
            status: status.clone(),
            authentication: Authentication::Optional,
            tasks: tasks.clone(),
            stop: stop.clone(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = tune(Server::builder()).add_service(ads);
        let ended = stop.clone().cancelled_owned();
        tasks.spawn(async move {
            server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), ended).await.unwrap();
        });
        let snapshot = Arc::new(Snapshot::build(&state));
        Self { status, state, snapshot, publisher, address, registry, tasks, stop }
    }

    /// Applies objects as one entry of the log; returns its revision.
    pub(crate) fn apply(&mut self, yaml: &str) -> u64 {
        let (objects, _) = registry::config::parse("test.yaml", yaml).unwrap();
        let revision = self.state.revision().0 + 1;
        self.commit(&Batch::put_objects(i64::try_from(revision).unwrap(), "test", objects))
    }

    /// Removes the objects that this describes.
    pub(crate) fn delete(&mut self, yaml: &str) -> u64 {
        let (objects, _) = registry::config::parse("test.yaml", yaml).unwrap();
        let revision = self.state.revision().0 + 1;
        let keys = objects.iter().map(ObjectKey::of);
        self.commit(&Batch::delete_objects(i64::try_from(revision).unwrap(), "test", keys))
    }

    fn commit(&mut self, batch: &Batch) -> u64 {
        let revision = self.state.revision().0 + 1;
        let (changes, _) = self.state.apply(Revision(revision), batch);
        self.snapshot = self.publisher.publish(&self.state, changes, Instant::now().into_std());
        revision
    }

    /// Connects a proxy that accepts everything.
    pub(crate) async fn proxy(&self, number: u32, native: bool) -> Held {
        let (held, run) = client::connect(&self.address, number, native).await;
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! { () = stop.cancelled() => {}, () = run => {} }
        });
        held
    }

    /// Waits until so many proxies run the revision.
    pub(crate) async fn acknowledged(&self, revision: u64, proxies: usize) -> WaitReport {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let report = self.status.wait(revision, deadline).await;
            assert!(report.pending.is_empty(), "{report:?}");
            if report.acknowledged.len() == proxies {
                return report;
            }
            // Not all have connected yet.
            assert!(Instant::now() < deadline, "{report:?}");
            tokio::task::yield_now().await;
        }
    }

    /// What a full translation of the newest snapshot gives the proxy.
    pub(crate) fn wanted(&self, number: u32, native: bool) -> Versions {
        let proxy = Proxy::from_node(&client::node(number, native), None).unwrap();
        let all = translate(&self.snapshot, &proxy).by_type.into_iter();
        all.flat_map(|(t, map)| map.into_values().map(move |r| ((t, r.name.clone()), r.version))).collect()
    }

    pub(crate) fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        tokio::time::timeout(TIMEOUT, self.tasks.wait()).await.unwrap();
    }
}

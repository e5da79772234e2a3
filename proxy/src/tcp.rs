//! The TCP proxy: a connection to a cluster's endpoint, and bytes both ways.

pub mod gather;
pub mod io;
pub mod relay;
pub mod splice;

use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use crate::access_log::Facts;
use crate::http::flags::Flags;
use crate::listener::connection::Connection;
use crate::listener::slot::{Chain, Runtime};
use crate::metrics::standard::{Parties, Reporter, TcpSeries};
use crate::upstream::health::Signal;
use crate::upstream::send::{Link, Opened};
use crate::upstream::{Ask, Host, Upstream};
use crate::worker::Worker;
use crate::xds::listener::tcp::TcpProxy;
use io::Io;
use relay::{Counts, End, relay};

/// Between two reports of a connection's bytes while it lives.
const REPORT: Duration = Duration::from_secs(5);

/// One connection through the TCP proxy.
struct Session<'a> {
    worker: &'a Rc<Worker>,
    connection: &'a Rc<Connection>,
    chain: &'a Chain,
    started: Instant,
    counts: Counts,
    flags: Flags,
    failure: String,
    upstream: Option<Rc<Upstream>>,
    host: Option<Rc<Host>>,
    link: Option<Rc<Link>>,
}

/// Serves a connection until either side ends it.
pub async fn serve(
    worker: &Rc<Worker>,
    runtime: &Runtime,
    chain: &Chain,
    config: &TcpProxy,
    connection: &Rc<Connection>,
    mut client: Io,
) {
    let mut session = Session {
        worker,
        connection,
        chain,
        started: Instant::now(),
        counts: Counts::default(),
        flags: Flags::NONE,
        failure: String::new(),
        upstream: None,
        host: None,
        link: None,
    };
    let cluster = config.pick(worker.random());
    let name = cluster.and_then(|c| runtime.active.listener.clusters.name(c));
    session.upstream = name.and_then(|n| worker.upstream(n));
    let connected = match session.upstream.clone() {
        Some(upstream) => connect(&mut session, &upstream, config).await,
        None => {
            session.flags.insert(Flags::NO_CLUSTER);
            None
        }
    };
    let series = chain.reporter.map(|reporter| session.series(reporter));
    if let Some(series) = &series {
        series.opened.inc();
    }
    if let Some((mut server, _opened)) = connected {
        let life = async {
            match config.max_connection_duration {
                Some(most) => tokio::time::sleep(most).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            end = relay(&mut client, &mut server, config.idle_timeout, &session.counts) => session.flags.insert(flags_of(&end)),
            () = life => session.flags.insert(Flags::MAX_DURATION),
            () = worker.drain.cut() => session.flags.insert(Flags::LOCAL_RESET),
            () = connection.was_cut() => session.flags.insert(Flags::LOCAL_RESET),
            () = report(&session.counts, series.as_deref()) => {}
        }
    }
    session.end(series.as_deref());
}

async fn connect(
    session: &mut Session<'_>,
    upstream: &Rc<Upstream>,
    config: &TcpProxy,
) -> Option<(Io, Opened)> {
    let hash = config
        .hash_source_ip
        .then(|| xxhash_rust::xxh64::xxh64(session.connection.remote.ip().to_string().as_bytes(), 0));
    upstream.warm().await;
    for _ in 0..config.max_connect_attempts {
        let ask = Ask { hash, avoid: &[], attempts: 1, original: session.connection.local };
        let Some(host) = upstream.pick(ask) else {
            session.flags.insert(Flags::NO_HEALTHY_UPSTREAM);
            return None;
        };
        session.host = Some(Rc::clone(&host));
        if !upstream.takes_connections() {
            session.flags.insert(Flags::UPSTREAM_OVERFLOW);
            session.host = None;
            return None;
        }
        let opened = match upstream.admit(&host.pools.one).await {
            Ok(opened) => opened,
            Err(_) => {
                session.flags.insert(Flags::UPSTREAM_OVERFLOW);
                return None;
            }
        };
        match upstream.connect(&host, None, host.origin(session.connection).as_deref()).await {
            Ok((io, link)) => {
                session.link = Some(link);
                upstream.on_result(&host, Signal::Status(200));
                return Some((io, opened));
            }
            Err(failure) => {
                upstream.on_result(&host, Signal::LocalFailure);
                session.flags.insert(Flags::UPSTREAM_CONNECTION_FAILURE);
                session.failure = failure.reason;
            }
        }
    }
    session.flags.insert(Flags::RETRY_LIMIT);
    None
}

fn flags_of(end: &End) -> Flags {
    match end {
        End::Closed | End::Idle => Flags::NONE,
        End::Client(_) => Flags::DOWNSTREAM_TERMINATION,
        End::Server(_) => Flags::UPSTREAM_TERMINATION,
    }
}

/// Tells from time to time how many bytes have gone; never ends.
async fn report(counts: &Counts, series: Option<&TcpSeries>) {
    let Some(series) = series else { return std::future::pending().await };
    loop {
        tokio::time::sleep(REPORT).await;
        tell(counts, series);
    }
}

fn tell(counts: &Counts, series: &TcpSeries) {
    let told = (counts.told_up.replace(counts.up.get()), counts.told_down.replace(counts.down.get()));
    series.received.add(counts.up.get() - told.0);
    series.sent.add(counts.down.get() - told.1);
}

impl Session<'_> {
    fn series(&self, reporter: Reporter) -> Rc<TcpSeries> {
        let standard = &self.worker.shared.standard;
        let nobody = &self.worker.nobody;
        let (peer, principals) = match reporter {
            Reporter::Source => {
                let principals = self.link.as_ref().and_then(|l| l.principals.as_ref());
                let principals = principals.unwrap_or(&self.worker.no_principals);
                (self.host.as_ref().map(|h| &h.workload), Rc::clone(principals))
            }
            Reporter::Destination => (None, self.connection.principals(standard)),
        };
        let parties = Parties {
            peer: peer.unwrap_or(nobody),
            service: self.upstream.as_ref().map_or(&self.worker.no_service, |u| &u.service),
            principals: &principals,
        };
        standard.tcp(reporter, parties, self.connection.is_mutual_tls(), self.flags)
    }

    fn end(&self, series: Option<&TcpSeries>) {
        if let Some(series) = series {
            tell(&self.counts, series);
            series.closed.inc();
        }
        if self.chain.logs.is_empty() {
            return;
        }
        let elapsed = self.started.elapsed();
        self.chain.logs.write_facts(
            &Facts {
                connection: self.connection,
                remote: self.connection.remote,
                began: crate::worker::wall_clock().checked_sub(elapsed).unwrap_or(std::time::UNIX_EPOCH),
                duration_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
                request_ms: None,
                response_ms: None,
                told: None,
                version: None,
                response: None,
                trailers: None,
                status: None,
                grpc_status: None,
                flags: self.flags,
                details: "",
                failure: &self.failure,
                received: self.counts.up.get(),
                sent: self.counts.down.get(),
                upstream: self.upstream.as_ref(),
                host: self.host.as_ref(),
                link: self.link.as_deref(),
                attempts: 1,
                route: "",
                route_metadata: None,
                dynamic: None,
            },
            self.worker,
        );
    }
}

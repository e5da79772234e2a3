//! What an agent is told.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ca::authn::JoinToken;

use crate::register::Workload;

/// One agent.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder for key, certificate and membership; only its owner may read it.
    pub data_dir: PathBuf,
    /// Join token; not needed after the first start.
    pub token: Option<JoinToken>,
    /// Addresses of the control plane that replace the token's.
    pub endpoints: Vec<String>,
    /// Lifetime to ask certificates for; the control plane's default when `None`.
    pub certificate_lifetime: Option<Duration>,
    /// What to register; `None` for a proxy without an application.
    pub workload: Option<Workload>,
    /// What sits in the data plane's seat.
    pub seat: Seat,
}

/// What sits in the data plane's seat.
#[derive(Debug, Clone)]
pub enum Seat {
    /// Our proxy, in this process.
    Proxy(ProxySeat),
    /// A stock Envoy, which gets its certificate from this Unix socket.
    Secrets {
        /// Path of the socket.
        socket: PathBuf,
    },
}

/// Our proxy beside one workload.
#[derive(Debug, Clone)]
pub struct ProxySeat {
    /// Workload name.
    pub name: String,
    /// Address other proxies reach the workload at.
    pub address: IpAddr,
    /// Labels of the workload.
    pub labels: BTreeMap<String, String>,
    /// Network address and prefix length of the loopback block; `None` when traffic is captured.
    pub loopback_block: Option<(Ipv4Addr, u8)>,
    /// Workload port to the address where the application listens.
    pub forward: BTreeMap<u16, SocketAddr>,
    /// Admin address.
    pub admin: SocketAddr,
    /// Address of `/stats/prometheus`.
    pub stats: SocketAddr,
    /// Address of `/healthz/ready`.
    pub readiness: SocketAddr,
    /// Worker threads.
    pub workers: usize,
    /// How long open requests may take to finish at the end.
    pub drain: Duration,
}

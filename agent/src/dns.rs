//! DNS for the applications of this machine: names of the mesh are answered here, all others by the servers that the
//! machine has.
//!
//! [`names`] follows what the control plane tells and keeps it for the next start; [`message`] reads and writes messages;
//! [`server`] answers over UDP and TCP.

pub mod message;
pub mod names;
pub mod server;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

/// The port at which an agent answers, unless it is told another (Istio, "Ports used by the sidecar").
pub const AGENT_PORT: u16 = 15053;
/// The port of every DNS server.
const PORT: u16 = 53;

/// Where systemd-resolved answers the machine's applications (systemd-resolved.service(8)). It asks the agent, so the agent
/// asks the servers behind it,
const STUBS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53)), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 54))];
/// which it lists here.
const BEHIND_STUBS: &str = "/run/systemd/resolve/resolv.conf";

/// Where queries are answered, and who answers what is not of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses to listen on, UDP and TCP; nobody is answered when there is none.
    pub listen: Vec<SocketAddr>,
    /// Servers for all other names, the first one first.
    pub upstreams: Vec<SocketAddr>,
}

impl Dns {
    /// A server on these addresses; without upstreams of its own it asks those of resolv.conf(5), but never itself.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn new(listen: Vec<SocketAddr>, upstreams: Vec<SocketAddr>) -> std::io::Result<Self> {
        let upstreams = if upstreams.is_empty() && !listen.is_empty() {
            of_system(Path::new("/etc/resolv.conf"), Path::new(BEHIND_STUBS))?
        } else {
            upstreams
        };
        let upstreams = upstreams.into_iter().filter(|upstream| !listen.contains(upstream)).collect();
        Ok(Self { listen, upstreams })
    }
}

fn of_system(file: &Path, behind_stubs: &Path) -> std::io::Result<Vec<SocketAddr>> {
    let read = |file: &Path| match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some(nameservers(&text))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let servers = read(file)?.unwrap_or_default();
    if !servers.iter().any(|server| STUBS.contains(&server.ip())) {
        return Ok(servers);
    }
    Ok(read(behind_stubs)?.unwrap_or(servers))
}

fn nameservers(text: &str) -> Vec<SocketAddr> {
    let lines =
        text.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.split_whitespace().next());
    lines.filter_map(|address| Some(SocketAddr::new(address.parse().ok()?, PORT))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behind_systemd_resolved_its_servers_are_asked() {
        let folder = tempfile::tempdir().unwrap();
        let (file, behind) = (folder.path().join("resolv.conf"), folder.path().join("behind"));
        let asked = || of_system(&file, &behind).unwrap().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(asked().is_empty());
        std::fs::write(&file, "nameserver 10.0.0.1\n").unwrap();
        std::fs::write(&behind, "nameserver 10.0.0.53\nnameserver fd00::53\n").unwrap();
        assert_eq!(asked(), ["10.0.0.1:53"]);
        std::fs::write(&file, "nameserver 127.0.0.53\noptions edns0 trust-ad\n").unwrap();
        assert_eq!(asked(), ["10.0.0.53:53", "[fd00::53]:53"]);
        std::fs::remove_file(&behind).unwrap();
        assert_eq!(asked(), ["127.0.0.53:53"], "somebody else has its address");
    }

    #[test]
    fn nameservers_are_those_of_the_system_without_ourselves() {
        let text =
            "# resolv.conf\nsearch a.example\nnameserver 10.0.0.53\n nameserver\tfd00::53\nnameserver x\n";
        let found = nameservers(text);
        assert_eq!(found, ["10.0.0.53:53".parse().unwrap(), "[fd00::53]:53".parse().unwrap()]);
        let own: SocketAddr = "127.0.0.1:15053".parse().unwrap();
        let dns = Dns::new(vec![own], vec![own, found[0]]).unwrap();
        assert_eq!(dns.upstreams, [found[0]]);
    }
}

//! systemd-resolved: names of the mesh are asked of the agent, all others go where they went.
//!
//! resolved chooses servers by the domains of links (systemd-resolved.service(8), "Protocols and routing"), and takes no
//! server for the loopback device. So the agent has a link of its own, of which nothing is sent: a pair of virtual
//! Ethernet devices, with the address that nobody has (RFC 7600). Its server is the agent, its domains are for routing
//! only, and it is no default route. All of that is gone with the link, and none of it is in a file.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::str::FromStr;

use crate::tool::{ToolError, run};

/// The agent's link, and its other end.
const LINK: &str = "istio-dns";
const PEER: &str = "istio-dns-peer";

/// Links without an address are not asked. This one is reserved for such ends (RFC 7600).
const NOBODY: &str = "192.0.0.8/32";

/// Where resolved keeps what it knows while it runs.
const RUNS: &str = "/run/systemd/resolve";

/// A domain whose names are asked of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(String);

/// A text is no domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("write a domain, such as `svc.cluster.local`")]
pub struct NotADomain;

impl FromStr for Domain {
    type Err = NotADomain;

    fn from_str(text: &str) -> Result<Self, NotADomain> {
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        if text.len() <= 253 && text.split('.').all(label) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NotADomain)
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why resolved does not ask the agent.
#[derive(Debug, thiserror::Error)]
pub enum ResolvedError {
    /// There is nobody to tell.
    #[error("systemd-resolved does not run on this machine")]
    NotHere,
    /// A program could not be run, or refused.
    #[error(transparent)]
    Tool(#[from] ToolError),
}

/// What resolved is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Where the agent answers.
    pub server: SocketAddr,
    /// The domains of the mesh.
    pub domains: Vec<Domain>,
}

impl Plan {
    /// The programs that tell it, in order, with their arguments.
    #[must_use]
    pub fn steps(&self) -> Vec<(&'static str, Vec<String>)> {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let ip = |text: String| ("ip", words(&text));
        let mut steps = vec![
            ip(format!("link add {LINK} type veth peer name {PEER}")),
            ip(format!("address add {NOBODY} dev {LINK}")),
            ip(format!("link set {PEER} up")),
            ip(format!("link set {LINK} up")),
        ];
        let domains = self.domains.iter().map(|domain| format!("~{domain}"));
        let tell = |what: &str, values: Vec<String>| {
            ("resolvectl", [what.to_owned(), LINK.to_owned()].into_iter().chain(values).collect())
        };
        steps.push(tell("dns", vec![self.server.to_string()]));
        steps.push(tell("domain", domains.collect()));
        // Names of the mesh are signed by nobody, and nobody is asked for them by shouting.
        for what in ["default-route", "dnssec", "dnsovertls", "llmnr", "mdns"] {
            steps.push(tell(what, vec!["no".to_owned()]));
        }
        steps
    }

    /// Tells resolved, in place of what it was told before. Blocks.
    ///
    /// # Errors
    ///
    /// When resolved does not run here, or a program refuses: then it knows nothing of the agent.
    pub fn apply(&self) -> Result<(), ResolvedError> {
        if !Path::new(RUNS).is_dir() {
            return Err(ResolvedError::NotHere);
        }
        Self::remove()?;
        for (program, args) in self.steps() {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            if let Err(error) = run(program, &args, "") {
                // Half of it would send names to nobody; why it is a half is what is told.
                if let Err(error) = Self::remove() {
                    tracing::warn!(%error, link = LINK, "the link is left");
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Has resolved forget the agent; it need not know it. Blocks.
    ///
    /// # Errors
    ///
    /// When the link cannot be removed.
    pub fn remove() -> Result<(), ToolError> {
        match run("ip", &["link", "show", "dev", LINK], "") {
            Ok(()) => run("ip", &["link", "delete", LINK], ""),
            Err(ToolError::Refused { .. }) => Ok(()),
            Err(error @ ToolError::Io(_)) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_asked_for_the_domains_of_the_mesh_alone() {
        let plan = Plan {
            server: "127.0.0.1:15053".parse().unwrap(),
            domains: ["svc.cluster.local", "consul"].map(|domain| domain.parse().unwrap()).to_vec(),
        };
        let lines: Vec<String> =
            plan.steps().iter().map(|(program, args)| format!("{program} {}", args.join(" "))).collect();
        let expected = [
            "ip link add istio-dns type veth peer name istio-dns-peer",
            "ip address add 192.0.0.8/32 dev istio-dns",
            "ip link set istio-dns-peer up",
            "ip link set istio-dns up",
            "resolvectl dns istio-dns 127.0.0.1:15053",
            "resolvectl domain istio-dns ~svc.cluster.local ~consul",
            "resolvectl default-route istio-dns no",
            "resolvectl dnssec istio-dns no",
            "resolvectl dnsovertls istio-dns no",
            "resolvectl llmnr istio-dns no",
            "resolvectl mdns istio-dns no",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn only_domains_are_domains() {
        assert_eq!("svc.cluster.local".parse::<Domain>().unwrap().to_string(), "svc.cluster.local");
        let long = "a".repeat(64);
        for wrong in ["", ".", "a..b", "~a", "a b", "-x;y", "a.", long.as_str()] {
            assert_eq!(wrong.parse::<Domain>(), Err(NotADomain), "{wrong}");
        }
    }
}

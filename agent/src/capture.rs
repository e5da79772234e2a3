//! Traffic capture: a table of nftables that redirects a machine's TCP connections to the proxy.
//!
//! [`Plan`] says what is captured and is printed as one script; nft carries it out as one transaction, so there is
//! never a half of it, and `delete table inet istio` removes the whole. The order of the rules is Istio's
//! (`istio-iptables`): the proxy's own traffic is recognised by its user and goes out, except what it sends to an
//! address of this machine, which enters again like a call from outside; what it sends to the application comes from
//! [`LOOP_BREAKERS`] and is left alone. ssh and the agent's own ports are never captured.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::tool::{ToolError, run};

/// The port at which the proxy takes what comes to the machine, unless the mesh says another.
pub const INBOUND_PORT: u16 = 15006;

/// Ports of the machine that are never captured: ssh, and the agent's (Istio, "Ports used by the sidecar").
const NEVER_INBOUND: [u16; 7] = [22, 15000, 15008, 15014, 15020, 15021, 15090];

/// From these addresses the proxy and probes call the application. The first needs nothing; the second must be an
/// address of the loopback device.
pub(crate) const LOOP_BREAKERS: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(127, 0, 0, 6), Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));

/// The table, which nobody else may use.
const TABLE: &str = "table inet istio";

/// A block of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    address: IpAddr,
    prefix: u8,
}

/// A text is not a block of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("write an address with a prefix length, such as `10.0.0.0/8` or `fd00::/8`")]
pub struct NotABlock;

impl FromStr for Block {
    type Err = NotABlock;

    fn from_str(text: &str) -> Result<Self, NotABlock> {
        let (address, prefix) = text.split_once('/').ok_or(NotABlock)?;
        let address: IpAddr = address.parse().map_err(|_| NotABlock)?;
        let prefix: u8 = prefix.parse().map_err(|_| NotABlock)?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        if prefix > longest { Err(NotABlock) } else { Ok(Self { address, prefix }) }
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.address.is_ipv4() { "ip" } else { "ip6" };
        write!(f, "{family} daddr {}/{}", self.address, self.prefix)
    }
}

/// What is captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The proxy's user.
    pub user: u32,
    /// Where the proxy takes what applications send.
    pub outbound_port: u16,
    /// Where the proxy takes what comes to the machine.
    pub inbound_port: u16,
    /// Where the agent answers DNS queries; they are left alone when `None`.
    pub dns: Option<u16>,
    /// Ports of the machine that are not captured.
    pub exclude_inbound: BTreeSet<u16>,
    /// Ports elsewhere that are not captured.
    pub exclude_outbound: BTreeSet<u16>,
    /// Addresses that are captured; all when empty.
    pub include: Vec<Block>,
    /// Addresses that are not captured.
    pub exclude: Vec<Block>,
}

impl Plan {
    /// The script: whatever was there is replaced.
    #[must_use]
    pub fn text(&self) -> String {
        // Deleting what does not exist is refused, so it is made first: all of it in one transaction.
        let mut text = format!("{TABLE}\ndelete {TABLE}\n{TABLE} {{\n");
        let mut chain = |name: &str, hook: &str, rules: &[String]| {
            let lines: String = rules.iter().map(|rule| format!("\t\t{rule}\n")).collect();
            // Writing into a string cannot fail.
            write!(text, "\tchain {name} {{\n{hook}{lines}\t}}\n").unwrap_or_default();
        };
        let hook = |hook: &str| format!("\t\ttype nat hook {hook} priority -100; policy accept;\n");
        chain("inbound", &hook("prerouting"), &self.inbound());
        chain("outbound", &hook("output"), &self.outbound());
        text.push_str("}\n");
        text
    }

    fn inbound(&self) -> Vec<String> {
        let never: BTreeSet<u16> = self.exclude_inbound.iter().copied().chain(NEVER_INBOUND).collect();
        vec![
            "meta l4proto != tcp return".to_owned(),
            "fib daddr type != local return".to_owned(),
            format!("tcp dport {} return", set(&never)),
            format!("meta l4proto tcp redirect to :{}", self.inbound_port),
        ]
    }

    fn outbound(&self) -> Vec<String> {
        let Self { user, inbound_port, outbound_port, .. } = self;
        // The agent itself asks other servers.
        let to_agent =
            |port, protocol: &str| format!("meta skuid != {user} {protocol} dport 53 redirect to :{port}");
        let dns =
            self.dns.into_iter().flat_map(|port| ["udp", "tcp"].map(|protocol| to_agent(port, protocol)));
        let mut rules: Vec<String> = dns.chain(["meta l4proto != tcp return".to_owned()]).collect();
        if !self.exclude_outbound.is_empty() {
            rules.push(format!("tcp dport {} return", set(&self.exclude_outbound)));
        }
        let (v4, v6) = LOOP_BREAKERS;
        // nft wants to see in the rule itself that there is a port.
        let redirect = "meta l4proto tcp redirect to";
        rules.extend([
            format!("oif lo ip saddr {v4} return"),
            format!("oif lo ip6 saddr {v6} return"),
            format!("oif lo meta skuid {user} ip daddr != 127.0.0.0/8 {redirect} :{inbound_port}"),
            format!("oif lo meta skuid {user} ip6 daddr != ::1 {redirect} :{inbound_port}"),
            "oif lo return".to_owned(),
            format!("meta skuid {user} return"),
        ]);
        rules.extend(self.exclude.iter().map(|block| format!("{block} return")));
        let redirect = format!("{redirect} :{outbound_port}");
        if self.include.is_empty() {
            rules.push(redirect);
        } else {
            rules.extend(self.include.iter().map(|block| format!("{block} {redirect}")));
        }
        rules
    }

    /// Puts the rules into place, in place of earlier ones. Blocks.
    ///
    /// # Errors
    ///
    /// When nft is not there or refuses: traffic is captured as before.
    pub fn apply(&self) -> Result<(), ToolError> {
        // A machine without IPv6 needs no such address.
        if let Err(error) = run("ip", &["-6", "addr", "replace", &breaker(), "dev", "lo", "nodad"], "") {
            tracing::debug!(%error, "no IPv6 on this machine");
        }
        run("nft", &["-f", "-"], &self.text())
    }

    /// Removes the rules; there need not be any. Blocks.
    ///
    /// # Errors
    ///
    /// When nft is not there or refuses.
    pub fn remove() -> Result<(), ToolError> {
        run("nft", &["-f", "-"], &format!("{TABLE}\ndelete {TABLE}\n"))?;
        if let Err(error) = run("ip", &["-6", "addr", "del", &breaker(), "dev", "lo"], "") {
            tracing::debug!(%error, "the loopback device had no address of ours");
        }
        Ok(())
    }
}

fn breaker() -> String {
    format!("{}/128", LOOP_BREAKERS.1)
}

fn set(ports: &BTreeSet<u16>) -> String {
    let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
    format!("{{ {} }}", ports.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            user: 1337,
            outbound_port: 15001,
            inbound_port: INBOUND_PORT,
            dns: None,
            exclude_inbound: [2222].into(),
            exclude_outbound: BTreeSet::new(),
            include: Vec::new(),
            exclude: vec!["169.254.169.254/32".parse().unwrap()],
        }
    }

    #[test]
    fn the_rules_are_one_script() {
        let expected = "table inet istio
delete table inet istio
table inet istio {
\tchain inbound {
\t\ttype nat hook prerouting priority -100; policy accept;
\t\tmeta l4proto != tcp return
\t\tfib daddr type != local return
\t\ttcp dport { 22, 2222, 15000, 15008, 15014, 15020, 15021, 15090 } return
\t\tmeta l4proto tcp redirect to :15006
\t}
\tchain outbound {
\t\ttype nat hook output priority -100; policy accept;
\t\tmeta l4proto != tcp return
\t\toif lo ip saddr 127.0.0.6 return
\t\toif lo ip6 saddr ::6 return
\t\toif lo meta skuid 1337 ip daddr != 127.0.0.0/8 meta l4proto tcp redirect to :15006
\t\toif lo meta skuid 1337 ip6 daddr != ::1 meta l4proto tcp redirect to :15006
\t\toif lo return
\t\tmeta skuid 1337 return
\t\tip daddr 169.254.169.254/32 return
\t\tmeta l4proto tcp redirect to :15001
\t}
}
";
        assert_eq!(plan().text(), expected);
    }

    #[test]
    fn what_is_included_alone_is_captured() {
        let include = vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        let text = Plan { include, exclude_outbound: [25, 587].into(), ..plan() }.text();
        assert!(
            text.contains(
                "ip daddr 10.0.0.0/8 meta l4proto tcp redirect to :15001\n\t\tip6 daddr fd00::/8 meta l4proto tcp redirect to :15001\n"
            )
        );
        assert!(text.contains("tcp dport { 25, 587 } return\n"));
        assert!(!text.contains("\t\tmeta l4proto tcp redirect to :15001\n"));
    }

    #[test]
    fn queries_go_to_the_agent_and_its_own_to_others() {
        let text = Plan { dns: Some(15053), ..plan() }.text();
        let rules = "policy accept;\n\t\tmeta skuid != 1337 udp dport 53 redirect to :15053\n\
                     \t\tmeta skuid != 1337 tcp dport 53 redirect to :15053\n\t\tmeta l4proto != tcp return\n";
        assert!(text.contains(rules), "{text}");
    }

    #[test]
    fn only_blocks_of_addresses_are_blocks() {
        for wrong in
            ["10.0.0.0", "10.0.0.0/33", "fd00::/129", "*", "a/8", "1.2.3.4/-1", "1.2.3.4/8; flush ruleset"]
        {
            assert_eq!(wrong.parse::<Block>(), Err(NotABlock), "{wrong}");
        }
    }
}

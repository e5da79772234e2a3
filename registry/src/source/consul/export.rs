//! What the mesh writes into a Consul catalog, so that Consul's clients find its services.
//!
//! All of it is on one node of its own, which no agent has. The node says who owns it, since which epoch and until when;
//! a writer claims it first, and each of its transactions holds only while the node is as it claimed it, so that what an
//! earlier owner has still under way comes to nothing. What is on the node and says another owner is somebody else's: it
//! is told, and never touched.
//!
//! [`desired`] is what should be there, out of a snapshot of the mesh; [`plan`] what leads from what is there to that;
//! [`writer`] when it is asked and written, and what becomes of failures. These know no IO. [`drive`] moves the bytes.

pub mod desired;
pub mod drive;
pub mod plan;
pub mod writer;

use std::collections::BTreeSet;
use std::time::Duration;

/// Metadata: the epoch of the owner, of the node; and of an entry, the one that it was written in.
pub const EPOCH: &str = "mesh-epoch";
/// Metadata of the node: until when its owner holds it, in seconds since 1970.
pub const LEASE: &str = "mesh-lease-expires";
/// Metadata of an entry: whether its check passes, so that reading services alone shows all differences.
pub const HEALTHY: &str = "mesh-healthy";

/// Where and how the mesh writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Name of the mesh, which no other mesh has; the owner of its entries.
    pub owner: String,
    /// The datacenter that is written into.
    pub datacenter: String,
    /// Name of the Consul cluster among the mesh's sources: what came from there is not written back.
    pub cluster: String,
    /// DNS domain of the Consul cluster.
    pub domain: String,
    /// Before the name of a service.
    pub prefix: String,
    /// Tags of every entry.
    pub tags: BTreeSet<String>,
    /// Entries written in a second.
    pub rate: u32,
    /// How long a claim holds if nobody renews it. It is renewed in its last half.
    pub lease: Duration,
    /// How many servers there are to ask.
    pub servers: usize,
    /// How long a question waits for a change. A catalog that was restored has a lower index than the question that comes
    /// just then, which waits in vain: so not long.
    pub wait: Duration,
    /// The node is read from nothing this often, give or take a fifth, and what was refused is tried again.
    pub resync: Duration,
}

impl Settings {
    /// The usual settings of a mesh.
    #[must_use]
    pub fn new(owner: &str, datacenter: &str, servers: usize) -> Self {
        Self {
            owner: owner.to_owned(),
            datacenter: datacenter.to_owned(),
            cluster: "consul".to_owned(),
            domain: "consul".to_owned(),
            prefix: String::new(),
            tags: BTreeSet::new(),
            rate: 50,
            lease: Duration::from_secs(600),
            servers,
            wait: Duration::from_secs(10),
            resync: Duration::from_secs(600),
        }
    }

    /// The node that holds the mesh's entries.
    #[must_use]
    pub fn node(&self) -> String {
        format!("mesh-{}", self.owner)
    }
}

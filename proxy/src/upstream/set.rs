//! The endpoints of a cluster, arranged for picking: by priority, locality and health.

use std::rc::Rc;

use super::check::Standing;
use super::host::Host;
use crate::lb::locality::{self, Level, PriorityLoad};
use crate::lb::{Balancer, Load, Policy};
use crate::xds::cluster::Cluster;
use crate::xds::cluster::lb::{LbPolicy, SlowStart};

/// The endpoints of a locality: priority, weight, endpoints.
pub(super) type Placed = (u32, Option<u32>, Vec<Rc<Host>>);

/// An endpoint as the balancer sees it.
#[derive(Debug, Clone)]
struct Candidate(Rc<Host>);

impl AsRef<Load> for Candidate {
    fn as_ref(&self) -> &Load {
        &self.0.load
    }
}

/// Endpoints that are picked from together.
#[derive(Debug)]
struct Group {
    hosts: Vec<Candidate>,
    balancer: Balancer,
}

/// The endpoints of one priority.
#[derive(Debug)]
struct PriorityHosts {
    /// Those that are used in a panic.
    all: Group,
    usable: Group,
    degraded: Group,
    /// When localities are weighted: their endpoints, and in the same order their weights.
    localities: Vec<Group>,
    weights: Vec<u64>,
    /// The sum of the weights.
    total: u64,
}

/// The endpoints of a cluster, arranged for picking. Replaced as a whole when an endpoint or its health changes.
#[derive(Debug, Default)]
pub(super) struct HostSet {
    /// All of them.
    pub(super) hosts: Vec<Rc<Host>>,
    priorities: Vec<PriorityHosts>,
    load: PriorityLoad,
}

/// The endpoints of which this holds.
fn those(hosts: &[Rc<Host>], hold: impl Fn(&Host) -> bool) -> Vec<Rc<Host>> {
    hosts.iter().filter(|h| hold(h)).cloned().collect()
}

/// What is weighed of these endpoints.
fn level(all: &[Rc<Host>], usable: &[Rc<Host>], degraded: &[Rc<Host>], cluster: &Cluster) -> Level {
    let counts = |h: &&Rc<Host>| !cluster.lb_common.ignore_unchecked || h.standing() != Standing::Unknown;
    Level { total: all.iter().filter(counts).count(), healthy: usable.len(), degraded: degraded.len() }
}

impl HostSet {
    /// Arranges endpoints. `factor` is the overprovisioning factor in percent, 0 for the default.
    pub(super) fn arrange(
        placed: &[Placed],
        cluster: &Cluster,
        factor: u32,
        rng: &mut fastrand::Rng,
    ) -> Self {
        let hosts: Vec<Rc<Host>> = placed.iter().flat_map(|(_, _, h)| h.iter().cloned()).collect();
        let count = placed.iter().map(|(p, _, _)| p + 1).max().unwrap_or(0);
        let hashes = matches!(cluster.lb, LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. });
        let by_locality = cluster.lb_common.locality_weighted;
        let mut priorities = Vec::new();
        let mut levels = Vec::new();
        for priority in 0..count {
            let of: Vec<_> = placed.iter().filter(|(p, _, _)| *p == priority).collect();
            let all: Vec<Rc<Host>> = of.iter().flat_map(|(_, _, h)| h.iter().cloned()).collect();
            let (usable, degraded) = (those(&all, Host::is_healthy), those(&all, Host::is_degraded));
            levels.push(level(&all, &usable, &degraded, cluster));
            let (weights, localities): (Vec<u64>, Vec<Group>) = if by_locality && !hashes {
                localities(&of, cluster, rng).into_iter().unzip()
            } else {
                Default::default()
            };
            priorities.push(PriorityHosts {
                // not even a panic sends requests to those that are about to go
                all: group(those(&all, |h| !h.is_draining()), cluster, rng),
                usable: if by_locality && hashes {
                    hashed(&of, cluster)
                } else {
                    group(usable, cluster, rng)
                },
                degraded: group(degraded, cluster, rng),
                total: weights.iter().sum(),
                localities,
                weights,
            });
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a percentage from 0 to 100"
        )]
        let panic_below = cluster.lb_common.panic_threshold.clamp(0.0, 100.0) as u32;
        let load = locality::priority_load(&levels, panic_below, Some(factor).filter(|f| *f > 0));
        Self { hosts, priorities, load }
    }

    /// An endpoint for a request.
    pub(super) fn pick(&self, hash: Option<u64>, rng: &mut fastrand::Rng) -> Option<&Rc<Host>> {
        let group = self.group(rng)?;
        let picked = group.balancer.pick(&group.hosts, hash, rng)?;
        group.hosts.get(picked).map(|candidate| &candidate.0)
    }

    /// An endpoint that is none of these, by chance; `None` when there is no other.
    pub(super) fn other_than(&self, avoid: &[Rc<Host>], rng: &mut fastrand::Rng) -> Option<&Rc<Host>> {
        let group = self.group(rng)?;
        let is_other = |c: &&Candidate| !avoid.iter().any(|h| h.address == c.0.address);
        let others = group.hosts.iter().filter(is_other);
        let count = others.clone().count();
        let at = if count == 0 { return None } else { rng.usize(..count) };
        others.map(|c| &c.0).nth(at)
    }

    fn group(&self, rng: &mut fastrand::Rng) -> Option<&Group> {
        let (index, degraded) = match self.load.percent.as_slice() {
            [100] => (0, false),
            _ => self.load.choose(rng.u32(..100))?,
        };
        let priority = self.priorities.get(index)?;
        if self.load.panic.get(index).copied().unwrap_or(false) {
            return Some(&priority.all);
        }
        if degraded {
            return Some(&priority.degraded);
        }
        if priority.total > 0 {
            let at = locality::weighted_index(&priority.weights, rng.u64(..priority.total))?;
            return priority.localities.get(at);
        }
        Some(&priority.usable)
    }
}

fn localities(of: &[&Placed], cluster: &Cluster, rng: &mut fastrand::Rng) -> Vec<(u64, Group)> {
    of.iter()
        .map(|(_, weight, hosts)| {
            let usable = those(hosts, Host::is_healthy);
            let level = level(hosts, &usable, &[], cluster);
            (locality::locality_weight(weight.unwrap_or(0), level), group(usable, cluster, rng))
        })
        .filter(|(weight, _)| *weight > 0)
        .collect()
}

/// The healthy endpoints of all localities in one table, so that a key always belongs to the same one; each locality
/// has as much of the table as it weighs.
fn hashed(of: &[&Placed], cluster: &Cluster) -> Group {
    let (mut hosts, mut shares) = (Vec::new(), Vec::new());
    for (_, weight, all) in of {
        if let Some(weight) = weight.filter(|w| *w > 0) {
            let usable = those(all, Host::is_healthy);
            shares.push((weight, usable.iter().map(|h| h.load.weight.get()).collect()));
            hosts.extend(usable);
        }
    }
    let weights = locality::shared_weights(&shares);
    let balancer = Balancer::hashing(policy_of(&cluster.lb), &keys(&hosts, cluster), &weights);
    Group { hosts: hosts.into_iter().map(Candidate).collect(), balancer }
}

/// What a table knows endpoints by.
fn keys(hosts: &[Rc<Host>], cluster: &Cluster) -> Vec<String> {
    let by_name = cluster.lb_common.hash_hostname;
    let key = |h: &Rc<Host>| {
        if by_name && !h.endpoint.hostname.is_empty() {
            h.endpoint.hostname.to_string()
        } else {
            h.text.to_string()
        }
    };
    hosts.iter().map(key).collect()
}

fn group(hosts: Vec<Rc<Host>>, cluster: &Cluster, rng: &mut fastrand::Rng) -> Group {
    let policy = policy_of(&cluster.lb);
    let keys = match policy {
        Policy::RingHash { .. } | Policy::Maglev { .. } => keys(&hosts, cluster),
        Policy::RoundRobin | Policy::Random | Policy::LeastRequest { .. } => Vec::new(),
    };
    let hosts: Vec<Candidate> = hosts.into_iter().map(Candidate).collect();
    let balancer = Balancer::new(policy, &hosts, &keys, rng.usize(..1 << 16));
    Group { hosts, balancer }
}

fn policy_of(lb: &LbPolicy) -> Policy {
    let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    match lb {
        LbPolicy::RoundRobin { .. } | LbPolicy::ClusterProvided => Policy::RoundRobin,
        LbPolicy::LeastRequest { choices, .. } => Policy::LeastRequest { choices: *choices },
        LbPolicy::Random => Policy::Random,
        LbPolicy::RingHash { min_size, max_size } => {
            Policy::RingHash { min_size: size(*min_size), max_size: size(*max_size) }
        }
        LbPolicy::Maglev { table_size } => Policy::Maglev { table_size: size(*table_size) },
    }
}

/// How new endpoints start, if the policy says so.
pub(super) fn slow_start(lb: &LbPolicy) -> Option<&SlowStart> {
    match lb {
        LbPolicy::RoundRobin { slow_start } | LbPolicy::LeastRequest { slow_start, .. } => {
            slow_start.as_ref()
        }
        LbPolicy::Random
        | LbPolicy::RingHash { .. }
        | LbPolicy::Maglev { .. }
        | LbPolicy::ClusterProvided => None,
    }
}

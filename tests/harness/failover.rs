//! Leaders that are taken away, again and again, under writes, reads and the streams of proxies: how long until
//! another one accepts a write, and what was lost.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;
use tokio::time::Instant;

use crate::admin::Door;
use crate::cluster::Cluster;
use crate::load::percentile;
use crate::netns::{Lan, Machine};
use crate::proxies::{Fleet, Proxies, Seen};
use crate::registers::{Rate, Registers, Verdict, area};
use crate::{PATIENCE, eventually};

/// Members.
const MEMBERS: usize = 3;
/// How long a leader stays stopped or cut off.
const AWAY: Duration = Duration::from_secs(4);
/// A write that is not accepted in this time is sent again.
const AGAIN: Duration = Duration::from_secs(3);

/// What is done to a leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9`, and started again when another leads.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Freeze,
    /// It and the other members do not reach each other; proxies and operators reach all. Needs machines.
    CutOff,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill -9",
            Self::Freeze => "SIGSTOP",
            Self::CutOff => "partition",
        })
    }
}

/// A trial: what goes on, and what goes wrong.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Proxies.
    pub proxies: usize,
    /// Writers and readers.
    pub rate: Rate,
    /// In order, each done to whoever leads then.
    pub faults: Vec<Fault>,
    /// From one fault to the next.
    pub every: Duration,
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// Each fault, and how long it took until another leader had accepted a write.
    pub failovers: Vec<(Fault, Duration)>,
    /// Of the clients.
    pub verdict: Verdict,
    /// Of the proxies.
    pub seen: Seen,
}

impl Report {
    /// How long the failovers after a fault took.
    #[must_use]
    pub fn after(&self, fault: Fault) -> Vec<Duration> {
        self.failovers.iter().filter(|(which, _)| *which == fault).map(|(_, took)| *took).collect()
    }

    /// Everything that must hold and does not.
    #[must_use]
    pub fn broken(&self, within: Duration) -> Vec<String> {
        let took: Vec<Duration> = self.failovers.iter().map(|(_, took)| *took).collect();
        let slow = percentile(&took, 0.99);
        let mut broken = Vec::new();
        if slow > within {
            broken.push(format!("a leader accepted writes within {slow:.2?} (p99), wanted: {within:?}"));
        }
        broken.extend(self.verdict.not_linearizable.iter().map(|why| format!("not linearizable: {why}")));
        for (what, list) in [
            ("acknowledged writes were lost", &self.verdict.lost),
            ("answers cannot be explained", &self.verdict.strange),
            ("streams of members to which nothing was done were cut", &self.seen.cut),
            ("responses were older than what the proxy had", &self.seen.backward),
        ] {
            if let Some(first) = list.first() {
                broken.push(format!("{} {what}, the first: {first}", list.len()));
            }
        }
        broken
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fault in [Fault::Kill, Fault::Freeze, Fault::CutOff] {
            let took = self.after(fault);
            if !took.is_empty() {
                let [p50, p99, most] = [0.5, 0.99, 1.0].map(|share| percentile(&took, share));
                let count = took.len();
                writeln!(
                    f,
                    "{fault}: {count} failovers; a new leader accepted a write after p50 {p50:.2?}, p99 {p99:.2?}, max {most:.2?}"
                )?;
            }
        }
        let Verdict { acknowledged, unknown, reads, lost, not_linearizable, took, .. } = &self.verdict;
        let order = if not_linearizable.is_none() { "linearizable" } else { "NOT linearizable" };
        writeln!(
            f,
            "{acknowledged} writes acknowledged in {took:.0?}, {unknown} without an answer, {} lost; {reads} reads, {order}",
            lost.len()
        )?;
        let Seen { responses, lost, moved, cut, backward, .. } = &self.seen;
        write!(
            f,
            "proxies: {responses} responses, {} of them older than what was there; {lost} streams lost with killed members, \
             {moved} moved by a hint, {} cut on survivors",
            backward.len(),
            cut.len()
        )
    }
}

/// Runs a trial with members on loopback addresses, or on machines of their own if `lan` has them.
///
/// # Errors
///
/// When something does not come about at all; what does not hold is in the [`Report`].
pub async fn run(folder: &Path, lan: Option<&Lan>, plan: &Plan) -> anyhow::Result<Report> {
    let (clients, cluster) = match lan {
        None => (None, Cluster::start(folder, MEMBERS).await?),
        Some(lan) => {
            let members = lan.machines.get(1..=MEMBERS).context("too few machines")?;
            (Some(lan.machine(0)?.clone()), Cluster::start_on(folder, members).await?)
        }
    };
    let fleet = fleet(&cluster, clients, plan.rate.areas)?;
    let proxies = Proxies::start(fleet, plan.proxies).await?;
    let registers = Registers::start(cluster.doors()?, plan.rate).await?;
    let mut trial = Trial { cluster, proxies, failovers: Vec::new() };
    let mut next = Instant::now();
    for fault in &plan.faults {
        tokio::time::sleep_until(next).await;
        next = Instant::now() + plan.every;
        let before = registers.acknowledged();
        trial.strike(*fault).await.with_context(|| format!("after {:?}", trial.failovers))?;
        eventually(PATIENCE, "somebody writes", || async {
            ensure!(registers.acknowledged() > before, "nobody, after {:?}", trial.failovers);
            Ok(())
        })
        .await?;
    }
    trial.proxies.all_open().await?;
    let verdict = registers.finish().await?;
    Ok(Report { failovers: trial.failovers, verdict, seen: trial.proxies.finish().await })
}

fn fleet(cluster: &Cluster, machine: Option<Machine>, areas: usize) -> anyhow::Result<Fleet> {
    let token = |number| {
        let token = cluster.member(0)?.istioctl(&["token", "create", "--namespace", &area(number)])?;
        Ok(token.trim().to_owned())
    };
    let tokens: anyhow::Result<Vec<String>> = (0..areas).map(token).collect();
    Ok(Fleet { members: cluster.members.iter().map(|m| m.xds()).collect(), machine, tokens: tokens? })
}

/// A trial under way.
struct Trial {
    cluster: Cluster,
    proxies: Proxies,
    failovers: Vec<(Fault, Duration)>,
}

impl Trial {
    /// Takes the leader away, measures, and brings it back.
    async fn strike(&mut self, fault: Fault) -> anyhow::Result<()> {
        let leader = eventually(PATIENCE, "somebody leads", || self.cluster.leader(0)).await?;
        let survivor = (leader + 1) % MEMBERS;
        let door = self.cluster.member(survivor)?.door()?;
        let struck = self.cluster.member(leader)?.xds();
        let began = Instant::now();
        self.apply(fault, leader, struck)?;
        let number = self.failovers.len();
        accepted(&door, number).await.with_context(|| format!("{fault} of member {leader}"))?;
        self.failovers.push((fault, began.elapsed()));
        let now = self.cluster.leader(survivor).await?;
        ensure!(now != leader, "{fault}: member {leader} is said to lead still");
        if fault != Fault::Kill {
            tokio::time::sleep_until(began + AWAY).await;
        }
        self.undo(fault, leader, struck).await?;
        self.proxies.all_open().await
    }

    fn apply(&mut self, fault: Fault, leader: usize, struck: SocketAddr) -> anyhow::Result<()> {
        match fault {
            Fault::Kill => {
                self.proxies.dying(struck, true);
                self.cluster.member_mut(leader)?.kill()
            }
            Fault::Freeze => self.cluster.member(leader)?.freeze(true),
            Fault::CutOff => self.cut_off(leader, true),
        }
    }

    async fn undo(&mut self, fault: Fault, leader: usize, struck: SocketAddr) -> anyhow::Result<()> {
        match fault {
            Fault::Kill => {
                self.cluster.member_mut(leader)?.restart().await?;
                self.proxies.dying(struck, false);
            }
            Fault::Freeze => self.cluster.member(leader)?.freeze(false)?,
            Fault::CutOff => self.cut_off(leader, false)?,
        }
        self.cluster.voting(MEMBERS).await
    }

    fn cut_off(&self, leader: usize, cut: bool) -> anyhow::Result<()> {
        let alone = self.cluster.member(leader)?.machine()?;
        for other in (0..MEMBERS).filter(|place| *place != leader) {
            let other = self.cluster.member(other)?.machine()?;
            alone.cut_off(other, cut)?;
            other.cut_off(alone, cut)?;
        }
        Ok(())
    }
}

/// Waits until a member has accepted a write.
async fn accepted(door: &Door, number: usize) -> anyhow::Result<()> {
    let probe = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": "probe", "namespace": "default"},
        "spec": {"hosts": ["probe.example"], "resolution": "DNS",
            "ports": [{"number": 80 + number, "name": "http", "protocol": "HTTP"}]},
    });
    eventually(PATIENCE, "another leader accepts a write", || async {
        let write = door.call("PUT", "/api/v1/config/ServiceEntry/default/probe", Some(&probe));
        let answer = tokio::time::timeout(AGAIN, write).await??;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
        Ok(())
    })
    .await
}

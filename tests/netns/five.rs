//! Five machines that serve each other, and one of them without the control plane for a while.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use tests::echo::{Echo, Seen};
use tests::mesh::strict;
use tests::netns::{Lan, Machine, is_root};
use tests::{PATIENCE, eventually};

use crate::captured::{service, vip};
use crate::dns::{self, A, AAAA, Answer, Elsewhere, MX};
use crate::machines::{Captured, ControlPlane, folder, get};

/// A silent agent's workload is sent no traffic after two seconds.
const LEASE: &str = "workloads: {lease: 2s, removeAfter: 10m}\n";
/// Requests that a machine without the control plane sends once nobody knows of it any more.
const ALONE: usize = 100;

/// A machine and the application on it, which is called as the machine is.
pub(crate) struct Vm {
    number: u8,
    pub(crate) name: String,
    pub(crate) captured: Captured,
    _application: Echo,
}

impl Vm {
    /// Numbers above 3 have their application, and their address for others, in IPv6.
    fn start(control_plane: &ControlPlane, lan: &Lan, number: u8) -> anyhow::Result<Self> {
        let (machine, name, v6) = (lan.machine(number.into())?, format!("vm{number}"), number > 3);
        let application = Echo::on(&name, machine.listen(v6, 8080)?)?;
        let addresses = [machine.address_of(v6), machine.address_of(!v6)];
        let labels = format!("app={name}");
        let captured = Captured::start(control_plane, machine, &name, &addresses, &["--labels", &labels])?;
        Ok(Self { number, name, captured, _application: application })
    }

    /// What this machine's application gets of another's, by its name and in one family.
    pub(crate) async fn asks(&self, other: &Self, v6: bool) -> anyhow::Result<Seen> {
        let name = format!("{}.default.svc.cluster.local", other.name);
        let found = dns::ask(&self.captured.machine, &name, if v6 { AAAA } else { A }, v6).await?;
        ensure!(found == Answer::Addresses(vec![vip(v6, other.number)]), "{name}: {found:?}");
        let to = SocketAddr::new(vip(v6, other.number), 80);
        let answer = self.captured.get(to, &other.name, "/").await?;
        ensure!(answer.status == 200, "{} asked {} at {to}: {answer:?}", self.name, other.name);
        let seen: Seen = answer.json()?;
        let caller = format!("spiffe://cluster.local/ns/default/sa/{}", self.name);
        ensure!(seen.name == other.name, "{seen:?}");
        ensure!(seen.header("x-forwarded-client-cert").contains(&caller), "{seen:?}");
        Ok(seen)
    }
}

/// Five machines, each with a service of its own, which take mutual TLS alone.
pub(crate) fn start(control_plane: &ControlPlane, lan: &Lan) -> anyhow::Result<Vec<Vm>> {
    let services: String = (1..=5).map(|number| service(&format!("vm{number}"), number)).collect();
    control_plane.apply(&(strict().to_owned() + &services))?;
    (1..=5).map(|number| Vm::start(control_plane, lan, number)).collect()
}

/// Drops everything between a machine and the control plane, as a network that is torn does: without a word.
pub(crate) struct Partition<'a>(&'a Machine);

impl<'a> Partition<'a> {
    pub(crate) fn between(machine: &'a Machine, control_plane: &Machine) -> anyhow::Result<Self> {
        let (v4, v6) = (control_plane.v4, control_plane.v6);
        let table = format!(
            "table inet torn {{\n\
             chain out {{\ntype filter hook output priority -300;\nip daddr {v4} drop\nip6 daddr {v6} drop\n}}\n\
             chain in {{\ntype filter hook input priority -300;\nip saddr {v4} drop\nip6 saddr {v6} drop\n}}\n}}\n"
        );
        machine.run("nft", &[&table])?;
        Ok(Self(machine))
    }

    pub(crate) fn heal(self) -> anyhow::Result<()> {
        self.0.run("nft", &["delete table inet torn"]).map(drop)
    }
}

/// Whether the control plane has others send traffic to a machine's service.
fn healthy(control_plane: &ControlPlane, vm: &Vm) -> anyhow::Result<bool> {
    let rows: serde_json::Value =
        serde_json::from_str(&control_plane.istioctl(&["services", "--output", "json"])?)?;
    let of_vm =
        |row: &&serde_json::Value| tests::text(row, "/hostname").starts_with(&format!("{}.", vm.name));
    let row = rows.as_array().and_then(|rows| rows.iter().find(of_vm)).with_context(|| rows.to_string())?;
    Ok(row.get("healthy").and_then(serde_json::Value::as_u64) == Some(1))
}

/// What is answered besides names with addresses.
async fn names(machine: &Machine) -> anyhow::Result<()> {
    let elsewhere = Answer::Addresses(vec![dns::ELSEWHERE.into()]);
    for (name, kind, expected) in [
        ("vm1", A, Answer::Addresses(vec![vip(false, 1)])),
        ("VM1.Default", AAAA, Answer::Addresses(vec![vip(true, 1)])),
        ("vm1.default.svc.cluster.local", MX, Answer::Addresses(Vec::new())),
        ("vm9.default.svc.cluster.local", A, Answer::NoSuchName),
        ("example.com", A, elsewhere),
    ] {
        for v6 in [false, true] {
            let found = dns::ask(machine, name, kind, v6).await?;
            ensure!(found == expected, "{name} {kind}: {found:?} is not {expected:?}");
        }
        let found = dns::ask_tcp(machine, name, kind).await?;
        ensure!(found == expected, "{name} {kind} over TCP: {found:?} is not {expected:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_machines_serve_each_other_and_one_goes_on_without_the_control_plane() -> anyhow::Result<()> {
    if !is_root() {
        println!("not run: network namespaces need root");
        return Ok(());
    }
    let (lan, folder) = (Lan::new(6)?, folder()?);
    let control_plane = ControlPlane::start(&lan, folder.path(), LEASE).await?;
    let vms = start(&control_plane, &lan)?;

    // Everybody calls everybody, in both families, and nobody is served without a proxy.
    for (one, other) in vms.iter().flat_map(|one| vms.iter().map(move |other| (one, other))) {
        if one.number != other.number {
            for v6 in [false, true] {
                eventually(PATIENCE, "they are served", || one.asks(other, v6)).await?;
            }
        }
    }
    let _elsewhere = Elsewhere::start(lan.machine(0)?)?;
    for vm in &vms {
        names(&vm.captured.machine).await.with_context(|| vm.name.clone())?;
        let to = SocketAddr::new(vm.captured.machine.address_of(vm.number > 3), 8080);
        let plain = get(lan.machine(0)?, to, &vm.name, "/").await;
        ensure!(plain.is_err(), "plain text to {} was answered: {plain:?}", vm.name);
    }

    // Cut off from the control plane, a machine goes on: what it knows does not end with its lease.
    let (torn, others) = vms.split_first().context("no machine")?;
    let partition = Partition::between(&torn.captured.machine, lan.machine(0)?)?;
    let alone = async {
        let (mut requests, mut unknown) = (0, 0);
        while unknown < ALONE {
            for other in others {
                torn.asks(other, requests % 2 == 0)
                    .await
                    .with_context(|| format!("after {requests} requests"))?;
                requests += 1;
                unknown += usize::from(unknown > 0);
            }
            if unknown == 0 && !healthy(&control_plane, torn)? {
                unknown = 1;
            }
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, alone).await.context("the lease does not end")??;
    for (one, other) in others.iter().zip(others.iter().skip(1)) {
        one.asks(other, false).await?;
    }

    // Once it is back, the others find it again by themselves.
    partition.heal()?;
    for other in others {
        eventually(PATIENCE, "the machine is back", || other.asks(torn, true)).await?;
    }
    for vm in vms {
        let mut agent = vm.captured.agent;
        ensure!(agent.stop().await?.success(), "{}", agent.output());
    }
    Ok(())
}

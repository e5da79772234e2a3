//! The packages on a Debian machine with systemd: installed, joined, upgraded under load, rebooted, purged.
//!
//! Needs root, and what `tests/run` brings for it: `debian-root`, `packages` and `debian` in its folder.
#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a step that cannot be taken has failed; what was measured, by the real clock, is told"
)]

mod machine;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use machine::Machine;
use tests::echo::{Echo, Seen};
use tests::load::Load;
use tests::{http, mesh};

/// The caller's loopback block.
const CALLER: Ipv4Addr = Ipv4Addr::new(127, 192, 16, 0);

/// Where the application of the machine listens, before and after it boots again.
const APPLICATION: u16 = 8080;

/// Where an administrator puts what the service manager hands over.
const CREDENTIALS: &str = "/etc/credstore.encrypted";

/// `istioctl` with what a member's folder says.
const ISTIOCTL: &str = "ISTIOCTL_SERVER=https://127.0.0.1:15080 ISTIOCTL_CA=/var/lib/istiod/root-cert.pem \
    ISTIOCTL_TOKEN_FILE=/var/lib/istiod/operator/admin-token istioctl";

/// The agent's process.
const PID: &str = "systemctl show --property=MainPID --value istio-agent";

fn packages() -> PathBuf {
    tests::peers::find("packages").expect("the packages")
}

/// A machine with a control plane from its package, and a caller with a proxy of its own.
struct Mesh {
    machine: Machine,
}

impl Mesh {
    fn start() -> anyhow::Result<Self> {
        let mut machine = Machine::boot(&packages())?;
        machine.run("dpkg --install /packages/old/istiod_*.deb /packages/old/istioctl_*.deb")?;
        machine.run("istiod init --name here --peer 127.0.0.1:15019 --xds 127.0.0.1:15012")?;
        machine.run("systemctl enable --now istiod")?;
        let rooted = machine.wait("istiod has its root", |m| m.run("test -s /var/lib/istiod/root-cert.pem"));
        rooted.with_context(|| machine.journal("istiod").unwrap_or_default())?;
        machine.write("/tmp/mesh.yaml", &format!("{}{}", mesh::service("billing"), mesh::strict()))?;
        machine.run(&format!("{ISTIOCTL} apply --filename /tmp/mesh.yaml"))?;
        let mesh = Self { machine };
        mesh.start_caller()?;
        Ok(mesh)
    }

    fn token(&self, account: &str) -> anyhow::Result<String> {
        let said = self
            .machine
            .run(&format!("{ISTIOCTL} token create --service-account {account} --output json"))?;
        let made: serde_json::Value = serde_json::from_str(&said)?;
        made.get("token").and_then(|token| token.as_str()).map(str::to_owned).with_context(|| said.clone())
    }

    /// Another agent, which stands for another machine.
    fn start_caller(&self) -> anyhow::Result<()> {
        let own = machine::own_address(CALLER);
        let token = self.token("caller")?;
        self.machine.run("dpkg --extract /packages/old/istio-agent_*.deb /opt/caller")?;
        self.machine.run(&format!(
            "cat > /etc/systemd/system/caller.service <<END\n[Service]\nType=notify\n\
             ExecStart=/opt/caller/usr/bin/istio-agent run --name caller --no-register --data-dir /var/lib/caller \
             --token {token} --address {own} --loopback-block {CALLER}/20 --admin {own}:15000 --stats {own}:15190 \
             --readiness {own}:15121 --workers 1\nEnvironment=ISTIO_LOG_LEVEL=info,proxy::upstream=debug\nRestart=always\n[Install]\nWantedBy=multi-user.target\nEND\n\
             systemctl enable --now caller"
        ))?;
        Ok(())
    }

    /// Where the caller's application reaches the service.
    fn service(&self) -> anyhow::Result<SocketAddr> {
        let said = self.machine.run(&format!("{ISTIOCTL} services --output json"))?;
        let rows: serde_json::Value = serde_json::from_str(&said)?;
        let rows = rows.as_array().with_context(|| said.clone())?;
        let row = rows
            .iter()
            .find(|row| tests::text(row, "/hostname").starts_with("billing."))
            .with_context(|| said.clone())?;
        let index = row.get("vipIndex").and_then(serde_json::Value::as_u64).context("no index")?;
        let address = xds::translate::names::block_address(CALLER, 20, u32::try_from(index)?);
        Ok(SocketAddr::from((address.context("the block is too small")?, 80)))
    }

    fn service_file(&self, behind: SocketAddr) -> anyhow::Result<()> {
        let text = format!("name: billing\nlabels: {{app: billing}}\nforward: {{80: \"{behind}\"}}");
        self.machine.write("/etc/istio/services.d/billing.yaml", &text)
    }

    /// Three commands: package, service, join. The time from the last to the first answer over mutual TLS.
    async fn install_and_join(&self, behind: SocketAddr) -> anyhow::Result<Duration> {
        let token = self.token("billing")?;
        self.machine.run("dpkg --install /packages/old/istio-agent_*.deb")?;
        self.service_file(behind)?;
        let joined = Instant::now();
        self.machine.run(&format!("istio-agent join {token}"))?;
        let caller = self.answered(self.service()?).await?;
        ensure!(caller.ends_with("/sa/caller"), "the application is told who calls: {caller:?}");
        Ok(joined.elapsed())
    }

    /// Waits for an answer; the identity of the caller that the application was told.
    async fn answered(&self, service: SocketAddr) -> anyhow::Result<String> {
        tests::eventually(machine::PATIENCE, "a request is answered", || async {
            let answer = http::get(service, "billing.default.svc.cluster.local", "/", &[]).await?;
            ensure!(answer.status == 200, "{} {}", answer.status, answer.text());
            let seen: Seen = answer.json()?;
            let told = seen.header("x-forwarded-client-cert").to_owned();
            let uri = told.split(';').find_map(|field| field.strip_prefix("URI="));
            Ok(uri.unwrap_or_default().to_owned())
        })
        .await
    }
}

#[test]
fn a_machine_joins_with_three_commands_is_upgraded_under_load_rebooted_and_purged() {
    let begun = Instant::now();
    let mut mesh = Mesh::start().unwrap();
    let told = |step: &str| tell(begun, step);
    told("control plane and caller run");

    // Join, and upgrade under load.
    mesh.machine
        .inside(async || {
            let echo = application()?;
            let took = mesh.install_and_join(echo.address).await?;
            told(&format!("first answer over mutual TLS {took:.2?} after the join"));
            ensure!(took < Duration::from_secs(3), "the join took {took:?}");
            upgraded_under_load(&mesh).await
        })
        .unwrap();
    told("upgraded");
    hardened(&mesh).unwrap();
    asked_by_systemd_resolved(&mut mesh).unwrap();
    told("systemd-resolved asks the agent");

    rebooted_without_a_control_plane(&mut mesh).unwrap();
    told("serves again after a reboot without the control plane, and with it");
    sealed_under_the_managers_key(&mesh).unwrap();
    told("serves with a key of the service manager");
    purged(&mut mesh).unwrap();
    told("purged");
}

fn application() -> anyhow::Result<Echo> {
    Echo::on("billing", std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, APPLICATION))?)
}

/// The machine boots while there is no control plane, and serves as before; once there is one, nobody has to do anything.
fn rebooted_without_a_control_plane(mesh: &mut Mesh) -> anyhow::Result<()> {
    let service = mesh.service()?;
    mesh.machine.run("systemctl disable --now istiod")?;
    mesh.machine.reboot()?;
    let booted = Instant::now();
    mesh.machine.inside(async || {
        let _application = application()?;
        let caller = mesh.answered(service).await?;
        ensure!(caller.ends_with("/sa/caller"), "the application is told who calls: {caller:?}");
        println!("         first answer {:.2?} after the boot", booted.elapsed());
        let state = mesh.machine.run("systemctl show --property=ActiveState --value istiod")?;
        ensure!(state == "inactive", "there is a control plane: {state}");
        mesh.machine.run("systemctl start istiod")?;
        tests::eventually(machine::PATIENCE, "the control plane knows the machine again", || async {
            let status = mesh.machine.run(&format!("{ISTIOCTL} proxy-status"))?;
            ensure!(status.contains("billing.default") && status.contains("caller.default"), "{status}");
            Ok(())
        })
        .await?;
        mesh.answered(service).await
    })?;
    Ok(())
}

fn tell(begun: Instant, step: &str) {
    println!("{:>8.2?} {step}", begun.elapsed());
}

/// 200 requests a second, the package of the next version, and no request that fails.
async fn upgraded_under_load(mesh: &Mesh) -> anyhow::Result<()> {
    let (service, old) = (mesh.service()?, mesh.machine.run(PID)?);
    let load = Load::start(service, "billing.default.svc.cluster.local", 200);
    load.more(200).await?;
    let shell = mesh.machine.shell();
    shell.beside("dpkg --install /packages/new/istio-agent_*.deb").await?;
    tests::eventually(machine::PATIENCE, "another process serves", || async {
        let new = shell.beside(PID).await?;
        ensure!(new != old && new != "0", "still {new}");
        let state = shell.beside("systemctl show --property=SubState --value istio-agent").await?;
        ensure!(state == "running", "{state}");
        Ok(())
    })
    .await?;
    load.more(600).await?;
    let tally = load.stop().await;
    let journal = mesh.machine.journal("istio-agent")?;
    let callers = mesh.machine.journal("caller")?;
    println!(
        "         {} requests, {} failed, slowest {:?}, p99 {:?}",
        tally.total(),
        tally.failures.len(),
        tally.percentile(1.0),
        tally.percentile(0.99)
    );
    tally.no_failures().with_context(|| format!("{journal}\n{callers}"))?;
    ensure!(journal.contains("took over listening sockets"), "{journal}");
    Ok(())
}

/// What systemd thinks of the agent's unit.
fn hardened(mesh: &Mesh) -> anyhow::Result<()> {
    for (unit, most) in [("istio-agent", 1.5), ("istiod", 1.5)] {
        let report =
            mesh.machine.run(&format!("systemd-analyze security --no-pager {unit}.service | tail -n 1"))?;
        let exposure = report.split(".service: ").nth(1).and_then(|rest| rest.split_whitespace().next());
        let exposure: f64 = exposure.and_then(|text| text.parse().ok()).with_context(|| report.clone())?;
        println!("         exposure of {unit}: {exposure}");
        ensure!(exposure <= most, "{report}");
    }
    Ok(())
}

/// systemd-resolved comes to the machine: from then on it asks the agent for names of the mesh, and for no other, for as
/// long as the agent serves.
fn asked_by_systemd_resolved(mesh: &mut Mesh) -> anyhow::Result<()> {
    let machine = &mut mesh.machine;
    machine.run("test ! -e /sys/class/net/istio-dns")?;
    machine.run("dpkg --install /packages/resolved/*.deb")?;
    // It started before the bus knew its user.
    machine.run("systemctl reload dbus; systemctl restart systemd-resolved")?;
    for step in ["start istio-resolved", "restart istio-agent", "restart systemd-resolved"] {
        machine.run(&format!("systemctl {step}"))?;
        let answered = machine.wait("names of the mesh are answered", |machine| {
            let own = machine.run("resolvectl query billing.default.svc.cluster.local")?;
            ensure!(own.contains(": 127.240."), "the machine's own address for it: {own}");
            Ok(())
        });
        answered.with_context(|| step)?;
    }
    let nothing = machine.run("resolvectl query nothing.default.svc.cluster.local 2>&1 || true")?;
    ensure!(nothing.contains("not found"), "{nothing}");
    let status = machine.run("resolvectl status istio-dns")?;
    for part in ["-DefaultRoute", "127.0.0.1:15053", "~svc.cluster.local ~service.consul"] {
        ensure!(status.contains(part), "{part} is not in {status}");
    }
    machine.run("systemctl stop istio-agent")?;
    machine.run("test ! -e /sys/class/net/istio-dns && test ! -e /sys/class/net/istio-dns-peer")?;
    machine.run("systemctl start istio-agent")?;
    machine.wait("the link is back", |machine| machine.run("test -e /sys/class/net/istio-dns")).map(drop)
}

/// The same from the beginning, with the agent's folder sealed under a key that the service manager hands over.
fn sealed_under_the_managers_key(mesh: &Mesh) -> anyhow::Result<()> {
    let machine = &mesh.machine;
    machine.run("dpkg --purge istio-agent")?;
    machine.run(&format!(
        "mkdir --parents {CREDENTIALS}; head --bytes=32 /dev/urandom \
         | systemd-creds encrypt --with-key=host --name=istio-agent.key - {CREDENTIALS}/istio-agent.key"
    ))?;
    machine.inside(async || {
        let application = application()?;
        mesh.install_and_join(application.address).await?;
        machine.run("test -s /var/lib/istio-agent/identity && test ! -e /var/lib/istio-agent/sealing-key")?;
        machine.run("systemctl restart istio-agent")?;
        mesh.answered(mesh.service()?).await
    })?;
    machine.run(&format!("rm {CREDENTIALS}/istio-agent.key")).map(drop)
}

/// Nothing of the packages is left: no file, no user, no rule, no process.
fn purged(mesh: &mut Mesh) -> anyhow::Result<()> {
    let machine = &mut mesh.machine;
    machine.run("systemctl disable --now caller; rm -rf /etc/systemd/system/caller.service /opt/caller /var/lib/caller")?;
    machine.run("dpkg --purge istio-agent istiod istioctl")?;
    let files = machine.run(
        "find / -xdev \\( -path /proc -o -path /packages -o -path /tmp \\) -prune -o -iname '*istio*' -print",
    )?;
    ensure!(files.is_empty(), "left: {files}");
    let users = machine.run("getent passwd istio-agent istiod || true")?;
    ensure!(users.is_empty(), "left: {users}");
    let links = machine.run("ip -brief link | grep istio || true")?;
    ensure!(links.is_empty(), "left: {links}");
    let tables = machine.run("nft list tables")?;
    ensure!(tables.is_empty(), "left: {tables}");
    let processes = machine.run("pgrep --list-full istio || true")?;
    ensure!(processes.is_empty(), "left: {processes}");
    // A unit that is gone is forgotten a moment later.
    machine.wait("systemd knows no unit of them", |machine| {
        let listed = machine.run("systemctl list-units --all --no-legend '*istio*'")?;
        ensure!(listed.is_empty(), "left: {listed}");
        Ok(())
    })
}

/// Runs a linter over all packages of a kind, in the root that has it.
fn lint(command: &str) -> String {
    let root = tests::peers::find("debian-lint").expect("the root with the linters");
    let script = r#"set -e; mount --bind "$2" "$1/mnt"; mount -t proc proc "$1/proc"; exec chroot "$1" sh -c "cd /tmp && $3""#;
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"])
        .args([&root, &packages()])
        .arg(command)
        .output()
        .expect("unshare");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command}: {text}");
    text
}

#[test]
fn lintian_finds_nothing_in_the_packages() {
    let said = lint("lintian --fail-on error,warning --tag-display-limit 0 /mnt/old/*.deb");
    let found: Vec<&str> =
        said.lines().filter(|line| line.starts_with("E:") || line.starts_with("W:")).collect();
    assert!(found.is_empty(), "{said}");
}

#[test]
fn rpmlint_finds_nothing_in_the_packages() {
    let said = lint("rpmlint --config /mnt/rpmlint.toml /mnt/old/*.rpm");
    assert!(said.contains("0 errors, 0 warnings"), "{said}");
}

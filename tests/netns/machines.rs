//! A control plane and workloads, each on a machine of its own.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use tests::http::{self, Answer};
use tests::netns::{Lan, Machine};
use tests::program::{self, Program};
use tests::{PATIENCE, eventually};

/// User of the proxies; nobody else is.
pub(crate) const PROXY: u32 = 1337;

/// A control plane on the first machine.
pub(crate) struct ControlPlane {
    machine: Machine,
    folder: PathBuf,
    pub(crate) program: Program,
}

impl ControlPlane {
    /// Starts `istiod run`, with these settings besides, and waits until it answers.
    pub(crate) async fn start(lan: &Lan, folder: &Path, settings: &str) -> anyhow::Result<Self> {
        let machine = lan.machine(0)?.clone();
        let file = folder.join("istiod.yaml");
        let yaml = format!(
            "dataDir: {}\nxds: {{address: '0.0.0.0:15012', advertise: '{}:15012'}}\n\
             admin: {{address: '127.0.0.1:15080', tls: false}}\nmetrics: {{address: '127.0.0.1:15014'}}\n{settings}",
            folder.join("istiod-data").display(),
            machine.v4
        );
        std::fs::write(&file, yaml)?;
        let args = ["run".to_owned(), "--config".to_owned(), file.display().to_string()];
        let program =
            machine.inside(|| Program::start(&program::ours("istiod")?, folder, "istiod", &args))?;
        let started = Self { machine, folder: folder.to_owned(), program };
        eventually(PATIENCE, "the control plane answers", || async { started.istioctl(&["version"]) })
            .await?;
        Ok(started)
    }

    /// Runs `istioctl`, which must succeed; its standard output.
    pub(crate) fn istioctl(&self, args: &[&str]) -> anyhow::Result<String> {
        let token = self.folder.join("istiod-data/operator/admin-token").display().to_string();
        let envs = [("ISTIOCTL_SERVER", "http://127.0.0.1:15080"), ("ISTIOCTL_TOKEN_FILE", token.as_str())];
        let (code, out, err) = self.machine.inside(|| program::run("istioctl", &envs, args))?;
        ensure!(code == 0, "istioctl {args:?}: {code}: {err}{out}{}", self.program.output());
        Ok(out)
    }

    /// Commits YAML and waits until every proxy that is connected runs it.
    pub(crate) fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        let file = self.folder.join("objects.yaml");
        std::fs::write(&file, yaml)?;
        self.istioctl(&["apply", "-f", &file.display().to_string(), "--wait"]).map(drop)
    }
}

/// A machine whose traffic is captured by its proxy.
pub(crate) struct Captured {
    pub(crate) machine: Machine,
    pub(crate) agent: Program,
    program: PathBuf,
}

impl Captured {
    /// Redirects the machine's traffic and starts its agent. Of `addresses`, others reach it at the first.
    pub(crate) fn start(
        control_plane: &ControlPlane,
        machine: &Machine,
        name: &str,
        addresses: &[IpAddr],
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let folder = control_plane.folder.as_path();
        let token = control_plane.istioctl(&["token", "create", "--service-account", name])?;
        let data = folder.join(name);
        std::fs::create_dir(&data)?;
        chown(&data, Some(PROXY), Some(PROXY))?;
        // Where every user may run it.
        let program = folder.join("istio-agent");
        if !program.exists() {
            // By a process of its own: a file that this one writes is busy for as long as a program that another test
            // starts meanwhile has inherited it.
            let copied = Command::new("cp").arg(program::ours("istio-agent")?).arg(&program).status()?;
            ensure!(copied.success(), "cp: {copied}");
        }
        let user = PROXY.to_string();
        let capture = ["capture", "on", "--user", &user, "--dns", "15053"];
        machine.run(&program.display().to_string(), &capture)?;
        let mut args =
            ["run", "--name", name, "--workers", "1", "--token", token.trim()].map(str::to_owned).to_vec();
        args.extend(["--data-dir".to_owned(), data.display().to_string()]);
        for dns in ["127.0.0.1:15053", "[::1]:15053"] {
            args.extend(["--dns".to_owned(), dns.to_owned()]);
        }
        args.extend(["--dns-upstream".to_owned(), format!("{}:53", control_plane.machine.v4)]);
        for address in addresses {
            args.extend(["--address".to_owned(), address.to_string()]);
        }
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let agent = machine.inside(|| Program::start_as(PROXY, &program, folder, name, &args))?;
        Ok(Self { machine: machine.clone(), agent, program })
    }

    /// Waits until the proxy has all it needs.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        eventually(PATIENCE, "the proxy is ready", || async {
            let ready =
                self.get(SocketAddr::from(([127, 0, 0, 1], 15021)), "proxy", "/healthz/ready").await?;
            ensure!(ready.status == 200, "{ready:?}");
            Ok(())
        })
        .await
        .with_context(|| self.agent.output())
    }

    /// What an application on this machine gets for a request.
    pub(crate) async fn get(&self, to: SocketAddr, host: &str, path: &str) -> anyhow::Result<Answer> {
        get(&self.machine, to, host, path).await
    }

    /// Stops redirecting.
    pub(crate) fn release(&self) -> anyhow::Result<()> {
        self.machine.run(&self.program.display().to_string(), &["capture", "off"]).map(drop)
    }
}

/// What an application on a machine gets for a request.
pub(crate) async fn get(machine: &Machine, to: SocketAddr, host: &str, path: &str) -> anyhow::Result<Answer> {
    let exchange =
        async { http::over(machine.connect(to).await?, http::request("GET", host, path, &[])?).await };
    tokio::time::timeout(PATIENCE, exchange).await.with_context(|| format!("no answer from {to}"))?
}

/// A folder that every user may look into.
pub(crate) fn folder() -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))?;
    Ok(folder)
}

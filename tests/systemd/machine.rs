//! A Debian machine: systemd as process 1 in namespaces of its own, over a root that it cannot change.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sched::{CloneFlags, setns};

/// A boot, and whatever a step needs, takes less than this.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How often something that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Makes the root as a layer over the one that `tests/run` made, in memory, and boots it. Everything is in a mount
/// namespace of its own, so nothing is left when it ends.
const BOOT: &str = r#"
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
while :; do
    "$2"/lib*/ld-linux-*.so.* --library-path "$3" "$2/usr/bin/systemd-nspawn" --quiet --directory="$1/root" --register=no --keep-unit --private-network --capability=CAP_NET_ADMIN \
    --machine="$4" --bind-ro="$5:/packages" --boot && exit
    # It says so when the machine wants to boot again.
    [ $? = 133 ] || exit 1
done
"#;

/// A running machine; it is gone when dropped.
#[derive(Debug)]
pub(crate) struct Machine {
    nspawn: Child,
    init: u32,
    log: PathBuf,
    _folder: tempfile::TempDir,
}

impl Machine {
    /// Boots, with these packages in `/packages`.
    pub(crate) fn boot(packages: &Path) -> anyhow::Result<Self> {
        let root = tests::peers::find("debian-root")?;
        let folder = tempfile::tempdir()?;
        let (layer, log) = (folder.path().join("layer"), folder.path().join("console.log"));
        fs::create_dir(&layer)?;
        let console = File::create(&log)?;
        let name = format!("mesh-{}", std::process::id());
        // nspawn is the root's own, with the root's libraries.
        let libraries = root.join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH));
        let libraries = format!("{0}:{0}/systemd", libraries.display());
        let nspawn = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", BOOT, "sh"])
            .args([&layer, &root, Path::new(&libraries), Path::new(&name), packages])
            .stdin(Stdio::null())
            .stdout(console.try_clone()?)
            .stderr(console)
            .spawn()
            .context("cannot start unshare")?;
        let mut machine = Self { nspawn, init: 0, log, _folder: folder };
        machine.booted()?;
        Ok(machine)
    }

    /// Waits until systemd has started everything.
    fn booted(&mut self) -> anyhow::Result<()> {
        let old = self.init;
        self.wait("systemd runs", |machine| {
            machine.init = machine.find_init().filter(|pid| *pid != old).context("no process 1")?;
            machine.run("systemctl is-system-running --wait | grep -E 'running|degraded'").map(drop)
        })
    }

    /// The process 1 of the machine: the child of nspawn that outlives its setup.
    fn find_init(&self) -> Option<u32> {
        let children = |pid: u32| -> Vec<u32> {
            let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
        };
        let is_init = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| {
                status.lines().any(|line| line.starts_with("NSpid:") && line.ends_with("\t1"))
            })
        };
        children(self.nspawn.id()).into_iter().flat_map(children).find(is_init)
    }

    /// A way into the machine until it boots again.
    pub(crate) fn shell(&self) -> Shell {
        Shell { init: self.init }
    }

    /// Runs a command of the shell in the machine; its output.
    pub(crate) fn run(&self, script: &str) -> anyhow::Result<String> {
        self.shell().run(script)
    }

    /// Writes a file in the machine.
    pub(crate) fn write(&self, path: &str, text: &str) -> anyhow::Result<()> {
        self.run(&format!("cat > {path} <<'END'\n{text}\nEND")).map(drop)
    }

    /// Waits until `probe` succeeds.
    pub(crate) fn wait<T>(
        &mut self,
        reason: &str,
        mut probe: impl FnMut(&mut Self) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match probe(self) {
                Ok(value) => return Ok(value),
                Err(error) if Instant::now() > deadline => {
                    let console = fs::read_to_string(&self.log).unwrap_or_default();
                    bail!("not within {PATIENCE:?}: {reason}: {error:#}\n{console}")
                }
                Err(_) => std::thread::sleep(LOOK), // eventually
            }
        }
    }

    /// Boots the machine again.
    pub(crate) fn reboot(&mut self) -> anyhow::Result<()> {
        self.run("systemctl reboot")?;
        self.booted()
    }

    /// What a unit has written to the journal since the last boot.
    pub(crate) fn journal(&self, unit: &str) -> anyhow::Result<String> {
        self.run(&format!("journalctl --boot --no-pager --output=cat --unit={unit}"))
    }

    /// Does something in the machine's network, on a thread of its own.
    pub(crate) fn inside<T: Send>(
        &self,
        doing: impl AsyncFnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let network = File::open(format!("/proc/{}/ns/net", self.init))?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(network, CloneFlags::CLONE_NEWNET)?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(doing())
            });
            inside.join().map_err(|_| anyhow::anyhow!("it panicked"))?
        })
    }
}

/// A way into a machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shell {
    init: u32,
}

impl Shell {
    /// Runs a command of the shell in the machine; its output.
    pub(crate) fn run(self, script: &str) -> anyhow::Result<String> {
        let output = Command::new("nsenter")
            .args([
                "--target",
                &self.init.to_string(),
                "--mount",
                "--uts",
                "--ipc",
                "--net",
                "--pid",
                "--cgroup",
            ])
            .args(["--root", "--wdns=/", "env", "-i", "PATH=/usr/sbin:/usr/bin", "LC_ALL=C.UTF-8"])
            .args(["DEBIAN_FRONTEND=noninteractive", "sh", "-ec", script])
            .stdin(Stdio::null())
            .output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, errors) = (text(&output.stdout), text(&output.stderr));
        ensure!(output.status.success(), "`{script}` failed ({}): {out}{errors}", output.status);
        Ok(out.trim().to_owned())
    }

    /// The same beside what this thread has to do.
    pub(crate) async fn beside(self, script: &'static str) -> anyhow::Result<String> {
        tokio::task::spawn_blocking(move || self.run(script)).await?
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // With its process 1 every process of it ends; nspawn tidies up after it, and its mounts end with itself.
        let pid = if self.init == 0 { self.nspawn.id() } else { self.init };
        if let Ok(pid) = i32::try_from(pid) {
            let _gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
        }
        let _ended = self.nspawn.wait();
    }
}

/// The first address of a loopback block, which is the workload's own.
pub(crate) fn own_address(block: Ipv4Addr) -> Ipv4Addr {
    tests::workload::own_address(block)
}

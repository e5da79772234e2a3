//! Processes of the demo: started from this very binary, logged to files, ended by their own pid.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// How long a process may take to end by itself after it was asked to.
const GRACE: Duration = Duration::from_secs(3);

/// One running process.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `istioctl internal ARGS`; standard error goes to `FOLDER/NAME.log`.
    ///
    /// # Errors
    ///
    /// When the process cannot be started.
    pub(crate) fn start(folder: &Path, name: &str, args: &[String]) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = Command::new(std::env::current_exe()?)
            .arg("internal")
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), log, child })
    }

    /// The address that the process prints as its first line.
    ///
    /// # Errors
    ///
    /// When the process ends, or prints something else.
    pub(crate) async fn address(&mut self) -> anyhow::Result<SocketAddr> {
        let stdout = self.child.stdout.take().context("the address was read already")?;
        let line = BufReader::new(stdout).lines().next_line().await?;
        match line.as_deref().map(str::trim).map(str::parse) {
            Some(Ok(address)) => Ok(address),
            _ => bail!("{} did not start: {}", self.name, self.last_words()),
        }
    }

    /// Fails when the process has ended.
    ///
    /// # Errors
    ///
    /// With the last lines of its log.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}: {}", self.name, self.last_words()),
        }
    }

    /// Asks the process to end, and ends it when it does not.
    pub(crate) async fn stop(mut self) {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok());
        let asked = pid.is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok());
        if !asked || tokio::time::timeout(GRACE, self.child.wait()).await.is_err() {
            self.child.kill().await.unwrap_or_default();
        }
    }

    fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(5)..).unwrap_or_default().join("\n")
    }
}

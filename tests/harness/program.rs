//! Programs as processes: started with a log, ended by their own pid.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::PATIENCE;

/// A running program; it is killed when dropped.
#[derive(Debug)]
pub struct Program {
    name: String,
    log: PathBuf,
    child: Child,
    ended: bool,
}

/// Path of one of our programs, beside the folder of the running test.
///
/// # Errors
///
/// With the command that builds it.
pub fn ours(name: &str) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test.ancestors().nth(2).context("the test has no target folder")?;
    let path = folder.join(name);
    ensure!(
        path.exists(),
        "{} is not there; `cargo build --profile PROFILE --bins` makes it, with the profile of this test (`quick`; benchmarks \
         take those of `release`)",
        path.display()
    );
    Ok(path)
}

impl Program {
    /// Starts a program whose output goes to `FOLDER/NAME.log`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(program: &Path, folder: &Path, name: &str, args: &[String]) -> anyhow::Result<Self> {
        Self::spawn(Command::new(program).args(args), folder, name)
    }

    /// As [`Program::start`], as another user. Needs root.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start_as(
        user: u32,
        program: &Path,
        folder: &Path,
        name: &str,
        args: &[String],
    ) -> anyhow::Result<Self> {
        Self::spawn(Command::new(program).args(args).uid(user).gid(user), folder, name)
    }

    fn spawn(command: &mut Command, folder: &Path, name: &str) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let program = PathBuf::from(command.get_program());
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { name: name.to_owned(), log, child, ended: false })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory, in KiB.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn resident(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|kib| kib.trim().strip_suffix(" kB")?.parse().ok()).context("no VmRSS")
    }

    /// Time that it was running on a processor.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn processor_time(&self) -> anyhow::Result<Duration> {
        // Of each thread, in nanoseconds.
        let mut all = Duration::ZERO;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let told = std::fs::read_to_string(thread?.path().join("schedstat"))?;
            let nanos = told.split(' ').next().and_then(|nanos| nanos.parse().ok());
            all += Duration::from_nanos(nanos.context("no time in schedstat")?);
        }
        Ok(all)
    }

    /// What the program wrote.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Fails when the program has ended.
    ///
    /// # Errors
    ///
    /// With what it wrote last.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}:\n{}", self.name, tail(&self.output())),
        }
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    ///
    /// When it cannot be signalled.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.ended = true;
        Ok(())
    }

    /// Whether it was neither killed nor seen to have ended.
    #[must_use]
    pub fn is_running(&self) -> bool {
        !self.ended
    }

    /// Asks it to end, and waits until it has.
    ///
    /// # Errors
    ///
    /// When it cannot be signalled, or does not end.
    pub async fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.ended().await
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// When it cannot be signalled.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.ended = true;
                return Ok(status);
            }
            ensure!(
                tokio::time::Instant::now() < deadline,
                "{} has not ended: {}",
                self.name,
                tail(&self.output())
            );
            tokio::time::sleep(Duration::from_millis(5)).await; // eventually
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already; there is nobody to tell.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(|_| ()).unwrap_or_default();
    }
}

/// Runs one of our programs to its end: exit code, standard output, standard error.
///
/// # Errors
///
/// When it cannot be started.
pub fn run(name: &str, envs: &[(&str, &str)], args: &[&str]) -> anyhow::Result<(i32, String, String)> {
    let output =
        Command::new(ours(name)?).args(args).envs(envs.iter().copied()).stdin(Stdio::null()).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr)))
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n")
}

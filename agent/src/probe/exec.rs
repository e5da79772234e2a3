//! Runs a command as a probe: without a shell, in a process group of its own that does not outlive the check, and without
//! the agent's environment, which may hold secrets.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

use super::Outcome;

/// How much of what a command writes is kept, in bytes. The rest is read and forgotten.
const SAID: usize = 200;
/// Where programs are that are named without a folder.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// After its end a command's last words are waited for no longer: another process may hold its output open.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Runs the command to its end; it is killed with all processes of its group when this future is dropped.
pub(super) async fn run(command: &[String]) -> Outcome {
    let (program, args) = command.split_first().ok_or("there is no command")?;
    let mut child = Command::new(program)
        .args(args)
        .env_clear()
        .env("PATH", PATH)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("`{program}` cannot be run: {error}"))?;
    let group = Group::of(child.id());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let status = {
        let keeping = async { tokio::join!(keep(stdout, &mut out), keep(stderr, &mut err)) };
        let mut keeping = std::pin::pin!(keeping);
        tokio::select! {
            status = child.wait() => {
                drop(group);
                // What is still in the pipes.
                if tokio::time::timeout(LAST_WORDS, &mut keeping).await.is_err() {
                    tracing::debug!(program, "somebody still holds the output of a probe that has ended");
                }
                status
            }
            _ = &mut keeping => child.wait().await,
        }
    };
    let status = status.map_err(|error| format!("`{program}`: {error}"))?;
    if status.success() {
        return Ok(());
    }
    let said = [err, out].concat();
    let said = String::from_utf8_lossy(said.get(..SAID).unwrap_or(&said)).trim().to_owned();
    let colon = if said.is_empty() { "" } else { ": " };
    Err(format!("`{}`: {status}{colon}{said}", command.join(" ")))
}

/// Reads to the end, and keeps the beginning.
async fn keep(from: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let room = SAID.saturating_sub(kept.len()).min(length);
        kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
    }
}

/// The processes of a command; killed when this is dropped.
struct Group(Option<Pid>);

impl Group {
    fn of(leader: Option<u32>) -> Self {
        Self(leader.and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // There may be nobody left.
            killpg(group, Signal::SIGKILL).unwrap_or_default();
        }
    }
}

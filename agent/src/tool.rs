//! Programs of the system that do what the agent has no call for.

use std::io::{self, Write as _};
use std::process::{Command, Stdio};

/// Why a program did not do what it was to do.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be run.
    #[error("cannot run it: {0}")]
    Io(#[from] io::Error),
    /// It refused.
    #[error("`{program}` refused: {reason}")]
    Refused {
        /// The program with its arguments.
        program: String,
        /// What it said.
        reason: String,
    },
}

/// Runs a program with this input to its end. Blocks.
///
/// # Errors
///
/// When it cannot be run, or fails.
pub(crate) fn run(program: &str, args: &[&str], input: &str) -> Result<(), ToolError> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(written?);
    }
    let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(ToolError::Refused { program: format!("{program} {}", args.join(" ")), reason })
}

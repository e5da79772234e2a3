//! Commands of those who run the control plane: history, the audit trail, backups.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::duration;

/// How a change is only looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DryRun {
    /// Check everything
    All,
    /// Also show which proxies and resources would change
    Preview,
}

/// Flags of `history`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct History {
    /// How many changes, the newest first
    #[arg(long, default_value_t = 20)]
    pub(crate) limit: u32,
    /// Or what to do with it
    #[command(subcommand)]
    pub(crate) command: Option<HistoryCommand>,
}

/// What to do with the history.
#[derive(Debug, Subcommand)]
pub(crate) enum HistoryCommand {
    /// Say how much is kept, or show it
    Keep(Keep),
}

/// How much is kept.
#[derive(Debug, Args)]
pub(crate) struct Keep {
    /// How many entries
    #[arg(long, requires = "age")]
    pub(crate) entries: Option<u32>,
    /// How much older than the newest they may be (`12h`, `30d`); `0s` is any age
    #[arg(long, requires = "entries", value_parser = duration)]
    pub(crate) age: Option<Duration>,
}

/// Flags of `diff`.
#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// The revision that is compared
    pub(crate) from: u64,
    /// The revision that it is compared with; now when not given
    pub(crate) to: Option<u64>,
}

/// Flags of `rollback`.
#[derive(Debug, Args)]
pub(crate) struct Rollback {
    /// The revision at which the configuration was as it shall be
    #[arg(long)]
    pub(crate) to: u64,
    /// Only objects of this namespace
    #[arg(long, short)]
    pub(crate) namespace: Option<String>,
    /// Check everything, commit nothing, and show which proxies and resources would change; `all` only checks
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "preview")]
    pub(crate) dry_run: Option<DryRun>,
    /// Commit even if it touches more proxies than maxAffectedProxiesPercent of the mesh allows
    #[arg(long)]
    pub(crate) force: bool,
    /// Return when every connected proxy runs the change
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,
}

/// What to do with the audit trail.
#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// Show entries, oldest first
    List {
        /// Only those after this revision
        #[arg(long, default_value_t = 0)]
        after: u64,
        /// Only what this caller did
        #[arg(long)]
        who: Option<String>,
    },
    /// Write all entries to a file, one JSON object on each line, as they can be verified later
    Export {
        /// The file; `-` is standard output
        file: PathBuf,
    },
    /// Follow the hash chain, of the control plane or of an exported file
    Verify {
        /// An exported file
        #[arg(long)]
        file: Option<PathBuf>,
        /// A hash that was noted earlier and must be in the chain; shows whether the newest entries were cut off
        #[arg(long)]
        contains: Option<String>,
    },
    /// Say how much is kept, or show it
    Keep(Keep),
}

/// What seals a backup.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Sealing {
    /// File whose first line is the passphrase; `-` is standard input
    #[arg(long)]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// File with at least 32 random bytes
    #[arg(long)]
    pub(crate) key_file: Option<PathBuf>,
}

/// Flags of `backup`.
#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// The file to write; it must not exist
    pub(crate) file: PathBuf,
    /// What seals it
    #[command(flatten)]
    pub(crate) sealing: Sealing,
    /// Also seal the root of the mesh's certificates with its private key, from the data folder of the member on this
    /// machine; without it a restored cluster needs that root from elsewhere, or every workload joins again
    #[arg(long, value_name = "DATA_DIR")]
    pub(crate) with_authority: Option<PathBuf>,
}

/// Flags of `restore`.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The backup
    pub(crate) file: PathBuf,
    /// What opens it
    #[command(flatten)]
    pub(crate) sealing: Sealing,
    /// Data folder of the new member, which must not run
    #[arg(long)]
    pub(crate) data_dir: PathBuf,
    /// Id of the new member
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) member: u64,
    /// Move what is in the data folder aside
    #[arg(long)]
    pub(crate) force: bool,
}

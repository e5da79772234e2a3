//! Every command and flag, with its help text.

mod operate;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use self::operate::{
    Audit, Backup, Diff, DryRun, History, HistoryCommand, Restore, Rollback, Sealing,
};

/// The command line of the mesh.
#[derive(Debug, Parser)]
#[command(name = "istioctl", version, about = "The command line of the mesh", max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done; 1 refused or not (yet) true; 2 wrong usage.")]
pub(crate) struct Cli {
    /// Where the admin API is.
    #[command(flatten)]
    pub(crate) server: Server,
    /// How to print.
    #[arg(long, short, global = true, value_enum, default_value = "table")]
    pub(crate) output: Output,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to reach the control plane.
#[derive(Debug, Clone, Args)]
pub(crate) struct Server {
    /// URL of the admin API
    #[arg(long, global = true, env = "ISTIOCTL_SERVER", default_value = "http://127.0.0.1:15080")]
    pub(crate) server: String,
    /// Bearer token of the admin API
    #[arg(long, global = true, env = "ISTIOCTL_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// File with the bearer token
    #[arg(long, global = true, env = "ISTIOCTL_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// PEM file with the certificate that signs the admin API's
    #[arg(long, global = true, env = "ISTIOCTL_CA")]
    pub(crate) ca: Option<PathBuf>,
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Aligned columns
    Table,
    /// Aligned columns, all of them
    Wide,
    /// JSON
    Json,
    /// YAML
    Yaml,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole mesh on this machine and watch it work
    Demo(Demo),
    /// Commit Istio objects, all or none
    Apply(Apply),
    /// Show objects
    Get(Get),
    /// Delete objects
    Delete(Delete),
    /// Check files with the rules of the control plane, without one
    Validate(Files),
    /// Show which changes were made, and say how many are kept
    History(History),
    /// Show what differs between two revisions
    Diff(Diff),
    /// Make the configuration what it was at a revision, in one commit
    Rollback(Rollback),
    /// Who changed what, from where: a trail that cannot be rewritten unnoticed
    #[command(subcommand)]
    Audit(Audit),
    /// Write the whole state of the control plane to a sealed file
    Backup(Backup),
    /// Make the first member of a new cluster from a backup, on this machine
    Restore(Restore),
    /// Show each proxy and what it has acknowledged
    #[command(visible_alias = "ps")]
    ProxyStatus,
    /// Show what a proxy was given
    #[command(visible_alias = "pc", subcommand)]
    ProxyConfig(ProxyConfig),
    /// Show the services of the mesh
    Services,
    /// Show the workloads of the mesh, and whether their agents are heard
    Workloads(Workloads),
    /// Tokens with which workloads join
    #[command(subcommand)]
    Token(Token),
    /// The machines that joined, and which of them are revoked
    #[command(subcommand)]
    Nodes(Nodes),
    /// Who may use the admin API
    #[command(subcommand)]
    Auth(Auth),
    /// The members of the control plane
    #[command(subcommand)]
    Members(Members),
    /// Versions of this program and of the control plane
    Version,
    /// Print a completion script
    Completion {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Run another program of the mesh out of this binary (used by the demo and by packaging)
    #[command(subcommand, hide = true)]
    Internal(Internal),
}

/// Flags of `demo`.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Verify every claim, print one line for each, and exit with 0 or 1
    #[arg(long)]
    pub(crate) check: bool,
    /// Requests of each traffic split
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub(crate) requests: u32,
}

/// Files to read.
#[derive(Debug, Args)]
pub(crate) struct Files {
    /// File or folder with YAML or JSON; `-` is standard input; may be repeated
    #[arg(long = "filename", short = 'f', required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Namespace of objects that name none
    #[arg(long, short, default_value = "default")]
    pub(crate) namespace: String,
}

/// Flags of `apply`.
#[derive(Debug, Args)]
pub(crate) struct Apply {
    /// What to apply
    #[command(flatten)]
    pub(crate) files: Files,
    /// Check everything, commit nothing, and show which proxies and resources would change; `all` only checks
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "preview")]
    pub(crate) dry_run: Option<DryRun>,
    /// Commit even if it touches more proxies than maxAffectedProxiesPercent of the mesh allows
    #[arg(long)]
    pub(crate) force: bool,
    /// In the same commit, delete what is no longer among the files: of a set, or with certain labels
    #[arg(long, requires = "pruned")]
    pub(crate) prune: bool,
    /// The set that the files are, whose other objects are deleted
    #[arg(long, group = "pruned", requires = "prune")]
    pub(crate) applied_set: Option<String>,
    /// Labels that all files have; other objects with them are deleted
    #[arg(long, short = 'l', group = "pruned", requires = "prune")]
    pub(crate) selector: Option<String>,
    /// Return when every connected proxy runs the change, or tell which do not and why
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait (`500ms`, `30s`, `2m`)
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,
}

/// Flags of `get`.
#[derive(Debug, Args)]
pub(crate) struct Get {
    /// Kind (`virtualservice`, `vs`, ...), or `all`
    pub(crate) kind: String,
    /// Name
    pub(crate) name: Option<String>,
    /// Namespace
    #[arg(long, short, default_value = "default")]
    pub(crate) namespace: String,
    /// All namespaces
    #[arg(long, short = 'A')]
    pub(crate) all_namespaces: bool,
    /// As it was at this revision
    #[arg(long)]
    pub(crate) at: Option<u64>,
}

/// Flags of `delete`.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Kind
    pub(crate) kind: String,
    /// Name
    pub(crate) name: String,
    /// Namespace
    #[arg(long, short, default_value = "default")]
    pub(crate) namespace: String,
    /// Check everything, commit nothing, and show which proxies and resources would change; `all` only checks
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "preview")]
    pub(crate) dry_run: Option<DryRun>,
    /// Delete even if it touches more proxies than maxAffectedProxiesPercent of the mesh allows
    #[arg(long)]
    pub(crate) force: bool,
    /// Return when every connected proxy runs the change
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,
}

/// What of a proxy's configuration to show.
#[derive(Debug, Subcommand)]
pub(crate) enum ProxyConfig {
    /// Listeners
    #[command(visible_aliases = ["listeners", "l"])]
    Listener(ProxyName),
    /// Routes
    #[command(visible_aliases = ["routes", "r"])]
    Route(ProxyName),
    /// Clusters
    #[command(visible_aliases = ["clusters", "c"])]
    Cluster(ProxyName),
    /// Endpoints
    #[command(visible_aliases = ["endpoints", "ep"])]
    Endpoint(ProxyName),
    /// Everything, as JSON or YAML
    All(ProxyName),
    /// A bootstrap file for a proxy that has yet to connect
    Bootstrap(Bootstrap),
}

/// Which proxy.
#[derive(Debug, Args)]
pub(crate) struct ProxyName {
    /// Node id, `name.namespace`, or a unique part of either
    pub(crate) proxy: String,
}

/// Flags of `proxy-config bootstrap`.
#[derive(Debug, Args)]
pub(crate) struct Bootstrap {
    /// For a stock Envoy
    #[arg(long, required = true)]
    pub(crate) envoy: bool,
    /// Workload, `name.namespace`
    pub(crate) workload: String,
    /// Service account of the workload
    #[arg(long, default_value = "default")]
    pub(crate) service_account: String,
    /// Address other proxies reach the workload at
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) address: std::net::IpAddr,
    /// Labels of the workload, `app=reviews,version=v1`
    #[arg(long, value_delimiter = ',', value_parser = key_value)]
    pub(crate) labels: Vec<(String, String)>,
    /// Loopback block for listeners without traffic capture, `127.240.16.0/20`
    #[arg(long)]
    pub(crate) loopback_block: Option<String>,
    /// Where the application listens, `9080=127.0.0.1:8080`; may be repeated
    #[arg(long, value_parser = key_value)]
    pub(crate) forward: Vec<(String, String)>,
    /// xDS address of the control plane; asked from it when not given
    #[arg(long)]
    pub(crate) xds: Option<String>,
    /// Unix socket at which `istio-agent secrets` serves the certificate
    #[arg(long)]
    pub(crate) secrets: PathBuf,
    /// Use the state-of-the-world protocol instead of delta
    #[arg(long)]
    pub(crate) sotw: bool,
    /// Envoy's admin port
    #[arg(long, default_value_t = 15000)]
    pub(crate) admin_port: u16,
}

/// Flags of `workloads`.
#[derive(Debug, Args)]
pub(crate) struct Workloads {
    /// What to do, instead of showing them
    #[command(subcommand)]
    pub(crate) command: Option<WorkloadsCommand>,
}

/// What to do with workloads.
#[derive(Debug, Subcommand)]
pub(crate) enum WorkloadsCommand {
    /// Give up workloads that are held as unknown since many agents were lost at the same time
    Release(Release),
}

/// Flags of `workloads release`.
#[derive(Debug, Args)]
#[group(id = "which", required = true, multiple = true)]
pub(crate) struct Release {
    /// The workload of this name
    #[arg(requires = "namespace", conflicts_with = "all")]
    pub(crate) name: Option<String>,
    /// Those of this namespace
    #[arg(long, short, conflicts_with = "all")]
    pub(crate) namespace: Option<String>,
    /// Those of all namespaces
    #[arg(long)]
    pub(crate) all: bool,
}

/// Join tokens.
#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Make a token; it is shown this once
    Create {
        /// Namespace of the workload
        #[arg(long, short, default_value = "default")]
        namespace: String,
        /// Service account of the workload
        #[arg(long, default_value = "default")]
        service_account: String,
        /// How long it may be used
        #[arg(long, default_value = "15m", value_parser = duration)]
        ttl: Duration,
        /// How many workloads may join with it
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// Block of addresses, `10.0.0.0/8`, from which machines must call to join with it; may be repeated
        #[arg(long = "cidr")]
        cidrs: Vec<String>,
    },
    /// Show tokens, without their secrets
    List,
    /// Make a token useless
    Revoke {
        /// Identifier, as `list` prints it
        id: String,
    },
}

/// Machines that joined.
#[derive(Debug, Subcommand)]
pub(crate) enum Nodes {
    /// Show the machines that are known, and the revoked ones
    List,
    /// Take a machine out of the mesh: it gets no certificates, what it has open ends, its workloads go
    Revoke {
        /// Its name, as `list` prints it
        #[arg(required_unless_present = "workload")]
        node: Option<String>,
        /// A workload that it has registered, instead of its name
        #[arg(long, conflicts_with = "node")]
        workload: Option<String>,
        /// Namespace of the workload
        #[arg(long, short, default_value = "default")]
        namespace: String,
        /// Why; the machine is told
        #[arg(long, default_value = "")]
        reason: String,
        /// Also a machine that nobody knows
        #[arg(long)]
        force: bool,
    },
}

/// Who may use the admin API.
#[derive(Debug, Subcommand)]
pub(crate) enum Auth {
    /// Show who one is to the control plane, and what one may do
    Whoami,
    /// Tokens of operators and programs
    #[command(subcommand)]
    Token(AuthToken),
    /// Roles of client certificates
    #[command(subcommand)]
    Role(AuthRole),
}

/// Tokens of operators.
#[derive(Debug, Subcommand)]
pub(crate) enum AuthToken {
    /// Make a token; it is shown this once
    Create {
        /// What for
        #[arg(long, default_value = "")]
        name: String,
        /// What it may do
        #[arg(long, value_enum)]
        role: RoleName,
        /// It may do that in these namespaces only; may be repeated
        #[arg(long = "namespace", short, value_delimiter = ',')]
        namespaces: Vec<String>,
        /// How long it may be used
        #[arg(long, default_value = "720h", value_parser = duration)]
        ttl: Duration,
    },
    /// Show tokens, without their secrets
    List,
    /// Make a token worthless
    Revoke {
        /// Identifier, as `list` prints it
        id: String,
    },
}

/// Roles of client certificates.
#[derive(Debug, Subcommand)]
pub(crate) enum AuthRole {
    /// Give whoever presents a certificate of this identity a role
    Bind {
        /// SPIFFE id
        identity: String,
        /// What it may do
        #[arg(long, value_enum)]
        role: RoleName,
        /// It may do that in these namespaces only; may be repeated
        #[arg(long = "namespace", short, value_delimiter = ',')]
        namespaces: Vec<String>,
    },
    /// Show the roles of identities
    List,
    /// Take the role of an identity away
    Unbind {
        /// SPIFFE id
        identity: String,
    },
}

/// What somebody may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleName {
    /// Read
    Viewer,
    /// Read, and change configuration
    Editor,
    /// Everything
    Admin,
}

impl From<RoleName> for istiod::access::Role {
    fn from(name: RoleName) -> Self {
        match name {
            RoleName::Viewer => Self::Viewer,
            RoleName::Editor => Self::Editor,
            RoleName::Admin => Self::Admin,
        }
    }
}

/// Members of the control plane.
#[derive(Debug, Subcommand)]
pub(crate) enum Members {
    /// Show the members, and how far each is
    List,
    /// Print the command, good for once, with which the next member joins
    Add {
        /// It only serves, and never votes by itself
        #[arg(long)]
        learner: bool,
        /// How long the ticket may be used
        #[arg(long, default_value = "1h", value_parser = duration)]
        ttl: Duration,
    },
    /// Remove members, for ever; 1, 3 or 5 voters must remain
    Remove {
        /// Their numbers
        #[arg(required = true)]
        ids: Vec<u64>,
    },
    /// Let learners vote that have caught up; there must be 1, 3 or 5 voters afterwards
    Promote {
        /// Their numbers
        #[arg(required = true)]
        ids: Vec<u64>,
    },
    /// Let another member lead
    Transfer {
        /// Its number
        id: u64,
    },
    /// Print the command, good for once, with which a machine takes the place of a member
    Replace {
        /// The number of the member that goes
        id: u64,
        /// How long the ticket may be used
        #[arg(long, default_value = "1h", value_parser = duration)]
        ttl: Duration,
    },
}

/// The mesh's other programs.
#[derive(Debug, Subcommand)]
pub(crate) enum Internal {
    /// The control plane
    Istiod(istiod::cli::Cli),
    /// The node agent
    Agent(Box<agent::cli::Cli>),
    /// Write manual pages and completion scripts of all programs into a folder
    Documents {
        /// The folder
        folder: PathBuf,
    },
    /// A service of the demo
    Service(crate::demo::app::Service),
}

/// `500ms`, `30s`, `2m`, `1h`, `7d`
fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_alphabetic()).unwrap_or(text.len()));
    let value: f64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a duration; write `500ms`, `30s`, `2m`, `1h` or `7d`"))?;
    let seconds = match unit {
        "ms" => value / 1000.0,
        "s" => value,
        "m" => value * 60.0,
        "h" => value * 3600.0,
        "d" => value * 86_400.0,
        other => {
            return Err(format!("`{other}` is not a unit of time; write `500ms`, `30s`, `2m`, `1h` or `7d`"));
        }
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("`{text}` is out of range"))
}

fn key_value(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned()))
        .ok_or_else(|| format!("`{text}`: write `key=value`"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("5").is_err());
        assert!(duration("-1s").is_err());
        assert!(duration("xs").is_err());
    }
}

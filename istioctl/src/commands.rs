//! The commands that ask the control plane.

mod audit;
mod auth;
pub(crate) mod backup;
pub(crate) mod config;
mod history;
mod members;
mod mesh;
mod nodes;
mod proxy;

use std::process::ExitCode;

use crate::cli::{Command, Output};
use crate::client::Client;

/// Runs one command against one control plane.
///
/// # Errors
///
/// What the control plane refused, or why it could not be asked.
pub(crate) async fn run(client: &Client, output: Output, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Apply(args) => config::apply(client, output, &args).await,
        Command::Get(args) => config::get(client, output, &args).await,
        Command::Delete(args) => config::delete(client, output, &args).await,
        Command::History(args) => history::history(client, output, &args).await,
        Command::Diff(args) => history::diff(client, output, &args).await,
        Command::Rollback(args) => history::rollback(client, output, &args).await,
        Command::Audit(args) => audit::run(client, output, &args).await,
        Command::Backup(args) => backup::backup(client, &args).await,
        Command::ProxyStatus => proxy::status(client, output).await,
        Command::ProxyConfig(args) => proxy::config(client, output, &args).await,
        Command::Services => mesh::services(client, output).await,
        Command::Workloads(args) => mesh::workloads(client, output, &args).await,
        Command::Auth(args) => auth::auth(client, output, &args).await,
        Command::Token(args) => mesh::token(client, output, &args).await,
        Command::Nodes(args) => nodes::run(client, output, &args).await,
        Command::Members(args) => members::run(client, output, &args).await,
        Command::Version => mesh::version(client, output).await,
        Command::Demo(_)
        | Command::Restore(_)
        | Command::Validate(_)
        | Command::Completion { .. }
        | Command::Internal(_) => {
            anyhow::bail!("this command does not ask the control plane")
        }
    }
}

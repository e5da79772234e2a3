//! The command line of the mesh.

mod cli;
mod client;
mod commands;
mod demo;
mod documents;
mod output;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use cli::{Cli, Command, Internal};
use client::Client;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            output::note(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "every other command asks the control plane")]
fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    // Programs with runtimes of their own, and what needs none.
    let command = match cli.command {
        Command::Internal(Internal::Istiod(istiod)) => return Ok(istiod::cli::main(istiod)),
        Command::Internal(Internal::Agent(agent)) => return Ok(agent::cli::main(*agent)),
        Command::Internal(Internal::Documents { folder }) => {
            return documents::write(&folder).map(|()| ExitCode::SUCCESS);
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "istioctl", &mut script);
            output::data(&String::from_utf8_lossy(&script))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Validate(files) => return commands::config::validate(&files),
        Command::Restore(args) => return commands::backup::restore(&args),
        other => other,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let server = cli.server;
    let output = cli.output;
    runtime.block_on(async move {
        match command {
            Command::Demo(args) => demo::run(&args).await,
            Command::Internal(Internal::Service(service)) => {
                demo::app::run(&service).await.map(|()| ExitCode::SUCCESS)
            }
            other => commands::run(&Client::new(&server)?, output, other).await,
        }
    })
}

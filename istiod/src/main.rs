//! One member of the control plane.

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    istiod::cli::main(istiod::cli::Cli::parse())
}

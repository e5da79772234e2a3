//! Manual pages and completion scripts of the mesh's programs, for their packages.
//!
//! `DIR/man/PROGRAM[-COMMAND].SECTION`, and `DIR/completions/PROGRAM.SHELL`.

use std::fs;
use std::path::Path;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;

/// Shells whose completions packages install.
const SHELLS: [(Shell, &str); 3] = [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")];

/// Writes the documents of every program into a folder.
///
/// # Errors
///
/// What cannot be written.
pub(crate) fn write(folder: &Path) -> anyhow::Result<()> {
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    for made in [&man, &completions] {
        fs::create_dir_all(made).with_context(|| format!("cannot make {}", made.display()))?;
    }
    let programs = [
        (crate::cli::Cli::command(), "1"),
        (istiod::cli::Cli::command(), "8"),
        (agent::cli::Cli::command(), "8"),
    ];
    for (mut program, section) in programs {
        let name = program.get_name().to_owned();
        for (shell, ending) in SHELLS {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut program, &name, &mut script);
            put(&completions.join(format!("{name}.{ending}")), &script)?;
        }
        program.build();
        pages(&program, section, &man)?;
    }
    Ok(())
}

/// The page of a command, and those of the commands below it.
fn pages(command: &Command, section: &str, folder: &Path) -> anyhow::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let shown = command.clone().disable_help_subcommand(true);
    let page = clap_mangen::Man::new(shown.name(name.clone())).section(section).manual("Service mesh");
    let mut text = Vec::new();
    page.render(&mut text)?;
    put(&folder.join(format!("{name}.{section}")), &text)?;
    let below = command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help");
    below.into_iter().try_for_each(|below| pages(below, section, folder))
}

fn put(path: &Path, text: &[u8]) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_and_command_has_a_page_and_every_shell_a_script() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        for page in
            ["istioctl.1", "istioctl-token-create.1", "istiod.8", "istiod-run.8", "istio-agent-join.8"]
        {
            let text = fs::read_to_string(folder.path().join("man").join(page)).unwrap();
            assert!(text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"), "{page}");
        }
        assert!(!folder.path().join("man/istioctl-internal.1").exists(), "what is hidden has none");
        for script in ["istioctl.bash", "istiod.zsh", "istio-agent.fish"] {
            assert!(folder.path().join("completions").join(script).exists(), "{script}");
        }
    }
}

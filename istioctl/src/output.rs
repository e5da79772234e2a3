//! Table, JSON and YAML. Data goes to standard output, all else to standard error.

use std::io::{self, IsTerminal, Write};

use owo_colors::{OwoColorize, Style};
use serde::Serialize;

use crate::cli::Output;

/// Rows for people.
#[derive(Debug)]
pub(crate) struct Rows {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Rows {
    /// No rows yet.
    pub(crate) fn new(header: impl IntoIterator<Item = &'static str>) -> Self {
        Self { header: header.into_iter().collect(), rows: Vec::new() }
    }

    /// One more row; its cells are in the order of the header.
    pub(crate) fn push(&mut self, row: impl IntoIterator<Item = String>) {
        self.rows.push(row.into_iter().collect());
    }

    /// Aligned columns with two spaces between them, as kubectl prints.
    pub(crate) fn render(&self) -> String {
        let header: Vec<String> = self.header.iter().map(|h| h.to_uppercase()).collect();
        let lines = || std::iter::once(&header).chain(&self.rows);
        let shown = |cell: &String| if cell.is_empty() { "-".to_owned() } else { cell.clone() };
        let width = |column| {
            lines().filter_map(|line| line.get(column)).map(|cell| shown(cell).chars().count()).max()
        };
        let widths: Vec<usize> = (0..header.len()).map(|column| width(column).unwrap_or_default()).collect();
        let line = |cells: &Vec<String>| {
            let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{:width$}  ", shown(cell)));
            format!("{}\n", padded.collect::<String>().trim_end())
        };
        lines().map(line).collect()
    }
}

/// Prints `value` as JSON or YAML, or `rows` as a table.
///
/// # Errors
///
/// When standard output cannot be written; a closed pipe is no error.
pub(crate) fn print<T: Serialize>(
    output: Output,
    value: &T,
    rows: impl FnOnce(bool) -> Rows,
) -> anyhow::Result<()> {
    let text = match output {
        Output::Table => rows(false).render(),
        Output::Wide => rows(true).render(),
        Output::Json => format!("{}\n", serde_json::to_string_pretty(value)?),
        Output::Yaml => serde_saphyr::to_string(value)?,
    };
    data(&text)
}

/// Writes text to standard output.
///
/// # Errors
///
/// As [`print()`].
pub(crate) fn data(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// Writes one line for people to standard error. Nobody is told when that fails.
pub(crate) fn note(text: &str) {
    writeln!(io::stderr().lock(), "{text}").unwrap_or_default();
}

/// Colour, only where a terminal shows it.
pub(crate) fn paint(text: &str, style: Style) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some() || !io::stdout().is_terminal();
    if plain { text.to_owned() } else { text.style(style).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_empty_cells_show() {
        let mut rows = Rows::new(["name", "namespace"]);
        rows.push(["reviews".to_owned(), "default".to_owned()]);
        rows.push(["a".to_owned(), String::new()]);
        assert_eq!(rows.render(), "NAME     NAMESPACE\nreviews  default\na        -\n");
    }
}

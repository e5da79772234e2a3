//! What the demo shows: a table that is drawn over itself on a terminal, and once where there is none.

use std::io::IsTerminal;

use istiod::api::types::ProxyRow;
use owo_colors::Style;

use super::load::Tally;
use crate::output::{Rows, data, paint};

/// The table of the demo.
#[derive(Debug)]
pub(crate) struct Board {
    live: bool,
    lines: usize,
}

impl Board {
    /// A board that draws over itself when standard output is a terminal.
    pub(crate) fn new() -> Self {
        Self { live: std::io::stdout().is_terminal(), lines: 0 }
    }

    /// Whether the board can be drawn again in the same place.
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// Text above the board that stays.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written.
    pub(crate) fn say(&mut self, text: &str) -> anyhow::Result<()> {
        self.lines = 0;
        data(&format!("{text}\n"))
    }

    /// Draws the board.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written.
    pub(crate) fn draw(&mut self, tally: &Tally, proxies: &[ProxyRow]) -> anyhow::Result<()> {
        let text = render(tally, proxies);
        let up =
            if self.live && self.lines > 0 { format!("\x1b[{}A\x1b[J", self.lines) } else { String::new() };
        self.lines = text.lines().count();
        data(&format!("{up}{text}"))
    }
}

fn render(tally: &Tally, proxies: &[ProxyRow]) -> String {
    let good = tally.total - tally.failed;
    let share = if tally.total == 0 { 0.0 } else { f64::from(good) * 100.0 / f64::from(tally.total) };
    let style = if tally.failed == 0 { Style::new().green() } else { Style::new().red() };
    let mut text = format!(
        "\n{} requests, {} good, p50 {:.1} ms, p99 {:.1} ms\n\n",
        tally.total,
        paint(&format!("{share:.1} %"), style),
        tally.latency(0.5),
        tally.latency(0.99),
    );
    let mut services = Rows::new([
        "service",
        "version",
        "answers",
        "share",
        "identity of the callers, as the server saw it",
    ]);
    for ((service, version), count) in &tally.answers {
        let callers = tally.callers.get(service).into_iter().flatten();
        services.push([
            service.clone(),
            version.clone(),
            count.to_string(),
            format!("{:.1} %", tally.share(service, version)),
            callers.map(|c| if c.is_empty() { "(none)" } else { c }).collect::<Vec<_>>().join(", "),
        ]);
    }
    text.push_str(&services.render());
    text.push('\n');
    let mut rows = Rows::new(["proxy", "revision", "configuration"]);
    for proxy in proxies {
        let worst = proxy
            .types
            .values()
            .find(|s| s.as_str() != "SYNCED")
            .cloned()
            .unwrap_or_else(|| "SYNCED".to_owned());
        rows.push([proxy.name.clone(), proxy.revision.to_string(), worst]);
    }
    text.push_str(&rows.render());
    text
}

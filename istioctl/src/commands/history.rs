//! `history`, `diff`, `rollback`.

use std::process::ExitCode;
use std::time::Duration;

use istiod::api::history::{DiffReport, HistoryRetention, RollbackRequest};
use istiod::api::types::{ApplyReport, HistoryEntry};

use super::config::{changing, finish};
use crate::cli::{Diff, History, HistoryCommand, Output, Rollback};
use crate::client::Client;
use crate::output::{Rows, data, note, print};

/// Shows which changes were made, or how many are kept.
///
/// # Errors
///
/// As every call of the API.
pub(crate) async fn history(client: &Client, output: Output, args: &History) -> anyhow::Result<ExitCode> {
    if let Some(HistoryCommand::Keep(keep)) = &args.command {
        if let (Some(entries), Some(age)) = (keep.entries, keep.age) {
            let retention = HistoryRetention { entries, age_seconds: age.as_secs() };
            client.put("/history/retention", &retention).await?;
        }
        let kept: HistoryRetention = client.get("/history/retention").await?;
        return show_retention(output, &kept, kept.entries, kept.age_seconds);
    }
    let entries: Vec<HistoryEntry> = client.get(&format!("/history?limit={}", args.limit)).await?;
    print(output, &entries, |_| {
        let mut rows = Rows::new(["revision", "time", "author", "changes"]);
        for entry in &entries {
            rows.push([
                entry.revision.to_string(),
                entry.time.clone(),
                entry.author.clone(),
                entry.changes.join(", "),
            ]);
        }
        rows
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Shows how much is kept of something.
pub(super) fn show_retention(
    output: Output,
    kept: &impl serde::Serialize,
    entries: u32,
    age_seconds: u64,
) -> anyhow::Result<ExitCode> {
    print(output, kept, |_| {
        let mut rows = Rows::new(["entries", "age"]);
        let age = match age_seconds {
            0 => "any".to_owned(),
            seconds => format!("{:?}", Duration::from_secs(seconds)),
        };
        rows.push([entries.to_string(), age]);
        rows
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Shows what differs between two revisions.
///
/// # Errors
///
/// When history does not reach back so far.
pub(crate) async fn diff(client: &Client, output: Output, args: &Diff) -> anyhow::Result<ExitCode> {
    let to = args.to.map(|to| format!("&to={to}")).unwrap_or_default();
    let report: DiffReport = client.get(&format!("/diff?from={}{to}", args.from)).await?;
    if matches!(output, Output::Json | Output::Yaml) {
        print(output, &report, |_| Rows::new([]))?;
    } else if report.objects.is_empty() {
        note(&format!("nothing differs between revision {} and revision {}", report.from, report.to));
    }
    if matches!(output, Output::Table | Output::Wide) {
        report.objects.iter().try_for_each(|object| data(&object.diff))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes the configuration what it was.
///
/// # Errors
///
/// What was refused.
pub(crate) async fn rollback(client: &Client, output: Output, args: &Rollback) -> anyhow::Result<ExitCode> {
    let request = RollbackRequest { to: args.to, namespace: args.namespace.clone() };
    let path = format!("/rollback?{}", changing(args.dry_run, args.force));
    let report: ApplyReport = client.post(&path, &request).await?;
    if report.objects.is_empty() {
        note(&format!("the configuration is as it was at revision {} already", args.to));
    }
    finish(client, output, &report, args.dry_run, args.wait.then_some(args.timeout)).await
}

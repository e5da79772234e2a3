//! `audit list`, `export`, `verify`, `keep`.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use ca::authn::Hash;
use istiod::api::audit::{AuditPage, AuditRetention};
use istiod::audit::{Anchor, AuditEntry, verify};

use super::history::show_retention;
use crate::cli::{Audit, Output};
use crate::client::Client;
use crate::output::{Rows, note, print};

/// A piece of the trail, or all of it.
struct Trail {
    anchor: Anchor,
    entries: Vec<Arc<AuditEntry>>,
}

/// Reads, verifies and takes away the audit trail.
///
/// # Errors
///
/// What was refused, or files that cannot be read or written.
pub(crate) async fn run(client: &Client, output: Output, command: &Audit) -> anyhow::Result<ExitCode> {
    match command {
        Audit::List { after, who } => {
            let mut trail = fetch(client, *after).await?;
            trail.entries.retain(|entry| who.as_ref().is_none_or(|who| entry.origin.who == *who));
            print(output, &trail.entries, |wide| table(&trail.entries, wide))?;
            Ok(ExitCode::SUCCESS)
        }
        Audit::Export { file } => export(&fetch(client, 0).await?, file),
        Audit::Verify { file, contains } => {
            let trail = match file {
                Some(file) => read(file)?,
                None => fetch(client, 0).await?,
            };
            check(&trail, contains.as_deref())
        }
        Audit::Keep(keep) => {
            if let (Some(entries), Some(age)) = (keep.entries, keep.age) {
                let retention = AuditRetention { entries, age_seconds: age.as_secs() };
                client.put("/audit/retention", &retention).await?;
            }
            let kept: AuditRetention = client.get("/audit/retention").await?;
            show_retention(output, &kept, kept.entries, kept.age_seconds)
        }
    }
}

/// All entries after a revision, piece by piece.
async fn fetch(client: &Client, after: u64) -> anyhow::Result<Trail> {
    let mut trail: Option<Trail> = None;
    let mut next = after;
    loop {
        let page: AuditPage = client.get(&format!("/audit?after={next}")).await?;
        let (last, more) = (page.entries.last().map(|entry| entry.revision), page.more);
        let trail = trail.get_or_insert(Trail { anchor: page.anchor, entries: Vec::new() });
        trail.entries.extend(page.entries);
        match last.filter(|_| more) {
            Some(last) => next = last,
            None => break,
        }
    }
    Ok(trail.unwrap_or(Trail { anchor: Anchor::default(), entries: Vec::new() }))
}

/// The anchor on the first line, an entry on each line after it.
fn export(trail: &Trail, file: &Path) -> anyhow::Result<ExitCode> {
    let mut text = serde_json::to_string(&trail.anchor)? + "\n";
    for entry in &trail.entries {
        text += &serde_json::to_string(entry)?;
        text.push('\n');
    }
    if file.as_os_str() == "-" {
        crate::output::data(&text)?;
    } else {
        let mut out = std::fs::File::create_new(file)
            .with_context(|| format!("cannot make {}; it must not exist", file.display()))?;
        out.write_all(text.as_bytes()).and_then(|()| out.sync_all())?;
    }
    note(&format!("{} entries; the newest hash is {}", trail.entries.len(), head(trail)));
    Ok(ExitCode::SUCCESS)
}

fn read(file: &Path) -> anyhow::Result<Trail> {
    let open = std::fs::File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut lines = BufReader::new(open).lines();
    let first = lines.next().with_context(|| format!("{} is empty", file.display()))??;
    let anchor = serde_json::from_str(&first)
        .with_context(|| format!("{}:1: is not the anchor of an exported trail", file.display()))?;
    let mut entries = Vec::new();
    for (number, line) in (2..).zip(lines) {
        let entry = serde_json::from_str(&line?);
        entries.push(entry.with_context(|| format!("{}:{number}: is not an entry", file.display()))?);
    }
    Ok(Trail { anchor, entries })
}

fn head(trail: &Trail) -> Hash {
    trail.entries.last().map_or(trail.anchor.hash, |entry| entry.hash)
}

/// Follows the chain, and looks for a hash that was noted.
fn check(trail: &Trail, contains: Option<&str>) -> anyhow::Result<ExitCode> {
    let head = match verify(&trail.anchor, trail.entries.iter().map(AsRef::as_ref)) {
        Ok(head) => head,
        Err(broken) => bail!("the audit trail does not hold: {broken}"),
    };
    if let Some(text) = contains {
        let noted = Hash::try_from(text.to_owned()).context("--contains takes a hash of 64 digits")?;
        let known = trail.anchor.hash == noted || trail.entries.iter().any(|entry| entry.hash == noted);
        anyhow::ensure!(
            known,
            "the noted hash is not in the trail: entries have been cut off, or were dropped as too old"
        );
    }
    let (entries, dropped) = (trail.entries.len(), trail.anchor.dropped);
    crate::output::data(&format!(
        "the audit trail holds: {entries} entries, {dropped} older ones dropped; the newest hash is {head}\n"
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn table(entries: &[Arc<AuditEntry>], wide: bool) -> Rows {
    let mut heads = vec!["revision", "time", "who", "from", "action", "objects"];
    heads.extend(wide.then_some("hash"));
    let mut rows = Rows::new(heads);
    for entry in entries {
        let time = jiff::Timestamp::from_millisecond(entry.origin.at_ms);
        let objects: Vec<_> = entry.objects.iter().map(|object| object.what.as_str()).collect();
        let mut row = vec![
            entry.revision.to_string(),
            time.map(|time| time.to_string()).unwrap_or_default(),
            entry.origin.who.clone(),
            entry.origin.from.clone(),
            entry.origin.action.clone(),
            objects.join(", "),
        ];
        row.extend(wide.then(|| entry.hash.to_string()));
        rows.push(row);
    }
    rows
}

//! `apply`, `get`, `delete`, `validate`, `history`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use istiod::api::types::{ApplyReport, ApplyRequest, HistoryEntry, List, SourceFile, WaitReport};
use registry::config::{Severity, validate_set};
use serde_json::Value;

use crate::cli::{Apply, Delete, Files, Get, History, Output};
use crate::client::{Client, segment};
use crate::output::{Rows, data, note, print};

/// Checks files with the control plane's own rules.
///
/// # Errors
///
/// Files that cannot be read; mistakes in them are printed, and the exit code tells.
pub(crate) fn validate(args: &Files) -> anyhow::Result<ExitCode> {
    let files = read_all(&args.files)?;
    let mut valid = Vec::new();
    let mut mistakes = 0;
    for file in &files {
        match registry::config::parse_in(&args.namespace, &file.name, &file.text) {
            Ok((objects, warnings)) => {
                valid.extend(objects);
                warnings.iter().for_each(|warning| note(&format!("warning: {warning}")));
            }
            Err(errors) => {
                mistakes += errors.len();
                errors.iter().for_each(|error| note(&format!("error: {error}")));
            }
        }
    }
    // What is only missing here may be in the mesh; what is wrong here is wrong there too.
    let together = validate_set(&valid.iter().collect::<Vec<_>>());
    for problem in together.iter().filter(|problem| problem.severity == Severity::Error) {
        mistakes += 1;
        note(&problem.to_string());
    }
    if mistakes > 0 {
        note(&format!("{mistakes} mistake(s) in {} file(s)", files.len()));
        return Ok(ExitCode::FAILURE);
    }
    data(&format!("{} object(s) in {} file(s) are valid\n", valid.len(), files.len()))?;
    Ok(ExitCode::SUCCESS)
}

/// Commits files, all or none.
///
/// # Errors
///
/// What was refused, every mistake of every file.
pub(crate) async fn apply(client: &Client, output: Output, args: &Apply) -> anyhow::Result<ExitCode> {
    let request = ApplyRequest {
        files: read_all(&args.files.files)?,
        namespace: args.files.namespace.clone(),
        dry_run: args.dry_run,
        force: false,
        prune: None,
    };
    let report: ApplyReport = client.post("/apply", &request).await?;
    show(output, &report, args.dry_run)?;
    if args.wait && !args.dry_run {
        wait(client, report.revision, args.timeout).await
    } else {
        Ok(ExitCode::SUCCESS)
    }
}

/// Deletes one object.
///
/// # Errors
///
/// An object that is not there, or what was refused.
pub(crate) async fn delete(client: &Client, output: Output, args: &Delete) -> anyhow::Result<ExitCode> {
    let path =
        format!("/config/{}/{}/{}", segment(&args.kind), segment(&args.namespace), segment(&args.name));
    let report: ApplyReport = client.delete(&path).await?;
    show(output, &report, false)?;
    if args.wait { wait(client, report.revision, args.timeout).await } else { Ok(ExitCode::SUCCESS) }
}

/// Shows objects.
///
/// # Errors
///
/// An unknown kind, or an object that is not there.
pub(crate) async fn get(client: &Client, output: Output, args: &Get) -> anyhow::Result<ExitCode> {
    if let Some(name) = &args.name {
        let path = format!("/config/{}/{}/{}", segment(&args.kind), segment(&args.namespace), segment(name));
        let object: Value = client.get(&path).await?;
        print(output, &object, |_| table(std::slice::from_ref(&object)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let scope =
        if args.all_namespaces { String::new() } else { format!("?namespace={}", segment(&args.namespace)) };
    let list: List = client.get(&format!("/config/{}{scope}", segment(&args.kind))).await?;
    if list.items.is_empty() && matches!(output, Output::Table | Output::Wide) {
        note("no objects found");
        return Ok(ExitCode::SUCCESS);
    }
    print(output, &list, |_| table(&list.items))?;
    Ok(ExitCode::SUCCESS)
}

/// Shows who changed what.
///
/// # Errors
///
/// As every call of the API.
pub(crate) async fn history(client: &Client, output: Output, args: &History) -> anyhow::Result<ExitCode> {
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

/// Waits until every connected proxy runs `revision`, and names those that do not.
async fn wait(client: &Client, revision: u64, timeout: Duration) -> anyhow::Result<ExitCode> {
    let deadline = tokio::time::Instant::now() + timeout;
    let report: WaitReport = loop {
        // The server waits no longer than that; who is more patient asks again.
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let now = left.min(istiod::api::LONGEST_WAIT);
        let path = format!("/wait/{revision}?timeoutMilliseconds={}", now.as_millis());
        let report: WaitReport = client.get_patiently(&path, now).await?;
        let refused = |p: &istiod::api::types::PendingProxy| p.gone || !p.rejected.is_empty();
        if left == now || report.pending.iter().all(refused) {
            break report;
        }
    };
    let total = report.acknowledged.len() + report.pending.len();
    if total == 0 {
        note("warning: no proxy is connected to this member, so nobody has confirmed the change");
    }
    if report.pending.is_empty() {
        note(&format!("revision {revision} runs on {total} of {total} proxies"));
        return Ok(ExitCode::SUCCESS);
    }
    note(&format!(
        "revision {revision} runs on {} of {total} proxies; it does not run on:",
        report.acknowledged.len()
    ));
    for pending in &report.pending {
        note(&format!("  {}", pending.proxy));
        for rejection in &pending.rejected {
            note(&format!(
                "    refused {} of revision {}: {}",
                rejection.kind, rejection.revision, rejection.error
            ));
        }
        if pending.gone {
            note("    went away while it was waited for");
        } else if pending.rejected.is_empty() {
            note("    has not answered");
        }
    }
    Ok(ExitCode::FAILURE)
}

fn show(output: Output, report: &ApplyReport, dry_run: bool) -> anyhow::Result<()> {
    report.warnings.iter().for_each(|warning| note(&format!("warning: {warning}")));
    if matches!(output, Output::Json | Output::Yaml) {
        return print(output, report, |_| Rows::new([]));
    }
    let suffix = if dry_run { " (dry run)" } else { "" };
    for object in &report.objects {
        let action = format!("{:?}", object.action).to_lowercase();
        data(&format!("{} {}/{} {action}{suffix}\n", object.kind, object.namespace, object.name))?;
    }
    Ok(())
}

fn table(items: &[Value]) -> Rows {
    let text = |item: &Value, pointer: &str| {
        item.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let mut rows = Rows::new(["kind", "namespace", "name", "revision", "created"]);
    for item in items {
        rows.push([
            text(item, "/kind"),
            text(item, "/metadata/namespace"),
            text(item, "/metadata/name"),
            text(item, "/metadata/resourceVersion"),
            text(item, "/metadata/creationTimestamp"),
        ]);
    }
    rows
}

/// Reads files, folders (their `.yaml`, `.yml` and `.json` files, in the order of their names) and `-`.
fn read_all(paths: &[PathBuf]) -> anyhow::Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
            files.push(SourceFile { name: "-".to_owned(), text });
        } else if path.is_dir() {
            read_folder(path, &mut files)?;
        } else {
            files.push(read_file(path)?);
        }
    }
    Ok(files)
}

fn read_folder(folder: &Path, files: &mut Vec<SourceFile>) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    let before = files.len();
    for path in paths {
        let known = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        if path.is_file() && known {
            files.push(read_file(&path)?);
        }
    }
    anyhow::ensure!(files.len() > before, "{} has no .yaml, .yml or .json file", folder.display());
    Ok(())
}

fn read_file(path: &Path) -> anyhow::Result<SourceFile> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(SourceFile { name: path.display().to_string(), text })
}

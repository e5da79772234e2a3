//! `apply`, `get`, `delete`, `validate`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use istiod::api::preview::PreviewReport;
use istiod::api::types::{ApplyReport, ApplyRequest, List, Prune, SourceFile, WaitReport};
use registry::config::{Severity, validate_set};
use serde_json::Value;

use crate::cli::{Apply, Delete, DryRun, Files, Get, Output};
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
    let prune = match (&args.applied_set, &args.selector) {
        (Some(set), _) => Some(Prune::Set(set.clone())),
        (None, Some(selector)) => Some(Prune::Selector(selector.clone())),
        (None, None) => None,
    };
    let request = ApplyRequest {
        files: read_all(&args.files.files)?,
        namespace: args.files.namespace.clone(),
        dry_run: false,
        force: false,
        prune,
    };
    let path = format!("/apply?{}", changing(args.dry_run, args.force));
    let report: ApplyReport = client.post(&path, &request).await?;
    finish(client, output, &report, args.dry_run, args.wait.then_some(args.timeout)).await
}

/// What follows the question mark of a change.
pub(super) fn changing(dry_run: Option<DryRun>, force: bool) -> String {
    let dry_run = dry_run.map(|dry_run| match dry_run {
        DryRun::All => "&dryRun=all",
        DryRun::Preview => "&dryRun=preview",
    });
    format!("force={force}{}", dry_run.unwrap_or_default())
}

/// Shows what a change did or would do, and waits for proxies if that is asked for.
pub(super) async fn finish(
    client: &Client,
    output: Output,
    report: &ApplyReport,
    dry_run: Option<DryRun>,
    wait_for: Option<Duration>,
) -> anyhow::Result<ExitCode> {
    show(output, report, dry_run.is_some())?;
    match wait_for.filter(|_| dry_run.is_none()) {
        Some(timeout) => wait(client, report.revision, timeout).await,
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Deletes one object.
///
/// # Errors
///
/// An object that is not there, or what was refused.
pub(crate) async fn delete(client: &Client, output: Output, args: &Delete) -> anyhow::Result<ExitCode> {
    let object = [&args.kind, &args.namespace, &args.name].map(|part| segment(part)).join("/");
    let path = format!("/config/{object}?{}", changing(args.dry_run, args.force));
    let report: ApplyReport = client.delete(&path).await?;
    finish(client, output, &report, args.dry_run, args.wait.then_some(args.timeout)).await
}

/// Shows objects.
///
/// # Errors
///
/// An unknown kind, or an object that is not there.
pub(crate) async fn get(client: &Client, output: Output, args: &Get) -> anyhow::Result<ExitCode> {
    let then = args.at.map(|revision| format!("/history/{revision}")).unwrap_or_default();
    if let Some(name) = &args.name {
        let path =
            format!("{then}/config/{}/{}/{}", segment(&args.kind), segment(&args.namespace), segment(name));
        let object: Value = client.get(&path).await?;
        print(output, &object, |_| table(std::slice::from_ref(&object)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let scope =
        if args.all_namespaces { String::new() } else { format!("?namespace={}", segment(&args.namespace)) };
    let list: List = client.get(&format!("{then}/config/{}{scope}", segment(&args.kind))).await?;
    if list.items.is_empty() && matches!(output, Output::Table | Output::Wide) {
        note("no objects found");
        return Ok(ExitCode::SUCCESS);
    }
    print(output, &list, |_| table(&list.items))?;
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
        note("warning: no proxy is connected, so nobody has confirmed the change");
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
    report.preview.as_ref().map_or(Ok(()), show_preview)
}

/// Which proxies and resources would change, and how.
fn show_preview(preview: &PreviewReport) -> anyhow::Result<()> {
    let (touched, of) = (preview.proxies.len() + preview.hidden, preview.connected);
    data(&format!("\n{touched} of {of} proxies would be sent {} bytes\n", preview.bytes))?;
    if preview.partial {
        note("warning: a member of the control plane did not answer; its proxies were not looked at");
    }
    if preview.hidden > 0 {
        note(&format!("{} of them are in namespaces that you may not see", preview.hidden));
    }
    if !preview.proxies.is_empty() {
        let mut rows = Rows::new(["proxy", "added", "changed", "removed", "sent again", "bytes"]);
        for proxy in &preview.proxies {
            let numbers = [proxy.added, proxy.changed, proxy.removed, proxy.resent].map(|n| n.to_string());
            let [added, changed, removed, resent] = numbers;
            let name = format!("{}.{}", proxy.name, proxy.namespace);
            rows.push([name, added, changed, removed, resent, proxy.bytes.to_string()]);
        }
        data(&rows.render())?;
    }
    for resource in &preview.resources {
        let change = format!("{:?}", resource.change).to_lowercase();
        let (kind, name, proxies) = (&resource.kind, &resource.name, resource.proxies.len());
        data(&format!("\n{change} {kind} {name} on {proxies} proxies\n"))?;
        data(resource.diff.as_deref().unwrap_or_default())?;
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

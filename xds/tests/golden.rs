//! Meshes and what one proxy is told about them: `tests/golden/*.yaml`.
//!
//! A file holds `proxy` (the node it sends), `mesh` (`MeshConfig`, optional), `objects` (in order of creation), and
//! `expect`: from `<type> <resource name> <JSON pointer>` to the value there, `null` when there is none; `<type> *` is
//! the list of all names of a type. `UPDATE=1` rewrites the values; `GOLDEN_BOOTSTRAPS=DIR` writes each file's
//! resources there as an Envoy bootstrap, for `envoy --mode validate`.

#[path = "golden/support.rs"]
mod support;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use support::{mesh, proxy, resources_as_json};

#[test]
fn every_golden_file_holds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder of golden files")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    assert!(files.len() >= 25, "only {} golden files", files.len());
    let update = support::update();
    let failures: Vec<String> = files.iter().flat_map(|file| check(file, update)).collect();
    assert!(failures.is_empty(), "\n{}\nUPDATE=1 rewrites what is expected", failures.join("\n"));
}

fn check(file: &Path, update: bool) -> Vec<String> {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let text = std::fs::read_to_string(file).expect("a readable file");
    let document: Map<String, Value> =
        serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
    let expected = document.get("expect").and_then(Value::as_object).cloned().unwrap_or_default();
    let found = translated(&document);
    support::write_bootstrap(&name, &found);
    let mut failures = Vec::new();
    let mut now = Map::new();
    for (key, wanted) in expected {
        let value = look_up(&found, &key);
        if value != wanted {
            failures.push(format!("{name}: {key}\n  expected {wanted}\n  found    {value}"));
        }
        now.insert(key, value);
    }
    if update && !failures.is_empty() {
        rewrite(file, &text, &now);
        return Vec::new();
    }
    failures
}

fn translated(document: &Map<String, Value>) -> Value {
    let objects = document.get("objects").and_then(Value::as_array).cloned().unwrap_or_default();
    let snapshot = mesh(document.get("mesh"), &objects);
    let proxy = proxy(document.get("proxy").unwrap_or(&Value::Null));
    resources_as_json(&xds::translate::translate(&snapshot, &proxy))
}

fn look_up(found: &Value, key: &str) -> Value {
    let mut parts = key.splitn(3, ' ');
    let of_type = found.get(parts.next().unwrap_or_default()).unwrap_or(&Value::Null);
    let name = parts.next().unwrap_or_default();
    if name == "*" {
        return of_type.as_object().map_or(Value::Null, |all| json!(all.keys().collect::<Vec<_>>()));
    }
    let resource = of_type.get(name).unwrap_or(&Value::Null);
    resource.pointer(parts.next().unwrap_or_default()).cloned().unwrap_or_default()
}

/// Keeps everything before `expect:`, comments included.
fn rewrite(file: &Path, text: &str, now: &Map<String, Value>) {
    let kept = text.split("\nexpect:").next().unwrap_or_default();
    let mut out = format!("{kept}\nexpect:\n");
    for (key, value) in now {
        let short = value.to_string();
        let shown = if short.len() > 100 {
            let pretty = serde_json::to_string_pretty(value).expect("JSON");
            format!("\n    {}", pretty.replace('\n', "\n    "))
        } else {
            format!(" {short}")
        };
        writeln!(out, "  {}:{shown}", json!(key)).expect("a string takes everything");
    }
    std::fs::write(file, out).expect("a writable file");
}

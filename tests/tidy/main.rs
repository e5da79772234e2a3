//! House rules that no lint can hold.
#![expect(clippy::unwrap_used, reason = "a rule that cannot be looked at has failed")]

mod cases;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Which of our crates a crate may use. `wire` is the wire itself, so both sides may.
const ARROWS: [(&str, &[&str]); 10] = [
    ("ca", &[]),
    ("registry", &["ca"]),
    ("wire", &[]),
    ("xds", &["ca", "registry", "wire"]),
    ("istiod", &["ca", "registry", "wire", "xds"]),
    ("proxy", &["ca", "wire"]),
    ("agent", &["ca", "proxy", "wire"]),
    ("istioctl", &["ca", "registry", "wire", "xds", "istiod", "agent", "proxy"]),
    ("tests", &["ca", "registry", "wire", "xds", "istiod", "agent", "proxy"]),
    ("fuzz", &["ca", "registry", "wire", "xds", "istiod", "agent", "proxy"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every file below the crates, in the order of its path.
fn files(extension: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") && !path.ends_with(".git") {
                walk(&path, extension, found);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), extension, &mut found);
    found.sort();
    found
}

fn manifests() -> BTreeMap<String, (PathBuf, String)> {
    let named = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let name = text.lines().find_map(|l| l.strip_prefix("name = \""))?.trim_end_matches('"').to_owned();
        text.starts_with("[package]").then_some((name, (path, text)))
    };
    files("toml").into_iter().filter(|p| p.ends_with("Cargo.toml")).filter_map(named).collect()
}

#[test]
fn arrows_between_crates_go_only_down() {
    let manifests = manifests();
    let names: BTreeSet<&str> = ARROWS.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        manifests.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        names,
        "every crate has its line in ARROWS"
    );
    for (name, allowed) in ARROWS {
        let (path, text) = &manifests[name];
        let used: BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.split(['.', ' ', '=']).next())
            .filter(|dependency| names.contains(dependency))
            .collect();
        let forbidden: Vec<_> = used.iter().filter(|used| !allowed.contains(*used)).collect();
        assert!(forbidden.is_empty(), "{}: {name} may not use {forbidden:?}", path.display());
    }
}

#[test]
fn every_crate_takes_the_workspace_lints() {
    for (path, text) in manifests().into_values() {
        assert!(text.contains("[lints]\nworkspace = true"), "{}: no workspace lints", path.display());
    }
}

#[test]
fn no_test_sleeps_or_is_ignored() {
    let sleeps = ["thread::sle", "time::sle"].map(|start| format!("{start}ep("));
    for path in files("rs") {
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains(&format!("#[{}]", "ignore")), "{}: an ignored test", path.display());
        let in_tests = path.components().any(|c| c.as_os_str() == "tests");
        let tests = if in_tests {
            text.as_str()
        } else {
            text.split_once("#[cfg(test)]").map_or("", |(_, tests)| tests)
        };
        for (number, line) in tests.lines().enumerate().filter(|(_, l)| sleeps.iter().any(|s| l.contains(s)))
        {
            let before = || tests.lines().take(number).collect::<Vec<_>>().into_iter().rev();
            let paced = before().next().is_some_and(|l| l.contains("paced:"));
            // Virtual time passes at once.
            let virtual_time =
                before().find(|l| l.contains("tokio::test")).is_some_and(|l| l.contains("start_paused"));
            let allowed = line.contains("eventually") || paced || virtual_time;
            assert!(allowed, "{}: a sleep in a test: {}", path.display(), line.trim());
        }
    }
}

#[test]
fn files_hold_one_subject() {
    // Tables of independent entries may be long; what is listed here says so.
    let tables: [&str; 0] = [];
    for path in files("rs") {
        let relative = path.strip_prefix(root()).unwrap().display().to_string();
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap().lines().count();
        let test = relative.contains("/tests/") || relative.starts_with("tests/");
        assert!(
            code <= 600 || test || tables.contains(&relative.as_str()),
            "{relative}: {code} lines before its tests"
        );
    }
}

#[test]
fn no_type_is_named_after_nothing() {
    let banned = ["Manager", "Helper", "Handler", "Processor", "Util", "Utils"];
    // The field's own words.
    let known = ["HttpConnectionManager"];
    for path in files("rs") {
        let text = fs::read_to_string(&path).unwrap();
        for line in text.lines().map(str::trim_start) {
            let Some(rest) = ["pub struct ", "pub(crate) struct ", "struct ", "pub enum ", "pub trait "]
                .iter()
                .find_map(|p| line.strip_prefix(p))
            else {
                continue;
            };
            let name = rest.split(|c: char| !c.is_alphanumeric()).next().unwrap();
            let nothing = banned.iter().any(|b| name.ends_with(b)) && !known.contains(&name);
            assert!(!nothing, "{}: {name}", path.display());
        }
    }
}

#[test]
fn every_invariant_in_the_architecture_names_a_test_that_exists() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let section =
        text.split("## Invariants").nth(1).expect("a section on invariants").split("\n## ").next().unwrap();
    let sources: Vec<String> = files("rs").iter().map(|p| fs::read_to_string(p).unwrap()).collect();
    let mut named = 0;
    for test in section.split('`').filter(|word| {
        word.contains('_') && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    }) {
        named += 1;
        let definition = format!("fn {test}(");
        assert!(
            sources.iter().any(|s| s.contains(&definition)),
            "ARCHITECTURE.md names `{test}`, which is no test"
        );
    }
    assert!(named >= 10, "only {named} invariants name their test");
}

#[test]
fn the_readme_has_its_two_commands() {
    let text = fs::read_to_string(root().join("README.md")).unwrap();
    for command in ["cargo run --release -p istioctl -- demo", "tests/run"] {
        assert!(text.contains(command), "README.md lacks `{command}`");
    }
    let ci = fs::read_to_string(root().join(".ci/run")).unwrap();
    assert!(ci.contains("tests/run"), ".ci/run does not run the tests");
}

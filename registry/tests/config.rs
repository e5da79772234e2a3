//! Configuration texts: every bad document is refused at the right place, every good one comes back unchanged.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use registry::config::node::Node;
use registry::config::{Object, parse, validate_set, yaml};

fn documents(folder: &str) -> Vec<(PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config").join(folder);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// Says what is wrong with the answer to a bad document; its first line says what is expected.
fn judge(file: &str, text: &str) -> Result<(), String> {
    let expected =
        text.lines().next().and_then(|line| line.strip_prefix("# expect: ")).ok_or("no # expect:")?;
    let Err(errors) = parse(file, text) else { return Err(format!("accepted; expected {expected}")) };
    let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
    let (place, rest) = expected.split_once(' ').ok_or("no place")?;
    let (path, fragment) = rest.split_once(": ").unwrap_or((rest, ""));
    let path = path.trim_end_matches(':');
    let [only] = errors.as_slice() else {
        return Err(format!("{} errors, expected one:\n{}", errors.len(), told.join("\n")));
    };
    let at = format!("{}:{}", only.line, only.column);
    if at != place || only.path != path || !only.message.contains(fragment) {
        return Err(format!("expected {expected}\n     got {}", told.join("\n")));
    }
    Ok(())
}

#[test]
fn every_bad_document_is_refused_with_line_field_and_reason() {
    let all = documents("bad");
    let mut wrong = Vec::new();
    for (path, text) in &all {
        let file = path.file_name().unwrap().to_string_lossy();
        if let Err(why) = judge(&file, text) {
            wrong.push(format!("{file}: {why}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} are judged wrong:\n{}", wrong.len(), all.len(), wrong.join("\n\n"));
    assert!(all.len() >= 120, "only {} documents", all.len());
    println!("{} bad documents refused, each with one error at its place", all.len());
}

/// What the text says, apart from the places: documents as JSON, lists flattened.
fn written(text: &str) -> Vec<serde_json::Value> {
    let (documents, errors) = yaml::read(text);
    assert_eq!(errors, []);
    let mut out = Vec::new();
    for document in documents.iter().filter(|document| !document.is_null()).map(Node::to_json) {
        match document.get("items").and_then(serde_json::Value::as_array) {
            Some(items) => out.extend(items.clone()),
            None => out.push(document),
        }
    }
    out
}

#[test]
fn every_good_document_is_accepted_and_comes_back_unchanged() {
    let mut count = 0;
    let mut kinds = std::collections::BTreeSet::new();
    for (path, text) in &documents("good") {
        let file = path.file_name().unwrap().to_string_lossy();
        let (objects, _) = parse(&file, text).unwrap_or_else(|errors| {
            let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
            panic!("refused:\n{}", told.join("\n"))
        });
        assert!(!objects.is_empty(), "{file}: no objects");
        for (object, written) in objects.iter().zip(written(text)) {
            count += 1;
            kinds.insert((object.kind, object.api_version.clone()));
            if object.kind.as_str() == written["kind"] {
                assert_eq!(
                    object.raw,
                    written.get("spec").cloned().unwrap_or(serde_json::json!({})),
                    "{file}"
                );
                assert_eq!(object.api_version, written["apiVersion"], "{file}");
            }
            round_trip(&file, object);
        }
    }
    for kind in registry::config::Kind::ALL {
        for version in kind.versions() {
            let version = format!("{}/{version}", kind.group());
            assert!(kinds.contains(&(*kind, version.clone())), "no good document of {kind} {version}");
        }
    }
    assert!(count >= 60, "only {count} documents");
    println!("{count} good documents accepted and unchanged");
}

fn round_trip(file: &str, object: &Object) {
    let json = object.to_json();
    assert_eq!(&Object::from_stored(&json).unwrap(), object, "{file}: through the store");
    let text = serde_json::to_string_pretty(&json).unwrap();
    let (again, _) = parse(file, &text).unwrap_or_else(|errors| panic!("{file} as JSON: {errors:?}"));
    assert_eq!(again.as_slice(), std::slice::from_ref(object), "{file}: through JSON");
}

#[test]
fn all_mistakes_of_a_file_are_told_together_in_order() {
    let text = "\
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: Reviews
spec:
  hosts: [reviews, reviews]
  htpp: []
  http:
  - timeout: soon
    route:
    - destination: {host: reviews, port: {number: 99999}}
      weight: -3
    retries: {attempts: two}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict}
spec:
  mtls: {mode: HARD}
";
    let errors = parse("mesh/all.yaml", text).unwrap_err();
    let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
    let expected = [
        "mesh/all.yaml:4:9: metadata.name: must have 1 to 253",
        "mesh/all.yaml:6:20: spec.hosts[1]: the host reviews is there twice",
        "mesh/all.yaml:7:3: spec.htpp: unknown field; did you mean http?",
        "mesh/all.yaml:9:14: spec.http[0].timeout: must be a duration",
        "mesh/all.yaml:11:51: spec.http[0].route[0].destination.port.number: must be a port number, 1 to 65535, found the number 99999",
        "mesh/all.yaml:12:15: spec.http[0].route[0].weight: must not be negative",
        "mesh/all.yaml:13:25: spec.http[0].retries.attempts: must be a whole number",
        "mesh/all.yaml:19:16: spec.mtls.mode: must be one of UNSET, DISABLE, PERMISSIVE, STRICT, found the string \"HARD\"",
    ];
    assert_eq!(told.len(), expected.len(), "{}", told.join("\n"));
    for (told, expected) in told.iter().zip(expected) {
        assert!(told.starts_with(expected), "\n{told}\n{expected}");
    }
}

#[track_caller]
fn check_warning(text: &str, expected: &str) {
    let (_, warnings) = parse("w.yaml", text).unwrap();
    let told: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    assert!(told.iter().any(|warning| warning.starts_with(expected)), "{told:?}\n{expected}");
}

#[test]
fn what_istio_warns_about_is_a_warning() {
    let head = "apiVersion: networking.istio.io/v1\nmetadata: {name: a}\n";
    let vs = |spec: &str| format!("{head}kind: VirtualService\nspec:\n  hosts: [a]\n  http:\n{spec}");
    check_warning(
        &vs("  - route: [{destination: {host: a}}]\n  - route: [{destination: {host: b}}]\n"),
        "w.yaml:8:5: spec.http[1]: is never reached: http[0] matches every request",
    );
    check_warning(
        &vs("  - mirrorPercent: 5\n    mirror: {host: b}\n    route: [{destination: {host: a}}]\n"),
        "w.yaml:7:5: spec.http[0].mirrorPercent: is deprecated; use mirrorPercentage",
    );
    check_warning(
        &format!(
            "{head}kind: DestinationRule\nspec: {{host: a, trafficPolicy: {{tls: {{mode: SIMPLE, credentialName: c}}}}}}\n"
        ),
        "w.yaml:4:69: spec.trafficPolicy.tls.credentialName: has an effect on sidecars only",
    );
    let twice = format!(
        "{head}kind: DestinationRule\nspec: {{host: a}}\n---\n{head}kind: DestinationRule\nspec: {{host: b}}\n"
    );
    check_warning(&twice, "w.yaml:6:1: metadata.name: DestinationRule/default/a is there twice");
}

#[track_caller]
fn check_set(text: &str, expected: &[&str]) {
    let (objects, _) = parse("set.yaml", text).unwrap();
    let objects: Vec<&Object> = objects.iter().collect();
    let told: Vec<String> = validate_set(&objects).iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (told, expected) in told.iter().zip(expected) {
        assert!(told.starts_with(expected), "\n{told}\n{expected}");
    }
}

fn object(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    let group = if kind.contains("Auth") { "security" } else { "networking" };
    format!(
        "---\napiVersion: {group}.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

#[test]
fn what_one_object_names_and_another_does_not_have_is_told() {
    let to_v2 = object(
        "VirtualService",
        "default",
        "reviews",
        "{hosts: [reviews], http: [{route: [{destination: {host: reviews, subset: v2}}]}]}",
    );
    let rule = |subset: &str| {
        object(
            "DestinationRule",
            "default",
            "reviews",
            &format!("{{host: reviews, subsets: [{{name: {subset}, labels: {{version: x}}}}]}}"),
        )
    };
    check_set(&format!("{to_v2}{}", rule("v2")), &[]);
    check_set(
        &format!("{to_v2}{}", rule("v1")),
        &[
            "warning: VirtualService/default/reviews: spec.http[0].route[0].destination.subset: no subset v2 in DestinationRule/default/reviews; it has: v1",
        ],
    );
    check_set(
        &to_v2,
        &[
            "warning: VirtualService/default/reviews: spec.http[0].route[0].destination.subset: no DestinationRule for reviews.default.svc.cluster.local",
        ],
    );

    let at_gateway = object(
        "VirtualService",
        "web",
        "shop",
        "{hosts: [shop.example.com], gateways: [edge/main], http: [{route: [{destination: {host: shop}}]}]}",
    );
    let gateway = |host: &str| {
        object(
            "Gateway",
            "edge",
            "main",
            &format!(
                "{{selector: {{istio: gw}}, servers: [{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: ['{host}']}}]}}"
            ),
        )
    };
    check_set(&format!("{at_gateway}{}", gateway("web/*.example.com")), &[]);
    check_set(&at_gateway, &["warning: VirtualService/web/shop: spec.gateways[0]: no Gateway edge/main"]);
    check_set(
        &format!("{at_gateway}{}", gateway("other/*.example.com")),
        &["warning: VirtualService/web/shop: spec.hosts[0]: no server of Gateway/edge/main has this host"],
    );
}

#[test]
fn objects_that_compete_are_told() {
    let route = |name: &str| {
        object("VirtualService", "default", name, "{hosts: [a], http: [{route: [{destination: {host: a}}]}]}")
    };
    check_set(
        &format!("{}{}", route("first"), route("second")),
        &[
            "warning: VirtualService/default/second: spec.hosts[0]: VirtualService/default/first has routes for a.default.svc.cluster.local",
        ],
    );
    let sidecar = |name: &str| object("Sidecar", "default", name, "{egress: [{hosts: ['./*']}]}");
    check_set(
        &format!("{}{}", sidecar("a"), sidecar("b")),
        &["warning: Sidecar/default/b: spec: Sidecar/default/a is for the whole namespace already"],
    );
    check_set(
        &object(
            "PeerAuthentication",
            "istio-system",
            "a",
            "{selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}}",
        ),
        &["warning: PeerAuthentication/istio-system/a: spec.selector: has no effect in the root namespace"],
    );
}

#[test]
fn routes_for_a_host_of_another_namespace_are_told_unless_they_are_kept_to_oneself() {
    let route = |host: &str, rest: &str| {
        object(
            "VirtualService",
            "shop",
            "r",
            &format!("{{hosts: ['{host}'], http: [{{route: [{{destination: {{host: a}}}}]}}]{rest}}}"),
        )
    };
    let theirs = "pay.bank.svc.cluster.local";
    check_set(
        &route(theirs, ""),
        &[
            "warning: VirtualService/shop/r: spec.hosts[0]: pay.bank.svc.cluster.local belongs to namespace bank",
        ],
    );
    check_set(&route(theirs, ", exportTo: ['.']"), &[]);
    check_set(&route("pay.shop.svc.cluster.local", ""), &[]);
    check_set(&route("pay", ""), &[]);
    check_set(&route("api.example.com", ""), &[]);
}

#[test]
fn an_issuer_without_known_keys_is_told() {
    let text =
        object("RequestAuthentication", "shop", "r", "{jwtRules: [{issuer: a, jwksUri: 'https://a/k'}]}");
    let (_, warnings) = registry::config::parse("f", &text).unwrap();
    assert!(warnings.iter().any(|w| w.to_string().contains("jwksUri is not fetched yet")), "{warnings:?}");
}

#[test]
fn delegates_are_checked_over_objects() {
    let root = object(
        "VirtualService",
        "default",
        "root",
        "{hosts: [a.b], http: [{delegate: {name: child, namespace: team}}]}",
    );
    let child = |spec: &str| object("VirtualService", "team", "child", spec);
    check_set(&format!("{root}{}", child("{http: [{route: [{destination: {host: a}}]}]}")), &[]);
    check_set(
        &root,
        &["warning: VirtualService/default/root: spec.http[0].delegate: no VirtualService team/child"],
    );
    check_set(
        &format!("{root}{}", child("{hosts: [c.d], http: [{route: [{destination: {host: a}}]}]}")),
        &["error: VirtualService/default/root: spec.http[0].delegate: VirtualService/team/child has hosts"],
    );
}

#[test]
fn an_empty_text_has_no_objects() {
    for text in ["", "\n", "---\n---\n", "# only a comment\n"] {
        assert_eq!(parse("a.yaml", text).unwrap().0, [], "{text:?}");
    }
}

#[test]
fn large_and_deep_texts_are_refused_quickly() {
    let deep = format!("a: {}", "{a: ".repeat(5000));
    assert!(parse("deep.yaml", &deep).is_err());
    let deep_block: String = (0..300).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
    assert!(parse("deep.yaml", &deep_block).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _answer = parse("a.yaml", &String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn arbitrary_yaml_like_text_never_panics(text in "[-:?{}\\[\\],&*!|>'\"%@`# \n\ta-c0-9.<~]{0,120}") {
        let _answer = parse("a.yaml", &text);
    }

    #[test]
    fn good_documents_with_a_changed_byte_never_panic(
        pick in any::<proptest::sample::Index>(),
        at in any::<proptest::sample::Index>(),
        byte in "[-:{}\\[\\],&*!'\"\n ax0~]",
    ) {
        let all = GOOD.get_or_init(|| documents("good"));
        let (_, text) = &all[pick.index(all.len())];
        let mut chars: Vec<char> = text.chars().collect();
        let at = at.index(chars.len());
        chars[at] = byte.chars().next().unwrap();
        let _answer = parse("a.yaml", &chars.into_iter().collect::<String>());
    }
}

static GOOD: std::sync::OnceLock<Vec<(PathBuf, String)>> = std::sync::OnceLock::new();

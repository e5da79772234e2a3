//! A scenario: the settings of a connection manager and its routes, from a seed. Pure.
//!
//! The words are few, so that hosts, paths and headers of requests come near those of the rules. What chance would
//! decide in the proxies (shares of requests, jitter) is left out.

use serde_json::{Map, Value, json};

use super::action::{action, retries};
use super::dice::Dice;
use super::filters::{cors, fault};

/// Clusters with a server.
pub(crate) const SERVED: [&str; 4] = ["one", "two", "three", HTTP2];
/// The one that speaks HTTP/2.
pub(crate) const HTTP2: &str = "four";
/// The cluster whose server never answers.
pub(crate) const SILENT: &str = "silent";
/// The cluster that gets copies.
pub(crate) const COPIES: &str = "copies";
/// Hosts that domains and requests are made of.
const HOSTS: [&str; 8] =
    ["a.example", "b.example", "x.a.example", "y.x.a.example", "example", "a.b", "a-b.example", "10.0.0.1"];
/// Headers that rules look at and write.
pub(crate) const NAMES: [&str; 8] =
    ["x-a", "x-b", "x-c", "X-D", "user-agent", "cookie", "accept", "x-forwarded-host"];
/// Values of headers.
pub(crate) const VALUES: [&str; 12] =
    ["one", "two", "One", "one,two", "", "5", "-3", "05", "a=1; b=2", "on", "the end", "v1.2"];
/// Parameters of queries.
pub(crate) const PARAMETERS: [&str; 4] = ["q", "v", "Q", "long-name"];
const PATHS: [&str; 12] = [
    "/",
    "/a",
    "/a/",
    "/a/b",
    "/ab",
    "/api",
    "/api/v1",
    "/api/v1/",
    "/A/b",
    "/a.b",
    "/static/x.css",
    "/a%20b",
];
const EXPRESSIONS: [(&str, &str); 9] = [
    ("/a/[^/]+", "/a/bc"),
    ("/(a|api)/v[0-9]+", "/api/v12"),
    (".*", "/any"),
    (".*b", "/a/b"),
    ("/a(/.*)?", "/a/x/y"),
    ("(?i)/API/.*", "/api/x"),
    ("/[a-z]{2,3}/?", "/abc"),
    ("/a\\.b", "/a.b"),
    ("/api/v1", "/api/v1"),
];

/// What a request must look like to come near a route.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hint {
    pub(crate) host: String,
    pub(crate) path: String,
    pub(crate) method: Option<&'static str>,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) query: Vec<(String, String)>,
}

/// A connection manager and its routes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scenario {
    /// Fields of the connection manager besides its routes and logs.
    pub(crate) manager: Map<String, Value>,
    /// The route configuration.
    pub(crate) routes: Value,
    /// One for each route.
    pub(crate) hints: Vec<Hint>,
}

impl Scenario {
    /// The scenario of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let manager = manager(&mut dice);
        let mut hints = Vec::new();
        let mut domains = Domains::default();
        let mut hosts = Vec::new();
        for number in 0..dice.from(1..5) {
            if let Some(host) = virtual_host(&mut dice, number, &mut domains, &mut hints) {
                hosts.push(host);
            }
        }
        // Unknown clusters are part of what is compared.
        let mut routes = json!({"name": "r", "validate_clusters": false, "virtual_hosts": hosts});
        operations(&mut dice, &mut routes, 4);
        flags(
            &mut dice,
            &mut routes,
            &["most_specific_header_mutations_wins", "ignore_port_in_host_matching"],
            4,
        );
        Self { manager, routes, hints }
    }

    /// Whether names of headers with `_` are refused.
    pub(crate) fn refuses_underscores(&self) -> bool {
        let options = self.manager.get("common_http_protocol_options");
        options.is_some_and(|o| o["headers_with_underscores_action"] == json!("REJECT_REQUEST"))
    }

    /// Whether a switch of the connection manager is on.
    pub(crate) fn is_on(&self, switch: &str) -> bool {
        self.manager.get(switch) == Some(&json!(true))
    }
}

/// Sets some of these.
pub(crate) fn flags(dice: &mut Dice, on: &mut Value, names: &[&str], one_in: u32) {
    for name in names {
        if dice.one_in(one_in) {
            on[*name] = json!(true);
        }
    }
}

fn manager(dice: &mut Dice) -> Map<String, Value> {
    let mut hcm = json!({});
    flags(dice, &mut hcm, &["merge_slashes", "strip_matching_host_port", "skip_xff_append"], 4);
    flags(dice, &mut hcm, &["always_set_request_id_in_response", "append_x_forwarded_port"], 5);
    flags(dice, &mut hcm, &["preserve_external_request_id", "use_remote_address"], 4);
    if dice.one_in(8) {
        hcm["strip_any_host_port"] = json!(true);
        hcm["strip_matching_host_port"] = json!(false);
    }
    if !dice.one_in(3) {
        hcm["normalize_path"] = json!(!dice.one_in(5));
    }
    if dice.one_in(3) {
        let actions = ["KEEP_UNCHANGED", "REJECT_REQUEST", "UNESCAPE_AND_FORWARD", "UNESCAPE_AND_REDIRECT"];
        hcm["path_with_escaped_slashes_action"] = json!(dice.pick(&actions));
    }
    if dice.one_in(4) {
        let action = dice.pick(&["REJECT_REQUEST", "DROP_HEADER"]);
        hcm["common_http_protocol_options"] = json!({"headers_with_underscores_action": action});
    }
    if dice.one_in(4) {
        hcm["server_header_transformation"] = json!(dice.pick(&["APPEND_IF_ABSENT", "PASS_THROUGH"]));
    }
    for (name, value) in [("via", "proxy"), ("server_name", "mesh")] {
        if dice.one_in(5) {
            hcm[name] = json!(value);
        }
    }
    if dice.one_in(5) {
        hcm["xff_num_trusted_hops"] = json!(1);
    }
    if dice.one_in(6) {
        hcm["scheme_header_transformation"] = json!({"scheme_to_overwrite": dice.pick(&["http", "https"])});
    }
    let mut router = json!({"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"});
    flags(dice, &mut router, &["suppress_envoy_headers"], 3);
    hcm["http_filters"] = json!([
        {"name": "envoy.filters.http.fault", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"}},
        {"name": "envoy.filters.http.cors", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors"}},
        {"name": "envoy.filters.http.router", "typed_config": router},
    ]);
    hcm.as_object().cloned().unwrap_or_default()
}

/// No domain may be in two virtual hosts.
#[derive(Default)]
struct Domains(Vec<String>);

impl Domains {
    /// A domain that is not taken yet, and a host that it is for.
    fn next(&mut self, dice: &mut Dice) -> Option<(String, String)> {
        let host = *dice.pick(&HOSTS);
        let (domain, host) = match dice.from(0..10) {
            0 => ("*".to_owned(), host.to_owned()),
            1 => ("*.example".to_owned(), "a.example".to_owned()),
            2 => ("*.a.example".to_owned(), "x.a.example".to_owned()),
            3 => ("*-b.example".to_owned(), "a-b.example".to_owned()),
            4 => ("a.*".to_owned(), "a.b".to_owned()),
            5 => ("x.a.*".to_owned(), "x.a.example".to_owned()),
            6 => (format!("{host}:8080"), format!("{host}:8080")),
            7 => (host.to_ascii_uppercase(), host.to_owned()),
            _ => (host.to_owned(), host.to_owned()),
        };
        let lower = domain.to_ascii_lowercase();
        if self.0.contains(&lower) {
            return None;
        }
        self.0.push(lower);
        Some((domain, host))
    }
}

fn virtual_host(dice: &mut Dice, number: usize, taken: &mut Domains, hints: &mut Vec<Hint>) -> Option<Value> {
    let domains: Vec<(String, String)> = (0..dice.from(1..4)).filter_map(|_| taken.next(dice)).collect();
    let (_, host) = domains.first()?;
    let mut routes = Vec::new();
    for at in 0..dice.from(1..7) {
        let mut hint = Hint { host: host.clone(), ..Hint::default() };
        routes.push(route(dice, &format!("h{number}r{at}"), &mut hint));
        hints.push(hint);
    }
    if dice.one_in(2) {
        let mut hint = Hint { host: host.clone(), path: "/".to_owned(), ..Hint::default() };
        let action = action(dice, &mut hint);
        routes.push(named(format!("h{number}rest"), json!({"prefix": "/"}), action));
        hints.push(hint);
    }
    let domains: Vec<&String> = domains.iter().map(|(domain, _)| domain).collect();
    let mut host = json!({"name": format!("h{number}"), "domains": domains, "routes": routes});
    operations(dice, &mut host, 3);
    flags(dice, &mut host, &["include_request_attempt_count", "include_attempt_count_in_response"], 4);
    if dice.one_in(8) {
        host["require_tls"] = json!("ALL");
    }
    if dice.one_in(8) {
        host["retry_policy"] = retries(dice);
    }
    if dice.one_in(6) {
        host["typed_per_filter_config"] = cors(dice);
    }
    Some(host)
}

fn named(name: String, wanted: Value, (kind, action): (&str, Value)) -> Value {
    let mut route = json!({"name": name, "match": wanted});
    route[kind] = action;
    route
}

fn route(dice: &mut Dice, name: &str, hint: &mut Hint) -> Value {
    let mut wanted = path_match(dice, hint);
    if dice.one_in(3) {
        let headers: Vec<Value> = (0..dice.from(1..3)).map(|_| header_match(dice, hint)).collect();
        wanted["headers"] = json!(headers);
    }
    if dice.one_in(4) {
        let query: Vec<Value> = (0..dice.from(1..3)).map(|_| query_match(dice, hint)).collect();
        wanted["query_parameters"] = json!(query);
    }
    if dice.one_in(40) {
        wanted["grpc"] = json!({});
    }
    let action = action(dice, hint);
    let forwards = action.0 == "route";
    let mut route = named(name.to_owned(), wanted, action);
    operations(dice, &mut route, 2);
    if forwards && dice.one_in(8) {
        route["typed_per_filter_config"] = cors(dice);
    }
    if dice.one_in(8) {
        route["typed_per_filter_config"]["envoy.filters.http.fault"] = fault(dice);
    }
    route
}

fn path_match(dice: &mut Dice, hint: &mut Hint) -> Value {
    let path = *dice.pick(&PATHS);
    hint.path = path.to_owned();
    let mut wanted = match dice.from(0..8) {
        0..=2 => json!({"prefix": path}),
        3..=4 => json!({"path": path}),
        5 if path.len() > 1 && !path.ends_with('/') => json!({"path_separated_prefix": path}),
        6 => {
            let (expression, example) = *dice.pick(&EXPRESSIONS);
            hint.path = example.to_owned();
            return json!({"safe_regex": {"regex": expression}});
        }
        _ => json!({"prefix": ""}),
    };
    if dice.one_in(4) {
        wanted["case_sensitive"] = json!(false);
    }
    wanted
}

fn string_match(dice: &mut Dice, example: &str) -> Value {
    let part =
        |from: usize, to: usize| example.get(from..to).filter(|p| !p.is_empty()).unwrap_or("o").to_owned();
    let half = example.len() / 2;
    let mut matcher = match dice.from(0..6) {
        0 => json!({"prefix": part(0, half.max(1))}),
        1 => json!({"suffix": part(half, example.len())}),
        2 => json!({"contains": part(half / 2, half + 1)}),
        3 => {
            return json!({"safe_regex": {"regex": dice.pick(&["[a-z]+", "o.*", "one|two", ".*", "[0-9-]+", "(?i)ONE"])}});
        }
        _ => json!({"exact": example}),
    };
    if dice.one_in(4) {
        matcher["ignore_case"] = json!(true);
    }
    matcher
}

fn header_match(dice: &mut Dice, hint: &mut Hint) -> Value {
    let value = *dice.pick(&VALUES);
    let mut matcher = match dice.from(0..12) {
        0 => {
            let method = *dice.pick(&["GET", "POST", "HEAD", "OPTIONS"]);
            hint.method = Some(method);
            json!({"name": ":method", "string_match": string_match(dice, method)})
        }
        1 => json!({"name": ":path", "string_match": string_match(dice, &hint.path)}),
        2 => {
            let name = dice.pick(&[":authority", "host"]);
            json!({"name": name, "string_match": string_match(dice, &hint.host)})
        }
        3 => json!({"name": ":scheme", "string_match": string_match(dice, "http")}),
        number => {
            let name = *dice.pick(&NAMES);
            hint.headers.push((name.to_owned(), value.to_owned()));
            match number {
                4 => json!({"name": name}),
                5 => json!({"name": name, "present_match": !dice.one_in(3)}),
                6 => json!({"name": name, "range_match": {"start": -5, "end": dice.from(0..10)}}),
                _ => json!({"name": name, "string_match": string_match(dice, value)}),
            }
        }
    };
    flags(dice, &mut matcher, &["invert_match", "treat_missing_header_as_empty"], 4);
    matcher
}

fn query_match(dice: &mut Dice, hint: &mut Hint) -> Value {
    let (name, value) = (*dice.pick(&PARAMETERS), *dice.pick(&["1", "one", "One", "", "a%20b"]));
    hint.query.push((name.to_owned(), value.to_owned()));
    match dice.from(0..5) {
        0 => json!({"name": name}),
        1 => json!({"name": name, "present_match": !dice.one_in(3)}),
        _ => json!({"name": name, "string_match": string_match(dice, value)}),
    }
}

/// Header operations of one level, each of the four with one chance in `one_in`.
pub(crate) fn operations(dice: &mut Dice, on: &mut Value, one_in: u32) {
    let request = [
        "new",
        "",
        "%REQ(x-a)%",
        "%REQ(:path)%",
        "%REQ(x-none?x-b)%",
        "%REQ(:authority)%:%PROTOCOL%",
        "100%%",
        "%REQ(x-c):2%",
    ];
    let response = [
        "new",
        "",
        "%REQ(x-a)%",
        "%RESPONSE_CODE%",
        "%RESP(x-u)%",
        "%PROTOCOL%",
        "%REQ(:method)%-%REQ(:path)%",
        "%ROUTE_NAME%",
        "%RESPONSE_FLAGS%",
        "%REQ(x-envoy-original-path?:path)%",
        "%UPSTREAM_CLUSTER%",
    ];
    for (side, values, more) in [
        ("request", request.as_slice(), ["x-new", "x-envoy-mine"].as_slice()),
        (
            "response",
            response.as_slice(),
            ["x-u", "server", "content-type", "set-cookie", "x-new"].as_slice(),
        ),
    ] {
        let name = |dice: &mut Dice| {
            let shared = ["x-a", "x-b", "X-C", "x-d"];
            (*if dice.one_in(2) { dice.pick(&shared) } else { dice.pick(more) }).to_owned()
        };
        if dice.one_in(one_in + 1) {
            let added: Vec<Value> = (0..dice.from(1..4))
                .map(|_| {
                    let header = json!({"key": name(dice), "value": dice.pick(values)});
                    addition(dice, header)
                })
                .collect();
            on[format!("{side}_headers_to_add")] = json!(added);
        }
        if dice.one_in(one_in + 2) {
            on[format!("{side}_headers_to_remove")] = json!([name(dice)]);
        }
    }
}

fn addition(dice: &mut Dice, header: Value) -> Value {
    let mut added = json!({"header": header});
    let actions =
        ["APPEND_IF_EXISTS_OR_ADD", "ADD_IF_ABSENT", "OVERWRITE_IF_EXISTS_OR_ADD", "OVERWRITE_IF_EXISTS"];
    if !dice.one_in(5) {
        added["append_action"] = json!(dice.pick(&actions));
    }
    flags(dice, &mut added, &["keep_empty_value"], 3);
    added
}

//! A scenario as its file has it: what the proxies are told, what servers there are, and what is asked. Pure.
//!
//! Files say only what matters: what is left out has the values below. In values a leading `~` stands for the scenario,
//! so `~c` is its cluster `c`, which no other scenario has; a field `"@": fault` is the `@type` of that short name.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Map, Value};

/// One scenario.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    /// What it shows, as a sentence.
    pub(crate) name: String,
    /// Clusters by name; none: `c`, with the server `a`.
    #[serde(default)]
    pub(crate) clusters: BTreeMap<String, Cluster>,
    /// Fields of the action of the only route, which leads to `~c` unless they say otherwise.
    #[serde(default)]
    pub(crate) route: Map<String, Value>,
    /// The routes, in place of the only one.
    #[serde(default)]
    pub(crate) routes: Vec<Value>,
    /// Further fields of the only virtual host.
    #[serde(default)]
    pub(crate) host: Map<String, Value>,
    /// Further fields of the connection manager.
    #[serde(default)]
    pub(crate) manager: Map<String, Value>,
    /// Filters in front of the router, each without its name.
    #[serde(default)]
    pub(crate) filters: Vec<Value>,
    /// Further fields of the listener.
    #[serde(default)]
    pub(crate) listener: Map<String, Value>,
    /// Fields of a TCP proxy in place of the connection manager.
    pub(crate) tcp: Option<Map<String, Value>>,
    /// Filter chains that stand in front: what each matches, and the cluster to which its bytes go.
    #[serde(default)]
    pub(crate) chains: Vec<Chain>,
    /// Connections that no chain is for are closed.
    #[serde(default)]
    pub(crate) closed: bool,
    /// Over which of its connections a server was asked is compared.
    #[serde(default)]
    pub(crate) connections: bool,
    /// Answers as bytes, by the names under which `raw=NAME` asks for them.
    #[serde(default)]
    pub(crate) bytes: BTreeMap<String, String>,
    /// Chance picks the first endpoint, so endpoints are told by the order in which a request met them.
    #[serde(default)]
    pub(crate) any_endpoint: bool,
    /// What is asked, one after the other.
    pub(crate) asks: Vec<Ask>,
    /// Beginnings of lines that may differ, and must, and why.
    #[serde(default)]
    pub(crate) differs: BTreeMap<String, String>,
}

/// A cluster: its servers, and further fields.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Cluster {
    /// Servers, each as `NAME[*weight][/zone[=weight]][:priority][!HEALTH]`.
    pub(crate) to: String,
    /// Endpoints speak HTTP/2.
    #[serde(default)]
    pub(crate) http2: bool,
    /// All other fields.
    #[serde(flatten)]
    pub(crate) fields: Map<String, Value>,
}

/// A filter chain that hands bytes on.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Chain {
    /// `filter_chain_match`
    pub(crate) on: Value,
    /// The cluster.
    pub(crate) to: String,
}

/// One request, one TCP connection, or several of the same at once.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ask {
    /// Path and query of a `GET`.
    pub(crate) get: Option<String>,
    /// Method and path in place of that.
    pub(crate) ask: Option<String>,
    /// Over HTTP/2.
    #[serde(default)]
    pub(crate) http2: bool,
    /// The protocol for which HTTP/2 is left (RFC 8441).
    pub(crate) protocol: Option<String>,
    /// Headers; `host` is `s.example` unless it is one of them.
    #[serde(default)]
    pub(crate) with: Map<String, Value>,
    /// Length of the body.
    pub(crate) body: Option<usize>,
    /// The body in place of that many bytes.
    pub(crate) text: Option<String>,
    /// Trailers.
    #[serde(default)]
    pub(crate) trailers: BTreeMap<String, String>,
    /// What the servers do at each attempt ([`super::server::Deed`]); the last holds for all that follow.
    #[serde(default)]
    pub(crate) serve: String,
    /// As `serve`, for one server.
    #[serde(default)]
    pub(crate) on: BTreeMap<String, String>,
    /// The bytes of an HTTP/1 request, as they are; `CASE` becomes its name.
    pub(crate) raw: Option<String>,
    /// The bytes that go over a TCP connection.
    pub(crate) tcp: Option<String>,
    /// Bytes in base 16 that go before them.
    #[serde(default)]
    pub(crate) hex: String,
    /// A TLS `ClientHello` in place of those bytes: server name and application protocols.
    pub(crate) hello: Option<(String, Vec<String>)>,
    /// The end of what the client sends comes after this many bytes have been received, or never.
    pub(crate) end_after: Option<usize>,
    /// The client keeps its side of a TCP connection open, and waits for the proxy's end.
    #[serde(default)]
    pub(crate) open: bool,
    /// How often it is asked, one after the other; which endpoints answered is compared.
    pub(crate) times: Option<usize>,
    /// By how many percent the endpoints' shares may differ; 0 unless chance picks.
    #[serde(default)]
    pub(crate) within: f64,
    /// How many are asked at once; the answers are compared without their order.
    pub(crate) at_once: Option<usize>,
    /// It is asked until an answer shows this; only that is compared.
    pub(crate) until: Option<String>,
    /// Copies that other servers (`m...`) get of it.
    #[serde(default)]
    pub(crate) copies: usize,
    /// The answer takes this many milliseconds at least, which is compared.
    pub(crate) slow: Option<u64>,
    /// What Envoy's lines must have, so that the scenario shows what it says.
    pub(crate) shows: Shows,
}

/// One piece, or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Shows {
    /// One.
    One(String),
    /// Several.
    All(Vec<String>),
}

impl Shows {
    /// All of them.
    pub(crate) fn all(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::All(all) => all,
        }
    }
}

impl Ask {
    /// As it is in a scenario with this prefix and these servers. `LONG5000` is a text of that length, `ADDRESS(a)` and
    /// `PORT(a)` are those of a server.
    pub(crate) fn filled(&self, prefix: &str, servers: &BTreeMap<String, SocketAddr>) -> Self {
        let fill = |text: &String| {
            let mut text = text.clone();
            for (name, address) in servers {
                text = text.replace(&format!("ADDRESS({name})"), &address.ip().to_string());
                text = text.replace(&format!("PORT({name})"), &address.port().to_string());
            }
            match text.split_once("LONG") {
                Some((before, length)) => before.to_owned() + &"x".repeat(length.parse().unwrap_or_default()),
                None => text,
            }
        };
        let mut filled = self.clone();
        filled.get = self.get.as_ref().map(fill);
        filled.raw = self.raw.as_ref().map(fill);
        filled.tcp = self.tcp.as_ref().map(fill);
        for value in filled.with.values_mut() {
            if let Some(name) = value.as_str().and_then(|text| text.strip_prefix('~')) {
                *value = Value::String(format!("{prefix}{name}"));
            }
        }
        filled
    }

    /// The body, if it has one.
    pub(crate) fn content(&self) -> Option<Vec<u8>> {
        let text = self.text.as_ref().map(|text| text.clone().into_bytes());
        text.or(self.body.map(|length| vec![b'x'; length]))
    }

    /// Method and path.
    pub(crate) fn target(&self) -> (&str, &str) {
        match (&self.get, &self.ask) {
            (Some(path), _) => ("GET", path),
            (None, Some(ask)) => ask.split_once(' ').unwrap_or((ask, "/")),
            (None, None) => ("GET", "/"),
        }
    }

    /// Headers in their order, with those by which servers and logs know it.
    pub(crate) fn headers(&self, case: &str) -> Vec<(String, String)> {
        let mut headers = Vec::new();
        for (name, value) in &self.with {
            let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
            headers.extend(values.iter().map(|value| (name.clone(), text(value))));
        }
        headers.push(("x-case".to_owned(), case.to_owned()));
        let all = (!self.serve.is_empty()).then(|| ("x-do".to_owned(), self.serve.clone()));
        headers.extend(all);
        headers.extend(self.on.iter().map(|(server, deeds)| (format!("x-do-{server}"), deeds.clone())));
        headers
    }
}

/// An endpoint of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) server: String,
    pub(crate) weight: Option<u32>,
    pub(crate) zone: String,
    pub(crate) zone_weight: Option<u32>,
    pub(crate) priority: u32,
    pub(crate) health: Option<String>,
}

impl Endpoint {
    /// From `NAME[*weight][/zone[=weight]][:priority][!HEALTH]`.
    fn parse(text: &str) -> anyhow::Result<Self> {
        let (text, health) = split(text, '!');
        let (text, priority) = split(text, ':');
        let (text, zone) = split(text, '/');
        let (server, weight) = split(text, '*');
        let (zone, zone_weight) = split(zone.unwrap_or_default(), '=');
        let number = |n: Option<&str>| n.map(str::parse).transpose().with_context(|| text.to_owned());
        Ok(Self {
            server: server.to_owned(),
            weight: number(weight)?,
            zone: zone.to_owned(),
            zone_weight: number(zone_weight)?,
            priority: number(priority)?.unwrap_or_default(),
            health: health.map(str::to_owned),
        })
    }
}

fn split(text: &str, at: char) -> (&str, Option<&str>) {
    text.split_once(at).map_or((text, None), |(before, after)| (before, Some(after)))
}

impl Cluster {
    /// Its endpoints.
    pub(crate) fn endpoints(&self) -> anyhow::Result<Vec<Endpoint>> {
        self.to.split_whitespace().map(Endpoint::parse).collect()
    }
}

impl Scenario {
    /// The scenarios of a file.
    pub(crate) fn read(file: &str) -> anyhow::Result<Vec<Self>> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("interop/scenarios").join(file);
        let text = std::fs::read_to_string(&path)?;
        let mut all: Vec<Self> = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
        for scenario in &mut all {
            if scenario.clusters.is_empty() {
                let one = Cluster { to: "a".to_owned(), http2: false, fields: Map::new() };
                scenario.clusters.insert("c".to_owned(), one);
            }
        }
        Ok(all)
    }

    /// Names of all its servers.
    pub(crate) fn servers(&self) -> anyhow::Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for cluster in self.clusters.values() {
            names.extend(cluster.endpoints()?.into_iter().map(|e| e.server));
        }
        Ok(names)
    }
}

#[test]
fn endpoints_have_weights_zones_priorities_and_health() {
    let plain = Endpoint {
        server: "a".to_owned(),
        weight: None,
        zone: String::new(),
        zone_weight: None,
        priority: 0,
        health: None,
    };
    assert_eq!(Endpoint::parse("a").unwrap(), plain);
    let all = Endpoint {
        weight: Some(3),
        zone: "z".to_owned(),
        zone_weight: Some(80),
        priority: 1,
        health: Some("DEGRADED".to_owned()),
        ..plain
    };
    assert_eq!(Endpoint::parse("a*3/z=80:1!DEGRADED").unwrap(), all);
    assert!(Endpoint::parse("a*x").is_err());
}

//! Settings of a Consul cluster as a source.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use registry::source::consul::client::{Server, TlsFiles};
use registry::source::consul::convert::Mapping;
use registry::source::consul::drive::Connection;

use super::Span;
use super::reader::{Reader, name, span, whole};

/// Questions that wait at the same time over HTTP/1.1, where each has a connection; Consul allows 200 for a client.
const WATCHES: usize = 150;
/// And over HTTP/2, where a hundred share one.
const SHARED_WATCHES: usize = 12_000;
/// The longest that Consul lets a question wait.
const LONGEST: Duration = Duration::from_secs(600);

/// A Consul cluster whose services are followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consul {
    /// Its servers; all with TLS, or none.
    pub servers: Vec<Server>,
    /// Its datacenters, the nearest first.
    pub datacenters: Vec<String>,
    /// Name of the cluster.
    pub cluster: String,
    /// Namespace of its services.
    pub namespace: String,
    /// DNS domain of its services.
    pub domain: String,
    /// File with the ACL token.
    pub token: Option<PathBuf>,
    /// Files for TLS.
    pub tls: Option<TlsFiles>,
    /// Questions that wait at the same time, when it is not the usual number.
    pub max_watches: Option<usize>,
    /// How long a question waits for a change.
    pub wait: Duration,
}

impl Consul {
    /// Each datacenter with where it goes and how it is reached: through the same servers, which forward.
    pub(crate) fn datacenters(&self) -> impl Iterator<Item = (Mapping, Connection)> + '_ {
        self.datacenters.iter().enumerate().map(|(position, datacenter)| {
            let mapping = Mapping {
                namespace: self.namespace.clone(),
                domain: self.domain.clone(),
                nearest: position == 0,
                ..Mapping::new(&self.cluster, datacenter)
            };
            let connection = Connection {
                servers: self.servers.clone(),
                token: self.token.clone(),
                tls: self.tls.clone(),
            };
            (mapping, connection)
        })
    }

    /// Questions that wait at the same time, in each datacenter.
    pub(crate) fn watches(&self) -> usize {
        let usual = if self.tls.is_some() { SHARED_WATCHES } else { WATCHES };
        (self.max_watches.unwrap_or(usual) / self.datacenters.len().max(1)).max(1)
    }
}

/// What the file says; nothing without servers.
pub(super) fn taken(reader: &mut Reader) -> Option<Consul> {
    let setting = |name: &str| format!("sources.consul.{name}");
    let addresses = reader.take_list(&setting("addresses"), server);
    let datacenters = reader.take_list(&setting("datacenters"), name);
    let mut file = |name: &str| reader.take(&setting(name), None, |text| Ok(Some(PathBuf::from(text))));
    let (token, ca, cert, key) = (file("tokenFile"), file("caFile"), file("certFile"), file("keyFile"));
    let mut text = |field: &str| reader.take(&setting(field), None, |text| name(text).map(Some));
    let usual = |told: Option<String>| told.unwrap_or_else(|| "consul".to_owned());
    let (cluster, namespace, domain) =
        (usual(text("cluster")), usual(text("namespace")), usual(text("domain")));
    let server_name = text("serverName");
    let max_watches = reader.take(&setting("maxWatches"), None, |text| {
        usize::try_from(whole(text, 1)?).map(Some).map_err(|error| error.to_string())
    });
    let wait = reader.take(&setting("wait"), Duration::from_secs(60), |text| {
        let wait = span(text, Duration::from_secs(1))?;
        if wait > LONGEST { Err("must be at most 10m".to_owned()) } else { Ok(wait) }
    });
    let tls = addresses.iter().any(|(_, tls)| *tls);
    if addresses.is_empty() {
        if reader.has("sources.consul") && !reader.has("sources.consul.addresses") {
            reader.wrong("sources.consul", "needs addresses, for example [http://127.0.0.1:8500]".to_owned());
        }
        return None;
    }
    if tls != addresses.iter().all(|(_, tls)| *tls) {
        reader.wrong(&setting("addresses"), "must be all http or all https".to_owned());
    }
    if tls != ca.is_some() {
        let told = if tls { "is required for https" } else { "is only possible with https" };
        reader.wrong(&setting("caFile"), told.to_owned());
    }
    if cert.is_some() != key.is_some() {
        reader.wrong(&setting("certFile"), "needs keyFile, and keyFile needs it".to_owned());
    }
    let identity = cert.zip(key);
    Some(Consul {
        servers: addresses.into_iter().map(|(server, _)| server).collect(),
        datacenters: if datacenters.is_empty() { vec!["dc1".to_owned()] } else { datacenters },
        cluster,
        namespace,
        domain,
        token,
        tls: ca.filter(|_| tls).map(|ca| TlsFiles { ca, identity, server_name }),
        max_watches,
        wait,
    })
}

/// `http://HOST:PORT`, and whether it is https.
fn server(text: &str) -> Result<(Server, bool), String> {
    let parsed = || {
        let (scheme, rest) = text.split_once("://")?;
        let (host, port) = rest.trim_end_matches('/').rsplit_once(':')?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let tls = match scheme {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        name(&host).ok()?;
        Some((Server { host, port }, tls))
    };
    parsed().ok_or_else(|| {
        format!("must be as http://127.0.0.1:8500 or https://consul.example.com:8501, this is {text:?}")
    })
}

/// The part of a file below `sources`.
impl fmt::Display for Consul {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let address = |Server { host, port }: &Server| {
            let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
            format!("{scheme}://{host}:{port}")
        };
        let addresses: serde_json::Value = self.servers.iter().map(address).collect();
        let datacenters = serde_json::Value::from(self.datacenters.clone());
        writeln!(f, "  consul:\n    addresses: {addresses}\n    datacenters: {datacenters}")?;
        let Self { cluster, namespace, domain, .. } = self;
        writeln!(f, "    cluster: {cluster:?}\n    namespace: {namespace:?}\n    domain: {domain:?}")?;
        let mut file = |name: &str, path: &PathBuf| {
            writeln!(f, "    {name}: {}", serde_json::Value::from(path.display().to_string()))
        };
        if let Some(token) = &self.token {
            file("tokenFile", token)?;
        }
        if let Some(tls) = &self.tls {
            file("caFile", &tls.ca)?;
            if let Some((certificate, key)) = &tls.identity {
                file("certFile", certificate)?;
                file("keyFile", key)?;
            }
            if let Some(name) = &tls.server_name {
                writeln!(f, "    serverName: {name:?}")?;
            }
        }
        if let Some(watches) = self.max_watches {
            writeln!(f, "    maxWatches: {watches}")?;
        }
        writeln!(f, "    wait: {}", Span(self.wait))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;

    fn parse(consul: &str) -> Result<Config, Vec<String>> {
        Config::parse("f", &format!("dataDir: /d\nxds: {{advertise: 'a:1'}}\nsources:\n  consul: {consul}\n"))
    }

    #[test]
    fn a_cluster_is_read_and_comes_back_as_it_was_written() {
        let text = "{addresses: ['https://[::1]:8501', 'https://c.example.com:8501'], datacenters: [dc1, dc2], \
             tokenFile: /t, caFile: /ca, certFile: /cert, keyFile: /key, serverName: server.dc1.consul, wait: 30s}";
        let config = parse(text).unwrap();
        let again = Config::parse("f", &config.to_string()).unwrap();
        assert_eq!(again.consul, config.consul);
        let consul = config.consul.unwrap();
        let nearest: Vec<bool> = consul.datacenters().map(|(mapping, _)| mapping.nearest).collect();
        assert_eq!((nearest, consul.watches()), (vec![true, false], 6_000));
        let plain = parse("{addresses: 'http://127.0.0.1:8500'}").unwrap().consul.unwrap();
        assert_eq!((plain.datacenters.clone(), plain.watches()), (vec!["dc1".to_owned()], 150));
    }

    #[test]
    fn what_does_not_fit_together_is_told() {
        for (text, expect) in [
            ("{datacenters: [dc1]}", "needs addresses"),
            ("{addresses: '127.0.0.1:8500'}", "must be as http://"),
            ("{addresses: ['http://a:1', 'https://b:1'], caFile: /c}", "all http or all https"),
            ("{addresses: 'https://a:1'}", "is required for https"),
            ("{addresses: 'http://a:1', caFile: /c}", "only possible with https"),
            ("{addresses: 'https://a:1', caFile: /c, certFile: /c}", "needs keyFile"),
            ("{addresses: 'http://a:1', wait: 11m}", "at most 10m"),
            ("{addresses: 'http://a:1', adress: x}", "no such setting"),
        ] {
            let told = parse(text).unwrap_err();
            assert!(told.iter().any(|told| told.contains(expect)), "{text}: {told:?}");
        }
    }
}

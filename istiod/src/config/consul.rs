//! Settings of a Consul cluster: as a source, and as a place that the mesh's services are written into.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use registry::source::consul::client::{Server, TlsFiles};
use registry::source::consul::convert::Mapping;
use registry::source::consul::drive::Connection;
use registry::source::consul::export::Settings;

use super::Span;
use super::reader::{Reader, name, span, whole};

/// Questions at the same time over HTTP/1.1, where each has a connection: those that wait, and those that come back at
/// once. Consul takes 200 connections of an address, and those of a member that was killed count until their wait ends,
/// so there is room for three members behind one.
const QUESTIONS: (usize, usize) = (48, 12);
/// And over HTTP/2, where a hundred share a connection.
const SHARED_QUESTIONS: (usize, usize) = (12_000, 32);
/// The node of an owner, `mesh-OWNER`, is a DNS label.
const MOST_OWNER: usize = 58;
/// The names of services that follow need some room.
const MOST_PREFIX: usize = 32;
/// The longest that Consul lets a question wait.
const LONGEST: Duration = Duration::from_secs(600);

/// Entries written in a second, usually: half of what Consul's documents call much.
const RATE: u32 = 50;

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
    /// The mesh's services are written into it too.
    pub export: Option<Export>,
}

/// How the mesh's services are written into a Consul cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Name of this mesh among those that write there.
    pub owner: String,
    /// The datacenters that are written into.
    pub datacenters: Vec<String>,
    /// Before the names of services.
    pub prefix: String,
    /// Tags of every entry.
    pub tags: Vec<String>,
    /// Entries written in a second.
    pub rate: u32,
    /// File with the ACL token, when it is another one than that for reading.
    pub token: Option<PathBuf>,
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
            (mapping, self.connection(self.token.clone()))
        })
    }

    /// Each datacenter that is written into, with how that is done.
    pub(crate) fn exports(&self) -> impl Iterator<Item = (Settings, Connection)> + '_ {
        let all = self.export.iter().flat_map(|export| export.datacenters.iter().map(move |dc| (export, dc)));
        all.map(|(export, datacenter)| {
            let settings = Settings {
                cluster: self.cluster.clone(),
                domain: self.domain.clone(),
                prefix: export.prefix.clone(),
                tags: export.tags.iter().cloned().collect::<BTreeSet<_>>(),
                rate: export.rate,
                ..Settings::new(&export.owner, datacenter, self.servers.len())
            };
            let token = export.token.clone().or_else(|| self.token.clone());
            (settings, self.connection(token))
        })
    }

    fn connection(&self, token: Option<PathBuf>) -> Connection {
        Connection { servers: self.servers.clone(), token, tls: self.tls.clone() }
    }

    /// Questions at the same time in each datacenter: those that wait, and those that come back at once.
    pub(crate) fn questions(&self) -> (usize, usize) {
        let (watches, fetches) = if self.tls.is_some() { SHARED_QUESTIONS } else { QUESTIONS };
        let share = |all: usize| (all / self.datacenters.len().max(1)).max(1);
        (share(self.max_watches.unwrap_or(watches)), share(fetches))
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
    let datacenters = if datacenters.is_empty() { vec!["dc1".to_owned()] } else { datacenters };
    let export = export(reader, &datacenters);
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
        datacenters,
        cluster,
        namespace,
        domain,
        token,
        tls: ca.filter(|_| tls).map(|ca| TlsFiles { ca, identity, server_name }),
        max_watches,
        wait,
        export,
    })
}

/// What the file says of writing; nothing without an owner.
fn export(reader: &mut Reader, followed: &[String]) -> Option<Export> {
    let setting = |name: &str| format!("sources.consul.export.{name}");
    let owner = reader.take(&setting("owner"), None, |text| label(text, MOST_OWNER).map(Some));
    let datacenters = reader.take_list(&setting("datacenters"), name);
    let prefix = reader.take(&setting("prefix"), String::new(), |text| {
        // What follows makes it a label.
        label(&format!("{text}x"), MOST_PREFIX).map(|_| text.to_owned())
    });
    let tags = reader.take_list(&setting("tags"), |text| Ok(text.to_owned()));
    let rate = reader.take(&setting("rate"), RATE, |text| {
        u32::try_from(whole(text, 1)?).map_err(|error| error.to_string())
    });
    let token = reader.take(&setting("tokenFile"), None, |text| Ok(Some(PathBuf::from(text))));
    if owner.is_none() && reader.has("sources.consul.export") && !reader.has(&setting("owner")) {
        let told = "needs owner: a name of this mesh, which no other mesh has that writes there";
        reader.wrong("sources.consul.export", told.to_owned());
    }
    let nearest = || followed.iter().take(1).cloned().collect();
    let datacenters = if datacenters.is_empty() { nearest() } else { datacenters };
    Some(Export { owner: owner?, datacenters, prefix, tags, rate, token })
}

/// A DNS label of at most so many bytes.
fn label(text: &str, most: usize) -> Result<String, String> {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let dashed = text.starts_with('-') || text.ends_with('-');
    if (1..=most).contains(&text.len()) && text.bytes().all(good) && !dashed {
        return Ok(text.to_owned());
    }
    Err(format!("must be lower case letters, digits and dashes, at most {most}, this is {text:?}"))
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
        writeln!(f, "    wait: {}", Span(self.wait))?;
        self.export.as_ref().map_or(Ok(()), |export| write!(f, "{export}"))
    }
}

/// The part of a file below `sources.consul`.
impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { owner, datacenters, prefix, tags, rate, token } = self;
        let list = |values: &[String]| serde_json::Value::from(values.to_vec());
        writeln!(f, "    export:\n      owner: {owner:?}\n      datacenters: {}", list(datacenters))?;
        writeln!(f, "      prefix: {prefix:?}\n      tags: {}\n      rate: {rate}", list(tags))?;
        if let Some(token) = token {
            writeln!(f, "      tokenFile: {}", serde_json::Value::from(token.display().to_string()))?;
        }
        Ok(())
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
             tokenFile: /t, caFile: /ca, certFile: /cert, keyFile: /key, serverName: server.dc1.consul, wait: 30s, \
             export: {owner: m1, prefix: m-, tags: [a], rate: 7, tokenFile: /w}}";
        let config = parse(text).unwrap();
        let again = Config::parse("f", &config.to_string()).unwrap();
        assert_eq!(again.consul, config.consul);
        let consul = config.consul.unwrap();
        let nearest: Vec<bool> = consul.datacenters().map(|(mapping, _)| mapping.nearest).collect();
        assert_eq!((nearest, consul.questions()), (vec![true, false], (6_000, 16)));
        let exports: Vec<_> = consul.exports().collect();
        let [(settings, connection)] = exports.as_slice() else { panic!("{exports:?}") };
        let told = (settings.node(), settings.datacenter.as_str(), settings.prefix.as_str(), settings.rate);
        assert_eq!(told, ("mesh-m1".to_owned(), "dc1", "m-", 7));
        assert_eq!(connection.token, Some("/w".into()));
        let plain = parse("{addresses: 'http://127.0.0.1:8500'}").unwrap().consul.unwrap();
        assert_eq!(plain.exports().count(), 0, "off unless asked for");
        assert_eq!((plain.datacenters.clone(), plain.questions()), (vec!["dc1".to_owned()], (48, 12)));
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
            ("{addresses: 'http://a:1', export: {}}", "needs owner"),
            ("{addresses: 'http://a:1', export: {datacenters: [dc1]}}", "needs owner"),
            ("{addresses: 'http://a:1', export: {owner: 'Mesh 1'}}", "must be lower case letters"),
            ("{addresses: 'http://a:1', export: {owner: m, prefix: a.}}", "must be lower case letters"),
            ("{addresses: 'http://a:1', export: {owner: m, rate: 0}}", "from 1"),
            ("{addresses: 'http://a:1', export: {owner: m, name: x}}", "no such setting"),
        ] {
            let told = parse(text).unwrap_err();
            assert!(told.iter().any(|told| told.contains(expect)), "{text}: {told:?}");
        }
    }
}

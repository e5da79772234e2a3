//! A probe as it is written, in a service's file and on the wire, and as it is carried out.

use std::fmt;
use std::time::Duration;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::http::uri::PathAndQuery;
use serde::Deserialize;
use wire::mesh;

use super::Pace;

/// A check of the application, and when it is made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Probe {
    /// When.
    pub pace: Pace,
    /// What.
    pub check: Check,
}

/// What is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// A request by HTTP/1.1 is answered with a status of 200 to 399.
    Http(HttpGet),
    /// A connection is made.
    Tcp {
        /// Empty is the machine itself.
        host: String,
        /// Port.
        port: u16,
    },
    /// `grpc.health.v1.Health` answers that the service serves.
    Grpc {
        /// Port.
        port: u16,
        /// Service; empty is all of the server.
        service: String,
    },
    /// A program with these arguments, of which the first is itself, ends with 0.
    Exec(Vec<String>),
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpGet {
    /// Empty is the machine itself.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Path, with its query.
    pub path: PathAndQuery,
    /// Over TLS, whatever the certificate.
    pub tls: bool,
    /// Further headers.
    pub headers: Headers,
}

/// Headers of a request.
pub type Headers = HeaderMap;

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(HttpGet { host, port, path, tls, .. }) => {
                write!(f, "GET http{}://{host}:{port}{path}", if *tls { "s" } else { "" })
            }
            Self::Tcp { host, port } => write!(f, "connection to {host}:{port}"),
            Self::Grpc { port, service } => write!(f, "gRPC health of `{service}` at port {port}"),
            Self::Exec(command) => write!(f, "`{}`", command.join(" ")),
        }
    }
}

/// Why something written is no probe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Neither of the four, or more than one, or one of a later time.
    #[error("exactly one of httpGet, tcpSocket, exec and grpc is needed, and one that this agent knows")]
    Check,
    /// A port is none.
    #[error("{0} is not a port")]
    Port(u32),
    /// A path is none.
    #[error("`{0}` is not a path")]
    Path(String),
    /// A header is none.
    #[error("`{0}` is not a header")]
    Header(String),
    /// The scheme is unknown.
    #[error("scheme `{0}` is neither HTTP nor HTTPS")]
    Scheme(String),
    /// There is nothing to run.
    #[error("exec has no command")]
    Command,
}

impl TryFrom<mesh::Probe> for Probe {
    type Error = Malformed;

    fn try_from(told: mesh::Probe) -> Result<Self, Malformed> {
        let or = |said: u32, otherwise: u32| if said == 0 { otherwise } else { said };
        let seconds = |said, otherwise| Duration::from_secs(or(said, otherwise).into());
        let pace = Pace {
            initial_delay: seconds(told.initial_delay_seconds, 0),
            timeout: seconds(told.timeout_seconds, 1),
            period: seconds(told.period_seconds, 10),
            successes: or(told.success_threshold, 1),
            failures: or(told.failure_threshold, 3),
        };
        Ok(Self { pace, check: told.check.ok_or(Malformed::Check)?.try_into()? })
    }
}

impl TryFrom<mesh::probe::Check> for Check {
    type Error = Malformed;

    fn try_from(told: mesh::probe::Check) -> Result<Self, Malformed> {
        Ok(match told {
            mesh::probe::Check::HttpGet(get) => Self::Http(HttpGet {
                host: get.host,
                port: port(get.port)?,
                path: path(&get.path)?,
                tls: get.tls,
                headers: get.headers.iter().map(header).collect::<Result<_, _>>()?,
            }),
            mesh::probe::Check::TcpSocket(socket) => {
                Self::Tcp { host: socket.host, port: port(socket.port)? }
            }
            mesh::probe::Check::Grpc(grpc) => Self::Grpc { port: port(grpc.port)?, service: grpc.service },
            mesh::probe::Check::Exec(exec) if exec.command.is_empty() => return Err(Malformed::Command),
            mesh::probe::Check::Exec(exec) => Self::Exec(exec.command),
        })
    }
}

fn port(said: u32) -> Result<u16, Malformed> {
    u16::try_from(said).ok().filter(|port| *port > 0).ok_or(Malformed::Port(said))
}

fn path(said: &str) -> Result<PathAndQuery, Malformed> {
    let path = if said.is_empty() { "/" } else { said };
    let parsed = path.parse().ok().filter(|_| path.starts_with('/'));
    parsed.ok_or_else(|| Malformed::Path(said.to_owned()))
}

fn header(said: &mesh::probe::Header) -> Result<(HeaderName, HeaderValue), Malformed> {
    let parsed = || Some((said.name.parse().ok()?, said.value.parse().ok()?));
    parsed().ok_or_else(|| Malformed::Header(said.name.clone()))
}

/// A probe in a service's file: as `WorkloadGroup` has it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[derive(Default)]
struct Written {
    initial_delay_seconds: u32,
    timeout_seconds: u32,
    period_seconds: u32,
    success_threshold: u32,
    failure_threshold: u32,
    http_get: Option<WrittenHttp>,
    tcp_socket: Option<WrittenTcp>,
    exec: Option<WrittenExec>,
    grpc: Option<WrittenGrpc>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenHttp {
    #[serde(default)]
    host: String,
    port: u32,
    #[serde(default)]
    path: String,
    #[serde(default)]
    scheme: String,
    #[serde(default)]
    http_headers: Vec<WrittenHeader>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenHeader {
    name: String,
    value: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenTcp {
    #[serde(default)]
    host: String,
    port: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenExec {
    command: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenGrpc {
    port: u32,
    #[serde(default)]
    service: String,
}

impl TryFrom<WrittenHttp> for mesh::probe::HttpGet {
    type Error = Malformed;

    fn try_from(written: WrittenHttp) -> Result<Self, Malformed> {
        let header = |h: WrittenHeader| mesh::probe::Header { name: h.name, value: h.value };
        let tls = match written.scheme.to_ascii_uppercase().as_str() {
            "" | "HTTP" => false,
            "HTTPS" => true,
            _ => return Err(Malformed::Scheme(written.scheme)),
        };
        Ok(Self {
            host: written.host,
            port: written.port,
            path: written.path,
            tls,
            headers: written.http_headers.into_iter().map(header).collect(),
        })
    }
}

impl TryFrom<Written> for Probe {
    type Error = Malformed;

    fn try_from(written: Written) -> Result<Self, Malformed> {
        use mesh::probe::{Check, Exec, GrpcHealth, TcpSocket};
        let http = written.http_get.map(TryInto::try_into).transpose()?.map(Check::HttpGet);
        let tcp = written.tcp_socket.map(|w| Check::TcpSocket(TcpSocket { host: w.host, port: w.port }));
        let exec = written.exec.map(|w| Check::Exec(Exec { command: w.command }));
        let grpc = written.grpc.map(|w| Check::Grpc(GrpcHealth { port: w.port, service: w.service }));
        let mut checks = [http, tcp, exec, grpc].into_iter().flatten();
        let (Some(check), None) = (checks.next(), checks.next()) else { return Err(Malformed::Check) };
        let probe = mesh::Probe {
            initial_delay_seconds: written.initial_delay_seconds,
            timeout_seconds: written.timeout_seconds,
            period_seconds: written.period_seconds,
            success_threshold: written.success_threshold,
            failure_threshold: written.failure_threshold,
            check: Some(check),
        };
        probe.try_into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(yaml: &str) -> Result<Probe, String> {
        serde_saphyr::from_str(yaml).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_not_said_is_as_in_kubernetes() {
        let probe = parsed("httpGet: {port: 8080}").unwrap();
        let second = Duration::from_secs(1);
        let usual = Pace {
            initial_delay: Duration::ZERO,
            timeout: second,
            period: second * 10,
            successes: 1,
            failures: 3,
        };
        assert_eq!(probe.pace, usual);
        assert_eq!(probe.check.to_string(), "GET http://:8080/");
        let said = "{initialDelaySeconds: 1, timeoutSeconds: 2, periodSeconds: 3, successThreshold: 4, \
                    failureThreshold: 5, tcpSocket: {host: db, port: 5432}}";
        let pace = Pace {
            initial_delay: second,
            timeout: second * 2,
            period: second * 3,
            successes: 4,
            failures: 5,
        };
        let check = Check::Tcp { host: "db".to_owned(), port: 5432 };
        assert_eq!(parsed(said).unwrap(), Probe { pace, check });
    }

    #[test]
    fn every_kind_is_read() {
        let http = "httpGet: {scheme: https, host: h, port: 1, path: \"/a?b=c\", httpHeaders: [{name: X-A, value: b}]}";
        let Check::Http(get) = parsed(http).unwrap().check else { panic!("another kind") };
        assert!(get.tls && get.headers["x-a"] == "b" && get.path == "/a?b=c");
        let shown = |yaml: &str| parsed(yaml).unwrap().check.to_string();
        assert_eq!(shown("exec: {command: [/bin/check, -x]}"), "`/bin/check -x`");
        assert_eq!(shown("grpc: {port: 9000, service: pay}"), "gRPC health of `pay` at port 9000");
    }

    #[test]
    fn what_is_no_probe_is_told() {
        for (wrong, reason) in [
            ("periodSeconds: 1", "exactly one of"),
            ("{tcpSocket: {port: 1}, grpc: {port: 1}}", "exactly one of"),
            ("tcpSocket: {port: 0}", "0 is not a port"),
            ("grpc: {port: 70000}", "70000 is not a port"),
            ("httpGet: {port: 1, path: ready}", "`ready` is not a path"),
            ("httpGet: {port: 1, scheme: ftp}", "scheme `ftp`"),
            ("httpGet: {port: 1, httpHeaders: [{name: a b, value: c}]}", "`a b` is not a header"),
            ("exec: {command: []}", "exec has no command"),
            ("httpget: {port: 1}", "httpget"),
        ] {
            let told = parsed(wrong).unwrap_err();
            assert!(told.contains(reason), "{wrong}: {told}");
        }
        assert_eq!(Probe::try_from(mesh::Probe::default()), Err(Malformed::Check), "a kind of a later time");
    }
}

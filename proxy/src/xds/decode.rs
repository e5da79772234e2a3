//! From protobuf values to plain ones: the small steps that every resource's parser shares.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::r#type::v3 as typev3;
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration as PbDuration, Struct, UInt32Value, value};
use http::{HeaderName, HeaderValue};
use ipnet::IpNet;
use prost::{Message, Name};
use serde_json::Value as Json;

/// The largest file that a `filename` data source may name, in bytes: certificates, keys and bodies are small.
const MAX_FILE: u64 = 1 << 20;

/// Why a resource is refused: the field's path inside the resource, and the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Invalid {
    /// Path of the field, such as `filter_chains[0].filters[1].typed_config`.
    pub field: String,
    /// What is wrong with it, and what would be right where that helps.
    pub reason: String,
}

impl Invalid {
    /// A field with something wrong.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    /// A field that Envoy knows and this proxy does not carry out.
    pub fn unsupported(field: impl Into<String>) -> Self {
        Self::new(field, "not supported by this proxy")
    }

    /// A field that must be set.
    pub fn missing(field: impl Into<String>) -> Self {
        Self::new(field, "must be set")
    }

    /// The same, seen from the message that holds the field.
    #[must_use]
    pub fn under(mut self, parent: &str) -> Self {
        if !parent.is_empty() {
            let dot = if self.field.is_empty() || self.field.starts_with('[') { "" } else { "." };
            self.field = format!("{parent}{dot}{}", self.field);
        }
        self
    }
}

/// Puts the holder's name in front of an error's field path.
pub trait Under<T> {
    /// In the field `parent`.
    ///
    /// # Errors
    ///
    /// The error it was called on, with a longer path.
    fn under(self, parent: &str) -> Result<T, Invalid>;

    /// In element `index` of the repeated field `parent`.
    ///
    /// # Errors
    ///
    /// The error it was called on, with a longer path.
    fn at(self, parent: &str, index: usize) -> Result<T, Invalid>;
}

impl<T> Under<T> for Result<T, Invalid> {
    fn under(self, parent: &str) -> Self {
        self.map_err(|e| e.under(parent))
    }

    fn at(self, parent: &str, index: usize) -> Self {
        self.map_err(|e| e.under(&format!("{parent}[{index}]")))
    }
}

/// The types of resources that this proxy takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `envoy.config.cluster.v3.Cluster`
    Cluster,
    /// `envoy.config.endpoint.v3.ClusterLoadAssignment`
    Endpoints,
    /// `envoy.config.listener.v3.Listener`
    Listener,
    /// `envoy.config.route.v3.RouteConfiguration`
    Routes,
    /// `envoy.extensions.transport_sockets.tls.v3.Secret`, only from a bootstrap file
    Secret,
}

impl Kind {
    /// What is subscribed to over ADS, in the order in which a new stream asks for it.
    pub const SUBSCRIBED: [Self; 4] = [Self::Cluster, Self::Endpoints, Self::Listener, Self::Routes];

    /// The type URL on the wire.
    #[must_use]
    pub fn url(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Routes => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        }
    }

    /// The subscribed kind of a type URL.
    #[must_use]
    pub fn from_url(url: &str) -> Option<Self> {
        Self::SUBSCRIBED.into_iter().find(|k| k.url() == url)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "Cluster",
            Self::Endpoints => "ClusterLoadAssignment",
            Self::Listener => "Listener",
            Self::Routes => "RouteConfiguration",
            Self::Secret => "Secret",
        })
    }
}

/// A resource that was refused: which one, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {name}: {invalid}")]
pub struct Rejected {
    /// The resource's type.
    pub kind: Kind,
    /// Its name; known before anything else about it is checked.
    pub name: String,
    /// What is wrong.
    pub invalid: Invalid,
}

/// The message in an `Any`, if it is one of type `M`.
///
/// # Errors
///
/// Another type URL, or bytes that do not decode.
pub fn unpack<M: Message + Default + Name>(any: &Any) -> Result<M, Invalid> {
    if !is::<M>(any) {
        return Err(Invalid::new("", format!("is a `{}`, expected `{}`", any.type_url, M::full_name())));
    }
    M::decode(any.value.as_slice()).map_err(|e| Invalid::new("", format!("does not decode: {e}")))
}

/// Whether the `Any` says that it holds an `M`.
#[must_use]
pub fn is<M: Name>(any: &Any) -> bool {
    any.type_url.rsplit('/').next() == Some(M::full_name().as_str())
}

/// A protobuf duration; negative ones and those outside of the protobuf range are refused.
///
/// # Errors
///
/// A negative or malformed duration.
pub fn duration(pb: PbDuration) -> Result<Duration, Invalid> {
    let secs = u64::try_from(pb.seconds).ok();
    let nanos = u32::try_from(pb.nanos).ok().filter(|n| *n < 1_000_000_000);
    match (secs, nanos) {
        (Some(secs), Some(nanos)) if secs <= 315_576_000_000 => Ok(Duration::new(secs, nanos)),
        _ => Err(Invalid::new("", format!("{}s {}ns is not a duration of 0 or more", pb.seconds, pb.nanos))),
    }
}

/// An optional duration; absent stays absent.
///
/// # Errors
///
/// As [`duration`].
pub fn opt_duration(pb: Option<PbDuration>, field: &str) -> Result<Option<Duration>, Invalid> {
    pb.map(duration).transpose().under(field)
}

/// A timeout with a default, where zero means "none".
///
/// # Errors
///
/// As [`duration`].
pub fn timeout(
    pb: Option<PbDuration>,
    default: Option<Duration>,
    field: &str,
) -> Result<Option<Duration>, Invalid> {
    Ok(match opt_duration(pb, field)? {
        None => default,
        Some(d) if d.is_zero() => None,
        Some(d) => Some(d),
    })
}

/// The value of a wrapped boolean.
#[must_use]
pub fn bool_or(pb: Option<BoolValue>, default: bool) -> bool {
    pb.map_or(default, |b| b.value)
}

/// The value of a wrapped number.
#[must_use]
pub fn u32_or(pb: Option<UInt32Value>, default: u32) -> u32 {
    pb.map_or(default, |n| n.value)
}

/// A number between 1 and 65535.
///
/// # Errors
///
/// Any other number.
pub fn port(value: u32, field: &str) -> Result<u16, Invalid> {
    u16::try_from(value)
        .ok()
        .filter(|p| *p != 0)
        .ok_or_else(|| Invalid::new(field, format!("{value} is not a port (1-65535)")))
}

/// Where a socket is: an IP address with a port, a name with a port, or a Unix socket.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// An IP address and a port.
    Socket(SocketAddr),
    /// A name that DNS must resolve first, and a port.
    Name(Arc<str>, u16),
    /// A Unix domain socket; a leading `@` means the abstract namespace.
    Pipe(PathBuf),
}

impl Address {
    /// Reads `HOST:PORT`; `None` when it is not that.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(socket) = text.parse() {
            return Some(Self::Socket(socket));
        }
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port > 0)?;
        (!host.is_empty()).then(|| Self::Name(host.into(), port))
    }

    /// The IP address and port, where there is one.
    #[must_use]
    pub fn socket(&self) -> Option<SocketAddr> {
        match self {
            Self::Socket(a) => Some(*a),
            Self::Name(..) | Self::Pipe(_) => None,
        }
    }

    /// The port, where there is one.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Socket(a) => Some(a.port()),
            Self::Name(_, port) => Some(*port),
            Self::Pipe(_) => None,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(a) => a.fmt(f),
            Self::Name(host, port) => write!(f, "{host}:{port}"),
            Self::Pipe(path) => path.display().fmt(f),
        }
    }
}

/// An address.
///
/// # Errors
///
/// No address, a UDP one, a port out of range, or an internal listener.
pub fn address(pb: Option<core::Address>) -> Result<Address, Invalid> {
    use core::address::Address as Pb;
    match pb.and_then(|a| a.address) {
        None => Err(Invalid::missing("")),
        Some(Pb::Pipe(p)) if p.path.is_empty() => Err(Invalid::missing("pipe.path")),
        Some(Pb::Pipe(p)) => Ok(Address::Pipe(p.path.into())),
        Some(Pb::EnvoyInternalAddress(_)) => Err(Invalid::unsupported("envoy_internal_address")),
        Some(Pb::SocketAddress(s)) => socket_address(s).under("socket_address"),
    }
}

fn socket_address(pb: core::SocketAddress) -> Result<Address, Invalid> {
    if pb.protocol != core::socket_address::Protocol::Tcp as i32 {
        return Err(Invalid::unsupported("protocol"));
    }
    if !pb.resolver_name.is_empty() {
        return Err(Invalid::unsupported("resolver_name"));
    }
    if !pb.network_namespace_filepath.is_empty() {
        return Err(Invalid::unsupported("network_namespace_filepath"));
    }
    let port = match pb.port_specifier {
        Some(core::socket_address::PortSpecifier::PortValue(p)) => {
            u16::try_from(p).map_err(|_| Invalid::new("port_value", format!("{p} is not a port")))?
        }
        Some(core::socket_address::PortSpecifier::NamedPort(_)) => {
            return Err(Invalid::unsupported("named_port"));
        }
        None => return Err(Invalid::missing("port_value")),
    };
    if pb.address.is_empty() {
        return Err(Invalid::missing("address"));
    }
    Ok(match pb.address.parse::<IpAddr>() {
        Ok(ip) => Address::Socket(SocketAddr::new(ip, port)),
        Err(_) => Address::Name(pb.address.into(), port),
    })
}

/// An IP prefix; host bits are cleared, a missing length means 0 as in Envoy.
///
/// # Errors
///
/// Something that is no IP address, or a length the family does not have.
pub fn cidr(pb: &core::CidrRange) -> Result<IpNet, Invalid> {
    let ip: IpAddr = pb.address_prefix.parse().map_err(|_| {
        Invalid::new("address_prefix", format!("`{}` is not an IP address", pb.address_prefix))
    })?;
    let len = u32_or(pb.prefix_len, 0);
    u8::try_from(len)
        .ok()
        .and_then(|len| IpNet::new(ip, len).ok())
        .map(|net| net.trunc())
        .ok_or_else(|| Invalid::new("prefix_len", format!("{len} is too long for {ip}")))
}

/// Several IP prefixes.
///
/// # Errors
///
/// As [`cidr`].
pub fn cidrs(pb: &[core::CidrRange], field: &str) -> Result<Box<[IpNet]>, Invalid> {
    pb.iter().enumerate().map(|(i, c)| cidr(c).at(field, i)).collect()
}

/// A header's name, in lower case.
///
/// # Errors
///
/// An empty name, or one with bytes that a header name may not have.
pub fn header_name(name: &str, field: &str) -> Result<HeaderName, Invalid> {
    HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| Invalid::new(field, format!("`{name}` is not a header name")))
}

/// A header's value.
///
/// # Errors
///
/// A value with control characters.
pub fn header_value(value: &str, field: &str) -> Result<HeaderValue, Invalid> {
    HeaderValue::from_str(value)
        .map_err(|_| Invalid::new(field, format!("`{}` is not a header value", value.escape_debug())))
}

/// The contents of a data source. A `filename` is read here and now, so that a file that is missing or too
/// large refuses the resource that names it.
///
/// # Errors
///
/// No source, an unreadable file, one that is no regular file or larger than 1 MiB, or an environment variable
/// (only configuration reads the environment).
pub fn data_source(pb: core::DataSource) -> Result<Vec<u8>, Invalid> {
    use core::data_source::Specifier;
    match pb.specifier {
        None => Err(Invalid::missing("")),
        Some(Specifier::InlineBytes(b)) => Ok(b),
        Some(Specifier::InlineString(s)) => Ok(s.into_bytes()),
        Some(Specifier::EnvironmentVariable(_)) => Err(Invalid::unsupported("environment_variable")),
        Some(Specifier::Filename(path)) => {
            read_file(&path).map_err(|e| Invalid::new("filename", format!("cannot read {path}: {e}")))
        }
    }
}

fn read_file(path: &str) -> std::io::Result<Vec<u8>> {
    let meta = std::fs::metadata(path)?;
    if !meta.is_file() || meta.len() > MAX_FILE {
        return Err(std::io::Error::other("not a regular file of at most 1 MiB"));
    }
    std::fs::read(path)
}

/// A share of all requests: `numerator` of `denominator`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fraction {
    /// How many of `denominator`.
    pub numerator: u32,
    /// 100, 10,000 or 1,000,000.
    pub denominator: u32,
}

impl Fraction {
    /// All of them.
    pub const ALL: Self = Self { numerator: 100, denominator: 100 };
    /// None of them.
    pub const NONE: Self = Self { numerator: 0, denominator: 100 };

    /// Whether the event with this random number is one of the share.
    #[must_use]
    pub fn hits(self, random: u64) -> bool {
        random % u64::from(self.denominator) < u64::from(self.numerator)
    }
}

/// A fraction; more than all is refused.
///
/// # Errors
///
/// An unknown denominator or a numerator above it.
pub fn fraction(pb: typev3::FractionalPercent) -> Result<Fraction, Invalid> {
    let denominator = match pb.denominator {
        0 => 100,
        1 => 10_000,
        2 => 1_000_000,
        other => return Err(Invalid::new("denominator", format!("unknown value {other}"))),
    };
    // Envoy takes numerators above the denominator as "always".
    Ok(Fraction { numerator: pb.numerator.min(denominator), denominator })
}

/// A fraction that a runtime key could change in Envoy; this proxy has no runtime and takes the default.
///
/// # Errors
///
/// As [`fraction`].
pub fn runtime_fraction(
    pb: Option<core::RuntimeFractionalPercent>,
    field: &str,
) -> Result<Option<Fraction>, Invalid> {
    let Some(pb) = pb else { return Ok(None) };
    let Some(value) = pb.default_value else { return Ok(Some(Fraction::ALL)) };
    fraction(value).under("default_value").under(field).map(Some)
}

/// A `google.protobuf.Struct` as JSON, with keys in order.
#[must_use]
pub fn json(pb: Struct) -> serde_json::Map<String, Json> {
    let mut fields: Vec<(String, Json)> =
        pb.fields.into_iter().map(|(k, v)| (k, json_value(v.kind))).collect();
    fields.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    fields.into_iter().collect()
}

fn json_value(kind: Option<value::Kind>) -> Json {
    match kind {
        None | Some(value::Kind::NullValue(_)) => Json::Null,
        Some(value::Kind::BoolValue(b)) => Json::Bool(b),
        Some(value::Kind::NumberValue(n)) => serde_json::Number::from_f64(n).map_or(Json::Null, Json::Number),
        Some(value::Kind::StringValue(s)) => Json::String(s),
        Some(value::Kind::ListValue(l)) => {
            Json::Array(l.values.into_iter().map(|v| json_value(v.kind)).collect())
        }
        Some(value::Kind::StructValue(s)) => Json::Object(json(s)),
    }
}

/// Free-form data about a resource, by the filter it is meant for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata(std::collections::BTreeMap<String, serde_json::Map<String, Json>>);

impl Metadata {
    /// From its proto; typed metadata has no reader here and is left out.
    #[must_use]
    pub fn new(pb: Option<core::Metadata>) -> Self {
        let fields = pb.map(|m| m.filter_metadata).unwrap_or_default();
        Self(fields.into_iter().map(|(filter, fields)| (filter, json(fields))).collect())
    }

    /// Everything said for one filter.
    #[must_use]
    pub fn filter(&self, filter: &str) -> Option<&serde_json::Map<String, Json>> {
        self.0.get(filter)
    }

    /// One value said for one filter.
    #[must_use]
    pub fn get(&self, filter: &str, key: &str) -> Option<&Json> {
        self.0.get(filter)?.get(key)
    }

    /// One string said for one filter.
    #[must_use]
    pub fn str(&self, filter: &str, key: &str) -> Option<&str> {
        self.get(filter, key)?.as_str()
    }
}

/// Where the configuration of a resource comes from; only ADS is known besides files and inline values.
///
/// # Errors
///
/// Any other source.
pub fn ads_only(pb: Option<core::ConfigSource>, field: &str) -> Result<Option<Duration>, Invalid> {
    use core::config_source::ConfigSourceSpecifier as Source;
    let Some(pb) = pb else { return Err(Invalid::missing(field)) };
    match pb.config_source_specifier {
        Some(Source::Ads(_) | Source::Self_(_)) => {
            timeout(pb.initial_fetch_timeout, Some(DEFAULT_FETCH_TIMEOUT), "initial_fetch_timeout")
                .under(field)
        }
        _ => Err(Invalid::new(field, "only `ads` is supported as a source")),
    }
}

/// How long a resource waits for another one it names, unless the resource says otherwise (Envoy's default).
pub const DEFAULT_FETCH_TIMEOUT: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(address: &str, port: u32) -> Option<core::Address> {
        Some(core::Address {
            address: Some(core::address::Address::SocketAddress(core::SocketAddress {
                address: address.into(),
                port_specifier: Some(core::socket_address::PortSpecifier::PortValue(port)),
                ..Default::default()
            })),
        })
    }

    #[test]
    fn addresses_are_ips_names_or_refused() {
        assert_eq!(address(socket("10.0.0.1", 80)).unwrap().to_string(), "10.0.0.1:80");
        assert_eq!(address(socket("::1", 80)).unwrap().to_string(), "[::1]:80");
        assert_eq!(address(socket("a.example", 80)).unwrap(), Address::Name("a.example".into(), 80));
        assert_eq!(
            address(socket("10.0.0.1", 70000)).unwrap_err().to_string(),
            "socket_address.port_value: 70000 is not a port"
        );
    }

    #[test]
    fn durations_are_never_negative() {
        assert_eq!(duration(PbDuration { seconds: 1, nanos: 5 }).unwrap(), Duration::new(1, 5));
        assert!(duration(PbDuration { seconds: -1, nanos: 0 }).is_err());
        assert!(duration(PbDuration { seconds: 0, nanos: 2_000_000_000 }).is_err());
    }

    #[test]
    fn field_paths_read_from_the_outside_in() {
        let e = Err::<(), _>(Invalid::missing("name")).at("filters", 2).under("chain").unwrap_err();
        assert_eq!(e.to_string(), "chain.filters[2].name: must be set");
    }

    #[test]
    fn a_fraction_hits_its_share() {
        let f = Fraction { numerator: 10, denominator: 100 };
        assert_eq!((0..1000).filter(|n| f.hits(*n)).count(), 100);
        assert!(Fraction::ALL.hits(99));
        assert!(!Fraction::NONE.hits(0));
    }

    #[test]
    fn a_directory_is_not_a_data_source() {
        let dir = core::DataSource {
            specifier: Some(core::data_source::Specifier::Filename("/dev/zero".into())),
            ..Default::default()
        };
        assert!(data_source(dir).unwrap_err().reason.contains("regular file"));
    }
}

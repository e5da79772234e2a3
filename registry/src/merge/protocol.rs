//! The protocol of a port, from what its author wrote.

use crate::model::service::Protocol;

/// Ports where the server speaks first, so that looking at the first bytes would hang.
const SERVER_FIRST: [u16; 4] = [25, 53, 3306, 27017];

impl Protocol {
    /// The protocol of a port: `appProtocol` if it says one, else the part of the port's name before the first `-`,
    /// else [`Protocol::Auto`], or TCP for ports whose servers speak first.
    ///
    /// Source: Istio, "Protocol Selection"; Kubernetes, standard values of `appProtocol`.
    #[must_use]
    pub fn parse(name: &str, app_protocol: Option<&str>, number: u16) -> Self {
        let undeclared = if SERVER_FIRST.contains(&number) { Self::Tcp } else { Self::Auto };
        match app_protocol {
            Some(declared) if !declared.is_empty() => {
                Self::from_app_protocol(declared).or_else(|| Self::from_name(declared)).unwrap_or(undeclared)
            }
            _ => Self::from_name(name).unwrap_or(undeclared),
        }
    }

    fn from_app_protocol(value: &str) -> Option<Self> {
        match value {
            "kubernetes.io/h2c" => Some(Self::Http2),
            "kubernetes.io/ws" => Some(Self::Http),
            "kubernetes.io/wss" => Some(Self::Https),
            _ => None,
        }
    }

    /// The protocol that a port's name, or `ServiceEntry`'s `protocol`, declares; case does not matter.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        if name == "grpc-web" || name.starts_with("grpc-web-") {
            return Some(Self::GrpcWeb);
        }
        match name.split('-').next().unwrap_or_default() {
            "http" | "http_proxy" => Some(Self::Http),
            "http2" => Some(Self::Http2),
            "grpc" => Some(Self::Grpc),
            "https" => Some(Self::Https),
            "tls" => Some(Self::Tls),
            "tcp" => Some(Self::Tcp),
            "udp" => Some(Self::Udp),
            "mongo" => Some(Self::Mongo),
            "mysql" => Some(Self::MySql),
            "redis" => Some(Self::Redis),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, app: Option<&str>, number: u16, expect: Protocol) {
        assert_eq!(Protocol::parse(name, app, number), expect, "{name:?} {app:?} {number}");
    }

    #[test]
    fn the_name_up_to_the_first_dash_declares_the_protocol() {
        check("http", None, 80, Protocol::Http);
        check("HTTP-web", None, 80, Protocol::Http);
        check("http2-api", None, 80, Protocol::Http2);
        check("grpc", None, 80, Protocol::Grpc);
        check("grpc-web", None, 80, Protocol::GrpcWeb);
        check("grpc-web-x", None, 80, Protocol::GrpcWeb);
        check("gRPC-Web", None, 80, Protocol::GrpcWeb);
        check("grpc-webx", None, 80, Protocol::Grpc);
        check("https", None, 443, Protocol::Https);
        check("tls-a", None, 443, Protocol::Tls);
        check("tcp", None, 80, Protocol::Tcp);
        check("udp", None, 80, Protocol::Udp);
        check("mongo", None, 80, Protocol::Mongo);
        check("mysql", None, 80, Protocol::MySql);
        check("redis-x", None, 80, Protocol::Redis);
        check("http_proxy", None, 80, Protocol::Http);
    }

    #[test]
    fn undeclared_ports_are_detected_except_where_servers_speak_first() {
        check("web", None, 80, Protocol::Auto);
        check("", None, 80, Protocol::Auto);
        check("httpx", None, 80, Protocol::Auto);
        for port in [25, 53, 3306, 27017] {
            check("web", None, port, Protocol::Tcp);
            check("http", None, port, Protocol::Http);
        }
    }

    #[test]
    fn app_protocol_outranks_the_name() {
        check("tcp", Some("http"), 80, Protocol::Http);
        check("http", Some("kubernetes.io/h2c"), 80, Protocol::Http2);
        check("tcp", Some("kubernetes.io/ws"), 80, Protocol::Http);
        check("http", Some("kubernetes.io/wss"), 80, Protocol::Https);
        check("http", Some("example.com/own"), 80, Protocol::Auto);
        check("http", Some("example.com/own"), 3306, Protocol::Tcp);
        check("http", Some(""), 80, Protocol::Http);
    }
}

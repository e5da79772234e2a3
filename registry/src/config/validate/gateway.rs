//! Rules of `Gateway`, and of the servers' TLS that `Sidecar` shares.

use base64::Engine as _;

use super::{Checker, grammar};
use crate::model::traffic::{Gateway, Port, Server, ServerTlsMode, ServerTlsSettings, TlsProtocol};

pub(super) fn check(cx: &mut Checker, gateway: &Gateway) {
    cx.refuse(gateway.servers.is_empty(), "servers", "is required: at least one server");
    cx.each("servers", &gateway.servers, check_server);
    cx.unique("servers", gateway.servers.iter().map(|server| server.name.as_str()), "name");
    let names =
        gateway.servers.iter().map(|server| server.port.as_ref().map_or("", |port| port.name.as_str()));
    cx.unique("servers", names, "port name");
    if gateway.selector.is_empty() {
        cx.at("selector", |cx| cx.warn("is empty: the gateway is for every proxy"));
    }
    cx.selector("selector", &gateway.selector);
}

fn check_server(cx: &mut Checker, server: &Server) {
    let Some(port) = &server.port else {
        cx.error_at("port", "is required");
        return;
    };
    cx.at("port", |cx| {
        check_port(cx, port);
        if port.target_port != 0 {
            cx.at("targetPort", |cx| cx.warn("has no effect in a Gateway"));
        }
    });
    cx.refuse(server.hosts.is_empty(), "hosts", "is required: at least one host");
    cx.each("hosts", &server.hosts, |cx, host| check_host(cx, host));
    cx.unique("hosts", server.hosts.iter().map(String::as_str), "host");
    if !server.bind.is_empty() && !grammar::is_ip(&server.bind) && !server.bind.starts_with("unix://") {
        cx.error_at("bind", "must be an IP address or unix:///path");
    }
    check_server_tls(cx, port, server.tls.as_ref());
    cx.refuse(
        !server.default_endpoint.is_empty() && !is_endpoint(&server.default_endpoint),
        "defaultEndpoint",
        "must be 127.0.0.1:PORT, 0.0.0.0:PORT, [::1]:PORT, [::]:PORT or unix:///path",
    );
}

/// A port of a gateway or a sidecar.
pub(super) fn check_port(cx: &mut Checker, port: &Port) {
    cx.port("number", port.number);
    if cx.required("protocol", &port.protocol) {
        check_protocol(cx, &port.protocol);
    }
    if !port.name.is_empty() && !grammar::is_subset_name(&port.name) {
        cx.error_at("name", "must be a name of letters, digits, - and .");
    }
}

pub(super) fn check_protocol(cx: &mut Checker, protocol: &str) {
    if !grammar::is_protocol(protocol) {
        cx.error_at("protocol", format!("must be one of {}", grammar::PROTOCOLS.join(", ")));
    }
}

fn check_host(cx: &mut Checker, host: &str) {
    let (namespace, name) =
        host.split_once('/').map_or((None, host), |(namespace, name)| (Some(namespace), name));
    if namespace.is_some_and(|namespace| !matches!(namespace, "*" | ".") && !grammar::is_label(namespace)) {
        cx.error("the part before the slash must be *, . or the name of a namespace");
    } else if !grammar::is_wildcard_host(name) && !grammar::is_ip(name) {
        cx.error(
            "must be a host name, or a host name with a leading *., after an optional namespace and slash",
        );
    } else if !name.contains(['.', ':', '*']) {
        cx.error("must be a full host name: short names mean nothing to clients outside the mesh");
    }
}

fn check_server_tls(cx: &mut Checker, port: &Port, tls: Option<&ServerTlsSettings>) {
    let secure = matches!(port.protocol.to_ascii_uppercase().as_str(), "HTTPS" | "TLS");
    match tls {
        None => cx.refuse(secure, "tls", "is required for the protocols HTTPS and TLS"),
        Some(tls) => cx.at("tls", |cx| {
            let redirect_only = ServerTlsSettings { https_redirect: true, ..ServerTlsSettings::default() };
            let plain = grammar::is_protocol(&port.protocol)
                && !secure
                && !port.protocol.eq_ignore_ascii_case("HBONE");
            if plain && tls.https_redirect && *tls == redirect_only {
                return;
            }
            let mesh = matches!(tls.mode, ServerTlsMode::IstioMutual);
            if plain && is_http(&port.protocol) && !mesh {
                cx.error("only httpsRedirect may be set for plain HTTP; use the protocol HTTPS");
                return;
            }
            cx.refuse(
                tls.https_redirect && secure,
                "httpsRedirect",
                "is for plain HTTP ports; this port has TLS",
            );
            check_tls(cx, tls);
        }),
    }
}

fn is_http(protocol: &str) -> bool {
    ["HTTP", "HTTP2", "GRPC", "GRPC-WEB"].iter().any(|http| http.eq_ignore_ascii_case(protocol))
}

pub(super) fn check_tls(cx: &mut Checker, tls: &ServerTlsSettings) {
    let own = !tls.credential_name.is_empty() || !tls.credential_names.is_empty();
    check_credentials(cx, tls);
    match tls.mode {
        ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual => {
            if !own && tls.tls_certificates.is_empty() {
                let message = "is required with this mode, or use credentialName";
                cx.refuse(tls.server_certificate.is_empty(), "serverCertificate", message);
                cx.refuse(tls.private_key.is_empty(), "privateKey", message);
            }
            let authorities =
                own || !tls.ca_certificates.is_empty() || !tls.ca_cert_credential_name.is_empty();
            cx.refuse(
                tls.mode == ServerTlsMode::Mutual && !authorities,
                "caCertificates",
                "is required with mode MUTUAL, or use caCertCredentialName",
            );
        }
        ServerTlsMode::IstioMutual | ServerTlsMode::Passthrough | ServerTlsMode::AutoPassthrough => {
            let message = format!("must be empty with mode {}", tls.mode.as_str());
            cx.refuse(!tls.server_certificate.is_empty(), "serverCertificate", &message);
            cx.refuse(!tls.private_key.is_empty(), "privateKey", &message);
            cx.refuse(!tls.ca_certificates.is_empty(), "caCertificates", &message);
            cx.refuse(!tls.credential_name.is_empty(), "credentialName", &message);
        }
    }
    let low = tls.min_protocol_version;
    let high = tls.max_protocol_version;
    cx.refuse(
        high != TlsProtocol::Auto && low > high,
        "minProtocolVersion",
        "must not be above maxProtocolVersion",
    );
    cx.each("verifyCertificateSpki", &tls.verify_certificate_spki, |cx, hash| {
        let bytes = base64::engine::general_purpose::STANDARD.decode(hash);
        if !bytes.is_ok_and(|bytes| bytes.len() == 32) {
            cx.error("must be a SHA-256 hash in base64");
        }
    });
    cx.each("verifyCertificateHash", &tls.verify_certificate_hash, |cx, hash| {
        let digits: String = hash.chars().filter(|c| *c != ':').collect();
        if digits.len() != 64 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            cx.error("must be a SHA-256 hash of 64 hexadecimal digits");
        }
    });
    cx.unique("cipherSuites", tls.cipher_suites.iter().map(String::as_str), "cipher suite");
}

fn check_credentials(cx: &mut Checker, tls: &ServerTlsSettings) {
    cx.refuse(
        !tls.credential_name.is_empty() && !tls.credential_names.is_empty(),
        "credentialNames",
        "only one of credentialName and credentialNames may be set",
    );
    cx.refuse(
        tls.credential_names.len() > 2,
        "credentialNames",
        "must have at most 2 entries, one for each kind of key",
    );
    let files = !tls.server_certificate.is_empty() || !tls.private_key.is_empty();
    cx.refuse(
        files && !tls.tls_certificates.is_empty(),
        "tlsCertificates",
        "only one of tlsCertificates and serverCertificate may be set",
    );
    cx.each("tlsCertificates", &tls.tls_certificates, |cx, certificate| {
        cx.required("serverCertificate", &certificate.server_certificate);
        cx.required("privateKey", &certificate.private_key);
    });
}

/// Where an application listens beside its proxy.
pub(super) fn is_endpoint(text: &str) -> bool {
    if let Some(path) = text.strip_prefix("unix://") {
        return path.starts_with(['/', '@']) && path.len() > 1;
    }
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    matches!(host, "127.0.0.1" | "0.0.0.0" | "[::1]" | "[::]")
        && port.parse::<u16>().is_ok_and(|port| port != 0)
}

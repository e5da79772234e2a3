//! TLS contexts: mutual TLS between proxies, and what a `DestinationRule` asks for towards others.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;

use super::pb;

/// Secret with the workload's own certificate and key.
pub const CERTIFICATE_SECRET: &str = "default";
/// Secret with the roots of the mesh.
pub const ROOT_SECRET: &str = "ROOTCA";
/// Bootstrap cluster of the agent's secret service.
pub const SDS_CLUSTER: &str = "sds-grpc";

const TLS_SOCKET: &str = "envoy.transport_sockets.tls";
const RAW_SOCKET: &str = "envoy.transport_sockets.raw_buffer";

/// What the proxies of a mesh say to one another in ALPN, beside the application's protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Alpn {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Opaque bytes.
    Tcp,
}

impl Alpn {
    fn client(self) -> Vec<String> {
        let names: &[&str] = match self {
            Self::Http1 => &["istio-http/1.1", "istio", "http/1.1"],
            Self::Http2 => &["istio-h2", "istio", "h2"],
            Self::Tcp => &["istio"],
        };
        names.iter().map(|&n| n.to_owned()).collect()
    }

    fn server(self) -> Vec<String> {
        match self {
            Self::Http1 | Self::Http2 => vec!["h2".to_owned(), "http/1.1".to_owned()],
            Self::Tcp => Vec::new(),
        }
    }

    /// What the application's own servers are offered.
    pub(super) fn origin(self) -> Vec<String> {
        match self {
            Self::Http1 => vec!["http/1.1".to_owned()],
            Self::Http2 => vec!["h2".to_owned()],
            Self::Tcp => Vec::new(),
        }
    }
}

/// How proxies speak TLS to one another.
#[derive(Debug, Clone, Copy)]
pub(super) struct MeshTls<'a> {
    pub(super) lowest: Lowest,
    /// Groups for the key exchange, the preferred one first; none: the proxy's own order.
    pub(super) curves: &'a [String],
}

/// The lowest version of TLS between proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lowest {
    /// 1.2, the default.
    Tls12,
    /// 1.3.
    Tls13,
}

/// Mutual TLS towards a workload of the mesh, which must prove one of `identities` (any identity of the mesh's roots,
/// when none is known).
pub(super) fn upstream_mesh<'a>(
    sni: String,
    alpn: Alpn,
    mesh: MeshTls<'_>,
    identities: impl IntoIterator<Item = &'a str>,
) -> core::TransportSocket {
    let sans = identities.into_iter().map(|id| uri_san(pb::exact(id))).collect();
    let context = tls::UpstreamTlsContext {
        common_tls_context: Some(mesh_context(alpn.client(), mesh, sans)),
        sni,
        ..Default::default()
    };
    pb::transport_socket(TLS_SOCKET, &context)
}

/// Mutual TLS with clients of the mesh: any workload of these trust domains.
pub(super) fn downstream_mesh(
    alpn: Alpn,
    mesh: MeshTls<'_>,
    trust_domains: &[String],
) -> core::TransportSocket {
    let sans =
        trust_domains.iter().map(|domain| uri_san(pb::prefix(format!("spiffe://{domain}/")))).collect();
    let context = tls::DownstreamTlsContext {
        common_tls_context: Some(mesh_context(alpn.server(), mesh, sans)),
        require_client_certificate: pb::boolv(true),
        ..Default::default()
    };
    pb::transport_socket(TLS_SOCKET, &context)
}

/// No TLS.
pub(super) fn plaintext() -> core::TransportSocket {
    pb::transport_socket(RAW_SOCKET, &RawBuffer {})
}

fn mesh_context(
    alpn_protocols: Vec<String>,
    mesh: MeshTls<'_>,
    sans: Vec<tls::SubjectAltNameMatcher>,
) -> tls::CommonTlsContext {
    let validation = tls::common_tls_context::CombinedCertificateValidationContext {
        default_validation_context: Some(tls::CertificateValidationContext {
            match_typed_subject_alt_names: sans,
            ..Default::default()
        }),
        validation_context_sds_secret_config: Some(secret(ROOT_SECRET)),
        ..Default::default()
    };
    tls::CommonTlsContext {
        tls_params: Some(parameters(mesh)),
        tls_certificate_sds_secret_configs: vec![secret(CERTIFICATE_SECRET)],
        alpn_protocols,
        validation_context_type: Some(
            tls::common_tls_context::ValidationContextType::CombinedValidationContext(validation),
        ),
        ..Default::default()
    }
}

fn parameters(mesh: MeshTls<'_>) -> tls::TlsParameters {
    let lowest = match mesh.lowest {
        Lowest::Tls12 => tls::tls_parameters::TlsProtocol::TlSv12,
        Lowest::Tls13 => tls::tls_parameters::TlsProtocol::TlSv13,
    };
    tls::TlsParameters {
        tls_minimum_protocol_version: lowest.into(),
        tls_maximum_protocol_version: tls::tls_parameters::TlsProtocol::TlSv13.into(),
        ecdh_curves: mesh.curves.to_vec(),
        ..Default::default()
    }
}

fn uri_san(
    matcher: envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher,
) -> tls::SubjectAltNameMatcher {
    tls::SubjectAltNameMatcher {
        san_type: tls::subject_alt_name_matcher::SanType::Uri.into(),
        matcher: Some(matcher),
        ..Default::default()
    }
}

fn secret(name: &str) -> tls::SdsSecretConfig {
    let grpc = core::GrpcService {
        target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(
            core::grpc_service::EnvoyGrpc { cluster_name: SDS_CLUSTER.to_owned(), ..Default::default() },
        )),
        ..Default::default()
    };
    let source = core::ApiConfigSource {
        api_type: core::api_config_source::ApiType::Grpc.into(),
        transport_api_version: core::ApiVersion::V3.into(),
        grpc_services: vec![grpc],
        set_node_on_first_message_only: true,
        ..Default::default()
    };
    tls::SdsSecretConfig {
        name: name.to_owned(),
        sds_config: Some(core::ConfigSource {
            initial_fetch_timeout: pb::zero(),
            resource_api_version: core::ApiVersion::V3.into(),
            config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::ApiConfigSource(
                source,
            )),
            ..Default::default()
        }),
    }
}

/// TLS that this proxy originates towards a server which is not part of the mesh.
#[derive(Debug, Clone, Default)]
pub(super) struct Origination<'a> {
    /// Server name; empty takes the request's host (HTTP) or none (TCP).
    pub(super) sni: &'a str,
    /// Names of which the server's certificate must have one; empty takes the server name.
    pub(super) sans: &'a [String],
    /// File with the roots that may have signed the server's certificate; empty means those of the system.
    pub(super) roots: &'a str,
    /// File with revoked certificates.
    pub(super) crl: &'a str,
    /// Own certificate chain and private key, as files.
    pub(super) certificate: Option<(&'a str, &'a str)>,
    /// Take any certificate.
    pub(super) insecure: bool,
}

/// The transport socket for [`Origination`].
pub(super) fn upstream_origination(
    origination: &Origination<'_>,
    alpn: Vec<String>,
) -> core::TransportSocket {
    let certificates = origination.certificate.map(|(chain, key)| tls::TlsCertificate {
        certificate_chain: Some(pb::file(chain)),
        private_key: Some(pb::file(key)),
        ..Default::default()
    });
    let context = tls::UpstreamTlsContext {
        common_tls_context: Some(tls::CommonTlsContext {
            tls_params: Some(parameters(MeshTls { lowest: Lowest::Tls12, curves: &[] })),
            tls_certificates: certificates.into_iter().collect(),
            alpn_protocols: alpn,
            validation_context_type: Some(tls::common_tls_context::ValidationContextType::ValidationContext(
                validation(origination),
            )),
            ..Default::default()
        }),
        sni: origination.sni.to_owned(),
        ..Default::default()
    };
    pb::transport_socket(TLS_SOCKET, &context)
}

fn validation(origination: &Origination<'_>) -> tls::CertificateValidationContext {
    if origination.insecure {
        return tls::CertificateValidationContext {
            trust_chain_verification:
                tls::certificate_validation_context::TrustChainVerification::AcceptUntrusted.into(),
            ..Default::default()
        };
    }
    let given = !origination.roots.is_empty() && origination.roots != "system";
    tls::CertificateValidationContext {
        trusted_ca: given.then(|| pb::file(origination.roots)),
        system_root_certs: (!given).then_some(tls::certificate_validation_context::SystemRootCerts {}),
        crl: (!origination.crl.is_empty()).then(|| pb::file(origination.crl)),
        match_typed_subject_alt_names: origination.sans.iter().flat_map(|san| any_san(san)).collect(),
        ..Default::default()
    }
}

/// A name of which the kind was not said: a URI when it has a scheme, an address, else a DNS name.
fn any_san(san: &str) -> Vec<tls::SubjectAltNameMatcher> {
    use tls::subject_alt_name_matcher::SanType;
    let kind = if san.contains("://") {
        SanType::Uri
    } else if san.parse::<std::net::IpAddr>().is_ok() {
        SanType::IpAddress
    } else {
        SanType::Dns
    };
    vec![tls::SubjectAltNameMatcher {
        san_type: kind.into(),
        matcher: Some(pb::exact(san)),
        ..Default::default()
    }]
}

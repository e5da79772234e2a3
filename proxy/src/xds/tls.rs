//! TLS settings of listeners and clusters: whose certificate, whom to believe, and how.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use rustls::NamedGroup;

use super::decode::{Invalid, Under as _, bool_or, data_source, is, unpack};
use super::matcher::StringMatcher;

/// A certificate chain and its key, both PEM.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PemIdentity {
    /// Leaf first, then intermediates.
    pub chain: Arc<[u8]>,
    /// The leaf's private key.
    pub key: Arc<[u8]>,
}

impl std::fmt::Debug for PemIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PemIdentity").field("chain_len", &self.chain.len()).finish_non_exhaustive()
    }
}

/// Where our own certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CertSource {
    /// The secret of this name: `default` is the workload's own identity, others are static secrets.
    Sds(Arc<str>),
    /// These.
    Pem(Box<[PemIdentity]>),
}

/// Where trusted roots come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RootSource {
    /// The secret of this name: `ROOTCA` is the mesh's bundle, others are static secrets.
    Sds(Arc<str>),
    /// These, PEM.
    Pem(Arc<[u8]>),
    /// Nobody is asked: a certificate is taken as it is. SANs are still matched where there are matchers.
    None,
}

/// Which kind of subject alternative name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SanKind {
    /// A DNS name.
    Dns,
    /// A URI, such as a SPIFFE id.
    Uri,
    /// An email address.
    Email,
    /// An IP address.
    Ip,
    /// Any of these kinds (Envoy's older, untyped matchers).
    Any,
}

/// A subject alternative name that the peer may have.
#[derive(Debug, Clone)]
pub struct SanMatcher {
    /// Its kind.
    pub kind: SanKind,
    /// How it looks.
    pub value: StringMatcher,
}

/// Whom to believe.
#[derive(Debug, Clone)]
pub struct Validation {
    /// The roots a chain must end in.
    pub roots: RootSource,
    /// One of the peer's names must be among these; empty: any name will do.
    pub sans: Box<[SanMatcher]>,
    /// Take a chain that does not verify (`trust_chain_verification: ACCEPT_UNTRUSTED`).
    pub accept_untrusted: bool,
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsVersion {
    /// 1.2
    V1_2,
    /// 1.3
    V1_3,
}

/// What both sides of TLS have in common.
#[derive(Debug, Clone)]
pub struct CommonTls {
    /// Our own certificate, if we show one.
    pub certificate: Option<CertSource>,
    /// Whom to believe; `None`: peers are not asked (server) or not checked (client), as Envoy has it.
    pub validation: Option<Validation>,
    /// Application protocols, best first.
    pub alpn: Box<[Box<[u8]>]>,
    /// The oldest version.
    pub min_version: TlsVersion,
    /// The newest version.
    pub max_version: TlsVersion,
    /// Groups for the key exchange, best first; empty: all, in this proxy's order.
    pub groups: Box<[NamedGroup]>,
}

/// TLS towards whoever connects to us.
#[derive(Debug, Clone)]
pub struct DownstreamTls {
    /// Certificates, validation, protocols.
    pub common: CommonTls,
    /// Turn away clients without a certificate.
    pub require_client_certificate: bool,
    /// Turn away clients that name no server.
    pub require_sni: bool,
}

/// TLS towards whom we connect to.
#[derive(Debug, Clone)]
pub struct UpstreamTls {
    /// Certificates, validation, protocols.
    pub common: CommonTls,
    /// The server name we send, if any.
    pub sni: Option<Arc<str>>,
    /// Send the request's authority as the server name.
    pub auto_host_sni: bool,
    /// The server's certificate must be for the server name that was sent.
    pub auto_sni_san: bool,
}

/// A named secret of a bootstrap file.
#[derive(Debug, Clone)]
pub enum Secret {
    /// Our own certificate.
    Certificate(PemIdentity),
    /// Whom to believe.
    Validation(Validation),
}

/// TLS towards clients, from a filter chain's transport socket; `None` is plain text.
///
/// # Errors
///
/// Another transport socket, or settings that cannot be met.
pub fn downstream(pb: Option<core::TransportSocket>) -> Result<Option<Arc<DownstreamTls>>, Invalid> {
    let Some(any) = typed_config(pb)? else { return Ok(None) };
    let tls: pb::DownstreamTlsContext = unpack(&any).under("typed_config")?;
    let common = tls.common_tls_context.ok_or_else(|| Invalid::missing("typed_config.common_tls_context"))?;
    let common = common_tls(common).under("typed_config.common_tls_context")?;
    if common.certificate.is_none() {
        return Err(Invalid::missing("typed_config.common_tls_context.tls_certificates"));
    }
    let require_client_certificate = bool_or(tls.require_client_certificate, false);
    if require_client_certificate && common.validation.is_none() {
        return Err(Invalid::new(
            "typed_config.common_tls_context.validation_context",
            "must be set when a client certificate is required",
        ));
    }
    let require_sni = bool_or(tls.require_sni, false);
    Ok(Some(Arc::new(DownstreamTls { common, require_client_certificate, require_sni })))
}

/// TLS towards servers, from a cluster's transport socket; `None` is plain text.
///
/// # Errors
///
/// Another transport socket, or settings that cannot be met.
pub fn upstream(pb: Option<core::TransportSocket>) -> Result<Option<Arc<UpstreamTls>>, Invalid> {
    let Some(any) = typed_config(pb)? else { return Ok(None) };
    let tls: pb::UpstreamTlsContext = unpack(&any).under("typed_config")?;
    if tls.allow_renegotiation {
        return Err(Invalid::unsupported("typed_config.allow_renegotiation"));
    }
    let common = tls.common_tls_context.unwrap_or_default();
    let common = common_tls(common).under("typed_config.common_tls_context")?;
    if tls.auto_sni_san_validation && common.validation.is_none() {
        return Err(Invalid::new("typed_config.auto_sni_san_validation", "needs a validation context"));
    }
    Ok(Some(Arc::new(UpstreamTls {
        common,
        sni: (!tls.sni.is_empty()).then(|| tls.sni.into()),
        auto_host_sni: tls.auto_host_sni,
        auto_sni_san: tls.auto_sni_san_validation,
    })))
}

/// A secret of a bootstrap file.
///
/// # Errors
///
/// A kind of secret that nothing here uses, or one that is incomplete.
pub fn secret(pb: pb::Secret) -> Result<Secret, Invalid> {
    match pb.r#type {
        Some(pb::secret::Type::TlsCertificate(c)) => {
            certificate(c).under("tls_certificate").map(Secret::Certificate)
        }
        Some(pb::secret::Type::ValidationContext(v)) => {
            validation(v, None).under("validation_context").map(Secret::Validation)
        }
        Some(pb::secret::Type::SessionTicketKeys(_) | pb::secret::Type::GenericSecret(_)) => {
            Err(Invalid::unsupported("type"))
        }
        None => Err(Invalid::missing("type")),
    }
}

/// The TLS context in a transport socket; `None` for a raw buffer or no socket at all.
fn typed_config(
    pb: Option<core::TransportSocket>,
) -> Result<Option<envoy_types::pb::google::protobuf::Any>, Invalid> {
    let Some(socket) = pb else { return Ok(None) };
    match socket.config_type {
        None if socket.name == "envoy.transport_sockets.raw_buffer" => Ok(None),
        None => Err(Invalid::missing("typed_config")),
        Some(core::transport_socket::ConfigType::TypedConfig(any)) if is::<RawBuffer>(&any) => Ok(None),
        Some(core::transport_socket::ConfigType::TypedConfig(any)) => Ok(Some(any)),
    }
}

fn common_tls(pb: pb::CommonTlsContext) -> Result<CommonTls, Invalid> {
    if pb.custom_handshaker.is_some() {
        return Err(Invalid::unsupported("custom_handshaker"));
    }
    if pb.tls_certificate_provider_instance.is_some() {
        return Err(Invalid::unsupported("tls_certificate_provider_instance"));
    }
    if pb.custom_tls_certificate_selector.is_some() {
        return Err(Invalid::unsupported("custom_tls_certificate_selector"));
    }
    let (min_version, max_version) = versions(pb.tls_params.as_ref()).under("tls_params")?;
    let curves = pb.tls_params.as_ref().map(|params| params.ecdh_curves.as_slice()).unwrap_or_default();
    let groups = groups(curves).under("tls_params")?;
    let certificate = match (pb.tls_certificates.as_slice(), pb.tls_certificate_sds_secret_configs.as_slice())
    {
        ([], []) => None,
        ([], [sds]) => Some(CertSource::Sds(sds_name(sds).under("tls_certificate_sds_secret_configs[0]")?)),
        ([], _) => {
            return Err(Invalid::new("tls_certificate_sds_secret_configs", "at most one is supported"));
        }
        (_, []) => {
            let pems = pb
                .tls_certificates
                .into_iter()
                .enumerate()
                .map(|(i, c)| certificate(c).at("tls_certificates", i))
                .collect::<Result<_, _>>()?;
            Some(CertSource::Pem(pems))
        }
        (_, _) => {
            return Err(Invalid::new(
                "tls_certificates",
                "and tls_certificate_sds_secret_configs exclude each other",
            ));
        }
    };
    if pb.alpn_protocols.iter().any(|p| p.is_empty() || p.len() > 255) {
        return Err(Invalid::new("alpn_protocols", "a name has 1 to 255 bytes"));
    }
    let alpn = pb.alpn_protocols.into_iter().map(|p| p.into_bytes().into_boxed_slice()).collect();
    let validation = validation_type(pb.validation_context_type)?;
    Ok(CommonTls { certificate, validation, alpn, min_version, max_version, groups })
}

fn versions(pb: Option<&pb::TlsParameters>) -> Result<(TlsVersion, TlsVersion), Invalid> {
    use pb::tls_parameters::TlsProtocol as Pb;
    let Some(pb) = pb else { return Ok((TlsVersion::V1_2, TlsVersion::V1_3)) };
    // Cipher suites and signature algorithms are the TLS library's own, all of them strong: a list that narrows them
    // further is met by not offering weak ones.
    let version = |value: i32, field: &str, auto: TlsVersion| match Pb::try_from(value) {
        Ok(Pb::TlsAuto) => Ok(auto),
        Ok(Pb::TlSv12) => Ok(TlsVersion::V1_2),
        Ok(Pb::TlSv13) => Ok(TlsVersion::V1_3),
        // As a minimum an older version is met by a newer one.
        Ok(Pb::TlSv10 | Pb::TlSv11) if field == "tls_minimum_protocol_version" => Ok(TlsVersion::V1_2),
        Ok(Pb::TlSv10 | Pb::TlSv11) => Err(Invalid::new(field, "TLS before 1.2 is not supported")),
        Err(_) => Err(Invalid::new(field, format!("unknown value {value}"))),
    };
    let min = version(pb.tls_minimum_protocol_version, "tls_minimum_protocol_version", TlsVersion::V1_2)?;
    let max = version(pb.tls_maximum_protocol_version, "tls_maximum_protocol_version", TlsVersion::V1_3)?;
    if min > max {
        return Err(Invalid::new("tls_minimum_protocol_version", "is above the maximum"));
    }
    Ok((min, max))
}

fn groups(curves: &[String]) -> Result<Box<[NamedGroup]>, Invalid> {
    let mut groups = Vec::new();
    for (i, name) in curves.iter().enumerate() {
        match name.as_str() {
            "X25519" => groups.push(NamedGroup::X25519),
            "P-256" => groups.push(NamedGroup::secp256r1),
            "P-384" => groups.push(NamedGroup::secp384r1),
            "X25519MLKEM768" => groups.push(NamedGroup::X25519MLKEM768),
            "P-521" => {} // Envoy's, not ours: what else is listed is used
            _ => return Err(Invalid::new("", "is no group for a key exchange")).at("ecdh_curves", i),
        }
    }
    if groups.is_empty() && !curves.is_empty() {
        return Err(Invalid::new("ecdh_curves", "one of X25519, P-256, P-384, X25519MLKEM768 is needed"));
    }
    Ok(groups.into())
}

fn sds_name(pb: &pb::SdsSecretConfig) -> Result<Arc<str>, Invalid> {
    if pb.name.is_empty() { Err(Invalid::missing("name")) } else { Ok(pb.name.as_str().into()) }
}

fn certificate(pb: pb::TlsCertificate) -> Result<PemIdentity, Invalid> {
    for (set, field) in [
        (pb.pkcs12.is_some(), "pkcs12"),
        (pb.password.is_some(), "password"),
        (pb.private_key_provider.is_some(), "private_key_provider"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    let chain = data_source(pb.certificate_chain.unwrap_or_default()).under("certificate_chain")?;
    let key = data_source(pb.private_key.unwrap_or_default()).under("private_key")?;
    Ok(PemIdentity { chain: chain.into(), key: key.into() })
}

fn validation_type(
    pb: Option<pb::common_tls_context::ValidationContextType>,
) -> Result<Option<Validation>, Invalid> {
    use pb::common_tls_context::ValidationContextType as Pb;
    #[expect(deprecated, reason = "two of the variants are refused, but must be named")]
    match pb {
        None => Ok(None),
        Some(Pb::ValidationContext(v)) => validation(v, None).under("validation_context").map(Some),
        Some(Pb::ValidationContextSdsSecretConfig(sds)) => {
            let roots = RootSource::Sds(sds_name(&sds).under("validation_context_sds_secret_config")?);
            Ok(Some(Validation { roots, sans: Box::default(), accept_untrusted: false }))
        }
        Some(Pb::CombinedValidationContext(c)) => {
            let field = "combined_validation_context";
            let sds = c
                .validation_context_sds_secret_config
                .ok_or_else(|| Invalid::missing("validation_context_sds_secret_config"))
                .under(field)?;
            let roots =
                RootSource::Sds(sds_name(&sds).under("validation_context_sds_secret_config").under(field)?);
            let default = c.default_validation_context.unwrap_or_default();
            validation(default, Some(roots)).under("default_validation_context").under(field).map(Some)
        }
        Some(
            Pb::ValidationContextCertificateProvider(_) | Pb::ValidationContextCertificateProviderInstance(_),
        ) => Err(Invalid::unsupported("validation_context_certificate_provider")),
    }
}

fn validation(
    pb: pb::CertificateValidationContext,
    roots: Option<RootSource>,
) -> Result<Validation, Invalid> {
    for (set, field) in [
        (!pb.verify_certificate_spki.is_empty(), "verify_certificate_spki"),
        (!pb.verify_certificate_hash.is_empty(), "verify_certificate_hash"),
        (pb.crl.is_some(), "crl"),
        (pb.allow_expired_certificate, "allow_expired_certificate"),
        (pb.custom_validator_config.is_some(), "custom_validator_config"),
        (pb.ca_certificate_provider_instance.is_some(), "ca_certificate_provider_instance"),
        (bool_or(pb.require_signed_certificate_timestamp, false), "require_signed_certificate_timestamp"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    let accept_untrusted = match pb.trust_chain_verification {
        0 => false,
        1 => true,
        other => return Err(Invalid::new("trust_chain_verification", format!("unknown value {other}"))),
    };
    let mut sans = pb
        .match_typed_subject_alt_names
        .into_iter()
        .enumerate()
        .map(|(i, m)| typed_san(m).at("match_typed_subject_alt_names", i))
        .collect::<Result<Vec<_>, _>>()?;
    #[expect(deprecated, reason = "configuration files still use it")]
    for (i, m) in pb.match_subject_alt_names.into_iter().enumerate() {
        let value = StringMatcher::new(m).at("match_subject_alt_names", i)?;
        sans.push(SanMatcher { kind: SanKind::Any, value });
    }
    let roots = match (roots, pb.trusted_ca) {
        (Some(roots), _) => roots,
        (None, Some(ca)) => RootSource::Pem(data_source(ca).under("trusted_ca")?.into()),
        (None, None) if pb.system_root_certs.is_some() => RootSource::Pem(system_roots()?),
        (None, None) => RootSource::None,
    };
    if matches!(roots, RootSource::None) && !sans.is_empty() && !accept_untrusted {
        return Err(Invalid::new("trusted_ca", "must be set when names are matched"));
    }
    Ok(Validation { roots, sans: sans.into(), accept_untrusted })
}

/// The roots that this machine's administrator believes, where distributions keep them.
fn system_roots() -> Result<Arc<[u8]>, Invalid> {
    const FILES: [&str; 4] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];
    let found = FILES.into_iter().find_map(|path| std::fs::read(path).ok());
    let reason = || Invalid::new("system_root_certs", format!("none of {} can be read", FILES.join(", ")));
    found.map(Into::into).ok_or_else(reason)
}

fn typed_san(pb: pb::SubjectAltNameMatcher) -> Result<SanMatcher, Invalid> {
    use pb::subject_alt_name_matcher::SanType as Pb;
    let kind = match Pb::try_from(pb.san_type) {
        Ok(Pb::Dns) => SanKind::Dns,
        Ok(Pb::Uri) => SanKind::Uri,
        Ok(Pb::Email) => SanKind::Email,
        Ok(Pb::IpAddress) => SanKind::Ip,
        Ok(Pb::OtherName) => return Err(Invalid::unsupported("san_type")),
        Ok(Pb::Unspecified) | Err(_) => {
            return Err(Invalid::new("san_type", "must be DNS, URI, EMAIL or IP_ADDRESS"));
        }
    };
    let value: matcher::StringMatcher = pb.matcher.ok_or_else(|| Invalid::missing("matcher"))?;
    Ok(SanMatcher { kind, value: StringMatcher::new(value).under("matcher")? })
}

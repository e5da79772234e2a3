//! TLS on both sides of the proxy: contexts prepared once per chain or cluster, the proxy's own identity, and what
//! is known of a peer after the handshake.
//!
//! A certificate comes from the configuration or, under the secret names `default` and `ROOTCA`, from the
//! [`Identity`] that the process renews: resolvers and verifiers read it at each handshake, so a renewal rebuilds
//! nothing and cuts nobody. Sessions are never resumed, because a resumed session shows no certificate.

pub mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use ca::tls::provider;
use ca::x509::{self, Facts};
use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, NamedGroup, RootCertStore, ServerConfig, SignatureScheme, SupportedProtocolVersion,
};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, TlsStream};

use crate::tables::TableStore;
use crate::tcp::io::{Io, Socket};
use crate::xds::cluster::Cluster;
use crate::xds::decode::{Invalid, Under as _};
use crate::xds::listener::Listener;
use crate::xds::matcher::StringMatcher;
use crate::xds::tls::{
    CertSource, CommonTls, DownstreamTls, RootSource, SanKind, SanMatcher, Secret, TlsVersion, UpstreamTls,
    Validation,
};
use verify::{Role, Roots, Trust, Verifier};

/// Why a TLS context cannot be prepared or used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Certificates or a key that do not parse or do not fit together.
    #[error("certificates: {0}")]
    Certificates(String),
    /// The proxy has no certificate yet.
    #[error("no certificate yet")]
    NoIdentity,
    /// The TLS library refuses the settings.
    #[error("tls settings")]
    Settings(#[from] rustls::Error),
}

/// A certificate chain with its key, and the roots it comes with.
#[derive(Debug)]
struct Credentials {
    own: Own,
    trust: Arc<Trust>,
}

/// A certificate of our own, and the URI names in it.
#[derive(Clone, Debug)]
pub struct Own {
    key: Arc<CertifiedKey>,
    uris: Arc<[String]>,
}

impl Own {
    fn new(key: CertifiedKey) -> Self {
        let facts = key.cert.first().and_then(|der| Facts::parse(der).ok());
        Self { key: Arc::new(key), uris: facts.map(|f| f.uris).unwrap_or_default().into() }
    }
}

/// The proxy's own certificate and roots, as the secrets `default` and `ROOTCA`. Renewed by whoever holds it.
#[derive(Debug, Default)]
pub struct Identity {
    current: ArcSwapOption<Credentials>,
}

impl Identity {
    /// Takes a new certificate chain (leaf first), its private key, and the roots to believe.
    ///
    /// # Errors
    ///
    /// When they do not parse or the key is not the leaf's; the old ones stay in use.
    pub fn publish(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: &[CertificateDer<'static>],
    ) -> Result<(), TlsError> {
        let own = Own::new(CertifiedKey::from_der(chain, key, &provider())?);
        let trust = Arc::new(Trust::new(roots)?);
        self.current.store(Some(Arc::new(Credentials { own, trust })));
        Ok(())
    }

    /// Whether there is a certificate.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.current.load().is_some()
    }

    /// The certificates in use, leaf first; empty when there is none yet.
    #[must_use]
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.current.load().as_ref().map(|c| c.own.key.cert.clone()).unwrap_or_default()
    }

    fn trust(&self) -> Option<Arc<Trust>> {
        self.current.load().as_ref().map(|c| Arc::clone(&c.trust))
    }

    fn own(&self) -> Option<Own> {
        self.current.load().as_ref().map(|c| c.own.clone())
    }
}

/// Where a context's certificate comes from.
#[derive(Clone, Debug)]
pub enum CertificateSource {
    /// The proxy's own identity.
    Identity(Arc<Identity>),
    /// A fixed one.
    Fixed(Own),
}

impl CertificateSource {
    /// A fixed certificate from PEM texts.
    ///
    /// # Errors
    ///
    /// When they do not parse or do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let chain = x509::certificates_from_pem(chain).map_err(|e| TlsError::Certificates(e.to_string()))?;
        let key = x509::key_from_pem(key).map_err(|e| TlsError::Certificates(e.to_string()))?;
        Ok(Self::Fixed(Own::new(CertifiedKey::from_der(chain, key, &provider())?)))
    }

    fn own(&self) -> Option<Own> {
        match self {
            Self::Identity(identity) => identity.own(),
            Self::Fixed(own) => Some(own.clone()),
        }
    }

    fn key(&self) -> Option<Arc<CertifiedKey>> {
        self.own().map(|own| own.key)
    }
}

/// Hands out the certificate that is current at the handshake.
#[derive(Debug)]
struct Resolver(Option<CertificateSource>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.as_ref().and_then(CertificateSource::key)
    }
}

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.as_ref().and_then(CertificateSource::key)
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

/// Settings that both sides have.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Our certificate.
    pub certificate: Option<CertificateSource>,
    /// How the peer's certificate is judged; `None`: clients are not asked for one, servers are not checked.
    pub verifier: Option<Verifier>,
    /// Application protocols, the preferred one first.
    pub alpn: Vec<Vec<u8>>,
    /// Only TLS 1.3.
    pub only_tls13: bool,
    /// Only TLS 1.2.
    pub only_tls12: bool,
    /// Groups for the key exchange, the preferred one first; empty: all.
    pub groups: Box<[NamedGroup]>,
}

impl Settings {
    /// The cryptography of connections that carry traffic. As with Envoy they prefer the classical groups, whose hello
    /// is one segment, until the configuration names others.
    fn provider(&self) -> Arc<CryptoProvider> {
        let mut provider = CryptoProvider::clone(&provider());
        if self.groups.is_empty() {
            provider.kx_groups.sort_by_key(|group| group.name() == NamedGroup::X25519MLKEM768);
        } else {
            provider.kx_groups.retain(|group| self.groups.contains(&group.name()));
            provider.kx_groups.sort_by_key(|group| self.groups.iter().position(|g| *g == group.name()));
        }
        Arc::new(provider)
    }

    fn versions(&self) -> &'static [&'static SupportedProtocolVersion] {
        const ONLY_12: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];
        const ONLY_13: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
        match (self.only_tls12, self.only_tls13) {
            (true, _) => ONLY_12,
            (_, true) => ONLY_13,
            _ => rustls::ALL_VERSIONS,
        }
    }
}

/// A filter chain's TLS, ready to accept.
#[derive(Clone, Debug)]
pub struct Acceptor {
    with_alpn: Arc<ServerConfig>,
    without_alpn: Arc<ServerConfig>,
    verifier: Option<Verifier>,
    certificate: Option<CertificateSource>,
}

impl Acceptor {
    /// Prepares `settings`; `client_required` turns away clients without a certificate.
    ///
    /// # Errors
    ///
    /// When the TLS library refuses the settings.
    pub fn new(settings: Settings, client_required: bool) -> Result<Self, TlsError> {
        let builder = ServerConfig::builder_with_provider(settings.provider())
            .with_protocol_versions(settings.versions())?;
        let verifier = settings.verifier.clone();
        let builder = match settings.verifier {
            Some(v) => builder.with_client_cert_verifier(Arc::new(v.client_required(client_required))),
            None => builder.with_no_client_auth(),
        };
        let certificate = settings.certificate.clone();
        let mut config = builder.with_cert_resolver(Arc::new(Resolver(settings.certificate)));
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        let without_alpn = Arc::new(config.clone());
        config.alpn_protocols = settings.alpn;
        Ok(Self { with_alpn: Arc::new(config), without_alpn, verifier, certificate })
    }

    /// Does the handshake.
    ///
    /// A client whose protocols have nothing in common with ours is served without one, as BoringSSL does.
    ///
    /// # Errors
    ///
    /// When the handshake fails, for instance because the client's certificate is not accepted.
    pub async fn accept(&self, socket: Socket) -> std::io::Result<(Io, Peer)> {
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket).await?;
        let hello = start.client_hello();
        let overlap = hello
            .alpn()
            .is_some_and(|mut offered| offered.any(|p| self.with_alpn.alpn_protocols.iter().any(|o| o == p)));
        let config = if overlap { &self.with_alpn } else { &self.without_alpn };
        let stream = start.into_stream(Arc::clone(config)).await?;
        let mut peer = Peer::of(stream.get_ref().1, Role::Client, self.verifier.as_ref());
        if !self.verifier.as_ref().is_some_and(Verifier::is_verifying) {
            peer.forget_certificate();
        }
        peer.server_name = stream.get_ref().1.server_name().map(str::to_owned);
        Ok((Io::Tls(Box::new(TlsStream::Server(stream))), peer))
    }

    /// URI names of our own certificate.
    #[must_use]
    pub fn own_uris(&self) -> Arc<[String]> {
        own_uris(self.certificate.as_ref())
    }
}

fn own_uris(certificate: Option<&CertificateSource>) -> Arc<[String]> {
    certificate.and_then(CertificateSource::own).map(|own| own.uris).unwrap_or_default()
}

/// A cluster's TLS, ready to connect.
#[derive(Clone, Debug)]
pub struct Connector {
    config: Arc<ClientConfig>,
    verifier: Verifier,
    certificate: Option<CertificateSource>,
    server_name: Option<ServerName<'static>>,
}

impl Connector {
    /// Prepares `settings`; `sni` is the name sent to the server, none when empty.
    ///
    /// # Errors
    ///
    /// When the TLS library refuses the settings or the name.
    pub fn new(settings: Settings, sni: &str) -> Result<Self, TlsError> {
        let builder = ClientConfig::builder_with_provider(settings.provider())
            .with_protocol_versions(settings.versions())?;
        let verifier = settings.verifier.unwrap_or_else(|| Verifier::new(Roots::Unverified, Arc::new([])));
        let certificate = settings.certificate.clone();
        let mut config = builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier.clone()))
            .with_client_cert_resolver(Arc::new(Resolver(settings.certificate)));
        config.alpn_protocols = settings.alpn;
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_sni = !sni.is_empty();
        let server_name = match sni {
            "" => None,
            name => Some(
                ServerName::try_from(name.to_owned())
                    .map_err(|e| TlsError::Certificates(format!("sni `{name}`: {e}")))?,
            ),
        };
        Ok(Self { config: Arc::new(config), verifier, certificate, server_name })
    }

    /// URI names of our own certificate.
    #[must_use]
    pub fn own_uris(&self) -> Arc<[String]> {
        own_uris(self.certificate.as_ref())
    }

    /// Does the handshake over a connected stream to `address`.
    ///
    /// # Errors
    ///
    /// When the handshake fails, for instance because the server's certificate is not accepted.
    pub async fn connect(&self, socket: Socket, address: std::net::IpAddr) -> std::io::Result<(Io, Peer)> {
        let name = self.server_name.clone().unwrap_or(ServerName::IpAddress(address.into()));
        let stream = TlsConnector::from(Arc::clone(&self.config)).connect(name, socket).await?;
        let peer = Peer::of(stream.get_ref().1, Role::Server, Some(&self.verifier));
        Ok((Io::Tls(Box::new(TlsStream::Client(stream))), peer))
    }
}

/// What a handshake told about the other side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// URI names of its verified certificate.
    pub uris: Vec<String>,
    /// DNS names of its verified certificate.
    pub dns: Vec<String>,
    /// Subject of its certificate.
    pub subject: String,
    /// SHA-256 of its certificate, in lower-case hexadecimal.
    pub fingerprint: String,
    /// Whether it showed a certificate at all.
    pub has_certificate: bool,
    /// The name it asked for.
    pub server_name: Option<String>,
    /// The negotiated application protocol.
    pub alpn: Option<Vec<u8>>,
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite's name.
    pub cipher: String,
}

impl Peer {
    fn of(connection: &rustls::CommonState, role: Role, verifier: Option<&Verifier>) -> Self {
        let chain = connection.peer_certificates().unwrap_or_default();
        // the verifier has parsed it before, so an error here cannot grant anything: no names
        let leaf = verifier.and_then(|v| v.leaf(role, chain));
        let facts = leaf.as_ref().map(|leaf| &leaf.facts);
        let (uris, dns, subject) =
            facts.map_or_else(Default::default, |f| (f.uris.clone(), f.dns.clone(), f.subject.clone()));
        let version = match connection.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
            Some(rustls::ProtocolVersion::TLSv1_2) => "TLSv1.2",
            Some(_) | None => "",
        };
        let suite = connection.negotiated_cipher_suite();
        Self {
            uris,
            dns,
            subject,
            fingerprint: leaf.map(|leaf| leaf.fingerprint.clone()).unwrap_or_default(),
            has_certificate: !chain.is_empty(),
            server_name: None,
            alpn: connection.alpn_protocol().map(<[u8]>::to_vec),
            version,
            cipher: suite.map(|s| format!("{:?}", s.suite())).unwrap_or_default(),
        }
    }

    /// Nothing vouches for the certificate, so no name in it counts.
    fn forget_certificate(&mut self) {
        self.uris.clear();
        self.dns.clear();
        self.subject.clear();
        self.fingerprint.clear();
        self.has_certificate = false;
    }

    /// The SPIFFE id, when the certificate has exactly one URI name and it is one.
    #[must_use]
    pub fn spiffe_id(&self) -> Option<&str> {
        match self.uris.as_slice() {
            [uri] if uri.starts_with("spiffe://") => Some(uri),
            _ => None,
        }
    }
}

/// Certificates and roots by the names that listeners and clusters use for them.
#[derive(Debug)]
pub struct Secrets {
    /// The proxy's own identity, as `default` and `ROOTCA`.
    pub identity: Arc<Identity>,
    /// Others, from the bootstrap file, are in the tables.
    pub tables: Arc<TableStore>,
}

impl Secrets {
    /// Prepares a filter chain's TLS.
    ///
    /// # Errors
    ///
    /// When a secret is not known or a certificate does not parse.
    pub fn acceptor(&self, tls: &DownstreamTls) -> Result<Acceptor, TlsError> {
        Named { identity: &self.identity, secrets: &self.tables.load().secrets }.acceptor(tls)
    }

    /// Prepares a cluster's TLS. `name` replaces the configured server name; with `check_name` the server's
    /// certificate must be for it.
    ///
    /// # Errors
    ///
    /// When a secret is not known or a certificate does not parse.
    pub fn connector(
        &self,
        tls: &UpstreamTls,
        name: Option<&str>,
        check_name: bool,
    ) -> Result<Connector, TlsError> {
        let secrets = &self.tables.load().secrets;
        Named { identity: &self.identity, secrets }.connector(tls, name, check_name)
    }
}

/// Static secrets by name, as the tables hold them.
pub type StaticSecrets = BTreeMap<Arc<str>, Arc<Secret>>;

/// Whether a listener's TLS contexts can be prepared: its secrets are there, its certificates parse and fit.
///
/// # Errors
///
/// The filter chain that cannot serve, and why.
pub fn check_listener(listener: &Listener, secrets: &StaticSecrets) -> Result<(), Invalid> {
    let identity = Arc::default();
    let named = Named { identity: &identity, secrets };
    for (i, chain) in listener.chains.iter().chain(&listener.default_chain).enumerate() {
        if let Some(tls) = &chain.tls {
            named.acceptor(tls).map_err(invalid).under("transport_socket").at("filter_chains", i)?;
        }
    }
    Ok(())
}

/// Whether a cluster's TLS contexts can be prepared.
///
/// # Errors
///
/// The transport socket that cannot connect, and why.
pub fn check_cluster(cluster: &Cluster, secrets: &StaticSecrets) -> Result<(), Invalid> {
    let identity = Arc::default();
    let named = Named { identity: &identity, secrets };
    if let Some(tls) = &cluster.transport.tls {
        named.connector(tls, None, tls.auto_sni_san).map_err(invalid).under("transport_socket")?;
    }
    for (i, wanted) in cluster.transport_matches.iter().enumerate() {
        if let Some(tls) = &wanted.transport.tls {
            let prepared = named.connector(tls, None, tls.auto_sni_san);
            prepared.map_err(invalid).under("transport_socket").at("transport_socket_matches", i)?;
        }
    }
    Ok(())
}

fn invalid(error: TlsError) -> Invalid {
    let reason = match &error {
        TlsError::Settings(cause) => format!("{error}: {cause}"),
        TlsError::Certificates(_) | TlsError::NoIdentity => error.to_string(),
    };
    Invalid::new("", reason)
}

/// What names of secrets stand for.
struct Named<'a> {
    identity: &'a Arc<Identity>,
    secrets: &'a StaticSecrets,
}

impl Named<'_> {
    fn acceptor(&self, tls: &DownstreamTls) -> Result<Acceptor, TlsError> {
        Acceptor::new(self.settings(&tls.common)?, tls.require_client_certificate)
    }

    fn connector(
        &self,
        tls: &UpstreamTls,
        name: Option<&str>,
        check_name: bool,
    ) -> Result<Connector, TlsError> {
        let sni = name.or(tls.sni.as_deref()).unwrap_or_default();
        let mut settings = self.settings(&tls.common)?;
        if check_name {
            let matcher = SanMatcher { kind: SanKind::Dns, value: StringMatcher::Exact(sni.into()) };
            settings.verifier = settings.verifier.map(|v| v.with_names(Arc::new([matcher])));
        }
        Connector::new(settings, sni)
    }

    fn settings(&self, common: &CommonTls) -> Result<Settings, TlsError> {
        let certificate = common.certificate.as_ref().map(|c| self.certificate(c)).transpose()?;
        let verifier = common.validation.as_ref().map(|v| self.verifier(v)).transpose()?;
        Ok(Settings {
            certificate,
            verifier: verifier.flatten(),
            alpn: common.alpn.iter().map(|p| p.to_vec()).collect(),
            only_tls13: common.min_version == TlsVersion::V1_3,
            only_tls12: common.max_version == TlsVersion::V1_2,
            groups: common.groups.clone(),
        })
    }

    fn certificate(&self, source: &CertSource) -> Result<CertificateSource, TlsError> {
        match source {
            CertSource::Sds(name) => match self.secrets.get(name).map(Arc::as_ref) {
                Some(Secret::Certificate(pem)) => CertificateSource::from_pem(&pem.chain, &pem.key),
                None if &**name == "default" => Ok(CertificateSource::Identity(Arc::clone(self.identity))),
                Some(Secret::Validation(_)) | None => Err(unknown(name)),
            },
            CertSource::Pem(list) => match list.first() {
                Some(pem) => CertificateSource::from_pem(&pem.chain, &pem.key),
                None => Err(TlsError::Certificates("none given".to_owned())),
            },
        }
    }

    /// `None` when nobody is to be verified at all.
    fn verifier(&self, validation: &Validation) -> Result<Option<Verifier>, TlsError> {
        let names: Arc<[SanMatcher]> = validation.sans.iter().cloned().collect();
        let roots = match &validation.roots {
            _ if validation.accept_untrusted => Roots::Unverified,
            RootSource::None => return Ok(None),
            RootSource::Pem(pem) => Roots::Fixed(trust_from_pem(pem)?),
            RootSource::Sds(name) => match self.secrets.get(name).map(Arc::as_ref) {
                Some(Secret::Validation(v)) => {
                    let inner = self.verifier(v)?;
                    return Ok(inner.map(|i| if names.is_empty() { i } else { i.with_names(names) }));
                }
                None if &**name == "ROOTCA" => Roots::Identity(Arc::clone(self.identity)),
                Some(Secret::Certificate(_)) | None => return Err(unknown(name)),
            },
        };
        Ok(Some(Verifier::new(roots, names)))
    }
}

fn unknown(name: &str) -> TlsError {
    TlsError::Certificates(format!("no secret `{name}`"))
}

/// Root certificates from PEM.
///
/// # Errors
///
/// When the text holds no certificate, or a broken one.
pub fn trust_from_pem(pem: &[u8]) -> Result<Arc<Trust>, TlsError> {
    let roots = x509::certificates_from_pem(pem).map_err(|e| TlsError::Certificates(e.to_string()))?;
    Ok(Arc::new(Trust::new(&roots)?))
}

fn root_store(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    Ok(store)
}

#[cfg(test)]
mod tests;

//! rustls server and client configurations, and the verifiers of peers.
//!
//! [`server_config`] and [`client_config`] are for the mesh's own connections: they present the identity that is
//! current at the time of each handshake, so a renewal needs no new configuration and cuts no connection.
//! [`ServerTls`] and [`ClientTls`] are the parts they are made of, for a proxy that is told by xDS what to present
//! and whom to believe. Sessions are never resumed: a resumed session does not verify the peer again.

use std::fmt;
use std::sync::{Arc, LazyLock};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CipherSuite, ClientConfig, ServerConfig, SupportedProtocolVersion};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;

use crate::identity::SpiffeId;
use crate::svid::Identity;
use crate::x509;

pub mod accept;
pub mod names;
pub mod verify;

pub use accept::{PeerCertificates, ServerContext, TlsConnection, accept};
pub use names::{NameKind, NameMatch, NameMatcher};
pub use verify::{Anchors, ExpectedIdentities, PeerRefused, Trust, Verify};

/// Where a configuration reads the identity that is current.
pub type IdentityWatch = watch::Receiver<Arc<Identity>>;

/// The cryptography in use: aws-lc-rs. Passed explicitly, so that no other provider in the process can interfere.
///
/// AES-128-GCM is preferred: it is as strong as the P-256 keys of the mesh, and what Envoy prefers too.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        // a stable sort: new versions stay before old ones, the rest keeps its order
        provider.cipher_suites.sort_by_key(|suite| (suite.tls13().is_none(), !is_aes_128(suite.suite())));
        Arc::new(provider)
    });
    Arc::clone(&PROVIDER)
}

fn is_aes_128(suite: CipherSuite) -> bool {
    use CipherSuite as S;
    matches!(
        suite,
        S::TLS13_AES_128_GCM_SHA256
            | S::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | S::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
    )
}

/// A chain and its key as rustls presents them.
///
/// # Errors
///
/// When the key is of a kind that cannot sign handshakes, or is not the leaf's.
pub fn certified_key(
    chain: Vec<CertificateDer<'static>>,
    key: &PrivateKeyDer<'static>,
) -> Result<CertifiedKey, rustls::Error> {
    CertifiedKey::from_der(chain, key.clone_key(), &provider())
}

/// A chain and its key from PEM texts.
///
/// # Errors
///
/// When a text is not PEM, the key cannot sign handshakes, or is not the leaf's.
pub fn certified_key_from_pem(chain: &[u8], key: &[u8]) -> Result<CertifiedKey, rustls::Error> {
    let general = |e: x509::X509Error| rustls::Error::General(e.to_string());
    let chain = x509::certificates_from_pem(chain).map_err(general)?;
    certified_key(chain, &x509::key_from_pem(key).map_err(general)?)
}

/// What is presented to peers.
#[derive(Clone)]
pub enum Own {
    /// Nothing (clients only; a server without a certificate refuses every handshake).
    Nothing,
    /// Always this chain and key.
    Fixed(Arc<CertifiedKey>),
    /// The identity that is current.
    Current(IdentityWatch),
    /// The identity that is current, and the roots after it: for servers whose clients may only know a root's
    /// fingerprint.
    CurrentWithRoots(IdentityWatch),
}

impl Own {
    fn get(&self) -> Option<Arc<CertifiedKey>> {
        match self {
            Self::Nothing => None,
            Self::Fixed(key) => Some(Arc::clone(key)),
            Self::Current(watch) => Some(Arc::clone(watch.borrow().certified())),
            Self::CurrentWithRoots(watch) => Some(Arc::clone(watch.borrow().certified_with_roots())),
        }
    }
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "Nothing",
            Self::Fixed(_) => "Fixed",
            Self::Current(_) => "Current",
            Self::CurrentWithRoots(_) => "CurrentWithRoots",
        })
    }
}

impl ResolvesServerCert for Own {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.get()
    }
}

impl ResolvesClientCert for Own {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.get()
    }

    fn has_certs(&self) -> bool {
        !matches!(self, Self::Nothing)
    }
}

/// Whether a server asks clients for a certificate. One that is presented is always verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// Clients are not asked.
    None,
    /// Clients are asked, and may have none.
    Optional,
    /// Clients without a certificate are refused.
    Required,
}

/// Oldest TLS version that is spoken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MinVersion {
    /// TLS 1.2.
    #[default]
    Tls12,
    /// TLS 1.3.
    Tls13,
}

impl MinVersion {
    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        static BOTH: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];
        static NEW: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
        match self {
            Self::Tls12 => &BOTH,
            Self::Tls13 => &NEW,
        }
    }
}

/// A server's side of TLS.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// What is presented to clients.
    pub own: Own,
    /// Whether clients are asked for a certificate.
    pub client_auth: ClientAuth,
    /// How a client's certificate is verified.
    pub verify: Verify,
    /// Protocols by preference; none is negotiated when empty.
    pub alpn: Vec<Vec<u8>>,
    /// Oldest TLS version.
    pub min_version: MinVersion,
}

impl ServerTls {
    /// The configuration for rustls.
    ///
    /// It refuses a client none of whose protocols is among ours; [`ServerContext`] goes on without one.
    ///
    /// # Errors
    ///
    /// When rustls does not accept the combination.
    pub fn build(&self) -> Result<Arc<ServerConfig>, rustls::Error> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(self.min_version.versions())?;
        let builder = match self.client_auth {
            ClientAuth::None => builder.with_no_client_auth(),
            ClientAuth::Optional => builder.with_client_cert_verifier(Arc::new(self.verifier(false))),
            ClientAuth::Required => builder.with_client_cert_verifier(Arc::new(self.verifier(true))),
        };
        let mut config = builder.with_cert_resolver(Arc::new(self.own.clone()));
        config.alpn_protocols.clone_from(&self.alpn);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn verifier(&self, mandatory: bool) -> verify::PeerVerifier {
        verify::PeerVerifier::new(self.verify.clone(), mandatory)
    }
}

/// A client's side of TLS.
#[derive(Debug, Clone)]
pub struct ClientTls {
    /// What is presented to servers that ask.
    pub own: Own,
    /// How the server's certificate is verified.
    pub verify: Verify,
    /// Protocols by preference; none is offered when empty.
    pub alpn: Vec<Vec<u8>>,
    /// Oldest TLS version.
    pub min_version: MinVersion,
}

impl ClientTls {
    /// The configuration for rustls.
    ///
    /// # Errors
    ///
    /// When rustls does not accept the combination.
    pub fn build(&self) -> Result<Arc<ClientConfig>, rustls::Error> {
        self.build_with(Arc::new(verify::PeerVerifier::new(self.verify.clone(), true)))
    }

    pub(crate) fn build_with(
        &self,
        verifier: Arc<dyn rustls::client::danger::ServerCertVerifier>,
    ) -> Result<Arc<ClientConfig>, rustls::Error> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(self.min_version.versions())?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match self.own {
            Own::Nothing => builder.with_no_client_auth(),
            Own::Fixed(_) | Own::Current(_) | Own::CurrentWithRoots(_) => {
                builder.with_client_cert_resolver(Arc::new(self.own.clone()))
            }
        };
        config.alpn_protocols.clone_from(&self.alpn);
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// A server of the mesh: presents the identity that is current, and accepts clients of its trust domain.
///
/// # Errors
///
/// When rustls does not accept the combination.
pub fn server_config(
    source: IdentityWatch,
    client_auth: ClientAuth,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, rustls::Error> {
    mesh_server(Own::Current(source.clone()), source, client_auth, alpn)
}

/// Like [`server_config`], and presents the roots too, for clients that only know a root's fingerprint
/// ([`crate::client::bootstrap_tls`]).
///
/// # Errors
///
/// When rustls does not accept the combination.
pub fn server_config_with_roots(
    source: IdentityWatch,
    client_auth: ClientAuth,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, rustls::Error> {
    mesh_server(Own::CurrentWithRoots(source.clone()), source, client_auth, alpn)
}

fn mesh_server(
    own: Own,
    source: IdentityWatch,
    client_auth: ClientAuth,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let domain = source.borrow().spiffe_id.trust_domain();
    let expected = ExpectedIdentities::TrustDomains([domain].into());
    let verify = Verify::Peer { trust: Trust::Current(source), expected };
    ServerTls { own, client_auth, verify, alpn: to_alpn(alpn), min_version: MinVersion::Tls12 }.build()
}

/// A client of the mesh: presents the identity that is current, and accepts a server with an expected identity.
///
/// # Errors
///
/// When rustls does not accept the combination.
pub fn client_config(
    source: IdentityWatch,
    expected: ExpectedIdentities,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let verify = Verify::Peer { trust: Trust::Current(source.clone()), expected };
    ClientTls { own: Own::Current(source), verify, alpn: to_alpn(alpn), min_version: MinVersion::Tls12 }
        .build()
}

/// The SPIFFE identity of the peer of a finished handshake; none when it presented no certificate, or one without a
/// single SPIFFE identity.
#[must_use]
pub fn peer_identity(connection: &rustls::CommonState) -> Option<SpiffeId> {
    x509::spiffe_id(connection.peer_certificates()?.first()?).ok()
}

fn to_alpn(protocols: &[&[u8]]) -> Vec<Vec<u8>> {
    protocols.iter().map(|protocol| protocol.to_vec()).collect()
}

#[cfg(test)]
#[path = "tls/tests.rs"]
mod tests;

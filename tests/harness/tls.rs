//! Clients that know TLS: with the certificate of a workload, and with certificates that must be refused.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ca::keystore::KeyStore;
use ca::seal::SealingKey;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::http::{self, Answer};

/// A refused client waits no longer than this.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a client shows.
#[derive(Debug)]
pub struct Credentials {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

impl Credentials {
    /// The identity that an agent keeps in its data folder.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn of_agent(data: &Path) -> anyhow::Result<Self> {
        let plain = KeyStore::open(data)?;
        let key = plain.load("sealing-key")?.with_context(|| format!("no key in {}", data.display()))?;
        let text = plain.sealed(SealingKey::from_bytes(&key)?).load("identity")?.context("no identity")?;
        let text = String::from_utf8(text.to_vec())?;
        let own = text.split("roots:\n").next().unwrap_or_default();
        let chain = CertificateDer::pem_slice_iter(own.as_bytes()).collect::<Result<_, _>>()?;
        Ok(Self { chain, key: PrivateKeyDer::from_pem_slice(own.as_bytes())? })
    }
}

/// A certificate authority of the test's own.
#[derive(Debug)]
pub struct Authority {
    /// Its certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new self-signed root.
    ///
    /// # Errors
    ///
    /// When keys cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let params = authority("root");
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            issuer: Issuer::new(params, key),
        })
    }

    /// An authority below this one.
    ///
    /// # Errors
    ///
    /// When keys cannot be made.
    pub fn below(&self) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let params = authority("below");
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Self {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            issuer: Issuer::new(params, key),
        })
    }

    /// A certificate for a SPIFFE identity, with the authority's own behind it.
    ///
    /// # Errors
    ///
    /// When the identity is none.
    pub fn issue(&self, identity: &str) -> anyhow::Result<Credentials> {
        let (key, leaf) = self.sign(identity)?;
        let root = CertificateDer::from_pem_slice(self.certificate.as_bytes())?;
        Ok(Credentials {
            chain: vec![leaf.der().clone(), root],
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        })
    }

    /// A certificate of this identity and its key, as PEM.
    ///
    /// # Errors
    ///
    /// When the identity is none.
    pub fn pems(&self, identity: &str) -> anyhow::Result<(String, String)> {
        let (key, leaf) = self.sign(identity)?;
        Ok((leaf.pem(), key.serialize_pem()))
    }

    fn sign(&self, identity: &str) -> anyhow::Result<(KeyPair, Certificate)> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(&key, &self.issuer)?;
        Ok((key, leaf))
    }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// Sends `GET /` with the host over mTLS as our proxies do, without looking at who answers.
///
/// # Errors
///
/// When the server refuses the client.
pub async fn get(
    address: SocketAddr,
    credentials: Option<Credentials>,
    host: &str,
) -> anyhow::Result<Answer> {
    let exchange = async {
        let stream = connect(address, credentials, host).await?;
        http::over(stream, http::request("GET", host, "/", &[])?).await
    };
    tokio::time::timeout(PATIENCE, exchange).await.context("no answer")?
}

async fn connect(
    address: SocketAddr,
    credentials: Option<Credentials>,
    host: &str,
) -> anyhow::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)));
    let mut config = match credentials {
        Some(credentials) => builder.with_client_auth_cert(credentials.chain, credentials.key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = [&b"istio-http/1.1"[..], b"istio", b"http/1.1"].map(<[u8]>::to_vec).to_vec();
    let tcp = TcpStream::connect(address).await?;
    let name = ServerName::try_from(format!("outbound_.80_._.{host}"))?;
    Ok(TlsConnector::from(Arc::new(config)).connect(name, tcp).await?)
}

/// Believes every server: these clients are here to be looked at.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

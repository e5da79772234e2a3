//! An authority plugged in from files, and the checks that it can work.

use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::{PrivateKey, SigningRoot};
use crate::x509::{self, Facts, X509Error};

/// What is wrong with plugged-in files. Each error names the file.
#[derive(Debug, thiserror::Error)]
pub enum PluggedError {
    /// A file cannot be read as what it should be.
    #[error("{file} cannot be used")]
    Unusable {
        /// The file.
        file: &'static str,
        /// What is wrong.
        #[source]
        source: X509Error,
    },
    /// `ca-key.pem` is not a key that can sign.
    #[error("ca-key.pem cannot sign; give an ECDSA, Ed25519 or RSA key in PEM without a passphrase")]
    Key(#[source] rcgen::Error),
    /// The key is not the certificate's.
    #[error("ca-key.pem is not the key of ca-cert.pem")]
    KeyMismatch,
    /// A certificate in a place of an authority may not sign.
    #[error("{file}: `{subject}` may not sign certificates (basic constraints or key usage)")]
    NotAuthority {
        /// The file.
        file: &'static str,
        /// The certificate's subject.
        subject: String,
    },
    /// A certificate has ended, or is not valid yet.
    #[error("{file}: `{subject}` is not valid at this time")]
    NotValid {
        /// The file.
        file: &'static str,
        /// The certificate's subject.
        subject: String,
    },
    /// No path leads from `ca-cert.pem` over `cert-chain.pem` to `root-cert.pem`.
    #[error(
        "`{subject}` is not signed by the next certificate of cert-chain.pem, nor by one of root-cert.pem"
    )]
    Broken {
        /// Subject of the certificate whose issuer is missing.
        subject: String,
    },
}

/// The four PEM files of a plugged-in authority, named as Istio names them.
#[derive(Debug, Clone)]
pub struct PluggedIn {
    /// `ca-cert.pem`: the certificate that signs.
    pub ca_cert: String,
    /// `ca-key.pem`: its private key.
    pub ca_key: Zeroizing<String>,
    /// `cert-chain.pem`: certificates above it. It may begin with `ca-cert.pem` and end with the root, and may be
    /// empty when a root signs `ca-cert.pem`.
    pub cert_chain: String,
    /// `root-cert.pem`: the roots to believe.
    pub root_cert: String,
}

impl PluggedIn {
    /// Checks that the files belong together and can sign at `now`.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, with the file in which it is.
    pub fn check(&self, now: SystemTime) -> Result<SigningRoot, PluggedError> {
        let roots = certificates("root-cert.pem", &self.root_cert)?;
        let mut cas = certificates("ca-cert.pem", &self.ca_cert)?;
        let cert = cas.swap_remove(0);
        let above: Vec<_> = match self.cert_chain.trim() {
            "" => Vec::new(),
            chain => certificates("cert-chain.pem", chain)?,
        };
        let above: Vec<_> = above.into_iter().filter(|c| *c != cert && !roots.contains(c)).collect();
        let facts = check_authority("ca-cert.pem", &cert, now)?;
        for upper in &above {
            check_authority("cert-chain.pem", upper, now)?;
        }
        for root in &roots {
            check_authority("root-cert.pem", root, now)?;
        }
        let key = key(&self.ca_key, &facts)?;
        check_path(&cert, &above, &roots)?;
        Ok(SigningRoot { cert, key, above, roots, facts })
    }
}

fn certificates(file: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, PluggedError> {
    x509::certificates_from_pem(pem.as_bytes()).map_err(|source| PluggedError::Unusable { file, source })
}

fn check_authority(
    file: &'static str,
    cert: &CertificateDer<'_>,
    now: SystemTime,
) -> Result<Facts, PluggedError> {
    let facts = Facts::parse(cert).map_err(|source| PluggedError::Unusable { file, source })?;
    if !facts.is_ca || !facts.can_sign {
        return Err(PluggedError::NotAuthority { file, subject: facts.subject });
    }
    if !facts.is_valid_at(now) {
        return Err(PluggedError::NotValid { file, subject: facts.subject });
    }
    Ok(facts)
}

fn key(pem: &str, facts: &Facts) -> Result<PrivateKey, PluggedError> {
    let der = x509::key_from_pem(pem.as_bytes())
        .map_err(|source| PluggedError::Unusable { file: "ca-key.pem", source })?;
    let pair = rcgen::KeyPair::try_from(&der).map_err(PluggedError::Key)?;
    if rcgen::PublicKeyData::subject_public_key_info(&pair) != facts.public_key {
        return Err(PluggedError::KeyMismatch);
    }
    Ok(PrivateKey::from_key_pair(&pair))
}

fn check_path(
    cert: &CertificateDer<'_>,
    above: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
) -> Result<(), PluggedError> {
    let mut lower = cert;
    for upper in above {
        if !issued(lower, upper) {
            return Err(broken(lower));
        }
        lower = upper;
    }
    let ends = roots.iter().any(|root| root.as_ref() == lower.as_ref() || issued(lower, root));
    if ends { Ok(()) } else { Err(broken(lower)) }
}

fn issued(cert: &CertificateDer<'_>, issuer: &CertificateDer<'_>) -> bool {
    x509::is_issued_by(cert, issuer).unwrap_or(false)
}

fn broken(cert: &CertificateDer<'_>) -> PluggedError {
    PluggedError::Broken { subject: Facts::parse(cert).map(|facts| facts.subject).unwrap_or_default() }
}

//! Parsers of the certificate authority.

use ca::authn::{Hash, JoinToken};
use ca::identity::{SpiffeId, TrustDomain};
use ca::node::NodeId;
use ca::state::CaState;
use ca::x509::{self, Facts};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};

use crate::{choice, text};

/// Certificates, as DER: the names that we read are the names that the verifier below TLS reads.
pub fn certificate(bytes: &[u8]) {
    let der = CertificateDer::from(bytes);
    let Ok(facts) = Facts::parse(&der) else {
        assert!(x509::spiffe_id(&der).is_err());
        return;
    };
    assert!(!facts.uris.iter().chain(&facts.dns).any(|name| name.contains('\0')));
    match facts.spiffe_id() {
        Ok(id) => assert_eq!([id.as_str()], *facts.uris),
        Err(_) => assert!(facts.uris.len() != 1 || SpiffeId::parse(&facts.uris[0]).is_err()),
    }
    let _node = facts.node();
    let pem = x509::to_pem("CERTIFICATE", &der);
    assert_eq!(x509::certificates_from_pem(pem.as_bytes()).as_deref(), Ok(&[der.clone()][..]));
    let _issued = x509::is_issued_by(&der, &der);
    if let Ok(theirs) = webpki::EndEntityCert::try_from(&der) {
        let names: Vec<&str> = theirs.valid_uri_names().collect();
        assert!(names.iter().all(|name| facts.uris.iter().any(|uri| uri == name)), "{names:?} {facts:?}");
    }
}

/// Certificate requests, as DER or PEM.
pub fn request(bytes: &[u8]) {
    let Some((form, rest)) = choice(bytes) else { return };
    let csr = if form & 1 == 0 {
        CertificateSigningRequestDer::from(rest.to_vec())
    } else {
        match x509::csr_from_pem(rest) {
            Ok(csr) => csr,
            Err(_) => return,
        }
    };
    let (key, names) = (x509::csr_public_key(&csr), x509::csr_names(&csr));
    if csr.len() > x509::MAX_CSR_LEN {
        assert!(key.is_err() && names.is_err());
    }
    if let Ok(key) = key {
        assert!(csr.windows(key.len()).any(|part| part == key));
    }
}

/// PEM texts: certificates, keys and requests.
pub fn pem(bytes: &[u8]) {
    if let Ok(certificates) = x509::certificates_from_pem(bytes) {
        assert!(!certificates.is_empty());
        let text = x509::certificates_to_pem(&certificates);
        assert_eq!(x509::certificates_from_pem(text.as_bytes()), Ok(certificates));
    }
    let _key = x509::key_from_pem(bytes);
    let _key = ca::svid::PrivateKey::from_pem(bytes);
    let _anchors = ca::tls::verify::Anchors::from_pem(bytes);
    if let Some(text) = text(bytes) {
        let reply: Vec<String> = text.split('\x1f').map(str::to_owned).collect();
        if let Ok(chain) = ca::svid::Chain::from_reply(&reply) {
            assert_eq!(ca::svid::Chain::from_reply(&chain.to_reply()), Ok(chain));
        }
    }
}

/// Identities, tokens and fingerprints as text: what is read is what is written.
pub fn identity(bytes: &[u8]) {
    let Some((kind, rest)) = choice(bytes) else { return };
    let Some(text) = text(rest) else { return };
    match kind % 5 {
        0 => {
            let Ok(id) = SpiffeId::parse(text) else { return };
            assert_eq!(id.as_str(), text);
            assert!(text.len() <= 2048 && !text.contains(['%', '\0', '?', '#', '@']));
            assert_eq!(format!("spiffe://{}{}", id.trust_domain_str(), id.path()), text);
            if let Some((namespace, account)) = id.workload_parts() {
                let same = SpiffeId::workload(&id.trust_domain(), namespace, account);
                assert_eq!(same.as_ref().ok(), Some(&id), "{text}");
            }
        }
        1 => {
            let Ok(domain) = TrustDomain::parse(text) else { return };
            assert_eq!(domain.as_str(), text);
            assert!(SpiffeId::parse(&format!("spiffe://{text}/ns/a/sa/b")).is_ok());
        }
        2 => {
            // most inputs are the JSON inside, encoded here
            let encoded = JoinToken::parse(text).or_else(|_| {
                use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
                JoinToken::parse(&format!(
                    "{}{}",
                    ca::authn::TOKEN_PREFIX,
                    BASE64_URL_SAFE_NO_PAD.encode(text)
                ))
            });
            let Ok(token) = encoded else { return };
            let written = token.to_text();
            assert!(
                written.len() > 16 * 1024 || JoinToken::parse(&written) == Ok(token.clone()),
                "{written}"
            );
            let _presented = token.presented();
        }
        3 => {
            let Ok(hash) = Hash::try_from(text.to_owned()) else { return };
            assert_eq!(hash.to_string(), text.to_ascii_lowercase());
        }
        _ => {
            let _of_serial = NodeId::of_serial(text);
            let Ok(node) = text.parse::<NodeId>() else { return };
            assert_eq!(node.to_string().parse(), Ok(node));
        }
    }
}

/// The authority's state as it is stored.
pub fn state(bytes: &[u8]) {
    let Ok(state) = CaState::decode(bytes) else { return };
    let encoded = state.encode();
    let again = CaState::decode(&encoded).expect("what was written is read");
    assert_eq!(again.encode(), encoded);
    let entries = state.entries();
    assert!(entries.len() <= bytes.len());
}

//! What the tests of this crate share: authorities, identities, clocks.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, SanType};
use rustls::sign::CertifiedKey;

use crate::authn::Caller;
use crate::authority::{Authority, Lifetimes, Serial, SigningRoot};
use crate::identity::{SpiffeId, TrustDomain};
use crate::svid::{Chain, Identity, PrivateKey};
use crate::tls;
use crate::x509;

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

#[expect(clippy::disallowed_methods, reason = "rustls verifies real handshakes by the system's clock")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

pub(crate) fn serial() -> Serial {
    Serial::random().unwrap()
}

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::default()
}

pub(crate) fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://{text}")).unwrap()
}

pub(crate) fn reviews() -> SpiffeId {
    id("cluster.local/ns/default/sa/reviews")
}

pub(crate) fn ratings() -> SpiffeId {
    id("cluster.local/ns/default/sa/ratings")
}

/// One authority of its own root.
pub(crate) struct Ca {
    pub(crate) root: SigningRoot,
    pub(crate) authority: Arc<Authority>,
}

pub(crate) fn ca_at(domain: &TrustDomain, at: SystemTime) -> Ca {
    let root = SigningRoot::generate(domain, at, serial()).unwrap();
    let authority = root.member(domain, "a", Lifetimes::default(), at, serial()).unwrap();
    Ca { root, authority: Arc::new(authority) }
}

pub(crate) fn ca() -> Ca {
    ca_at(&domain(), now() - HOUR)
}

impl Ca {
    /// An identity issued at `at` for `lifetime`.
    pub(crate) fn issue_at(&self, who: &SpiffeId, at: SystemTime, lifetime: Duration) -> Arc<Identity> {
        let key = PrivateKey::generate().unwrap();
        let csr = key.request().unwrap();
        let caller = Caller::from_redeemed_token(who.clone(), "t");
        let chain = self.authority.sign(csr.der(), &caller, Some(lifetime), at, serial()).unwrap();
        Arc::new(Identity::new(chain, key, at).unwrap())
    }

    pub(crate) fn issue(&self, who: &SpiffeId) -> Arc<Identity> {
        self.issue_at(who, now(), HOUR)
    }

    pub(crate) fn control_plane(&self) -> Arc<Identity> {
        let key = PrivateKey::generate().unwrap();
        let csr = key.request().unwrap();
        let names = ["istiod.istio-system.svc".to_owned()];
        let chain = self.authority.sign_control_plane(csr.der(), &names, None, now(), serial()).unwrap();
        Arc::new(Identity::new(chain, key, now()).unwrap())
    }

    /// A leaf that the policy would never sign, by this authority's key.
    pub(crate) fn forge(&self, uris: &[&str], usages: &[ExtendedKeyUsagePurpose]) -> (Chain, PrivateKey) {
        let key = PrivateKey::generate().unwrap();
        let issuing = PrivateKey::from_pem(self.authority.key_pem().as_bytes()).unwrap();
        let cert = self.authority.chain().first().unwrap();
        let issuer = Issuer::from_ca_cert_der(cert, issuing.key_pair().unwrap()).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris.iter().map(|u| SanType::URI((*u).try_into().unwrap())).collect();
        params.extended_key_usages = usages.to_vec();
        let leaf = params.signed_by(&key.key_pair().unwrap(), &issuer).unwrap().der().clone();
        let chain = Chain {
            leaf,
            intermediates: self.authority.chain().to_vec(),
            roots: self.authority.roots().to_vec(),
        };
        (chain, key)
    }
}

pub(crate) fn certified(chain: &Chain, key: &PrivateKey) -> Arc<CertifiedKey> {
    Arc::new(tls::certified_key(chain.presented(), &key.to_der()).unwrap())
}

pub(crate) fn serial_of(identity: &Identity) -> String {
    x509::Facts::parse(&identity.chain[0]).unwrap().serial
}

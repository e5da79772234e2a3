//! The trust bundle: the roots a mesh believes, and where each stands in its rotation.
//!
//! A root is first [`RootPhase::Next`] (believed, signs nothing), then [`RootPhase::Active`] (new intermediates are
//! signed by it), then [`RootPhase::Retired`] (believed until the last leaf below it has ended), then removed. So a
//! handshake fails at no step: whoever presents a chain presents one that everybody already believes.

use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::x509::{self, Facts, X509Error};

/// Where a root stands in its rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RootPhase {
    /// Believed, but signs nothing yet.
    Next,
    /// Signs new intermediates. At most one root of a bundle is active.
    Active,
    /// Signs nothing any more, still believed.
    Retired,
}

/// Why a bundle could not be changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// The certificate cannot be read.
    #[error("the root cannot be read")]
    Malformed(#[from] X509Error),
    /// The certificate may not sign others.
    #[error("`{0}` is no certificate authority")]
    NotAuthority(String),
    /// No root of the bundle has this fingerprint.
    #[error("no root with fingerprint {0} in the bundle")]
    Unknown(String),
    /// The step does not follow from the phase in which the root is.
    #[error("a root that is {from:?} cannot become {to:?}")]
    Step {
        /// Phase in which the root is.
        from: RootPhase,
        /// Phase that was asked for.
        to: RootPhase,
    },
}

/// One root certificate and its phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleRoot {
    #[serde(with = "der_as_base64")]
    der: Vec<u8>,
    phase: RootPhase,
}

impl BundleRoot {
    /// The certificate.
    #[must_use]
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.der.clone().into()
    }

    /// Where the root stands in its rotation.
    #[must_use]
    pub fn phase(&self) -> RootPhase {
        self.phase
    }

    /// SHA-256 of the certificate in lower-case hexadecimal.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.der)
    }
}

/// The roots of one trust domain, in the order in which they came.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bundle {
    roots: Vec<BundleRoot>,
}

impl Bundle {
    /// A bundle with these roots, the first of which is active.
    ///
    /// # Errors
    ///
    /// When one of them is not a certificate authority.
    pub fn new(roots: &[CertificateDer<'_>]) -> Result<Self, BundleError> {
        let mut bundle = Self::default();
        for root in roots {
            bundle.prepare(root)?;
        }
        if let Some(first) = bundle.roots.first_mut() {
            first.phase = RootPhase::Active;
        }
        Ok(bundle)
    }

    /// The roots with their phases.
    #[must_use]
    pub fn roots(&self) -> &[BundleRoot] {
        &self.roots
    }

    /// The certificates that are believed: all of them, the active one first.
    #[must_use]
    pub fn trusted(&self) -> Vec<CertificateDer<'static>> {
        let (active, others): (Vec<_>, Vec<_>) =
            self.roots.iter().partition(|root| root.phase == RootPhase::Active);
        active.into_iter().chain(others).map(BundleRoot::certificate).collect()
    }

    /// The root that signs.
    #[must_use]
    pub fn active(&self) -> Option<&BundleRoot> {
        self.roots.iter().find(|root| root.phase == RootPhase::Active)
    }

    /// Adds a root that is believed but signs nothing yet. One that is there already stays as it is.
    ///
    /// # Errors
    ///
    /// When it is not the certificate of an authority.
    pub fn prepare(&mut self, root: &CertificateDer<'_>) -> Result<(), BundleError> {
        let facts = Facts::parse(root)?;
        if !facts.is_ca || !facts.can_sign {
            return Err(BundleError::NotAuthority(facts.subject));
        }
        if !self.roots.iter().any(|known| known.der == root.as_ref()) {
            self.roots.push(BundleRoot { der: root.to_vec(), phase: RootPhase::Next });
        }
        Ok(())
    }

    /// Makes a prepared root the one that signs; the one that did so is retired.
    ///
    /// # Errors
    ///
    /// When there is no such root or it is retired.
    pub fn activate(&mut self, fingerprint: &str) -> Result<(), BundleError> {
        let at = self.position(fingerprint)?;
        for (index, root) in self.roots.iter_mut().enumerate() {
            match (index == at, root.phase) {
                (true, RootPhase::Retired) => {
                    return Err(BundleError::Step { from: RootPhase::Retired, to: RootPhase::Active });
                }
                (true, RootPhase::Next | RootPhase::Active) => root.phase = RootPhase::Active,
                (false, _) => {}
            }
        }
        let others = self.roots.iter_mut().enumerate().filter(|(index, _)| *index != at);
        for (_, root) in others.filter(|(_, root)| root.phase == RootPhase::Active) {
            root.phase = RootPhase::Retired;
        }
        Ok(())
    }

    /// Ends the belief in a root that does not sign.
    ///
    /// # Errors
    ///
    /// When there is no such root or it is the active one.
    pub fn remove(&mut self, fingerprint: &str) -> Result<(), BundleError> {
        let at = self.position(fingerprint)?;
        if self.roots.get(at).is_some_and(|root| root.phase == RootPhase::Active) {
            return Err(BundleError::Step { from: RootPhase::Active, to: RootPhase::Retired });
        }
        self.roots.remove(at);
        Ok(())
    }

    fn position(&self, wanted: &str) -> Result<usize, BundleError> {
        self.roots
            .iter()
            .position(|root| root.fingerprint() == wanted)
            .ok_or_else(|| BundleError::Unknown(wanted.to_owned()))
    }
}

/// SHA-256 of a certificate in lower-case hexadecimal.
#[must_use]
pub fn fingerprint(der: &[u8]) -> String {
    x509::hex(&x509::sha256(der))
}

mod der_as_base64 {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(der: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(der))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(from)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    fn root() -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    fn phases(bundle: &Bundle) -> Vec<RootPhase> {
        bundle.roots().iter().map(BundleRoot::phase).collect()
    }

    #[test]
    fn a_rotation_never_stops_believing_the_root_in_use() {
        use RootPhase::*;
        let (a, b) = (root(), root());
        let mut bundle = Bundle::new(std::slice::from_ref(&a)).unwrap();
        assert_eq!(phases(&bundle), [Active]);
        bundle.prepare(&b).unwrap();
        bundle.prepare(&b).unwrap();
        assert_eq!(phases(&bundle), [Active, Next]);
        assert_eq!(bundle.trusted(), [a.clone(), b.clone()]);
        let (fa, fb) = (fingerprint(&a), fingerprint(&b));
        assert_eq!(bundle.remove(&fa), Err(BundleError::Step { from: Active, to: Retired }));
        bundle.activate(&fb).unwrap();
        assert_eq!(phases(&bundle), [Retired, Active]);
        assert_eq!(bundle.trusted(), [b.clone(), a]);
        assert_eq!(bundle.activate(&fa), Err(BundleError::Step { from: Retired, to: Active }));
        assert_eq!(phases(&bundle), [Retired, Active]);
        bundle.remove(&fa).unwrap();
        assert_eq!(bundle.trusted(), [b]);
        assert!(matches!(bundle.remove(&fa), Err(BundleError::Unknown(_))));
    }

    #[test]
    fn a_leaf_is_no_root() {
        let leaf = CertificateParams::default().self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert!(matches!(Bundle::new(&[leaf.der().clone()]), Err(BundleError::NotAuthority(_))));
    }

    #[test]
    fn stored_form_round_trips() {
        let bundle = Bundle::new(&[root(), root()]).unwrap();
        let json = serde_json::to_string(&bundle).unwrap();
        assert_eq!(serde_json::from_str::<Bundle>(&json).unwrap(), bundle);
    }
}

//! How a machine that was off for longer than its certificate lives comes back by itself. Pure.
//!
//! It presents the certificate that has ended, and a request for the key of that certificate. The request is signed by
//! the key, which proves that the caller has it, and the answer is of no use to whoever has not.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::{CertificateDer, UnixTime};

use crate::authn::{Caller, Proof};
use crate::tls::Anchors;
use crate::x509::{Facts, X509Error};

/// How long after the end of its certificate a machine may come back, unless a setting says otherwise: a week.
pub const DEFAULT_DORMANCY: Duration = Duration::from_secs(7 * 24 * 3600);
/// The most that a setting can say: 30 days.
pub const LONGEST_DORMANCY: Duration = Duration::from_secs(30 * 24 * 3600);

/// Why a certificate that has ended gives no other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DormancyRefused {
    /// There is no certificate, or it has no single SPIFFE identity.
    #[error("the certificate that has ended is refused: {0}")]
    Certificate(#[from] X509Error),
    /// It was not issued below one of our roots.
    #[error("the certificate that has ended does not lead to a root of this mesh: {0}")]
    Root(String),
    /// The request is for another key.
    #[error("the request is not signed by the key of the certificate that has ended")]
    Key,
    /// It has ended too long ago.
    #[error(
        "the certificate has ended {ended} ago, and a machine may come back within {window}; make a token with \
         `istioctl token create` and join again"
    )]
    TooLong {
        /// How long ago.
        ended: Told,
        /// The longest.
        window: Told,
    },
}

/// A time for people: in its largest unit, rounded down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told(Duration);

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = self.0.as_secs();
        match seconds {
            172_800.. => write!(f, "{} days", seconds / 86_400),
            7200.. => write!(f, "{} hours", seconds / 3600),
            120.. => write!(f, "{} minutes", seconds / 60),
            _ => write!(f, "{seconds} s"),
        }
    }
}

/// The caller that presents `chain`, leaf first, which has ended or soon will, with a request for `csr_key`, the
/// `SubjectPublicKeyInfo` of a request that is signed by it.
///
/// # Errors
///
/// When the chain was never one of this mesh, the request is for another key, or the certificate has ended more than
/// `window` before `now`.
pub fn returning(
    chain: &[CertificateDer<'_>],
    csr_key: &[u8],
    anchors: &Anchors,
    window: Duration,
    now: SystemTime,
) -> Result<Caller, DormancyRefused> {
    let missing = || X509Error::Certificate("there is none".to_owned());
    let (leaf, intermediates) = chain.split_first().ok_or_else(missing)?;
    let facts = Facts::parse(leaf)?;
    // Of its last moment the chain is what it was when handshakes accepted it.
    let at = now.min(facts.not_after).duration_since(UNIX_EPOCH).unwrap_or_default();
    anchors
        .verify(leaf, intermediates, UnixTime::since_unix_epoch(at), webpki::KeyUsage::client_auth())
        .map_err(|e| DormancyRefused::Root(e.to_string()))?;
    if facts.public_key != csr_key {
        return Err(DormancyRefused::Key);
    }
    let ended = now.duration_since(facts.not_after).unwrap_or_default();
    if ended > window {
        return Err(DormancyRefused::TooLong { ended: Told(ended), window: Told(window) });
    }
    Ok(Caller::new(facts.spiffe_id()?, Proof::EndedCertificate, facts.node()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{HOUR, ca_at, domain, reviews};
    use crate::svid::Identity;

    const DAY: Duration = Duration::from_secs(86_400);

    fn t0() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn key(identity: &Identity) -> Vec<u8> {
        rcgen::PublicKeyData::subject_public_key_info(&identity.key.key_pair().unwrap())
    }

    #[test]
    fn a_machine_comes_back_within_the_window_and_not_later() {
        let ca = ca_at(&domain(), t0());
        let anchors = Anchors::new(ca.authority.roots()).unwrap();
        let identity = ca.issue_at(&reviews(), t0(), HOUR);
        let node = Facts::parse(&identity.chain[0]).unwrap().node();
        let at = |now| returning(&identity.chain, &key(&identity), &anchors, DEFAULT_DORMANCY, now);
        for now in [t0(), identity.not_after, identity.not_after + DAY, identity.not_after + 7 * DAY] {
            let caller = at(now).unwrap();
            assert_eq!((caller.identity(), caller.node()), (&reviews(), node));
            assert_eq!(*caller.proof(), Proof::EndedCertificate);
        }
        let late = at(identity.not_after + 9 * DAY).unwrap_err();
        let told =
            "the certificate has ended 9 days ago, and a machine may come back within 7 days; make a token";
        assert!(late.to_string().starts_with(told), "{late}");
        let off = returning(&identity.chain, &key(&identity), &anchors, Duration::ZERO, t0() + 2 * HOUR);
        assert!(off.unwrap_err().to_string().contains("60 minutes ago"));
    }

    #[test]
    fn only_the_key_of_a_certificate_of_this_mesh_brings_anybody_back() {
        let (ca, other) = (ca_at(&domain(), t0()), ca_at(&domain(), t0()));
        let anchors = Anchors::new(ca.authority.roots()).unwrap();
        let (own, foreign) = (ca.issue_at(&reviews(), t0(), HOUR), other.issue_at(&reviews(), t0(), HOUR));
        let now = t0() + DAY;
        let back = |chain: &[CertificateDer<'_>], key: &[u8]| {
            returning(chain, key, &anchors, DEFAULT_DORMANCY, now).unwrap_err()
        };
        assert_eq!(back(&own.chain, &key(&foreign)), DormancyRefused::Key);
        let stranger = back(&foreign.chain, &key(&foreign));
        assert!(matches!(stranger, DormancyRefused::Root(_)), "{stranger}");
        assert!(matches!(back(&[], &key(&own)), DormancyRefused::Certificate(_)));
    }
}

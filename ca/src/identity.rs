//! SPIFFE identities: parse, print, compare.
//!
//! A [`SpiffeId`] names a workload as `spiffe://<trust domain>/<path>` (SPIFFE-ID, section 2). Workloads of the
//! mesh use the path `/ns/<namespace>/sa/<service account>`; other paths are valid identities too, they only have
//! no namespace and no service account.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest identity in bytes (SPIFFE-ID, section 2.3).
pub const MAX_ID_LEN: usize = 2048;
/// Longest trust domain in bytes (SPIFFE-ID, section 2.1).
pub const MAX_TRUST_DOMAIN_LEN: usize = 255;

/// Namespace of the control plane and of mesh-wide policies.
pub const ROOT_NAMESPACE: &str = "istio-system";
/// Service account of the control plane, in [`ROOT_NAMESPACE`].
pub const CONTROL_PLANE_ACCOUNT: &str = "istiod";

const SCHEME: &str = "spiffe://";

/// Why a text is not a SPIFFE identity or not a trust domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The text does not begin with `spiffe://`.
    #[error("an identity begins with `spiffe://`, this one does not")]
    Scheme,
    /// The text is longer than the specification allows.
    #[error("too long: {len} bytes, at most {max} are allowed")]
    TooLong {
        /// Length found, in bytes.
        len: usize,
        /// Longest length allowed, in bytes.
        max: usize,
    },
    /// The trust domain is empty.
    #[error("the trust domain is empty")]
    EmptyTrustDomain,
    /// The trust domain has a character outside `a-z 0-9 . - _`.
    #[error("`{0}` cannot stand in a trust domain, only a-z, 0-9, `.`, `-` and `_` can")]
    TrustDomainChar(char),
    /// A path segment is empty, `.` or `..`, or the path ends with `/`.
    #[error("a path segment is empty, `.` or `..`")]
    Segment,
    /// The path has a character outside `a-z A-Z 0-9 . - _`.
    #[error("`{0}` cannot stand in the path of an identity, only a-z, A-Z, 0-9, `.`, `-` and `_` can")]
    PathChar(char),
}

/// The name of a trust domain, for example `cluster.local`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Parses a trust domain name, without scheme.
    ///
    /// # Errors
    ///
    /// When it is empty, longer than [`MAX_TRUST_DOMAIN_LEN`], or has a character that is not allowed.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        check_trust_domain(text)?;
        Ok(Self(text.into()))
    }

    /// The name, for example `cluster.local`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    /// Istio's default, `cluster.local`.
    fn default() -> Self {
        Self("cluster.local".into())
    }
}

/// The identity of a workload, for example `spiffe://cluster.local/ns/default/sa/reviews`.
///
/// Two identities are equal when their texts are equal, byte for byte; the order is that of the texts. A clone is
/// cheap (shared text).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    text: Arc<str>,
    path_at: usize,
}

impl SpiffeId {
    /// Parses a whole identity with its scheme.
    ///
    /// # Errors
    ///
    /// When it breaks one of the rules of SPIFFE-ID, section 2.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        if text.len() > MAX_ID_LEN {
            return Err(IdentityError::TooLong { len: text.len(), max: MAX_ID_LEN });
        }
        let rest = text.strip_prefix(SCHEME).ok_or(IdentityError::Scheme)?;
        let (domain, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        check_trust_domain(domain)?;
        if let Some(segments) = path.strip_prefix('/') {
            segments.split('/').try_for_each(check_segment)?;
        }
        Ok(Self { text: text.into(), path_at: SCHEME.len() + domain.len() })
    }

    /// The identity of a service account: `spiffe://<domain>/ns/<namespace>/sa/<service account>`.
    ///
    /// # Errors
    ///
    /// When the namespace or the service account cannot be a path segment.
    pub fn workload(
        domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        check_segment(namespace)?;
        check_segment(service_account)?;
        Self::parse(&format!("{SCHEME}{domain}/ns/{namespace}/sa/{service_account}"))
    }

    /// The control plane's own identity: service account `istiod` in `istio-system`.
    #[must_use]
    pub fn control_plane(domain: &TrustDomain) -> Self {
        let text = format!("{SCHEME}{domain}/ns/{ROOT_NAMESPACE}/sa/{CONTROL_PLANE_ACCOUNT}");
        Self { text: text.into(), path_at: SCHEME.len() + domain.as_str().len() }
    }

    /// The identity as text, with its scheme.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The identity as policies write it: without `spiffe://` (Istio's *principal*).
    #[must_use]
    pub fn principal(&self) -> &str {
        self.text.get(SCHEME.len()..).unwrap_or_default()
    }

    /// The name of the trust domain.
    #[must_use]
    pub fn trust_domain_str(&self) -> &str {
        self.text.get(SCHEME.len()..self.path_at).unwrap_or_default()
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.trust_domain_str().into())
    }

    /// The path with its leading `/`; empty for the identity of the trust domain itself.
    #[must_use]
    pub fn path(&self) -> &str {
        self.text.get(self.path_at..).unwrap_or_default()
    }

    /// The namespace, when the path is `/ns/<namespace>/sa/<service account>`.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        self.workload_parts().map(|(namespace, _)| namespace)
    }

    /// The service account, when the path is `/ns/<namespace>/sa/<service account>`.
    #[must_use]
    pub fn service_account(&self) -> Option<&str> {
        self.workload_parts().map(|(_, account)| account)
    }

    /// Namespace and service account, when the path is `/ns/<namespace>/sa/<service account>`.
    #[must_use]
    pub fn workload_parts(&self) -> Option<(&str, &str)> {
        let mut parts = self.path().strip_prefix("/ns/")?.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(namespace), Some("sa"), Some(account), None) => Some((namespace, account)),
            _ => None,
        }
    }
}

fn check_trust_domain(text: &str) -> Result<(), IdentityError> {
    if text.is_empty() {
        return Err(IdentityError::EmptyTrustDomain);
    }
    if text.len() > MAX_TRUST_DOMAIN_LEN {
        return Err(IdentityError::TooLong { len: text.len(), max: MAX_TRUST_DOMAIN_LEN });
    }
    let bad = |c: &char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_'));
    text.chars().find(bad).map_or(Ok(()), |c| Err(IdentityError::TrustDomainChar(c)))
}

fn check_segment(segment: &str) -> Result<(), IdentityError> {
    if matches!(segment, "" | "." | "..") {
        return Err(IdentityError::Segment);
    }
    let bad = |c: &char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    segment.chars().find(bad).map_or(Ok(()), |c| Err(IdentityError::PathChar(c)))
}

macro_rules! text_form {
    ($type:ty, $parse:path, $as_str:path) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($as_str(self))
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($as_str(self))
            }
        }
        impl FromStr for $type {
            type Err = IdentityError;
            fn from_str(text: &str) -> Result<Self, IdentityError> {
                $parse(text)
            }
        }
        impl TryFrom<String> for $type {
            type Error = IdentityError;
            fn try_from(text: String) -> Result<Self, IdentityError> {
                $parse(&text)
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> Self {
                $as_str(&value).to_owned()
            }
        }
    };
}
text_form!(TrustDomain, TrustDomain::parse, TrustDomain::as_str);
text_form!(SpiffeId, SpiffeId::parse, SpiffeId::as_str);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Trust domain, path, and namespace with service account.
    type Parts<'a> = (&'a str, &'a str, Option<(&'a str, &'a str)>);

    #[track_caller]
    fn check(text: &str, expected: Result<Parts<'_>, IdentityError>) {
        let parsed = SpiffeId::parse(text);
        let seen = parsed.as_ref().map(|id| (id.trust_domain_str(), id.path(), id.workload_parts()));
        assert_eq!(seen, expected.as_ref().copied(), "{text}");
    }

    #[test]
    fn workload_identities_tell_namespace_and_service_account() {
        let parts = Some(("default", "reviews"));
        check(
            "spiffe://cluster.local/ns/default/sa/reviews",
            Ok(("cluster.local", "/ns/default/sa/reviews", parts)),
        );
        check("spiffe://a_b-c.d/ns/default/sa/reviews", Ok(("a_b-c.d", "/ns/default/sa/reviews", parts)));
    }

    #[test]
    fn other_paths_are_identities_without_namespace() {
        check("spiffe://td", Ok(("td", "", None)));
        check("spiffe://td/istiod/member-1", Ok(("td", "/istiod/member-1", None)));
        check("spiffe://td/ns/a/sa/b/c", Ok(("td", "/ns/a/sa/b/c", None)));
        check("spiffe://td/ns/a", Ok(("td", "/ns/a", None)));
        check("spiffe://td/NS/a/sa/b", Ok(("td", "/NS/a/sa/b", None)));
    }

    #[test]
    fn what_breaks_the_specification_is_refused() {
        use IdentityError::*;
        check("", Err(Scheme));
        check("https://td/x", Err(Scheme));
        check("SPIFFE://td/x", Err(Scheme));
        check("spiffe:///x", Err(EmptyTrustDomain));
        check("spiffe://Td/x", Err(TrustDomainChar('T')));
        check("spiffe://user@td/x", Err(TrustDomainChar('@')));
        check("spiffe://td:80/x", Err(TrustDomainChar(':')));
        check("spiffe://td?q", Err(TrustDomainChar('?')));
        check("spiffe://td/", Err(Segment));
        check("spiffe://td/a//b", Err(Segment));
        check("spiffe://td/a/", Err(Segment));
        check("spiffe://td/a/../b", Err(Segment));
        check("spiffe://td/./b", Err(Segment));
        check("spiffe://td/a%2fb", Err(PathChar('%')));
        check("spiffe://td/a\0b", Err(PathChar('\0')));
        check("spiffe://td/a?b", Err(PathChar('?')));
        check("spiffe://td/a#b", Err(PathChar('#')));
        check("spiffe://td/ns/é", Err(PathChar('é')));
        let long = format!("spiffe://{}", "a".repeat(256));
        check(&long, Err(TooLong { len: 256, max: MAX_TRUST_DOMAIN_LEN }));
        let long = format!("spiffe://td/{}", "a".repeat(MAX_ID_LEN));
        check(&long, Err(TooLong { len: MAX_ID_LEN + 12, max: MAX_ID_LEN }));
    }

    #[test]
    fn a_name_cannot_smuggle_a_path_into_an_identity() {
        let td = TrustDomain::default();
        assert_eq!(
            SpiffeId::workload(&td, "default", "reviews").unwrap().principal(),
            "cluster.local/ns/default/sa/reviews"
        );
        for name in ["", "a/sa/admin", "..", "a b"] {
            assert!(SpiffeId::workload(&td, name, "x").is_err(), "{name}");
            assert!(SpiffeId::workload(&td, "x", name).is_err(), "{name}");
        }
    }

    #[test]
    fn the_control_planes_identity_is_a_workload_identity() {
        let td = TrustDomain::default();
        let id = SpiffeId::workload(&td, ROOT_NAMESPACE, CONTROL_PLANE_ACCOUNT).unwrap();
        assert_eq!(SpiffeId::control_plane(&td), id);
    }

    #[test]
    fn stored_as_plain_text() {
        let id = SpiffeId::parse("spiffe://td/ns/a/sa/b").unwrap();
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, "\"spiffe://td/ns/a/sa/b\"");
        assert_eq!(serde_json::from_str::<SpiffeId>(&json).unwrap(), id);
        assert!(serde_json::from_str::<SpiffeId>("\"spiffe://td/\"").is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_printing_is_its_inverse(text in "(spiffe://)?[a-z./%A-Z?]{0,40}") {
            if let Ok(id) = SpiffeId::parse(&text) {
                prop_assert_eq!(id.to_string(), text);
                prop_assert_eq!(format!("{}{}{}", SCHEME, id.trust_domain_str(), id.path()), id.as_str());
            }
        }
    }
}

//! Who calls: an argument of everything that the service layer does.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use crate::access::{Grant, Role};

use super::ApiError;

/// Where a call comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// This process, or a caller whose address is not known.
    Local,
    /// The address of the connection.
    Address(SocketAddr),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// An authenticated caller of the admin API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Whom the audit log names: `admin`, `token/ID`, or a SPIFFE id.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// The namespaces in which it may; all when none is said.
    pub namespaces: Option<BTreeSet<String>>,
    /// Where it calls from.
    pub from: Source,
}

impl Caller {
    /// A caller with a grant.
    #[must_use]
    pub fn new(name: impl Into<String>, grant: Grant, from: Source) -> Self {
        let Grant { role, namespaces } = grant;
        Self { name: name.into(), role, namespaces, from }
    }

    /// The member itself, with every right.
    #[must_use]
    pub fn local() -> Self {
        Self::new("local", Grant::everywhere(Role::Admin), Source::Local)
    }

    /// What it may do, and where.
    #[must_use]
    pub fn grant(&self) -> Grant {
        Grant { role: self.role, namespaces: self.namespaces.clone() }
    }

    /// Whether its rights hold in this namespace.
    #[must_use]
    pub fn covers(&self, namespace: &str) -> bool {
        self.namespaces.as_ref().is_none_or(|some| some.contains(namespace))
    }

    /// Whether its rights hold in the whole mesh.
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        self.namespaces.is_none()
    }

    /// Refuses a caller whose rights do not hold in this namespace.
    ///
    /// # Errors
    ///
    /// [`ApiError::Forbidden`].
    pub fn must_cover(&self, namespace: &str) -> Result<(), ApiError> {
        if self.covers(namespace) {
            return Ok(());
        }
        Err(ApiError::Forbidden(format!("{} may do nothing in namespace `{namespace}`", self.name)))
    }

    /// Refuses a caller whose rights do not hold in the whole mesh.
    ///
    /// # Errors
    ///
    /// [`ApiError::Forbidden`].
    pub fn must_be_unlimited(&self, what: &str) -> Result<(), ApiError> {
        if self.is_unlimited() {
            return Ok(());
        }
        Err(ApiError::Forbidden(format!(
            "{what}: the rights of {} are limited to some namespaces",
            self.name
        )))
    }
}

//! The certificate authority: join tokens and the trust bundle.

use std::time::Duration;

use ca::authn::{Hash, JoinToken, TokenBinding};
use ca::state::{CaCommand, TokenRecord};
use ipnet::IpNet;

use super::types::{AuthorityReport, RootRow, TokenCreated, TokenRequest, TokenRow};
use super::view::{rfc3339, token_row};
use super::{Api, ApiError, Caller};
use crate::raft::Command;

/// Longest lifetime of a join token.
const LONGEST_TOKEN: Duration = Duration::from_secs(30 * 24 * 3600);

/// The most machines that may join with one token: each leaves its key's hash in the state.
const MOST_USES: u32 = 10_000;

/// The most blocks of addresses of one token.
const MOST_CIDRS: usize = 64;

impl Api {
    /// Makes a join token; its secret is in the answer and nowhere else.
    ///
    /// # Errors
    ///
    /// A namespace or service account that no identity can have, a lifetime out of range, or blocks that are none.
    pub async fn create_token(
        &self,
        caller: &Caller,
        request: &TokenRequest,
    ) -> Result<TokenCreated, ApiError> {
        caller.must_cover(&request.namespace)?;
        let lifetime = Duration::from_secs(request.ttl_seconds);
        if lifetime.is_zero() || lifetime > LONGEST_TOKEN {
            return Err(ApiError::invalid_field("ttlSeconds", "from 1 to 2592000 (30 days)"));
        }
        if request.uses == 0 || request.uses > MOST_USES {
            return Err(ApiError::invalid_field("uses", format!("from 1 to {MOST_USES}")));
        }
        let issuing = self.issuing.load_full();
        let binding = TokenBinding {
            namespace: request.namespace.clone(),
            service_account: request.service_account.clone(),
            trust_domain: issuing.trust_domain().clone(),
        };
        let root = issuing.roots().first().ok_or_else(|| ApiError::Internal("no root".to_owned()))?;
        let token = JoinToken::generate(binding, self.addresses(), Hash::of(root))
            .map_err(|e| ApiError::Internal(e.to_string()))?;
        let expires = (self.clock)() + lifetime;
        let mut record = TokenRecord::of(&token, expires, request.uses, &caller.name);
        record.cidrs = cidrs(&request.cidrs)?;
        record.identity(issuing.trust_domain()).map_err(|e| ApiError::invalid(e.to_string()))?;
        let created = TokenCreated {
            id: token.id.clone(),
            token: token.to_text(),
            expires: rfc3339(record.expires_at),
        };
        let add = Command::Ca(CaCommand::AddJoinToken(record));
        self.propose(caller, "create join token", &add).await?;
        Ok(created)
    }

    /// Join tokens of the caller's namespaces, without their secrets.
    ///
    /// # Errors
    ///
    /// When this member has stopped.
    pub async fn tokens(&self, caller: &Caller) -> Result<Vec<TokenRow>, ApiError> {
        let view = self.view().await?;
        Ok(view.ca.tokens().filter(|token| caller.covers(&token.namespace)).map(token_row).collect())
    }

    /// Makes a token useless.
    ///
    /// # Errors
    ///
    /// [`ApiError::NotFound`] when it is not there, or not of the caller's namespaces.
    pub async fn revoke_token(&self, caller: &Caller, id: &str) -> Result<(), ApiError> {
        let view = self.view().await?;
        if !view.ca.token(id).is_some_and(|token| caller.covers(&token.namespace)) {
            return Err(ApiError::NotFound(format!("there is no token `{id}`")));
        }
        drop(view);
        let revoke = Command::Ca(CaCommand::RevokeJoinToken { id: id.to_owned() });
        self.propose(caller, "revoke join token", &revoke).await?;
        Ok(())
    }

    /// The trust bundle in PEM.
    #[must_use]
    pub fn roots(&self) -> String {
        ca::x509::certificates_to_pem(self.issuing.load().roots())
    }

    /// Whom certificates of the mesh are trusted for, and what this member signs with.
    #[must_use]
    pub fn authority(&self) -> AuthorityReport {
        let issuing = self.issuing.load_full();
        let seconds = ca::state::unix_seconds;
        let root = |der| {
            let facts = ca::x509::Facts::parse(der).ok()?;
            Some(RootRow {
                fingerprint: ca::bundle::fingerprint(der),
                not_before: rfc3339(seconds(facts.not_before)),
                not_after: rfc3339(seconds(facts.not_after)),
            })
        };
        let (from, until) = issuing.validity();
        AuthorityReport {
            trust_domain: issuing.trust_domain().as_str().to_owned(),
            not_before: rfc3339(seconds(from)),
            not_after: rfc3339(seconds(until)),
            roots: issuing.roots().iter().filter_map(root).collect(),
        }
    }
}

/// Blocks of addresses, of which one may be a single address.
fn cidrs(said: &[String]) -> Result<Vec<IpNet>, ApiError> {
    if said.len() > MOST_CIDRS {
        return Err(ApiError::invalid_field("cidrs", format!("at most {MOST_CIDRS}")));
    }
    let block = |text: &String| {
        let block =
            text.parse::<IpNet>().ok().or_else(|| Some(IpNet::from(text.parse::<std::net::IpAddr>().ok()?)));
        block.map(|block| block.trunc()).ok_or_else(|| {
            ApiError::invalid_field(
                "cidrs",
                format!("`{text}` is not a block of addresses such as 10.0.0.0/8"),
            )
        })
    };
    said.iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_of_either_family_and_may_be_one_address() {
        let read = |text: &str| cidrs(&[text.to_owned()]).map(|cidrs| cidrs[0].to_string());
        assert_eq!(read("10.1.2.3/8").unwrap(), "10.0.0.0/8");
        assert_eq!(read("10.1.2.3").unwrap(), "10.1.2.3/32");
        assert_eq!(read("2001:db8::/32").unwrap(), "2001:db8::/32");
        for wrong in ["", "10.0.0.0/33", "vms.example"] {
            assert!(read(wrong).unwrap_err().to_string().contains("is not a block"), "{wrong}");
        }
        assert!(cidrs(&vec!["10.0.0.0/8".to_owned(); 65]).is_err());
    }
}

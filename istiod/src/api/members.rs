//! The members of the control plane, for operators.

use std::collections::BTreeSet;
use std::time::Duration;

use super::types::members::{MemberChange, MemberRequest, MemberTicket};
use super::{Api, ApiError, Caller};
use crate::cluster::members::{MemberView, MembersError, NewMember};

/// Longest life of a ticket.
const LONGEST_TICKET: u64 = 7 * 24 * 3600;

impl From<MembersError> for ApiError {
    fn from(error: MembersError) -> Self {
        match error {
            MembersError::Refused(reason) => Self::Conflict(reason),
            MembersError::NotFound(reason) => Self::NotFound(reason),
            MembersError::Log(error) => Self::Unavailable(error),
        }
    }
}

impl Api {
    /// All members.
    ///
    /// # Errors
    ///
    /// When this member has stopped.
    pub async fn members(&self) -> Result<Vec<MemberView>, ApiError> {
        Ok(self.members.list().await?)
    }

    /// Makes a ticket with which a machine joins.
    ///
    /// # Errors
    ///
    /// A lifetime out of range, a member to be replaced that is none, or a member that stands alone.
    pub async fn add_member(
        &self,
        caller: &Caller,
        request: &MemberRequest,
    ) -> Result<MemberTicket, ApiError> {
        if request.ttl_seconds == 0 || request.ttl_seconds > LONGEST_TICKET {
            return Err(ApiError::invalid_field(
                "ttlSeconds",
                format!("from 1 to {LONGEST_TICKET} (a week)"),
            ));
        }
        let new = NewMember {
            voter: request.voter,
            replaces: request.replaces,
            ttl: Duration::from_secs(request.ttl_seconds),
        };
        let origin = self.origin(caller, "members add");
        let ticket = self.members.add(new, Some(&origin)).await?.to_text();
        let command = format!("istiod init --peer HOST:15019 --xds HOST:15012 --join {ticket}");
        Ok(MemberTicket { ticket, command })
    }

    /// Learners become voters.
    ///
    /// # Errors
    ///
    /// [`ApiError::Conflict`] when that is not safe.
    pub async fn promote_members(&self, caller: &Caller, change: &MemberChange) -> Result<(), ApiError> {
        let origin = self.origin(caller, "members promote");
        Ok(self.members.promote(&ids(change)?, Some(&origin)).await?)
    }

    /// Members go, for ever.
    ///
    /// # Errors
    ///
    /// [`ApiError::Conflict`] when that is not safe.
    pub async fn remove_members(&self, caller: &Caller, change: &MemberChange) -> Result<(), ApiError> {
        let origin = self.origin(caller, "members remove");
        Ok(self.members.remove(&ids(change)?, Some(&origin)).await?)
    }

    /// Leadership moves.
    ///
    /// # Errors
    ///
    /// [`ApiError::Conflict`] when the member does not vote or does not take over.
    pub async fn transfer_leadership(&self, to: u64) -> Result<(), ApiError> {
        Ok(self.members.transfer(to).await?)
    }
}

fn ids(change: &MemberChange) -> Result<BTreeSet<u64>, ApiError> {
    if change.ids.is_empty() {
        return Err(ApiError::invalid_field("ids", "at least one member"));
    }
    Ok(change.ids.iter().copied().collect())
}

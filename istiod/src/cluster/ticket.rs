//! What a new member joins with, once: where to ask, whom to believe there, and a secret.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ca::authn::{Hash, Secret, TokenError};
use serde::{Deserialize, Serialize};

/// Every ticket begins so.
pub const PREFIX: &str = "istiod-ticket-";
/// Longest text that is looked at, in bytes.
const MAX_LEN: usize = 8 << 10;

/// A ticket, as one line of text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Its public part.
    pub id: String,
    /// The secret; the log holds its hash.
    pub secret: Secret,
    /// Members to ask, `HOST:PORT` of their peer ports.
    pub peers: Vec<String>,
    /// SHA-256 of the peers' root certificate.
    pub ca: Hash,
}

/// Why a text is no ticket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// It does not begin with [`PREFIX`], or cannot be read.
    #[error("this is no ticket of `istioctl members add`; perhaps it was cut while copying")]
    Malformed,
    /// No randomness for a new one.
    #[error(transparent)]
    Secret(#[from] TokenError),
}

impl Ticket {
    /// A new one, with an id and a secret of its own.
    ///
    /// # Errors
    ///
    /// [`TicketError::Secret`].
    pub fn generate(peers: Vec<String>, ca: Hash) -> Result<Self, TicketError> {
        let id: String = Secret::random()?.hash().to_string().chars().take(12).collect();
        Ok(Self { id, secret: Secret::random()?, peers, ca })
    }

    /// Reads the text.
    ///
    /// # Errors
    ///
    /// [`TicketError::Malformed`].
    pub fn parse(text: &str) -> Result<Self, TicketError> {
        let text = text.trim();
        let body = text.strip_prefix(PREFIX).filter(|_| text.len() <= MAX_LEN);
        let bytes = body.and_then(|body| URL_SAFE_NO_PAD.decode(body).ok()).ok_or(TicketError::Malformed)?;
        serde_json::from_slice(&bytes).map_err(|_| TicketError::Malformed)
    }

    /// The text.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_survives_its_text_and_a_part_of_it_is_none() {
        let ticket = Ticket::generate(vec!["a:15019".to_owned()], Hash::of(b"root")).unwrap();
        let text = ticket.to_text();
        assert_eq!(Ticket::parse(&format!(" {text}\n")), Ok(ticket));
        for length in [0, 5, PREFIX.len(), text.len() / 2, text.len() - 1] {
            assert_eq!(Ticket::parse(&text[..length]), Err(TicketError::Malformed), "{length}");
        }
    }
}

//! Listeners: sockets, what is looked at before a chain is chosen, and the chain's way on.
//!
//! [`slot`] is one listener on one worker, [`accept`] takes its connections: the original destination
//! ([`original_dst`]), a PROXY protocol header ([`proxy_protocol`]), the first bytes ([`detect`]), the filter chain
//! ([`filter_chain`]), and then HTTP or TCP.

pub mod accept;
pub mod connection;
pub mod detect;
pub mod filter_chain;
pub mod original_dst;
pub mod proxy_protocol;
pub mod slot;

//! SPIFFE identities, certificates and who may be issued what.
//!
//! [`identity`] is the name of a workload, [`x509`] reads and prints what carries it, [`svid`] is an issued one with
//! its key. [`authority`] decides what is signed, for the callers that [`authn`] knows; [`renewal`] says when to ask
//! again, and [`dormancy`] how a machine comes back that was off for long; [`node`] tells machines of one identity apart.
//! [`service`] serves certificates, [`client`] obtains and renews them, [`tls`] makes connections with them.
//! [`bundle`] holds the roots that are believed, [`state`] what all members of the control plane share, [`seal`] what
//! only they may read of it, [`keystore`] the
//! private keys.

pub mod authn;
pub mod authority;
pub mod bundle;
pub mod client;
pub mod dormancy;
pub mod identity;
pub mod keystore;
pub mod node;
pub mod renewal;
pub mod seal;
pub mod service;
pub mod state;
pub mod svid;
pub mod tls;
pub mod x509;

#[cfg(test)]
mod fixtures;

//! SPIFFE identities, certificates and who may be issued what.
//!
//! [`identity`] is the name of a workload.

pub mod identity;

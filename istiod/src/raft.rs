//! The replicated log of the control plane: what every member agrees on.
//!
//! From the ground up: [`disk`] is the few file operations that matter, [`log`] and [`snapshots`] are durable on it,
//! [`store`] keeps the applied state between runs, [`machine`] is what the log drives, [`node`] moves them in the
//! safe order, and [`state_machine`] is the mesh itself as such a machine.

pub mod disk;
pub mod log;
pub mod machine;
pub mod member;
pub mod metrics;
pub mod node;
pub mod sessions;
pub mod snapshots;
pub mod store;
pub mod wire;

//! Machines whose traffic is captured, and members that do not reach each other: network namespaces, with nftables and
//! routes. Needs root; without, it says so.

mod captured;
mod consul;
mod dns;
mod five;
mod held;
mod machines;
mod partition;
mod wire;

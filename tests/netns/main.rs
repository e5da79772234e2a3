//! Machines whose traffic is captured: network namespaces with nftables. Needs root; without, it says so.

mod captured;
mod machines;
mod wire;

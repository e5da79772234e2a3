//! A Consul datacenter as a source of services.
//!
//! [`datacenter`] is the machine that decides everything without IO: which question is asked when and of which
//! [server](servers), with the rules of a blocking query ([`poll`]), what an [answer] says, what it means for the mesh
//! ([`convert`]), and when something that has vanished is believed to be gone ([`losses`]). [`client`] moves its bytes,
//! and [`drive`] its time. [`export`] is the other direction: what the mesh writes into a catalog.

pub mod answer;
pub mod client;
pub mod convert;
pub mod datacenter;
pub mod drive;
pub mod export;
pub mod losses;
pub mod poll;
pub mod servers;

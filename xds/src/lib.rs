//! From snapshot to stream.
//!
//! [`translate`] turns a mesh and a [`proxy`] into [`resources`]; [`cache`] shares them between proxies;
//! [`affected`] and [`debounce`] decide who gets a push and when; [`stream`] speaks the protocol; [`server`] holds
//! the sockets; [`balance`] spreads streams over the members; [`status`] tells what each proxy has acknowledged.
//! Nothing here knows Raft.

pub mod proxy;
pub mod resources;
pub mod translate;

pub mod affected;
pub mod balance;
pub mod cache;
pub mod debounce;
pub mod server;
pub mod status;
pub mod stream;

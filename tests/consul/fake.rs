//! A Consul that does what it is told, also wrongly.

pub(crate) mod catalog;
pub(crate) mod server;

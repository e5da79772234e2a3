//! What a control plane says to this proxy: resources, validated once, and the stream they come on.

pub mod access_log;
pub mod client;
pub mod cluster;
pub mod decode;
pub mod filter;
pub mod format;
pub mod jwt;
pub mod last_good;
pub mod listener;
pub mod matcher;
pub mod members;
pub mod mutation;
pub mod parse;
pub mod proxy_protocol;
pub mod rbac;
pub mod route;
pub mod tls;
pub mod transport;

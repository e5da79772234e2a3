//! The data plane: what a control plane says becomes tables, and tables decide what happens to traffic.
pub mod admin;
pub mod bootstrap;
pub mod config;
pub mod drain;
pub mod sockets;
pub mod tables;
pub mod telemetry;
pub mod xds;

//! The data plane: what a control plane says becomes tables, and tables decide what happens to traffic.
//!
//! [`Proxy::start`] wires it in the order in which things flow. [`xds`] turns messages into checked values and keeps
//! the stream; [`tables`] holds them, swapped whole, with the [`sockets`] of their listeners; each [`worker`] serves
//! connections on one core: [`listener`] takes them, [`tls`] opens them, [`http`] and [`tcp`] carry what is in them,
//! asking [`authz`] and [`router`] on the way and sending it [`upstream`]; [`h1`] is how both speak HTTP/1. [`admin`]
//! shows all of it; [`drain`] ends it; a service manager is told by [`supervisor`] how far it is, [`handover`] lets
//! another process follow, and [`overload`] sheds what is too much.

pub mod access_log;
pub mod admin;
pub mod authz;
pub mod bootstrap;
pub mod config;
pub mod drain;
pub mod h1;
pub mod handover;
pub mod http;
pub mod lb;
pub mod listener;
pub mod metrics;
pub mod overload;
pub mod ratelimit;
pub mod retry;
pub mod router;
mod run;
pub mod signal;
pub mod sockets;
pub mod supervisor;
pub mod tables;
pub mod tcp;
pub mod telemetry;
pub mod tls;
pub mod upstream;
pub mod worker;
pub mod xds;

pub use run::{Bound, Proxy, StartError, run};

//! The data path in one process: client, proxy, backend, over loopback.

mod backend;
mod faults;
mod harness;
mod mtls;
mod plain;

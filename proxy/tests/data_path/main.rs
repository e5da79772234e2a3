//! The data path in one process: client, proxy, backend, over loopback.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "what fails in a helper fails the test that called it"
)]

mod backend;
mod faults;
mod floods;
mod h2spec;
mod harness;
mod hostile;
mod http1;
mod limits;
mod mtls;
mod plain;
mod policies;
mod smuggling;
mod timeouts;
mod tokens;
mod updates;
mod websocket;
mod workers;

//! The harness: real programs, real peers, and waiting with a deadline and a reason.
//!
//! [`program`] starts the programs that `cargo build --profile quick --bins` made; [`istiod`] and [`workload`] are the two
//! kinds of them, [`cluster`] is several of the first, and [`mesh`] puts them together on loopback addresses;
//! [`echo`] is the application behind a proxy;
//! [`envoy`] puts a stock Envoy into a proxy's seat;
//! [`ads`] is a control plane of a few resources for a proxy alone, and [`fleet`] its endpoints that come and go;
//! [`http`] and [`tls`] ask, rightly and wrongly; [`load`] sends requests at a rate and keeps every failure, [`paced`] many of
//! them over connections of each kind;
//! [`consul`] starts real servers of it, and a fake; [`peers`] finds what `tests/run` installed; [`netns`] makes several machines of one;
//! [`failover`] takes leaders away while clients use [`registers`] through [`admin`] APIs, which [`history`] judges, and
//! simulated [`proxies`] hold streams.

pub mod admin;
pub mod ads;
pub mod cluster;
pub mod consul;
pub mod echo;
pub mod envoy;
pub mod failover;
pub mod fleet;
pub mod history;
pub mod http;
pub mod istiod;
pub mod load;
pub mod mesh;
pub mod netns;
pub mod paced;
pub mod peers;
pub mod program;
pub mod proxies;
pub mod registers;
pub mod tls;
pub mod workload;

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

/// Everything that is waited for happens within this time.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How often something that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Waits until `probe` gives a value.
///
/// # Errors
///
/// At the deadline, with `reason` and the last refusal.
pub async fn eventually<T, F>(
    within: Duration,
    reason: &str,
    mut probe: impl FnMut() -> F,
) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let deadline = Instant::now() + within;
    loop {
        match probe().await {
            Ok(value) => return Ok(value),
            Err(refusal) if Instant::now() >= deadline => {
                return Err(refusal.context(format!("not within {within:?}: {reason}")));
            }
            Err(_) => tokio::time::sleep(LOOK).await, // eventually
        }
    }
}

/// The JSON value at `pointer`, as a string.
#[must_use]
pub fn text<'a>(value: &'a serde_json::Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(serde_json::Value::as_str).unwrap_or_default()
}

//! The harness: real programs, real peers, and waiting with a deadline and a reason.
//!
//! [`program`] starts the programs that `cargo build --release --bins` made; [`mesh`] puts them together on loopback
//! addresses; [`echo`] is the application behind a proxy; [`load`] sends requests at a rate and keeps every
//! failure; [`peers`] finds what `tests/run` installed.

pub mod echo;
pub mod http;
pub mod load;
pub mod mesh;
pub mod peers;
pub mod program;

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

/// How often something that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Waits until `probe` gives a value, and fails with `reason` and the last refusal at the deadline.
///
/// # Panics
///
/// At the deadline: this is for tests.
#[expect(clippy::panic, reason = "a test that waited in vain has failed")]
pub async fn eventually<T, F>(within: Duration, reason: &str, mut probe: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let deadline = Instant::now() + within;
    loop {
        let refusal = match probe().await {
            Ok(value) => return value,
            Err(refusal) => refusal,
        };
        if Instant::now() >= deadline {
            panic!("not within {within:?}: {reason}: {refusal}");
        }
        tokio::time::sleep(LOOK).await; // eventually
    }
}

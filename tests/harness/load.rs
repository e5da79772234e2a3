//! Requests at a steady rate, and every failure with its words.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::http::Request;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::echo::Seen;

/// What came back.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Answers with status 200.
    pub good: u64,
    /// Everything else, in words.
    pub failures: Vec<String>,
    /// Time of each answer.
    pub took: Vec<Duration>,
}

impl Tally {
    /// All requests.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.good + self.failures.len() as u64
    }

    /// The time that this share of the answers took at most.
    #[must_use]
    pub fn percentile(&self, share: f64) -> Duration {
        percentile(&self.took, share)
    }

    /// Fails when a request did, with the first words.
    ///
    /// # Errors
    ///
    /// The failures.
    pub fn no_failures(&self) -> anyhow::Result<()> {
        let some: Vec<_> = self.failures.iter().take(3).collect();
        anyhow::ensure!(
            self.failures.is_empty(),
            "{} of {} requests failed: {some:?}",
            self.failures.len(),
            self.total()
        );
        anyhow::ensure!(self.good > 0, "no request was sent");
        Ok(())
    }
}

/// The time that this share of `took` is not above.
#[must_use]
pub fn percentile(took: &[Duration], share: f64) -> Duration {
    let mut sorted = took.to_vec();
    sorted.sort();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index in a short list"
    )]
    let index = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
}

/// A load that runs until it is stopped.
#[derive(Debug)]
pub struct Load {
    tally: Arc<Mutex<Tally>>,
    stop: CancellationToken,
    tasks: TaskTracker,
    rate: u32,
}

impl Load {
    /// Sends `GET /` with the host, `rate` times a second, over connections that are kept alive. Requests are
    /// begun on time whether or not earlier ones were answered.
    #[must_use]
    pub fn start(address: SocketAddr, host: &str, rate: u32) -> Self {
        let load =
            Self { tally: Arc::default(), stop: CancellationToken::new(), tasks: TaskTracker::new(), rate };
        let client: Client<HttpConnector, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let (tally, stop, tasks, host) =
            (load.tally.clone(), load.stop.clone(), load.tasks.clone(), host.to_owned());
        let begun = Instant::now();
        load.tasks.spawn(async move {
            let mut every = tokio::time::interval(Duration::from_secs(1) / rate);
            every.set_missed_tick_behavior(MissedTickBehavior::Burst);
            while stop.run_until_cancelled(every.tick()).await.is_some() {
                let (client, tally, host) = (client.clone(), tally.clone(), host.clone());
                tasks.spawn(async move {
                    let started = Instant::now();
                    let outcome = one(&client, address, &host).await;
                    if let Ok(mut tally) = tally.lock() {
                        tally.took.push(started.elapsed());
                        match outcome {
                            Ok(()) => tally.good += 1,
                            Err(words) => tally
                                .failures
                                .push(format!("{:.2?} after the start: {words}", begun.elapsed())),
                        }
                    }
                });
            }
        });
        load
    }

    /// Answers so far.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.tally.lock().map(|t| t.good + t.failures.len() as u64).unwrap_or_default()
    }

    /// Waits until so many more answers came.
    ///
    /// # Errors
    ///
    /// When they do not.
    pub async fn more(&self, answers: u64) -> anyhow::Result<()> {
        let wanted = self.answers() + answers;
        let within = crate::PATIENCE + Duration::from_secs(answers * 2) / self.rate.max(1);
        crate::eventually(within, "the load is answered", || async {
            anyhow::ensure!(self.answers() >= wanted, "{} of {wanted} answers", self.answers());
            Ok(())
        })
        .await
    }

    /// Stops, waits for what is under way, and tells what came back.
    pub async fn stop(self) -> Tally {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.tally.lock().map(|t| t.clone()).unwrap_or_default()
    }
}

async fn one(
    client: &Client<HttpConnector, Empty<Bytes>>,
    address: SocketAddr,
    host: &str,
) -> Result<(), String> {
    let request = Request::get(format!("http://{address}/"))
        .header("host", host)
        .body(Empty::new())
        .map_err(|e| e.to_string())?;
    let exchange = async {
        let response = client.request(request).await.map_err(|e| format!("{e:?}"))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes();
        if status == 200 { Ok(()) } else { Err(format!("{status} {}", String::from_utf8_lossy(&body))) }
    };
    tokio::time::timeout(Duration::from_secs(10), exchange)
        .await
        .unwrap_or_else(|_| Err("no answer within 10 s".to_owned()))
}

/// Sends `GET` of a path `requests` times, `concurrency` at a time over connections that are kept alive, and counts
/// the answers of each [`crate::echo::Echo`] by its name, others by their status.
///
/// # Errors
///
/// When there is no answer.
pub async fn burst(
    address: SocketAddr,
    host: &str,
    path: &str,
    requests: u32,
    concurrency: usize,
) -> anyhow::Result<BTreeMap<String, u32>> {
    let client: Client<HttpConnector, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let ask = |_| {
        let (client, uri) = (client.clone(), format!("http://{address}{path}"));
        async move {
            let response = client.request(Request::get(uri).header("host", host).body(Empty::new())?).await?;
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            let name = serde_json::from_slice::<Seen>(&body).map(|seen| seen.name);
            anyhow::Ok(if status == 200 {
                name.unwrap_or_else(|_| status.to_string())
            } else {
                status.to_string()
            })
        }
    };
    let answers: Vec<String> =
        futures::stream::iter(0..requests).map(ask).buffer_unordered(concurrency).try_collect().await?;
    Ok(answers.into_iter().fold(BTreeMap::new(), |mut counts, name| {
        *counts.entry(name).or_default() += 1;
        counts
    }))
}

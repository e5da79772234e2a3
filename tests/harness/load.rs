//! Requests at a steady rate, and every failure with its words.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::http::Request;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

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

/// A load that runs until it is stopped.
#[derive(Debug)]
pub struct Load {
    tally: Arc<Mutex<Tally>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Load {
    /// Sends `GET /` with the host, `rate` times a second, over connections that are kept alive. Requests are
    /// begun on time whether or not earlier ones were answered.
    #[must_use]
    pub fn start(address: SocketAddr, host: &str, rate: u32) -> Self {
        let load = Self { tally: Arc::default(), stop: CancellationToken::new(), tasks: TaskTracker::new() };
        let client: Client<HttpConnector, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let (tally, stop, tasks, host) = (load.tally.clone(), load.stop.clone(), load.tasks.clone(), host.to_owned());
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
                            Err(words) => tally.failures.push(words),
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

    /// Stops, waits for what is under way, and tells what came back.
    pub async fn stop(self) -> Tally {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.tally.lock().map(|t| t.clone()).unwrap_or_default()
    }
}

async fn one(client: &Client<HttpConnector, Empty<Bytes>>, address: SocketAddr, host: &str) -> Result<(), String> {
    let request = Request::get(format!("http://{address}/")).header("host", host).body(Empty::new()).map_err(|e| e.to_string())?;
    let exchange = async {
        let response = client.request(request).await.map_err(|e| format!("{e:?}"))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes();
        if status == 200 { Ok(()) } else { Err(format!("{status} {}", String::from_utf8_lossy(&body))) }
    };
    tokio::time::timeout(Duration::from_secs(10), exchange).await.unwrap_or_else(|_| Err("no answer within 10 s".to_owned()))
}

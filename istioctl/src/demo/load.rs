//! Traffic from outside the mesh, and what came back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use tokio::time::Instant;

use super::app::{Answer, Call};

/// A request is given up after this time.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What to send.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    /// Address of the front service at the proxy that traffic enters by.
    pub(crate) address: SocketAddr,
    /// `Host` header.
    pub(crate) host: &'static str,
    /// Value of the `end-user` header.
    pub(crate) user: Option<&'static str>,
    /// How many requests in all.
    pub(crate) requests: u32,
    /// How many at a time.
    pub(crate) concurrency: usize,
}

/// What came back.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    /// Answers of any kind.
    pub(crate) total: u32,
    /// Answers in which the front service or any service below it failed.
    pub(crate) failed: u32,
    /// The first failure's own words.
    pub(crate) first_failure: Option<String>,
    /// Service and version to answers.
    pub(crate) answers: BTreeMap<(String, String), u32>,
    /// Service to the identities of its callers.
    pub(crate) callers: BTreeMap<String, BTreeSet<String>>,
    /// Called service to status to count.
    pub(crate) statuses: BTreeMap<String, BTreeMap<u16, u32>>,
    micros: Vec<u32>,
}

impl Tally {
    /// Share of `version` among the answers of `service`, 0 to 100.
    pub(crate) fn share(&self, service: &str, version: &str) -> f64 {
        let all: u32 = self.answers.iter().filter(|((s, _), _)| s == service).map(|(_, n)| n).sum();
        let some = self.answers.get(&(service.to_owned(), version.to_owned())).copied().unwrap_or_default();
        if all == 0 { 0.0 } else { f64::from(some) * 100.0 / f64::from(all) }
    }

    /// Latency below which the given share (0 to 1) of the answers came, in milliseconds.
    pub(crate) fn latency(&self, share: f64) -> f64 {
        let mut sorted = self.micros.clone();
        sorted.sort_unstable();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index within the length"
        )]
        let index = ((sorted.len() as f64 - 1.0).max(0.0) * share) as usize;
        sorted.get(index).map_or(0.0, |micros| f64::from(*micros) / 1000.0)
    }

    /// Adds another tally.
    pub(crate) fn merge(&mut self, other: Self) {
        self.total += other.total;
        self.failed += other.failed;
        self.first_failure = self.first_failure.take().or(other.first_failure);
        self.micros.extend(other.micros);
        for (key, count) in other.answers {
            *self.answers.entry(key).or_default() += count;
        }
        for (service, callers) in other.callers {
            self.callers.entry(service).or_default().extend(callers);
        }
        for (service, statuses) in other.statuses {
            for (status, count) in statuses {
                *self.statuses.entry(service.clone()).or_default().entry(status).or_default() += count;
            }
        }
    }

    fn add(&mut self, call: &Call, service: &str, took: Duration) {
        self.total += 1;
        self.micros.push(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
        if let Some(failure) = self.walk(call, service) {
            self.failed += 1;
            self.first_failure.get_or_insert(failure);
        }
    }

    /// Counts one call and those below it; gives the first failure among them.
    fn walk(&mut self, call: &Call, service: &str) -> Option<String> {
        *self.statuses.entry(service.to_owned()).or_default().entry(call.status).or_default() += 1;
        let mut failure = (call.status != 200).then(|| format!("{service}: {} {}", call.status, call.text));
        if let Some(answer) = &call.answer {
            *self.answers.entry((answer.service.clone(), answer.version.clone())).or_default() += 1;
            self.callers.entry(answer.service.clone()).or_default().insert(answer.caller.clone());
            for (name, below) in &answer.calls {
                failure = failure.or(self.walk(below, name));
            }
        }
        failure
    }
}

type Http = Client<HttpConnector, Empty<Bytes>>;

/// Sends the load and waits for every answer.
pub(crate) async fn send(load: &Load) -> Tally {
    let client: Http =
        Client::builder(TokioExecutor::new()).pool_max_idle_per_host(load.concurrency).build_http();
    let left = AtomicU32::new(load.requests);
    let workers = (0..load.concurrency).map(|_| async {
        let mut tally = Tally::default();
        while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
            let started = Instant::now();
            let call = one(&client, load).await;
            tally.add(&call, load.host, started.elapsed());
        }
        tally
    });
    let mut all = Tally::default();
    futures::future::join_all(workers).await.into_iter().for_each(|tally| all.merge(tally));
    all
}

async fn one(client: &Http, load: &Load) -> Call {
    let failed = |text: String| Call { status: 0, answer: None, text };
    let mut request = Request::builder().uri(format!("http://{}/", load.address)).header("host", load.host);
    if let Some(user) = load.user {
        request = request.header("end-user", user);
    }
    let Ok(request) = request.body(Empty::new()) else { return failed("not a request".to_owned()) };
    let exchange = async {
        let response = client.request(request).await.map_err(|e| e.to_string())?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes();
        Ok::<_, String>((status, body))
    };
    match tokio::time::timeout(TIMEOUT, exchange).await {
        Ok(Ok((status, body))) => match serde_json::from_slice::<Answer>(&body) {
            Ok(answer) => Call { status, answer: Some(Box::new(answer)), text: String::new() },
            Err(_) => Call { status, answer: None, text: String::from_utf8_lossy(&body).into_owned() },
        },
        Ok(Err(error)) => failed(error),
        Err(_) => failed(format!("no answer within {TIMEOUT:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(service: &str, version: &str, calls: &[(&str, Call)]) -> Call {
        let calls = calls.iter().map(|(name, call)| ((*name).to_owned(), call.clone())).collect();
        let answer = Answer {
            service: service.to_owned(),
            version: version.to_owned(),
            caller: "x".to_owned(),
            calls,
        };
        Call { status: 200, answer: Some(Box::new(answer)), text: String::new() }
    }

    #[test]
    fn a_failure_below_counts_as_a_failure() {
        let mut tally = Tally::default();
        let denied = Call { status: 403, answer: None, text: "RBAC: access denied".to_owned() };
        tally.add(&answer("front", "v1", &[("below", denied)]), "front", Duration::from_millis(2));
        tally.add(&answer("front", "v2", &[]), "front", Duration::from_millis(4));
        assert_eq!((tally.total, tally.failed), (2, 1));
        assert_eq!(tally.first_failure.as_deref(), Some("below: 403 RBAC: access denied"));
        assert!((tally.share("front", "v1") - 50.0).abs() < f64::EPSILON);
        assert!((tally.latency(1.0) - 4.0).abs() < f64::EPSILON);
        assert_eq!(tally.statuses["below"][&403], 1);
    }
}

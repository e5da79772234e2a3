//! One endpoint of a cluster on one worker.

use std::rc::Rc;
use std::sync::Arc;

use http::HeaderValue;
use tokio::time::Instant;

use super::check::{Checked, Standing};
use super::health::Outlier;
use super::pool::{Pool, Pools};
use crate::lb::Load;
use crate::listener::connection::{Connection, Origin};
use crate::metrics::standard::{Numbered, Standard, Workload};
use crate::xds::cluster::Cluster;
use crate::xds::cluster::endpoint::{Endpoint, Health};
use crate::xds::cluster::lb::SlowStart;
use crate::xds::cluster::transport::Transport;
use crate::xds::decode::Address;

/// One endpoint on one worker.
#[derive(Debug)]
pub struct Host {
    /// Where it is.
    pub address: Address,
    /// Its address as text.
    pub text: Rc<str>,
    /// What discovery says of it.
    pub endpoint: Arc<Endpoint>,
    /// Weight and requests under way.
    pub load: Load,
    /// Its connections.
    pub pools: Rc<Pools>,
    /// How connections to it begin.
    pub transport: Transport,
    /// The workload behind it, for metrics.
    pub workload: Rc<Numbered<Workload>>,
    /// The most requests on one connection.
    pub max_uses: Option<u32>,
    /// A connection is for one authority, because its server name is the request's.
    by_authority: bool,
    pub(super) outlier: Arc<Outlier>,
    /// What checks found out, if it is checked.
    checked: Option<Arc<Checked>>,
    since: Instant,
}

/// What all workers know of an endpoint's health.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// What requests found out.
    pub(super) outlier: Arc<Outlier>,
    /// What checks found out, if it is checked.
    pub(super) checked: Option<Arc<Checked>>,
}

impl Host {
    /// An endpoint that was not known before.
    pub(super) fn new(
        endpoint: &Arc<Endpoint>,
        cluster: &Cluster,
        known: Known,
        standard: &Standard,
    ) -> Rc<Self> {
        let workload = match &endpoint.workload {
            Some(w) => Workload::from_endpoint(
                &[&*w.name, &w.namespace, &w.canonical_name, &w.canonical_revision, &w.cluster].join(";"),
            ),
            None => Workload::default(),
        };
        let transport = cluster.transport_for(endpoint.transport_metadata()).clone();
        Rc::new(Self {
            address: endpoint.address.clone(),
            text: endpoint.address.to_string().into(),
            endpoint: Arc::clone(endpoint),
            load: Load::new(endpoint.weight),
            pools: Rc::default(),
            by_authority: cluster.http.auto_sni || transport.tls.as_ref().is_some_and(|t| t.auto_host_sni),
            transport,
            workload: standard.workload(workload),
            max_uses: cluster.http.max_requests_per_connection,
            outlier: known.outlier,
            checked: known.checked,
            since: Instant::now(),
        })
    }

    /// This endpoint with what discovery says of it now. Its connections stay, unless they are made otherwise now.
    pub(super) fn with(
        &self,
        endpoint: &Arc<Endpoint>,
        cluster: &Cluster,
        known: Known,
        standard: &Standard,
    ) -> Rc<Self> {
        let mut next = Self::new(endpoint, cluster, known, standard);
        let same = next.transport.is_same(&self.transport);
        if let Some(next) = Rc::get_mut(&mut next) {
            next.since = self.since;
            next.load = Load::like(endpoint.weight, &self.load.active);
            if same {
                next.pools = Rc::clone(&self.pools);
            }
        }
        if !same {
            self.pools.close();
        }
        next
    }

    pub(super) fn is_healthy(&self) -> bool {
        !self.is_ejected() && self.endpoint.health == Health::Healthy && self.standing() == Standing::Healthy
    }

    pub(super) fn is_degraded(&self) -> bool {
        let said = matches!(self.endpoint.health, Health::Healthy | Health::Degraded);
        let found = matches!(self.standing(), Standing::Healthy | Standing::Degraded);
        !self.is_ejected() && said && found && !self.is_healthy()
    }

    /// Whether it is about to go.
    pub(super) fn is_draining(&self) -> bool {
        self.endpoint.health == Health::Draining
    }

    /// What checks found out; an endpoint that is not checked counts as healthy.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.checked.as_ref().map_or(Standing::Healthy, |checked| checked.standing())
    }

    /// Whether passive health checks left it out.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.outlier.is_ejected()
    }

    /// The connections for requests to this authority, of this client if the endpoint is told who called.
    #[must_use]
    pub fn pool(&self, authority: &HeaderValue, origin: Option<&Rc<Origin>>) -> Rc<Pool> {
        self.pools.of(self.by_authority.then_some(authority), origin)
    }

    /// What the endpoint is told of this client, if it is told anything.
    #[must_use]
    pub fn origin(&self, connection: &Connection) -> Option<Rc<Origin>> {
        self.transport.proxy_protocol.as_ref().map(|_| connection.origin())
    }

    /// Whether it is so new that it gets less than its share.
    pub(super) fn is_warming(&self, slow: &SlowStart, now: Instant) -> bool {
        now.duration_since(self.since) < slow.window
    }

    /// Gives it its share as of now. All weights are multiplied, so that part of 1 is a whole number.
    pub(super) fn warm_up(&self, slow: &SlowStart, now: Instant) {
        let share = slow_share(slow, now.duration_since(self.since).as_secs_f64());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most SCALE")]
        let parts = (f64::from(SCALE) * share) as u32;
        self.load.weight.set(self.endpoint.weight.max(1).saturating_mul(parts.max(1)));
    }
}

/// How many parts a weight of 1 has under slow start.
const SCALE: u32 = 1000;

/// Envoy's share of an endpoint that is so many seconds old: `max(least, (age / window) ^ (1 / aggression))`.
fn slow_share(slow: &SlowStart, age: f64) -> f64 {
    let window = slow.window.as_secs_f64();
    if age >= window {
        return 1.0;
    }
    // Envoy counts at least one second, so that a new endpoint gets something
    let factor = (age.max(1.0) / window).min(1.0).powf(1.0 / slow.aggression.max(f64::MIN_POSITIVE));
    factor.max(slow.min_weight_percent / 100.0).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_new_endpoints_share_grows_with_its_age() {
        let slow = SlowStart { window: Duration::from_secs(100), aggression: 1.0, min_weight_percent: 10.0 };
        for (age, share) in [(0.0, 0.1), (5.0, 0.1), (50.0, 0.5), (99.0, 0.99), (100.0, 1.0), (1e9, 1.0)] {
            assert!((slow_share(&slow, age) - share).abs() < 1e-9, "{age}");
        }
        let eager = SlowStart { aggression: 2.0, ..slow };
        assert!((slow_share(&eager, 25.0) - 0.5).abs() < 1e-9);
    }
}

//! Catalogs that the mesh follows, and those that it writes into. One member does so for each of them: the leader of the
//! log, from what the state holds.

pub(crate) mod consul;
pub(crate) mod export;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::raft::node::Status;

/// Where a datacenter's metrics are told apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    datacenter: String,
}

type Gauges = Family<Labels, Gauge>;
type Counters = Family<Labels, Counter>;

/// Registers metrics by name and help, under names that begin with `prefix`.
fn register(
    registry: &mut Registry,
    prefix: &str,
    gauges: &[(&str, &str, &Gauges)],
    counters: &[(&str, &str, &Counters)],
) {
    let ours = registry.sub_registry_with_prefix(prefix);
    for (name, help, gauge) in gauges {
        ours.register(*name, *help, Gauges::clone(gauge));
    }
    for (name, help, counter) in counters {
        ours.register(*name, *help, Counters::clone(counter));
    }
}

/// Sets gauges, and has counters go on from what was shown before.
fn show(labels: &Labels, gauges: &[(&Gauges, usize)], counters: &[(&Counters, u64, u64)]) {
    for (gauge, value) in gauges {
        gauge.get_or_create(labels).set(i64::try_from(*value).unwrap_or(i64::MAX));
    }
    for (counter, was, is) in counters {
        counter.get_or_create(labels).inc_by(is.saturating_sub(*was));
    }
}

/// What all of them tell Prometheus.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) consul: consul::Metrics,
    pub(crate) export: export::Metrics,
}

impl Metrics {
    /// Metrics that `registry` shows.
    pub(crate) fn registered(registry: &mut Registry) -> Self {
        Self { consul: consul::Metrics::registered(registry), export: export::Metrics::registered(registry) }
    }
}

/// The turns of a member: the times in which it leads. Each term is a turn of its own, for others may have led in between.
struct Turns {
    leads: watch::Receiver<Status>,
    stop: CancellationToken,
}

impl Turns {
    /// The next turn: its term, and what is cancelled at its end. `None` at the end of the member.
    async fn begin(&mut self) -> Option<(u64, CancellationToken)> {
        let led = self.stop.run_until_cancelled(self.leads.wait_for(|status| status.leading)).await?;
        Some((led.ok()?.term, self.stop.child_token()))
    }

    /// Waits until the turn of this term is over, and says so; whether there may be another one.
    async fn end(&mut self, term: u64, turn: CancellationToken) -> bool {
        let over = self.leads.wait_for(|status| !status.leading || status.term != term);
        let over = self.stop.run_until_cancelled(over).await.is_some_and(|over| over.is_ok());
        turn.cancel();
        over
    }
}

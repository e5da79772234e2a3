//! The push side's metrics, by Istio's names, for Istio's dashboards.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use envoy_types::pb::google::protobuf::Any;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::Registry;

use crate::resources::Type;
use crate::stream::Action;

/// A count whose name is Istio's and so has no `_total` at its end, which a counter of this library would get.
#[derive(Debug, Clone, Default)]
pub struct Sum(Arc<AtomicU64>);

impl Sum {
    /// One more.
    pub fn inc(&self) {
        self.inc_by(1);
    }

    /// So many more.
    pub fn inc_by(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// How many so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl TypedMetric for Sum {
    const TYPE: MetricType = MetricType::Unknown;
}

impl EncodeMetric for Sum {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        encoder.encode_gauge(&self.get())
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// `type="cds"`, or what a metric counts by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TypeLabel {
    r#type: &'static str,
}

impl TypeLabel {
    /// The label with this value; values are few and fixed.
    #[must_use]
    pub fn new(value: &'static str) -> Self {
        Self { r#type: value }
    }
}

impl From<Type> for TypeLabel {
    fn from(t: Type) -> Self {
        Self::new(short(t))
    }
}

fn short(t: Type) -> &'static str {
    match t {
        Type::Cluster => "cds",
        Type::Endpoint => "eds",
        Type::Listener => "lds",
        Type::Route => "rds",
    }
}

/// What streams and pushes count. Clones count in the same.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// `pilot_xds`
    pub connected: Gauge,
    /// `pilot_xds_pushes`, by type.
    pub pushes: Family<TypeLabel, Sum>,
    /// `pilot_xds_config_size_bytes`, by type.
    pub size: Family<TypeLabel, Histogram>,
    /// `pilot_total_xds_rejects`
    pub rejects: Sum,
    /// `pilot_xds_{cds,eds,lds,rds}_reject`
    pub refusing: [Gauge; Type::ALL.len()],
    /// `pilot_proxy_convergence_time`: from a commit to the response that brings it.
    pub convergence: Histogram,
    /// `push_convergence_seconds`: from a commit to its acknowledgement by one proxy.
    pub push_convergence: Histogram,
    /// `pilot_proxy_queue_time`
    pub queue_time: Histogram,
    /// `pilot_debounce_time`
    pub debounce_time: Histogram,
    /// `pilot_push_triggers`, by `full` and `endpoint`.
    pub triggers: Family<TypeLabel, Sum>,
    /// `pilot_inbound_updates`, by `config`, `eds` and `mesh`.
    pub inbound: Family<TypeLabel, Sum>,
    /// `pilot_services`
    pub services: Gauge,
    /// `pilot_virt_services`
    pub virtual_services: Gauge,
    /// `xds_identity_refusals_total`
    pub unauthenticated: Counter,
}

/// Seconds, from half a millisecond to what an operator would not believe.
const SECONDS: [f64; 15] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 5.0, 10.0, 30.0];

/// Bytes, as Istio has them.
const BYTES: [f64; 6] = [1.0, 10_000.0, 1_000_000.0, 4_000_000.0, 10_000_000.0, 40_000_000.0];

impl Default for Metrics {
    fn default() -> Self {
        let seconds = || Histogram::new(SECONDS);
        Self {
            connected: Gauge::default(),
            pushes: Family::default(),
            size: Family::new_with_constructor(|| Histogram::new(BYTES)),
            rejects: Sum::default(),
            refusing: Default::default(),
            convergence: seconds(),
            push_convergence: seconds(),
            queue_time: seconds(),
            debounce_time: seconds(),
            triggers: Family::default(),
            inbound: Family::default(),
            services: Gauge::default(),
            virtual_services: Gauge::default(),
            unauthenticated: Counter::default(),
        }
    }
}

impl Metrics {
    /// Metrics that `registry` shows.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        registry.register("pilot_xds", "Number of proxies connected over xDS", m.connected.clone());
        registry.register("pilot_xds_pushes", "Responses sent, by type", m.pushes.clone());
        registry.register("pilot_xds_config_size_bytes", "Sizes of responses, by type", m.size.clone());
        registry.register("pilot_total_xds_rejects", "Responses that proxies rejected", m.rejects.clone());
        for (t, gauge) in Type::ALL.into_iter().zip(&m.refusing) {
            let name = format!("pilot_xds_{}_reject", short(t));
            registry.register(name, "Proxies that now reject a resource of the type", gauge.clone());
        }
        let help = "Seconds from a change to the response that brings it to a proxy";
        registry.register("pilot_proxy_convergence_time", help, m.convergence.clone());
        let help = "Seconds from a commit to its acknowledgement by a proxy";
        registry.register("push_convergence_seconds", help, m.push_convergence.clone());
        let help = "Seconds a proxy waits in the push queue";
        registry.register("pilot_proxy_queue_time", help, m.queue_time.clone());
        let help = "Seconds a change waits to be merged with others";
        registry.register("pilot_debounce_time", help, m.debounce_time.clone());
        registry.register("pilot_push_triggers", "Translations, by what they cover", m.triggers.clone());
        registry.register("pilot_inbound_updates", "Changes that came in, by kind", m.inbound.clone());
        registry.register("pilot_services", "Services known", m.services.clone());
        registry.register("pilot_virt_services", "VirtualServices known", m.virtual_services.clone());
        let help = "Streams refused because their identity is missing or another than they say";
        registry.register("xds_identity_refusals", help, m.unauthenticated.clone());
        m
    }

    pub(super) fn count(&self, action: &Action) {
        match action {
            Action::Send(response) => {
                let Some(t) = Type::from_url(&response.type_url) else { return };
                self.pushes.get_or_create(&t.into()).inc();
                let bytes: usize = response.resources.iter().map(|r| size(&r.body)).sum();
                self.size.get_or_create(&t.into()).observe(u32::try_from(bytes).unwrap_or(u32::MAX).into());
            }
            Action::Accepted { .. } => {}
            Action::Rejected(_) => self.rejects.inc(),
        }
    }

    pub(super) fn refusing(&self, t: Type, before: bool, now: bool) {
        let gauge = Type::ALL.into_iter().zip(&self.refusing).find(|(other, _)| *other == t);
        match (gauge, before, now) {
            (Some((_, gauge)), false, true) => _ = gauge.inc(),
            (Some((_, gauge)), true, false) => _ = gauge.dec(),
            _ => {}
        }
    }
}

fn size(any: &Any) -> usize {
    any.type_url.len() + any.value.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_istios_to_the_letter() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        metrics.pushes.get_or_create(&Type::Cluster.into()).inc();
        metrics.refusing(Type::Route, false, true);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in ["pilot_xds 0\n", "pilot_xds_pushes{type=\"cds\"} 1\n", "pilot_xds_rds_reject 1\n"] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.contains("pilot_total_xds_rejects 0\n"));
    }
}

//! Counters of a connection manager.

use std::rc::Rc;

use crate::metrics::{Counter, Registry};

/// What Envoy counts of a connection manager.
#[derive(Debug)]
pub struct HttpStats {
    /// Requests.
    pub rq_total: Rc<Counter>,
    /// Requests under way.
    pub rq_active: Rc<Counter>,
    /// Responses by class: 1xx to 5xx.
    pub rq_xx: [Rc<Counter>; 5],
    /// Requests that access rules let through.
    pub rbac_allowed: Rc<Counter>,
    /// Requests that access rules turned away.
    pub rbac_denied: Rc<Counter>,
    /// Requests that shadow rules would have turned away.
    pub rbac_shadow_denied: Rc<Counter>,
    /// Delays under way.
    pub faults_active: Rc<Counter>,
    /// Streams on which nothing moved for too long.
    pub rq_idle_timeout: Rc<Counter>,
    /// Requests that did not come whole in time.
    pub rq_timeout: Rc<Counter>,
    /// Connections closed because their clients gave up too many requests at once.
    pub too_many_resets: Rc<Counter>,
    /// Connections closed because their clients took nothing of a response for too long.
    pub stalled: Rc<Counter>,
    /// Requests that were too much.
    pub shed: Rc<Counter>,
    /// Connections that end because there is too much.
    pub keepalive_disabled: Rc<Counter>,
}

impl HttpStats {
    pub(super) fn new(registry: &Registry, prefix: &str) -> Self {
        let labels = [("envoy_http_conn_manager_prefix", prefix)];
        let class = |code| {
            let labels = [("envoy_http_conn_manager_prefix", prefix), ("envoy_response_code_class", code)];
            registry.counter("envoy_http_downstream_rq_xx", &labels)
        };
        Self {
            rq_total: registry.counter("envoy_http_downstream_rq_total", &labels),
            rq_active: registry.gauge("envoy_http_downstream_rq_active", &labels),
            rq_xx: ["1", "2", "3", "4", "5"].map(class),
            rbac_allowed: registry.counter("envoy_http_rbac_allowed", &labels),
            rbac_denied: registry.counter("envoy_http_rbac_denied", &labels),
            rbac_shadow_denied: registry.counter("envoy_http_rbac_shadow_denied", &labels),
            faults_active: registry.gauge("envoy_http_fault_active_faults", &labels),
            rq_idle_timeout: registry.counter("envoy_http_downstream_rq_idle_timeout", &labels),
            rq_timeout: registry.counter("envoy_http_downstream_rq_timeout", &labels),
            too_many_resets: registry.counter("envoy_http_downstream_rq_too_many_premature_resets", &labels),
            stalled: registry.counter("envoy_http_downstream_flush_timeout", &labels),
            shed: registry.counter("envoy_http_downstream_rq_overload_close", &labels),
            keepalive_disabled: registry
                .counter("envoy_http_downstream_cx_overload_disable_keepalive", &labels),
        }
    }
}

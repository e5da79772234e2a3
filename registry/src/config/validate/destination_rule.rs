//! Rules of `DestinationRule`, and of the policies that other kinds share with it.

use std::collections::BTreeSet;

use super::virtual_service::check_percent;
use super::{Checker, check_label, grammar};
use crate::config::node::Segment;
use crate::model::traffic::{
    ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, ConsistentHashLb, DestinationRule, Failover,
    H2UpgradePolicy, HashAlgorithm, HashKey, HttpSettings, LbPolicy, LoadBalancerSettings, LocalityLbSetting,
    OutlierDetection, PortTrafficPolicy, Subset, TcpSettings, TrafficPolicy, TunnelSettings,
    WarmupConfiguration,
};

/// Largest table of Maglev (Envoy).
const MAX_MAGLEV: u64 = 5_000_011;
/// Largest ring (Envoy).
const MAX_RING: u64 = 8 << 20;

pub(super) fn check(cx: &mut Checker, rule: &DestinationRule) {
    if cx.required("host", &rule.host) && !grammar::is_wildcard_host(&rule.host) {
        cx.error_at("host", "must be a host name, or a host name with a leading *.");
    }
    cx.opt("trafficPolicy", rule.traffic_policy.as_ref(), check_traffic_policy);
    cx.each("subsets", &rule.subsets, check_subset);
    cx.unique("subsets", rule.subsets.iter().map(|subset| subset.name.as_str()), "subset");
    cx.export_to(&rule.export_to);
    cx.opt("workloadSelector", rule.workload_selector.as_ref(), |cx, selector| {
        cx.selector("matchLabels", &selector.match_labels);
    });
    if rule.workload_selector.is_some() {
        let foreign = rule.export_to.iter().any(|namespace| namespace != ".");
        cx.refuse(foreign, "exportTo", "must be . or absent when workloadSelector is set");
    } else {
        credentials_of_sidecars(cx, rule);
    }
}

fn credentials_of_sidecars(cx: &mut Checker, rule: &DestinationRule) {
    let tls = rule.traffic_policy.as_ref().and_then(|policy| policy.tls.as_ref());
    if tls.is_some_and(|tls| !tls.credential_name.is_empty()) {
        cx.at("trafficPolicy", |cx| {
            cx.at("tls", |cx| {
                cx.at("credentialName", |cx| {
                    cx.warn(
                        "has an effect on sidecars only with workloadSelector; without, on gateways only",
                    );
                });
            });
        });
    }
}

fn check_subset(cx: &mut Checker, subset: &Subset) {
    if cx.required("name", &subset.name) && !grammar::is_subset_name(&subset.name) {
        cx.error_at("name", "must be a name of letters, digits and -");
    }
    cx.entries("labels", &subset.labels, |cx, key, value| check_label(cx, key, value));
    if subset.labels.is_empty() {
        cx.at("labels", |cx| cx.warn("is empty: the subset has every endpoint"));
    }
    cx.opt("trafficPolicy", subset.traffic_policy.as_ref(), check_traffic_policy);
}

fn check_traffic_policy(cx: &mut Checker, policy: &TrafficPolicy) {
    if *policy == TrafficPolicy::default() {
        cx.error("must have at least one field");
    }
    cx.opt("loadBalancer", policy.load_balancer.as_ref(), check_load_balancer);
    cx.opt("connectionPool", policy.connection_pool.as_ref(), check_connection_pool);
    cx.opt("outlierDetection", policy.outlier_detection.as_ref(), check_outlier_detection);
    cx.opt("tls", policy.tls.as_ref(), check_client_tls);
    cx.each("portLevelSettings", &policy.port_level_settings, check_port_policy);
    let mut ports = BTreeSet::new();
    cx.at("portLevelSettings", |cx| {
        for (index, port) in policy.port_level_settings.iter().enumerate() {
            let number = port.port.as_ref().map_or(0, |port| port.number);
            if number != 0 && !ports.insert(number) {
                cx.step(Segment::Index(index), |cx| {
                    cx.error(format!("the port {number} is there twice; it must be unique"))
                });
            }
        }
    });
    cx.opt("tunnel", policy.tunnel.as_ref(), check_tunnel);
    cx.opt("retryBudget", policy.retry_budget.as_ref(), |cx, budget| {
        check_percent(cx, "percent", budget.percent.as_ref());
        cx.duration("budgetInterval", budget.budget_interval);
    });
}

fn check_port_policy(cx: &mut Checker, policy: &PortTrafficPolicy) {
    match &policy.port {
        None => cx.error_at("port", "is required"),
        Some(port) => cx.at("port", |cx| cx.port("number", port.number)),
    }
    cx.opt("loadBalancer", policy.load_balancer.as_ref(), check_load_balancer);
    cx.opt("connectionPool", policy.connection_pool.as_ref(), check_connection_pool);
    cx.opt("outlierDetection", policy.outlier_detection.as_ref(), check_outlier_detection);
    cx.opt("tls", policy.tls.as_ref(), check_client_tls);
}

fn check_tunnel(cx: &mut Checker, tunnel: &TunnelSettings) {
    cx.refuse(
        !matches!(tunnel.protocol.as_str(), "" | "CONNECT" | "POST"),
        "protocol",
        "must be CONNECT or POST",
    );
    if cx.required("targetHost", &tunnel.target_host) {
        let fits = grammar::is_host(&tunnel.target_host) || grammar::is_ip(&tunnel.target_host);
        cx.refuse(!fits, "targetHost", "must be a host name without wildcard or an IP address");
    }
    cx.port("targetPort", tunnel.target_port);
}

pub(super) fn check_connection_pool(cx: &mut Checker, pool: &ConnectionPoolSettings) {
    if pool.tcp.is_none() && pool.http.is_none() {
        cx.error("must have at least one of tcp and http");
    }
    cx.opt("tcp", pool.tcp.as_ref(), check_tcp);
    cx.opt("http", pool.http.as_ref(), check_http);
}

fn check_tcp(cx: &mut Checker, tcp: &TcpSettings) {
    not_negative(cx, "maxConnections", tcp.max_connections);
    cx.duration("connectTimeout", tcp.connect_timeout);
    cx.duration("maxConnectionDuration", tcp.max_connection_duration);
    cx.duration_or_zero("idleTimeout", tcp.idle_timeout);
    cx.opt("tcpKeepalive", tcp.tcp_keepalive.as_ref(), |cx, keepalive| {
        cx.duration("time", keepalive.time);
        cx.duration("interval", keepalive.interval);
    });
}

fn check_http(cx: &mut Checker, http: &HttpSettings) {
    not_negative(cx, "http1MaxPendingRequests", http.http1_max_pending_requests);
    not_negative(cx, "http2MaxRequests", http.http2_max_requests);
    not_negative(cx, "maxRequestsPerConnection", http.max_requests_per_connection);
    not_negative(cx, "maxRetries", http.max_retries);
    not_negative(cx, "maxConcurrentStreams", http.max_concurrent_streams);
    cx.duration_or_zero("idleTimeout", http.idle_timeout);
    cx.refuse(
        http.use_client_protocol && http.h2_upgrade_policy == H2UpgradePolicy::Upgrade,
        "useClientProtocol",
        "must not be true when h2UpgradePolicy is UPGRADE",
    );
    cx.opt("http2KeepAlive", http.http2_keep_alive.as_ref(), |cx, keepalive| {
        cx.duration("interval", keepalive.interval);
        cx.duration("timeout", keepalive.timeout);
    });
}

fn not_negative(cx: &mut Checker, field: &str, value: Option<i32>) {
    cx.refuse(value.is_some_and(|value| value < 0), field, "must not be negative");
}

pub(super) fn check_outlier_detection(cx: &mut Checker, outlier: &OutlierDetection) {
    cx.duration("interval", outlier.interval);
    cx.duration("baseEjectionTime", outlier.base_ejection_time);
    cx.percent("maxEjectionPercent", Some(f64::from(outlier.max_ejection_percent)));
    cx.percent("minHealthPercent", Some(f64::from(outlier.min_health_percent)));
    not_negative(cx, "consecutiveErrors", Some(outlier.consecutive_errors));
    cx.refuse(
        outlier.consecutive_local_origin_failures.is_some_and(|failures| failures > 0)
            && !outlier.split_external_local_origin_errors,
        "consecutiveLocalOriginFailures",
        "has an effect only when splitExternalLocalOriginErrors is true",
    );
    cx.each("outlierDetectionHttpErrorCodes", &outlier.outlier_detection_http_error_codes, |cx, codes| {
        let code = |text: &str| text.parse::<u16>().ok().filter(|code| (100..=599).contains(code));
        let fits = match codes.split_once('-') {
            Some((from, to)) => code(from).zip(code(to)).is_some_and(|(from, to)| from <= to),
            None => code(codes).is_some(),
        };
        if !fits {
            cx.error("must be a status code such as \"503\" or a range such as \"500-599\"");
        }
    });
}

pub(super) fn check_load_balancer(cx: &mut Checker, balancer: &LoadBalancerSettings) {
    if let Some(LbPolicy::ConsistentHash(hash)) = &balancer.lb_policy {
        cx.at("consistentHash", |cx| check_consistent_hash(cx, hash));
        cx.refuse(balancer.warmup.is_some(), "warmup", "is for ROUND_ROBIN and LEAST_REQUEST only");
    }
    cx.opt("localityLbSetting", balancer.locality_lb_setting.as_ref(), check_locality);
    cx.opt("zoneAwareLbSetting", balancer.zone_aware_lb_setting.as_ref(), |cx, zones| {
        check_failover(cx, &zones.failover);
        cx.refuse(
            !zones.failover.is_empty() && !zones.failover_priority.is_empty(),
            "failoverPriority",
            "only one of failover and failoverPriority may be set",
        );
    });
    cx.refuse(
        balancer.locality_lb_setting.is_some() && balancer.zone_aware_lb_setting.is_some(),
        "zoneAwareLbSetting",
        "only one of localityLbSetting and zoneAwareLbSetting may be set",
    );
    cx.refuse(
        balancer.warmup.is_some() && balancer.warmup_duration_secs.is_some(),
        "warmup",
        "only one of warmup and warmupDurationSecs may be set",
    );
    cx.duration("warmupDurationSecs", balancer.warmup_duration_secs);
    cx.opt("warmup", balancer.warmup.as_ref(), check_warmup);
}

fn check_warmup(cx: &mut Checker, warmup: &WarmupConfiguration) {
    cx.refuse(warmup.duration.is_none(), "duration", "is required");
    cx.duration("duration", warmup.duration);
    cx.percent("minimumPercent", warmup.minimum_percent);
    cx.refuse(warmup.aggression.is_some_and(|a| a < 1.0), "aggression", "must be at least 1");
}

fn check_consistent_hash(cx: &mut Checker, hash: &ConsistentHashLb) {
    match &hash.hash_key {
        None => {
            cx.error("must have one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName")
        }
        Some(HashKey::HttpHeaderName(name)) => {
            cx.refuse(!grammar::is_header_name(name), "httpHeaderName", "must be the name of a header");
        }
        Some(HashKey::HttpCookie(cookie)) => cx.at("httpCookie", |cx| {
            cx.required("name", &cookie.name);
            cx.each("attributes", &cookie.attributes, |cx, attribute| {
                cx.required("name", &attribute.name);
            });
        }),
        Some(HashKey::HttpQueryParameterName(name)) => {
            cx.required("httpQueryParameterName", name);
        }
        Some(HashKey::UseSourceIp(on)) => {
            if !on {
                cx.error_at("useSourceIp", "must be true, or another key must be chosen");
            }
        }
    }
    match &hash.hash_algorithm {
        Some(HashAlgorithm::Maglev(maglev)) => {
            let size = maglev.table_size.unwrap_or(65537);
            cx.at("maglev", |cx| {
                cx.refuse(size > MAX_MAGLEV, "tableSize", "must be at most 5000011");
                cx.refuse(size <= MAX_MAGLEV && !is_prime(size), "tableSize", "must be a prime number");
            });
        }
        Some(HashAlgorithm::RingHash(ring)) => {
            let size = ring.minimum_ring_size.unwrap_or(1024);
            cx.at("ringHash", |cx| cx.refuse(size > MAX_RING, "minimumRingSize", "must be at most 8388608"));
        }
        None => {}
    }
}

fn is_prime(n: u64) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

pub(super) fn check_locality(cx: &mut Checker, locality: &LocalityLbSetting) {
    let set = [
        !locality.distribute.is_empty(),
        !locality.failover.is_empty(),
        !locality.failover_priority.is_empty(),
    ];
    // Istio takes failover with failoverPriority; distribute excludes both.
    if set.iter().filter(|set| **set).count() > 1 && set.first() == Some(&true) {
        cx.error_at("distribute", "only one of distribute, failover and failoverPriority may be set");
    }
    cx.each("distribute", &locality.distribute, |cx, distribute| {
        if cx.required("from", &distribute.from) && !grammar::is_locality_pattern(&distribute.from) {
            cx.error_at("from", "must be region/zone/subzone; only the last part may be *");
        }
        cx.refuse(distribute.to.is_empty(), "to", "is required: at least one locality");
        cx.entries("to", &distribute.to, |cx, to, weight| {
            if !grammar::is_locality_pattern(to) {
                cx.error("must be region/zone/subzone; only the last part may be *");
            } else if *weight == 0 {
                cx.error("must be at least 1; leave out localities that get nothing");
            }
        });
        let sum: u64 = distribute.to.values().copied().map(u64::from).sum();
        if !distribute.to.is_empty() && sum != 100 {
            cx.error_at("to", format!("the weights must add up to 100, these add up to {sum}"));
        }
    });
    check_failover(cx, &locality.failover);
}

fn check_failover(cx: &mut Checker, failover: &[Failover]) {
    cx.each("failover", failover, |cx, failover| {
        for (field, region) in [("from", &failover.from), ("to", &failover.to)] {
            if cx.required(field, region) && region.contains(['/', '*']) {
                cx.error_at(field, "must be a region, without zone and without *");
            }
        }
        cx.refuse(
            failover.from == failover.to && !failover.to.is_empty(),
            "to",
            "must be another region than from",
        );
    });
}

pub(super) fn check_client_tls(cx: &mut Checker, tls: &ClientTlsSettings) {
    let files = [
        ("clientCertificate", &tls.client_certificate),
        ("privateKey", &tls.private_key),
        ("caCertificates", &tls.ca_certificates),
    ];
    if !tls.credential_name.is_empty() && tls.mode != ClientTlsMode::IstioMutual {
        for (field, file) in files {
            cx.refuse(!file.is_empty(), field, "must be empty when credentialName is set");
        }
    }
    match tls.mode {
        ClientTlsMode::Mutual if tls.credential_name.is_empty() => {
            for (field, file) in files.iter().take(2) {
                cx.refuse(file.is_empty(), field, "is required with mode MUTUAL, or use credentialName");
            }
        }
        ClientTlsMode::IstioMutual => {
            for (field, file) in files {
                cx.refuse(
                    !file.is_empty(),
                    field,
                    "must be empty with mode ISTIO_MUTUAL, which uses the workload's own",
                );
            }
            cx.refuse(
                !tls.credential_name.is_empty(),
                "credentialName",
                "must be empty with mode ISTIO_MUTUAL",
            );
        }
        ClientTlsMode::Disable | ClientTlsMode::Simple | ClientTlsMode::Mutual => {}
    }
    let verified = !tls.ca_certificates.is_empty() || !tls.subject_alt_names.is_empty();
    cx.refuse(
        tls.insecure_skip_verify == Some(true) && verified,
        "insecureSkipVerify",
        "must not be true when caCertificates or subjectAltNames are set",
    );
    if !tls.sni.is_empty() && !grammar::is_host(&tls.sni) {
        cx.error_at("sni", "must be a host name without wildcard");
    }
    cx.each("subjectAltNames", &tls.subject_alt_names, |cx, name| {
        if name.is_empty() {
            cx.error("must not be empty");
        }
    });
}

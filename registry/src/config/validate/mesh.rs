//! Rules of `MeshConfig`.

use super::destination_rule::{
    check_client_tls, check_connection_pool, check_locality, check_outlier_detection,
};
use super::service_entry::check_probe;
use super::virtual_service::check_retries;
use super::{Checker, grammar};
use crate::model::mesh::{
    ExtensionProvider, LabelSelector, LabelSelectorOperator, MeshConfig, Provider, ProxyConfig,
};

pub(super) fn check(cx: &mut Checker, mesh: &MeshConfig) {
    cx.duration("connectTimeout", mesh.connect_timeout);
    cx.duration_or_zero("protocolDetectionTimeout", mesh.protocol_detection_timeout);
    cx.duration("dnsRefreshRate", mesh.dns_refresh_rate);
    for (field, port) in [
        ("proxyListenPort", mesh.proxy_listen_port),
        ("proxyInboundListenPort", mesh.proxy_inbound_listen_port),
    ] {
        if let Some(port) = port {
            cx.port(field, port);
        }
    }
    let percent = mesh.max_affected_proxies_percent;
    cx.refuse(percent.is_some_and(|p| p > 100), "maxAffectedProxiesPercent", "must be from 0 to 100");
    check_names(cx, mesh);
    for (field, namespaces) in [
        ("defaultServiceExportTo", &mesh.default_service_export_to),
        ("defaultVirtualServiceExportTo", &mesh.default_virtual_service_export_to),
        ("defaultDestinationRuleExportTo", &mesh.default_destination_rule_export_to),
    ] {
        cx.each(field, namespaces, |cx, namespace| {
            if !matches!(namespace.as_str(), "*" | "." | "~") && !grammar::is_label(namespace) {
                cx.error("must be *, ., ~ or the name of a namespace");
            }
        });
    }
    cx.opt("localityLbSetting", mesh.locality_lb_setting.as_ref(), check_locality);
    cx.opt("defaultHttpRetryPolicy", mesh.default_http_retry_policy.as_ref(), |cx, retries| {
        check_retries(cx, retries);
        cx.refuse(retries.per_try_timeout.is_some(), "perTryTimeout", "cannot be set for the whole mesh");
    });
    cx.opt("defaultTrafficPolicy", mesh.default_traffic_policy.as_ref(), |cx, policy| {
        cx.opt("connectionPool", policy.connection_pool.as_ref(), check_connection_pool);
        cx.opt("outlierDetection", policy.outlier_detection.as_ref(), check_outlier_detection);
    });
    cx.each("extensionProviders", &mesh.extension_providers, check_provider);
    cx.unique("extensionProviders", mesh.extension_providers.iter().map(|p| p.name.as_str()), "provider");
    check_default_providers(cx, mesh);
    cx.each("discoverySelectors", &mesh.discovery_selectors, check_label_selector);
    cx.each("configSources", &mesh.config_sources, |cx, source| {
        let known = ["k8s://", "fs:///", "xds://"].iter().any(|scheme| source.address.starts_with(scheme));
        cx.refuse(!known, "address", "must begin with k8s://, fs:/// or xds://");
        cx.opt("tlsSettings", source.tls_settings.as_ref(), check_client_tls);
    });
    cx.opt("defaultConfig", mesh.default_config.as_ref(), check_proxy_config);
}

fn check_names(cx: &mut Checker, mesh: &MeshConfig) {
    if !mesh.root_namespace.is_empty() && !grammar::is_label(&mesh.root_namespace) {
        cx.error_at("rootNamespace", "must be the name of a namespace");
    }
    let trust_domain = |domain: &str| {
        !domain.is_empty()
            && domain.len() <= 255
            && domain
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'))
    };
    if !mesh.trust_domain.is_empty() && !trust_domain(&mesh.trust_domain) {
        cx.error_at("trustDomain", "must have lower-case letters, digits, ., - and _ only (SPIFFE ID, 2.1)");
    }
    cx.each("trustDomainAliases", &mesh.trust_domain_aliases, |cx, alias| {
        if !trust_domain(alias) {
            cx.error("must have lower-case letters, digits, ., - and _ only (SPIFFE ID, 2.1)");
        }
    });
}

fn check_provider(cx: &mut Checker, provider: &ExtensionProvider) {
    cx.required("name", &provider.name);
    let Some(kind) = &provider.provider else {
        cx.error("must have one provider, for example envoyExtAuthzHttp, zipkin or prometheus");
        return;
    };
    let (service, port) = match kind {
        Provider::EnvoyExtAuthzHttp(p) => (&p.service, p.port),
        Provider::EnvoyExtAuthzGrpc(p) => (&p.service, p.port),
        Provider::Zipkin(p) => (&p.service, p.port),
        Provider::Lightstep(p) => (&p.service, p.port),
        Provider::Datadog(p) => (&p.service, p.port),
        Provider::Opencensus(p) => (&p.service, p.port),
        Provider::Skywalking(p) => (&p.service, p.port),
        Provider::Opentelemetry(p) => (&p.service, p.port),
        Provider::EnvoyHttpAls(p) => (&p.service, p.port),
        Provider::EnvoyTcpAls(p) => (&p.service, p.port),
        Provider::EnvoyOtelAls(p) => (&p.service, p.port),
        Provider::Sds(p) => (&p.service, p.port),
        Provider::Stackdriver(_) | Provider::Prometheus(_) | Provider::EnvoyFileAccessLog(_) => return,
    };
    let name = crate::config::decode::OneOf::name(kind);
    cx.at(name, |cx| {
        if cx.required("service", service) {
            let host = service.split_once('/').map_or(service.as_str(), |(_, host)| host);
            cx.refuse(
                !grammar::is_host(host),
                "service",
                "must be a host name, after an optional namespace and slash",
            );
        }
        cx.port("port", port);
        check_ext_authz(cx, kind);
    });
}

fn check_ext_authz(cx: &mut Checker, provider: &Provider) {
    let (timeout, status, prefix) = match provider {
        Provider::EnvoyExtAuthzHttp(p) => (p.timeout, &p.status_on_error, p.path_prefix.as_str()),
        Provider::EnvoyExtAuthzGrpc(p) => (p.timeout, &p.status_on_error, ""),
        Provider::Zipkin(_)
        | Provider::Lightstep(_)
        | Provider::Datadog(_)
        | Provider::Stackdriver(_)
        | Provider::Opencensus(_)
        | Provider::Skywalking(_)
        | Provider::Opentelemetry(_)
        | Provider::Prometheus(_)
        | Provider::EnvoyFileAccessLog(_)
        | Provider::EnvoyHttpAls(_)
        | Provider::EnvoyTcpAls(_)
        | Provider::EnvoyOtelAls(_)
        | Provider::Sds(_) => return,
    };
    cx.duration("timeout", timeout);
    let code = status.parse::<u16>().is_ok_and(|code| (100..=599).contains(&code));
    cx.refuse(!status.is_empty() && !code, "statusOnError", "must be a status code in quotes, 100 to 599");
    cx.refuse(!prefix.is_empty() && !prefix.starts_with('/'), "pathPrefix", "must begin with /");
}

fn check_default_providers(cx: &mut Checker, mesh: &MeshConfig) {
    cx.opt("defaultProviders", mesh.default_providers.as_ref(), |cx, defaults| {
        for (field, names) in [
            ("tracing", &defaults.tracing),
            ("metrics", &defaults.metrics),
            ("accessLogging", &defaults.access_logging),
        ] {
            cx.each(field, names, |cx, name| {
                // These two exist in every mesh.
                let built_in = matches!(name.as_str(), "prometheus" | "envoy" | "stackdriver");
                if !built_in && mesh.provider(name).is_none() {
                    cx.error("must be the name of one of extensionProviders");
                }
            });
        }
    });
}

fn check_label_selector(cx: &mut Checker, selector: &LabelSelector) {
    cx.selector("matchLabels", &selector.match_labels);
    cx.each("matchExpressions", &selector.match_expressions, |cx, condition| {
        cx.required("key", &condition.key);
        let needs = matches!(condition.operator, LabelSelectorOperator::In | LabelSelectorOperator::NotIn);
        cx.refuse(
            needs && condition.values.is_empty(),
            "values",
            "is required with the operators In and NotIn",
        );
        cx.refuse(
            !needs && !condition.values.is_empty(),
            "values",
            "must be empty with Exists and DoesNotExist",
        );
    });
}

fn check_proxy_config(cx: &mut Checker, config: &ProxyConfig) {
    cx.refuse(
        config.concurrency.is_some_and(|threads| threads < 0),
        "concurrency",
        "must not be negative; 0 is one thread for each core",
    );
    cx.duration("drainDuration", config.drain_duration);
    cx.duration_or_zero("terminationDrainDuration", config.termination_drain_duration);
    if let Some(port) = config.status_port {
        cx.port("statusPort", port);
    }
    cx.opt("tracing", config.tracing.as_ref(), |cx, tracing| {
        cx.percent("sampling", tracing.sampling);
        cx.opt("tlsSettings", tracing.tls_settings.as_ref(), check_client_tls);
    });
    cx.opt("proxyStatsMatcher", config.proxy_stats_matcher.as_ref(), |cx, matcher| {
        cx.each("inclusionRegexps", &matcher.inclusion_regexps, |cx, pattern| {
            if let Err(why) = grammar::regex(pattern) {
                cx.error(why);
            }
        });
    });
    cx.opt("readinessProbe", config.readiness_probe.as_ref(), check_probe);
}

//! Rules of `ServiceEntry`, `WorkloadEntry` and `WorkloadGroup`.

use std::collections::BTreeSet;

use super::gateway::check_protocol;
use super::{Checker, check_label, grammar};
use crate::config::node::Segment;
use crate::model::traffic::{ServiceEntry, ServiceEntryLocation, ServiceEntryResolution};
use crate::model::workload::{HealthCheckMethod, ReadinessProbe, WorkloadEntry, WorkloadGroup};

pub(super) fn check(cx: &mut Checker, entry: &ServiceEntry) {
    cx.refuse(entry.hosts.is_empty(), "hosts", "is required: at least one host");
    cx.refuse(entry.hosts.len() > 256, "hosts", "must have at most 256 entries");
    cx.each("hosts", &entry.hosts, |cx, host| {
        if host == "*" {
            cx.error("must not be * alone; name a domain, as in *.example.com");
        } else if !grammar::is_wildcard_host(host) {
            cx.error("must be a host name, or a host name with a leading *.");
        } else if !host.contains('.') {
            cx.warn("a short name is not completed here; clients must ask for exactly this name");
        }
    });
    cx.unique("hosts", entry.hosts.iter().map(String::as_str), "host");
    check_addresses(cx, entry);
    check_ports(cx, entry);
    cx.opt("workloadSelector", entry.workload_selector.as_ref(), |cx, selector| {
        cx.selector("labels", &selector.labels);
    });
    cx.refuse(
        entry.workload_selector.is_some() && !entry.endpoints.is_empty(),
        "workloadSelector",
        "only one of workloadSelector and endpoints may be set",
    );
    check_resolution(cx, entry);
    cx.each("endpoints", &entry.endpoints, |cx, endpoint| {
        check_workload_entry(cx, endpoint);
        check_endpoint(cx, entry, endpoint);
    });
    cx.export_to(&entry.export_to);
}

fn check_addresses(cx: &mut Checker, entry: &ServiceEntry) {
    let ranges = matches!(entry.resolution, ServiceEntryResolution::None | ServiceEntryResolution::Static);
    cx.each("addresses", &entry.addresses, |cx, address| {
        if !grammar::is_subnet(address) {
            cx.error("must be an IP address or a range such as 10.0.0.0/8");
        } else if !ranges && !grammar::is_ip(address) {
            cx.error("ranges are for the resolutions NONE and STATIC only; use single addresses");
        }
    });
}

fn check_ports(cx: &mut Checker, entry: &ServiceEntry) {
    cx.refuse(entry.ports.is_empty(), "ports", "is required: at least one port");
    cx.each("ports", &entry.ports, |cx, port| {
        cx.required("name", &port.name);
        cx.port("number", port.number);
        // Without a protocol the name of the port may say it, or the first bytes do.
        if !port.protocol.is_empty() {
            check_protocol(cx, &port.protocol);
        }
    });
    cx.unique("ports", entry.ports.iter().map(|port| port.name.as_str()), "port name");
    let mut numbers = BTreeSet::new();
    cx.at("ports", |cx| {
        for (index, port) in entry.ports.iter().enumerate() {
            if port.number != 0 && !numbers.insert(port.number) {
                let message = format!("the port {} is there twice; it must be unique", port.number);
                cx.step(Segment::Index(index), |cx| cx.error_at("number", message));
            }
        }
    });
}

fn check_resolution(cx: &mut Checker, entry: &ServiceEntry) {
    let none = entry.endpoints.is_empty();
    match entry.resolution {
        ServiceEntryResolution::None => {
            cx.refuse(!none, "endpoints", "must be empty with resolution NONE; use STATIC or DNS");
        }
        ServiceEntryResolution::Static => {
            let missing = none && entry.workload_selector.is_none();
            cx.refuse(missing, "endpoints", "is required with resolution STATIC, or use workloadSelector");
        }
        ServiceEntryResolution::Dns | ServiceEntryResolution::DnsRoundRobin => {
            if none && entry.workload_selector.is_none() {
                wildcards(
                    cx,
                    entry,
                    "cannot be resolved by DNS: without endpoints a host must be a full name",
                );
            }
            let one = entry.resolution == ServiceEntryResolution::DnsRoundRobin;
            cx.refuse(
                one && entry.endpoints.len() > 1,
                "endpoints",
                "must have one entry at most with resolution DNS_ROUND_ROBIN",
            );
        }
        ServiceEntryResolution::DynamicDns => {
            cx.refuse(!none, "endpoints", "must be empty with resolution DYNAMIC_DNS");
            cx.refuse(
                entry.location == ServiceEntryLocation::MeshInternal,
                "location",
                "must be MESH_EXTERNAL with resolution DYNAMIC_DNS",
            );
            cx.each("hosts", &entry.hosts, |cx, host| {
                if !host.starts_with('*') {
                    cx.error("must have a leading *. with resolution DYNAMIC_DNS; use DNS for single hosts");
                }
            });
        }
    }
}

fn wildcards(cx: &mut Checker, entry: &ServiceEntry, message: &str) {
    cx.each("hosts", &entry.hosts, |cx, host| {
        if host.starts_with('*') && host != "*" {
            cx.error(message);
        }
    });
}

/// What the service around an endpoint demands of it.
fn check_endpoint(cx: &mut Checker, entry: &ServiceEntry, endpoint: &WorkloadEntry) {
    let address = endpoint.address.as_str();
    let socket = address.starts_with("unix://");
    let by_name =
        matches!(entry.resolution, ServiceEntryResolution::Dns | ServiceEntryResolution::DnsRoundRobin);
    if by_name && socket {
        cx.error_at("address", "must not be a Unix socket with resolution DNS; use STATIC");
    } else if entry.resolution == ServiceEntryResolution::Static
        && !address.is_empty()
        && !socket
        && !grammar::is_ip(address)
    {
        cx.error_at(
            "address",
            "must be an IP address or unix:///path with resolution STATIC; use DNS for names",
        );
    }
    cx.refuse(
        socket && entry.ports.len() > 1,
        "address",
        "a Unix socket can serve one port only, and this service has several",
    );
    cx.entries("ports", &endpoint.ports, |cx, name, _| {
        if !entry.ports.iter().any(|port| port.name == name) {
            let known: Vec<&str> = entry.ports.iter().map(|port| port.name.as_str()).collect();
            cx.error(format!("must be the name of a port of this service: {}", known.join(", ")));
        }
    });
}

pub(super) fn check_workload_entry(cx: &mut Checker, entry: &WorkloadEntry) {
    if entry.address.is_empty() {
        cx.refuse(entry.network.is_empty(), "address", "is required, unless network is set");
    } else {
        cx.at("address", |cx| check_address(cx, entry));
    }
    check_workload(cx, entry);
}

fn check_address(cx: &mut Checker, entry: &WorkloadEntry) {
    if let Some(path) = entry.address.strip_prefix("unix://") {
        if !path.starts_with(['/', '@']) {
            cx.error("must have an absolute path after unix://");
        } else if path.ends_with('/') {
            cx.error("must be the path of a socket, not of a folder");
        } else if !entry.ports.is_empty() {
            cx.error("a Unix socket has no ports; remove ports");
        }
    } else if entry.address.contains('*') {
        cx.error("must be one address, without a wildcard");
    } else if !grammar::is_ip(&entry.address) && !grammar::is_host(&entry.address) {
        cx.error("must be an IP address, a DNS name or unix:///path");
    }
}

/// What holds for entries and for the template of a group.
fn check_workload(cx: &mut Checker, entry: &WorkloadEntry) {
    cx.entries("ports", &entry.ports, |cx, _, port| {
        if *port == 0 {
            cx.error("must be a port number, 1 to 65535");
        }
    });
    cx.entries("labels", &entry.labels, |cx, key, value| check_label(cx, key, value));
    if !entry.locality.is_empty() && !grammar::is_locality(&entry.locality) {
        cx.error_at("locality", "must be region, region/zone or region/zone/subzone");
    }
    if !entry.service_account.is_empty() && !grammar::is_subdomain(&entry.service_account) {
        cx.error_at("serviceAccount", "must be the name of a service account");
    }
}

pub(super) fn check_workload_group(cx: &mut Checker, group: &WorkloadGroup) {
    cx.opt("metadata", group.metadata.as_ref(), |cx, metadata| {
        cx.entries("labels", &metadata.labels, |cx, key, value| check_label(cx, key, value));
    });
    match &group.template {
        None => cx.error_at("template", "is required"),
        Some(template) => cx.at("template", |cx| {
            cx.refuse(!template.address.is_empty(), "address", "must be empty: each workload brings its own");
            check_workload(cx, template);
        }),
    }
    cx.opt("probe", group.probe.as_ref(), check_probe);
}

pub(super) fn check_probe(cx: &mut Checker, probe: &ReadinessProbe) {
    for (field, number) in [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        cx.refuse(number < 0, field, "must not be negative");
    }
    match &probe.health_check_method {
        None => cx.error("must have one of httpGet, tcpSocket, exec and grpc"),
        Some(HealthCheckMethod::HttpGet(get)) => cx.at("httpGet", |cx| {
            cx.port("port", get.port);
            cx.refuse(!get.path.is_empty() && !get.path.starts_with('/'), "path", "must begin with /");
            cx.refuse(
                !matches!(get.scheme.as_str(), "" | "HTTP" | "HTTPS" | "http" | "https"),
                "scheme",
                "must be HTTP or HTTPS",
            );
            cx.each("httpHeaders", &get.http_headers, |cx, header| {
                cx.refuse(!grammar::is_header_name(&header.name), "name", "must be the name of a header");
            });
        }),
        Some(HealthCheckMethod::TcpSocket(socket)) => cx.at("tcpSocket", |cx| cx.port("port", socket.port)),
        Some(HealthCheckMethod::Grpc(grpc)) => cx.at("grpc", |cx| cx.port("port", grpc.port)),
        Some(HealthCheckMethod::Exec(exec)) => cx.at("exec", |cx| {
            cx.refuse(exec.command.is_empty(), "command", "is required: the program and its arguments");
        }),
    }
}

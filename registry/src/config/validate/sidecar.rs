//! Rules of `Sidecar`.

use std::collections::BTreeSet;

use super::destination_rule::check_connection_pool;
use super::gateway::{check_port, check_tls, is_endpoint};
use super::virtual_service::check_destination;
use super::{Checker, grammar};
use crate::config::node::Segment;
use crate::model::traffic::{
    CaptureMode, IstioEgressListener, IstioIngressListener, OutboundTrafficPolicyMode, ServerTlsMode, Sidecar,
};

pub(super) fn check(cx: &mut Checker, sidecar: &Sidecar) {
    if *sidecar == Sidecar::default() {
        cx.error(
            "must have at least one of egress, ingress, outboundTrafficPolicy and inboundConnectionPool",
        );
    }
    cx.opt("workloadSelector", sidecar.workload_selector.as_ref(), |cx, selector| {
        cx.selector("labels", &selector.labels);
    });
    if !sidecar.ingress.is_empty() && sidecar.workload_selector.is_none() {
        cx.at("ingress", |cx| {
            cx.warn(
                "replaces the listeners of every workload of the namespace; a workloadSelector is missing",
            )
        });
    }
    cx.each("ingress", &sidecar.ingress, check_ingress);
    unique_ports(cx, sidecar);
    cx.each("egress", &sidecar.egress, check_egress);
    let rest: Vec<usize> = sidecar
        .egress
        .iter()
        .enumerate()
        .filter(|(_, listener)| listener.port.is_none())
        .map(|(index, _)| index)
        .collect();
    if let [first, .., last] = rest.as_slice() {
        let message = format!("only one listener may be without port, and egress[{first}] is");
        cx.at("egress", |cx| cx.step(Segment::Index(*last), |cx| cx.error(message)));
    } else if let [only] = rest.as_slice()
        && only + 1 != sidecar.egress.len()
    {
        cx.at("egress", |cx| {
            cx.step(Segment::Index(*only), |cx| cx.error("the listener without port must be the last one"));
        });
    }
    cx.opt("inboundConnectionPool", sidecar.inbound_connection_pool.as_ref(), check_connection_pool);
    cx.opt("outboundTrafficPolicy", sidecar.outbound_traffic_policy.as_ref(), |cx, policy| {
        cx.opt("egressProxy", policy.egress_proxy.as_ref(), |cx, proxy| {
            check_destination(cx, proxy);
            cx.refuse(proxy.port.is_none(), "port", "is required");
        });
        cx.refuse(
            policy.egress_proxy.is_some() && policy.mode != OutboundTrafficPolicyMode::AllowAny,
            "egressProxy",
            "needs mode ALLOW_ANY",
        );
    });
}

fn unique_ports(cx: &mut Checker, sidecar: &Sidecar) {
    let ingress = sidecar.ingress.iter().map(|l| (l.bind.as_str(), l.port.as_ref().map_or(0, |p| p.number)));
    let egress = sidecar.egress.iter().map(|l| (l.bind.as_str(), l.port.as_ref().map_or(0, |p| p.number)));
    let lists: [(&str, Vec<(&str, u16)>); 2] = [("ingress", ingress.collect()), ("egress", egress.collect())];
    for (field, listeners) in lists {
        let mut seen = BTreeSet::new();
        cx.at(field, |cx| {
            for (index, (bind, port)) in listeners.into_iter().enumerate() {
                if port != 0 && !seen.insert((bind, port)) {
                    let message = format!("the port {port} is there twice; it must be unique");
                    cx.step(Segment::Index(index), |cx| cx.error_at("port", message));
                }
            }
        });
    }
}

fn check_ingress(cx: &mut Checker, listener: &IstioIngressListener) {
    match &listener.port {
        None => cx.error_at("port", "is required"),
        Some(port) => cx.at("port", |cx| check_port(cx, port)),
    }
    cx.refuse(!listener.bind.is_empty() && !grammar::is_ip(&listener.bind), "bind", "must be an IP address");
    cx.refuse(
        !listener.default_endpoint.is_empty() && !is_endpoint(&listener.default_endpoint),
        "defaultEndpoint",
        "must be 127.0.0.1:PORT, 0.0.0.0:PORT, [::1]:PORT, [::]:PORT or unix:///path",
    );
    cx.opt("tls", listener.tls.as_ref(), |cx, tls| {
        let fits =
            matches!(tls.mode, ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual);
        cx.refuse(!fits, "mode", "must be SIMPLE, MUTUAL or OPTIONAL_MUTUAL");
        cx.refuse(tls.https_redirect, "httpsRedirect", "is for gateways only");
        if fits {
            check_tls(cx, tls);
        }
    });
    cx.opt("connectionPool", listener.connection_pool.as_ref(), check_connection_pool);
}

fn check_egress(cx: &mut Checker, listener: &IstioEgressListener) {
    cx.refuse(listener.hosts.is_empty(), "hosts", "is required: at least one namespace/host");
    cx.each("hosts", &listener.hosts, |cx, host| check_host(cx, host));
    let socket = listener.bind.strip_prefix("unix://");
    cx.opt("port", listener.port.as_ref(), |cx, port| {
        if socket.is_none() || port.number != 0 {
            check_port(cx, port);
        }
    });
    match socket {
        Some(path) => {
            cx.refuse(!path.starts_with(['/', '@']), "bind", "must have an absolute path after unix://");
            cx.refuse(
                listener.capture_mode == CaptureMode::Iptables,
                "captureMode",
                "IPTABLES cannot capture a Unix socket; use NONE",
            );
        }
        None => {
            cx.refuse(
                !listener.bind.is_empty() && !grammar::is_ip(&listener.bind),
                "bind",
                "must be an IP address or unix:///path",
            );
        }
    }
    cx.refuse(!listener.bind.is_empty() && listener.port.is_none(), "port", "is required when bind is set");
}

fn check_host(cx: &mut Checker, host: &str) {
    let Some((namespace, name)) = host.split_once('/') else {
        cx.error("must be namespace/host; the namespace may be *, . or ~");
        return;
    };
    let bare = namespace.strip_prefix('~').filter(|rest| !rest.is_empty()).unwrap_or(namespace);
    if !matches!(bare, "*" | "." | "~") && !grammar::is_label(bare) {
        cx.error("the part before the slash must be *, ., ~ or the name of a namespace");
    } else if !grammar::is_wildcard_host(name) {
        cx.error("the part after the slash must be a host name, *, or a host name with a leading *.");
    }
}

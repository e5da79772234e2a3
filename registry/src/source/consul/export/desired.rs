//! What should be in a catalog: the endpoints of the mesh's own services.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::{HEALTHY, Settings};
use crate::config::validate::grammar;
use crate::model::service::{Endpoint, Health, Location, Service, ServicePort, SourceId};
use crate::snapshot::Snapshot;
use crate::source::consul::answer::Registered;
use crate::source::consul::convert::{NAMESPACE, SERVICE_ACCOUNT};

/// Label of a workload that clients of Consul choose by too.
const VERSION: &str = "version";

/// What should be in the catalog, by id.
pub type Desired = BTreeMap<String, Registered>;

/// A service with all its endpoints.
type Whole = (Arc<Service>, Arc<[Endpoint]>);

/// What the entries of a snapshot were made of: most snapshots that follow make the same.
#[derive(Debug, Default)]
pub struct Basis {
    /// `None` before the first look.
    services: Option<Vec<Whole>>,
}

impl Basis {
    /// Whether a snapshot may make other entries than the one that was looked at before. It is looked at from now on.
    pub fn differs(&mut self, snapshot: &Snapshot, settings: &Settings) -> bool {
        let with_endpoints =
            |service: &Arc<Service>| (Arc::clone(service), Arc::clone(snapshot.endpoints_of(service)));
        let services: Vec<_> = snapshot.services().map(with_endpoints).collect();
        let before = self.services.replace(services);
        let (Some(before), Some(services)) = (before, &self.services) else { return true };
        before.len() != services.len()
            || before.iter().zip(services).any(|((service, endpoints), (now, others))| {
                let same = Arc::ptr_eq(service, now) || service == now;
                let of = |endpoints| written(now, endpoints, settings);
                !same || !Arc::ptr_eq(endpoints, others) && !of(endpoints).eq(of(others))
            })
    }
}

/// The endpoints of all services that every namespace may see, but not what came from Consul. The second value are
/// services that are written under another name than their own, or not at all, with the reason.
#[must_use]
pub fn desired(snapshot: &Snapshot, settings: &Settings) -> (Desired, Vec<String>) {
    let (mut all, mut problems) = (Desired::new(), Vec::new());
    // Who has a name: Consul's own services before all others.
    let in_consul =
        snapshot.services().filter_map(|service| Some((consul_name(service, settings)?, service)));
    let mut names: BTreeMap<String, String> =
        in_consul.map(|(name, service)| (name.to_owned(), service.hostname.clone())).collect();
    for service in snapshot.services() {
        let Some(port) = service.ports.first() else { continue };
        let mut endpoints = written(service, snapshot.endpoints_of(service), settings).peekable();
        if endpoints.peek().is_none() {
            continue;
        }
        let name = match consul_name(service, settings) {
            // Its clients mean the service of Consul, of which it is a part.
            Some(name) => name.to_owned(),
            None => match named(service, settings, &mut names, &mut problems) {
                Some(name) => name,
                None => continue,
            },
        };
        for endpoint in endpoints {
            let entry = entry(&name, service, port, endpoint, settings);
            all.insert(entry.id.clone(), entry);
        }
    }
    (all, problems)
}

/// Those of a service's endpoints that are written.
fn written<'a>(
    service: &'a Service,
    endpoints: &'a [Endpoint],
    settings: &'a Settings,
) -> impl Iterator<Item = &'a Endpoint> {
    let public = is_public(service);
    endpoints.iter().filter(move |endpoint| public && is_ours(endpoint, service, settings))
}

/// Inside the mesh, and exported to every namespace: a catalog has no namespaces that would hide it.
fn is_public(service: &Service) -> bool {
    service.location == Location::Internal && service.export_to.iter().any(|to| to == "*")
}

/// It has an address, and Consul has not told it to us.
fn is_ours(endpoint: &Endpoint, service: &Service, settings: &Settings) -> bool {
    let told = match &service.source {
        SourceId::Consul(datacenter) => datacenter.split('/').next() == Some(endpoint.cluster.as_str()),
        SourceId::Config | SourceId::Workload | SourceId::Kubernetes(_) | SourceId::File(_) => false,
    };
    !told && endpoint.cluster != settings.cluster && endpoint.address.parse::<IpAddr>().is_ok()
}

/// `web` of `web.service.consul` and `web.service.dc1.consul`, in this datacenter.
fn consul_name<'a>(service: &'a Service, settings: &Settings) -> Option<&'a str> {
    let rest = service.hostname.strip_suffix(settings.domain.as_str())?.strip_suffix('.')?;
    let here = format!(".service.{}", settings.datacenter.to_ascii_lowercase());
    let name = rest.strip_suffix(here.as_str()).or_else(|| rest.strip_suffix(".service"))?;
    grammar::is_label(name).then_some(name)
}

/// The name of a service of the mesh, or with its namespace when somebody else has that.
fn named(
    service: &Service,
    settings: &Settings,
    names: &mut BTreeMap<String, String>,
    problems: &mut Vec<String>,
) -> Option<String> {
    let host = format!("{}/{}", service.namespace, service.hostname);
    let plain = format!("{}{}", settings.prefix, service.name.replace(['.', '_'], "-")).to_ascii_lowercase();
    let apart = format!("{plain}-{}", service.namespace);
    let taken = names.get(&plain).filter(|other| **other != host);
    if let Some(other) = taken {
        problems.push(format!("{host}: the name {plain} is that of {other}, so it is written as {apart}"));
    }
    let name = if taken.is_some() { apart } else { plain };
    if !grammar::is_label(&name) {
        problems.push(format!("{host}: is not written, for {name} is no DNS label"));
        return None;
    }
    match names.insert(name.clone(), host.clone()).filter(|other| *other != host) {
        Some(other) => {
            problems.push(format!("{host}: is not written, for {name} is {other}"));
            names.insert(name, other);
            None
        }
        None => Some(name),
    }
}

fn entry(
    name: &str,
    service: &Service,
    port: &ServicePort,
    endpoint: &Endpoint,
    settings: &Settings,
) -> Registered {
    let number = |port: &ServicePort| {
        endpoint.ports.get(&port.name).copied().or(port.target_port).unwrap_or(port.number)
    };
    let healthy = endpoint.health == Health::Healthy;
    let mut meta = BTreeMap::from([(HEALTHY.to_owned(), healthy.to_string())]);
    let version = endpoint.labels.get(VERSION).cloned().unwrap_or_default();
    let told =
        [(NAMESPACE, &endpoint.namespace), (SERVICE_ACCOUNT, &endpoint.service_account), (VERSION, &version)];
    for (key, value) in told.into_iter().filter(|(_, value)| !value.is_empty()) {
        meta.insert(key.to_owned(), value.clone());
    }
    // An entry has one port; clients that know more of the service find the others here.
    for other in service.ports.iter().skip(1) {
        meta.insert(format!("port-{}", other.name), number(other).to_string());
    }
    Registered {
        id: format!("{name}-{}-{}", endpoint.address.replace(':', "-"), number(port)),
        service: name.to_owned(),
        address: endpoint.address.clone(),
        port: number(port),
        tags: settings.tags.clone(),
        meta,
        weight: endpoint.weight.max(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::state::{Batch, Command, Revision, State};

    /// What should be in the catalog, by id, and what is told of it.
    fn check(yaml: &str, consul: &[(&str, &str)], settings: &Settings) -> (Desired, Vec<String>) {
        desired(&mesh(yaml, consul), settings)
    }

    /// A mesh of these objects and instances of a catalog.
    fn mesh(yaml: &str, consul: &[(&str, &str)]) -> Snapshot {
        let (objects, _) = config::parse_in("default", "t", yaml).unwrap();
        let mut state = State::default();
        state.apply(Revision(1), &Batch::put_objects(1_000, "t", objects));
        let source = SourceId::Consul("consul/dc1".to_owned());
        for (n, (name, address)) in consul.iter().enumerate() {
            let mapping = crate::source::consul::convert::Mapping::new("consul", "dc1");
            let body = format!(
                r#"[{{"Node":{{"Node":"n"}},"Service":{{"ID":"i{n}","Service":"{name}","Address":"{address}","Port":80}}}}]"#
            );
            let instances = crate::source::consul::answer::instances(body.as_bytes()).unwrap();
            let converted = crate::source::consul::convert::convert(name, &instances, &mapping, None);
            let commands = mapping.hosts(name).unwrap().into_iter().flat_map(|hostname| {
                let service = Arc::new(Service { hostname: hostname.clone(), ..converted.service.clone() });
                let endpoints = converted.endpoints.iter().cloned().collect();
                [
                    Command::PutService { service },
                    Command::ReplaceEndpoints { host: hostname, source: source.clone(), endpoints },
                ]
            });
            let batch = Batch { time_ms: 1_000, author: "t".to_owned(), commands: commands.collect() };
            state.apply(Revision(2 + n as u64), &batch);
        }
        Snapshot::build(&state)
    }

    fn entry(name: &str, host: &str, namespace: &str, address: &str, more: &str) -> String {
        format!(
            "---\n{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: {name}, namespace: {namespace}}}, \
             spec: {{hosts: [{host}], ports: [{{number: 80, name: http, protocol: HTTP}}, {{number: 9000, name: admin}}], \
             location: MESH_INTERNAL, resolution: STATIC, endpoints: [{{address: {address}, ports: {{http: 8080}}, \
             labels: {{version: v2}}, serviceAccount: pay, weight: 3}}]{more}}}}}\n"
        )
    }

    fn ids(desired: &Desired) -> Vec<&str> {
        desired.keys().map(String::as_str).collect()
    }

    #[test]
    fn an_endpoint_of_the_mesh_is_an_entry_with_its_port_metadata_and_weight() {
        let settings = Settings {
            prefix: "m-".to_owned(),
            tags: ["mesh".to_owned()].into(),
            ..Settings::new("m1", "dc1", 1)
        };
        let yaml = entry("pay", "pay.shop.svc.cluster.local", "shop", "10.1.1.1", "");
        let (desired, problems) = check(&yaml, &[], &settings);
        assert_eq!((ids(&desired), problems.len()), (vec!["m-pay-10.1.1.1-8080"], 0));
        let written = desired["m-pay-10.1.1.1-8080"].clone();
        assert_eq!((written.service.as_str(), written.address.as_str()), ("m-pay", "10.1.1.1"));
        assert_eq!((written.port, written.weight, written.tags.len()), (8080, 3, 1));
        let meta: Vec<String> = written.meta.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let expect = [
            "mesh-healthy=true",
            "mesh-namespace=shop",
            "mesh-service-account=pay",
            "port-admin=9000",
            "version=v2",
        ];
        assert_eq!(meta, expect);
    }

    #[test]
    fn only_what_everybody_may_see_and_has_an_address_is_written() {
        let settings = Settings::new("m1", "dc1", 1);
        let yaml = [
            entry("own", "own.example.com", "a", "10.1.1.1", ", exportTo: ['.']"),
            entry("out", "out.example.com", "a", "10.1.1.2", "").replace("MESH_INTERNAL", "MESH_EXTERNAL"),
            entry("dns", "dns.example.com", "a", "db.example.com", "").replace("STATIC", "DNS"),
            entry("all", "all.example.com", "a", "2001:db8::1", ""),
        ];
        let (desired, problems) = check(&yaml.concat(), &[], &settings);
        assert_eq!((ids(&desired), problems), (vec!["all-example-com-2001-db8--1-8080"], Vec::new()));
    }

    #[test]
    fn what_came_from_consul_is_not_written_back_and_what_the_mesh_adds_to_it_is() {
        let settings = Settings::new("m1", "dc1", 1);
        let (desired, _) = check("", &[("web", "10.2.2.2")], &settings);
        assert_eq!(ids(&desired), [""; 0]);
        // A machine of the mesh serves a part of Consul's own service, under both of its hosts.
        let yaml = entry("web", "web.service.consul", "consul", "10.1.1.1", "")
            + &entry("web-dc1", "web.service.dc1.consul", "consul", "10.1.1.1", "");
        let (desired, problems) = check(&yaml, &[("web", "10.2.2.2")], &settings);
        assert_eq!((ids(&desired), problems), (vec!["web-10.1.1.1-8080"], Vec::new()));
    }

    #[test]
    fn names_that_somebody_has_are_told_and_get_their_namespace() {
        let settings = Settings::new("m1", "dc1", 1);
        let yaml = entry("a", "pay.a.svc.cluster.local", "a", "10.1.1.1", "")
            + &entry("b", "pay.b.svc.cluster.local", "b", "10.1.1.2", "")
            + &entry("c", "web.c.svc.cluster.local", "c", "10.1.1.3", "");
        let (desired, problems) = check(&yaml, &[("web", "10.2.2.2")], &settings);
        let services: Vec<&str> = desired.values().map(|entry| entry.service.as_str()).collect();
        assert_eq!((services, problems.len()), (vec!["pay", "pay-b", "web-c"], 2), "{problems:?}");
    }

    #[test]
    fn a_snapshot_is_looked_at_only_when_something_that_is_written_differs() {
        let settings = Settings::new("m1", "dc1", 1);
        let pay = |address: &str| entry("pay", "pay.shop.svc.cluster.local", "shop", address, "");
        let mut basis = Basis::default();
        let mut check = |yaml: &str, consul: &[(&str, &str)], expect: bool, what: &str| {
            assert_eq!(basis.differs(&mesh(yaml, consul), &settings), expect, "{what}");
        };
        check("", &[], true, "the first one, though it is empty");
        check("", &[], false, "the same");
        check(&pay("10.1.1.1"), &[("web", "10.2.2.2")], true, "new services");
        check(&pay("10.1.1.1"), &[("web", "10.2.2.3")], false, "another instance of Consul's own");
        check(&pay("10.1.1.2"), &[("web", "10.2.2.3")], true, "another endpoint of ours");
        check(
            &pay("10.1.1.2"),
            &[("web", "10.2.2.3"), ("pay", "10.2.2.4")],
            true,
            "a name that Consul has now",
        );
    }
}

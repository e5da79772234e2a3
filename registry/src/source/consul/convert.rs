//! From instances of a Consul service to a service of the mesh with its endpoints.
//!
//! A service `web` of datacenter `dc1` is `web.service.dc1.consul`, and in the datacenter that is nearest also
//! `web.service.consul`. Nothing of the catalog reaches a proxy before it has the form that the same field of an
//! object has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::answer::{Condition, Instance, Kind};
use crate::config::validate::grammar;
use crate::model::service::{
    Endpoint, Health, Hostname, Locality, Location, Protocol, Resolution, Service, ServicePort, SourceId,
    TlsMode,
};

/// Metadata of what the mesh itself wrote into a catalog: its owner.
pub const OWNER: &str = "mesh-owner";
/// Metadata: the port by which clients of the mesh call the service, when it differs from that of its instances.
pub const SERVICE_PORT: &str = "mesh-port";
/// Metadata: the service account of an instance that has a proxy of the mesh in front of it.
pub const SERVICE_ACCOUNT: &str = "mesh-service-account";
/// Metadata: the namespace of that service account, when it is not that of the source.
pub const NAMESPACE: &str = "mesh-namespace";
/// Metadata: what is spoken.
const PROTOCOL: &str = "protocol";
/// Metadata by which other syncs mark what they copied.
const FOREIGN: &str = "external-source";
/// Metadata of nodes that name a zone.
const ZONES: [&str; 3] = ["failure-domain", "zone", "topology.kubernetes.io/zone"];
/// Label of a tag.
const TAG: &str = "consul.tag/";
/// Labels of one endpoint.
const MOST_LABELS: usize = 64;
/// Largest weight of an endpoint.
const MOST_WEIGHT: u32 = 65_535;

/// Where a catalog goes in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Cluster id of the Consul cluster.
    pub cluster: String,
    /// The datacenter; also the region of its instances unless they say another.
    pub datacenter: String,
    /// DNS domain of the Consul cluster.
    pub domain: String,
    /// Namespace of its services.
    pub namespace: String,
    /// Its services also have hosts without the datacenter.
    pub nearest: bool,
    /// Network of its instances; empty is the default one.
    pub network: String,
    /// What is a copy of something that the mesh knows from elsewhere: values of `external-source`.
    pub skip_external: BTreeSet<String>,
}

impl Mapping {
    /// A datacenter of a cluster, with the hosts and the namespace that are usual.
    #[must_use]
    pub fn new(cluster: &str, datacenter: &str) -> Self {
        Self {
            cluster: cluster.to_owned(),
            datacenter: datacenter.to_owned(),
            domain: "consul".to_owned(),
            namespace: "consul".to_owned(),
            nearest: true,
            network: String::new(),
            skip_external: BTreeSet::new(),
        }
    }

    /// Who says it.
    #[must_use]
    pub fn source(&self) -> SourceId {
        SourceId::Consul(format!("{}/{}", self.cluster, self.datacenter))
    }

    /// The hosts of a service. Consul's names are case sensitive and may have characters that no host has; its DNS is
    /// not and has not.
    ///
    /// # Errors
    ///
    /// When no host can be made of the name.
    pub fn hosts(&self, service: &str) -> Result<Vec<Hostname>, &'static str> {
        let name = service.to_ascii_lowercase().replace(['_', '.'], "-");
        if !grammar::is_label(&name) {
            return Err("the name of the service makes no DNS label");
        }
        let (domain, datacenter) = (&self.domain, self.datacenter.to_ascii_lowercase());
        let mut hosts = vec![format!("{name}.service.{datacenter}.{domain}")];
        if self.nearest {
            hosts.push(format!("{name}.service.{domain}"));
        }
        Ok(hosts)
    }
}

/// A service as the mesh sees it. The hostname is empty: it is the same under each of its hosts.
#[derive(Debug, Clone, PartialEq)]
pub struct Converted {
    /// The service.
    pub service: Service,
    /// Its endpoints.
    pub endpoints: BTreeSet<Endpoint>,
    /// Instances that serve nobody, with the reason; the first few of them.
    pub problems: Vec<String>,
    /// Instances that are somebody else's: what the mesh wrote itself, copies, sidecars.
    pub skipped: usize,
}

/// Reasons that are told for one service.
const MOST_PROBLEMS: usize = 5;

/// What the instances of service `name` make. `previous` is what they made before: its ports stay while an instance
/// has them, so that the address by which clients call does not move.
#[must_use]
pub fn convert(
    name: &str,
    instances: &[Instance],
    mapping: &Mapping,
    previous: Option<&Service>,
) -> Converted {
    let ours: Vec<&Instance> = instances.iter().filter(|instance| is_service(instance, mapping)).collect();
    let ports = ports(&ours, previous);
    let mut converted = Converted {
        service: service(name, ports, mapping),
        endpoints: BTreeSet::new(),
        problems: Vec::new(),
        skipped: instances.len() - ours.len(),
    };
    for instance in ours {
        match endpoint(instance, &converted.service, mapping) {
            Ok(endpoint) => {
                converted.endpoints.insert(endpoint);
            }
            Err(reason) if converted.problems.len() < MOST_PROBLEMS => {
                let line = format!("{name}: instance {} of node {}: {reason}", instance.id, instance.node);
                converted.problems.push(line.chars().take(300).collect());
            }
            Err(_) => {}
        }
    }
    converted
}

/// What a client of the mesh may be sent to, and what did not come out of the mesh.
fn is_service(instance: &Instance, mapping: &Mapping) -> bool {
    let copied = instance.meta.get(FOREIGN).is_some_and(|who| mapping.skip_external.contains(who));
    instance.kind == Kind::Typical && !instance.meta.contains_key(OWNER) && !copied
}

fn service(name: &str, ports: Vec<ServicePort>, mapping: &Mapping) -> Service {
    Service {
        hostname: String::new(),
        name: name.to_ascii_lowercase(),
        namespace: mapping.namespace.clone(),
        ports,
        addresses: Vec::new(),
        vip_index: 0,
        resolution: Resolution::Static,
        location: Location::Internal,
        export_to: Vec::new(),
        subject_alt_names: Vec::new(),
        labels: BTreeMap::new(),
        created: 0,
        source: mapping.source(),
    }
}

/// The ports of the service: for each name the number that most instances have, or the one it had before.
fn ports(instances: &[&Instance], previous: Option<&Service>) -> Vec<ServicePort> {
    let mut votes: BTreeMap<String, BTreeMap<u16, usize>> = BTreeMap::new();
    for instance in instances {
        for (name, number) in named_ports(instance) {
            let number = service_port(instance).unwrap_or(number);
            *votes.entry(name).or_default().entry(number).or_default() += 1;
        }
    }
    if votes.is_empty() {
        return previous.map(|service| service.ports.clone()).unwrap_or_default();
    }
    let mut ports: Vec<ServicePort> = Vec::new();
    for (name, numbers) in votes {
        let before = previous.into_iter().flat_map(|service| &service.ports).find(|port| port.name == name);
        let kept = before.map(|port| port.number).filter(|number| numbers.contains_key(number));
        // The lowest of those that most have, so that every look gives the same.
        let most = numbers.iter().max_by_key(|(number, count)| (**count, std::cmp::Reverse(**number)));
        let Some(number) = kept.or(most.map(|(number, _)| *number)) else { continue };
        if ports.iter().any(|port| port.number == number) {
            continue;
        }
        let declared = declared_protocol(instances);
        let protocol = Protocol::parse(&name, declared.as_deref(), number);
        ports.push(ServicePort { name, number, target_port: None, protocol });
    }
    ports
}

/// Names and numbers of the ports of an instance that are ports.
fn named_ports(instance: &Instance) -> Vec<(String, u16)> {
    let single = instance.ports.len() == 1;
    let named = instance.ports.iter().filter_map(|port| {
        let number = u16::try_from(port.number).ok().filter(|number| *number != 0)?;
        let name = port.name.to_ascii_lowercase();
        // Without names the port is called after what it speaks, as port names of the mesh are.
        let name = match (name.is_empty(), single) {
            (true, _) | (_, true) if !grammar::is_label(&name) => protocol_name(instance),
            _ => name,
        };
        grammar::is_label(&name).then_some((name, number))
    });
    named.collect()
}

fn protocol_name(instance: &Instance) -> String {
    let declared = instance.meta.get(PROTOCOL).map(|protocol| protocol.to_ascii_lowercase());
    let known = declared.filter(|protocol| Protocol::from_name(protocol).is_some());
    known.unwrap_or_else(|| "default".to_owned()).replace('_', "-")
}

/// What the first instance that says something says.
fn declared_protocol(instances: &[&Instance]) -> Option<String> {
    instances.iter().find_map(|instance| instance.meta.get(PROTOCOL).cloned())
}

fn service_port(instance: &Instance) -> Option<u16> {
    let single = instance.ports.len() == 1;
    instance.meta.get(SERVICE_PORT).filter(|_| single)?.parse().ok().filter(|port| *port != 0)
}

fn endpoint(instance: &Instance, service: &Service, mapping: &Mapping) -> Result<Endpoint, &'static str> {
    let address = address(&instance.address)?;
    let own = named_ports(instance);
    if own.is_empty() {
        return Err("has no port");
    }
    let number = |name: &str| service.ports.iter().find(|port| port.name == name).map(|port| port.number);
    let single =
        |own: &[(String, u16)]| (own.len() == 1 && service.ports.len() == 1).then(|| service.ports.first());
    let mut ports = BTreeMap::new();
    for (name, port) in &own {
        match number(name) {
            Some(number) if number != *port => drop(ports.insert(name.clone(), *port)),
            Some(_) => {}
            // One port each: whatever either calls it, it is meant.
            None => {
                if let Some(known) = single(&own).flatten().filter(|known| known.number != *port) {
                    ports.insert(known.name.clone(), *port);
                }
            }
        }
    }
    let (weight, health) = served(instance);
    let text = |key: &str| instance.meta.get(key).cloned().unwrap_or_default();
    let service_account =
        Some(text(SERVICE_ACCOUNT)).filter(|name| grammar::is_subdomain(name)).unwrap_or_default();
    let namespace = Some(text(NAMESPACE)).filter(|name| grammar::is_label(name));
    Ok(Endpoint {
        address,
        ports,
        weight,
        locality: locality(instance, mapping),
        network: mapping.network.clone(),
        labels: labels(instance),
        workload: format!("{}/{}", instance.node, instance.id).chars().take(253).collect(),
        namespace: namespace.unwrap_or_else(|| mapping.namespace.clone()),
        cluster: mapping.cluster.clone(),
        tls_mode: if service_account.is_empty() { TlsMode::Disabled } else { TlsMode::Istio },
        service_account,
        health,
    })
}

/// An address that can be called: of one machine, as an IP address.
fn address(told: &str) -> Result<String, &'static str> {
    let bare = told.trim_start_matches('[').trim_end_matches(']');
    match bare.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() => Err("its address stands for every address"),
        Ok(ip) if ip.is_multicast() => Err("its address is one of many machines"),
        Ok(ip) => Ok(ip.to_string()),
        Err(_) if told.is_empty() => Err("has no address"),
        Err(_) if grammar::is_host(told) => Err("its address is a name, not an IP address"),
        Err(_) => Err("its address is none"),
    }
}

/// Weight and health.
fn served(instance: &Instance) -> (u32, Health) {
    let weighted = |weight: u32| match weight {
        0 => (1, Health::Unhealthy),
        weight => (weight.min(MOST_WEIGHT), Health::Healthy),
    };
    match instance.condition {
        Condition::Passing => weighted(instance.passing_weight),
        Condition::Warning => weighted(instance.warning_weight),
        Condition::Critical => (instance.passing_weight.clamp(1, MOST_WEIGHT), Health::Unhealthy),
        Condition::Maintenance => (instance.passing_weight.clamp(1, MOST_WEIGHT), Health::Draining),
    }
}

fn locality(instance: &Instance, mapping: &Mapping) -> Locality {
    let part = |text: &str| -> String {
        let good = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        text.chars().filter(good).take(63).collect()
    };
    let declared = instance.locality.clone().unwrap_or_default();
    let region = if declared.0.is_empty() { &mapping.datacenter } else { &declared.0 };
    let zoned = || ZONES.iter().find_map(|key| instance.node_meta.get(*key)).cloned().unwrap_or_default();
    let zone = if declared.1.is_empty() { zoned() } else { declared.1 };
    Locality { region: part(region), zone: part(&zone), subzone: String::new() }
}

/// Metadata and tags that have the form of labels; metadata outranks tags, the instance outranks its node.
fn labels(instance: &Instance) -> BTreeMap<String, String> {
    let valid = |key: &str, value: &str| {
        grammar::label_key(key).is_ok() && grammar::label_value(value).is_ok() && !key.contains("istio.io/")
    };
    let mut labels: BTreeMap<String, String> = BTreeMap::new();
    let mut add = |key: &str, value: &str| {
        if valid(key, value) && labels.len() < MOST_LABELS && !labels.contains_key(key) {
            labels.insert(key.to_owned(), value.to_owned());
        }
    };
    for (key, value) in instance.meta.iter().filter(|(key, _)| !key.starts_with("mesh-")) {
        add(key, value);
    }
    for tag in &instance.tags {
        match tag.split_once(['=', ':', '|']) {
            Some((key, value)) => add(key, value),
            None => add(&format!("{TAG}{tag}"), "true"),
        }
    }
    for (key, value) in &instance.node_meta {
        add(key, value);
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::super::answer::Port;
    use super::*;

    fn instance(id: &str, address: &str, port: u32) -> Instance {
        Instance {
            service: "web".into(),
            node: "n1".into(),
            id: id.into(),
            address: address.into(),
            ports: vec![Port { name: String::new(), number: port, default: true }],
            tags: BTreeSet::new(),
            meta: BTreeMap::new(),
            node_meta: BTreeMap::new(),
            locality: None,
            passing_weight: 1,
            warning_weight: 1,
            condition: Condition::Passing,
            kind: Kind::Typical,
        }
    }

    fn made(instances: &[Instance]) -> Converted {
        convert("web", instances, &Mapping::new("c", "dc1"), None)
    }

    fn meta(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
        entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_service_has_a_host_in_its_datacenter_and_one_where_it_is_nearest() {
        let mut mapping = Mapping::new("c", "DC1");
        assert_eq!(mapping.hosts("Web").unwrap(), ["web.service.dc1.consul", "web.service.consul"]);
        mapping.nearest = false;
        assert_eq!(mapping.hosts("my_app.v2").unwrap(), ["my-app-v2.service.dc1.consul"]);
        for name in ["", "-", "a b", "ä", &"x".repeat(64), "web/../x"] {
            assert!(mapping.hosts(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn what_is_no_address_or_port_serves_nobody_and_is_told() {
        for (address, port) in
            [("", 80), ("0.0.0.0", 80), ("::", 80), ("db.example.com", 80), ("10.0.0.1", 0), ("224.0.0.1", 1)]
        {
            let converted = made(&[instance("a", address, port), instance("b", "10.0.0.2", 80)]);
            assert_eq!((converted.endpoints.len(), converted.problems.len()), (1, 1), "{address}:{port}");
        }
        let v6 = made(&[instance("a", "[2001:db8::1]", 80)]);
        assert_eq!(v6.endpoints.first().unwrap().address, "2001:db8::1");
    }

    #[test]
    fn the_number_of_the_port_stays_while_an_instance_has_it() {
        let two = made(&[
            instance("a", "10.0.0.1", 8080),
            instance("b", "10.0.0.2", 8080),
            instance("c", "10.0.0.3", 90),
        ]);
        assert_eq!(two.service.ports[0].number, 8080);
        let other: Vec<_> = two.endpoints.iter().map(|e| e.ports.get("default").copied()).collect();
        assert_eq!(other, [None, None, Some(90)]);
        let moving =
            [instance("a", "10.0.0.1", 8080), instance("b", "10.0.0.2", 90), instance("c", "10.0.0.3", 90)];
        let mapping = Mapping::new("c", "dc1");
        assert_eq!(convert("web", &moving, &mapping, Some(&two.service)).service.ports[0].number, 8080);
        assert_eq!(convert("web", &moving[1..], &mapping, Some(&two.service)).service.ports[0].number, 90);
        assert_eq!(convert("web", &[], &mapping, Some(&two.service)).service.ports, two.service.ports);
    }

    #[test]
    fn metadata_names_protocol_port_and_identity() {
        let mut a = instance("a", "10.0.0.1", 8080);
        a.meta =
            meta(&[("protocol", "http"), (SERVICE_PORT, "80"), (SERVICE_ACCOUNT, "web"), ("version", "v1")]);
        let converted = made(&[a]);
        let port = &converted.service.ports[0];
        assert_eq!((port.name.as_str(), port.number, port.protocol), ("http", 80, Protocol::Http));
        let endpoint = converted.endpoints.first().unwrap();
        assert_eq!(endpoint.ports["http"], 8080);
        assert_eq!((endpoint.service_account.as_str(), endpoint.tls_mode), ("web", TlsMode::Istio));
        assert_eq!(endpoint.labels, meta(&[("protocol", "http"), ("version", "v1")]));
        assert_eq!(
            made(&[instance("a", "10.0.0.1", 1)]).endpoints.first().unwrap().tls_mode,
            TlsMode::Disabled
        );
    }

    #[test]
    fn tags_and_metadata_become_labels_when_they_have_their_form() {
        let mut a = instance("a", "10.0.0.1", 80);
        a.tags =
            ["primary", "color=blue", "size:l", "rank|1", "version=v2", "ü", "traefik.http.rule=Host(`x`)"]
                .map(str::to_owned)
                .into();
        a.meta =
            meta(&[("version", "v1"), ("big", &"x".repeat(1 << 20)), ("security.istio.io/tlsMode", "istio")]);
        let labels = made(&[a]).endpoints.first().unwrap().labels.clone();
        let expect = [
            ("color", "blue"),
            ("consul.tag/primary", "true"),
            ("rank", "1"),
            ("size", "l"),
            ("version", "v1"),
        ];
        assert_eq!(labels, meta(&expect));
    }

    #[test]
    fn health_and_weights_follow_the_checks() {
        let served = |condition, passing, warning| {
            let weighted = Instance {
                condition,
                passing_weight: passing,
                warning_weight: warning,
                ..instance("a", "10.0.0.1", 80)
            };
            let endpoint = made(&[weighted]).endpoints.pop_first().unwrap();
            (endpoint.weight, endpoint.health)
        };
        assert_eq!(served(Condition::Passing, 10, 2), (10, Health::Healthy));
        assert_eq!(served(Condition::Warning, 10, 2), (2, Health::Healthy));
        assert_eq!(served(Condition::Warning, 10, 0), (1, Health::Unhealthy));
        assert_eq!(served(Condition::Critical, 10, 2), (10, Health::Unhealthy));
        assert_eq!(served(Condition::Maintenance, 10, 2), (10, Health::Draining));
        assert_eq!(served(Condition::Passing, u32::MAX, 2), (MOST_WEIGHT, Health::Healthy));
    }

    #[test]
    fn sidecars_copies_and_what_the_mesh_wrote_are_no_services() {
        let proxy = Instance { kind: Kind::Connect, ..instance("p", "10.0.0.1", 80) };
        let echo = Instance { meta: meta(&[(OWNER, "m")]), ..instance("e", "10.0.0.2", 80) };
        let copy =
            Instance { meta: meta(&[("external-source", "kubernetes")]), ..instance("k", "10.0.0.3", 80) };
        let mut mapping = Mapping::new("c", "dc1");
        let all = [proxy, echo, copy];
        assert_eq!(convert("web", &all, &mapping, None).endpoints.len(), 1);
        mapping.skip_external = ["kubernetes".to_owned()].into();
        let none = convert("web", &all, &mapping, None);
        assert_eq!((none.endpoints.len(), none.skipped, none.problems.len()), (0, 3, 0));
    }

    #[test]
    fn the_datacenter_is_the_region_unless_another_is_declared() {
        let mut a = instance("a", "10.0.0.1", 80);
        a.node_meta = meta(&[("failure-domain", "z1")]);
        assert_eq!(made(&[a.clone()]).endpoints.first().unwrap().locality.to_string(), "dc1/z1");
        a.locality = Some(("eu".into(), "eu-1".into()));
        assert_eq!(made(&[a]).endpoints.first().unwrap().locality.to_string(), "eu/eu-1");
    }

    #[test]
    fn the_order_of_instances_does_not_matter_and_the_same_id_on_two_nodes_is_two() {
        let a = instance("a", "10.0.0.1", 80);
        let b = Instance { node: "n2".into(), ..instance("a", "10.0.0.2", 80) };
        let (x, y) = (made(&[a.clone(), b.clone()]), made(&[b, a]));
        assert_eq!(x, y);
        assert_eq!(x.endpoints.len(), 2);
    }
}

//! Names and addresses of what a workload may call: what its agent answers DNS queries with.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::Ipv4Net;
use registry::merge::declare::Labels;
use registry::model::service::{Endpoint, Resolution, Service};
use registry::snapshot::Snapshot;
use wire::mesh::{Name, Names};
use xds::translate::names::{block_address, domains, service_addresses};

/// Whose names.
#[derive(Debug, Clone)]
pub(crate) struct Asker {
    /// Namespace of the workload.
    pub(crate) namespace: String,
    /// Its labels.
    pub(crate) labels: Labels,
    /// Loopback block of its proxy, without capture.
    pub(crate) block: Option<Ipv4Net>,
}

/// What names follow from. As long as it is the same, they are.
#[derive(Debug, Clone, Default)]
pub(crate) struct Basis(Vec<(Arc<Service>, Arc<[Endpoint]>)>);

impl PartialEq for Basis {
    fn eq(&self, other: &Self) -> bool {
        let same = |((a, of_a), (b, of_b)): (&(Arc<Service>, Arc<[Endpoint]>), &(_, _))| {
            Arc::ptr_eq(a, b) && Arc::ptr_eq(of_a, of_b)
        };
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(same)
    }
}

impl Asker {
    /// The services that the workload sees, each with its endpoints where names follow from them.
    pub(crate) fn basis(&self, snapshot: &Snapshot) -> Basis {
        let services = snapshot.services_for(&self.namespace, &self.labels).into_iter();
        Basis(
            services
                .map(|service| {
                    let endpoints = if self.is_headless(&service) {
                        Arc::clone(snapshot.endpoints_of(&service))
                    } else {
                        Arc::default()
                    };
                    (service, endpoints)
                })
                .collect(),
        )
    }

    /// Every name with its addresses; of several services with one name the first counts.
    pub(crate) fn names(&self, basis: &Basis, domain: &str) -> Names {
        let mut names: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for (service, endpoints) in &basis.0 {
            let addresses = self.addresses(service, endpoints);
            if addresses.is_empty() {
                continue;
            }
            for host in domains(service.hostname.as_str(), &self.namespace, domain) {
                names.entry(host.to_ascii_lowercase()).or_insert_with(|| addresses.clone());
            }
        }
        let name = |(host, addresses): (String, Vec<IpAddr>)| Name {
            host,
            addresses: addresses.iter().map(ToString::to_string).collect(),
        };
        Names { names: names.into_iter().map(name).collect(), domain: domain.to_owned() }
    }

    fn addresses(&self, service: &Service, endpoints: &[Endpoint]) -> Vec<IpAddr> {
        if let Some(block) = self.block {
            let own = block_address(block.network(), block.prefix_len(), service.vip_index);
            return own.map(IpAddr::from).into_iter().collect();
        }
        if self.is_headless(service) {
            let mut addresses: Vec<IpAddr> =
                endpoints.iter().filter_map(|endpoint| endpoint.address.parse().ok()).collect();
            addresses.sort();
            addresses.dedup();
            return addresses;
        }
        // A block of addresses is no answer.
        let single =
            service_addresses(service).into_iter().filter(|net| net.prefix_len() == net.max_prefix_len());
        single.map(|net| net.addr()).collect()
    }

    /// Clients call its endpoints themselves.
    fn is_headless(&self, service: &Service) -> bool {
        self.block.is_none() && service.resolution == Resolution::None && service.addresses.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use registry::state::{Batch, Revision, State};

    use super::*;

    /// The state after this YAML.
    fn applied(state: &mut State, yaml: &str) -> Snapshot {
        let (objects, _) = registry::config::parse("test.yaml", yaml).unwrap();
        let revision = Revision(state.revision().0 + 1);
        state.apply(revision, &Batch::put_objects(1, "test", objects));
        Snapshot::build(state)
    }

    fn entry(name: &str, spec: &str) -> String {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{{spec}, ports: [{{number: 80, name: http, protocol: HTTP}}]}}\n---\n"
        )
    }

    fn asker(namespace: &str, block: Option<&str>) -> Asker {
        let block = block.map(|block| block.parse().unwrap());
        Asker { namespace: namespace.to_owned(), labels: Labels::default(), block }
    }

    fn lines(asker: &Asker, snapshot: &Snapshot) -> Vec<String> {
        let told = asker.names(&asker.basis(snapshot), snapshot.domain_suffix());
        assert_eq!(told.domain, "cluster.local");
        told.names.iter().map(|name| format!("{} {}", name.host, name.addresses.join(","))).collect()
    }

    fn mesh() -> (State, Snapshot) {
        let yaml = [
            entry(
                "pay",
                "hosts: [pay.shop.svc.cluster.local], addresses: [10.9.0.1, 'fd09::1'], resolution: STATIC, endpoints: [{address: 10.1.1.1}]",
            ),
            entry(
                "own",
                "hosts: [own.shop.svc.cluster.local], exportTo: ['.'], resolution: STATIC, endpoints: [{address: 10.1.1.1}]",
            ),
            entry("each", "hosts: [each.example.com], resolution: NONE, endpoints: []"),
            entry("all", "hosts: ['*.Example.org'], addresses: [10.9.0.9], resolution: NONE"),
            entry("net", "hosts: [net.example.com], addresses: [10.8.0.0/16], resolution: NONE"),
        ];
        let mut state = State::default();
        let snapshot = applied(&mut state, &yaml.concat());
        (state, snapshot)
    }

    #[test]
    fn a_captured_workload_is_told_the_addresses_that_its_proxy_knows_and_short_names_of_its_namespace() {
        let (_, snapshot) = mesh();
        let told = lines(&asker("shop", None), &snapshot);
        for expected in [
            "pay 10.9.0.1,fd09::1",
            "pay.shop 10.9.0.1,fd09::1",
            "pay.shop.svc.cluster.local 10.9.0.1,fd09::1",
            "*.example.org 10.9.0.9",
        ] {
            assert!(told.iter().any(|line| line == expected), "{expected}: {told:#?}");
        }
        let own = told.iter().find(|line| line.starts_with("own ")).unwrap();
        assert!(own.contains("240.240.0.") && own.contains("2001:2::"), "automatic addresses: {own}");
        assert!(!told.iter().any(|line| line.contains(".example.com")), "no address to tell: {told:#?}");
        let elsewhere = lines(&asker("bank", None), &snapshot);
        assert!(elsewhere.iter().any(|line| line.starts_with("pay.shop ")), "{elsewhere:#?}");
        assert!(
            !elsewhere.iter().any(|line| line.starts_with("pay ") || line.starts_with("own")),
            "{elsewhere:#?}"
        );
    }

    #[test]
    fn a_workload_without_capture_is_told_addresses_of_its_own_block() {
        let (_, snapshot) = mesh();
        let told = lines(&asker("shop", Some("127.240.16.0/20")), &snapshot);
        assert!(told.iter().all(|line| line.contains(" 127.240.")), "{told:#?}");
        assert!(told.iter().any(|line| line.starts_with("pay ")), "{told:#?}");
    }

    #[test]
    fn nothing_is_told_again_before_a_service_is_another() {
        let (mut state, before) = mesh();
        let asker = asker("shop", None);
        let basis = asker.basis(&before);
        assert!(basis == asker.basis(&before));
        let after = applied(
            &mut state,
            &entry("more", "hosts: [more.example.com], resolution: STATIC, endpoints: [{address: 10.1.1.1}]"),
        );
        assert!(basis != asker.basis(&after));
    }
}

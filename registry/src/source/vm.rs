//! A machine that joins: from its `WorkloadGroup` and what its agent tells, to a registration.
//!
//! Source: Istio, "VM auto-registration": labels of the agent outrank those of the group's metadata, and these those of
//! its template; the entry is named `<group>-<address>[-<network>]`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::config::validate::grammar;
use crate::config::{Object, Spec};
use crate::model::service::Locality;
use crate::model::workload::{WorkloadEntry, WorkloadGroup};
use crate::state::{Presence, Registration};

/// Names the group on the entry.
pub const GROUP_ANNOTATION: &str = "istio.io/autoRegistrationGroup";

/// What an agent tells about its machine. Namespace and service account come from its identity, not from its word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// Namespace of the identity.
    pub namespace: String,
    /// Service account of the identity.
    pub service_account: String,
    /// Name of the workload, for a machine without a group.
    pub workload: String,
    /// Where it is reached.
    pub address: IpAddr,
    /// Service port name to port; outranks the group's.
    pub ports: BTreeMap<String, u16>,
    /// Labels; outrank the group's.
    pub labels: BTreeMap<String, String>,
    /// Network; empty takes the group's.
    pub network: String,
    /// `region/zone/subzone`; empty takes the group's.
    pub locality: String,
    /// Cluster id.
    pub cluster: String,
    /// Stable id of the machine.
    pub instance: String,
    /// The agent's session.
    pub session: String,
    /// How long the registration outlives the last sign of life.
    pub lease: Duration,
}

/// Why a machine may not join.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The identity is not the group's.
    #[error("the group {group} is for service account {expected:?}, the identity is of {found:?}")]
    ServiceAccount {
        /// The group.
        group: String,
        /// What its template says.
        expected: String,
        /// What the identity says.
        found: String,
    },
    /// The identity is of another namespace.
    #[error("the group {group} is in namespace {expected:?}, the identity is of {found:?}")]
    Namespace {
        /// The group.
        group: String,
        /// Its namespace.
        expected: String,
        /// What the identity says.
        found: String,
    },
    /// The object is no `WorkloadGroup`.
    #[error("{0} is no WorkloadGroup")]
    NotAGroup(String),
    /// Something told by the agent cannot be part of a workload.
    #[error("{field}: {reason}")]
    Malformed {
        /// What of it.
        field: String,
        /// What would be right.
        reason: &'static str,
    },
    /// Neither a group nor a name.
    #[error("a machine without a WorkloadGroup must tell the name of its workload")]
    NoName,
}

/// The registration of a machine of `group`, or of one without a group.
///
/// # Errors
///
/// [`JoinError`] when the identity does not belong to the group, or when there is nothing to name the entry after.
pub fn register(group: Option<&Object>, join: &Join) -> Result<Registration, JoinError> {
    check(join)?;
    let Some(object) = group else {
        if join.workload.is_empty() {
            return Err(JoinError::NoName);
        }
        let name = named(&join.workload, join, &join.network);
        return Ok(registration(name, "", &WorkloadGroup::default(), join));
    };
    let Spec::WorkloadGroup(group) = &*object.spec else { return Err(JoinError::NotAGroup(object.id())) };
    if object.namespace != join.namespace {
        return Err(JoinError::Namespace {
            group: object.name.clone(),
            expected: object.namespace.clone(),
            found: join.namespace.clone(),
        });
    }
    let expected =
        group.template.as_ref().map(|template| template.service_account.as_str()).unwrap_or_default();
    if !expected.is_empty() && expected != join.service_account {
        return Err(JoinError::ServiceAccount {
            group: object.name.clone(),
            expected: expected.to_owned(),
            found: join.service_account.clone(),
        });
    }
    let network = first(&join.network, group.template.as_ref().map_or("", |template| &template.network));
    Ok(registration(named(&object.name, join, &network), &object.name, group, join))
}

/// Labels, and ports, of one workload.
const MOST: usize = 64;

/// What enters the log and the configuration of other proxies has the form that the same field of an object has.
fn check(join: &Join) -> Result<(), JoinError> {
    let fail = |field: &str, reason| Err(JoinError::Malformed { field: field.to_owned(), reason });
    if !join.workload.is_empty() && !grammar::is_subdomain(&join.workload) {
        return fail("name", "must be a name of lower case letters, digits, - and .");
    }
    if grammar::label_value(&join.network).is_err() {
        return fail("network", "must have at most 63 letters, digits, -, _ and .");
    }
    if join.locality.len() > 255 || !join.locality.is_empty() && !grammar::is_locality(&join.locality) {
        return fail("locality", "must be region, region/zone or region/zone/subzone");
    }
    if join.session.is_empty() || grammar::label_value(&join.session).is_err() {
        return fail("session", "must have 1 to 63 letters, digits, -, _ and .");
    }
    if join.labels.len() > MOST || join.ports.len() > MOST {
        return fail("labels and ports", "must be at most 64 of each");
    }
    for (key, value) in &join.labels {
        if let Err(reason) = grammar::label_key(key).and_then(|()| grammar::label_value(value)) {
            return fail(&format!("labels.{}", key.escape_debug()), reason);
        }
    }
    let bad = join.ports.keys().find(|name| !grammar::is_label(name));
    bad.map_or(Ok(()), |_| fail("ports", "must have names of lower case letters, digits and -"))
}

/// A colon is no letter of a name.
fn named(prefix: &str, join: &Join, network: &str) -> String {
    let address = join.address.to_string().replace(':', "-");
    if network.is_empty() { format!("{prefix}-{address}") } else { format!("{prefix}-{address}-{network}") }
}

fn first(own: &str, groups: &str) -> String {
    if own.is_empty() { groups.to_owned() } else { own.to_owned() }
}

fn registration(name: String, group_name: &str, group: &WorkloadGroup, join: &Join) -> Registration {
    let template: WorkloadEntry = group.template.clone().unwrap_or_default();
    let metadata = group.metadata.clone().unwrap_or_default();
    let mut labels = template.labels;
    labels.extend(metadata.labels);
    labels.extend(join.labels.clone());
    let mut annotations = metadata.annotations;
    if !group_name.is_empty() {
        annotations.insert(GROUP_ANNOTATION.to_owned(), group_name.to_owned());
    }
    let mut ports = template.ports;
    ports.extend(join.ports.clone());
    Registration {
        namespace: join.namespace.clone(),
        name,
        address: join.address.to_string(),
        ports,
        labels,
        annotations,
        network: first(&join.network, &template.network),
        locality: Locality::parse(&first(&join.locality, &template.locality)),
        weight: template.weight,
        service_account: join.service_account.clone(),
        cluster: join.cluster.clone(),
        group: group_name.to_owned(),
        instance: join.instance.clone(),
        session: join.session.clone(),
        lease_ms: u64::try_from(join.lease.as_millis()).unwrap_or(u64::MAX),
        // With a probe it gets traffic once the probe has succeeded, without one at once.
        healthy: group.probe.is_none(),
        presence: Presence::Heard,
        lost_ms: 0,
        reason: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Kind;
    use serde_json::json;

    fn join() -> Join {
        Join {
            namespace: "shop".into(),
            service_account: "pay".into(),
            workload: String::new(),
            address: IpAddr::from([10, 0, 0, 1]),
            ports: BTreeMap::from([("http".into(), 9090)]),
            labels: BTreeMap::from([("who".into(), "agent".into())]),
            network: String::new(),
            locality: "r2/z2".into(),
            cluster: "default".into(),
            instance: "i".into(),
            session: "s".into(),
            lease: Duration::from_secs(30),
        }
    }

    fn group(spec: serde_json::Value) -> Object {
        Object::new(Kind::WorkloadGroup, "shop", "vms", spec)
    }

    #[test]
    fn the_agent_outranks_the_groups_metadata_and_that_its_template() {
        let group = group(json!({
            "metadata": {"labels": {"who": "metadata", "m": "metadata"}, "annotations": {"a": "b"}},
            "template": {"labels": {"who": "template", "m": "template", "t": "template"}, "serviceAccount": "pay",
                "network": "n1", "locality": "r1", "weight": 7, "ports": {"http": 80, "tcp": 81}},
            "probe": {"httpGet": {"port": 80}}}));
        let made = register(Some(&group), &join()).unwrap();
        let labels: Vec<_> = made.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(labels, ["m=metadata", "t=template", "who=agent"]);
        assert_eq!(made.name, "vms-10.0.0.1-n1");
        assert_eq!(
            (made.network.as_str(), made.locality.to_string().as_str(), made.weight),
            ("n1", "r2/z2", 7)
        );
        assert_eq!(made.ports, BTreeMap::from([("http".into(), 9090), ("tcp".into(), 81)]));
        assert_eq!(made.annotations[GROUP_ANNOTATION], "vms");
        assert_eq!((made.group.as_str(), made.lease_ms), ("vms", 30_000));
        assert!(!made.healthy, "the probe has not succeeded yet");
    }

    #[test]
    fn a_machine_without_a_group_is_named_by_itself() {
        assert_eq!(register(None, &join()), Err(JoinError::NoName));
        let join = Join { workload: "w".into(), address: IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), ..join() };
        let made = register(None, &join).unwrap();
        assert_eq!(made.name, "w---1");
        assert!(made.healthy && made.annotations.is_empty());
    }

    #[test]
    fn what_an_agent_tells_has_the_form_of_an_object() {
        let join = || Join { workload: "w".into(), ..join() };
        let long = "a".repeat(64);
        let wrong = [
            Join { workload: "W w".into(), ..join() },
            Join { network: long.clone(), ..join() },
            Join { locality: "a//b".into(), ..join() },
            Join { session: String::new(), ..join() },
            Join { session: long.clone(), ..join() },
            Join { labels: [("app".into(), long)].into(), ..join() },
            Join { labels: [("no key".into(), String::new())].into(), ..join() },
            Join { labels: (0..65).map(|i| (format!("l{i}"), String::new())).collect(), ..join() },
            Join { ports: [("Not a name".into(), 1)].into(), ..join() },
        ];
        for join in wrong {
            assert!(matches!(register(None, &join), Err(JoinError::Malformed { .. })), "{join:?}");
        }
        assert!(register(None, &join()).is_ok());
    }

    #[test]
    fn only_the_groups_own_identity_may_join() {
        let other = group(json!({"template": {"serviceAccount": "other"}}));
        assert!(matches!(register(Some(&other), &join()), Err(JoinError::ServiceAccount { .. })));
        let foreign = Join { namespace: "else".into(), ..join() };
        assert!(matches!(register(Some(&group(json!({}))), &foreign), Err(JoinError::Namespace { .. })));
        let rule = Object::new(Kind::DestinationRule, "shop", "r", json!({}));
        assert!(matches!(register(Some(&rule), &join()), Err(JoinError::NotAGroup(_))));
        assert!(register(Some(&group(json!({}))), &join()).is_ok());
    }
}

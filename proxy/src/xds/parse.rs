//! One resource from the wire to a [`Change`]: decoded, validated, named.

use std::sync::Arc;

use envoy_types::pb::envoy::config::{cluster, endpoint, listener, route};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};

use super::decode::{Invalid, Kind, Rejected, unpack};
use crate::tables::{Change, Held};

/// A resource as it came.
#[derive(Debug, Clone)]
pub struct Resource {
    /// The name outside of the message, where the protocol tells one.
    pub name: Option<String>,
    /// Its version.
    pub version: String,
    /// The message.
    pub any: Any,
}

/// A resource that is valid.
#[derive(Debug, Clone)]
pub struct Parsed {
    /// Its name.
    pub name: Arc<str>,
    /// Its version.
    pub version: Arc<str>,
    /// What it changes.
    pub change: Change,
}

/// Validates a resource of this kind.
///
/// # Errors
///
/// What is wrong with it, with its name, which is found before anything else is looked at.
pub fn parse(kind: Kind, resource: Resource, at: jiff::Timestamp) -> Result<Parsed, Rejected> {
    let Resource { name, version, any } = resource;
    let version: Arc<str> = version.into();
    let raw = Arc::new(any);
    let named = Named { kind, name: name.as_deref(), raw: &raw };
    let (name, change) = match kind {
        Kind::Cluster => {
            let pb: cluster::v3::Cluster = named.decode(|pb: &cluster::v3::Cluster| &pb.name)?;
            let value = Arc::new(super::cluster::Cluster::try_from(pb)?);
            let name = Arc::clone(&value.name);
            (name, Change::Cluster(held(value, &raw, &version, at)))
        }
        Kind::Endpoints => {
            use endpoint::v3::ClusterLoadAssignment as Pb;
            let pb: Pb = named.decode(|pb: &Pb| &pb.cluster_name)?;
            let value = Arc::new(super::cluster::endpoint::ClusterLoadAssignment::try_from(pb)?);
            let name = Arc::clone(&value.name);
            (name, Change::Endpoints(held(value, &raw, &version, at)))
        }
        Kind::Listener => {
            let pb: listener::v3::Listener = named.decode(|pb: &listener::v3::Listener| &pb.name)?;
            let value = Arc::new(super::listener::Listener::try_from(pb)?);
            let name = Arc::clone(&value.name);
            (name, Change::Listener(held(value, &raw, &version, at)))
        }
        Kind::Routes => {
            use route::v3::RouteConfiguration as Pb;
            let pb: Pb = named.decode(|pb: &Pb| &pb.name)?;
            let value = Arc::new(super::route::RouteConfiguration::try_from(pb)?);
            let name = Arc::clone(&value.name);
            (name, Change::Routes(held(value, &raw, &version, at)))
        }
        Kind::Secret => return Err(named.refuse(Invalid::unsupported("type_url"))),
    };
    Ok(Parsed { name, version, change })
}

fn held<T>(value: Arc<T>, raw: &Arc<Any>, version: &Arc<str>, updated: jiff::Timestamp) -> Held<T> {
    Held { value, raw: Arc::clone(raw), version: Arc::clone(version), updated, is_static: false }
}

struct Named<'a> {
    kind: Kind,
    name: Option<&'a str>,
    raw: &'a Any,
}

impl Named<'_> {
    fn refuse(&self, invalid: Invalid) -> Rejected {
        Rejected { kind: self.kind, name: self.name.unwrap_or_default().to_owned(), invalid }
    }

    fn decode<M: Message + Default + Name>(&self, name_of: impl Fn(&M) -> &String) -> Result<M, Rejected> {
        let pb: M = unpack(self.raw).map_err(|e| self.refuse(e))?;
        let inner = name_of(&pb);
        if let Some(outer) = self.name.filter(|outer| *outer != inner) {
            let reason = format!("the resource `{outer}` calls itself `{inner}`");
            return Err(self.refuse(Invalid::new("name", reason)));
        }
        if inner.is_empty() {
            return Err(self.refuse(Invalid::missing("name")));
        }
        Ok(pb)
    }
}

/// A resource of a bootstrap file.
///
/// # Errors
///
/// As [`parse`].
pub fn parse_static(kind: Kind, message: Any, at: jiff::Timestamp) -> Result<Parsed, Rejected> {
    let mut parsed = parse(kind, Resource { name: None, version: String::new(), any: message }, at)?;
    match &mut parsed.change {
        Change::Cluster(h) => h.is_static = true,
        Change::Listener(h) => h.is_static = true,
        Change::Endpoints(h) => h.is_static = true,
        Change::Routes(h) => h.is_static = true,
        Change::Secret(..) | Change::Remove(..) | Change::Absent(..) => {}
    }
    Ok(parsed)
}

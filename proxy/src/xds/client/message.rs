//! Messages of both forms of the protocol, and what they have in common.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3 as pb;
use envoy_types::pb::google::rpc::Status;

use super::Protocol;
use crate::xds::decode::Kind;
use crate::xds::parse::Resource;

/// gRPC's INVALID_ARGUMENT, which a NACK carries.
const INVALID_ARGUMENT: i32 = 3;

/// A request, in one form of the protocol.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// Incremental.
    Delta(Box<pb::DeltaDiscoveryRequest>),
    /// State of the world.
    Sotw(Box<pb::DiscoveryRequest>),
}

/// A response, in one form of the protocol.
#[derive(Debug, Clone, PartialEq)]
pub enum Response {
    /// Incremental.
    Delta(Box<pb::DeltaDiscoveryResponse>),
    /// State of the world.
    Sotw(Box<pb::DiscoveryResponse>),
}

impl Response {
    /// The version of the whole.
    pub(crate) fn version(&self) -> &str {
        match self {
            Self::Delta(pb) => &pb.system_version_info,
            Self::Sotw(pb) => &pb.version_info,
        }
    }
}

/// What both forms of a response say.
pub(super) struct Incoming {
    pub(super) kind: Kind,
    pub(super) nonce: String,
    pub(super) version: String,
    pub(super) resources: Vec<Resource>,
    /// `None`: the form does not tell.
    pub(super) removed: Option<Vec<Arc<str>>>,
}

impl Incoming {
    pub(super) fn new(response: Response) -> Option<Self> {
        match response {
            Response::Delta(pb) => {
                let version = pb.system_version_info;
                // A resource without a body only says that it still lives.
                let resources = pb.resources.into_iter().filter_map(|r| {
                    let any = r.resource?;
                    Some(Resource { name: Some(r.name).filter(|n| !n.is_empty()), version: r.version, any })
                });
                Some(Self {
                    kind: Kind::from_url(&pb.type_url)?,
                    nonce: pb.nonce,
                    version,
                    resources: resources.collect(),
                    removed: Some(pb.removed_resources.into_iter().map(Arc::from).collect()),
                })
            }
            Response::Sotw(pb) => {
                let version = pb.version_info;
                let resources = pb.resources.into_iter().map(|any| Resource {
                    name: None,
                    version: version.clone(),
                    any,
                });
                Some(Self {
                    kind: Kind::from_url(&pb.type_url)?,
                    nonce: pb.nonce,
                    resources: resources.collect(),
                    version: version.clone(),
                    removed: None,
                })
            }
        }
    }
}

/// What both forms of a request say.
#[derive(Default)]
pub(super) struct Outgoing {
    /// All names that are asked for (state of the world).
    pub(super) names: Vec<Arc<str>>,
    /// Names that are newly asked for (incremental).
    pub(super) added: Vec<Arc<str>>,
    /// Names that are not asked for any more (incremental).
    pub(super) dropped: Vec<Arc<str>>,
    /// What is held (incremental, first request of a stream).
    pub(super) held: BTreeMap<Arc<str>, Arc<str>>,
    /// The version of the last response that was taken (state of the world).
    pub(super) version: String,
    pub(super) nonce: String,
    pub(super) error: Option<String>,
}

pub(super) fn request(protocol: Protocol, kind: Kind, out: Outgoing, node: Option<Node>) -> Request {
    let error_detail =
        out.error.map(|message| Status { code: INVALID_ARGUMENT, message, details: Vec::new() });
    let strings = |names: Vec<Arc<str>>| names.iter().map(ToString::to_string).collect();
    match protocol {
        Protocol::Delta => Request::Delta(Box::new(pb::DeltaDiscoveryRequest {
            node,
            type_url: kind.url().into(),
            resource_names_subscribe: strings(out.added),
            resource_names_unsubscribe: strings(out.dropped),
            initial_resource_versions: out
                .held
                .iter()
                .map(|(name, version)| (name.to_string(), version.to_string()))
                .collect(),
            response_nonce: out.nonce,
            error_detail,
            ..Default::default()
        })),
        Protocol::Sotw => Request::Sotw(Box::new(pb::DiscoveryRequest {
            version_info: out.version,
            node,
            resource_names: strings(out.names),
            type_url: kind.url().into(),
            response_nonce: out.nonce,
            error_detail,
            ..Default::default()
        })),
    }
}

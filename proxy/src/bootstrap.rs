//! An Envoy v3 bootstrap file, YAML or JSON, to a [`Config`].
//!
//! What a bootstrap says about Envoy's own inner life (watchdogs, statistics sinks, the runtime but for limits on
//! connections) has no meaning here and is left out with a note in the log; what says where traffic goes, and what is too much,
//! must be understood.

mod overload;
mod server;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use envoy_types::pb::envoy::config::bootstrap::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};

use self::server::settings;
use crate::config::Config;
use crate::tables::{Change, Update};
use crate::xds::decode::{Invalid, Kind, Rejected, Under as _, address};
use crate::xds::parse::parse_static;
use crate::xds::tls::secret;

/// Why a bootstrap file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not a bootstrap message.
    #[error("not an Envoy v3 bootstrap")]
    Format(#[source] Box<wire::json::JsonError>),
    /// Some of its resources are not valid; all of them are told.
    #[error("{}", lines(.0))]
    Resources(Vec<Rejected>),
    /// Something else in it is not valid.
    #[error("{0}")]
    Invalid(Invalid),
}

fn lines(rejected: &[Rejected]) -> String {
    rejected.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// The configuration in a bootstrap file.
///
/// # Errors
///
/// A file that cannot be read, is no bootstrap, or says something this proxy cannot do.
pub fn load(path: &Path, now: jiff::Timestamp) -> Result<Config, BootstrapError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| BootstrapError::Read { path: path.to_owned(), source })?;
    let mut config = parse(&text, now)?;
    config.bootstrap_path = Some(path.to_owned());
    Ok(config)
}

/// The configuration in the text of a bootstrap file.
///
/// # Errors
///
/// As [`load`].
pub fn parse(text: &str, now: jiff::Timestamp) -> Result<Config, BootstrapError> {
    let pb = read(text).map_err(|e| BootstrapError::Format(Box::new(e)))?;
    let kept = Arc::new(pb.clone());
    note_unused(&pb);
    let limits = overload::config(pb.overload_manager, pb.layered_runtime.as_ref());
    let static_resources = static_resources(pb.static_resources.unwrap_or_default(), now)?;
    let mut config = Config::new(pb.node.unwrap_or_default());
    config.overload = limits.map_err(BootstrapError::Invalid)?;
    config.admin = admin(pb.admin).map_err(BootstrapError::Invalid)?;
    let dynamic = pb.dynamic_resources.unwrap_or_default();
    config.xds =
        xds(dynamic, &static_resources).under("dynamic_resources").map_err(BootstrapError::Invalid)?;
    config.static_resources = static_resources;
    config.bootstrap = Some(kept);
    Ok(config)
}

/// Reads the message on a thread of its own: the descriptors that it takes are many times what a proxy needs from then
/// on, and memory of a thread that has ended goes back as a whole.
fn read(text: &str) -> Result<pb::Bootstrap, wire::json::JsonError> {
    let encoded = || {
        let message: Result<pb::Bootstrap, _> = wire::json::message_from_yaml(text);
        wire::forget_descriptors();
        message.map(|m| m.encode_to_vec())
    };
    let encoded = std::thread::scope(|scope| scope.spawn(encoded).join());
    let bytes = encoded.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let type_name = pb::Bootstrap::full_name();
    pb::Bootstrap::decode(bytes.as_slice())
        .map_err(|source| wire::json::JsonError::Decode { type_name, source })
}

fn note_unused(pb: &pb::Bootstrap) {
    for (set, field) in [
        (pb.layered_runtime.is_some(), "layered_runtime, but for limits on connections"),
        (!pb.stats_sinks.is_empty(), "stats_sinks"),
        (pb.hds_config.is_some(), "hds_config"),
        (pb.watchdogs.is_some(), "watchdogs"),
        (!pb.bootstrap_extensions.is_empty(), "bootstrap_extensions"),
    ] {
        if set {
            tracing::info!(field, "the bootstrap says something that has no meaning for this proxy");
        }
    }
}

fn admin(pb: Option<pb::Admin>) -> Result<Option<crate::xds::decode::Address>, Invalid> {
    match pb.and_then(|a| a.address) {
        None => Ok(None),
        Some(a) => address(Some(a)).under("admin.address").map(Some),
    }
}

fn static_resources(
    pb: pb::bootstrap::StaticResources,
    now: jiff::Timestamp,
) -> Result<Update, BootstrapError> {
    let mut update = Update::default();
    let mut rejected = Vec::new();
    for s in pb.secrets {
        let name = s.name.clone();
        match secret(s) {
            Ok(secret) => update.changes.push(Change::Secret(name.into(), Arc::new(secret))),
            Err(invalid) => rejected.push(Rejected { kind: Kind::Secret, name, invalid }),
        }
    }
    let clusters = pb.clusters.iter().map(|c| (Kind::Cluster, any(c)));
    let listeners = pb.listeners.into_iter().map(|l| (Kind::Listener, any(&named(l))));
    for (kind, any) in clusters.chain(listeners) {
        match parse_static(kind, any, now) {
            Ok(parsed) => update.changes.push(parsed.change),
            Err(e) => rejected.push(e),
        }
    }
    if rejected.is_empty() { Ok(update) } else { Err(BootstrapError::Resources(rejected)) }
}

fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

/// Envoy lets a static listener go without a name; its address stands in.
fn named(
    mut pb: envoy_types::pb::envoy::config::listener::v3::Listener,
) -> envoy_types::pb::envoy::config::listener::v3::Listener {
    if pb.name.is_empty() {
        pb.name = address(pb.address.clone()).map(|a| a.to_string()).unwrap_or_default();
    }
    pb
}

fn xds(
    pb: pb::bootstrap::DynamicResources,
    resources: &Update,
) -> Result<Option<crate::xds::transport::Settings>, Invalid> {
    for (config, field) in [(pb.lds_config, "lds_config"), (pb.cds_config, "cds_config")] {
        match config.map(|c| c.config_source_specifier) {
            None | Some(Some(core::config_source::ConfigSourceSpecifier::Ads(_))) => {}
            Some(_) => return Err(Invalid::new(field, "only `ads` is supported as a source")),
        }
    }
    pb.ads_config.map(|ads| settings(ads, resources).under("ads_config")).transpose()
}

#[cfg(test)]
mod tests;

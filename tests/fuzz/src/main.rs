//! One program for all targets: `FUZZ_TARGET` says which, or `FUZZ_SEEDS` a folder for inputs to begin with.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

/// A target: its name, and what it does with its bytes.
type Target = (&'static str, fn(&[u8]));

static TARGETS: [Target; 36] = [
    ("bootstrap", fuzz::proxy::bootstrap),
    ("ca_state", fuzz::ca::state),
    ("certificate", fuzz::ca::certificate),
    ("certificate_request", fuzz::ca::request),
    ("consul", fuzz::registry::consul),
    ("detect", fuzz::proxy::detect),
    ("dns_query", fuzz::agent::dns_query),
    ("dns_reply", fuzz::proxy::dns_reply),
    ("flood", fuzz::proxy::flood),
    ("format", fuzz::proxy::format),
    ("grpc_web", fuzz::proxy::grpc_web),
    ("headers", fuzz::proxy::headers),
    ("http1", fuzz::connection::http1),
    ("http2", fuzz::connection::http2),
    ("identity", fuzz::ca::identity),
    ("istio", fuzz::registry::istio),
    ("jwt", fuzz::proxy::jwt),
    ("log_entry", fuzz::istiod::command),
    ("log_file", fuzz::istiod::log),
    ("members", fuzz::wire::members),
    ("mesh_config", fuzz::registry::mesh),
    ("names", fuzz::agent::names),
    ("node", fuzz::xds::node),
    ("operator_text", fuzz::istiod::texts),
    ("path", fuzz::proxy::path),
    ("peer", fuzz::proxy::peer),
    ("pem", fuzz::ca::pem),
    ("proxy_protocol", fuzz::proxy::proxy_protocol),
    ("raft_message", fuzz::istiod::message),
    ("request_head", fuzz::proxy::request_head),
    ("resources", fuzz::proxy::resources),
    ("response", fuzz::proxy::response),
    ("stored_command", fuzz::registry::command),
    ("stored_state", fuzz::registry::state),
    ("xds_json", fuzz::wire::message),
    ("xds_stream", fuzz::xds::stream),
];

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    *TARGETS
        .iter()
        .find(|(known, _)| *known == name)
        .unwrap_or_else(|| panic!("FUZZ_TARGET={name} is no target"))
});

libfuzzer_sys::fuzz_target!(
    init: {
        if let Some(folder) = std::env::var_os("FUZZ_SEEDS") {
            fuzz::seeds::write(Path::new(&folder));
            std::process::exit(0);
        }
        LazyLock::force(&TARGET);
    },
    |bytes: &[u8]| (TARGET.1)(bytes)
);

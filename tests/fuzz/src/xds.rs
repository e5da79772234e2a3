//! What proxies send to the control plane.

use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use prost::Message as _;
use xds::proxy::Proxy;
use xds::stream::{Stream, Variant};

use crate::choice;

/// The node that a proxy says it is.
pub fn node(bytes: &[u8]) {
    let Ok(node) = Node::decode(bytes) else { return };
    let Ok(proxy) = Proxy::from_node(&node, None) else { return };
    assert_eq!(proxy.id, node.id);
    assert!(!proxy.name.is_empty() && !proxy.namespace.is_empty());
    assert!(!proxy.inbound_forward.contains_key(&0));
}

/// Requests on a stream, one after the other, each after its length: no order and no content of them breaks it.
pub fn stream(bytes: &[u8]) {
    let Some((form, mut rest)) = choice(bytes) else { return };
    let variant = if form & 1 == 0 { Variant::Delta } else { Variant::StateOfTheWorld };
    let mut stream = Stream::new(variant, form & 2 != 0);
    let mut now = Instant::now();
    while let Some(([length], tail)) = rest.split_first_chunk::<1>() {
        let (one, tail) = tail.split_at(usize::from(*length).min(tail.len()));
        rest = tail;
        now += Duration::from_millis(u64::from(*length));
        match variant {
            Variant::Delta => {
                let Ok(request) = DeltaDiscoveryRequest::decode(one) else { continue };
                drop(stream.on_delta(request, now));
            }
            Variant::StateOfTheWorld => {
                let Ok(request) = DiscoveryRequest::decode(one) else { continue };
                drop(stream.on_whole(request, now));
            }
        }
        drop(stream.on_view(Arc::default(), now));
        drop(stream.on_tick(now));
    }
    let _report = stream.report();
    assert!(stream.held().by_type.values().all(|of_type| of_type.is_empty()), "nothing was ever there");
}

//! xDS messages as JSON, and as canonical bytes.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};

use crate::{choice, text};

/// Encoded messages: their canonical form is canonical, says the same, and can be printed and read again.
pub fn message(bytes: &[u8]) {
    let Some((kind, rest)) = choice(bytes) else { return };
    match kind % 3 {
        0 => of::<Cluster>(rest),
        1 => of::<Listener>(rest),
        _ => of::<RouteConfiguration>(rest),
    }
}

fn of<M: Message + Name + Default + PartialEq>(bytes: &[u8]) {
    let name = M::full_name();
    let canonical = wire::canonical::bytes(&name, bytes);
    assert_eq!(wire::canonical::bytes(&name, &canonical), canonical);
    let Ok(message) = M::decode(bytes) else { return };
    let any = wire::canonical::any(&message);
    assert_eq!(wire::canonical::bytes(&name, &any.value), any.value);
    let Ok(again) = M::decode(&*any.value) else { panic!("the canonical form does not decode") };
    assert_eq!(again.encoded_len(), message.encoded_len());
    if let Ok(printed) = wire::json::message_to_json(&message)
        && let Ok(read) = wire::json::message_from_json::<M>(&printed)
    {
        let reprinted = wire::json::message_to_json(&read).expect("what was read can be printed");
        assert_eq!(reprinted, printed);
    }
    let _shown = wire::json::any_to_json(&Any { type_url: format!("t/{name}"), value: bytes.to_vec() });
}

/// Addresses of members, in a list in the metadata of an answer.
pub fn members(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    let mut metadata = tonic::metadata::MetadataMap::new();
    wire::members::tell(&mut metadata, [text]);
    if let Some(told) = wire::members::told(&metadata) {
        assert!(told.iter().all(|member| wire::members::is_address(member)));
    }
    let named: BTreeSet<&str> = text.split(',').collect();
    let order = wire::members::order(text, text.split(','));
    assert_eq!(order.into_iter().collect::<BTreeSet<_>>(), named);
}
